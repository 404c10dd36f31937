import logging
import warnings
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from grasp_lightning.config import LoraSettings, TrainMode
from grasp_lightning.errors import ConfigError, ModelError, NumericsError
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.lowrank import low_rank_linears, narrowed_linears, ranks_of, shapes_of
from grasp_lightning.models.surgery import apply_operations
from grasp_lightning.plan import MergeLayers, Plan, SetWeights
from grasp_lightning.training.compensation import (
    make_trainable,
    merge_adapters,
    resolve_targets,
    rewritten_parameters,
    trainable_linears,
)
from tests.conftest import tiny_model
from tests.unit.models.helpers import factorize_layers, in_dtype, narrow_layers

FAMILIES = ["llama", "gpt2", "opt", "gpt_neox", "phi3", "mixtral"]
MODES: list[TrainMode] = ["lora", "factors", "lora_on_factors"]
LORA = LoraSettings(rank=3, alpha=6.0, dropout=0.5)
RANK = 8  # of the low-rank linears, so that adapters of rank 3 fit
IDS = torch.arange(24).reshape(2, 12) * 7 % 256


def compressed(family: str = "llama", layers: Sequence[int] = (1,)) -> DecoderView:
    """A tiny model in which all linears of some layers are low-rank."""
    view = DecoderView(tiny_model(family))
    apply_operations(view, *factorize_layers(view, layers, RANK))
    return view


def linears_in_layers(view: DecoderView) -> list[str]:
    """Names of all linears of decoder layers outside experts, in module order."""
    return [
        name
        for name, module in view.model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
        and name.startswith(view.layers_name)
        and not (view.model.config.model_type == "mixtral" and ".mlp." in name)
    ]


def factors(view: DecoderView) -> list[str]:
    return [name for name in linears_in_layers(view) if name.endswith((".left", ".right"))]


def trainable_names(model: PreTrainedModel) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        scores: Tensor = model(IDS).logits
    return scores


