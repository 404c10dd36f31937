"""Language models inside wrappers with images: compressed in place, and saved as the wrapper."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel

from grasp_lightning.cli import main
from grasp_lightning.models.checkpoint import save_model
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.lowrank import low_rank_linears
from grasp_lightning.models.surgery import apply_operations
from grasp_lightning.plan import FactorizeLinear
from tests.conftest import byte_tokenizer

_IMAGE = 200  # the token that stands for a piece of an image
_TEXT = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_SECTIONS = {**_ROPE, "mrope_section": [2, 3, 3]}
_SMALL_HEADS = {"head_dim": 8, "rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]}}

Inputs = Mapping[str, Tensor]


def gemma3() -> tuple[transformers.PreTrainedConfig, Inputs]:
    config = transformers.Gemma3Config(
        text_config={**_TEXT, "sliding_window": 8},
        vision_config=_VISION,
        mm_tokens_per_image=1,
        image_token_index=_IMAGE,
    )
    ids = prompt(1)
    inputs = {"pixel_values": torch.randn(1, 3, 28, 28), "token_type_ids": (ids == _IMAGE).long()}
    return config, {"input_ids": ids, **inputs}


def llava() -> tuple[transformers.PreTrainedConfig, Inputs]:
    config = transformers.LlavaConfig(
        text_config={"model_type": "llama", **_TEXT},
        vision_config={"model_type": "clip_vision_model", **_VISION},
        image_token_index=_IMAGE,
    )
    return config, {"input_ids": prompt(4), "pixel_values": torch.randn(1, 3, 28, 28)}


def qwen3_vl() -> tuple[transformers.PreTrainedConfig, Inputs]:
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 40, "num_heads": 2}
    vision |= {"patch_size": 14, "out_hidden_size": 32, "num_position_embeddings": 16}
    config = transformers.Qwen3VLConfig(
        text_config={**_TEXT, "rope_parameters": _SECTIONS},
        vision_config={**vision, "deepstack_visual_indexes": [0]},
        image_token_id=_IMAGE,
    )
    return config, _patches()


def _patches() -> Inputs:
    """Return a prompt with an image of four patches, as Qwen's models read it."""
    ids = prompt(1)
    patch = 3 * 2 * 14**2  # colors, frames and pixels
    image = {"pixel_values": torch.randn(4, patch), "image_grid_thw": torch.tensor([[1, 2, 2]])}
    return {"input_ids": ids, "mm_token_type_ids": (ids == _IMAGE).int(), **image}


def qwen2_vl() -> tuple[transformers.PreTrainedConfig, Inputs]:
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 1}
    config = transformers.Qwen2VLConfig(
        text_config={**_TEXT, **_SMALL_HEADS},
        vision_config={**vision, "patch_size": 14},
        image_token_id=_IMAGE,
    )
    return config, _patches()


def qwen2_5_vl() -> tuple[transformers.PreTrainedConfig, Inputs]:
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 40, "num_heads": 2}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**_TEXT, **_SMALL_HEADS},
        vision_config={**vision, "out_hidden_size": 32, "fullatt_block_indexes": [1]},
        image_token_id=_IMAGE,
    )
    return config, _patches()


def mistral3() -> tuple[transformers.PreTrainedConfig, Inputs]:
    config = transformers.Mistral3Config(
        text_config={"model_type": "mistral", **_TEXT},
        vision_config={"model_type": "pixtral", **_VISION, "image_size": 56},
        image_token_index=_IMAGE,
    )
    image = {"pixel_values": torch.randn(1, 3, 56, 56), "image_sizes": torch.tensor([[56, 56]])}
    return config, {"input_ids": prompt(4), **image}


def llama4() -> tuple[transformers.PreTrainedConfig, Inputs]:
    experts = {"num_local_experts": 4, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 48}
    config = transformers.Llama4Config(
        text_config={**_TEXT, **experts},
        vision_config={
            **_VISION,
            "intermediate_size": 128,  # four patches of 32 channels become one token
            "projector_input_dim": 32,
            "projector_output_dim": 32,
            "vision_output_dim": 32,
        },
        image_token_index=_IMAGE,
    )
    return config, {"input_ids": prompt(1), "pixel_values": torch.randn(1, 3, 28, 28)}


