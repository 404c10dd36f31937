"""README and docs: every link and key exists, every command parses, every Python block runs.

Commands are checked with the parser of the program that they call. What is cheap runs for real. A
model that is slow to load, or that is on the hub, is replaced by a tiny one or by its config.
"""

import argparse
import dataclasses
import importlib.util
import json
import re
import runpy
import shlex
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml
from torch.distributed.run import get_args_parser
from transformers import LlamaConfig

import grasp_lightning.cli as program
from grasp_lightning.config import CONFIGS
from grasp_lightning.config.keys import leaves
from grasp_lightning.config.parsing import parse
from grasp_lightning.errors import GraspError
from tests.conftest import save_tiny
from tests.integration.docs import ROOT, Page, pages

PAGES = pages()
LANGUAGES = ("sh", "python", "yaml", "toml", "json", "text", "bibtex", "")
# test_extending.py installs and runs the package that this page builds.
TESTED_ELSEWHERE = "docs/extending.md"
# What comes before an excerpt.
PRELUDES = {
    "docs/decisions/0002-two-top-level-packages.md": (
        "import lightning as L\n"
        "from grasp_lightning.callbacks import (\n"
        "    LayerSimilarity, ReplaceRedundantLayers, SingularAttribution\n"
        ")\n"
    ),
    # A vocabulary with tokens to remove.
    "docs/trim.md": (
        "from pathlib import Path\n"
        "from tests.integration.trimming import save_model_of\n"
        "save_model_of('byte_level', Path('tiny'))\n"
    ),
}
NEEDED = ("model.path", "model", "output_dir")
COMMANDS_OF_CONFIGS: dict[str, tuple[type, str]] = {
    name: (config, next((f"--{key}=tiny" for key in NEEDED if key in dict(leaves(config))), ""))
    for name, config in CONFIGS.items()
}
# Programs of the system, and those that serve models: only their names are checked.
SYSTEM = frozenset({"cd", "curl", "git", "grep", "scontrol", "squeue", "tail"})
SERVERS = frozenset({"llama-server", "ollama", "vllm"})
VARIABLES = {"GRASP_DATA": "/data"}
# Folders by the names of hub models, with the config alone: more is not read by `plan`.
HUB_CONFIGS = {
    "meta-llama/Llama-2-7b-hf": LlamaConfig(
        num_hidden_layers=32,
        hidden_size=4096,
        intermediate_size=11008,
        num_attention_heads=32,
        vocab_size=32000,
        dtype="bfloat16",
    ),
    "meta-llama/Meta-Llama-3-8B": LlamaConfig(
        num_hidden_layers=32,
        hidden_size=4096,
        intermediate_size=14336,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        dtype="bfloat16",
    ),
}
CHEAP = ("plan", "completion", "--help", "--version", "--print_config", "--dry_run")
# What runs, runs on these.
SUBSTITUTIONS = (
    (r"(?<![\w/])smollm2\b", "tiny"),
    (r"\bwikitext2\b", "pydoc"),
    (r"(seqlen\"?\s*[=:]\s*)\d+", r"\g<1>32"),
)
# Appended to commands that run: little data that needs no network.
LIMITS = {
    "compress": (
        "--calibration.source=pydoc",
        "--calibration.num_samples=4",
        "--calibration.seqlen=32",
        "--evaluation.source=pydoc",
        "--evaluation.num_samples=2",
        "--evaluation.seqlen=32",
    ),
    "evaluate": ("--evaluation.num_samples=2", "--evaluation.seqlen=32"),
}
EXTRAS = re.compile(r"\[([\w,-]+)\]")


def by_name(page: Page) -> str:
    return page.name


def pages_with(language: str, text: str = "") -> list[Page]:
    """Return the pages with a block of a language that matches a pattern."""
    return [
        page
        for page in PAGES
        if any(
            f.language == language and re.search(text, f.text, re.MULTILINE) for f in page.fences()
        )
    ]


@pytest.fixture
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the files of the repository that commands name."""
    folder = tmp_path / "sandbox"
    folder.mkdir()
    for name in ("benchmarks", "cli.py", "configs", "constraints.txt", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and the quickstart's run on it, on small data."""
    folder = tmp_path_factory.mktemp("runs")
    # As many layers and positions as the pages need.
    save_tiny(folder / "tiny", num_hidden_layers=10, max_position_embeddings=2048)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        config = ROOT / "configs" / "quickstart.yaml"
        argv = ["compress", f"--config={config}", "--model.path=tiny", *LIMITS["compress"]]
        assert program.main(argv) == 0
    return folder


