"""Inputs of ``compress``: model, method and texts, checked before any measurement."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from grasp_lightning import __version__, processes
from grasp_lightning.callbacks.placement import check_trainer, is_split
from grasp_lightning.commands.stages import LOAD
from grasp_lightning.commands.streamed import check_chain
from grasp_lightning.commands.vocabulary import shares_of_the_rest, vocabulary_of
from grasp_lightning.config import CompressConfig
from grasp_lightning.config.values import check_values
from grasp_lightning.data.datamodules import CalibrationData
from grasp_lightning.data.mixture import mixture_parts
from grasp_lightning.data.section_windows import evaluation_windows
from grasp_lightning.data.windows import TokenWindows
from grasp_lightning.errors import ConfigError, ModelError
from grasp_lightning.evaluation.phases import Phases
from grasp_lightning.methods import build_method
from grasp_lightning.methods.base import CompressionMethod
from grasp_lightning.methods.prediction import Prediction
from grasp_lightning.models.calls import check_length, check_vocabulary, leave_uncalled
from grasp_lightning.models.checkpoint import check_not_quantized
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.in_memory import ModelInMemory
from grasp_lightning.models.integrity import config_values
from grasp_lightning.models.loading import LoadedModel, load_model, model_hash, resolve_device
from grasp_lightning.models.sharding import check_runs, is_sharded, process_mesh, shard
from grasp_lightning.models.streamed import streamed_weights
from grasp_lightning.models.streamed_loading import load_streamed
from grasp_lightning.models.verification import can_generate
from grasp_lightning.models.vocabulary.ends import special_tokens
from grasp_lightning.progress import track
from grasp_lightning.reporting.trimming import TrimFacts
from grasp_lightning.run_folder import RunFolder
from grasp_lightning.storage.progress import check_same_model
from grasp_lightning.storage.recut import StoredScores
from grasp_lightning.storage.sampled_text import SAMPLE, SampledText
from grasp_lightning.storage.shared import SharedFolder
from grasp_lightning.training.hidden_cache import check_independent

_PACKAGES = ("torch", "transformers")  # which compute the model
_SAFETY = 1.1  # tokenizer, report and logs, in addition to weights and factors


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The checked inputs of a run; the budget of the method is what trimming left of it.

    Attributes:
        text: Writes calibration text with the model.
        data: Calibration windows; None if stored scores are enough.
        stored: Stored scores to cut again; None if the run measures.
        shared: Measurements that runs share; None if this one shares nothing.
        hashes: Hashes of the model and of the windows, for the plan.
        token_counts: How often a larger text uses each token, ``(V,)``; None without one.
        trim: What trimming the vocabulary removed before anything else, if it did.
        generates: Whether the model generates with its cache.
    """

    loaded: LoadedModel
    view: DecoderView
    method: CompressionMethod
    held_out: TokenWindows
    text: SampledText
    data: CalibrationData | None
    stored: StoredScores | None
    shared: SharedFolder | None
    hashes: Mapping[str, str]
    bytes_needed: int
    generates: bool
    token_counts: Tensor | None = None
    trim: TrimFacts | None = None


