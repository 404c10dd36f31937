import json
import logging
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from grasp_lightning.errors import ConfigError, ModelError, NumericsError
from grasp_lightning.models.loading import load_meta_model, load_model, model_hash
from tests.conftest import save_tiny, tiny_model
from tests.unit.models.loading_helpers import cpu, message

LLAMA2_7B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}


def edit_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace, add or (None) delete tensors of a saved model; ``__`` in a name means a dot."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for name, tensor in changes.items():
        key = name.replace("__", ".")
        if tensor is None:
            del tensors[key]
        else:
            tensors[key] = tensor
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_folder_is_loaded_with_its_tokenizer(tiny_folder: Path) -> None:
    loaded = load_model(cpu(tiny_folder))

    expected = tiny_model()
    assert not loaded.model.training
    assert loaded.model.device == torch.device("cpu")
    assert loaded.tokenizer.decode(loaded.tokenizer("a text").input_ids) == "a text"
    for name, parameter in expected.named_parameters():
        assert torch.equal(loaded.model.get_parameter(name), parameter)


@pytest.mark.parametrize("family", ["qwen2", "opt", "gpt_neox"])
def test_other_families_are_loaded_bit_for_bit(tmp_path: Path, family: str) -> None:
    loaded = load_model(cpu(save_tiny(tmp_path / family, family)))

    assert model_hash(loaded.model) == model_hash(tiny_model(family))


def test_the_checkpoints_own_dtype_is_kept_and_can_be_overridden(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "half")
    tiny_model().bfloat16().save_pretrained(folder)

    assert load_model(cpu(folder)).model.dtype == torch.bfloat16
    assert load_model(cpu(folder, dtype="float32")).model.dtype == torch.float32


def test_no_path_of_the_machine_is_saved_again(tiny_folder: Path, tmp_path: Path) -> None:
    loaded = load_model(cpu(tiny_folder))
    loaded.model.save_pretrained(tmp_path / "again")
    loaded.tokenizer.save_pretrained(tmp_path / "again")

    assert loaded.origin.name == "tiny-llama"
    assert loaded.model.name_or_path == "tiny-llama"
    for file in (tmp_path / "again").glob("*.json"):
        assert str(tmp_path) not in file.read_text()


def test_origin_names_licence_files_and_size(tiny_folder: Path) -> None:
    (tiny_folder / "README.md").write_text("---\nlicense: mit\ntags: [a]\n---\n# Card\n")
    (tiny_folder / "LICENSE").write_text("text")
    (tiny_folder / "NOTICE.txt").write_text("text")

    origin = load_model(cpu(tiny_folder)).origin

    assert origin.licence == "mit"
    assert origin.licence_files == (tiny_folder / "LICENSE", tiny_folder / "NOTICE.txt")
    assert origin.source_bytes == (tiny_folder / "model.safetensors").stat().st_size
    assert origin.folder == tiny_folder
    assert not origin.quantized_source


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: other\nlicense_name: llama2\n---\n", "llama2"),
        ("---\ntags: [a]\n---\n", None),
        ("---\nlicense: [unclosed\n---\n", None),
        ("---\nlicense: mit\nday: 2020-99-99\n---\n", None),
        ("# license: mit\n", None),
    ],
)
def test_licence_is_read_from_the_front_matter_only(
    tiny_folder: Path, card: str, licence: str | None
) -> None:
    (tiny_folder / "README.md").write_text(card)

    assert load_model(cpu(tiny_folder)).origin.licence == licence


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("~nouser/x", "~nouser/x: ~nouser has no home folder"),
        ("a\0b", "'a\\x00b' is not a path: embedded null byte"),
        ("x" * 300, "File name too long"),
        ("https://me:secret@host/a/b", "no such file or folder: https://***@host/a/b"),
        ("ssh://token@host/a b", "no such file or folder: ssh://***@host/a b"),
    ],
)
def test_a_path_that_no_file_can_have_is_one_line(path: str, reason: str) -> None:
    text = message(cpu(path))

    assert text.startswith("model.path: ")
    assert text.endswith(reason)


