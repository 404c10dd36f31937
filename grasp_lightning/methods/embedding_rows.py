"""Rows of embedding and head under the budget of all linears: groups of tokens become factors.

Tokens are grouped by how often they occur. A change ``D`` of the rows of one group costs
``sum_v q_v D_v (A + H) D_v^T / 2`` nats per token, where ``D_v`` is the row of token v and ``q_v``
the variance of its prediction, the diagonal of the Fisher information of the logits. It stands for
the frequency of v, too. ``A`` belongs to the embedding: the mean of ``g g^T`` over gradients by
embedded tokens of the group. ``H`` belongs to the head: the mean of ``x x^T`` over hidden states,
each weighted by the squared gradients of the group's logits. A matrix that is embedding and head
has both. The weighted rows then have one singular value decomposition.

These losses order the components of a group well, but are several times too low in trained models:
the hidden states before a token point towards its own row, and no metric common to all rows has
that. So each group is tried: factors of half the rank are measured on windows whose tokens were not
counted, and all losses of the group are scaled to the measured one.

Sources: groups of tokens by frequency, of decreasing size of representation, as embedding and as
head, arXiv:1809.10853 and arXiv:1609.04309, where they are trained from scratch; curvature as a
product of two metrics, K-FAC (arXiv:1503.05671).
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import NamedTuple

import torch
from torch import Tensor

from grasp_lightning.config import MetricOptions
from grasp_lightning.linalg.row_groups import group_sizes, row_factors, row_losses
from grasp_lightning.linalg.weightings import damped_root
from grasp_lightning.methods.base import Decision
from grasp_lightning.methods.metric import Metric
from grasp_lightning.methods.rank_rules import Shapes
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.operations.factorize_rows import left_key, right_key
from grasp_lightning.models.vocabulary.ends import Ends, vocabulary_ends
from grasp_lightning.plan import FactorizeRows, row_group
from grasp_lightning.stats.base import Moments, Vocabulary
from grasp_lightning.stats.vocabulary import groups_of


def measured_vocabulary(view: DecoderView, metric: Metric) -> Vocabulary:
    """Return what to measure at both ends of a model.

    A model whose rows cannot be factorized is a ``ModelError``.
    """
    ends = vocabulary_ends(view.model)
    return Vocabulary(
        embedding=ends.embedding,
        head=ends.head,
        scale=ends.scale,
        special=_special(view, ends),
        metric=MetricOptions(**asdict(metric)),
    )


def row_shapes(view: DecoderView) -> Shapes:
    """Return ``(V_g, d)`` of each group of rows that may be factorized, by name.

    The group that always stays dense is not among them. A model whose rows cannot be factorized
    is a ``ModelError``; its weights may be on the meta device.
    """
    ends = vocabulary_ends(view.model)
    num_tokens, features = ends.shape
    sizes = group_sizes(num_tokens, len(_special(view, ends)))
    return {
        row_group(names[0], group): (size, features)
        for names in ends.matrices
        for group, size in enumerate(sizes[1:], start=1)
        if size
    }


def _special(view: DecoderView, ends: Ends) -> tuple[int, ...]:
    """Return the ids of tokens whose rows stay dense, ascending."""
    known = (token for token in view.special_tokens if 0 <= token < ends.shape[0])
    return tuple(sorted({*ends.special, *known}))


class _Group(NamedTuple):
    """Rows of a group, with their weights ``(n,)`` and the root of the metric of columns."""

    rows: Tensor
    weights: Tensor
    root: Tensor


class MeasuredRows:
    """Embedding and head with their moments, and the metric for changes of them.

    Args:
        view: The dense model.
        vocabulary: What was measured.
        moments: See ``VocabularySums.mean``.
    """

    def __init__(
        self,
        view: DecoderView,
        vocabulary: Vocabulary,
        moments: Mapping[str, Moments],
    ) -> None:
        self._view = view
        self._names = vocabulary
        self._metric = Metric(**asdict(vocabulary.metric))
        self._moments = moments
        self._matrices = vocabulary_ends(view.model).matrices
        frequencies = moments[vocabulary.embedding].input_square
        assert frequencies is not None  # the step requested it
        self._groups = groups_of(vocabulary, frequencies)

    def losses(self, tried: Mapping[str, float]) -> dict[str, Tensor]:
        """Return the loss of each component of each group, ``(K,)``, descending, float64.

        Args:
            tried: The measured loss of each cut of ``trial``, by name of its group.
        """
        found: dict[str, Tensor] = {}
        for name, (names, group) in self._present.items():
            # The loss is quadratic around the dense rows: half its second derivative.
            losses = row_losses(*self._group(names, group)).cpu() / 2
            predicted = float(losses[_tried_rank(len(losses)) :].sum())
            scale = tried[name] / predicted if name in tried and predicted > 0 else 1.0
            found[name] = losses * scale
        return found

    def trial(self) -> Decision:
        """Return factors of half the rank for all groups, to be measured one by one."""
        features = self._view.module(self._names.embedding).get_parameter("weight").shape[1]
        sizes = torch.bincount(self._groups).tolist()
        return self.decision(
            {
                name: _tried_rank(min(sizes[group], features))
                for name, (_, group) in self._present.items()
            }
        )

    def decision(self, ranks: Mapping[str, int]) -> Decision:
        """Return the factors of ranks by name of a group; other groups stay dense."""
        decision = Decision(operations=())
        for names in self._matrices:
            chosen = tuple(ranks.get(row_group(names[0], g), 0) for g in self._numbers)
            if not any(chosen):
                continue
            operation = FactorizeRows(
                modules=names, groups="".join(map(str, self._groups.tolist())), group_ranks=chosen
            )
            tensors = dict(decision.tensors)
            for group, rank in zip(self._numbers, chosen, strict=True):
                if rank:
                    left, right = row_factors(*self._group(names, group), rank)
                    tensors[left_key(operation, group)] = left.float().cpu()
                    tensors[right_key(operation, group)] = right.float().cpu()
            operations = (*decision.operations, operation)
            decision = replace(decision, operations=operations, tensors=tensors)
        return decision

    @property
    def _numbers(self) -> range:
        return range(1, int(self._groups.max()) + 1)

    @property
    def _present(self) -> dict[str, tuple[tuple[str, ...], int]]:
        """Names of the matrix, and number, of each group that has tokens, by its name."""
        numbers = [group for group in self._numbers if bool((self._groups == group).any())]
        places = ((names, group) for names in self._matrices for group in numbers)
        return {row_group(names[0], group): (names, group) for names, group in places}

    def _group(self, names: tuple[str, ...], group: int) -> _Group:
        ids = torch.nonzero(self._groups == group)[:, 0]
        weight = self._view.module(names[0]).get_parameter("weight").detach()
        own = self._moments[row_group(self._names.embedding, group)]
        ends = {self._names.embedding: own.gradient_gram, self._names.head: own.input_gram}
        gram = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64)
        for name in names:
            of_columns = ends[name]
            assert of_columns is not None  # the step requested it
            gram += of_columns.double().cpu()
        of_rows = self._moments[self._names.embedding].gradient_square
        assert of_rows is not None  # the step requested it
        # Shares: the whole unit of the losses is in the metric of columns.
        weights = of_rows.double().cpu()[ids]
        weights = damped_root(weights, self._metric.gradient_damping).square()
        root = damped_root(gram, self._metric.input_damping)
        device = weight.device
        return _Group(weight[ids.to(device)], (weights / weights.sum()).to(device), root.to(device))


def _tried_rank(num_components: int) -> int:
    return max(num_components // 2, 1)
