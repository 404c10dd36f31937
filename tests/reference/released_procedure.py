"""GRASP as its public code computes it, written from a description of that code.

For each given layer, last to first, its MLP and then its attention: every linear of the block runs
as ``U diag(S) V^T``, rebuilt in each forward, with ``S`` a parameter; one pass over the windows
sums dL/dS with its sign; the components with the largest ``|S dL/dS|`` are kept, as two linears;
the next block is scored on the resulting model.

Two faults of the public code are not reproduced: labels are shifted once, not twice, and a bias is
kept.

Legend: N outputs and M inputs of a linear, K = min(N, M) components.
"""

import math

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# Layer list, then the linears of the MLP and of the attention, in the order they are treated.
FAMILIES = {
    "llama": (
        "model.layers",
        ("mlp.down_proj", "mlp.up_proj", "mlp.gate_proj"),
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    ),
    "opt": (
        "model.decoder.layers",
        ("fc2", "fc1"),
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj"),
    ),
    "gpt_neox": (
        "gpt_neox.layers",
        ("mlp.dense_4h_to_h", "mlp.dense_h_to_4h"),
        ("attention.query_key_value", "attention.dense"),
    ),
}
FAMILIES["qwen2"] = FAMILIES["llama"]


class RebuiltLinear(nn.Module):
    """A linear whose weight is ``U diag(S) V^T``, multiplied out in every forward."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        u, s, vh = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
        self.u, self.s, self.vh = u, nn.Parameter(s), vh
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to ``(..., M)``."""
        return nn.functional.linear(x, self.u @ torch.diag(self.s) @ self.vh, self.bias)

    def scores(self) -> Tensor:
        """``|S dL/dS|`` of what was summed so far, ``(K,)``."""
        assert self.s.grad is not None
        return (self.s.grad * self.s.detach()).abs()

    def compiled(self, kept: list[int]) -> nn.Sequential:
        """Two linears: ``sqrt(S) V^T``, then ``U sqrt(S)`` with the bias."""
        root = self.s.detach()[kept].sqrt()
        into = nn.Linear(self.vh.shape[1], len(kept), bias=False)
        into.weight = nn.Parameter(torch.diag(root) @ self.vh[kept])
        out = nn.Linear(len(kept), self.u.shape[0], bias=False)
        out.weight = nn.Parameter(self.u[:, kept] @ torch.diag(root))
        out.bias = self.bias
        return nn.Sequential(into, out)


def preserved_rank(linear: nn.Linear, keep_ratio: float) -> int:
    """Number of components that a share of the parameters pays for."""
    n, m = linear.out_features, linear.in_features
    return max(1, math.floor(n * m * keep_ratio / (n + m)))


def accumulate_gradients(model: PreTrainedModel, windows: Tensor) -> None:
    """Sum gradients with their sign over equal windows ``(W, T)``, one window a batch."""
    for window in windows:
        logits = model(window[None], use_cache=False).logits[0]
        # Token t + 1 is predicted at position t: shifted once.
        nn.functional.cross_entropy(logits[:-1], window[1:]).backward()


def treat_block(
    model: PreTrainedModel, names: list[str], keep_ratio: float, windows: Tensor
) -> tuple[dict[str, list[int]], dict[str, Tensor]]:
    """Replace one block; return kept components, ascending, and all scores by name."""
    ranks, rebuilt = {}, {}
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        ranks[name], rebuilt[name] = preserved_rank(linear, keep_ratio), RebuiltLinear(linear)
        model.set_submodule(name, rebuilt[name])
    accumulate_gradients(model, windows)
    kept, scores = {}, {}
    for name, module in rebuilt.items():
        scores[name] = module.scores()
        kept[name] = sorted(scores[name].topk(ranks[name]).indices.tolist())
        model.set_submodule(name, module.compiled(kept[name]))
    return kept, scores


def released_procedure(
    model: PreTrainedModel, family: str, layers: list[int], keep_ratio: float, windows: Tensor
) -> tuple[dict[str, list[int]], dict[str, Tensor]]:
    """Compress a model in place.

    Args:
        model: The model, in the dtype that all is computed in.
        family: Key of ``FAMILIES``.
        layers: Numbers of the layers to treat.
        keep_ratio: Share of each weight's parameters that is kept.
        windows: Token ids, ``(W, T)``.

    Returns:
        By name, in the order of treatment: indices of kept components, ascending, and the scores
        that they were chosen by.
    """
    path, *blocks = FAMILIES[family]
    kept: dict[str, list[int]] = {}
    scores: dict[str, Tensor] = {}
    for index in sorted(layers, reverse=True):
        for block in blocks:
            names = [f"{path}.{index}.{linear}" for linear in block]
            block_kept, block_scores = treat_block(model, names, keep_ratio, windows)
            kept |= block_kept
            scores |= block_scores
    return kept, scores
