"""Completion of commands, keys and values in bash and zsh."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Literal, get_args, get_origin

import argcomplete
from argcomplete.shell_integration import shellcode

from grasp_lightning.config import CONFIGS, METHOD_OPTIONS
from grasp_lightning.config.keys import leaves
from grasp_lightning.errors import ConfigError
from grasp_lightning.plugins import method_plugins
from grasp_lightning.reading.text import one_line

SHELLS: Final = ("bash", "zsh")
_USAGE: Final = """\
usage: {program} completion {{bash,zsh}}

Print a script that completes commands, keys and values. Store it once, in a folder that your shell
reads:

  bash  grasp-lightning completion bash > ~/.local/share/bash-completion/completions/grasp-lightning
  zsh   grasp-lightning completion zsh > "${{fpath[1]}}/_grasp-lightning"

New shells use it. The script asks the installed program, so it stays valid after an update."""


def completion(program: str, argv: Sequence[str]) -> str:
    """Return the script that a shell sources, or the help.

    Raises:
        ConfigError: If ``argv`` names anything but one known shell.
    """
    if argv and argv[0] in ("-h", "--help"):
        return _USAGE.format(program=program)
    if len(argv) != 1 or argv[0] not in SHELLS:
        came = f"got {one_line(repr(' '.join(argv)))}" if argv else "got nothing"
        raise ConfigError(f"completion: expected one of {', '.join(SHELLS)}, {came}")
    return shellcode(["grasp-lightning"], shell=argv[0])


def complete(commands: Mapping[str, str]) -> None:
    """Write what may follow on the shell's line, and end the process.

    Args:
        commands: What each command does, by its name.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--version", action="store_true")
    subparsers = parser.add_subparsers()
    for name, text in commands.items():
        command = subparsers.add_parser(name, help=text)
        command.add_argument("--config", action="append")
        command.add_argument("--print_config", action="store_true")
        for key, kind in leaves(CONFIGS[name]):
            _add_key(command, key, kind)
    script = subparsers.add_parser("completion", help="the script that completes this line")
    script.add_argument("shell", choices=SHELLS)
    argcomplete.autocomplete(parser)


def _add_key(parser: argparse.ArgumentParser, key: str, kind: Any) -> None:  # noqa: ANN401  a type
    values = [str(value) for value in _values(kind)]
    if key == "method.name":
        values = [*METHOD_OPTIONS, *method_plugins()]
    # A switch may stand alone; keys without listed values complete to files.
    nargs = "?" if bool in (kind, *get_args(kind)) else None
    parser.add_argument(f"--{key}", nargs=nargs, choices=values or None, action="append")


def _values(kind: Any) -> Iterator[str]:  # noqa: ANN401  a type annotation
    """Yield the values that an annotation lists."""
    if kind is bool:
        yield from ("true", "false")
    elif get_origin(kind) is Literal:
        yield from get_args(kind)
    else:
        for part in get_args(kind):
            yield from _values(part)
