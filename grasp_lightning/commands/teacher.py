"""The dense model behind a compensation: it teaches, and writes text. Loaded only if needed."""

import gc
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grasp_lightning import processes
from grasp_lightning.config import CompensateConfig, ModelConfig
from grasp_lightning.config.compensate_settings import needs_dense, uses_self
from grasp_lightning.data.datamodules import TrainingData
from grasp_lightning.errors import ConfigError, ModelError
from grasp_lightning.evaluation.phases import Phases
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.loading import LoadedModel, load_model, load_without_weights
from grasp_lightning.models.model_settings import named_by
from grasp_lightning.models.source import resolve_source, source_hash
from grasp_lightning.models.streamed_loading import check_streamable, load_streamed
from grasp_lightning.progress import track
from grasp_lightning.run_folder import RunFolder
from grasp_lightning.storage.sampled_text import SampledText
from grasp_lightning.storage.shared import SharedFolder
from grasp_lightning.storage.teacher_cache import TEACHER, Facts, TeacherCache
from grasp_lightning.training.compensation import CachedTeacher, Teacher, predictions_of


def teacher_settings(config: CompensateConfig) -> ModelConfig:
    """Return which model teaches, and how it is loaded."""
    assert config.distillation.teacher is not None  # checked with the other settings
    device = config.distillation.device
    return replace(
        config.model,
        path=config.distillation.teacher,
        revision=None,
        gguf_file=None,
        device=config.model.device if device == "auto" else device,
    )


