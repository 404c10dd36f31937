"""The metric in which low-rank methods truncate weights."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grasp_lightning.config import FisherChoice, Weighting
from grasp_lightning.linalg.channels import Removal, narrowed_weight, removal_order
from grasp_lightning.linalg.factors import SVD
from grasp_lightning.linalg.weightings import (
    activation_scales,
    damped_root,
    weighted_singular_values,
    weighted_svd,
)
from grasp_lightning.plan import OptionValue
from grasp_lightning.stats.base import MomentKind, Moments

_STACKED = 3  # dimensions of the weights of experts
GRADIENT_DAMPING = 1e-2
INPUT_DAMPING = 1e-4
_KINDS: dict[Weighting, frozenset[MomentKind]] = {
    "none": frozenset(),
    "fisher_rows": frozenset({"fisher_columns"}),
    "scale_columns": frozenset({"input_scale"}),
    "input_gram": frozenset({"input_gram"}),
    "kfac": frozenset({"input_gram", "gradient_gram"}),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """How much a change of a weight counts.

    ``none`` counts entries equally. ``fisher_rows`` (FWSVD, arXiv:2207.00112) weights every input
    by its Fisher information: the inputs are the rows of that paper's weights. ``scale_columns``
    (ASVD, arXiv:2312.05821) weights every input by the root of its mean modulus. ``input_gram``
    (SVD-LLM, arXiv:2403.07378) counts the squared error of the outputs. ``kfac`` counts half the
    change's curvature of the loss, in nats per token, with the Kronecker-factored approximation
    of Martens and Grosse (arXiv:1503.05671); only its losses are comparable across matrices.

    Attributes:
        weighting: One of the above.
        fisher: Whose gradients measure the curvature, for ``kfac``.
        gradient_damping: Share of its mean diagonal that is added to the Gram matrix of gradients.
        input_damping: The same for the Gram matrix of inputs.
    """

    weighting: Weighting
    fisher: FisherChoice = "empirical"
    gradient_damping: float = GRADIENT_DAMPING
    input_damping: float = INPUT_DAMPING

    @property
    def options(self) -> Mapping[str, OptionValue]:
        """The options that decompositions depend on, for the plan."""
        options: dict[str, OptionValue] = {"weighting": self.weighting}
        if self.weighting == "kfac":
            options["fisher"] = self.fisher
            options["gradient_damping"] = self.gradient_damping
        if self.weighting in ("kfac", "input_gram", "fisher_rows"):
            options["input_damping"] = self.input_damping
        return options

    @property
    def moment_kinds(self) -> frozenset[MomentKind]:
        """The moments to measure for each linear."""
        return _KINDS[self.weighting]

    def decompose(self, weight: Tensor, moments: Moments) -> SVD:
        """Decompose a weight ``(N, M)`` for optimal truncation; its vectors are not orthonormal."""
        return weighted_svd(weight, *self._roots(moments))

    def losses(self, weight: Tensor, moments: Moments) -> Tensor:
        """Return the loss of dropping each component of a weight ``(N, M)``.

        Returns:
            ``(K,)``, descending, float64: predicted nats per token for ``kfac``, else the squared
            singular values.
        """
        return self.of_singular_values(weighted_singular_values(weight, *self._roots(moments)))

    def of_singular_values(self, values: Tensor) -> Tensor:
        """Return the loss of components with these singular values ``(K,)``, in float64."""
        squares = values.double().square()
        # The loss is quadratic around the dense weight: half its second derivative.
        return squares / 2 if self.weighting == "kfac" else squares

    @property
    def orders_channels(self) -> bool:
        """True if this metric can order the channels of an MLP for removal."""
        return self.weighting in ("kfac", "input_gram")

    def removal(self, weight: Tensor, moments: Moments) -> Removal:
        """Return the greedy order in which inputs of a weight ``(N, M)`` are removed.

        Losses are predicted nats per token for ``kfac``, else squared errors of the outputs. The
        weights of experts, ``(E, N, M)``, have an order and losses each, ``(E, M)``.
        """
        left, gram = self._left_root(moments), _measured(moments.input_gram)
        damping = self.input_damping
        if weight.ndim == _STACKED:
            grams = self._with_prior(gram, range(len(weight)))
            pairs = zip(weight, grams, strict=True)
            found = [removal_order(one, own, left, damping) for one, own in pairs]
            order = torch.stack([removal.order for removal in found])
            losses = torch.stack([removal.losses for removal in found])
        else:
            order, losses = removal_order(weight, gram, left, damping)
        return Removal(order, losses / 2 if self.weighting == "kfac" else losses)

    def narrowed(
        self, weight: Tensor, moments: Moments, kept: Tensor, experts: Sequence[int] = ()
    ) -> Tensor:
        """Refit a weight ``(N, M)`` to the kept inputs, ascending, ``(k,)``: ``(N, k)``.

        Of the weights of experts, ``(E, N, M)``, some keep inputs, a row of ``(..., k)`` each.
        Theirs keep their dtype.
        """
        gram, damping = _measured(moments.input_gram), self.input_damping
        if weight.ndim < _STACKED:
            return narrowed_weight(weight, gram, kept.tolist(), damping)
        parts = zip(experts, self._with_prior(gram, experts), kept.tolist(), strict=True)
        return torch.stack(
            [
                narrowed_weight(weight[expert], own, channels, damping).to(weight.dtype)
                for expert, own, channels in parts
            ]
        )

    def _with_prior(self, grams: Tensor, experts: Iterable[int]) -> Iterator[Tensor]:
        """Yield the Gram matrix of some experts, each with the damping of the average expert.

        An expert with few tokens has a small one, which says little: without this prior, its
        channels would seem free.
        """
        pooled = float(grams.diagonal(dim1=-2, dim2=-1).double().mean())
        for expert in experts:
            own = grams[expert].clone()
            own.diagonal().add_(self.input_damping * pooled)
            yield own

    def _roots(self, moments: Moments) -> tuple[Tensor | None, Tensor | None]:
        """Return the roots of the output metric and the input metric."""
        if self.weighting == "none":
            return None, None
        if self.weighting == "fisher_rows":
            return None, damped_root(_measured(moments.fisher_columns), self.input_damping)
        if self.weighting == "scale_columns":
            return None, activation_scales(_measured(moments.input_scale))
        right = damped_root(_measured(moments.input_gram), self.input_damping)
        return self._left_root(moments), right

    def _left_root(self, moments: Moments) -> Tensor | None:
        if self.weighting != "kfac":
            return None
        return damped_root(_measured(moments.gradient_gram), self.gradient_damping)


def _measured(moment: Tensor | None) -> Tensor:
    assert moment is not None  # the step requested it
    return moment
