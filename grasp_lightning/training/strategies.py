"""Lightning strategies for runs of several processes."""

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

    Calibration has no optimizer, so the module is not wrapped: DDP would allocate buckets and
    average gradients before callbacks read them. Callbacks sum over processes after a pass.
    """

    def configure_ddp(self) -> None:
        """Return the module unchanged."""


class CalibrationFSDP(ModelParallelStrategy):
    """One process per device, each with a shard of every weight and its own windows.

    The module is already sharded over the mesh, and stays so between passes.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__(data_parallel_size=mesh.size(), tensor_parallel_size=1)
        self._mesh = mesh

    def setup_environment(self) -> None:
        """Reuse the mesh: a new one would leave a process group behind at each pass."""
        self._setup_distributed()
        self._device_mesh = self._mesh


class _WholeCheckpoint(Strategy):
    """Writes checkpoints like a single-process Trainer: whole tensors in one file.

    Only trained parameters and their states are gathered, a small part of the model. A run can
    therefore resume with another number of processes or another strategy.
    """

    def lightning_module_state_dict(self) -> dict[str, Tensor]:
        """Return the trained parameters as whole tensors; empty tensors outside rank 0."""
        return {name: _stored(whole_values(p)) for name, p in self._trained().items()}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:  # Any: Lightning's own type
        """Return torch's ``Optimizer.state_dict`` with whole tensors; empty ones outside rank 0."""
        states, inner = {}, getattr(optimizer, "_optimizer", optimizer)  # Lightning wraps it
        for index, parameter in enumerate(self._trained().values()):
            state = whole_state(inner, parameter)
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
        """Write the checkpoint in rank 0."""
        Strategy.save_checkpoint(self, checkpoint, str(filepath), storage_options)

    def load_checkpoint(
        self, checkpoint_path: str | PathLike[str], weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint in every process."""
        return Strategy.load_checkpoint(self, str(checkpoint_path), weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the trained parameters; ``strict`` has no effect."""
        del strict
        for name, parameter in self._trained().items():
            fill(parameter, checkpoint["state_dict"][name])

    @property
    def lightning_restore_optimizer(self) -> bool:
        """True: the Trainer calls ``load_optimizer_state_dict``."""
        return True

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the state of the one optimizer."""
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
    """FSDP2: every process holds a shard of each weight and gathers one layer at a time."""


class CompensationDeepSpeed(_WholeCheckpoint, DeepSpeedStrategy):
    """ZeRO: shards optimizer states, gradients (2) and weights (3) over processes."""

    device_types: ClassVar[tuple[str, ...]] = ("cuda",)

    def init_deepspeed(self) -> None:
        """Shard the weights, then let Lightning create the engine."""
        if self.zero_stage_3:
            # The engine would move the whole model to the device before it splits it.
            assert isinstance(self.model, nn.Module)  # the LightningModule
            split_weights(self.model, self.config, self.root_device)
        super().init_deepspeed()

    def training_step(self, *args: object, **kwargs: object) -> STEP_OUTPUT:
        """Run the module's step outside the engine; ``run_part`` enters it for each micro-batch."""
        assert self.lightning_module is not None  # a fit has one
        with self.precision_plugin.train_step_context():
            return self.lightning_module.training_step(*args, **kwargs)

    def run_part(self, method: str, *args: object) -> Tensor:
        """Run a method of the module as one forward pass of the engine, which counts the passes."""
        assert self.model is not None  # a fit has one
        assert self.lightning_module is not None
        result = self._forward_redirection(self.model, self.lightning_module, method, *args)
        assert isinstance(result, Tensor)
        return result

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Tell the engine that more micro-batches of the step follow."""
        self.deepspeed_engine.set_gradient_accumulation_boundary(False)
        yield
        self.deepspeed_engine.set_gradient_accumulation_boundary(True)


def is_deepspeed(name: config.Strategy) -> bool:
    """Return whether ``trainer.strategy`` is one of DeepSpeed's."""
    return name.startswith("deepspeed_")


def is_sharded_strategy(name: config.Strategy) -> bool:
    """Return whether ``trainer.strategy`` shards the model or its training state."""
    return name == "fsdp" or is_deepspeed(name)


def check_strategy(name: config.Strategy, device: torch.device) -> None:
    """Refuse a ``trainer.strategy`` that cannot run on this process's device.

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
            f"trainer.strategy {name} needs CUDA devices, but the model is on {device}; use fsdp"
        )
    if processes.num_processes() == 1 and device.index:
        raise ConfigError(
            f"trainer.strategy {name} uses the first CUDA device, but model.device is {device}: "
            "set it to auto, and choose a device with CUDA_VISIBLE_DEVICES"
        )


def sharded_strategy(name: config.Strategy, gradient_clip: float | None) -> ParallelStrategy:
    """Return a new strategy for a sharded fit; a ``gradient_clip`` of None does not clip."""
    if name == "fsdp":
        num_processes = processes.num_processes()
        return CompensationFSDP(data_parallel_size=num_processes, tensor_parallel_size=1)
    strategy = CompensationDeepSpeed(**StrategyRegistry[name]["init_params"])
    assert isinstance(strategy.config, dict)  # the default one
    strategy.config |= {
        # The engine clips; Lightning's clipping has no effect.
        "gradient_clipping": gradient_clip or 0.0,
        "train_micro_batch_size_per_gpu": 1,  # for logging only
        # torch's AdamW also runs on the CPU, without a compiler and with the same numbers.
        "zero_force_ds_cpu_optimizer": False,
    }
    return strategy


def shard_layers(view: DecoderView, mesh: DeviceMesh) -> None:
    """Shard every weight of a model in place: FSDP2, one group per decoder layer."""
    for index in view.layer_indices:
        fully_shard(view.layer(index), mesh=mesh)
    fully_shard(view.model, mesh=mesh)


def _stored(value: Tensor) -> Tensor:
    # One copy on the CPU, where it is written; the other processes only took part.
    return value.cpu() if processes.is_first() else value.new_empty(0)
