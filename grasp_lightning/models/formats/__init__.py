"""The formats of ``export``: one file each, and one entry in the table."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from transformers import PreTrainedModel

from grasp_lightning.models.checkpoint import save_model
from grasp_lightning.models.formats.dense import dense_refusal, densify


@dataclass(frozen=True, kw_only=True)
class Format:
    """A way to write a compressed model for runtimes that know none of its layers.

    Attributes:
        refusal: Why a model cannot be written so, as the rest of a sentence; None if it can.
        convert: Changes a model in place into what is written; the meta device will do. Its second
            argument shows progress: names of linears -> the same names.
        doing: What it does, for the progress bar.
        save: Writes the model, as ``save_model`` does.
    """

    refusal: Callable[[PreTrainedModel], str | None]
    convert: Callable[[PreTrainedModel, Callable[[Sequence[str]], Iterable[str]]], object]
    doing: str
    save: Callable[..., None] = save_model


FORMATS: Final[Mapping[str, Format]] = MappingProxyType(
    {"dense": Format(refusal=dense_refusal, convert=densify, doing="multiplying factors")}
)
