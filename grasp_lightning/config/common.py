"""Sections of several commands: models, texts and the Trainer."""

from dataclasses import dataclass
from typing import Annotated, Literal

from grasp_lightning.config.values import Count, PathName, Range, WindowLength

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Loading = Literal["whole", "streamed"]
Precision = Literal["32-true", "bf16-mixed"]
MatmulPrecision = Literal["highest", "high", "medium"]
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
        device: Device of the model: auto, cpu, cuda, cuda:1, ...
        trust_remote_code: Run model code that comes with the checkpoint.
        loading: whole: the device holds all weights; streamed: it holds one decoder layer at a
            time, read from the disk (compress, and compensate with objective local).
    """

    path: PathName
    revision: str | None = None
    gguf_file: PathName | None = None
    dtype: Dtype = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    loading: Loading = "whole"


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """Text on which scores are measured.

    Attributes:
        source: pydoc (embedded), wikitext2, c4, ptb (hub), file (see ``path``); with answers:
            alpaca (hub), instructions (see ``path``); self: text that the model generates. A list
            mixes sources. The default is a mixture, because calibrating on one kind of text makes
            the model worse on others.
        path: A .txt, .jsonl or .parquet file for ``source: file``, a .jsonl, .json or .parquet file
            for ``source: instructions``; a list has one for each of these, in order.
        weights: Relative number of windows from each source of a list; unset: equal.
        rows: Rows of the file to read, from 0, such as 0-259 or 260-; a list has one range per
            ``path``; unset: all rows.
        split: Split of the corpora; unset: the calibration split of each.
        field: Text column of .jsonl and .parquet files, for ``source: file``.
        num_samples: Number of windows, over all sources.
        seqlen: Tokens per window.
        batch_size: Windows per forward pass; changes speed and memory, never scores.
        add_bos: Start every window with the beginning-of-sequence token.
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
class CorpusSource:
    """Source of plain text.

    Attributes:
        source: Corpus: pydoc (embedded), wikitext2, c4, ptb (hub), or file (see ``path``).
        path: A .txt, .jsonl or .parquet file for ``source: file``.
    """

    source: str = "wikitext2"
    path: PathName | None = None


@dataclass(frozen=True, kw_only=True)
class CorpusWindows:
    """How held-out text is cut into windows.

    Attributes:
        rows: Rows of the file to read, from 0, such as 0-259 or 260-; unset: all.
        split: Split of the corpus; unset: its held-out split.
        field: Text column of .jsonl and .parquet files.
        num_samples: Number of windows, from the start of the corpus; unset: all.
        seqlen: Tokens per window.
        batch_size: Windows per forward pass.
        add_bos: Start every window with the beginning-of-sequence token.
        tail: Keep or drop a last window shorter than ``seqlen``.
    """

    rows: str | None = None
    split: str | None = None
    field: str = "text"
    num_samples: Count | None = None
    seqlen: WindowLength = 2048
    batch_size: Count = 1
    add_bos: bool = False
    tail: Literal["keep", "drop"] = "keep"


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(CorpusWindows, CorpusSource):
    """Held-out text on which perplexity is measured, before and after."""


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How Lightning runs calibration and compensation.

    Attributes:
        accelerator: Lightning accelerator; auto follows ``model.device``.
        devices: Devices per node.
        num_nodes: Number of nodes.
        strategy: auto, ddp: each device holds the whole model; fsdp: devices shard the weights;
            deepspeed_stage_1, _2, _3, _2_offload, _3_offload: compensation only.
        precision: 32-true computes in the model's own dtype, bf16-mixed in bfloat16.
        matmul_precision: How torch may round the inputs of float32 matrix products in the model:
            highest not at all, high to TensorFloat32, medium to bfloat16. Sums over tokens and
            decompositions are never rounded.
        checkpoint_seconds: Seconds between checkpoints, from which a killed run resumes.
    """

    accelerator: Literal["auto", "cpu", "cuda", "gpu"] = "auto"
    devices: Count = 1
    num_nodes: Count = 1
    strategy: Strategy = "auto"
    precision: Precision = "32-true"
    matmul_precision: MatmulPrecision = "highest"
    checkpoint_seconds: Annotated[float, Range(at_least=0, claim="cannot be negative")] = 30.0
