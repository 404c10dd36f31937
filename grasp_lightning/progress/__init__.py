"""Progress of a run on the terminal. It imports no torch."""

from grasp_lightning.progress.bars import (
    PassBar,
    RunBar,
    expect_passes,
    expect_work,
    pass_bar,
    skip_pass,
    track,
)
from grasp_lightning.progress.estimate import Stage, Work

__all__ = [
    "PassBar",
    "RunBar",
    "Stage",
    "Work",
    "expect_passes",
    "expect_work",
    "pass_bar",
    "skip_pass",
    "track",
]