class DenseModel:
    """The dense model of a configuration that names one.

    Its vocabulary is checked at once, without its weights.

    Args:
        config: The configuration.
        trained: The model that is trained.
        tokenizer: The tokenizer of that model.

    Raises:
        ModelError: If the two vocabularies differ.
        ConfigError: If the cache is to keep more tokens than there are.
    """

    def __init__(
        self,
        config: CompensateConfig,
        trained: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        self._settings = teacher_settings(config)
        self._model: PreTrainedModel | None = None
        if self._settings.loading == "streamed":
            try:
                check_streamable(self._settings)
            except ConfigError as error:
                raise ConfigError(f"distillation.teacher: {error}") from error
        with named_by("distillation.teacher"):
            model, own_tokenizer = load_without_weights(self._settings)
            name = resolve_source(self._settings).name
        self.dtype = model.dtype
        self._empty = model
        self.vocabulary = int(model.config.get_text_config().vocab_size)
        size = trained.config.get_text_config().vocab_size
        if self.vocabulary != size or own_tokenizer.get_vocab() != tokenizer.get_vocab():
            raise ModelError(
                f"distillation.teacher: {name} has a different vocabulary from the model "
                f"({self.vocabulary} and {size} tokens); use the dense model that was compressed"
            )
        if config.distillation.cache and config.distillation.top_k > self.vocabulary:
            raise ConfigError(
                f"distillation.top_k is {config.distillation.top_k}, but the vocabulary has "
                f"{self.vocabulary} tokens; lower it"
            )

    @property
    def num_layers(self) -> int:
        """Number of its decoder layers."""
        return DecoderView(self._empty).num_layers

    @property
    def hidden_size(self) -> int:
        """Number of features of its hidden states."""
        return int(self._empty.config.get_text_config().hidden_size)

    @cached_property
    def digest(self) -> str:
        """A hash of its files; all processes must ask for it."""
        with named_by("distillation.teacher"):
            return processes.on_first(lambda: source_hash(self._settings))

    def load(self) -> PreTrainedModel:
        """Return the model, without gradients; it is loaded once."""
        if self._model is None:
            with named_by("distillation.teacher"):
                if self._settings.loading == "streamed":
                    self._model = load_streamed(self._settings)[0].model
                else:
                    self._model = load_model(self._settings).model
            self._model.requires_grad_(False)
        return self._model

    def release(self) -> None:
        """Free its memory; ``load`` would read it again."""
        if self._model is not None:
            self._model = None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What the dense model contributes to a training.

    Attributes:
        text: Writes text with it; None if the training has no such text.
        teacher: What the training learns from; None for the text alone.
        cache: Its predictions on disk, if they are kept there.
    """

    dense: DenseModel | None = None
    text: SampledText | None = None
    teacher: Teacher | CachedTeacher | None = None
    cache: TeacherCache | None = None

    def keep_in(self, run: RunFolder) -> None:
        """Keep text and predictions in a run folder."""
        if self.text is not None:
            self.text.keep_in(run)
        if self.cache is not None:
            self.cache.keep_in(run)

    def prepare(self, config: CompensateConfig, data: TrainingData, phases: Phases) -> None:
        """Run the teacher on what the cache lacks, and add its predictions to the batches.

        All processes of a run must call this. Afterwards, a cached teacher takes no memory.
        """
        if self.cache is None:
            return
        cache, dense = self.cache, self.dense
        assert dense is not None  # it is the teacher
        with phases(TEACHER):
            cache.fill(
                lambda samples, indices: predictions_of(
                    dense.load(),
                    samples,
                    indices,
                    batch_size=config.training.micro_batch_size,
                    top_k=config.distillation.top_k,
                    temperature=config.distillation.temperature,
                    precision=config.trainer.precision,
                )
            )
        dense.release()
        data.extras = {part: cache.extras(part) for part in ("train", "validation")}


def lesson_of(
    config: CompensateConfig,
    loaded: LoadedModel,
    data_of: Callable[[SampledText | None], TrainingData],
    phases: Phases,
    run: RunFolder | None,
) -> tuple[TrainingData, Lesson]:
    """Return the training data, and what the dense model contributes.

    Args:
        data_of: Builds the data; takes the sampler of the dense model.
        run: Keeps text and predictions once it is open.
    """
    is_distilled, is_local = config.objective == "distill", config.objective == "local"
    if not needs_dense(config):
        return data_of(None), Lesson()
    dense = DenseModel(config, loaded.model, loaded.tokenizer)
    text = None
    if uses_self(config):
        text = _text(config, dense, phases)
        if run is not None:
            text.keep_in(run)
    data = data_of(text)
    if is_local:
        return data, Lesson(dense=dense, text=text)
    if not is_distilled:
        _ = data.samples
        dense.release()
        return data, Lesson(dense=dense, text=text)
    if not config.distillation.cache:
        settings = config.distillation
        teacher = Teacher(dense.load(), temperature=settings.temperature, mix=settings.mix)
        return data, Lesson(dense=dense, text=text, teacher=teacher)
    return data, _cached(config, dense, data, text, run)


def _text(config: CompensateConfig, dense: DenseModel, phases: Phases) -> SampledText:
    folder = config.distillation.cache_dir
    shared = None
    if folder is not None:
        facts = {"teacher": dense.digest, "dtype": str(dense.dtype)}
        shared = SharedFolder(Path(folder).expanduser(), facts, phases)
    digest = f"{dense.digest} {dense.dtype}"
    return SampledText(dense.load, digest, phases, shared=shared, track=track)


def _cached(
    config: CompensateConfig,
    dense: DenseModel,
    data: TrainingData,
    text: SampledText | None,
    run: RunFolder | None,
) -> Lesson:
    settings, samples = config.distillation, data.samples
    whole = samples.train.sha256 + samples.validation.sha256
    facts: Facts = {
        "teacher": dense.digest,
        "text": hashlib.sha256(whole.encode()).hexdigest(),
        "top_k": settings.top_k,
        "temperature": settings.temperature,
        "dtype": f"{str(dense.dtype).removeprefix('torch.')} ({config.trainer.precision})",
    }
    if config.trainer.matmul_precision != "highest":  # so that earlier caches stay valid
        facts = {**facts, "matmul_precision": config.trainer.matmul_precision}
    folder = settings.cache_dir
    cache = TeacherCache(
        {"train": samples.train, "validation": samples.validation},
        facts,
        vocabulary=dense.vocabulary,
        folder=None if folder is None else Path(folder).expanduser(),
        run=run,
    )
    processes.on_first(cache.check_free_space)
    teacher = CachedTeacher(str(facts), temperature=settings.temperature, mix=settings.mix)
    return Lesson(dense=dense, text=text, teacher=teacher, cache=cache)
