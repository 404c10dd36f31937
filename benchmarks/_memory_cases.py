"""One measuring process: calibrate or compensate, and record the peak of each part."""

import gc
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any, Final, Literal

import lightning as L
import torch
import transformers
from lightning.pytorch.strategies import DDPStrategy

from grasp_lightning import processes
from grasp_lightning.callbacks.expected_warnings import expected_warnings
from grasp_lightning.callbacks.measure import TrainerMeasure
from grasp_lightning.callbacks.placement import placement
from grasp_lightning.callbacks.trainable import TrainableParameters
from grasp_lightning.config import (
    CalibrationConfig,
    LoraSettings,
    MethodConfig,
    ModelConfig,
    OptimizerConfig,
    Strategy,
    TextConfig,
    TrainerConfig,
    TrainingConfig,
)
from grasp_lightning.data.datamodules import CalibrationData, TextData
from grasp_lightning.evaluation.peak_memory import forget_peak, peak_bytes
from grasp_lightning.memory.calibration import (
    calibration_activations,
    calibration_memory,
    decomposition_bytes,
)
from grasp_lightning.memory.compensation import (
    compensation_activations,
    compensation_memory,
    trained_parameters,
)
from grasp_lightning.memory.model_shape import model_shape
from grasp_lightning.memory.shapes import Adapters, ModelShape, Pass, Scored
from grasp_lightning.methods import build_method, resolve_method
from grasp_lightning.methods.base import CompressionMethod
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.loading import LoadedModel, load_meta_model, load_model
from grasp_lightning.models.sharding import process_mesh, shard
from grasp_lightning.models.surgery import apply_operations
from grasp_lightning.plan import Plan
from grasp_lightning.training.compensation import CompensationModule
from grasp_lightning.training.strategies import is_deepspeed, is_sharded_strategy, sharded_strategy

_CPU: Final = torch.device("cpu")
_NUM_STEPS: Final = 2  # from the second step on, optimizer states exist
_GRADIENT_CLIP: Final = OptimizerConfig().gradient_clip
_NUM_PARTS: Final = 2  # micro-batches per step: from the second on, gradients exist

