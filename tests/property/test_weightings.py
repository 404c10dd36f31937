import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from grasp_lightning.linalg.factors import balanced_factors, factorize
from grasp_lightning.linalg.weightings import (
    damped_cholesky,
    damped_root,
    even_norms,
    weighted_svd,
)
from tests.reference.definitions import curvature_error

quick = settings(max_examples=40, deadline=None)
sizes = st.integers(1, 9)
seeds = st.integers(0, 2**31)
dampings = st.sampled_from([1e-6, 1e-3, 0.1, 2.0])
LEFT, RIGHT = {"left": True, "right": False}, {"left": False, "right": True}
sides = st.sampled_from([LEFT, RIGHT, {"left": True, "right": True}])


def random(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def random_root(size: int, seed: int, damping: float = 0.01) -> Tensor:
    tokens = random(size, max(1, size - 1), seed=seed)  # a gram that lacks full rank
    return damped_root(tokens @ tokens.mT, damping)


def roots(rows: int, columns: int, seed: int, side: dict[str, bool]) -> list[Tensor | None]:
    left = random_root(rows, seed + 1) if side["left"] else None
    right = random_root(columns, seed + 2) if side["right"] else None
    return [left, right]


def grams(pair: list[Tensor | None]) -> list[Tensor | None]:
    return [None if root is None else root @ root.mT for root in pair]


def product(svd: tuple[Tensor, Tensor, Tensor], kept: list[int] | slice = slice(None)) -> Tensor:
    u, s, vh = svd
    return (u[:, kept] * s[kept]) @ vh[kept]


@quick
@given(sizes, st.integers(0, 12), seeds, dampings)
def test_root_reproduces_the_damped_gram(
    size: int, num_tokens: int, seed: int, damping: float
) -> None:
    tokens = random(size, num_tokens, seed=seed)
    gram = tokens @ tokens.mT
    root, jitter = damped_cholesky(gram, damping)
    mean = float(gram.diagonal().mean()) or 1.0
    assert jitter == damping * mean
    assert torch.equal(root, root.tril())
    expected = gram + damping * mean * torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(root @ root.mT, expected, rtol=1e-10, atol=1e-12 * mean)


@quick
@given(sizes, sizes, seeds, sides)
def test_all_components_reproduce_the_weight(
    rows: int, columns: int, seed: int, side: dict[str, bool]
) -> None:
    weight = random(rows, columns, seed=seed)
    svd = weighted_svd(weight, *roots(rows, columns, seed, side))
    assert (svd.s >= 0).all()
    assert (svd.s[:-1] >= svd.s[1:]).all()
    torch.testing.assert_close(product(svd), weight, rtol=1e-8, atol=1e-9)


@quick
@given(sizes, sizes, seeds, sides, st.data())
def test_weighted_error_equals_the_dropped_squared_singular_values(
    rows: int, columns: int, seed: int, side: dict[str, bool], data: st.DataObject
) -> None:
    weight = random(rows, columns, seed=seed)
    pair = roots(rows, columns, seed, side)
    svd = weighted_svd(weight, *pair)
    num_components = min(rows, columns)
    kept = sorted(data.draw(st.sets(st.integers(0, num_components - 1))))
    dropped = [k for k in range(num_components) if k not in kept]
    error = curvature_error(weight - product(svd, kept), *grams(pair))
    expected = svd.s[dropped].square().sum()
    torch.testing.assert_close(error, expected, rtol=1e-7, atol=1e-9 * float(svd.s[0]) ** 2)


@quick
@given(st.integers(2, 9), st.integers(2, 9), seeds, sides, st.data())
def test_no_weight_of_the_same_rank_has_a_smaller_weighted_error(
    rows: int, columns: int, seed: int, side: dict[str, bool], data: st.DataObject
) -> None:
    weight = random(rows, columns, seed=seed)
    pair = roots(rows, columns, seed, side)
    rank = data.draw(st.integers(1, min(rows, columns) - 1))
    scale = data.draw(st.sampled_from([1e-4, 1e-2, 1.0]))
    left, right = balanced_factors(weighted_svd(weight, *pair), range(rank))
    best = float(curvature_error(weight - left @ right, *grams(pair)))
    plain = product(factorize(weight), list(range(rank)))
    moved = (left + scale * random(rows, rank, seed=seed + 3)) @ (
        right + scale * random(rank, columns, seed=seed + 4)
    )
    for other in (plain, moved):
        assert best <= float(curvature_error(weight - other, *grams(pair))) * (1 + 1e-9) + 1e-12


@quick
@given(sizes, sizes, seeds)
def test_vectors_are_orthonormal_in_the_metrics(rows: int, columns: int, seed: int) -> None:
    left, right = random_root(rows, seed + 1, 0.1), random_root(columns, seed + 2, 0.1)
    u, _, vh = weighted_svd(random(rows, columns, seed=seed), left, right)
    eye = torch.eye(min(rows, columns), dtype=torch.float64)
    torch.testing.assert_close(u.mT @ (left @ left.mT) @ u, eye, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(vh @ (right @ right.mT) @ vh.mT, eye, rtol=1e-8, atol=1e-8)


@quick
@given(sizes, sizes, seeds, sides)
def test_vectors_stand_for_diagonal_matrices(
    rows: int, columns: int, seed: int, side: dict[str, bool]
) -> None:
    weight = random(rows, columns, seed=seed)
    left = random(rows, seed=seed + 1).abs() + 0.1 if side["left"] else None
    right = random(columns, seed=seed + 2).abs() + 0.1 if side["right"] else None
    full = [None if root is None else root.diag() for root in (left, right)]
    by_vector, by_matrix = weighted_svd(weight, left, right), weighted_svd(weight, *full)
    torch.testing.assert_close(by_vector.s, by_matrix.s)
    torch.testing.assert_close(product(by_vector, [0]), product(by_matrix, [0]))
    squares = [None if root is None else root.square() for root in (left, right)]
    error = curvature_error(weight, *squares)
    torch.testing.assert_close(error, curvature_error(weight, *grams(full)))
    torch.testing.assert_close(error, by_vector.s.square().sum())


@quick
@given(sizes, sizes, seeds)
def test_roots_of_the_identity_change_nothing(rows: int, columns: int, seed: int) -> None:
    weight = random(rows, columns, seed=seed)
    plain = factorize(weight)
    for ours, theirs in zip(weighted_svd(weight, None, None), plain, strict=True):
        assert torch.equal(ours, theirs)
    eyes = [torch.eye(size, dtype=torch.float64) for size in (rows, columns)]
    weighted = weighted_svd(weight, *eyes)
    torch.testing.assert_close(weighted.s, plain.s, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(product(weighted), weight, rtol=1e-10, atol=1e-12)


@quick
@given(sizes, sizes, seeds)
def test_curvature_error_equals_the_trace(rows: int, columns: int, seed: int) -> None:
    change = random(rows, columns, seed=seed)
    a, c = random(rows, 4, seed=seed + 1), random(columns, 4, seed=seed + 2)
    a, c = a @ a.mT, c @ c.mT
    expected = torch.trace(a @ change @ c @ change.mT)
    torch.testing.assert_close(curvature_error(change, a, c), expected, rtol=1e-9, atol=1e-9)
    expected = torch.trace(change @ c @ change.mT)
    torch.testing.assert_close(curvature_error(change, None, c), expected, rtol=1e-9, atol=1e-9)


@quick
@given(sizes, sizes, seeds, st.sampled_from([1e-8, 1e-3, 1e6]))
def test_even_norms_leave_every_component_unchanged(
    rows: int, columns: int, seed: int, unit: float
) -> None:
    weight = random(rows, columns, seed=seed)
    svd = weighted_svd(weight, unit * random_root(rows, seed + 1), None)
    even = even_norms(svd)
    assert torch.equal(even.s, svd.s)
    for k in range(min(rows, columns)):
        torch.testing.assert_close(product(even, [k]), product(svd, [k]))
    left, right = balanced_factors(even, range(min(rows, columns)))
    torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1))
