"""How commands that take several models load each of them, and name them in messages."""

import re
from collections.abc import Iterator
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


def model_settings(keys: SharedModelKeys, path: str, key: str) -> ModelConfig:
    """Return how one of several models is loaded; a revision is for those from the hub.

    Args:
        keys: Configuration of the command.
        path: The model, as the user named it.
        key: Key under which it was named, for messages.

    Returns:
        The configuration.
    """
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
