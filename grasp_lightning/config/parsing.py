"""From command line and YAML to a typed configuration, with one clear line for every mistake."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser

from grasp_lightning.config.compress import CompressConfig
from grasp_lightning.config.help import HelpFormatter, hide_help_of_sections
from grasp_lightning.config.keys import (
    NAMES,
    allowed_keys,
    check_keys,
    checked,
    explain,
    leaves,
    section_of,
)
from grasp_lightning.config.method import METHOD_OPTIONS, KeepOptions, MethodConfig, MethodOptions
from grasp_lightning.errors import ConfigError
from grasp_lightning.reading.text import is_there, one_line, user_path
from grasp_lightning.reading.typed import to_plain
from grasp_lightning.reading.yaml_text import read_yaml

C = TypeVar("C")
_PARSER_OPTIONS = ("config", "help", "print_config")
_MAX_LENGTH = 10_000  # of a word of the command line
# The parser passes on what Python raises on endless numbers and on deep nesting.
_REFUSALS = (ArgumentError, ValueError, OverflowError, RecursionError)
METHOD_NAMES = ("name", "preset")
"""Keys of the section ``method`` that ask for another method."""


def parse(config_type: type[C], prog: str, argv: Sequence[str]) -> C:
    """Return the configuration that YAML files and flags describe; later ones win.

    ``--help`` and ``--print_config`` print and exit with code 0.

    Raises:
        ConfigError: If a key or value is wrong, with its source and what is allowed.
    """
    _refuse_long(argv)
    schema = dict(leaves(config_type))
    argv = _with_lists(_with_flag_values(argv, schema), schema)
    files = _config_files(argv)
    contents = {file: read_settings(file, config_type) for file in files}
    flags = _flags(argv, schema)
    parser = ArgumentParser(
        prog=prog,
        usage=f"{prog} [--config FILE.yaml] [--key value ...]",
        description=(config_type.__doc__ or "").partition("\n\n")[0].replace("``", ""),
        formatter_class=HelpFormatter,
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file; flags override it")
    parser.add_class_arguments(config_type, as_group=False)
    hide_help_of_sections(parser)
    try:
        parsed = parser.instantiate(parser.parse_args(argv))
    except _REFUSALS as error:
        message = _refused_section(contents, schema)
        message = message or explain(str(error), schema, flags, contents)
        raise ConfigError(message) from error
    return checked(config_type, parsed, schema)


def _refused_section(
    contents: Mapping[str, Mapping[str, Any]],  # Any: parsed YAML
    schema: Mapping[str, Any],
) -> str | None:
    """Return what is wrong in the first section under a name that the parser refuses, if any."""
    for file, content in contents.items():
        for key in filter(content.__contains__, schema):
            kind = section_of(schema[key])
            if kind is None:
                continue
            for name, keys in content[key].items():
                parser, source = ArgumentParser(exit_on_error=False), f"{file}: {key}.{name}"
                parser.add_class_arguments(kind, as_group=False)
                try:
                    parser.parse_object(keys)
                except _REFUSALS as error:
                    known, missing = dict(leaves(kind)), f"{source}.{{}} is not set"
                    text = explain(str(error), known, set(), {source: keys}, missing)
                    return text.replace(f"{source}: ", f"{source}.", 1)
    return None


def with_run_config(argv: Sequence[str]) -> list[str]:
    """Put the config.yaml of ``--from_scores RUN`` in front of a command line, which overrides it.

    If another method or preset is requested, only the layers and the amount to remove are taken
    over.
    """
    begin = [f"--config={config_of_run(folder)}" for folder in _given(argv, "--from_scores")]
    asked = _asked_method(argv)
    if begin and asked:
        begin += [f"--method.{key}=null" for key in unread_keys(asked)]
    return [*begin, *argv]


def config_of_run(folder: str) -> Path:
    """Return the config.yaml of a run that ``from_scores`` names.

    Raises:
        ConfigError: If there is none.
    """
    if not (user_path(folder, "from_scores", ConfigError) / "config.yaml").is_file():
        raise ConfigError(
            f"from_scores: {folder} is not a finished run with scores: it has no config.yaml"
        )
    return Path(folder) / "config.yaml"


def unread_keys(asked: Mapping[str, str]) -> list[str]:
    """Return the keys of an earlier run's method that a newly requested one does not take over."""
    read = {*get_type_hints(MethodOptions), *get_type_hints(KeepOptions)}
    read &= get_type_hints(METHOD_OPTIONS.get(asked.get("name", ""), MethodConfig)).keys()
    return [key for key in get_type_hints(MethodConfig) if key not in read]


