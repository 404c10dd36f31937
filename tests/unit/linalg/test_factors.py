import re

import pytest
import torch

from grasp_lightning.linalg.factors import SVD, balanced_factors, factorize


@pytest.fixture
def svd() -> SVD:
    return factorize(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), (0, 3), (3, 0), ()])
def test_weight_that_is_not_a_matrix_is_refused_with_its_shape(shape: tuple[int, ...]) -> None:
    message = (
        f"weight must be a matrix with at least one row and one column, got shape {tuple(shape)}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        factorize(torch.zeros(shape))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_entries_are_counted_and_located(value: float) -> None:
    weight = torch.ones(3, 4)
    weight[1, 2] = weight[2, 0] = value
    message = f"weight has 2 non-finite entries of 12, the first is {value} at row 1, column 2"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        factorize(weight)


def test_integer_weight_is_refused() -> None:
    with pytest.raises(ValueError, match=r"float dtype, got torch\.int8; dequantise it first"):
        factorize(torch.ones(3, 3, dtype=torch.int8))


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_decomposition_is_float32_or_better(dtype: torch.dtype, expected: torch.dtype) -> None:
    svd = factorize(torch.eye(4, 3).to(dtype))
    assert {tensor.dtype for tensor in svd} == {expected}


def test_everything_returned_is_contiguous_and_detached() -> None:
    svd = factorize(torch.nn.Linear(6, 9).weight)
    for tensor in (*svd, *balanced_factors(svd, [0, 2, 5])):
        assert tensor.is_contiguous()
        assert not tensor.requires_grad


def test_factors_share_no_memory_with_the_decomposition(svd: SVD) -> None:
    factors = balanced_factors(svd, [0, 1, 2])
    owners = {tensor.untyped_storage().data_ptr() for tensor in svd}
    assert owners.isdisjoint(tensor.untyped_storage().data_ptr() for tensor in factors)


def test_factors_of_a_known_matrix() -> None:
    svd = factorize(torch.tensor([[0.0, 9.0], [4.0, 0.0], [0.0, 0.0]]))
    left, right = balanced_factors(svd, [1])
    torch.testing.assert_close(left.abs(), torch.tensor([[0.0], [2.0], [0.0]]))
    torch.testing.assert_close(left @ right, torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 0.0]]))


def test_weight_of_zeros_has_finite_factors() -> None:
    left, right = balanced_factors(factorize(torch.zeros(3, 2)), [0])
    assert torch.equal(left @ right, torch.zeros(3, 2))


@pytest.mark.parametrize(
    ("components", "message"),
    [
        ([], "components must name at least one singular component, got none"),
        ([0, 3], "components must lie in [0, 3), as the weight has 3 singular components, got 3"),
        ([-1], "components must lie in [0, 3), as the weight has 3 singular components, got -1"),
        ([2, 0], "components must be strictly ascending, got 2 before 0; "),
        ([1, 1], "components must be strictly ascending, got 1 before 1; "),
    ],
)
def test_wrong_components_are_refused(svd: SVD, components: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        balanced_factors(svd, components)
