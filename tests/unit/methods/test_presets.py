import pytest

from grasp_lightning.config import MethodConfig
from grasp_lightning.errors import ConfigError
from grasp_lightning.methods import resolve_method


def test_the_paper_preset_fills_what_the_user_left_unset() -> None:
    resolved = resolve_method(MethodConfig(num_layers=8, keep_ratio=0.1, preset="paper"))
    assert (resolved.terms, resolved.reduction, resolved.score) == ("full", "absolute", "taylor")
    assert (resolved.schedule, resolved.layer_metric) == ("one_shot", "similarity")


def test_a_preset_never_overrides_the_user() -> None:
    resolved = resolve_method(MethodConfig(num_layers=8, preset="paper", reduction="signed"))
    assert (resolved.terms, resolved.reduction) == ("full", "signed")


def test_explicit_layers_are_sorted() -> None:
    assert resolve_method(MethodConfig(layers=(3, 1))).layers == (1, 3)


def test_resolving_twice_changes_nothing() -> None:
    once = resolve_method(MethodConfig(num_layers=2))
    assert resolve_method(once) == once


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MethodConfig(), "set exactly one of method.num_layers and method.layers (neither is set)"),
        (MethodConfig(num_layers=2, layers=(1,)), "(both are set)"),
        (MethodConfig(num_layers=0), "method.num_layers must be at least 1, got 0"),
        (MethodConfig(layers=()), "must name at least one layer"),
        (MethodConfig(layers=(1, -2)), "cannot be negative, got -2"),
        (MethodConfig(layers=(1, 2, 1)), "names layer 1 more than once"),
        (MethodConfig(num_layers=2, keep_ratio=1.0), "at least 0 and below 1, got 1.0"),
        (MethodConfig(num_layers=2, keep_ratio=-0.1), "at least 0 and below 1, got -0.1"),
        (MethodConfig(layers=(1,), layer_metric="angular"), "method.layer_metric would be ignored"),
        (
            MethodConfig(name="drop", num_layers=2, keep_ratio=0.1, terms="full"),
            "method.keep_ratio, method.terms would be ignored",
        ),
        (
            MethodConfig(num_layers=2, score="magnitude", reduction="signed"),
            "method.reduction would be ignored: score magnitude needs no gradients",
        ),
        (
            MethodConfig(num_layers=2, budget="time"),
            "method.budget would be ignored: method grasp scores plain components",
        ),
        (
            MethodConfig(name="drop", num_layers=2, budget="time"),
            "method.budget would be ignored: method drop deletes layers",
        ),
        (
            MethodConfig(name="low_rank", keep_ratio=0.5, budget="time"),
            "method.budget would be ignored: method.ranks is uniform",
        ),
    ],
)
def test_wrong_options_are_refused_by_name(config: MethodConfig, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve_method(config)
    assert message in str(error.value)
