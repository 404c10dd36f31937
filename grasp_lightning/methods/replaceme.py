"""Deletion of a span of layers, with a linear map folded into the MLP before it."""

from dataclasses import replace
from typing import Final

import torch

from grasp_lightning.config import MethodConfig
from grasp_lightning.errors import ConfigError, ModelError
from grasp_lightning.methods.base import Decision, Registered, Track
from grasp_lightning.methods.budget import resolve_num_layers
from grasp_lightning.methods.drop import DropMethod
from grasp_lightning.methods.layer_choice import LayerChoice, configured_layers
from grasp_lightning.methods.options import resolve_deletion
from grasp_lightning.methods.prediction import Layers
from grasp_lightning.methods.seams import SEAM, checked_ridge, seam_weight
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.linears import TransposedLinear, as_linear
from grasp_lightning.models.mlp import mlps
from grasp_lightning.models.operations.base import dense_module
from grasp_lightning.models.residual import fold_problem
from grasp_lightning.models.sharding import whole
from grasp_lightning.plan import DropLayers, Plan, SetWeights
from grasp_lightning.stats.base import Needs, Seam, Statistics, Step

REPLACEME: Final = "replaceme"
_ELSE = "use method.name=drop with method.seam=linear, or another method"


class ReplaceMe(DropMethod):
    """Delete a span of layers, and change the last linear of the MLP before it to make up for it.

    With the MLP's output M and the other terms Y of the layer before the span, ``h = Y + M``, and
    the state L after the span, the map is ``T = argmin |M T + Y - L|^2``. The linear that computes
    M gets the weight ``T^T W`` and the bias ``T^T b``, so the model has an ordinary structure.

    Source: Shopov et al., "ReplaceMe", arXiv:2505.02819, the least squares solution. Differences:

    - The ridge pulls T to the identity, which is plain deletion, and not to zero, which would
      remove the MLP's output in directions that the text does not show. Without a ridge both are
      the same.
    - The default ridge of 1e-8 of the mean diagonal of ``M^T M``, where the public code has none,
      bounds T if there are fewer tokens than features. With enough text it changes nothing visible.
    - Padding does not count. The public code pads and truncates its texts again, includes the
      padding, and drops a last partial batch. The fit depends strongly on these tokens.
    - The span is the one with the smallest mean angle over all tokens, as in ``layer_metric:
      angular``, and L is read before the final norm. The public code compares the last token of
      each text, and reads the state after the last layer behind the final norm.
    - The sums use the model in its own dtype; the public code measures a model in 4 bits.

    Args:
        layers: How the span is chosen.
        ridge: Share of the mean diagonal.
    """

    def __init__(self, layers: LayerChoice, ridge: float) -> None:
        super().__init__(
            layers, REPLACEME, "https://arxiv.org/abs/2505.02819", more_options={"ridge": ridge}
        )
        self._ridge = ridge

    def _step(self, model: DecoderView, plan: Plan, layers: Layers) -> Step | None:
        """Request the sums of the span, once."""
        if plan.dropped_layers:
            return None
        (mlp,) = mlps(model, layers[0] - 1)
        needs = Needs(seams=(Seam(layers=layers, source=mlp.reader),))
        return Step(name=SEAM, layers=layers, needs=needs)

    def _decide(self, step: Step, model: DecoderView, stats: Statistics) -> Decision:
        """Fold the map into the linear, and delete the span."""
        (seam,) = step.needs.seams
        assert seam.source is not None  # the step names it
        added = seam_weight(stats.seams[seam], self._ridge)
        linear = as_linear(dense_module(model, seam.source))
        parameters = {"weight": linear.weight}
        if linear.bias is not None:
            parameters["bias"] = linear.bias
        tensors = {}
        for name, parameter in parameters.items():
            value = whole(parameter.detach()).cpu()
            folded = value.double() + added @ value.double()
            folded = folded.to(torch.promote_types(value.dtype, torch.float32))
            if name == "weight" and isinstance(linear, TransposedLinear):
                folded = folded.mT.contiguous()
            tensors[f"{seam.source}.{name}"] = folded
        fold = SetWeights(module=seam.source, parameters=tuple(parameters))
        return Decision(operations=(fold, DropLayers(layers=seam.layers)), tensors=tensors)


def _resolved(config: MethodConfig) -> MethodConfig:
    if config.layer_metric not in (None, "angular"):
        raise ConfigError(
            f"method.layer_metric is {config.layer_metric}, but method replaceme deletes "
            "contiguous layers: expected angular"
        )
    given = replace(config, layer_metric="angular") if config.layers is None else config
    resolved = resolve_deletion(given)
    layers = resolved.layers
    if layers is not None and layers != tuple(range(layers[0], layers[-1] + 1)):
        raise ConfigError(
            f"method.layers must be contiguous for method replaceme, got {list(layers)}: the span "
            "is replaced by one linear map; method.name=drop takes any layers"
        )
    if layers is not None and layers[0] == 0:
        raise ConfigError(
            "method.layers must start at layer 1 or later for method replaceme, got "
            f"{list(layers)}: the map is folded into the MLP of the layer before them"
        )
    return replace(resolved, ridge=checked_ridge(config))


def _built(config: MethodConfig, view: DecoderView, track: Track) -> ReplaceMe:
    del track
    choice = configured_layers(resolve_num_layers(config, view))
    choice.check(view.num_layers)
    family = type(view.model).__name__
    earlier = view.layer_indices[:-1] if choice.layers is None else (choice.layers[0] - 1,)
    problems = {index: fold_problem(view, index) for index in earlier}
    starts = tuple(i + 1 for i, problem in problems.items() if problem is None)
    if not starts:
        index, problem = next(iter(problems.items()), (0, "no layer follows it"))
        raise ModelError(
            f"method replaceme cannot fold a map into decoder layer {index} of {family}: "
            f"{problem}; {_ELSE}"
        )
    if choice.layers is None:
        choice = replace(choice, starts=starts)
        choice.check(view.num_layers)
    return ReplaceMe(choice, checked_ridge(config))


REPLACEME_METHOD: Final = Registered(
    name=REPLACEME,
    ignores="deletes a span of layers and scores no components",
    resolve=_resolved,
    build=_built,
)
