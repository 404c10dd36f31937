"""MLPs and experts with fewer channels: the loss of each channel, and removal of the cheapest."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from grasp_lightning.errors import ConfigError
from grasp_lightning.linalg.channels import Removal
from grasp_lightning.methods.base import Decision
from grasp_lightning.methods.truncation import Measured, Parts
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.experts import MULTIPLE, READER
from grasp_lightning.models.mixtures import experts_in
from grasp_lightning.models.mlp import mlps
from grasp_lightning.models.operations.narrow_experts import narrow_experts
from grasp_lightning.models.sharding import is_sharded
from grasp_lightning.plan import NarrowExperts, NarrowMlp
from grasp_lightning.reading.on_access import OnAccess
from grasp_lightning.stats.base import Moments


@dataclass(frozen=True, kw_only=True, slots=True)
class Narrowable:
    """An MLP whose hidden channels can be removed one by one, or all experts of a layer.

    Attributes:
        reader: Full name of the linear that reads the channels, or of the module of experts.
        writers: Full names of the linears that write them, in module order; none for experts.
        layer: Number of the decoder layer.
        num_channels: Number of hidden channels, of each expert.
        channel_size: Parameters per channel, including biases of the writers; of one channel in
            every expert.
        num_outputs: Outputs of the linear, or of all experts together.
        num_experts: 0 for an MLP.
        has_width: Whether the experts must keep all channels.
    """

    reader: str
    writers: tuple[str, ...]
    layer: int
    num_channels: int
    channel_size: int
    num_outputs: int
    num_experts: int = 0
    has_width: bool = False

    @property
    def multiple_of(self) -> int:
        """Number whose multiples are allowed numbers of channels."""
        return MULTIPLE if self.num_experts else 1

    @property
    def loss_shape(self) -> tuple[int, ...]:
        """Shape of the losses of its channels: ``(I,)``, or ``(E, I)`` of experts."""
        return (self.num_experts, self.num_channels) if self.num_experts else (self.num_channels,)

    def size_of(self, num_experts: int) -> int:
        """Return the parameters of one channel in some experts."""
        return self.channel_size // self.num_experts * num_experts

    @property
    def solved_tensor(self) -> str:
        """Name of the weight that is refitted to the kept channels."""
        return f"{self.reader}.{READER if self.num_experts else 'weight'}"

    def operation(self, kept: Tensor) -> NarrowMlp | NarrowExperts:
        """Return the operation that keeps some channels, ascending, ``(k,)``.

        Of experts, each may keep its own, ``(..., k)`` for those that are left.
        """
        if self.num_experts:
            rows = kept.expand(self.num_experts, -1) if kept.ndim == 1 else kept
            return narrow_experts(self.reader, rows.tolist())
        return NarrowMlp(reader=self.reader, writers=self.writers, channels=tuple(kept.tolist()))


def narrowable_mlps(view: DecoderView, layers: Sequence[int]) -> dict[str, Narrowable]:
    """Return the MLPs and experts of some layers whose channels can be removed, in model order.

    They are found by the names of their readers. The weights may be on the meta device.

    Raises:
        ConfigError: If there are experts, and FSDP shards the model.
    """
    view.narrows_experts = True
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
                layer=index,
                num_channels=count,
                channel_size=written + reader.out_features,
                num_outputs=reader.out_features,
            )
        for name, layout in experts_in(view, index).items():
            if is_sharded(view.module(name)):
                raise ConfigError(
                    f"method.mlp channels narrows {name}, which trainer.strategy fsdp does not "
                    "support: use auto or ddp, or set method.mlp=factors to leave experts unchanged"
                )
            if layout.width > MULTIPLE:
                found[name] = Narrowable(
                    reader=name,
                    writers=(),
                    layer=index,
                    num_channels=layout.width,
                    channel_size=layout.channel_size,
                    num_outputs=layout.number * layout.hidden,
                    num_experts=layout.number,
                )
    return found


def channel_orders(measured: Measured, readers: Iterable[str]) -> dict[str, Removal]:
    """Return the order and the losses of channel removal, by reader; of experts, one of each."""

    def removal(_: str, weight: Tensor, moments: Moments) -> Parts:
        found = measured.metric.removal(weight, moments)
        return {"order": found.order.cpu(), "losses": found.losses.cpu()}

    orders = measured.each(readers, removal, "order channels")
    return {name: Removal(parts["order"], parts["losses"]) for name, parts in orders.items()}


def narrowing(
    measured: Measured,
    narrowable: Mapping[str, Narrowable],
    orders: Mapping[str, Removal],
    channels: Mapping[str, int],
    experts: Mapping[str, Sequence[int]],
) -> Decision:
    """Keep the last ``channels`` of each order, by reader, and refit the readers to them.

    ``experts`` are those that stay of each mixture that loses some.
    """
    left = {name: experts.get(name, range(narrowable[name].num_experts)) for name in channels}
    kept: dict[str, Tensor] = {}
    for name, count in channels.items():
        order = orders[name].order
        order = order[list(left[name])] if narrowable[name].num_experts else order
        kept[name] = order[..., -count:].sort(-1).values

    def refitted(name: str, weight: Tensor, moments: Moments) -> Parts:
        return {"weight": measured.metric.narrowed(weight, moments, kept[name], left[name]).cpu()}

    weights = measured.each(kept, refitted, "narrow")
    return Decision(
        operations=tuple(narrowable[name].operation(channels) for name, channels in kept.items()),
        tensors=OnAccess(
            {
                narrowable[name].solved_tensor: partial(parts.__getitem__, "weight")
                for name, parts in weights.items()
            }
        ),
    )
