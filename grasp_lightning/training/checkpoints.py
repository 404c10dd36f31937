"""Checks of a Trainer's checkpoint before a training continues from it."""

from collections.abc import Mapping
from typing import Any

from grasp_lightning.errors import ModelError


def check_checkpoint(
    checkpoint: Mapping[str, Any],  # Any: Lightning's own type
    stored: Mapping[str, str],
    own: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    path: object,
) -> None:
    """Refuse a checkpoint of another training, or one without a tensor.

    Args:
        checkpoint: Content of the file.
        stored: The fingerprint in it.
        own: Fingerprint of this training.
        shapes: Shapes of the trained parameters.
        path: The file, for messages.

    Raises:
        ModelError: If a fingerprint or a tensor's shape differs.
    """
    differing = sorted(key for key in own if stored.get(key) != own[key])
    if differing:
        raise ModelError(
            "the checkpoint belongs to a different training: it differs in "
            f"{', '.join(differing)}; start again, or use the settings it was made with"
        )
    for name, shape in shapes.items():
        if getattr(checkpoint["state_dict"].get(name), "shape", None) != shape:
            raise ModelError(
                f"{path} is damaged: it has no {name} of shape {shape}; delete it to train again "
                "from the start"
            )
