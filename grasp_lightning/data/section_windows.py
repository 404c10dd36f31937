"""The windows that sections of the configuration ask for: drawn, or from the start of a text."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from grasp_lightning.config import CalibrationConfig, EvaluationConfig, TextConfig
from grasp_lightning.config.values import check_values
from grasp_lightning.data.chat import calibration_documents
from grasp_lightning.data.hub import HUB_CORPORA
from grasp_lightning.data.instruction_files import HUB_INSTRUCTIONS
from grasp_lightning.data.mixture import SELF, interleaved, mixture_parts, section_of, shares
from grasp_lightning.data.self_text import Sampler, self_text
from grasp_lightning.data.sources import MixturePart, Part, check_corpus, read_documents
from grasp_lightning.data.windows import TokenWindows, pack_windows
from grasp_lightning.errors import DataError

CANDIDATE_FACTOR = 4
"""Calibration reads documents until it has this many times the windows it needs."""


def calibration_windows(
    config: CalibrationConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    *,
    sample: Sampler | None = None,
) -> TokenWindows:
    """Draw the ``num_samples`` windows for calibration.

    The seed shuffles the documents. They are read until there are ``CANDIDATE_FACTOR`` times as
    many windows as needed (a shard of C4 has hundreds of times as many); a second draw selects from
    these, so every window of a document can be drawn. With several sources, each contributes the
    windows it would give alone, and these are interleaved. An option that is out of range or
    without effect is a ``ConfigError``, a corpus that is unreadable or too short a ``DataError``.

    Args:
        seed: Seed for all draws.
        sample: Writes text with the model, for ``source: self``.

    Returns:
        Full windows; those of each source keep the order of its shuffled corpus.
    """
    check_values(config, "calibration.")
    sources, drawn = mixture_parts(config, "calibration"), []
    for source in sources:
        asked = _asked(config, source) if len(sources) > 1 else None
        if source.source == SELF:
            drawn.append(_written(source, config, tokenizer, seed, sample))
        else:
            drawn.append(_drawn(source, config, tokenizer, seed, part="calibration", asked=asked))
    return _interleaved(drawn)


class TrainingWindows(NamedTuple):
    """Windows to train on, and others, of the same mixture, to validate on."""

    train: TokenWindows
    validation: TokenWindows


def training_windows(
    config: TextConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    *,
    sample: Sampler | None = None,
) -> TrainingWindows:
    """Draw the windows of section ``text``; no window is in both parts.

    Each source is drawn as in ``calibration_windows``, and a further draw sets its share of
    ``num_validation`` windows aside. It raises the errors of ``calibration_windows``.

    Args:
        seed: Seed for all draws.
        sample: Writes text with the dense model, for ``source: self``.
    """
    section, train, validation = section_of(config), [], []
    for both, count, asked in _training_parts(config):
        if both.source == SELF:
            windows = _written(both, section, tokenizer, seed, sample)
        else:
            windows = _drawn(both, section, tokenizer, seed, part="text", asked=asked)
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
        train.append(windows.select(order[count:].sort().values))
        validation.append(windows.select(order[:count].sort().values))
    return TrainingWindows(_interleaved(train), _interleaved(validation))


def readable_training_windows(
    config: TextConfig, tokenizer: PreTrainedTokenizerBase, seed: int, *, reads_hub: bool
) -> list[tuple[str, TokenWindows | None]]:
    """Return the windows of section ``text`` that need no model, validation included, by source.

    Raises the errors of ``training_windows``.

    Args:
        config: The section.
        seed: Seed for all draws.
        reads_hub: Whether to read sources on the hub, too.

    Returns:
        Pairs of a source and its windows, None if they are not read.
    """
    found: list[tuple[str, TokenWindows | None]] = []
    for both, _, asked in _training_parts(config):
        windows = None
        if both.source in HUB_CORPORA:
            check_corpus(both, "text")
        is_on_hub = both.source in HUB_CORPORA or both.source in HUB_INSTRUCTIONS
        if both.source != SELF and (reads_hub or not is_on_hub):
            section = section_of(config)
            windows = _drawn(both, section, tokenizer, seed, part="text", asked=asked)
        found.append((both.source, windows))
    return found


class _TrainingPart(NamedTuple):
    """One source of section ``text``: its windows, how many are set aside, and a message."""

    both: MixturePart
    set_aside: int
    asked: str


def _training_parts(config: TextConfig) -> list[_TrainingPart]:
    section = section_of(config)
    check_values(section, "text.")
    sources = mixture_parts(section, "text")
    set_aside = shares(config.num_validation, config.weights or [1.0] * len(sources))
    asked = f"num_samples is {config.num_samples} and num_validation {config.num_validation}"
    parts = []
    for source, count in zip(sources, set_aside, strict=True):
        both = replace(source, num_samples=source.num_samples + count)
        own = f", {both.num_samples} of {both.source}" if len(sources) > 1 else ""
        parts.append(_TrainingPart(both, count, asked + own))
    return parts


def local_calibration_windows(
    config: CalibrationConfig, tokenizer: PreTrainedTokenizerBase, seed: int
) -> list[tuple[str, TokenWindows | None]]:
    """Return the calibration windows of each source that needs neither the hub nor the model.

    Raises the errors of ``calibration_windows``. Of a corpus on the hub, only the keys are checked.

    Returns:
        Pairs of a source and its windows, None if they are not local.
    """
    check_values(config, "calibration.")
    sources, found = mixture_parts(config, "calibration"), []
    for source in sources:
        windows = None
        if source.source in HUB_CORPORA:
            check_corpus(source, "calibration")
        elif source.source != SELF and source.source not in HUB_INSTRUCTIONS:
            asked = _asked(config, source) if len(sources) > 1 else None
            windows = _drawn(source, config, tokenizer, seed, part="calibration", asked=asked)
        found.append((source.source, windows))
    return found


def evaluation_windows(
    config: EvaluationConfig, tokenizer: PreTrainedTokenizerBase
) -> TokenWindows:
    """Return the first ``num_samples`` windows of the held-out text; None takes all.

    Raises the errors of ``calibration_windows``.
    """
    check_values(config, "evaluation.")
    documents = read_documents(config, "evaluation")
    windows = pack_windows(
        documents.texts,
        tokenizer,
        seqlen=config.seqlen,
        add_bos=config.add_bos,
        tail=config.tail,
        enough=config.num_samples,
    )
    _require_windows(windows, config.num_samples, documents.name, "evaluation")
    if config.num_samples is not None:
        windows = windows.select(range(config.num_samples))
    return _with_targets(windows, documents.name)


def _asked(config: CalibrationConfig, source: MixturePart) -> str:
    return f"num_samples is {config.num_samples}, {source.num_samples} of {source.source}"


def _drawn(
    source: MixturePart,
    config: CalibrationConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    *,
    part: Part,
    asked: str | None,
) -> TokenWindows:
    documents = calibration_documents(source, tokenizer, part)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(documents.texts), generator=generator).tolist()
    windows = pack_windows(
        (documents.texts[index] for index in order),
        tokenizer,
        seqlen=config.seqlen,
        add_bos=config.add_bos,
        enough=CANDIDATE_FACTOR * source.num_samples,
    )
    _require_windows(windows, source.num_samples, documents.name, part, asked)
    chosen = torch.randperm(len(windows), generator=generator)[: source.num_samples]
    return _with_targets(windows.select(chosen.sort().values), documents.name)


def _written(
    source: MixturePart,
    config: CalibrationConfig,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    sample: Sampler | None,
) -> TokenWindows:
    if sample is None:
        raise ValueError("source self needs sample, which writes text with the model")
    ids = self_text(
        sample,
        tokenizer,
        num_windows=source.num_samples,
        seqlen=config.seqlen,
        add_bos=config.add_bos,
        seed=seed,
    )
    targets = torch.ones_like(ids, dtype=torch.bool)
    targets[:, 0] = False
    return TokenWindows(ids, torch.ones_like(targets), targets)


def _interleaved(parts: Sequence[TokenWindows]) -> TokenWindows:
    joined = TokenWindows(
        torch.cat([part.input_ids for part in parts]),
        torch.cat([part.mask for part in parts]),
        torch.cat([part.targets for part in parts]),
    )
    return joined.select(interleaved([len(part) for part in parts]))


def _require_windows(
    windows: TokenWindows,
    num_samples: int | None,
    corpus: str,
    part: Part,
    asked: str | None = None,
) -> None:
    if len(windows) >= (num_samples or 1):
        return
    length = windows.input_ids.shape[1]
    needed = "at least 1 is needed" if num_samples is None else f"num_samples is {num_samples}"
    raise DataError(
        f"{part}: {asked or needed}, but {corpus} gives {len(windows)} windows of {length} tokens; "
        f"lower {part}.num_samples or {part}.seqlen, or use a longer corpus"
    )


def _with_targets(windows: TokenWindows, corpus: str) -> TokenWindows:
    if windows.num_targets > 0:
        return windows
    raise DataError(f"{corpus} has no token to predict: each document is a single token")
