"""The compensation that follows a compression in one command: its keys and their defaults."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from grasp_lightning.config.common import TrainerConfig
from grasp_lightning.config.compensate import CompensateConfig
from grasp_lightning.config.compensate_settings import check_settings, needs_dense
from grasp_lightning.config.compress import CompressConfig, PlanConfig
from grasp_lightning.config.keywords import parse_keywords
from grasp_lightning.config.parsing import parse
from grasp_lightning.errors import ConfigError
from grasp_lightning.reading.text import user_path

_PREFIX: Final = "--compensate."
# Keys and sections that the compression decides on; those of a file are for ``compensate`` alone.
_OF_COMPRESSION: Final = frozenset(
    {"output_dir", "overwrite", "dry_run", "evaluation"}
    | {f"model.{key}" for key in ("path", "revision", "gguf_file")}
)


def split_options(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line into options of the compression and of the compensation after it.

    The latter begin with ``--compensate.``, which is taken off.
    """
    own: list[str] = []
    second: list[str] = []
    is_open = False
    for word in argv:
        if word.startswith(_PREFIX):
            second.append(f"--{word.removeprefix(_PREFIX)}")
        elif is_open and not word.startswith("--"):  # the value of the option before
            second.append(word)
        else:
            own.append(word)
        is_open = word.startswith(_PREFIX) and "=" not in word
    return own, second


def second_stage(
    config: CompressConfig, options: Sequence[str] = (), *, can_teach: bool = True
) -> CompensateConfig | None:
    """Return the compensation that the file ``config.compensate`` and options describe, if any.

    See ``following``; the model of the result is still the dense one.

    Args:
        config: The compression.
        options: Further options of ``compensate``.
        can_teach: Whether the dense model can be loaded by its path.

    Raises:
        ConfigError: If the file is missing, or as ``compensate`` refuses it.
    """
    keys = [word.removeprefix("--").partition("=")[0] for word in options if word[:2] == "--"]
    if config.compensate is None:
        if keys:
            raise ConfigError(f"{_PREFIX}{keys[0]} has no effect without --compensate FILE")
        return None
    if not user_path(config.compensate, "--compensate", ConfigError).is_file():
        raise ConfigError(f"--compensate {config.compensate}: no such file")
    _refuse_keys_of_compression(keys)
    argv = [f"--config={config.compensate}", *options, f"--model.path={config.model.path}"]
    try:
        settings = parse(CompensateConfig, "compensate", argv)
        return following(config, settings, can_teach=can_teach)
    except ConfigError as error:
        raise ConfigError(f"--compensate: {error}") from error


def second_stage_of_keywords(
    config: CompressConfig, keys: Mapping[str, Any], *, can_teach: bool
) -> CompensateConfig:
    """Return the compensation that the keywords of a Python call describe.

    Args:
        config: The compression.
        keys: Keywords of ``compensate``.
        can_teach: Whether the dense model can be loaded by its path.

    Raises:
        ConfigError: As ``compensate`` does.
    """
    _refuse_keys_of_compression(_dotted(keys))
    given = {**keys, "model": {**keys.get("model", {}), "path": config.model.path}}
    try:
        settings = parse_keywords(CompensateConfig, given, "compensate")
        return following(config, settings, can_teach=can_teach)
    except ConfigError as error:
        raise ConfigError(f"compress: {error}") from error


def following(
    config: CompressConfig, settings: CompensateConfig, *, can_teach: bool = True
) -> CompensateConfig:
    """Return a compensation with what it takes over from the compression before it.

    Both measure perplexity on the same text and have the same processes. Where the settings leave
    it open, the dense model teaches, and device and remote code follow the compression.

    Args:
        config: The compression.
        settings: The compensation.
        can_teach: Whether the dense model can be loaded by its path.

    """
    dense, model = config.model, settings.model
    model = replace(
        model,
        path=dense.path,
        revision=None,
        gguf_file=None,
        device=dense.device if model.device == "auto" else model.device,
        trust_remote_code=dense.trust_remote_code or model.trust_remote_code,
    )
    distillation = settings.distillation
    is_named = can_teach and dense.revision is None and dense.gguf_file is None
    if needs_dense(settings) and distillation.teacher is None and is_named:
        distillation = replace(distillation, teacher=dense.path)
    trainer = settings.trainer
    if not isinstance(config, PlanConfig):  # which runs neither
        trainer = _trainer(config.trainer, trainer)
    settings = replace(
        settings,
        output_dir=config.output_dir,
        overwrite=config.overwrite,
        dry_run=False,
        model=model,
        distillation=distillation,
        evaluation=config.evaluation,
        trainer=trainer,
    )
    check_settings(settings)
    return settings


def _trainer(first: TrainerConfig, second: TrainerConfig) -> TrainerConfig:
    """Return the Trainer of the second stage, with the processes of the first."""
    for key in ("devices", "num_nodes"):
        asked, there = getattr(second, key), getattr(first, key)
        if asked not in (1, there):
            raise ConfigError(
                f"trainer.{key} is {asked} here and {there} in the compression: one command has "
                f"the same processes in both; set --trainer.{key}={asked}, or run compensate on "
                "its own afterwards"
            )
    accelerator = first.accelerator if second.accelerator == "auto" else second.accelerator
    return replace(
        second, devices=first.devices, num_nodes=first.num_nodes, accelerator=accelerator
    )


def _refuse_keys_of_compression(keys: Iterable[str]) -> None:
    for key in keys:
        if key in _OF_COMPRESSION or key.partition(".")[0] in _OF_COMPRESSION:
            raise ConfigError(
                f"compensate.{key} has no effect: the compression decides on it; leave it out"
            )


def _dotted(keys: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in keys.items():
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"
