"""Similarity of the hidden states that enter and leave decoder layers."""

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from grasp_lightning.config import LayerMetric
from grasp_lightning.linalg.layers import angular_distance_sum, cosine_sum
from grasp_lightning.models.calls import hidden_input, hidden_output
from grasp_lightning.models.decoder import DecoderView

_Args = tuple[object, ...]
_Kwargs = dict[str, object]


class LayerMetricCollector:
    """Mean over tokens of a metric between the input of layer l and the output of l + span - 1.

    Hidden states are read at the layers: the last entry of ``output_hidden_states`` comes after the
    final norm, so it is not comparable to the others.

    Source: Men et al., "ShortGPT", arXiv:2403.03853 (cosine); Gromov et al., "The Unreasonable
    Ineffectiveness of the Deeper Layers", arXiv:2403.17887 (angular distance).

    Args:
        metric: ``similarity``: mean cosine; ``angular``: mean arccos(cosine) / pi.
        span: Number of contiguous layers to compare across.

    Raises:
        ValueError: If the model has fewer layers than ``span``.
    """

    def __init__(self, view: DecoderView, metric: LayerMetric, span: int = 1) -> None:
        self._view = view
        self._measure = cosine_sum if metric == "similarity" else angular_distance_sum
        self._span = span
        num_starts = len(view.layer_indices) - span + 1
        if num_starts < 1:
            raise ValueError(f"span of {span} layers in a model of {len(view.layer_indices)}")
        self.sums = torch.zeros(num_starts, dtype=torch.float64, device=view.model.device)
        self.num_tokens = 0
        self._mask: Tensor | None = None
        self._inputs: deque[Tensor] = deque(maxlen=span)

    def start_batch(self, mask: Tensor) -> None:
        """Set the mask of the next forward pass, True for real tokens, ``(B, T)``."""
        self._mask = mask.to(self.sums.device)
        self._inputs.clear()
        self.num_tokens += int(mask.sum())

    def state(self) -> dict[str, Tensor]:
        """Return the sums so far."""
        return {"sums": self.sums.cpu().clone(), "num_tokens": torch.tensor(self.num_tokens)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore sums from ``state``."""
        self.sums = state["sums"].to(self.sums, copy=True)
        self.num_tokens = int(state["num_tokens"])

    def mean(self) -> Tensor:
        """Return the mean metric per start layer, float32 on the CPU, ``(L - span + 1,)``.

        Raises:
            ValueError: If no real token was seen.
        """
        if self.num_tokens == 0:
            raise ValueError("no real token was seen, so there is nothing to average")
        return (self.sums.cpu() / self.num_tokens).float()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hook the decoder layers during a ``with`` block."""
        with ExitStack() as stack:
            for position, index in enumerate(self._view.layer_indices):
                layer, hook = self._view.layer(index), partial(self._hook, position)
                stack.enter_context(layer.register_forward_hook(hook, with_kwargs=True))
            yield

    def _hook(
        self, position: int, _: nn.Module, args: _Args, kwargs: _Kwargs, output: object
    ) -> None:
        """Add one call of the layer at a position among those still in the model."""
        self._inputs.append(hidden_input(args, kwargs).detach().flatten(2))
        start = position - self._span + 1
        if start < 0:
            return
        if self._mask is None:
            raise RuntimeError("start_batch must be called before each forward pass")
        leaving = hidden_output(output).detach().flatten(2)
        self.sums[start] += self._measure(self._inputs[0], leaving, self._mask)
