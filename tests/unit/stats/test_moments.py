"""Moments of linears against sums written out naively, and what must not change them."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from grasp_lightning.errors import ModelError, NumericsError
from grasp_lightning.linalg.triangles import pack_triangle, unpack_triangle
from grasp_lightning.models.decoder import DecoderView, frozen
from grasp_lightning.stats.base import MomentKind, Moments, Needs
from grasp_lightning.stats.moments import MomentSums, layer_groups, moment_bytes
from grasp_lightning.stats.observer import InputObserver, LinearObserver, shared_inputs
from tests.conftest import ALL_FAMILIES, tiny_model
from tests.unit.evaluation.test_perplexity import random_batch
from tests.unit.stats.test_observer import Batch, run

KINDS: frozenset[MomentKind] = frozenset(
    {"input_gram", "gradient_gram", "input_scale", "input_square", "fisher_columns"}
)
CPU = torch.device("cpu")


def shapes_of(view: DecoderView, layers: tuple[int, ...]) -> dict[str, tuple[int, int]]:
    linears = {n: m for index in layers for n, m in view.linears(index).items()}
    return {name: (m.out_features, m.in_features) for name, m in linears.items()}


def measure(
    view: DecoderView, batches: list[Batch], kinds: frozenset[MomentKind] = KINDS
) -> dict[str, Moments]:
    shapes = shapes_of(view, (1, 2))
    sums = MomentSums(shapes, kinds, shared_inputs(view, tuple(shapes)), CPU)
    with frozen(view.model), LinearObserver(view, tuple(shapes), sums.add).attached():
        for batch in batches:
            run(view, batch)
    return sums.mean(sum(int(batch["mask"].sum()) for batch in batches))


def single_windows(batch: Batch) -> list[Batch]:
    return [{key: value[i : i + 1] for key, value in batch.items()} for i in range(3)]


def naive(view: DecoderView, batch: Batch) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Return (x, dL/dy) of every window by module, from autograd itself."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {}
    kept: list[tuple[str, Tensor, Tensor]] = []

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            del module
            output.retain_grad()
            kept.append((name, args[0], output))

        return hook

    handles = [view.module(n).register_forward_hook(keep(n)) for n in shapes_of(view, (1, 2))]
    for window in single_windows(batch):
        run(view, window)
    for handle in handles:
        handle.remove()
    for name, x, output in kept:
        assert output.grad is not None
        rows = (x.detach().flatten(0, -2).double(), output.grad.flatten(0, -2).double())
        found.setdefault(name, []).append(rows)
    return found


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_moments_equal_sums_written_out(family: str) -> None:
    view, batch = DecoderView(tiny_model(family)), random_batch()
    measured = measure(view, [batch])
    num_tokens = int(batch["mask"].sum())
    for name, windows in naive(view, batch).items():
        moments = measured[name]
        expected = Moments(
            input_gram=sum((x.mT @ x for x, _ in windows), torch.zeros(())) / num_tokens,
            gradient_gram=sum((g.mT @ g for _, g in windows), torch.zeros(())) / num_tokens,
            input_scale=sum((x.abs().sum(0) for x, _ in windows), torch.zeros(())) / num_tokens,
            input_square=sum((x.square().sum(0) for x, _ in windows), torch.zeros(())) / num_tokens,
            fisher_columns=sum(((g.mT @ x).square().sum(0) for x, g in windows), torch.zeros(()))
            / num_tokens,
        )
        for kind in KINDS:
            value, wanted = getattr(moments, kind), getattr(expected, kind)
            scale = float(wanted.abs().max())
            torch.testing.assert_close(value.double(), wanted, rtol=1e-4, atol=1e-5 * scale)


def test_moments_do_not_depend_on_the_batch_size() -> None:
    batch = random_batch()
    together = measure(DecoderView(tiny_model()), [batch])
    alone = measure(DecoderView(tiny_model()), single_windows(batch))
    for name, moments in together.items():
        for kind in KINDS:
            first, second = getattr(moments, kind), getattr(alone[name], kind)
            scale = float(first.abs().max())
            torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6 * scale)


def test_a_forward_pass_gives_the_same_input_moments() -> None:
    kinds: frozenset[MomentKind] = frozenset({"input_gram", "input_scale"})
    view, batch = DecoderView(tiny_model()), random_batch()
    both = measure(view, [batch])
    shapes = shapes_of(view, (1, 2))
    sums = MomentSums(shapes, kinds, shared_inputs(view, tuple(shapes)), CPU)
    with torch.no_grad(), InputObserver(view, tuple(shapes), sums.add).attached():
        view.model(input_ids=batch["input_ids"], attention_mask=batch["mask"].long())
    for name, moments in sums.mean(int(batch["mask"].sum())).items():
        assert moments.gradient_gram is None
        torch.testing.assert_close(moments.input_gram, both[name].input_gram)
        torch.testing.assert_close(moments.input_scale, both[name].input_scale)


@pytest.mark.parametrize(
    ("family", "groups"),
    [
        ("llama", [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"]]),
        ("gpt2", [["c_attn"], ["c_fc"]]),
        ("opt", [["k_proj", "v_proj", "q_proj"], ["out_proj"], ["fc1"], ["fc2"]]),
    ],
)
def test_linears_that_read_the_same_input_share_its_moments(
    family: str, groups: list[list[str]]
) -> None:
    view = DecoderView(tiny_model(family))
    modules = tuple(view.linears(0))
    sources = shared_inputs(view, modules)
    for group in groups:
        members = [next(m for m in modules if m.endswith(f".{name}")) for name in group]
        assert len({sources[m] for m in members}) == 1
        assert sources[members[0]] in members
    assert len(set(sources.values())) == 4


def test_a_state_resumes_where_it_was() -> None:
    view, batch = DecoderView(tiny_model()), random_batch()
    whole = measure(view, single_windows(batch))
    shapes = shapes_of(view, (1, 2))
    sources = shared_inputs(view, tuple(shapes))
    state: dict[str, Tensor] | None = None
    for window in single_windows(batch):
        sums = MomentSums(shapes, KINDS, sources, CPU)
        if state is not None:
            sums.load_state(state)
        with frozen(view.model), LinearObserver(view, tuple(shapes), sums.add).attached():
            run(view, window)
        state = sums.state()
    for name, moments in sums.mean(int(batch["mask"].sum())).items():
        for kind in KINDS:
            value, wanted = getattr(moments, kind), getattr(whole[name], kind)
            # A packed triangle makes a Gram matrix symmetric, which products are to the last bits.
            torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-8)


def test_groups_hold_whole_layers_within_the_memory() -> None:
    view = DecoderView(tiny_model())
    modules = tuple(name for index in range(4) for name in view.linears(index))
    needs = Needs(moments=modules, moment_kinds=KINDS)
    sources = shared_inputs(view, modules)
    layer = moment_bytes(shapes_of(view, (0,)), KINDS, sources)
    assert layer_groups(view, needs, math.inf, sources) == [modules]
    for limit, sizes in (
        (0, [7] * 4),
        (layer, [7] * 4),
        (2.5 * layer, [14, 14]),
        (3 * layer, [21, 7]),
    ):
        groups = layer_groups(view, needs, limit, sources)
        assert [len(group) for group in groups] == sizes
        assert tuple(name for group in groups for name in group) == modules


def test_a_linear_that_is_not_called_is_named() -> None:
    sums = MomentSums({"a": (2, 3), "b": (2, 3)}, KINDS, {"a": "a", "b": "b"}, CPU)
    sums.add("a", torch.ones(4, 3), torch.ones(4, 2))
    with pytest.raises(ModelError, match="b was seen in 0 of 1 windows"):
        sums.mean(4)


def test_what_is_not_finite_is_named() -> None:
    sums = MomentSums({"a": (2, 3)}, frozenset({"input_gram"}), {"a": "a"}, CPU)
    sums.add("a", torch.full((4, 3), math.inf))
    with pytest.raises(NumericsError, match="the input_gram of a is NaN or infinite"):
        sums.mean(4)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_a_packed_triangle_is_the_matrix(size: int) -> None:
    half = torch.randn(size, size)
    matrix = half + half.mT
    packed = pack_triangle(matrix)
    assert packed.numel() == size * (size + 1) // 2
    assert torch.equal(unpack_triangle(packed), matrix)


def test_a_shape_that_is_not_a_triangle_is_refused() -> None:
    with pytest.raises(ValueError, match="not the shape of a packed triangle"):
        unpack_triangle(torch.zeros(4))
