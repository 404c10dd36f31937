"""``method.embeddings: factors`` through the program: plan, run, second cut, and refusals."""

import json
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from grasp_lightning.cli import main
from grasp_lightning.models.factored_rows import TiedHead
from tests.conftest import byte_tokenizer, save_tiny
from tests.integration.forked import killed, run_ranks
from tests.integration.killing import Kill
from tests.integration.test_resume import assert_equal_runs

pytestmark = pytest.mark.slow  # it runs the program several times

NAME = "model.embed_tokens"


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = save_tiny(tmp_path_factory.mktemp("model") / "tied", tie_word_embeddings=True)
    texts = [
        f"--{section}.{key}"
        for section in ("calibration", "evaluation")
        for key in ("source=pydoc", "num_samples=4", "seqlen=32")
    ]
    return [f"--model.path={folder}", *texts, "--method.embeddings=factors"]


@pytest.fixture(scope="module")
def half(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "half"
    argv = [*settings, "--method.removed_ratio=0.5", f"--output_dir={folder}"]
    assert main(["compress", *argv]) == 0
    return folder


def operations(folder: Path) -> list[dict]:
    found: list[dict] = json.loads((folder / "plan.json").read_text())["operations"]
    return found


def test_rows_share_the_budget(
    half: Path, settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = json.loads((half / "metrics.json").read_text())
    assert metrics["removed_ratio"] == pytest.approx(0.5, abs=0.002)
    (rows,) = (op for op in operations(half) if op["kind"] == "factorize_rows")
    assert rows["modules"] == [NAME, "lm_head"]
    assert set(rows["groups"][256:259]) == {"0"}  # special tokens
    scores = load_file(half / "scores.safetensors")
    cut = [g for g, rank in enumerate(rows["group_ranks"], 1) if rank]
    assert cut
    for group in cut:
        assert float(scores[f"{NAME}[{group}].measured"]) > 0
    assert f"Rows of embedding and head: {len(cut)} group" in (half / "report.html").read_text()
    assert "tokens in `model.embed_tokens` and `lm_head`" in (half / "model/README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(half / "model")
    assert isinstance(model.lm_head, TiedHead)
    assert sum(p.numel() for p in model.parameters()) == metrics["parameters"]["compressed"]
    assert main(["plan", *settings, "--method.removed_ratio=0.5"]) == 0
    assert "and the rows of embedding and head, share one budget" in capsys.readouterr().out


def test_a_second_cut_equals_a_full_run(half: Path, settings: list[str], tmp_path: Path) -> None:
    argv = [*settings, "--method.removed_ratio=0.4", "--statistics.measured_windows=0"]
    stored = [f"--from_scores={half}", f"--output_dir={tmp_path / 'cut'}"]
    assert main(["compress", *argv, *stored]) == 0
    assert main(["compress", *argv, f"--output_dir={tmp_path / 'full'}"]) == 0
    assert operations(tmp_path / "cut") == operations(tmp_path / "full")


@pytest.mark.parametrize("step", [3, 6])  # of the linears, and of embedding and head
def test_a_killed_run_ends_with_the_bytes_of_one_that_was_not(
    step: int, half: Path, settings: list[str], tmp_path: Path
) -> None:
    where = Kill("grasp_lightning.training.calibration", "CalibrationModule", "training_step", step)
    argv = ["compress", *settings, "--method.removed_ratio=0.5", f"--output_dir={tmp_path / 'run'}"]
    argv += ["--trainer.checkpoint_seconds=0"]
    assert killed(where, signal.SIGKILL, argv) == -signal.SIGKILL
    assert list((tmp_path / "run/checkpoints").glob("pass-*"))
    assert main(argv) == 0
    assert_equal_runs(half, tmp_path / "run")


def test_two_processes_decide_as_one_does(half: Path, settings: list[str], tmp_path: Path) -> None:
    words = ["--method.removed_ratio=0.5", f"--output_dir={tmp_path / 'two'}"]
    both = run_ranks(["compress", *settings, *words, "--trainer.devices=2"], 2)
    assert both.codes == [0, 0], both.text
    assert (half / "plan.json").read_bytes() == (tmp_path / "two/plan.json").read_bytes()


def test_a_larger_text_smooths_the_counts(
    half: Path, settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "corpus.txt").write_text("~" * 1000, encoding="utf-8")  # not in the other text
    (token,) = byte_tokenizer()("~").input_ids
    words = [f"--tokens.corpora={tmp_path / 'corpus.txt'}", "--method.removed_ratio=0.5"]
    folder = tmp_path / "run"
    assert main(["compress", *settings, *words, f"--output_dir={folder}"]) == 0
    before, after = (load_file(f / "statistics-vocabulary.safetensors") for f in (half, folder))
    (one, two) = (found[f"{NAME}.input_square"] for found in (before, after))
    assert two[token] > 10 * one[token]
    assert two[two < one].numel() > 100  # of all others that the text lacks
    assert float(two.sum()) == pytest.approx(1)
    plans = [json.loads((f / "plan.json").read_text())["inputs"] for f in (half, folder)]
    assert plans[1].keys() - plans[0].keys() == {"token_counts"}
    again = ["--method.removed_ratio=0.4", f"--output_dir={tmp_path / 'cut'}"]
    assert main(["compress", *settings, f"--from_scores={half}", *words[:1], *again]) == 2
    assert "was made with another vocabulary" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method.name=low_rank"], "only method grasp_plus factorizes embeddings"),
        (["--method.target=gguf"], "method.embeddings factors needs method.target=any, got gguf"),
        (["--method.ranks=uniform"], "needs method.ranks=global, got uniform"),
        (["--tokens.num_tokens=9"], "tokens.num_tokens has no effect: set method.vocabulary"),
        (["--model.loading=streamed"], "factors measures rows in the whole model: set it to none"),
        (
            ["--trainer.strategy=fsdp"],
            "method.embeddings factors needs whole rows in every process",
        ),
    ],
)
def test_what_cannot_work_is_refused(
    words: list[str],
    message: str,
    settings: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = [*settings, "--method.removed_ratio=0.2", "--statistics.measured_windows=0", *words]
    assert main(["compress", *argv, f"--output_dir={tmp_path / 'run'}"]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_scores_without_rows_are_refused(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = [*settings[:-1], "--method.removed_ratio=0.2", "--statistics.measured_windows=0"]
    assert main(["compress", *plain, f"--output_dir={tmp_path / 'plain'}"]) == 0
    stored = [f"--from_scores={tmp_path / 'plain'}", f"--output_dir={tmp_path / 'cut'}"]
    assert main(["compress", *plain, settings[-1], *stored]) == 2
    assert "has not measured the rows of model.embed_tokens" in capsys.readouterr().err
