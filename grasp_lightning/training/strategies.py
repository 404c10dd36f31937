"""Strategies of Lightning Trainers for runs of several processes."""

from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.device_mesh import DeviceMesh


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
