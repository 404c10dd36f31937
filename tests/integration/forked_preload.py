"""Imports that forked test processes share, without any state."""

import torch

import grasp_lightning.commands.compensate
import tests.integration.cpu_deepspeed  # noqa: F401  changes Lightning's strategy

assert grasp_lightning.commands.compensate is not None
torch.set_num_threads(1)
