"""A streamed model computes like a whole one, with at most two layers in memory."""

import re
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from weakref import WeakSet

import pytest
import torch
from huggingface_hub import ResolvedRevision
from torch import Tensor, nn

from grasp_lightning.commands.streamed import check_chain
from grasp_lightning.config import MethodConfig, ModelConfig
from grasp_lightning.errors import GraspError, ModelError
from grasp_lightning.models.calls import leave_uncalled
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.loading import load_model, model_hash
from grasp_lightning.models.streamed import StreamedWeights, dense_weights, streamed_weights
from grasp_lightning.models.streamed_loading import check_apart, load_streamed
from grasp_lightning.training.layer_streams import HiddenStates
from grasp_lightning.training.sweep import LayerSweep, unseen
from tests.conftest import save_tiny, tiny_model
from tests.unit.models.test_calls import gemma4

# Tied embeddings and biases, transposed linears, buffers that are not stored, softcapping.
FAMILIES = ("llama", "qwen2", "opt", "gpt2", "gemma2")


def settings(folder: Path, **more: object) -> ModelConfig:
    return ModelConfig(path=str(folder), device="cpu", loading="streamed", **more)  # type: ignore[arg-type]


def weights_of(model: nn.Module) -> StreamedWeights:
    found = streamed_weights(model)
    assert found is not None
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_streamed_model_computes_the_logits_of_the_whole_one(family: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / family, family)
    loaded, digest = load_streamed(settings(folder))
    whole = load_model(ModelConfig(path=str(folder), device="cpu")).model
    ids = torch.arange(24).reshape(2, 12)

    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, whole(ids).logits)
    assert digest == model_hash(whole)
    assert not weights_of(loaded.model).materialised
    view, dense = DecoderView(loaded.model), DecoderView(whole)
    names = list(dense.linears(1))
    found, expected = dense_weights(view, names), dense_weights(dense, names)
    assert all(torch.equal(found[name], expected[name]) for name in names)


def test_at_most_two_layers_have_their_weights_in_memory(tiny_folder: Path) -> None:
    loaded, _ = load_streamed(settings(tiny_folder))
    model, view = loaded.model, DecoderView(loaded.model)
    live: list[int] = []
    most: list[int] = []

    def count(*_: object) -> None:
        layers = [view.layer(index) for index in view.layer_indices]
        live.append(sum(any(p.device.type != "meta" for p in x.parameters()) for x in layers))
        most.append(len(weights_of(model).materialised))

    for index in view.layer_indices:
        view.layer(index).register_forward_hook(count)
    batches = {0: batch(0), 1: batch(1)}
    model.requires_grad_(False)
    sweep = LayerSweep(view, batches, HiddenStates(tiny_folder, 1e9), lambda items, _: items)
    sweep.up("up", until=3, kept_from=0)
    sweep.down("down", 0, "sampled", visit=unseen)

    assert max(live) == 1  # on the device; the next one may have been read
    assert max(most) == 2
    assert not weights_of(model).materialised


def batch(number: int) -> Mapping[str, Tensor]:
    ids = torch.arange(12).reshape(1, 12) + number
    real = torch.ones_like(ids, dtype=torch.bool)
    return {"input_ids": ids, "mask": real, "targets": real, "index": torch.tensor([number])}


def test_the_search_for_uncalled_linears_keeps_one_layer_at_a_time(tiny_folder: Path) -> None:
    view = DecoderView(load_streamed(settings(tiny_folder))[0].model)
    names = list(view.all_linears())
    alive: WeakSet[Saved] = WeakSet()
    most: list[int] = []

    def save(tensor: Tensor) -> Saved:
        saved = Saved(tensor)
        alive.add(saved)
        most.append(sum(each.tensor.nbytes for each in alive))
        return saved

    with torch.autograd.graph.saved_tensors_hooks(save, lambda saved: saved.tensor):
        leave_uncalled(view)

    layer = sum(tensor.nbytes for tensor in view.layer(1).state_dict().values())
    assert max(most) < 2 * layer
    assert list(view.all_linears()) == names


