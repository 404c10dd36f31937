"""Checks of the configuration of ``compensate`` that need neither model nor text."""

import math
from collections.abc import Iterator
from dataclasses import fields
from importlib.util import find_spec
from typing import Any, NamedTuple

from grasp_lightning.config import (
    CompensateConfig,
    DistillationConfig,
    InstructionConfig,
    LoggersConfig,
    LoraSettings,
    TextConfig,
)
from grasp_lightning.errors import ConfigError

_MAX_SEED = 2**63 - 1


class _Bound(NamedTuple):
    """What a number must be.

    Attributes:
        key: Dotted key.
        is_met: Whether it is.
        expected: In words.
    """

    key: str
    is_met: bool
    expected: str


def check_settings(config: CompensateConfig) -> None:
    """Refuse numbers that are out of range, and keys that contradict others or have no effect.

    Args:
        config: What the user set.

    Raises:
        ConfigError: Naming the key, what was expected, and what came.
    """
    for key, is_met, expected in _bounds(config):
        if not is_met:
            raise ConfigError(f"{key} must be {expected}, got {_value(config, key)}")
    _refuse_ignored(config)
    _check_validation(config)
    _check_packages(config.loggers)


def uses_instructions(config: CompensateConfig) -> bool:
    """Return whether the model is trained on instructions, and not on plain text."""
    if config.objective == "distill":
        return config.distillation.data == "instruction"
    return config.objective == "instruction"


def _bounds(config: CompensateConfig) -> Iterator[_Bound]:
    lora, teacher, optimizer = config.lora, config.distillation, config.optimizer
    training, at_least_1, positive = config.training, "at least 1", "above 0"
    yield _Bound("seed", 0 <= config.seed <= _MAX_SEED, f"from 0 to {_MAX_SEED}")
    yield _Bound("lora.rank", lora.rank >= 1, at_least_1)
    yield _Bound("lora.alpha", 0 < lora.alpha < math.inf, positive)
    yield _Bound("lora.dropout", 0 <= lora.dropout < 1, "at least 0 and below 1")
    yield _Bound("distillation.temperature", 0 < teacher.temperature < math.inf, positive)
    yield _Bound("distillation.mix", 0 < teacher.mix <= 1, "above 0 and at most 1")
    yield _Bound(
        "optimizer.learning_rate", 0 < optimizer.learning_rate <= 1, "above 0 and at most 1"
    )
    yield _Bound("optimizer.weight_decay", 0 <= optimizer.weight_decay < math.inf, "at least 0")
    yield _Bound("optimizer.beta1", 0 <= optimizer.beta1 < 1, "at least 0 and below 1")
    yield _Bound("optimizer.beta2", 0 <= optimizer.beta2 < 1, "at least 0 and below 1")
    yield _Bound("optimizer.epsilon", 0 < optimizer.epsilon < math.inf, positive)
    yield _Bound("optimizer.warmup_steps", optimizer.warmup_steps >= 0, "at least 0")
    yield _Bound("optimizer.gradient_clip", _is_above(optimizer.gradient_clip, 0), positive)
    yield _Bound("training.epochs", training.epochs >= 1, at_least_1)
    yield _Bound("training.max_steps", _is_above(training.max_steps, 0), at_least_1)
    yield _Bound("training.batch_size", training.batch_size >= 1, at_least_1)
    yield _Bound("training.micro_batch_size", training.micro_batch_size >= 1, at_least_1)
    yield _Bound("training.validate_every", _is_above(training.validate_every, 0), at_least_1)
    yield _Bound("training.patience", _is_above(training.patience, 0), at_least_1)


def _is_above(value: float | None, bound: float) -> bool:
    return value is None or value > bound


def _value(config: object, key: str) -> object:
    for part in key.split("."):
        config = getattr(config, part)
    return config


def _refuse_ignored(config: CompensateConfig) -> None:
    """Refuse keys of a section that the run does not read."""
    reads_instructions = uses_instructions(config)
    unread: list[tuple[str, Any, str]] = []  # Any: a section
    if config.train == "factors":
        unread.append(("lora", LoraSettings(), "train: factors has no adapters"))
    if config.objective != "distill":
        reason = f"objective: {config.objective} has no teacher"
        unread.append(("distillation", DistillationConfig(), reason))
    elif config.distillation.teacher is None:
        raise ConfigError(
            "objective: distill needs distillation.teacher: the dense model, as a folder, hub "
            "name, .gguf file or smollm2"
        )
    if reads_instructions:
        unread.append(("text", TextConfig(), "instructions are learned"))
    else:
        unread.append(("data", InstructionConfig(), "plain text is learned"))
    for section, defaults, reason in unread:
        for key in fields(defaults):
            value = getattr(getattr(config, section), key.name)
            if value != getattr(defaults, key.name):
                raise ConfigError(
                    f"{section}.{key.name} is {value!r}, but would be ignored: {reason}; leave it "
                    "out"
                )


def _check_validation(config: CompensateConfig) -> None:
    training = config.training
    samples = config.data if uses_instructions(config) else config.text
    section = "data" if uses_instructions(config) else "text"
    if training.validate_every is None:
        for key, default in (("patience", None), ("keep", "last")):
            value = getattr(training, key)
            if value != default:
                raise ConfigError(
                    f"training.{key} is {value}, but would be ignored: set training.validate_every"
                )
    elif samples.num_validation == 0:
        raise ConfigError(
            f"training.validate_every is {training.validate_every}, but {section}.num_validation "
            "is 0: set samples aside, or leave it out"
        )


def _check_packages(loggers: LoggersConfig) -> None:
    for key, is_wanted, package, command in (
        ("tensorboard", loggers.tensorboard, "tensorboard", "'grasp-lightning[tensorboard]'"),
        ("wandb", loggers.wandb is not None, "wandb", "wandb"),
    ):
        if is_wanted and find_spec(package) is None:
            raise ConfigError(
                f"loggers.{key} needs the package {package}: pip install {command}, or leave it out"
            )
