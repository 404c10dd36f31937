"""Local data for tasks of lm-eval: JSON lines instead of a data set on the hub."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from grasp_lightning.errors import ConfigError, DataError
from grasp_lightning.reading.text import one_line, read_json_lines

_SPLIT_KEYS = ("training_split", "validation_split", "test_split")
_TEMPLATES = ("doc_to_text", "doc_to_target", "doc_to_choice")

TaskConfig = Mapping[str, Any]  # Any: a task's configuration as YAML has it


def local_config(
    task: str, config: TaskConfig, folder: Path, *, num_fewshot: int | None
) -> dict[str, Any]:  # Any: as above
    """Return the overrides that make a task read local files.

    They change neither prompts and metrics nor the split that the task evaluates on.

    Args:
        config: Its configuration in lm-eval.
        folder: Folder with ``<split>.jsonl`` files.
        num_fewshot: Number of examples; None for the task's default.

    Raises:
        ConfigError: If the task loads its data with its own code, or has fewer rows than examples.
        DataError: If a file or a field is missing.
    """
    if "class" in config or "custom_dataset" in config:
        raise ConfigError(
            f"tasks: {task} loads its data with its own code, so task_data cannot replace it; "
            f"remove {folder} to take the data from the hub"
        )
    files = {file.stem: file for file in sorted(folder.glob("*.jsonl"))}
    needed = [evaluated_split(config)]
    shots, num_shots = _few_shot_split(config), _num_shots(config, num_fewshot)
    if num_shots > 0 and shots is not None:
        needed.append(shots)
    for split in needed:
        if split not in files:
            raise DataError(f"{task} needs {folder / f'{split}.jsonl'}, which does not exist")
        count = _check_rows(files[split], task, _columns(config))
        if split == shots and count <= num_shots:
            raise ConfigError(
                f"num_fewshot must be below {count}, the number of rows of {files[split]}, got "
                f"{num_shots}"
            )
    overrides: dict[str, Any] = {
        "task": task,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(file) for split, file in files.items()}},
    }
    for key in (*_SPLIT_KEYS, "fewshot_split"):
        if config.get(key) is not None and config[key] not in files:
            overrides[key] = None
    return overrides


def evaluated_split(config: TaskConfig) -> str:
    """Return a task's test split, or its validation split if it has no other."""
    split: str = config.get("test_split") or config.get("validation_split") or "test"
    return split


def _few_shot_split(config: TaskConfig) -> str | None:
    """Return the split that lm-eval draws examples from."""
    options = config.get("fewshot_config") or {}
    if "samples" in options:
        return None
    splits = (config.get(key) for key in _SPLIT_KEYS)
    named = (config.get("fewshot_split"), options.get("split"), *splits)
    return next((split for split in named if split), None)


def _num_shots(config: TaskConfig, wanted: int | None) -> int:
    own = config.get("num_fewshot")
    # lm-eval always keeps a task's own 0.
    shots = own if wanted is None or own == 0 else wanted
    return int(shots or 0)


def _columns(config: TaskConfig) -> set[str]:
    """Return the fields that templates name directly: lm-eval prints the name of a missing one."""
    if "process_docs" in config:
        return set()  # the names belong to rows that code has changed
    texts = [config.get(key) for key in _TEMPLATES]
    return {text for text in texts if isinstance(text, str) and text.isidentifier()}


def first_line_without(file: Path, field: str) -> int | None:
    """Return the first line, from 1, whose object lacks a field at any depth; None if none does."""
    return next((number for number, row in _rows(file) if not _has(row, field)), None)


def _has(value: object, field: str) -> bool:
    if isinstance(value, dict):
        return field in value or any(_has(part, field) for part in value.values())
    return isinstance(value, list) and any(_has(part, field) for part in value)


def _check_rows(file: Path, task: str, fields: set[str]) -> int:
    """Check that all rows have the same fields, including these, and return their number."""
    count = 0
    for number, row in _rows(file):
        count += 1
        if count == 1:
            # A field that is missing in one row would be read as null.
            fields = fields | row.keys()
        missing = sorted(fields - row.keys())
        if missing:
            raise DataError(
                f"{file}, line {number}: no field {missing[0]!r}, which {task} reads; it has: "
                f"{', '.join(row)}"
            )
    if count == 0:
        raise DataError(f"{file} is empty; expected one JSON object per line")
    return count


def _rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:  # Any: parsed JSON
    for number, row in read_json_lines(file):
        if not isinstance(row, dict):
            came = one_line(json.dumps(row))
            raise DataError(f"{file}, line {number}: expected a JSON object, got {came}")
        yield number, row
