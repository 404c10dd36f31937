from collections.abc import Iterable
from dataclasses import replace

import lightning as L
import pytest
import torch

from callbacks.measure import TrainerMeasure
from grasp_lightning.config import CalibrationConfig, Reduction, Terms
from grasp_lightning.data.datamodules import CalibrationData
from grasp_lightning.errors import NumericsError
from grasp_lightning.methods.low_rank import attribution_step
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.stats.base import Needs, Scoring, Step
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


class PaddedData(CalibrationData):
    """The windows as in ``data``, with padding between and behind them."""

    def without(self, windows: Iterable[int]) -> CalibrationData:
        del windows
        return self

    @property
    def batches(self) -> list[list[int]]:
        return [[0, 1], [], [2, 3], [4], []]


@pytest.mark.parametrize("reduction", ["absolute", "signed", "squared"])
@pytest.mark.parametrize("terms", ["full", "sigma"])
def test_padding_does_not_count(reduction: Reduction, terms: Terms) -> None:
    view = DecoderView(tiny_model())
    plain = data()
    padded = PaddedData(CalibrationConfig(), byte_tokenizer(), windows=plain.windows)
    scoring = Scoring(reduction=reduction, terms=terms)
    step = attribution_step(view, view.linears(2), scoring)
    # With layers the input of layer 2 is kept in the first pass, and the second starts from it.
    for asked in (SIMILARITY, replace(step, layers=(1, 2))):
        measures = [TrainerMeasure(windows, progress=False) for windows in (plain, padded)]
        for _ in range(2):
            first, second = (measure(view, asked) for measure in measures)
            if first.layer_metric is not None:
                assert second.layer_metric is not None
                assert torch.equal(second.layer_metric, first.layer_metric)
            assert second.component_scores.keys() == first.component_scores.keys()
            for name, scores in first.component_scores.items():
                assert torch.equal(second.component_scores[name], scores)
