"""Calibration text written by the model itself, for calibration without data."""

from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grasp_lightning.data.windows import bos_prefix


class Sampler(Protocol):
    """Writes text with a model, such as ``models.sampling.sample_text`` with its model bound."""

    def __call__(
        self, num_windows: int, length: int, *, starts: Tensor, vocabulary: Tensor, seed: int
    ) -> Tensor:
        """Write texts.

        Args:
            num_windows: Number of texts.
            length: Tokens of each.
            starts: Ids for the first token, all equally likely, ``(S,)``.
            vocabulary: Ids that may follow, ``(K,)``, ascending.
            seed: Seed for all draws.

        Returns:
            Token ids, ``(num_windows, length)`` int64 on the CPU.
        """


def self_text(
    sample: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_windows: int,
    seqlen: int,
    add_bos: bool,
    seed: int,
) -> Tensor:
    """Return windows sampled from the model, ``(num_windows, seqlen)`` int64.

    Source: Liu et al., "LLM-QAT: Data-Free Quantization Aware Training", arXiv:2305.17888: a random
    first token, followed by tokens of the model. The paper chooses the first few of them greedily;
    here all are sampled, at temperature 1. Ids unknown to the tokenizer are never drawn.

    Args:
        add_bos: Begin with the beginning-of-sequence token; otherwise with a random token that is
            not special.
    """
    known = sorted(set(tokenizer.get_vocab().values()))
    special = set(tokenizer.all_special_ids)
    starts = bos_prefix(tokenizer, add_bos) or [id_ for id_ in known if id_ not in special]
    return sample(
        num_windows, seqlen, starts=torch.tensor(starts), vocabulary=torch.tensor(known), seed=seed
    )
