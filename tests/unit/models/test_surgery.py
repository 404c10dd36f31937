from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from grasp_lightning.errors import PlanError
from grasp_lightning.methods.blocks import blocks
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.linears import DenseModule
from grasp_lightning.models.lowrank import LowRankLinear, NarrowedLinear, narrowed_linears
from grasp_lightning.models.operations import APPLIERS
from grasp_lightning.models.size import count_parameters
from grasp_lightning.models.surgery import apply_operations, parameters_after
from grasp_lightning.plan import (
    OPERATIONS,
    AddSeam,
    DropLayers,
    FactorizeLinear,
    NarrowMlp,
    Operation,
    RemoveBlock,
    SelectLayers,
    SetWeights,
)
from tests.conftest import ALL_FAMILIES, MOE_FAMILIES, tiny_model
from tests.unit.models.helpers import (
    factorize_layers,
    in_dtype,
    meta_model,
    narrow_layers,
    random_factors,
)

UP = "model.layers.1.mlp.up_proj"  # 48 x 32
IDS = torch.arange(12).reshape(2, 6)


def factorize(
    module: str = UP, rank: int = 3, components: tuple[int, ...] | None = None
) -> FactorizeLinear:
    return FactorizeLinear(module=module, rank=rank, components=components)


DOWN, GATE = "model.layers.1.mlp.down_proj", "model.layers.1.mlp.gate_proj"


def remove(*modules: str) -> RemoveBlock:
    return RemoveBlock(block="model.layers.1.some", modules=modules)


def narrow(
    reader: str = DOWN, writers: Sequence[str] = (GATE, UP), channels: Sequence[int] = (0, 3, 7)
) -> NarrowMlp:
    return NarrowMlp(reader=reader, writers=tuple(writers), channels=tuple(channels))


LAYER = "model.layers.1"


def set_weights(*parameters: str, module: str = LAYER) -> SetWeights:
    return SetWeights(module=module, parameters=parameters)


def seam(layer: int, holder: int) -> AddSeam:
    return AddSeam(layers=(layer,), holder=holder, is_after=False)


def state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_factorized_model_computes_with_the_product_of_its_factors(family: str) -> None:
    dense, low_rank = DecoderView(tiny_model(family)), DecoderView(tiny_model(family))
    operations, tensors = factorize_layers(low_rank, (1, 3), rank=3)
    apply_operations(low_rank, operations, tensors)
    for module in {key.rpartition(".")[0] for key in tensors}:
        index = dense.layer_of(module)
        assert index is not None
        with torch.no_grad():
            weight = dense.linears(index)[module].weight
            weight.copy_(tensors[f"{module}.left"] @ tensors[f"{module}.right"])
    torch.testing.assert_close(
        low_rank.model(IDS).logits, dense.model(IDS).logits, rtol=1e-4, atol=1e-5
    )


def test_factors_are_copies_in_the_place_of_the_weight_with_the_old_bias() -> None:
    view = DecoderView(in_dtype(tiny_model(mlp_bias=True), torch.bfloat16))
    old = view.linears(1)[UP]
    tensors = random_factors(view, [factorize()])
    # Not contiguous, as a slice of columns of U is not.
    tensors[f"{UP}.left"] = tensors[f"{UP}.left"].mT.contiguous().mT
    apply_operations(view, [factorize()], tensors)
    new = view.module(UP)
    assert isinstance(new, LowRankLinear)
    assert new.left.bias is old.bias
    for linear, key in ((new.left, "left"), (new.right, "right")):
        assert torch.equal(linear.weight, tensors[f"{UP}.{key}"].to(torch.bfloat16))
        assert linear.weight.is_contiguous()
        assert linear.weight.data_ptr() != tensors[f"{UP}.{key}"].data_ptr()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_training_state_is_that_of_the_old_linear(training: bool, requires_grad: bool) -> None:
    view = DecoderView(tiny_model())
    view.module(UP).train(training).requires_grad_(requires_grad)
    apply_operations(view, [factorize()], random_factors(view, [factorize()]))
    new = view.module(UP)
    assert {module.training for module in new.modules()} == {training}
    assert {parameter.requires_grad for parameter in new.parameters()} == {requires_grad}


