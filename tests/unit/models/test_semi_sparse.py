"""2:4 weights: their stored form on the CPU, and their products on a GPU."""

from pathlib import Path

import pytest
import torch
from torch.sparse import SparseSemiStructuredTensor
from transformers import PreTrainedModel

from grasp_lightning.cli import main
from grasp_lightning.config import ExportConfig, ModelConfig
from grasp_lightning.errors import ModelError
from grasp_lightning.linalg.sparsity import wanda
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.formats.semi_sparse import SemiSparseFormat
from grasp_lightning.models.loading import load_model
from grasp_lightning.models.semi_sparse import (
    open_2_4,
    packed_2_4,
    semi_sparse_problem,
    semi_sparse_tensors,
    unpacked_2_4,
)
from tests.conftest import byte_tokenizer, tiny_model

IDS = torch.arange(40, 60)[None]


def sparse_model(width: int = 128) -> PreTrainedModel:
    """A tiny model in bfloat16 whose linears are 2:4."""
    model = tiny_model(
        hidden_size=64, intermediate_size=width, num_attention_heads=2, num_key_value_heads=1
    )
    for linear in DecoderView(model).all_linears().values():
        weight = linear.weight.detach()
        weight.copy_(wanda(weight, torch.ones(weight.shape[1]), groups=(2, 4)))
    model.bfloat16()
    return model


def saved(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_a_packed_weight_has_half_the_values_and_unpacks_to_the_same() -> None:
    weight = wanda(torch.randn(5, 48), torch.ones(48), groups=(2, 4))
    weight[0, :12] = torch.tensor([0, 0, 0, 3.0, 0, 0, 0, 0, 7.0, 0, 0, 0])  # fewer than two
    packed = packed_2_4(weight)
    assert packed is not None
    values, positions = packed
    assert values.shape == (5, 24)
    assert (positions.shape, positions.dtype) == ((5, 6), torch.uint8)
    assert torch.equal(unpacked_2_4(values, positions), weight)
    weight[3, 4:7] = 1
    assert packed_2_4(weight) is None


def test_the_copy_is_smaller_and_opens_equal_on_the_cpu_and_not_as_an_ordinary_model(
    tmp_path: Path,
) -> None:
    loaded = load_model(ModelConfig(path=str(saved(sparse_model(), tmp_path / "source"))))
    folder = tmp_path / "copy"
    folder.mkdir()
    options = ExportConfig(model="", output_dir="")
    facts = SemiSparseFormat().write(loaded, folder, options, tuple)
    assert facts.num_linears == 4 * 7
    linears = DecoderView(loaded.model).all_linears().values()
    saved_bytes = sum(linear.weight.nbytes for linear in linears) * 7 / 16
    assert facts.bytes.compressed - facts.bytes.sparse == saved_bytes
    with torch.no_grad():
        assert torch.equal(open_2_4(folder, "cpu")(IDS).logits, loaded.model(IDS).logits)
    with pytest.raises(ModelError):
        load_model(ModelConfig(path=str(folder)))
    with pytest.raises(ModelError, match="has no 2:4 weights"):
        open_2_4(tmp_path / "source", "cpu")


def test_what_has_no_2_4_form_is_named() -> None:
    model = sparse_model()
    assert semi_sparse_problem(model) is None
    DecoderView(model).linears(2)["model.layers.2.mlp.up_proj"].weight.data[1, :3] = 1
    with pytest.raises(ModelError, match=r"model.layers.2.mlp.up_proj is not 2:4: some of its"):
        semi_sparse_tensors(model)
    problem = semi_sparse_problem(sparse_model(width=96))
    assert problem is not None
    assert "model.layers.0.mlp.down_proj of shape (64, 96)" in problem
    problem = semi_sparse_problem(model.float())
    assert problem is not None
    assert problem.startswith("has weights in float32, and 2:4 products exist in bfloat16")


def test_the_export_is_refused_in_one_line_without_a_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    source = saved(sparse_model(), tmp_path / "source")
    words = [f"--model={source}", f"--output_dir={tmp_path / 'out'}", "--format=2_4"]
    assert main(["export", *words]) == 2
    assert capsys.readouterr().err == (
        f"error: model: {source} cannot be stored in 2:4 form here: expected an NVIDIA GPU of "
        "compute capability 8.0 or higher, and torch finds none; the folder itself opens anywhere\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.gpu
def test_a_gpu_computes_with_the_2_4_weights(tmp_path: Path) -> None:
    source = saved(sparse_model(), tmp_path / "source")
    words = [f"--model={source}", f"--output_dir={tmp_path / 'out'}", "--format=2_4"]
    assert main(["export", *words]) == 0
    model = open_2_4(tmp_path / "out/model")
    for linear in DecoderView(model).all_linears().values():
        assert isinstance(linear.weight.data, SparseSemiStructuredTensor)
    expected = load_model(ModelConfig(path=str(source), device="cuda")).model
    with torch.no_grad():
        found, wanted = (m(IDS.cuda()).logits.float() for m in (model, expected))
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05 * float(wanted.abs().max()))
