import random

from hypothesis import given, settings
from hypothesis import strategies as st

from grasp_lightning.plan import (
    DropLayers,
    FactorizeLinear,
    MergeLayers,
    NarrowMlp,
    Operation,
    Plan,
    RemoveBlock,
    SelectLayers,
    TryMerge,
)

indices = st.lists(st.integers(0, 200), unique=True, max_size=6).map(lambda v: tuple(sorted(v)))
names = st.text(min_size=1, max_size=20)
operations = st.one_of(
    st.builds(SelectLayers, layers=indices),
    st.builds(DropLayers, layers=indices),
    st.builds(
        FactorizeLinear,
        module=names,
        rank=st.integers(1, 4096),
        components=st.none() | indices,
    ),
    st.builds(
        NarrowMlp,
        reader=names,
        writers=st.lists(names, max_size=3).map(tuple),
        channels=indices,
    ),
    st.builds(TryMerge, base=st.integers(0, 200), absorbed=indices, sweep=st.integers(0, 40)),
    st.builds(
        MergeLayers,
        base=st.integers(0, 200),
        absorbed=indices,
        rule=st.sampled_from(["paper", "released"]),
    ),
    st.builds(RemoveBlock, block=names, modules=st.lists(names, max_size=3).map(tuple)),
)
options = st.dictionaries(
    names,
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**60), 2**60),
        st.floats(allow_nan=False, allow_infinity=False),
        names,
        indices,
    ),
    max_size=5,
)
plans = st.builds(
    Plan,
    method=names,
    options=options,
    inputs=st.dictionaries(names, names, max_size=3),
    operations=st.lists(operations, max_size=6).map(tuple),
    complete=st.booleans(),
)


@settings(max_examples=50, deadline=None)
@given(plan=plans)
def test_a_plan_survives_the_round_trip(plan: Plan) -> None:
    again = Plan.from_json(plan.to_json())

    assert again == plan
    assert [type(value) for value in again.options.values()] == [
        type(plan.options[key]) for key in again.options
    ]


@settings(max_examples=50, deadline=None)
@given(plan=plans, seed=st.integers(0, 100))
def test_equal_plans_have_equal_ascii_bytes(plan: Plan, seed: int) -> None:
    items = list(plan.options.items())
    random.Random(seed).shuffle(items)
    shuffled = Plan(
        method=plan.method,
        options=dict(items),
        inputs=dict(sorted(plan.inputs.items(), reverse=True)),
        operations=plan.operations,
        complete=plan.complete,
    )

    text = plan.to_json()
    assert shuffled.to_json() == text
    assert Plan.from_json(text).to_json() == text
    assert text.isascii()
    assert text.endswith("}\n")


@settings(max_examples=50, deadline=None)
@given(first=plans, second=plans)
def test_different_plans_have_different_bytes(first: Plan, second: Plan) -> None:
    assert (first.to_json() == second.to_json()) == (first == second)


@settings(max_examples=25, deadline=None)
@given(plan=plans, more=st.lists(operations, max_size=3).map(tuple))
def test_extending_appends(plan: Plan, more: tuple[Operation, ...]) -> None:
    longer = plan.extended(more)

    assert longer.operations == plan.operations + more
    assert longer.options == plan.options
