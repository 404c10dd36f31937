"""Decoder layers, and attention and MLP blocks, that may go as a whole at a measured price."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import Tensor, tensor

from grasp_lightning.config import RemovableChoice
from grasp_lightning.methods.blocks import blocks
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.size import count_parameters
from grasp_lightning.plan import DropLayers, RemoveBlock
from grasp_lightning.stats.base import Removable

_KEY = "{name}.removal"


def removable_parts(
    view: DecoderView, layers: Sequence[int], choice: RemovableChoice
) -> tuple[Removable, ...]:
    """Return what may go as a whole.

    If all layers of the model may be compressed, the first of them stays, so that one is left. Of a
    mixture of experts the MLP block stays, as its experts are no linears of their own.

    Args:
        view: The dense model; its weights may be on the meta device.
        layers: Numbers of the layers that may be compressed, ascending.
        choice: ``none``, ``layers``, or ``blocks`` for layers and blocks.

    Returns:
        Every layer, followed by its blocks. A ``ModelError`` says that no layer of this model can
        be dropped.
    """
    if choice == "none":
        return ()
    view.check_droppable()
    droppable = layers[1:] if len(layers) == view.num_layers else layers
    found: list[Removable] = []
    for index in layers:
        prefix, linears = f"{view.layers_name}.{index}", tuple(view.linears(index))
        if index in droppable:
            own = count_parameters(view.layer(index))
            name = f"{prefix}.layer"
            found.append(Removable(name=name, layer=index, linears=linears, parameters=own))
        if choice == "blocks":
            found += _blocks(view, index)
    return tuple(found)


def _blocks(view: DecoderView, index: int) -> Iterator[Removable]:
    prefix, found = f"{view.layers_name}.{index}", view.linears(index)
    mlp, attention = blocks(view, index)
    parts = {"attention": attention, "mlp": () if view.skipped(index) else mlp}
    for kind, linears in parts.items():
        if linears:
            size = sum(found[name].weight.numel() for name in linears)
            name = f"{prefix}.{kind}"
            yield Removable(name=name, layer=index, linears=linears, parameters=size, is_block=True)


def removal_operations(
    removable: Iterable[Removable], names: Iterable[str]
) -> tuple[RemoveBlock | DropLayers, ...]:
    """Return the removal of some layers and blocks.

    Args:
        removable: What may go.
        names: Names of what goes; no block is in a layer that goes.

    Returns:
        One operation for each block, and one at the end for all layers.
    """
    by_name, gone = {part.name: part for part in removable}, set(names)
    removed = [part for name, part in by_name.items() if name in gone]
    blocks_ = tuple(RemoveBlock(block=p.name, modules=p.linears) for p in removed if p.is_block)
    layers = tuple(part.layer for part in removed if not part.is_block)
    return (*blocks_, DropLayers(layers=layers)) if layers else blocks_


def stored_prices(losses: Mapping[str, float]) -> dict[str, Tensor]:
    """Return measured prices as they are stored among the scores."""
    return {_KEY.format(name=name): tensor([loss]) for name, loss in losses.items()}


def read_price(name: str, scores: Mapping[str, Tensor]) -> float | None:
    """Return the stored price of a layer or block; None where there is none."""
    price = scores.get(_KEY.format(name=name))
    return None if price is None else float(price)
