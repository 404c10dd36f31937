"""A made-up compensation of the compressed model of ``example.py``."""

import math
from dataclasses import replace

from grasp_lightning.reporting.metrics import (
    Change,
    CompensationMetrics,
    CompensationSeconds,
    History,
    ParameterCounts,
)

STEPS = 100
CONFIG = {
    "output_dir": "/srv/secret/runs/alpaca",
    "overwrite": False,
    "seed": 0,
    "train": "lora",
    "objective": "instruction",
    "model": {"path": "/srv/secret/runs/quickstart/model", "dtype": "auto", "device": "auto"},
    "lora": {"rank": 8, "alpha": 16.0, "dropout": 0.05, "targets": []},
    "data": {
        "source": "alpaca",
        "path": None,
        "num_train": None,
        "num_validation": 2000,
        "max_length": 256,
        "train_on_inputs": True,
        "add_eos": False,
        "order": "shuffled",
    },
    "text": {"source": "wikitext2", "path": None, "num_samples": 512, "seqlen": 512},
    "distillation": {"teacher": None, "data": "instruction", "temperature": 2.0, "mix": 0.5},
    "optimizer": {
        "learning_rate": 3e-4,
        "weight_decay": 0.0,
        "schedule": "linear",
        "warmup_steps": 10,
        "gradient_clip": 1.0,
    },
    "training": {"epochs": 1, "max_steps": STEPS, "batch_size": 32, "micro_batch_size": 4},
    "evaluation": {"source": "pydoc", "path": None, "num_samples": 32, "seqlen": 512},
}


def example_history() -> History:
    steps = range(1, STEPS + 1)
    validation_steps = range(0, STEPS + 1, 25)
    return History(
        steps=tuple(steps),
        loss=tuple(1.7 + 0.9 * math.exp(-step / 20) + 0.1 * math.sin(7 * step) for step in steps),
        learning_rate=tuple(3e-4 * min(step / 10, (STEPS - step) / 90) for step in steps),
        validation_steps=tuple(validation_steps),
        validation_loss=tuple(1.75 + 0.9 * math.exp(-step / 20) for step in validation_steps),
    )


def example_compensation(**changes: object) -> CompensationMetrics:
    metrics = CompensationMetrics(
        model="SmolLM2-135M-Instruct",
        train="lora",
        objective="instruction",
        dtype="float32",
        parameters=ParameterCounts(before=109_013_760, after=109_013_760, trainable=9_768_960),
        bytes=Change(before=436_055_040, after=436_055_040),
        perplexity=Change[float | None](before=41.0152, after=30.7614),
        perplexity_tokens=16_352,
        validation_loss=Change[float | None](before=2.65, after=1.7561),
        validation_tokens=312_345,
        steps=STEPS,
        epochs=0.0643,
        samples={
            "train": 49_732,
            "validation": 2000,
            "read": 51_760,
            "empty": 28,
            "cut": 4321,
            "cut_prompts": 12,
            "no_answer": 0,
        },
        trained_tokens=498_765,
        data="alpaca (yahma/alpaca-cleaned)",
        data_licence="CC-BY-4.0",
        history=example_history(),
        seconds=CompensationSeconds(load=12.0, train=812.4, evaluate=95.1, save=2.0, total=925.0),
        peak_memory_bytes=3_100_000_000,
        versions={"grasp_lightning": "0.1.0", "python": "3.11.2", "torch": "2.13.0+cpu"},
    )
    return replace(metrics, **changes)  # type: ignore[arg-type]  # fields by name


def smallest_compensation() -> CompensationMetrics:
    """Return metrics with nothing but what every run has."""
    return CompensationMetrics(
        model="m",
        train="factors",
        objective="text",
        dtype="float32",
        parameters=ParameterCounts(before=2, after=2, trainable=1),
        bytes=Change(before=8, after=8),
        steps=0,
        epochs=0,
        samples={},
        trained_tokens=0,
        data="pydoc",
    )
