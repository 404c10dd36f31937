"""Strategies of Lightning Trainers for runs of several processes."""

from lightning.pytorch.strategies import DDPStrategy


class CalibrationDDP(DDPStrategy):
    """One process per device, each with the whole model and its own windows; nothing is averaged.

    Calibration has no optimizer, so the module is not wrapped: no buckets, and no gradients that
    are averaged before callbacks read them. Callbacks add their sums up at the end of a pass.
    """

    def configure_ddp(self) -> None:
        """Leave the module as it is."""
