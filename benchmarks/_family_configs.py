"""Tiny random models of the causal language models that the installed transformers has.

A family's own default config is shrunk: known keys get tiny values, and lists with an entry per
layer are left to the family. A table holds what single families need in addition.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto import modeling_auto

VOCABULARY: Final = 260  # 256 bytes and the special tokens
Settings = Mapping[str, Any]  # Any: values of a config

# Members of the mapping that are no decoder-only language models of text: wrappers with images or
# sound, whose text models have names of their own, and models that need another one beside them.
_OTHER: Final = frozenset(
    {
        *("bert-generation", "emu3", "fuyu", "gemma3", "gemma3n", "gemma4", "gemma4_unified"),
        *("gemma4_assistant", "gemma4_unified_assistant", "git", "got_ocr2", "llama4", "mllama"),
        *("moshi", "musicgen", "musicgen_melody", "phi4_multimodal", "qwen3_5", "qwen3_5_moe"),
        *("qwen4_exp", "dots3_note", "trocr", "whisper", "xlnet"),
        "blt",  # four transformers, whose sizes its config does not make tiny
    }
)
_LAYERS: Final = 4
# Tiny values by key, for whatever family has the key.
_TINY: Final[Settings] = MappingProxyType(
    {
        **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "embedding_dim"), 32),
        **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"), 48),
        **dict.fromkeys(("dim_ff", "dff", "intermediate_size_mlp", "dense_intermediate_size"), 48),
        **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), _LAYERS),
        **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "attention_heads"), 4),
        **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"), 2),
        **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 128),
        **dict.fromkeys(("model_max_length", "context_length"), 128),
        **dict.fromkeys(("head_dim", "swa_head_dim", "dim_head", "kv_channels"), 16),
        **dict.fromkeys(("sliding_window", "sliding_window_size", "window_size"), 8),
        **dict.fromkeys(("attention_window_size", "local_attention", "keep_window_size"), 8),
        **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts"), 4),
        **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk"), 2),
        **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), 24),
        **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size"), 24),
        **dict.fromkeys(("shared_experts_intermediate_size", "router_hidden_size"), 24),
        **dict.fromkeys(("moe_shared_expert_intermediate_size", "ple_embed_dim"), 24),
        **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
        **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "hc_lowrank"), 16),
        **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
        **dict.fromkeys(("index_head_dim", "linear_head_dim"), 8),
        **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
        **dict.fromkeys(("linear_num_value_heads", "index_n_heads", "linear_num_heads"), 4),
        **dict.fromkeys(("linear_num_key_heads", "n_groups", "o_groups"), 2),
        **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "mamba_d_head"), 8),
        **dict.fromkeys(("mamba_head_dim", "mamba_n_heads", "mamba_num_heads"), 8),
        **dict.fromkeys(("chunk_size", "mamba_chunk_size", "attention_chunk_size"), 16),
        **dict.fromkeys(("time_step_rank", "mamba_dt_rank", "d_rel", "rotary_dim"), 8),
        **dict.fromkeys(("lru_width", "word_embed_proj_dim"), 32),
        **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
        # All tokens: many scores are 0, and padding would decide between them.
        "index_topk": 64,
        "moe_num_experts": 4,
        "swa_num_attention_heads": 4,
        "mamba_d_ssm": 64,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
        "qk_head_dim": 16,
        "rel_extent": 32,
        "zero_expert_num": 2,
        "block_size": 16,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 258,
    }
)
_ROTARY: Final = {"rope_type": "default", "rope_theta": 10000.0}
_BOTH_KINDS: Final = ["linear_attention", "full_attention"] * 2
_HYBRID: Final = ["linear_attention", "hybrid"] * 2
_WINDOWS: Final = ["sliding_attention", "full_attention"] * 2
# What single families need in addition, most often a short pattern of layers.
_OWN: Final[Mapping[str, Settings]] = MappingProxyType(
    {
        "bailing_hybrid": {"layer_types": _BOTH_KINDS, "mlp_layer_types": ["dense", "sparse"] * 2},
        "bamba": {"attn_layer_indices": [1, 3]},
        "cohere_compass_text": {
            "layer_types": _WINDOWS,
            "rope_parameters": dict.fromkeys(_WINDOWS, _ROTARY),
        },
        "dbrx": {
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
            "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 24, "moe_num_experts": 4},
        },
        "dots1": {"n_shared_experts": 1, "n_routed_experts": 4},
        "dots3_note_text": {"per_layer_config": {}, "swa_head_dim": 16, "head_dim": 16},
        "gemma3n_text": {
            "layer_types": _WINDOWS,
            "num_kv_shared_layers": 2,
            "activation_sparsity_pattern": [0.5, 0.0] * 2,
        },
        "gemma4_text": {
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "num_kv_shared_layers": 4,
        },
        "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
        "granitemoehybrid": {"layer_types": _BOTH_KINDS},
        "helium": {"head_dim": 8},
        "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
        "kimi_linear": {"layer_types": _BOTH_KINDS},
        "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
        "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
        "mamba2": {"head_dim": 8, "num_heads": 8},
        "qwen4_exp_text": {
            "layer_types": _BOTH_KINDS,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 8,
            "indexer_compress_ratio": 4,
            "ngram_vocab_size_base": 64,
            "split_ngram_parts": 1,
        },
        "xglm": {"pad_token_id": 1},
        "xlstm": {"hidden_size": 64, "embedding_dim": 64, "num_heads": 4, "qk_dim_factor": 1.0},
        "zamba": {"layers_block_type": _HYBRID, "num_key_value_heads": 4},
        "zamba2": {"layers_block_type": _HYBRID, "num_key_value_heads": 4},
        "zaya": {"num_experts_per_tok": 1},
    }
)
# Rotary features of latent attention, whose config calls them the size of a head.
_LATENT: Final = "qk_rope_head_dim"


def family_names() -> list[str]:
    """Return the model types of all decoder-only causal language models of transformers."""
    others = (
        modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.keys()
        | modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.keys()
        | _OTHER
    )
    names: list[str] = [*modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    return [name for name in names if name not in others]


def tiny_config(family: str) -> PreTrainedConfig:
    """Return the shrunk default config of a family.

    Args:
        family: Its model type.

    Returns:
        The config, with the vocabulary of ``byte_tokenizer``.
    """
    kind = CONFIG_MAPPING[family]
    default = kind().to_dict()
    known = {key: value for key, value in _TINY.items() if key in default}
    if _LATENT in default:
        known |= {"head_dim": known[_LATENT], "num_key_value_heads": 4}
    return kind(**{**known, **_OWN.get(family, {})})


def tiny_model(family: str) -> PreTrainedModel:
    """Return a tiny random model of a family, float32, in eval mode.

    Args:
        family: Its model type.

    Returns:
        The model, whose matrices are drawn larger than usual so that layers differ visibly.
    """
    torch.manual_seed(0)
    build: Any = AutoModelForCausalLM.from_config  # Any: untyped in transformers
    model: PreTrainedModel = build(tiny_config(family), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and parameter.is_floating_point():
                parameter.normal_(std=0.15)
            elif name.endswith("bias"):
                parameter.normal_(std=0.05)
    model.train(False)
    return model


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one id per byte (0 to 255), then <s>, </s> and <pad>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    build: Any = PreTrainedTokenizerFast  # Any: untyped in transformers
    found: PreTrainedTokenizerFast = build(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    return found
