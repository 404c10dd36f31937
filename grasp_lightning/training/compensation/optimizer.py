"""AdamW of a compensation, and its learning rate by step."""

import math
from collections.abc import Iterable
from importlib import import_module

import torch
from torch import nn
from torch.optim import Optimizer

from grasp_lightning.config import OptimizerConfig

_FUSED = ("cpu", "cuda", "xpu")  # devices on which torch has it, and its numbers are tested
_PLANNED_WARMUP = 10  # at most one in this many steps that were planned from a time limit


def make_optimizer(
    config: OptimizerConfig, parameters: Iterable[nn.Parameter], *, is_sharded: bool
) -> Optimizer:
    """Return AdamW over parameters: of torch, or with states in 8 bits, of bitsandbytes.

    torch's fused kernel updates a parameter in one pass. Sharded states take the ordinary one:
    their checkpoints are assembled from parts, and DeepSpeed updates flat copies.

    Source of the 8 bits: Dettmers et al., arXiv:2110.02861; parameters of fewer than 4096 values
    keep float32 states.
    """
    trained = list(parameters)
    betas = (config.beta1, config.beta2)
    if config.name == "adamw_8bit":
        optimizer: Optimizer = import_module("bitsandbytes.optim").AdamW8bit(
            trained,
            lr=config.learning_rate,
            betas=betas,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
        )
        return optimizer
    is_fused = not is_sharded and all(p.device.type in _FUSED for p in trained)
    optimizer = torch.optim.AdamW(
        trained,
        lr=config.learning_rate,
        betas=betas,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        fused=is_fused or None,
    )
    # It could unscale gradients itself, so that Lightning would refuse to clip them; bfloat16
    # needs no scaling.
    optimizer._step_supports_amp_scaling = False
    return optimizer


def rate_share(
    config: OptimizerConfig, step: int, num_steps: int | None, *, is_limited: bool = False
) -> float:
    """Return the learning rate of a step, counted from 0, as a share of the peak.

    Args:
        config: The schedule and its warm-up.
        step: The step.
        num_steps: Number of all steps; None while it is not known: the rate then does not fall.
        is_limited: Whether ``num_steps`` was planned from a time limit. The warm-up then takes at
            most a tenth of the steps.
    """
    warmup = config.warmup_steps
    if is_limited and num_steps is not None:
        warmup = min(warmup, num_steps // _PLANNED_WARMUP)
    if step < warmup:
        return step / warmup
    if config.schedule == "constant" or num_steps is None:
        return 1.0
    done = min((step - warmup) / max(1, num_steps - warmup), 1.0)
    return 1.0 - done if config.schedule == "linear" else (1.0 + math.cos(math.pi * done)) / 2
