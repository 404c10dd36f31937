"""Our own method: one parameter budget, spent where the loss curves least.

A change D of a weight costs ``tr(A D C D^T) / 2`` nats per token, with C the mean of x x^T over the
inputs of the linear, and A that of g g^T over gradients by its outputs: by default random ones,
with the covariance that labels drawn from the model's predictions give (``metric.fisher``). The
decomposition in this metric gives components whose losses are comparable across all matrices of
the model. MLPs lose hidden channels, priced in the same metric with the others refitted. One
Lagrange multiplier decides what stays dense, and at which rank or width the rest goes; at last,
what writes into the residual stream is fitted to what the stream lacks. There is no choice of
layers beforehand, and no score beside the singular value.

It takes from GRASP (arXiv:2501.00339) that loss gradients on little text decide; from SVD-LLM
(arXiv:2403.07378) the Gram matrix of inputs as a metric; from K-FAC (arXiv:1503.05671) the
curvature as a product of two Gram matrices; from the optimal brain surgeon (1993) and ZipLM
(arXiv:2302.04089) the removal of channels; from Shoham and Gersho (1988) the allocation.
"""

from dataclasses import replace
from typing import Final

from grasp_lightning.config import MethodConfig
from grasp_lightning.methods.base import Registered
from grasp_lightning.methods.grasp import PRESETS
from grasp_lightning.methods.low_rank import PLAIN, check_amount, truncation, with_parts
from grasp_lightning.methods.options import refuse_ignored

_PARTS: Final = replace(
    PLAIN, weighting="kfac", ranks="global", mlp="channels", refit="residual", input_damping=1e-2
)


def _resolved(config: MethodConfig) -> MethodConfig:
    config = check_amount(config)
    owner = "grasp" if config.preset in PRESETS else "low_rank"
    refuse_ignored(config, ("preset",), "method grasp_plus is one", f"set method.name={owner}")
    return with_parts(config, _PARTS)


GRASP_PLUS: Final = Registered(
    name="grasp_plus",
    ignores="keeps the largest components",
    remedy="set method.name=grasp",
    resolve=_resolved,
    build=truncation,
)
