"""What a finished compression writes into its run folder."""

import math
import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from grasp_lightning import __version__
from grasp_lightning.evaluation.phases import Phases, peak_memory_bytes
from grasp_lightning.models.checkpoint import save_model
from grasp_lightning.models.loading import LoadedModel
from grasp_lightning.models.size import ModelSize
from grasp_lightning.models.verification import verify_saved
from grasp_lightning.plan import Plan
from grasp_lightning.reporting.card import model_card
from grasp_lightning.reporting.linears import predicted_losses
from grasp_lightning.reporting.metrics import DecoderLinears, LossChange, Metrics, Pair, Seconds
from grasp_lightning.reporting.page import render_report
from grasp_lightning.run_folder import RunFolder

_PACKAGES = ("torch", "lightning", "transformers", "torchmetrics", "safetensors")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a compression leads to, before it is written.

    Attributes:
        loaded: The compressed model, its tokenizer and its origin.
        plan: All decisions.
        scores: What they were made from, as stored in scores.safetensors.
        factors: Factors of low-rank linears, ``<module>.left`` and ``<module>.right``, and weights
            of what reads the channels of narrowed MLPs, ``<module>.weight``.
        num_inputs: Number of inputs of every linear in decoder layers of the dense model.
        sizes: Size before and after.
        perplexity: On held-out text, before and after.
        perplexity_tokens: Number of predicted tokens behind each perplexity.
        settings: The resolved configuration as plain values.
        generates: Whether the dense model generates with its cache.
    """

    loaded: LoadedModel
    plan: Plan
    scores: Mapping[str, Tensor]
    factors: Mapping[str, Tensor]
    num_inputs: Mapping[str, int]
    sizes: Pair[ModelSize]
    perplexity: Pair[float | None]
    perplexity_tokens: int
    settings: Mapping[str, Any]  # Any: values of YAML
    generates: bool = True


def write_outputs(run: RunFolder, outcome: Outcome, phases: Phases) -> Metrics:
    """Write model, plan, scores, factors, metrics and report.

    Args:
        run: The run folder.
        outcome: What was done.
        phases: Times so far; saving and verifying are added.

    Returns:
        The metrics as written.
    """
    dtype = outcome.loaded.model.dtype
    with phases("save", excluding=("verify",)):
        _write_model(run, outcome, phases)
        _write_tensors(run, "scores.safetensors", outcome.scores, torch.float32)
        _write_tensors(run, "factors.safetensors", outcome.factors, dtype)
        run.write_text("plan.json", outcome.plan.to_json())
    metrics = _metrics(outcome, phases)
    report = render_report(metrics, outcome.plan, outcome.scores, outcome.settings)
    run.write_text("report.html", report)
    run.write_json("metrics.json", metrics.to_dict())
    return metrics


def _write_model(run: RunFolder, outcome: Outcome, phases: Phases) -> None:
    origin = outcome.loaded.origin
    card = model_card(
        _metrics(outcome, phases),
        outcome.plan,
        origin_name=origin.name,
        licence=origin.licence,
        licence_files=[file.name for file in origin.licence_files],
        config=outcome.settings,
    )
    with run.new_folder("model") as folder:
        save_model(outcome.loaded.model, folder, tokenizer=outcome.loaded.tokenizer)
        for file in origin.licence_files:
            shutil.copyfile(file, folder / file.name)
        (folder / "README.md").write_text(card, encoding="utf-8")
        with phases("verify"):
            verify_saved(outcome.loaded.model, folder, generates=outcome.generates)


def _write_tensors(
    run: RunFolder, name: str, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    """Write tensors, or nothing where there are none (a method that only drops layers)."""
    if tensors:
        # Copies: two names may stand for one tensor, which safetensors refuses.
        stored = {key: value.to(dtype).cpu().contiguous().clone() for key, value in tensors.items()}
        run.write_with(name, _saver(stored))


def _saver(tensors: dict[str, Tensor]) -> Callable[[Path], None]:
    return lambda path: save_file(tensors, path)


def _metrics(outcome: Outcome, phases: Phases) -> Metrics:
    dense, compressed = outcome.sizes.dense, outcome.sizes.compressed
    seconds = {phase.name: phases.seconds.get(phase.name) for phase in fields(Seconds)}
    return Metrics(
        model=outcome.loaded.origin.name,
        method=outcome.plan.method,
        dtype=str(outcome.loaded.model.dtype).removeprefix("torch."),
        layers=outcome.plan.selected_layers or (),
        removed_ratio=1 - compressed.parameters / dense.parameters,
        parameters=Pair(dense=dense.parameters, compressed=compressed.parameters),
        bytes=Pair(dense=dense.bytes, compressed=compressed.bytes),
        decoder_linears=DecoderLinears(
            parameters=Pair(
                dense=dense.decoder_linear_parameters,
                compressed=compressed.decoder_linear_parameters,
            ),
            bytes=Pair(
                dense=dense.decoder_linear_bytes, compressed=compressed.decoder_linear_bytes
            ),
        ),
        channels={
            reader: Pair(dense=outcome.num_inputs[reader], compressed=kept)
            for reader, kept in outcome.plan.channels.items()
        },
        source_bytes=outcome.loaded.origin.source_bytes,
        perplexity=outcome.perplexity,
        perplexity_tokens=outcome.perplexity_tokens,
        loss_change=_loss_change(outcome),
        seconds=Seconds(**{**seconds, "total": phases.total}),
        peak_memory_bytes=peak_memory_bytes(),
        versions=package_versions(),
    )


def _loss_change(outcome: Outcome) -> LossChange:
    predicted = predicted_losses(outcome.plan, outcome.scores)
    dense, compressed = outcome.perplexity.dense, outcome.perplexity.compressed
    return LossChange(
        predicted=sum(predicted.values()) if predicted else None,
        measured=math.log(compressed / dense) if dense and compressed else None,
    )


def package_versions(*more: str) -> dict[str, str]:
    """Return the versions of what a run was made with.

    Args:
        *more: Packages that this kind of run uses beside the usual ones.

    Returns:
        Version by package name.
    """
    packages = {package: version(package) for package in (*_PACKAGES, *more)}
    return {"grasp_lightning": __version__, "python": platform.python_version(), **packages}
