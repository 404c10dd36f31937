"""``method.vocabulary: corpus``: tokens that texts never use go first, and count in the budget."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from grasp_lightning import compress
from grasp_lightning.cli import main
from grasp_lightning.errors import ConfigError
from tests.conftest import byte_tokenizer, tiny_model
from tests.integration.forked import killed, run_ranks
from tests.integration.killing import Kill
from tests.integration.test_resume import assert_equal_runs
from tests.integration.trimming import NUM_ROWS, save_model_of

pytestmark = pytest.mark.slow  # it runs the program several times

RATIO = 0.3
TEXTS = [
    f"--{section}.{key}"
    for section in ("calibration", "evaluation")
    for key in ("source=pydoc", "num_samples=4", "seqlen=32")
]
QUICK = "--statistics.measured_windows=0"
TRAINING_STEP = Kill(
    "grasp_lightning.training.calibration", "CalibrationModule", "training_step", 2
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_model_of(
        "byte_level",
        tmp_path_factory.mktemp("model") / "tiny",
        hidden_size=64,
        intermediate_size=192,
        tie_word_embeddings=True,
    )
    (folder.parent / "other.txt").write_text(Path(json.__file__).read_text(), encoding="utf-8")
    (folder / "LICENSE").write_text("Do what you like.\n")
    (folder / "vocab.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def settings(source: Path) -> list[str]:
    texts = {"corpora": "corpus.txt", "unnamed": "other.txt"}
    named = [f"--tokens.{key}={source.parent / name}" for key, name in texts.items()]
    return [f"--model.path={source}", *TEXTS, QUICK, "--method.vocabulary=corpus", *named]


@pytest.fixture(scope="module")
def run(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    argv = [*settings, f"--method.removed_ratio={RATIO}", f"--output_dir={folder}"]
    assert main(["compress", *argv]) == 0
    return folder


@pytest.fixture(scope="module")
def trimmed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trimmed") / "out"
    texts = {"corpora": "corpus.txt", "unnamed": "other.txt"}
    named = [f"--{key}={source.parent / name}" for key, name in texts.items()]
    assert main(["trim", f"--model.path={source}", *named, f"--output_dir={folder}"]) == 0
    return folder


def contents(folder: Path, name: str) -> dict:
    found: dict = json.loads((folder / name).read_text())
    return found


def test_it_is_a_trim_and_a_compression_with_what_is_left_of_the_budget(
    run: Path, trimmed: Path, tmp_path: Path
) -> None:
    facts, metrics = contents(run, "trim.json"), contents(run, "metrics.json")
    expected = contents(trimmed, "trim.json")
    del expected["source_sha256"]
    assert facts == expected
    before, after = (facts["parameters"][key] for key in ("before", "after"))
    assert metrics["parameters"]["dense"] == before
    assert metrics["removed_ratio"] == pytest.approx(RATIO, abs=0.002)
    left = (round(RATIO * before) - (before - after)) / after
    words = [f"--model.path={trimmed / 'model'}", f"--method.removed_ratio={left!r}"]
    assert main(["compress", *words, *TEXTS, QUICK, f"--output_dir={tmp_path / 'two'}"]) == 0
    one, two = (load_file(f / "model/model.safetensors") for f in (run, tmp_path / "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        assert contents(run / "model", name) == contents(tmp_path / "two/model", name), name


def test_the_folder_and_its_papers_say_what_went(run: Path, source: Path) -> None:
    folder, facts = run / "model", contents(run, "trim.json")
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    number = facts["tokens"]["after"]
    assert (
        model.config.vocab_size == model.get_input_embeddings().num_embeddings == number < NUM_ROWS
    )
    assert len(tokenizer) == number
    assert not (folder / "vocab.json").exists()  # of the old vocabulary
    assert (folder / "LICENSE").is_file()
    metrics = contents(run, "metrics.json")
    assert metrics["parameters"]["compressed"] == sum(p.numel() for p in model.parameters())
    assert metrics["vocabulary"]["texts"] == facts["texts"]
    removed = facts["parameters"]["before"] - facts["parameters"]["after"]
    card, report = (folder / "README.md").read_text(), (run / "report.html").read_text()
    for text in (card, report):
        assert (
            f"{NUM_ROWS - number:,} of {NUM_ROWS:,} tokens are removed, with {removed:,} param"
            in text
        )
        assert "Tokens per byte of text: corpus.txt x 1.00, other.txt (not named) x 1." in text
    assert "tokens that `corpus.txt` do not use were removed" in card
    assert str(source.parent) not in card
    plan = contents(run, "plan.json")
    assert plan["options"]["removed_ratio"] == RATIO
    assert plan["options"]["vocabulary"] == "corpus"


def test_plan_and_dry_run_predict_it(
    run: Path, settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts = contents(run, "trim.json")
    before, gone = facts["parameters"]["before"], NUM_ROWS - facts["tokens"]["after"]
    words = [*settings, f"--method.removed_ratio={RATIO}"]
    for argv in (["plan", *words], ["compress", *words, f"--output_dir={tmp_path}", "--dry_run"]):
        capsys.readouterr()
        assert main(argv) == 0
        first, second, third, *_ = capsys.readouterr().out.splitlines()
        assert first.startswith(f"30.0% of {before:,} parameters removed")
        assert second.startswith(f"{gone:,} of {NUM_ROWS:,} tokens are removed, with ")
        assert third.startswith("tokens per byte of text: corpus.txt x 1.00, ")
    assert not any(tmp_path.iterdir())


def test_other_methods_take_what_is_left(settings: list[str], tmp_path: Path) -> None:
    words = ["--method.name=drop", "--method.removed_ratio=0.35"]
    assert main(["compress", *settings, *words, f"--output_dir={tmp_path}"]) == 0
    metrics = contents(tmp_path, "metrics.json")
    assert len(metrics["layers"]) >= 1
    assert metrics["removed_ratio"] == pytest.approx(0.35, abs=0.06)  # of whole layers


def test_a_killed_run_ends_with_the_bytes_of_one_that_was_not(
    run: Path, settings: list[str], tmp_path: Path
) -> None:
    words = [f"--method.removed_ratio={RATIO}", "--trainer.checkpoint_seconds=0"]
    whole = ["compress", *settings, *words, f"--output_dir={tmp_path / 'whole'}"]
    assert main(whole) == 0
    argv = ["compress", *settings, *words, f"--output_dir={tmp_path / 'run'}"]
    assert killed(TRAINING_STEP, signal.SIGKILL, argv) == -signal.SIGKILL
    assert list((tmp_path / "run/checkpoints").glob("pass-*"))
    assert main(argv) == 0
    assert_equal_runs(run, tmp_path / "run")
    assert contents(run, "trim.json") == contents(tmp_path / "run", "trim.json")


def test_two_processes_decide_as_one_does(run: Path, settings: list[str], tmp_path: Path) -> None:
    words = [f"--method.removed_ratio={RATIO}", f"--output_dir={tmp_path / 'two'}"]
    both = run_ranks(["compress", *settings, *words, "--trainer.devices=2"], 2)
    assert both.codes == [0, 0], both.text
    assert (run / "plan.json").read_bytes() == (tmp_path / "two/plan.json").read_bytes()


def test_a_second_cut_needs_the_same_vocabulary(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"--from_scores={run}", "--method.removed_ratio=0.4"]
    assert main(["compress", *words, f"--output_dir={tmp_path / 'cut'}"]) == 0
    cut = contents(tmp_path / "cut", "metrics.json")
    assert cut["removed_ratio"] == pytest.approx(0.4, abs=0.002)
    assert contents(tmp_path / "cut", "trim.json") == contents(run, "trim.json")
    capsys.readouterr()
    other = ["--tokens.num_tokens=2000", f"--output_dir={tmp_path / 'other'}"]
    assert main(["compress", *words, *other]) == 2
    assert "was made with another vocabulary: use its" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_rows_that_stay_can_become_factors(settings: list[str], tmp_path: Path) -> None:
    words = ["--method.embeddings=factors", "--method.removed_ratio=0.5"]
    assert main(["compress", *settings, *words, f"--output_dir={tmp_path}"]) == 0
    metrics, plan = contents(tmp_path, "metrics.json"), contents(tmp_path, "plan.json")
    assert metrics["removed_ratio"] == pytest.approx(0.5, abs=0.002)
    rows = [op for op in plan["operations"] if op["kind"] == "factorize_rows"]
    assert rows
    assert {len(op["groups"]) for op in rows} == {
        contents(tmp_path, "trim.json")["tokens"]["after"]
    }
    assert (
        "Token ids and the tokenizer did not change"
        not in (tmp_path / "model/README.md").read_text()
    )


def mistakes(source: Path, root: Path) -> dict[str, str]:
    """Message of each mistake, by the word that makes it."""
    (root / "short.txt").write_text("A short text.", encoding="utf-8")
    content = contents(source, "tokenizer.json")
    ids = {token: index for index, token in enumerate(content["model"]["vocab"])}
    level = {"type": "WordLevel", "vocab": ids, "unk_token": "<unk>"}
    folder = shutil.copytree(source, root / "words")
    (folder / "tokenizer.json").write_text(json.dumps({**content, "model": level}))
    return {
        "--method.vocabulary=keep": "tokens.corpora has no effect: set method.vocabulary=corpus or",
        "--tokens.corpora=wikitext3": "tokens.corpora: expected pydoc, wikitext2",
        f"--tokens.corpora={root / 'short.txt'}": "only 4 different tokens, expected at",
        "--tokens.num_tokens=20": "tokens.num_tokens is 20, but 260 tokens must stay",
        "--method.removed_ratio=0.05": "but trimming the vocabulary alone removes 0.0990: set",
        "--method.removed_ratio=0.9": "parameters that trimming the vocabulary leaves)",
        "--method.name=wanda": "but method wanda sets weights to zero and removes none",
        "--trainer.strategy=fsdp": "but trainer.strategy fsdp divides rows among processes",
        "--model.loading=streamed": "but rows are removed in the whole model: set",
        f"--model.path={folder}": "of type WordLevel, which cannot be trimmed; expected one of BPE",
    }


def test_every_contradiction_is_one_line_and_leaves_nothing(
    settings: list[str], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [*settings, f"--method.removed_ratio={RATIO}", f"--output_dir={tmp_path / 'run'}"]
    for word, message in mistakes(source, tmp_path).items():
        capsys.readouterr()
        assert main(["compress", *argv, word]) == 2, word
        told = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
        assert message in told[-1]
        assert not (tmp_path / "run").exists()
    without = [word for word in argv if "--tokens.corpora" not in word]
    assert main(["plan", *without]) == 2
    assert "tokens.corpora is empty; name at least one text" in capsys.readouterr().err


def test_a_model_in_memory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the model is already in memory: give its path, or"):
        compress(
            tiny_model(),
            tokenizer=byte_tokenizer(),
            output_dir=tmp_path / "run",
            method={"vocabulary": "corpus", "removed_ratio": 0.3},
            tokens={"corpora": ["pydoc"]},
        )
