"""The operations that a plan can hold, one file each."""

import pkgutil
from importlib import import_module

from grasp_lightning.models.operations.base import APPLIERS, Applier, applier_of, register

__all__ = ["APPLIERS", "Applier", "applier_of", "register"]

for _file in pkgutil.iter_modules(__path__, f"{__name__}."):
    import_module(_file.name)  # each registers its appliers
