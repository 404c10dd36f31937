"""From command line and YAML to a typed configuration, with one clear line for every mistake."""

import dataclasses
import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser

from grasp_lightning.config.compress import CompressConfig
from grasp_lightning.config.method import METHOD_OPTIONS, KeepOptions, MethodConfig, MethodOptions
from grasp_lightning.config.values import check_values
from grasp_lightning.errors import ConfigError
from grasp_lightning.reading.text import is_there, one_line, user_path
from grasp_lightning.reading.typed import to_plain
from grasp_lightning.reading.yaml_text import read_yaml

C = TypeVar("C")
_PARSER_OPTIONS = ("config", "help", "print_config")
_BAD_VALUE = re.compile(r'Parser key "([^"]+)":')
_MISSING = re.compile(r"arguments are required: ([\w.]+)")
_GOT = re.compile(r"(?:Got value|Given value): (.*)$", re.MULTILINE)
_MAX_LENGTH = 10_000  # of a word of the command line
_NAMES = tuple[str, ...]
_TYPE_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def parse(config_type: type[C], prog: str, argv: Sequence[str]) -> C:
    """Return the configuration that YAML files and flags describe; later ones win.

    ``--help`` and ``--print_config`` print and exit with code 0.

    Raises:
        ConfigError: If a key or value is wrong, with its source and what is allowed.
    """
    _refuse_long(argv)
    schema = dict(_leaves(config_type))
    argv = _with_lists(_with_flag_values(argv, schema), schema)
    files = _config_files(argv)
    contents = {file: _read_yaml(file, config_type) for file in files}
    flags = _flags(argv, schema)
    parser = ArgumentParser(prog=prog, exit_on_error=False, description=config_type.__doc__)
    parser.add_argument("--config", action="config", help="YAML file; flags override it")
    parser.add_class_arguments(config_type, as_group=False)
    try:
        parsed = parser.instantiate(parser.parse_args(argv))
    # The parser passes on what Python raises on endless numbers and on deep nesting.
    except (ArgumentError, ValueError, OverflowError, RecursionError) as error:
        raise ConfigError(_explain(str(error), schema, flags, contents)) from error
    _refuse_nulls(parsed, schema)
    config = config_type(**{name: parsed[name] for name in get_type_hints(config_type)})
    check_values(config)
    return config


def with_run_config(argv: Sequence[str]) -> list[str]:
    """Put the config.yaml of ``--from_scores RUN`` in front of a command line, which overrides it.

    If another method or preset is requested, only the layers and the amount to remove are taken
    over.

    Raises:
        ConfigError: If the run has no config.yaml.
    """
    folders = _given(argv, "--from_scores")
    for folder in folders:
        if not (user_path(folder, "from_scores", ConfigError) / "config.yaml").is_file():
            raise ConfigError(
                f"from_scores: {folder} is not a finished run with scores: it has no config.yaml"
            )
    begin = [f"--config={Path(folder) / 'config.yaml'}" for folder in folders]
    asked = _asked_method(argv)
    if begin and asked:
        read = {*get_type_hints(MethodOptions), *get_type_hints(KeepOptions)}
        read &= get_type_hints(METHOD_OPTIONS.get(asked.get("name", ""), MethodConfig)).keys()
        unread = [key for key in get_type_hints(MethodConfig) if key not in read]
        begin += [f"--method.{key}=null" for key in unread]
    return [*begin, *argv]


def _asked_method(argv: Sequence[str]) -> dict[str, str]:
    """Return the method and preset that files and flags set, if any."""
    asked: dict[str, str] = {}
    for file in _config_files(argv):
        section = _read_yaml(file, CompressConfig).get("method", {})
        asked |= {key: str(section[key]) for key in ("name", "preset") if key in section}
    for key in ("name", "preset"):
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


