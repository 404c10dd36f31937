"""Checks of the configuration of ``compensate`` that need neither model nor text."""

from dataclasses import fields, replace
from importlib.util import find_spec
from typing import Any, Final

from grasp_lightning.config import (
    CompensateConfig,
    DistillationConfig,
    InstructionConfig,
    LocalConfig,
    LoggersConfig,
    LoraSettings,
    Recipe,
    TextConfig,
    TrainingConfig,
    TrainMode,
)
from grasp_lightning.config.values import check_values
from grasp_lightning.errors import ConfigError

_SELF = "self"  # see data.mixture
ADAPTER_MODES: Final[tuple[TrainMode, ...]] = ("lora", "lora_on_factors")


def check_settings(config: CompensateConfig) -> None:
    """Refuse numbers out of range, and keys that contradict others or have no effect."""
    check_values(config)
    _check_loading(config)
    if config.objective == "local":
        _check_local(config)
    _refuse_ignored(config)
    _check_validation(config)
    _check_optimizer(config)
    _check_packages(config.loggers)


def uses_instructions(config: Recipe) -> bool:
    """Return whether the model is trained on instructions rather than plain text."""
    if config.objective == "distill":
        return config.distillation.data == "instruction"
    return config.objective == "instruction"


def uses_self(config: Recipe) -> bool:
    """Return whether the model is trained on text that the dense model generates."""
    sources = config.text.source
    return not uses_instructions(config) and _SELF in (
        (sources,) if isinstance(sources, str) else sources
    )


def needs_dense(config: Recipe) -> bool:
    """Return whether a training needs a dense model: as the teacher, or to write text."""
    return config.objective in {"distill", "local"} or uses_self(config)


def _check_loading(config: CompensateConfig) -> None:
    """Refuse a streamed model where a training needs more than one layer at a time."""
    if config.model.loading == "whole":
        return
    trainer = config.trainer
    problems = {
        f"objective {config.objective} trains the whole model: set objective=local": (
            config.objective != "local"
        ),
        "the whole model would generate text: leave self out of text.source": uses_self(config),
        "layers compute in their own dtype: set trainer.precision=32-true, and model.dtype": (
            trainer.precision != "32-true"
        ),
        "its processes share files: set trainer.num_nodes=1": trainer.num_nodes > 1,
    }
    for reason, applies in problems.items():
        if applies:
            raise ConfigError(
                f"model.loading is streamed, but {reason}; or set model.loading=whole"
            )


def _refuse_ignored(config: CompensateConfig) -> None:
    reads_instructions = uses_instructions(config)
    unread: list[tuple[str, Any, str]] = []  # Any: a section
    if config.train not in ADAPTER_MODES:
        unread.append(("lora", LoraSettings(), f"train: {config.train} has no adapters"))
    unread += _unread_distillation(config)
    if config.objective != "local":
        unread.append(("local", LocalConfig(), f"objective is {config.objective}, not local"))
    if reads_instructions:
        unread.append(("text", TextConfig(), "the model is trained on instructions"))
    else:
        unread.append(("data", InstructionConfig(), "the model is trained on plain text"))
    for section, defaults, reason in unread:
        for key in fields(defaults):
            value = getattr(getattr(config, section), key.name)
            if value != getattr(defaults, key.name):
                raise ConfigError(
                    f"{section}.{key.name} is {value!r}, but would be ignored: {reason}; leave it "
                    "out"
                )


def _unread_distillation(config: CompensateConfig) -> list[tuple[str, DistillationConfig, str]]:
    """Return what must be unset in section ``distillation``, and why; a teacher may be missing."""
    given, defaults = config.distillation, DistillationConfig()
    is_distilled, is_local = config.objective == "distill", config.objective == "local"
    if needs_dense(config) and given.teacher is None:
        which = f"objective: {config.objective}" if is_distilled or is_local else "text.source self"
        raise ConfigError(
            f"{which} needs distillation.teacher: the dense model, as a folder, hub name, .gguf "
            "file or smollm2"
        )
    if is_distilled:
        uncached = replace(given, top_k=defaults.top_k, cache_dir=None)
        reason = "distillation.cache is false"
        return [] if given.cache else [("distillation", uncached, reason)]
    if needs_dense(config):  # which only writes text, or gives hidden states
        defaults = replace(defaults, teacher=given.teacher, device=given.device)
    if is_local:
        if given.data == "text":  # which it reads anyway
            defaults = replace(defaults, data="text")
        return [("distillation", defaults, "objective: local learns hidden states of plain text")]
    return [("distillation", defaults, f"objective: {config.objective} has no teacher")]


def _check_local(config: CompensateConfig) -> None:
    """Refuse what makes no sense if one layer is trained at a time."""
    if config.train in ADAPTER_MODES:
        raise ConfigError(
            f"objective: local trains weights themselves, but train is {config.train}; set train: "
            "all, replaced or factors"
        )
    if config.trainer.strategy not in {"auto", "ddp"}:
        raise ConfigError(
            f"objective: local trains one layer at a time, so there is nothing for "
            f"trainer.strategy {config.trainer.strategy} to divide; use auto or ddp"
        )
    for key in ("patience", "gradient_checkpointing"):
        value = getattr(config.training, key)
        if value != getattr(TrainingConfig(), key):
            raise ConfigError(
                f"training.{key} is {value}, but would be ignored: objective: local trains one "
                "layer at a time; leave it out"
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


def _check_optimizer(config: CompensateConfig) -> None:
    name, strategy = config.optimizer.name, config.trainer.strategy
    if name == "adamw":
        return
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"optimizer.name {name} needs the package bitsandbytes: pip install "
            "'grasp-lightning[quantize]', or use adamw"
        )
    if strategy not in {"auto", "ddp"}:
        raise ConfigError(
            f"optimizer.name {name} cannot divide its states between processes, as "
            f"trainer.strategy {strategy} does: use adamw, or trainer.strategy auto or ddp"
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
