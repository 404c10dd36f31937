"""Attention and MLP blocks in decoder layers, and weights of layers that are half replaced."""

from grasp_lightning.methods.rank_rules import Shapes
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.plan import Plan


def blocks(view: DecoderView, index: int) -> tuple[tuple[str, ...], ...]:
    """Return the names of the dense linears of one layer, MLP block first, attention block second.

    A linear is in the attention block if the module below the layer that holds it has "att" in its
    name (self_attn, attention, attn), which is so in every family of transformers.

    Args:
        view: The model.
        index: The layer's number in the original model.

    Returns:
        Two groups of full names; a group may be empty.
    """
    prefix = f"{view.layers_name}.{index}."
    names = tuple(view.linears(index))
    attention = tuple(n for n in names if "att" in n.removeprefix(prefix).split(".")[0].lower())
    return tuple(name for name in names if name not in attention), attention


def weight_shapes(view: DecoderView, plan: Plan, layers: tuple[int, ...]) -> Shapes:
    """Return the shapes of all weights of some layers, those that are replaced already included.

    Args:
        view: The model, with all operations of the plan applied.
        plan: Decisions so far.
        layers: Numbers of the layers in the original model.

    Returns:
        ``(N, M)`` by full name, sorted by layer and name.
    """
    shapes: dict[str, tuple[int, int]] = {}
    for index in layers:
        prefix = f"{view.layers_name}.{index}."
        replaced = {name for name in plan.ranks if name.startswith(prefix)}
        for name in sorted({*view.linears(index), *replaced}):
            module = view.module(name)
            shapes[name] = (_size(module, "out_features"), _size(module, "in_features"))
    return shapes


def _size(module: object, name: str) -> int:
    return int(getattr(module, name))
