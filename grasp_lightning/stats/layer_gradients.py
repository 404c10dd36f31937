"""Scores of whole decoder layers by the gradients of all their parameters."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from grasp_lightning.errors import ModelError, NumericsError
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.sharding import whole
from grasp_lightning.stats.moments import groups_within
from grasp_lightning.stats.observer import ParameterObserver, parameter_owners


class LayerGradients:
    """Sums the gradient of every parameter of some layers over windows, sign included.

    The score of a layer is the sum of ``|w dL/dw|`` over all its parameters w, norms and biases
    included. The modulus is taken after the sum over windows.

    Source: Kim et al., "Shortened LLaMA", arXiv:2402.02834, the Taylor criterion.

    Args:
        layers: Original numbers of the layers.
    """

    def __init__(self, view: DecoderView, layers: tuple[int, ...]) -> None:
        self._view = view
        self._layers = layers
        self.sums = {
            f"{module}.{key}": torch.zeros(
                parameter.shape,
                dtype=torch.promote_types(parameter.dtype, torch.float32),
                device=view.model.device,
            )
            for module in parameter_owners(view, layers)
            for key, parameter in view.module(module).named_parameters(recurse=False)
        }
        self.observer = ParameterObserver(view, layers, self.add)

    def add(self, module: str, gradients: Mapping[str, Tensor]) -> None:
        """Add gradients of a module's own parameters, by their names in it."""
        for key, gradient in gradients.items():
            self.sums[f"{module}.{key}"] += gradient

    def state(self) -> dict[str, Tensor]:
        """Return the sums so far by parameter, on the CPU."""
        return {name: value.cpu() for name, value in self.sums.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore sums from ``state``."""
        self.sums = {name: state[name].to(value) for name, value in self.sums.items()}

    def check_seen(self) -> None:
        """Refuse a module whose parameters the model reads without calling it.

        Raises:
            ModelError: If there is one.
        """
        for module in parameter_owners(self._view, self._layers):
            if module not in self.observer.called:
                raise ModelError(
                    f"the model reads the parameters of {module} without calling it, so they have "
                    "no measured gradient; set method.criterion=perplexity"
                )

    def scores(self, num_targets: int) -> dict[int, float]:
        """Return the score of every layer, in nats per predicted token.

        Raises:
            NumericsError: If a score is NaN or infinite.
        """
        scores = {index: self._score(index) / num_targets for index in self._layers}
        for index, score in scores.items():
            if not score < float("inf"):
                raise NumericsError(
                    f"the gradient of decoder layer {index} is NaN or infinite; check the "
                    "checkpoint, or compute in float32 (model.dtype, trainer.precision) if it is "
                    "narrower"
                )
        return scores

    def _score(self, index: int) -> float:
        total = 0.0
        for module in parameter_owners(self._view, (index,)):
            for key, parameter in self._view.module(module).named_parameters(recurse=False):
                gradient = self.sums[f"{module}.{key}"]
                weight = whole(parameter.detach()).to(gradient)
                total += float((weight * gradient).abs().sum(dtype=torch.float64))
        return total


def gradient_groups(
    view: DecoderView, layers: Iterable[int], max_bytes: float
) -> list[tuple[int, ...]]:
    """Group layers whose summed gradients, in float32, fit into memory.

    Args:
        max_bytes: Memory for the sums of a group; a single layer may take more.
    """
    sizes = {
        index: 4 * sum(parameter.numel() for parameter in view.layer(index).parameters())
        for index in layers
    }
    return groups_within(sizes, max_bytes)
