"""Instruction samples as tokens: the Alpaca template, training targets, and truncation."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from grasp_lightning.data.batching import TokenSamples
from grasp_lightning.data.instruction_files import Instructions, InstructionSample
from grasp_lightning.data.windows import MIN_TOKENS, bos_prefix
from grasp_lightning.errors import ConfigError, DataError

# Source: the template "alpaca" of Alpaca-LoRA, which the published procedure uses: the template of
# Taori et al., "Stanford Alpaca", plus a line feed after the last colon.
_PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
_PROMPT_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)

_CHUNK = 1000  # samples per call of the tokenizer: Python's lists of ids are large


def alpaca_prompt(sample: InstructionSample) -> str:
    """Return the Alpaca prompt of a sample; the answer follows it directly."""
    template = _PROMPT_WITH_INPUT if sample.input else _PROMPT_WITHOUT_INPUT
    return template.format(instruction=sample.instruction, input=sample.input)


class Split(NamedTuple):
    """Training samples (at least one), and other samples for validation (may be empty)."""

    train: Instructions
    validation: Instructions


def split_instructions(
    instructions: Instructions,
    *,
    num_validation: int,
    seed: int,
    num_train: int | None = None,
    section: str = "data",
) -> Split:
    """Set samples aside for validation.

    The seed alone chooses them: they do not depend on the number of training samples, the
    tokenizer or the maximum length.

    Args:
        num_validation: Number of validation samples, at least 0.
        num_train: Number of training samples, at least 1; None takes all others.
        section: Section of the configuration, for messages.

    Returns:
        Both parts, each in the order of the source.

    Raises:
        ConfigError: If a number is too small, or the source has too few samples.
    """
    if num_validation < 0:
        raise ConfigError(f"{section}.num_validation must be at least 0, got {num_validation}")
    if num_train is not None and num_train < 1:
        raise ConfigError(f"{section}.num_train must be at least 1, got {num_train}")
    least = 1 if num_train is None else num_train
    if num_validation + least > len(instructions):
        raise ConfigError(
            f"{section}.num_validation is {num_validation}: with {least} for training, more than "
            f"the {len(instructions)} samples of {instructions.name}; lower "
            f"{section}.num_validation" + (f" or {section}.num_train" if num_train else "")
        )
    order = torch.randperm(len(instructions), generator=torch.Generator().manual_seed(seed))
    end = None if num_train is None else num_validation + num_train

    def part(indices: torch.Tensor) -> Instructions:
        """Return some of the samples, in the order of the source."""
        chosen = tuple(instructions.samples[index] for index in indices.sort().values.tolist())
        return Instructions(chosen, instructions.name)

    return Split(part(order[num_validation:end]), part(order[:num_validation]))


@dataclass(frozen=True, kw_only=True)
class SampleCounts:
    """What happened to the samples.

    Attributes:
        read: Samples of the source.
        empty: Skipped because their output is blank.
        cut: Other samples above the maximum length, which lost their end.
        cut_prompts: Those of ``cut`` that lost part of the prompt.
        no_answer: Skipped because the cut left nothing of the answer.
    """

    read: int
    empty: int
    cut: int
    cut_prompts: int
    no_answer: int

    @property
    def kept(self) -> int:
        """Number of training samples."""
        return self.read - self.empty - self.no_answer

    def __str__(self) -> str:
        return (
            f"{self.kept} of {self.read} samples; {self.cut} were too long and were cut, "
            f"{self.cut_prompts} of them inside the prompt; skipped: {self.no_answer} whose answer "
            f"was cut off, {self.empty} with a blank output"
        )


class TokenizedInstructions(NamedTuple):
    """The tokens of the remaining samples, and the counts of all."""

    tokens: TokenSamples
    counts: SampleCounts


def tokenize_instructions(
    instructions: Instructions,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    train_on_inputs: bool = True,
    add_eos: bool = False,
    add_bos: bool | None = None,
) -> TokenizedInstructions:
    """Tokenize prompt and answer of every sample as one text, and cut it at the maximum length.

    A token belongs to the answer if it contains any of its characters. A sample is skipped and
    counted if its output is blank or the cut leaves nothing of its answer.

    Args:
        instructions: The samples; may be empty.
        max_length: Maximum tokens per sample, special tokens included, at least 2.
        train_on_inputs: Predict all tokens but the first; otherwise only the answer.
        add_eos: End every uncut sample with the end-of-sequence token, as a target. A sample
            without room for it counts as cut.
        add_bos: Start every sample with the beginning-of-sequence token; None follows the
            tokenizer's default.

    Raises:
        ConfigError: If the tokenizer lacks a requested special token.
        DataError: If no sample remains.
        ValueError: If ``max_length`` is below 2.
    """
    if max_length < MIN_TOKENS:
        raise ValueError(f"max_length must be at least {MIN_TOKENS}, got {max_length}")
    if add_eos and tokenizer.eos_token_id is None:
        raise ConfigError(
            "add_eos is set, but the tokenizer has no end-of-sequence token; set add_eos: false"
        )
    prefix = _prefix(tokenizer, add_bos)
    suffix = [tokenizer.eos_token_id] if add_eos else []
    counts = Counter(cut=0, cut_prompts=0, no_answer=0)
    ids, targets = [], []
    samples = [sample for sample in instructions.samples if sample.output.strip()]
    for num_prompt, tokens in _tokenized(samples, tokenizer, prefix):
        counts["cut"] += len(tokens) + len(suffix) > max_length
        counts["cut_prompts"] += num_prompt > max_length
        if num_prompt >= min(len(tokens), max_length):
            counts["no_answer"] += 1
            continue
        ids.append(torch.tensor([*tokens, *suffix][:max_length]))
        targets.append(torch.ones(len(ids[-1]), dtype=torch.bool))
        targets[-1][: 1 if train_on_inputs else max(num_prompt, 1)] = False
    num_read = len(instructions)
    result = SampleCounts(read=num_read, empty=num_read - len(samples), **counts)
    if num_read > 0 and result.kept == 0:
        raise DataError(
            f"{instructions.name} has no sample with an answer within max_length {max_length}: "
            f"{result}; raise max_length"
        )
    return TokenizedInstructions(TokenSamples.from_rows(ids, targets), result)


def _prefix(tokenizer: PreTrainedTokenizerBase, add_bos: bool | None) -> list[int]:
    bos = tokenizer.bos_token_id
    if add_bos is None:
        add_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    return bos_prefix(tokenizer, add_bos)


def _tokenized(
    samples: Sequence[InstructionSample], tokenizer: PreTrainedTokenizerBase, prefix: list[int]
) -> Iterator[tuple[int, list[int]]]:
    """Yield, for every sample, the number of tokens before its answer, and all its tokens."""
    for start in range(0, len(samples), _CHUNK):
        part = samples[start : start + _CHUNK]
        prompts = [alpaca_prompt(sample) for sample in part]
        texts = [prompt + sample.output for prompt, sample in zip(prompts, part, strict=True)]
        pairs = zip(_token_ids(prompts, tokenizer), _token_ids(texts, tokenizer), strict=True)
        for prompt_ids, text_ids in pairs:
            yield len(prefix) + _num_shared(prompt_ids, text_ids), [*prefix, *text_ids]


def _token_ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    # verbose: texts longer than the model's context are cut later.
    encoding = tokenizer(texts, add_special_tokens=False, verbose=False)
    ids: list[list[int]] = encoding["input_ids"]
    return ids


def _num_shared(first: list[int], second: list[int]) -> int:
    # A tokenizer may merge the end of the prompt with the beginning of the answer.
    if second[: len(first)] == first:
        return len(first)
    differs = (a != b for a, b in zip(first, second, strict=False))
    return next((index for index, different in enumerate(differs) if different), len(second))
