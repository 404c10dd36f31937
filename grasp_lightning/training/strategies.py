"""Strategies of Lightning Trainers for runs of several processes."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from os import PathLike
from typing import Any, ClassVar

import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ModelParallelStrategy,
    ParallelStrategy,
    Strategy,
    StrategyRegistry,
)
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer

from grasp_lightning import config, processes
from grasp_lightning.errors import ConfigError
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.training.shards import (
    fill,
    fill_state,
    prepare_states,
    split_weights,
    whole_state,
    whole_values,
)


class CalibrationDDP(DDPStrategy):
    """One process per device, each with the whole model and its own windows; nothing is averaged.

    Calibration has no optimizer, so the module is not wrapped: no buckets, and no gradients that
    are averaged before callbacks read them. Callbacks add their sums up at the end of a pass.
    """

    def configure_ddp(self) -> None:
        """Leave the module as it is."""


class CalibrationFSDP(ModelParallelStrategy):
    """One process per device, each with a part of every weight, and its own windows.

    The module is sharded before it comes here, and stays so between passes.

    Args:
        mesh: The processes that share its weights.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__(data_parallel_size=mesh.size(), tensor_parallel_size=1)
        self._mesh = mesh

    def setup_environment(self) -> None:
        """Take the mesh that is there: one of its own would leave a process group at each pass."""
        self._setup_distributed()
        self._device_mesh = self._mesh