@pytest.mark.parametrize("path", ["./none", "/none/there", "~/none-there", "a/b/c", "none.gguf"])
def test_a_path_that_does_not_exist_is_named(path: str) -> None:
    assert message(cpu(path)) == f"model.path: no such file or folder: {path}"


def test_an_empty_path_does_not_mean_the_working_directory() -> None:
    assert "model.path is empty" in message(cpu(""), ConfigError)


def test_a_hub_name_that_cannot_be_fetched_says_at_once_what_to_do(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there

    text = message(cpu("nobody/nothing"))

    assert not caplog.records  # the hub's library would try five times, and log each

    assert text.startswith("model.path: cannot get nobody/nothing from the Hugging Face hub (")
    assert "HF_HUB_OFFLINE" in text
    assert "give a local folder" in text


def test_a_hub_model_in_the_cache_needs_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, repository = "0123456789" * 4, tmp_path / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = save_tiny(repository / "snapshots" / commit)
    (snapshot / "README.md").write_text("---\nlicense: mit\n---\n")
    for module in ("constants", "hf_api", "file_download"):
        monkeypatch.setattr(f"huggingface_hub.{module}.HF_HUB_CACHE", tmp_path, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there

    loaded = load_model(cpu("org/tiny"))

    assert (loaded.origin.name, loaded.origin.licence) == ("org/tiny", "mit")
    assert loaded.model.name_or_path == "org/tiny"


def test_a_gguf_file_of_a_hub_name_that_cannot_be_fetched_says_what_to_do() -> None:
    assert "cannot get nobody/nothing" in message(cpu("nobody/nothing", gguf_file="a.gguf"))


def test_a_name_that_the_hub_cannot_have_is_refused() -> None:
    assert "neither a file, a folder nor a hub name" in message(cpu("two words"))


def test_a_file_of_another_kind_is_refused(tiny_folder: Path) -> None:
    assert "is a file; expected a folder" in message(cpu(tiny_folder / "model.safetensors"))


def test_keys_without_effect_are_refused(tiny_folder: Path) -> None:
    text = message(cpu(tiny_folder, revision="main"), ConfigError)

    assert text == "model.revision has no effect with a local folder; leave it out"


def test_a_folder_without_config_names_what_it_lacks(tmp_path: Path) -> None:
    assert message(cpu(tmp_path)).endswith("is not a model folder: it has no config.json")
    (tmp_path / "x.gguf").touch()
    assert message(cpu(tmp_path)).endswith("it has x.gguf: set model.gguf_file")


def test_a_folder_without_weights_names_what_it_lacks(tiny_folder: Path) -> None:
    (tiny_folder / "model.safetensors").unlink()

    assert "no weights (model.safetensors or pytorch_model.bin)" in message(cpu(tiny_folder))


@pytest.mark.parametrize(
    "content",
    ["{", "{}", '{"model_type": "nosuch"}', '{"model_type": "llama", "hidden_size": "x"}'],
)
def test_a_config_that_cannot_be_read_is_one_line(tiny_folder: Path, content: str) -> None:
    (tiny_folder / "config.json").write_text(content)

    assert message(cpu(tiny_folder)).startswith("cannot load tiny-llama: ")


@pytest.mark.parametrize(
    ("key", "value"), [("num_attention_heads", 0), ("vocab_size", -5), ("num_hidden_layers", 0)]
)
def test_a_config_of_impossible_numbers_is_one_line(
    tiny_folder: Path, key: str, value: int
) -> None:
    config = json.loads((tiny_folder / "config.json").read_text()) | {key: value}
    (tiny_folder / "config.json").write_text(json.dumps(config))

    expected = f"the config.json of tiny-llama has {key} {value}; expected 1 or more"
    assert message(cpu(tiny_folder)) == expected
    with pytest.raises(ModelError, match=key):
        load_meta_model(cpu(tiny_folder))


class Harmful:
    def __reduce__(self) -> tuple[object, ...]:
        return print, ("ran",)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (pickle.dumps({"a": Harmful()}), "not a torch file, or it has objects other than tensors"),
        (b"<html>not found</html>", "not a torch file, or it has objects other than tensors"),
        (b"", "EOFError"),
    ],
)
def test_a_pickle_or_a_foreign_file_is_not_opened(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str], content: bytes, reason: str
) -> None:
    (tiny_folder / "model.safetensors").unlink()
    (tiny_folder / "pytorch_model.bin").write_bytes(content)

    text = message(cpu(tiny_folder))

    assert text.startswith(f"cannot load tiny-llama: pytorch_model.bin is damaged: {reason}")
    assert text.endswith("; download it again")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (
            {"weight_map": {"a": "/etc/passwd"}},
            "names '/etc/passwd'; expected names of files next to it",
        ),
        (
            {"weight_map": {"a": "../a.safetensors"}},
            "names '../a.safetensors'; expected names of files",
        ),
        ({"weight_map": {"a": 3}}, "names 3; expected names of files next to it"),
        ({"weight_map": {"a": "b.safetensors"}}, "b.safetensors cannot be read: No such file"),
        ({}, "lacks its metadata or weight_map"),
        ("{", "is not JSON"),
    ],
)
def test_an_index_names_files_next_to_it(
    tiny_folder: Path, content: dict[str, object] | str, reason: str
) -> None:
    (tiny_folder / "model.safetensors").unlink()
    text = content if isinstance(content, str) else json.dumps(content | {"metadata": {}})
    (tiny_folder / "model.safetensors.index.json").write_text("{}" if content == {} else text)

    assert reason in message(cpu(tiny_folder))


