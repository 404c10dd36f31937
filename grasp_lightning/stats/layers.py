"""Hidden states that enter and leave decoder layers, compared while the model runs."""

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from grasp_lightning.config import LayerMetric
from grasp_lightning.linalg.layers import angular_distance_sum, cosine_sum
from grasp_lightning.models.calls import hidden_input, hidden_output
from grasp_lightning.models.decoder import DecoderView


class LayerMetricCollector:
    """Token-weighted mean of a metric between the input of layer l and the output of l + span - 1.

    The hidden states are read at the layers themselves: the last entry of ``output_hidden_states``
    is taken after the final norm, so it cannot be compared with the others.

    Source: Men et al., "ShortGPT", arXiv:2403.03853 (cosine); Gromov et al., "The Unreasonable
    Ineffectiveness of the Deeper Layers", arXiv:2403.17887 (angular distance).

    Args:
        view: The model.
        metric: ``similarity``: mean cosine; ``angular``: mean arccos(cosine) / pi.
        span: Number of contiguous layers that are compared across.

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
        self.sums = torch.zeros(num_starts, dtype=torch.float64)
        self.num_tokens = 0
        self._mask: Tensor | None = None
        self._inputs: deque[Tensor] = deque(maxlen=span)

    def start_batch(self, mask: Tensor) -> None:
        """Tell which tokens of the coming forward pass are real.

        Args:
            mask: True where a token is real, ``(B, T)``.
        """
        self._mask = mask
        self._inputs.clear()
        self.num_tokens += int(mask.sum())

    def state(self) -> dict[str, Tensor]:
        """Return the sums so far, from which a collector can go on."""
        return {"sums": self.sums.clone(), "num_tokens": torch.tensor(self.num_tokens)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from sums that ``state`` gave.

        Args:
            state: The sums.
        """
        self.sums = state["sums"].clone()
        self.num_tokens = int(state["num_tokens"])

    def mean(self) -> Tensor:
        """Return the metric per start layer, averaged over all tokens so far.

        Returns:
            Float32, ``(L - span + 1,)``.

        Raises:
            ValueError: If no real token was seen.
        """
        if self.num_tokens == 0:
            raise ValueError("no real token was seen, so there is nothing to average")
        return (self.sums / self.num_tokens).float()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hook the decoder layers for the duration of a ``with`` block.

        Yields:
            Nothing.
        """
        with ExitStack() as stack:
            for position, index in enumerate(self._view.layer_indices):
                layer = self._view.layer(index)
                stack.callback(
                    layer.register_forward_hook(self._hook(position), with_kwargs=True).remove
                )
            yield

    def _hook(self, position: int) -> "_LayerHook":
        return _LayerHook(self, position)

    def observe(self, position: int, entering: Tensor, leaving: Tensor) -> None:
        """Add one layer call of one batch.

        Args:
            position: Position of the layer among those still in the model.
            entering: Hidden states entering it, ``(B, T, D)``.
            leaving: Hidden states leaving it, ``(B, T, D)``.

        Raises:
            RuntimeError: If ``start_batch`` was not called before.
        """
        self._inputs.append(entering)
        start = position - self._span + 1
        if start < 0:
            return
        if self._mask is None:
            raise RuntimeError("start_batch must be called before each forward pass")
        self.sums[start] += self._measure(self._inputs[0], leaving, self._mask).cpu()


class _LayerHook:
    """Forward hook of one decoder layer."""

    def __init__(self, collector: LayerMetricCollector, position: int) -> None:
        self._collector = collector
        self._position = position

    def __call__(
        self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object
    ) -> None:
        del module
        self._collector.observe(
            self._position, hidden_input(args, kwargs).detach(), hidden_output(output).detach()
        )
