"""Several sources of calibration text: the keys and the share of each, and how they interleave."""

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations
from pathlib import Path

from grasp_lightning.config import CalibrationConfig, TextConfig
from grasp_lightning.data.hub import HUB_CORPORA
from grasp_lightning.data.instruction_files import HUB_INSTRUCTIONS
from grasp_lightning.data.rows import RowRange
from grasp_lightning.data.sources import DEFAULT_FIELD, SOURCES, MixturePart, Part
from grasp_lightning.errors import ConfigError

INSTRUCTIONS = "instructions"
SELF = "self"
CALIBRATION_SOURCES = (*SOURCES, INSTRUCTIONS, *HUB_INSTRUCTIONS, SELF)
"""What a mixture takes: ``SOURCES``, instruction samples, and text that the model writes."""

_WITH_FILE = ("file", INSTRUCTIONS)
_WITH_SPLITS = ("pydoc", *HUB_CORPORA)


def section_of(text: TextConfig) -> CalibrationConfig:
    """Return the mixture that a section ``text`` names, with its training windows."""
    return CalibrationConfig(
        source=text.source,
        path=text.path,
        weights=text.weights,
        rows=text.rows,
        split=text.split,
        field=text.field,
        num_samples=text.num_samples,
        seqlen=text.seqlen,
        add_bos=text.add_bos,
    )


def mixture_parts(config: CalibrationConfig, part: Part) -> tuple[MixturePart, ...]:
    """Return the sources that a section names, in order, without reading any.

    For a single corpus, ``read_documents`` checks the keys.

    Args:
        config: The section; its numbers are in range.
        part: Name of the section, for messages.

    Raises:
        ConfigError: If keys do not fit the sources.
    """
    sources = _sources(config, part)
    counts = _counts(config, part, sources)
    if len(sources) == 1 and sources[0] in SOURCES:
        return (
            MixturePart(
                source=sources[0],
                num_samples=config.num_samples,
                path=_single(config.path, f"{part}.path"),
                rows=_single(config.rows, f"{part}.rows"),
                split=config.split,
                field=config.field,
            ),
        )
    paths = _by_file(config.path, f"{part}.path", sources, part)
    for source, path in zip(sources, paths, strict=True):
        if source in _WITH_FILE and not path:
            raise ConfigError(f"{part}.source {source} needs {part}.path, the file to read")
    rows = _by_file(config.rows, f"{part}.rows", sources, part)
    parts = tuple(
        MixturePart(
            source=source,
            num_samples=count,
            path=path,
            rows=range_,
            split=config.split if source in _WITH_SPLITS else None,
            field=config.field if _has_columns(source, path) else DEFAULT_FIELD,
        )
        for source, count, path, range_ in zip(sources, counts, paths, rows, strict=True)
    )
    _refuse_unread(config, parts, part)
    _refuse_repeats(parts, part)
    return parts


def shares(total: int, weights: Sequence[float]) -> list[int]:
    """Split a total by weight into whole numbers (largest remainder; ties go to the first)."""
    exact = [Fraction(weight) for weight in weights]
    quotas = [total * weight / sum(exact) for weight in exact]
    counts = [math.floor(quota) for quota in quotas]
    rests = [count - quota for count, quota in zip(counts, quotas, strict=True)]
    for index in sorted(range(len(counts)), key=rests.__getitem__)[: total - sum(counts)]:
        counts[index] += 1
    return counts


def interleaved(counts: Sequence[int]) -> list[int]:
    """Return indices that interleave concatenated sources: every prefix is a fair mixture.

    The windows of each source, ``counts`` of them, are spread evenly and keep their order.
    """
    places = [
        ((2 * position + 1) / count, index)
        for index, count in enumerate(counts)
        for position in range(count)
    ]
    return sorted(range(len(places)), key=places.__getitem__)


def _sources(config: CalibrationConfig, part: Part) -> tuple[str, ...]:
    allowed = CALIBRATION_SOURCES
    sources = (config.source,) if isinstance(config.source, str) else config.source
    if not sources:
        raise ConfigError(
            f"{part}.source is an empty list; name at least one of {', '.join(allowed)}"
        )
    for source in sources:
        if source not in allowed:
            raise ConfigError(
                f"{part}.source {source!r} is unknown; expected one of {', '.join(allowed)}, or a "
                "list such as [wikitext2, c4]"
            )
    return sources


