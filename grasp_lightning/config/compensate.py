"""Configuration of ``compensate``. The defaults are the published settings, preset ``paper``."""

from dataclasses import dataclass, field
from typing import Literal

from grasp_lightning.config.common import EvaluationConfig, ModelConfig, TrainerConfig
from grasp_lightning.config.values import (
    BelowOne,
    Count,
    CountOrZero,
    Duration,
    NotNegative,
    PathName,
    Positive,
    Seed,
    Share,
    WindowLength,
)

TrainMode = Literal["lora", "factors", "lora_on_factors", "replaced", "all"]
Objective = Literal["instruction", "text", "distill", "local"]
LocalScale = Literal["layer", "token"]
BatchOrder = Literal["shuffled", "length_grouped", "packed"]
OptimizerName = Literal["adamw", "adamw_8bit"]
LearningRateSchedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Low-rank adapters, merged into the weights at the end.

    Attributes:
        rank: Rank of each adapter, at most half the smaller side of its linear.
        alpha: The product of an adapter is scaled by alpha / rank.
        dropout: Share of adapter inputs zeroed in training, in [0, 1).
        targets: Names of linears, such as q_proj, or of modules; empty: all in the decoder layers.
    """

    rank: Count = 256
    alpha: Positive = 16.0
    dropout: BelowOne = 0.05
    targets: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class InstructionConfig:
    """Instructions with answers, in the Alpaca template.

    Attributes:
        source: alpaca (hub), or file (see ``path``).
        path: A .jsonl, .json or .parquet file with instruction, output and, optionally, input.
        num_train: Number of training samples; unset: all that are not set aside.
        num_validation: Number of samples set aside for validation.
        max_length: Maximum tokens of a sample; longer ones lose their end.
        train_on_inputs: Train on the prompt as well as on the answer.
        add_eos: End samples with the end-of-sequence token.
        add_bos: Start samples with the beginning-of-sequence token; unset: the tokenizer's default.
        order: shuffled, length_grouped (less padding) or packed (several samples per row, without
            attention between them).
        licence: Licence of a local file, for the model card.
    """

    source: str = "alpaca"
    path: PathName | None = None
    num_train: Count | None = None
    num_validation: CountOrZero = 2000
    max_length: WindowLength = 256
    train_on_inputs: bool = True
    add_eos: bool = False
    add_bos: bool | None = None
    order: BatchOrder = "shuffled"
    licence: str | None = None


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Plain text, in windows of equal length.

    Attributes:
        source: One source or a list, as of ``calibration.source``: pydoc, wikitext2, c4, ptb, file;
            with answers, in the chat format of the model: alpaca, instructions; self: text that
            the dense model, ``distillation.teacher``, generates.
        path: One file for each ``file`` and ``instructions`` in ``source``, in order.
        weights: Relative number of windows from each source of a list; unset: equal.
        rows: Rows of the files to read, from 0, such as 0-259 or 260-, one range per ``path``;
            unset: all rows.
        split: Split of the corpora; unset: the calibration split of each.
        field: Text column of .jsonl and .parquet files.
        num_samples: Number of training windows, over all sources.
        num_validation: Number of other windows of the same mixture, for validation.
        seqlen: Tokens per window.
        add_bos: Start every window with the beginning-of-sequence token.
        licence: Licence of the local files, for the model card.
    """

    source: str | tuple[str, ...] = "wikitext2"
    path: PathName | tuple[PathName, ...] | None = None
    weights: tuple[float, ...] | None = None
    rows: str | tuple[str, ...] | None = None
    split: str | None = None
    field: str = "text"
    num_samples: Count = 512
    num_validation: CountOrZero = 32
    seqlen: WindowLength = 512
    add_bos: bool = False
    licence: str | None = None


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """Learning from the output distribution of a teacher, and from the text itself.

    Attributes:
        teacher: The dense model: a folder, hub name, .gguf file, or the alias ``smollm2``.
        data: Text that both models read: instruction (section ``data``) or text (section ``text``).
        temperature: Softmax temperature of both distributions, above 0.
        mix: Share of the teacher in the loss, in (0, 1]; the rest is the usual cross-entropy.
        device: Device of the teacher: auto (the model's), or another, such as cpu.
        cache: Run the teacher once, and keep its likeliest next tokens on disk.
        top_k: Number of these tokens per predicted token; all others count as one class.
        cache_dir: Folder that keeps these tokens for other runs with the same teacher and text;
            unset: the run folder, until the run is finished.
    """

    teacher: PathName | None = None
    data: Literal["instruction", "text"] = "instruction"
    temperature: Positive = 1.0
    mix: Share = 1.0
    device: str = "auto"
    cache: bool = False
    top_k: Count = 64
    cache_dir: PathName | None = None


