"""The numbers of one run: the content of ``metrics.json``. Standard library only."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Self, TypeVar

from grasp_lightning.errors import OutputError
from grasp_lightning.reading.typed import as_type, to_plain

T = TypeVar("T")


class States(Generic[T]):
    """One quantity in two states of a model, named as in metrics.json."""

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
    """One quantity before and after compensation or trimming."""

    before: T
    after: T


@dataclass(frozen=True, kw_only=True)
class TextLength:
    """The length of a text in tokens, before and after.

    Attributes:
        name: Corpus and split, or name of the file.
        is_named: Whether it is one of the corpora, whose tokens stay.
        num_bytes: Its length in UTF-8.
        tokens_per_byte: Tokens divided by bytes.
    """

    name: str
    is_named: bool
    num_bytes: int
    tokens: Change[int]
    tokens_per_byte: Change[float]


@dataclass(frozen=True, kw_only=True)
class VocabularyChange:
    """What trimming the vocabulary removed.

    Attributes:
        tokens: Rows of the embedding.
        parameters: Of the whole model, tied ones counted once.
        same_pieces: Whether the corpora are split as before.
        texts: Lengths of the corpora, and of another text.
    """

    tokens: Change[int]
    parameters: Change[int]
    same_pieces: bool
    texts: tuple[TextLength, ...]


_NO_PAIR = Pair[float | None](dense=None, compressed=None)
_NO_CHANGE = Change[float | None](before=None, after=None)


@dataclass(frozen=True, kw_only=True)
class DecoderLinears:
    """Size of the linears in decoder layers, which methods can remove; tied ones count once."""

    parameters: Pair[int]
    bytes: Pair[int]


@dataclass(frozen=True, kw_only=True)
class LinearCount:
    """Linears of one layer's attention or MLP; replaced, removed and sparse ones are changed."""

    changed: int
    total: int


@dataclass(frozen=True, kw_only=True)
class LayerChange:
    """Changes of one decoder layer; everything outside attention counts as MLP."""

    attention: LinearCount
    mlp: LinearCount


@dataclass(frozen=True, kw_only=True)
class LossChange:
    """Increase of the loss in nats per token, on calibration (predicted) and held-out text."""

    predicted: float | None = None
    measured: float | None = None


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """Wall-clock seconds per phase; None for phases that the run did not have."""

    load: float | None = None
    sample: float | None = None
    similarity: float | None = None
    attribution: float | None = None
    curvature: float | None = None
    seam: float | None = None
    slice: float | None = None
    merges: float | None = None
    removals: float | None = None
    gradients: float | None = None
    spread: float | None = None
    factorize: float | None = None
    cut_losses: float | None = None
    refit: float | None = None
    save: float | None = None
    verify: float | None = None
    evaluate: float | None = None
    total: float | None = None


@dataclass(frozen=True, kw_only=True)
class CompensationSeconds:
    """Wall-clock seconds per phase; None for phases that the run did not have."""

    load: float | None = None
    sample: float | None = None
    teacher: float | None = None
    train: float | None = None
    evaluate: float | None = None
    save: float | None = None
    verify: float | None = None
    total: float | None = None


@dataclass(frozen=True, kw_only=True)
class RunMetrics:
    """Measurements of every run that writes a model. Keys of metrics.json are stable.

    Attributes:
        model: Name of the source model, without local paths.
        dtype: Floating point type in which both states are counted, such as ``float32``.
        perplexity_tokens: Number of predicted tokens per perplexity.
        peak_memory_bytes: Of the process, or of its device.
        evaluation: Measurements of ``evaluate`` on the written model.
        throughput: Measurements of ``benchmark`` on the written model.
    """

    model: str
    dtype: str
    perplexity_tokens: int | None = None
    peak_memory_bytes: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    evaluation: Mapping[str, Any] | None = None  # Any: values of JSON
    throughput: Mapping[str, Any] | None = None  # Any: values of JSON

    def to_dict(self) -> dict[str, Any]:  # Any: values of JSON
        """Return the content of ``metrics.json``: nested attributes, None if not applicable."""
        content: dict[str, Any] = to_plain(self)
        return content

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:  # Any: values of JSON
        """Return the metrics that ``to_dict`` wrote; keys of later versions are ignored."""
        what, advice = "not the metrics of a run", "expected the content of a metrics.json"
        return as_type(cls, content, what, OutputError, advice, ignores_unknown=True)


