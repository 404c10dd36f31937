"""The released procedure, written from its description, as the reference of the cost table.

Block by block from the last layer, MLP before attention: the block's linears are decomposed and
replaced by modules that rebuild the dense weight in every forward, all windows pass through the
whole model one at a time, the gradients of the singular values are summed, and the block is cut.

Source: the procedure of LyoAI/GRASP at commit 739125c, with labels shifted once. It rebuilds the
weight by two dense products, U (diag(s) V^T), freezes the base model, and leaves u, s and v of the
current block trainable; ``Gradients`` has this choice, one with fewer trainable parameters and one
with more.

Legend: N output and M input features of a linear, K = min(N, M) components, r kept ones.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from grasp_lightning.errors import ModelError
from grasp_lightning.linalg.ranks import rank_for_keep_ratio, top_components
from grasp_lightning.methods.blocks import blocks
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.next_token import forward_inputs

Gradients = Literal["sigma", "factors", "all"]
"""What is trainable: s of the current block; its u, s and v; or every parameter of the model."""

Kept = dict[str, list[int]]
"""Kept components by module, ascending."""


def _summed_loss(logits: Tensor, input_ids: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy summed over predicted tokens, by torch's own function."""
    predicted = targets[:, 1:]
    return nn.functional.cross_entropy(
        logits[:, :-1][predicted].float(), input_ids[:, 1:][predicted], reduction="sum"
    )


class RebuiltLinear(nn.Module):
    """A linear that holds ``u (N, K)``, ``s (K,)``, ``vh (K, M)`` and multiplies them each time.

    Args:
        linear: The linear it replaces.
        train_vectors: Train u and v as well as s.
    """

    def __init__(self, linear: nn.Linear, *, train_vectors: bool) -> None:
        super().__init__()
        u, s, vh = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
        self.u = nn.Parameter(u, requires_grad=train_vectors)
        self.s = nn.Parameter(s)
        self.vh = nn.Parameter(vh, requires_grad=train_vectors)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Rebuild the weight, and apply it.

        Args:
            x: ``(..., M)``.

        Returns:
            ``(..., N)``.
        """
        weight = self.u @ (torch.diag(self.s) @ self.vh)
        return nn.functional.linear(x, weight, self.bias)

    def cut(self, components: Sequence[int]) -> nn.Sequential:
        """Return two linears that keep some components.

        Args:
            components: Indices of the kept components, ascending.

        Returns:
            The linears, applied one after the other, frozen.
        """
        rank, index = len(components), list(components)
        root = self.s.detach()[index].sqrt()
        right = nn.Linear(self.vh.shape[1], rank, bias=False)
        left = nn.Linear(rank, self.u.shape[0], bias=self.bias is not None)
        with torch.no_grad():
            right.weight.copy_(root[:, None] * self.vh[index])
            left.weight.copy_(self.u[:, index] * root)
            if self.bias is not None:
                left.bias.copy_(self.bias)
        return nn.Sequential(right, left).requires_grad_(False)


@dataclass(frozen=True, kw_only=True)
class ReferenceProcedure:
    """The procedure on some layers of a model.

    Attributes:
        view: The model, changed in place.
        windows: Batches of one window each.
        keep_ratio: Share of each matrix's parameters that its factors keep.
        gradients: What is trainable.
    """

    view: DecoderView
    windows: Sequence[Mapping[str, Tensor]]
    keep_ratio: float
    gradients: Gradients

    def run(self, groups: Sequence[Sequence[str]]) -> Kept:
        """Replace blocks, one after another.

        Args:
            groups: Names of the linears of each block, in processing order.

        Returns:
            What was kept.
        """
        self.view.model.requires_grad_(self.gradients == "all")
        kept: Kept = {}
        for group in groups:
            kept |= self._replace_block(group)
        return kept

    def _replace_block(self, group: Sequence[str]) -> Kept:
        rebuilt = {name: self._rebuild(name) for name in group}
        sums = {name: torch.zeros_like(module.s) for name, module in rebuilt.items()}
        model = self.view.model
        for batch in self.windows:
            logits = model(**forward_inputs(batch), use_cache=False).logits
            loss = _summed_loss(logits, batch["input_ids"], batch["targets"])
            model.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # untyped in torch
            for name, module in rebuilt.items():
                assert module.s.grad is not None
                sums[name] += module.s.grad
        kept: Kept = {}
        for name, module in rebuilt.items():
            scores = (sums[name] * module.s.detach()).abs()
            rank = rank_for_keep_ratio(self.keep_ratio, module.u.shape[0], module.vh.shape[1])
            kept[name] = list(top_components(scores, rank))
            cut = module.cut(kept[name]).requires_grad_(self.gradients == "all")
            self.view.set_module(name, cut)
        return kept

    def _rebuild(self, name: str) -> RebuiltLinear:
        linear = self.view.module(name)
        if not isinstance(linear, nn.Linear):
            raise ModelError(
                f"{name} is a {type(linear).__name__}; the reference procedure knows nn.Linear only"
            )
        rebuilt = RebuiltLinear(linear, train_vectors=self.gradients != "sigma")
        self.view.set_module(name, rebuilt)
        return rebuilt


def block_groups(view: DecoderView, layers: Sequence[int]) -> list[tuple[str, ...]]:
    """Return the linears of each block, in the order in which the procedure processes them.

    Args:
        view: The dense model.
        layers: Chosen layers.

    Returns:
        Names, two groups per layer, the last layer's MLP first.
    """

    def groups() -> Iterator[tuple[str, ...]]:
        for index in sorted(layers, reverse=True):
            yield from blocks(view, index)

    return [group for group in groups() if group]
