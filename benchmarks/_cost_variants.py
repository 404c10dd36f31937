"""One measuring process: load a model, run one variant, and measure its cost."""

import gc
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Final

import torch
import transformers
from _meters import PassCounter
from _reference import Gradients, Kept, ReferenceProcedure, block_groups

from grasp_lightning.callbacks.measure import TrainerMeasure
from grasp_lightning.config import CalibrationConfig, MethodConfig, ModelConfig, TrainerConfig
from grasp_lightning.data.datamodules import CalibrationData
from grasp_lightning.data.section_windows import calibration_windows
from grasp_lightning.data.windows import TokenWindows, batches
from grasp_lightning.evaluation.peak_memory import forget_peak, peak_bytes
from grasp_lightning.linalg.factors import factorize
from grasp_lightning.methods import build_method, resolve_method
from grasp_lightning.models.decoder import DecoderView, frozen
from grasp_lightning.models.loading import load_model
from grasp_lightning.models.next_token import forward_inputs, next_token_losses
from grasp_lightning.pipeline import compress
from grasp_lightning.plan import FactorizeLinear, Plan
from grasp_lightning.stats.observer import LinearObserver

_CPU: Final = TrainerConfig(accelerator="cpu")
_CPU_DEVICE: Final = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class CostSettings:
    """The settings of all variants.

    Attributes:
        model: Hugging Face folder.
        data: ``pydoc``, or a text file.
        layers: Layers that are replaced.
        keep_ratio: Share of each matrix's parameters that its factors keep.
        windows: Number of calibration windows.
        seqlen: Tokens per window.
        batch_size: Windows per forward pass; the reference procedure always takes 1.
        seed: Seed of the windows.
        estimate_blocks: Blocks on which the reference procedure is timed; None takes all.
    """

    model: str
    data: str
    layers: tuple[int, ...]
    keep_ratio: float
    windows: int
    seqlen: int
    batch_size: int
    seed: int
    estimate_blocks: int | None = None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The cost of one run of one variant.

    Attributes:
        seconds: Wall-clock time, without loading and the choice of windows.
        cpu_seconds: Time of all threads.
        passes: How often each window passed through the topmost decoder layer.
        layer_passes: The same, averaged over all decoder layers.
        peak_bytes: Highest resident memory during the measurement.
        loaded_bytes: Resident memory before it, with the model loaded.
        parts: Seconds of the timed parts of the work.
        kept: Kept components by module.
        scale: Factor by which times and passes were scaled up from the timed blocks; 1 if measured.
        threads: Threads of torch.
    """

    seconds: float
    cpu_seconds: float
    passes: float
    layer_passes: float
    peak_bytes: int
    loaded_bytes: int
    parts: Mapping[str, float]
    kept: Kept
    scale: float
    threads: int


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    kept: Kept = field(default_factory=dict)
    parts: Mapping[str, float] = field(default_factory=dict)
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class _Job:
    settings: CostSettings
    view: DecoderView
    data: CalibrationData


def measure(variant: str, settings: CostSettings) -> Measured:
    """Run one variant in this process, which should be a fresh one.

    Args:
        variant: A key of ``VARIANTS``.
        settings: The settings.

    Returns:
        Its cost.
    """
    job = _prepare(settings)
    passes = PassCounter(job.view)
    forget_peak(_CPU_DEVICE)
    loaded_bytes = peak_bytes(_CPU_DEVICE)
    with passes.attached():
        wall, cpu = time.perf_counter(), time.process_time()
        outcome = VARIANTS[variant](job)
        seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
    windows, scale = settings.windows, outcome.scale
    return Measured(
        seconds=seconds * scale,
        cpu_seconds=cpu_seconds * scale,
        passes=passes.counts[-1] / windows * scale,
        layer_passes=sum(passes.counts) / len(passes.counts) / windows * scale,
        peak_bytes=peak_bytes(_CPU_DEVICE),
        loaded_bytes=loaded_bytes,
        parts=outcome.parts,
        kept=outcome.kept,
        scale=scale,
        threads=torch.get_num_threads(),
    )


def choose_layers(settings: CostSettings, num_layers: int) -> tuple[int, ...]:
    """Return the layers that similarity chooses on the calibration windows.

    Args:
        settings: The settings; ``layers`` is not read.
        num_layers: How many.

    Returns:
        Indices, ascending.
    """
    job = _prepare(settings)
    plan = _compress(job, MethodConfig(name="drop", num_layers=num_layers))
    assert plan.selected_layers is not None
    return plan.selected_layers


def _prepare(settings: CostSettings) -> _Job:
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # untyped there
    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(f"{library}.utilities.rank_zero").setLevel(logging.WARNING)
    loaded = load_model(ModelConfig(path=settings.model, dtype="float32", device="cpu"))
    is_file = settings.data != "pydoc"
    config = CalibrationConfig(
        source="file" if is_file else "pydoc",
        path=settings.data if is_file else None,
        num_samples=settings.windows,
        seqlen=settings.seqlen,
        batch_size=settings.batch_size,
    )
    windows = calibration_windows(config, loaded.tokenizer, settings.seed)
    view = DecoderView(loaded.model)
    _warm_up(view, windows)
    data = CalibrationData(config, loaded.tokenizer, settings.seed, windows=windows)
    return _Job(settings=settings, view=view, data=data)


def _warm_up(view: DecoderView, windows: TokenWindows) -> None:
    """Load memory-mapped weights and lazily loaded code."""
    with frozen(view.model), torch.no_grad():
        view.model(**forward_inputs(windows.batch([0])), use_cache=False)
    torch.linalg.svd(torch.eye(2))
    gc.collect()


def _reference(gradients: Gradients, job: _Job) -> _Outcome:
    groups = block_groups(job.view, job.settings.layers)
    timed = _spread(len(groups), job.settings.estimate_blocks)
    windows = list(batches(job.data.windows, batch_size=1))
    procedure = ReferenceProcedure(
        view=job.view, windows=windows, keep_ratio=job.settings.keep_ratio, gradients=gradients
    )
    kept = procedure.run([groups[number] for number in timed])
    return _Outcome(kept=kept, scale=len(groups) / len(timed))


def _spread(total: int, count: int | None) -> list[int]:
    """Return ``count`` of ``total`` numbers, evenly spread; None takes all."""
    if count is None or count >= total:
        return list(range(total))
    return [int((position + 0.5) * total / count) for position in range(count)]


def _ours(method: MethodConfig, job: _Job) -> _Outcome:
    plan = _compress(job, method)
    replaced = [op for op in plan.operations if isinstance(op, FactorizeLinear)]
    return _Outcome(kept={op.module: list(op.components or ()) for op in replaced})


def _compress(job: _Job, config: MethodConfig) -> Plan:
    method = build_method(resolve_method(config), job.view)
    plan = Plan(method=method.name, options=method.options, inputs={})
    measure_step = TrainerMeasure(job.data, _CPU, progress=False)
    return compress(job.view, method, measure_step, plan, lambda *_: None)


def _one_shot(job: _Job) -> _Outcome:
    settings = job.settings
    return _ours(
        MethodConfig(
            name="grasp", preset="paper", layers=settings.layers, keep_ratio=settings.keep_ratio
        ),
        job,
    )


def _one_shot_choosing(job: _Job) -> _Outcome:
    settings = job.settings
    num_layers = len(settings.layers)
    return _ours(
        MethodConfig(
            name="grasp", preset="paper", num_layers=num_layers, keep_ratio=settings.keep_ratio
        ),
        job,
    )


def _iterative(job: _Job) -> _Outcome:
    settings = job.settings
    return _ours(
        MethodConfig(
            name="grasp", preset="released", layers=settings.layers, keep_ratio=settings.keep_ratio
        ),
        job,
    )


def _floor(job: _Job) -> _Outcome:
    """Do only the work that no implementation can avoid."""
    view, settings = job.view, job.settings
    parts: dict[str, float] = {}
    linears = [linear for index in settings.layers for linear in view.linears(index).values()]
    lowest = next(iter(view.linears(min(settings.layers))))
    with _timed(parts, "svd"):
        for linear in linears:
            factorize(linear.weight)
    with _timed(parts, "forward"), frozen(view.model), torch.no_grad():
        for batch in batches(job.data.windows, settings.batch_size):
            view.model.base_model(**forward_inputs(batch), use_cache=False)
    # Observing one linear of the lowest layer makes the backward pass end there.
    observer = LinearObserver(view, (lowest,), lambda *_: None)
    with _timed(parts, "backward"), frozen(view.model), observer.attached():
        for batch in batches(job.data.windows, settings.batch_size):
            logits = view.model(**forward_inputs(batch), use_cache=False).logits
            losses = next_token_losses(logits, batch["input_ids"], batch["targets"])
            losses.sum().backward()  # type: ignore[no-untyped-call]  # untyped in torch
    return _Outcome(parts=parts)


@contextmanager
def _timed(parts: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    parts[name] = time.perf_counter() - start


VARIANTS: Final[Mapping[str, Callable[[_Job], _Outcome]]] = MappingProxyType(
    {
        "reference_frozen": partial(_reference, "sigma"),
        "reference_factors": partial(_reference, "factors"),
        "reference_all": partial(_reference, "all"),
        "one_shot": _one_shot,
        "one_shot_choosing": _one_shot_choosing,
        "iterative": _iterative,
        "floor": _floor,
    }
)
