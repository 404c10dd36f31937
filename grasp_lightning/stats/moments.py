"""Sums over tokens of inputs and gradients of linears, such as Gram matrices.

The readers of experts count as one linear ``(E, N, M)``: each expert's own inputs have a Gram
matrix, ``(E, M, M)`` in all, and the gradients belong to the sum of all experts.

Legend: T tokens of a window, N output and M input features of a linear, E experts.
"""

from collections.abc import Mapping
from itertools import product

import torch
from torch import Tensor

from grasp_lightning.errors import NumericsError
from grasp_lightning.linalg.precision import full_precision
from grasp_lightning.linalg.triangles import pack_triangle, unpack_triangle
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.mixtures import RoutedTokens, weights_of
from grasp_lightning.stats.base import MomentKind, Moments, Needs, check_seen

_GRAMS: frozenset[MomentKind] = frozenset({"input_gram", "gradient_gram"})
_OF_INPUTS: frozenset[MomentKind] = frozenset({"input_gram", "input_scale", "input_square"})


class MomentSums:
    """Sums the moments of several linears in float32, window by window.

    Each window is one float32 matrix product, so sums do not depend on the batch size. Linears that
    read the same input share its sums.

    Args:
        shapes: ``(N, M)`` of a linear or ``(E, N, M)`` of experts, by module.
        kinds: Which sums are taken; of experts only Gram matrices.
        sources: Module -> the module whose input it shares, possibly itself.
        device: Device of the sums.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        kinds: frozenset[MomentKind],
        sources: Mapping[str, str],
        device: torch.device,
    ) -> None:
        self._kinds = kinds
        self._sources = sources
        self._shapes = shapes
        self._num_windows = dict.fromkeys(shapes, 0)
        self.sums: dict[str, Tensor] = {}
        for (module, (*stack, n, m)), kind in product(shapes.items(), sorted(kinds)):
            key, size = self._key(module, kind), n if kind == "gradient_gram" else m
            if key not in self.sums:
                shape = (size, size) if kind in _GRAMS else (size,)
                shape = (*stack, *shape) if kind in _OF_INPUTS else shape
                self.sums[key] = torch.zeros(shape, device=device)

    def _key(self, module: str, kind: MomentKind) -> str:
        return f"{self._sources[module] if kind in _OF_INPUTS else module}:{kind}"

    def _find(self, module: str, kind: MomentKind) -> Tensor | None:
        return self.sums[self._key(module, kind)] if kind in self._kinds else None

    def add(self, module: str, x: Tensor | RoutedTokens, grad_output: Tensor | None = None) -> None:
        """Add one window of a linear: input ``(T, M)``, any gradient of its output ``(T, N)``.

        Experts have routed tokens instead of an input.
        """
        self._num_windows[module] += 1
        with full_precision(self.sums[next(iter(self.sums))].device):
            if isinstance(x, RoutedTokens):
                self._add_routed(module, x)
                x = x.hidden[:, :0]
            elif self._sources[module] == module:
                self._add_input(module, x.float())
            if grad_output is not None:
                self._add_gradient(module, x.float(), grad_output.float())

    @torch.no_grad()
    def _add_routed(self, module: str, tokens: RoutedTokens) -> None:
        grams = self._find(module, "input_gram")
        if grams is not None:
            for expert, x in tokens.inputs():
                grams[expert].addmm_(x.float().mT, x.float())

    def _add_input(self, module: str, x: Tensor) -> None:
        gram, scale = self._find(module, "input_gram"), self._find(module, "input_scale")
        square = self._find(module, "input_square")
        if gram is not None:
            gram.addmm_(x.mT, x)
        if scale is not None:
            scale += x.abs().sum(dim=0)
        if square is not None:
            square += x.square().sum(dim=0)

    def _add_gradient(self, module: str, x: Tensor, gradient: Tensor) -> None:
        gram, fisher = self._find(module, "gradient_gram"), self._find(module, "fisher_columns")
        if gram is not None:
            gram.addmm_(gradient.mT, gradient)
        if fisher is not None:
            fisher += (gradient.mT @ x).square().sum(dim=0)

    def state(self) -> dict[str, Tensor]:
        """Return the sums so far on the CPU, Gram matrices as packed triangles."""
        return {
            key: (pack_triangle(value) if value.ndim > 1 else value).cpu()
            for key, value in self.sums.items()
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore sums from ``state``."""
        for key, value in self.sums.items():
            stored = state[key].to(value)
            value.copy_(unpack_triangle(stored) if value.ndim > 1 else stored)

    def check_seen(self) -> None:
        """Raise ``ModelError`` for a linear that was called less often than others."""
        check_seen(self._num_windows, "it cannot be measured")

    def mean(self, num_tokens: int) -> dict[str, Moments]:
        """Divide the sums in place by the number of real tokens, and return the moments by module.

        Raises:
            NumericsError: If a sum is NaN or infinite.
        """
        self.check_seen()
        for key, value in self.sums.items():
            if not value.isfinite().all():
                module, _, kind = key.partition(":")
                raise NumericsError(
                    f"the {kind} of {module} is NaN or infinite; check the checkpoint, or compute "
                    "in float32 (model.dtype, trainer.precision) if it is narrower"
                )
            value.div_(num_tokens)
        return {name: moments_of(name, self.sums, self._sources) for name in self._shapes}

    @property
    def num_bytes(self) -> int:
        """Memory of the sums."""
        return sum(value.nbytes for value in self.sums.values())


