"""Text that a model writes by itself, token by token, each drawn from its own distribution."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grasp_lightning import processes
from grasp_lightning.errors import NumericsError
from grasp_lightning.models.calls import check_vocabulary, locate_non_finite
from grasp_lightning.models.decoder import DecoderView

BATCH = 16
"""Texts that are written together. It is fixed, since other sizes round, and so draw, otherwise."""

# Wraps an iterable of known length in a progress bar with a description.
Track = Callable[[Sequence[int], str], Iterable[int]]


def sample_text(
    model: PreTrainedModel,
    num_windows: int,
    length: int,
    *,
    starts: Tensor,
    vocabulary: Tensor,
    seed: int,
    track: Track = lambda items, _: items,
) -> Tensor:
    """Draw texts from a model at temperature 1, ancestral: each token given all before it.

    Several processes share the texts, and all get all of them. On one kind of machine the same
    seed gives the same ids, whatever the number of processes.

    Args:
        model: The model, in ``eval()``.
        num_windows: Number of texts, at least 1.
        length: Tokens of each, at least 1; the model has as many positions.
        starts: Ids of which each text takes its first token, all equally likely, ``(S,)``.
        vocabulary: Ids that may follow, ``(K,)``, ascending. Ids that the model does not know are
            left out here and of ``starts``.
        seed: Seed of all draws.
        track: Draws a progress bar.

    Returns:
        Token ids, ``(num_windows, length)`` int64 on the CPU.
    """
    view = DecoderView(model)
    check_vocabulary(view, starts.min())
    embedding = model.get_input_embeddings().weight
    assert isinstance(embedding, Tensor)  # every family embeds its tokens
    starts, vocabulary = (ids[ids < len(embedding)] for ids in (starts, vocabulary))
    generator = torch.Generator().manual_seed(seed)
    # One number per token, drawn beforehand, so that no text depends on how they are shared out.
    draws = torch.rand(num_windows, length, dtype=torch.float64, generator=generator)
    first = starts[(draws[:, 0] * len(starts)).long()]
    own = {
        begin: _continued(
            view, first[begin : begin + BATCH], draws[begin : begin + BATCH], vocabulary
        )
        for begin in track(
            processes.own_share(range(0, num_windows, BATCH)), "text of the model itself"
        )
    }
    written = {begin: ids for part in processes.gather(own) for begin, ids in part.items()}
    return torch.cat([written[begin] for begin in sorted(written)])


@torch.no_grad()
def _continued(view: DecoderView, first: Tensor, draws: Tensor, vocabulary: Tensor) -> Tensor:
    """Return texts, (B, T), that begin with given tokens, (B,); draws are in [0, 1), (B, T)."""
    ids = first[:, None]
    cache = None
    for draw in draws.T[1:]:
        step = ids[:, -1:].to(view.model.device)
        output = view.model(input_ids=step, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        # On the CPU and in float64: sums on a GPU do not always come out the same.
        logits = output.logits[:, -1].double().cpu()[:, vocabulary]
        edges = logits.softmax(dim=-1).cumsum(dim=-1)  # (B, K)
        if edges.isnan().any():
            where = locate_non_finite(view, {"input_ids": ids.to(view.model.device)})
            raise NumericsError(
                f"the model gives NaN or infinity, first in {where}, so that no text can be drawn "
                "from it; check the checkpoint, or try model.dtype float32"
            )
        picks = torch.searchsorted(edges, draw[:, None] * edges[:, -1:], right=True)
        token = vocabulary[picks.clamp(max=len(vocabulary) - 1)]  # (B, 1)
        ids = torch.cat([ids, token], dim=1)
    return ids
