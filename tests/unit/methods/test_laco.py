"""The search for merges: a function of the plan, compared with the algorithm as a loop."""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from grasp_lightning.config import MethodConfig
from grasp_lightning.errors import ConfigError, ModelError, NumericsError
from grasp_lightning.methods import build_method, predict, resolve_method
from grasp_lightning.methods.laco import LacoMethod, MergeSearch
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.plan import MergeLayers, Operation, Plan, TryMerge
from grasp_lightning.stats.base import Statistics
from tests.conftest import tiny_model

Similarity = Callable[[tuple[int, ...], int], float]
CONFIG = MethodConfig(name="laco", num_layers=2)


def by_loop(search: MergeSearch, num_layers: int, similarity: Similarity) -> list[tuple[int, ...]]:
    """Return the merged layers as the algorithm of the paper finds them, sweep after sweep."""
    left, found = list(range(num_layers)), []
    remaining, threshold = search.num_layers, search.threshold
    while remaining:
        size = min(search.merge_layers - 1, remaining)
        position = len(left) - 1 - size
        while position >= 0 and remaining:
            merge = tuple(left[position : position + size + 1])
            if similarity(tuple(left), merge[0]) > threshold:
                found.append(merge)
                del left[position + 1 : position + size + 1]
                remaining -= size
                size = min(search.merge_layers - 1, remaining)
                position = min(position - search.interval, len(left) - 1 - size)
            else:
                position -= 1
        threshold -= 0.05
    return found


def by_plan(
    search: MergeSearch, num_layers: int, similarity: Similarity
) -> tuple[list[Operation], list[tuple[tuple[int, ...], int]]]:
    """Return the operations of a search, and the trials that it measured."""
    operations: list[Operation] = []
    left, trials = list(range(num_layers)), []
    while (entry := search.next_merge(num_layers, operations)) is not None:
        merge, has_passed = entry
        if has_passed:
            left = [index for index in left if index not in merge.absorbed]
            operations.append(merge)
            continue
        trials.append((tuple(left), merge.base))
        sweep = search.sweep_of(similarity(*trials[-1]))
        operations.append(TryMerge(base=merge.base, absorbed=merge.absorbed, sweep=sweep))
    return operations, trials


def test_the_search_is_the_algorithm_and_measures_no_merge_twice() -> None:
    draw = random.Random(0)
    lowered = 0
    for _ in range(200):
        num_layers = draw.randint(2, 14)
        search = MergeSearch(
            num_layers=draw.randint(1, num_layers - 1),
            rule="paper",
            merge_layers=draw.randint(2, 6),
            interval=draw.randint(1, 4),
            threshold=draw.choice([-1.0, 0.3, 0.65, 0.99]),
        )
        values: dict[tuple[tuple[int, ...], int], float] = {}

        def similarity(left: tuple[int, ...], base: int) -> float:
            return values.setdefault((left, base), draw.uniform(-1, 1))  # noqa: B023  same round

        operations, trials = by_plan(search, num_layers, similarity)
        merges = [op for op in operations if isinstance(op, MergeLayers)]
        expected = by_loop(search, num_layers, similarity)
        assert [(op.base, *op.absorbed) for op in merges] == expected
        assert sum(len(op.absorbed) for op in merges) == search.num_layers
        assert len(set(trials)) == len(trials)
        lowered += any(isinstance(op, TryMerge) and op.sweep for op in operations)
    assert 50 < lowered < 200


def test_the_first_merge_is_at_the_top_and_the_last_may_be_smaller() -> None:
    search = MergeSearch(num_layers=5, rule="paper", merge_layers=4, interval=2, threshold=0.65)
    merges = search.merges(12)
    assert [(op.base, op.absorbed) for op in merges] == [(8, (9, 10, 11)), (6, (7, 8))]


def method(config: MethodConfig, view: DecoderView) -> LacoMethod:
    built = build_method(resolve_method(config), view)
    assert isinstance(built, LacoMethod)
    return built


def test_a_step_is_a_trial_and_then_the_merge_that_passed() -> None:
    view = DecoderView(tiny_model())
    laco, plan = method(replace(CONFIG, merge_layers=2), view), Plan(method="laco")
    step = laco.next_step(view, plan)
    assert step is not None
    merge = MergeLayers(base=2, absorbed=(3,), rule="paper")
    assert step.needs.merge == merge
    rejected = laco.decide(step, view, Statistics(merge_similarity=0.62))
    assert rejected.operations == (TryMerge(base=2, absorbed=(3,), sweep=1),)
    assert [*rejected.scores] == ["merge.0.2.similarity"]
    step = laco.next_step(view, plan.extended(rejected.operations))
    assert step is not None
    assert step.layers == (1, 2)
    passed = laco.decide(step, view, Statistics(merge_similarity=0.66))
    step = laco.next_step(view, plan.extended(rejected.operations + passed.operations))
    assert step is not None
    assert step.needs.is_empty
    decision = laco.decide(step, view, Statistics())
    assert decision.operations == (MergeLayers(base=1, absorbed=(2,), rule="paper"),)


def test_a_similarity_that_is_not_a_number_is_refused() -> None:
    view = DecoderView(tiny_model())
    step = method(CONFIG, view).next_step(view, Plan(method="laco"))
    assert step is not None
    with pytest.raises(NumericsError, match=r"layers \[2, 3\] merged into layer 1, hidden states"):
        method(CONFIG, view).decide(step, view, Statistics(merge_similarity=float("nan")))


def test_the_nearest_share_is_reached_and_predicted() -> None:
    view = DecoderView(tiny_model())
    config = resolve_method(MethodConfig(name="laco", removed_ratio=0.3))
    prediction = predict(view, config)
    one = sum(parameter.numel() for parameter in view.layer(0).parameters())
    assert prediction.num_layers == round(0.3 * prediction.dense / one)
    assert prediction.most == prediction.dense - prediction.num_layers * one
    assert prediction.lines[-1] == f"{prediction.num_layers} layers are merged into others"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            MethodConfig(name="laco"),
            "laco needs method.removed_ratio or method.num_layers; neither is set",
        ),
        (replace(CONFIG, removed_ratio=0.2), "removed_ratio or method.num_layers, not both"),
        (replace(CONFIG, layers=(1,)), "method.layers would be ignored: method laco finds the"),
        (
            replace(CONFIG, keep_ratio=0.1),
            "method.keep_ratio would be ignored: method laco",
        ),
        (replace(CONFIG, merge_layers=1), "method.merge_layers must be at least 2, got 1"),
        (replace(CONFIG, interval=0), "method.interval must be at least 1, got 0"),
        (replace(CONFIG, threshold=1.0), "method.threshold must be a cosine from -1 to below 1"),
        (replace(CONFIG, num_layers=0), "method.num_layers must be at least 1, got 0"),
    ],
)
def test_wrong_options_are_refused(config: MethodConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(").replace(")", r"\)")):
        resolve_method(config)


def test_a_model_whose_layers_cannot_be_merged_is_refused_before_anything_is_measured() -> None:
    view = DecoderView(tiny_model("gemma2"))
    with pytest.raises(ModelError, match=r"^method laco cannot merge the decoder layers of Gemma2"):
        predict(view, resolve_method(CONFIG))
    too_many = resolve_method(replace(CONFIG, num_layers=4))
    with pytest.raises(ConfigError, match="4 decoder layers, of which one must remain"):
        predict(DecoderView(tiny_model()), too_many)