def _counts(config: CalibrationConfig, part: Part, sources: Sequence[str]) -> list[int]:
    """Return the number of windows per source."""
    weights, num_samples = config.weights, config.num_samples
    if weights is None:
        weights = (1.0,) * len(sources)
    elif len(sources) == 1:
        raise ConfigError(f"{part}.weights has no effect with one {part}.source; remove it")
    if len(weights) != len(sources):
        raise ConfigError(
            f"{part}.weights has {len(weights)} numbers, but {part}.source has {len(sources)} "
            f"names: {', '.join(sources)}; give one weight for each"
        )
    for weight in weights:
        if not 0 < weight < math.inf:
            raise ConfigError(f"{part}.weights must be above 0, got {weight}")
    if num_samples < len(sources):
        raise ConfigError(
            f"{part}.num_samples is {num_samples}, fewer than the {len(sources)} names in "
            f"{part}.source: raise it, or name fewer"
        )
    counts = shares(num_samples, weights)
    if 0 in counts:
        raise ConfigError(
            f"{part}.weights give {sources[counts.index(0)]} none of the {num_samples} windows; "
            f"raise its weight or {part}.num_samples, or leave it out"
        )
    return counts


def _single(value: str | tuple[str, ...] | None, key: str) -> str | None:
    if not isinstance(value, tuple):
        return value
    if len(value) != 1:
        raise ConfigError(f"{key} must have one value for one source, got {len(value)}")
    return value[0]


def _by_file(
    value: str | tuple[str, ...] | None, key: str, sources: Sequence[str], part: Part
) -> list[str | None]:
    """Return the value for each source; None for those without a file, or if the key is not set."""
    if value is None:
        return [None] * len(sources)
    values = value if isinstance(value, tuple) else (value,)
    files = [source for source in sources if source in _WITH_FILE]
    if not files:
        raise ConfigError(
            f"{key} {', '.join(values)!r} has no effect with {part}.source {', '.join(sources)}; "
            f"remove it, or add {' or '.join(_WITH_FILE)} in {part}.source"
        )
    if len(values) != len(files):
        raise ConfigError(
            f"{key} must have one value for each of {', '.join(files)} in {part}.source, in their "
            f"order: {len(files)}, got {len(values)}"
        )
    left = iter(values)
    return [next(left) if source in _WITH_FILE else None for source in sources]


def _has_columns(source: str, path: str | None) -> bool:
    return source == "file" and path is not None and Path(path).suffix.lower() != ".txt"


def _refuse_unread(config: CalibrationConfig, parts: Sequence[MixturePart], part: Part) -> None:
    """Refuse a shared key if it applies to none of the sources."""
    sources = ", ".join(one.source for one in parts)
    if config.split is not None and all(one.split is None for one in parts):
        raise ConfigError(
            f"{part}.split {config.split!r} has no effect with {part}.source {sources}; remove it"
        )
    if config.field != DEFAULT_FIELD and all(one.field == DEFAULT_FIELD for one in parts):
        raise ConfigError(
            f"{part}.field {config.field!r} has no effect with {part}.source {sources}: no .jsonl "
            "or .parquet file is read as source file; remove it"
        )


def _refuse_repeats(parts: Sequence[MixturePart], part: Part) -> None:
    """Refuse text that would be read twice: a window could then be drawn twice."""
    read = [
        (
            one.source if one.path is None else str(Path(one.path).expanduser().resolve()),
            RowRange.parse(one.rows, f"{part}.rows"),
        )
        for one in parts
    ]
    for (first, rows), (second, other_rows) in combinations(read, 2):
        if first == second and rows.overlaps(other_rows):
            which = "" if rows == other_rows else f", with rows {rows} and {other_rows}"
            raise ConfigError(
                f"{part}.source names {first} twice{which}; name each text once and set its share "
                f"with {part}.weights"
            )
