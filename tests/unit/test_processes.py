import os
import socket
import subprocess
import sys
import textwrap

import pytest
import torch

from grasp_lightning import processes
from grasp_lightning.data import windows
from grasp_lightning.data.windows import TokenWindows


@pytest.mark.parametrize("count", [1, 2, 5, 6, 7])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_process_has_as_many_batches_and_every_item_counts_once(
    count: int, size: int, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "num_processes", lambda: world)
    shares = []
    for rank in range(world):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        shares.append(processes.own_batches(range(count), size))
    assert len({len(share) for share in shares}) == 1
    counted = [item for share in shares for batch, counts in share if counts for item in batch]
    assert sorted(counted) == list(range(count))
    assert all(1 <= len(batch) <= size for share in shares for batch, _ in share)


def test_a_batch_for_company_has_no_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "num_processes", lambda: 2)
    monkeypatch.setattr(processes, "rank", lambda: 1)
    ids = torch.arange(12).view(3, 4)
    held_out = TokenWindows(ids, ids >= 0, ids % 4 > 0)
    own, company = windows.own_micro_batches(held_out, 1)
    assert torch.equal(own["input_ids"], ids[1:2])
    assert torch.equal(own["targets"], held_out.targets[1:2])
    assert torch.equal(own["position_ids"], torch.arange(4)[None])
    assert not company["targets"].any()
    assert company["mask"].all()


# Seen in a separate process; ``late`` is freed when the interpreter shuts down.
ENDING = textwrap.dedent("""
    import atexit, os, sys, threading, time
    import torch
    from grasp_lightning import cli, processes

    class Late:
        def __del__(self, write=os.write):
            write(1, b"apart ")

    def speak():
        time.sleep(0.2)
        print("thread", end=" ")

    def main(argv):
        if argv == ["fault"]:
            raise ValueError("the cause")
        return 3

    late = Late()
    late.itself = late
    atexit.register(print, "handler", end=" ")
    if sys.argv[1] != "alone":
        processes.join(torch.device("cpu"))
    if sys.argv[1] == "left":
        processes.leave()
    threading.Thread(target=speak).start()
    cli.main = main
    cli.run_program(sys.argv[1:])
""")


@pytest.mark.parametrize(
    ("how", "code", "says"),
    [
        ("alone", 3, "thread handler apart"),
        ("left", 3, "thread handler"),
        ("joined", 3, "thread handler"),
        ("fault", 1, "thread handler"),
    ],
)
def test_a_member_of_a_group_ends_without_taking_its_interpreter_apart(
    how: str, code: int, says: str
) -> None:
    world = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run(
        [sys.executable, "-c", ENDING, how],
        env={**os.environ, **world},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert sorted(done.stdout.split()) == sorted(says.split())
    assert ("ValueError: the cause" in done.stderr) == (how == "fault")


# Rank 1 has ended when rank 0 reports that a signal ended it, too.
INTERRUPTED = textwrap.dedent("""
    import sys, time
    import torch
    from grasp_lightning import processes
    from grasp_lightning.errors import Interrupted

    def work():
        time.sleep(1)
        raise Interrupted(15)

    processes.join(torch.device("cpu"))
    processes.barrier()
    if processes.rank() == 1:
        processes.gather(1) if sys.argv[1] == "in_turns" else None  # the turns are counted first
        processes.end(0)
    try:
        getattr(processes, sys.argv[1])(work)
    except Interrupted:
        processes.end(143)
""")


@pytest.mark.slow
@pytest.mark.parametrize("function", ["on_first", "in_turns"])
def test_a_signal_counts_where_the_others_have_ended_by_it_already(function: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    first, second = (
        subprocess.Popen(
            [sys.executable, "-c", INTERRUPTED, function],
            env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    )
    assert second.wait(60) == 0
    _, errors = first.communicate(timeout=60)
    assert first.returncode == 143, errors
