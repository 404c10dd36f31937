"""Weights in the pattern 2:4 without their zeros, for NVIDIA GPUs."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from grasp_lightning.config import ExportConfig
from grasp_lightning.errors import ModelError
from grasp_lightning.models.checkpoint import foreign_quantizer
from grasp_lightning.models.formats.base import ExportFacts, Format, Track
from grasp_lightning.models.loading import LoadedModel
from grasp_lightning.models.lowrank import has_replaced
from grasp_lightning.models.seams import seam_refusal
from grasp_lightning.models.semi_sparse import (
    POSITIONS,
    device_problem,
    open_2_4,
    semi_sparse_problem,
    semi_sparse_tensors,
)
from grasp_lightning.models.size import count_bytes

_TOLERANCE = 0.05  # of logits in 16 bits, as a share of the largest


@dataclass(frozen=True, kw_only=True)
class StoredBytes:
    """Bytes of all tensors of the copy (sparse) and of the compressed model."""

    sparse: int
    compressed: int


@dataclass(frozen=True, kw_only=True)
class SemiSparseFacts(ExportFacts):
    """What the format ``2_4`` wrote.

    Attributes:
        num_linears: Number of linears in 2:4 form.
        dtype: Type of all weights.
    """

    num_linears: int
    bytes: StoredBytes
    dtype: str

    def lines(self, folder: Path) -> list[str]:
        """Return the sizes, and the path of the copy."""
        first = (
            f"{self.num_linears} linears in 2:4 form: {self.bytes.sparse / 1e6:,.1f} MB, the "
            f"compressed model has {self.bytes.compressed / 1e6:,.1f} MB"
        )
        return [first, f"model:  {folder}"]


class SemiSparseFormat(Format):
    """The linears of a 2:4 model as values and positions, which torch computes on NVIDIA GPUs."""

    facts = SemiSparseFacts
    doing = "packing"

    def refusal(self, model: PreTrainedModel, options: ExportConfig) -> str | None:
        """Return that device, shapes or dtype do not fit, or that the linears were replaced."""
        del options
        problem = device_problem()
        if problem is not None:
            return f"cannot be stored in 2:4 form here: {problem}; the folder itself opens anywhere"
        foreign = foreign_quantizer(model)
        if foreign is not None:
            return f"is quantized with {foreign} already: export the unquantized model"
        if has_replaced(model):
            return "has low-rank or narrowed linears: 2:4 needs a model of wanda or sparsegpt"
        return seam_refusal(model, "2:4 weights") or semi_sparse_problem(model)

    def num_bytes(self, model: PreTrainedModel, options: ExportConfig) -> int:
        """Return the bytes of the weights with their zeros, which are more than is written."""
        del options
        return count_bytes(model)

    def write(
        self, loaded: LoadedModel, folder: Path, options: ExportConfig, track: Track
    ) -> SemiSparseFacts:
        """Write config, tokenizer and one weight file."""
        del options, track
        model = loaded.model
        tensors = semi_sparse_tensors(model)
        model.config.save_pretrained(folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return SemiSparseFacts(
            num_linears=sum(name.endswith(POSITIONS) for name in tensors),
            bytes=StoredBytes(
                sparse=sum(tensor.nbytes for tensor in tensors.values()),
                compressed=count_bytes(model),
            ),
            dtype=str(model.dtype).removeprefix("torch."),
        )

    def verify(self, loaded: LoadedModel, folder: Path, *, generates: bool) -> None:
        """Open the copy on the GPU, and compare its logits with those of the ordinary weights."""
        del generates
        ids = torch.arange(16, device="cuda")[None]
        loaded.model.to("cuda")  # type: ignore[arg-type]  # transformers wraps it too narrowly
        with torch.no_grad():
            found, expected = (m(ids).logits.float() for m in (open_2_4(folder), loaded.model))
        difference = float((found - expected).abs().max() / expected.abs().max())
        if not difference <= _TOLERANCE:
            raise ModelError(
                "the model with 2:4 weights computes other logits: they differ by "
                f"{difference:.3f} of the largest, at most {_TOLERANCE} is rounding; it is not kept"
            )
