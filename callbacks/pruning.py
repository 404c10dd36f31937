"""Replaces redundant layers after a calibration fit with hand-picked callbacks."""

import lightning as L

from grasp_lightning.callbacks.measurement import calibration_module
from grasp_lightning.data.datamodules import CalibrationData
from grasp_lightning.errors import ConfigError
from grasp_lightning.methods.attribution import ATTRIBUTION
from grasp_lightning.methods.grasp import Grasp
from grasp_lightning.methods.rank_rules import UniformRanks
from grasp_lightning.models.loading import model_hash
from grasp_lightning.models.surgery import apply_operations
from grasp_lightning.plan import Plan
from grasp_lightning.stats.base import Scoring
from grasp_lightning.training.calibration import CalibrationModule


class ReplaceRedundantLayers(L.Callback):
    """Turns measured scores into a plan and applies it, after the fit.

    The structure of a module never changes during a fit. Afterwards the module holds the plan
    (``plan``) and the compressed model.

    Args:
        keep_ratio: Share of each matrix's parameters that its factors keep; a ratio outside (0, 1)
            is a ``ConfigError``.
    """

    def __init__(self, keep_ratio: float = 0.1) -> None:
        if not 0 < keep_ratio < 1:
            raise ConfigError(f"keep_ratio must be above 0 and below 1, got {keep_ratio}")
        self._keep_ratio = keep_ratio

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Decide and replace; if no layer was scored in this fit, this is a ``ConfigError``."""
        module = calibration_module(pl_module)
        choice, scoring = module.layer_choice, _scoring(module)
        if choice is None or scoring is None:
            raise ConfigError(
                "no layer was scored: LayerSimilarity needs the first epoch and "
                f"SingularAttribution the second, so use max_epochs=2 (got {trainer.max_epochs}) "
                "and both callbacks"
            )
        rule = UniformRanks(keep_ratio=self._keep_ratio)
        module.teardown("fit")  # first: factors inherit whether a weight is frozen
        method = Grasp(layers=choice, scoring=scoring, rank_rule=rule)
        inputs = {"model": model_hash(module.model)} | _fingerprint(trainer)
        plan = Plan(method=method.name, options=method.options, inputs=inputs)
        for step, stats in module.measured:
            decision = method.decide(step, module.view, stats)
            apply_operations(module.view, decision.operations, decision.tensors)
            plan = plan.extended(decision.operations)
        module.plan = plan.completed()
        module.measured.clear()  # the bases in it are as large as the layers


def _scoring(module: CalibrationModule) -> Scoring | None:
    steps = [step for step, _ in module.measured if step.name == ATTRIBUTION]
    return steps[-1].needs.scoring if steps else None


def _fingerprint(trainer: L.Trainer) -> dict[str, str]:
    # Lightning adds the attribute when fit is called with a data module, and declares no type.
    data = getattr(trainer, "datamodule", None)
    return data.fingerprint if isinstance(data, CalibrationData) else {}