@pytest.fixture
def workshop(sandbox: Path, runs: Path) -> Path:
    """The sandbox with models and a run by the names of the pages, and configurations for them."""
    shutil.copytree(runs, sandbox, dirs_exist_ok=True)
    (sandbox / "MODEL").symlink_to("tiny")
    for name, config in HUB_CONFIGS.items():
        config.save_pretrained(sandbox / name)
    (sandbox / "configs").unlink()
    for source in ROOT.glob("configs/**/*.yaml"):
        target = sandbox / source.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(on_tiny(source.read_text(encoding="utf-8")), encoding="utf-8")
    return sandbox


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_every_link_resolves(page: Page) -> None:
    broken = []
    for line, link in page.links():
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = (page.path.parent / path).resolve() if path else page.path
        is_there = target.exists() and target.is_relative_to(ROOT)
        if is_there and anchor:
            is_there = target.suffix == ".md" and anchor in Page(target).anchors()
        if not is_there:
            broken.append(f"{page.name}:{line}: {link}")
    assert not broken


def test_every_page_is_reached_from_the_readme() -> None:
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        path = waiting.pop()
        if path in reached:
            continue
        reached.add(path)
        if path.is_dir():
            waiting += path.glob("*.md")
        elif path.suffix == ".md" and path.is_file():
            links = (link.partition("#")[0] for _, link in Page(path).links())
            waiting += [(path.parent / link).resolve() for link in links if ":" not in link]
    pages_of_docs = [page for page in PAGES if page.path.is_relative_to(ROOT / "docs")]
    assert [page.name for page in pages_of_docs if page.path not in reached] == []


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_blocks_of_code_are_valid_in_their_language(page: Page) -> None:
    valid: dict[str, Callable[[str], object]] = {
        "json": json.loads,
        "python": lambda text: compile(text, page.name, "exec"),
        "toml": tomllib.loads,
        "yaml": yaml.safe_load,
    }
    for fence in page.fences():
        assert fence.language in LANGUAGES, f"{page.name}:{fence.line}"
        valid.get(fence.language, str)(fence.text)


