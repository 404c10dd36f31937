from itertools import pairwise

import pytest
import torch

from grasp_lightning.config import LayerMetric
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.stats.layers import LayerMetricCollector
from tests.conftest import ALL_FAMILIES, tiny_model
from tests.reference.naive_similarity import naive_angular_distance_sum, naive_cosine_sum
from tests.unit.evaluation.test_perplexity import random_batch


def measure(view: DecoderView, batches: list, metric: LayerMetric, span: int = 1) -> torch.Tensor:
    collector = LayerMetricCollector(view, metric, span)
    with collector.attached(), torch.no_grad():
        for batch in batches:
            collector.start_batch(batch["mask"])
            view.model(batch["input_ids"])
    return collector.mean()


def hidden_states(family: str, batch: dict) -> list[torch.Tensor]:
    """Residual stream before each layer, and after the last but before the final norm."""
    model = tiny_model(family)
    view, stream = DecoderView(model), []
    for index in view.layer_indices:
        # Copies: otherwise a family that writes into its input would go unnoticed.
        view.layer(index).register_forward_pre_hook(lambda _, args: stream.append(args[0].clone()))
    last = view.layer(view.num_layers - 1)
    last.register_forward_hook(lambda *call: stream.append(call[-1]))
    with torch.no_grad():
        model(batch["input_ids"])
    return [h[0] if isinstance(h, tuple) else h for h in stream]


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize(("metric", "span"), [("similarity", 1), ("angular", 1), ("angular", 2)])
def test_the_metric_equals_a_naive_loop_over_the_residual_stream(
    family: str, metric: LayerMetric, span: int
) -> None:
    batch = random_batch(2, 6)
    naive = naive_cosine_sum if metric == "similarity" else naive_angular_distance_sum
    stream = hidden_states(family, batch)
    assert len(stream) == 5
    expected = [
        naive(stream[start], stream[start + span], batch["mask"]) / int(batch["mask"].sum())
        for start in range(4 - span + 1)
    ]
    measured = measure(DecoderView(tiny_model(family)), [batch], metric, span)
    assert measured.tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_the_residual_stream_is_what_transformers_gives_out(family: str) -> None:
    batch, model = random_batch(2, 12), tiny_model(family)
    measured = measure(DecoderView(model), [batch], "similarity")
    with torch.no_grad():
        states = model(batch["input_ids"], output_hidden_states=True).hidden_states
    assert len(states) == 5
    # The last entry is taken after the final norm.
    for index, (entering, leaving) in enumerate(pairwise(states[:-1])):
        expected = naive_cosine_sum(entering, leaving, batch["mask"]) / int(batch["mask"].sum())
        assert measured[index].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("metric", ["similarity", "angular"])
def test_the_mean_is_over_tokens_not_over_batches(metric: LayerMetric) -> None:
    batch = random_batch(3, 8)
    batch["mask"][2, 3:] = False
    rows = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(3)]
    view = DecoderView(tiny_model())
    torch.testing.assert_close(measure(view, [batch], metric), measure(view, rows, metric))


def test_hooks_are_removed_afterwards() -> None:
    view = DecoderView(tiny_model())
    measure(view, [random_batch()], "similarity")
    assert not any(module._forward_hooks for module in view.model.modules())


def test_a_span_longer_than_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match="span of 5 layers in a model of 4"):
        LayerMetricCollector(DecoderView(tiny_model()), "angular", 5)


def test_no_token_gives_no_mean() -> None:
    collector = LayerMetricCollector(DecoderView(tiny_model()), "similarity")
    with pytest.raises(ValueError, match="nothing to average"):
        collector.mean()
