"""Passes that start in the middle of the model give the same bits as full passes."""

import pytest
import torch

from grasp_lightning.callbacks import TrainerMeasure
from grasp_lightning.config import CalibrationConfig, MethodConfig
from grasp_lightning.data.datamodules import CalibrationData
from grasp_lightning.methods import build_method, resolve_method
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.pipeline import compress
from grasp_lightning.plan import Plan
from grasp_lightning.stats.base import Statistics, Step
from grasp_lightning.training.hidden_cache import HiddenCache
from tests.conftest import FAMILIES, byte_tokenizer, tiny_model


def run(family: str, *, is_cached: bool) -> tuple[list[Statistics], list[int], Plan]:
    """Compress layers 1 to 3 block by block; count how often layer 0 runs."""
    view = DecoderView(tiny_model(family))
    data = CalibrationData(
        CalibrationConfig(source="pydoc", num_samples=3, seqlen=24, batch_size=2), byte_tokenizer()
    )
    config = MethodConfig(name="grasp", layers=(1, 3), keep_ratio=0.3, schedule="iterative")
    measure = TrainerMeasure(data, progress=False)
    measured, calls = [], [0]
    norm = next(m for name, m in view.layer(0).named_modules() if "norm" in name.lower())
    norm.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))

    def noting(view: DecoderView, step: Step) -> Statistics:
        if not is_cached:
            measure._cache = None
        measured.append(measure(view, step))
        return measured[-1]

    method = build_method(resolve_method(config), view)
    plan = compress(view, method, noting, Plan(method="grasp"), lambda *_: None)
    return measured, calls, plan


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_passes_give_the_bits_of_whole_ones_and_skip_the_lower_layers(family: str) -> None:
    cached, cached_calls, cached_plan = run(family, is_cached=True)
    whole, whole_calls, whole_plan = run(family, is_cached=False)
    assert cached_plan.to_json() == whole_plan.to_json()
    for left, right in zip(cached, whole, strict=True):
        assert left.component_scores.keys() == right.component_scores.keys()
        for name, scores in left.component_scores.items():
            assert torch.equal(scores, right.component_scores[name])
    assert whole_calls[0] == 4 * 2  # four passes of two batches
    assert cached_calls[0] == 2  # one pass fills the cache


def test_what_does_not_fit_is_not_kept() -> None:
    view = DecoderView(tiny_model())
    cache = HiddenCache(view, limit=0)
    cache.start_batch(torch.tensor([0]))
    with cache.capturing((1, 2), 1), torch.no_grad():
        view.model(torch.arange(8)[None])
    assert cache.start_layer(3, [0]) is None


def test_where_not_all_layers_fit_the_highest_are_kept_whole() -> None:
    view = DecoderView(tiny_model())
    one_layer = 3 * 8 * 32 * 4  # windows, tokens, hidden size, bytes
    cache = HiddenCache(view, limit=one_layer)
    with cache.capturing((1, 2), 3), torch.no_grad():
        for windows in ([0, 1], [2]):
            cache.start_batch(torch.tensor(windows))
            view.model(torch.arange(8).repeat(len(windows), 1))
    assert cache.start_layer(3, [0, 1, 2]) == 2
    assert cache.start_layer(1, [0, 1, 2]) is None


def test_the_highest_layer_below_the_measured_one_is_chosen() -> None:
    view = DecoderView(tiny_model())
    cache = HiddenCache(view)
    cache.start_batch(torch.tensor([0]))
    with cache.capturing((1, 2), 1), torch.no_grad():
        view.model(torch.arange(8)[None])
    assert cache.start_layer(3, [0]) == 2
    assert cache.start_layer(1, [0]) == 1
    assert cache.start_layer(0, [0]) is None
    assert cache.start_layer(3, [0, 1]) is None
    cache.keep_only((1,))
    assert cache.start_layer(3, [0]) == 1


def test_layers_are_as_before_after_a_shortened_pass() -> None:
    view = DecoderView(tiny_model())
    ids = torch.arange(8)[None]
    before = view.model(ids).logits
    cache = HiddenCache(view)
    cache.start_batch(torch.tensor([0]))
    with cache.capturing((2,), 1), torch.no_grad():
        view.model(ids)
    with cache.starting_from(2):
        assert torch.equal(view.model(ids).logits, before)
        assert torch.equal(view.model(ids.flip(1)).logits, before)  # layers 0 and 1 do not run
    assert not torch.equal(view.model(ids.flip(1)).logits, before)
    assert "forward" not in vars(view.layer(0))