def test_surgery_draws_no_random_numbers() -> None:
    view = DecoderView(tiny_model())
    tensors = random_factors(view, [factorize()])
    before = torch.get_rng_state()
    apply_operations(view, [factorize()], tensors)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_on_the_meta_device_gets_its_structure() -> None:
    view, real = DecoderView(meta_model("llama")), DecoderView(tiny_model())
    operations: list[Operation] = [factorize(), DropLayers(layers=(0,))]
    tensors = random_factors(real, operations)
    apply_operations(view, operations, tensors)
    apply_operations(real, operations, tensors)
    assert {k: v.shape for k, v in view.model.state_dict().items()} == {
        k: v.shape for k, v in real.model.state_dict().items()
    }
    assert {parameter.device.type for parameter in view.model.parameters()} == {"meta"}


def test_operations_use_original_numbers_in_any_order() -> None:
    operations: list[Operation] = [factorize("model.layers.3.mlp.up_proj"), DropLayers(layers=(1,))]
    first, second = DecoderView(tiny_model()), DecoderView(tiny_model())
    tensors = random_factors(first, operations)
    apply_operations(first, operations, tensors)
    for operation in reversed(operations):
        apply_operations(second, [operation], tensors)
    assert torch.equal(first.model(IDS).logits, second.model(IDS).logits)
    assert first.current_name("model.layers.3.mlp.up_proj") == "model.layers.2.mlp.up_proj"
    assert list(first.model.config.quantization_config.ranks) == ["model.layers.2.mlp.up_proj"]


def test_selecting_layers_changes_nothing() -> None:
    view = DecoderView(tiny_model())
    before = state(view.model)
    apply_operations(view, [SelectLayers(layers=(1, 2))], {})
    after = view.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not hasattr(view.model.config, "quantization_config")


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_a_layer_with_the_weights_of_another_computes_like_it(family: str) -> None:
    view, expected = (DecoderView(tiny_model(family)) for _ in range(2))
    copied = {name: value.detach().double() for name, value in view.layer(2).named_parameters()}
    module = f"{view.layers_name}.1"
    operation = SetWeights(module=module, parameters=tuple(copied))
    assert parameters_after(view, [operation]) == count_parameters(view.model)
    before = dict(view.model.named_parameters())
    tensors = {f"{module}.{name}": value for name, value in copied.items()}
    apply_operations(view, [operation, DropLayers(layers=(0,))], tensors)
    for name in copied:
        assert view.layer(1).get_parameter(name) is before[f"{module}.{name}"]
    expected.layer(1).load_state_dict(expected.layer(2).state_dict())
    expected.drop([0])
    assert torch.equal(view.model(IDS).logits, expected.model(IDS).logits)
    assert not hasattr(view.model.config, "quantization_config")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, f"weight {DOWN}.weight is missing"),
        ({f"{DOWN}.weight": torch.zeros(48, 32)}, r"must have shape \(32, 48\), got \(48, 32\)"),
        ({f"{DOWN}.weight": torch.full((32, 48), 1e30)}, "not finite in torch.float16"),
    ],
)
def test_values_that_do_not_fit_change_nothing(change: dict[str, Tensor], message: str) -> None:
    view = DecoderView(in_dtype(tiny_model(), torch.float16))
    norm = f"{LAYER}.input_layernorm.weight"
    operation = set_weights("input_layernorm.weight", "mlp.down_proj.weight")
    before = state(view.model)
    with pytest.raises(PlanError, match=message):
        apply_operations(view, [operation], {norm: torch.zeros(32)} | change)
    assert torch.equal(before[norm], view.model.state_dict()[norm])


def test_every_operation_that_a_plan_can_hold_can_be_applied() -> None:
    assert set(APPLIERS) == set(OPERATIONS.values())


