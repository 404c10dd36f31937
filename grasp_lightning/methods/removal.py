"""Decoder layers, and attention and MLP blocks, that can be removed at a measured price."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import nan

from torch import Tensor, tensor

from grasp_lightning.config import RemovableChoice
from grasp_lightning.errors import ConfigError
from grasp_lightning.methods.blocks import blocks
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.dropping import droppable_layers
from grasp_lightning.models.linears import in_attention
from grasp_lightning.models.lowrank import is_replaced
from grasp_lightning.models.mlp import mlps
from grasp_lightning.models.size import count_parameters
from grasp_lightning.plan import DropLayers, RemoveBlock
from grasp_lightning.stats.base import Removable

REMOVALS = "removals"
"""Name of a step that only measures removals."""
_KEY = "{name}.removal"
_SEARCH_KEY = "search.{number}.losses"


def removable_parts(
    view: DecoderView, layers: Sequence[int], choice: RemovableChoice
) -> tuple[Removable, ...]:
    """Return every layer that may be removed as a whole, each followed by its blocks.

    If all layers of the model may be compressed, the first is kept, so that one remains. Layers
    without which the model cannot be saved, loaded or run are kept as well, and so are all layers
    of a model whose layers compute with their numbers. Blocks are the linears of attention, and
    those of an MLP with separable channels, if nothing in them is replaced yet: no mixture of
    experts, no convolution. The weights may be on the meta device.

    Raises:
        ConfigError: If only layers are requested, and none of this model can be dropped.
    """
    if choice == "none":
        return ()
    droppable = layers[1:] if len(layers) == view.num_layers else layers
    option = view.number_dependent_option
    if option is not None:
        if choice == "layers":
            raise ConfigError(
                f"method.removable is layers, but {type(view.model).__name__} has {option}: its "
                "decoder layers compute with their layer numbers, so none can be dropped; set "
                "method.removable=layers_and_blocks to remove blocks only, or none"
            )
        droppable = ()
    droppable = droppable_layers(view, droppable)
    found: list[Removable] = []
    for index in layers:
        if index in droppable:
            found.append(layer_part(view, index))
        if choice == "layers_and_blocks":
            found += block_parts(view, index)
    return tuple(found)


def layer_part(view: DecoderView, index: int) -> Removable:
    """Return a decoder layer as a part that is removed as a whole."""
    return Removable(
        name=f"{view.layers_name}.{index}.layer",
        layer=index,
        linears=tuple(view.linears(index)),
        parameters=count_parameters(view.layer(index)),
    )


def block_parts(view: DecoderView, index: int) -> Iterator[Removable]:
    """Yield the attention and the MLP block of a layer, ``<layer>.attention`` and ``<layer>.mlp``.

    A block whose linears cannot be told apart, or of which some are replaced, is left out.
    """
    prefix, found = f"{view.layers_name}.{index}", view.linears(index)
    others, attention = blocks(view, index)
    replaced = (n for n, m in view.layer(index).named_modules() if is_replaced(m))
    has_whole_attention = not any(map(in_attention, replaced))
    is_mlp = any({mlp.reader, *mlp.writers} == set(others) for mlp in mlps(view, index))
    parts = {"attention": attention * has_whole_attention, "mlp": others * is_mlp}
    for kind, linears in parts.items():
        if linears:
            size = sum(found[name].weight.numel() for name in linears)
            name = f"{prefix}.{kind}"
            yield Removable(name=name, layer=index, linears=linears, parameters=size, is_block=True)


def removal_operations(
    removable: Iterable[Removable], names: Iterable[str]
) -> tuple[RemoveBlock | DropLayers, ...]:
    """Remove the named parts: one operation per block, and one at the end for all layers.

    No named block may be in a named layer.
    """
    by_name, gone = {part.name: part for part in removable}, set(names)
    removed = [part for name, part in by_name.items() if name in gone]
    blocks_ = tuple(RemoveBlock(block=p.name, modules=p.linears) for p in removed if p.is_block)
    layers = tuple(part.layer for part in removed if not part.is_block)
    return (*blocks_, DropLayers(layers=layers)) if layers else blocks_


def stored_losses(number: int, losses: Mapping[int, float], num_layers: int) -> dict[str, Tensor]:
    """Return the losses of one step of a search by their storage name.

    Args:
        number: How many layers are gone already.
        losses: Loss without each candidate, by its number in the original model.
        num_layers: Number of layers of the original model.

    Returns:
        ``search.<number>.losses``, ``(num_layers,)``, NaN where a layer was no candidate.
    """
    values = tensor([losses.get(index, nan) for index in range(num_layers)])
    return {_SEARCH_KEY.format(number=number): values}


def search_losses(scores: Mapping[str, Tensor]) -> list[Tensor]:
    """Return what ``stored_losses`` stored, step by step."""
    found: list[Tensor] = []
    while (values := scores.get(_SEARCH_KEY.format(number=len(found)))) is not None:
        found.append(values)
    return found


def stored_prices(losses: Mapping[str, float]) -> dict[str, Tensor]:
    """Return the measured prices by their storage names."""
    return {_KEY.format(name=name): tensor([loss]) for name, loss in losses.items()}


def read_price(name: str, scores: Mapping[str, Tensor]) -> float | None:
    """Return the stored price of a layer or block; None if it has none."""
    price = scores.get(_KEY.format(name=name))
    return None if price is None else float(price)