class Saved:
    """A tensor that autograd keeps."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def test_layers_that_share_a_weight_are_refused() -> None:
    model = tiny_model()
    view = DecoderView(model)
    shared = view.layer(1).get_parameter("input_layernorm.weight")
    view.layer(2).get_submodule("input_layernorm").register_parameter("weight", shared)

    with pytest.raises(ModelError, match="LlamaForCausalLM share weights, so they cannot be"):
        check_apart(model, view)


def test_layers_that_share_keys_and_values_are_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny")
    gemma4(num_kv_shared_layers=2, hidden_size_per_layer_input=8).save_pretrained(folder)
    view = DecoderView(load_streamed(settings(folder))[0].model)

    with pytest.raises(ModelError) as raised:
        check_chain(view, MethodConfig(name="grasp"))
    assert str(raised.value) == (
        "decoder layers of Gemma4ForCausalLM pass on more than hidden states, such as keys and "
        "values, so they cannot be streamed: set model.loading=whole"
    )


def test_an_absent_shard_is_refused(tiny_folder: Path) -> None:
    (tiny_folder / "model.safetensors").unlink()
    tiny_model().save_pretrained(tiny_folder, max_shard_size="20kB")
    assert load_streamed(settings(tiny_folder))[1] == model_hash(tiny_model())
    shard = sorted(tiny_folder.glob("model-*.safetensors"))[1]
    shard.unlink()

    with pytest.raises(ModelError, match=re.escape(f"cannot load tiny-llama: {shard.name}")):
        load_streamed(settings(tiny_folder))


@pytest.mark.parametrize(
    ("family", "more", "message"),
    [
        ("mixtral", {}, "have no model.layers.0.mlp.experts.down_proj, and model.loading streamed"),
        ("llama", {"trust_remote_code": True}, "but code of a checkpoint"),
    ],
)
def test_a_source_that_cannot_be_streamed_is_one_line(
    family: str, more: dict[str, object], message: str, tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path / family, family)

    with pytest.raises(GraspError, match=message) as caught:
        load_streamed(settings(folder, **more))
    assert str(caught.value).endswith("set model.loading=whole")


@pytest.fixture
def snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of several shards in the cache of the hub, as org/tiny; there is no network."""
    commit, repository = "0123456789" * 4, tmp_path / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    for module in ("constants", "hf_api", "file_download", "_snapshot_download"):
        monkeypatch.setattr(f"huggingface_hub.{module}.HF_HUB_CACHE", tmp_path, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = save_tiny(repository / "snapshots" / commit)
    (folder / "model.safetensors").unlink()
    tiny_model().save_pretrained(folder, max_shard_size="20kB")
    return folder


def test_a_hub_model_in_the_cache_is_streamed(snapshot: Path) -> None:
    loaded, digest = load_streamed(settings(Path("org/tiny")))

    assert digest == model_hash(tiny_model())
    assert (loaded.origin.name, loaded.origin.folder) == ("org/tiny", None)
    assert loaded.model.name_or_path == "org/tiny"
    assert weights_of(loaded.model)._files["lm_head.weight"].path.parent == snapshot


def test_shards_that_the_cache_lacks_are_downloaded(
    snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = sorted(snapshot.glob("model-*.safetensors"))[1]
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(ModelError, match=re.escape(f"{shard.name}")):
        load_streamed(settings(Path("org/tiny")))

    def download(name: str, *, revision: ResolvedRevision, ignore_patterns: list[str]) -> str:
        assert (name, revision.resolved) == ("org/tiny", snapshot.name)
        assert not any(fnmatch(shard.name, pattern) for pattern in ignore_patterns)
        shard.write_bytes(content)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert load_streamed(settings(Path("org/tiny")))[1] == model_hash(tiny_model())


def test_a_hub_model_without_safetensors_files_is_one_line(snapshot: Path) -> None:
    for file in snapshot.glob("model*"):
        file.unlink()

    with pytest.raises(ModelError, match="cannot get org/tiny from the Hugging Face hub") as caught:
        load_streamed(settings(Path("org/tiny")))
    assert "it has no safetensors files" in str(caught.value)


@pytest.mark.usefixtures("snapshot")
def test_a_hub_model_that_is_not_in_the_cache_is_one_line() -> None:
    with pytest.raises(
        ModelError, match="cannot get org/other from the Hugging Face hub"
    ) as caught:
        load_streamed(settings(Path("org/other")))
    assert "\n" not in str(caught.value)


def test_other_commands_refuse_to_stream(tiny_folder: Path) -> None:
    with pytest.raises(GraspError, match="which only compress, evaluate and export can do"):
        load_model(settings(tiny_folder))
