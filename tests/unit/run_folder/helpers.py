"""Shared by the tests of run folders."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from grasp_lightning.errors import OutputError
from grasp_lightning.run_folder.folder import RunFolder

CONFIG: dict[str, Any] = {
    "output_dir": "runs/x",
    "overwrite": False,
    "seed": 0,
    "model": {"path": "m", "revision": None},
    "method": {"keep_ratio": 0.1, "layers": (1, 2)},
}


def changed(**method: object) -> dict[str, Any]:
    return {**CONFIG, "method": {**CONFIG["method"], **method}}


def refusal(
    path: Path | str,
    config: dict[str, Any] = CONFIG,
    overwrite: bool = False,
    protected: Sequence[Path] = (),
) -> str:
    with pytest.raises(OutputError) as caught:
        RunFolder.open(path, config, overwrite=overwrite, protected=protected)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def content(root: Path) -> dict[str, bytes | None]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes() if path.is_file() else None
        for path in root.rglob("*")
    }
