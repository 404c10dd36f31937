"""Layers deleted by importance: the lowest, never the protected ones."""

import pytest
import torch

from grasp_lightning.callbacks.measure import TrainerMeasure
from grasp_lightning.config import CalibrationConfig, MethodConfig
from grasp_lightning.data.datamodules import CalibrationData
from grasp_lightning.errors import ConfigError
from grasp_lightning.methods import build_method, predict, resolve_method
from grasp_lightning.methods.shortened_llama import LOSSES, TAYLOR_SCORES
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.next_token import forward_inputs, next_token_losses
from grasp_lightning.models.surgery import apply_operations
from grasp_lightning.plan import DropLayers, Plan, SelectLayers
from grasp_lightning.stats.base import Statistics
from tests.conftest import byte_tokenizer, tiny_model
from tests.integration.test_golden_plan import seeded_windows

SCORES = (0.1, 0.5, 0.4, 0.9, 0.2, 0.3, 0.8, 0.7, 0.05, 0.6)


def shortened(**options: object) -> MethodConfig:
    return resolve_method(MethodConfig(name="shortened_llama", **options))  # type: ignore[arg-type]  # keys of all types


def chosen(scores: tuple[float, ...] = SCORES, **options: object) -> tuple[int, ...]:
    view = DecoderView(tiny_model(num_hidden_layers=len(scores)))
    method = build_method(shortened(**options), view)
    step = method.next_step(view, Plan(method=method.name))
    assert step is not None
    assert step.needs.layer_gradients == view.layer_indices
    decision = method.decide(step, view, Statistics(layer_scores=dict(enumerate(scores))))
    assert torch.equal(decision.scores[TAYLOR_SCORES], torch.tensor(scores))
    (selected,) = decision.operations
    assert isinstance(selected, SelectLayers)
    step = method.next_step(view, Plan(method=method.name).extended(decision.operations))
    assert step is not None
    (dropped,) = method.decide(step, view, Statistics()).operations
    assert dropped == DropLayers(layers=selected.layers)
    return selected.layers


def test_protected_layers_stay_however_low_their_scores() -> None:
    assert chosen(num_layers=3, criterion="taylor") == (0, 4, 8)
    assert chosen(num_layers=3) == (4, 5, 7)  # published: the first 4 and the last 2 stay
    assert chosen(num_layers=3, protect_first=0) == (0, 4, 5)
    assert chosen(num_layers=3, criterion="taylor", protect_last=2) == (0, 4, 5)
    assert chosen(num_layers=4) == (4, 5, 6, 7)


def test_ties_take_the_lower_layer() -> None:
    assert chosen((1.0,) * 10, num_layers=2) == (4, 5)


def test_the_share_is_met_by_the_nearest_number_of_free_layers() -> None:
    view = DecoderView(tiny_model(num_hidden_layers=10))
    smallest = predict(view, shortened(num_layers=1))
    one = 1 - smallest.most / smallest.dense
    for count in (1, 2, 4):
        for shift in (-0.4, 0.4):
            prediction = predict(view, shortened(removed_ratio=(count + shift) * one))
            assert prediction.num_layers == count
            assert prediction.layers[0] >= 4
            assert prediction.layers[-1] < 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 5}, "num_layers is 5, but only 4 of the model's 10 decoder layers may be"),
        ({"num_layers": 1, "protect_first": 9}, "only 0 of the model's 10 decoder layers"),
        ({"removed_ratio": 0.9}, r"out of reach: the feasible range is .* from 1 to 4 layers"),
        ({"num_layers": 10, "criterion": "taylor"}, "only 9 of the model's 10 decoder layers"),
        ({}, "needs method.removed_ratio or method.num_layers; neither is set"),
        ({"num_layers": 1, "removed_ratio": 0.1}, "not both; leave one unset"),
        ({"num_layers": 0}, "must be at least 1, got 0"),
        ({"num_layers": 1, "protect_last": -1}, "protect_last .* cannot be negative: -1"),
        ({"layers": (1,)}, "layers would be ignored: .* deletes the layers that its criterion"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, object], message: str) -> None:
    view = DecoderView(tiny_model(num_hidden_layers=10))
    with pytest.raises(ConfigError, match=message):
        predict(view, shortened(**options))


@torch.no_grad()
def loss_without(layers: tuple[int, ...]) -> float:
    view = DecoderView(tiny_model())
    apply_operations(view, (DropLayers(layers=layers),), {})
    batch = seeded_windows().batch(list(range(6)))
    logits = view.model(**forward_inputs(batch)).logits
    return float(next_token_losses(logits, batch["input_ids"], batch["targets"]).double().mean())


def test_perplexity_deletes_the_layers_that_a_naive_deletion_finds_cheapest() -> None:
    view = DecoderView(tiny_model())
    method = build_method(shortened(num_layers=2, criterion="perplexity"), view)
    step = method.next_step(view, Plan(method=method.name))
    assert step is not None
    data = CalibrationData(
        CalibrationConfig(batch_size=4), byte_tokenizer(), windows=seeded_windows()
    )
    stats = TrainerMeasure(data, progress=False)(view, step)
    decision = method.decide(step, view, stats)
    naive = [loss_without((index,)) for index in view.layer_indices]
    torch.testing.assert_close(decision.scores[LOSSES], torch.tensor(naive), rtol=1e-5, atol=0)
    cheapest = tuple(sorted(sorted(view.layer_indices, key=naive.__getitem__)[:2]))
    assert decision.operations == (SelectLayers(layers=cheapest),)