def fill_adapters(model: PreTrainedModel) -> None:
    """Give adapters values as large as those of the weights, so that they change the logits."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.15


def adapter(model: PreTrainedModel, module: str) -> tuple[Tensor, Tensor]:
    """The two matrices of the adapter on a linear: (N, r), (r, M)."""
    left = model.get_parameter(f"{module}.lora_B.default.weight")
    right = model.get_parameter(f"{module}.lora_A.default.weight")
    return left.detach(), right.detach()


# What is trained


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("train", ["lora", "lora_on_factors"])
def test_adapters_alone_are_trained_on_every_linear_or_on_factors_only(
    family: str, train: TrainMode
) -> None:
    view = compressed(family)
    expected = linears_in_layers(view) if train == "lora" else factors(view)
    shapes = {name: view.model.get_parameter(f"{name}.weight").shape for name in expected}

    trained = make_trainable(view, train, LORA)

    assert trained.modules == tuple(expected)
    assert sorted(trainable_names(view.model)) == sorted(
        f"{name}.lora_{part}.default.weight" for name in expected for part in "AB"
    )
    assert trained.num_parameters == sum(LORA.rank * sum(shape) for shape in shapes.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_factors_are_trained_themselves_without_their_biases(family: str) -> None:
    view = compressed(family)
    expected = factors(view)

    trained = make_trainable(view, "factors", LORA)

    assert expected
    assert trained.modules == tuple(expected)
    assert trained.adapters is None
    assert trainable_names(view.model) == [f"{name}.weight" for name in expected]
    assert trained.num_parameters == sum(
        linear.left.weight.numel() + linear.right.weight.numel()
        for linear in low_rank_linears(view.model).values()
    )


@pytest.mark.parametrize("train", MODES)
def test_targets_choose_what_is_trained(train: TrainMode) -> None:
    view = compressed()

    make_trainable(view, train, LoraSettings(rank=2, targets=("mlp.down_proj",)))

    weights = trainable_names(view.model)
    assert all(".mlp.down_proj." in name for name in weights)
    of_mode = {"lora": 2 * 5, "factors": 2, "lora_on_factors": 2 * 2}  # 3 dense ones, 2 factors
    assert len(weights) == of_mode[train]


def test_linears_of_a_model_that_has_lost_a_layer_go_by_their_present_names() -> None:
    view = compressed(layers=(2,))
    view.drop([0])

    linears = trainable_linears(view, "lora", ("q_proj",))

    modules = dict(view.model.named_modules())
    assert list(linears) == [
        f"model.layers.{layer}.self_attn.q_proj" + factor
        for layer, factor in ((0, ""), (1, ".right"), (1, ".left"), (2, ""))
    ]
    assert all(modules[name] is linear for name, linear in linears.items())


def test_parts_of_a_mixture_of_experts_that_get_no_adapters_are_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    make_trainable(DecoderView(tiny_model("mixtral")), "lora", LORA)

    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "MixtralForCausalLM is a mixture of experts: mlp" in record.getMessage()


@pytest.mark.parametrize("train", ["factors", "lora_on_factors"])
def test_a_dense_model_has_no_factors_to_train(train: TrainMode) -> None:
    with pytest.raises(ModelError) as caught:
        make_trainable(DecoderView(tiny_model()), train, LORA)
    assert str(caught.value) == (
        f"train: {train} needs a model with low-rank linears, and this one has none: give the "
        "model/ folder of a compressed model, or use train: lora or all"
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi3"])
@pytest.mark.parametrize("train", MODES)
def test_narrowed_linears_are_trained_as_factors_are(family: str, train: TrainMode) -> None:
    view = compressed(family)
    model = view.model
    apply_operations(view, *narrow_layers(view, (2,), range(0, 40, 2)))
    narrowed = list(narrowed_linears(model))
    expected = linears_in_layers(view)
    if train != "lora":
        expected = [n for n in expected if n in narrowed or n.endswith((".left", ".right"))]
    before, shapes = logits(model), shapes_of(model)

    trained = make_trainable(view, train, LORA)

    assert narrowed
    assert trained.modules == tuple(expected)
    assert torch.equal(logits(model), before)
    if train == "factors":
        assert trainable_names(model) == [f"{name}.weight" for name in expected]
        return
    fill_adapters(model)
    unmerged = logits(model)
    merge_adapters(trained)
    torch.testing.assert_close(logits(model), unmerged, rtol=1e-4, atol=1e-4)
    assert shapes_of(model) == shapes


def test_narrowed_linears_alone_can_be_trained() -> None:
    view = DecoderView(tiny_model())
    apply_operations(view, *narrow_layers(view, (2,), range(0, 40, 2)))
    trained = make_trainable(view, "factors", LORA)
    assert trained.modules == tuple(
        f"model.layers.2.mlp.{name}_proj" for name in ("gate", "up", "down")
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_all_trains_every_parameter_of_the_decoder_layers_and_no_other(family: str) -> None:
    view = compressed(family)
    names = [name for name, _ in view.model.named_parameters()]
    trained = make_trainable(view, "all", LORA)
    inside = [name for name in names if name.startswith(f"{view.layers_name}.")]
    assert trainable_names(view.model) == inside
    assert any("norm" in name or "ln_" in name for name in inside)
    assert trained.adapters is None
    assert trained.num_parameters == sum(
        parameter.numel() for layer in range(4) for parameter in view.layer(layer).parameters()
    )


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_replaced_trains_what_compression_replaced_set_or_merged(family: str) -> None:
    view = DecoderView(tiny_model(family))
    layers = f"{view.layers_name}."
    norm = "input_layernorm" if family == "llama" else "self_attn_layer_norm"
    factorized, tensors = factorize_layers(view, [1], RANK)
    apply_operations(view, factorized, tensors)
    apply_operations(view, *narrow_layers(view, (2,), range(0, 40, 2)))
    view.drop([0])
    plan = Plan(
        method="made up",
        operations=(
            *factorized,
            SetWeights(module=f"{layers}2", parameters=(f"{norm}.weight",)),
            SetWeights(module=f"{layers}1.self_attn.q_proj", parameters=("weight",)),
            MergeLayers(base=3, absorbed=(0,), rule="paper"),
        ),
    )
    present = DecoderView(view.model)  # layers 1, 2, 3 are now 0, 1, 2
    rewritten = rewritten_parameters(present, plan)

    make_trainable(present, "replaced", LORA, rewritten)

    linears = ("fc1", "fc2") if family == "opt" else ("mlp.",)
    whole = (f"{layers}2.", f"{layers}1.{norm}.weight", *(f"{layers}1.{x}" for x in linears))
    expected = [
        name
        for name, _ in view.model.named_parameters()
        if name.startswith(whole) or ".left." in name or ".right." in name
    ]
    assert trainable_names(view.model) == expected
    assert any(name.endswith(".left.bias") for name in expected) == (family == "opt")


def test_a_plan_of_another_model_is_refused() -> None:
    operations, _ = factorize_layers(DecoderView(tiny_model()), [2], RANK)
    with pytest.raises(ModelError, match=r"belongs to another model: its low-rank linears differ"):
        rewritten_parameters(compressed(), Plan(method="x", operations=tuple(operations)))


def test_nothing_replaced_is_an_error_that_names_another_mode() -> None:
    with pytest.raises(ModelError, match=r"^train: replaced needs .* or use train: all$"):
        make_trainable(DecoderView(tiny_model()), "replaced", LORA)


# Adapters


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("train", MODES)
def test_a_model_computes_what_it_did_before_the_first_step(family: str, train: TrainMode) -> None:
    view = compressed(family)
    before = logits(view.model)

    make_trainable(view, train, LORA)

    assert torch.equal(logits(view.model), before)


def test_adapters_start_from_the_global_seed() -> None:
    drawn = []
    for seed in (3, 3, 4):
        view = compressed()
        torch.manual_seed(seed)
        make_trainable(view, "lora", LORA)
        drawn.append(adapter(view.model, "model.layers.0.self_attn.q_proj")[1])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_dropout_follows_the_mode_of_the_model() -> None:
    view = compressed()
    make_trainable(view, "lora", LORA)
    fill_adapters(view.model)
    evaluated = logits(view.model)
    assert torch.equal(logits(view.model), evaluated)

    view.model.train()

    assert not torch.equal(logits(view.model), evaluated)


@pytest.mark.parametrize("train", ["lora", "lora_on_factors"])
def test_adapters_on_a_model_in_low_precision_are_in_float32(train: TrainMode) -> None:
    view = compressed()
    in_dtype(view.model, torch.bfloat16)
    before = logits(view.model)

    make_trainable(view, train, LORA)

    types = {
        (".lora_" in name, parameter.dtype) for name, parameter in view.model.named_parameters()
    }
    assert types == {(True, torch.float32), (False, torch.bfloat16)}
    assert torch.equal(logits(view.model), before)


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (
            64,
            (
                "lora.rank 64 is more than half the smaller dimension of 35 of 35 linears and "
                "is capped there (at 4 to 16)"
            ),
        ),
        (
            5,
            (
                "lora.rank 5 is more than half the smaller dimension of 14 of 35 linears and "
                "is capped there (at 4 to 4)"
            ),
        ),
    ],
)
def test_a_rank_is_capped_at_half_the_smaller_side_and_the_scale_stays(
    rank: int, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    view = compressed()  # 3 dense layers of 7 linears, and 7 low-rank linears of rank 8
    trained = make_trainable(view, "lora", LoraSettings(rank=rank, alpha=16.0))
    model = view.model

    ranks = {name: len(adapter(model, name)[1]) for name in trained.modules}
    sides = {name: min(adapter(model, name)[k].shape[k] for k in (0, 1)) for name in ranks}
    assert ranks == {name: min(rank, side // 2) for name, side in sides.items()}
    assert [record.getMessage() for record in caplog.records] == [message]
    fill_adapters(model)
    name = "model.layers.0.self_attn.k_proj"  # (16, 32)
    left, right = adapter(model, name)
    weight = model.get_parameter(f"{name}.base_layer.weight").clone()
    merge_adapters(trained)
    merged = model.get_parameter(f"{name}.weight")
    torch.testing.assert_close(merged, weight + 16 / rank * left @ right)


def test_a_linear_of_rank_1_gets_an_adapter_of_rank_1() -> None:
    view = DecoderView(tiny_model())
    apply_operations(view, *factorize_layers(view, [1], 1))

    trained = make_trainable(view, "lora_on_factors", LoraSettings(rank=4))

    assert {len(adapter(view.model, name)[1]) for name in trained.modules} == {1}


def test_a_rank_that_fits_everywhere_causes_no_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    make_trainable(compressed(), "lora", LoraSettings(rank=RANK // 2))
    assert not caplog.records


def test_transposed_linears_next_to_ordinary_ones_cause_no_warning() -> None:
    view = compressed("gpt2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_trainable(view, "lora", LORA)


# Merging


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("train", ["lora", "lora_on_factors"])
def test_a_merged_model_computes_the_same_with_the_modules_it_had(
    family: str, train: TrainMode
) -> None:
    view = compressed(family)
    model = view.model
    modules = {name: type(module) for name, module in model.named_modules()}
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    ranks, before = ranks_of(model), logits(model)
    trained = make_trainable(view, train, LORA)
    fill_adapters(model)
    unmerged = logits(model)

    merge_adapters(trained)

    largest = unmerged.abs().max()
    assert (unmerged - before).abs().max() > 0.01 * largest
    assert (logits(model) - unmerged).abs().max() <= 1e-5 * largest
    assert {name: type(module) for name, module in model.named_modules()} == modules
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == shapes
    assert ranks_of(model) == ranks != {}


@pytest.mark.parametrize("train", ["lora", "lora_on_factors"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_each_factor_takes_up_its_own_adapter(family: str, train: TrainMode) -> None:
    view = compressed(family)
    trained = make_trainable(view, train, LORA)
    fill_adapters(view.model)
    scale = LORA.alpha / LORA.rank
    before, products = {}, {}
    for name in factors_of(trained.modules):
        left, right = adapter(view.model, name)
        before[name] = view.model.get_parameter(f"{name}.base_layer.weight").detach().clone()
        products[name] = scale * left @ right

    merge_adapters(trained)

    linears = low_rank_linears(view.model)
    assert len(products) == 2 * len(linears) > 0
    for name, linear in linears.items():
        for factor, merged in (("left", linear.left), ("right", linear.right)):
            key = f"{name}.{factor}"
            torch.testing.assert_close(merged.weight, before[key] + products[key])


def factors_of(modules: Sequence[str]) -> list[str]:
    return [name for name in modules if name.rpartition(".")[2] in ("left", "right")]


@pytest.mark.parametrize(
    ("family", "name"),
    [("llama", "model.layers.0.mlp.up_proj"), ("gpt2", "transformer.h.0.mlp.c_fc")],
)
def test_a_dense_linear_takes_up_its_adapter(family: str, name: str) -> None:
    view = compressed(family)
    trained = make_trainable(view, "lora", LORA)
    fill_adapters(view.model)
    left, right = adapter(view.model, name)
    product = LORA.alpha / LORA.rank * left @ right
    before = view.model.get_parameter(f"{name}.base_layer.weight").detach().clone()

    merge_adapters(trained)

    is_transposed = family == "gpt2"
    merged = view.model.get_parameter(f"{name}.weight")
    torch.testing.assert_close(merged, before + (product.mT if is_transposed else product))


@pytest.mark.parametrize("train", ["lora", "lora_on_factors"])
def test_a_merged_model_in_low_precision_keeps_its_precision(train: TrainMode) -> None:
    view = compressed()
    in_dtype(view.model, torch.bfloat16)
    trained = make_trainable(view, train, LORA)
    fill_adapters(view.model)
    name = "model.layers.1.mlp.up_proj.left"
    left, right = adapter(view.model, name)
    before = view.model.get_parameter(f"{name}.base_layer.weight").float()

    merge_adapters(trained)

    assert {parameter.dtype for parameter in view.model.parameters()} == {torch.bfloat16}
    merged = view.model.get_parameter(f"{name}.weight").float()
    expected = before + LORA.alpha / LORA.rank * left @ right
    torch.testing.assert_close(merged, expected, rtol=2**-7, atol=2**-8)


def test_factors_that_were_trained_themselves_have_nothing_to_merge() -> None:
    view = compressed()
    trained = make_trainable(view, "factors", LORA)
    before = {name: parameter.clone() for name, parameter in view.model.named_parameters()}

    merge_adapters(trained)

    after = dict(view.model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_is_not_merged(value: float) -> None:
    view = compressed()
    trained = make_trainable(view, "lora", LORA)
    view.model.get_parameter("model.layers.2.mlp.up_proj.lora_B.default.weight").data[0, 0] = value

    with pytest.raises(NumericsError) as caught:
        merge_adapters(trained)

    line = str(caught.value)
    assert line.startswith("training diverged to NaN or infinity: ")
    assert line.endswith("; lower optimizer.learning_rate")
    assert "\n" not in line


# Targets

NAMES = [
    *("layers.0.self_attn.q_proj", "layers.0.self_attn.v_proj", "layers.0.mlp.down_proj"),
    *("layers.1.self_attn.q_proj.right", "layers.1.self_attn.q_proj.left"),
    "layers.1.mlp.down_proj",
]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ((), range(6)),
        (("q_proj",), (0, 3, 4)),
        (("self_attn.q_proj",), (0, 3, 4)),
        (("down_proj", "v_proj"), (1, 2, 5)),
        (("v_proj", "v_proj"), (1,)),
        (("1.self_attn.q_proj",), (3, 4)),
        (("layers.1.self_attn.q_proj",), (3, 4)),
        (("layers.1.self_attn.q_proj.left",), (4,)),
        (("q_proj.right",), (3,)),
        (("left",), (4,)),
        (("layers.0.mlp.down_proj",), (2,)),
    ],
)
def test_a_target_is_the_end_of_a_name_from_a_dot_on(
    targets: tuple[str, ...], expected: Sequence[int]
) -> None:
    assert resolve_targets(NAMES, targets) == tuple(NAMES[index] for index in expected)


def test_a_linear_that_has_the_very_name_is_the_only_one_that_is_meant() -> None:
    assert resolve_targets(("a.fc1", "a.up_proj"), ("up_proj",)) == ("a.up_proj",)
    assert resolve_targets(("a.fc1", "a.fc2"), ("up_proj",)) == ("a.fc1",)


@pytest.mark.parametrize("target", ["proj", "gate_proj", "self_attn", "layers.2.mlp.down_proj", ""])
def test_a_target_that_matches_nothing_is_an_error_that_names_the_linears(target: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_targets(NAMES, ("q_proj", target))
    assert str(caught.value) == (
        f"lora.targets: no linear matches {target!r}; the linears are: down_proj, q_proj, v_proj"
    )


@pytest.mark.parametrize(
    ("family", "names"),
    [
        (
            "phi3",
            {
                **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "self_attn.qkv_proj"),
                "o_proj": "self_attn.o_proj",
                **dict.fromkeys(("gate_proj", "up_proj"), "mlp.gate_up_proj"),
                "down_proj": "mlp.down_proj",
            },
        ),
        (
            "gpt_neox",
            {
                **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "attention.query_key_value"),
                "o_proj": "attention.dense",
                "up_proj": "mlp.dense_h_to_4h",
                "down_proj": "mlp.dense_4h_to_h",
            },
        ),
        (
            "gpt2",
            {
                **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "attn.c_attn"),
                "o_proj": "attn.c_proj",
                "up_proj": "mlp.c_fc",
                "down_proj": "mlp.c_proj",
            },
        ),
        (
            "opt",
            {
                "q_proj": "self_attn.q_proj",
                "o_proj": "self_attn.out_proj",
                "up_proj": "fc1",
                "down_proj": "fc2",
            },
        ),
        (
            "bloom",
            {
                "q_proj": "self_attention.query_key_value",
                "o_proj": "self_attention.dense",
                "up_proj": "mlp.dense_h_to_4h",
                "down_proj": "mlp.dense_4h_to_h",
            },
        ),
    ],
)
def test_the_usual_names_find_linears_that_a_family_fuses_or_calls_otherwise(
    family: str, names: dict[str, str]
) -> None:
    view = compressed(family)
    layers = view.layers_name
    for target, name in names.items():
        assert list(trainable_linears(view, "lora", (target,))) == [
            f"{layers}.0.{name}",
            f"{layers}.1.{name}.right",
            f"{layers}.1.{name}.left",
            f"{layers}.2.{name}",
            f"{layers}.3.{name}",
        ], target


def test_a_usual_name_that_a_family_has_no_linear_for_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"no linear matches 'gate_proj'; .*: fc1, fc2, k_proj,"):
        make_trainable(compressed("opt"), "lora", LoraSettings(targets=("gate_proj",)))


def test_a_target_that_was_not_compressed_is_not_a_factor() -> None:
    view = DecoderView(tiny_model())
    operations, tensors = factorize_layers(view, [1], RANK)
    apply_operations(view, operations[:1], tensors)  # its q_proj
    with pytest.raises(ConfigError, match=r"no linear matches 'up_proj'; the linears are: q_proj$"):
        make_trainable(view, "factors", LoraSettings(targets=("up_proj",)))
