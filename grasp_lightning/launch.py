"""Starts the processes of a run, or joins those of torchrun or srun."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO, NamedTuple

import grasp_lightning
from grasp_lightning.config import TrainerConfig
from grasp_lightning.errors import ConfigError
from grasp_lightning.starting import begin

_PARENT = "GRASP_LIGHTNING_PARENT"
_POLL = 0.1  # seconds
_GRACE = 5.0  # seconds for the first process to end and report its own error
_PATIENCE = 30.0  # seconds for a process to save its work
_FAILED = 1
_PROCESSES, _PROCESSES_PER_CORE = 16, 4  # more than any machine has GPUs


@contextmanager
def joined(
    trainer: TrainerConfig, device: str, command: str, argv: Sequence[str]
) -> Iterator[bool]:
    """Run a ``with`` block in as many processes as the configuration says.

    The process of the user does not run it: it starts the others with ``command`` and ``argv``,
    waits for them and exits.

    Yields:
        Whether this process speaks to the user: only rank 0 does.

    Raises:
        ConfigError: If there are too many processes for this machine, or several nodes were not
            started from outside.
        SystemExit: In the process that started others, with the exit code of the run.
    """
    _take_slurm_environment()
    if "RANK" not in os.environ:
        end_with_parent()
        if trainer.devices * trainer.num_nodes == 1:
            yield True
            return
        if trainer.num_nodes > 1:
            raise ConfigError(
                f"trainer.num_nodes is {trainer.num_nodes}: start the command on every node, with "
                "torchrun or srun"
            )
        check_number(trainer.devices)
        begin()
        raise SystemExit(_launch(command, argv, trainer.devices))
    with among_started(device) as speaks:
        yield speaks


@contextmanager
def among_started(device: str) -> Iterator[bool]:
    """Run a ``with`` block in every process that torchrun or srun has started.

    Yields:
        Whether this process is rank 0; a single process always is.
    """
    _take_slurm_environment()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield True
        return
    # Imported here: a process that only starts others does not need it.
    from grasp_lightning import processes  # noqa: PLC0415
    from grasp_lightning.models.device import resolve_device  # noqa: PLC0415

    end_with_parent()
    processes.join(resolve_device(device))
    try:
        yield processes.is_first()
    finally:
        processes.leave()


def _take_slurm_environment() -> None:
    """Set the variables of torchrun from those of srun."""
    # Only steps that srun has started have this number, not the batch script itself.
    number = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in os.environ or int(number) == 1:
        return
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment  # noqa: PLC0415

    slurm = SLURMEnvironment(auto_requeue=False)
    os.environ |= {
        "RANK": os.environ["SLURM_PROCID"],
        "LOCAL_RANK": os.environ["SLURM_LOCALID"],
        "NODE_RANK": os.environ["SLURM_NODEID"],
        "WORLD_SIZE": number,
        "MASTER_ADDR": slurm.main_address,
        "MASTER_PORT": str(slurm.main_port),
    }


class _Child(NamedTuple):
    """A started process; rank 0 writes to the user's standard error, so its ``errors`` is None."""

    rank: int
    process: subprocess.Popen[bytes]
    errors: IO[bytes] | None


def check_number(devices: int) -> None:
    """Refuse more processes than this machine can run; each counts its GPUs later."""
    cores = os.cpu_count() or 1
    most = max(_PROCESSES, _PROCESSES_PER_CORE * cores)
    if devices > most:
        raise ConfigError(
            f"trainer.devices is {devices}, but this machine has {cores} cores: expected one "
            f"process per GPU, and no more than {most}"
        )


def _launch(command: str, argv: Sequence[str], number: int) -> int:
    words = [sys.executable, "-m", "grasp_lightning", command, *argv]
    environment = _environment(number)
    children: list[_Child] = []
    try:
        for rank in range(number):
            own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            # Other ranks print the same as rank 0; their output is shown only if they fail alone.
            errors = None if rank == 0 else tempfile.TemporaryFile()  # noqa: SIM115
            process = subprocess.Popen(
                words,
                env=own,
                stdout=None if rank == 0 else subprocess.DEVNULL,
                stderr=errors,
                start_new_session=True,  # Ctrl-C arrives here and is passed on once
            )
            children.append(_Child(rank, process, errors))
        with _passing_signals_on(children):
            return _wait(children)
    finally:
        for child in children:
            child.process.kill()
            child.process.wait()


def _environment(number: int) -> Mapping[str, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threads = str(max((os.cpu_count() or 1) // number, 1))
    return {
        "OMP_NUM_THREADS": threads,
        **child_environment(),
        "WORLD_SIZE": str(number),
        "LOCAL_WORLD_SIZE": str(number),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def child_environment() -> dict[str, str]:
    """Return the environment of a process that runs this package and calls ``end_with_parent``."""
    root = str(Path(grasp_lightning.__file__).parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), _PARENT: str(os.getpid())}


@contextmanager
def _passing_signals_on(children: Sequence[_Child]) -> Iterator[None]:
    def pass_on(number: int, frame: FrameType | None) -> None:
        del frame
        for child in children:
            child.process.send_signal(number)

    is_main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1) if is_main else ()
    earlier = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _wait(children: Sequence[_Child]) -> int:
    """Return 0 if all processes succeed; at the first failure, end the others and report it."""
    failed = None
    while failed is None and any(child.process.poll() is None for child in children):
        failed = next((child for child in children if child.process.poll()), None)
        time.sleep(_POLL)
    failed = failed or next((child for child in children if child.process.poll()), None)
    if failed is None:
        return 0
    first = children[0].process
    _wait_for([first], _GRACE)
    speaks_itself = (first.poll() or 0) > 0
    for child in children:
        if child.process.poll() is None:
            child.process.terminate()
    _wait_for([child.process for child in children], _PATIENCE)
    code = failed.process.poll()
    assert code is not None  # it has failed
    if code > _FAILED and speaks_itself:
        return first.poll() or code
    sys.stderr.write(f"error: {_what_happened(failed, len(children))}\n")
    return max(_FAILED, code)


def _wait_for(waited: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(process.poll() is None for process in waited):
        time.sleep(_POLL)


def _what_happened(child: _Child, number: int) -> str:
    code = child.process.poll() or 0
    end = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    text = ""
    if child.errors is not None:
        child.errors.seek(0)
        lines = child.errors.read().decode(errors="replace").strip().splitlines()
        text = f" ({lines[-1].removeprefix('error: ')})" if lines else ""
    return (
        f"process {child.rank} of {number} {end}{text}, and the others were stopped; run the same "
        "command again without --overwrite: it resumes from what was saved, if anything"
    )


def end_with_parent() -> None:
    """Save and end once the process that started this one from ``child_environment`` has died."""
    parent = os.environ.pop(_PARENT, None)  # the processes that this one starts have another
    if parent is None:
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
