"""Requeues a SLURM job that has to end, after its work was saved."""

import logging
import os
import signal
import subprocess
from typing import Final

logger = logging.getLogger(__name__)

REQUEUE_SIGNAL: Final = signal.SIGUSR1
_JOB = "SLURM_JOB_ID"


def is_slurm_job() -> bool:
    """Return whether this process runs inside a SLURM job."""
    return _JOB in os.environ


def job_name() -> str:
    """Return the SLURM job id of this process, ARRAY_TASK for an array, empty outside of a job."""
    # The job id of an array's last task is also that of the whole array.
    array, task = (os.environ.get(f"SLURM_ARRAY_{part}_ID") for part in ("JOB", "TASK"))
    return os.environ.get(_JOB, "") if array is None else f"{array}_{task}"


def is_requeued() -> bool:
    """Return whether SLURM has already started and requeued the job of this process."""
    return is_slurm_job() and os.environ.get("SLURM_RESTART_COUNT", "0") != "0"


def requeue_job() -> str | None:
    """Requeue the job of this process; rank 0 does it for all ranks.

    SLURM then sends SIGTERM to every process of the job, including this one and ``scontrol``, and
    SIGKILL after a while (``KillWait``, 30 seconds by default), in which other ranks may still
    save. Therefore SIGTERM and the signal itself are ignored from here on: call it last, in a
    process that is about to end.

    Returns:
        Why the job was not requeued, in one line; None if it was, or on another rank.
    """
    for number in (signal.SIGTERM, REQUEUE_SIGNAL):
        signal.signal(number, signal.SIG_IGN)  # scontrol inherits this, unlike a handler
    if _rank() != 0:
        return None
    job = job_name()
    try:
        done = subprocess.run(
            ["scontrol", "requeue", job], capture_output=True, text=True, check=False
        )
    except OSError as error:
        return f"scontrol requeue {job}: {error.strerror}"
    if done.returncode != 0:
        said = " ".join((done.stderr or done.stdout).split())
        return f"scontrol requeue {job}: {said or f'exit code {done.returncode}'}"
    logger.warning("job %s was requeued", job)
    return None


def _rank() -> int:
    # Processes that this program or torchrun has started share the number that srun gave.
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
