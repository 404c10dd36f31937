"""The production ``Measure``: one pass of a Lightning Trainer per step."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.loggers import CSVLogger
from rich.progress import track

from grasp_lightning import processes
from grasp_lightning.callbacks.attribution import SingularAttribution, group_scores
from grasp_lightning.callbacks.calibration_checkpoint import (
    CalibrationCheckpoint,
    PassStore,
    StepStore,
)
from grasp_lightning.callbacks.expected_warnings import expected_warnings
from grasp_lightning.callbacks.measurement import WINDOWS, Measurement
from grasp_lightning.callbacks.moments import LinearMoments
from grasp_lightning.callbacks.progress import StepProgressBar
from grasp_lightning.callbacks.similarity import LayerSimilarity
from grasp_lightning.callbacks.stop_request import StopRequest
from grasp_lightning.config import CALIBRATION_STRATEGIES, Strategy, TrainerConfig
from grasp_lightning.data.datamodules import CalibrationData
from grasp_lightning.errors import ConfigError
from grasp_lightning.evaluation.cut_losses import first_tokens
from grasp_lightning.methods.attribution import ATTRIBUTION, attribution_step
from grasp_lightning.methods.layer_choice import SELECT
from grasp_lightning.methods.truncation import CURVATURE
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.sharding import is_sharded, mesh_of
from grasp_lightning.stats.base import (
    MergedMoments,
    Moments,
    Removable,
    Statistics,
    Step,
)
from grasp_lightning.stats.moments import layer_groups
from grasp_lightning.stats.observer import shared_inputs
from grasp_lightning.training.calibration import CalibrationModule
from grasp_lightning.training.hidden_cache import HiddenCache
from grasp_lightning.training.removal_losses import removal_losses
from grasp_lightning.training.strategies import CalibrationDDP, CalibrationFSDP

_DESCRIPTIONS = {
    SELECT: "comparing layers",
    ATTRIBUTION: "scoring components",
    CURVATURE: "measuring curvature",
}


class TrainerMeasure:
    """Measures what steps need: ``fit`` of a Trainer where backward is needed, else ``predict``.

    Args:
        data: The calibration windows.
        config: Accelerator, devices, strategy, precision, and how often a pass is saved.
        log_dir: Folder for the CSV log of the calibration loss; None writes none.
        progress: Show progress bars.
        store: Where what is measured is kept for a later start; None keeps none.
        stop: Tells whether the run shall end at the next batch.
        max_bytes: Memory that the moments of one pass may take; more are measured in several.
        priced_windows: Number of windows on which removals are priced.
        caches: Keep what enters layers for later passes, see ``HiddenCache``; not for models whose
            layers hand on more than hidden states.
    """

    def __init__(
        self,
        data: CalibrationData,
        config: TrainerConfig | None = None,
        log_dir: Path | None = None,
        *,
        progress: bool = True,
        store: StepStore | None = None,
        stop: StopRequest | None = None,
        max_bytes: float = math.inf,
        priced_windows: int = 1,
        caches: bool = True,
    ) -> None:
        self._data = data
        self._config = config or TrainerConfig()
        self._log_dir = log_dir
        self._progress = progress
        self._store = store
        self._stop = stop or StopRequest()
        self._max_bytes = max_bytes
        self._priced_windows = priced_windows
        self._passes = 0
        self._cache: HiddenCache | None = None
        self._caches = caches

    def __call__(self, view: DecoderView, step: Step) -> Statistics:
        """Run one pass over the windows that are not counted yet.

        Args:
            view: The model.
            step: What to measure.

        Returns:
            The statistics; empty ones, without a pass, if the step needs nothing.

        Raises:
            ValueError: If the strategy is fsdp, but the model is whole in every process.
        """
        if step.needs.is_empty:
            return Statistics()
        check_trainer(self._config, view.model.device)
        if is_split(self._config) and not is_sharded(view.model):
            raise ValueError(
                "trainer.strategy is fsdp, but the model is whole in every process: shard it first"
            )
        if step.needs.moment_kinds:
            return Statistics(
                moments=self._moments(view, step),
                removal_losses=self._prices(view, step.needs.removables),
            )
        if step.needs.layer_metric is not None:
            return self._pass(view, step, LayerSimilarity(step=step))
        more = group_scores(
            step.needs,
            lambda modules: attribution_step(view, modules, step.needs.scoring, track=self._track),
            lambda group, part: self._pass(view, group, SingularAttribution(step=group), part),
            None if self._store is None else self._store.scored_groups,
        )
        if not step.needs.weight_gradients:
            return Statistics(more_scores=more)
        stats = self._pass(view, step, SingularAttribution(step=step))
        return replace(stats, more_scores=more)

    def _prices(self, view: DecoderView, removables: Sequence[Removable]) -> dict[str, float]:
        """Price removals on the first windows, in which the sources of a mixture take turns."""
        if not removables:
            return {}
        windows = self._data.windows
        count = min(self._priced_windows, len(windows))
        batches = [first_tokens(windows.batch([number])) for number in range(count)]
        return removal_losses(view, removables, batches, self._track)

    def _track(self, items: Sequence[str], description: str) -> Iterable[str]:
        return track(items, description=description) if self._progress else items

    def _moments(self, view: DecoderView, step: Step) -> Mapping[str, Moments]:
        """Measure moments, in as many passes as their memory asks for."""
        sources = shared_inputs(view, step.needs.moments)
        groups = layer_groups(view, step.needs, self._max_bytes, sources)
        found: list[Mapping[str, Moments]] = []
        for number, group in enumerate(groups, start=1):
            part = f"-{number:05d}-of-{len(groups):05d}" if len(groups) > 1 else ""
            moments = None if self._store is None else self._store.load_moments(part)
            if moments is None:
                narrowed = replace(step, needs=replace(step.needs, moments=group))
                measurement = LinearMoments(narrowed, sources)
                moments = self._pass(view, narrowed, measurement, part).moments
                if self._store is not None:
                    moments = self._store.keep_moments(moments, part)
            found.append(moments)
        return found[0] if len(found) == 1 else MergedMoments(found)

    def _pass(
        self, view: DecoderView, step: Step, measurement: Measurement, part: str = ""
    ) -> Statistics:
        store = None if self._store is None else self._store.pass_store(part)
        state = None if store is None else store.load()
        done: list[int] = []
        if state is not None:
            measurement.go_on_from(state)
            done = state[WINDOWS].tolist()
        module = CalibrationModule(view, fisher=step.needs.fisher)
        with self._stop.deferred():
            self._run(module, measurement, step, self._data.without(done), store)
        if sorted(measurement.windows) != list(range(len(self._data.windows))):
            raise RuntimeError(f"windows counted: {measurement.windows}, expected each one once")
        ((_, stats),) = module.measured
        module.measured.clear()  # Trainer and module hold each other, and would hold the bases
        return stats

    def _run(
        self,
        module: CalibrationModule,
        measurement: Measurement,
        step: Step,
        rest: CalibrationData,
        store: PassStore | None,
    ) -> None:
        if not rest.batches:  # the pass was complete, and ended before its decision
            measurement.start(module)
            measurement.finish(module)
            return
        device = module.view.model.device
        description = _DESCRIPTIONS.get(step.name, step.name)
        with expected_warnings():
            if step.needs.is_backward:
                trainer = self._trainer(module, measurement, description, store, self._logger())
                with self._cached(module, step, rest):
                    trainer.fit(module, datamodule=rest)
            else:
                trainer = self._trainer(module, measurement, description, store)
                trainer.predict(module, datamodule=rest, return_predictions=False)
        # A Trainer leaves its module on the CPU.
        module.view.model.to(device)  # type: ignore[arg-type]  # transformers wraps it with a narrow type

    @contextmanager
    def _cached(
        self, module: CalibrationModule, step: Step, data: CalibrationData
    ) -> Iterator[None]:
        """Start a pass where the model has not changed since an earlier one."""
        if not (step.layers and self._caches):
            yield
            return
        module.cache = self._cache = self._cache or HiddenCache(module.view)
        self._cache.keep_only(step.layers)
        windows = [window for batch in data.batches for window in batch]
        start = self._cache.start_layer(max(step.layers), windows)
        if len(set(processes.gather(start))) > 1:
            # After a resume each may have other windows; a sharded model runs in all or in none.
            start = None
        if start is None:
            with self._cache.capturing(step.layers, len(windows)):
                yield
        else:
            with self._cache.starting_from(start):
                yield

    def _logger(self) -> CSVLogger | bool:
        if self._log_dir is None:
            return False
        self._passes += 1
        return CSVLogger(self._log_dir, name="", version=f"pass_{self._passes}")

    def _trainer(
        self,
        module: CalibrationModule,
        measurement: Measurement,
        description: str,
        store: PassStore | None,
        logger: CSVLogger | bool = False,
    ) -> L.Trainer:
        callbacks: list[L.Callback] = [measurement]
        if self._progress:
            callbacks.append(StepProgressBar(description))
        if store is not None:
            seconds = self._config.checkpoint_seconds
            callbacks.append(
                CalibrationCheckpoint(measurement, store, every_seconds=seconds, stop=self._stop)
            )
        device, mesh = module.view.model.device, mesh_of(module.view.model)
        where = placement(self._config, device)
        if mesh is not None:
            where["strategy"] = CalibrationFSDP(mesh)
        return L.Trainer(
            accelerator=device.type,
            **where,
            precision=self._config.precision,
            max_epochs=1,
            callbacks=callbacks,
            logger=logger,
            log_every_n_steps=1,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=self._progress,
            # Inference tensors that a model caches (rotary tables) cannot be used in backward.
            inference_mode=False,
            use_distributed_sampler=False,
        )


def placement(config: TrainerConfig, device: torch.device) -> dict[str, Any]:
    """Return the arguments of a Trainer that say where it runs, alone or in a group.

    Args:
        config: The settings.
        device: Device that holds the model of this process.

    Returns:
        ``devices``, ``num_nodes``, ``strategy`` and ``plugins``.
    """
    arguments: dict[str, Any] = {
        # The environment was read when the processes were joined. Lightning's own reading of that
        # of SLURM would requeue from a signal handler, in the middle of a batch.
        "plugins": [LightningEnvironment()],
        "devices": 1 if device.type == "cpu" else [device.index or 0],
        "num_nodes": 1,
        "strategy": "auto",
    }
    if processes.num_processes() > 1:
        arguments |= {
            "devices": config.devices,
            "num_nodes": config.num_nodes,
            "strategy": CalibrationDDP(),
        }
    return arguments


def is_split(config: TrainerConfig) -> bool:
    """Return whether the processes of a run shall share the weights of one model.

    Args:
        config: The settings.

    Returns:
        True with strategy fsdp, unless there is one process only.
    """
    return config.strategy == "fsdp" and processes.num_processes() > 1


def check_trainer(
    config: TrainerConfig,
    device: torch.device,
    strategies: Sequence[Strategy] = CALIBRATION_STRATEGIES,
    stage: str = "calibration",
) -> None:
    """Refuse Trainer settings that no pass can follow.

    Args:
        config: The settings.
        device: Device that holds the model.
        strategies: Strategies that the stage supports.
        stage: Name of the stage, for the message.

    Raises:
        ConfigError: If another number of processes is asked for than there are, another device
            than the model's, or a strategy of another stage.
    """
    if config.strategy not in strategies:
        raise ConfigError(
            f"trainer.strategy is {config.strategy}, which {stage} does not support; expected one "
            f"of {', '.join(strategies)}"
        )
    wanted_processes = config.devices * config.num_nodes
    if wanted_processes != processes.num_processes():
        raise ConfigError(
            f"trainer.devices times trainer.num_nodes is {wanted_processes}, but there are "
            f"{processes.num_processes()} processes: start as many with torchrun or srun"
        )
    wanted = "cuda" if config.accelerator == "gpu" else config.accelerator
    if wanted not in ("auto", device.type):
        raise ConfigError(
            f"trainer.accelerator is {config.accelerator}, but the model is on {device}: leave it "
            "on auto, and set model.device"
        )
