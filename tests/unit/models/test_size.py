import pytest
import torch
from torch import nn

from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.lowrank import LowRankLinear, NarrowedLinear
from grasp_lightning.models.size import (
    ModelSize,
    count_decoder_linears,
    count_parameters,
    count_tied_parameters,
    measure_size,
)
from tests.conftest import ALL_FAMILIES, MOE_FAMILIES, VOCABULARY, tiny_model
from tests.unit.models.helpers import in_dtype, meta_model

# q, o: 32 x 32; k, v: 16 x 32; gate, up, down: 48 x 32.
LLAMA_LAYER = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32


def test_tied_embeddings_count_once() -> None:
    tied, untied = (tiny_model("llama", tie_word_embeddings=tie) for tie in (True, False))
    assert count_parameters(untied) - count_parameters(tied) == VOCABULARY * 32
    assert count_tied_parameters(untied) == 0
    assert count_tied_parameters(tied) == VOCABULARY * 32


def test_a_llama_has_the_parameters_of_its_shapes() -> None:
    view = DecoderView(tiny_model())
    assert count_decoder_linears(view) == 4 * LLAMA_LAYER
    norms = 4 * 2 * 32 + 32
    assert count_parameters(view.model) == 4 * LLAMA_LAYER + norms + 2 * VOCABULARY * 32


def test_biases_of_linears_count_but_norms_do_not() -> None:
    plain = count_decoder_linears(DecoderView(tiny_model()))
    biased = count_decoder_linears(DecoderView(tiny_model(mlp_bias=True)))
    assert biased - plain == 4 * (48 + 48 + 32)


def test_factors_count_in_place_of_the_dense_linear() -> None:
    view = DecoderView(tiny_model())
    view.set_module("model.layers.1.mlp.up_proj", LowRankLinear(32, 48, 5))
    assert count_decoder_linears(view) == 4 * LLAMA_LAYER - 48 * 32 + 5 * (48 + 32)


def test_narrowed_linears_count_with_what_is_left_of_them() -> None:
    view = DecoderView(tiny_model())
    view.set_module("model.layers.1.mlp.up_proj", NarrowedLinear(32, 20, bias=False))
    assert count_decoder_linears(view) == 4 * LLAMA_LAYER - 28 * 32


def test_dropped_layers_do_not_count() -> None:
    view = DecoderView(tiny_model())
    view.drop([0, 3])
    assert count_decoder_linears(view) == 2 * LLAMA_LAYER


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_the_meta_device_gives_the_same_counts(family: str) -> None:
    real, meta = tiny_model(family), meta_model(family)
    assert count_parameters(meta) == count_parameters(real) == real.num_parameters()
    assert count_decoder_linears(DecoderView(meta)) == count_decoder_linears(DecoderView(real))


def test_bytes_follow_the_dtype_or_the_element_size_asked_for() -> None:
    view = DecoderView(in_dtype(tiny_model(), torch.bfloat16))
    size = measure_size(view)
    linears = 4 * LLAMA_LAYER
    assert size == ModelSize(
        parameters=count_parameters(view.model),
        decoder_linear_parameters=linears,
        bytes=2 * count_parameters(view.model),
        decoder_linear_bytes=2 * linears,
    )
    assert measure_size(view, element_size=4).decoder_linear_bytes == 4 * linears


def test_a_parameter_shared_by_two_modules_counts_once() -> None:
    first, second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    second.weight = first.weight
    assert count_parameters(nn.ModuleList([first, second])) == 9


def test_a_transposed_linear_counts_before_and_after() -> None:
    view = DecoderView(tiny_model("gpt2"))
    layer = 32 * 96 + 96 + 32 * 32 + 32 + 32 * 48 + 48 + 48 * 32 + 32
    assert count_decoder_linears(view) == 4 * layer
    view.set_module("transformer.h.1.mlp.c_fc", LowRankLinear(32, 48, 5, bias=True))
    assert count_decoder_linears(view) == 4 * layer - 48 * 32 + 5 * (48 + 32)


@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_experts_and_routers_are_not_decoder_linears(family: str) -> None:
    view = DecoderView(tiny_model(family))
    attention = [
        parameter.numel()
        for name, parameter in view.model.named_parameters()
        if ".self_attn." in name and "_norm." not in name
    ]
    assert count_decoder_linears(view) == sum(attention)


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "gemma3_text", "falcon", "bloom"])
def test_families_with_tied_embeddings_count_them_once(family: str) -> None:
    model = tiny_model(family)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    untied = tiny_model(family, tie_word_embeddings=False)
    assert count_parameters(untied) - count_parameters(model) == VOCABULARY * 32
