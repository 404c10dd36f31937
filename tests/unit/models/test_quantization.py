"""Weights in int8, int4 and NF4: of each linear, saved, loaded, and refused."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import pad
from torchao.prototype.quantization.int4 import Int4OpaqueTensor
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, PreTrainedModel, TorchAoConfig

from grasp_lightning import Run, quantize
from grasp_lightning.errors import ConfigError, ModelError
from grasp_lightning.models import quantization
from grasp_lightning.models.checkpoint import save_model, save_quantized
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.int4 import packed_for_cpu, unpacked
from grasp_lightning.models.lowrank import low_rank_linears
from grasp_lightning.models.quantization import KINDS, Kind, quantize_model
from grasp_lightning.models.size import count_bytes, count_parameters
from grasp_lightning.models.surgery import apply_operations
from grasp_lightning.models.verification import verify_saved
from tests.conftest import tiny_model
from tests.unit.models.helpers import factorize_layers, narrow_layers

IDS = torch.arange(1, 9)[None]
# Relative to the product with the unquantized weight, for normal weights and inputs.
ERRORS = {"int8": 0.01, "int4": 0.12, "nf4": 0.14}

# Opens a folder without the package, computes, and saves it again.
CHILD = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "grasp_lightning":
            raise ModuleNotFoundError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
import torch
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
folder, again = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
with torch.no_grad():
    torch.save(model(torch.arange(1, 9)[None]).logits, f"{folder}/logits.pt")
model.save_pretrained(again)
"""


def compressed(family: str) -> PreTrainedModel:
    """A model with low-rank, narrowed and dense linears, of sizes that fill no group or block."""
    view = DecoderView(tiny_model(family).eval())
    apply_operations(view, *factorize_layers(view, (1,), rank=5))
    apply_operations(view, *narrow_layers(view, (0,), range(3, 40, 3)))
    return view.model


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(IDS).logits
    return result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_each_linear_computes_nearly_what_it_did(family: str, kind: Kind) -> None:
    model = compressed(family)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    original = copy.deepcopy(model)
    names = quantize_model(model, kind)
    assert len(names) == 7 * 4 + 7  # four layers, one of them with two factors per linear
    for name in names:
        before, after = original.get_submodule(name), model.get_submodule(name)
        assert isinstance(before, nn.Linear)
        assert isinstance(after, nn.Linear)
        x = torch.randn(6, before.in_features)
        with torch.no_grad():
            # A low-rank linear whose rank is padded passes the zeros on.
            want, got = before(x), after(pad(x, (0, after.in_features - before.in_features)))
        if before.bias is not None:
            want, got = want - before.bias, got - before.bias
        got = got[:, : want.shape[1]]
        assert float((got - want).norm() / want.norm()) < ERRORS[kind], name


@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_rank_changes_no_result(kind: Kind) -> None:
    model = compressed("qwen2")
    quantize_model(model, kind)
    for linear in low_rank_linears(model).values():
        x = torch.randn(3, linear.in_features)
        with torch.no_grad():
            hidden = linear.right(x)
            assert torch.count_nonzero(hidden[:, 5:]) == 0
            assert linear(x).shape == (3, linear.out_features)


@pytest.mark.parametrize("kind", KINDS)
def test_factors_of_rank_one_reload(kind: Kind, tmp_path: Path) -> None:
    view = DecoderView(tiny_model("llama").eval())
    apply_operations(view, *factorize_layers(view, (1,), rank=1))
    names = quantize_model(view.model, kind)
    # In int8, a left factor of one column stays as it is.
    assert len(names) == 7 * 3 + 7 * (1 if kind == "int8" else 2)
    view.model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(reloaded), logits(view.model))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_take_the_bytes_of_their_type(kind: Kind) -> None:
    model = tiny_model("llama", hidden_size=64, intermediate_size=128)
    parameters = count_parameters(model)
    linears = dict(quantization._linears(DecoderView(model), kind))
    num_weights = sum(linear.weight.numel() for linear in linears.values())
    num_rows = sum(linear.weight.shape[0] for linear in linears.values())
    rest = count_bytes(model) - 4 * num_weights
    quantize_model(model, kind)
    values = {
        "int8": num_weights + 5 * num_rows,  # a float32 scale and an int8 zero point per row
        "int4": num_weights // 2 + 4 * num_weights // 32,  # two bfloat16 numbers per 32
        "nf4": num_weights // 2 + 4 * num_weights // 64,  # a float32 scale per 64
    }
    assert count_bytes(model) - rest == values[kind]
    assert count_parameters(model) == parameters


