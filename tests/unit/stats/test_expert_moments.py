"""Moments of experts against sums written out naively, and observing them changes nothing."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grasp_lightning.errors import ModelError
from grasp_lightning.models.decoder import DecoderView, frozen
from grasp_lightning.models.mixtures import experts_in, in_model_order, weights_of
from grasp_lightning.models.next_token import forward_inputs
from grasp_lightning.stats.base import MomentKind, Needs
from grasp_lightning.stats.moments import MomentSums, layer_groups
from grasp_lightning.stats.observer import InputObserver, LinearObserver, shared_inputs
from tests.conftest import tiny_model
from tests.unit.evaluation.test_perplexity import random_batch
from tests.unit.stats.test_observer import Batch, run

KINDS: frozenset[MomentKind] = frozenset({"input_gram", "gradient_gram"})
FAMILIES = ("mixtral", "gpt_oss", "deepseek_v3", "llama4_text")


def sums_of(view: DecoderView, names: tuple[str, ...], batches: list[Batch]) -> MomentSums:
    shapes = {name: tuple(weight.shape) for name, weight in weights_of(view, names).items()}
    sums = MomentSums(shapes, KINDS, shared_inputs(view, names), torch.device("cpu"))
    with frozen(view.model), LinearObserver(view, names, sums.add).attached():
        for batch in batches:
            run(view, batch)
    return sums


def what_readers_read(view: DecoderView, name: str, batch: Batch) -> tuple[Tensor, Tensor]:
    """Each expert's channels times router weights, zero without a route, and dL/d(output)."""
    layout, module = experts_in(view, view.layer_of(name) or 0)[name], view.module(name)
    seen: list[Any] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        output.retain_grad()
        seen.append((*args, output))

    with module.register_forward_hook(keep):
        run(view, batch)
    *given, output = seen[0]
    gated: Any = module
    if layout.is_scaled:
        scaled = given[0].reshape(layout.number, -1, layout.hidden)
        gate, up = (scaled @ gated.gate_up_proj).chunk(2, dim=-1)
        each = output.grad.reshape(scaled.shape)
        assert torch.equal(each, each[:1].expand_as(each))
        return (up * gated.act_fn(gate)).detach(), each[0]
    hidden, index, weights = given
    rows = torch.zeros(layout.number, len(hidden), layout.width)
    for token, (x, chosen, shares) in enumerate(zip(hidden, index, weights, strict=True)):
        for expert, share in zip(chosen.tolist(), shares, strict=True):
            weight = gated.gate_up_proj[expert]
            y = x @ (weight if layout.is_transposed else weight.mT)
            y = y + gated.gate_up_proj_bias[expert] if layout.has_bias else y
            rows[expert, token] = share * gated._apply_gate(y)
    return rows.detach(), output.grad


@pytest.mark.parametrize("family", FAMILIES)
def test_moments_are_those_of_each_experts_own_tokens(family: str) -> None:
    view = DecoderView(tiny_model(family))
    name, batch = next(iter(experts_in(view, 2))), random_batch()
    moments = sums_of(view, (name,), [batch]).mean(int(batch["mask"].sum()))[name]
    rows, gradient = what_readers_read(view, name, batch)
    number = int(batch["mask"].sum())
    torch.testing.assert_close(moments.input_gram, rows.mT @ rows / number)
    torch.testing.assert_close(moments.gradient_gram, gradient.mT @ gradient / number)


def test_a_forward_pass_sums_the_same_inputs() -> None:
    view = DecoderView(tiny_model("gpt_oss"))
    (name,), batch = experts_in(view, 1), random_batch()
    both, kinds = sums_of(view, (name,), [batch]), frozenset[MomentKind]({"input_gram"})
    shapes = {name: tuple(weights_of(view, [name])[name].shape)}
    sums = MomentSums(shapes, kinds, {name: name}, torch.device("cpu"))
    with frozen(view.model), InputObserver(view, (name,), sums.add).attached(), torch.no_grad():
        view.model.base_model(**forward_inputs(batch), use_cache=False)
    torch.testing.assert_close(sums.sums, {k: v for k, v in both.sums.items() if "input" in k})


@pytest.mark.parametrize("family", ["qwen3_moe", "llama4_text"])
def test_sums_do_not_depend_on_the_batch_size_and_go_through_their_state(family: str) -> None:
    view = DecoderView(tiny_model(family))
    names = in_model_order(view, [*view.all_linears(), *experts_in(view, 1), *experts_in(view, 3)])
    batch = random_batch()
    single = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(3)]
    together, apart = (sums_of(view, names, batches) for batches in ([batch], single))
    other = sums_of(view, names, [])
    other.load_state(together.state())
    for key, value in together.sums.items():
        torch.testing.assert_close(apart.sums[key], value)
        torch.testing.assert_close(other.sums[key], value)


def test_observing_leaves_logits_and_splits_memory_by_layers() -> None:
    view = DecoderView(tiny_model("gpt_oss"))
    names = tuple(name for index in range(4) for name in experts_in(view, index))
    ids = torch.arange(12)[None]
    before = view.model(input_ids=ids).logits
    with frozen(view.model), LinearObserver(view, names, lambda *_: None).attached():
        assert torch.equal(view.model(input_ids=ids).logits, before)
    needs, sources = Needs(moments=names, moment_kinds=KINDS), {name: name for name in names}
    size = 4 * (4 * 48 * 48 + 32 * 32)  # four Gram matrices of channels, and one of gradients
    assert layer_groups(view, needs, 2 * size, sources) == [names[:2], names[2:]]
    assert len(layer_groups(view, needs, 2 * size - 1, sources)) == 4


def test_experts_that_compute_something_else_are_named() -> None:
    view = DecoderView(tiny_model("qwen3_moe"))
    (name,) = experts_in(view, 0)
    experts: Any = view.module(name)
    forward = experts.forward
    experts.forward = lambda *args: 1.5 * forward(*args)
    with pytest.raises(ModelError, match=r"layers\.0\.mlp\.experts .* usual sum of experts"):
        sums_of(view, (name,), [random_batch()])


def test_scaled_experts_that_are_not_added_up_are_named() -> None:
    view = DecoderView(tiny_model("llama4_text"))
    (name,) = experts_in(view, 0)
    experts = view.module(name)
    number = experts_in(view, 0)[name].number
    shares = torch.arange(1.0, number + 1)[:, None, None]

    def weighted(_: nn.Module, __: object, output: Tensor) -> Tensor:
        return (shares * output.reshape(number, -1, output.shape[-1])).flatten(0, 1)

    with (
        frozen(view.model),
        LinearObserver(view, (name,), lambda *_: None).attached(),
        experts.register_forward_hook(weighted),
        pytest.raises(ModelError, match=r"feed_forward\.experts .* usual sum of experts"),
    ):
        run(view, random_batch())
