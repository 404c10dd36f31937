"""The keys of a configuration, and the one-line message for each mistake in them."""

import dataclasses
import difflib
import re
from collections.abc import Iterator, Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from grasp_lightning.config.values import check_values
from grasp_lightning.errors import ConfigError
from grasp_lightning.reading.text import one_line

C = TypeVar("C")
NAMES = tuple[str, ...]
"""Type of the keys that take a list of names."""

_BAD_VALUE = re.compile(r'Parser key "([^"]+)":')
_MISSING = re.compile(r"arguments are required: ([\w.]+)")
_GOT = re.compile(r"(?:Got value|Given value): (.*)$", re.MULTILINE)
_ABSENT = object()
_TYPE_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def leaves(config_type: type, prefix: str = "") -> Iterator[tuple[str, Any]]:  # Any: an annotation
    """Yield (dotted key, type) of every value, sections left out."""
    for name, kind in get_type_hints(config_type).items():
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            yield from leaves(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, kind


def section_of(kind: Any) -> type | None:  # noqa: ANN401  a type annotation
    """Return the type of the sections that a key holds by name, None for other keys."""
    section = get_args(kind)[-1] if get_origin(kind) is Mapping else None
    return section if isinstance(section, type) and dataclasses.is_dataclass(section) else None


def checked(config_type: type[C], parsed: Mapping[str, Any], schema: Mapping[str, Any]) -> C:
    """Return the parsed configuration; refuse values that do not fit their keys."""
    _refuse_nulls(parsed, schema)
    config = config_type(**{name: parsed[name] for name in get_type_hints(config_type)})
    check_values(config)
    return config


def check_keys(
    content: Mapping[str, Any],
    config_type: type,
    file: str,
    schema: Mapping[str, Any],
    prefix: str = "",
) -> None:
    """Refuse unknown keys, and values that should be sections.

    Args:
        content: Keys and values, nested like the configuration.
        file: Name of the source of the keys, for messages.
        schema: The allowed keys, dotted; see ``leaves``.

    Raises:
        ConfigError: With the wrong key and the allowed ones.
    """
    kinds = get_type_hints(config_type)
    for name, value in content.items():
        key = f"{prefix}{name}"
        if name not in kinds:
            raise ConfigError(f"{file}: unknown key {one_line(key)}; {allowed_keys(key, schema)}")
        kind = kinds[name]
        section = section_of(kind)
        if section is not None:
            _require_section(value, file, key)
            for entry, keys in value.items():
                _require_section(keys, file, f"{key}.{entry}")
                known = dict(leaves(section, f"{key}.{entry}."))
                check_keys(keys, section, file, known, f"{key}.{entry}.")
        elif isinstance(kind, type) and dataclasses.is_dataclass(kind):
            _require_section(value, file, key)
            check_keys(value, kind, file, schema, f"{key}.")


def _require_section(value: object, file: str, key: str) -> None:
    if not isinstance(value, dict):
        raise ConfigError(f"{file}: {key}: expected a section of keys, got {one_line(repr(value))}")


def allowed_keys(key: str, schema: Mapping[str, Any]) -> str:
    """Return the key that an unknown one may mean, or else the allowed keys."""
    first = key.partition(".")[0]
    if section_of(schema.get(first)) is not None:
        return f"set all entries at once, as in --{first}='{{NAME: {{KEY: VALUE}}}}'"
    section = key.rpartition(".")[0]
    siblings = [k for k in schema if section and k.rpartition(".")[0] == section]
    names = siblings or sorted({k.partition(".")[0] for k in schema})
    near = difflib.get_close_matches(key, [*schema, *names], n=1, cutoff=0.8)
    return f"did you mean {near[0]}?" if near else f"allowed: {', '.join(names)}"


def _refuse_nulls(parsed: Mapping[str, Any], schema: Mapping[str, Any], prefix: str = "") -> None:
    """Refuse null where the type does not allow it: the parser always allows it."""
    for key, kind in schema.items():
        value: Any = parsed
        for part in key.split("."):
            value = value[part] if isinstance(value, Mapping) else getattr(value, part)
        section = section_of(kind)
        if section is not None and isinstance(value, Mapping):
            for name, entry in value.items():
                _refuse_nulls(
                    entry if isinstance(entry, Mapping) else vars(entry),
                    dict(leaves(section)),
                    f"{key}.{name}.",
                )
        if value is None and NoneType not in get_args(kind):
            raise ConfigError(f"{prefix}{key}: expected {describe(kind)}, got null")


def explain(
    message: str,
    schema: Mapping[str, Any],
    flags: set[str],
    contents: Mapping[str, dict[str, Any]],
    missing_text: str = "{0} is not set; set it in a --config file or as --{0}=...",
) -> str:
    """Turn a parser's message into one line with source, key, expectation and value."""
    missing = _MISSING.search(message)
    if missing:
        return missing_text.format(missing.group(1))
    found = _BAD_VALUE.search(message)
    if found is None or found.group(1) not in schema:
        return f"command line: {one_line(message)}"
    key = found.group(1)
    holders = [file for file, content in contents.items() if _value(content, key) is not _ABSENT]
    got = _GOT.search(message)
    # A file is read before the flags that override it.
    refused = [f for f in holders if got and str(_value(contents[f], key)) == got.group(1)]
    source = "command line" if key in flags or not holders else holders[-1]
    source = refused[-1] if refused else source
    value = f", got {one_line(repr(got.group(1)))}" if got else ""
    return f"{source}: {key}: expected {describe(schema[key])}{value}"


def _value(content: object, key: str) -> object:
    """Return the value of a dotted key, or ``_ABSENT``."""
    for part in key.split("."):
        if not isinstance(content, dict) or part not in content:
            return _ABSENT
        content = content[part]
    return content


def describe(kind: Any) -> str:  # noqa: ANN401  a type annotation
    """Return in words what a key takes, for messages and ``--help``."""
    origin, parts = get_origin(kind), get_args(kind)
    if origin is Annotated:
        base, limit = parts[0], str(parts[1])
        return f"a {limit}" if base is str else f"{describe(base)} {limit}"
    if origin in (Union, UnionType):
        return " or ".join(describe(part) for part in parts)
    if origin is Literal:
        return "one of " + ", ".join(str(value) for value in parts)
    if section_of(kind) is not None:
        return "names with a section of keys each"
    if origin is tuple:
        inner = (parts[0], *get_args(parts[0]))
        example = "[0.1, 0.2]" if float in inner else "[20, 21]"
        return "a list of names" if str in inner else f"a list such as {example}"
    return "null" if kind is NoneType else _TYPE_NAMES.get(kind, str(kind))
