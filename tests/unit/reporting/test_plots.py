import xml.etree.ElementTree as ET
from dataclasses import replace

import matplotlib as mpl
import pytest
import torch

from grasp_lightning.plan import DropLayers, FactorizeLinear, Plan, RemoveBlock, SelectLayers
from grasp_lightning.reporting.drawing import Plot
from grasp_lightning.reporting.heat_maps import ranks_plot, widths_plot
from grasp_lightning.reporting.linears import module_place, scored_linears
from grasp_lightning.reporting.plots import (
    components_plot,
    layers_plot,
    parameters_plot,
    run_plots,
)
from tests.unit.reporting.example import (
    drop_metrics,
    drop_plan,
    example_metrics,
    example_plan,
    example_scores,
    narrowing_metrics,
    narrowing_plan,
)

MODULE = "model.layers.2.mlp.up_proj"


def one_linear(components: tuple[int, ...] | None, scores: list[float]) -> tuple[Plan, dict]:
    rank = 2 if components is None else len(components)
    operation = FactorizeLinear(module=MODULE, rank=rank, components=components)
    tensors = {
        f"{MODULE}.scores": torch.tensor(scores),
        f"{MODULE}.singular_values": torch.tensor([4.0, 3.0, 2.0, 0.0])[: len(scores)],
    }
    return Plan(method="grasp", operations=(operation,)), tensors


@pytest.fixture(scope="module")
def plots() -> tuple[Plot, ...]:
    return run_plots(example_metrics(), example_plan(), example_scores())


def test_a_full_run_has_every_plot_as_well_formed_svg_with_words(plots: tuple[Plot, ...]) -> None:
    assert [plot.title for plot in plots] == [
        "19.0% of all parameters were removed: 134.5 M before, 109.0 M after",
        "Layers 17, 19-24, 26 change their input least",
        plots[2].title,
        "56 linears in 8 layers now have ranks 14 to 41",
    ]
    for plot in plots:
        assert ET.fromstring(plot.svg).tag.endswith("svg")
        assert plot.alt
        assert plot.explanation.endswith(".")


def test_title_counts_the_components_that_plain_truncation_would_remove(
    plots: tuple[Plot, ...],
) -> None:
    linears = [op for op in example_plan().operations if isinstance(op, FactorizeLinear)]
    kept = [(op.rank, index) for op in linears for index in op.components or ()]
    share = sum(index >= rank for rank, index in kept) / len(kept)
    assert plots[2].title.startswith(f"{share:.0%} of the kept components")


def test_the_largest_components_give_another_title() -> None:
    plot = components_plot(*one_linear((0, 1), [3.0, 2.0, 1.0, 0.5]))
    assert plot is not None
    assert "are those with the largest" in plot.title


