"""What a compression method is: a pure function of model, plan so far, and statistics."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from grasp_lightning.config import MethodConfig, MethodOptions, RefitChoice
from grasp_lightning.methods.prediction import Prediction
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.plan import Operation, OptionValue, Plan
from grasp_lightning.stats.base import Statistics, Step

Track = Callable[[Sequence[str], str], Iterable[str]]
"""Shows progress: (items, what is done) -> the same items."""


def untracked(items: Sequence[str], description: str) -> Iterable[str]:
    """Return the items as they are: progress that shows nothing."""
    del description
    return items


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What a method decided in one step.

    Attributes:
        operations: What to do to the model, in order.
        tensors: Factors for the operations, as ``<module>.left`` and ``<module>.right``.
        scores: What the decision was made from, to be stored for re-cutting and reports.
        refit: How the tensors are fitted once more before the operations are applied.
    """

    operations: tuple[Operation, ...]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    refit: RefitChoice = "none"


class CompressionMethod(ABC):
    """A method returns operations as data and has no state: a run goes on from its plan."""

    name: str
    reference: str

    @property
    @abstractmethod
    def options(self) -> Mapping[str, OptionValue]:
        """The options that decisions depend on, for the plan."""

    @abstractmethod
    def next_step(self, model: DecoderView, plan: Plan) -> Step | None:
        """Return what to measure and decide next, or None if nothing is left to do.

        Args:
            model: The model with all operations of the plan applied.
            plan: Decisions so far.

        Returns:
            The next step, or None.
        """

    @abstractmethod
    def decide(self, step: Step, model: DecoderView, stats: Statistics) -> Decision:
        """Return the operations that follow from a measurement; must not change the model.

        Args:
            step: What ``next_step`` asked for.
            model: The model, as it was measured.
            stats: What was measured.

        Returns:
            The operations, their tensors, and the scores behind them.
        """

    @abstractmethod
    def predict(self, view: DecoderView) -> Prediction:
        """Return what the method would remove.

        Args:
            view: The dense model; its weights may be on the meta device.

        Returns:
            Sizes before and after, from shapes alone.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class Registered:
    """A method as configurations name it.

    Attributes:
        name: Its ``method.name``.
        options: The keys that it reads; those of methods of this package are in ``METHOD_OPTIONS``.
        ignores: Why it has no use for the keys of other methods, for the message.
        remedy: What to do instead of leaving such a key unset; None if nothing else helps.
        resolve: From what the user set to complete options, in which None means "no effect here";
            what is out of range or contradicts itself is a ``ConfigError``.
        build: From complete options, the dense model and the display of progress to the method.
    """

    name: str
    options: type[MethodOptions] = MethodOptions
    ignores: str
    remedy: str | None = None
    resolve: Callable[[MethodConfig], MethodConfig]
    build: Callable[[MethodConfig, DecoderView, Track], CompressionMethod]
