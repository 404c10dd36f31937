import json
import re
from pathlib import Path
from typing import Any

import pytest

from grasp_lightning.errors import ConfigError, DataError
from grasp_lightning.evaluation.task_data import first_line_without, local_config

# Any: a task's configuration as YAML has it.
QUIZ: dict[str, Any] = {
    "task": "quiz",
    "dataset_path": "hub/quiz",
    "dataset_name": "main",
    "training_split": "train",
    "validation_split": "validation",
    "test_split": "test",
    "doc_to_text": "question",
    "doc_to_target": "{{choices.label.index(key)}}",
    "doc_to_choice": "{{choices.text}}",
}
ROW = {"question": "?", "choices": {"text": ["a"], "label": ["A"]}, "key": "A"}


def write(folder: Path, split: str, *rows: object) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / f"{split}.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    file.write_text("".join(f"{line}\n" for line in lines))
    return file


def refusal(folder: Path, config: dict[str, Any] = QUIZ, num_fewshot: int | None = 0) -> str:
    with pytest.raises(DataError) as caught:
        local_config("quiz", config, folder, num_fewshot=num_fewshot)
    return str(caught.value)


def test_only_the_data_of_a_task_changes(tmp_path: Path) -> None:
    test = write(tmp_path, "test", ROW)
    assert local_config("quiz", QUIZ, tmp_path, num_fewshot=None) == {
        "task": "quiz",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(test)}},
        "training_split": None,
        "validation_split": None,
    }


def test_a_task_is_never_evaluated_on_another_split(tmp_path: Path) -> None:
    write(tmp_path, "validation", ROW)
    assert refusal(tmp_path) == f"quiz needs {tmp_path / 'test.jsonl'}, which does not exist"


def test_a_task_without_test_split_is_evaluated_on_its_validation_split(tmp_path: Path) -> None:
    config = {**QUIZ, "test_split": None}
    file = write(tmp_path, "validation", ROW)
    found = local_config("quiz", config, tmp_path, num_fewshot=None)
    assert found["dataset_kwargs"]["data_files"] == {"validation": str(file)}
    assert "validation_split" not in found


def test_examples_come_from_the_split_that_lm_eval_takes_them_from(tmp_path: Path) -> None:
    write(tmp_path, "test", ROW)
    write(tmp_path, "validation", ROW)
    message = f"quiz needs {tmp_path / 'train.jsonl'}, which does not exist"
    assert refusal(tmp_path, num_fewshot=2) == message
    assert refusal(tmp_path, {**QUIZ, "num_fewshot": 5}, num_fewshot=None) == message
    # lm-eval keeps a task's own 0.
    local_config("quiz", {**QUIZ, "num_fewshot": 0}, tmp_path, num_fewshot=2)
    write(tmp_path, "train", *[ROW] * 6)
    local_config("quiz", QUIZ, tmp_path, num_fewshot=2)


@pytest.mark.parametrize("missing", ["question", "choices", "key"])
def test_a_missing_field_is_named_with_file_and_line(tmp_path: Path, missing: str) -> None:
    other = {key: value for key, value in ROW.items() if key != missing}
    file = write(tmp_path, "test", ROW, ROW, other)
    assert refusal(tmp_path) == (
        f"{file}, line 3: no field {missing!r}, which quiz reads; it has: {', '.join(other)}"
    )


def test_a_field_that_the_task_names_itself_is_needed_in_the_first_row_too(tmp_path: Path) -> None:
    file = write(tmp_path, "test", {"choices": ROW["choices"], "key": "A"})
    assert f"{file}, line 1: no field 'question', which quiz reads" in refusal(tmp_path)


def test_there_must_be_more_rows_than_examples(tmp_path: Path) -> None:
    write(tmp_path, "test", ROW)
    file = write(tmp_path, "train", ROW, ROW)
    local_config("quiz", QUIZ, tmp_path, num_fewshot=1)
    message = f"num_fewshot must be below 2, the number of rows of {file}, got 2"
    with pytest.raises(ConfigError, match=re.escape(message)):
        local_config("quiz", QUIZ, tmp_path, num_fewshot=2)


def test_the_first_line_without_a_field_is_found_at_any_depth(tmp_path: Path) -> None:
    file = write(tmp_path, "test", ROW, {**ROW, "choices": {"text": ["a"]}})
    assert first_line_without(file, "label") == 2
    assert first_line_without(file, "text") is None


def test_rows_that_code_reads_must_be_like_the_first(tmp_path: Path) -> None:
    config = {**QUIZ, "process_docs": "/lm_eval/tasks/quiz/utils.process"}
    file = write(tmp_path, "test", {"ctx": "a", "label": 1}, {"ctx": "b"})
    assert f"{file}, line 2: no field 'label'" in refusal(tmp_path, config)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{broken", "line 2 is not JSON"),
        ("[1, 2]", "line 2: expected a JSON object, got [1, 2]"),
    ],
)
def test_lines_that_are_not_objects_are_named(tmp_path: Path, line: str, message: str) -> None:
    file = write(tmp_path, "test", ROW, line)
    assert re.search(re.escape(f"{file}, {message}"), refusal(tmp_path))


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path, "test")
    assert refusal(tmp_path) == f"{file} is empty; expected one JSON object per line"


def test_tasks_that_load_their_data_by_code_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "test", ROW)
    with pytest.raises(ConfigError, match="quiz loads its data with its own code"):
        local_config("quiz", {"task": "quiz", "class": "Quiz"}, tmp_path, num_fewshot=0)
