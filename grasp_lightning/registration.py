"""Lets transformers open compressed models without importing transformers first."""

import importlib.util
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Final

_AWAITED: Final = "transformers.modeling_utils"  # where ``from_pretrained`` looks up quantizers
_REGISTERS: Final = "grasp_lightning.models.lowrank"


def register_with_transformers() -> None:
    """Register low-rank linears now if transformers is imported, else when it is.

    This saves ``--help`` and mistyped keys the seconds that importing transformers and torch takes.
    """
    # On import, by peft too, bitsandbytes warns that a kernel which nothing here uses is absent.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    if _AWAITED in sys.modules:
        import_module(_REGISTERS)
    else:
        sys.meta_path.insert(0, _Finder())


@contextmanager
def without_warnings() -> Iterator[None]:
    """Drop logged warnings: torchao and bitsandbytes log one for each kernel that is absent."""
    level = logging.root.manager.disable
    logging.disable(max(level, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(level)


class _Finder(MetaPathFinder):
    """Finds the awaited module once, in the usual way; registers after its execution."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the usual spec of the awaited module, None for all others."""
        del path, target
        if fullname != _AWAITED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader)
        return spec


class _Registering(Loader):
    """Loads a module like another loader, then registers."""

    def __init__(self, usual: Loader) -> None:
        self._usual = usual

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Leave it to the usual loader."""
        return self._usual.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module, then import what registers."""
        with without_warnings():  # it imports torchao, if installed
            self._usual.exec_module(module)
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._usual
        import_module(_REGISTERS)
