"""A real SLURM of one node: installed where it is missing, started and stopped for the tests."""

import getpass
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_PATIENCE = 180.0  # seconds for a job, on a busy machine
_HERE = Path(__file__).parent
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
_PACKAGES = ("munge", "slurmctld", "slurmd", "slurm-client")  # of Debian
_FILES = ("null", "zero")
_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


class Cluster:
    """A running cluster.

    Args:
        folder: Holds its configuration, state and logs.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # Without settings of an outer job or the defaults of the user.
        outer = ("SLURM", "SBATCH", "SRUN")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(outer)}
        self._environment = kept | {"PATH": _PATH, "SLURM_CONF": str(folder / "slurm.conf")}

    def ask(self, *words: object) -> str:
        """Run a program of SLURM and return what it says."""
        done = subprocess.run(
            list(map(str, words)),
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}{self.logs()}"
        return done.stdout.strip()

    def logs(self) -> str:
        """Return the last lines of what the daemons have written."""
        files = sorted(self._folder.glob("*.log"))
        return "\n".join(f"== {file.name}\n{_tail(file)}" for file in files)

    def submit(
        self, script: Path, argv: list[str], log: Path, *options: str, **environment: str
    ) -> "Job":
        """Submit a batch script from the checkout, as a user does.

        Args:
            script: The script.
            argv: What it hands to the program.
            log: Where its output goes.
            options: Options of sbatch that override those of the script.
            environment: Variables of the job.
        """
        words = ["sbatch", "--parsable", f"--chdir={ROOT}", f"--output={log}", *options]
        exported = ",".join(["ALL", *(f"{key}={value}" for key, value in environment.items())])
        number = self.ask(*words, f"--export={exported}", script, *argv)
        return Job(self, int(number), log)

    def cancel_all(self) -> None:
        """Cancel all jobs and wait for their end."""
        self.ask("scancel", f"--user={getpass.getuser()}")
        wait_until(lambda: not self.ask("squeue", "--noheader"), "the end of all jobs", self.logs)


class Job:
    """A submitted job.

    Args:
        cluster: Its cluster.
        number: Its number.
        log: Where its output goes.

    Attributes:
        number: Its number; that of the array, if it is one.
    """

    def __init__(self, cluster: Cluster, number: int, log: Path) -> None:
        self._cluster = cluster
        self.number = number
        self._log = log

    def warn(self) -> None:
        """Send its ranks the signal that SLURM sends before the time limit."""
        self._cluster.ask("scancel", "--signal=USR1", self.number)

    def fields(self) -> Mapping[str, str]:
        """Return what SLURM reports about it."""
        words = self._cluster.ask("scontrol", "show", "job", self.number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def output(self) -> str:
        """Return what it has written so far."""
        return self._log.read_text() if self._log.exists() else ""

    def wait(self, has_come: Callable[[], object], what: str) -> None:
        """Wait for something while it runs, and fail if it ends before."""

        def is_over() -> bool:
            if has_come():
                return True
            state = self.fields()["JobState"]
            assert state not in ("FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"), self.explain()
            return False

        wait_until(is_over, what, self.explain, _PATIENCE)

    def explain(self) -> str:
        """Return everything that may explain why it failed."""
        return f"{self.fields()}\n{self.output()}\n{self._cluster.logs()}"


def wait_until(
    is_true: Callable[[], object], what: str, explain: Callable[[], str], seconds: float = 60
) -> None:
    """Wait for something that must happen."""
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, f"waited {seconds:.0f} s for {what}\n{explain()}"
        time.sleep(0.1)


def install() -> None:
    """Install SLURM if it is missing, and skip the test if that fails."""
    if all(shutil.which(program, path=_PATH) for program in _PROGRAMS):
        return
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        pytest.skip("SLURM is not installed here, and only root can install it, on a Debian")
    _apt("update")
    _apt("install", "--yes", "--no-install-recommends", *_PACKAGES)


def _apt(*words: str) -> None:
    done = subprocess.run(
        ["apt-get", "--quiet", *words],
        env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    """Run a cluster for the duration of a ``with`` block."""
    install()
    # Not pytest's folder, which others may not enter: munged insists on that.
    folder = Path(tempfile.mkdtemp(prefix="grasp-slurm-"))
    folder.chmod(0o755)
    cluster, daemons = Cluster(folder), list[subprocess.Popen[bytes]]()
    try:
        _configure(folder)
        munge = {name: folder / f"munge.{name}" for name in ("socket", "key", "log", "pid", "seed")}
        words = [f"--{key if key == 'socket' else f'{key}-file'}={munge[key]}" for key in munge]
        daemons.append(_start("munged", "--foreground", *words))
        wait_until(munge["socket"].exists, "munged", cluster.logs)
        for name in ("slurmctld", "slurmd"):
            daemons.append(_start(name, "-D", "-f", str(folder / "slurm.conf")))
        wait_until(lambda: _is_idle(cluster), "an idle node", cluster.logs)
        yield cluster
        cluster.cancel_all()
    finally:
        for daemon in reversed(daemons):
            _stop(daemon)
        shutil.rmtree(folder)


def _configure(folder: Path) -> None:
    host = socket.gethostname().partition(".")[0]
    controller_port, node_port = _free_ports(2)
    text = (_HERE / "slurm.conf").read_text()
    values = {
        "host": host,
        "folder": folder,
        "user": getpass.getuser(),
        "controller_port": controller_port,
        "node_port": node_port,
        "first_job": 1000 + controller_port % 8000,
    }
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "slurm.conf").write_text(text.format(**values))
    # SLURM counts a GPU by its file, whatever that is.
    (folder / "gres.conf").write_text("".join(f"Name=gpu File=/dev/{it}\n" for it in _FILES))
    (folder / "munge.key").touch(0o600)
    (folder / "munge.key").write_bytes(os.urandom(128))


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [free.getsockname()[1] for free in sockets]
    finally:
        for free in sockets:
            free.close()


def _start(name: str, *words: str) -> subprocess.Popen[bytes]:
    program = shutil.which(name, path=_PATH)
    assert program is not None
    return subprocess.Popen(
        [program, *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C ends the test, which then ends the daemons in order
    )


def _stop(daemon: subprocess.Popen[bytes]) -> None:
    daemon.terminate()
    try:
        daemon.wait(timeout=20)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


def _is_idle(cluster: Cluster) -> bool:
    try:
        return cluster.ask("sinfo", "--noheader", "--format=%T") == "idle"
    except AssertionError:  # the controller does not answer yet
        return False


def _tail(file: Path) -> str:
    return "\n".join(file.read_text(errors="replace").splitlines()[-20:])
