"""The loss with a single linear truncated, against a model whose weight is a truncated matrix."""

import itertools
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from grasp_lightning.config import MetricOptions
from grasp_lightning.errors import Interrupted
from grasp_lightning.linalg.factors import SVD, factorize
from grasp_lightning.methods.base import untracked
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.next_token import forward_inputs, next_token_losses
from grasp_lightning.stats.base import Sensitivity
from grasp_lightning.training.truncation_losses import truncation_losses
from tests.conftest import tiny_model
from tests.unit.training.test_refit import windows


def basis(name: str, weight: Tensor) -> SVD:
    del name
    return factorize(weight)


def search_of(view: DecoderView) -> Sensitivity:
    names = [name for index in (0, 2) for name in view.linears(index)]
    return Sensitivity(ranks=dict.fromkeys(names, (9, 3, 1)), metric=MetricOptions())


@torch.no_grad()
def naive(family: str, name: str, rank: int, batches: list[dict[str, Tensor]]) -> float:
    model = tiny_model(family)
    linear = DecoderView(model).all_linears()[name]
    u, s, vh = torch.linalg.svd(linear.weight.double(), full_matrices=False)
    linear.weight.copy_((u[:, :rank] * s[:rank]) @ vh[:rank])
    found = [
        next_token_losses(model(**forward_inputs(b)).logits, b["input_ids"], b["targets"])
        for b in batches
    ]
    return float(torch.cat(found).double().mean())


class Store:
    """Keeps the losses, and ends the search at one of its calls."""

    def __init__(self, end: int | None = None) -> None:
        self.tensors: dict[str, Tensor] | None = None
        self._left = end

    def load(self, number: int) -> Mapping[str, Tensor] | None:
        assert number == 0
        return self.tensors

    def save(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        assert number == 0
        self.tensors = dict(tensors)
        self._left = None if self._left is None else self._left - 1
        if self._left == 0:
            raise Interrupted(15)

    @property
    def count(self) -> int:
        assert self.tensors is not None
        return sum(len(value) for name, value in self.tensors.items() if name != "seconds")


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_losses_are_those_of_truncated_matrices_and_leave_no_trace(family: str) -> None:
    batches = [windows().batch([row]) for row in range(2)]
    batches[1]["targets"][:, 20:] = False  # padding
    view = DecoderView(tiny_model(family))
    before = {name: value.clone() for name, value in view.model.state_dict().items()}
    search, store = search_of(view), Store()
    found = truncation_losses(view, search, basis, batches, untracked, store=store)
    assert list(found) == list(search.ranks)
    for name, rank in itertools.product([*search.ranks][::3], (9, 1)):
        assert found[name][rank] == pytest.approx(naive(family, name, rank, batches), abs=2e-6)
    assert all(torch.equal(before[name], v) for name, v in view.model.state_dict().items())
    assert store.count == 3 * len(found)
    assert truncation_losses(view, search, basis, batches, untracked, caches=False) == found


def test_an_interrupted_search_measures_only_what_is_missing() -> None:
    batches, view = [windows().batch([0])], DecoderView(tiny_model())
    search, measured = search_of(view), Store()
    whole = truncation_losses(view, search, basis, batches, untracked)
    store = Store(end=8)
    with pytest.raises(Interrupted):
        truncation_losses(view, search, basis, batches, untracked, store=store)
    measured.tensors = store.tensors
    decomposed: list[str] = []

    def counting(name: str, weight: Tensor) -> SVD:
        decomposed.append(name)
        return factorize(weight)

    assert measured.count == 8
    found = truncation_losses(view, search, counting, batches, untracked, store=measured)
    assert found == whole
    assert decomposed == list(search.ranks)[2:]  # three ranks each: the third had one left


def test_a_time_limit_leaves_one_loss_of_each_linear_and_counts_earlier_starts() -> None:
    batches, view = [windows().batch([0])], DecoderView(tiny_model())
    search = replace(search_of(view), seconds=3600.0)
    whole = truncation_losses(view, search, basis, batches, untracked)
    assert all(len(losses) == 3 for losses in whole.values())
    store = Store()
    store.tensors = {"seconds": torch.tensor([3600.0], dtype=torch.float64)}
    found = truncation_losses(view, search, basis, batches, untracked, store=store)
    assert found == {name: {9: losses[9]} for name, losses in whole.items()}
