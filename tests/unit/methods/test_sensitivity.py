"""Ranks by measured losses: what may be asked for, and which ranks are tried."""

from typing import Any

import pytest

from grasp_lightning.config import MethodConfig
from grasp_lightning.errors import ConfigError
from grasp_lightning.methods import build_method, predict, resolve_method
from grasp_lightning.methods.sensitivity import SensitivityRanks
from grasp_lightning.models.decoder import DecoderView
from tests.conftest import tiny_model

SHAPES = {"a": (40, 60), "b": (30, 30), "v": (1, 50)}  # the last cannot get smaller
SIZE = 40 * 60 + 30 * 30 + 50


def search(**options: Any) -> SensitivityRanks:  # noqa: ANN401  values of all types
    return SensitivityRanks(num_parameters=2 * SIZE, **options)


def test_every_ratio_is_tried_once_and_a_limit_changes_only_the_order() -> None:
    plain = search(removed_ratio=0.2).trials(SHAPES)
    assert plain == {"a": (21, 19, 16, 14, 12, 9, 7, 4, 2), "b": (13, 12, 10, 9, 7, 6, 4, 3, 1)}
    limited = search(removed_ratio=0.2, search_minutes=1.0).trials(SHAPES)
    assert {name: tuple(sorted(ranks)[::-1]) for name, ranks in limited.items()} == plain
    first = {name: ranks[0] for name, ranks in limited.items()}
    assert first == {"a": 14, "b": 9}  # 0.6: 40 % of all linears go
    left = 50 + sum(rank * sum(SHAPES[name]) for name, rank in first.items())
    assert left <= search(removed_ratio=0.2).kept(SHAPES) == SIZE - round(0.2 * 2 * SIZE)


def test_a_budget_out_of_reach_is_refused_with_the_range() -> None:
    with pytest.raises(
        ConfigError, match=r"removed_ratio 0.46 is out of reach.* above 0 to 0.4537"
    ):
        search(removed_ratio=0.46).kept(SHAPES)
    with pytest.raises(ConfigError, match=r"keep_ratio 0.05 is out of reach.* 0.0926 to below 1"):
        search(keep_ratio=0.05).kept(SHAPES)
    with pytest.raises(ConfigError, match="less than one parameter"):
        search(removed_ratio=1e-6).kept(SHAPES)
    with pytest.raises(ConfigError, match="the 1 truncations that were measured remove too little"):
        search(removed_ratio=0.2).ranks(SHAPES, {"a": {21: 1.0}})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"search_minutes": 5.0}, "search_minutes would be ignored: method.ranks is uniform; set"),
        ({"ranks": "sensitivity", "multiple_of": 8}, "multiple_of would be ignored: method.ranks"),
        ({"preset": "asvd_search", "ranks": "uniform", "search_minutes": 1.0}, "would be ignored"),
    ],
)
def test_keys_without_effect_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        resolve_method(MethodConfig(name="low_rank", **options))


def test_the_prediction_is_the_budget() -> None:
    view = DecoderView(tiny_model())
    options = MethodConfig(name="low_rank", preset="asvd_search", removed_ratio=0.2)
    prediction = predict(view, resolve_method(options))
    assert prediction.lines[0].startswith("20.0% of ")
    assert "the data decides on ranks, and on what stays dense" in prediction.lines[1]
    assert build_method(resolve_method(options), view).options == {
        "layers": (0, 1, 2, 3),
        "ranks": "sensitivity",
        "removed_ratio": 0.2,
        "weighting": "scale_columns",
    }
