"""``compress`` on mixtures, instructions, and text that the model generates."""

import json
from pathlib import Path

import pytest

from grasp_lightning.cli import main
from grasp_lightning.plan import Plan
from tests.conftest import byte_tokenizer, save_tiny

pytestmark = pytest.mark.slow  # every test runs the program several times


@pytest.fixture
def settings(tiny_folder: Path) -> list[str]:
    return [
        f"--model.path={tiny_folder}",
        "--method.name=grasp",
        "--method.num_layers=2",
        "--method.keep_ratio=0.3",
        "--calibration.num_samples=8",
        "--calibration.seqlen=48",
        "--evaluation.num_samples=3",
        "--evaluation.seqlen=48",
    ]


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    texts = (f"Document {number} is about the number {number}. " * 3 for number in range(40))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture
def samples_file(tmp_path: Path) -> Path:
    path = tmp_path / "samples.json"
    samples = [{"instruction": f"Count to {n}.", "output": "1, 2, 3"} for n in range(40)]
    path.write_text(json.dumps(samples))
    return path


def compress(settings: list[str], folder: Path, *more: str) -> Plan:
    assert main(["compress", *settings, f"--output_dir={folder}", *more]) == 0
    return Plan.from_json((folder / "plan.json").read_text())


def test_a_mixture_of_everything_compresses_and_is_named(
    settings: list[str], rows_file: Path, samples_file: Path, tmp_path: Path
) -> None:
    words = [
        "--calibration.source=[pydoc,file,instructions,self]",
        "--calibration.weights=[2,3,2,1]",
        f"--calibration.path=[{rows_file},{samples_file}]",
        "--calibration.rows=[0-19,0-]",
        "--evaluation.source=file",
        f"--evaluation.path={rows_file}",
        "--evaluation.rows=20-39",
    ]
    first = compress(settings, tmp_path / "first", *words)
    assert first.complete
    assert compress(settings, tmp_path / "second", *words) == first
    card = (tmp_path / "first" / "model" / "README.md").read_text()
    assert "`pydoc` (2), a local file (3), a local file of instructions (2), text that" in card
    assert "`pydoc` PSF License Agreement" in card
    report = (tmp_path / "first" / "report.html").read_text()
    assert all(f"- {source}\n" in report for source in ("pydoc", "file", "instructions", "self"))
    assert main(["compress", *settings, f"--output_dir={tmp_path / 'first'}", *words]) == 0
    other = compress(settings, tmp_path / "other", *words, "--calibration.weights=[1,1,1,1]")
    assert other.inputs["calibration"] != first.inputs["calibration"]


@pytest.mark.parametrize("schedule", ["one_shot", "iterative"])
def test_a_model_is_compressed_without_data(
    settings: list[str], schedule: str, tmp_path: Path
) -> None:
    words = [
        f"--method.schedule={schedule}",
        "--calibration.source=self",
        "--evaluation.source=pydoc",
    ]
    first = compress(settings, tmp_path / "first", *words)
    second = compress(settings, tmp_path / "second", *words, "--calibration.batch_size=3")
    seconds = json.loads((tmp_path / "first" / "metrics.json").read_text())["seconds"]
    assert seconds["sample"] > 0
    assert seconds["load"] + seconds["sample"] < seconds["total"]
    assert first.complete
    assert second.inputs == first.inputs
    other = compress(settings, tmp_path / "other", *words, "--seed=1")
    assert other.inputs["calibration"] != first.inputs["calibration"]
    card = (tmp_path / "first" / "model" / "README.md").read_text()
    assert "Calibration text: text that the base model generated, 8 windows of 48 tokens." in card


def test_scores_of_a_mixture_are_cut_again(settings: list[str], tmp_path: Path) -> None:
    words = ["--calibration.source=[pydoc,self]", "--evaluation.source=pydoc"]
    first = compress(settings, tmp_path / "first", *words)
    argv = [f"--from_scores={tmp_path / 'first'}", "--method.keep_ratio=0.2"]
    assert main(["compress", *argv, f"--output_dir={tmp_path / 'again'}"]) == 0
    again = Plan.from_json((tmp_path / "again" / "plan.json").read_text())
    assert again.inputs == first.inputs


def test_a_refit_of_a_stored_run_reads_the_text_that_is_stored_with_it(
    settings: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = [word for word in settings if not word.startswith("--method")]
    words += ["--method.removed_ratio=0.2", "--calibration.source=[pydoc,self]"]
    first = compress(words, tmp_path / "first", "--evaluation.source=pydoc")
    monkeypatch.setattr(
        "grasp_lightning.models.sampling._continued", lambda *_: pytest.fail("written again")
    )
    argv = [f"--from_scores={tmp_path / 'first'}", "--method.removed_ratio=0.3"]
    assert main(["compress", *argv, f"--output_dir={tmp_path / 'again'}"]) == 0
    again = Plan.from_json((tmp_path / "again" / "plan.json").read_text())
    assert again.inputs == first.inputs
    assert again.options["refit"] == "residual"
    argv[1:] = ["--seed=1"]
    assert main(["compress", *argv, f"--output_dir={tmp_path / 'other'}"]) == 2
    assert "use its calibration settings and seed" in capsys.readouterr().err


def test_instructions_take_the_chat_template_of_the_model(
    settings: list[str], samples_file: Path, tmp_path: Path
) -> None:
    words = [
        "--calibration.source=instructions",
        f"--calibration.path={samples_file}",
        "--evaluation.source=pydoc",
    ]
    plain = compress(settings, tmp_path / "plain", *words)
    save_tiny(tmp_path / "tiny-llama")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "tiny-llama")
    chat = compress(settings, tmp_path / "chat", *words)
    assert chat.inputs["model"] == plain.inputs["model"]
    assert chat.inputs["calibration"] != plain.inputs["calibration"]
