"""The contract of every method: pure decisions, from statistics of any origin."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from grasp_lightning.config import METHOD_OPTIONS, LayerMetric, MethodConfig
from grasp_lightning.errors import ConfigError, ModelError, NumericsError
from grasp_lightning.linalg.ranks import rank_for_keep_ratio
from grasp_lightning.methods import METHODS, build_method, resolve_method
from grasp_lightning.methods.layer_choice import LayerChoice
from grasp_lightning.methods.options import keys_of
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.stream import stream_of
from grasp_lightning.models.surgery import parameters_after
from grasp_lightning.pipeline import compress
from grasp_lightning.plan import DropLayers, FactorizeLinear, Plan, SelectLayers
from grasp_lightning.stats.base import (
    Moments,
    SeamSums,
    SpanTraining,
    Spread,
    Statistics,
    Step,
    StreamBases,
    StreamBasis,
)
from tests.conftest import tiny_model

# They make layers smaller, in one step, and choose none.
UNIT_METHODS = ("llm_pruner", "flap")
SIMILARITY = torch.tensor([0.2, 0.9, 0.5, 0.9])


def stored_statistics(view: DecoderView, step: Step) -> Statistics:
    """Measure nothing: the layer metric is made up, every component scores its index."""
    scores = {name: torch.arange(basis.s.numel()).float() for name, basis in step.bases.items()}
    moments = {name: made_up_moments(view, name) for name in step.needs.moments}
    losses = {part.name: float(part.layer) for part in step.needs.removables}
    seams = {seam: SeamSums(gram=torch.eye(32), cross=torch.eye(32)) for seam in step.needs.seams}
    return Statistics(
        layer_metric=SIMILARITY[: view.num_layers - step.needs.span + 1],
        component_scores=scores,
        moments=moments,
        removal_losses=losses,
        layer_scores=dict(enumerate((1 - SIMILARITY).tolist())),
        merge_similarity=0.5,
        trained=made_up_layer(view, step.needs.span_training),
        seams=seams,
        unit_scores={x.reader: torch.arange(float(x.number)) for x in step.needs.units},
        spreads={name: made_up_spread(view, name) for name in step.needs.spreads},
        stream=made_up_bases(view, step.needs.stream),
    )


def made_up_spread(view: DecoderView, module: str) -> Spread:
    linear = view.module(module)
    assert isinstance(linear, nn.Linear)
    generator = torch.Generator().manual_seed(len(module))
    values = torch.rand(2, linear.in_features, generator=generator).double()
    return Spread(mean=values[0], variance=values[1])


def made_up_bases(view: DecoderView, asked: StreamBases | None) -> dict[str, StreamBasis]:
    if asked is None:
        return {}
    basis = StreamBasis(basis=torch.eye(32)[:, : asked.width], variances=torch.ones(32))
    return {read.norms[0]: basis for read in stream_of(view).reads}


def made_up_layer(view: DecoderView, span: SpanTraining | None) -> dict[str, Tensor]:
    if span is None:
        return {}
    name = f"{view.layers_name}.{span.layers[0]}"
    layer = view.layer(span.layers[0])
    return {f"{name}.{key}": 2 * layer.get_parameter(key).detach() for key in span.parameters}


def made_up_moments(view: DecoderView, module: str) -> Moments:
    linear = view.module(module)
    assert isinstance(linear, nn.Linear)
    generator = torch.Generator().manual_seed(len(module))
    x = torch.randn(64, linear.in_features, generator=generator)
    gradient = torch.randn(64, linear.out_features, generator=generator)
    return Moments(
        input_gram=x.mT @ x / 64,
        gradient_gram=gradient.mT @ gradient / 64,
        input_scale=x.abs().mean(dim=0),
        input_square=x.square().mean(dim=0),
        fisher_columns=(gradient.mT @ x).square().sum(dim=0),
    )


def method_config(name: str, keep_ratio: float | None = None) -> MethodConfig:
    if name in UNIT_METHODS:
        config = MethodConfig(name=name, removed_ratio=0.2)
        if name == "llm_pruner":
            config = replace(config, protect_first=1, protect_last=1)
        return resolve_method(config)
    config = MethodConfig(name=name, num_layers=2, keep_ratio=keep_ratio)
    if name == "slicegpt":
        config = replace(config, num_layers=None, keep_ratio=0.5)
    if name == "grasp_plus":
        config = replace(config, refit="none")  # stored statistics have no windows
    if name == "shortened_llama":
        config = replace(config, criterion="taylor")  # a tiny model has no layer to protect
    return resolve_method(config)


def test_the_names_in_configurations_are_those_of_the_methods() -> None:
    assert set(METHODS) == set(METHOD_OPTIONS)
    read = {key for options in METHOD_OPTIONS.values() for key in keys_of(options)}
    assert read == set(keys_of(MethodConfig))


def test_a_method_that_nobody_has_is_refused_with_the_nearest_name() -> None:
    expected = f"expected one of {', '.join(METHODS)}, got 'gras'; did you mean grasp?"
    with pytest.raises(ConfigError) as caught:
        resolve_method(MethodConfig(name="gras"))
    assert str(caught.value) == f"method.name: {expected}"


@pytest.mark.parametrize("name", METHODS)
def test_decide_leaves_the_model_unchanged(name: str) -> None:
    model = tiny_model()
    view = DecoderView(model)
    method = build_method(method_config(name), view)
    plan = Plan(method=name)
    step = method.next_step(view, plan)
    assert step is not None
    before = copy.deepcopy(model.state_dict())
    select = method.decide(step, view, stored_statistics(view, step))
    step = method.next_step(view, plan.extended(select.operations))
    assert (step is None) == (name in {*UNIT_METHODS, "slicegpt"})
    decision = select if step is None else method.decide(step, view, stored_statistics(view, step))
    assert decision.operations
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", METHODS)
def test_steps_end_and_the_size_is_as_predicted(name: str) -> None:
    view = DecoderView(tiny_model())
    method = build_method(method_config(name), view)
    untouched = DecoderView(tiny_model())
    plan = compress(view, method, stored_statistics, Plan(method=name), lambda *_: None)
    assert plan.complete
    assert method.next_step(view, plan) is None
    changed = plan.selected_layers or plan.dropped_layers
    others = {
        "random": (0, 1),
        "sleb": (1, 2),
        "laco": (2, 3),
        "llm_streamline": (1, 2, 3),
        "replaceme": (2, 3),
        **dict.fromkeys(UNIT_METHODS, ()),
        "slicegpt": (),
    }
    assert changed == others.get(name, (1, 3))
    expected = parameters_after(untouched, plan.operations)
    assert sum(p.numel() for p in view.model.parameters()) == expected


def test_grasp_keeps_the_best_scored_components_at_the_ratio() -> None:
    view = DecoderView(tiny_model())
    method = build_method(method_config("grasp", keep_ratio=0.3), view)
    plan = compress(view, method, stored_statistics, Plan(method="grasp"), lambda *_: None)
    factorized = [op for op in plan.operations if isinstance(op, FactorizeLinear)]
    assert len(factorized) == 2 * 7
    for op in factorized:
        linear = DecoderView(tiny_model()).module(op.module)
        assert isinstance(linear, nn.Linear)
        rows, columns = linear.weight.shape
        assert op.rank == rank_for_keep_ratio(0.3, rows, columns)
        last = min(rows, columns)
        assert op.components == tuple(range(last - op.rank, last))


def test_keep_ratio_zero_deletes_the_layers() -> None:
    view = DecoderView(tiny_model())
    method = build_method(method_config("grasp", keep_ratio=0.0), view)
    plan = compress(view, method, stored_statistics, Plan(method="grasp"), lambda *_: None)
    assert plan.operations == (SelectLayers(layers=(1, 3)), DropLayers(layers=(1, 3)))


def test_magnitude_needs_no_pass_and_keeps_the_largest_singular_values() -> None:
    config = resolve_method(
        MethodConfig(name="grasp", layers=(2,), score="magnitude", keep_ratio=0.3)
    )
    view = DecoderView(tiny_model())
    method = build_method(config, view)
    asked = []

    def measure(view: DecoderView, step: Step) -> Statistics:
        del view
        asked.append(step.needs.is_empty)
        return Statistics()

    plan = compress(view, method, measure, Plan(method="grasp"), lambda *_: None)
    assert asked == [True, True]
    for op in plan.operations[1:]:
        assert isinstance(op, FactorizeLinear)
        assert op.components == tuple(range(op.rank))


def test_a_run_resumes_from_its_plan() -> None:
    whole, plans = DecoderView(tiny_model()), []
    method = build_method(method_config("grasp"), whole)
    final = compress(
        whole, method, stored_statistics, Plan(method="grasp"), lambda plan, _: plans.append(plan)
    )
    resumed = compress(
        DecoderView(tiny_model()), method, stored_statistics, plans[0], lambda *_: None
    )
    assert resumed.to_json() == final.to_json()


def test_ties_between_layers_go_to_the_lower_index() -> None:
    choice = LayerChoice(num_layers=1)
    assert choice.chosen(Statistics(layer_metric=SIMILARITY)) == (1,)


def test_angular_chooses_the_contiguous_block_of_smallest_distance() -> None:
    choice = LayerChoice(num_layers=2, metric="angular")
    assert choice.chosen(Statistics(layer_metric=torch.tensor([0.3, 0.1, 0.2]))) == (1, 2)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        (LayerChoice(num_layers=5), "method.num_layers is 5, but the model has 4 decoder layers"),
        (LayerChoice(layers=(1, 4)), "method.layers names 4, but the model has layers 0 to 3"),
    ],
)
def test_more_layers_than_the_model_has_are_refused(choice: LayerChoice, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choice.step(DecoderView(tiny_model()))


def test_a_metric_that_is_not_finite_names_its_layer() -> None:
    stats = Statistics(layer_metric=torch.tensor([0.1, 0.2, float("nan")]))
    with pytest.raises(NumericsError, match="layer 2"):
        LayerChoice(num_layers=1).chosen(stats)


@pytest.mark.parametrize(("metric", "chosen"), [("similarity", (1, 2)), ("angular", (0, 1))])
def test_the_last_attention_of_a_hybrid_is_not_deleted_however_similar(
    metric: LayerMetric, chosen: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    view = DecoderView(tiny_model("qwen3_5_text"))
    config = MethodConfig(name="drop", num_layers=2, layer_metric=metric)
    method = build_method(resolve_method(config), view)
    step = method.next_step(view, Plan(method="drop"))
    assert step is not None
    values = SIMILARITY if metric == "similarity" else torch.tensor([0.2, 0.3, 0.1])
    decision = method.decide(step, view, Statistics(layer_metric=values))
    assert decision.operations == (SelectLayers(layers=chosen),)
    assert f"layers {list(chosen)} are deleted, not " in caplog.text
    assert "without layers [3], the last of their kind" in caplog.text


def test_spans_that_all_hold_the_last_attention_are_an_error() -> None:
    types = ["linear_attention", "full_attention", "linear_attention", "linear_attention"]
    view = DecoderView(tiny_model("qwen3_5_text", layer_types=types))
    choice = LayerChoice(num_layers=3, metric="angular")
    with pytest.raises(
        ModelError, match=r"^no 3 layers can be deleted \(without layers \[1\].*low"
    ):
        choice.decide(Statistics(layer_metric=torch.tensor([0.1, 0.2])), view)
