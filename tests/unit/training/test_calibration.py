from collections.abc import Iterable
from dataclasses import replace

import lightning as L
import pytest
import torch

from grasp_lightning.callbacks.measure import TrainerMeasure
from grasp_lightning.config import CalibrationConfig, FisherChoice, Reduction, Terms
from grasp_lightning.data.datamodules import CalibrationData
from grasp_lightning.errors import ModelError, NumericsError
from grasp_lightning.methods.attribution import attribution_step
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.stats.base import MomentKind, Moments, Needs, Scoring, Step
from grasp_lightning.training.calibration import CalibrationModule
from tests.conftest import byte_tokenizer, tiny_model

SIMILARITY = Step(name="select", needs=Needs(layer_metric="similarity"))


def data(batch_size: int = 2) -> CalibrationData:
    config = CalibrationConfig(source="pydoc", num_samples=5, seqlen=32, batch_size=batch_size)
    return CalibrationData(config, byte_tokenizer())


def test_the_model_is_restored() -> None:
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


def test_a_linear_that_is_not_called_ends_the_pass_after_its_first_batch() -> None:
    view = DecoderView(tiny_model())
    layer = view.layer(1)
    # Its linears are there, and not called.
    layer.get_submodule("mlp").forward = lambda x: x
    batches: list[int] = []
    layer.register_forward_hook(lambda *_: batches.append(1))
    step = attribution_step(view, list(view.linears(1)), Scoring())

    with pytest.raises(ModelError, match=r"mlp\.gate_proj was seen in 0 of \d windows"):
        TrainerMeasure(data(), progress=False)(view, step)
    assert len(batches) == 1


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


def moments(batch_size: int, fisher: FisherChoice) -> dict[str, Moments]:
    view = DecoderView(tiny_model())
    kinds: frozenset[MomentKind] = frozenset({"input_gram", "gradient_gram"})
    needs = Needs(moments=tuple(view.linears(1)), moment_kinds=kinds, fisher=fisher)
    measured = TrainerMeasure(data(batch_size), progress=False)(view, Step(name="m", needs=needs))
    assert measured.moments is not None
    return dict(measured.moments)


def test_random_gradients_do_not_depend_on_the_batch_size() -> None:
    alone, together = moments(1, "sampled"), moments(3, "sampled")
    for name, expected in alone.items():
        for kind in ("input_gram", "gradient_gram"):
            value, wanted = getattr(together[name], kind), getattr(expected, kind)
            scale = float(wanted.abs().max())
            torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-5 * scale)


def test_random_gradients_take_the_place_of_those_of_the_text() -> None:
    sampled, empirical = moments(2, "sampled"), moments(2, "empirical")
    for name, of_text in empirical.items():
        assert of_text.input_gram is not None
        assert of_text.gradient_gram is not None
        random = sampled[name].gradient_gram
        assert random is not None
        torch.testing.assert_close(sampled[name].input_gram, of_text.input_gram, rtol=0, atol=0)
        assert not torch.allclose(random, of_text.gradient_gram, rtol=1e-2)
        assert 0.25 < float(random.trace() / of_text.gradient_gram.trace()) < 4
