"""Throughput of several models, measured in turns and compared round by round."""

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

_SIZE_NAMES = {"prefill": "length", "decode": "batch_size"}


class Turn(NamedTuple):
    """One measurement in the order of all.

    Attributes:
        name: The model.
        setting: What is timed.
        is_warm_up: True before the rounds; its time is not used.
    """

    name: str
    setting: Setting
    is_warm_up: bool


# Wraps an iterable of known length in a progress bar with a description.
Track = Callable[[Sequence[Turn], str], Iterable[Turn]]


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median and quartiles over the rounds.

    Attributes:
        first_quartile: A quarter of the rounds lies below.
        median: Half of them does.
        third_quartile: A quarter lies above.
    """

    first_quartile: float
    median: float
    third_quartile: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Return the spread of some values.

        Args:
            values: One per round, at least one; between two of them is interpolated.

        Returns:
            Median and quartiles.
        """
        first, median, third = (float(value) for value in np.quantile(values, (0.25, 0.5, 0.75)))
        return cls(first_quartile=first, median=median, third_quartile=third)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One model at one setting.

    Attributes:
        setting: What was timed.
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
        """Return the numbers as plain values, under ``length`` or ``batch_size``."""
        content = asdict(self)
        kind, size = content.pop("setting")
        if kind == "decode":
            del content["first_token_seconds"]
        return {_SIZE_NAMES[kind]: size, **content}


@dataclass(frozen=True, kw_only=True)
class ModelThroughput:
    """Everything that was measured of one model.

    Attributes:
        name: Name among the compared models.
        is_control: True for the first model's second measurement, which shows what difference
            chance alone makes.
        parameters: Number of parameters, tied ones counted once.
        dtype: Floating point type of the weights.
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
        """Return the timings of one kind.

        Args:
            kind: ``prefill`` or ``decode``.

        Returns:
            One per size.
        """
        return tuple(timing for timing in self.timings if timing.setting.kind == kind)

    def to_dict(self) -> dict[str, Any]:  # Any: plain values
        """Return the numbers as plain values, with one list per kind of setting."""
        content = asdict(self)
        del content["timings"]
        lists = {kind: [t.to_dict() for t in self.of_kind(kind)] for kind in _SIZE_NAMES}
        return {**content, **lists}


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """The result of one benchmark.

    Attributes:
        workload: What every model was measured on.
        machine: What it was measured with.
        models: The first model, its control, then the others.
    """

    workload: Workload
    machine: Machine
    models: tuple[ModelThroughput, ...]

    def to_dict(self) -> dict[str, Any]:  # Any: plain values
        """Return everything as plain values: what the JSON file holds."""
        workload = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self.workload).items()
        }
        return {
            "workload": workload,
            "machine": self.machine.to_dict(),
            "models": [model.to_dict() for model in self.models],
        }


def measure_throughput(
    models: Mapping[str, PreTrainedModel], workload: Workload, track: Track
) -> dict[str, tuple[Timing, ...]]:
    """Measure models in turns, so that whatever slows the machine down meets all alike.

    Args:
        models: Models in eval mode by name; the first one is what the others are compared with. A
            control, the first model once more, is a matter of the caller.
        workload: What is run.
        track: Shows progress; it must not work while a measurement runs.

    Returns:
        Timings of each model, one per setting. Fails as ``time_setting`` does, and with a
        ``ModelError`` for a device that is too small.
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
    """Yield what is measured, in order: a warm-up of everything, then round by round.

    In each round the settings come in random order, and at each setting the models do: those that
    are compared with each other run one right after the other.

    Args:
        names: The models.
        workload: Settings, number of rounds and seed.

    Yields:
        Every model at every setting, once for the warm-up and once per round.
    """
    order = random.Random(workload.seed)
    for round_index in range(-1, workload.num_rounds):
        for setting in order.sample(workload.settings, len(workload.settings)):
            for name in order.sample(names, len(names)):
                yield Turn(name, setting, is_warm_up=round_index < 0)


def summarize(
    setting: Setting, num_tokens: int, samples: Sequence[Sample], first: Sequence[Sample] | None
) -> Timing:
    """Return what the rounds of one model at one setting come to.

    Args:
        setting: What was timed.
        num_tokens: Tokens that one measurement counts.
        samples: One per round.
        first: The first model's, in the same rounds; None if these are its own.

    Returns:
        Medians and quartiles.
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
