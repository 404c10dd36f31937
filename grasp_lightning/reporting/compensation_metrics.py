"""The numbers of one compensation: the content of its ``metrics.json``. Standard library only."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Generic, Self, TypeVar

from grasp_lightning.reporting.metrics import optional_float, optional_int, reading_metrics

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Change(Generic[T]):
    """One quantity before and after compensation.

    Attributes:
        before: Value of the compressed model.
        after: Value of the trained one.
    """

    before: T
    after: T


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
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
        lengths = [len(self.steps), len(self.loss), len(self.learning_rate)]
        if len(set(lengths)) != 1:
            raise ValueError(
                f"history must have one loss and learning rate per step, got {lengths}"
            )
        lengths = [len(self.validation_steps), len(self.validation_loss)]
        if len(set(lengths)) != 1:
            raise ValueError(f"history must have one loss per validation, got {lengths}")


@dataclass(frozen=True, kw_only=True)
class CompensationMetrics:
    """Everything that a compensation measured. ``to_dict`` gives the contract for scripts.

    Attributes:
        model: Name of the source model, without a machine's paths.
        train: What was trained: lora, factors, or lora_on_factors.
        objective: What was learned: instruction, text, or distill.
        dtype: Floating point type in which both models are counted, such as ``float32``.
        parameters: Parameters before and after, and those that were trained.
        bytes: Size of the whole model in bytes, both at ``dtype``.
        perplexity: On held-out text; None where it was not measured.
        perplexity_tokens: Number of predicted tokens behind each perplexity.
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
        peak_memory_bytes: Highest memory use of the process, or of its device.
        versions: Version by package name (grasp_lightning, python, torch, ...).
        evaluation: What ``evaluate`` measured of the trained model; None before.
        throughput: What ``benchmark`` measured of the trained model; None before.
    """

    model: str
    train: str
    objective: str
    dtype: str
    parameters: ParameterCounts
    bytes: Change[int]
    perplexity: Change[float | None] = field(
        default_factory=lambda: Change[float | None](before=None, after=None)
    )
    perplexity_tokens: int | None = None
    validation_loss: Change[float | None] = field(
        default_factory=lambda: Change[float | None](before=None, after=None)
    )
    validation_tokens: int | None = None
    steps: int
    best_step: int | None = None
    epochs: float
    samples: Mapping[str, int]
    trained_tokens: int
    data: str
    data_licence: str | None = None
    history: History = field(default_factory=History)
    seconds: CompensationSeconds = field(default_factory=CompensationSeconds)
    peak_memory_bytes: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    evaluation: Mapping[str, Any] | None = None  # Any: values of JSON
    throughput: Mapping[str, Any] | None = None  # Any: values of JSON

    def to_dict(self) -> dict[str, Any]:  # Any: values of JSON
        """Return the nested content of ``metrics.json``. Its keys are stable: scripts rely on them.

        ``model``, ``train``, ``objective``, ``dtype`` (strings),
        ``parameters.{before,after,trainable}`` (int), ``bytes.{before,after}`` (int),
        ``perplexity.{before,after}`` (float), ``perplexity_tokens`` (int),
        ``validation_loss.{before,after}`` (float), ``validation_tokens`` (int), ``steps``,
        ``best_step`` (int), ``epochs`` (float), ``samples`` (name to int), ``trained_tokens``
        (int), ``data``, ``data_licence`` (strings), ``history.{steps,validation_steps}`` (lists of
        int), ``history.{loss,learning_rate,validation_loss}`` (lists of float),
        ``seconds.{load,train,evaluate,save,verify,total}`` (float), ``peak_memory_bytes`` (int),
        ``versions`` (package name to version),
        ``evaluation.{settings,cost,peak_memory_bytes,corpora,tasks,mean_of_seven}`` as in the
        output of ``evaluate``, and ``throughput``, the output of ``benchmark``.

        Every key is always there; a value that does not apply is None. The key ``train`` tells the
        metrics of a compensation from those of a compression.
        """
        return {
            **asdict(self),
            "samples": dict(self.samples),
            "history": {name: list(values) for name, values in asdict(self.history).items()},
            "versions": dict(self.versions),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:  # Any: values of JSON
        """Return the metrics that ``to_dict`` wrote; keys of later versions are ignored.

        Args:
            content: Parsed content of a ``metrics.json``.

        Returns:
            Metrics equal to those that were written. A missing key, or a value of another type, is
            an ``OutputError``.
        """
        with reading_metrics():
            licence = content["data_licence"]
            return cls(
                model=str(content["model"]),
                train=str(content["train"]),
                objective=str(content["objective"]),
                dtype=str(content["dtype"]),
                parameters=ParameterCounts(
                    **{
                        count.name: int(content["parameters"][count.name])
                        for count in fields(ParameterCounts)
                    }
                ),
                bytes=Change(
                    before=int(content["bytes"]["before"]), after=int(content["bytes"]["after"])
                ),
                perplexity=_optional_change(content["perplexity"]),
                perplexity_tokens=optional_int(content["perplexity_tokens"]),
                validation_loss=_optional_change(content["validation_loss"]),
                validation_tokens=optional_int(content["validation_tokens"]),
                steps=int(content["steps"]),
                best_step=optional_int(content["best_step"]),
                epochs=float(content["epochs"]),
                samples={name: int(count) for name, count in dict(content["samples"]).items()},
                trained_tokens=int(content["trained_tokens"]),
                data=str(content["data"]),
                data_licence=None if licence is None else str(licence),
                history=_history(content["history"]),
                seconds=CompensationSeconds(
                    **{
                        phase.name: optional_float(content["seconds"][phase.name])
                        for phase in fields(CompensationSeconds)
                    }
                ),
                peak_memory_bytes=optional_int(content["peak_memory_bytes"]),
                versions=dict(content["versions"]),
                evaluation=content.get("evaluation"),
                throughput=content.get("throughput"),
            )


def _optional_change(content: Mapping[str, Any]) -> Change[float | None]:  # Any: values of JSON
    return Change[float | None](
        before=optional_float(content["before"]), after=optional_float(content["after"])
    )


def _history(content: Mapping[str, Any]) -> History:  # Any: values of JSON
    def numbers(name: str) -> tuple[float, ...]:
        return tuple(float(value) for value in content[name])

    return History(
        steps=tuple(int(step) for step in content["steps"]),
        loss=numbers("loss"),
        learning_rate=numbers("learning_rate"),
        validation_steps=tuple(int(step) for step in content["validation_steps"]),
        validation_loss=numbers("validation_loss"),
    )
