"""Scores of singular components, summed over windows.

Legend: T tokens of a window, N output and M input features of a linear, K = min(N, M) components.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from grasp_lightning.errors import NumericsError
from grasp_lightning.linalg.components import (
    GradientScore,
    TokenGradient,
    sigma_gradients,
    window_scores,
)
from grasp_lightning.linalg.factors import SVD
from grasp_lightning.stats.base import Scoring, check_seen


class ComponentScores:
    """Sums the scores of every singular component of several linears, window by window.

    Terms that are not linear in the data (absolute values, squares) are formed per window, so
    scores do not depend on the batch size or the number of processes. ``signed`` sums first:
    gradients of the singular values if they alone are scored, else the weight's gradient.

    Args:
        bases: Decompositions of the weights, by module.
        scoring: How gradients become scores.

    Raises:
        ValueError: If the score is ``magnitude``, which needs no data.
    """

    def __init__(self, bases: Mapping[str, SVD], scoring: Scoring) -> None:
        if scoring.score == "magnitude":
            raise ValueError("score 'magnitude' needs no gradients")
        self._bases = bases
        self._scoring = scoring
        self._score: GradientScore = scoring.score
        self.sums = {name: self._zeros(basis) for name, basis in bases.items()}
        self._num_windows = dict.fromkeys(bases, 0)

    @property
    def _sums_weight_gradients(self) -> bool:
        return self._scoring.reduction == "signed" and self._scoring.terms == "full"

    def _zeros(self, basis: SVD) -> Tensor:
        if self._sums_weight_gradients:
            return basis.u.new_zeros(basis.u.shape[0], basis.vh.shape[1])
        return torch.zeros_like(basis.s, dtype=torch.float64)

    def add(self, module: str, x: Tensor, grad_output: Tensor) -> None:
        """Add one window of a linear: input ``(T, M)``, gradient of its output ``(T, N)``."""
        basis, gradient = self._bases[module], TokenGradient(x, grad_output)
        self._num_windows[module] += 1
        if self._sums_weight_gradients:
            self.sums[module] += gradient.dense(basis.s.dtype)
        elif self._scoring.reduction == "signed":
            self.sums[module] += sigma_gradients(basis, gradient)
        else:
            self.sums[module] += self._window_scores(basis, gradient)

    def state(self) -> dict[str, Tensor]:
        """Return the sums so far by module, on the CPU."""
        return {name: value.cpu() for name, value in self.sums.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore sums from ``state``."""
        self.sums = {name: state[name].to(value) for name, value in self.sums.items()}

    def check_seen(self) -> None:
        """Raise ``ModelError`` for a linear that was called less often than others."""
        check_seen(self._num_windows, "its components cannot be scored")

    def mean(self, num_targets: int) -> dict[str, Tensor]:
        """Return the scores per predicted token, float32, ``(K,)`` per module.

        Raises:
            NumericsError: If a score is NaN or infinite.
        """
        self.check_seen()
        scores = {name: self._reduced(name) / num_targets for name in self.sums}
        for name, values in scores.items():
            if not values.isfinite().all():
                raise NumericsError(
                    f"the gradient of {name} is NaN or infinite; check the checkpoint, or compute "
                    "in float32 (model.dtype, trainer.precision) if it is narrower"
                )
        return {name: values.float().cpu() for name, values in scores.items()}

    def _reduced(self, module: str) -> Tensor:
        basis, total = self._bases[module], self.sums[module]
        if self._sums_weight_gradients:
            return self._window_scores(basis, total)
        if self._scoring.reduction == "signed":
            return (total * basis.s if self._score == "taylor" else total).abs()
        return total

    def _window_scores(self, basis: SVD, weight_grad: Tensor | TokenGradient) -> Tensor:
        return window_scores(
            basis,
            weight_grad,
            terms=self._scoring.terms,
            score=self._score,
            squared=self._scoring.reduction == "squared",
        )
