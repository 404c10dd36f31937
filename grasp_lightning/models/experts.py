"""Experts whose weights are stacked in parameters of three dimensions, and their inner channels.

This file needs only torch: its text is copied into saved models, see ``lowrank``.

Legend: E experts; H hidden size; I inner channels of an expert; p parts of the writer (gate and up,
or up alone). Expert e computes ``D_e act(U_e x + b_e) + c_e``: the writer ``U_e`` is ``(p I, H)``,
the reader ``D_e`` is ``(H, I)``.
"""

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

READER = "down_proj"
MULTIPLE = 8  # products of experts need rows of a multiple of 16 bytes, also in bfloat16
_BIAS = "_bias"
_WIDTH = "narrowed_width"  # attribute of experts that have lost channels
_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")


class ExpertsLayout(NamedTuple):
    """How a module of experts stores its weights.

    Attributes:
        writer: Name of the parameter with all ``U_e``.
        number: E.
        hidden: H.
        width: I.
        num_parts: p.
        is_transposed: Both weights are stored with their last two dimensions swapped.
        is_interleaved: Rows of gate and up alternate, instead of one part after the other.
        has_bias: Writer and reader have biases ``(E, p I)`` and ``(E, H)``.
        is_scaled: Router weights multiply what experts read, as in Llama 4. The module then gets
            all tokens once for each expert, those without a route times zero, and returns as many.
    """

    writer: str
    number: int
    hidden: int
    width: int
    num_parts: int
    is_transposed: bool
    is_interleaved: bool
    has_bias: bool
    is_scaled: bool = False

    @property
    def channel_size(self) -> int:
        """Parameters of one channel in all experts."""
        written = self.num_parts * (self.hidden + self.has_bias)
        return self.number * (written + self.hidden)

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        """Return the stored shape of every parameter at another width, by name."""
        rows = self.num_parts * width
        writer, reader = (rows, self.hidden), (self.hidden, width)
        if self.is_transposed:
            writer, reader = writer[::-1], reader[::-1]
        found: dict[str, tuple[int, ...]] = {
            self.writer: (self.number, *writer),
            READER: (self.number, *reader),
        }
        if self.has_bias:
            found[self.writer + _BIAS] = (self.number, rows)
            found[READER + _BIAS] = (self.number, self.hidden)
        return found

    def rows(self, channels: Tensor) -> Tensor:
        """Return the rows of the writers of some channels, ``(..., k) -> (..., p k)``."""
        if self.is_interleaved:
            parts = torch.arange(self.num_parts, device=channels.device)
            return (channels[..., None] * self.num_parts + parts).flatten(-2)
        return torch.cat([channels + part * self.width for part in range(self.num_parts)], dim=-1)


def experts_layout(module: nn.Module) -> ExpertsLayout | None:
    """Return the layout of a module of experts; None for other modules.

    The attributes that transformers sets for its own products of experts say how weights are
    stored, and the shapes of all parameters must fit. A norm or scale inside the experts does not.
    Experts without these attributes that take nothing but hidden states get scaled ones.
    """
    gated: Any = module  # Any: attributes of experts alone
    own = dict(module.named_parameters(recurse=False))
    if READER not in own or own[READER].dim() != 3 or _has_more(module):  # noqa: PLR2004
        return None
    if not all(isinstance(getattr(module, flag, None), bool) for flag in _FLAGS):
        return _scaled_layout(module, own)
    number, *sides = own[READER].shape
    hidden, width = sides[::-1] if gated.is_transposed else sides
    layout = ExpertsLayout(
        writer="gate_up_proj" if gated.has_gate else "up_proj",
        number=number,
        hidden=hidden,
        width=width,
        num_parts=1 + gated.has_gate,
        is_transposed=gated.is_transposed,
        is_interleaved=gated.has_gate and not gated.is_concatenated,
        has_bias=gated.has_bias,
    )
    found = {name: tuple(parameter.shape) for name, parameter in own.items()}
    return layout if found == layout.shapes(width) else None


def _scaled_layout(module: nn.Module, own: Mapping[str, Tensor]) -> ExpertsLayout | None:
    """Return the layout of gated experts whose tokens are scaled; None for other modules."""
    number, width, hidden = own[READER].shape
    layout = ExpertsLayout(
        writer="gate_up_proj",
        number=number,
        hidden=hidden,
        width=width,
        num_parts=2,
        is_transposed=True,
        is_interleaved=False,
        has_bias=False,
        is_scaled=True,
    )
    shapes = {name: tuple(parameter.shape) for name, parameter in own.items()}
    takes = inspect.signature(type(module).forward).parameters  # with self
    is_known = callable(getattr(module, "act_fn", None)) and len(takes) == 2  # noqa: PLR2004
    return layout if is_known and shapes == layout.shapes(width) else None


