import itertools
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from grasp_lightning.linalg.components import TokenGradient, sigma_gradients, window_scores
from grasp_lightning.linalg.factors import SVD, factorize
from tests.reference.definitions import component_gradients
from tests.reference.factorized_linear import FactorizedLinear

quick = settings(max_examples=30, deadline=None)
sizes = st.integers(1, 7)
seeds = st.integers(0, 2**31)
Options = dict[str, Any]  # Any: keyword arguments of several types
OPTIONS: list[Options] = [
    {"terms": terms, "score": score, "squared": squared}
    for terms, score, squared in itertools.product(
        ("full", "sigma"), ("taylor", "gradient"), (False, True)
    )
]
options = st.sampled_from(OPTIONS)


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def backpropagate(layer: nn.Module, x: Tensor, target: Tensor) -> None:
    (layer(x).tanh() - target).square().sum().backward()


def gradient_of(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def dense_and_factorized(
    rows: int, columns: int, seed: int, with_bias: bool
) -> tuple[SVD, Tensor, FactorizedLinear]:
    """Backpropagate one loss through a dense linear, and through its explicit factorisation."""
    generator = torch.Generator().manual_seed(seed)
    dense = nn.Linear(columns, rows, bias=with_bias, dtype=torch.float64)
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.copy_(normal(generator, *parameter.shape))
    svd = factorize(dense.weight)
    factorized = FactorizedLinear(svd.u, svd.s, svd.vh.T, dense.bias)
    x, target = normal(generator, 2, 5, columns), normal(generator, 2, 5, rows)
    backpropagate(dense, x, target)
    backpropagate(factorized, x, target)
    return svd, gradient_of(dense.weight), factorized


def assert_equal_to_1e9(actual: Tensor, expected: Tensor, scale: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11 * float(scale.abs().max()))


def naive_scores(layer: FactorizedLinear, terms: str, score: str, squared: bool) -> list[float]:
    """Loop over the parameters of every component with the gradients that autograd gave them."""
    s, u, v = layer.s.tolist(), layer.u.tolist(), layer.v.tolist()
    s_grad, u_grad, v_grad = (gradient_of(p).tolist() for p in (layer.s, layer.u, layer.v))
    scores = []
    for k in range(len(s)):
        pairs = [(s[k], s_grad[k])]
        if terms == "full":
            pairs += [(u[i][k], u_grad[i][k]) for i in range(len(u))]
            pairs += [(v[j][k], v_grad[j][k]) for j in range(len(v))]
        total = 0.0
        for theta, gradient in pairs:
            value = gradient if score == "gradient" else theta * gradient
            total += value**2 if squared else abs(value)
        scores.append(total)
    return scores


@quick
@given(sizes, sizes, seeds, st.booleans())
def test_gradients_equal_autograd_through_the_factorised_layer(
    rows: int, columns: int, seed: int, with_bias: bool
) -> None:
    svd, weight_grad, layer = dense_and_factorized(rows, columns, seed, with_bias)
    gradients = component_gradients(svd, weight_grad)
    assert gradients.u.shape == layer.u.shape
    assert gradients.v.shape == layer.v.shape
    assert_equal_to_1e9(gradients.s, gradient_of(layer.s), weight_grad)
    assert_equal_to_1e9(gradients.u, gradient_of(layer.u), gradient_of(layer.u))
    assert_equal_to_1e9(gradients.v, gradient_of(layer.v), gradient_of(layer.v))


@quick
@given(sizes, sizes, seeds, st.booleans(), options)
def test_scores_equal_a_loop_over_autograd_gradients(
    rows: int, columns: int, seed: int, with_bias: bool, option: Options
) -> None:
    svd, weight_grad, layer = dense_and_factorized(rows, columns, seed, with_bias)
    expected = torch.tensor(naive_scores(layer, **option), dtype=torch.float64)
    assert_equal_to_1e9(window_scores(svd, weight_grad, **option), expected, expected)


@quick
@given(sizes, sizes, seeds, st.data(), options)
def test_scores_ignore_the_sign_of_singular_pairs(
    rows: int, columns: int, seed: int, data: st.DataObject, option: Options
) -> None:
    generator = torch.Generator().manual_seed(seed)
    u, s, vh = factorize(normal(generator, rows, columns))
    weight_grad = normal(generator, rows, columns)
    signs = data.draw(st.lists(st.sampled_from([-1.0, 1.0]), min_size=len(s), max_size=len(s)))
    sign = torch.tensor(signs, dtype=torch.float64)
    flipped = SVD(u * sign, s, sign[:, None] * vh)
    expected = window_scores(SVD(u, s, vh), weight_grad, **option)
    assert_equal_to_1e9(window_scores(flipped, weight_grad, **option), expected, expected)


@quick
@given(sizes, sizes, seeds)
def test_signed_sigma_terms_sum_to_the_inner_product_of_weight_and_gradient(
    rows: int, columns: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, weight_grad = normal(generator, rows, columns), normal(generator, rows, columns)
    svd = factorize(weight)
    signed = (svd.s * component_gradients(svd, weight_grad).s).sum()
    scale = weight.norm() * weight_grad.norm()
    assert_equal_to_1e9(signed, (weight * weight_grad).sum(), scale)


@quick
@given(sizes, sizes, seeds, st.floats(0.01, 100.0), options)
def test_scores_scale_with_the_gradient(
    rows: int, columns: int, seed: int, factor: float, option: Options
) -> None:
    generator = torch.Generator().manual_seed(seed)
    svd = factorize(normal(generator, rows, columns))
    weight_grad = normal(generator, rows, columns)
    power = 2 if option["squared"] else 1
    expected = window_scores(svd, weight_grad, **option) * factor**power
    assert_equal_to_1e9(window_scores(svd, weight_grad * factor, **option), expected, expected)


@quick
@given(sizes, sizes, st.integers(1, 12), seeds, options)
def test_tokens_score_like_the_gradient_they_sum_to(
    rows: int, columns: int, num_tokens: int, seed: int, option: Options
) -> None:
    generator = torch.Generator().manual_seed(seed)
    svd = factorize(normal(generator, rows, columns))
    tokens = TokenGradient(
        x=normal(generator, num_tokens, columns), grad_output=normal(generator, num_tokens, rows)
    )
    weight_grad = tokens.dense(torch.float64)
    expected = window_scores(svd, weight_grad, **option)
    assert_equal_to_1e9(window_scores(svd, tokens, **option), expected, expected)
    s_grad = sigma_gradients(svd, weight_grad)
    assert_equal_to_1e9(sigma_gradients(svd, tokens), s_grad, s_grad)
