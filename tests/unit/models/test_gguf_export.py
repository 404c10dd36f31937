"""What ``export --format gguf`` writes, read back by the package gguf, and what it refuses."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from grasp_lightning.commands.export import run_export
from grasp_lightning.config import ExportConfig
from grasp_lightning.errors import GraspError
from grasp_lightning.models.checkpoint import save_model
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.formats import ExportFacts
from grasp_lightning.models.formats.gguf import GgufFacts
from grasp_lightning.models.formats.gguf.tensors import llama3_factors
from grasp_lightning.models.surgery import apply_operations
from grasp_lightning.plan import FactorizeLinear, RemoveBlock
from grasp_lightning.storage.copies import CopyRun
from tests.conftest import byte_tokenizer, tiny_model
from tests.serving.llamacpp import byte_base, sentencepiece_model
from tests.unit.models.helpers import narrow_layers, random_factors

Export = CopyRun[ExportFacts]
Q_PROJ = "model.layers.2.self_attn.q_proj"


def save(model: PreTrainedModel, folder: Path) -> Path:
    save_model(model, folder, tokenizer=byte_tokenizer())
    return folder


def cut_model(family: str = "llama", **overrides: object) -> PreTrainedModel:
    """MLPs of 40 and 20 of 48 channels and none at all, a low-rank linear, no attention twice."""
    view = DecoderView(tiny_model(family, 0, **overrides))
    apply_operations(view, *narrow_layers(view, (1,), range(20)))
    apply_operations(view, *narrow_layers(view, (2,), range(8, 48)))
    factor = FactorizeLinear(module=Q_PROJ, rank=5, components=None)
    apply_operations(view, [factor], random_factors(view, [factor]))
    for layer, block in ((0, "self_attn"), (3, "self_attn"), (0, "mlp")):
        name = f"model.layers.{layer}.{block}"
        modules = tuple(linear for linear in view.linears(layer) if linear.startswith(name))
        apply_operations(view, [RemoveBlock(block=name, modules=modules)], {})
    return view.model


def export(source: Path, **keys: str | None) -> Export:
    defaults = {"gguf_base": str(byte_base(source.parent / "base.gguf"))}
    defaults |= {"model": str(source), "output_dir": str(source.parent / "out")}
    content: dict[str, Any] = {**defaults, "format": "gguf", **keys}  # Any: values of YAML
    return run_export(ExportConfig(**content))


def read(run: Export) -> gguf.GGUFReader:
    assert isinstance(run.facts, GgufFacts)
    return gguf.GGUFReader(run.folder / "model" / run.facts.file)


def tensors(run: Export) -> dict[str, torch.Tensor]:
    return {t.name: torch.from_numpy(t.data.copy()) for t in read(run).tensors}


def values(run: Export) -> dict[str, Any]:  # Any: of any type that the format has
    return {name: field.contents() for name, field in read(run).fields.items()}


def test_widths_and_heads_are_written_per_layer(tmp_path: Path) -> None:
    run = export(save(cut_model(), tmp_path / "m"))
    found = values(run)
    assert found["general.architecture"] == "deci"
    # One block of zeros for the removed MLP; 20, 40 and 48 channels filled up.
    assert found["deci.feed_forward_length"] == [32, 32, 64, 64]
    # The first layer keeps its heads: llama.cpp takes their size from it.
    assert found["deci.attention.head_count"] == [4, 4, 4, 0]
    assert found["deci.attention.head_count_kv"] == [2, 2, 2, 0]
    assert found["deci.context_length"] == 128
    written = tensors(run)
    assert not [name for name in written if name.startswith("blk.3.attn")]
    assert not written["blk.0.attn_output.weight"].any()


def test_weights_are_multiplied_filled_up_and_reordered(tmp_path: Path) -> None:
    model = cut_model()
    written = tensors(export(save(model, tmp_path / "m")))
    layer: Any = model.get_submodule("model.layers.2")  # Any: a module of the family
    down = written["blk.2.ffn_down.weight"]
    assert torch.equal(down[:, :40], layer.mlp.down_proj.weight)
    assert not down[:, 40:].any()
    gate = written["blk.2.ffn_gate.weight"]
    assert torch.equal(gate[:40], layer.mlp.gate_proj.weight)
    assert not gate[40:].any()
    q = layer.self_attn.q_proj.weight
    # A head has 8 values: row 1 of the file is the one that turns with row 0, the fifth.
    torch.testing.assert_close(written["blk.2.attn_q.weight"][:3], q[[0, 4, 1]])
    assert torch.equal(written["output.weight"], model.get_parameter("lm_head.weight"))


def test_the_facts_and_lines_say_what_was_done(tmp_path: Path) -> None:
    source = save(cut_model(), tmp_path / "m")
    run = export(source, gguf_type="q8_0")
    facts = json.loads((tmp_path / "out" / "export.json").read_text())
    assert facts["zero_channels"] == [32, 12, 24, 16]
    assert facts["without_attention"] == [3]
    assert facts["ranks"][Q_PROJ] == 5
    size = (tmp_path / "out" / "model" / "model-q8_0.gguf").stat().st_size
    assert facts["bytes"]["file"] == size
    assert facts["bytes"]["dense"] > size
    lines = run.facts.lines(run.model_folder)
    assert lines[0].startswith(f"gguf q8_0, architecture deci: {size / 1e6:.1f} MB (dense: ")
    # One low-rank linear, four of each of two attentions, three of an MLP.
    assert lines[1].startswith("factors of 12 linears multiplied: llama.cpp has no low-rank")
    assert lines[2] == "84 zero channels pad the MLPs of 4 layers to multiples of 32"
    card = (tmp_path / "out" / "model" / "README.md").read_text()
    assert "84 zero channels pad the MLPs of 4 layers" in card
    assert "The factors of 12 linears are multiplied back" in card
    assert "llama-server -m model-q8_0.gguf" in card
    assert export(source, gguf_type="q8_0").facts == run.facts  # from what is stored


@pytest.mark.parametrize(
    ("family", "equal", "other"),
    [
        ("llama", "llama", "deci"),
        ("mistral", "llama", "deci"),
        ("qwen2", "qwen2", "deci"),
        ("qwen3", "qwen3", "openelm"),
    ],
)
def test_equal_widths_use_the_own_architecture(
    tmp_path: Path, family: str, equal: str, other: str
) -> None:
    for name, layers, expected in (("equal", range(4), equal), ("other", (1,), other)):
        view = DecoderView(tiny_model(family))
        apply_operations(view, *narrow_layers(view, layers, range(20)))
        (tmp_path / name).mkdir()
        run = export(save(view.model, tmp_path / name / "m"))
        found = values(run)
        assert found["general.architecture"] == expected
        limit = 8 if family == "mistral" else 128  # its sliding window
        assert found[f"{expected}.context_length"] == limit


def test_the_tokenizer_of_the_base_is_copied(tmp_path: Path) -> None:
    run = export(save(tiny_model(), tmp_path / "m"))
    base = gguf.GGUFReader(tmp_path / "base.gguf")
    copied = {n: v for n, v in values(run).items() if n.startswith("tokenizer.")}
    assert copied == {
        name: field.contents()
        for name, field in base.fields.items()
        if name.startswith("tokenizer.")
    }
    assert isinstance(run.facts, GgufFacts)
    assert run.facts.tokenizer == "base.gguf"


def test_a_tokenizer_of_sentencepiece_gets_scores_in_the_order_of_merges(tmp_path: Path) -> None:
    source = sentencepiece_model(tmp_path / "m")
    found = values(export(source, gguf_base=None))
    assert found["tokenizer.ggml.model"] == "llama"
    assert found["tokenizer.ggml.add_space_prefix"] is True
    assert found["tokenizer.chat_template"] == "{{ messages[0].content }}"
    assert found["tokenizer.ggml.eos_token_id"] == 2
    assert found["tokenizer.ggml.add_bos_token"] is True
    tokens, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert [gguf.TokenType(kinds[index]).name for index in (0, 1, 3, 259, -3, -1)] == [
        *("UNKNOWN", "CONTROL", "BYTE", "NORMAL", "CONTROL", "UNUSED")
    ]
    scores = dict(zip(tokens, found["tokenizer.ggml.scores"], strict=True))
    content = json.loads((source / "tokenizer.json").read_text())
    merged = ["".join(pair) for pair in content["model"]["merges"]]
    assert [scores[token] for token in merged[:4]] == [0.0, -1.0, -2.0, -3.0]


def test_factors_of_llama3_turn_its_usual_frequencies_into_scaled_ones() -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    sizes = {"head_dim": 128, "max_position_embeddings": 131072}
    config = AutoConfig.for_model("llama", rope_parameters=rope, **sizes)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    usual = 500000.0 ** -(torch.arange(0, 128, 2) / 128)
    factors = llama3_factors(config)
    assert factors.min() == 1
    assert factors.max() == 8
    torch.testing.assert_close(usual / factors, expected)


def refusal(source: Path, **keys: str | None) -> str:
    with pytest.raises(GraspError) as caught:
        export(source, **keys)
    assert not (source.parent / "out").exists()
    return str(caught.value)


REFUSALS: dict[str, tuple[str, dict[str, object], str]] = {
    "family": (
        "gemma3_text",
        {},
        "has class Gemma3ForCausalLM, which format gguf does not support; supported: ",
    ),
    "activation": (
        "llama",
        {"hidden_act": "gelu"},
        "has MLPs with gelu, but llama.cpp computes silu in this family",
    ),
    "rope": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "rotary embeddings with type dynamic, which format gguf does not write; it knows the types",
    ),
    "rope setting": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 2.0,
                "beta_fast": 16,
            }
        },
        "has rotary embeddings with beta_fast 16, which format gguf does not write",
    ),
    "biases of qwen3": (
        "qwen3",
        {"attention_bias": True},
        "has biases in its attention, but llama.cpp reads none in this family",
    ),
    "qwen3": (
        "qwen3",
        {"tie_word_embeddings": False},
        "has MLPs of different widths, or layers with different numbers of heads: llama.cpp reads",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_model_that_llamacpp_cannot_compute_is_refused(tmp_path: Path, case: str) -> None:
    family, overrides, expected = REFUSALS[case]
    view = DecoderView(tiny_model(family, 0, **overrides))
    apply_operations(view, *narrow_layers(view, (1,), range(20)))
    assert expected in refusal(save(view.model, tmp_path / "m"))


def test_a_type_whose_blocks_do_not_fit_is_refused(tmp_path: Path) -> None:
    source = save(tiny_model("llama", 0, hidden_size=48), tmp_path / "m")
    assert refusal(source, gguf_type="q4_0") == (
        f"model: {source} does not fit gguf_type q4_0: rows of token_embd.weight have 48 values, "
        "but Q4_0 stores blocks of 32; use f32, f16 or bf16"
    )


def test_weights_that_overflow_are_refused(tmp_path: Path) -> None:
    model = tiny_model()
    model.get_parameter("model.layers.1.mlp.up_proj.weight").data[3, 3] = 1e5
    assert refusal(save(model, tmp_path / "m"), gguf_type="f16") == (
        "weights of blk.1.ffn_up.weight are too large for gguf_type f16; use bf16 or f32"
    )


def test_an_unknown_pre_tokenizer_is_refused_with_what_to_do(tmp_path: Path) -> None:
    assert refusal(save(tiny_model(), tmp_path / "m"), gguf_base=None) == (
        "llama.cpp has no name for the pre-tokenizer of this model; "
        "pass --gguf_base, a GGUF file of the base model, whose tokenizer is copied"
    )


def test_a_base_of_another_model_is_refused(tmp_path: Path) -> None:
    source, base = save(tiny_model(), tmp_path / "m"), byte_base(tmp_path / "base.gguf")
    other = sentencepiece_model(tmp_path / "other")
    assert "base.gguf has 260 tokens, but the model has" in refusal(other, gguf_base=str(base))
    content = json.loads((source / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["!"], vocabulary['"'] = vocabulary['"'], vocabulary["!"]
    (source / "tokenizer.json").write_text(json.dumps(content))
    assert "another vocabulary: token 0 is '!' there and '\"' in the model" in refusal(
        source, gguf_base=str(base)
    )
    assert "no such file: " in refusal(source, gguf_base=str(tmp_path / "none.gguf"))


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, find = save(tiny_model(), tmp_path / "m"), importlib.util.find_spec
    base = str(byte_base(tmp_path / "base.gguf"))
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name)
    )
    assert refusal(source, gguf_base=base) == (
        "format gguf needs the package gguf, which is not installed: "
        'pip install "grasp-lightning[gguf]"'
    )
