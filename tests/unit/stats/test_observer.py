"""Hooks against autograd on every family, and what must not change their result."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from grasp_lightning.config import Reduction
from grasp_lightning.errors import ModelError, NumericsError
from grasp_lightning.linalg.factors import SVD, factorize
from grasp_lightning.models.decoder import DecoderView, frozen
from grasp_lightning.models.next_token import forward_inputs, next_token_losses
from grasp_lightning.stats.base import Scoring
from grasp_lightning.stats.components import ComponentScores
from grasp_lightning.stats.observer import LinearObserver
from tests.conftest import ALL_FAMILIES, tiny_model
from tests.unit.evaluation.test_perplexity import random_batch

Batch = dict[str, Tensor]


def run(view: DecoderView, batch: Batch) -> None:
    logits = view.model(**forward_inputs(batch)).logits
    next_token_losses(logits, batch["input_ids"], batch["targets"]).sum().backward()


def observed_gradients(
    view: DecoderView, modules: tuple[str, ...], batch: Batch
) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}

    def sink(name: str, x: Tensor, grad: Tensor) -> None:
        sums[name] = sums.get(name, torch.zeros(())) + grad.mT @ x

    with frozen(view.model), LinearObserver(view, modules, sink).attached():
        run(view, batch)
    return sums


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_observed_gradients_equal_those_of_autograd(family: str) -> None:
    view, batch = DecoderView(tiny_model(family)), random_batch()
    modules = tuple(name for index in (1, 2) for name in view.linears(index))
    observed = observed_gradients(view, modules, batch)
    run(view, batch)
    assert set(observed) == set(modules)
    for name in modules:
        expected = view.model.get_parameter(f"{name}.weight").grad
        assert expected is not None
        is_transposed = isinstance(view.module(name), Conv1D)
        expected = expected.mT if is_transposed else expected
        torch.testing.assert_close(observed[name], expected, rtol=1e-4, atol=1e-5)


def test_backward_ends_at_the_lowest_observed_layer() -> None:
    view, batch = DecoderView(tiny_model()), random_batch()
    reached = []
    for index in range(4):
        view.layer(index).register_full_backward_hook(lambda *_, index=index: reached.append(index))
    observed_gradients(view, tuple(view.linears(2)), batch)
    assert sorted(reached) == [2, 3]


def test_nothing_of_the_model_is_left_changed() -> None:
    model, batch = tiny_model(), random_batch()
    view = DecoderView(model)
    observed_gradients(view, tuple(view.linears(1)), batch)
    assert all(
        parameter.grad is None and parameter.requires_grad for parameter in model.parameters()
    )
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def accumulate(scoring: Scoring, batches: list[Batch]) -> dict[str, Tensor]:
    view = DecoderView(tiny_model())
    bases = {name: factorize(linear.weight) for name, linear in view.linears(1).items()}
    scores = ComponentScores(bases, scoring)
    with frozen(view.model), LinearObserver(view, tuple(bases), scores.add).attached():
        for batch in batches:
            run(view, batch)
    return scores.mean(sum(int(batch["targets"].sum()) for batch in batches))


def rows(batch: Batch) -> list[Batch]:
    return [
        {key: value[i : i + 1] for key, value in batch.items()}
        for i in range(len(batch["input_ids"]))
    ]


ALL_SCORINGS = [
    Scoring(terms=terms, reduction=reduction, score=score)
    for terms in ("full", "sigma")
    for reduction in ("signed", "absolute", "squared")
    for score in ("taylor", "gradient")
]


@pytest.mark.parametrize("scoring", ALL_SCORINGS, ids=str)
def test_scores_do_not_depend_on_the_batch_size(scoring: Scoring) -> None:
    batch = random_batch(4)
    whole, split = accumulate(scoring, [batch]), accumulate(scoring, rows(batch))
    for name in whole:
        torch.testing.assert_close(whole[name], split[name], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("scoring", ALL_SCORINGS, ids=str)
def test_padding_never_counts(scoring: Scoring) -> None:
    batch = random_batch(2)
    padded = {key: torch.nn.functional.pad(value, (0, 5)) for key, value in batch.items()}
    plain, with_padding = accumulate(scoring, [batch]), accumulate(scoring, [padded])
    for name in plain:
        torch.testing.assert_close(plain[name], with_padding[name], rtol=1e-3, atol=1e-7)


def per_window_terms(
    bases: dict[str, SVD], batch: Batch, view: DecoderView
) -> dict[str, list[Tensor]]:
    """Theta * dL/dtheta of (s, u, v) by the chain rule written out, one entry per window."""
    terms: dict[str, list[Tensor]] = {name: [] for name in bases}
    for row in rows(batch):
        view.model.zero_grad()
        run(view, row)
        for name, (u, s, vh) in bases.items():
            grad = view.model.get_parameter(f"{name}.weight").grad
            assert grad is not None
            by_s = s * torch.diag(u.T @ grad @ vh.T)
            by_u = u * (grad @ vh.T @ torch.diag(s))
            by_v = vh.T * (grad.T @ u @ torch.diag(s))
            terms[name].append(torch.cat([by_s[None], by_u, by_v]))  # (1 + N + M, K)
    return terms


@pytest.mark.parametrize(
    ("reduction", "combine"),
    [
        ("signed", lambda windows: torch.stack(windows).sum(0).abs().sum(0)),
        ("absolute", lambda windows: torch.stack(windows).abs().sum((0, 1))),
        ("squared", lambda windows: torch.stack(windows).square().sum((0, 1))),
    ],
)
def test_reductions_are_what_their_names_say(
    reduction: Reduction, combine: Callable[[list[Tensor]], Tensor]
) -> None:
    batch, view = random_batch(3), DecoderView(tiny_model())
    bases = {name: factorize(linear.weight) for name, linear in view.linears(1).items()}
    scores = accumulate(Scoring(reduction=reduction), [batch])
    for name, windows in per_window_terms(bases, batch, view).items():
        expected = combine(windows) / int(batch["targets"].sum())
        torch.testing.assert_close(scores[name], expected, rtol=1e-3, atol=1e-7)


def test_absolute_scores_do_not_cancel_as_signed_ones_do() -> None:
    batch = random_batch(4)
    absolute = accumulate(Scoring(reduction="absolute"), [batch])
    signed = accumulate(Scoring(reduction="signed"), [batch])
    for name in absolute:
        assert (absolute[name] >= signed[name] * (1 - 1e-4)).all()
        assert (absolute[name] > signed[name]).any()


def test_a_linear_that_the_model_does_not_call_is_named() -> None:
    view = DecoderView(tiny_model())
    bases = {name: factorize(linear.weight) for name, linear in view.linears(1).items()}
    scores = ComponentScores(bases, Scoring())
    missing, *called = bases
    for name in called:
        scores.add(
            name, torch.ones(2, bases[name].vh.shape[1]), torch.ones(2, bases[name].u.shape[0])
        )
    with pytest.raises(ModelError, match=f"{missing} was seen in 0 of 1 windows"):
        scores.mean(1)


def test_a_gradient_that_is_not_finite_is_named() -> None:
    view = DecoderView(tiny_model())
    name, linear = next(iter(view.linears(1).items()))
    scores = ComponentScores({name: factorize(linear.weight)}, Scoring())
    x, grad = torch.ones(2, linear.in_features), torch.full((2, linear.out_features), float("inf"))
    scores.add(name, x, grad)
    with pytest.raises(NumericsError, match=f"the gradient of {name} is NaN or infinite"):
        scores.mean(1)
