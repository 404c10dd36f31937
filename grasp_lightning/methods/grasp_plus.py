"""GRASP plus: one parameter budget, spent where the loss curves least.

A change ``D`` of a weight costs ``tr(A D C D^T) / 2`` nats per token. ``C`` is the mean of
``x x^T`` over the inputs of the linear, and ``A`` that of ``g g^T`` over the gradients of its
outputs. By default these gradients are random, with the covariance that labels drawn from the
model's predictions would give (``metric.fisher``). The singular components in this metric have
losses that are comparable across all matrices of the model. MLPs lose hidden channels, priced in
the same metric with the other channels refitted. One Lagrange multiplier decides what stays dense,
and the rank or width of the rest. Finally, the linears that write to the residual stream are
refitted to reduce the accumulated error. There is no separate choice of layers, and no score other
than the singular value. With ``embeddings: factors``, the rows of embedding and head share the
budget, too, see ``embedding_rows``.

Sources: loss gradients on little text, GRASP (arXiv:2501.00339); the Gram matrix of inputs as a
metric, SVD-LLM (arXiv:2403.07378); curvature as a product of two Gram matrices, K-FAC
(arXiv:1503.05671); removal of channels, the optimal brain surgeon (1993) and ZipLM
(arXiv:2302.04089); allocation, Shoham and Gersho (1988).
"""

from dataclasses import replace
from typing import Final

from grasp_lightning.config import MethodConfig
from grasp_lightning.errors import ConfigError
from grasp_lightning.methods.base import Registered
from grasp_lightning.methods.grasp import PRESETS
from grasp_lightning.methods.low_rank import PLAIN, check_amount, obstacle, truncation, with_parts
from grasp_lightning.methods.options import refuse_ignored

_PARTS: Final = replace(
    PLAIN, weighting="kfac", ranks="global", mlp="channels", refit="residual", input_damping=1e-2
)


def _resolved(config: MethodConfig) -> MethodConfig:
    config = check_amount(config)
    owner = "grasp" if config.preset in PRESETS else "low_rank"
    refuse_ignored(config, ("preset",), "method grasp_plus is one", f"set method.name={owner}")
    config = with_parts(config, _PARTS)
    if config.embeddings == "factors":
        _check_embeddings(config)
    return replace(config, embeddings=config.embeddings or "none")


def _check_embeddings(config: MethodConfig) -> None:
    """Refuse parts that do not price rows of an embedding: a ``ConfigError``."""
    for key, needed in (
        ("weighting", "kfac"),
        ("fisher", "sampled"),
        ("ranks", "global"),
        ("target", "any"),
    ):
        value = getattr(config, key)
        if value not in (None, needed):
            raise ConfigError(
                f"method.embeddings factors needs method.{key}={needed}, got {value}: set one of "
                "them, or method.embeddings=none"
            )


GRASP_PLUS: Final = Registered(
    name="grasp_plus",
    ignores="keeps the largest components",
    remedy="set method.name=grasp",
    resolve=_resolved,
    build=truncation,
    obstacle=obstacle,
)
