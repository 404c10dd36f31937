"""Weights set to zero, and the others changed to make up for them: SparseGPT."""

from typing import ClassVar, Final

from torch import Tensor

from grasp_lightning.linalg.sparsity import sparse_gpt, zeros_per_block
from grasp_lightning.methods.sparsity import SparsityMethod, sparsity_method
from grasp_lightning.stats.base import MomentKind, Moments


class SparseGpt(SparsityMethod):
    """Set the weights of lowest ``(w / U_jj)^2`` to zero, and correct the later columns.

    U is the upper triangle with ``U^T U = H^-1`` and ``H = X X^T + rho I``. Each block of 128
    columns has one threshold for all its rows, ``int(N B s)`` zeros in ``(N, B)``; in a pattern
    n:m, each m consecutive weights of a row get n zeros, chosen after the updates so far.

    Source: Frantar and Alistarh, "SparseGPT", arXiv:2301.00774, Algorithm 1, with the damping and
    block sizes of the public code. Differences:

    - s is solved so that the zeros are the requested share of all parameters of the model.
    - A threshold gives exactly that number of zeros, where the public code sets one weight more.
    - Inputs that are always 0 are not special: the damping makes their weights the cheapest, and
      the public code sets them to zero in addition.
    - The update is computed in float64, from Gram matrices summed in float32.
    """

    moment_kind: ClassVar[MomentKind] = "input_gram"
    reference = "https://arxiv.org/abs/2301.00774"

    def _pruned(
        self, weight: Tensor, moments: Moments, sparsity: float, groups: tuple[int, int] | None
    ) -> Tensor:
        assert moments.input_gram is not None  # the step requested it
        return sparse_gpt(weight, moments.input_gram, sparsity=sparsity, groups=groups)


SPARSEGPT: Final = sparsity_method("sparsegpt", SparseGpt, zeros_per_block)
