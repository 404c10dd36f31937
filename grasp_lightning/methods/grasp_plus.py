"""Our own method, and low-rank methods put together from its parts."""

from grasp_lightning.config import RefitChoice
from grasp_lightning.methods.base import Track, untracked
from grasp_lightning.methods.global_ranks import GlobalRanks
from grasp_lightning.methods.layer_choice import LayerChoice
from grasp_lightning.methods.low_rank import LowRankMethod
from grasp_lightning.methods.rank_rules import RankRule
from grasp_lightning.methods.weighting import Metric
from grasp_lightning.stats.base import Scoring

_MAGNITUDE = Scoring(score="magnitude")


def grasp_plus(
    *,
    layers: LayerChoice,
    rank_rule: RankRule | GlobalRanks | None,
    metric: Metric,
    refit: RefitChoice = "none",
    track: Track = untracked,
) -> LowRankMethod:
    """Return the method that spends one parameter budget where the loss curves least.

    A change D of a weight costs ``tr(A D C D^T) / 2`` nats per token, with C the mean of x x^T over
    the inputs of the linear, and A that of g g^T over gradients by its outputs: by default random
    ones, with the covariance that labels drawn from the model's predictions give
    (``metric.fisher``). The decomposition in this metric gives components whose losses are
    comparable across all matrices of the model. MLPs lose hidden channels, priced in the same
    metric with the others refitted. One Lagrange multiplier decides what stays dense, and at which
    rank or width the rest goes; at last, what writes into the residual stream is fitted to what the
    stream lacks. There is no choice of layers beforehand, and no score beside the singular value.

    It takes from GRASP (arXiv:2501.00339) that loss gradients on little text decide; from SVD-LLM
    (arXiv:2403.07378) the Gram matrix of inputs as a metric; from K-FAC (arXiv:1503.05671) the
    curvature as a product of two Gram matrices; from the optimal brain surgeon (1993) and ZipLM
    (arXiv:2302.04089) the removal of channels; from Shoham and Gersho (1988) the allocation.

    Args:
        layers: Layers that may be compressed.
        rank_rule: How many components each weight keeps.
        metric: How large a change of a weight counts.
        refit: How truncations are fitted once more.
        track: Shows the progress of factorisations.

    Returns:
        The method.
    """
    return low_rank(
        layers=layers,
        rank_rule=rank_rule,
        metric=metric,
        refit=refit,
        track=track,
        name="grasp_plus",
    )


def low_rank(
    *,
    layers: LayerChoice,
    rank_rule: RankRule | GlobalRanks | None,
    metric: Metric,
    refit: RefitChoice = "none",
    track: Track = untracked,
    name: str = "low_rank",
) -> LowRankMethod:
    """Return a truncation in any metric: plain SVD, FWSVD, ASVD, SVD-LLM, or a mixture of parts.

    Args:
        layers: Layers that may be compressed.
        rank_rule: How many components each weight keeps.
        metric: How large a change of a weight counts.
        refit: How truncations are fitted once more.
        track: Shows the progress of factorisations.
        name: Name of the combination.

    Returns:
        The method.
    """
    return LowRankMethod(
        name=name,
        reference=_REFERENCES[metric.weighting],
        layers=layers,
        scoring=_MAGNITUDE,
        rank_rule=rank_rule,
        metric=metric,
        refit=refit,
        track=track,
    )


_REFERENCES = {
    "none": "https://doi.org/10.1007/BF02288367",
    "fisher_rows": "https://arxiv.org/abs/2207.00112",
    "scale_columns": "https://arxiv.org/abs/2312.05821",
    "input_gram": "https://arxiv.org/abs/2403.07378",
    "kfac": "https://arxiv.org/abs/1503.05671",
}
