"""The numbers of one run: the content of ``metrics.json``. Standard library only."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Self, TypeVar

from grasp_lightning.errors import OutputError
from grasp_lightning.reading.plain import from_plain, to_plain

T = TypeVar("T")


class States(Generic[T]):
    """One quantity in two states of a model, under the names that metrics.json has for them."""

    @property
    def values(self) -> tuple[T, T]:
        """Value in the first and in the second state."""
        first, second, *_ = vars(self).values()
        return first, second


@dataclass(frozen=True, kw_only=True)
class Pair(States[T]):
    """One quantity of the dense and of the compressed model."""

    dense: T
    compressed: T


@dataclass(frozen=True, kw_only=True)
class Change(States[T]):
    """One quantity before and after compensation."""

    before: T
    after: T


_NO_PAIR = Pair[float | None](dense=None, compressed=None)
_NO_CHANGE = Change[float | None](before=None, after=None)


@dataclass(frozen=True, kw_only=True)
class DecoderLinears:
    """Size of the linears inside the decoder layers, which is what methods can remove.

    Attributes:
        parameters: Number of parameters, tied ones counted once.
        bytes: Their size in bytes, both at the dtype of the run.
    """

    parameters: Pair[int]
    bytes: Pair[int]


@dataclass(frozen=True, kw_only=True)
class LinearCount:
    """Linears of the attention or of the MLP of one decoder layer.

    Attributes:
        changed: Number of low-rank, narrowed and removed ones.
        total: Number of all.
    """

    changed: int
    total: int


@dataclass(frozen=True, kw_only=True)
class LayerChange:
    """What of one decoder layer was changed; all that is not attention counts as MLP."""

    attention: LinearCount
    mlp: LinearCount


@dataclass(frozen=True, kw_only=True)
class LossChange:
    """By how much the cross-entropy of a token grows, in nats; None where it is not known.

    Attributes:
        predicted: Sum of what the method predicts for every linear, on the calibration text.
        measured: Logarithm of the ratio of both perplexities, on held-out text.
    """

    predicted: float | None = None
    measured: float | None = None


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Wall-clock seconds per phase; None for a phase that the run did not have.

    Attributes:
        load: Reading the model and the text.
        sample: Calibration text that the model writes itself.
        similarity: Pass that measures the decoder layers.
        attribution: Pass that scores singular components.
        curvature: Pass that sums up moments of linears.
        factorize: Singular value decompositions and replacement.
        cut_losses: Measuring each cut by itself.
        refit: Fitting what was cut once more.
        save: Writing the model.
        verify: Loading the saved model in a fresh process.
        evaluate: Perplexity before and after.
        total: The whole command.
    """

    load: float | None = None
    sample: float | None = None
    similarity: float | None = None
    attribution: float | None = None
    curvature: float | None = None
    factorize: float | None = None
    cut_losses: float | None = None
    refit: float | None = None
    save: float | None = None
    verify: float | None = None
    evaluate: float | None = None
    total: float | None = None


@dataclass(frozen=True, kw_only=True)
class CompensationSeconds:
    """Wall-clock seconds per phase; None for a phase that the run did not have.

    Attributes:
        load: Reading model and data.
        train: Optimizer steps, and the validations between them.
        evaluate: Perplexity and validation loss, before and after.
        save: Writing the model.
        verify: Loading the saved model in a fresh process.
        total: The whole command.
    """

    load: float | None = None
    train: float | None = None
    evaluate: float | None = None
    save: float | None = None
    verify: float | None = None
    total: float | None = None


@dataclass(frozen=True, kw_only=True)
class RunMetrics:
    """What is measured of every run that writes a model. Keys of metrics.json are stable.

    Attributes:
        model: Name of the source model, without a machine's paths.
        dtype: Floating point type in which both states are counted, such as ``float32``.
        perplexity_tokens: Number of predicted tokens behind each perplexity.
        peak_memory_bytes: Highest memory use of the process, or of its device.
        versions: Version by package name (grasp_lightning, python, torch, ...).
        evaluation: What ``evaluate`` measured of the written model; None before.
        throughput: What ``benchmark`` measured of the written model; None before.
    """

    model: str
    dtype: str
    perplexity_tokens: int | None = None
    peak_memory_bytes: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    evaluation: Mapping[str, Any] | None = None  # Any: values of JSON
    throughput: Mapping[str, Any] | None = None  # Any: values of JSON

    def to_dict(self) -> dict[str, Any]:  # Any: values of JSON
        """Return the content of ``metrics.json``, the contract for scripts.

        Its keys are the names of all attributes, nested as they are. Every key is always there; a
        value that does not apply is None.
        """
        content: dict[str, Any] = to_plain(self)
        return content

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:  # Any: values of JSON
        """Return the metrics that ``to_dict`` wrote; keys of later versions are ignored.

        Args:
            content: Parsed content of a ``metrics.json``.

        Returns:
            Metrics equal to those that were written.

        Raises:
            OutputError: If a key is missing, or a value has another type.
        """
        try:
            return from_plain(cls, content)
        except (KeyError, TypeError, ValueError) as error:
            raise OutputError(
                f"not the metrics of a run: {error!r}; expected the content of a metrics.json"
            ) from error