BAD: list[tuple[Sequence[Operation], str]] = [
    ([factorize("model.layers.1.mlp.nothing")], "nothing: LlamaForCausalLM has no module"),
    ([factorize("model.layers.7.mlp.up_proj")], "no decoder layer 7"),
    ([factorize("model.layers.1.mlp")], "expected a Linear, the model has LlamaMLP"),
    ([factorize(rank=33)], f"rank of {UP} must be from 1 to 32, the plan says 33"),
    ([factorize(rank=0)], f"rank of {UP} must be from 1 to 32, the plan says 0"),
    ([factorize(components=(0, 1))], r"rank 3, but the plan keeps components \[0, 1\]"),
    ([factorize(components=(0, 1, 1))], "rank 3, but the plan keeps components"),
    ([factorize(components=(0, 1, 32))], "must be from 0 to 31"),
    ([factorize(), factorize()], f"factorizes {UP} twice"),
    ([DropLayers(layers=(1,)), factorize()], f"factorizes {UP} after dropping its decoder layer"),
    ([DropLayers(layers=(4,))], r"decoder layers \[4\], the model has \[0, 1, 2, 3\]"),
    (
        [DropLayers(layers=(1,)), DropLayers(layers=(1,))],
        r"layers \[1\], the model has \[0, 2, 3\]",
    ),
    ([DropLayers(layers=(2, 2))], "names a decoder layer twice"),
    ([SelectLayers(layers=(9,))], r"decoder layers \[9\]"),
    ([DropLayers(layers=(0, 1, 2, 3))], "drops all 4 decoder layers"),
    ([remove(UP), factorize()], f"factorizes {UP} twice"),
    ([narrow(), remove(UP)], f"removes {UP} and narrows it, too"),
    ([DropLayers(layers=(1,)), remove(UP)], f"removes {UP} after dropping its decoder layer"),
    ([remove()], "some: expected its linears, each once, got"),
    ([remove(UP, UP)], "expected its linears, each once, got"),
    ([remove("model.layers.1.mlp")], "removes .*: expected a Linear, the model has LlamaMLP"),
    ([narrow(), narrow()], f"narrows {DOWN} twice"),
    ([factorize(), narrow()], f"narrows {UP} and factorizes it, too"),
    ([narrow(), factorize()], f"factorizes {UP} and narrows it, too"),
    ([DropLayers(layers=(1,)), narrow()], f"narrows {DOWN} after dropping its decoder layer"),
    ([narrow("model.layers.1.mlp.nothing")], "nothing: LlamaForCausalLM has no module"),
    ([narrow(writers=("model.layers.1.mlp.act_fn",))], "expected a Linear, the model has SiLU"),
    ([narrow(writers=())], f"the MLP of {DOWN}: expected other linears"),
    ([narrow(writers=(UP, UP))], f"the MLP of {DOWN}: expected other linears"),
    ([narrow(writers=(DOWN, UP))], f"the MLP of {DOWN}: expected other linears"),
    ([narrow(writers=("model.layers.2.mlp.up_proj",))], f"not in the same module as {DOWN}"),
    ([narrow(UP, (GATE, DOWN))], "its 48 outputs are not a multiple of the 32 channels that"),
    ([narrow(channels=())], f"keeps 0 channels of {DOWN}: it must keep from 1 to 47"),
    ([narrow(channels=range(48))], f"keeps 48 channels of {DOWN}"),
    ([narrow(channels=(1, 0))], f"keeps channels of {DOWN} that are not in ascending order"),
    ([narrow(channels=(1, 1))], f"keeps channels of {DOWN} that are not in ascending order"),
    ([narrow(channels=(-1, 1))], "must be from 0 to 47, the plan keeps -1 to 1"),
    ([narrow(channels=(1, 48))], "must be from 0 to 47, the plan keeps 1 to 48"),
    ([set_weights()], f"weights of {LAYER}: expected names of its parameters, each once"),
    ([set_weights("weight", "weight", module=UP)], f"weights of {UP}: expected names of its par"),
    ([set_weights("mlp.up_proj.bias")], "bias: that module has the parameters self_attn.q_proj.w"),
    ([set_weights("weight", module="model.layers.7")], "sets weights of .*: no decoder layer 7"),
    (
        [DropLayers(layers=(1,)), set_weights("mlp.up_proj.weight")],
        f"sets weights of {LAYER} after dropping its decoder layer",
    ),
    (
        [factorize(), set_weights("mlp.up_proj.weight")],
        f"sets {UP}.weight after replacing the linear that it is in",
    ),
    ([set_weights("weight", module=DOWN), narrow()], f"narrows {DOWN} after setting its weights"),
    ([seam(1, 2)], r"seam for decoder layers \[1\]: expected deleted layers, \[1\] remain"),
    ([DropLayers(layers=(1,)), seam(1, 1)], "adds a seam to decoder layer 1, which is deleted"),
]


