"""Principal directions and aligned bases, against what defines them."""

import torch

from grasp_lightning.linalg.directions import aligned, principal_directions


def rows(number: int, size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.linspace(0.1, 3.0, size, dtype=torch.float64)
    return torch.randn(number, size, generator=generator, dtype=torch.float64) * scales


def test_they_keep_what_the_largest_singular_values_hold() -> None:
    states = rows(50, 12)
    basis, variances = principal_directions(states.mT @ states, 5)
    values = torch.linalg.svdvals(states)
    torch.testing.assert_close(variances, values.square())
    torch.testing.assert_close(basis.mT @ basis, torch.eye(5, dtype=torch.float64))
    lost = (states - states @ basis @ basis.mT).square().sum()
    torch.testing.assert_close(lost, values[5:].square().sum())


def test_the_mean_comes_last_even_where_other_directions_are_empty() -> None:
    states = rows(4, 12)
    states = states - states.mean(dim=1, keepdim=True)
    basis, variances = principal_directions(states.mT @ states, 11, without_mean=True)
    assert float(basis.sum(dim=0).abs().max()) < 1e-9
    assert float(variances[4:].max()) < 1e-9
    torch.testing.assert_close(states @ basis @ basis.mT, states)


def test_an_aligned_basis_spans_the_same_and_differs_least() -> None:
    first, second = (torch.linalg.qr(rows(12, 5, seed))[0] for seed in (1, 2))
    turned = aligned(second, first)
    torch.testing.assert_close(turned @ turned.mT, second @ second.mT)
    change = first.mT @ turned
    torch.testing.assert_close(change, change.mT)
    assert float(torch.linalg.eigvalsh(change).min()) > -1e-12
    assert (turned - first).norm() < (second - first).norm()
    torch.testing.assert_close(aligned(first, first), first)
