"""Tiny models built from configs, and a byte-level tokenizer: no test needs a download."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

# Tiny matrices: more threads only wait for each other.
torch.set_num_threads(1)

VOCABULARY = 260  # 256 bytes and the special tokens

_COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 258}
_COMMON_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_GROUPED = {**_COMMON_SIZES, "num_key_value_heads": 2}
_WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
TINY_CONFIGS: dict[str, dict[str, object]] = {
    "llama": {"model_type": "llama", **_GROUPED, "tie_word_embeddings": False},
    "qwen2": {"model_type": "qwen2", **_GROUPED, "tie_word_embeddings": True},
    "opt": {
        "model_type": "opt",
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    },
    "gpt_neox": {"model_type": "gpt_neox", **_COMMON_SIZES, "tie_word_embeddings": False},
}
# Of the tests that run in seconds.
FAMILIES = tuple(TINY_CONFIGS)
TINY_CONFIGS |= {
    "mistral": {"model_type": "mistral", **_GROUPED, "sliding_window": 8},
    "qwen3": {"model_type": "qwen3", **_GROUPED, "head_dim": 16, "tie_word_embeddings": True},
    "gemma2": {
        "model_type": "gemma2",
        **_GROUPED,
        **_WINDOWS,
        "head_dim": 16,
        # Softcapping must bend the scores of a tiny model, too.
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {"model_type": "gemma3_text", **_GROUPED, **_WINDOWS, "head_dim": 16},
    "phi3": {"model_type": "phi3", **_GROUPED},
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 32,
        "n_inner": 48,
        "n_layer": 4,
        "n_head": 4,
        "n_positions": 128,
    },
    "falcon": {"model_type": "falcon", **_COMMON_SIZES, "ffn_hidden_size": 48},
    "falcon_new": {
        "model_type": "falcon",
        **_COMMON_SIZES,
        "ffn_hidden_size": 48,
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
    },
    "bloom": {"model_type": "bloom", "hidden_size": 32, "n_layer": 4, "n_head": 4},
    "mixtral": {
        "model_type": "mixtral",
        **_GROUPED,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        **_GROUPED,
        **_EXPERTS,
        "shared_expert_intermediate_size": 24,
    },
    "qwen3_moe": {"model_type": "qwen3_moe", **_GROUPED, **_EXPERTS, "head_dim": 16},
}
ALL_FAMILIES = tuple(TINY_CONFIGS)
MOE_FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe")
STACKED_FAMILIES = (
    *MOE_FAMILIES,
    *("olmoe", "gpt_oss", "deepseek_v3", "glm4_moe", "granitemoe", "qwen3_next", "llama4_text"),
)
_STATE_SPACE = {"hidden_size": 32, "num_hidden_layers": 4, "state_size": 8}
_LINEAR_ATTENTION = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
# Of single tests: families that read weights of linears, a hybrid with two kinds of caches, and
# one that scales what its blocks add.
TINY_CONFIGS |= {
    "mamba": {"model_type": "mamba", **_STATE_SPACE, "time_step_rank": 12},
    "mamba2": {
        "model_type": "mamba2",
        **_STATE_SPACE,
        "head_dim": 8,
        "num_heads": 8,
        "n_groups": 2,
        "chunk_size": 16,
    },
    "xlstm": {
        "model_type": "xlstm",
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_heads": 4,
    },
    "granite": {"model_type": "granite", **_GROUPED},
    "olmoe": {"model_type": "olmoe", **_GROUPED, "num_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {
        "model_type": "gpt_oss",
        **_GROUPED,
        **_WINDOWS,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "deepseek_v3": {
        "model_type": "deepseek_v3",
        **_COMMON_SIZES,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "glm4_moe": {
        "model_type": "glm4_moe",
        **_GROUPED,
        "head_dim": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
    "granitemoe": {
        "model_type": "granitemoe",
        **_GROUPED,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "llama4_text": {
        "model_type": "llama4_text",
        **_GROUPED,
        "head_dim": 16,
        "intermediate_size_mlp": 48,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "interleave_moe_layer_step": 1,
        "attention_chunk_size": 16,
    },
    "qwen3_next": {
        "model_type": "qwen3_next",
        **_GROUPED,
        **_EXPERTS,
        **_LINEAR_ATTENTION,
        "head_dim": 16,
        "shared_expert_intermediate_size": 24,
    },
    "qwen3_5_text": {
        "model_type": "qwen3_5_text",
        **_GROUPED,
        **_LINEAR_ATTENTION,
        "head_dim": 16,
    },
}


def tiny_model(family: str = "llama", seed: int = 0, **overrides: object) -> PreTrainedModel:
    """Return a tiny random model of one family, float32, in eval mode.

    Weights are drawn larger than at a usual initialisation, so that layers differ visibly.
    """
    torch.manual_seed(seed)
    options = {**_COMMON, **TINY_CONFIGS.get(family, {"model_type": family}), **overrides}
    config = AutoConfig.for_model(str(options.pop("model_type")), **options)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
            elif name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    model.eval()
    return model


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one id per byte (0 to 255), then <s>, </s> and <pad>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def save_tiny(path: Path, family: str = "llama", seed: int = 0, **overrides: object) -> Path:
    """Write a tiny model with its tokenizer as a Hugging Face folder."""
    tiny_model(family, seed, **overrides).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests of GPUs where there is none."""
    is_dry = os.environ.get("GRASP_GPU_DEVICE") == "cpu" and "tests/gpu/" in item.nodeid
    if item.get_closest_marker("gpu") and not (torch.cuda.is_available() or is_dry):
        pytest.skip("needs an NVIDIA GPU, and torch finds none")


@pytest.fixture
def make_model() -> Callable[..., PreTrainedModel]:
    return tiny_model


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    """A tiny Llama with tokenizer, on disk."""
    return save_tiny(tmp_path / "tiny-llama")


@pytest.fixture(scope="session")
def grasp_data() -> Path:
    """Folder of the real development data; the test skips if it is not set."""
    folder = os.environ.get("GRASP_DATA", "")
    if folder in ("", "none"):
        pytest.skip("GRASP_DATA is not set: it names the folder with the real development data")
    return Path(folder)