def prompt(length: int) -> Tensor:
    """Return token ids, of which some stand for an image."""
    ids = torch.arange(12)[None].clone()
    ids[0, 3 : 3 + length] = _IMAGE
    return ids


FAMILIES = (gemma3, llava, qwen2_vl, qwen2_5_vl, qwen3_vl, mistral3, llama4)
Family = Callable[[], tuple[transformers.PreTrainedConfig, Inputs]]


def built(family: Family) -> tuple[PreTrainedModel, Inputs]:
    torch.manual_seed(0)
    config, inputs = family()
    build: Any = AutoModelForImageTextToText.from_config  # Any: untyped in transformers
    model: PreTrainedModel = build(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    return model.eval(), inputs


def opened(folder: Path, **options: object) -> PreTrainedModel:
    load: Any = AutoModelForImageTextToText.from_pretrained  # Any: its type ignores the report
    model, report = load(folder, output_loading_info=True, **options)
    assert not any(report.values())
    found: PreTrainedModel = model.eval()
    return found


@torch.no_grad()
def logits(model: PreTrainedModel, inputs: Inputs) -> Tensor:
    run: Any = model  # Any: outputs of every family
    found: Tensor = run(**inputs).logits
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_gives_the_same_output_at_full_rank(family: Family, tmp_path: Path) -> None:
    model, inputs = built(family)
    before = logits(model, inputs)
    bright = {**inputs, "pixel_values": 2 * inputs["pixel_values"]}
    assert not torch.allclose(logits(model, bright), before)  # the image matters
    view = DecoderView(model)
    names = [name for name in view.all_linears() if name.endswith("up_proj")]
    operations = [FactorizeLinear(module=name, rank=32, components=None) for name in names]
    factors: dict[str, Tensor] = {}
    for name in names:
        u, s, vh = torch.linalg.svd(view.linears(view.layer_of(name) or 0)[name].weight, False)
        factors |= {f"{name}.left": u * s.sqrt(), f"{name}.right": s.sqrt()[:, None] * vh}
    apply_operations(view, operations, factors)
    save_model(model, tmp_path / "saved", tokenizer=byte_tokenizer())
    saved = opened(tmp_path / "saved")
    assert type(saved) is type(model)
    assert sorted(low_rank_linears(saved)) == sorted(names)
    torch.testing.assert_close(logits(saved, inputs), before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(saved, inputs), logits(model, inputs))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_language_model_of_a_wrapper_is_compressed(family: Family, tmp_path: Path) -> None:
    model, inputs = built(family)
    source, run = tmp_path / "source", tmp_path / "run"
    model.save_pretrained(source)
    byte_tokenizer().save_pretrained(source)
    (source / "preprocessor_config.json").write_text('{"size": 28}')
    text = ["source=pydoc", "num_samples=2", "seqlen=32"]
    sections = [f"--{part}.{key}" for part in ("calibration", "evaluation") for key in text]
    settings = [f"--model.path={source}", f"--output_dir={run}", "--method.removed_ratio=0.1"]
    assert main(["compress", *settings, *sections]) == 0
    assert (run / "model/preprocessor_config.json").read_text() == '{"size": 28}'
    saved = opened(run / "model")
    assert type(saved) is type(model)
    inside = f"{DecoderView(model).layers_name}."
    dense, tensors = model.state_dict(), saved.state_dict()
    outside = [name for name in dense if not name.startswith(inside)]
    assert any("vis" in name for name in outside)
    assert all(torch.equal(tensors[name], dense[name]) for name in outside)
    assert logits(saved, inputs).isfinite().all()
    counts = json.loads((run / "metrics.json").read_text())["parameters"]
    assert saved.num_parameters() == counts["compressed"] <= 0.9 * counts["dense"] + 100
