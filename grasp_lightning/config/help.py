"""The text of ``COMMAND --help``."""

from argparse import Action
from typing import Literal, get_origin

from jsonargparse import DefaultHelpFormatter

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
