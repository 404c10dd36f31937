"""The interface of a method: a pure function of the model, the plan so far, and statistics."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from torch import Tensor

from grasp_lightning.config import AmountOptions, MethodConfig, MethodOptions, RefitChoice
from grasp_lightning.methods.prediction import Prediction
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.plan import Operation, OptionValue, Plan
from grasp_lightning.stats.base import Statistics, Step

REFIT_PULL: Final = 1.0
"""Pull of a refit towards the truncated tensors, where the user has set none."""

Track = Callable[[Sequence[str], str], Iterable[str]]
"""Shows progress: (items, description) -> the same items."""


def untracked(items: Sequence[str], description: str) -> Iterable[str]:
    """Return the items unchanged and show no progress."""
    del description
    return items


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """The outcome of one step.

    Attributes:
        operations: Changes to the model, in order.
        tensors: Factors for the operations, as ``<module>.left`` and ``<module>.right``.
        scores: The basis of the decision, stored for re-cutting and reports.
        refit: How the tensors are refitted before the operations are applied.
        refit_pull: Cost of a change of a linear's outputs by the refit, relative to their error.
    """

    operations: tuple[Operation, ...]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    refit: RefitChoice = "none"
    refit_pull: float = REFIT_PULL


class CompressionMethod(ABC):
    """A method returns operations as data and keeps no state, so a run resumes from its plan.

    Attributes:
        name: Its ``method.name``.
        reference: Its publication.
        skips_parts: Its measurements run the model without single layers or blocks.
    """

    name: str
    reference: str
    skips_parts: bool = False

    @property
    @abstractmethod
    def options(self) -> Mapping[str, OptionValue]:
        """The options that decisions depend on, for the plan."""

    @abstractmethod
    def next_step(self, model: DecoderView, plan: Plan) -> Step | None:
        """Return what to measure and decide next, or None when the plan is complete.

        All operations of the plan are applied to the model already.
        """

    @abstractmethod
    def decide(self, step: Step, model: DecoderView, stats: Statistics) -> Decision:
        """Return the operations that follow from a measurement of the model; must not change it."""

    @abstractmethod
    def predict(self, view: DecoderView) -> Prediction:
        """Return sizes before and after, from shapes alone; weights may be on the meta device."""


def no_obstacle(config: MethodConfig) -> str | None:
    """Return None: one decoder layer at a time is enough, with any options."""
    del config
    return None


@dataclass(frozen=True, kw_only=True, slots=True)
class Registered:
    """A method that configurations name.

    Attributes:
        name: Its ``method.name``.
        options: The keys it reads. Methods of this package list theirs in ``METHOD_OPTIONS``.
        ignores: Why the keys of other methods have no effect here, for error messages.
        remedy: An alternative to leaving such a key unset; None if there is none.
        resolve: Completes what the user set; in the result None means "no effect here". Values out
            of range or in contradiction are a ``ConfigError``.
        build: Makes the method from complete options, the dense model and the progress display.
        obstacle: Returns what in complete options needs the whole model on the device, and what to
            do, in one line; None if one decoder layer at a time is enough. Without this function,
            the method always needs the whole model, and ``model.loading: streamed`` is refused.
    """

    name: str
    options: type[AmountOptions] = MethodOptions
    ignores: str
    remedy: str | None = None
    resolve: Callable[[MethodConfig], MethodConfig]
    build: Callable[[MethodConfig, DecoderView, Track], CompressionMethod]
    obstacle: Callable[[MethodConfig], str | None] | None = None
