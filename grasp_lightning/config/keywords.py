"""From the keywords of a Python call to a typed configuration."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, TypeVar, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser

from grasp_lightning.config.compress import CompressConfig
from grasp_lightning.config.keys import NAMES, check_keys, checked, explain, leaves
from grasp_lightning.config.method import MethodConfig
from grasp_lightning.config.parsing import (
    METHOD_NAMES,
    config_of_run,
    read_settings,
    split_names,
    unread_keys,
)
from grasp_lightning.errors import ConfigError
from grasp_lightning.reading.text import one_line

C = TypeVar("C")
Keys = Mapping[str, Any]  # Any: what a caller gives, until it is parsed

# The key of a section that a single name sets.
_NAMED: Final = MappingProxyType(
    {
        "model": "path",
        "method": "name",
        "calibration": "source",
        "evaluation": "source",
        "data": "source",
        "text": "source",
    }
)
_METHOD_KEYS: Final = tuple(key for key in get_type_hints(MethodConfig) if key != "name")


def parse_keywords(config_type: type[C], keywords: Keys, call: str) -> C:
    """Return the configuration that the keywords of a call describe.

    Every key of the configuration is a keyword; a section is a mapping. Keys of the section
    ``method`` can also be given directly. A name for a whole section sets its path, name or source.
    A single name for a list of names is a list of one. With ``from_scores``, keys that are not
    given come from that run, as on the command line.

    Raises:
        ConfigError: If a key or value is wrong. The message is the same as from
            ``parse``; it names ``call`` as the source.
    """
    schema = dict(leaves(config_type))
    has_method = "method.name" in schema
    keys = _with_sections(_plain(keywords, schema), schema)
    if has_method:
        keys["method"] = _method_section(keys, call)
    allowed = [*schema, *(_METHOD_KEYS if has_method else ())]
    check_keys(keys, config_type, call, dict.fromkeys(allowed))
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(config_type, as_group=False)
    try:
        parsed = parser.instantiate(parser.parse_object(_with_run_keys(keys)))
    except (ArgumentError, ValueError, OverflowError, RecursionError) as error:
        missing = call + ": {} is not set"
        raise ConfigError(explain(str(error), schema, set(), {call: keys}, missing)) from None
    return checked(config_type, parsed, schema)


def _plain(keys: Keys, schema: Keys, prefix: str = "") -> dict[str, Any]:  # Any: as in Keys
    """Return keys and values as a YAML file would have them."""
    plain: dict[str, Any] = {}
    for name, value in keys.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            plain[name] = _plain(value, schema, f"{key}.")
        elif isinstance(value, str) and schema.get(key) == NAMES:
            plain[name] = split_names(value)
        else:
            plain[name] = _plain_value(value)
    return plain


def _plain_value(value: object) -> object:
    if isinstance(value, list | tuple):
        return [_plain_value(part) for part in value]
    return str(value) if isinstance(value, Path) else value


def _with_sections(keys: Keys, schema: Keys) -> dict[str, Any]:  # Any: as in Keys
    """Turn a name for a whole section into that section."""
    return {
        name: {_NAMED[name]: value}
        if isinstance(value, str | list) and f"{name}.{_NAMED.get(name)}" in schema
        else value
        for name, value in keys.items()
    }


def _method_section(keys: dict[str, Any], call: str) -> Any:  # noqa: ANN401  as in Keys
    """Take the keys of the method out of the others, and return its section."""
    section = keys.get("method", {})
    if not isinstance(section, dict):
        return section  # refused later
    short = {key: keys.pop(key) for key in _METHOD_KEYS if key in keys}
    for key in sorted(short.keys() & section.keys()):
        raise ConfigError(
            f"{call}: {key} is given twice, as {one_line(repr(short[key]))} and in method, as "
            f"{one_line(repr(section[key]))}; leave one out"
        )
    return {**section, **short}


def _with_run_keys(keys: Keys) -> dict[str, Any]:  # Any: as in Keys
    """Return the keys of the run that ``from_scores`` names, overridden by the given ones."""
    folder = keys.get("from_scores")
    if not isinstance(folder, str):
        return dict(keys)
    merged = read_settings(str(config_of_run(folder)), CompressConfig)
    asked = {key: str(keys["method"][key]) for key in METHOD_NAMES if key in keys["method"]}
    unset = {"method": dict.fromkeys(unread_keys(asked))} if asked else {}
    for layer in (unset, keys):
        for name, value in layer.items():
            is_section = isinstance(value, dict) and isinstance(merged.get(name), dict)
            merged[name] = {**merged[name], **value} if is_section else value
    return merged
