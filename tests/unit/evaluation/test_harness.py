"""Tasks of lm-eval on tiny models with local data, against lm-eval's own command line."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from grasp_lightning.errors import ConfigError, DataError, NumericsError
from grasp_lightning.evaluation.harness import Harness, TaskSettings
from grasp_lightning.evaluation.task_results import TaskRun
from grasp_lightning.models.checkpoint import save_model
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.surgery import apply_operations
from grasp_lightning.reading.typed import as_type, to_plain
from tests.conftest import byte_tokenizer, tiny_model
from tests.unit.models.helpers import factorize_layers

pytestmark = pytest.mark.slow  # lm_eval takes seconds to import

NUM_QUESTIONS = 24


def questions() -> Iterator[dict[str, object]]:
    """Yield rows as OpenBookQA has them; a random model answers some of them."""
    for number in range(NUM_QUESTIONS):
        texts = [f"answer {chr(97 + (7 * number + 5 * choice) % 26)}" for choice in range(4)]
        yield {
            "id": str(number),
            "question_stem": f"question {number} asks",
            "choices": {"text": texts, "label": ["A", "B", "C", "D"]},
            "answerKey": "ABCD"[number % 4],
        }


@pytest.fixture
def task_data(tmp_path: Path) -> Path:
    folder = tmp_path / "data" / "openbookqa"
    folder.mkdir(parents=True)
    rows = "".join(json.dumps(row) + "\n" for row in questions())
    (folder / "test.jsonl").write_text(rows)
    return tmp_path / "data"


def run(task_data: Path, **settings: int) -> TaskRun:
    harness = Harness(["openbookqa"], str(task_data), TaskSettings(**settings))
    return harness.run(tiny_model(), byte_tokenizer(), "openbookqa")


def test_accuracy_counts_the_likeliest_answers(task_data: Path) -> None:
    result = run(task_data).results["openbookqa"]
    model, tokenizer = tiny_model(), byte_tokenizer()
    correct = []
    for row in questions():
        likelihoods = []
        assert isinstance(row["choices"], dict)
        for text in row["choices"]["text"]:
            context = tokenizer(str(row["question_stem"]), add_special_tokens=False)["input_ids"]
            answer = tokenizer(f" {text}", add_special_tokens=False)["input_ids"]
            ids = torch.tensor([context + answer])
            with torch.no_grad():
                log_probs = model(ids).logits.log_softmax(-1)[0]
            steps = range(len(context) - 1, len(context) + len(answer) - 1)
            likelihoods.append(
                sum(
                    float(log_probs[step, token]) for step, token in zip(steps, answer, strict=True)
                )
            )
        guess = max(range(4), key=likelihoods.__getitem__)
        correct.append(float("ABCD"[guess] == row["answerKey"]))
    assert result.samples["acc"] == correct
    assert 0 < sum(correct) < NUM_QUESTIONS
    assert result.metrics["acc"].value == pytest.approx(sum(correct) / NUM_QUESTIONS)
    assert (result.num_samples, result.num_fewshot) == (NUM_QUESTIONS, 0)


def test_a_limit_takes_the_first_documents_and_batches_change_nothing(task_data: Path) -> None:
    whole = run(task_data).results["openbookqa"]
    part = run(task_data, limit=6, batch_size=4).results["openbookqa"]
    assert part.num_samples == 6
    assert list(part.samples["acc"]) == list(whole.samples["acc"])[:6]
    assert part.documents != whole.documents


def test_a_run_survives_plain_values(task_data: Path) -> None:
    found = run(task_data, limit=2)
    assert as_type(TaskRun, json.loads(json.dumps(to_plain(found))), "file") == found


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("openbook_qa", "lm-eval has no task, tag or group 'openbook_qa'; the closest names are"),
        ("ai2_arc", "task_data has data for arc_easy of ai2_arc; name the tasks instead: "),
    ],
)
def test_names_that_cannot_be_run_are_refused(task_data: Path, name: str, message: str) -> None:
    (task_data / "arc_easy").mkdir()
    with pytest.raises(ConfigError) as caught:
        Harness([name], str(task_data), TaskSettings())
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"limit": 0}, "limit must be at least 1, got 0"),
        ({"num_fewshot": -1}, "num_fewshot must be at least 0, got -1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_numbers_out_of_range_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}$"):
        Harness(["piqa"], None, TaskSettings(**settings))


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder; expected <task>/<split>"):
        Harness(["piqa"], str(tmp_path / "absent"), TaskSettings())


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        (
            "openbookqa",
            {"choices": {"text": ["a"]}},
            "line 2: no field 'label', which openbookqa reads",
        ),
        (
            "openbookqa",
            {"answerKey": "E"},
            "document 2: openbookqa cannot use it ('E' is not in list)",
        ),
        ("winogrande", {}, "line 1: no field 'answer', which winogrande reads"),
        ("hellaswag", {}, "line 1: no field 'ctx_a', which hellaswag reads"),
    ],
)
def test_documents_that_a_task_cannot_use_are_named_before_a_model_runs(
    task_data: Path, task: str, row: dict[str, object], message: str
) -> None:
    folder = task_data / task
    folder.mkdir(exist_ok=True)
    split = "test" if task == "openbookqa" else "validation"
    good = next(questions())
    lines = [json.dumps(line) for line in (good, {**good, **row})]
    (folder / f"{split}.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError) as caught:
        Harness([task], str(task_data), TaskSettings())
    assert message in str(caught.value)


def test_nan_is_not_an_accuracy(task_data: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        next(model.model.layers[2].parameters()).fill_(float("nan"))
    harness = Harness(["openbookqa"], str(task_data), TaskSettings(limit=2))
    with pytest.raises(NumericsError, match="openbookqa: a likelihood is NaN"):
        harness.run(model, byte_tokenizer(), "openbookqa")


def test_a_fixed_number_of_examples_is_reported(
    task_data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = task_data / "gsm8k_cot_zeroshot"
    folder.mkdir()
    (folder / "test.jsonl").write_text('{"question": "1 + 1", "answer": "so #### 2"}\n')
    names = ["gsm8k_cot_zeroshot"]
    harness = Harness(names, str(task_data), TaskSettings(num_fewshot=1, limit=1))
    model = tiny_model(max_position_embeddings=512)
    found = harness.run(model, byte_tokenizer(), names[0]).results[names[0]]
    assert "exact_match,strict-match" in found.metrics
    assert found.num_fewshot == 0
    assert "has a fixed number of examples, 0, which replaces num_fewshot 1" in caplog.text


def test_data_that_is_only_on_the_hub_says_how_to_go_without(task_data: Path) -> None:
    harness = Harness(["piqa"], str(task_data), TaskSettings(limit=1))
    with pytest.raises(DataError, match=r"put it in <task_data>/piqa/<split>.jsonl"):
        harness.run(tiny_model(), byte_tokenizer(), "piqa")


def test_the_tasks_of_every_shipped_config_exist() -> None:
    folder = Path(__file__).parents[3] / "configs" / "evaluate"
    configs = [yaml.safe_load(file.read_text()) for file in sorted(folder.glob("*.yaml"))]
    names = [task for config in configs for task in config["tasks"]]
    assert {"openbookqa", "race", "longbench"} <= set(names)
    Harness(names, None, TaskSettings())


def test_lm_eval_s_own_command_line_gives_the_same_accuracies(
    task_data: Path, tmp_path: Path
) -> None:
    model = tiny_model()
    view = DecoderView(model)
    apply_operations(view, *factorize_layers(view, [1, 2], rank=3))
    folder = tmp_path / "model"
    save_model(model, folder, tokenizer=byte_tokenizer())
    group = {
        "group": "local",
        "task": [
            {
                "task": "openbookqa",
                "dataset_path": "json",
                "dataset_name": None,
                "dataset_kwargs": {
                    "data_files": {"test": str(task_data / "openbookqa" / "test.jsonl")}
                },
                "training_split": None,
                "validation_split": None,
            }
        ],
    }
    file = tmp_path / "local.yaml"
    file.write_text(yaml.safe_dump(group))
    output = tmp_path / "results"
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", str(file)]
    command += ["--model_args", f"pretrained={folder},trust_remote_code=True,dtype=float32"]
    command += ["--device", "cpu", "--output_path", str(output)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "code")}
    # From an empty folder: the package itself is not needed, nor imported.
    subprocess.run(command, check=True, cwd=tmp_path, env=environment, capture_output=True)
    (written,) = output.rglob("results_*.json")
    theirs = json.loads(written.read_text())["results"]["openbookqa"]
    harness = Harness(["openbookqa"], str(task_data), TaskSettings())
    ours = harness.run(model, byte_tokenizer(), "openbookqa").results["openbookqa"].metrics
    for metric in ("acc", "acc_norm"):
        assert ours[metric].value == theirs[f"{metric},none"]
        assert ours[metric].stderr == theirs[f"{metric}_stderr,none"]