def test_a_link_to_nothing_and_a_fifo_are_named(tiny_folder: Path) -> None:
    file = tiny_folder / "model.safetensors"
    file.rename(tiny_folder / "weights")
    file.symlink_to("/nowhere/weights")

    assert message(cpu(tiny_folder)) == (
        "cannot load tiny-llama: model.safetensors cannot be read: a link to /nowhere/weights, "
        "which does not exist; download it again"
    )
    file.unlink()
    os.mkfifo(file)
    assert "is a FIFO; expected a file" in message(cpu(tiny_folder))


def test_a_shard_next_to_its_index_is_loaded(tiny_folder: Path) -> None:
    tiny_model().save_pretrained(tiny_folder, max_shard_size="20kB")
    (tiny_folder / "model.safetensors").unlink(missing_ok=True)

    loaded = load_model(cpu(tiny_folder))

    assert model_hash(loaded.model) == model_hash(tiny_model())
    shards = sorted(tiny_folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert loaded.origin.source_bytes == sum(file.stat().st_size for file in shards)


def test_a_model_that_is_not_a_language_model_is_one_line(tiny_folder: Path) -> None:
    (tiny_folder / "config.json").write_text('{"model_type": "vit"}')

    text = message(cpu(tiny_folder))
    assert "Unrecognized configuration class" in text
    assert len(text) < 400


@pytest.mark.parametrize("kept", [0, 4, 100, 5000, -10])
def test_weights_cut_short_are_one_line(tiny_folder: Path, kept: int) -> None:
    file = tiny_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])

    assert message(cpu(tiny_folder)).startswith("cannot load tiny-llama: ")


def test_a_checkpoint_that_lacks_a_weight_never_runs_with_random_values(tiny_folder: Path) -> None:
    edit_weights(tiny_folder, model__layers__2__mlp__up_proj__weight=None)

    assert message(cpu(tiny_folder)) == (
        "the checkpoint of tiny-llama lacks weights: model.layers.2.mlp.up_proj.weight; "
        "it does not match its config.json"
    )


