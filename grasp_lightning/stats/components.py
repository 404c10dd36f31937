"""Scores of singular components, accumulated over windows.

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
    """Sums per-window scores of every singular component of several linears.

    What is not linear in the data (moduli, squares) is formed per window, so scores depend neither
    on the batch size nor on the number of processes. ``signed`` sums first: the gradients of the
    singular values where they alone are scored, else the gradient of the weight.

    Args:
        bases: Decompositions of the weights, by module.
        scoring: How gradients become scores; not ``magnitude``, which needs no data.

    Raises:
        ValueError: If the score is ``magnitude``.
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
        """Add one window of one linear.

        Args:
            module: Name of the linear.
            x: Its input, ``(T, M)``.
            grad_output: Gradient of the summed token loss by its output, ``(T, N)``.
        """
        basis, gradient = self._bases[module], TokenGradient(x, grad_output)
        self._num_windows[module] += 1
        if self._sums_weight_gradients:
            self.sums[module] += gradient.dense(basis.s.dtype)
        elif self._scoring.reduction == "signed":
            self.sums[module] += sigma_gradients(basis, gradient)
        else:
            self.sums[module] += self._window_scores(basis, gradient)

    def state(self) -> dict[str, Tensor]:
        """Return the sums so far, by module, from which another object can go on."""
        return {name: value.cpu() for name, value in self.sums.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from sums that ``state`` gave.

        Args:
            state: The sums.
        """
        self.sums = {name: state[name].to(value) for name, value in self.sums.items()}

    def check_seen(self) -> None:
        """Refuse a linear that was called less often than others: a ``ModelError`` names it."""
        check_seen(self._num_windows, "its components cannot be scored")

    def mean(self, num_targets: int) -> dict[str, Tensor]:
        """Return the scores of all components, divided once by the number of predicted tokens.

        Args:
            num_targets: Number of predicted tokens in all windows.

        Returns:
            Float32, ``(K,)`` per module. A linear that was not seen is a ``ModelError``.

        Raises:
            NumericsError: If a score is NaN or infinite, naming the module.
        """
        self.check_seen()
        scores = {name: self._reduced(name) / num_targets for name in self.sums}
        for name, values in scores.items():
            if not values.isfinite().all():
                raise NumericsError(
                    f"the gradient of {name} is NaN or infinite; check the checkpoint, or "
                    "compute in float32 (model.dtype, trainer.precision) if it is not"
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
