"""Sections that several commands have: models, texts and the Trainer."""

from dataclasses import dataclass
from typing import Annotated, Literal

from grasp_lightning.config.values import (
    Count,
    PathName,
    Range,
    WindowLength,
)

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Precision = Literal["32-true", "bf16-mixed"]
Strategy = Literal[
    "auto",
    "ddp",
    "fsdp",
    "deepspeed_stage_1",
    "deepspeed_stage_2",
    "deepspeed_stage_3",
    "deepspeed_stage_2_offload",
    "deepspeed_stage_3_offload",
]
CALIBRATION_STRATEGIES: tuple[Strategy, ...] = ("auto", "ddp", "fsdp")


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

    path: PathName
    revision: str | None = None
    gguf_file: PathName | None = None
    dtype: Dtype = "auto"
    device: str = "auto"
    trust_remote_code: bool = False


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """The text that scores are measured on.

    Attributes:
        source: Corpus: pydoc (embedded), wikitext2, c4, ptb (hub), or file with ``path``; samples
            with their answers: alpaca (hub), or instructions with ``path``; self: text that the
            model writes. A list of these mixes them; the default is one, since what is calibrated
            on one kind of text loses much on others.
        path: A .txt, .jsonl or .parquet file for ``source: file``, a .jsonl, .json or .parquet
            file for ``source: instructions``; a list has one for each of these, in their order.
        weights: Share of windows that each source of a list gets, in any unit; None: equal shares.
        rows: Rows of the file that are read, counted from 0, such as 0-259 or 260-; a list has one
            range for each ``path``. None: all rows.
        split: Part of the corpora; None takes each one's own part for calibration.
        field: Column that holds the text of .jsonl and .parquet files of ``source: file``.
        num_samples: Number of windows, of all sources together.
        seqlen: Tokens per window.
        batch_size: Windows per forward pass; changes speed and memory, never scores.
        add_bos: Start every window with the tokenizer's beginning-of-sequence token.
    """

    source: str | tuple[str, ...] = ("wikitext2", "c4", "self")
    path: PathName | tuple[PathName, ...] | None = None
    weights: tuple[float, ...] | None = None
    rows: str | tuple[str, ...] | None = None
    split: str | None = None
    field: str = "text"
    num_samples: Count = 512
    seqlen: WindowLength = 512
    batch_size: Count = 1
    add_bos: bool = False


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """The held-out text that perplexity is measured on, before and after.

    Attributes:
        source: Corpus: pydoc (embedded), wikitext2, c4, ptb (hub), or file with ``path``.
        path: A .txt, .jsonl or .parquet file for ``source: file``.
        rows: Rows of the file that are read, counted from 0, such as 0-259 or 260-; None: all.
        split: Part of the corpus; None takes the source's own held-out part.
        field: Column that holds the text of .jsonl and .parquet files.
        num_samples: Number of windows, from the start of the corpus; None takes all.
        seqlen: Tokens per window.
        batch_size: Windows per forward pass.
        add_bos: Start every window with the tokenizer's beginning-of-sequence token.
        tail: Keep or drop a last window that is shorter than ``seqlen``.
    """

    source: str = "wikitext2"
    path: PathName | None = None
    rows: str | None = None
    split: str | None = None
    field: str = "text"
    num_samples: Count | None = None
    seqlen: WindowLength = 2048
    batch_size: Count = 1
    add_bos: bool = False
    tail: Literal["keep", "drop"] = "keep"


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How Lightning runs calibration and compensation.

    Attributes:
        accelerator: Lightning accelerator; auto follows ``model.device``.
        devices: Number of devices per node.
        num_nodes: Number of nodes.
        strategy: auto, ddp: a process per device, each with the whole model; fsdp: each with a
            part of every weight; deepspeed_stage_1, _2, _3, _2_offload, _3_offload: compensation
            alone.
        precision: 32-true runs in the model's own dtype, bf16-mixed computes in bfloat16.
        checkpoint_seconds: Seconds between saves of a running pass, for a killed run to go on from.
    """

    accelerator: Literal["auto", "cpu", "cuda", "gpu"] = "auto"
    devices: Count = 1
    num_nodes: Count = 1
    strategy: Strategy = "auto"
    precision: Precision = "32-true"
    checkpoint_seconds: Annotated[float, Range(at_least=0, claim="cannot be negative")] = 30.0
