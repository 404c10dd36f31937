"""Lets the program run DeepSpeed on CPU processes (gloo); to be imported before it starts.

Lightning's strategy and the library ask for CUDA. All else is the code that runs on GPUs.
"""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DeepSpeedStrategy

from grasp_lightning.training.strategies import CompensationDeepSpeed

# On the CPU DeepSpeed would compile an operation for shared memory, which takes minutes; a build
# that is killed leaves a lock on which later runs wait forever. Without it, plain gloo is used.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

create_config = DeepSpeedStrategy._create_default_config


def setup_environment(self: DeepSpeedStrategy) -> None:
    """Skip the check that the accelerator is CUDA."""
    super(DeepSpeedStrategy, self).setup_environment()


def setup_distributed(self: DeepSpeedStrategy) -> None:
    """Skip the validation of the indices of devices."""
    reset_seed()
    self.set_world_ranks()
    self._init_deepspeed_distributed()


def create_config_of_small_models(
    self: DeepSpeedStrategy,
    *args: object,
    **kwargs: object,
) -> dict:
    """Split small weights, too, which ZeRO-3 keeps whole by default."""
    config = create_config(self, *args, **kwargs)  # type: ignore[arg-type]  # passed on
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return config


CompensationDeepSpeed.device_types = ("cuda", "cpu")
for name, value in {
    "setup_environment": setup_environment,
    "setup_distributed": setup_distributed,
    "_create_default_config": create_config_of_small_models,
    # The engine compares the index with a number.
    "root_device": property(lambda self: torch.device("cpu", 0)),  # noqa: ARG005
}.items():
    setattr(DeepSpeedStrategy, name, value)
