"""The Trainer composed by hand gives the plan of the pipeline."""

import lightning as L
import pytest
import torch
from transformers import PreTrainedModel

from grasp_lightning.callbacks import (
    LayerSimilarity,
    ReplaceRedundantLayers,
    SingularAttribution,
    TrainerMeasure,
)
from grasp_lightning.config import CalibrationConfig, LayerMetric, MethodConfig
from grasp_lightning.data.datamodules import CalibrationData
from grasp_lightning.errors import ConfigError
from grasp_lightning.methods import build_method, resolve_method
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.loading import model_hash
from grasp_lightning.pipeline import compress
from grasp_lightning.plan import Plan
from grasp_lightning.training.calibration import CalibrationModule
from tests.conftest import FAMILIES, byte_tokenizer, tiny_model

CONFIG = CalibrationConfig(source="pydoc", num_samples=6, seqlen=48, batch_size=4)


def by_hand(model: PreTrainedModel, *callbacks: L.Callback, epochs: int) -> CalibrationModule:
    module = CalibrationModule(model)
    trainer = L.Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=CalibrationData(CONFIG, byte_tokenizer()))
    return module


def by_pipeline(model: PreTrainedModel, config: MethodConfig) -> Plan:
    method = build_method(resolve_method(config), DecoderView(model))
    data = CalibrationData(CONFIG, byte_tokenizer())
    inputs = {"model": model_hash(model), **data.fingerprint}
    plan = Plan(method=method.name, options=method.options, inputs=inputs)
    measure = TrainerMeasure(data, progress=False)
    return compress(DecoderView(model), method, measure, plan, lambda *_: None)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("metric", ["similarity", "angular"])
def test_the_hand_made_fit_gives_the_pipeline_s_plan(family: str, metric: LayerMetric) -> None:
    hand, pipe = tiny_model(family), tiny_model(family)
    module = by_hand(
        hand,
        LayerSimilarity(num_layers=2, metric=metric),
        SingularAttribution(terms="full"),
        ReplaceRedundantLayers(keep_ratio=0.3),
        epochs=2,
    )
    plan = by_pipeline(
        pipe, MethodConfig(name="grasp", num_layers=2, layer_metric=metric, keep_ratio=0.3)
    )
    assert module.plan is not None
    assert module.plan.to_json() == plan.to_json()
    assert plan.complete
    ids = torch.arange(20)[None]
    assert torch.equal(hand(ids).logits, pipe(ids).logits)


def test_explicit_layers_need_one_epoch() -> None:
    model = tiny_model()
    module = by_hand(
        model,
        SingularAttribution(layers=(0, 2), terms="sigma", reduction="signed"),
        ReplaceRedundantLayers(keep_ratio=0.3),
        epochs=1,
    )
    config = MethodConfig(
        name="grasp", layers=(0, 2), keep_ratio=0.3, terms="sigma", reduction="signed"
    )
    plan = by_pipeline(tiny_model(), config)
    assert module.plan is not None
    assert module.plan.to_json() == plan.to_json()


def test_too_few_epochs_are_explained() -> None:
    with pytest.raises(ConfigError, match="use max_epochs=2"):
        by_hand(
            tiny_model(),
            LayerSimilarity(num_layers=2),
            SingularAttribution(),
            ReplaceRedundantLayers(),
            epochs=1,
        )


def test_the_model_runs_dense_until_the_fit_ends() -> None:
    seen = []

    class Spy(L.Callback):
        def on_train_batch_end(
            self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object
        ) -> None:
            del trainer
            seen.append(sum(p.numel() for p in pl_module.parameters()))

    model = tiny_model()
    dense = sum(p.numel() for p in model.parameters())
    by_hand(
        model, LayerSimilarity(2), SingularAttribution(), ReplaceRedundantLayers(), Spy(), epochs=2
    )
    assert set(seen) == {dense}
    assert sum(p.numel() for p in model.parameters()) < dense


def test_factors_are_trainable_as_the_weights_were() -> None:
    model = tiny_model()
    model.train()
    by_hand(model, LayerSimilarity(2), SingularAttribution(), ReplaceRedundantLayers(), epochs=2)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.modules())


def test_callbacks_can_be_used_again() -> None:
    callbacks = (LayerSimilarity(2), SingularAttribution(), ReplaceRedundantLayers(0.3))
    first = by_hand(tiny_model(), *callbacks, epochs=2)
    second = by_hand(tiny_model(), *callbacks, epochs=2)
    assert first.plan is not None
    assert second.plan is not None
    assert first.plan.to_json() == second.plan.to_json()