@dataclass(frozen=True, kw_only=True)
class LocalConfig:
    """Layer-by-layer training: every layer learns the hidden state of the dense model.

    Attributes:
        layers_at_once: Number of layers that are trained together.
        scale: What a squared error is divided by: the mean square of the dense hidden states of all
            tokens (layer), or of the same token (token).
        max_memory: Limit in GB for the hidden states of all windows; the rest is stored on disk.
    """

    layers_at_once: Count = 1
    scale: LocalScale = "layer"
    max_memory: Positive = 8.0


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its learning rate.

    Attributes:
        name: adamw, or adamw_8bit, whose states take a quarter of the memory (bitsandbytes).
        learning_rate: Peak learning rate.
        weight_decay: Decoupled weight decay of all trained parameters.
        beta1: Decay of the mean of gradients.
        beta2: Decay of the mean of squared gradients.
        epsilon: Added to the square root of that mean.
        schedule: Learning rate after the warm-up: constant, linear or cosine to 0.
        warmup_steps: Optimizer steps in which the learning rate rises from 0.
        gradient_clip: Maximum norm of the whole gradient; unset: no clipping.
    """

    name: OptimizerName = "adamw"
    learning_rate: Share = 3e-4
    weight_decay: NotNegative = 0.0
    beta1: BelowOne = 0.9
    beta2: BelowOne = 0.999
    epsilon: Positive = 1e-8
    schedule: LearningRateSchedule = "linear"
    warmup_steps: CountOrZero = 100
    gradient_clip: Positive | None = 1.0


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Training length, step size, and which weights to keep.

    Attributes:
        epochs: Passes over the samples.
        max_steps: Maximum optimizer steps; unset: ``epochs`` decides.
        max_time: Maximum time of the training, such as 90s, 30m or 2h. Steps, warm-up and decay are
            planned for this time; other limits still hold.
        batch_size: Rows per optimizer step.
        micro_batch_size: Rows per forward pass; changes memory and speed, not the result.
        validate_every: Optimizer steps between validations; unset: only before and after.
        patience: Stop after this many validations without a lower loss; unset: never.
        keep: Weights to keep: last, or best (lowest validation loss).
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
    """

    epochs: Count = 1
    max_steps: Count | None = None
    max_time: Duration | None = None
    batch_size: Count = 32
    micro_batch_size: Count = 4
    validate_every: Count | None = None
    patience: Count | None = None
    keep: Literal["last", "best"] = "last"
    gradient_checkpointing: bool = False


@dataclass(frozen=True, kw_only=True)
class LoggersConfig:
    """Where losses are logged, in addition to the CSV file in ``logs``.

    Attributes:
        tensorboard: Write TensorBoard files into ``logs``; needs the extra ``tensorboard``.
        wandb: Project on Weights & Biases; needs the package wandb.
    """

    tensorboard: bool = False
    wandb: str | None = None


@dataclass(frozen=True, kw_only=True)
class TrainedFolder:
    """Where a training is written, and its seed.

    Attributes:
        output_dir: Run folder to write.
        overwrite: Delete what an earlier run wrote there.
        seed: Seed of the validation split, order, adapters and dropout.
    """

    output_dir: PathName | None = None
    overwrite: bool = False
    seed: Seed = 0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train a compressed model.

    Attributes:
        preset: Named set of defaults: paper, the settings of arXiv:2501.00339, Table 6.
        train: What to train: lora (adapters on all linears), factors (low-rank factors and narrowed
            linears, without biases), lora_on_factors (adapters on these only), replaced (these
            linears with biases, seams, and weights that compression changed in place), or all
            (every weight of the decoder layers).
        objective: What to learn: instruction, text, distill (a teacher's output distribution), or
            local (a teacher's hidden states, layer by layer).
        lora: LoRA adapters.
        data: Instructions to train on.
        text: Plain text to train on.
        distillation: Distillation from a teacher.
        local: Layer-by-layer training.
        optimizer: AdamW and its learning rate.
        training: Steps, batches, and weights to keep.
        trainer: Lightning settings.
        loggers: Where losses are logged.
    """

    preset: Literal["paper"] = "paper"
    train: TrainMode = "lora"
    objective: Objective = "instruction"
    lora: LoraSettings = field(default_factory=LoraSettings)
    data: InstructionConfig = field(default_factory=InstructionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    local: LocalConfig = field(default_factory=LocalConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    loggers: LoggersConfig = field(default_factory=LoggersConfig)


@dataclass(frozen=True, kw_only=True)
class CompensateConfig(Recipe, TrainedFolder):
    """Train a compressed model, merge adapters, save the result and a report.

    Attributes:
        dry_run: Check everything that is quick to check, print the memory, and write nothing.
        push_to_hub: Hub repository to upload the finished model to.
        model: The compressed model.
        evaluation: Held-out text for perplexity, before and after.
    """

    dry_run: bool = False
    push_to_hub: str | None = None
    model: ModelConfig
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
