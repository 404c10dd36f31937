"""The program, with DeepSpeed on CPU processes (gloo), where Lightning and the library ask for CUDA.

Start with torchrun, or alone for one process.
"""

import os
import sys

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch
from lightning.fabric.utilities.seed import reset_seed

from grasp_lightning.cli import main
from grasp_lightning.training.strategies import CompensationDeepSpeed, DeepSpeedStrategy

# On the CPU DeepSpeed would compile an operation for shared memory, which takes minutes; a build
# that is killed leaves a lock on which later runs wait for ever. Without it, plain gloo is used.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def setup_environment(self: DeepSpeedStrategy) -> None:
    """Skip the check that the accelerator is CUDA."""
    super(DeepSpeedStrategy, self).setup_environment()


def setup_distributed(self: DeepSpeedStrategy) -> None:
    """Skip the validation of the indices of devices."""
    reset_seed()
    self.set_world_ranks()
    self._init_deepspeed_distributed()


CompensationDeepSpeed.device_types = ("cuda", "cpu")
DeepSpeedStrategy.setup_environment = setup_environment  # type: ignore[method-assign]
DeepSpeedStrategy.setup_distributed = setup_distributed  # type: ignore[method-assign]
# The engine compares the index with a number.
DeepSpeedStrategy.root_device = property(lambda self: torch.device("cpu", 0))  # type: ignore[assignment, method-assign]

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
