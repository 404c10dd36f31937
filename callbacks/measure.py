"""The production ``Measure``: one pass of a Lightning Trainer per step."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from grasp_lightning import processes
from grasp_lightning.callbacks.attribution import SingularAttribution, group_scores
from grasp_lightning.callbacks.calibration_checkpoint import (
    CalibrationCheckpoint,
    PassStore,
    StepStore,
)
from grasp_lightning.callbacks.expected_warnings import expected_warnings
from grasp_lightning.callbacks.layer_gradients import LayerTaylorScores, layer_scores
from grasp_lightning.callbacks.measurement import WINDOWS, Measurement
from grasp_lightning.callbacks.moments import LinearMoments
from grasp_lightning.callbacks.placement import check_trainer, is_split, placement
from grasp_lightning.callbacks.progress import StepProgressBar
from grasp_lightning.callbacks.removals import LossWithoutParts
from grasp_lightning.callbacks.seams import LayerSeams
from grasp_lightning.callbacks.similarity import LayerSimilarity
from grasp_lightning.callbacks.span_training import train_span
from grasp_lightning.callbacks.spread import InputSpreads
from grasp_lightning.callbacks.stop_request import StopRequest
from grasp_lightning.callbacks.unit_gradients import UnitTaylorScores, unit_scores
from grasp_lightning.callbacks.vocabulary import VocabularyMoments
from grasp_lightning.config import TrainerConfig
from grasp_lightning.data.datamodules import CalibrationData
from grasp_lightning.errors import PlanError
from grasp_lightning.evaluation.cut_losses import first_tokens
from grasp_lightning.methods.attribution import ATTRIBUTION, attribution_step
from grasp_lightning.methods.embedding_rows import MeasuredRows
from grasp_lightning.methods.layer_choice import GRADIENTS, SELECT
from grasp_lightning.methods.metric import Metric
from grasp_lightning.methods.removal import REMOVALS
from grasp_lightning.methods.seams import SEAM
from grasp_lightning.methods.sensitivity import SENSITIVITY
from grasp_lightning.methods.truncation import CURVATURE, Measured
from grasp_lightning.methods.unit_removal import SPREAD
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.sharding import is_sharded, mesh_of
from grasp_lightning.plan import MergeLayers
from grasp_lightning.progress import expect_passes, skip_pass, track
from grasp_lightning.stats.base import (
    MergedMoments,
    Moments,
    Needs,
    Sensitivity,
    SpanTraining,
    Statistics,
    Step,
    StreamBases,
    StreamBasis,
    Vocabulary,
)
from grasp_lightning.stats.layer_gradients import gradient_groups
from grasp_lightning.stats.moments import layer_groups
from grasp_lightning.stats.observer import shared_inputs
from grasp_lightning.stats.unit_gradients import unit_groups
from grasp_lightning.training.calibration import CalibrationModule
from grasp_lightning.training.hidden_cache import HiddenCache
from grasp_lightning.training.merge_trials import MergeTrials, final_states
from grasp_lightning.training.removal_losses import removal_losses
from grasp_lightning.training.row_losses import row_losses
from grasp_lightning.training.strategies import CalibrationFSDP
from grasp_lightning.training.stream_bases import stream_bases
from grasp_lightning.training.truncation_losses import num_sweeps, truncation_losses

_TRIED_SHARE = 8  # one in so many windows
_DESCRIPTIONS = {
    SELECT: "comparing layers",
    ATTRIBUTION: "scoring components",
    CURVATURE: "measuring curvature",
    REMOVALS: "measuring removals",
    SEAM: "comparing hidden states",
    GRADIENTS: "scoring by gradients",
    SPREAD: "measuring inputs",
    SENSITIVITY: "measuring inputs",
}


class TrainerMeasure:
    """Measures steps: ``fit`` of a Trainer if a step needs gradients, otherwise ``predict``.

    Args:
        log_dir: Folder for the CSV log of the calibration loss; None writes none.
        store: Keeps measurements for a later start; None keeps none.
        max_bytes: Memory limit for the moments or summed gradients of one pass; more are measured
            in several passes.
        priced_windows: Number of windows on which removals are priced, and merges and truncations
            are tried.
        caches: Keep the inputs of layers for later passes, see ``HiddenCache``; not for models
            whose layers pass each other more than hidden states.
        token_counts: How often a larger text uses each token, which smooths how often the
            calibration text does; None without one.
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
        token_counts: Tensor | None = None,
    ) -> None:
        self._data = data
        self._token_counts = token_counts
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
        self._trials: MergeTrials | None = None

    def __call__(self, view: DecoderView, step: Step) -> Statistics:
        """Measure a step on all windows; a step that needs nothing gets empty statistics."""
        if step.needs.is_empty:
            return Statistics()
        check_trainer(self._config, view.model.device)
        if is_split(self._config) and not is_sharded(view.model):
            raise ValueError(
                "trainer.strategy is fsdp, but every process holds the whole model: shard it first"
            )
        needs = step.needs
        if needs.weight_gradients or needs.more_groups:
            return self._component_scores(view, step)
        measurement = _of_one_pass(step)
        if measurement is not None:
            return self._pass(view, step, measurement)
        if needs.sensitivity is not None:
            return self._sensitivity(view, step, needs.sensitivity)
        moments = self._moments(view, step) if needs.moment_kinds else {}
        return Statistics(
            moments=moments,
            row_losses=self._row_losses(view, needs.vocabulary, moments),
            removal_losses=self._removal_losses(view, needs),
            layer_scores=self._layer_scores(view, step) if needs.layer_gradients else {},
            unit_scores=self._unit_scores(view, step) if needs.units else {},
            merge_similarity=self._merge_similarity(view, needs.merge),
            trained={} if needs.span_training is None else self._train(view, needs.span_training),
            stream={} if needs.stream is None else self._bases(view, needs.stream),
        )

    def _bases(self, view: DecoderView, asked: StreamBases) -> dict[str, StreamBasis]:
        return stream_bases(
            view,
            asked,
            self._data,
            track=self._track,
            max_bytes=self._max_bytes,
            store=None if self._store is None else self._store.scored_groups,
        )

    def _merge_similarity(self, view: DecoderView, merge: MergeLayers | None) -> float | None:
        if merge is None:
            return None
        trials = self._trials = self._trials or self._merge_trials(view)
        return trials(view, merge)

    def _sensitivity(self, view: DecoderView, step: Step, search: Sensitivity) -> Statistics:
        """Measure the moments, and then the loss with each linear truncated."""
        if not step.needs.moment_kinds:
            expect_passes(num_sweeps(search))
        moments = self._moments(view, step) if step.needs.moment_kinds else {}
        metric = Metric(**asdict(search.metric))
        losses = truncation_losses(
            view,
            search,
            Measured(view, metric, moments, self._track).basis,
            self._priced_batches(),
            self._track,
            store=None if self._store is None else self._store.tried_truncations,
            caches=self._caches,
        )
        return Statistics(moments=moments, truncation_losses=losses)

    def _component_scores(self, view: DecoderView, step: Step) -> Statistics:
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

    def _removal_losses(self, view: DecoderView, needs: Needs) -> Mapping[str, float]:
        """Measure removals on all windows, or on the first ones."""
        if not needs.removables:
            return {}
        if needs.removal_measure == "loss":
            measured = Needs(removables=needs.removables, removal_measure="loss")
            step = Step(name=REMOVALS, needs=measured)
            # Its sums must not be taken for those of moments.
            return self._pass(view, step, LossWithoutParts(step), "-removals").removal_losses
        batches = self._priced_batches()
        if not needs.moment_kinds:
            expect_passes(len(batches))
        return removal_losses(view, needs.removables, batches, self._track)

    def _row_losses(
        self, view: DecoderView, ends: Vocabulary | None, moments: Mapping[str, Moments]
    ) -> Mapping[str, float]:
        """Measure factors of each group of rows, on windows whose tokens were not counted."""
        if ends is None:
            return {}
        rows, batches = MeasuredRows(view, ends, moments), self._first_batches(self._num_tried)
        return row_losses(view, rows, batches, self._track)

    @property
    def _num_tried(self) -> int:
        """Number of windows on which rows are tried."""
        return max(len(self._data.windows) // _TRIED_SHARE, 1)

    def _priced_batches(self) -> list[dict[str, Tensor]]:
        return self._first_batches(min(self._priced_windows, len(self._data.windows)))

    def _first_batches(self, number: int) -> list[dict[str, Tensor]]:
        """Return the first windows, which interleave the sources of a mixture, one by one."""
        return [first_tokens(self._data.windows.batch([place])) for place in range(number)]

    def _merge_trials(self, view: DecoderView) -> MergeTrials:
        """Return trials against the dense model, whose states an earlier start may have stored.

        Raises:
            PlanError: If the model has changed, and the states were not stored before.
        """
        batches = self._priced_batches()
        dense = None if self._store is None else self._store.load_final_states()
        if dense is None:
            if len(view.layer_indices) < view.num_layers:
                raise PlanError(
                    "the final hidden states of the dense model are missing, and layers are merged "
                    "already: start the run again with --overwrite"
                )
            dense = final_states(view, batches)
            if self._store is not None:
                self._store.keep_final_states(dense)
        return MergeTrials(batches, dense, self._track)

    def _train(self, view: DecoderView, span: SpanTraining) -> dict[str, Tensor]:
        """Train a layer; the weights are equal in all processes."""
        with expected_warnings():
            return train_span(
                view,
                span,
                self._data,
                partial(self._trainer, view, is_backward=True),
                callbacks=[StepProgressBar("training a layer")] if self._progress else [],
                track=self._track,
                store=None if self._store is None else self._store.training,
                every_seconds=self._config.checkpoint_seconds,
                stop=self._stop,
                max_bytes=self._max_bytes,
            )

    def _layer_scores(self, view: DecoderView, step: Step) -> Mapping[int, float]:
        """Score layers by gradients, in as many passes as the memory of these requires."""
        return layer_scores(
            step,
            gradient_groups(view, step.needs.layer_gradients, self._max_bytes),
            lambda group, part: self._pass(view, group, LayerTaylorScores(group), part),
            None if self._store is None else self._store.scored_groups,
        )

    def _unit_scores(self, view: DecoderView, step: Step) -> Mapping[str, Tensor]:
        """Score units by gradients, in as many passes as the memory of these requires."""
        needs = step.needs
        return unit_scores(
            step,
            unit_groups(view, needs.units, needs.importance, self._max_bytes),
            lambda group, part: self._pass(view, group, UnitTaylorScores(group), part),
            None if self._store is None else self._store.scored_groups,
        )

    def _track(self, items: Sequence[str], description: str) -> Iterable[str]:
        return track(items, description) if self._progress else items

    def _moments(self, view: DecoderView, step: Step) -> Mapping[str, Moments]:
        """Measure moments, in as many passes as their memory requires."""
        sources = shared_inputs(view, step.needs.moments)
        groups = layer_groups(view, step.needs, self._max_bytes, sources)
        removal_passes = 1 if step.needs.removal_measure == "loss" else self._priced_windows
        searched = num_sweeps(step.needs.sensitivity)
        removals = bool(step.needs.removables) * removal_passes
        ends = step.needs.vocabulary is not None
        expect_passes(len(groups) + removals + searched + ends * (1 + self._num_tried))
        found: list[Mapping[str, Moments]] = []
        for number, group in enumerate(groups, start=1):
            part = f"-{number:05d}-of-{len(groups):05d}" if len(groups) > 1 else ""
            needs = replace(step.needs, moments=group, removables=(), sensitivity=None)
            narrowed = replace(step, needs=replace(needs, vocabulary=None))
            found.append(self._kept(view, narrowed, LinearMoments(narrowed, sources), part))
        if ends:
            needs = Needs(vocabulary=step.needs.vocabulary, fisher=step.needs.fisher)
            alone = replace(step, needs=needs)
            data, tried = self._data.windows, self._num_tried
            measurement = VocabularyMoments(alone, data, tried, self._token_counts)
            found.append(self._kept(view, alone, measurement, "-vocabulary"))
        return found[0] if len(found) == 1 else MergedMoments(found)

    def _kept(
        self, view: DecoderView, step: Step, measurement: Measurement, part: str
    ) -> Mapping[str, Moments]:
        """Return the moments of one pass, measured or kept by an earlier start."""
        moments = None if self._store is None else self._store.load_moments(part)
        if moments is not None:
            skip_pass()
            return moments
        moments = self._pass(view, step, measurement, part).moments
        return moments if self._store is None else self._store.keep_moments(moments, part)

    def _pass(
        self, view: DecoderView, step: Step, measurement: Measurement, part: str = ""
    ) -> Statistics:
        store = None if self._store is None else self._store.pass_store(part)
        state = None if store is None else store.load()
        done: list[int] = []
        if state is not None:
            measurement.go_on_from(state)
            done = state[WINDOWS].tolist()
        fisher, removables = step.needs.fisher, step.needs.removables
        module = CalibrationModule(view, fisher=fisher, removables=removables)
        with self._stop.deferred():
            self._run(module, measurement, step, self._data.without(done), store)
        if sorted(measurement.windows) != list(range(len(self._data.windows))):
            raise RuntimeError(f"windows counted: {measurement.windows}, expected each one once")
        ((_, stats),) = module.measured
        # Trainer and module reference each other, which would keep the bases in memory.
        module.measured.clear()
        return stats

    def _run(
        self,
        module: CalibrationModule,
        measurement: Measurement,
        step: Step,
        rest: CalibrationData,
        store: PassStore | None,
    ) -> None:
        if not rest.batches:  # the pass was complete, but the run ended before the decision
            measurement.start(module)
            measurement.finish(module)
            return
        device = module.view.model.device
        with expected_warnings():
            share_done = len(rest.done) / len(rest.windows)
            callbacks = self._callbacks(measurement, step, store, share_done)
            trainer = self._trainer(module.view, callbacks, is_backward=step.needs.is_backward)
            with self._cached(module, step, rest):
                if step.needs.is_backward:
                    trainer.fit(module, datamodule=rest)
                else:
                    trainer.predict(module, datamodule=rest, return_predictions=False)
        # A Trainer leaves its module on the CPU.
        module.view.model.to(device)  # type: ignore[arg-type]  # transformers wraps it with a narrow type

    @contextmanager
    def _cached(
        self, module: CalibrationModule, step: Step, data: CalibrationData
    ) -> Iterator[None]:
        """Skip the first layers of a pass if they have not changed since an earlier one.

        Backward passes work from the last layer down, and start from the inputs that the first pass
        has kept. Forward passes over the inputs of linears work up: each measures its first layer,
        starts from the input of the layer measured before, and skips the layers above.
        """
        has_cache = step.needs.is_backward or step.needs.moment_kinds
        if not (step.layers and self._caches and has_cache):
            yield
            return
        module.cache = cache = self._cache = self._cache or HiddenCache(module.view)
        windows = [window for batch in data.batches for window in batch]
        if not step.needs.is_backward:
            measured = min(step.layers)
            start = _agreed(cache.start_layer(measured, windows))
            with (
                cache.capturing((measured,), len(windows)),
                cache.starting_from(start),
                cache.ending_at(measured),
            ):
                yield
            cache.keep_only((measured,))
            return
        cache.keep_only(step.layers)
        start = _agreed(cache.start_layer(max(step.layers), windows))
        if start is None:
            with cache.capturing(step.layers, len(windows)):
                yield
        else:
            with cache.starting_from(start):
                yield

    def _callbacks(
        self, measurement: Measurement, step: Step, store: PassStore | None, share_done: float
    ) -> list[L.Callback]:
        callbacks: list[L.Callback] = [measurement]
        if self._progress:
            description = _DESCRIPTIONS.get(step.name, step.name)
            callbacks.append(StepProgressBar(description, share_done))
        if store is not None:
            seconds = self._config.checkpoint_seconds
            callbacks.append(
                CalibrationCheckpoint(measurement, store, every_seconds=seconds, stop=self._stop)
            )
        return callbacks

    def _trainer(
        self,
        view: DecoderView,
        callbacks: list[L.Callback],
        *,
        is_backward: bool,
        **more: Any,  # noqa: ANN401  arguments of a Trainer
    ) -> L.Trainer:
        logger: CSVLogger | bool = False
        if is_backward and self._log_dir is not None:
            self._passes += 1
            logger = CSVLogger(self._log_dir, name="", version=f"pass_{self._passes}")
        device, mesh = view.model.device, mesh_of(view.model)
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
            **more,
        )


def _agreed(start: int | None) -> int | None:
    """Return the cached layer that a pass starts from, if it is the same in all processes.

    After a resume processes may have other windows; a sharded model runs in all or none.
    """
    return start if len(set(processes.gather(start))) == 1 else None


def _of_one_pass(step: Step) -> Measurement | None:
    """Return what measures a step in a single pass over the windows; None for other steps."""
    needs = step.needs
    if needs.layer_metric is not None:
        return LayerSimilarity(step=step)
    if needs.seams:
        return LayerSeams(step)
    return InputSpreads(step) if needs.spreads else None
