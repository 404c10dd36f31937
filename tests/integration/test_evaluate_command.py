"""``evaluate`` as a user runs it: numbers, files, resume, and one line for every mistake."""

import json
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from grasp_lightning.cli import main
from grasp_lightning.evaluation.perplexity import evaluate_perplexity
from grasp_lightning.models.decoder import DecoderView
from tests.conftest import byte_tokenizer, save_tiny
from tests.unit.evaluation.test_harness import questions

TEXT = "The quick brown fox jumps over the lazy dog.\nNobody knows why it does so.\n" * 5
SEQLEN = 48
FEW = ("--evaluation.num_samples=2",)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    file = tmp_path / "corpus.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture
def task_data(tmp_path: Path) -> Path:
    folder = tmp_path / "data" / "openbookqa"
    folder.mkdir(parents=True)
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions()))
    return tmp_path / "data"


def evaluate(*argv: object) -> int:
    return main(["evaluate", f"--evaluation.seqlen={SEQLEN}", *map(str, argv)])


def read(file: Path) -> dict[str, Any]:  # Any: values of JSON
    content: dict[str, Any] = json.loads(file.read_text())
    return content


def plain_perplexity(folder: Path) -> float:
    """Loop over windows that do not overlap, the last one shorter, as the definition says."""
    text = "\n\n".join(TEXT.splitlines(keepends=True))
    ids = byte_tokenizer()(text, add_special_tokens=False)["input_ids"]
    assert len(ids) % SEQLEN > 1
    model = AutoModelForCausalLM.from_pretrained(folder)
    losses: list[float] = []
    for start in range(0, len(ids), SEQLEN):
        window = ids[start : start + SEQLEN]
        with torch.no_grad():
            log_probs = model(torch.tensor([window])).logits[0].log_softmax(-1)
        losses += [-float(log_probs[i - 1, window[i]]) for i in range(1, len(window))]
    return math.exp(sum(losses) / len(losses))


def test_perplexity_is_that_of_a_plain_loop(
    tiny_folder: Path, corpus: Path, tmp_path: Path
) -> None:
    output = tmp_path / "results.json"
    assert evaluate(f"--model={tiny_folder}", "--corpora", corpus, "--output", output) == 0
    (result,) = read(output)["models"][0]["corpora"].values()
    assert result["perplexity"] == pytest.approx(plain_perplexity(tiny_folder), rel=1e-5)


