"""How commands that take several models load each of them, and name them in messages."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from grasp_lightning.config import Dtype, ModelConfig
from grasp_lightning.errors import ConfigError, ModelError
from grasp_lightning.models.source import resolve_source

_MODEL_KEY = re.compile(r"\bmodel\.(path|revision|device|dtype|trust_remote_code)\b")


class SharedModelKeys(Protocol):
    """The keys that are meant for all models of a command."""

    @property
    def revision(self) -> str | None:
        """Branch, tag or commit of a hub model."""

    @property
    def dtype(self) -> Dtype:
        """Floating point type of the weights."""

    @property
    def device(self) -> str:
        """Device that holds the model."""

    @property
    def trust_remote_code(self) -> bool:
        """Run model code that comes with the checkpoints."""


def all_settings(
    keys: SharedModelKeys, paths: Sequence[str], names: Sequence[str]
) -> list[ModelConfig]:
    """Return how several models are loaded; a revision is for those from the hub.

    Args:
        keys: Configuration of the command.
        paths: The models, as the user named them.
        names: Key under which each was named, for messages.

    Returns:
        Their configurations, in this order.

    Raises:
        ConfigError: If a revision is set, and no model comes from the hub.
    """
    settings = [_settings(keys, path, key) for path, key in zip(paths, names, strict=True)]
    if keys.revision is not None and all(one.revision is None for one in settings):
        raise ConfigError("revision has no effect: no model comes from the hub; leave it out")
    return settings


def _settings(keys: SharedModelKeys, path: str, key: str) -> ModelConfig:
    with named_by(key):
        is_hub = resolve_source(ModelConfig(path=path)).is_hub
    return ModelConfig(
        path=path,
        revision=keys.revision if is_hub else None,
        dtype=keys.dtype,
        device=keys.device,
        trust_remote_code=keys.trust_remote_code,
    )


@contextmanager
def named_by(key: str) -> Iterator[None]:
    """Let errors about a model speak of the keys of a command with several models.

    Args:
        key: What such a command calls ``model.path``.

    Yields:
        Nothing.

    Raises:
        ConfigError: If the block raises one.
        ModelError: If the block raises one.
    """
    try:
        yield
    except ConfigError as error:
        raise ConfigError(_renamed(str(error), key)) from error
    except ModelError as error:
        raise ModelError(_renamed(str(error), key)) from error


def _renamed(text: str, key: str) -> str:
    return _MODEL_KEY.sub(lambda found: key if found[1] == "path" else found[1], text)
