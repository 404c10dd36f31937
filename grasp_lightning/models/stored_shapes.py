"""The shapes in the weight files of a Hugging Face folder."""

from pathlib import Path

from grasp_lightning.errors import ModelError
from grasp_lightning.models.weight_files import ADVICE, fault, weight_files
from grasp_lightning.reading.tensors import read_shapes


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor in the weight files of a folder, from their headers."""
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files(folder):
        shapes |= read_shapes(file, ModelError, fault(file), ADVICE)
    return shapes
