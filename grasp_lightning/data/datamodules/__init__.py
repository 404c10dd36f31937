"""Data for a Lightning Trainer: windows to calibrate on, samples to train on."""

from grasp_lightning.data.datamodules.calibration import CalibrationData
from grasp_lightning.data.datamodules.training import (
    InstructionData,
    TextData,
    TrainingData,
    TrainingSamples,
)

__all__ = ["CalibrationData", "InstructionData", "TextData", "TrainingData", "TrainingSamples"]
