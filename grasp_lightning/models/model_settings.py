"""Settings and error messages of commands that load several models."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from grasp_lightning.config import BenchmarkConfig, EvaluateConfig, ModelConfig
from grasp_lightning.errors import ConfigError, ModelError
from grasp_lightning.models.source import resolve_source

_MODEL_KEY = re.compile(r"\bmodel\.(path|revision|device|dtype|trust_remote_code|loading)\b")


def all_settings(
    keys: BenchmarkConfig | EvaluateConfig, paths: Sequence[str], names: Sequence[str]
) -> list[ModelConfig]:
    """Return the configurations of models by path and key; those from the hub get the revision."""
    settings = []
    for path, name in zip(paths, names, strict=True):
        with named_by(name):
            is_hub = resolve_source(ModelConfig(path=path)).is_hub
        settings.append(
            ModelConfig(
                path=path,
                revision=keys.revision if is_hub else None,
                dtype=keys.dtype,
                device=keys.device,
                trust_remote_code=keys.trust_remote_code,
                loading=keys.loading if isinstance(keys, EvaluateConfig) else "whole",
            )
        )
    if keys.revision is not None and all(one.revision is None for one in settings):
        raise ConfigError("revision has no effect: no model comes from the hub; leave it out")
    return settings


@contextmanager
def named_by(key: str) -> Iterator[None]:
    """In errors, name ``model.path`` by the command's own key, and ``model.dtype`` as ``dtype``."""
    try:
        yield
    except (ConfigError, ModelError) as error:
        text = _MODEL_KEY.sub(lambda found: key if found[1] == "path" else found[1], str(error))
        raise type(error)(text) from error