Stage = Literal["calibration", "compensation"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One measurement.

    Attributes:
        stage: What runs.
        batch_size: Windows per forward pass.
        seqlen: Tokens per window.
        num_layers: Calibration: number of layers that are replaced, the topmost ones.
        rank: Compensation: rank of the adapters.
        checkpointing: Compensation: recompute activations in the backward pass.
        num_processes: Number of processes.
        strategy: What the processes shard; no effect with one process.
    """

    stage: Stage
    batch_size: int
    seqlen: int
    num_layers: int = 0
    rank: int = 0
    checkpointing: bool = False
    num_processes: int = 1
    strategy: Strategy = "ddp"


def measure(case: Case, model: str) -> dict[str, int]:
    """Run one case in this process, which should be a fresh one.

    Args:
        case: What to run.
        model: Hugging Face folder.

    Returns:
        Resident bytes: ``libraries`` (before the model is loaded), ``loaded`` (with model,
        tokenizer and text), and the peak of every part.
    """
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # untyped there
    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(f"{library}.utilities.rank_zero").setLevel(logging.WARNING)
    _touch_libraries()
    if is_deepspeed(case.strategy):
        _let_deepspeed_use_cpus()
    peaks = _Peaks()
    peaks.note_now("libraries")
    loaded = load_model(ModelConfig(path=model, dtype="float32", device="cpu"))
    _make_resident(loaded)
    if case.stage == "calibration":
        _calibrate(case, loaded, peaks)
    else:
        _compensate(case, loaded, peaks)
    return peaks.bytes


def measure_in_group(case: Case, model: str, rank: int, port: int) -> dict[str, int]:
    """Measure as one of the processes of the case.

    Args:
        case: What to run.
        model: Hugging Face folder.
        rank: Number of this process.
        port: A free port.

    Returns:
        As ``measure``.
    """
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(case.num_processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    processes.join(_CPU)
    try:
        return measure(case, model)
    finally:
        processes.leave()


class _Peaks:
    """Resident bytes of this process, by name."""

    def __init__(self) -> None:
        self.bytes: dict[str, int] = {}

    def note_now(self, name: str) -> None:
        """Record the bytes that are resident now."""
        gc.collect()
        forget_peak(_CPU)
        self.bytes[name] = peak_bytes(_CPU)

    @contextmanager
    def noted(self, name: str) -> Iterator[None]:
        """Record the peak of a ``with`` block; of several blocks, the highest."""
        forget_peak(_CPU)
        yield
        self.bytes[name] = max(self.bytes.get(name, 0), peak_bytes(_CPU))


def _touch_libraries() -> None:
    """Load lazily loaded code."""
    torch.linalg.svd(torch.eye(2))
    weight = torch.nn.Parameter(torch.ones(2, 2))
    weight.sum().backward()  # type: ignore[no-untyped-call]  # untyped in torch
    torch.optim.AdamW([weight]).step()


def _make_resident(loaded: LoadedModel) -> None:
    """Copy every weight: weights are memory-mapped from a file, which is freed with the last."""
    for parameter in loaded.model.parameters():
        parameter.data = parameter.detach().clone()


def _let_deepspeed_use_cpus() -> None:
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    import_module("tests.integration.cpu_deepspeed")
    # Starting an engine loads 50 MB of code, which is not part of a model's memory.
    module = torch.nn.Linear(2, 2)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1}}
    config |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    deepspeed = import_module("deepspeed")
    deepspeed.init_distributed("gloo")
    deepspeed.initialize(
        model=module, optimizer=torch.optim.AdamW(module.parameters()), config=config
    )


def _calibrate(case: Case, loaded: LoadedModel, peaks: _Peaks) -> None:
    num_samples = case.batch_size * case.num_processes
    config = CalibrationConfig(
        source="pydoc", num_samples=num_samples, seqlen=case.seqlen, batch_size=case.batch_size
    )
    view = DecoderView(loaded.model)
    data = CalibrationData(config, loaded.tokenizer, seed=0)
    assert len(data.windows) == num_samples  # the text is read here
    peaks.note_now("loaded")
    if case.strategy == "fsdp":
        shard(loaded.model, process_mesh(_CPU), _CPU)
    layers = view.layer_indices[-case.num_layers :]
    method = build_method(
        resolve_method(MethodConfig(name="grasp", preset="paper", layers=layers, keep_ratio=0.1)),
        view,
    )
    trainer = TrainerConfig(devices=case.num_processes, strategy=case.strategy)
    measure_step = TrainerMeasure(data, trainer, progress=False)
    _run_steps(view, method, measure_step, peaks)


def _run_steps(
    view: DecoderView, method: CompressionMethod, measure_step: TrainerMeasure, peaks: _Peaks
) -> None:
    """Compress as ``pipeline.compress`` does, and record the peak of each part."""
    plan = Plan(method=method.name, options=method.options)
    for _ in ("select", "attribution"):
        with peaks.noted("factorize"):
            step = method.next_step(view, plan)
        assert step is not None  # one_shot takes these two
        with peaks.noted("attribution"):
            stats = measure_step(view, step)
        with peaks.noted("replace"):
            decision = method.decide(step, view, stats)
            apply_operations(view, decision.operations, decision.tensors)
        plan = plan.extended(decision.operations)


def _compensate(case: Case, loaded: LoadedModel, peaks: _Peaks) -> None:
    rows = case.batch_size * case.num_processes * _NUM_PARTS
    training = TrainingConfig(
        batch_size=rows, micro_batch_size=case.batch_size, max_steps=_NUM_STEPS
    )
    text = TextConfig(
        source="pydoc", num_samples=_NUM_STEPS * rows, num_validation=0, seqlen=case.seqlen
    )
    module = CompensationModule(loaded.model, OptimizerConfig(warmup_steps=1))
    trainable = TrainableParameters(
        "lora", LoraSettings(rank=case.rank), gradient_checkpointing=case.checkpointing
    )
    data = TextData(text, loaded.tokenizer, training, seed=0)
    assert len(data.samples.train) > 0  # the text is read here
    peaks.note_now("loaded")
    with peaks.noted("training"), expected_warnings():
        trainer = L.Trainer(
            accelerator="cpu",
            **_placement(case),
            max_epochs=1,
            limit_val_batches=0,
            callbacks=[trainable],
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            inference_mode=False,
            use_distributed_sampler=False,
        )
        trainer.fit(module, datamodule=data)


def predict(records: Sequence[Mapping[str, Any]], model: str) -> list[dict[str, int]]:
    """Return what ``plan`` predicts for some cases.

    Args:
        records: Cases, as mappings.
        model: Hugging Face folder.

    Returns:
        Bytes of weights (``loaded``) and of every part, without libraries.
    """
    view = DecoderView(load_meta_model(ModelConfig(path=model, dtype="float32")))
    shape = model_shape(view)
    keys = [field.name for field in fields(Case)]
    cases = [Case(**{key: record[key] for key in keys}) for record in records]
    return [
        _predict_calibration(case, shape)
        if case.stage == "calibration"
        else _predict_compensation(case, shape)
        for case in cases
    ]


def _predict_calibration(case: Case, shape: ModelShape) -> dict[str, int]:
    layers = tuple(range(len(shape.layers)))[-case.num_layers :]
    linears = tuple(x for index in layers for x in shape.layers[index].linears.values())
    scored = Scored(linears=linears, lowest=min(layers), num_layers=len(layers))
    run = Pass(batch_size=case.batch_size, seqlen=case.seqlen, on_cpu=True)
    num_parts = case.num_processes if case.strategy == "fsdp" else 1
    memory = calibration_memory(shape, (), run, scored, num_parts=num_parts)
    held = memory.weights + memory.statistics
    return {
        "loaded": shape.weights,
        "factorize": held + decomposition_bytes(linears[-1]),
        "attribution": held + calibration_activations(shape, run, scored),
    }


def _predict_compensation(case: Case, shape: ModelShape) -> dict[str, int]:
    adapters = Adapters(rank=case.rank)
    run = Pass(batch_size=case.batch_size, seqlen=case.seqlen, on_cpu=True)
    activations = compensation_activations(shape, run, adapters, is_checkpointed=case.checkpointing)
    memory, host = compensation_memory(
        shape,
        case.strategy,
        case.num_processes,
        trained=trained_parameters(shape, adapters),
        is_new=True,
        activations=activations,
    )
    return {"loaded": shape.weights, "training": memory.total + host}


def _placement(case: Case) -> dict[str, Any]:  # Any: arguments of a Trainer
    arguments = placement(TrainerConfig(devices=case.num_processes), _CPU)
    if is_sharded_strategy(case.strategy):
        arguments["strategy"] = sharded_strategy(case.strategy, _GRADIENT_CLIP)
    elif case.num_processes > 1:
        arguments["strategy"] = DDPStrategy(broadcast_buffers=False)
    return arguments
