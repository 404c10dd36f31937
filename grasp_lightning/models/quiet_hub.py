"""Silence around downloads; progress is shown by us."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.utils.tqdm import disable_progress_bars


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Silence progress bars of the hub's client."""
    # If the variable is set to false, the user asks for these bars, and the client would warn.
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is False:
        yield
        return
    with disable_progress_bars():
        yield
