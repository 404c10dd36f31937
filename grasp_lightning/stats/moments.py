"""Sums over tokens of what passes through linears: Gram matrices of inputs and of gradients.

Legend: T tokens of a window, N output and M input features of a linear.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from grasp_lightning.errors import NumericsError
from grasp_lightning.linalg.triangles import pack_triangle, unpack_triangle
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.stats.base import MomentKind, Moments, Needs, check_seen

_GRAMS: frozenset[MomentKind] = frozenset({"input_gram", "gradient_gram"})
_OF_INPUTS: frozenset[MomentKind] = frozenset({"input_gram", "input_scale"})


class MomentSums:
    """Sums of moments of several linears, in float32, window by window.

    A window is added as one product of float32 matrices, whatever shares its batch, so the sums do
    not depend on the batch size. Linears that read the same input share the sums over it.

    Args:
        shapes: ``(N, M)`` by module.
        kinds: What is summed up.
        sources: Module -> the module whose input stands for its own, which may be itself.
        device: Device of the sums.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        kinds: frozenset[MomentKind],
        sources: Mapping[str, str],
        device: torch.device,
    ) -> None:
        self._kinds = kinds
        self._sources = sources
        self._shapes = shapes
        self._num_windows = dict.fromkeys(shapes, 0)
        zeros = partial(torch.zeros, device=device)
        self.sums = {
            key: zeros((size, size) if kind in _GRAMS else size)
            for key, (kind, size) in self._sizes().items()
        }

    def _sizes(self) -> dict[str, tuple[MomentKind, int]]:
        """Return kind and number of features by key of a sum."""
        return {
            self._key(module, kind): (kind, n if kind == "gradient_gram" else m)
            for module, (n, m) in self._shapes.items()
            for kind in sorted(self._kinds)
        }

    def _key(self, module: str, kind: MomentKind) -> str:
        return f"{self._sources[module] if kind in _OF_INPUTS else module}:{kind}"

    def _find(self, module: str, kind: MomentKind) -> Tensor | None:
        return self.sums[self._key(module, kind)] if kind in self._kinds else None

    def add(self, module: str, x: Tensor, grad_output: Tensor | None = None) -> None:
        """Add one window of one linear.

        Args:
            module: Name of the linear.
            x: Its input, ``(T, M)``, any float dtype.
            grad_output: Gradient of the summed token loss by its output, ``(T, N)``; None in a
                pass without gradients.
        """
        self._num_windows[module] += 1
        # Hooks may call from inside a mixed-precision step, where autocast would round products.
        with torch.autocast(x.device.type, enabled=False):
            if self._sources[module] == module:
                self._add_input(module, x.float())
            if grad_output is not None:
                self._add_gradient(module, x.float(), grad_output.float())

    def _add_input(self, module: str, x: Tensor) -> None:
        gram, scale = self._find(module, "input_gram"), self._find(module, "input_scale")
        if gram is not None:
            gram.addmm_(x.mT, x)
        if scale is not None:
            scale += x.abs().sum(dim=0)

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
        """Go on from sums that ``state`` gave.

        Args:
            state: The sums.
        """
        for key, value in self.sums.items():
            stored = state[key].to(value)
            value.copy_(unpack_triangle(stored) if value.ndim > 1 else stored)

    def check_seen(self) -> None:
        """Refuse a linear that was called less often than others: a ``ModelError`` names it."""
        check_seen(self._num_windows, "it cannot be measured")

    def mean(self, num_tokens: int) -> dict[str, Moments]:
        """Return the moments of all linears, divided once by the number of tokens, in place.

        Args:
            num_tokens: Number of real tokens in all windows.

        Returns:
            Moments by module. A linear that was not seen is a ``ModelError``.

        Raises:
            NumericsError: If a sum is NaN or infinite, naming the module.
        """
        self.check_seen()
        for key, value in self.sums.items():
            if not value.isfinite().all():
                raise NumericsError(
                    f"the {key.partition(':')[2]} of {key.partition(':')[0]} is NaN or infinite; "
                    "check the checkpoint, or compute in float32 (model.dtype, trainer.precision) "
                    "if it is not"
                )
            value.div_(num_tokens)
        return {name: moments_of(name, self.sums, self._sources) for name in self._shapes}

    @property
    def num_bytes(self) -> int:
        """Memory of the sums."""
        return sum(value.nbytes for value in self.sums.values())


def moments_of(module: str, tensors: Mapping[str, Tensor], sources: Mapping[str, str]) -> Moments:
    """Return the moments of one linear among tensors named ``<module>:<kind>``.

    Args:
        module: Name of the linear.
        tensors: Moments of all linears.
        sources: Module -> the module whose input stands for its own.

    Returns:
        Its moments; what is not there is None.
    """
    source = sources[module]
    return Moments(
        input_gram=tensors.get(f"{source}:input_gram"),
        gradient_gram=tensors.get(f"{module}:gradient_gram"),
        input_scale=tensors.get(f"{source}:input_scale"),
        fisher_columns=tensors.get(f"{module}:fisher_columns"),
    )


def moment_bytes(
    shapes: Mapping[str, tuple[int, int]],
    kinds: frozenset[MomentKind],
    sources: Mapping[str, str],
) -> int:
    """Return the memory that the sums of some linears take.

    Args:
        shapes: ``(N, M)`` by module.
        kinds: What is summed up.
        sources: Module -> the module whose input stands for its own.

    Returns:
        Bytes.
    """
    return MomentSums(shapes, kinds, sources, torch.device("meta")).num_bytes


def layer_groups(
    view: DecoderView, needs: Needs, max_bytes: float, sources: Mapping[str, str]
) -> list[tuple[str, ...]]:
    """Return the linears of a step in groups of whole layers whose sums fit into memory.

    Args:
        view: The model.
        needs: What is measured.
        max_bytes: Memory that the sums of a group may take; one layer may take more.
        sources: Module -> the module whose input stands for its own.

    Returns:
        Modules of each group, in model order.
    """
    linears = view.all_linears()
    groups: list[tuple[str, ...]] = []
    total = 0
    for index in view.layer_indices:
        layer = tuple(n for n in needs.moments if view.layer_of(n) == index)
        shapes = {n: (linears[n].out_features, linears[n].in_features) for n in layer}
        size = moment_bytes(shapes, needs.moment_kinds, sources)
        if layer and groups and total + size <= max_bytes:
            groups[-1] += layer
            total += size
        elif layer:
            groups.append(layer)
            total = size
    return groups
