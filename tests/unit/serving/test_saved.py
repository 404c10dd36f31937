import pytest

from grasp_lightning.models.lowrank import config_of
from grasp_lightning_vllm.saved import read_config
from tests.conftest import tiny_model


def test_what_the_package_writes_can_be_read() -> None:
    config = {**config_of(tiny_model()).to_dict(), "ranks": {"a": 0}, "shapes": {"b": [3, 4]}}
    saved = read_config(config)
    assert (saved.ranks, saved.shapes) == ({"a": 0}, {"b": (3, 4)})
    assert "a" in saved
    assert "c" not in saved


def test_a_newer_format_is_refused_in_one_line() -> None:
    message = r"unknown keys.*newer.*update grasp-lightning-vllm"
    with pytest.raises(ValueError, match=message) as found:
        read_config({"quant_method": "grasp_lightning", "ranks": {}, "groups": {}})
    assert "\n" not in str(found.value)


def test_quantized_weights_are_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match="quantized with torchao, which this plugin does not"):
        read_config({"weights": {"quant_method": "torchao"}})


def test_seams_are_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"has seams .*, which vLLM does not compute") as found:
        read_config({"ranks": {}, "seams": {"model.layers.1.seam": "model.layers.1.norm.weight"}})
    assert "\n" not in str(found.value)


def test_removed_heads_and_added_biases_are_refused_in_one_line() -> None:
    heads = {"shapes": {"model.layers.1.self_attn.k_proj": [8, 32]}}
    with pytest.raises(ValueError, match=r"k_proj has lost attention heads, and vLLM needs the"):
        read_config(heads)
    reader = "model.layers.1.mlp.down_proj"
    with pytest.raises(ValueError, match=r"has biases that compression has added .*flap"):
        read_config({"shapes": {reader: [32, 20]}, "biases": [reader]})


def test_sliced_hidden_states_are_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"has sliced hidden states .*, which vLLM") as found:
        read_config({"ranks": {}, "stream": {"width": 32, "size": 20}})
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        ({"ranks": {"a": -1}}, "rank of a must be an integer of at least 0, got -1"),
        ({"ranks": {"a": True}}, "rank of a must be an integer of at least 0, got True"),
        ({"shapes": {"a": [3]}}, r"shape of a must be two positive integers, got \[3\]"),
        ({"ranks": {"a": 1}, "shapes": {"a": [3, 4]}}, "a has both a rank and a shape"),
        ({"ranks": ["a"]}, r"ranks of quantization_config must be a mapping, got \['a'\]"),
    ],
)
def test_a_damaged_config_is_refused(damaged: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_config(damaged)


def test_narrowed_experts_are_refused() -> None:
    with pytest.raises(ValueError, match="narrowed experts, which this plugin does not read"):
        read_config({"ranks": {}, "experts": {"model.layers.0.mlp.experts": 8}})


def test_rows_of_factors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"lm_head of this model consists of factors .*, which"):
        read_config({"ranks": {}, "rows": {"lm_head": {"tied_to": "model.embed_tokens"}}})