def test_the_layout_of_the_cpu_can_be_undone() -> None:
    weight = torch.randn(48, 96)
    packed = Int4OpaqueTensor.from_hp(weight.bfloat16(), [1, 32])
    plain: Any = unpacked(packed)
    low, high = plain.qdata << 4 >> 4, plain.qdata >> 4  # signed: two's complement
    codes = torch.stack([low, high], dim=-1).flatten(1).float()
    scale, zero = (
        t.mT.float().repeat_interleave(32, dim=1) for t in (plain.scale, plain.zero_point)
    )
    assert float((codes * scale + zero - weight).norm() / weight.norm()) < 0.1
    again: Any = packed_for_cpu(plain)
    assert torch.equal(again.qdata, packed.qdata)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_a_saved_model_is_the_same_with_and_without_the_package(
    family: str, kind: Kind, tmp_path: Path
) -> None:
    model = compressed(family)
    quantize_model(model, kind)
    folder, again = tmp_path / "saved", tmp_path / "again"
    save_quantized(model, folder)
    verify_saved(model, folder)  # in a fresh process: tensors, logits, generated tokens
    process = subprocess.run(
        [sys.executable, "-P", "-c", CHILD, str(folder), str(again)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert torch.equal(torch.load(folder / "logits.pt"), logits(model))
    first, second = (load_file(path / "model.safetensors") for path in (folder, again))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_dense_model_is_saved_too(kind: Kind, tmp_path: Path) -> None:
    model = tiny_model("llama").eval()
    quantize(model, kind)
    model.save_pretrained(tmp_path)
    verify_saved(model, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_program_without_the_format_stops(kind: Kind, tmp_path: Path) -> None:
    model = compressed("llama")
    quantize_model(model, kind)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    with torch.device("meta"):
        dense = tiny_model("llama")
    shapes = {key: tensor.shape for key, tensor in dense.state_dict().items()}
    assert any(stored[key].shape != shapes[key] for key in stored.keys() & shapes.keys())


def test_a_quantized_model_is_not_quantized_compressed_or_saved_as_plain(tmp_path: Path) -> None:
    model = compressed("llama")
    quantize(model)
    for call in (lambda: quantize(model), lambda: save_model(model, tmp_path / "x")):
        with pytest.raises(ModelError, match="the model is quantized with torchao"):
            call()
    assert not (tmp_path / "x").exists()


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ConfigError, match=r"expected int8, int4, nf4, got 'int2'"):
        quantize(tiny_model("llama"), "int2")
    with pytest.raises(ConfigError, match=r"got Run; give its model: quantize\(run.model\)"):
        quantize(Run(Path("runs/x")))


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "find_spec", lambda _: None)
    with pytest.raises(ModelError, match="nf4 weights need bitsandbytes, which is not installed"):
        quantize(tiny_model("llama"), "nf4")


def test_int4_on_a_gpu_names_the_library_of_its_kernels() -> None:
    problem = quantization.quantization_problem("int4", "cuda")
    assert problem == "int4 weights need mslk, which is not installed: pip install mslk"


def test_a_family_without_linears_for_torchao_is_refused() -> None:
    with pytest.raises(ModelError, match="GPT2LMHeadModel has no linear that torchao can quantize"):
        quantize(tiny_model("gpt2"))


def test_a_second_quantization_config_names_the_call_to_use(tmp_path: Path) -> None:
    save_model(compressed("llama"), tmp_path)
    config = TorchAoConfig(Int8WeightOnlyConfig())
    with pytest.raises(
        ValueError, match=r"call grasp_lightning.quantize\(model, 'int8'\)"
    ) as error:
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert "\n" not in str(error.value)


def test_a_saved_model_names_the_library_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = compressed("llama")
    quantize_model(model, "int8")
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("grasp_lightning.models.lowrank.find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r"quantized with torchao.*pip install torchao"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
