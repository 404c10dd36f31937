"""What cannot be done to a model that computes more than its family does: seams and shortcuts."""

from torch import nn

from grasp_lightning.models.lowrank import seams
from grasp_lightning.models.sliced import is_sliced


def seam_refusal(model: nn.Module, who: str) -> str | None:
    """Return why a program or format cannot hold a model, as the rest of a sentence.

    Args:
        model: The model; the meta device works.
        who: The program or format, for the text.

    Returns:
        None if the model has neither seams nor sliced hidden states.
    """
    if is_sliced(model):
        return (
            "has sliced hidden states (method.name=slicegpt), with matrices in the residual "
            f"connections that {who} cannot compute; compress with another method"
        )
    if not seams(model):
        return None
    return (
        f"has seams (linear maps of the hidden states, method.seam=linear), which {who} cannot "
        "compute; compress with method.seam=none or method.name=replaceme"
    )