@pytest.mark.parametrize(("bad", "message"), BAD)
def test_a_plan_that_does_not_fit_changes_nothing(bad: Sequence[Operation], message: str) -> None:
    view = DecoderView(tiny_model())
    good: list[Operation] = [factorize("model.layers.3.mlp.up_proj"), DropLayers(layers=(0,))]
    # The message about all layers counts those of the whole plan.
    operations = [*bad] if "drops all" in message else [good[0], *bad]
    tensors = random_factors(view, good) | random_factors(view, [factorize()])
    before = state(view.model)
    for call in (
        lambda: apply_operations(view, operations, tensors),
        lambda: parameters_after(view, operations),
    ):
        with pytest.raises(PlanError, match=message):
            call()
    assert before.keys() == view.model.state_dict().keys()
    assert view.layer_indices == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, f"factor {UP}.left is missing"),
        ({f"{UP}.left": torch.zeros(3, 48)}, r"left must have shape \(48, 3\), got \(3, 48\)"),
        ({f"{UP}.right": torch.zeros(4, 32)}, r"right must have shape \(3, 32\), got \(4, 32\)"),
        ({f"{UP}.right": torch.full((3, 32), torch.nan)}, "not finite in torch.float16"),
        ({f"{UP}.left": torch.full((48, 3), 1e30)}, "not finite in torch.float16"),
    ],
)
def test_factors_that_do_not_fit_change_nothing(
    change: dict[str, torch.Tensor], message: str
) -> None:
    view = DecoderView(in_dtype(tiny_model(), torch.float16))
    tensors = {f"{UP}.left": torch.zeros(48, 3), f"{UP}.right": torch.zeros(3, 32)}
    tensors = tensors | change if change else {}
    with pytest.raises(PlanError, match=message):
        apply_operations(view, [DropLayers(layers=(0,)), factorize()], tensors)
    assert view.layer_indices == (0, 1, 2, 3)


def test_a_linear_is_factorized_once_only() -> None:
    view = DecoderView(tiny_model())
    tensors = random_factors(view, [factorize()])
    apply_operations(view, [factorize()], tensors)
    with pytest.raises(PlanError, match="expected a Linear, the model has LowRankLinear"):
        apply_operations(view, [factorize()], tensors)
    with pytest.raises(PlanError, match="or was already replaced by factors"):
        apply_operations(view, [factorize(f"{UP}.left", rank=1)], {})


def test_a_model_quantized_otherwise_is_refused() -> None:
    view = DecoderView(tiny_model())
    view.model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(PlanError, match="the model is quantized with gptq"):
        apply_operations(view, [SelectLayers(layers=(0,))], {})


def test_a_weight_that_is_tied_to_one_that_stays_is_still_counted() -> None:
    view = DecoderView(tiny_model())
    modules = view.dense_modules(1)
    modules["model.layers.1.mlp.gate_proj"].weight = modules[UP].weight
    predicted = parameters_after(view, [factorize()])
    apply_operations(view, [factorize()], random_factors(view, [factorize()]))
    assert predicted == count_parameters(view.model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, f"weight {DOWN}.weight is missing"),
        ({f"{DOWN}.weight": torch.zeros(3, 32)}, r"must have shape \(32, 3\), got \(3, 32\)"),
        ({f"{DOWN}.weight": torch.full((32, 3), 1e30)}, "not finite in torch.float16"),
    ],
)
def test_a_weight_that_does_not_fit_changes_nothing(
    change: dict[str, torch.Tensor], message: str
) -> None:
    view = DecoderView(in_dtype(tiny_model(), torch.float16))
    operations: list[Operation] = [factorize("model.layers.3.mlp.up_proj"), narrow()]
    tensors = random_factors(view, operations)
    tensors = tensors | change if change else random_factors(view, operations[:1])
    before = state(view.model)
    with pytest.raises(PlanError, match=message):
        apply_operations(view, operations, tensors)
    assert before.keys() == view.model.state_dict().keys()


