"""Throughput of several models, measured alternately and compared round by round."""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Self

import numpy as np
from transformers import PreTrainedModel

from grasp_lightning.evaluation.machine import Machine
from grasp_lightning.evaluation.peak_memory import PeakMemory
from grasp_lightning.evaluation.workload import (
    Sample,
    Setting,
    Workload,
    out_of_memory_as_model_error,
    time_setting,
)
from grasp_lightning.reading.typed import to_plain

_SIZE_NAMES = {"prefill": "length", "decode": "batch_size"}


class Turn(NamedTuple):
    """One measurement; ``is_warm_up`` marks those before the rounds, which do not count."""

    name: str
    setting: Setting
    is_warm_up: bool


# Wraps an iterable of known length in a progress bar with a description.
Track = Callable[[Sequence[Turn], str], Iterable[Turn]]


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median and quartiles over the rounds."""

    first_quartile: float
    median: float
    third_quartile: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Return the spread of one value per round, interpolated between values."""
        first, median, third = (float(value) for value in np.quantile(values, (0.25, 0.5, 0.75)))
        return cls(first_quartile=first, median=median, third_quartile=third)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One model at one setting.

    Attributes:
        num_rounds: Number of measurements.
        tokens_per_second: Of the prompt, or decoded over all sequences.
        ratio: Tokens per second divided by the first model's in the same round; above 1 is
            faster. None for the first model itself.
        first_token_seconds: From the prompt to the first new token; None for decode.
    """

    setting: Setting
    num_rounds: int
    tokens_per_second: Spread
    ratio: Spread | None
    first_token_seconds: Spread | None

    def to_dict(self) -> dict[str, Any]:  # Any: plain values
        """Return plain values, with the size under ``length`` or ``batch_size``."""
        content = asdict(self)
        kind, size = content.pop("setting")
        if kind == "decode":
            del content["first_token_seconds"]
        return {_SIZE_NAMES[kind]: size, **content}


@dataclass(frozen=True, kw_only=True)
class ModelThroughput:
    """Every measurement of one model.

    Attributes:
        name: Name among the compared models.
        is_control: True for the first model's second measurement, whose difference is pure noise.
        parameters: Tied parameters count once.
        peak_memory: Of a process that runs the largest settings.
        timings: One per setting, in the order of the workload.
    """

    name: str
    is_control: bool
    parameters: int
    dtype: str
    peak_memory: PeakMemory
    timings: tuple[Timing, ...]

    def of_kind(self, kind: str) -> tuple[Timing, ...]:
        """Return the timings of one kind, ``prefill`` or ``decode``."""
        return tuple(timing for timing in self.timings if timing.setting.kind == kind)

    def to_dict(self) -> dict[str, Any]:  # Any: plain values
        """Return plain values, with one list per kind of setting."""
        content = asdict(self)
        del content["timings"]
        lists = {kind: [t.to_dict() for t in self.of_kind(kind)] for kind in _SIZE_NAMES}
        return {**content, **lists}


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """The result of one benchmark: the first model, its control, then the others."""

    workload: Workload
    machine: Machine
    models: tuple[ModelThroughput, ...]

    def to_dict(self) -> dict[str, Any]:  # Any: plain values
        """Return the content of the JSON file."""
        return {
            "workload": to_plain(self.workload),
            "machine": self.machine.to_dict(),
            "models": [model.to_dict() for model in self.models],
        }


def measure_throughput(
    models: Mapping[str, PreTrainedModel], workload: Workload, track: Track
) -> dict[str, tuple[Timing, ...]]:
    """Measure models alternately, so that anything that slows the machine affects all of them.

    Raises the errors of ``time_setting``, and a ``ModelError`` for a device that is too small.

    Args:
        models: Models in eval mode by name; the others are compared to the first. The caller may
            add it again as a control.
        workload: What is run.
        track: Shows progress; it must be idle while a measurement runs.

    Returns:
        Timings of each model, one per setting.
    """
    samples: dict[tuple[str, Setting], list[Sample]] = {}
    for name, setting, is_warm_up in track(list(turns(tuple(models), workload)), "throughput"):
        with out_of_memory_as_model_error(name):
            sample = time_setting(models[name], workload, setting)
        if not is_warm_up:
            samples.setdefault((name, setting), []).append(sample)
    first = next(iter(models))
    return {
        name: tuple(
            summarize(
                setting,
                workload.num_tokens(setting),
                samples[name, setting],
                None if name == first else samples[first, setting],
            )
            for setting in workload.settings
        )
        for name in models
    }


def turns(names: Sequence[str], workload: Workload) -> Iterator[Turn]:
    """Yield every model at every setting, first as a warm-up and then once per round.

    Each round shuffles the settings, and each setting shuffles the models, so that compared models
    run one right after another.
    """
    order = random.Random(workload.seed)
    for round_index in range(-1, workload.num_rounds):
        for setting in order.sample(workload.settings, len(workload.settings)):
            for name in order.sample(names, len(names)):
                yield Turn(name, setting, is_warm_up=round_index < 0)


def summarize(
    setting: Setting, num_tokens: int, samples: Sequence[Sample], first: Sequence[Sample] | None
) -> Timing:
    """Return the medians and quartiles of one model at one setting.

    Args:
        num_tokens: Tokens that one measurement counts.
        samples: One per round.
        first: The first model's, in the same rounds; None for the first model itself.
    """
    waits = [s.first_token_seconds for s in samples if s.first_token_seconds is not None]
    paired = zip(first, samples, strict=True) if first is not None else ()
    ratios = [theirs.seconds / ours.seconds for theirs, ours in paired]
    return Timing(
        setting=setting,
        num_rounds=len(samples),
        tokens_per_second=Spread.of([num_tokens / sample.seconds for sample in samples]),
        ratio=Spread.of(ratios) if ratios else None,
        first_token_seconds=Spread.of(waits) if waits else None,
    )
