"""Computes log-likelihoods of texts with one pass over the beginning that they share."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from operator import eq

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel

from grasp_lightning.evaluation.workload import cache_options


@dataclass(frozen=True, slots=True)
class Answer:
    """A text and its end, whose log-likelihood is asked for.

    Attributes:
        tokens: Token ids of the text.
        length: Number of tokens of the end, at least 1 and fewer than ``tokens``.
    """

    tokens: tuple[int, ...]
    length: int

    @property
    def read(self) -> tuple[int, ...]:
        """The tokens that the model reads; the last one is only predicted."""
        return self.tokens[:-1]

    @property
    def start(self) -> int:
        """Position of the token that predicts the first token of the end."""
        return len(self.read) - self.length


@dataclass(frozen=True, slots=True)
class Group:
    """Answers that begin with the same tokens.

    Attributes:
        members: Their indices.
        shared: Number of tokens that all of them begin with.
    """

    members: tuple[int, ...]
    shared: int


def can_share(model: PreTrainedModel) -> bool:
    """Return whether several texts can continue from one cache; recurrent states cannot."""
    return isinstance(model, GenerationMixin) and not model._is_stateful


def grouped(answers: Sequence[Answer], most: int) -> list[Group]:
    """Return groups of answers with the same beginning, in an order that starts with the longest.

    An answer joins a group if at least half of it is shared, if the group then reads fewer tokens
    than apart, and if the rest of the longest, times their number, is at most ``most`` tokens.
    """
    order = sorted(range(len(answers)), key=lambda index: answers[index].read)
    groups: list[Group] = []
    for index in order:
        joined = _joined(groups[-1], index, answers, most) if groups else None
        if joined is None:
            groups.append(Group((index,), len(answers[index].read)))
        else:
            groups[-1] = joined
    return sorted(groups, key=lambda group: -group.shared)


def batched(groups: Sequence[Group], most: int) -> Iterator[list[Group]]:
    """Yield groups together, at most ``most`` answers in all; a group of more is alone.

    In a batch, all beginnings are cut to the length of the shortest, which is at least seven
    eighths of the longest: none needs padding.

    Args:
        groups: Groups in an order that starts with the longest beginning.
        most: Number of answers.
    """
    batch: list[Group] = []
    for group in groups:
        number = sum(len(own.members) for own in (*batch, group))
        if batch and (number > most or 8 * group.shared < 7 * batch[0].shared):
            yield _cut(batch)
            batch = []
        batch.append(group)
    if batch:
        yield _cut(batch)


@torch.no_grad()
def log_likelihoods(
    model: PreTrainedModel, answers: Sequence[Answer], batch: Sequence[Group]
) -> Iterator[tuple[int, float, bool]]:
    """Yield the index, the log-likelihood and whether each token is the likeliest, per answer.

    The beginnings are read once, without padding. Their cache is repeated for the answers, whose
    rests are padded on the right: no token sees the padding.

    Args:
        model: A model for which ``can_share`` holds.
        answers: All answers.
        batch: Groups with equally long beginnings.
    """
    shared = batch[0].shared
    members = [(row, index) for row, group in enumerate(batch) for index in group.members]
    kept = max(1, shared - min(answers[index].start for _, index in members))
    beginnings = [answers[group.members[0]].read[:shared] for group in batch]
    output = model(input_ids=_padded(beginnings, model), **cache_options(model, kept))
    first = output.logits[:, -kept:]
    rests = [answers[index].read[shared:] for _, index in members]
    last = first
    if any(rests):
        cache = output.past_key_values
        cache.reorder_cache(torch.tensor([row for row, _ in members], device=model.device))
        last = model(input_ids=_padded(rests, model), past_key_values=cache, use_cache=True).logits
    for place, (row, index) in enumerate(members):
        answer, rest = answers[index], len(rests[place])
        before = max(shared - answer.start, 0)  # positions of the beginning
        after = max(answer.start - shared, 0)
        logits = first[row, kept - before :]
        if rest:
            logits = torch.cat([logits, last[place, after:rest]])
        expected = torch.tensor(answer.tokens[-answer.length :], device=logits.device)
        scores = logits.log_softmax(dim=-1).gather(-1, expected[:, None])
        yield index, float(scores.sum()), bool((logits.argmax(dim=-1) == expected).all())


def _cut(batch: Sequence[Group]) -> list[Group]:
    return [replace(group, shared=batch[-1].shared) for group in batch]


def _joined(group: Group, index: int, answers: Sequence[Answer], most: int) -> Group | None:
    read = answers[index].read
    members = (*group.members, index)
    first = answers[group.members[0]].read[: group.shared]
    shared = sum(1 for _ in takewhile(lambda same: same, map(eq, first, read)))
    rest = max(len(answers[member].read) for member in members) - shared
    is_shorter = len(group.members) * shared > (len(group.members) - 1) * group.shared
    fits = 2 * shared >= len(read) and rest * len(members) <= most
    return Group(members, shared) if is_shorter and fits else None


def _padded(texts: Sequence[Sequence[int]], model: PreTrainedModel) -> Tensor:
    """Return token ids ``(B, T)``, padded on the right with 0."""
    rows = [torch.tensor(text, dtype=torch.long) for text in texts]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