def _asked_method(argv: Sequence[str]) -> dict[str, str]:
    """Return the method and preset that files and flags set, if any."""
    asked: dict[str, str] = {}
    for file in _config_files(argv):
        section = read_settings(file, CompressConfig).get("method", {})
        asked |= {key: str(section[key]) for key in METHOD_NAMES if key in section}
    for key in METHOD_NAMES:
        if values := _given(argv, f"--method.{key}"):
            asked[key] = values[-1]
    return asked


def _given(argv: Sequence[str], option: str) -> list[str]:
    """Return the values of an option, as ``--key value`` or ``--key=value``."""
    values: list[str] = []
    for position, word in enumerate(argv):
        key, equals, value = word.partition("=")
        if key == option:
            values += [value] if equals else argv[position + 1 : position + 2]
    return values


def to_dict(config: object) -> dict[str, Any]:  # Any: values of YAML
    """Return a configuration as nested dicts, lists and scalars for YAML and JSON."""
    content: dict[str, Any] = to_plain(config)
    return content


def _refuse_long(argv: Sequence[str]) -> None:
    """Refuse huge words: the parser's YAML reader, in C, would recurse until it crashes."""
    for word in argv:
        if len(word) > _MAX_LENGTH:
            raise ConfigError(
                f"command line: {word[:20]!r}... has {len(word)} characters, expected at most "
                f"{_MAX_LENGTH}; put long lists into a --config file"
            )


def _with_flag_values(argv: Sequence[str], schema: Mapping[str, Any]) -> list[str]:
    """Let ``--overwrite`` without a value mean ``--overwrite=true``."""
    result = []
    for position, word in enumerate(argv):
        following = argv[position + 1] if position + 1 < len(argv) else "--"
        kind = schema.get(word.removeprefix("--"))
        alone = (kind is bool or bool in get_args(kind)) and following.startswith("--")
        result.append(f"{word}=true" if alone and word.startswith("--") else word)
    return result


def _with_lists(argv: Sequence[str], schema: Mapping[str, Any]) -> list[str]:
    """Let ``--tasks a,b`` and ``--model a --model b`` give lists of names, as YAML does."""
    result: list[str] = []
    collected: dict[str, list[str]] = {}
    words = iter(argv)
    for word in words:
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or schema.get(key) != NAMES:
            result.append(_with_bracketed_names(word, schema))
            continue
        text = value if equals else next(words, "--")
        if text.startswith("--"):
            raise ConfigError(f"command line: --{key} needs a name")
        if key not in collected:
            result.append(f"--{key}=")
        collected.setdefault(key, []).extend(split_names(text))
    lists = {f"--{key}=": f"--{key}={json.dumps(names)}" for key, names in collected.items()}
    return [lists.get(word, word) for word in result]


def _with_bracketed_names(word: str, schema: Mapping[str, Any]) -> str:
    """Let ``--calibration.source=[a,b]`` be a list, for keys that take one name or several."""
    key, _, text = word.removeprefix("--").partition("=")
    takes_both = word.startswith("--") and NAMES in get_args(schema.get(key))
    if takes_both and text.startswith("[") and text.endswith("]") and not is_there(text):
        return f"--{key}={json.dumps(split_names(text))}"
    return word


def split_names(text: str) -> list[str]:
    """Return the names in ``a,b`` or in a YAML list."""
    if is_there(text):  # a path may hold a comma
        return [text] if text else []
    bare = text.removeprefix("[").removesuffix("]") if text.startswith("[") else text
    return [name.strip(" \"'") for name in bare.split(",") if name.strip()]


def _config_files(argv: Sequence[str]) -> list[str]:
    if argv[-1:] == ["--config"]:
        raise ConfigError("--config needs the path of a YAML file")
    return _given(argv, "--config")


def _flags(argv: Sequence[str], schema: Mapping[str, Any]) -> set[str]:
    """Return the keys on the command line; refuse unknown ones."""
    words = [word.removeprefix("--").partition("=")[0] for word in argv if word.startswith("--")]
    for key in words:
        if key not in schema and key not in _PARSER_OPTIONS:
            raise ConfigError(
                f"command line: unknown option --{one_line(key)}; {allowed_keys(key, schema)}"
            )
    return set(words)


def read_settings(file: str, config_type: type) -> dict[str, Any]:  # Any: parsed YAML
    """Return the nested keys of a ``--config`` file, none of them unknown."""
    path = user_path(file, "--config", ConfigError)
    if not path.exists():
        raise ConfigError(f"--config {file}: no such file")
    content = read_yaml(path, ConfigError, file)
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: expected keys and values, got {type(content).__name__}")
    check_keys(content, config_type, file, dict(leaves(config_type)))
    return content