def moments_of(module: str, tensors: Mapping[str, Tensor], sources: Mapping[str, str]) -> Moments:
    """Return one linear's moments from tensors named ``<module>:<kind>``; missing ones are None."""
    source = sources[module]
    return Moments(
        input_gram=tensors.get(f"{source}:input_gram"),
        gradient_gram=tensors.get(f"{module}:gradient_gram"),
        input_scale=tensors.get(f"{source}:input_scale"),
        input_square=tensors.get(f"{source}:input_square"),
        fisher_columns=tensors.get(f"{module}:fisher_columns"),
    )


def moment_bytes(
    shapes: Mapping[str, tuple[int, ...]],
    kinds: frozenset[MomentKind],
    sources: Mapping[str, str],
) -> int:
    """Return the bytes that ``MomentSums`` of the same arguments takes."""
    return MomentSums(shapes, kinds, sources, torch.device("meta")).num_bytes


def layer_groups(
    view: DecoderView, needs: Needs, max_bytes: float, sources: Mapping[str, str]
) -> list[tuple[str, ...]]:
    """Group a step's linears by whole layers whose sums fit into memory, in model order.

    Args:
        max_bytes: Memory for the sums of a group; a single layer may take more.
        sources: Module -> the module whose input it shares, possibly itself.
    """
    weights = weights_of(view, needs.moments)
    layers: dict[int, tuple[str, ...]] = {}
    for index in view.layer_indices:
        if found := tuple(n for n in needs.moments if view.layer_of(n) == index):
            layers[index] = found

    def size(names: tuple[str, ...]) -> int:
        shapes = {name: tuple(weights[name].shape) for name in names}
        return moment_bytes(shapes, needs.moment_kinds, sources)

    groups = groups_within({index: size(names) for index, names in layers.items()}, max_bytes)
    return [tuple(n for index in group for n in layers[index]) for group in groups]


def groups_within(sizes: Mapping[int, int], max_bytes: float) -> list[tuple[int, ...]]:
    """Split layers into consecutive groups, each as large as the memory allows.

    Args:
        sizes: Bytes of each layer, in order.
        max_bytes: Memory for a group; a single layer may take more.
    """
    groups: list[tuple[int, ...]] = []
    total = 0
    for index, size in sizes.items():
        if groups and total + size <= max_bytes:
            groups[-1] += (index,)
            total += size
        else:
            groups.append((index,))
            total = size
    return groups
