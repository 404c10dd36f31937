"""Where a Trainer runs: its devices and processes, and settings that do not fit them."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment

from grasp_lightning import processes
from grasp_lightning.config import CALIBRATION_STRATEGIES, Strategy, TrainerConfig
from grasp_lightning.errors import ConfigError
from grasp_lightning.training.strategies import CalibrationDDP


def placement(config: TrainerConfig, device: torch.device) -> dict[str, Any]:
    """Return the Trainer arguments ``devices``, ``num_nodes``, ``strategy`` and ``plugins``."""
    # The environment was read when the process group was formed. Lightning's own plugin for SLURM
    # would requeue from a signal handler, in the middle of a batch.
    plugins = [LightningEnvironment()]
    if processes.num_processes() > 1:
        group = {"devices": config.devices, "num_nodes": config.num_nodes}
        return {**group, "strategy": CalibrationDDP(), "plugins": plugins}
    devices = 1 if device.type == "cpu" else [device.index or 0]
    return {"devices": devices, "num_nodes": 1, "strategy": "auto", "plugins": plugins}


def is_split(config: TrainerConfig) -> bool:
    """Return whether several processes share the weights of one model (strategy fsdp)."""
    return config.strategy == "fsdp" and processes.num_processes() > 1


def check_trainer(
    config: TrainerConfig,
    device: torch.device,
    strategies: Sequence[Strategy] = CALIBRATION_STRATEGIES,
    stage: str = "calibration",
) -> None:
    """Refuse Trainer settings that no pass of a stage can follow.

    Raises:
        ConfigError: If the number of processes differs from the settings, or as in
            ``check_placement``.
    """
    check_placement(config, device, strategies, stage)
    wanted_processes = config.devices * config.num_nodes
    if wanted_processes != processes.num_processes():
        raise ConfigError(
            f"trainer.devices times trainer.num_nodes is {wanted_processes}, but there are "
            f"{processes.num_processes()} processes: start that many with torchrun or srun"
        )


def check_placement(
    config: TrainerConfig,
    device: torch.device,
    strategies: Sequence[Strategy] = CALIBRATION_STRATEGIES,
    stage: str = "calibration",
) -> None:
    """Refuse Trainer settings that do not fit the stage or the device.

    Raises:
        ConfigError: If the stage does not support the strategy, or the accelerator is another
            kind of device.
    """
    if config.strategy not in strategies:
        raise ConfigError(
            f"trainer.strategy is {config.strategy}, which {stage} does not support; expected one "
            f"of {', '.join(strategies)}"
        )
    wanted = "cuda" if config.accelerator == "gpu" else config.accelerator
    if wanted not in ("auto", device.type):
        raise ConfigError(
            f"trainer.accelerator is {config.accelerator}, but the model is on {device}: leave it "
            "on auto, and set model.device"
        )
