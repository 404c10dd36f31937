"""MLPs with fewer hidden channels: what each channel costs, and the removal of those that go."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from grasp_lightning.linalg.channels import Removal
from grasp_lightning.methods.base import Decision, Track
from grasp_lightning.methods.dealing import dealt
from grasp_lightning.methods.metric import Metric
from grasp_lightning.methods.truncation import moments_beside, weights_of
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
        num_channels: How many there are.
        channel_size: Parameters that belong to one, biases of its writers included.
    """

    reader: str
    writers: tuple[str, ...]
    num_channels: int
    channel_size: int


def narrowable_mlps(view: DecoderView, layers: Sequence[int]) -> dict[str, Narrowable]:
    """Return the MLPs of some layers whose channels can be removed.

    Args:
        view: The dense model; its weights may be on the meta device.
        layers: Numbers of the layers in the original model.

    Returns:
        MLP by the full name of its reader, in model order; none of a mixture of experts.
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


def channel_orders(
    view: DecoderView,
    readers: Sequence[str],
    metric: Metric,
    moments: Mapping[str, Moments],
    track: Track,
) -> dict[str, Removal]:
    """Return in which order channels go and what they cost, by reader; processes share the work."""

    def removal(name: str, weight: Tensor) -> Removal:
        found = metric.removal(weight, moments_beside(weight, moments.get(name)))
        return Removal(*(part.cpu() for part in found))

    return dict(dealt(weights_of(view, readers), removal, track, "order channels"))


def narrow_operations(
    found: Mapping[str, Removal], narrowable: Mapping[str, Narrowable], channels: Mapping[str, int]
) -> tuple[NarrowMlp, ...]:
    """Return the removal of the channels that go first.

    Args:
        found: In which order channels go, by reader.
        narrowable: The MLPs, by reader.
        channels: Number of channels that stay, by reader; an MLP that is missing stays dense.

    Returns:
        One operation per number, in their order.
    """
    return tuple(
        NarrowMlp(
            reader=name,
            writers=narrowable[name].writers,
            channels=tuple(sorted(found[name].order[-count:].tolist())),
        )
        for name, count in channels.items()
    )


def narrowing(
    view: DecoderView,
    operations: tuple[NarrowMlp, ...],
    metric: Metric,
    moments: Mapping[str, Moments],
    track: Track,
) -> Decision:
    """Return the removal of channels with refitted readers; several processes share the work.

    Args:
        view: The dense model.
        operations: Which channels stay.
        metric: How large a change of a weight counts.
        moments: What was measured, by module.
        track: Shows the progress.

    Returns:
        The operations, with the weight of each reader on what stays.
    """
    kept = {operation.reader: operation.channels for operation in operations}

    def narrowed(name: str, weight: Tensor) -> Tensor:
        return metric.narrowed(weight, moments_beside(weight, moments.get(name)), kept[name]).cpu()

    narrow = dealt(weights_of(view, kept), narrowed, track, "narrow")
    tensors = {f"{name}.weight": weight for name, weight in narrow}
    return Decision(operations=operations, tensors=tensors)
