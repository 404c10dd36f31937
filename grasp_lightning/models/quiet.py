"""Silence around calls of transformers and of the hub's client: this package shows progress."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import transformers
from transformers import modeling_gguf_pytorch_utils

from grasp_lightning.models.quiet_hub import quiet_hub


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence logs of transformers below an error, and progress bars of it and of the hub."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.ERROR)
    try:
        with _without_bars():
            yield
    finally:
        transformers.logging.set_verbosity(level)


@contextmanager
def _without_bars() -> Iterator[None]:
    gguf: Any = modeling_gguf_pytorch_utils  # Any: it has a bar of its own, which no setting hides
    gguf_bar, hook = gguf.tqdm, transformers.logging.set_tqdm_hook(_disabled)
    gguf.tqdm = partial(gguf_bar, disable=True)
    try:
        with quiet_hub():
            yield
    finally:
        gguf.tqdm = gguf_bar
        transformers.logging.set_tqdm_hook(hook)


def _disabled(
    make: Callable[..., Any],  # Any: a bar of tqdm
    args: tuple[Any, ...],  # Any: its arguments
    options: dict[str, Any],  # Any: its arguments
) -> Any:  # noqa: ANN401  a bar of tqdm
    return make(*args, **{**options, "disable": True})
