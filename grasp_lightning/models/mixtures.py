"""Mixtures of experts in decoder layers: what can be narrowed, and what each expert reads.

Legend: E experts; H hidden size; I inner channels of an expert; T tokens of a window; K experts per
token; N outputs and M inputs of a linear.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from grasp_lightning.errors import ModelError
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.experts import (
    READER,
    ExpertsLayout,
    experts_layout,
    inner_channels,
    is_narrowed_experts,
    stacked_reader,
)

_ROUTED_DIMENSIONS = 2
# Relative error of the sum of all experts, computed one by one, by dtype of the hidden states.
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.05}


def experts_in(view: DecoderView, index: int) -> dict[str, ExpertsLayout]:
    """Return the experts of a layer whose channels can be removed, by original name.

    Already narrowed ones, experts built of linears and shared experts are none. The weights may be
    on the meta device.
    """
    found: dict[str, ExpertsLayout] = {}
    for name, module in view.layer(index).named_modules():
        layout = None if is_narrowed_experts(module) else experts_layout(module)
        if layout is not None:
            found[f"{view.layers_name}.{index}.{name}"] = layout
    return found


def weights_of(view: DecoderView, modules: Iterable[str]) -> dict[str, Tensor]:
    """Return the dense weights of linears, ``(N, M)``, and of experts, ``(E, H, I)``, by name.

    Those of experts are their readers. The weights may be sharded, or on the meta device.
    """
    names = tuple(modules)
    linears = view.all_linears()
    found: dict[str, Tensor] = {}
    for name in names:
        if name in linears:
            found[name] = linears[name].weight.detach()
        else:
            module = view.module(name)
            found[name] = stacked_reader(module, _layout(module, name))
    return found


def in_model_order(view: DecoderView, modules: Iterable[str]) -> tuple[str, ...]:
    """Return names of linears and experts in the order of the layers, experts last in each."""
    wanted = set(modules)
    return tuple(
        name
        for index in view.layer_indices
        for name in (*view.linears(index), *experts_in(view, index))
        if name in wanted
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutedTokens:
    """The tokens of a window that a module of experts gets, with their routes.

    Attributes:
        experts: The module.
        layout: Its layout.
        hidden: ``(T, H)``; if scaled, all tokens of the first expert come first, ``(E T, H)``.
        index: Experts of each of these, ``(.., K)``; -1 for none.
        weights: Router weight of each of them, ``(.., K)``; 1 if it scaled the tokens.
    """

    experts: nn.Module
    layout: ExpertsLayout
    hidden: Tensor
    index: Tensor
    weights: Tensor

    def inputs(self) -> Iterator[tuple[int, Tensor]]:
        """Yield each expert with tokens, and its channels times their router weights, ``(n, I)``.

        The module's output is the sum of ``D_e`` times these inputs, apart from biases. Float32 or
        better.
        """
        wide = torch.promote_types(self.hidden.dtype, torch.float32)
        for expert in range(self.layout.number):
            tokens, places = (self.index == expert).nonzero(as_tuple=True)
            if len(tokens) > 0:
                channels = inner_channels(self.experts, self.layout, expert, self.hidden[tokens])
                yield expert, channels.to(wide) * self.weights[tokens, places, None].to(wide)

    def output(self) -> Tensor:
        """Return the output of the module for ``hidden``, computed expert by expert."""
        wide = torch.promote_types(self.hidden.dtype, torch.float32)
        found = torch.zeros(self.hidden.shape, dtype=wide, device=self.hidden.device)
        readers = stacked_reader(self.experts, self.layout)
        for expert, channels in self.inputs():
            tokens, places = (self.index == expert).nonzero(as_tuple=True)
            out = channels @ readers[expert].to(wide).mT
            if self.layout.has_bias:
                bias = self.experts.get_parameter(f"{READER}_bias").detach()[expert]
                out += self.weights[tokens, places, None].to(wide) * bias.to(wide)
            found.index_add_(0, tokens, out)
        return found


def routed_tokens(
    experts: nn.Module, name: str, values: Iterable[object], batch_size: int
) -> list[RoutedTokens]:
    """Return what a call of experts gets, window by window.

    Args:
        experts: The called module.
        name: Its full name.
        values: The arguments of the call: hidden states, experts and weights of all tokens; if
            scaled, only hidden states, once for each expert.
        batch_size: Number of windows, whose tokens come one window after the other.

    Raises:
        ModelError: If the family calls its experts in another way.
    """
    given = [value.detach() for value in values if isinstance(value, Tensor)]
    layout = _layout(experts, name)
    if layout.is_scaled and len(given) == 1:
        given = _scaled(layout, given[0])
    dimensions = [value.dim() for value in given]
    is_known = dimensions == 3 * [_ROUTED_DIMENSIONS] and given[1].shape == given[2].shape
    if not is_known or given[1].is_floating_point() or len(given[0]) != len(given[1]):
        raise ModelError(_unknown(experts, name))
    parts = [by_window(layout, value, batch_size) for value in given]
    return [
        RoutedTokens(experts=experts, layout=layout, hidden=hidden, index=index, weights=weights)
        for hidden, index, weights in zip(*parts, strict=True)
    ]


def _scaled(layout: ExpertsLayout, hidden: Tensor) -> list[Tensor]:
    """Return scaled tokens with their experts and weights; a token times zero has no expert."""
    hidden = hidden.reshape(layout.number, -1, layout.hidden)
    experts = torch.arange(layout.number, device=hidden.device)[:, None, None]
    index = torch.where((hidden != 0).any(-1, keepdim=True), experts, -1)
    flat = [value.flatten(0, 1) for value in (hidden, index)]
    return [*flat, torch.ones_like(flat[1], dtype=hidden.dtype)]


def by_window(layout: ExpertsLayout, values: Tensor, batch_size: int) -> Tensor:
    """Return what experts get or return for their tokens, a row for each window.

    Args:
        layout: Layout of the experts.
        values: One entry per token; if scaled, per expert and token.
        batch_size: Number of windows, whose tokens come one window after the other.
    """
    if not layout.is_scaled:
        return values.reshape(batch_size, -1, values.shape[-1])
    parts = values.reshape(layout.number, batch_size, -1, values.shape[-1])
    return parts.transpose(0, 1).flatten(1, 2)


def gradients_of_sum(name: str, routed: Sequence[RoutedTokens], gradient: Tensor) -> Tensor:
    """Return the gradient of the sum of all experts, ``(windows, T, H)``.

    Args:
        name: Full name of the experts.
        routed: What their call got, window by window.
        gradient: That of their output.

    Raises:
        ModelError: If scaled experts are not added up: their gradients would be equal.
    """
    layout, parts = routed[0].layout, by_window(routed[0].layout, gradient, len(routed))
    if not layout.is_scaled:
        return parts
    first, *others = parts.chunk(layout.number, dim=1)
    is_sum = all(torch.equal(first, other) for other in others)
    if not is_sum and gradient.isfinite().all():  # else: reported elsewhere
        raise ModelError(_unknown(routed[0].experts, name))
    return first


@torch.no_grad()
def check_layout(name: str, routed: RoutedTokens, output: Tensor) -> None:
    """Check by the numbers that experts compute what their layout says.

    Args:
        name: Full name of the experts.
        routed: The tokens of one window.
        output: What the module returned for them, as ``by_window`` gives it.

    Raises:
        ModelError: If the sum of the experts, computed one by one, is another.
    """
    expected = output.to(torch.promote_types(output.dtype, torch.float32))
    if not expected.isfinite().all():  # told elsewhere, with the layer where it begins
        return
    kind, dtype = output.device.type, routed.hidden.dtype
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else dtype
    error = float((routed.output() - expected).norm())
    if error > _TOLERANCES[dtype] * float(expected.norm()):
        raise ModelError(_unknown(routed.experts, name))


def _unknown(experts: nn.Module, name: str) -> str:
    return (
        f"{name} ({type(experts).__name__}) does not compute the usual sum of experts, so its "
        "channels cannot be removed: set method.mlp=factors to leave experts unchanged"
    )


def _layout(module: nn.Module, name: str) -> ExpertsLayout:
    layout = experts_layout(module)
    if layout is None:
        raise ModelError(
            f"{name} is a {type(module).__name__}: expected a linear, or experts whose weights "
            "are stacked in parameters of three dimensions"
        )
    return layout
