"""MLPs with fewer hidden channels: the loss of each channel, and removal of the cheapest."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from grasp_lightning.linalg.channels import Removal
from grasp_lightning.methods.base import Decision
from grasp_lightning.methods.truncation import Measured
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.mlp import mlps
from grasp_lightning.plan import NarrowMlp
from grasp_lightning.stats.base import Moments


@dataclass(frozen=True, kw_only=True, slots=True)
class Narrowable:
    """An MLP whose hidden channels can be removed one by one.

    Attributes:
        reader: Full name of the linear that reads the channels.
        writers: Full names of the linears that write them, in module order.
        num_channels: Number of hidden channels.
        channel_size: Parameters per channel, including biases of the writers.
    """

    reader: str
    writers: tuple[str, ...]
    num_channels: int
    channel_size: int


def narrowable_mlps(view: DecoderView, layers: Sequence[int]) -> dict[str, Narrowable]:
    """Return the MLPs of some layers whose channels can be removed, by reader, in model order.

    A mixture of experts has none. The weights of the model may be on the meta device.
    """
    found: dict[str, Narrowable] = {}
    for index in layers:
        linears = view.linears(index)
        for mlp in mlps(view, index):
            reader, writers = linears[mlp.reader], [linears[name] for name in mlp.writers]
            count = reader.in_features
            # A fused writer has several rows for each channel.
            written = sum(
                w.out_features // count * (w.in_features + (w.bias is not None)) for w in writers
            )
            found[mlp.reader] = Narrowable(
                reader=mlp.reader,
                writers=mlp.writers,
                num_channels=count,
                channel_size=written + reader.out_features,
            )
    return found


def channel_orders(measured: Measured, readers: Iterable[str]) -> dict[str, Removal]:
    """Return the order and the losses of channel removal, by reader."""

    def removal(_: str, weight: Tensor, moments: Moments) -> Removal:
        return Removal(*(part.cpu() for part in measured.metric.removal(weight, moments)))

    return dict(measured.each(readers, removal, "order channels"))


def narrowing(
    measured: Measured,
    narrowable: Mapping[str, Narrowable],
    orders: Mapping[str, Removal],
    channels: Mapping[str, int],
) -> Decision:
    """Keep the last ``channels`` of each order, by reader, and refit the readers to them."""
    kept = {n: tuple(sorted(orders[n].order[-count:].tolist())) for n, count in channels.items()}

    def refitted(name: str, weight: Tensor, moments: Moments) -> Tensor:
        return measured.metric.narrowed(weight, moments, kept[name]).cpu()

    return Decision(
        operations=tuple(
            NarrowMlp(reader=name, writers=narrowable[name].writers, channels=kept[name])
            for name in kept
        ),
        tensors={f"{n}.weight": weight for n, weight in measured.each(kept, refitted, "narrow")},
    )