def _leaves(config_type: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, type) of every value, sections left out."""
    for name, kind in get_type_hints(config_type).items():
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            yield from _leaves(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, kind


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
        if not word.startswith("--") or schema.get(key) != _NAMES:
            result.append(_with_bracketed_names(word, schema))
            continue
        text = value if equals else next(words, "--")
        if text.startswith("--"):
            raise ConfigError(f"command line: --{key} needs a name")
        if key not in collected:
            result.append(f"--{key}=")
        collected.setdefault(key, []).extend(_split_names(text))
    lists = {f"--{key}=": f"--{key}={json.dumps(names)}" for key, names in collected.items()}
    return [lists.get(word, word) for word in result]


def _with_bracketed_names(word: str, schema: Mapping[str, Any]) -> str:
    """Let ``--calibration.source=[a,b]`` be a list, for keys that take one name or several."""
    key, _, text = word.removeprefix("--").partition("=")
    takes_both = word.startswith("--") and _NAMES in get_args(schema.get(key))
    if takes_both and text.startswith("[") and text.endswith("]") and not is_there(text):
        return f"--{key}={json.dumps(_split_names(text))}"
    return word


def _split_names(text: str) -> list[str]:
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
                f"command line: unknown option --{one_line(key)}; {_allowed(key, schema)}"
            )
    return set(words)


def _read_yaml(file: str, config_type: type) -> dict[str, Any]:
    path = user_path(file, "--config", ConfigError)
    if not path.exists():
        raise ConfigError(f"--config {file}: no such file")
    content = read_yaml(path, ConfigError, file)
    if not isinstance(content, dict):
        raise ConfigError(f"{file}: expected keys and values, got {type(content).__name__}")
    _check_keys(content, config_type, file, dict(_leaves(config_type)))
    return content


def _check_keys(
    content: Mapping[str, Any],
    config_type: type,
    file: str,
    schema: Mapping[str, Any],
    prefix: str = "",
) -> None:
    kinds = get_type_hints(config_type)
    for name, value in content.items():
        key = f"{prefix}{name}"
        if name not in kinds:
            raise ConfigError(f"{file}: unknown key {one_line(key)}; {_allowed(key, schema)}")
        kind = kinds[name]
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            if not isinstance(value, dict):
                raise ConfigError(
                    f"{file}: {key}: expected a section of keys, got {one_line(repr(value))}"
                )
            _check_keys(value, kind, file, schema, f"{key}.")


def _allowed(key: str, schema: Mapping[str, Any]) -> str:
    """Return the key that an unknown one may mean, and the allowed keys."""
    section = key.rpartition(".")[0]
    siblings = [k for k in schema if section and k.rpartition(".")[0] == section]
    names = siblings or sorted({k.partition(".")[0] for k in schema})
    near = difflib.get_close_matches(key, [*schema, *names], n=1, cutoff=0.8)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{hint}allowed: {', '.join(names)}"


def _refuse_nulls(parsed: Mapping[str, Any], schema: Mapping[str, Any]) -> None:
    """Refuse null where the type does not allow it: the parser always does."""
    for key, kind in schema.items():
        value: Any = parsed
        for part in key.split("."):
            value = value[part] if isinstance(value, Mapping) else getattr(value, part)
        if value is None and NoneType not in get_args(kind):
            raise ConfigError(f"{key}: expected {_describe(kind)}, got null")


def _explain(
    message: str, schema: Mapping[str, Any], flags: set[str], contents: Mapping[str, dict[str, Any]]
) -> str:
    """Turn a parser's message into one line with source, key, expectation and value."""
    missing = _MISSING.search(message)
    if missing:
        key = missing.group(1)
        return f"{key} is not set; set it in a --config file or as --{key}=..."
    found = _BAD_VALUE.search(message)
    if found is None or found.group(1) not in schema:
        return f"command line: {one_line(message)}"
    key = found.group(1)
    holders = [file for file, content in contents.items() if _holds(content, key)]
    source = "command line" if key in flags or not holders else holders[-1]
    got = _GOT.search(message)
    value = f", got {one_line(repr(got.group(1)))}" if got else ""
    return f"{source}: {key}: expected {_describe(schema[key])}{value}"


def _holds(content: object, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(content, dict) or part not in content:
            return False
        content = content[part]
    return True


def _describe(kind: Any) -> str:  # noqa: ANN401  a type annotation
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(_describe(part) for part in get_args(kind))
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(str(value) for value in get_args(kind))
    if get_origin(kind) is tuple:
        return "a list of names" if kind == _NAMES else "a list such as [20, 21]"
    return "null" if kind is NoneType else _TYPE_NAMES.get(kind, str(kind))
