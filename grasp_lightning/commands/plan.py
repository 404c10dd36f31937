"""``plan``: what a configuration would remove, and its memory, from shapes alone."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from grasp_lightning.commands.streamed import check_streamed, method_problem
from grasp_lightning.commands.vocabulary import (
    check_vocabulary_keys,
    shares_of_the_rest,
    without_weights,
)
from grasp_lightning.config import (
    CompensateConfig,
    CompressConfig,
    MatmulPrecision,
    PlanConfig,
)
from grasp_lightning.memory.activations import FLOAT64
from grasp_lightning.memory.forecast import calibration_plan, compensation_plan
from grasp_lightning.memory.model_shape import model_shape, shape_after
from grasp_lightning.memory.text import CalibrationPlan, CompensationPlan, memory_lines
from grasp_lightning.methods import build_method, predict, resolve_method
from grasp_lightning.methods.blocks import weight_shapes
from grasp_lightning.methods.budgeted_truncation import BudgetedTruncation
from grasp_lightning.methods.embedding_rows import row_shapes
from grasp_lightning.methods.metric import Metric
from grasp_lightning.methods.narrowing import narrowable_mlps
from grasp_lightning.methods.prediction import Prediction
from grasp_lightning.methods.sparsity import SparsityMethod
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.loading import load_meta_model
from grasp_lightning.models.mixtures import in_model_order, weights_of
from grasp_lightning.models.operations import applier_of
from grasp_lightning.plan import NarrowExperts, Plan
from grasp_lightning.reporting.metrics import VocabularyChange
from grasp_lightning.reporting.tables import change_lines, target_losses_text
from grasp_lightning.stats.base import Needs
from grasp_lightning.stats.moments import layer_groups, moment_bytes
from grasp_lightning.storage.recut import StoredScores

_UNKNOWN = (
    "the loss of each method.target depends on the data: compress and plan --from_scores report it"
)


_DIRECTIONS = 4  # matrices of the hidden size that one eigendecomposition takes


@dataclass(frozen=True, kw_only=True)
class Planned:
    """Sizes before and after, and memory of a calibration and a later compensation.

    Attributes:
        target_losses: Predicted loss by ``method.target``; None if the method has no targets.
        matmul_precision: How the passes of the model round products.
        vocabulary: What trimming removes first; None if all tokens stay.
    """

    prediction: Prediction
    target_losses: Mapping[str, float] | None
    calibration: CalibrationPlan
    compensation: CompensationPlan
    matmul_precision: MatmulPrecision
    vocabulary: VocabularyChange | None = None

    @property
    def lines(self) -> list[str]:
        """All of it as text; the first line begins with the removed share, if known."""
        memory = memory_lines(self.calibration, self.compensation)
        first, *others = self.prediction.lines
        trimmed = [] if self.vocabulary is None else change_lines(self.vocabulary)
        said = [first, *trimmed, *others, *self._target_lines, *self._precision_lines]
        return [*said, "", *memory]

    @property
    def _precision_lines(self) -> list[str]:
        if self.matmul_precision == "highest":
            return []
        key = f"trainer.matmul_precision {self.matmul_precision}"
        exact = "those of Gram matrices, scores and decompositions are not"
        return [f"float32 products of the model are rounded ({key}), {exact}"]

    @property
    def _target_lines(self) -> list[str]:
        if self.target_losses is None:
            return []
        if not self.target_losses:
            return [_UNKNOWN]
        losses = target_losses_text(self.target_losses)
        return [f"predicted increase of the loss, in nats per token, by method.target: {losses}"]


def run_plan(config: PlanConfig, compensate: CompensateConfig | None = None) -> Planned:
    """Return what a configuration would remove and the memory it takes; reads no weights."""
    config = replace(config, method=resolve_method(config.method, config.seed))
    check_vocabulary_keys(config)
    if config.model.loading == "streamed":
        check_streamed(config)
    if config.method.vocabulary == "corpus":  # which reads the tokenizer
        model, _, trimmed, vocabulary = without_weights(config)
        return planned(trimmed, compensate, DecoderView(model), vocabulary)
    return planned(config, compensate, DecoderView(load_meta_model(config.model, warns=True)))


def planned(
    config: CompressConfig,
    compensate: CompensateConfig | None,
    view: DecoderView,
    vocabulary: VocabularyChange | None = None,
) -> Planned:
    """Return the forecast of a configuration with its method resolved, and of a compensation.

    Args:
        config: The configuration.
        compensate: None for the defaults.
        view: The dense model; its weights may be on the meta device.
        vocabulary: What trimming has removed from it; ``config`` has what is left of the budget.
    """
    compensate = compensate or CompensateConfig(model=config.model)
    with shares_of_the_rest(vocabulary):
        prediction = predict(view, config.method)
    if vocabulary is not None:
        prediction = replace(prediction, dense=vocabulary.parameters.before)
    dense = model_shape(view)
    compressed = shape_after(dense, prediction.operations, prediction.most)
    return Planned(
        prediction=prediction,
        target_losses=_target_losses(config, view),
        calibration=calibration_plan(
            config,
            dense,
            compressed,
            prediction.layers,
            moments=_moment_bytes(view, config, prediction),
            layer_moments=(
                None
                if method_problem(config.method)
                else _moment_bytes(view, config, prediction, by_layer=True)
            ),
            set_weights=_set_weights(view, prediction),
            row_groups=tuple(row_shapes(view).values()) if prediction.has_rows else (),
            device_memory=config.device_memory if isinstance(config, PlanConfig) else None,
        ),
        compensation=compensation_plan(
            compensate,
            dense,
            compressed,
            source=config.compensate,
            trainers=[config.trainer],
        ),
        matmul_precision=config.trainer.matmul_precision,
        vocabulary=vocabulary,
    )


def _set_weights(view: DecoderView, prediction: Prediction) -> int:
    """Return how many weights in the type of the model a run keeps besides factors."""
    if prediction.zeros:
        return prediction.factors
    found = 0
    for op in prediction.operations:
        if isinstance(op, NarrowExperts):
            own = applier_of(op).own_tensors(op, view).values()
            found += sum(tensor.numel() for tensor in own)
    return found


def _target_losses(config: CompressConfig, view: DecoderView) -> dict[str, float] | None:
    method = build_method(config.method, view)
    if config.method.weighting != "kfac" or not isinstance(method, BudgetedTruncation):
        return None
    if config.from_scores is None:
        return {}
    stored = StoredScores(config.from_scores)
    return method.stored_target_losses(view, stored.plan, stored)


def _moment_bytes(
    view: DecoderView, config: CompressConfig, prediction: Prediction, *, by_layer: bool = False
) -> int:
    """Return an upper bound for the sums in the largest pass of a curvature measurement.

    With ``by_layer``, each layer has a pass of its own.

    Linears with the same input share its Gram matrix, which shapes do not show.
    """
    if config.method.directions_of is not None:  # sums, eigenvectors and their workspace
        return _DIRECTIONS * FLOAT64 * model_shape(view).hidden ** 2
    method = build_method(config.method, view)
    if isinstance(method, SparsityMethod):
        kinds, limit = frozenset({method.moment_kind}), 0.0  # one layer at a time
    elif config.method.weighting is not None:
        kinds = Metric(weighting=config.method.weighting).moment_kinds
        limit = 0.0 if by_layer else config.statistics.max_memory * 1e9
    else:
        return 0
    measured = {*weight_shapes(view, Plan(method="plan"), prediction.layers)}
    if prediction.is_budget and config.method.mlp == "channels":
        # Of an MLP, the linear that reads its channels is measured alone.
        mlps = narrowable_mlps(view, prediction.layers).values()
        measured |= {mlp.reader for mlp in mlps}
        measured -= {name for mlp in mlps for name in mlp.writers}
    weights = weights_of(view, in_model_order(view, measured))
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    sources = {name: name for name in shapes}
    needs = Needs(moments=tuple(shapes), moment_kinds=kinds)
    groups = layer_groups(view, needs, limit, sources)
    return max(moment_bytes({n: shapes[n] for n in group}, kinds, sources) for group in groups)
