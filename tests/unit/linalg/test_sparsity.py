import pytest
import torch
from torch import Tensor

from grasp_lightning.linalg.sparsity import (
    BLOCK,
    Groups,
    smallest_sparsity,
    sparse_gpt,
    wanda,
    zeros_per_block,
    zeros_per_row,
)

ROWS, COLUMNS = 6, 168  # one whole block of columns, and a part of one


def example(seed: int = 0, columns: int = COLUMNS) -> tuple[Tensor, Tensor]:
    """A weight ``(N, M)``, and the Gram matrix of correlated inputs, which has full rank."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(ROWS, columns, generator=generator, dtype=torch.float64)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    x = torch.randn(3 * columns, columns, generator=generator, dtype=torch.float64) @ mixing
    return weight, x.mT @ x / len(x)


def error(weight: Tensor, pruned: Tensor, gram: Tensor) -> float:
    change = weight - pruned
    return float((change @ gram * change).sum())


def naive_wanda(weight: Tensor, gram: Tensor, sparsity: float) -> Tensor:
    pruned = weight.clone()
    for row in range(ROWS):
        scores = [
            (abs(float(weight[row, j])) * float(gram[j, j]) ** 0.5, j) for j in range(COLUMNS)
        ]
        for _, column in sorted(scores)[: int(COLUMNS * sparsity)]:
            pruned[row, column] = 0
    return pruned


def naive_sparse_gpt(
    weight: Tensor, gram: Tensor, sparsity: float, groups: Groups | None
) -> Tensor:
    """Optimal brain surgeon, column by column, with the inverse of what remains of H each time."""
    pruned, columns = weight.clone(), weight.shape[1]
    hessian = gram + 0.01 * gram.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(columns)]
    chosen: set[tuple[int, int]] = set()
    for column in range(columns):
        if groups is None and column % BLOCK == 0:
            block = range(column, min(column + BLOCK, columns))
            costs = [
                (float(pruned[i, j] ** 2 / inverses[j][0, 0]), i, j)
                for i in range(ROWS)
                for j in block
            ]
            count = int(ROWS * len(block) * sparsity)
            chosen |= {(i, j) for _, i, j in sorted(costs)[:count]}
        if groups is not None and column % groups[1] == 0:
            for i in range(ROWS):
                group = range(column, column + groups[1])
                costs = [(float(pruned[i, j] ** 2 / inverses[j][0, 0]), i, j) for j in group]
                chosen |= {(i, j) for _, i, j in sorted(costs)[: groups[0]]}
        inverse = inverses[column]
        for row in range(ROWS):
            if (row, column) in chosen:
                pruned[row, column:] -= pruned[row, column] / inverse[0, 0] * inverse[0]
                pruned[row, column] = 0
    return pruned


def test_wanda_is_the_sorted_product_of_magnitude_and_norm() -> None:
    weight, gram = example()
    found = wanda(weight, gram.diagonal(), sparsity=0.37)
    assert torch.equal(found, naive_wanda(weight, gram, 0.37))
    assert (found == 0).sum(dim=1).tolist() == [int(COLUMNS * 0.37)] * ROWS
    assert int((found == 0).sum()) == zeros_per_row(ROWS, COLUMNS, 0.37)


@pytest.mark.parametrize(("sparsity", "groups"), [(0.37, None), (0.0, (2, 4)), (0.0, (4, 8))])
def test_sparse_gpt_is_the_optimal_brain_surgeon(sparsity: float, groups: Groups | None) -> None:
    weight, gram = example()
    found = sparse_gpt(weight, gram, sparsity=sparsity, groups=groups)
    expected = naive_sparse_gpt(weight, gram, sparsity, groups)
    assert torch.equal(found == 0, expected == 0)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    if groups is None:
        assert int((found == 0).sum()) == zeros_per_block(ROWS, COLUMNS, sparsity)
        assert int((found[:, :BLOCK] == 0).sum()) == int(ROWS * BLOCK * sparsity)


@pytest.mark.parametrize("groups", [(2, 4), (4, 8)])
def test_each_group_has_its_zeros(groups: Groups) -> None:
    weight, gram = example()
    for pruned in (
        wanda(weight, gram.diagonal(), groups=groups),
        sparse_gpt(weight, gram, groups=groups),
    ):
        zeros = (pruned == 0).unflatten(1, (-1, groups[1])).sum(dim=-1)
        assert (zeros == groups[0]).all()


@pytest.mark.parametrize("groups", [None, (2, 4), (4, 8)])
def test_sparse_gpt_changes_the_output_less_than_wanda(groups: Groups | None) -> None:
    for seed in range(5):
        weight, gram = example(seed)
        first = wanda(weight, gram.diagonal(), sparsity=0.5, groups=groups)
        second = sparse_gpt(weight, gram, sparsity=0.5, groups=groups)
        assert error(weight, second, gram) < error(weight, first, gram)


def test_inputs_that_are_always_zero_lose_their_weights_first() -> None:
    weight = example(columns=64)[0].clamp(-2, 2)
    weight += weight.sign()
    gram = torch.diag((torch.arange(64) >= 8).double())
    for pruned in (
        wanda(weight, gram.diagonal(), sparsity=1 / 8),
        sparse_gpt(weight, gram, sparsity=1 / 8),
    ):
        assert (pruned[:, :8] == 0).all()
        torch.testing.assert_close(pruned[:, 8:], weight[:, 8:])
    nothing = sparse_gpt(weight, torch.zeros_like(gram), sparsity=0.5)
    assert nothing.isfinite().all()


def test_the_sparsity_is_the_smallest_that_gives_enough_zeros() -> None:
    def zeros(sparsity: float) -> int:
        return zeros_per_row(4, 48, sparsity) + zeros_per_row(4, 32, sparsity)

    for target in (1, 4, 5, 100, 312):
        found = smallest_sparsity(zeros, target)
        assert zeros(found) >= target > zeros(found - 1e-12)