class _WholeCheckpoint(Strategy):
    """Keeps checkpoints in the form of a Trainer of one process: whole tensors, in one file.

    Only trained parameters and their states are gathered, and these are few beside the model. So a
    training goes on with another number of processes, and under another strategy, too.
    """

    def lightning_module_state_dict(self) -> dict[str, Tensor]:
        """Return the trained parameters as whole tensors; of value in rank 0 alone."""
        return {name: _stored(whole_values(p)) for name, p in self._trained().items()}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:  # Any: Lightning's own type
        """Return the state of the optimizer with whole tensors; of value in rank 0 alone.

        Args:
            optimizer: The one optimizer.

        Returns:
            The state in the form of torch's ``Optimizer.state_dict``.
        """
        states = {}
        for index, parameter in enumerate(self._trained().values()):
            state = whole_state(_inner(optimizer), parameter)
            states[index] = {key: _stored(value) for key, value in state.items()}
        (group,) = optimizer.param_groups
        settings = {key: value for key, value in group.items() if key != "params"}
        return {"state": states, "param_groups": [{**settings, "params": list(states)}]}

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        filepath: str | PathLike[str],
        storage_options: object = None,
    ) -> None:
        """Let rank 0 write the checkpoint.

        Args:
            checkpoint: Its content.
            filepath: The file.
            storage_options: See Lightning.
        """
        Strategy.save_checkpoint(self, checkpoint, str(filepath), storage_options)

    def load_checkpoint(
        self, checkpoint_path: str | PathLike[str], weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint in every process.

        Args:
            checkpoint_path: The file.
            weights_only: See torch.load.

        Returns:
            Its content.
        """
        return Strategy.load_checkpoint(self, str(checkpoint_path), weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Give the trained parameters the values of a checkpoint.

        Args:
            checkpoint: Its content.
            strict: Of no effect: a checkpoint holds exactly what is trained.
        """
        del strict
        for name, parameter in self._trained().items():
            fill(parameter, checkpoint["state_dict"][name])

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Return True: the Trainer is to call ``load_optimizer_state_dict``."""
        return True

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Give the optimizer the state of a checkpoint.

        Args:
            checkpoint: Its content.
        """
        (optimizer,), (stored,) = self.optimizers, checkpoint["optimizer_states"]
        prepare_states(optimizer)
        for index, parameter in enumerate(self._trained().values()):
            fill_state(optimizer, parameter, stored["state"][index])
        for group, settings in zip(optimizer.param_groups, stored["param_groups"], strict=True):
            group.update((key, value) for key, value in settings.items() if key != "params")

    def _trained(self) -> dict[str, nn.Parameter]:
        assert self.lightning_module is not None  # a fit has one
        named = self.lightning_module.named_parameters()
        return {name: parameter for name, parameter in named if parameter.requires_grad}


class CompensationFSDP(_WholeCheckpoint, ModelParallelStrategy):
    """FSDP2: every process holds a part of each weight, and gathers one layer at a time."""


class CompensationDeepSpeed(_WholeCheckpoint, DeepSpeedStrategy):
    """ZeRO: optimizer states, gradients (2) and weights (3) are split over processes.

    Attributes:
        device_types: Devices that Lightning runs DeepSpeed on.
    """

    device_types: ClassVar[tuple[str, ...]] = ("cuda",)

    def init_deepspeed(self) -> None:
        """Split the weights, and let Lightning make the engine."""
        if self.zero_stage_3:
            # The engine would move the whole model to the device before it splits it.
            assert isinstance(self.model, nn.Module)  # the LightningModule
            split_weights(self.model, self.config, self.root_device)
        super().init_deepspeed()

    def training_step(self, *args: object, **kwargs: object) -> STEP_OUTPUT:
        """Run the module's step outside of the engine: each part of it goes through the engine.

        Args:
            *args: What the module takes.
            **kwargs: What the module takes.

        Returns:
            What the module returns.
        """
        assert self.lightning_module is not None  # a fit has one
        with self.precision_plugin.train_step_context():
            return self.lightning_module.training_step(*args, **kwargs)

    def run_part(self, method: str, *args: object) -> Tensor:
        """Run a method of the module as one forward pass of the engine, which counts them.

        Args:
            method: Name of the method.
            *args: What it takes.

        Returns:
            What it returns.
        """
        assert self.model is not None  # a fit has one
        assert self.lightning_module is not None
        result = self._forward_redirection(self.model, self.lightning_module, method, *args)
        assert isinstance(result, Tensor)
        return result

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Tell the engine that more parts of the step will follow.

        Yields:
            Nothing.
        """
        self.deepspeed_engine.set_gradient_accumulation_boundary(False)
        yield
        self.deepspeed_engine.set_gradient_accumulation_boundary(True)


def is_deepspeed(name: config.Strategy) -> bool:
    """Return whether a strategy is one of DeepSpeed's.

    Args:
        name: Key ``trainer.strategy``.

    Returns:
        True if it is.
    """
    return name.startswith("deepspeed_")


def is_sharded_strategy(name: config.Strategy) -> bool:
    """Return whether a strategy splits what is trained, or the model, over processes.

    Args:
        name: Key ``trainer.strategy``.

    Returns:
        True if it does.
    """
    return name == "fsdp" or is_deepspeed(name)


def check_strategy(name: config.Strategy, device: torch.device) -> None:
    """Refuse a strategy that cannot run here.

    Args:
        name: Key ``trainer.strategy``.
        device: Device of this process.

    Raises:
        ConfigError: If a package or a device is missing.
    """
    if not is_deepspeed(name):
        return
    if find_spec("deepspeed") is None:
        raise ConfigError(
            f"trainer.strategy {name} needs the package deepspeed: pip install "
            "'grasp-lightning[deepspeed]', or use fsdp"
        )
    if device.type not in CompensationDeepSpeed.device_types:
        raise ConfigError(
            f"trainer.strategy {name} needs CUDA devices, and the model is on {device}; use fsdp"
        )
    if processes.num_processes() == 1 and device.index:
        raise ConfigError(
            f"trainer.strategy {name} takes the first CUDA device, and model.device is {device}: "
            "leave it on auto, and set CUDA_VISIBLE_DEVICES"
        )


def sharded_strategy(name: config.Strategy, gradient_clip: float | None) -> ParallelStrategy:
    """Return a strategy for a fit that splits something over processes.

    Args:
        name: Key ``trainer.strategy``.
        gradient_clip: Largest norm of all gradients together; None does not clip.

    Returns:
        A new strategy.
    """
    if name == "fsdp":
        return CompensationFSDP(
            data_parallel_size=processes.num_processes(), tensor_parallel_size=1
        )
    strategy = CompensationDeepSpeed(**StrategyRegistry[name]["init_params"])
    assert isinstance(strategy.config, dict)  # the default one
    strategy.config |= {
        # The engine clips; what Lightning would do with the gradients has no effect.
        "gradient_clipping": gradient_clip or 0.0,
        "train_micro_batch_size_per_gpu": 1,  # for a log of speed only
        # torch's AdamW runs on the CPU, too: no compiler is needed, and the numbers stay the same.
        "zero_force_ds_cpu_optimizer": False,
    }
    return strategy


def shard_layers(view: DecoderView, mesh: DeviceMesh) -> None:
    """Split every weight of a model over processes: FSDP2, one group per decoder layer.

    Args:
        view: The model, changed in place.
        mesh: The processes.
    """
    for index in view.layer_indices:
        fully_shard(view.layer(index), mesh=mesh)
    fully_shard(view.model, mesh=mesh)


def _stored(value: Tensor) -> Tensor:
    # One copy on the CPU, where it is written; the other processes only took part.
    return value.cpu() if processes.is_first() else value.new_empty(0)


def _inner(optimizer: object) -> object:
    """Return the optimizer that Lightning has wrapped."""
    return getattr(optimizer, "_optimizer", optimizer)
