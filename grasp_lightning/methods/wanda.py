"""Weights set to zero by magnitude times input norm: Wanda."""

from typing import ClassVar, Final

from torch import Tensor

from grasp_lightning.linalg.sparsity import wanda, zeros_per_row
from grasp_lightning.methods.sparsity import SparsityMethod, sparsity_method
from grasp_lightning.stats.base import MomentKind, Moments


class Wanda(SparsityMethod):
    """Set the weights of lowest ``|W_ij| |X_j|`` in each output row to zero; the others stay.

    ``|X_j|`` is the norm of input j over all calibration tokens. A row of M weights gets
    ``int(M s)`` zeros; in a pattern n:m, each m consecutive weights of a row get n.

    Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models",
    arXiv:2306.11695, Eq. 1 and Algorithm 1. Difference: s is solved so that the zeros are the
    requested share of all parameters of the model; the paper gives s itself.
    """

    moment_kind: ClassVar[MomentKind] = "input_square"
    reference = "https://arxiv.org/abs/2306.11695"

    def _pruned(
        self, weight: Tensor, moments: Moments, sparsity: float, groups: tuple[int, int] | None
    ) -> Tensor:
        assert moments.input_square is not None  # the step requested it
        return wanda(weight, moments.input_square, sparsity=sparsity, groups=groups)


WANDA: Final = sparsity_method("wanda", Wanda, zeros_per_row)
