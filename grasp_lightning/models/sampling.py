"""Text that a model writes itself, token by token, each drawn from the predicted distribution."""

from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grasp_lightning import processes
from grasp_lightning.errors import NumericsError
from grasp_lightning.models.calls import check_vocabulary, locate_non_finite, vocabulary_size
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.integrity import nan_advice
from grasp_lightning.models.sharding import is_sharded

BATCH = 16
"""Texts per batch; fixed, because other sizes round differently and would draw other tokens."""

# The first text of a batch, in a sequence of one, and whether the batch counts.
Round = tuple[Sequence[int], bool]
# Wraps an iterable of known length in a progress bar with a description.
Track = Callable[[Sequence[Round], str], Iterable[Round]]


def sample_text(
    model: PreTrainedModel,
    num_windows: int,
    length: int,
    *,
    starts: Tensor,
    vocabulary: Tensor,
    seed: int,
    written: Tensor | None = None,
    keep: Callable[[Tensor], object] = lambda _: None,
    track: Track = lambda items, _: items,
) -> Tensor:
    """Draw texts from a model in ``eval()`` by ancestral sampling at temperature 1.

    Processes share the texts, and each returns all of them. If they share the weights too, each
    runs the same number of forward passes. On one kind of machine a seed always gives the same ids,
    whatever the number of processes.

    Args:
        num_windows: Number of texts, at least 1.
        length: Tokens per text, from 1 to the number of positions of the model.
        starts: Candidates for the first token of a text, equally likely, ``(S,)``.
        vocabulary: Ids that may follow, ``(K,)``, ascending. Ids unknown to the model are left out
            of this and of ``starts``.
        written: What an earlier call with the same arguments passed to ``keep``.
        keep: Receives all texts so far, ``(n, length)``, whenever there are more.

    Returns:
        Token ids, ``(num_windows, length)`` int64 on the CPU.
    """
    view = DecoderView(model)
    check_vocabulary(view, starts.min())
    size = vocabulary_size(model)
    starts, vocabulary = (ids[ids < size] for ids in (starts, vocabulary))
    generator = torch.Generator().manual_seed(seed)
    # One number per token, drawn up front, so that texts do not depend on the number of processes.
    draws = torch.rand(num_windows, length, dtype=torch.float64, generator=generator)
    first = starts[(draws[:, 0] * len(starts)).long()]
    done = first.new_empty(0, length) if written is None else written
    rounds = processes.own_batches(range(len(done), num_windows, BATCH), 1)
    for batch, counts in track(rounds, "generate text"):
        begin, end = batch[0], batch[0] + BATCH
        texts, bad = _continued(view, first[begin:end], draws[begin:end], vocabulary)
        parts = processes.gather((texts if counts else texts[:0], bad))
        for _, bad_text in parts:
            if bad_text is not None:
                _refuse_non_finite(view, bad_text)
        done = torch.cat([done, *(texts for texts, _ in parts)])
        keep(done)
    return done


@torch.no_grad()
def _continued(
    view: DecoderView, first: Tensor, draws: Tensor, vocabulary: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return texts (B, T) that begin with given tokens (B,), by draws (B, T) in [0, 1).

    The second value is the text at which the model first gave NaN or infinity, or None. Processes
    that share the weights continue after that, since all need the same number of forward passes.
    """
    ids = first[:, None]
    bad = cache = None
    for draw in draws.T[1:]:
        step = ids[:, -1:].to(view.model.device)
        output = view.model(input_ids=step, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        # On the CPU and in float64: sums on a GPU do not always come out the same.
        logits = output.logits[:, -1].double().cpu()[:, vocabulary]
        edges = logits.softmax(dim=-1).cumsum(dim=-1)  # (B, K)
        if bad is None and edges.isnan().any():
            bad = ids
            if not is_sharded(view.model):
                break
        picks = torch.searchsorted(edges, draw[:, None] * edges[:, -1:], right=True)
        token = vocabulary[picks.clamp(max=len(vocabulary) - 1)]  # (B, 1)
        ids = torch.cat([ids, token], dim=1)
    return ids, bad


def _refuse_non_finite(view: DecoderView, ids: Tensor) -> NoReturn:
    where = locate_non_finite(view, {"input_ids": ids.to(view.model.device)})
    raise NumericsError(
        f"the model gives NaN or infinity, first in {where}, so it cannot generate text; "
        f"{nan_advice(view.model.dtype)}"
    )