def prepare(
    config: CompressConfig,
    phases: Phases,
    run: RunFolder | None = None,
    given: ModelInMemory | None = None,
) -> Inputs:
    """Load model and text; input that does not fit is a ``GraspError`` before anything is measured.

    The method of ``config`` must be resolved. ``run`` stores generated text once it is open. A
    ``given`` model is copied, and none is loaded.
    """
    check_values(config)
    mixture_parts(config.calibration, "calibration")  # conflicting keys are an error
    check_trainer(config.trainer, resolve_device(config.model.device))
    stored = None
    if config.from_scores is not None:
        stored = StoredScores(config.from_scores)
        # The requested scores are stored already, or not available.
        config = replace(config, method=replace(config.method, score_all_layers=None))
    with phases(LOAD, excluding=(SAMPLE,)):
        loaded, digest = _load(config, given)
        vocabulary = vocabulary_of(config, loaded, digest)
        loaded, hashes = vocabulary.loaded, dict(vocabulary.hashes)
        config = replace(config, method=vocabulary.method)
        digest = hashes["model"]
        view = DecoderView(loaded.model)
        view.special_tokens = special_tokens(loaded.tokenizer)
        is_streamed = streamed_weights(loaded.model) is not None
        if is_streamed:
            check_chain(view, config.method)
        leave_uncalled(view)
        with shares_of_the_rest(vocabulary.facts):
            method = build_method(config.method, view, track)
            check_independent(view, config.method, skips_parts=method.skips_parts)
            prediction = method.predict(view)
        shared = _shared(config, loaded, digest, phases)
        text = SampledText(
            lambda: loaded.model,
            digest,
            phases,
            earlier=None if config.from_scores is None else Path(config.from_scores),
            shared=shared,
            track=track,
        )
        if run is not None:
            check_same_model(run, digest)
            text.keep_in(run)
        check_length(view, config.evaluation.seqlen, "evaluation.seqlen")
        held_out = evaluation_windows(config.evaluation, loaded.tokenizer)
        check_vocabulary(view, held_out.input_ids)
        data = None
        if stored is not None:
            stored.check_vocabulary(hashes, config.method.embeddings)
            stored.check(digest, method.options)
            hashes |= stored.inputs
        if stored is None or "refit" in method.options:
            if stored is not None:
                stored.check_windows({"seed": str(config.seed)})
            data = _calibration(config, loaded, view, text)
            if stored is not None:
                stored.check_windows(data.fingerprint)
            hashes |= data.fingerprint
        # Reading all layers for each token would take long.
        generates = is_streamed or is_sharded(loaded.model) or can_generate(loaded.model)
    return Inputs(
        loaded=loaded,
        view=view,
        method=method,
        held_out=held_out,
        text=text,
        data=data,
        stored=stored,
        shared=shared,
        hashes=hashes,
        bytes_needed=bytes_needed(prediction, loaded.model.dtype),
        generates=generates,
        token_counts=vocabulary.counts,
        trim=vocabulary.facts,
    )


def _shared(
    config: CompressConfig, loaded: LoadedModel, digest: str, phases: Phases
) -> SharedFolder | None:
    """Return the shared measurements of this model, if the run shares any."""
    if config.statistics.shared is None:
        return None
    model = loaded.model
    kind = type(model)
    facts = {
        "model": digest,
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "config": json.loads(json.dumps(config_values(model), sort_keys=True, default=str)),
        "attention": str(model.config._attn_implementation),
        "device": model.device.type,
        "versions": {"grasp_lightning": __version__, **{k: version(k) for k in _PACKAGES}},
    }
    return SharedFolder(Path(config.statistics.shared).expanduser(), facts, phases)


def bytes_needed(prediction: Prediction, dtype: torch.dtype) -> int:
    """Return the bytes that a run writes, about."""
    return int(_SAFETY * (prediction.most + prediction.factors) * dtype.itemsize)


def check_num_windows(config: CompressConfig, num_processes: int) -> None:
    """Raise a ``ConfigError`` if there are fewer calibration windows than processes."""
    if config.calibration.num_samples < num_processes:
        raise ConfigError(
            f"calibration.num_samples is {config.calibration.num_samples}, fewer than the "
            f"{num_processes} processes: use fewer processes or more windows"
        )


def _calibration(
    config: CompressConfig, loaded: LoadedModel, view: DecoderView, text: SampledText
) -> CalibrationData:
    check_length(view, config.calibration.seqlen, "calibration.seqlen")
    check_num_windows(config, processes.num_processes())
    data = CalibrationData(config.calibration, loaded.tokenizer, config.seed, sample=text)
    check_vocabulary(view, data.windows.input_ids)
    return data


def _load(config: CompressConfig, given: ModelInMemory | None) -> tuple[LoadedModel, str]:
    """Return the model and the hash of its weights.

    The processes of a node read a sharded model one by one: memory holds one whole model at a time,
    and no device ever does.

    Raises:
        ConfigError: If a given model would have to be sharded.
    """
    if given is not None:
        if is_split(config.trainer):
            raise ConfigError(
                f"trainer.strategy is {config.trainer.strategy}, but the model is already in "
                "memory: give its path instead"
            )
        return given.copied(), given.digest
    if config.model.loading == "streamed":
        return load_streamed(config.model)
    if not is_split(config.trainer):
        loaded = load_model(config.model)
        check_not_quantized(loaded.model, ModelError)
        return loaded, model_hash(loaded.model)
    device = resolve_device(config.model.device)
    mesh = process_mesh(device)

    def work() -> tuple[LoadedModel, str]:
        loaded = load_model(replace(config.model, device="cpu"))
        check_not_quantized(loaded.model, ModelError)
        digest = model_hash(loaded.model) if processes.is_first() else ""
        shard(loaded.model, mesh, device)
        return loaded, digest

    loaded, digest = processes.in_turns(work)
    check_runs(loaded.model)
    return loaded, processes.on_first(lambda: digest)
