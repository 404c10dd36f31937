"""A made-up throughput measurement of three models."""

from dataclasses import replace

from grasp_lightning.evaluation.machine import Machine
from grasp_lightning.evaluation.peak_memory import PeakMemory
from grasp_lightning.evaluation.throughput import ModelThroughput, Spread, Throughput, Timing
from grasp_lightning.evaluation.workload import Setting, Workload


def spread(median: float, reach: float) -> Spread:
    return Spread(first_quartile=median - reach, median=median, third_quartile=median + reach)


def timing(kind: str, size: int, rate: float, ratio: float | None) -> Timing:
    return Timing(
        setting=Setting(kind, size),  # type: ignore[arg-type]  # text for a literal
        num_rounds=7,
        tokens_per_second=spread(rate, 20.0),
        ratio=None if ratio is None else spread(ratio, 0.05),
        first_token_seconds=spread(size / rate, 0.01) if kind == "prefill" else None,
    )


def model(name: str, speed: float | None, size: int) -> ModelThroughput:
    factor = speed or 1.0
    return ModelThroughput(
        name=name,
        is_control=name.endswith("(again)"),
        parameters=134_515_008,
        dtype="float32",
        peak_memory=PeakMemory(bytes=size, covers="resident"),
        timings=(
            timing("prefill", 128, 1024.0 * factor, speed),
            timing("prefill", 1024, 2000.0 * factor, speed),
            timing("decode", 1, 40.0 * factor, speed),
            timing("decode", 8, 160.0 * factor, speed),
        ),
    )


def example_throughput(**changes: object) -> Throughput:
    result = Throughput(
        workload=Workload(
            prefill_lengths=(128, 1024),
            decode_batch_sizes=(1, 8),
            prompt_length=128,
            new_tokens=32,
            num_rounds=7,
            seed=0,
            vocabulary=49152,
        ),
        machine=Machine(
            device="cpu",
            device_name="Some Processor",
            cores=4,
            threads=2,
            system="Linux",
            versions={"python": "3.11.2", "torch": "2.13.0", "transformers": "5.23.0"},
        ),
        models=(
            model("dense", None, 1_000_000_000),
            model("dense (again)", 1.0, 1_001_000_000),
            model("runs/[x]/model", 1.25, 750_000_000),
        ),
    )
    return replace(result, **changes)  # type: ignore[arg-type]  # fields by name
