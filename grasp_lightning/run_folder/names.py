"""Every name that a run may write in its folder; writing another one is a bug."""

from fnmatch import fnmatchcase
from typing import Final

CONFIG: Final = "config.yaml"
PLAN: Final = "plan.json"
SCORES: Final = "scores.safetensors"
FACTORS: Final = "factors.safetensors"
STATISTICS: Final = "statistics*.safetensors"
SAMPLED_TEXT: Final = "sampled_text.safetensors"
METRICS: Final = "metrics.json"
REPORT: Final = "report.html"
EXPORT: Final = "export.json"
TRIM: Final = "trim.json"
MODEL: Final = "model"
LOGS: Final = "logs"
CHECKPOINTS: Final = "checkpoints"
COMPRESSED: Final = "compressed"
"""Run folder of a compression, inside that of the compensation which the same command does."""

_FOLDERS = (MODEL, LOGS, CHECKPOINTS)
_FILES = (CONFIG, PLAN, SCORES, FACTORS, STATISTICS, SAMPLED_TEXT, METRICS, REPORT, EXPORT, TRIM)


def is_reserved(name: str) -> bool:
    """Return whether a run may write under this name, or in a folder of this name."""
    return any(fnmatchcase(name.partition("/")[0], pattern) for pattern in _FOLDERS + _FILES)
