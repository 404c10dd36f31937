import pytest

from grasp_lightning.config import MethodConfig
from grasp_lightning.errors import ConfigError
from grasp_lightning.methods import resolve_method


def test_the_paper_preset_fills_what_the_user_left_unset() -> None:
    resolved = resolve_method(
        MethodConfig(name="grasp", num_layers=8, keep_ratio=0.1, preset="paper")
    )
    assert (resolved.terms, resolved.reduction, resolved.score) == ("full", "absolute", "taylor")
    assert (resolved.schedule, resolved.layer_metric) == ("one_shot", "similarity")


def test_a_preset_never_overrides_the_user() -> None:
    resolved = resolve_method(
        MethodConfig(name="grasp", num_layers=8, preset="paper", reduction="signed")
    )
    assert (resolved.terms, resolved.reduction) == ("full", "signed")


def test_the_default_is_one_budget_over_all_layers() -> None:
    resolved = resolve_method(MethodConfig())
    assert resolved == resolve_method(MethodConfig(name="grasp_plus", removed_ratio=0.2))
    assert (resolved.num_layers, resolved.layers, resolved.keep_ratio) == (None, None, None)
    assert (resolved.weighting, resolved.fisher, resolved.ranks) == ("kfac", "sampled", "global")
    assert (resolved.mlp, resolved.refit) == ("channels", "residual")


def test_explicit_layers_are_sorted() -> None:
    assert resolve_method(MethodConfig(name="grasp", layers=(3, 1))).layers == (1, 3)


def test_resolving_twice_changes_nothing() -> None:
    once = resolve_method(MethodConfig(name="grasp", num_layers=2))
    assert resolve_method(once) == once


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            MethodConfig(name="grasp"),
            "set exactly one of method.num_layers and method.layers (neither is set)",
        ),
        (MethodConfig(name="grasp", num_layers=2, layers=(1,)), "(both are set)"),
        (MethodConfig(name="grasp", num_layers=0), "method.num_layers must be at least 1, got 0"),
        (MethodConfig(name="grasp", layers=()), "must name at least one layer"),
        (MethodConfig(name="grasp", layers=(1, -2)), "cannot be negative, got -2"),
        (MethodConfig(name="grasp", layers=(1, 2, 1)), "names layer 1 more than once"),
        (
            MethodConfig(name="grasp", num_layers=2, keep_ratio=1.0),
            "at least 0 and below 1, got 1.0",
        ),
        (
            MethodConfig(name="grasp", num_layers=2, keep_ratio=-0.1),
            "at least 0 and below 1, got -0.1",
        ),
        (
            MethodConfig(name="grasp", layers=(1,), layer_metric="angular"),
            "method.layer_metric would be ignored",
        ),
        (
            MethodConfig(name="drop", num_layers=2, keep_ratio=0.1, terms="full"),
            "method.keep_ratio, method.terms would be ignored",
        ),
        (
            MethodConfig(name="grasp", num_layers=2, score="magnitude", reduction="signed"),
            "method.reduction would be ignored: score magnitude needs no gradients",
        ),
        (
            MethodConfig(name="grasp", num_layers=2, multiple_of=8),
            "method.multiple_of would be ignored: method grasp scores components of the plain SVD",
        ),
        (
            MethodConfig(name="drop", num_layers=2, multiple_of=8),
            "method.multiple_of would be ignored: method drop deletes layers",
        ),
        (
            MethodConfig(name="grasp_plus", weighting="input_gram", removable="layers"),
            "method.removable layers needs method.weighting kfac, got input_gram",
        ),
        (
            MethodConfig(name="low_rank", keep_ratio=0.5, multiple_of=8),
            "method.multiple_of would be ignored: method.ranks is uniform",
        ),
        (
            MethodConfig(name="low_rank", preset="svd_llm_v2", multiple_of=8),
            "method.multiple_of would be ignored: method.ranks is per_type",
        ),
        (
            MethodConfig(name="low_rank", preset="fwsvd", ranks="per_type"),
            "method.ranks per_type needs method.weighting input_gram, got fisher_rows",
        ),
        (
            MethodConfig(name="low_rank", preset="svd_llm", refit_pull=0.5),
            "method.refit_pull would be ignored: method.refit is none",
        ),
    ],
)
def test_wrong_options_are_refused_by_name(config: MethodConfig, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve_method(config)
    assert message in str(error.value)


LARGEST = "keeps the largest components"


@pytest.mark.parametrize(
    ("config", "keys", "reason", "owner"),
    [
        (MethodConfig(num_layers=8, preset="paper"), "preset", "grasp_plus is one", "grasp"),
        (MethodConfig(preset="released"), "preset", "grasp_plus is one", "grasp"),
        (MethodConfig(preset="svd_llm"), "preset", "grasp_plus is one", "low_rank"),
        (MethodConfig(num_layers=8, score="taylor"), "score", f"grasp_plus {LARGEST}", "grasp"),
        (
            MethodConfig(num_layers=8, keep_ratio=0.1, preset="paper", schedule="one_shot"),
            "schedule",
            f"grasp_plus {LARGEST}",
            "grasp",
        ),
        (
            MethodConfig(terms="full", reduction="signed", score_all_layers=True),
            "terms, method.reduction, method.score_all_layers",
            f"grasp_plus {LARGEST}",
            "grasp",
        ),
        (
            MethodConfig(name="low_rank", reduction="signed"),
            "reduction",
            f"low_rank {LARGEST}",
            "grasp",
        ),
    ],
)
def test_options_of_another_method_name_it(
    config: MethodConfig, keys: str, reason: str, owner: str
) -> None:
    with pytest.raises(ConfigError) as error:
        resolve_method(config)
    assert str(error.value) == (
        f"method.{keys} would be ignored: method {reason}; set method.name={owner}, or leave it "
        "unset"
    )
