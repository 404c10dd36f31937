"""Calibration text that the model itself writes, for calibration without data."""

from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grasp_lightning.errors import ConfigError


class Sampler(Protocol):
    """Writes text with a model; ``models.sampling.sample_text`` with its model bound is one."""

    def __call__(
        self, num_windows: int, length: int, *, starts: Tensor, vocabulary: Tensor, seed: int
    ) -> Tensor:
        """Write texts.

        Args:
            num_windows: Number of texts.
            length: Tokens of each.
            starts: Ids of which each text takes its first token, all equally likely, ``(S,)``.
            vocabulary: Ids that may follow, ``(K,)``, ascending.
            seed: Seed of all draws.

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
    """Return windows that the model writes: each token is drawn from its own distribution.

    Source: Liu et al., "LLM-QAT: Data-Free Quantization Aware Training", arXiv:2305.17888: a random
    first token, then the model's own. There the first few tokens after it are the likeliest ones;
    here all are drawn, at temperature 1.

    Args:
        sample: Writes with the model.
        tokenizer: Tokenizer of the model; ids that it does not have are never drawn.
        num_windows: Number of windows.
        seqlen: Tokens of each.
        add_bos: Begin with the beginning-of-sequence token; else with a random token that is not
            special.
        seed: Seed of all draws.

    Returns:
        Token ids, ``(num_windows, seqlen)`` int64.

    Raises:
        ConfigError: If ``add_bos`` is set and the tokenizer has no such token.
    """
    if add_bos and tokenizer.bos_token_id is None:
        raise ConfigError(
            "add_bos is set, but the tokenizer has no beginning-of-sequence token; "
            "set add_bos: false"
        )
    known = sorted(set(tokenizer.get_vocab().values()))
    special = set(tokenizer.all_special_ids)
    starts = [tokenizer.bos_token_id] if add_bos else [id_ for id_ in known if id_ not in special]
    return sample(
        num_windows,
        seqlen,
        starts=torch.tensor(starts),
        vocabulary=torch.tensor(known),
        seed=seed,
    )
