"""Scores of singular components, accumulated over windows.

Legend: T tokens of a window, N output and M input features of a linear, K = min(N, M) components.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from grasp_lightning.errors import NumericsError
from grasp_lightning.linalg.components import GradientScore, window_scores
from grasp_lightning.linalg.factors import SVD
from grasp_lightning.stats.base import Scoring


class ComponentScores:
    """Sums per-window scores of every singular component of several linears.

    What is not linear in the data (moduli, squares) is formed per window, so scores depend neither
    on the batch size nor on the number of processes. ``signed`` alone sums the gradients first.

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

    def _zeros(self, basis: SVD) -> Tensor:
        if self._scoring.reduction == "signed":
            return basis.u.new_zeros(basis.u.shape[0], basis.vh.shape[1])
        return torch.zeros_like(basis.s, dtype=torch.float64)

    def add(self, module: str, x: Tensor, grad_output: Tensor) -> None:
        """Add one window of one linear.

        Args:
            module: Name of the linear.
            x: Its input, ``(T, M)``.
            grad_output: Gradient of the summed token loss by its output, ``(T, N)``.
        """
        basis = self._bases[module]
        # The hook runs inside a mixed-precision step, where autocast would round the product.
        with torch.autocast(x.device.type, enabled=False):
            weight_grad = grad_output.to(basis.s.dtype).mT @ x.to(basis.s.dtype)  # (N, M)
        if self._scoring.reduction == "signed":
            self.sums[module] += weight_grad
        else:
            self.sums[module] += self._window_scores(basis, weight_grad)

    def mean(self, num_targets: int) -> dict[str, Tensor]:
        """Return the scores of all components, divided once by the number of predicted tokens.

        Args:
            num_targets: Number of predicted tokens in all windows.

        Returns:
            Float32, ``(K,)`` per module.

        Raises:
            NumericsError: If a score is NaN or infinite, naming the module.
        """
        scores = {name: self._reduced(name) / num_targets for name in self.sums}
        for name, values in scores.items():
            if not values.isfinite().all():
                raise NumericsError(
                    f"the gradient of {name} is NaN or infinite; try model.dtype float32 "
                    "or trainer.precision 32-true"
                )
        return {name: values.float().cpu() for name, values in scores.items()}

    def _reduced(self, module: str) -> Tensor:
        if self._scoring.reduction == "signed":
            return self._window_scores(self._bases[module], self.sums[module])
        return self.sums[module]

    def _window_scores(self, basis: SVD, weight_grad: Tensor) -> Tensor:
        return window_scores(
            basis,
            weight_grad,
            terms=self._scoring.terms,
            score=self._score,
            squared=self._scoring.reduction == "squared",
        )
