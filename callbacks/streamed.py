"""The ``Measure`` of streamed models: sweeps over decoder layers instead of passes of a Trainer."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from grasp_lightning import processes
from grasp_lightning.callbacks.attribution import SingularAttribution, group_scores
from grasp_lightning.callbacks.calibration_checkpoint import StepStore
from grasp_lightning.callbacks.measurement import Measurement
from grasp_lightning.callbacks.moments import LinearMoments
from grasp_lightning.data.datamodules import CalibrationData
from grasp_lightning.errors import ConfigError
from grasp_lightning.linalg.factors import SVD
from grasp_lightning.linalg.layers import angular_distance_sum, cosine_sum
from grasp_lightning.methods.attribution import attribution_step
from grasp_lightning.models.decoder import DecoderView, frozen
from grasp_lightning.run_folder import check_free_space
from grasp_lightning.stats.base import (
    MergedMoments,
    Moments,
    Needs,
    Statistics,
    Step,
    StreamedStatistics,
)
from grasp_lightning.stats.moments import layer_groups
from grasp_lightning.stats.observer import shared_inputs
from grasp_lightning.training.calibration import CalibrationModule
from grasp_lightning.training.layer_streams import HiddenStates, numbered_batches
from grasp_lightning.training.sweep import LayerSweep, Visit, Visitor, unseen

_MEASURED = {"layer_metric", "span", "moments", "moment_kinds", "fisher", "scoring"}
_MEASURED |= {"weight_gradients", "more_groups"}


class StreamedMeasure:
    """Measures steps of a streamed model by sweeps over its layers.

    The same measurements as in a Trainer see the inputs and output gradients of one layer at a
    time, so statistics are equal. Each process moves its own windows through all layers, and sums
    are added up layer by layer.

    Args:
        data: Calibration windows; each process has at least one of them.
        store: Keeps measurements for a later start; None keeps none.
        max_bytes: Memory for hidden states of this process; the rest is stored in temporary files.
        track: Shows progress over layers.
    """

    def __init__(
        self,
        data: CalibrationData,
        *,
        store: StepStore | None,
        max_bytes: float,
        track: Callable[[Sequence[str], str], Iterable[str]],
    ) -> None:
        batches = numbered_batches(data)
        # No layer waits for other processes, so that padding need not run.
        self._batches = {number: x for number, x in batches.items() if len(x["index"]) > 0}
        self._store = store
        self._max_bytes = max_bytes
        self._track = track

    def __call__(self, view: DecoderView, step: Step) -> Statistics:
        """Measure a step on all windows; a step that needs nothing gets empty statistics."""
        found = self._measured_step(view, step)
        decided = None if self._store is None else self._store.decided
        if decided is None:
            return found
        values = {field.name: getattr(found, field.name) for field in fields(found)}
        return StreamedStatistics(**values, decided=decided)

    def _measured_step(self, view: DecoderView, step: Step) -> Statistics:
        needs = step.needs
        if needs.is_empty:
            return Statistics()
        check_needs(needs)
        if needs.layer_metric is not None:
            return Statistics(layer_metric=self._layer_metric(view, needs))
        if needs.weight_gradients or needs.more_groups:
            return self._component_scores(view, step)
        return Statistics(moments=self._moments(view, step))

    @contextmanager
    def _sweep(self, view: DecoderView, num_layers: int) -> Iterator[LayerSweep]:
        """Open a sweep that keeps the inputs of some layers, if the disk has room for them."""
        tokens = sum(batch["input_ids"].numel() for batch in self._batches.values())
        width = view.model.config.get_text_config().hidden_size
        # And what leaves the layer that runs, or its gradient.
        hidden = (num_layers + 1) * tokens * width * view.model.dtype.itemsize
        with TemporaryDirectory() as folder, frozen(view.model):
            check_free_space(Path(folder), max(0, int(hidden - self._max_bytes)), "TMPDIR")
            states = HiddenStates(Path(folder), self._max_bytes, view.model.device)
            yield LayerSweep(view, self._batches, states, self._track)

    def _layer_metric(self, view: DecoderView, needs: Needs) -> Tensor:
        """Return the metric of every start layer, as ``LayerMetricCollector``."""
        measure = cosine_sum if needs.layer_metric == "similarity" else angular_distance_sum
        layers, span = view.layer_indices, needs.span
        device = view.model.device
        sums = torch.zeros(len(layers) - span + 1, dtype=torch.float64, device=device)
        with self._sweep(view, span) as sweep:

            def passed(index: int, number: int, leaving: Tensor) -> None:
                start = layers.index(index) - span + 1
                if start >= 0:
                    entering = sweep.entering(layers[start], number)
                    mask = self._batches[number]["mask"].to(leaving.device)
                    sums[start] += measure(entering, leaving, mask)

            sweep.up("comparing layers", num_kept=span, passed=passed)
        num_tokens = torch.tensor(sum(int(b["mask"].sum()) for b in self._batches.values()))
        total = processes.summed({"sums": sums.cpu(), "num_tokens": num_tokens})
        return (total["sums"] / total["num_tokens"]).float()

    def _moments(self, view: DecoderView, step: Step) -> Mapping[str, Moments]:
        """Measure moments layer by layer; layers that an earlier start has measured are read."""
        sources = shared_inputs(view, step.needs.moments)
        groups = layer_groups(view, step.needs, 0.0, sources)
        found: dict[int, Mapping[str, Moments]] = {}
        waiting: dict[int, tuple[str, tuple[str, ...]]] = {}
        for number, group in enumerate(groups, start=1):
            part, index = f"-{number:05d}-of-{len(groups):05d}", view.layer_of(group[0])
            assert index is not None  # its linears are in a decoder layer
            stored = None if self._store is None else self._store.load_moments(part)
            if stored is None:
                waiting[index] = part, group
            else:
                found[index] = stored

        def measurement(index: int) -> Measurement:
            needs = replace(step.needs, moments=waiting[index][1])
            return LinearMoments(replace(step, needs=needs), sources)

        def keep(index: int, stats: Statistics) -> None:
            moments = {name: _on_cpu(value) for name, value in stats.moments.items()}
            if self._store is None:
                found[index] = moments
            else:
                found[index] = self._store.keep_moments(stats.moments, waiting[index][0])

        self._measured(view, step.needs, tuple(waiting), measurement, keep)
        return MergedMoments([found[index] for index in sorted(found)])

    def _component_scores(self, view: DecoderView, step: Step) -> Statistics:
        more = group_scores(
            step.needs,
            lambda modules: attribution_step(view, modules, step.needs.scoring, track=self._track),
            lambda group, _: Statistics(component_scores=self._scores(view, group)),
            None if self._store is None else self._store.scored_groups,
        )
        return Statistics(component_scores=self._scores(view, step), more_scores=more)

    def _scores(self, view: DecoderView, step: Step) -> dict[str, Tensor]:
        """Score components with the decompositions of one layer at a time on the device."""
        found: dict[str, Tensor] = {}
        modules: dict[int, list[str]] = {}
        for name in step.needs.weight_gradients:
            index = view.layer_of(name)
            assert index is not None  # its linears are in decoder layers
            modules.setdefault(index, []).append(name)

        def measurement(index: int) -> Measurement:
            names, device = modules[index], view.model.device
            bases = {n: SVD(*(part.to(device) for part in step.bases[n])) for n in names}
            needs = replace(step.needs, weight_gradients=tuple(names), more_groups=())
            return SingularAttribution(step=replace(step, needs=needs, bases=bases))

        def keep(_: int, stats: Statistics) -> None:
            found.update(stats.component_scores)

        self._measured(view, step.needs, tuple(modules), measurement, keep)
        return {name: found[name] for name in step.needs.weight_gradients}

    def _measured(
        self,
        view: DecoderView,
        needs: Needs,
        layers: Sequence[int],
        measurement: Callable[[int], Measurement],
        keep: Callable[[int, Statistics], None],
    ) -> None:
        """Measure some layers: forward only, or forward and then backward from the last layer."""
        if not layers:
            return
        module, first, last = CalibrationModule(view), min(layers), max(layers)
        visit = _visiting(module, layers, measurement, keep)
        if not needs.is_backward:
            until = next((i for i in view.layer_indices if i > last), None)
            with self._sweep(view, 1) as sweep:
                sweep.up("measuring inputs", until=until, visit=visit)
            return
        with self._sweep(view, sum(index >= first for index in view.layer_indices)) as sweep:
            top = view.layer_indices[-1]
            sweep.up("keeping hidden states", until=top, kept_from=first)
            sweep.down("measuring gradients", first, needs.fisher, visit)


def check_needs(needs: Needs) -> None:
    """Refuse a step that needs more than sums over the tokens of single layers.

    Raises:
        ConfigError: If it does.
    """
    empty = Needs()
    for name in Needs.__dataclass_fields__:
        if name not in _MEASURED and getattr(needs, name) != getattr(empty, name):
            raise ConfigError(
                f"model.loading is streamed, but the method needs {name} of the whole model: set "
                "model.loading=whole"
            )


def _visiting(
    module: CalibrationModule,
    layers: Sequence[int],
    measurement: Callable[[int], Measurement],
    keep: Callable[[int, Statistics], None],
) -> Visit:
    """Return what measures each of some layers while it runs."""

    @contextmanager
    def visit(index: int) -> Iterator[Visitor]:
        if index not in layers:
            with unseen(index) as visitor:
                yield visitor
            return
        seen = measurement(index)
        seen.start(module)
        try:
            yield _Measuring(seen)
        except BaseException:
            seen.close()
            raise
        seen.finish(module)
        ((_, stats),) = module.measured
        module.measured.clear()
        keep(index, stats)

    return visit


class _Measuring:
    """Tells a measurement about each batch."""

    def __init__(self, measurement: Measurement) -> None:
        self._measurement = measurement

    def before(self, batch: Mapping[str, Tensor]) -> None:
        """Announce the batch."""
        self._measurement.start_batch(batch)

    def after(self, batch: Mapping[str, Tensor]) -> None:
        """Record which windows were counted."""
        self._measurement.windows += batch["index"].tolist()


def _on_cpu(moments: Moments) -> Moments:
    parts = {name: getattr(moments, name) for name in Moments.__dataclass_fields__}
    return Moments(**{key: None if part is None else part.cpu() for key, part in parts.items()})
