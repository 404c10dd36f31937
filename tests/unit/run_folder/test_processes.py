import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import grasp_lightning
from grasp_lightning.run_folder.folder import RunFolder
from tests.unit.run_folder.helpers import CONFIG, changed, content, refusal

# The package's own __init__ registers the model format with transformers, which takes seconds; it
# is left out in the processes that these tests start.
LIGHT = f"""
import sys, types
package = types.ModuleType("grasp_lightning")
package.__path__ = [{str(Path(grasp_lightning.__file__).parent)!r}]
sys.modules["grasp_lightning"] = package
"""
WRITER = """
from grasp_lightning.run_folder.folder import RunFolder
config = {config!r}
run = RunFolder.open(sys.argv[1], config, overwrite="overwrite" in sys.argv)
run.write_text("plan.json", "complete")
def half(path):
    path.write_text("half")
    print("ready", flush=True)
    sys.stdin.read()
{act}
"""
HALF_FILE = 'run.write_with("scores.safetensors", half)'
HALF_FOLDER = """
with run.new_folder("model") as folder:
    half(folder / "config.json")
"""
FINISHED = 'run.finish(); half(run.root.parent / "beside")'


@pytest.fixture
def start_writer(root: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start another process that writes a run; return when part of it is half written."""
    started: list[subprocess.Popen[str]] = []

    def start(act: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", LIGHT + WRITER.format(config=CONFIG, act=act), str(root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def kill(process: subprocess.Popen[str]) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def test_a_second_process_is_refused_while_the_first_one_lives(
    root: Path, start_writer: Callable[..., subprocess.Popen[str]]
) -> None:
    process = start_writer(HALF_FILE)

    for overwrite in (False, True):
        assert f"another process is writing to {root}" in refusal(root, overwrite=overwrite)
    assert (root / "plan.json").read_text() == "complete"

    kill(process)
    assert RunFolder.open(root, CONFIG).state == "unfinished"


@pytest.mark.parametrize("act", [HALF_FILE, HALF_FOLDER])
def test_a_killed_run_is_unfinished_and_its_half_written_part_is_deleted(
    root: Path, act: str, start_writer: Callable[..., subprocess.Popen[str]]
) -> None:
    kill(start_writer(act))

    with RunFolder.open(root, CONFIG) as run:
        assert run.state == "unfinished"
        assert set(content(root)) == {"config.yaml", "plan.json", "manifest.json", ".lock"}
        run.write_text("scores.safetensors", "whole")
        with run.new_folder("model") as folder:
            (folder / "config.json").write_text("whole")
        run.discard()
    assert content(root) == {}


def test_a_run_killed_after_its_end_is_finished(
    root: Path, start_writer: Callable[..., subprocess.Popen[str]]
) -> None:
    kill(start_writer(FINISHED))

    assert RunFolder.open(root, CONFIG).state == "finished"


STOP_EVERYWHERE = """
import os, shutil, sys
from pathlib import Path
from grasp_lightning.errors import OutputError
from grasp_lightning.run_folder.folder import RunFolder

config, other = {config!r}, {other!r}
WHOLE = ["config.yaml", "manifest.json", "model/config.json", "plan.json"]
CHANGES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")

def whole_run(root):
    with RunFolder.open(root, config) as run:
        run.write_text("plan.json", "plan")
        run.write_text("checkpoints/a.ckpt", "state")
        with run.new_folder("model") as folder:
            (folder / "config.json").write_text("model")
        run.remove("checkpoints/a.ckpt")
        run.finish()

def start_over(root):
    RunFolder.open(root, other, overwrite=True).close()

def killed_at(step, work, root):
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    seen = 0
    def audit(event, arguments):
        nonlocal seen
        # A folder is opened by its path, and what is in it by its name.
        if event in CHANGES:
            seen += 1
            if seen == step:
                os._exit(9)
    sys.addaudithook(audit)
    work(root)
    os._exit(0)

base = Path(sys.argv[1])
for name, work in (("run", whole_run), ("over", start_over)):
    step, killed = 0, True
    while killed:
        step += 1
        root = base / name / str(step)
        if work is start_over:
            whole_run(root)
        killed = killed_at(step, work, root)
        for leftover in root.rglob("*.json"):
            assert leftover.name.startswith(".partial") or leftover.read_text(), leftover
        try:
            run = RunFolder.open(root, config if work is whole_run else other)
            state = run.state
        except OutputError as error:
            assert work is start_over and "contains a run (finished)" in str(error), error
            assert all((root / name).is_file() for name in WHOLE), "deleted before it was marked"
            state = "untouched"
        if work is whole_run and state != "finished":
            run.close()
            whole_run(root)
            found = sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())
            assert found == WHOLE, found
        elif state in ("new", "unfinished"):
            run.close()
        print(name, step, state, flush=True)
"""


def test_a_run_killed_at_any_change_of_the_disk_is_never_mistaken(tmp_path: Path) -> None:
    script = LIGHT + STOP_EVERYWHERE.format(config=CONFIG, other=changed(keep_ratio=0.5))
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    states: dict[str, list[str]] = {"run": [], "over": []}
    for line in done.stdout.splitlines():
        name, _, state = line.split()
        states[name].append(state)
    run, over = states["run"], states["over"]
    assert run == sorted(run, key=["new", "unfinished", "finished"].index)
    assert run.count("unfinished") > 20
    assert over == sorted(over, key=["untouched", "new", "unfinished"].index)
    assert over.count("new") > 5
    assert over[-1] == "unfinished"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "x"


def test_the_run_folder_itself_needs_no_torch() -> None:
    code = LIGHT + (
        "import grasp_lightning.run_folder\n"
        "print(sorted({'torch', 'transformers', 'lightning'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "[]\n"
