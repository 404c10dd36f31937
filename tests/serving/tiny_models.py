"""Tiny random models of every family that servers are tested with, in every pattern of linears."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from grasp_lightning.methods.expert_removal import removals_of_experts
from grasp_lightning.models.checkpoint import save_model
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.expert_numbers import numbered_experts
from grasp_lightning.models.experts import stacked_reader
from grasp_lightning.models.lowrank import LowRankLinear, NarrowedLinear
from grasp_lightning.models.mixtures import experts_in
from grasp_lightning.models.operations.narrow_experts import narrow_experts
from grasp_lightning.models.surgery import apply_operations
from grasp_lightning.plan import DropLayers
from tests.conftest import byte_tokenizer, tiny_model

# CPU attention of vLLM needs heads of 32; two processes must divide heads and channels.
TINY_SIZES: dict[str, object] = {
    "hidden_size": 64,
    "head_dim": 32,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
}
_BIASES = {"attention_bias": True, "mlp_bias": True}
_LONGER = {"sliding_window": 16}
FAMILIES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", TINY_SIZES),
    "llama with biases": ("llama", {**TINY_SIZES, **_BIASES}),
    "mistral": ("mistral", {**TINY_SIZES, **_LONGER}),
    "qwen2": ("qwen2", {**TINY_SIZES, "hidden_size": 128}),  # without head_dim
    "qwen3": ("qwen3", TINY_SIZES),
    "gemma2": ("gemma2", {**TINY_SIZES, **_LONGER, "num_key_value_heads": 1}),
    "gemma3": ("gemma3_text", {**TINY_SIZES, **_LONGER}),
    "phi3": ("phi3", {**TINY_SIZES, "hidden_size": 128}),  # without head_dim
    "qwen3_moe": ("qwen3_moe", {**TINY_SIZES, "moe_intermediate_size": 32}),  # dense experts
}
# Mixtures whose folders stay ordinary ones. The config of the last has no key for the width.
MIXTURES: dict[str, dict[str, object]] = {
    "mixtral": {"num_local_experts": 8, "intermediate_size": 64},
    "qwen3_moe": {"num_experts": 8},
    "gpt_oss": {"num_local_experts": 8, "intermediate_size": 64, "layer_types": None},
    "glm4_moe": {"n_routed_experts": 8},
}
NARROWED_MIXTURES = ("mixtral", "qwen3_moe", "gpt_oss")
NARROWED = 37  # odd, so that two processes hold shares of two sizes

# For each layer: ranks by the last part of a linear's name.
_RANKS: tuple[dict[str, int], ...] = (
    {"q_proj": 5, "k_proj": 0, "o_proj": 7, "qkv_proj": 11},
    {"k_proj": 3, "v_proj": 9, "gate_proj": 4, "down_proj": 6, "gate_up_proj": 8},
    dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj"), 0)
    | dict.fromkeys(("gate_proj", "up_proj", "down_proj", "gate_up_proj"), 0),
    {},
)


def save_compressed(path: Path, name: str) -> PreTrainedModel:
    """Save a tiny model with low-rank and narrowed linears, and return it."""
    family, options = FAMILIES[name]
    model = tiny_model(family, 0, **options)
    generator = torch.Generator().manual_seed(7)
    for module, linear in list(_linears(model)):
        layer, last = int(module.split(".")[2]), module.rpartition(".")[2]
        rank = _RANKS[layer].get(last)
        if rank is not None:
            model.set_submodule(module, _low_rank(linear, rank, generator))
        elif layer == 0 and "mlp" in module:
            model.set_submodule(module, _narrowed(linear, last))
    save_model(model, path, tokenizer=byte_tokenizer())
    return model


def save_ordinary(path: Path) -> PreTrainedModel:
    """Save a tiny model with fewer layers and equally narrow MLPs, which needs no plugin."""
    model = tiny_model("llama", 0, **TINY_SIZES)
    for module, linear in list(_linears(model)):
        if "mlp" in module:
            model.set_submodule(module, _narrowed(linear, module.rpartition(".")[2], kept=64))
    apply_operations(DecoderView(model), [DropLayers(layers=(1,))], {})
    save_model(model, path, tokenizer=byte_tokenizer())
    assert "quantization_config" not in json.loads((path / "config.json").read_text())
    return model


def save_ordinary_mixture(path: Path, family: str) -> PreTrainedModel:
    """Save a tiny mixture with six of eight experts, narrower if its config has a key for that."""
    options = {**TINY_SIZES, "num_hidden_layers": 2, "moe_intermediate_size": 64}
    model = tiny_model(family, 0, **{**options, **MIXTURES[family]})
    view = DecoderView(model)
    found = numbered_experts(view)
    assert found is not None
    kept = dict.fromkeys(found.mixtures, (0, 2, 3, 4, 6, 7))
    apply_operations(view, removals_of_experts(found, kept), {})
    if family in NARROWED_MIXTURES:
        channels = range(3, 35)
        readers = {
            name: stacked_reader(view.module(name), layout)[..., list(channels)].clone()
            for index in view.layer_indices
            for name, layout in experts_in(view, index).items()
        }
        operations = [narrow_experts(name, [channels] * len(kept[name])) for name in readers]
        tensors = {f"{name}.down_proj": reader for name, reader in readers.items()}
        apply_operations(view, operations, tensors)
    save_model(model, path, tokenizer=byte_tokenizer())
    assert "quantization_config" not in json.loads((path / "config.json").read_text())
    return model


def _linears(model: PreTrainedModel) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            yield name, module


def _low_rank(linear: nn.Linear, rank: int, generator: torch.Generator) -> LowRankLinear:
    has_bias = linear.bias is not None
    made = LowRankLinear(linear.in_features, linear.out_features, rank, bias=has_bias)
    with torch.no_grad():
        for factor in (made.left, made.right):
            factor.weight.copy_(torch.randn(factor.weight.shape, generator=generator) * 0.3)
        if has_bias:
            made.left.bias.copy_(linear.bias)
    return made


def _narrowed(linear: nn.Linear, last: str, kept: int = NARROWED) -> NarrowedLinear:
    """Keep the first channels; of a fused gate and up, those of each."""
    halves = 2 if last == "gate_up_proj" else 1
    channels = slice(None, kept)
    weight = linear.weight.detach()
    bias = None if linear.bias is None else linear.bias.detach()
    if last == "down_proj":
        weight = weight[:, channels]
    else:
        weight = torch.cat([half[channels] for half in weight.chunk(halves)])
        bias = None if bias is None else torch.cat([half[channels] for half in bias.chunk(halves)])
    rows, columns = weight.shape
    made = NarrowedLinear(columns, rows, bias=bias is not None)
    with torch.no_grad():
        made.weight.copy_(weight)
        if bias is not None:
            made.bias.copy_(bias)
    return made
