"""Configuration of ``compress``, ``plan`` and ``export``."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from grasp_lightning.config.common import (
    CalibrationConfig,
    EvaluationConfig,
    Loading,
    ModelConfig,
    TrainerConfig,
)
from grasp_lightning.config.method import MethodConfig
from grasp_lightning.config.trim import TokensConfig
from grasp_lightning.config.values import Count, PathName, Positive, Range, Seed


@dataclass(frozen=True, kw_only=True)
class StatisticsConfig:
    """Measurements, their limits, and where they are kept.

    Attributes:
        max_memory: Limit in GB for Gram matrices, and later for the hidden states of a refit. Above
            it, layers are measured in several passes, and hidden states are stored on disk.
        store: Keep Gram matrices in the run folder, so that ``from_scores`` can compress to another
            ratio.
        measured_windows: Held-out windows on which each cut is measured alone, for a comparison
            with its predicted loss; 0: none.
        priced_windows: Calibration windows on which single removals of layers and blocks are
            measured, for ``method.removable`` and for ``drop`` with blocks. On these windows, laco
            also tries merges, and ``method.ranks: sensitivity`` measures truncations.
        shared: Folder of measurements and generated text that runs share: one run makes each of
            them, and the other runs read it. Unset: none.
    """

    max_memory: Positive = 8.0
    store: bool = True
    measured_windows: Annotated[int, Range(at_least=0, claim="cannot be negative")] = 1
    priced_windows: Count = 2
    shared: PathName | None = None


@dataclass(frozen=True, kw_only=True)
class CompressConfig:
    """Calibrate a model, decide what to remove, remove it, save the result and a report.

    Attributes:
        output_dir: Run folder to write; ``plan`` needs none.
        overwrite: Delete what an earlier run wrote there.
        dry_run: Check everything that is quick to check, print what ``plan`` prints, and write
            nothing.
        seed: Seed for choosing the calibration windows, and the layers for the method random.
        from_scores: Finished run whose stored scores are used instead of a pass over the text;
            unset keys are taken from its configuration.
        compensate: YAML file of ``compensate`` for a training that follows in the same run folder.
            Its keys are also options, as in ``--compensate.training.max_time=10m``. ``plan``
            predicts its memory. Unset: no training follows.
        model: Model to compress.
        method: Compression method.
        tokens: Texts whose tokens are counted.
        calibration: Calibration text.
        evaluation: Held-out text for perplexity.
        trainer: Lightning settings.
        statistics: Measurements, their limits, and where they are kept.
    """

    output_dir: PathName | None = None
    overwrite: bool = False
    dry_run: bool = False
    seed: Seed = 0
    from_scores: PathName | None = None
    compensate: PathName | None = None
    model: ModelConfig
    method: MethodConfig = field(default_factory=MethodConfig)
    tokens: TokensConfig = field(default_factory=TokensConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    statistics: StatisticsConfig = field(default_factory=StatisticsConfig)


@dataclass(frozen=True, kw_only=True)
class PlanConfig(CompressConfig):
    """Predict what ``compress`` removes and how much memory it needs, from the config alone.

    Attributes:
        device_memory: Memory of one device in GB; ``plan`` then says how to load the model on it.
    """

    device_memory: Positive | None = None


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a compressed model in another format.

    Attributes:
        model: Folder of a compressed model, such as ``runs/x/model``.
        format: Format of the copy. dense: multiply the factors back into ordinary weights; gguf:
            write a file for llama.cpp; torchao, bitsandbytes: quantize the weights; 2_4: store 2:4
            weights without their zeros, for NVIDIA GPUs.
        type: Type of the quantized weights: int8 (default) or int4 of torchao, nf4 of bitsandbytes.
        gguf_type: Type of the matrices in a GGUF file; unset: the type of the model.
        gguf_base: GGUF file, or smollm2, whose tokenizer is copied; unset: the tokenizer of the
            model is converted.
        loading: whole: memory holds all weights; streamed: one decoder layer at a time, for format
            dense.
        output_dir: Run folder to write; the copy is in its subfolder ``model``.
        overwrite: Delete what an earlier run wrote there.
    """

    model: PathName
    loading: Loading = "whole"
    format: Literal["dense", "gguf", "torchao", "bitsandbytes", "2_4"] = "dense"
    type: Literal["int8", "int4", "nf4"] | None = None
    gguf_type: Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"] | None = None
    gguf_base: PathName | None = None
    output_dir: PathName
    overwrite: bool = False