@pytest.mark.parametrize("scores", [[3.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
def test_zero_scores_and_zero_singular_values_are_drawn(scores: list[float]) -> None:
    plot = components_plot(*one_linear((0, 2), scores))
    assert plot is not None
    assert f"Scores of zero ({scores.count(0.0)})" in plot.explanation


def test_solved_factors_have_ranks_but_no_components() -> None:
    plan, scores = one_linear(None, [3.0, 2.0, 1.0, 0.5])
    assert components_plot(plan, scores) is None
    assert ranks_plot(plan) is not None


def test_the_share_of_channels_that_narrowed_linears_keep_is_drawn() -> None:
    plot = widths_plot(narrowing_metrics(), narrowing_plan())
    assert plot is not None
    assert plot.title == "2 MLPs keep 25% to 67% of the hidden channels"
    assert "3 kinds of linears by 2 layers" in plot.alt
    assert ET.fromstring(plot.svg).tag.endswith("svg")
    ranks = ranks_plot(narrowing_plan())
    assert ranks is not None
    assert ranks.explanation.endswith("linears in grey are dense or narrowed.")
    assert ranks.title.startswith("1 linear in 1 layer now")
    assert "by 2 layers" in ranks.alt  # the same layers as in the other drawing
    gone = (RemoveBlock(block="model.layers.7.mlp", modules=()), DropLayers(layers=(1, 9)))
    plan = replace(narrowing_plan(), operations=(*narrowing_plan().operations, *gone))
    for drawn in (ranks_plot(plan), widths_plot(narrowing_metrics(), plan)):
        assert drawn is not None
        assert "by 5 layers" in drawn.alt
    assert widths_plot(example_metrics(), narrowing_plan()) is None  # of unknown width
    assert widths_plot(example_metrics(), example_plan()) is None


def test_shares_of_a_linear_follow_their_definitions() -> None:
    (linear,) = scored_linears(*one_linear((0, 2), [6.0, 1.0, 3.0, 0.0]))
    assert linear.kept_score == pytest.approx(0.9)
    assert linear.kept_energy == pytest.approx(20 / 29)
    assert linear.num_beyond_largest == 1


def test_explicit_layers_have_no_layer_plot() -> None:
    plan, scores = one_linear((0, 2), [3.0, 2.0, 1.0, 0.5])
    assert layers_plot(plan, scores) is None
    assert len(run_plots(example_metrics(), plan, scores)) == 3


def test_a_choice_that_is_not_the_top_is_not_called_so() -> None:
    scores = {"layer_similarity": torch.tensor([0.9, 0.8, 0.7])}
    plan = Plan(method="grasp", operations=(SelectLayers(layers=(1,)),))
    plot = layers_plot(plan, scores)
    assert plot is not None
    assert plot.title == "Chosen layers: 1"


@pytest.mark.parametrize("values", [[1.0, 1.0, 1.0, 1.0], [-0.3, 0.5, 0.9, 0.99]])
def test_equal_and_negative_similarities_are_drawn(values: list[float]) -> None:
    plan = Plan(method="grasp", operations=(SelectLayers(layers=(3,)),))
    plot = layers_plot(plan, {"layer_similarity": torch.tensor(values)})
    assert plot is not None
    assert plot.title == "Layer 3 changes its input least"


def test_dropped_layers_by_angle_show_the_start_of_their_span() -> None:
    distance = torch.full((28,), 0.3)
    distance[24] = 0.1
    plots = run_plots(drop_metrics(), drop_plan(), {"layer_angular_distance": distance})
    assert [plot.title for plot in plots[1:]] == ["Layers 24-26 together change their input least"]


@pytest.mark.parametrize(
    ("chosen", "protect_last", "title", "note"),
    [
        ((2, 3), 0, "Layers 2-3 have the lowest Taylor score", "deleted. The axis"),
        ((1, 2), 1, "Chosen layers: 1-2", "The first 0 and the last 1 are protected."),
    ],
)
def test_the_importance_of_layers_is_drawn(
    chosen: tuple[int, ...], protect_last: int, title: str, note: str
) -> None:
    plan = Plan(
        method="shortened_llama",
        options={"protect_first": 0, "protect_last": protect_last},
        operations=(SelectLayers(layers=chosen),),
    )
    plot = layers_plot(plan, {"layer_taylor_scores": torch.tensor([9.0, 4.0, 2.0, 1.0])})
    assert plot is not None
    assert plot.title == title
    assert note in plot.explanation
    losses = layers_plot(plan, {"layer_removal_losses": torch.tensor([5.0, 4.0, 3.5, 3.4])})
    assert losses is not None
    assert "loss without the layer" in losses.alt


def test_equal_runs_give_equal_drawings_whatever_the_user_set() -> None:
    before = parameters_plot(example_metrics()).svg
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "black"}):
        settings, backend = dict(mpl.rcParams), mpl.get_backend(auto_select=False)
        assert parameters_plot(example_metrics()).svg == before
        assert dict(mpl.rcParams) == settings
        assert mpl.get_backend(auto_select=False) == backend


@pytest.mark.parametrize(
    ("module", "place"),
    [
        ("model.layers.22.mlp.gate_proj", (22, "mlp.gate_proj")),
        ("model.layers.3.mlp.experts.5.w1", (3, "mlp.experts.5.w1")),
        ("gpt_neox.layers.0.attention.dense", (0, "attention.dense")),
        ("lm_head", (-1, "lm_head")),
    ],
)
def test_layer_and_kind_come_from_the_module_name(module: str, place: tuple[int, str]) -> None:
    assert module_place(module) == place
