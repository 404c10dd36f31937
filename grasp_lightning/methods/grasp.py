"""GRASP: gradient-based retention of adaptive singular parameters."""

from grasp_lightning.methods.base import Track, untracked
from grasp_lightning.methods.layer_choice import LayerChoice
from grasp_lightning.methods.low_rank import LowRankMethod
from grasp_lightning.stats.base import Scoring


def grasp(
    *, layers: LayerChoice, scoring: Scoring, keep_ratio: float, track: Track = untracked
) -> LowRankMethod:
    """Return the paper's method: plain SVD, components scored by loss gradients, uniform ranks.

    Source: Liu et al., "GRASP", arXiv:2501.00339, Algorithm 1.

    Args:
        layers: How redundant layers are chosen.
        scoring: How components are scored; the defaults are the paper's Eq. 6.
        keep_ratio: Share of each matrix's parameters that its factors keep, in [0, 1).
        track: Shows the progress of factorisations.

    Returns:
        The method.
    """
    return LowRankMethod(
        name="grasp",
        reference="https://arxiv.org/abs/2501.00339",
        layers=layers,
        scoring=scoring,
        keep_ratio=keep_ratio,
        track=track,
    )
