"""Predictions of a model with factors of single groups of rows of its embedding and head."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor

from grasp_lightning.evaluation.cut_losses import cut_losses
from grasp_lightning.methods.embedding_rows import MeasuredRows
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.plan import FactorizeRows


def row_losses(
    view: DecoderView,
    rows: MeasuredRows,
    batches: Sequence[Mapping[str, Tensor]],
    track: Callable[[Sequence[str], str], Iterable[str]],
) -> dict[str, float]:
    """Return how far factors of half the rank of each group alone move the predictions.

    The distance is the same as in ``cut_losses``, averaged over the batches.

    Args:
        view: The dense model; each cut is applied and undone.
        rows: Its embedding and head.
        batches: Batches of ``TokenWindows.batch``, all of one size.
        track: Shows progress.

    Returns:
        Nats per predicted token by name of a group; equal in all processes.
    """
    trial = rows.trial()
    cuts = [cut for op in trial.operations if isinstance(op, FactorizeRows) for cut in op.cuts]
    found = [cut_losses(view, cuts, trial.tensors, batch, track) for batch in batches]
    # Rounding can make the divergence negative if nothing changes.
    totals = {cut.solved: sum(losses[cut.solved] for losses in found) for cut in cuts}
    return {name: max(total / len(found), 0.0) for name, total in totals.items()}
