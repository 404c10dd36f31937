"""The production ``Measure``: one pass of a Lightning Trainer per step."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning as L
from lightning.pytorch.loggers import CSVLogger

from callbacks.attribution import SingularAttribution
from callbacks.measurement import Measurement
from callbacks.progress import StepProgressBar
from callbacks.similarity import LayerSimilarity
from grasp_lightning.config import TrainerConfig
from grasp_lightning.data.datamodules import CalibrationData
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.stats.base import Statistics, Step
from grasp_lightning.training.calibration import CalibrationModule


class TrainerMeasure:
    """Measures what steps need: ``fit`` of a Trainer where backward is needed, else ``predict``.

    Args:
        data: The calibration windows.
        config: Accelerator, devices, strategy and precision.
        log_dir: Folder for the CSV log of the calibration loss; None writes none.
        progress: Show progress bars.
    """

    def __init__(
        self,
        data: CalibrationData,
        config: TrainerConfig | None = None,
        log_dir: Path | None = None,
        *,
        progress: bool = True,
    ) -> None:
        self._data = data
        self._config = config or TrainerConfig()
        self._log_dir = log_dir
        self._progress = progress

    def __call__(self, view: DecoderView, step: Step) -> Statistics:
        """Run one pass over the windows.

        Args:
            view: The model.
            step: What to measure.

        Returns:
            The statistics; empty ones, without a pass, if the step needs nothing.
        """
        if step.needs.is_empty:
            return Statistics()
        module = CalibrationModule(view)
        device = view.model.device
        with _expected_warnings():
            if step.needs.weight_gradients:
                trainer = self._trainer(SingularAttribution(step=step), "scoring components")
                trainer.fit(module, datamodule=self._data)
            else:
                trainer = self._trainer(LayerSimilarity(step=step), "comparing layers")
                trainer.predict(module, datamodule=self._data, return_predictions=False)
        # A Trainer leaves its module on the CPU.
        view.model.to(device)  # type: ignore[arg-type]  # transformers wraps it with a narrow type
        ((_, stats),) = module.measured
        return stats

    def _trainer(self, measurement: Measurement, description: str) -> L.Trainer:
        bars = [StepProgressBar(description)] if self._progress else []
        logger = CSVLogger(self._log_dir, name="", version="") if self._log_dir else False
        return L.Trainer(
            accelerator=self._config.accelerator,
            devices=self._config.devices,
            num_nodes=self._config.num_nodes,
            strategy=self._config.strategy,
            precision=self._config.precision,
            max_epochs=1,
            callbacks=[measurement, *bars],
            logger=logger,
            log_every_n_steps=1,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=self._progress,
            # Inference tensors that a model caches (rotary tables) cannot be used in backward.
            inference_mode=False,
            use_distributed_sampler=False,
        )


@contextmanager
def _expected_warnings() -> Iterator[None]:
    """Silence what Lightning warns of and what is meant to be so here."""
    with warnings.catch_warnings():
        for message in (
            ".*does not have many workers.*",  # windows are in memory
            ".*returned `None`, this fit will run with no optimizer.*",
            ".*module\\(s\\) in eval mode at the start of training.*",
            "predict returned None.*",  # hooks read what they need; nothing is predicted
            ".*treespec, LeafSpec.*",  # inside Lightning, with torch 2.13
        ):
            warnings.filterwarnings("ignore", message=message)
        yield
