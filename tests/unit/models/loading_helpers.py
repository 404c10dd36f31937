"""Shared by the tests of loading."""

from pathlib import Path

import pytest

from grasp_lightning.config import ModelConfig
from grasp_lightning.errors import ModelError
from grasp_lightning.models.loading import load_model


def cpu(path: Path | str, **keys: object) -> ModelConfig:
    return ModelConfig(path=str(path), **{"device": "cpu", **keys})  # type: ignore[arg-type]  # mixed


def message(config: ModelConfig, kind: type[Exception] = ModelError) -> str:
    with pytest.raises(kind) as caught:
        load_model(config)
    text = str(caught.value)
    assert "\n" not in text
    return text
