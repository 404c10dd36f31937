"""The span that one trained layer replaces, and the size of what is left."""

import pytest
import torch

from grasp_lightning.config import MethodConfig
from grasp_lightning.errors import ConfigError, ModelError
from grasp_lightning.methods import build_method, predict, resolve_method
from grasp_lightning.methods.layer_choice import LayerChoice
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.size import count_parameters
from grasp_lightning.plan import DropLayers, Plan, RemoveBlock, SelectLayers
from grasp_lightning.stats.base import Statistics
from tests.conftest import tiny_model

HYBRID = "qwen3_5_text"  # layers 0 to 2 have linear attention, layer 3 has not


def config(**options: object) -> MethodConfig:
    return resolve_method(MethodConfig(name="llm_streamline", **options))  # type: ignore[arg-type]  # checked there


def selected(view: DecoderView, metric: list[float], **options: object) -> tuple[int, ...] | None:
    method = build_method(config(**options), view)
    step = method.next_step(view, Plan(method="llm_streamline"))
    assert step is not None
    assert view.num_layers - step.needs.span + 1 == len(metric)
    decision = method.decide(step, view, Statistics(layer_metric=torch.tensor(metric)))
    return Plan(method="llm_streamline", operations=decision.operations).selected_layers


def test_the_span_of_the_highest_similarity_is_replaced() -> None:
    view = DecoderView(tiny_model(num_hidden_layers=6))
    assert selected(view, [0.1, 0.3, 0.9, 0.4], num_layers=2) == (2, 3, 4)
    angles = [0.1, 0.3, 0.9, 0.4]
    assert selected(view, angles, num_layers=2, layer_metric="angular") == (0, 1, 2)


def test_one_more_layer_is_compared_than_is_deleted() -> None:
    choice = LayerChoice(num_layers=2, replaces_span=True)
    assert choice.step(DecoderView(tiny_model())).needs.span == 3
    assert choice.options["num_layers"] == 2


@pytest.mark.parametrize("replacement", ["layer", "mlp"])
@pytest.mark.parametrize("share", [0.15, 0.3, 0.5])
def test_a_share_gives_the_nearest_size(replacement: str, share: float) -> None:
    view = DecoderView(tiny_model(num_hidden_layers=8))
    found = predict(view, config(replacement=replacement, removed_ratio=share))
    sizes = [predict(view, config(replacement=replacement, num_layers=n)).most for n in range(1, 8)]
    target = (1 - share) * count_parameters(view.model)
    assert found.most == found.least == min(sizes, key=lambda size: abs(size - target))
    kinds = [DropLayers] if replacement == "layer" else [RemoveBlock, DropLayers]
    assert [type(op) for op in found.operations] == kinds
    assert found.lines[1] == f"{found.num_layers + 1} contiguous layers are replaced by one"


def test_explicit_layers_are_the_whole_span() -> None:
    view = DecoderView(tiny_model())
    method = build_method(config(layers=(3, 1, 2)), view)
    plan = Plan(method="llm_streamline", operations=(SelectLayers(layers=(1, 2, 3)),))
    step = method.next_step(view, plan)
    assert step is not None
    assert step.needs.span_training is not None
    assert step.needs.span_training.layers == (1, 2, 3)


def test_layers_of_different_kinds_are_no_span(caplog: pytest.LogCaptureFixture) -> None:
    view = DecoderView(tiny_model(HYBRID))
    with pytest.raises(ModelError, match=r"\[2, 3\] cannot be replaced by one: layers 2 and 3 are"):
        predict(view, config(layers=(2, 3)))
    assert selected(view, [0.3, 0.2, 0.9], num_layers=1) == (0, 1)
    assert "layers [0, 1] are replaced by one, not [2, 3]" in caplog.text
    # Attention of two patterns has the same parameters.
    assert selected(DecoderView(tiny_model("gemma2")), [0.3, 0.2, 0.9], num_layers=1) == (2, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": (1, 3)}, r"method.layers=\[1, 3\]: .* contiguous"),
        ({"layers": (2,)}, "name at least two without a gap"),
        ({"num_layers": 2, "removed_ratio": 0.2}, "not both"),
        ({"num_layers": 2, "epochs": -1}, "method.epochs must be at least 0, got -1"),
        ({"num_layers": 2, "learning_rate": 0.0}, "method.learning_rate must be above 0, got 0.0"),
        ({"num_layers": 2, "step_windows": 0}, "method.step_windows must be at least 1, got 0"),
        ({"num_layers": 2, "keep_ratio": 0.1}, "replaces contiguous layers by one trained layer"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**options)


def test_one_layer_must_remain() -> None:
    view = DecoderView(tiny_model())
    assert predict(view, config(num_layers=3)).num_layers == 3
    expected = "method.num_layers is 4, but the model has 4 decoder layers, of which one must"
    with pytest.raises(ConfigError, match=expected):
        predict(view, config(num_layers=4))