@dataclass(frozen=True, kw_only=True)
class Metrics(RunMetrics):
    """Everything that a compression measured.

    Attributes:
        method: Name of the compression method.
        layers: Decoder layers that the method chose, ascending, as indices of the original model.
        layer_changes: What was changed in each decoder layer, by its index; None for a deleted one.
        removed_ratio: Share of all parameters that is gone, in [0, 1].
        parameters: Parameters of the whole model, tied ones counted once.
        bytes: Size of the whole model in bytes, both at ``dtype``.
        decoder_linears: The same for the linears of the decoder layers.
        channels: Number of hidden channels of every narrowed MLP, by the full name of the linear
            that reads them.
        source_bytes: Size of the source's weight files on disk, None if unknown.
        perplexity: On held-out text; None where it was not measured.
        loss_change: By how much the cross-entropy of a token grows, predicted and measured.
        seconds: Time per phase.
    """

    STATES: ClassVar = ("dense", "compressed")

    method: str
    layers: tuple[int, ...]
    layer_changes: Mapping[str, LayerChange | None] = field(default_factory=dict)
    removed_ratio: float
    parameters: Pair[int]
    bytes: Pair[int]
    decoder_linears: DecoderLinears
    channels: Mapping[str, Pair[int]] = field(default_factory=dict)
    source_bytes: int | None = None
    perplexity: Pair[float | None] = _NO_PAIR
    loss_change: LossChange = LossChange()
    seconds: Seconds = Seconds()

    @property
    def changed_layers(self) -> tuple[int, ...]:
        """Decoder layers with a change, ascending; all chosen ones where that is not known."""
        return tuple(sorted(map(int, self.layer_changes))) or self.layers


@dataclass(frozen=True, kw_only=True)
class ParameterCounts(Change[int]):
    """Parameters of the whole saved model, tied ones counted once.

    Attributes:
        before: Number before training.
        after: Number after it: adapters are merged, so it is the same.
        trainable: Number of trained parameters: those of the adapters, or of the factors.
    """

    before: int
    after: int
    trainable: int


@dataclass(frozen=True, kw_only=True)
class History:
    """Losses over the optimizer steps, in nats per predicted token.

    Attributes:
        steps: Optimizer steps, ascending, counted from 1.
        loss: Mean training loss of each of these steps.
        learning_rate: Learning rate of each of these steps.
        validation_steps: Number of steps that were done when it was validated, ascending.
        validation_loss: Loss of each validation.
    """

    steps: tuple[int, ...] = ()
    loss: tuple[float, ...] = ()
    learning_rate: tuple[float, ...] = ()
    validation_steps: tuple[int, ...] = ()
    validation_loss: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Check that there is one value per step.

        Raises:
            ValueError: If numbers of values differ.
        """
        validations = (self.validation_steps, self.validation_loss)
        for what, values in (
            ("loss and learning rate per step", (self.steps, self.loss, self.learning_rate)),
            ("loss per validation", validations),
        ):
            lengths = [len(entries) for entries in values]
            if len(set(lengths)) != 1:
                raise ValueError(f"history must have one {what}, got {lengths}")


@dataclass(frozen=True, kw_only=True)
class CompensationMetrics(RunMetrics):
    """Everything that a compensation measured; ``train`` tells its metrics from a compression's.

    Attributes:
        train: What was trained: lora, factors, or lora_on_factors.
        objective: What was learned: instruction, text, or distill.
        parameters: Parameters before and after, and those that were trained.
        bytes: Size of the whole model in bytes, both at ``dtype``.
        perplexity: On held-out text; None where it was not measured.
        validation_loss: Nats per predicted token on samples set aside; None where there were none.
        validation_tokens: Number of predicted tokens behind each validation loss.
        steps: Number of optimizer steps.
        best_step: Step whose weights were kept; None if they are those of the last one.
        epochs: How often each sample was seen.
        samples: Number of samples by what became of them: train, validation, read, cut, ...
        trained_tokens: Number of predicted tokens over all steps.
        data: What was learned from, in words, without a machine's paths.
        data_licence: Its licence, None if unknown.
        history: Losses over the steps.
        seconds: Time per phase.
    """

    STATES: ClassVar = ("before", "after")

    train: str
    objective: str
    parameters: ParameterCounts
    bytes: Change[int]
    perplexity: Change[float | None] = _NO_CHANGE
    validation_loss: Change[float | None] = _NO_CHANGE
    validation_tokens: int | None = None
    steps: int
    best_step: int | None = None
    epochs: float
    samples: Mapping[str, int]
    trained_tokens: int
    data: str
    data_licence: str | None = None
    history: History = History()
    seconds: CompensationSeconds = CompensationSeconds()
