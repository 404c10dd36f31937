"""Configuration of ``compare``."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Annotated, Any, TypeVar, get_type_hints

from grasp_lightning.config.common import (
    CalibrationConfig,
    EvaluationConfig,
    MatmulPrecision,
    ModelConfig,
    TrainerConfig,
)
from grasp_lightning.config.compensate import Recipe
from grasp_lightning.config.compress import StatisticsConfig
from grasp_lightning.config.method import MethodConfig
from grasp_lightning.config.values import (
    Count,
    CountOrZero,
    LibrarySeed,
    PathName,
    Range,
    Seed,
    is_path,
)
from grasp_lightning.errors import ConfigError

C = TypeVar("C")
RemovedRatio = Annotated[float, Range(above=0, below=1)]
_VARIABLE = re.compile(r"\$\{(\w+)\}")


@dataclass(frozen=True, kw_only=True)
class TasksConfig:
    """Tasks of lm-eval on every model; needs the extra ``eval``.

    Attributes:
        names: Names of tasks, tags or groups; empty: none.
        task_data: Folder with task data, ``<task>/<split>.jsonl``; other tasks read the hub.
        limit: Number of documents per task, from the start; unset: all.
        num_fewshot: Examples before each question; unset: the default of each task.
        batch_size: Requests of a task per forward pass.
        seed: Seed of few-shot examples and of sampling.
        removed_ratios: Shares at which tasks are measured; unset: all.
    """

    names: tuple[str, ...] = ()
    task_data: PathName | None = None
    limit: Count | None = None
    num_fewshot: CountOrZero | None = None
    batch_size: Count = 1
    seed: LibrarySeed = 1234
    removed_ratios: tuple[RemovedRatio, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class SpeedConfig:
    """Throughput of every model, measured alternately with the dense model in one process.

    Attributes:
        prefill_length: Tokens of the prompt whose prefill is timed; unset: not measured.
        decode_batch_size: Number of sequences to decode together; unset: not measured.
        prompt_length: Tokens per sequence before decoding.
        new_tokens: Tokens to decode per sequence.
        rounds: How often to measure, in random order.
        seed: Seed of the prompts and of the order.
        removed_ratios: Shares at which throughput is measured; unset: all.
    """

    prefill_length: Count | None = None
    decode_batch_size: Count | None = None
    prompt_length: Count = 128
    new_tokens: Count = 32
    rounds: Count = 7
    seed: Seed = 0
    removed_ratios: tuple[RemovedRatio, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class GridRecipe(Recipe):
    """A training of every compressed model.

    Attributes:
        after: Name of another entry, from whose model this training starts; unset: it starts from
            the compressed model.
    """

    after: str | None = None


@dataclass(frozen=True, kw_only=True)
class PaperConfig:
    """A paper's own numbers, shown next to the measured ones.

    Attributes:
        numbers: YAML file with the numbers; see docs/compare.md.
        table: Name of the table in that file.
    """

    numbers: PathName | None = None
    table: str | None = None


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Compress models with several methods to several sizes, and compare them in one table.

    Attributes:
        output_dir: Folder to write; each cell of the grid is a run folder in ``cells``.
        overwrite: Run cells again whose configuration has changed.
        jobs: Number of cells to run at once, each with its share of the CPU threads.
        cells: Part of the grid to run, such as 3/16 for the third of 16; unset: all of it, and the
            table is written.
        seeds: Seeds for choosing the calibration windows.
        removed_ratios: Shares of all parameters to remove.
        skip_unknown: Skip methods that do not exist, instead of refusing them.
        models: Models by name.
        methods: Methods by name, without ``removed_ratio``; a method that sets its own size has one
            cell per seed.
        compensations: Trainings after compression by name; each runs on the model of every cell.
        calibration: Calibration text of all cells.
        statistics: Measurements of all cells, their limits, and where they are kept.
        trainer: Lightning settings of all compressions.
        texts: Held-out texts for perplexity by name.
        tasks: Tasks of lm-eval.
        matmul_precision: How torch may round the inputs of float32 matrix products in perplexity
            and tasks: highest not at all, high to TensorFloat32, medium to bfloat16.
        speed: Throughput.
        paper: Numbers of a paper.
    """

    output_dir: PathName
    overwrite: bool = False
    jobs: Count = 1
    cells: str | None = None
    seeds: tuple[Seed, ...] = (0,)
    removed_ratios: tuple[RemovedRatio, ...] = (0.2,)
    skip_unknown: bool = False
    models: Mapping[str, ModelConfig]
    methods: Mapping[str, MethodConfig]
    compensations: Mapping[str, GridRecipe] = field(default_factory=dict)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    statistics: StatisticsConfig = field(default_factory=StatisticsConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    texts: Mapping[str, EvaluationConfig]
    tasks: TasksConfig = field(default_factory=TasksConfig)
    matmul_precision: MatmulPrecision = "highest"
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    paper: PaperConfig = field(default_factory=PaperConfig)


def with_variables(config: C, environment: Mapping[str, str] = os.environ) -> C:
    """Return a configuration whose paths have the values of variables instead of ``${NAME}``.

    A variable that is not set is a ``ConfigError`` with the key and its name.
    """
    found: C = _expanded(config, "", environment, is_named=False)
    return found


def _expanded(
    value: Any,  # noqa: ANN401  of any key
    key: str,
    environment: Mapping[str, str],
    *,
    is_named: bool,
) -> Any:  # noqa: ANN401  as before
    """Return the value of a key, or a section; ``is_named`` says that the value is a path."""
    if is_dataclass(value) and not isinstance(value, type):
        hints = get_type_hints(type(value), include_extras=True)
        changes = {
            name: _expanded(part, f"{key}.{name}", environment, is_named=is_path(hints[name]))
            for name, part in vars(value).items()
        }
        return replace(value, **changes)
    if isinstance(value, Mapping):
        return {
            name: _expanded(entry, f"{key}.{name}", environment, is_named=is_named)
            for name, entry in value.items()
        }
    if isinstance(value, tuple):
        return tuple(_expanded(part, key, environment, is_named=is_named) for part in value)
    if not (is_named and isinstance(value, str)):
        return value
    for name in _VARIABLE.findall(value):
        if not environment.get(name):
            raise ConfigError(
                f"{key.removeprefix('.')}: the environment variable {name} is not set, which "
                f"{value} needs; set it, as in export {name}=/path"
            )
    return _VARIABLE.sub(lambda found: environment[found[1]], value)
