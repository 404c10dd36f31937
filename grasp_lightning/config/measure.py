"""Configuration of ``evaluate`` and ``benchmark``."""

from dataclasses import dataclass, field

from grasp_lightning.config.common import CorpusWindows, Dtype, Loading, MatmulPrecision
from grasp_lightning.config.values import (
    Count,
    CountOrZero,
    LibrarySeed,
    PathName,
    Seed,
)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Measure perplexity, tasks and cost of models, side by side.

    Attributes:
        model: Models, compared with the first: folders, hub names, .gguf files, ``smollm2``.
        revision: Branch, tag or commit of a hub model.
        dtype: Floating point type of the weights; auto keeps each checkpoint's.
        device: Device of the model: auto, cpu, cuda, cuda:1, ...
        trust_remote_code: Run model code that comes with the checkpoints.
        loading: whole: the device holds all weights; streamed: it holds one decoder layer at a
            time, read from a local folder.
        matmul_precision: How torch may round the inputs of float32 matrix products: highest not at
            all, high to TensorFloat32, medium to bfloat16; rounding is faster on hardware that
            supports it.
        corpora: Texts for perplexity: wikitext2, ptb, c4, pydoc, or .txt, .jsonl or .parquet files.
        evaluation: How to cut these texts into windows.
        tasks: Names of lm-eval tasks, tags or groups; needs the extra ``eval``.
        task_data: Folder with task data, ``<task>/<split>.jsonl``; other tasks read the hub.
        limit: Number of documents per task, from the start; unset: all.
        num_fewshot: Examples before each question; unset: the default of each task.
        batch_size: Requests of a task per forward pass.
        seed: Seed of few-shot examples and of sampling; 1234 is lm-eval's default.
        output: JSON file for the results; results that it already contains are not measured again.
        overwrite: Measure again even if ``output`` contains the result.
    """

    model: tuple[PathName, ...]
    revision: str | None = None
    dtype: Dtype = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    loading: Loading = "whole"
    matmul_precision: MatmulPrecision = "highest"
    corpora: tuple[PathName, ...] = ()
    evaluation: CorpusWindows = field(default_factory=CorpusWindows)
    tasks: tuple[str, ...] = ()
    task_data: PathName | None = None
    limit: Count | None = None
    num_fewshot: CountOrZero | None = None
    batch_size: Count = 1
    seed: LibrarySeed = 1234
    output: PathName | None = None
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Measure prefill and decode throughput of models, alternately.

    Attributes:
        model: Model that the others are compared with: folder, hub name, .gguf file or ``smollm2``.
        against: The other models.
        revision: Branch, tag or commit of the hub models.
        dtype: Floating point type of the weights; auto keeps each checkpoint's.
        device: Device of the models: auto, cpu, cuda, cuda:1, ...
        trust_remote_code: Run model code that comes with the checkpoints.
        threads: Threads of torch on the CPU; unset: torch's default.
        prefill_lengths: Prompt lengths in tokens whose prefill is timed, one prompt at a time.
        decode_batch_sizes: Numbers of sequences to decode together.
        prompt_length: Tokens per sequence before decoding.
        new_tokens: Tokens to decode per sequence.
        rounds: How often to measure everything, in random order.
        seed: Seed of the prompts and of the order.
        output: JSON file to write, with a plot of the same name next to it.
        overwrite: Overwrite an existing ``output``.
    """

    model: PathName
    against: tuple[PathName, ...] = ()
    revision: str | None = None
    dtype: Dtype = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    threads: Count | None = None
    prefill_lengths: tuple[Count, ...] = (128, 256, 512, 1024)
    decode_batch_sizes: tuple[Count, ...] = (1, 2, 4, 8)
    prompt_length: Count = 128
    new_tokens: Count = 32
    rounds: Count = 7
    seed: Seed = 0
    output: PathName | None = None
    overwrite: bool = False
