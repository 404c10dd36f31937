"""Truncation in any metric: plain SVD, FWSVD, ASVD, SVD-LLM, or a mixture of parts.

Sources of the presets: ``svd_llm``, the truncation-aware whitening of Wang et al., "SVD-LLM",
arXiv:2403.07378; ``svd_llm_update``, the same with the layer-wise closed-form update of its first
version (``training.refit.Refitter``); ``svd_llm_v2``, Wang et al., "SVD-LLM V2", arXiv:2503.12340
(``methods.per_type``); ``asvd``, Yuan et al., arXiv:2312.05821, with one keep ratio for all
linears; ``fwsvd``, Hsu et al., arXiv:2207.00112: the Fisher information of a window is the squared
gradient of its own loss, and each input is weighted by the root of the sum over windows and
outputs.

The SVDs are exact. The public code of ASVD takes ``torch.svd_lowrank``, with a squared error 8 to
11 % higher on 8 weights of SmolLM2. Its baseline for FWSVD has the exponent 0.5 and labels that are
shifted twice, and its search takes the truncations ``sorted[mid:]`` with an outdated ``mid``. The
public code of SVD-LLM has no grouped queries, and a fixed rotary base of 10,000. The damping of
``svd_llm`` is ours.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from grasp_lightning.config import (
    BudgetOptions,
    DampingOptions,
    LowRankOptions,
    MethodConfig,
    MetricOptions,
    PresetName,
    SearchOptions,
    Weighting,
)
from grasp_lightning.errors import ConfigError
from grasp_lightning.methods.base import REFIT_PULL, CompressionMethod, Registered, Track
from grasp_lightning.methods.budgeted_truncation import BudgetedTruncation
from grasp_lightning.methods.global_ranks import GlobalRanks
from grasp_lightning.methods.layer_choice import configured_layers
from grasp_lightning.methods.metric import GRADIENT_DAMPING, INPUT_DAMPING, Metric
from grasp_lightning.methods.options import (
    check_share,
    chosen_preset,
    filled,
    given,
    keys_of,
    named_layers,
    refuse_ignored,
    resolve_layers,
)
from grasp_lightning.methods.per_type import PerTypeTruncation
from grasp_lightning.methods.rank_rules import configured_rule
from grasp_lightning.methods.sensitivity import SensitivityRanks, SensitivityTruncation
from grasp_lightning.methods.targets import check_target
from grasp_lightning.methods.truncation import Truncation
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.size import count_parameters

DEFAULT_REMOVED_RATIO: Final = 0.2
PLAIN: Final = LowRankOptions(
    weighting="none",
    fisher="sampled",
    ranks="uniform",
    mlp="factors",
    refit="none",
    refit_pull=REFIT_PULL,
    gradient_damping=GRADIENT_DAMPING,
    input_damping=INPUT_DAMPING,
)
_SVD_LLM: Final = replace(PLAIN, weighting="input_gram")
_PRESETS: Final[Mapping[PresetName, LowRankOptions]] = {
    "svd_llm": _SVD_LLM,
    "svd_llm_update": replace(_SVD_LLM, refit="prefix", refit_pull=0.0),
    "svd_llm_v2": replace(_SVD_LLM, ranks="per_type"),
    "asvd": replace(PLAIN, weighting="scale_columns"),
    "asvd_search": replace(PLAIN, weighting="scale_columns", ranks="sensitivity"),
    # The publication has no damping: this only gives inputs without any gradient a weight above 0.
    "fwsvd": replace(PLAIN, weighting="fisher_rows", input_damping=1e-10),
}
_REFERENCES: Final[Mapping[Weighting, str]] = {
    "none": "https://doi.org/10.1007/BF02288367",
    "fisher_rows": "https://arxiv.org/abs/2207.00112",
    "scale_columns": "https://arxiv.org/abs/2312.05821",
    "input_gram": "https://arxiv.org/abs/2403.07378",
    "kfac": "https://arxiv.org/abs/1503.05671",
}
_LARGEST_DAMPING: Final = 100


def check_amount(config: MethodConfig) -> MethodConfig:
    """Check layers and ratios, and return options with one of ``removed_ratio`` and ``keep_ratio``.

    All layers are compressed by default.

    Raises:
        ConfigError: If a ratio is out of range, or both are set.
    """
    if named_layers(config) is None:
        refuse_ignored(config, ("layer_metric",), "all layers are compressed")
    else:
        config = resolve_layers(config)
    if config.removed_ratio is not None and config.keep_ratio is not None:
        raise ConfigError(
            f"method {config.name} takes method.removed_ratio or method.keep_ratio, not both; "
            "leave one unset"
        )
    if config.keep_ratio is None:
        ratio = DEFAULT_REMOVED_RATIO if config.removed_ratio is None else config.removed_ratio
        check_share(ratio)
        return replace(config, removed_ratio=ratio)
    if not 0 < config.keep_ratio < 1:
        raise ConfigError(
            f"method.keep_ratio must be above 0 and below 1, got {config.keep_ratio}: it is the "
            "share of the linears' parameters that is kept"
        )
    return config


def with_parts(config: MethodConfig, defaults: LowRankOptions) -> MethodConfig:
    """Fill in the parts of a method or preset; refuse parts that do not fit together.

    Raises:
        ConfigError: If a part is out of range or without effect.
    """
    metric = Metric(weighting=config.weighting or defaults.weighting or "none")
    unused = set(keys_of(MetricOptions)) - set(metric.options)
    refuse_ignored(config, unused, f"method.weighting is {metric.weighting}")
    _check_damping(config)
    if (config.refit or defaults.refit) == "none":
        unused.add("refit_pull")
        refuse_ignored(config, ("refit_pull",), "method.refit is none")
    ranks = config.ranks or defaults.ranks
    if ranks == "per_type" and metric.weighting != "input_gram":
        raise ConfigError(
            f"method.ranks per_type needs method.weighting input_gram, got {metric.weighting}: its "
            "formula takes the error of the outputs"
        )
    if ranks != "sensitivity":
        remedy = "set method.ranks=sensitivity"
        refuse_ignored(config, keys_of(SearchOptions), f"method.ranks is {ranks}", remedy)
    if ranks != "global":
        unused |= set(keys_of(BudgetOptions))
        refuse_ignored(config, keys_of(BudgetOptions), f"method.ranks is {ranks}")
    else:
        _check_budget(config, metric)
        if not metric.orders_channels:
            defaults = replace(defaults, mlp="factors")
        elif config.target not in (None, "any"):
            defaults = replace(defaults, mlp="channels")
    return filled(config, defaults, unused)


def _check_damping(config: MethodConfig) -> None:
    for key in keys_of(DampingOptions):
        value: float | None = getattr(config, key)
        if value is not None and not 0 <= value <= _LARGEST_DAMPING:
            raise ConfigError(
                f"method.{key} must be from 0 to {_LARGEST_DAMPING}, got {value}: it is a share of "
                "the mean diagonal"
            )


def _check_budget(config: MethodConfig, metric: Metric) -> None:
    if config.multiple_of is not None and config.multiple_of < 1:
        raise ConfigError(f"method.multiple_of must be at least 1, got {config.multiple_of}")
    if config.removable not in (None, "none") and metric.weighting != "kfac":
        raise ConfigError(
            f"method.removable {config.removable} needs method.weighting kfac, got "
            f"{metric.weighting}: removals are measured in nats, and only its losses have that unit"
        )
    if config.mlp == "channels" and not metric.orders_channels:
        raise ConfigError(
            f"method.mlp channels needs method.weighting kfac or input_gram, got {metric.weighting}"
        )
    check_target(config, metric)


def truncation(config: MethodConfig, view: DecoderView, track: Track) -> CompressionMethod:
    """Return the method of resolved options; without named layers it compresses all of them."""
    if named_layers(config) is None:
        config = replace(config, layers=view.layer_indices)
    metric = Metric(**given(config, MetricOptions))
    parts: dict[str, Any] = {  # Any: arguments of several types
        "name": config.name,
        "reference": _REFERENCES[metric.weighting],
        "layers": configured_layers(config),
        "metric": metric,
        "refit": config.refit or "none",
        "refit_pull": REFIT_PULL if config.refit_pull is None else config.refit_pull,
        "track": track,
    }
    if config.ranks in ("uniform", "per_type"):
        method = PerTypeTruncation if config.ranks == "per_type" else Truncation
        return method(rule=configured_rule(config, view), **parts)
    budget: dict[str, Any] = {
        "removed_ratio": config.removed_ratio,
        "keep_ratio": config.keep_ratio,
        "num_parameters": count_parameters(view.model),
    }
    if config.ranks == "sensitivity":
        rule = SensitivityRanks(**budget, search_minutes=config.search_minutes)
        return SensitivityTruncation(rule=rule, **parts)
    budget |= {"embeddings": config.embeddings or "none", **given(config, BudgetOptions)}
    return BudgetedTruncation(rule=GlobalRanks(**budget), **parts)


def obstacle(config: MethodConfig) -> str | None:
    """Return what of complete options needs the whole model, or None; see ``Registered``."""
    reasons = {
        "method.ranks sensitivity tries truncations in the whole model: set another one": (
            config.ranks == "sensitivity"
        ),
        "method.removable measures removals in the whole model: set it to none": (
            config.removable not in (None, "none")
        ),
        "method.embeddings factors measures rows in the whole model: set it to none": (
            config.embeddings == "factors"
        ),
        "method.target plain changes the config of the whole model: set another one": (
            config.target == "plain"
        ),
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def _resolved(config: MethodConfig) -> MethodConfig:
    return with_parts(check_amount(config), chosen_preset(config, _PRESETS, PLAIN))


LOW_RANK: Final = Registered(
    name="low_rank",
    ignores="keeps the largest components",
    remedy="set method.name=grasp",
    resolve=_resolved,
    build=truncation,
    obstacle=obstacle,
)
