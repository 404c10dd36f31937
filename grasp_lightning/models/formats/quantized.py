"""Quantized weights: the linears of a compressed model in int8, int4 or NF4."""

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from transformers import PreTrainedModel

from grasp_lightning.config import ExportConfig
from grasp_lightning.models.checkpoint import foreign_quantizer, save_quantized
from grasp_lightning.models.formats.base import ExportFacts, Format, Track
from grasp_lightning.models.loading import LoadedModel
from grasp_lightning.models.lowrank import is_quantized_here
from grasp_lightning.models.quantization import (
    LIBRARIES,
    QUANTIZED_FORMAT,
    Kind,
    quantization_problem,
    quantize_model,
)
from grasp_lightning.models.seams import computation_refusal
from grasp_lightning.models.size import count_bytes


@dataclass(frozen=True, kw_only=True)
class NumBytes:
    """Bytes of all tensors of the copy (quantized) and of the compressed model."""

    quantized: int
    compressed: int


@dataclass(frozen=True, kw_only=True)
class QuantizedFacts(ExportFacts):
    """What a quantized format wrote.

    Attributes:
        type: Type of the weights.
        library: Package that reads them.
        num_linears: Number of quantized matrices; a low-rank linear has two.
        dtype: Type of everything else.
        needs_format: Whether the folder opens only with grasp_lightning or its own code.
    """

    type: str
    library: str
    num_linears: int
    bytes: NumBytes
    dtype: str
    needs_format: bool

    def lines(self, folder: Path) -> list[str]:
        """Return what was quantized, and the path of the copy."""
        first = (
            f"{self.num_linears} matrices in {self.type}: {self.bytes.quantized / 1e6:,.1f} MB, "
            f"the compressed model has {self.bytes.compressed / 1e6:,.1f} MB"
        )
        return [first, f"model:  {folder}"]


class QuantizedFormat(Format):
    """The linears of a compressed model with quantized weights, as a Hugging Face folder.

    Args:
        *types: Types of one library, the default first.
    """

    facts = QuantizedFacts
    doing = "quantizing"

    def __init__(self, *types: Kind) -> None:
        self.types = types

    def refusal(self, model: PreTrainedModel, options: ExportConfig) -> str | None:
        """Return that a model is quantized already, or the library is missing."""
        foreign = foreign_quantizer(model)
        if foreign is not None:
            return f"is quantized with {foreign} already: export the unquantized model"
        refusal = computation_refusal(model, QUANTIZED_FORMAT)
        if refusal is not None:
            return refusal
        problem = quantization_problem(self._type(options), "cpu")
        return None if problem is None else f"cannot be quantized: {problem}"

    def num_bytes(self, model: PreTrainedModel, options: ExportConfig) -> int:
        """Return the bytes of the unquantized weights, which are more than is written."""
        del options
        return count_bytes(model)

    def write(
        self, loaded: LoadedModel, folder: Path, options: ExportConfig, track: Track
    ) -> QuantizedFacts:
        """Quantize the model and write a Hugging Face folder."""
        model, kind = loaded.model, self._type(options)
        before = count_bytes(model)
        names = quantize_model(model, kind, track)
        save_quantized(model, folder, tokenizer=loaded.tokenizer)
        return QuantizedFacts(
            type=kind,
            library=LIBRARIES[kind],
            num_linears=len(names),
            bytes=NumBytes(quantized=count_bytes(model), compressed=before),
            dtype=str(model.dtype).removeprefix("torch."),
            needs_format=is_quantized_here(model),
        )

    def _type(self, options: ExportConfig) -> Kind:
        return cast(Kind, options.type or self.types[0])
