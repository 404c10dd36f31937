"""The formats of ``export``: one file and one entry in the table each."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from transformers import PreTrainedModel

from grasp_lightning.models.checkpoint import save_model
from grasp_lightning.models.formats.dense import dense_refusal, densify


@dataclass(frozen=True, kw_only=True)
class Format:
    """A way to write a compressed model for runtimes without support for its layers.

    Attributes:
        refusal: Why a model cannot be converted, as the rest of a sentence; None if it can.
        convert: Converts a model in place, on the meta device too. Its second argument shows
            progress: names of linears -> the same names.
        doing: Label of the progress bar.
    """

    refusal: Callable[[PreTrainedModel], str | None]
    convert: Callable[[PreTrainedModel, Callable[[Sequence[str]], Iterable[str]]], object]
    doing: str
    save: Callable[..., None] = save_model


FORMATS: Final[Mapping[str, Format]] = MappingProxyType(
    {"dense": Format(refusal=dense_refusal, convert=densify, doing="multiplying factors")}
)
