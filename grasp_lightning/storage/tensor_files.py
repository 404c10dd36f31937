"""Files of tensors that a run keeps for a later start, with metadata that say what they are of."""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from grasp_lightning.errors import PlanError


def metadata_of(path: Path) -> dict[str, str]:
    """Return the metadata of a file of tensors, without reading any of these.

    Args:
        path: The file.

    Returns:
        The metadata; empty if it has none.

    Raises:
        PlanError: If the file is damaged.
    """
    try:
        with safe_open(path, framework="pt") as content:
            return content.metadata() or {}
    except SafetensorError as error:
        raise PlanError(f"{path} is damaged: {error}; delete it to measure again") from error
