"""The numbers of one run: the content of ``metrics.json``. Standard library only."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Generic, Self, TypeVar

from grasp_lightning.errors import OutputError

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Pair(Generic[T]):
    """One quantity of the dense and of the compressed model.

    Attributes:
        dense: Value before compression.
        compressed: Value after it.
    """

    dense: T
    compressed: T


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
class Metrics:
    """Everything that a run measured. ``to_dict`` gives the contract for scripts.

    Attributes:
        model: Name of the source model, without a machine's paths.
        method: Name of the compression method.
        dtype: Floating point type in which both models are counted, such as ``float32``.
        layers: Replaced or dropped decoder layers, ascending, as indices of the original model.
        removed_ratio: Share of all parameters that is gone, in [0, 1].
        parameters: Parameters of the whole model, tied ones counted once.
        bytes: Size of the whole model in bytes, both at ``dtype``.
        decoder_linears: The same for the linears of the decoder layers.
        channels: Number of hidden channels of every narrowed MLP, by the full name of the linear
            that reads them.
        source_bytes: Size of the source's weight files on disk, None if unknown.
        perplexity: On held-out text; None where it was not measured.
        perplexity_tokens: Number of predicted tokens behind each perplexity.
        loss_change: By how much the cross-entropy of a token grows, predicted and measured.
        seconds: Time per phase.
        peak_memory_bytes: Highest memory use of the process, or of its device.
        versions: Version by package name (grasp_lightning, python, torch, ...).
        evaluation: What ``evaluate`` measured of the compressed model; None before.
        throughput: What ``benchmark`` measured of the compressed model; None before.
    """

    model: str
    method: str
    dtype: str
    layers: tuple[int, ...]
    removed_ratio: float
    parameters: Pair[int]
    bytes: Pair[int]
    decoder_linears: DecoderLinears
    channels: Mapping[str, Pair[int]] = field(default_factory=dict)
    source_bytes: int | None = None
    perplexity: Pair[float | None] = field(
        default_factory=lambda: Pair[float | None](dense=None, compressed=None)
    )
    perplexity_tokens: int | None = None
    loss_change: LossChange = field(default_factory=LossChange)
    seconds: Seconds = field(default_factory=Seconds)
    peak_memory_bytes: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    evaluation: Mapping[str, Any] | None = None  # Any: values of JSON
    throughput: Mapping[str, Any] | None = None  # Any: values of JSON

    def to_dict(self) -> dict[str, Any]:  # Any: values of JSON
        """Return the nested content of ``metrics.json``. Its keys are stable: scripts rely on them.

        ``model``, ``method``, ``dtype`` (strings), ``layers`` (list of int), ``removed_ratio``
        (float), ``parameters.{dense,compressed}``, ``bytes.{dense,compressed}``,
        ``decoder_linears.parameters.{dense,compressed}``,
        ``decoder_linears.bytes.{dense,compressed}``, ``channels`` (module name to
        ``{dense,compressed}``), ``source_bytes`` (int),
        ``perplexity.{dense,compressed}`` (float), ``perplexity_tokens`` (int),
        ``loss_change.{predicted,measured}`` (float, nats per token),
        ``seconds.{load,sample,similarity,attribution,curvature,factorize,cut_losses,refit,save,
        verify,evaluate,total}`` (float),
        ``peak_memory_bytes`` (int), ``versions`` (package name to version),
        ``evaluation.{settings,cost,peak_memory_bytes,corpora,tasks,mean_of_seven}`` as in the
        output of ``evaluate``, and ``throughput``, the output of ``benchmark``.

        Every key is always there; a value that does not apply is None.
        """
        return {**asdict(self), "layers": list(self.layers), "versions": dict(self.versions)}

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
            linears = content["decoder_linears"]
            return cls(
                model=str(content["model"]),
                method=str(content["method"]),
                dtype=str(content["dtype"]),
                layers=tuple(int(index) for index in content["layers"]),
                removed_ratio=float(content["removed_ratio"]),
                parameters=_int_pair(content["parameters"]),
                bytes=_int_pair(content["bytes"]),
                decoder_linears=DecoderLinears(
                    parameters=_int_pair(linears["parameters"]), bytes=_int_pair(linears["bytes"])
                ),
                channels={k: _int_pair(v) for k, v in content.get("channels", {}).items()},
                source_bytes=optional_int(content["source_bytes"]),
                perplexity=Pair[float | None](
                    dense=optional_float(content["perplexity"]["dense"]),
                    compressed=optional_float(content["perplexity"]["compressed"]),
                ),
                perplexity_tokens=optional_int(content["perplexity_tokens"]),
                loss_change=LossChange(**content.get("loss_change", {})),
                seconds=Seconds(
                    **{
                        phase.name: optional_float(content["seconds"].get(phase.name))
                        for phase in fields(Seconds)
                    }
                ),
                peak_memory_bytes=optional_int(content["peak_memory_bytes"]),
                versions=dict(content["versions"]),
                evaluation=content.get("evaluation"),
                throughput=content.get("throughput"),
            )


@contextmanager
def reading_metrics() -> Iterator[None]:
    """Turn what goes wrong while the content of a metrics.json is read into one line.

    Yields:
        Nothing.

    Raises:
        OutputError: If a key is missing, or a value has another type.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise OutputError(
            f"not the metrics of a run: {error!r}; expected the content of a metrics.json"
        ) from error


def _int_pair(content: Mapping[str, Any]) -> Pair[int]:  # Any: values of JSON
    return Pair(dense=int(content["dense"]), compressed=int(content["compressed"]))


def optional_int(value: float | None) -> int | None:
    """Return a number of JSON as int; None stays None."""
    return None if value is None else int(value)


def optional_float(value: float | None) -> float | None:
    """Return a number of JSON as float; None stays None."""
    return None if value is None else float(value)