@pytest.mark.parametrize("family", ["opt", "gpt2", "phi3"])
def test_writers_keep_rows_of_every_part_and_the_reader_its_bias(family: str) -> None:
    view, dense = DecoderView(tiny_model(family)), DecoderView(tiny_model(family))
    operations, _ = narrow_layers(view, (1,), (5, 6, 40))
    (operation,) = operations
    assert isinstance(operation, NarrowMlp)
    before = view.module(operation.reader).bias
    tensors = random_factors(view, operations)
    apply_operations(view, operations, tensors)
    linears = narrowed_linears(view.model)
    assert set(linears) == {operation.reader, *operation.writers}
    reader, writer = linears[operation.reader], linears[operation.writers[0]]
    assert torch.equal(reader.weight, tensors[f"{operation.reader}.weight"])
    assert reader.bias is before
    old = dense.linears(1)[operation.writers[0]]
    rows = [5, 6, 40, 53, 54, 88] if family == "phi3" else [5, 6, 40]
    assert torch.equal(writer.weight, old.weight[rows])
    assert writer.weight.is_contiguous()
    if old.bias is not None:
        assert torch.equal(writer.bias, old.bias[rows])
    assert not view.dense_modules(1).keys() & linears.keys()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_training_state_of_an_mlp_is_kept(training: bool, requires_grad: bool) -> None:
    view = DecoderView(in_dtype(tiny_model(mlp_bias=True), torch.bfloat16))
    view.module("model.layers.1.mlp").train(training).requires_grad_(requires_grad)
    apply_operations(view, [narrow()], random_factors(view, [narrow()]))
    new = view.module("model.layers.1.mlp")
    assert {module.training for module in new.modules()} == {training}
    assert {(p.requires_grad, p.dtype) for p in new.parameters()} == {
        (requires_grad, torch.bfloat16)
    }


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_removed_attention_block_adds_its_bias_alone(family: str) -> None:
    view, layer = DecoderView(tiny_model(family)), 1
    mlp, attention = blocks(view, layer)
    assert mlp
    operation = RemoveBlock(block="attention", modules=attention)
    expected = parameters_after(view, [operation])
    assert expected == count_parameters(view.model) - sum(
        view.linears(layer)[name].weight.numel() for name in attention
    )
    writer = view.module(attention[-1])
    assert isinstance(writer, DenseModule)
    bias = torch.zeros(32) if writer.bias is None else writer.bias.detach().clone()
    apply_operations(view, [operation], {})
    assert count_parameters(view.model) == expected
    given: list[Tensor] = []
    module = view.module(attention[-1])
    module.register_forward_hook(lambda _, __, output: given.append(output))
    view.model(IDS)
    assert torch.equal(given[0], bias.expand_as(given[0]))


def test_a_narrowed_linear_cannot_be_replaced_again() -> None:
    view = DecoderView(tiny_model())
    apply_operations(view, [narrow()], random_factors(view, [narrow()]))
    for operation in (factorize(), narrow(channels=(0, 1))):
        with pytest.raises(PlanError, match="was already replaced by factors or narrowed"):
            apply_operations(view, [operation], {})


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_a_narrowed_model_has_the_predicted_size_also_without_weights(family: str) -> None:
    view, meta = DecoderView(tiny_model(family)), DecoderView(meta_model(family))
    operations, tensors = narrow_layers(view, (0, 1), (5, 6, 40))
    operations += [DropLayers(layers=(0, 3))]
    predicted = parameters_after(view, operations)
    assert parameters_after(meta, operations) == predicted
    for changed in (view, meta):
        apply_operations(changed, operations, tensors)
        assert count_parameters(changed.model) == predicted
    assert {k: v.shape for k, v in view.model.state_dict().items()} == {
        k: v.shape for k, v in meta.model.state_dict().items()
    }
    assert all(isinstance(m, NarrowedLinear) for m in narrowed_linears(view.model).values())


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_the_predicted_size_is_that_after_surgery(family: str) -> None:
    view, meta = DecoderView(tiny_model(family)), DecoderView(meta_model(family))
    operations, tensors = factorize_layers(view, (1, 3), rank=3)
    operations = [*operations, DropLayers(layers=(0, 3))]
    predicted = parameters_after(view, operations)
    assert parameters_after(meta, operations) == predicted
    apply_operations(view, operations, tensors)
    assert count_parameters(view.model) == predicted


@pytest.mark.parametrize("side", ["training", "requires_grad"])
def test_a_transposed_linear_hands_its_state_on_without_gradients(side: str) -> None:
    view, module = DecoderView(tiny_model("gpt2")), "transformer.h.1.mlp.c_fc"
    view.module(module).train(side == "training").requires_grad_(side == "requires_grad")
    with torch.no_grad():
        apply_operations(view, [factorize(module)], random_factors(view, [factorize(module)]))
    new = view.module(module)
    assert {module.training for module in new.modules()} == {side == "training"}
    assert {p.requires_grad for p in new.parameters()} == {side == "requires_grad"}


@pytest.mark.parametrize("part", ["gate", "shared_expert_gate", "shared_expert.up_proj", "experts"])
@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_a_plan_cannot_replace_a_part_of_a_mixture_of_experts(family: str, part: str) -> None:
    view = DecoderView(tiny_model(family))
    module = f"model.layers.1.mlp.{part}"
    with pytest.raises(PlanError, match=f"factorizes {module}"):
        apply_operations(view, [factorize(module, rank=1)], {})


def test_a_plan_that_drops_layers_which_compute_with_their_number_is_refused() -> None:
    view = DecoderView(tiny_model("gpt2", scale_attn_by_inverse_layer_idx=True))
    with pytest.raises(PlanError, match="the plan drops decoder layers: GPT2LMHeadModel has scale"):
        parameters_after(view, [DropLayers(layers=(0,))])