def test_matmul_precision_rounds_products_and_is_restored(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del workplace
    before = torch.get_float32_matmul_precision()
    found = {}
    for name in ("highest", "medium"):
        argv = ["--model=tiny-llama", "--corpora=corpus.txt", f"--matmul_precision={name}"]
        assert evaluate(*argv, f"--output={name}.json", "--evaluation.seqlen=16") == 0
        capsys.readouterr()
        (model,) = json.loads(Path(f"{name}.json").read_text())["models"]
        found[name] = model["corpora"]["corpus.txt"]["perplexity"]
    assert torch.get_float32_matmul_precision() == before
    assert found["medium"] == pytest.approx(found["highest"], rel=0.01)


def test_rows_of_a_file_are_a_setting_of_the_results(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus, output = tmp_path / "rows.jsonl", tmp_path / "results.json"
    corpus.write_text("".join(json.dumps({"text": f"Text {i}. " * 9}) + "\n" for i in range(9)))
    argv = [f"--model={tiny_folder}", f"--corpora={corpus}", f"--output={output}"]
    assert evaluate(*argv, "--evaluation.rows=0-3") == 0
    (result,) = read(output)["models"][0]["corpora"].values()
    # Neither the first token of a window nor that of a document is predicted.
    assert result["num_tokens"] == 4 * 72 - 6 - 2
    assert evaluate(*argv) == 2
    assert "evaluation.rows 0-3, now it is None" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_models_stand_side_by_side_with_paired_differences(
    tiny_folder: Path,
    corpus: Path,
    task_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other, output = save_tiny(tmp_path / "other", seed=1), tmp_path / "results.json"
    argv = [f"--model={tiny_folder}", f"--model={other}", f"--corpora={corpus}"]
    argv += ["--tasks=openbookqa", f"--task_data={task_data}", f"--output={output}"]
    assert evaluate(*argv) == 0
    content = read(output)
    first, second = content["models"]
    assert [first["model"], second["model"]] == [str(tiny_folder), str(other)]
    results = [model["tasks"]["openbookqa"]["results"]["openbookqa"] for model in (first, second)]
    samples = [result["samples"]["acc"] for result in results]
    difference = content["differences"]["models"][str(other)]["openbookqa"]["acc"]
    expected = [b - a for a, b in zip(*samples, strict=True)]
    assert difference["value"] == pytest.approx(sum(expected) / len(expected))
    variance = torch.tensor(expected, dtype=torch.float64).var()
    assert difference["stderr"] == pytest.approx(math.sqrt(float(variance) / len(expected)))
    printed = capsys.readouterr().out
    assert "openbookqa, acc_norm" in printed
    assert "parameters in decoder linears" in printed
    assert f"results: {output}" in printed


@pytest.mark.slow
def test_what_is_finished_is_not_measured_again(
    tiny_folder: Path, corpus: Path, task_data: Path, tmp_path: Path
) -> None:
    output = tmp_path / "results.json"
    argv = [f"--model={tiny_folder}", f"--output={output}", f"--corpora={corpus}"]
    assert evaluate(*argv) == 0
    corpora = read(output)["models"][0]["corpora"]
    tasks = [*argv, "--tasks=openbookqa", f"--task_data={task_data}"]
    assert evaluate(*tasks) == 0
    content = read(output)
    assert content["models"][0]["corpora"] == corpora  # seconds among them
    assert evaluate(*tasks) == 0
    assert read(output) == content
    other = save_tiny(tmp_path / "other", seed=1)
    assert evaluate(f"--model={other}", *tasks) == 0
    assert [model["model"] for model in read(output)["models"]] == [str(other), str(tiny_folder)]
    assert read(output)["models"][1] == content["models"][0]
    assert read(output)["differences"]["to"] == str(other)
    # Only the requested parts are measured again, and nothing else is lost.
    assert (
        evaluate(
            f"--model={other}",
            f"--output={output}",
            "--tasks=openbookqa",
            f"--task_data={task_data}",
            "--overwrite",
        )
        == 0
    )
    models = {model["model"]: model for model in read(output)["models"]}
    assert models[str(tiny_folder)] == content["models"][0]
    assert list(models[str(other)]["corpora"]) == [str(corpus)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--evaluation.seqlen=32", "with evaluation.seqlen 48, now it is 32; name another file"),
        ("--limit=3", "with limit None, now it is 3"),
        ("--dtype=bfloat16", "with dtype auto, now it is bfloat16"),
        ("--matmul_precision=medium", "with matmul_precision highest, now it is medium"),
    ],
)
def test_other_settings_are_not_mixed_with_stored_results(
    workplace: Path, task_data: Path, flag: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = workplace / "results.json"
    argv = ["--model=tiny-llama", f"--output={output}", "--corpora=corpus.txt"]
    argv += ["--tasks=openbookqa", f"--task_data={task_data}"]
    assert evaluate(*argv) == 0
    before = output.read_bytes()
    assert evaluate(*argv, flag) == 2
    assert message in capsys.readouterr().err
    assert output.read_bytes() == before
    assert evaluate(*argv, flag, "--overwrite") == 0


@pytest.mark.slow
def test_a_changed_text_or_task_is_noticed(
    tiny_folder: Path, corpus: Path, task_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = corpus.parent / "results.json"
    argv = [f"--model={tiny_folder}", f"--output={output}"]
    texts, tasks = [f"--corpora={corpus}"], ["--tasks=openbookqa", f"--task_data={task_data}"]
    assert evaluate(*argv, *texts, *tasks) == 0
    corpus.write_text(TEXT[::-1])
    assert evaluate(*argv, *texts) == 2
    assert f"the perplexity on an earlier version of {corpus}" in capsys.readouterr().err
    file = task_data / "openbookqa" / "test.jsonl"
    file.write_text("".join(reversed(file.read_text().splitlines(keepends=True))))
    assert evaluate(*argv, *tasks) == 2
    assert "contains results with task_data.openbookqa" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_evaluation_resumes_after_its_last_measurement(
    tiny_folder: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, second = tmp_path / "results.json", tmp_path / "second.txt"
    second.write_text(TEXT[::-1])
    argv = [f"--model={tiny_folder}", f"--corpora={corpus},{second}", f"--output={output}"]
    seen = []

    def killed(view: DecoderView, batches: Iterable[Mapping[str, Tensor]]) -> float:
        seen.append(1)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return evaluate_perplexity(view, batches)

    monkeypatch.setattr("grasp_lightning.commands.workflow.evaluate_perplexity", killed)
    assert evaluate(*argv) == 130
    stored = read(output)["models"][0]["corpora"]
    assert list(stored) == [str(corpus)]
    assert evaluate(*argv) == 0
    assert len(seen) == 3  # the second text alone
    assert read(output)["models"][0]["corpora"][str(corpus)] == stored[str(corpus)]


@pytest.mark.slow
def test_a_run_s_metrics_and_report_gain_the_evaluation(
    tiny_folder: Path, task_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    argv = [f"--model.path={tiny_folder}", f"--output_dir={run}", "--method.name=drop"]
    argv += ["--method.num_layers=1", "--calibration.source=pydoc", "--calibration.num_samples=2"]
    argv += ["--calibration.seqlen=32", "--evaluation.source=pydoc", "--evaluation.seqlen=32"]
    argv += ["--evaluation.num_samples=2"]
    assert main(["compress", *argv]) == 0
    before = read(run / "metrics.json")
    assert before["evaluation"] is None
    tasks = ["--tasks=openbookqa", f"--task_data={task_data}", "--limit=5"]
    assert evaluate(f"--model={run / 'model'}", *tasks) == 0
    after = read(run / "metrics.json")
    task = after["evaluation"]["tasks"]["openbookqa"]
    assert (task["num_samples"], set(task["metrics"])) == (5, {"acc", "acc_norm"})
    assert {**after, "evaluation": None} == before
    assert "openbookqa, acc_norm, 5 documents" in (run / "report.html").read_text()
    assert evaluate(f"--model={run / 'model'}", "--corpora=pydoc", *FEW) == 0
    both = read(run / "metrics.json")["evaluation"]
    assert both["tasks"] == after["evaluation"]["tasks"]
    assert set(both["corpora"]) == {"pydoc"}
    after = read(run / "metrics.json")
    # The run is still finished, and its own.
    assert main(["compress", *argv]) == 0
    assert read(run / "metrics.json") == after
    assert not (run / ".lock").exists()


@pytest.fixture
def workplace(tiny_folder: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model, a corpus, and things that are neither."""
    folder = corpus.parent
    monkeypatch.chdir(folder)
    (folder / "short.txt").write_text("too short")
    (folder / "empty").mkdir()
    save_tiny(folder / "bare")
    for file in (folder / "bare").glob("tokenizer*"):
        file.unlink()
    assert tiny_folder.parent == folder
    return folder


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tasks=openbook_qa"], "lm-eval has no task, tag or group 'openbook_qa'; the closest"),
        (["--tasks=openbookqa", "--task_data=absent"], "task_data: absent is not a folder"),
        (["--task_data=data"], "task_data has no effect without tasks"),
        (["--corpora=wikitext3"], "corpora: expected pydoc, wikitext2, c4, ptb, or a file"),
        (["--corpora=absent.txt"], "absent.txt does not exist"),
        (["--corpora=corpus.txt", "--evaluation.seqlen=500"], "evaluation.seqlen is 500, but"),
        (["--corpora=corpus.txt", "--evaluation.seqlen=1"], "evaluation.seqlen must be at least 2"),
        (
            ["--corpora=short.txt", "--evaluation.tail=drop"],
            "gives 0 windows of 48 tokens; lower evaluation.num_samples or evaluation.seqlen",
        ),
        (["--corpora=short.txt"], "evaluation.seqlen is 48, but short.txt has only 9 tokens"),
        (["--corpora=pydoc,pydoc"], "corpora: pydoc is named twice"),
        (["--model=./absent/model"], "no such file or folder: ./absent/model"),
        (["--model=empty"], "is not a model folder: it has no config.json"),
        (["--model=bare"], "cannot load the tokenizer of bare"),
        (["--tasks"], "command line: --tasks needs a name"),
        (["--tasks=piqa", "--seed=-1"], "seed must be at least 0, got -1"),
        (["--revision=abc"], "revision has no effect: no model comes from the hub"),
        (["--output=corpus.txt"], "corpus.txt exists and is not an output of evaluate"),
        (["--output=empty"], "is a folder"),
        (["--limit=0", "--tasks=piqa"], "limit must be at least 1, got 0"),
    ],
)
def test_every_mistake_is_one_line(
    workplace: Path, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {file: file.read_bytes() for file in workplace.glob("*.*")}
    assert evaluate("--model=tiny-llama", *argv) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert [line for line in errors if line.startswith("error: ")] == errors[-1:]
    assert message in errors[-1]
    assert {file: file.read_bytes() for file in workplace.glob("*.*")} == before


def test_without_lm_eval_tasks_say_how_to_get_it(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # importing it fails
    assert evaluate(f"--model={tiny_folder}", "--tasks=piqa") == 2
    assert "pip install 'grasp-lightning[eval]'" in capsys.readouterr().err
    assert evaluate(f"--model={tiny_folder}") == 0


def test_a_run_that_cannot_be_written_costs_a_warning(
    tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    argv = [f"--model.path={tiny_folder}", f"--output_dir={run}", "--method.name=drop"]
    argv += ["--method.num_layers=1", "--calibration.source=pydoc", "--calibration.num_samples=2"]
    argv += ["--calibration.seqlen=32", "--evaluation.source=pydoc", "--evaluation.seqlen=32"]
    assert main(["compress", *argv, "--evaluation.num_samples=2"]) == 0
    (run / "plan.json").write_text("{}")
    assert evaluate(f"--model={run / 'model'}", "--corpora=pydoc", *FEW) == 0
    assert "is not added to its run" in caplog.text
    assert read(run / "metrics.json")["evaluation"] is None


def test_other_weights_under_a_stored_name_are_refused(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results.json"
    argv = [f"--model={tiny_folder}", f"--output={output}"]
    assert evaluate(*argv) == 0
    save_tiny(tiny_folder, seed=5)
    assert evaluate(*argv) == 2
    assert f"contains results of an earlier version of {tiny_folder}" in capsys.readouterr().err