def _has_more(module: nn.Module) -> bool:
    """Return whether experts compute with more than their two products and an activation."""
    inside = any(True for child in module.children() for _ in child.parameters())
    return inside or bool(getattr(module, "has_post_expert_norm", False))


def stacked_reader(module: nn.Module, layout: ExpertsLayout) -> Tensor:
    """Return all ``D_e`` as a view of the parameter, ``(E, H, I)``."""
    weight = module.get_parameter(READER).detach()
    return weight.mT if layout.is_transposed else weight


def inner_channels(module: nn.Module, layout: ExpertsLayout, expert: int, x: Tensor) -> Tensor:
    """Return what the reader of one expert reads for its tokens, ``(n, H) -> (n, I)``."""
    gated: Any = module  # Any: methods of experts alone
    weight = module.get_parameter(layout.writer)[expert]
    bias = module.get_parameter(layout.writer + _BIAS)[expert] if layout.has_bias else None
    written = nn.functional.linear(x, weight.mT if layout.is_transposed else weight, bias)
    if layout.is_scaled:
        gate, up = written.chunk(2, dim=-1)
        found: Tensor = up * gated.act_fn(gate)
    else:
        found = gated._apply_gate(written) if gated.has_gate else gated.act_fn(written)
    return found


def kept_parameters(
    module: nn.Module, layout: ExpertsLayout, kept: Tensor, reader: Tensor
) -> dict[str, Tensor]:
    """Return the parameters of experts that keep some channels, by name, as they are stored.

    Args:
        kept: Channels that each expert keeps, ascending, ``(E, k)``.
        reader: The new ``D_e``, ``(E, H, k)``.
    """
    own = {name: parameter.detach() for name, parameter in module.named_parameters(recurse=False)}
    rows = layout.rows(kept.to(own[layout.writer].device))  # (E, p k)
    writer = own[layout.writer].mT if layout.is_transposed else own[layout.writer]
    writer = torch.stack([weight[chosen] for weight, chosen in zip(writer, rows, strict=True)])
    found = {layout.writer: writer, READER: reader}
    if layout.is_transposed:
        found = {name: weight.mT for name, weight in found.items()}
    if layout.has_bias:
        found[layout.writer + _BIAS] = own[layout.writer + _BIAS].gather(1, rows)
        found[READER + _BIAS] = own[READER + _BIAS]
    return found


def set_experts(module: nn.Module, width: int | None, parameters: Mapping[str, Tensor]) -> None:
    """Give experts other parameters, and this width; None is the width that the config says."""
    own = dict(module.named_parameters(recurse=False))
    for name, value in parameters.items():
        like = own[name]
        new = value.detach().to(device=like.device, dtype=like.dtype).contiguous()
        module.register_parameter(name, nn.Parameter(new, requires_grad=like.requires_grad))
    holder: Any = module  # Any: an attribute of our own
    if width is not None:
        holder.narrowed_width = width
    elif is_narrowed_experts(module):
        del holder.narrowed_width


def is_narrowed_experts(module: nn.Module) -> bool:
    """Return whether compression removed channels of these experts."""
    return getattr(module, _WIDTH, None) is not None


def narrowed_experts(model: nn.Module) -> dict[str, int]:
    """Return the width of all experts that have lost channels, by full name, sorted by name."""
    found = {n: getattr(m, _WIDTH) for n, m in model.named_modules() if is_narrowed_experts(m)}
    return {name: int(found[name]) for name in sorted(found)}


def shrink_experts(module: nn.Module, name: str, width: int) -> None:
    """Give experts on the meta device another width.

    Raises:
        ValueError: If the module has no such experts, or the width is not smaller.
    """
    layout = experts_layout(module)
    if layout is None:
        raise ValueError(f"{name} must be experts of a mixture, got {type(module).__name__}")
    if width >= layout.width:
        raise ValueError(f"{width} channels of {name} are not fewer than {layout.width}")
    shapes = layout.shapes(width)
    own = dict(module.named_parameters(recurse=False))
    empty = {key: own[key].new_empty(shape, device="meta") for key, shape in shapes.items()}
    set_experts(module, width, empty)
