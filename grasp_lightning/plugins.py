"""Methods of other installed packages: entry points ``grasp_lightning.methods``.

A package is only imported when a configuration or a plan names its method.
"""

from importlib.metadata import EntryPoint, entry_points
from typing import cast

from grasp_lightning.errors import ConfigError

GROUP = "grasp_lightning.methods"


def method_plugins() -> dict[str, EntryPoint]:
    """Return the entry points by method name."""
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def load_method(name: str) -> object | None:
    """Import a method and its package's operations; return None if no package has it."""
    entry = method_plugins().get(name)
    if entry is None:
        return None
    try:
        return cast(object, entry.load())
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"method.name: {name}, the entry point {entry.value} cannot be loaded: {error}"
        ) from error
