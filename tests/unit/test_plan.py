import json

import pytest

from grasp_lightning.errors import PlanError
from grasp_lightning.plan import (
    DropLayers,
    FactorizeLinear,
    NarrowMlp,
    Plan,
    SelectLayers,
    SetWeights,
)

PLAN = Plan(
    method="grasp",
    options={"keep_ratio": 0.1, "layers": (1, 2), "preset": None, "terms": "full"},
    inputs={"windows": "ab", "model": "cd"},
    operations=(
        SelectLayers(layers=(1, 2)),
        FactorizeLinear(module="model.layers.1.mlp.up_proj", rank=2, components=(0, 3)),
        FactorizeLinear(module="model.layers.2.mlp.up_proj", rank=5, components=None),
        DropLayers(layers=(7,)),
        SetWeights(module="model.layers.4", parameters=("mlp.up_proj.weight",)),
        DropLayers(layers=(0, 3)),
        SelectLayers(layers=(4,)),
    ),
)


def edited(**changes: object) -> str:
    return json.dumps({**json.loads(PLAN.to_json()), **changes})


def test_the_stored_text_is_fixed_to_the_byte() -> None:
    plan = Plan(
        method="grasp",
        options={"b": 0.5, "a": (1, 2)},
        operations=(FactorizeLinear(module="m", rank=1, components=(4,)),),
        complete=True,
    )

    assert plan.to_json() == (
        '{\n  "complete": true,\n  "inputs": {},\n  "method": "grasp",\n  "operations": [\n    {\n'
        '      "components": [\n        4\n      ],\n      "kind": "factorize_linear",\n'
        '      "module": "m",\n      "rank": 1\n    }\n  ],\n  "options": {\n    "a": [\n      1,\n'
        '      2\n    ],\n    "b": 0.5\n  },\n  "version": 1\n}\n'
    )


def test_reading_gives_back_what_was_written() -> None:
    again = Plan.from_json(PLAN.to_json())

    assert again == PLAN
    assert again.options["layers"] == (1, 2)


def test_the_order_of_options_leaves_the_bytes() -> None:
    backwards = Plan(
        method=PLAN.method,
        options=dict(reversed([*PLAN.options.items()])),
        inputs=dict(reversed([*PLAN.inputs.items()])),
        operations=PLAN.operations,
    )

    assert backwards.to_json() == PLAN.to_json()


def test_the_order_of_operations_is_kept() -> None:
    backwards = Plan(method="grasp", operations=PLAN.operations[::-1])

    assert Plan.from_json(backwards.to_json()).operations == PLAN.operations[::-1]


def test_the_last_selection_counts() -> None:
    assert PLAN.selected_layers == (4,)
    assert Plan(method="grasp").selected_layers is None


def test_ranks_and_dropped_layers_are_gathered_from_all_operations() -> None:
    assert PLAN.ranks == {"model.layers.1.mlp.up_proj": 2, "model.layers.2.mlp.up_proj": 5}
    assert PLAN.dropped_layers == (0, 3, 7)


def test_extending_leaves_the_old_plan_unchanged() -> None:
    before = PLAN.to_json()
    longer = PLAN.extended((DropLayers(layers=(9,)),))

    assert longer.operations == (*PLAN.operations, DropLayers(layers=(9,)))
    assert PLAN.to_json() == before


def test_a_plan_of_another_version_is_refused() -> None:
    with pytest.raises(PlanError, match=r"plan has version 2, this program reads .*1"):
        Plan.from_json(edited(version=2))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        PLAN.to_json()[:-40],
        edited(operations=[{"kind": "unknown"}]),
        edited(operations=[{"kind": "drop_layers"}]),
        edited(operations=[{"kind": "drop_layers", "layers": [1], "extra": 1}]),
        edited(operations=3),
        edited(options=[1]),
        edited(options={"layers": {}}),
        edited(inputs=["a"]),
        edited(inputs={"model": 3}),
        edited(complete="yes"),
        edited(method=None),
        edited(operations=[{"kind": []}]),
        edited(operations=[{"kind": "drop_layers", "layers": ["1"]}]),
        edited(operations=[{"kind": "drop_layers", "layers": 1}]),
        "[" * 100_000,
        "1" * 5000,
        '{"version": NaN}',
        edited(operations=[["drop_layers"]]),
    ],
)
def test_text_that_is_not_a_plan_is_one_line(text: str) -> None:
    with pytest.raises(PlanError, match=r"expected the content of a plan\.json") as caught:
        Plan.from_json(text)

    assert "\n" not in str(caught.value)


def test_a_number_that_json_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        Plan(method="grasp", options={"keep_ratio": float("nan")}).to_json()


def test_narrowed_mlps_are_stored_and_counted_by_what_reads_their_channels() -> None:
    mlp = NarrowMlp(reader="m.down", writers=("m.gate", "m.up"), channels=(0, 3, 7))
    plan = Plan(method="grasp_plus", operations=(mlp,))

    assert json.loads(plan.to_json())["operations"] == [
        {
            "kind": "narrow_mlp",
            "reader": "m.down",
            "writers": ["m.gate", "m.up"],
            "channels": [0, 3, 7],
        }
    ]
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.channels == {"m.down": 3}
    assert plan.ranks == PLAN.channels == {}
    assert mlp.mlp == "m"
