import json
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

import pytest
import torch
from transformers import PreTrainedModel

from grasp_lightning.errors import ModelError
from grasp_lightning.evaluation.throughput import (
    Spread,
    Turn,
    measure_throughput,
    summarize,
    turns,
)
from grasp_lightning.evaluation.workload import Sample, Setting, Workload
from tests.conftest import VOCABULARY, tiny_model
from tests.unit.reporting.throughput_example import example_throughput

NAMES = ("a", "a (again)", "b")
WORKLOAD = Workload(
    prefill_lengths=(4, 8),
    decode_batch_sizes=(1, 2),
    prompt_length=4,
    new_tokens=2,
    num_rounds=3,
    seed=0,
    vocabulary=VOCABULARY,
)


def no_bar(items: Sequence[Turn], description: str) -> Iterable[Turn]:
    del description
    return items


def wait_in(model: PreTrainedModel, seconds: Iterable[float]) -> PreTrainedModel:
    """Delay one forward pass after the other, and none after the last number."""
    waits = iter(seconds)
    model.register_forward_pre_hook(lambda *_: time.sleep(next(waits, 0.0)))
    return model


def rounds(order: Sequence[Turn]) -> list[list[Turn]]:
    size = len(NAMES) * len(WORKLOAD.settings)
    return [list(order[start : start + size]) for start in range(0, len(order), size)]


def test_every_round_holds_every_model_at_every_setting_once_after_a_warm_up() -> None:
    parts = rounds(list(turns(NAMES, WORKLOAD)))
    everything = {(name, setting) for name in NAMES for setting in WORKLOAD.settings}
    assert len(parts) == 1 + WORKLOAD.num_rounds
    for part in parts:
        assert Counter((turn.name, turn.setting) for turn in part) == Counter(everything)
    assert [{turn.is_warm_up for turn in part} for part in parts] == [{True}, *[{False}] * 3]


def test_the_order_is_another_in_every_round_and_the_seed_s_own() -> None:
    order = list(turns(NAMES, WORKLOAD))
    assert order == list(turns(NAMES, WORKLOAD))
    sequences = [[(turn.name, turn.setting) for turn in part] for part in rounds(order)]
    assert all(first != second for first, second in pairwise(sequences))


def test_models_that_are_compared_run_one_after_the_other_and_change_places() -> None:
    order = list(turns(NAMES, WORKLOAD))
    groups = [order[start : start + 3] for start in range(0, len(order), 3)]
    assert all(len({turn.setting for turn in group}) == 1 for group in groups)
    assert {group[0].name for group in groups} == set(NAMES)


def test_ratios_are_taken_within_a_round() -> None:
    # The machine slows down from round to round; the second model is always twice as fast.
    first = [Sample(seconds, None) for seconds in (1.0, 2.0, 8.0)]
    samples = [Sample(seconds / 2, None) for seconds in (1.0, 2.0, 8.0)]
    timing = summarize(Setting("decode", 2), 16, samples, first)
    assert timing.ratio == Spread(first_quartile=2.0, median=2.0, third_quartile=2.0)
    assert timing.tokens_per_second == Spread(first_quartile=10.0, median=16.0, third_quartile=24.0)
    assert timing.num_rounds == 3
    assert timing.first_token_seconds is None


def test_the_first_model_has_no_ratio() -> None:
    timing = summarize(Setting("prefill", 8), 8, [Sample(2.0, 4.0)], None)
    assert timing.ratio is None
    assert timing.tokens_per_second.median == 4.0
    assert timing.first_token_seconds == Spread(first_quartile=4.0, median=4.0, third_quartile=4.0)


def test_a_slower_model_has_a_ratio_below_one() -> None:
    fast, slow = tiny_model(), wait_in(tiny_model(), [0.1] * 1000)
    timings = measure_throughput({"fast": fast, "slow": slow}, WORKLOAD, no_bar)
    assert [timing.setting for timing in timings["slow"]] == list(WORKLOAD.settings)
    for timing in timings["slow"]:
        assert timing.ratio is not None
        assert timing.ratio.median < 0.5
        assert timing.tokens_per_second.median <= timing.setting.size / 0.1
    assert all(timing.ratio is None for timing in timings["fast"])


def test_the_warm_up_does_not_count() -> None:
    # A model's first pass at each setting is part of the warm-up: 2 prompts, 2 x (prompt, 2 steps).
    model = wait_in(tiny_model(), [1.0] + [0.0] * 1000)
    (timings,) = measure_throughput({"model": model}, WORKLOAD, no_bar).values()
    for timing in timings:
        assert timing.num_rounds == 3
        assert timing.tokens_per_second.first_quartile > timing.setting.size


def test_a_device_that_is_full_is_one_line_with_the_model_s_name() -> None:
    model = tiny_model()

    def fill(*_: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    model.register_forward_pre_hook(fill)
    with pytest.raises(ModelError, match="too little memory to run large; use smaller prefill"):
        measure_throughput({"large": model}, WORKLOAD, no_bar)


def test_the_result_is_plain_data_by_kind_of_setting() -> None:
    result = example_throughput()
    content = result.to_dict()
    assert json.loads(json.dumps(content)) == content
    assert content.keys() == {"workload", "machine", "models"}
    assert content["workload"]["prefill_lengths"] == [128, 1024]
    first, control, other = content["models"]
    assert [first["is_control"], control["is_control"], other["is_control"]] == [False, True, False]
    assert [timing["length"] for timing in other["prefill"]] == [128, 1024]
    assert [timing["batch_size"] for timing in other["decode"]] == [1, 8]
    assert other["prefill"][0]["first_token_seconds"]["median"] == 0.1
    assert "first_token_seconds" not in other["decode"][0]
    assert first["prefill"][0]["ratio"] is None
    assert other["decode"][1]["ratio"] == {
        "first_quartile": 1.2,
        "median": 1.25,
        "third_quartile": 1.3,
    }
    assert other["peak_memory"] == {"bytes": 750_000_000, "covers": "resident"}
