"""The memory forecast against torch: exact where it counts, close where it estimates."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from grasp_lightning.config import (
    LoraSettings,
    MethodConfig,
    Reduction,
    Strategy,
    Terms,
    TrainMode,
)
from grasp_lightning.linalg.factors import balanced_factors, factorize
from grasp_lightning.memory.activations import LOSS_PARTS, head_bytes, layer_bytes, sampling_bytes
from grasp_lightning.memory.calibration import (
    bases_bytes,
    calibration_activations,
    calibration_memory,
    factors_bytes,
    sums_bytes,
    update_bytes,
    window_bytes,
)
from grasp_lightning.memory.compensation import (
    compensation_activations,
    compensation_memory,
    trained_parameters,
)
from grasp_lightning.memory.model_shape import model_shape, shape_after
from grasp_lightning.memory.shapes import Adapters, ModelShape, Pass, Scored
from grasp_lightning.methods import predict, resolve_method
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.size import LinearShape, count_parameters
from grasp_lightning.models.surgery import apply_operations
from grasp_lightning.plan import (
    AddSeam,
    DropLayers,
    FactorizeLinear,
    MergeLayers,
    Plan,
    SetWeights,
)
from grasp_lightning.stats.base import Scoring
from grasp_lightning.stats.components import ComponentScores
from grasp_lightning.training.compensation import make_trainable, rewritten_parameters
from tests.conftest import TINY_CONFIGS, VOCABULARY, tiny_model
from tests.unit.models.helpers import factorize_layers, narrow_layers

RUN = Pass(batch_size=2, seqlen=24, on_cpu=True)
WITHOUT_ATTENTION = ("mamba", "mamba2", "xlstm")
OPERATIONS = tuple(
    FactorizeLinear(module=f"model.layers.1.{name}", rank=rank, components=None)
    for name, rank in (("mlp.down_proj", 8), ("self_attn.q_proj", 6))
)


def test_a_weight_that_is_replaced_by_one_of_equal_shape_counts_like_factors() -> None:
    scored = Scored(linears=(), lowest=None, num_layers=0, update=10**9)
    plain = calibration_memory(shape(), (), RUN, replace(scored, update=0))
    found = calibration_memory(shape(), (), RUN, scored, set_weights=1000)
    assert found.factors == plain.factors + 1000
    assert found.activations == 10**9
    # The Gram matrix and its two factors and inverse, and two copies of the weight.
    assert update_bytes(LinearShape(3, 5)) == 8 * (4 * 25 + 2 * 15)


def shape(family: str = "llama") -> ModelShape:
    return model_shape(DecoderView(tiny_model(family)))


def compressed_view() -> DecoderView:
    view = DecoderView(tiny_model())
    tensors, weights = {}, linears_of(view, 1)
    for operation in OPERATIONS:
        basis = factorize(weights[operation.module])
        factors = balanced_factors(basis, range(operation.rank))
        tensors[f"{operation.module}.left"] = factors.left
        tensors[f"{operation.module}.right"] = factors.right
    apply_operations(view, OPERATIONS, tensors)
    return view


def linears_of(view: DecoderView, index: int) -> dict[str, Tensor]:
    return {name: linear.weight for name, linear in view.linears(index).items()}


@contextmanager
def kept_by_autograd(model: nn.Module) -> Iterator[dict[int, Tensor]]:
    """Record every tensor other than a parameter that is kept for backward, by its memory."""
    kept: dict[int, Tensor] = {}
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in own:
            kept[address] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def bytes_kept(kept: dict[int, Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def hidden_states(model: PreTrainedModel) -> Tensor:
    """Return what autograd can start from, below all layers."""
    ids = torch.arange(RUN.num_tokens).view(RUN.batch_size, RUN.seqlen)
    states: Tensor = model.get_input_embeddings()(ids)
    return states.detach().requires_grad_(True)


@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_every_family_has_a_shape(family: str) -> None:
    model = tiny_model(family)
    found = model_shape(DecoderView(model))
    assert found.weights == sum(parameter.nbytes for parameter in model.parameters())
    assert len(found.layers) == model.config.num_hidden_layers
    assert found.inner > 0
    if family in WITHOUT_ATTENTION:
        assert (found.num_heads, found.keys, found.queries) == (0, 0, 0)
    else:
        assert 0 < found.keys <= found.queries
    assert layer_bytes(found, RUN) > 0


def test_llama_s_widths_are_read() -> None:
    found = shape()
    assert (found.hidden, found.queries, found.keys, found.inner) == (32, 32, 16, 48)
    assert found.is_gated
    assert not shape("opt").is_gated


def test_the_shape_after_operations_is_that_of_the_compressed_model() -> None:
    view = compressed_view()
    expected = model_shape(view)
    planned = shape_after(shape(), OPERATIONS, count_parameters(view.model))
    for layer, wanted in zip(planned.layers, expected.layers, strict=True):
        assert layer.parameters == wanted.parameters
        assert dict(layer.linears) == dict(wanted.linears)
        assert set(layer.attention) == set(wanted.attention)
    assert planned.weights == expected.weights


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_the_shape_of_narrowed_mlps_is_planned_and_found(family: str) -> None:
    view = DecoderView(tiny_model(family))
    operations, tensors = narrow_layers(view, (0, 1, 2, 3), range(20))
    before = shape(family)
    apply_operations(view, operations, tensors)
    found = model_shape(view)
    planned = shape_after(before, operations, count_parameters(view.model))
    assert [dict(layer.linears) for layer in planned.layers] == [
        dict(layer.linears) for layer in found.layers
    ]
    assert planned.weights == found.weights
    assert (planned.inner, planned.is_gated) == (found.inner, found.is_gated) == (20, True)
    for train in ("factors", "lora"):
        adapters = Adapters(rank=5 if train == "lora" else None, on_dense=train == "lora")
        trained = make_trainable(view, train, LoraSettings(rank=5))
        assert trained_parameters(found, adapters) == trained.num_parameters


@pytest.mark.parametrize("train", ["replaced", "all"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_trained_weights_are_planned_to_the_parameter(family: str, train: TrainMode) -> None:
    view = DecoderView(tiny_model(family))
    norm = "input_layernorm.weight" if family == "llama" else "self_attn_layer_norm.weight"
    before, layers = shape(family), view.layers_name
    factorized, tensors = factorize_layers(view, [1], 8)
    operations = (
        *factorized,
        SetWeights(module=f"{layers}.0", parameters=(norm,)),
        MergeLayers(base=2, absorbed=(3,), rule="paper"),
        AddSeam(layers=(3,), holder=2, is_after=True),
    )
    hidden = before.hidden
    tensors[f"{layers}.0.{norm}"] = torch.ones(hidden)
    tensors[f"{layers}.2.seam_after.weight"] = torch.zeros(hidden, hidden)
    apply_operations(view, operations, tensors)
    planned = shape_after(before, operations, count_parameters(view.model))
    present = DecoderView(view.model)
    plan = Plan(method="made up", operations=operations)
    trained = make_trainable(present, train, LoraSettings(), rewritten_parameters(present, plan))
    adapters = Adapters(rank=None, on_dense=train == "all", has_rewritten=train == "replaced")
    assert trained_parameters(planned, adapters) == trained.num_parameters
    if train == "all":
        assert trained_parameters(model_shape(present), adapters) == trained.num_parameters


def test_states_of_8_bits_are_counted_to_the_byte() -> None:
    bits8 = pytest.importorskip("bitsandbytes", reason="the extra quantize is not installed")
    weight = nn.Parameter(torch.zeros(64, 80))
    weight.grad = torch.zeros_like(weight)
    optimizer = bits8.optim.AdamW8bit([weight])
    optimizer.step()
    ((_, state),) = optimizer.state.items()
    kept = sum(state[key].nbytes for key in ("state1", "state2", "absmax1", "absmax2"))
    memory, _ = compensation_memory(
        shape(), "auto", 1, trained=5120, is_new=False, activations=0, is_8bit=True
    )
    assert memory.optimizer == kept


def test_the_widest_mlp_counts() -> None:
    view = DecoderView(tiny_model())
    apply_operations(view, *narrow_layers(view, (0,), range(20)))
    assert model_shape(view).inner == 48


def test_slicing_narrows_the_linears_of_layers_and_a_head_outside_them() -> None:
    view = DecoderView(tiny_model())
    prediction = predict(view, resolve_method(MethodConfig(name="slicegpt", keep_ratio=0.5), 0))
    planned = shape_after(model_shape(view), prediction.operations, prediction.most)
    linears = planned.layers[1].linears
    assert linears["model.layers.1.mlp.up_proj"].columns == 16
    assert linears["model.layers.1.mlp.down_proj"].rows == 16
    assert planned.parameters == prediction.most


def test_dropped_layers_do_not_exist() -> None:
    planned = shape_after(shape(), (DropLayers(layers=(0, 2)),), 1000)
    assert len(planned.layers) == 2
    assert planned.weights == 4000


def test_decompositions_and_factors_are_counted_to_the_byte() -> None:
    view, found = DecoderView(tiny_model()), shape()
    bases = {name: factorize(weight) for name, weight in linears_of(view, 1).items()}
    linears = found.layers[1].linears.values()
    assert bases_bytes(linears) == sum(part.nbytes for basis in bases.values() for part in basis)
    ranked = [linear._replace(rank=3) for linear in linears]
    factors = [balanced_factors(basis, (0, 1, 2)) for basis in bases.values()]
    assert factors_bytes(ranked) == sum(part.nbytes for pair in factors for part in pair)


@pytest.mark.parametrize("terms", ["full", "sigma"])
@pytest.mark.parametrize("reduction", ["signed", "absolute"])
def test_sums_are_counted_to_the_byte(terms: Terms, reduction: Reduction) -> None:
    view = DecoderView(tiny_model())
    bases = {name: factorize(weight) for name, weight in linears_of(view, 1).items()}
    scores = ComponentScores(bases, Scoring(terms=terms, reduction=reduction))
    counted = sums_bytes(
        shape().layers[1].linears.values(),
        sums_gradients=(terms, reduction) == ("full", "signed"),
    )
    assert counted == sum(total.nbytes for total in scores.sums.values())


@pytest.mark.parametrize("targets", [(), ("q_proj", "mlp.down_proj")])
@pytest.mark.parametrize("train", ["lora", "factors", "lora_on_factors"])
def test_trained_parameters_and_their_states_are_counted_to_the_byte(
    train: TrainMode, targets: tuple[str, ...]
) -> None:
    view = compressed_view()
    found = model_shape(view)
    adapters = Adapters(
        rank=None if train == "factors" else 5, on_dense=train == "lora", targets=targets
    )
    trained = make_trainable(view, train, LoraSettings(rank=5, targets=targets)).num_parameters
    assert trained_parameters(found, adapters) == trained
    parameters = [p for p in view.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    memory, host = compensation_memory(
        found, "auto", 1, trained=trained, is_new=adapters.rank is not None, activations=0
    )
    assert memory.optimizer == sum(state.nbytes for state in states if state.ndim > 0)
    assert memory.gradients == sum(p.nbytes for p in parameters)
    assert memory.weights == sum(p.nbytes for p in view.model.parameters())
    assert host == 0


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", torch.float32), ("llama", torch.bfloat16), ("opt", torch.float32)],
)
def test_a_frozen_layer_keeps_what_is_modelled(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family)
    nn.Module.to(model, dtype)  # transformers wraps its own with a narrow type
    model.requires_grad_(False)
    view = DecoderView(model)
    with kept_by_autograd(model) as kept:
        model.base_model(inputs_embeds=hidden_states(model), use_cache=False)
    modelled = 4 * layer_bytes(model_shape(view), RUN)
    # Not modelled: statistics of norms, tables of positions, the last norm.
    assert modelled == pytest.approx(bytes_kept(kept), rel=0.1)


@pytest.mark.parametrize(
    ("dropout", "is_mixed", "least"),
    # Without dropout, linears that read the same input share it.
    [(0.1, False, 0.95), (0.1, True, 0.9), (0.0, False, 0.6)],
)
def test_adapters_keep_what_is_modelled(dropout: float, is_mixed: bool, least: float) -> None:
    view = DecoderView(tiny_model())
    make_trainable(view, "lora", LoraSettings(rank=4, dropout=dropout))
    view.model.train()
    states = hidden_states(view.model)
    with (
        kept_by_autograd(view.model) as kept,
        torch.autocast("cpu", torch.bfloat16, enabled=is_mixed),
    ):
        view.model.base_model(inputs_embeds=states, use_cache=False)
    adapters, run = Adapters(rank=4, has_dropout=dropout > 0), replace(RUN, is_mixed=is_mixed)
    found = shape()
    modelled, rest = (
        compensation_activations(part, run, adapters, is_checkpointed=False)
        for part in (found, replace(found, layers=()))
    )
    assert least * (modelled - rest) < bytes_kept(kept) < 1.05 * (modelled - rest)


def test_checkpointing_keeps_one_layer_and_the_inputs_of_all() -> None:
    found, adapters = shape(), Adapters(rank=4)
    full = compensation_activations(found, RUN, adapters, is_checkpointed=False)
    less = compensation_activations(found, RUN, adapters, is_checkpointed=True)
    head = head_bytes(found, RUN)
    assert less - head == 4 * RUN.num_tokens * found.hidden * 4
    assert full - head > 4 * (less - head)


def test_logits_are_held_once() -> None:
    found = shape()
    per_token = found.vocabulary * 4 + 2 * found.hidden * 4
    assert head_bytes(found, RUN) == RUN.num_tokens * per_token + LOSS_PARTS


@pytest.mark.parametrize("family", TINY_CONFIGS)
def test_keys_and_values_of_a_writing_model_are_counted_to_the_byte(family: str) -> None:
    model = tiny_model(family)
    counted = sampling_bytes(model_shape(DecoderView(model)), RUN)
    if family in WITHOUT_ATTENTION:
        assert counted == 0
        return
    ids = torch.arange(RUN.num_tokens).view(RUN.batch_size, RUN.seqlen)
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    layers = [layer for layer in cache.layers if hasattr(layer, "keys")]  # none in linear attention
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    if family == "falcon_new":  # it repeats keys for all heads before it keeps them
        assert held == 2 * counted
    elif family in {"mistral", "gemma2", "gemma3_text", "gpt_oss", "llama4_text", "deepseek_v3"}:
        # With a sliding window, chunks, or latents of keys and values.
        assert held < counted
    else:
        assert held == counted


def test_activations_grow_with_the_layers_above_the_lowest_scored_one() -> None:
    found = shape()
    linears = tuple(found.layers[3].linears.values())
    top = Scored(linears=linears, lowest=3, num_layers=1)
    sizes = [
        calibration_activations(found, RUN, replace(top, lowest=lowest)) for lowest in range(4)
    ]
    steps = {low - high for low, high in pairwise(sizes)}
    assert steps == {layer_bytes(found, RUN)}


def test_mixed_precision_keeps_each_weight_in_bfloat16() -> None:
    found = shape()
    mixed = replace(RUN, is_mixed=True)
    one, two = (replace(mixed, batch_size=size) for size in (1, 2))
    weights = sum(linear.parameters for linear in found.layers[0].linears.values())
    assert 2 * layer_bytes(found, one) - layer_bytes(found, two) == 2 * weights
    half = replace(found, element_size=2)
    assert 2 * layer_bytes(half, one) == layer_bytes(half, two)


def test_scoring_takes_the_cheaper_way_and_less_without_u_and_v() -> None:
    linear = LinearShape(30, 20)
    assert window_bytes(linear, 8, is_full=False) == 4 * (8 * 50 + 2 * 8 * 20)
    assert window_bytes(linear, 1000, is_full=False) == 4 * (1000 * 50 + 600)
    assert window_bytes(linear, 8, is_full=True) > window_bytes(linear, 8, is_full=False)


@pytest.mark.parametrize("is_tied", [False, True])
def test_fsdp_divides_weights_and_nothing_else_of_a_calibration(is_tied: bool) -> None:
    found = model_shape(DecoderView(tiny_model(tie_word_embeddings=is_tied)))
    words = VOCABULARY * 32 * 4
    assert found.tied * 4 == words * is_tied
    scored = Scored(linears=tuple(found.layers[0].linears.values()), lowest=0, num_layers=1)
    one, many = (
        calibration_memory(found, (), RUN, scored, num_parts=parts, cache=7) for parts in (1, 4)
    )
    assert one.weights == found.weights
    tied, largest = (words, 32 * 48 * 4) if is_tied else (0, words)
    assert many.weights == tied + -(-(found.weights - tied) // 4) + 2 * largest
    assert one[1:] == many[1:]
    assert one.total == sum(one)


def memory_under(strategy: Strategy) -> tuple[int, int, int, int]:
    many = 10**6  # more than what ddp copies when it starts
    memory, host = compensation_memory(
        shape(), strategy, 4, trained=1000, is_new=True, activations=many
    )
    assert memory.activations == many
    return memory.weights, memory.gradients, memory.optimizer, host


def test_strategies_divide_what_they_say() -> None:
    found = shape()
    whole, layer = found.weights + 4000, found.largest_layer + 1000
    part = -(-whole // 4)
    # Both matrices of words and the last norm.
    assert found.outside == 4 * (2 * VOCABULARY * 32 + 32)
    gathered = 2 * whole  # fewer than stage 3 keeps, and than it fetches ahead
    assert memory_under("ddp") == (whole, 8000, 8000, 0)
    assert memory_under("fsdp") == (part + found.outside + 3 * layer, 1000, 2000, 0)
    assert memory_under("deepspeed_stage_1") == (whole, 4000, 3000, 0)
    assert memory_under("deepspeed_stage_2") == (whole, 1000, 3000, 0)
    assert memory_under("deepspeed_stage_3") == (part + gathered, 1000, 2000, 0)
    assert memory_under("deepspeed_stage_2_offload") == (whole, 1000, 0, 4000)
    assert memory_under("deepspeed_stage_3_offload") == (gathered, 1000, 0, 4000 + part)


def test_stage_3_gathers_no_more_than_its_settings_allow() -> None:
    large = replace(shape(), parameters=7 * 10**9, element_size=2)
    memory, host = compensation_memory(
        large, "deepspeed_stage_3_offload", 8, trained=0, is_new=True, activations=0
    )
    assert memory.weights == 2 * (10**9 + 5 * 10**7)
    assert host == large.weights // 8


def test_one_process_gathers_nothing() -> None:
    found = shape()
    strategies: tuple[Strategy, ...] = ("fsdp", "deepspeed_stage_3")
    for strategy in strategies:
        memory, _ = compensation_memory(found, strategy, 1, trained=0, is_new=True, activations=0)
        assert memory.weights == found.weights


def test_ddp_copies_weights_when_it_starts() -> None:
    memory, _ = compensation_memory(shape(), "ddp", 2, trained=10, is_new=True, activations=5)
    assert memory.total == 2 * memory.weights  # they fit into one of its copies
    alone, _ = compensation_memory(shape(), "ddp", 1, trained=10, is_new=True, activations=5)
    assert alone == (memory.weights, 40, 80, 5)