@pytest.mark.usefixtures("stops_after_parsing")
@pytest.mark.parametrize("page", pages_with("yaml"), ids=by_name)
def test_configurations_are_valid(
    page: Page, sandbox: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for fence in page.fences():
        if fence.language == "yaml":
            (sandbox / "block.yaml").write_text(fence.text, encoding="utf-8")
            keys = set(yaml.safe_load(fence.text))
            commands = [
                [command, "--config=block.yaml", needed]
                for command, (config, needed) in COMMANDS_OF_CONFIGS.items()
                if keys & set(get_type_hints(config))
            ]
            codes = [program.main(argv) for argv in commands]
            assert not codes or 0 in codes, f"{page.name}:{fence.line}: {capsys.readouterr().err}"


def keys_of(config: type, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of a configuration."""
    for name, kind in get_type_hints(config).items():
        yield prefix + name
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            yield from keys_of(kind, f"{prefix}{name}.")


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "CHANGELOG.md"], ids=by_name)
def test_keys_inside_sentences_exist(page: Page) -> None:
    keys = {key for config, _ in COMMANDS_OF_CONFIGS.values() for key in keys_of(config)}
    sections = {key.partition(".")[0] for key in keys if "." in key}
    unknown = []
    for line, span in page.code_spans():
        named = re.match(r"(?:--)?((\w+)\.(?!safetensors|svg|py)[\w.]+)(?=$|[=: ])", span)
        if named and named[2] in sections and named[1] not in keys:
            unknown.append(f"{page.name}:{line}: {span}")
    assert not unknown


@pytest.fixture
def stops_after_parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the program and the benchmarks end, with code 0, once their arguments are parsed."""
    parse_args = argparse.ArgumentParser.parse_args

    def parsed(*args: object, **kwargs: object) -> None:
        parse(*args, **kwargs)  # type: ignore[arg-type]
        raise SystemExit(0)

    def parsed_args(*args: object, **kwargs: object) -> None:
        parse_args(*args, **kwargs)  # type: ignore[call-overload]
        raise SystemExit(0)

    monkeypatch.setattr("grasp_lightning.cli.parse", parsed)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed_args)


@pytest.mark.usefixtures("stops_after_parsing")
@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_every_command_parses(
    page: Page, sandbox: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = []
    for line, words in commands_of(page, sandbox):
        try:
            check_command(words)
        except (AssertionError, GraspError, SystemExit) as error:
            reason = str(error).partition("\n")[0]
            wrong.append(f"{page.name}:{line}: {shlex.join(words)}: {reason}")
        wrong += capsys.readouterr().err.splitlines()
    assert not wrong, "\n".join(wrong)


def commands_of(page: Page, sandbox: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the commands of shell blocks, and those of make and pip inside sentences."""
    for call in page.calls(sandbox, **VARIABLES):
        if "--from_scores" in call.words:  # begins with the configuration of that run
            run = sandbox / call.words[call.words.index("--from_scores") + 1]
            run.mkdir(parents=True, exist_ok=True)
            (run / "config.yaml").write_bytes((ROOT / "configs/quickstart.yaml").read_bytes())
        yield call
    for line, span in page.code_spans():
        if re.match(r"(make|pip install) ", span):
            yield line, shlex.split(span)


def check_command(words: Sequence[str]) -> None:
    """Check a command with the parser of what it calls.

    Raises:
        AssertionError: If it, or what it names, does not exist.
        SystemExit: If a parser refuses it; the message is on standard error.
    """
    name, arguments = Path(words[0]).name, list(words[1:])
    if name in {"python", "python3"}:
        check_python(arguments)
    elif name == "grasp-lightning":
        check_program(arguments)
    elif name == "torchrun":
        known = get_args_parser().parse_known_args
        options, _ = known(arguments)
        check_python([options.training_script, *options.training_script_args])
    elif name == "sbatch":
        script = next(word for word in arguments if not word.startswith("-"))
        assert Path(script).is_file(), f"no file {script}"
        check_program([Path(script).stem, *arguments[arguments.index(script) + 1 :]])
    elif name == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        targets = {word for word in arguments if "=" not in word}
        unknown = targets - {*re.findall(r"^([\w-]+):", makefile, re.MULTILINE)}
        assert not unknown, f"no target {unknown}"
    elif name == "pip":
        check_pip(arguments)
    else:
        is_here = (Path(sys.executable).parent / name).is_file()
        assert name in SYSTEM | SERVERS or is_here, f"unknown program {name}"


def check_python(arguments: Sequence[str]) -> None:
    """Check what follows ``python``."""
    script, *options = arguments
    if script == "cli.py":
        check_program(options)
    elif script == "-c":
        compile(options[0], "-c", "exec")
    elif script == "-m" and options[0] == "pip":
        check_pip(options[1:])
    elif script == "-m":
        assert importlib.util.find_spec(options[0]), f"no module {options[0]}"
    else:
        assert (ROOT / script).is_file(), f"no file {script}"
        check_script(ROOT / script, options)


def check_script(script: Path, options: Sequence[str]) -> None:
    """Let a script of the repository parse its options."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(script), *options])
        patch.syspath_prepend(script.parent)
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(script), run_name="__main__")
    code = end.value.code or 0
    assert code == 0, f"exit code {code}"


def check_program(arguments: Sequence[str]) -> None:
    """Let the program parse its command line."""
    code = program.main(arguments)
    assert code == 0, f"exit code {code}"


def check_pip(arguments: Sequence[str]) -> None:
    """Check that files, and extras of this package, exist."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = set(project["optional-dependencies"])
    assert arguments[0] == "install"
    for option, word in pairwise(arguments):
        if option in {"-c", "-r"}:
            assert (ROOT / word).is_file(), f"no file {word}"
        elif named := EXTRAS.search(word):
            assert {*named[1].split(",")} <= extras, f"no extra {word}"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "page", [page for page in pages_with("python") if page.name != TESTED_ELSEWHERE], ids=by_name
)
def test_python_blocks_run(page: Page, workshop: Path) -> None:
    names: dict[str, object] = {"__name__": "__main__"}
    exec(PRELUDES.get(page.name, ""), names)
    for fence in page.fences():
        if fence.language == "python":
            # Lines are counted as in the page.
            code = "\n" * fence.line + on_tiny(fence.text)
            exec(compile(code, workshop / page.name, "exec"), names)


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with("sh", "|".join(CHEAP)), ids=by_name)
def test_cheap_commands_run(page: Page, workshop: Path) -> None:
    commands = [python_words(words) for _, words in commands_of(page, workshop)]
    shutil.rmtree(workshop / "runs")  # a dry run refuses a run of another configuration
    for words in commands:
        if words[:1] == ["-c"]:
            exec(words[1].replace("/tmp/", f"{workshop}/"), {})
        elif words[:1] == ["cli.py"] and {*words} & {*CHEAP}:
            arguments = [word.replace("/tmp/", f"{workshop}/") for word in words[1:]]
            assert program.main([on_tiny(word) for word in arguments]) == 0, words


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [page for page in pages_with("sh", "^grasp-lightning") if page.name == "README.md"],
    ids=by_name,
)
def test_commands_of_the_readme_run_on_a_tiny_model(page: Page, workshop: Path) -> None:
    for _, words in commands_of(page, workshop):
        if words[0] == "grasp-lightning":
            arguments = [*map(on_tiny, words[1:]), *LIMITS[words[1]]]
            assert program.main(arguments) == 0, words


def python_words(words: Sequence[str]) -> list[str]:
    """Return what follows ``python`` in a command of Python, nothing of others."""
    if words[0] == "grasp-lightning":
        return ["cli.py", *words[1:]]
    return list(words[1:]) if Path(words[0]).name in {"python", "python3"} else []


def on_tiny(text: str) -> str:
    """Name the tiny model, embedded text and short windows: seconds, and no network."""
    for pattern, replacement in SUBSTITUTIONS:
        text = re.sub(pattern, replacement, text)
    return text
