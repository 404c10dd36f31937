"""What cannot be done to a model that computes more than its family does."""

from torch import nn

from grasp_lightning.models.factored_rows import factorized_rows
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


def computation_refusal(model: nn.Module, who: str) -> str | None:
    """Return the ``seam_refusal`` or else the ``rows_refusal`` of a model, if any."""
    return seam_refusal(model, who) or rows_refusal(model, who)


def rows_refusal(model: nn.Module, who: str) -> str | None:
    """Return why a program or format cannot hold a model, as the rest of a sentence.

    Arguments: see ``seam_refusal``.

    Returns:
        None if the model has no factorized rows in embedding or head.
    """
    if not factorized_rows(model):
        return None
    return (
        f"has an embedding or head of factors (method.embeddings=factors), which {who} cannot "
        "compute; export it with format=dense, or compress with method.embeddings=none"
    )
