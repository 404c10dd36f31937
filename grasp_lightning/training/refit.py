"""Refit of cut linears on their inputs in the compressed model."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

from torch import Tensor

from grasp_lightning.config import RefitChoice
from grasp_lightning.data.datamodules import CalibrationData
from grasp_lightning.methods.base import REFIT_PULL
from grasp_lightning.models.decoder import DecoderView, frozen
from grasp_lightning.models.streamed import holding, streamed_weights
from grasp_lightning.models.surgery import replacements
from grasp_lightning.plan import FactorizeRows, Operation, Replacement
from grasp_lightning.reading.on_access import merged
from grasp_lightning.training.layer_refit import LayerRefit
from grasp_lightning.training.layer_streams import HiddenStates, Streams


class LayerStore(Protocol):
    """Stores layers that are already refitted."""

    def load(self, layer: int) -> Mapping[str, Tensor] | None:
        """Return a layer's refitted tensors, on any device; None if it is not finished."""

    def save(self, layer: int, tensors: Mapping[str, Tensor]) -> None:
        """Store a layer's refitted tensors."""


class RefitStore(LayerStore, Protocol):
    """Also reads one of them again."""

    def saved(self, layer: int) -> Mapping[str, Tensor]:
        """Return a stored layer's refitted tensors, read on access."""


class Refitter:
    """Refits the left factors of low-rank linears and the readers of narrowed MLPs, in order.

    Layers and blocks that are removed are missing in the compressed model from the start, and rows
    of the embedding are factorized.

    Each linear is fitted by least squares, with everything before it already compressed and
    refitted. ``prefix`` targets the linear's output in the dense model. ``residual`` fits only the
    linears that write into the residual stream and lets them compensate for earlier errors: the
    target is the dense stream after the write minus the compressed stream before it. Each token is
    weighted by the inverse mean square of the stream, because the next norm divides by it. In
    parallel blocks, attention counts as the first writer. Where a layer's change is not the sum of
    two linears' outputs (as with a norm after them), ``residual`` falls back to ``prefix``.

    The fit is pulled towards the truncated tensors: by default, their difference costs as much as
    the fit's error. Without the pull it overfits the calibration text.

    Source: ``prefix`` without a pull follows the layer-wise closed-form update of the first version
    of Wang et al., "SVD-LLM", arXiv:2403.07378. Its public code, on 16 samples, takes the inputs of
    all linears of a layer from the dense layer behind the compressed ones, so those of ``o_proj``
    and ``down_proj`` come from dense blocks. Its target is the dense weight times this input, not
    the output in the dense model. We know of no publication that targets the residual stream.

    Args:
        max_bytes: Memory for hidden states; the rest is stored in files.
        pull: Cost of that difference relative to the fit's error; 0 is least squares.
    """

    def __init__(
        self,
        data: CalibrationData,
        *,
        max_bytes: float,
        track: Callable[[Sequence[str], str], Iterable[str]],
        pull: float = REFIT_PULL,
    ) -> None:
        self._data = data
        self._max_bytes = max_bytes
        self._track = track
        self._pull = pull

    def __call__(
        self,
        view: DecoderView,
        mode: RefitChoice,
        operations: Sequence[Operation],
        tensors: Mapping[str, Tensor],
        store: RefitStore | None = None,
    ) -> Mapping[str, Tensor]:
        """Return refitted tensors of the same names and shapes; a store keeps a streamed model's.

        Args:
            view: The dense model; it is changed during the refit and dense again afterwards.
            mode: ``prefix`` or ``residual``.
            operations: The operations decided on.
            tensors: Their tensors before the refit.
            store: Holds the finished layers of earlier starts, and keeps those of this one.
        """
        refitted, by_layer = [tensors], _by_layer(view, operations)
        dropped = {index for operation in operations for index in operation.dropped}
        fitted = [i for i in by_layer if any(isinstance(op, Replacement) for op in by_layer[i])]
        if not fitted:
            return tensors
        first, last = min(by_layer.keys() | dropped), max(fitted)
        ends = [op for op in operations if isinstance(op, FactorizeRows)]
        factored = replacements(view, ends, tensors) if ends else {}
        if factored:
            first = view.layer_indices[0]
        layers = {str(i): i for i in view.layer_indices if first <= i <= last}
        with TemporaryDirectory() as folder, frozen(view.model):
            is_streamed = streamed_weights(view.model) is not None
            device = view.model.device if is_streamed else None
            hidden = HiddenStates(Path(folder), self._max_bytes, device)
            streams = Streams(view, self._data, hidden)
            streams.start(first, factored)
            following = dict(pairwise(layers.values()))
            for number in self._track(tuple(layers), "refit layers"):
                index = layers[number]
                with holding(view.model, index, following.get(index)):
                    if index in dropped:
                        streams.advance_dense(index)
                        continue
                    changes = by_layer.get(index, [])
                    keeps = store if index in fitted else None
                    own = self._refit_layer(
                        view,
                        index,
                        changes,
                        tensors=tensors,
                        streams=streams,
                        mode=mode,
                        store=keeps,
                    )
                    on_disk = is_streamed and keeps is not None
                    refitted.append(keeps.saved(index) if keeps is not None and on_disk else own)
        return merged(*refitted)

    def _refit_layer(
        self,
        view: DecoderView,
        index: int,
        changes: Sequence[Operation],
        *,
        tensors: Mapping[str, Tensor],
        streams: Streams,
        mode: RefitChoice,
        store: LayerStore | None,
    ) -> dict[str, Tensor]:
        """Refit the cuts of one layer, and move the hidden states through it; return the cuts."""
        changed = {name for change in changes for name in change.modules}
        own = {key: tensors[key] for key in tensors if key.rpartition(".")[0] in changed}
        stored = None if store is None else store.load(index)
        for key, value in (stored or {}).items():
            own[key] = value.to(own[key])
        is_fitted = stored is not None
        layer = LayerRefit(
            view,
            index,
            changes,
            own,
            streams,
            mode=mode,
            pull=self._pull,
            is_fitted=is_fitted,
        )
        for group in layer.groups():
            layer.fit(group)
        if store is not None and not is_fitted:
            store.save(index, layer.fitted)
        layer.advance()
        return layer.fitted


def _by_layer(view: DecoderView, operations: Sequence[Operation]) -> dict[int, list[Operation]]:
    found: dict[int, list[Operation]] = {}
    for operation in operations:
        if operation.modules and not isinstance(operation, FactorizeRows):
            index = view.layer_of(operation.modules[0])
            assert index is not None  # operations are on modules of decoder layers
            found.setdefault(index, []).append(operation)
    return found
