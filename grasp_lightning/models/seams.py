"""What cannot be done to a model with seams, see ``models.lowrank.SeamLinear``."""

from torch import nn

from grasp_lightning.models.lowrank import seams


def seam_refusal(model: nn.Module, who: str) -> str | None:
    """Return why a program or format cannot hold a model with seams, as the rest of a sentence.

    Args:
        model: The model; the meta device works.
        who: The program or format, for the text.

    Returns:
        None if the model has no seams.
    """
    if not seams(model):
        return None
    return (
        f"has seams (linear maps of the hidden states, method.seam=linear), which {who} cannot "
        "compute; compress with method.seam=none or method.name=replaceme"
    )
