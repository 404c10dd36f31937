"""Trainable parameters: weights themselves or LoRA adapters, and how adapters are merged."""

import logging
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from peft import LoraConfig, LoraModel
from torch import Tensor
from transformers import PreTrainedModel

from grasp_lightning.config import CompensateConfig, LoraSettings, TrainMode
from grasp_lightning.errors import ConfigError, ModelError, NumericsError
from grasp_lightning.linalg.precision import matmul_precision
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.linears import DenseModule
from grasp_lightning.models.loading import LoadedModel, load_model
from grasp_lightning.models.lowrank import low_rank_linears, narrowed_linears, ranks_of
from grasp_lightning.training.compensation.parameters import own_parameters

logger = logging.getLogger(__name__)

_ADAPTER = "default"
_FACTORS = ("left", "right")
_QKV = ("q_proj", "k_proj", "v_proj")
# The usual names, and what families that fuse or rename linears call them.
_FUSED = {
    **dict.fromkeys(_QKV, ("qkv_proj", "query_key_value", "c_attn", "Wqkv")),
    "o_proj": ("out_proj", "attention.dense", "self_attention.dense", "attn.c_proj"),
    "gate_proj": ("gate_up_proj",),
    "up_proj": ("gate_up_proj", "fc1", "dense_h_to_4h", "c_fc"),
    "down_proj": ("fc2", "dense_4h_to_h", "mlp.c_proj"),
}


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The trainable part of a model.

    Attributes:
        modules: Full names of the modules that are trained or have adapters, in model order.
        adapters: None where weights themselves are trained.
    """

    modules: tuple[str, ...]
    adapters: LoraModel | None
    num_parameters: int


def make_trainable(
    view: DecoderView, train: TrainMode, lora: LoraSettings, rewritten: Collection[str] = ()
) -> Trained:
    """Freeze a model in place, except for what the training mode changes.

    Adapters start at zero, so the model's output is unchanged; their first factors are drawn from
    torch's global generator. A rank above half the smaller side of a linear is capped there with
    one warning, and alpha with it, so that the adapter keeps its scale.

    Args:
        view: The model.
        train: The training mode.
        lora: Settings of adapters; ``targets`` also choose among factors.
        rewritten: Further parameters that ``replaced`` trains, from ``rewritten_parameters``.

    Source: Hu et al., "LoRA", arXiv:2106.09685, section 4.1.
    """
    adapters = None
    if train == "all" or train == "replaced":  # noqa: PLR1714  # mypy narrows only this form
        parameters = own_parameters(view, train, rewritten)
        view.model.requires_grad_(False)
        modules = tuple(dict.fromkeys(name.rpartition(".")[0] for name in parameters))
        for parameter in parameters.values():
            parameter.requires_grad_(True)
    else:
        linears = trainable_linears(view, train, lora.targets)
        view.model.requires_grad_(False)
        modules = tuple(linears)
        if train == "factors":
            for linear in linears.values():
                linear.weight.requires_grad_(True)
        else:
            adapters = _attach(view.model, linears, lora)
    trained = (p.numel() for p in view.model.parameters() if p.requires_grad)
    return Trained(modules=modules, adapters=adapters, num_parameters=sum(trained))


def trainable_linears(
    view: DecoderView, train: TrainMode, targets: Sequence[str]
) -> dict[str, DenseModule]:
    """Return the linears that a training mode trains or puts adapters on, in model order.

    Narrowed linears are trained with factors: both replaced linears in the compression. Factors are
    named ``<module>.left`` and ``<module>.right``. ``resolve_targets`` explains the targets.

    Raises:
        ModelError: If factors are to be trained, and the model has nothing to train.
    """
    found: dict[str, DenseModule] = {}
    for module, low_rank in low_rank_linears(view.model).items():
        if low_rank.rank > 0:  # a removed block has nothing to train
            found[f"{module}.right"], found[f"{module}.left"] = low_rank.right, low_rank.left
    # The head of a sliced model is narrowed too.
    narrowed = narrowed_linears(view.model).items()
    found |= {n: linear for n, linear in narrowed if view.layer_of(n) is not None}
    if train == "lora":
        for index in view.layer_indices:
            view.linears(index)  # warns of what is skipped
            dense = view.dense_modules(index)
            found |= {view.current_name(name): linear for name, linear in dense.items()}
    if not found:
        which = "those of this one have rank 0" if ranks_of(view.model) else "this one has none"
        raise ModelError(
            f"train: {train} needs a model with low-rank linears, and {which}: give the "
            "model/ folder of a compressed model, or use train: lora or all"
        )
    ordered = [name for name, _ in view.model.named_modules() if name in found]
    return {name: found[name] for name in resolve_targets(ordered, targets)}


def resolve_targets(linears: Iterable[str], targets: Sequence[str]) -> tuple[str, ...]:
    """Return the full names of the linears that targets match, in the order of ``linears``.

    A target is a full name or its end (``q_proj``, ``self_attn.q_proj``); a low-rank linear's name
    matches both of its factors. The usual names also match where a family fuses or renames linears.

    Args:
        linears: Full names of all linears, factors as ``<module>.left`` and ``<module>.right``.
        targets: No targets match everything.

    Raises:
        ConfigError: If a target matches no linear.
    """
    names = list(linears)
    if not targets:
        return tuple(names)
    chosen: set[str] = set()
    for target in targets:
        found = _matching(names, [target]) or _matching(names, _FUSED.get(target, ()))
        if not found:
            kinds = sorted({_without_factor(name).rpartition(".")[2] for name in names})
            raise ConfigError(
                f"lora.targets: no linear matches {target!r}; the linears are: {', '.join(kinds)}"
            )
        chosen |= found
    return tuple(name for name in names if name in chosen)


def merge_adapters(trained: Trained) -> None:
    """Merge every adapter into its linear's weight in place; low-rank factors stay factors.

    Raises:
        NumericsError: If a merged weight is NaN or infinite.
    """
    if trained.adapters is None:
        return
    try:
        with matmul_precision("highest"):
            trained.adapters.merge_and_unload(safe_merge=True)
    except ValueError as error:
        raise NumericsError(
            f"training diverged to NaN or infinity: {error}; lower optimizer.learning_rate"
        ) from error


def _matching(names: Sequence[str], targets: Iterable[str]) -> set[str]:
    return {
        name
        for name in names
        for target in targets
        if any(f".{full}".endswith(f".{target}") for full in (name, _without_factor(name)))
    }


def _without_factor(name: str) -> str:
    module, _, last = name.rpartition(".")
    return module if last in _FACTORS else name


def _attach(
    model: PreTrainedModel, linears: Mapping[str, DenseModule], lora: LoraSettings
) -> LoraModel:
    limits = {name: max(min(linear.weight.shape) // 2, 1) for name, linear in linears.items()}
    capped = {name: limit for name, limit in limits.items() if limit < lora.rank}
    if capped:
        logger.warning(
            "lora.rank %d is more than half the smaller dimension of %d of %d linears and is "
            "capped there (at %d to %d)",
            lora.rank,
            len(capped),
            len(linears),
            min(capped.values()),
            max(capped.values()),
        )
    scale = lora.alpha / lora.rank
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # any number will do
        lora_dropout=lora.dropout,
        target_modules=list(linears),
        rank_pattern=capped,
        alpha_pattern={name: scale * rank for name, rank in capped.items()},
        bias="none",
    )
    with warnings.catch_warnings():
        # peft warns about GPT-2's transposed linears next to ordinary ones.
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out is set to.*")
        adapters = LoraModel(model, config, _ADAPTER)
    model.train(model.training)  # the new modules, too
    for parameter in model.parameters():
        if parameter.requires_grad:
            # Low precision would lose small optimizer steps.
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    return adapters


def consolidated(
    config: CompensateConfig, state: Mapping[str, Tensor], rewritten: Collection[str] = ()
) -> LoadedModel:
    """Reload the model on the CPU, load the trained parameters by name, and merge the adapters.

    Unchanged weights come from their original files, so they are never gathered.
    """
    loaded = load_model(replace(config.model, device="cpu"))
    trained = make_trainable(DecoderView(loaded.model), config.train, config.lora, rewritten)
    parameters = dict(loaded.model.named_parameters())
    assert {name for name, p in parameters.items() if p.requires_grad} == set(state)
    with torch.no_grad():
        for name, value in state.items():
            parameters[name].copy_(value)
    merge_adapters(trained)
    return loaded
