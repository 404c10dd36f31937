"""A compressed tiny model, and samples to train it on."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from grasp_lightning.cli import main
from tests.conftest import save_tiny

# A small compression.
CUT = (
    "--method.name=grasp",
    "--method.num_layers=1",
    "--method.keep_ratio=0.5",
    "--calibration.source=pydoc",
    "--calibration.num_samples=4",
    "--calibration.seqlen=32",
    "--evaluation.source=pydoc",
    "--evaluation.num_samples=2",
    "--evaluation.seqlen=32",
)


def metrics_of(folder: Path) -> dict:
    """Return the metrics of a run folder."""
    content: dict = json.loads((folder / "metrics.json").read_text())
    return content


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the saved weights of a run folder."""
    return load_file(folder / "model" / "model.safetensors")


def assert_equal_models(first: Path, second: Path) -> None:
    """Check that two run folders have the same weights, bit for bit."""
    left, right = weights(first), weights(second)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


def compressed_folder(folder: Path, family: str = "llama") -> Path:
    """Compress a tiny model, and return the folder of the result."""
    model = save_tiny(folder / "tiny", family, max_position_embeddings=256)
    argv = [f"--model.path={model}", *CUT, f"--output_dir={folder / 'run'}"]
    assert main(["compress", *argv]) == 0
    return folder / "run" / "model"


def write_samples(file: Path, count: int = 30) -> Path:
    """Write instructions with answers of unequal length."""
    samples = [
        {"instruction": f"say {n}", "input": "x" if n % 2 else "", "output": "word " * (1 + n % 5)}
        for n in range(count)
    ]
    file.write_text("\n".join(json.dumps(sample) for sample in samples), encoding="utf-8")
    return file


def compensate_argv(model: Path, folder: Path) -> list[str]:
    """Return options of a training of 6 steps per epoch, all but its output folder."""
    return [
        f"--model.path={model}",
        "--data.source=file",
        f"--data.path={write_samples(folder / 'samples.jsonl')}",
        "--data.num_validation=6",
        "--data.max_length=250",
        "--training.batch_size=4",
        "--training.micro_batch_size=3",
        "--optimizer.learning_rate=0.003",
        "--optimizer.warmup_steps=1",
        "--evaluation.source=pydoc",
        "--evaluation.num_samples=2",
        "--evaluation.seqlen=32",
    ]
