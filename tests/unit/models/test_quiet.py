"""Bars and logs of the loaders are hidden, and as they were afterwards."""

import io
import sys
from typing import Any

import pytest
import transformers
from huggingface_hub.utils.tqdm import are_progress_bars_disabled
from transformers import modeling_gguf_pytorch_utils

from grasp_lightning.models.quiet import quiet_transformers


def drawn() -> str:
    """Return what the bars of transformers and of its reader of GGUF files draw."""
    file = io.StringIO()
    gguf: Any = modeling_gguf_pytorch_utils  # Any: it does not export its bar
    for bar in (transformers.utils.logging.tqdm, gguf.tqdm):
        assert list(bar([1, 2], file=file)) == [1, 2]
    return file.getvalue()


def test_bars_are_hidden_and_then_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    # Tests run without bars.
    monkeypatch.setattr(transformers.utils.logging, "_tqdm_active", True)
    hub = sys.modules["huggingface_hub.utils.tqdm"]
    monkeypatch.setattr(hub, "HF_HUB_DISABLE_PROGRESS_BARS", None)
    monkeypatch.setattr(hub, "progress_bar_states", {})
    assert not are_progress_bars_disabled()
    assert drawn().count("2/2") == 2
    with quiet_transformers():
        assert drawn() == ""
        assert are_progress_bars_disabled()
        with quiet_transformers():
            assert drawn() == ""
        assert drawn() == ""
    assert drawn().count("2/2") == 2
    assert not are_progress_bars_disabled()
