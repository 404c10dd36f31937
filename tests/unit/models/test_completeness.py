import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from grasp_lightning.errors import ModelError
from grasp_lightning.models.completeness import check_config_builds
from grasp_lightning.models.loading import load_meta_model, load_model
from grasp_lightning.models.lowrank import LowRankLinear
from tests.conftest import byte_tokenizer, tiny_model
from tests.unit.models.loading_helpers import cpu, message

_TEXT = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
_VISION = {"hidden_size": 24, "intermediate_size": 32, "patch_size": 14}


def qwen() -> PreTrainedModel:
    linear = {"linear_num_value_heads": 4, "linear_num_key_heads": 2}
    heads = {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
    vision = {"depth": 2, "num_heads": 2, "out_hidden_size": 32, "num_position_embeddings": 16}
    return transformers.Qwen3_5ForConditionalGeneration(
        transformers.Qwen3_5Config(
            text_config={**_TEXT, **linear, **heads}, vision_config={**_VISION, **vision}
        )
    )


def llama4() -> PreTrainedModel:
    experts = {"intermediate_size_mlp": 64, "num_local_experts": 2, "num_experts_per_tok": 1}
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    outputs = ("vision_output_dim", "projector_input_dim", "projector_output_dim")
    vision = {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28}
    return transformers.Llama4ForConditionalGeneration(
        transformers.Llama4Config(
            text_config={**_TEXT, **experts, **ends},
            vision_config={**_VISION, **vision, **dict.fromkeys(outputs, 24)},
        )
    )


@pytest.mark.parametrize(
    ("build", "loaded_as", "left_out"),
    [
        (qwen, "Qwen3_5ForCausalLM", "model.visual"),
        (llama4, "Llama4ForCausalLM", "multi_modal_projector, vision_model"),
    ],
)
def test_what_is_left_out_of_a_model_with_vision_is_named_with_its_share(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    build: Callable[[], PreTrainedModel],
    loaded_as: str,
    left_out: str,
) -> None:
    whole = build()
    whole.save_pretrained(tmp_path)
    # An architecture that no auto class opens, so that only the language model can be loaded.
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = [f"Custom{type(whole).__name__}"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    byte_tokenizer().save_pretrained(tmp_path)
    caplog.clear()

    loaded = load_model(cpu(tmp_path)).model

    sizes = [sum(p.numel() for p in model.parameters()) for model in (loaded, whole)]
    share = 1 - sizes[0] / sizes[1]
    assert [record.getMessage() for record in caplog.records] == [
        (
            f"{tmp_path.name} is a Custom{type(whole).__name__}, loaded as {loaded_as}: the "
            f"result is a text-only model without {left_out} ({share:.1%} of its parameters); "
            "all sizes and shares refer to the loaded part"
        )
    ]
    caplog.clear()
    load_meta_model(cpu(tmp_path), warns=True)
    assert f"without the other parts of a Custom{type(whole).__name__}" in caplog.text


def test_an_adapter_is_to_be_merged_first(tiny_folder: Path, tmp_path: Path) -> None:
    adapter = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    adapter.save_pretrained(str(tiny_folder))
    adapter.save_pretrained(str(tmp_path / "alone"))

    text = message(cpu(tiny_folder))
    assert "tiny-llama has a PEFT adapter next to the model: merge it first, with peft." in text
    assert ".merge_and_unload(), or move adapter_config.json elsewhere" in text
    text = message(cpu(tmp_path / "alone"))
    assert "alone is a PEFT adapter without its base model: merge it first, with peft." in text
    assert "AutoPeftModelForCausalLM.from_pretrained(" in text


def test_a_module_that_the_config_does_not_build_is_refused() -> None:
    model = tiny_model()
    model.set_submodule("model.layers.1.mlp.up_proj", LowRankLinear(32, 48, 3))
    check_config_builds("tiny", model)

    class Scaled(nn.Linear):
        pass

    model.set_submodule("model.layers.2.mlp.up_proj", Scaled(32, 48, bias=False))
    expected = "tiny has Scaled at model.layers.2.mlp.up_proj, where its config.json builds Linear"
    with pytest.raises(ModelError, match=expected):
        check_config_builds("tiny", model)


def test_weights_that_a_family_always_leaves_out_are_named(
    tiny_folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    model.register_module("mtp", nn.Linear(32, 600, bias=False))
    model.register_buffer("inv_freq", torch.zeros(4))
    model.save_pretrained(tiny_folder)
    patterns = [r"^mtp.*", "inv_freq"]
    monkeypatch.setattr(type(model), "_keys_to_ignore_on_load_unexpected", patterns)

    with caplog.at_level(logging.WARNING):
        load_model(cpu(tiny_folder))

    (record,) = caplog.records
    assert "has weights that the model does not use: mtp.weight (" in record.getMessage()
