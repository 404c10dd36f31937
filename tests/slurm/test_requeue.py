"""The shipped batch scripts on a real SLURM: a job that is warned resumes and loses nothing."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from grasp_lightning.cli import main
from tests.conftest import save_tiny
from tests.integration.compensation import compensate_argv, compressed_folder
from tests.slurm.cluster import ROOT, Cluster, Job

pytestmark = pytest.mark.slurm

WINDOWS = 600  # small ones: some seconds of a pass, most of which is left after the signal
SCRIPTS = ROOT / "configs" / "slurm"


@pytest.fixture(scope="module")
def compression(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [
        f"--model.path={save_tiny(tmp_path_factory.mktemp('model') / 'tiny')}",
        "--model.device=cpu",
        "--method.name=grasp",
        "--method.num_layers=2",
        "--method.keep_ratio=0.3",
        "--calibration.source=pydoc",
        f"--calibration.num_samples={WINDOWS}",
        "--calibration.seqlen=128",
        "--evaluation.source=pydoc",
        "--evaluation.num_samples=2",
        "--evaluation.seqlen=32",
        "--trainer.checkpoint_seconds=1000",  # only the signal causes a save
    ]


@pytest.fixture(scope="module")
def compressed(compression: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert main(["compress", *compression, f"--output_dir={folder}"]) == 0
    return folder


def submit(cluster: Cluster, command: str, argv: list[str], folder: Path, *options: str) -> Job:
    (folder / "scratch").mkdir()
    return cluster.submit(
        SCRIPTS / f"{command}.sbatch",
        [*argv, f"--output_dir={folder / 'run'}"],
        folder / "job.log",
        "--cpus-per-task=1",
        *options,
        PYTHON=sys.executable,
        TMPDIR=str(folder / "scratch"),
    )


def warn(job: Job) -> None:
    """Warn a running job, and wait until it is requeued."""
    job.warn()
    job.wait(lambda: job.fields()["JobState"] == "PENDING", "the queue")
    assert job.fields()["Restarts"] == "1", job.explain()


def assert_ends_well(job: Job) -> None:
    job.wait(lambda: job.fields()["JobState"] == "COMPLETED", "the end")
    assert job.fields()["Restarts"] == "1"
    assert job.output().count("start 0 of job") == job.output().count("start 1 of job") == 1
    assert job.output().count("was requeued") == 1, job.output()
    assert job.output().count("model:  ") == 1, job.output()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_warned_compression_resumes_and_counts_each_window_once(
    ranks: int, cluster: Cluster, compression: list[str], compressed: Path, tmp_path: Path
) -> None:
    argv = [*compression, "--overwrite=true"]  # which counts only at the first start
    job = submit(cluster, "compress", argv, tmp_path, f"--ntasks-per-node={ranks}")
    # The log of the attribution pass.
    log = "*/pass_1/metrics.csv"
    job.wait(lambda: list((tmp_path / "scratch").glob(log)), "the attribution pass")
    warn(job)
    saved = list((tmp_path / "run" / "checkpoints").glob("pass-*.safetensors"))
    windows = [window for file in saved for window in load_file(file)["windows"].tolist()]
    assert len(saved) == ranks, job.explain()
    assert 0 < len(windows) < WINDOWS
    assert len(windows) == len(set(windows))
    assert_ends_well(job)
    assert (tmp_path / "run" / "plan.json").read_bytes() == (compressed / "plan.json").read_bytes()
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_warned_training_resumes_to_the_same_weights(cluster: Cluster, tmp_path: Path) -> None:
    argv = [
        *compensate_argv(compressed_folder(tmp_path), tmp_path),
        "--model.device=cpu",
        "--lora.rank=4",
        "--training.epochs=40",
        "--training.validate_every=50",
        "--trainer.checkpoint_seconds=1000",
    ]
    folder = tmp_path / "job"
    folder.mkdir()
    job = submit(cluster, "compensate", [*argv, "--overwrite=true"], folder)
    # Written every ten steps.
    job.wait((folder / "run" / "logs" / "start_1" / "metrics.csv").exists, "the training")
    warn(job)
    assert (folder / "run" / "checkpoints" / "last.ckpt").is_file(), job.explain()
    assert_ends_well(job)
    assert main(["compensate", *argv, f"--output_dir={tmp_path / 'whole'}"]) == 0
    left, right = (
        load_file(run / "model" / "model.safetensors")
        for run in (folder / "run", tmp_path / "whole")
    )
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)