@dataclass(frozen=True, kw_only=True)
class Metrics(RunMetrics):
    """All measurements of a compression.

    Attributes:
        layers: Decoder layers chosen by the method, ascending, as indices of the original model.
        layer_changes: Changes of each decoder layer by index; None for a deleted one.
        removed_ratio: Share of all parameters that was removed, in [0, 1].
        zero_ratio: Share of all parameters that was set to zero, in [0, 1]; they are stored like
            all others, so they are not removed.
        parameters: Of the whole model; tied ones count once.
        bytes: Size of the whole model at ``dtype``.
        channels: Hidden channels of every narrowed MLP, by the full name of the linear that reads
            them.
        experts: Experts of every mixture that lost some, by its full name.
        heads: Key/value groups of every attention that lost some, by its full name.
        source_bytes: Size of the source's weight files on disk.
        perplexity: On held-out text; None if not measured.
        vocabulary: What ``method.vocabulary`` removed before anything else; None if all tokens
            stayed. The dense perplexity is then that of the trimmed model.
        target_losses: Predicted increase of the loss in nats per token for each ``method.target``
            that this budget and this model allow; empty if it was not predicted.
    """

    STATES: ClassVar = ("dense", "compressed")

    method: str
    layers: tuple[int, ...]
    layer_changes: Mapping[str, LayerChange | None] = field(default_factory=dict)
    removed_ratio: float
    zero_ratio: float = 0.0
    parameters: Pair[int]
    bytes: Pair[int]
    decoder_linears: DecoderLinears
    channels: Mapping[str, Pair[int]] = field(default_factory=dict)
    experts: Mapping[str, Pair[int]] = field(default_factory=dict)
    heads: Mapping[str, Pair[int]] = field(default_factory=dict)
    vocabulary: VocabularyChange | None = None
    source_bytes: int | None = None
    perplexity: Pair[float | None] = _NO_PAIR
    loss_change: LossChange = LossChange()
    target_losses: Mapping[str, float] = field(default_factory=dict)
    seconds: Seconds = Seconds()

    @property
    def changed_layers(self) -> tuple[int, ...]:
        """Changed decoder layers, ascending; all chosen ones if the changes are unknown."""
        return tuple(sorted(map(int, self.layer_changes))) or self.layers


@dataclass(frozen=True, kw_only=True)
class ParameterCounts(Change[int]):
    """Parameters of the whole saved model and trained ones; merged adapters add none."""

    before: int
    after: int
    trainable: int


@dataclass(frozen=True, kw_only=True)
class History:
    """Losses over the optimizer steps, ascending from 1, in nats per predicted token."""

    steps: tuple[int, ...] = ()
    loss: tuple[float, ...] = ()
    learning_rate: tuple[float, ...] = ()
    validation_steps: tuple[int, ...] = ()
    validation_loss: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Check that there is one value per step."""
        validations = (self.validation_steps, self.validation_loss)
        for what, values in (
            ("loss and learning rate per step", (self.steps, self.loss, self.learning_rate)),
            ("loss per validation", validations),
        ):
            lengths = [len(entries) for entries in values]
            if len(set(lengths)) != 1:
                raise ValueError(f"history must have one {what}, got {lengths}")


@dataclass(frozen=True, kw_only=True)
class LimitedTime:
    """What a training with a time limit planned and took; None without a limit.

    Attributes:
        max_seconds: The limit.
        planned_steps: None also if the training ended before it could plan.
        seconds: Time in training, over all starts.
    """

    max_seconds: float | None = None
    planned_steps: int | None = None
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class FirstStage:
    """The compression that the same command did before a compensation.

    Attributes:
        bytes: Size of both models at the dtype of the compensated one.
        seconds: Of the whole compression.
        peak_memory_bytes: Of the process that compressed, or of its device.
    """

    method: str
    removed_ratio: float
    parameters: Pair[int]
    bytes: Pair[int]
    perplexity: Pair[float | None] = _NO_PAIR
    seconds: float | None = None
    peak_memory_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class CompensationMetrics(RunMetrics):
    """All measurements of a compensation; ``train`` distinguishes them from those of a compression.

    Attributes:
        train: lora, factors, lora_on_factors, replaced, or all.
        objective: instruction, text, distill, or local.
        validation_loss: Nats per predicted token on samples set aside; None if there are none. Of
            local, the mean of ``layer_errors``.
        layer_errors: Of local: normalised error of the hidden states after each trained layer, by
            its number in the model, on samples set aside.
        best_step: Step whose weights were kept; None for the last one.
        epochs: How often each sample was seen.
        samples: Number of samples by their fate: train, validation, read, cut, ...
        trained_tokens: Number of predicted tokens over all steps.
        tokens_per_second: Predicted tokens per second of the median step.
        data: Description of the training data, without local paths.
        data_licence: None if unknown.
        compression: The first stage of ``compress --compensate``; None for ``compensate`` alone.
    """

    STATES: ClassVar = ("before", "after")

    train: str
    objective: str
    parameters: ParameterCounts
    bytes: Change[int]
    perplexity: Change[float | None] = _NO_CHANGE
    validation_loss: Change[float | None] = _NO_CHANGE
    validation_tokens: int | None = None
    layer_errors: Mapping[str, Change[float]] = field(default_factory=dict)
    steps: int
    time_limit: LimitedTime = LimitedTime()
    best_step: int | None = None
    epochs: float
    samples: Mapping[str, int]
    trained_tokens: int
    tokens_per_second: float | None = None
    data: str
    data_licence: str | None = None
    history: History = History()
    compression: FirstStage | None = None
    seconds: CompensationSeconds = CompensationSeconds()
