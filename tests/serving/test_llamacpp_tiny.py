"""llama.cpp computes what transformers does, for tiny models of every family and pattern."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from grasp_lightning.models.checkpoint import save_model
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.surgery import apply_operations
from grasp_lightning.plan import AddBias, DropLayers, FactorizeLinear, RemoveBlock
from tests.conftest import byte_tokenizer, tiny_model
from tests.serving.llamacpp import (
    Result,
    byte_base,
    export_gguf,
    load,
    logits_of,
    run_llamacpp,
    sentencepiece_model,
)
from tests.serving.reference import greedy
from tests.unit.models.helpers import narrow_layers, random_factors, removal

pytestmark = pytest.mark.serving

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
IDS = [256, 84, 104, 101, 32, 113, 117, 105, 99, 107, 32, 98, 114, 111, 119, 110]
NUM_NEW = 24
# Multiples of 32 everywhere, so that every type fits.
SIZES = {"hidden_size": 64, "intermediate_size": 96, "sliding_window": None}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}


def narrow(view: DecoderView) -> None:
    apply_operations(view, *narrow_layers(view, (0,), range(3, 40)))
    apply_operations(view, *narrow_layers(view, (1, 3), range(64)))


def narrow_equally(view: DecoderView) -> None:
    apply_operations(view, *narrow_layers(view, range(4), range(5, 45)))


def factorize_attention(view: DecoderView) -> None:
    linears = [name for layer in (0, 2) for name in view.linears(layer) if "self_attn" in name]
    operations = [FactorizeLinear(module=name, rank=6, components=None) for name in linears]
    apply_operations(view, operations, random_factors(view, operations))


def remove(view: DecoderView, layer: int, block: str) -> None:
    name = f"model.layers.{layer}.{block}"
    modules = tuple(linear for linear in view.linears(layer) if linear.startswith(name))
    apply_operations(view, [RemoveBlock(block=name, modules=modules)], {})


def remove_attention(view: DecoderView) -> None:
    for layer in (0, 2, 3):
        remove(view, layer, "self_attn")


def remove_mlps(view: DecoderView) -> None:
    for layer in (1, 3):
        remove(view, layer, "mlp")


def remove_a_layer(view: DecoderView) -> None:
    for block in ("self_attn", "mlp"):
        remove(view, 3, block)
        remove(view, 1, block)


def drop_and_narrow(view: DecoderView) -> None:
    narrow(view)
    apply_operations(view, [DropLayers(layers=(1,))], {})


def remove_heads(view: DecoderView) -> None:
    for layer, group in ((0, 1), (2, 0)):
        apply_operations(view, [removal(view, layer, (group,))], {})
    apply_operations(view, *narrow_layers(view, (0, 1), range(40)))


def remove_equal_heads_and_add_biases(view: DecoderView) -> None:
    """Equal numbers in all layers: the biases alone need an architecture of their own."""
    for layer in range(4):
        heads = removal(view, layer, (layer % 2,))
        narrow, tensors = narrow_layers(view, (layer,), range(40))
        biases = [AddBias(module=heads.output), AddBias(module=narrow[0].linears[0])]
        tensors |= random_factors(view, biases)
        apply_operations(view, [heads, *narrow, *biases], tensors)


PATTERNS: dict[str, Callable[[DecoderView], None]] = {
    "dense": lambda _: None,
    "narrow": narrow,
    "equal": narrow_equally,
    "factors": factorize_attention,
    "no-attention": remove_attention,
    "no-mlps": remove_mlps,
    "no-layer": remove_a_layer,
    "dropped": drop_and_narrow,
    "heads": remove_heads,
    "added-biases": remove_equal_heads_and_add_biases,
}
OVERRIDES: dict[str, dict[str, object]] = {
    "qwen3-untied": {"tie_word_embeddings": False},
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-head": {"head_dim": 32},
    "llama-llama3": {"rope_parameters": LLAMA3},
    "llama-linear": {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}
    },
    "llama-yarn": {"rope_parameters": YARN},
    "qwen2-yarn": {"rope_parameters": {**YARN, "beta_fast": 32.0}},
}
CASES = [f"{family} {pattern}" for family in FAMILIES for pattern in PATTERNS]
CASES += [f"{name} {pattern}" for name in OVERRIDES for pattern in ("dense", "narrow")]
# Refused: see the unit tests.
CASES = [case for case in CASES if case not in ("qwen3-untied narrow", "qwen3 added-biases")]
TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")


class Run(NamedTuple):
    source: Path
    result: Result


def compressed(case: str, folder: Path) -> Path:
    name, _, pattern = case.partition(" ")
    model = tiny_model(name.partition("-")[0], 0, **{**SIZES, **OVERRIDES.get(name, {})})
    view = DecoderView(model)
    PATTERNS[pattern](view)
    save_model(model, folder, tokenizer=byte_tokenizer())
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """All cases in float32, run by one process of llama.cpp."""
    root = tmp_path_factory.mktemp("tiny")
    base = byte_base(root / "base.gguf")
    sources = {case: compressed(case, root / case.replace(" ", "-")) for case in CASES}
    jobs = [
        {
            "file": str(export_gguf(source, root / f"{source.name}-gguf", f"--gguf_base={base}")),
            "logits": [IDS],
            "greedy": [IDS],
            "num_new": NUM_NEW,
        }
        for source in sources.values()
    ]
    results = run_llamacpp(jobs, root)
    return {
        case: Run(source, result)
        for (case, source), result in zip(sources.items(), results, strict=True)
    }


@pytest.mark.parametrize("case", CASES)
def test_llamacpp_computes_the_same(runs: dict[str, Run], case: str) -> None:
    source, result = runs[case]
    model = load(source)
    logits = logits_of(model, IDS)
    (got,) = (torch.tensor(rows) for rows in result["logits"])
    assert (got - logits).abs().max() <= 1e-4 * logits.abs().max()
    assert result["greedy"] == [greedy(model, IDS, NUM_NEW).tokens]


def error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def test_llamacpp_opens_every_type(tmp_path: Path) -> None:
    base, source = byte_base(tmp_path / "base.gguf"), compressed("llama narrow", tmp_path / "m")
    jobs = [
        {
            "file": str(
                export_gguf(source, tmp_path / kind, f"--gguf_type={kind}", f"--gguf_base={base}")
            ),
            "logits": [IDS],
        }
        for kind in TYPES
    ]
    logits = logits_of(load(source), IDS)
    errors = {
        kind: error(torch.tensor(result["logits"][0]), logits)
        for kind, result in zip(TYPES, run_llamacpp(jobs, tmp_path), strict=True)
    }
    assert errors["f32"] < 1e-5
    assert errors["f16"] < 5e-3
    assert errors["bf16"] < 0.05
    # Random weights suffer more than trained ones; files of wrong values have errors above 1.
    assert errors["q8_0"] < 0.1
    assert errors["q8_0"] < errors["q5_1"] < errors["q4_1"]
    assert max(errors["q5_0"], errors["q4_0"], errors["q4_1"]) < 0.8, errors


def test_a_tokenizer_of_sentencepiece_splits_texts_in_the_same_way(tmp_path: Path) -> None:
    texts = ["the cat sat on the mat", " other  thing", "caf\u00e9 \u5929", "a<|extra|>mat</s>", ""]
    file = export_gguf(sentencepiece_model(tmp_path / "m"), tmp_path / "out")
    (result,) = run_llamacpp([{"file": str(file), "texts": texts}], tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert result["tokens"] == tokenizer(texts)["input_ids"]
