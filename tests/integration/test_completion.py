"""A shell completes commands, keys and values with the script that the program prints."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from grasp_lightning.cli import COMMANDS, main
from grasp_lightning.config.completion import SHELLS
from tests.integration.killing import ROOT

# What bash does when the user presses TAB at the end of a line.
PRESS_TAB = """
source "$1"
COMP_LINE="$2" COMP_POINT=${#2} COMP_TYPE=9
_python_argcomplete grasp-lightning
printf '%s\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a shell that finds the program of this checkout."""
    folder = tmp_path_factory.mktemp("bin")
    file = folder / "grasp-lightning"
    file.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m grasp_lightning "$@"\n')
    file.chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory, program: dict[str, str]) -> Path:
    words = ["grasp-lightning", "completion", "bash"]
    text = subprocess.run(words, env=program, capture_output=True, text=True, check=True).stdout
    file = tmp_path_factory.mktemp("script") / "grasp-lightning"
    file.write_text(text)
    return file


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("comp", ["compress", "compensate", "compare", "completion"]),
        ("compress --method.na", ["--method.name"]),
        ("compress --method.name=gra", ["grasp", "grasp_plus"]),
        ("compensate --train lora", ["lora", "lora_on_factors"]),
        ("plan --evaluation.tail=", ["keep", "drop"]),
        ("compress --overwrite --overw", ["--overwrite"]),
        ("evaluate --trust_remote_code=t", ["true"]),
        ("evaluate --model=a --mod", ["--model"]),
        ("compress --config=configs/quick", ["configs/quickstart.yaml"]),
        ("export --format ", ["dense", "gguf", "torchao", "bitsandbytes", "2_4"]),
        ("completion z", ["zsh"]),
    ],
)
def test_bash_completes_commands_keys_and_values(
    line: str, expected: list[str], script: Path, program: dict[str, str]
) -> None:
    done = subprocess.run(
        ["bash", "-c", PRESS_TAB, "bash", str(script), f"grasp-lightning {line}"],
        cwd=ROOT,
        env=program,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == expected


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_completes_the_keys_that_its_help_lists(
    command: str, program: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--help"]) == 0
    shown = {
        word.rstrip(",")
        for line in capfd.readouterr().out.splitlines()
        if line.startswith("  --") and "CONFIG" not in line
        for word in line.split()[:1]
    }
    line = f"grasp-lightning {command} --"
    asking = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_SHELL": "bash",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": "/dev/stdout",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }
    done = subprocess.run(
        ["grasp-lightning"], env=program | asking, capture_output=True, text=True, check=True
    )
    assert shown <= set(done.stdout.split())
    assert len(shown) > 3


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_is_valid(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "#compdef grasp-lightning" in script  # where zsh looks for what the file is for
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize(
    ("words", "came"), [([], "got nothing"), (["fish"], "got 'fish'"), (["bash", "zsh"], "got 'b")]
)
def test_an_unknown_shell_is_one_line(
    words: list[str], came: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["completion", *words]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"error: completion: expected one of bash, zsh, {came}")
    assert line.count("\n") == 1


def test_the_help_says_where_the_script_goes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "--help"]) == 0
    assert "bash-completion/completions/grasp-lightning" in capsys.readouterr().out
    assert main(["--help"]) == 0
    assert "completion" in capsys.readouterr().out