def test_a_weight_of_another_shape_is_named(tiny_folder: Path) -> None:
    edit_weights(tiny_folder, model__layers__1__mlp__up_proj__weight=torch.zeros(3, 3))

    assert (
        "has weights of another shape: model.layers.1.mlp.up_proj.weight is (3, 3), "
        "expected (48, 32)" in message(cpu(tiny_folder))
    )


def test_weights_that_the_model_does_not_use_are_one_warning(
    tiny_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit_weights(tiny_folder, **{f"extra__{index}": torch.zeros(2) for index in range(5)})

    with caplog.at_level(logging.WARNING):
        load_model(cpu(tiny_folder))

    assert [record.getMessage() for record in caplog.records] == [
        (
            "the checkpoint of tiny-llama has weights that the model does not use: "
            "extra.0, extra.1, extra.2 and 2 more"
        )
    ]


@pytest.mark.parametrize("family", ["llama", "qwen2", "opt", "gpt_neox"])
def test_a_missing_tokenizer_is_an_error(tmp_path: Path, family: str) -> None:
    folder = save_tiny(tmp_path / family, family)
    for file in folder.glob("tokenizer*"):
        file.unlink()

    assert "tokenizer" in message(cpu(folder))


def test_a_damaged_tokenizer_is_one_line(tiny_folder: Path) -> None:
    (tiny_folder / "tokenizer.json").write_text("{")

    assert message(cpu(tiny_folder)).startswith("cannot load the tokenizer of tiny-llama: ")
    (tiny_folder / "tokenizer.json").write_text('{"added_tokens": [], "model": {"type": "none"}}')
    assert "did not match any variant" in message(cpu(tiny_folder))


def test_model_code_runs_only_when_trusted(tiny_folder: Path) -> None:
    config = json.loads((tiny_folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (tiny_folder / "config.json").write_text(json.dumps(config))
    (tiny_folder / "own.py").write_text("raise SystemExit('ran')")

    assert "set model.trust_remote_code: true if you trust it" in message(cpu(tiny_folder))


def test_a_weight_that_is_not_finite_is_named(tiny_folder: Path) -> None:
    weight = load_file(tiny_folder / "model.safetensors")["model.layers.3.mlp.up_proj.weight"]
    weight[4, 5] = torch.nan
    edit_weights(tiny_folder, model__layers__3__mlp__up_proj__weight=weight)

    text = message(cpu(tiny_folder), NumericsError)

    assert text.startswith(
        "weight model.layers.3.mlp.up_proj.weight contains NaN or infinity (1 of 1536 values): "
    )


def test_meta_model_counts_llama_2_7b_from_its_config_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA2_7B))

    model = load_meta_model(cpu(tmp_path))

    assert sum(parameter.numel() for parameter in model.parameters()) == 6_738_415_616
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_meta_model_has_the_shapes_of_the_loaded_model(tiny_folder: Path) -> None:
    meta, real = load_meta_model(cpu(tiny_folder)), load_model(cpu(tiny_folder)).model

    assert {n: p.shape for n, p in meta.named_parameters()} == {
        n: p.shape for n, p in real.named_parameters()
    }
    assert meta.dtype == real.dtype


def test_meta_model_knows_low_rank_linears(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    ranks = {"model.layers.1.mlp.up_proj": 3}
    config["quantization_config"] = {"quant_method": "grasp_lightning", "ranks": ranks}
    (tmp_path / "config.json").write_text(json.dumps(config))

    shapes = {name: tuple(p.shape) for name, p in load_meta_model(cpu(tmp_path)).named_parameters()}

    assert shapes["model.layers.1.mlp.up_proj.right.weight"] == (3, 32)
    assert shapes["model.layers.1.mlp.up_proj.left.weight"] == (48, 3)
    assert "model.layers.1.mlp.up_proj.weight" not in shapes


def test_meta_model_names_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"it has no config\.json"):
        load_meta_model(cpu(tmp_path))
