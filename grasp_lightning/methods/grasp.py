"""GRASP: gradient-based retention of adaptive singular parameters."""

from grasp_lightning.config import Schedule
from grasp_lightning.methods.base import Track, untracked
from grasp_lightning.methods.layer_choice import LayerChoice
from grasp_lightning.methods.low_rank import LowRankMethod
from grasp_lightning.methods.rank_rules import RankRule
from grasp_lightning.stats.base import Scoring


def grasp(
    *,
    layers: LayerChoice,
    scoring: Scoring,
    rank_rule: RankRule | None,
    schedule: Schedule = "one_shot",
    score_all_layers: bool = False,
    track: Track = untracked,
) -> LowRankMethod:
    """Return the paper's method: plain SVD, components scored by loss gradients.

    Source: Liu et al., "GRASP", arXiv:2501.00339, Algorithm 1.

    Args:
        layers: How redundant layers are chosen.
        scoring: How components are scored; the defaults are the paper's Eq. 6.
        rank_rule: How many components each weight keeps; None deletes the layers.
        schedule: All layers in one pass, or block by block from the last one.
        score_all_layers: Score all layers' components, beyond the chosen ones.
        track: Shows the progress of factorisations.

    Returns:
        The method.
    """
    return LowRankMethod(
        name="grasp",
        reference="https://arxiv.org/abs/2501.00339",
        layers=layers,
        scoring=scoring,
        rank_rule=rank_rule,
        schedule=schedule,
        score_all_layers=score_all_layers,
        track=track,
    )
