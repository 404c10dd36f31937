import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from tests.unit.serving.stand_in_vllm import ENGINE, modules

_NEEDS_VLLM = ("completeness", "config", "linear")


@pytest.fixture
def stand_in_vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets the plugin be imported; afterwards, no module has seen the stand-ins."""
    for name, module in modules().items():
        parents = [name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1)]
        for parent in parents:
            monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        monkeypatch.setitem(sys.modules, name, module)
    for name, module in modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    yield
    ENGINE.config = None
    for name in _NEEDS_VLLM:
        sys.modules.pop(f"grasp_lightning_vllm.{name}", None)
