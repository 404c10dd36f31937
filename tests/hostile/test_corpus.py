"""Every command, on every kind of bad input: exit code 2, one line, and nothing written."""

import json
import os
import shutil
from itertools import cycle
from pathlib import Path

import pytest

from grasp_lightning.cli import COMMANDS, main
from grasp_lightning.plan import Plan
from tests.conftest import save_tiny
from tests.hostile import corpus

Words = dict[str, str]

TEXT = "The quick brown fox jumps over the lazy dog.\n" * 40
PATH_KEYS = {
    "compress": ("model.path", "output_dir", "from_scores", "calibration.path", "evaluation.path"),
    "plan": ("model.path", "compensate", "model.gguf_file", "config"),
    "compensate": ("model.path", "output_dir", "data.path", "text.path", "distillation.teacher"),
    "evaluate": ("model", "corpora", "task_data", "output", "config"),
    "benchmark": ("model", "against", "output"),
    "export": ("model", "output_dir"),
    "trim": ("model.path", "output_dir", "corpora", "unnamed"),
    "compare": ("output_dir", "config"),
}
GRID = """
models: {{tiny: {{path: {model}}}}}
methods: {{drop: {{name: drop, num_layers: 1}}}}
calibration: {{source: file, path: ../text.txt, num_samples: 2, seqlen: 16}}
texts: {{held out: {{source: file, path: ../text.txt, num_samples: 2, seqlen: 16}}}}
"""


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with which every command below would work."""
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def work(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, empty; what commands read is next to it."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "grid.yaml").write_text(GRID.format(model=sound))
    return folder


def words_of(command: str, given: Path, **changes: str) -> list[str]:
    """A command line that would work without the change."""
    text = "--{}.source=file --{}.path=../text.txt --{}.num_samples=2 --{}.seqlen=16"
    held_out = text.replace("{}", "evaluation").split()
    lines = {
        "compress": [
            *(f"--model.path={given} --output_dir=run --method.name=drop").split(),
            *("--method.num_layers=1", *text.replace("{}", "calibration").split(), *held_out),
        ],
        "plan": [f"--model.path={given}", "--method.name=drop", "--method.num_layers=1"],
        "compensate": [
            *(f"--model.path={given} --output_dir=run --objective=text --train=lora").split(),
            *(
                "--lora.rank=2",
                "--optimizer.warmup_steps=0",
                "--text.source=file",
                "--text.path=../text.txt",
                *held_out,
            ),
            *("--text.num_samples=4", "--text.num_validation=0", "--text.seqlen=16"),
        ],
        "evaluate": [f"--model={given}", "--corpora=../text.txt", "--evaluation.seqlen=16"],
        "benchmark": [f"--model={given}", "--prefill_lengths=[8]", "--prompt_length=8"],
        "export": [f"--model={given}", "--output_dir=run"],
        "trim": [f"--model.path={given}", "--corpora=pydoc", "--output_dir=run"],
        "compare": ["--config=../grid.yaml", "--output_dir=run"],
    }
    keys = {name.replace("__", "."): value for name, value in changes.items()}
    kept = [w for w in lines[command] if w.removeprefix("--").partition("=")[0] not in keys]
    return [command, *kept, *(f"--{name}={value}" for name, value in keys.items())]


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """The content of a folder, without following links."""
    found = {}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            state = (Path(place) / name).lstat()
            found[f"{place}/{name}"] = (state.st_mode, state.st_size)
    return found


def refuse(words: list[str], root: Path, capfd: pytest.CaptureFixture[str]) -> str:
    """Run a command that must end in one line, and return it."""
    before = tree(root)
    capfd.readouterr()
    code = main(words)
    error = capfd.readouterr().err
    shown = [word[:100] for word in words]
    assert code == 2, (shown, error)
    assert error.count("\n") == 1, (shown, error)
    assert error.startswith("error: "), (shown, error)
    assert len(error) < 2000, (shown, error)
    assert tree(root) == before, shown
    return error


@pytest.mark.parametrize("command", COMMANDS)
def test_a_name_that_no_file_can_have(
    command: str, sound: Path, work: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    names = cycle(corpus.NAMES)
    for key in PATH_KEYS[command]:
        for _ in range(2):
            changes = {key.replace(".", "__"): next(names)}
            assert key in refuse(words_of(command, sound, **changes), work.parent, capfd)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_configuration_that_is_none(
    command: str, sound: Path, work: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    number = list(COMMANDS).index(command)
    for position, (kind, content) in enumerate(corpus.YAML.items()):
        (work.parent / "a.yaml").write_bytes(content)
        if position % len(COMMANDS) == number:
            line = refuse(words_of(command, sound, config="../a.yaml"), work.parent, capfd)
            assert "a.yaml" in line or "must be" in line, kind
    (work.parent / "a.yaml").unlink()
    for file in corpus.place_odd_files(work.parent, ".yaml").values():
        refuse(words_of(command, sound, config=str(file)), work.parent, capfd)


def test_a_compensation_file_of_plan_that_is_none(
    sound: Path, work: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for content in corpus.YAML.values():
        (work.parent / "a.yaml").write_bytes(content)
        refuse(words_of("plan", sound, compensate="../a.yaml"), work.parent, capfd)
    for file in corpus.place_odd_files(work.parent, ".yml").values():
        refuse(words_of("plan", sound, compensate=str(file)), work.parent, capfd)


def test_texts_that_are_none(sound: Path, work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    files = list(corpus.data_files(work.parent).values())
    for suffix in (".txt", ".jsonl", ".parquet"):
        files += corpus.place_odd_files(work.parent, suffix).values()
    commands = cycle(("evaluate", "compress", "compensate"))
    keys = {"evaluate": "corpora", "compress": "calibration__path", "compensate": "text__path"}
    for file, command in zip(files, commands, strict=False):
        changes = {keys[command]: str(file)}
        refuse(words_of(command, sound, **changes), work.parent, capfd)


@pytest.mark.slow
def test_instructions_that_are_none(
    sound: Path, work: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    files = list(corpus.data_files(work.parent).values())
    for suffix in (".json", ".jsonl", ".parquet"):
        files += corpus.place_odd_files(work.parent, suffix).values()
    for file in files:
        words = ["compensate", f"--model.path={sound}", "--output_dir=run", "--data.source=file"]
        words += [f"--data.path={file}", "--evaluation.source=pydoc", "--evaluation.seqlen=16"]
        refuse(words, work.parent, capfd)


@pytest.mark.parametrize("command", ["evaluate", "benchmark"])
def test_results_that_are_none(
    command: str, sound: Path, work: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    contents = list(corpus.JSON.values())
    for keys in corpus.RESULTS.values():
        assert isinstance(keys, dict)
        contents.append(json.dumps({"format": "grasp_lightning evaluation 1", **keys}).encode())
    for overwrite in ("false", "true"):
        for content in contents:
            (work.parent / "a.json").write_bytes(content)
            changes = {"output": "../a.json", "overwrite": overwrite}
            refuse(words_of(command, sound, **changes), work.parent, capfd)
    (work.parent / "a.json").unlink()
    for kind, file in corpus.place_odd_files(work.parent, ".json").items():
        if kind != "dangling":
            changes = {"output": str(file), "overwrite": "true"}
            refuse(words_of(command, sound, **changes), work.parent, capfd)


def test_runs_whose_scores_are_none(
    sound: Path, work: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = work.parent / "scored"
    run.mkdir()
    (run / "config.yaml").write_text("seed: 0\n")
    plan = json.loads(Plan(method="grasp").completed().to_json())
    plans = [json.dumps({**plan, **keys}).encode() for keys in corpus.PLANS.values()]  # type: ignore[dict-item]

    def check() -> None:
        changes = {"from_scores": str(run), "method__name": "grasp"}
        refuse(words_of("compress", sound, **changes), work.parent, capfd)

    for content in (*corpus.JSON.values(), *plans):
        (run / "plan.json").write_bytes(content)
        check()
    (run / "plan.json").write_text(json.dumps(plan))
    for content in corpus.TENSORS.values():
        (run / "scores.safetensors").write_bytes(content)
        check()
    (run / "scores.safetensors").unlink()
    for file in corpus.place_odd_files(work.parent).values():
        for name in ("scores.safetensors", "plan.json"):
            (run / name).unlink(missing_ok=True)
            (run / name).symlink_to(file)
            check()
        (run / name).unlink()
        (run / "plan.json").write_text(json.dumps(plan))


@pytest.fixture
def damaged(sound: Path, tmp_path: Path) -> Path:
    """A copy of the model, whose folder a test damages."""
    return shutil.copytree(sound, tmp_path / "damaged")


@pytest.mark.parametrize("kind", corpus.damaged_models())
def test_models_that_are_none(
    kind: str, damaged: Path, work: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    corpus.damaged_models()[kind](damaged)
    number = list(corpus.damaged_models()).index(kind)
    # The first three load weights; benchmark does, too, but each time in a process of its own.
    tried = [("compress", "compensate", "evaluate")[number % 3]]
    if kind.startswith("config"):
        tried.append(("plan", "benchmark", "export")[number % 3])
    for command in tried:
        refuse(words_of(command, damaged), work.parent, capfd)
