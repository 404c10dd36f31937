"""Least-squares refit of one decoder layer on the hidden states of both models.

Legend: a cut linear computes ``V z + b``, where ``z`` holds its ``r`` inner activations: the output
of the right factor, or the kept channels of an MLP. ``T`` is its target for every token. The dense
and compressed streams are the hidden states of both models before this linear.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor, nn

from grasp_lightning import processes
from grasp_lightning.config import RefitChoice
from grasp_lightning.linalg.precision import full_precision
from grasp_lightning.linalg.regression import pulled_regression
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.linears import in_attention
from grasp_lightning.models.lowrank import is_low_rank
from grasp_lightning.models.sharding import is_sharded, whole
from grasp_lightning.models.surgery import in_place_of_linears, replacements
from grasp_lightning.plan import Operation, Replacement
from grasp_lightning.training.layer_streams import COMPRESSED, DENSE, Streams

RIDGE = 1e-2  # with a pull of 1
_LEAST_RIDGE = 1e-6  # products of inner activations are taken in float32
_UNEXPLAINED = 0.05  # largest share of a layer's change that its writers may not explain
_ROUNDING = 1e-4  # the same, for using the writers' sum instead of running the layer
_LEAVING, _INNER = "leaving", "inner"


class _Writers(NamedTuple):
    """Full names of a layer's linears that write into the residual stream.

    Their outputs explain the layer's change up to a share ``unexplained``.
    """

    attention: str
    mlp: str
    unexplained: float

    @property
    def names(self) -> tuple[str, str]:
        """Both linears in execution order."""
        return self.attention, self.mlp


class _SeenError(Exception):
    """Ends a forward pass once everything needed has been observed."""


class LayerRefit:
    """One decoder layer, run dense or compressed.

    Args:
        view: The model with this layer dense, as it is again after each method.
        index: The layer's number in the original model.
        changes: The layer's cuts and removals; may be empty.
        tensors: Tensors of the cuts, updated by each fit.
        streams: The hidden states that enter the layer.
        mode: ``prefix`` or ``residual``.
        pull: Cost of a change of outputs from those of ``tensors``, relative to their error. The
            ridge is proportional to it.
        is_fitted: ``tensors`` come from an earlier fit: ``fit`` only prepares ``advance``.
    """

    def __init__(
        self,
        view: DecoderView,
        index: int,
        changes: Sequence[Operation],
        tensors: dict[str, Tensor],
        streams: Streams,
        *,
        mode: RefitChoice,
        pull: float,
        is_fitted: bool,
    ) -> None:
        self._view = view
        self._pull = pull
        self._index = index
        self._is_fitted = is_fitted
        self._changes = changes
        self._cuts = cuts = [change for change in changes if isinstance(change, Replacement)]
        self._tensors = tensors
        self._streams = streams
        self._prefix = f"{view.layers_name}.{index}."
        self._dense = {name: view.module(name) for cut in cuts for name in cut.linears}
        self._compressed = replacements(view, changes, tensors)
        self._writers = self._find_writers() if cuts else None
        # The writers that are fitted to the stream; None where linears are fitted to outputs.
        self._stream = self._writers if mode == "residual" else None
        self._outputs = tuple(self._dense) if self._stream is None else self._stream.names
        self._may_stop = not is_sharded(view.model)
        self._run_dense()

    @property
    def fitted(self) -> dict[str, Tensor]:
        """The current tensors of the cuts."""
        return {cut.solved_tensor: self._tensors[cut.solved_tensor] for cut in self._cuts}

    def groups(self) -> list[list[Replacement]]:
        """Return the cuts that are fitted together, in the order in which the layer runs them."""
        writers = () if self._writers is None else self._writers.names
        groups: list[list[Replacement]] = []
        # A writer reads the outputs of its block's other linears.
        for attention, is_writer in product((True, False), (False, True)):
            group = [
                cut
                for cut in self._cuts
                if self._in_attention(cut.solved) == attention
                and (cut.solved in writers) == is_writer
            ]
            if group and (is_writer or self._stream is None):
                groups.append(group)
        return groups

    def fit(self, group: Sequence[Replacement]) -> None:
        """Fit some cuts, given the current tensors of the cuts that run before them."""
        sums: dict[str, Tensor] = {}
        names, hidden = {cut.solved for cut in group}, self._streams.hidden
        summed = self._summed(names)
        if self._is_fitted and summed is None:
            return
        with (
            self._streams.runner.only(self._index) as run,
            in_place_of_linears(self._view, self._compressed),
            self._noted_until_seen(names) as (outputs, inner),
        ):
            for number, batch in self._streams.batches.items():
                entering = hidden[COMPRESSED, number]
                outputs.clear()
                inner.clear()
                with suppress(_SeenError):
                    run(batch, entering)
                if len(batch["index"]) == 0:  # padding
                    continue
                for cut in () if self._is_fitted else group:  # in one order in all processes
                    target, weights = self._target(cut.solved, number, outputs)
                    weights = weights * batch["mask"].to(weights)
                    add_products(sums, cut.solved, inner[cut.solved], target, weights)
                if (
                    summed is not None
                ):  # for advance: the last writer's input and the rest of the sum
                    hidden[_INNER, number] = inner[summed.mlp]
                    written = _rows(outputs[summed.attention], entering)
                    hidden[COMPRESSED, number] = entering + written
        if self._is_fitted:
            return
        sums = processes.summed(sums)
        for cut in group:
            name, key = cut.solved, cut.solved_tensor
            cross, gram = sums[f"{name}:cross"], sums[f"{name}:gram"]
            prior = self._tensors[key].to(cross.device)
            ridge = max(RIDGE * self._pull, _LEAST_RIDGE)
            fitted = pulled_regression(cross, gram, prior, pull=self._pull, ridge=ridge)
            self._tensors[key] = fitted.to(self._tensors[key])
        self._compressed = replacements(self._view, self._changes, self._tensors)

    @torch.no_grad()
    def advance(self) -> None:
        """Move the hidden states of both models through the layer.

        The layer does not run again if the last writer's fit has kept its input and the rest of the
        sum.
        """
        hidden = self._streams.hidden
        summed = self._summed({cut.solved for cut in self._cuts})
        last = None if summed is None else _fitted_part(self._compressed[summed.mlp])
        with (
            self._streams.runner.only(self._index) as run,
            in_place_of_linears(self._view, self._compressed),
        ):
            for number, batch in self._streams.batches.items():
                if last is None:
                    hidden[COMPRESSED, number] = run(batch, hidden[COMPRESSED, number])
                elif len(batch["index"]) > 0:
                    now = hidden[COMPRESSED, number]
                    hidden[COMPRESSED, number] = now + _rows(last(hidden[_INNER, number]), now)
                hidden[DENSE, number] = hidden[_LEAVING, number]

    def _summed(self, names: AbstractSet[str]) -> _Writers | None:
        """Return the writers if the MLP's is in ``names`` and their sum is the layer's output."""
        writers = self._stream
        if writers is None or writers.mlp not in names or not self._may_stop:
            return None
        return writers if writers.unexplained <= _ROUNDING else None

    def _run_dense(self) -> None:
        """Store the output of the dense layer, and of those of its linears that targets need."""
        hidden = self._streams.hidden
        with (
            self._streams.runner.only(self._index) as run,
            self._noted_outputs(self._outputs) as outputs,
        ):
            for number, batch in self._streams.batches.items():
                entering = hidden[DENSE, number]
                hidden[_LEAVING, number] = run(batch, entering)
                for name in self._outputs:
                    # The same key in all layers, so that later layers overwrite it.
                    place = name.removeprefix(self._prefix), number
                    hidden[place] = _rows(outputs[name], entering)

    def _target(
        self, name: str, number: int, compressed: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return a linear's target without its bias, and the weights of all tokens."""
        hidden = self._streams.hidden
        target = hidden[name.removeprefix(self._prefix), number]
        weights = torch.ones(target.shape[:-1], device=target.device)
        if self._stream is not None:
            before, now = hidden[DENSE, number], hidden[COMPRESSED, number]
            if name == self._stream.mlp:
                attention = self._stream.attention
                before = before + hidden[attention.removeprefix(self._prefix), number]
                now = now + _rows(compressed[attention], now)
            after = before + target
            target, weights = after - now, 1 / after.float().square().mean(-1)
        bias = getattr(self._dense[name], "bias", None)
        return (target if bias is None else target - whole(bias)), weights

    def _in_attention(self, name: str) -> bool:
        return in_attention(name.removeprefix(self._prefix))

    @contextmanager
    def _noted_outputs(self, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
        """Record the outputs of linears by name."""
        found: dict[str, Tensor] = {}

        def note(name: str, _module: nn.Module, _args: object, output: Tensor) -> None:
            found[name] = output.detach().clone()  # some families add to it in place

        with ExitStack() as stack:
            for name in names:
                module = self._view.module(name)
                stack.enter_context(module.register_forward_hook(partial(note, name)))
            yield found

    @contextmanager
    def _noted_until_seen(
        self, names: AbstractSet[str]
    ) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """Record what targets need and the inputs of the fitted parts, in the compressed layer.

        ``_SeenError`` then ends the forward pass, unless the model is sharded: other processes wait
        for the rest of it.
        """
        inner: dict[str, Tensor] = {}
        needed: set[str] = set()
        if self._stream is not None and self._stream.mlp in names:
            needed = {self._stream.attention}

        def stop(*_: object) -> None:
            if self._may_stop and names <= inner.keys() and needed <= outputs.keys():
                raise _SeenError

        def note(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
            inner[name] = args[0].detach()
            stop()

        with ExitStack() as stack:
            outputs = stack.enter_context(self._noted_outputs(self._outputs))
            for name in needed:
                stack.enter_context(self._view.module(name).register_forward_hook(stop))
            for name in names:
                part = _fitted_part(self._compressed[name])
                stack.enter_context(part.register_forward_pre_hook(partial(note, name)))
            yield outputs, inner

    def _find_writers(self) -> _Writers | None:
        """Return the two linears whose outputs add up to the layer's change; None if no two do."""
        number, batch = next(iter(self._streams.batches.items()))
        linears, entering = self._view.linears(self._index), self._streams.hidden[DENSE, number]
        dense = self._view.dense_modules(self._index)
        names = [name for name in dense if linears[name].out_features == entering.shape[-1]]
        with self._noted_outputs(names) as outputs, self._streams.runner.only(self._index) as run:
            change = (run(batch, entering) - entering).float()
        found = {name: _rows(value, entering) for name, value in outputs.items()}
        attention = [name for name in found if self._in_attention(name)]
        pairs = product(attention, [name for name in found if name not in attention])
        scale = float(change.norm())
        writers = None
        for pair in pairs:
            rest = change - found[pair[0]].float() - found[pair[1]].float()
            if float(rest.norm()) <= _UNEXPLAINED * scale:
                writers = _Writers(*pair, float(rest.norm()) / scale if scale else 0.0)
        return processes.gather(writers)[0]


def _rows(value: Tensor, hidden: Tensor) -> Tensor:
    """Return a linear's input or output as ``(B, T, ...)``: some families flatten it."""
    return value.reshape(*hidden.shape[:-1], value.shape[-1])


def _fitted_part(module: nn.Module) -> nn.Module:
    """Return the fitted part of a replaced linear."""
    part = module.left if is_low_rank(module) else module
    assert isinstance(part, nn.Module)  # attributes of modules have no narrower type
    return part


def add_products(
    sums: dict[str, Tensor], name: str, inner: Tensor, target: Tensor, weights: Tensor
) -> None:
    """Add the products of one batch: inner activations ``(B, T, r)`` and targets ``(B, T, N)``.

    Products are taken in float32 and summed in float64.
    """
    inner, target = inner.flatten(0, -2).float(), target.flatten(0, -2).float()
    weighted = inner * weights.reshape(-1, 1)
    with full_precision(inner.device):
        products = {"cross": target.mT @ weighted, "gram": inner.mT @ weighted}
    for part, product_ in products.items():
        key = f"{name}:{part}"
        sums[key] = product_.double() + sums[key] if key in sums else product_.double()
