"""Preset ``released`` keeps the components that the public code's procedure keeps."""

import pytest
import torch
from torch import Tensor

from grasp_lightning.callbacks import TrainerMeasure
from grasp_lightning.config import CalibrationConfig, MethodConfig
from grasp_lightning.data.datamodules import CalibrationData
from grasp_lightning.methods import build_method, resolve_method
from grasp_lightning.methods.base import Decision
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.pipeline import compress
from grasp_lightning.plan import FactorizeLinear, Plan
from tests.conftest import FAMILIES, byte_tokenizer, tiny_model
from tests.integration.test_golden_plan import seeded_windows
from tests.reference.released_procedure import released_procedure

LAYERS = (0, 2)
KEEP_RATIO = 0.3


def run_preset(family: str, batch_size: int = 1) -> tuple[DecoderView, Plan, Decision]:
    """Compress by the preset; the last item has the tensors and scores of all steps."""
    view = DecoderView(tiny_model(family))
    config = MethodConfig(name="grasp", preset="released", layers=LAYERS, keep_ratio=KEEP_RATIO)
    method = build_method(resolve_method(config), view)
    data = CalibrationData(
        CalibrationConfig(batch_size=batch_size), byte_tokenizer(), windows=seeded_windows()
    )
    tensors: dict[str, Tensor] = {}
    scores: dict[str, Tensor] = {}

    def keep(plan: Plan, decision: Decision) -> None:
        del plan
        tensors.update(decision.tensors)
        scores.update(decision.scores)

    measure = TrainerMeasure(data, progress=False)
    plan = compress(view, method, measure, Plan(method=method.name), keep)
    return view, plan, Decision(operations=plan.operations, tensors=tensors, scores=scores)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_preset_keeps_what_the_public_procedure_keeps(family: str) -> None:
    exact, same_dtype = tiny_model(family).double(), tiny_model(family)
    windows = seeded_windows().input_ids
    expected, _ = released_procedure(exact, family, list(LAYERS), KEEP_RATIO, windows)
    _, scores = released_procedure(same_dtype, family, list(LAYERS), KEEP_RATIO, windows)
    view, plan, done = run_preset(family)
    kept = {
        op.module: list(op.components or ())
        for op in plan.operations
        if isinstance(op, FactorizeLinear)
    }
    assert kept == expected
    for name, values in scores.items():
        # Ours are nats per token of all windows, theirs a sum over windows of nats per token.
        ours = done.scores[f"{name}.scores"] * len(windows)
        # Addends of either sign cancel in small scores, so rounding is a share of the large ones.
        torch.testing.assert_close(ours, values, rtol=0, atol=5e-5 * float(values.max()))
    ids = windows[:2]
    torch.testing.assert_close(view.model(ids).logits, same_dtype(ids).logits, rtol=0, atol=1e-3)


def test_the_batch_size_changes_nothing() -> None:
    assert run_preset("llama")[1].to_json() == run_preset("llama", batch_size=4)[1].to_json()


def test_the_preset_differs_from_the_paper_s() -> None:
    resolved = resolve_method(MethodConfig(name="grasp", preset="released", layers=LAYERS))
    assert (resolved.terms, resolved.reduction) == ("sigma", "signed")
    assert (resolved.score, resolved.schedule) == ("taylor", "iterative")
