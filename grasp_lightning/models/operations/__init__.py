"""The operations that a plan can hold: one file each, with all that is to know about it."""

from typing import Any, Final

from grasp_lightning.models.operations.base import Applier
from grasp_lightning.models.operations.factorize import Factorize
from grasp_lightning.models.operations.narrow import Narrow
from grasp_lightning.models.operations.remove import Drop, Remove, Select
from grasp_lightning.plan import Operation

__all__ = ["APPLIERS", "Applier", "applier_of", "register"]

# Any: each is for operations of one type
APPLIERS: Final[dict[type[Operation], Applier[Any]]] = {}


def register(applier: Applier[Any]) -> None:  # Any: as above
    """Let operations of a type be applied."""
    APPLIERS[applier.operation] = applier


def applier_of(operation: Operation) -> Applier[Any]:  # Any: as above
    """Return the behaviour of an operation."""
    return APPLIERS[type(operation)]


for _applier in (Select(), Factorize(), Narrow(), Remove(), Drop()):
    register(_applier)
