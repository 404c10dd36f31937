"""Typed configuration of the commands. No torch here, so that parsing and ``--help`` are quick.

``None`` means "not set by the user": presets and methods fill in what is left (see ``resolve``).
"""

from dataclasses import dataclass, field
from typing import Literal

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
MethodName = Literal["grasp", "drop"]
LayerMetric = Literal["similarity", "angular"]
Terms = Literal["full", "sigma"]
Reduction = Literal["signed", "absolute", "squared"]
Score = Literal["taylor", "gradient", "magnitude"]
Schedule = Literal["one_shot", "iterative"]
PresetName = Literal["paper", "released"]
Precision = Literal["32-true", "bf16-mixed"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model to load, and how.

    Attributes:
        path: Hugging Face folder, hub name, .gguf file, or the alias ``smollm2``.
        revision: Branch, tag or commit of a hub model.
        gguf_file: Name of a .gguf file inside the folder or hub repository ``path``.
        dtype: Floating point type of the weights; auto keeps the checkpoint's (GGUF: float32).
        device: Device that holds the model: auto, cpu, cuda, cuda:1, ...
        trust_remote_code: Run model code that comes with the checkpoint.
    """

    path: str
    revision: str | None = None
    gguf_file: str | None = None
    dtype: Dtype = "auto"
    device: str = "auto"
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """What is removed, and how it is chosen.

    Attributes:
        name: Compression method.
        preset: Named set of options; it fills only keys that are not set.
        layer_metric: How redundant layers are found when ``num_layers`` is given.
        num_layers: Number of decoder layers to replace or delete.
        layers: Explicit indices of decoder layers instead of ``num_layers``.
        keep_ratio: Share of each matrix's parameters that its factors keep, in [0, 1).
        removed_ratio: Share of all the model's parameters to remove, instead of one of
            ``num_layers`` and ``keep_ratio``.
        terms: Parameters of a component that are scored: all of u, s, v, or s alone.
        reduction: How per-window scores are combined.
        score: taylor multiplies each gradient with its parameter, gradient does not, magnitude
            takes the singular values alone.
        schedule: one_shot scores all chosen layers in one pass; iterative replaces the last layer
            first, its MLP before its attention, and scores each with what is above replaced.
        score_all_layers: Score the components of all layers, so that ``from_scores`` can choose
            any of them later; one_shot only.
    """

    name: MethodName = "grasp"
    preset: PresetName | None = None
    layer_metric: LayerMetric | None = None
    num_layers: int | None = None
    layers: tuple[int, ...] | None = None
    keep_ratio: float | None = None
    removed_ratio: float | None = None
    terms: Terms | None = None
    reduction: Reduction | None = None
    score: Score | None = None
    schedule: Schedule | None = None
    score_all_layers: bool | None = None


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """The text that scores are measured on.

    Attributes:
        source: Corpus: pydoc (embedded), wikitext2, c4, ptb (hub), or file with ``path``.
        path: A .txt, .jsonl or .parquet file for ``source: file``.
        split: Part of the corpus; None takes the source's own part for calibration.
        field: Column that holds the text of .jsonl and .parquet files.
        num_samples: Number of windows.
        seqlen: Tokens per window.
        batch_size: Windows per forward pass; changes speed and memory, never scores.
        add_bos: Start every window with the tokenizer's beginning-of-sequence token.
    """

    source: str = "wikitext2"
    path: str | None = None
    split: str | None = None
    field: str = "text"
    num_samples: int = 512
    seqlen: int = 512
    batch_size: int = 1
    add_bos: bool = False


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """The held-out text that perplexity is measured on, before and after.

    Attributes:
        source: Corpus: pydoc (embedded), wikitext2, c4, ptb (hub), or file with ``path``.
        path: A .txt, .jsonl or .parquet file for ``source: file``.
        split: Part of the corpus; None takes the source's own held-out part.
        field: Column that holds the text of .jsonl and .parquet files.
        num_samples: Number of windows, from the start of the corpus; None takes all.
        seqlen: Tokens per window.
        batch_size: Windows per forward pass.
        add_bos: Start every window with the tokenizer's beginning-of-sequence token.
        tail: Keep or drop a last window that is shorter than ``seqlen``.
    """

    source: str = "wikitext2"
    path: str | None = None
    split: str | None = None
    field: str = "text"
    num_samples: int | None = None
    seqlen: int = 2048
    batch_size: int = 1
    add_bos: bool = False
    tail: Literal["keep", "drop"] = "keep"


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How Lightning runs the calibration.

    Attributes:
        accelerator: Lightning accelerator; auto follows ``model.device``.
        devices: Number of devices per node.
        num_nodes: Number of nodes.
        strategy: Lightning strategy.
        precision: 32-true runs in the model's own dtype, bf16-mixed computes in bfloat16.
        checkpoint_seconds: Seconds between saves of a running pass, for a killed run to go on from.
    """

    accelerator: Literal["auto", "cpu", "cuda", "gpu"] = "auto"
    devices: int = 1
    num_nodes: int = 1
    strategy: Literal["auto"] = "auto"
    precision: Precision = "32-true"
    checkpoint_seconds: float = 30.0


@dataclass(frozen=True, kw_only=True)
class CompressConfig:
    """Everything that ``compress`` and ``plan`` read.

    Attributes:
        output_dir: Run folder that is written; ``plan`` needs none.
        overwrite: Delete what an earlier run wrote there.
        seed: Seed of the choice of calibration windows.
        from_scores: Run folder whose stored scores are cut again, without a pass over the data;
            its configuration is taken where no key is set.
        model: Which model.
        method: What is removed.
        calibration: Text to measure on.
        evaluation: Held-out text.
        trainer: Lightning settings.
    """

    output_dir: str | None = None
    overwrite: bool = False
    seed: int = 0
    from_scores: str | None = None
    model: ModelConfig
    method: MethodConfig = field(default_factory=MethodConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Everything that ``export`` reads.

    Attributes:
        model: Folder of a compressed model, such as ``runs/x/model``.
        format: Shape of the copy; dense multiplies the factors back into ordinary weights.
        output_dir: Run folder that is written; the copy is in its folder ``model``.
        overwrite: Delete what an earlier run wrote there.
    """

    model: str
    format: Literal["dense"] = "dense"
    output_dir: str
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True)
class CorpusWindows:
    """How the texts of ``evaluate`` are cut into windows; keys as in ``EvaluationConfig``.

    Attributes:
        split: Part of the corpora; None takes each one's own held-out part.
        field: Column that holds the text of .jsonl and .parquet files.
        num_samples: Number of windows, from the start of each corpus; None takes all.
        seqlen: Tokens per window.
        batch_size: Windows per forward pass.
        add_bos: Start every window with the tokenizer's beginning-of-sequence token.
        tail: Keep or drop a last window that is shorter than ``seqlen``.
    """

    split: str | None = None
    field: str = "text"
    num_samples: int | None = None
    seqlen: int = 2048
    batch_size: int = 1
    add_bos: bool = False
    tail: Literal["keep", "drop"] = "keep"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Everything that ``evaluate`` reads.

    Attributes:
        model: Models, the first one the others are compared with: each a folder, a hub name, a
            .gguf file or the alias ``smollm2``.
        revision: Branch, tag or commit of a hub model.
        dtype: Floating point type of the weights; auto keeps each checkpoint's.
        device: Device that holds the model: auto, cpu, cuda, cuda:1, ...
        trust_remote_code: Run model code that comes with the checkpoints.
        corpora: Texts to measure perplexity on: each a name (wikitext2, ptb, c4, pydoc), or a
            .txt, .jsonl or .parquet file.
        evaluation: How these texts are cut into windows.
        tasks: Names of lm-eval tasks, tags or groups; needs the extra ``eval``.
        task_data: Folder with local data of tasks, ``<task>/<split>.jsonl``; a task without a
            folder there takes its data from the hub.
        limit: Number of documents per task, from its start; None takes all.
        num_fewshot: Examples before each question; None takes each task's own number.
        batch_size: Requests of a task per forward pass.
        seed: Seed of few-shot examples and of sampling; 1234 is lm-eval's own.
        output: JSON file that holds the results; what is finished in it is not measured again.
        overwrite: Measure again what ``output`` holds.
    """

    model: tuple[str, ...]
    revision: str | None = None
    dtype: Dtype = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    corpora: tuple[str, ...] = ()
    evaluation: CorpusWindows = field(default_factory=CorpusWindows)
    tasks: tuple[str, ...] = ()
    task_data: str | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int = 1
    seed: int = 1234
    output: str | None = None
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Everything that ``benchmark`` reads.

    Attributes:
        model: The model that the others are compared with: a folder, a hub name, a .gguf file or
            the alias ``smollm2``.
        against: The others.
        revision: Branch, tag or commit of the hub models.
        dtype: Floating point type of the weights; auto keeps each checkpoint's.
        device: Device that holds the models: auto, cpu, cuda, cuda:1, ...
        trust_remote_code: Run model code that comes with the checkpoints.
        threads: Threads of torch on the CPU; None leaves torch's own number.
        prefill_lengths: Prompt lengths, in tokens, whose prefill is timed, one prompt at a time.
        decode_batch_sizes: Numbers of sequences that are decoded together.
        prompt_length: Tokens per sequence before decoding.
        new_tokens: Tokens that are decoded per sequence.
        rounds: How often everything is measured, in random order.
        seed: Seed of the prompts and of the order.
        output: JSON file that is written, and beside it a plot of the same name.
        overwrite: Write over an ``output`` that exists.
    """

    model: str
    against: tuple[str, ...] = ()
    revision: str | None = None
    dtype: Dtype = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    threads: int | None = None
    prefill_lengths: tuple[int, ...] = (128, 256, 512, 1024)
    decode_batch_sizes: tuple[int, ...] = (1, 2, 4, 8)
    prompt_length: int = 128
    new_tokens: int = 32
    rounds: int = 7
    seed: int = 0
    output: str | None = None
    overwrite: bool = False
