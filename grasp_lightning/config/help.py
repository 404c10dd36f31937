"""The text of ``COMMAND --help``."""

from argparse import SUPPRESS, Action
from typing import Literal, get_origin

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from grasp_lightning.config.keys import describe


class HelpFormatter(DefaultHelpFormatter):
    """Names types and defaults in words, as error messages do."""

    def _get_type_str(self, action: Action) -> str | None:
        kind = getattr(action, "_typehint", None)
        is_shown = kind is bool or get_origin(kind) is Literal  # after the option, in braces
        return None if kind is None or is_shown else describe(kind)

    def _expand_help(self, action: Action) -> str:
        text = super()._expand_help(action).replace("``", "")
        return text.replace("default: null)", "default: unset)")


def hide_help_of_sections(parser: ArgumentParser) -> None:
    """Leave out the options ``--models.help`` that the parser adds to sections under names."""
    for action in parser._actions:
        if any(option.endswith(".help") for option in action.option_strings):
            action.help = SUPPRESS
