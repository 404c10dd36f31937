import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from grasp_lightning.errors import ConfigError
from grasp_lightning.plan import OPERATIONS, Plan
from grasp_lightning.plugins import load_method

OPERATION = """
from grasp_lightning.plan import Operation, operation

@operation("polish")
class Polish(Operation):
    layers: tuple[int, ...]

METHOD = "what methods would look at"
"""


@pytest.fixture
def _package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package that adds methods, as pip would have installed it."""
    (tmp_path / "polisher.py").write_text(OPERATION)
    info = tmp_path / "polisher-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: polisher\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[grasp_lightning.methods]\npolish = polisher:METHOD\nlost = polisher:GONE\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert "polisher" not in sys.modules
    yield
    del OPERATIONS["polish"], sys.modules["polisher"]


@pytest.mark.usefixtures("_package")
def test_a_plan_finds_the_operations_of_its_method_in_the_package_that_adds_it() -> None:
    entry = {"kind": "polish", "layers": [1, 2]}
    text = json.dumps({**json.loads(Plan(method="polish").to_json()), "operations": [entry]})
    (found,) = Plan.from_json(text).operations
    assert type(found) is OPERATIONS["polish"]
    assert asdict(found) == {"layers": (1, 2)}
    assert load_method("polish") == "what methods would look at"


@pytest.mark.usefixtures("_package")
def test_an_entry_point_that_names_nothing_is_one_line() -> None:
    with pytest.raises(ConfigError, match="lost, the entry point polisher:GONE cannot be loaded"):
        load_method("lost")
    assert load_method("nothing") is None
