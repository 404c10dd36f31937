"""Which part of each decoder layer was changed: numbers, sentence, page, and keys."""

import json

import pytest

from grasp_lightning.plan import (
    DropLayers,
    FactorizeLinear,
    NarrowMlp,
    Operation,
    Plan,
    RemoveBlock,
    SelectLayers,
)
from grasp_lightning.reporting.card import model_card
from grasp_lightning.reporting.linears import layer_changes
from grasp_lightning.reporting.metrics import Metrics
from grasp_lightning.reporting.page import render_report
from grasp_lightning.reporting.servers import Servers
from grasp_lightning.reporting.tables import summary
from tests.unit.reporting.example import example_metrics
from tests.unit.reporting.test_page import Page

PARTS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")
LINEARS = [f"model.layers.{layer}.{part}" for layer in range(11) for part in PARTS]
LOW_RANK = FactorizeLinear(module=LINEARS[0], rank=2, components=None)
NARROWED = NarrowMlp(reader=LINEARS[7], writers=(LINEARS[6],), channels=(0,))
REMOVED = RemoveBlock(block="model.layers.1.attention", modules=(LINEARS[4], LINEARS[5]))
DROPPED = DropLayers(layers=(2, 10))
WHOLE = tuple(FactorizeLinear(module=name, rank=1, components=None) for name in LINEARS[:4])


def run(method: str, *operations: Operation) -> tuple[Metrics, Plan]:
    layers = tuple(range(11))
    plan = Plan(method=method, operations=(SelectLayers(layers=layers), *operations))
    changes = layer_changes(plan, LINEARS)
    return example_metrics(method=method, layers=layers, layer_changes=changes), plan


@pytest.mark.parametrize(
    ("method", "operations", "expected"),
    [
        (
            "grasp_plus",
            (LOW_RANK, NARROWED, REMOVED, DROPPED),
            "4 decoder layers compressed (3 of 4 attention linears, 2 of 4 MLP linears, 2 deleted)",
        ),
        (
            "grasp",
            (LOW_RANK,),
            "1 decoder layer replaced (1 of 2 attention linears, 0 of 2 MLP linears)",
        ),
        ("grasp", WHOLE, "1 decoder layer replaced"),
        ("grasp", (DROPPED,), "2 decoder layers deleted"),
        ("drop", (DROPPED,), "2 decoder layers dropped"),
    ],
)
def test_the_sentence_says_what_was_done_to_which_part(
    method: str, operations: tuple[Operation, ...], expected: str
) -> None:
    assert summary(run(method, *operations)[0]) == f"{expected}, 19.0% of all parameters removed"


def test_metrics_count_the_changed_linears_of_each_layer() -> None:
    metrics, _ = run("grasp_plus", LOW_RANK, DROPPED)
    content = json.loads(json.dumps(metrics.to_dict()))
    assert content["layer_changes"] == {
        "0": {"attention": {"changed": 1, "total": 2}, "mlp": {"changed": 0, "total": 2}},
        "2": None,
        "10": None,
    }
    assert Metrics.from_dict(content) == metrics


def test_layers_of_which_only_attention_is_known_are_reported_so() -> None:
    attention = layer_changes(run("grasp", *WHOLE[:2])[1], LINEARS[:2])  # as beside experts
    told = summary(example_metrics(layer_changes=attention))
    assert told.startswith("1 decoder layer replaced (2 of 2 attention linears),")


def test_the_page_lists_every_changed_layer_in_order() -> None:
    metrics, plan = run("grasp_plus", LOW_RANK, NARROWED, REMOVED, DROPPED)
    stored = Metrics.from_dict(json.loads(json.dumps(metrics.to_dict(), sort_keys=True)))
    text = Page(render_report(stored, plan, {}, {})).text
    rows = "01 of 2 low-rankunchanged 12 of 2 removed2 of 2 narrowed 2deleteddeleted"
    assert f"{rows} 10deleteddeleted" in " ".join(text.split())


def test_a_card_calls_deleted_layers_so() -> None:
    metrics, plan = run("grasp", DROPPED)
    card = model_card(
        metrics,
        plan,
        origin_name="a/b",
        licence=None,
        licence_files=[],
        config={},
        servers=Servers(),
    )
    assert "decoder layers 2, 10 are deleted" in card
