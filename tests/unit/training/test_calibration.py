import lightning as L
import pytest
import torch

from callbacks.measure import TrainerMeasure
from grasp_lightning.config import CalibrationConfig
from grasp_lightning.data.datamodules import CalibrationData
from grasp_lightning.errors import NumericsError
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.stats.base import Needs, Step
from grasp_lightning.training.calibration import CalibrationModule
from tests.conftest import byte_tokenizer, tiny_model

SIMILARITY = Step(name="select", needs=Needs(layer_metric="similarity"))


def data(batch_size: int = 2) -> CalibrationData:
    config = CalibrationConfig(source="pydoc", num_samples=5, seqlen=32, batch_size=batch_size)
    return CalibrationData(config, byte_tokenizer())


def test_the_model_comes_back_as_it_was() -> None:
    model = tiny_model()
    model.train()
    model.config.use_cache = True
    TrainerMeasure(data(), progress=False)(DecoderView(model), SIMILARITY)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.config.use_cache


def test_a_nan_in_the_model_is_named_by_layer() -> None:
    model = tiny_model()
    model.get_parameter("model.layers.2.mlp.up_proj.weight").data[0, 0] = float("nan")
    module = CalibrationModule(model)
    trainer = L.Trainer(
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with pytest.raises(NumericsError, match="first in the output of decoder layer 2"):
        trainer.fit(module, datamodule=data())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_measuring_twice_gives_the_same_bits() -> None:
    view = DecoderView(tiny_model())
    measure = TrainerMeasure(data(), progress=False)
    first, second = measure(view, SIMILARITY), measure(view, SIMILARITY)
    assert first.layer_metric is not None
    assert second.layer_metric is not None
    assert torch.equal(first.layer_metric, second.layer_metric)


def test_a_step_without_needs_makes_no_pass() -> None:
    model = tiny_model()
    model.register_forward_hook(lambda *_: pytest.fail("the model ran"))
    stats = TrainerMeasure(data(), progress=False)(DecoderView(model), Step(name="drop"))
    assert stats.layer_metric is None
    assert not stats.component_scores
