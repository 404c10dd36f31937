"""The MLPs of decoder layers whose hidden channels can be removed one by one.

Legend: D hidden size of the model, I number of hidden channels of an MLP.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.linears import DenseLinear, as_linear, in_attention

# Multiples of the channels in each writer: one linear, gate and up separate, or both fused.
_PARTS = ([1], [1, 1], [2])


class Mlp(NamedTuple):
    """Full names of the linears that read and that write the hidden channels of an MLP."""

    reader: str
    writers: tuple[str, ...]


def mlps(view: DecoderView, index: int) -> tuple[Mlp, ...]:
    """Return the MLPs of a decoder layer whose hidden channels can be removed one by one.

    Shapes decide, so the meta device works. Outside attention, the layer must have one linear from
    I to D and, in the same module, one or two linears from D with I outputs (``down(act(up(x)))``)
    or 2 I outputs in all (``down(act(gate(x)) * up(x))``, gate and up separate or fused). No other
    parameter of the layer, such as a norm in between, may have size I.

    Mixtures of experts and layers with replaced linears have none, nor do layers where D equals I,
    since shapes are then ambiguous.
    """
    prefix = f"{view.layers_name}.{index}."
    linears = {
        name: as_linear(module)
        for name, module in view.dense_modules(index).items()
        if not in_attention(name.removeprefix(prefix))
    }
    hidden = view.model.config.get_text_config().hidden_size
    readers = [n for n, x in linears.items() if x.out_features == hidden != x.in_features]
    if view.skipped(index) or len(readers) != 1:
        return ()
    found = Mlp(readers[0], tuple(name for name in linears if name not in readers))
    num_channels = linears[found.reader].in_features
    if not _fits(found, linears, hidden) or num_channels in _other_sizes(view, index, linears):
        return ()
    return (found,)


def _fits(found: Mlp, linears: Mapping[str, DenseLinear], hidden: int) -> bool:
    """Return whether all writers read the hidden states and write all channels once or twice."""
    num_channels, writers = linears[found.reader].in_features, [linears[w] for w in found.writers]
    return (
        len({name.rpartition(".")[0] for name in linears}) == 1
        and all(writer.in_features == hidden for writer in writers)
        and [writer.out_features / num_channels for writer in writers] in _PARTS
    )


def _other_sizes(view: DecoderView, index: int, linears: Iterable[str]) -> set[int]:
    """Return the sizes of all parameters of a layer, except attention and the given linears."""
    prefix, known = f"{view.layers_name}.{index}.", set(linears)
    return {
        size
        for name, parameter in view.layer(index).named_parameters()
        if not in_attention(name) and prefix + name.rpartition(".")[0] not in known
        for size in parameter.shape
    }
