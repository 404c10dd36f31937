"""The interface of the formats of ``export``."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from transformers import PreTrainedModel

from grasp_lightning.config import ExportConfig
from grasp_lightning.models.loading import LoadedModel
from grasp_lightning.models.verification import verify_saved

Track = Callable[[Sequence[str]], Iterable[str]]
"""Shows progress: names of linears -> the same names."""


@dataclass(frozen=True, kw_only=True)
class ExportFacts(ABC):
    """What a format wrote: the content of ``export.json``, and the values of its card."""

    @abstractmethod
    def lines(self, folder: Path) -> list[str]:
        """Return the text for the user; ``folder`` is the written one, as the user named it."""


class Format(ABC):
    """A way to write a compressed model for other programs, without state.

    The card is rendered from the template ``card_<name of the format>.md.jinja``.

    Attributes:
        facts: Class of what ``write`` returns.
        doing: Label of the progress bar.
        library: ``library_name`` of the card, by which the hub chooses its instructions.
        types: Values of the key ``type`` that this format has, the default first.
    """

    facts: ClassVar[type[ExportFacts]]
    doing: ClassVar[str]
    library: ClassVar[str] = "transformers"
    types: tuple[str, ...] = ()

    @abstractmethod
    def refusal(self, model: PreTrainedModel, options: ExportConfig) -> str | None:
        """Return why a model on the meta device cannot be written, as the rest of a sentence."""

    @abstractmethod
    def num_bytes(self, model: PreTrainedModel, options: ExportConfig) -> int:
        """Return the size of what is written; may change the model, which is on the meta device."""

    @abstractmethod
    def write(
        self, loaded: LoadedModel, folder: Path, options: ExportConfig, track: Track
    ) -> ExportFacts:
        """Write weights and tokenizer into an empty folder; may change the model."""

    def verify(self, loaded: LoadedModel, folder: Path, *, generates: bool) -> None:
        """Check what was written; ``generates`` says whether the model does, with its cache."""
        verify_saved(loaded.model, folder, generates=generates)
