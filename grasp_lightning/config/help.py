"""The text of ``COMMAND --help``."""

from argparse import Action
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from jsonargparse import DefaultHelpFormatter

_NAMES = {int: "whole number", float: "number", str: "text", bool: "true or false"}


class HelpFormatter(DefaultHelpFormatter):
    """Names types and defaults in words, as error messages do."""

    def _get_type_str(self, action: Action) -> str | None:
        kind = getattr(action, "_typehint", None)
        is_shown = kind is bool or get_origin(kind) is Literal  # after the option, in braces
        return None if kind is None or is_shown else _words(kind)

    def _expand_help(self, action: Action) -> str:
        text = super()._expand_help(action).replace("``", "")
        return text.replace("default: null)", "default: unset)")


def _words(kind: Any) -> str:  # noqa: ANN401  a type annotation
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(_words(part) for part in parts if part is not NoneType)
    if origin is Literal:
        return "one of " + ", ".join(str(value) for value in parts)
    if origin is tuple:
        return f"list of {_words(parts[0])}s"
    if origin is Annotated:
        base, limit = parts[0], str(parts[1])
        return limit if base is str else f"{_words(base)} {limit}"
    return _NAMES.get(kind, str(kind))
