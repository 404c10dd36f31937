"""Saved models, opened in fresh processes with and without the package."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import grasp_lightning
from grasp_lightning.errors import ModelError
from grasp_lightning.methods.seams import seam_operations
from grasp_lightning.models.checkpoint import save_model
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.lowrank import GraspConfig
from grasp_lightning.models.stream import stream_of
from grasp_lightning.models.surgery import apply_operations
from grasp_lightning.plan import DropLayers, FactorizeLinear, SliceStream
from tests.conftest import (
    ALL_FAMILIES,
    FAMILIES,
    MOE_FAMILIES,
    byte_tokenizer,
    tiny_model,
)
from tests.unit.models.helpers import factorize_layers, narrow_layers, random_factors

ROOT = Path(grasp_lightning.__file__).parents[1]
NEW_TOKENS = 8

# One process opens many folders: importing transformers takes seconds.
CHILD = """
import json, sys
from pathlib import Path

mode, root = sys.argv[1], Path(sys.argv[2])

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "grasp_lightning":
            raise ModuleNotFoundError(f"{name} is blocked")

if "package" in mode:
    import transformers, grasp_lightning
else:
    sys.meta_path.insert(0, Blocker())
    try:
        import grasp_lightning
    except ModuleNotFoundError:
        pass
    else:
        raise SystemExit("grasp_lightning must not be importable here")
    import transformers

import torch

torch.set_num_threads(1)  # as in the tests: products of experts round by the number of threads
from safetensors.torch import load_file

options = {"trust_remote_code": True} if "trust" in mode else {}

def opened(folder, auto, dtype):
    model, info = auto.from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
    return model.eval(), sorted(key for keys in info.values() for key in keys)

def check(folder):
    expected = load_file(folder.parent / (folder.name + ".safetensors"))
    ids, dtype = expected["ids"], expected["logits"].dtype
    model, problems = opened(folder, transformers.AutoModelForCausalLM, dtype)
    if "trust" in mode and "again" in folder.name:
        for round in ("second", "third"):
            folder = Path(round) / folder.name
            model.save_pretrained(folder)
            model, problems = opened(folder, transformers.AutoModelForCausalLM, dtype)
    with torch.no_grad():
        result = {
            "problems": problems,
            "logits": torch.equal(model(ids).logits, expected["logits"]),
            "class": type(model).__module__,
            "auto_map": hasattr(model.config, "auto_map"),
        }
        for use_cache, name in ((True, "cached"), (False, "uncached")):
            tokens = model.generate(
                ids, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False,
                use_cache=use_cache,
            )
            result[name] = torch.equal(tokens, expected[name])
        base, _ = opened(folder, transformers.AutoModel, dtype)
        hidden = base(ids).last_hidden_state
        result["base"] = torch.equal(hidden, expected["hidden"])
    return result

results = {}
for file in sorted(root.glob("*.safetensors")):
    try:
        results[file.stem] = check(file.with_suffix(""))
    except Exception as error:
        results[file.stem] = {"error": f"{type(error).__name__}: {error}"}
        try:
            opened(file.with_suffix(""), transformers.AutoModel, torch.float32)
        except Exception as error:
            results[file.stem]["base error"] = f"{type(error).__name__}: {error}"
print("RESULTS" + json.dumps(results))
""".replace("NEW_TOKENS", str(NEW_TOKENS))


def low_rank(model: PreTrainedModel, rank: int = 5) -> PreTrainedModel:
    """Factorize every linear of the two middle layers with random factors."""
    view = DecoderView(model)
    operations, tensors = factorize_layers(view, (1, 2), rank)
    apply_operations(view, operations, tensors)
    return model


def narrowed(model: PreTrainedModel) -> PreTrainedModel:
    """Keep 20 channels of the MLPs of two layers."""
    view = DecoderView(model)
    apply_operations(view, *narrow_layers(view, (1, 3), range(3, 43, 2)))
    return model


def factorize_one(model: PreTrainedModel, module: str, rank: int) -> None:
    view = DecoderView(model)
    operations = [FactorizeLinear(module=module, rank=rank, components=None)]
    apply_operations(view, operations, random_factors(view, operations))


def dropped(model: PreTrainedModel, layers: tuple[int, ...] = (0, 2)) -> PreTrainedModel:
    apply_operations(DecoderView(model), [DropLayers(layers=layers)], {})
    return model


def seamed(model: PreTrainedModel, layers: tuple[int, ...] = (1, 3)) -> PreTrainedModel:
    """Delete layers, with a random seam for each run of them."""
    view = DecoderView(model)
    operations = [DropLayers(layers=layers), *seam_operations(view, layers)]
    apply_operations(view, operations, random_factors(view, operations))
    return model


def sliced(model: PreTrainedModel) -> PreTrainedModel:
    """Slice the hidden states to 20 random directions at every block."""
    view = DecoderView(model)
    stream = stream_of(view)
    operation = SliceStream(width=20, embeddings=stream.embeddings, reads=stream.reads)
    apply_operations(view, [operation], random_factors(view, [operation]))
    return model


@torch.no_grad()
def behaviour(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    generate: Any = model.generate  # Any: the base class has it only with a head
    ids = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(2))
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    return {
        "ids": ids,
        "logits": model(ids).logits,
        "hidden": model.base_model(ids).last_hidden_state,
        "cached": generate(ids, use_cache=True, **options),
        "uncached": generate(ids, use_cache=False, **options),
    }


def reopened(
    model: PreTrainedModel, folder: Path, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    save_model(model, folder)
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert not loaded.training
    return loaded


Case = Callable[[Path], PreTrainedModel]


def cases_of(family: str) -> dict[str, Case]:
    def model() -> PreTrainedModel:
        return tiny_model(family)

    return {
        family: lambda _: low_rank(model()),
        f"{family}-dropped": lambda _: dropped(model()),
        f"{family}-low-rank-then-dropped": lambda _: dropped(low_rank(model())),
        # .to(bfloat16) would round rotary frequencies, from_pretrained computes them in float32.
        f"{family}-bf16": lambda scratch: reopened(low_rank(model()), scratch, torch.bfloat16),
        f"{family}-saved-twice": lambda scratch: reopened(low_rank(model()), scratch),
    }


def all_at_once(family: str) -> Case:
    return lambda scratch: reopened(dropped(low_rank(tiny_model(family))), scratch, torch.bfloat16)


def narrowed_and_more(family: str) -> Case:
    # With layers of two widths left: those of one width would make an ordinary model.
    return lambda scratch: reopened(
        dropped(narrowed(tiny_model(family)), (0,)), scratch, torch.bfloat16
    )


def seamed_twice(family: str) -> Case:
    # The only layer left between the runs holds two seams.
    return lambda scratch: reopened(seamed(tiny_model(family), (0, 2, 3)), scratch, torch.bfloat16)


CONFIGURATION = """
from transformers import LlamaConfig


class CustomConfig(LlamaConfig):
    model_type = "custom_llama"
"""
MODELING = """
import transformers

from .configuration_custom import CustomConfig


class CustomModel(transformers.LlamaModel):
    config_class = CustomConfig


class CustomForCausalLM(transformers.LlamaForCausalLM):
    config_class = CustomConfig
"""


def write_custom(scratch: Path, *, has_config: bool = True) -> None:
    """Write a checkpoint with its own code, optionally for its config, too."""
    tiny_model().save_pretrained(scratch)
    config, modeling = read_config(scratch), MODELING
    config["auto_map"] = {
        "AutoModel": "modeling_custom.CustomModel",
        "AutoModelForCausalLM": "modeling_custom.CustomForCausalLM",
    }
    if has_config:
        (scratch / "configuration_custom.py").write_text(CONFIGURATION)
        config["auto_map"]["AutoConfig"] = "configuration_custom.CustomConfig"
        config["model_type"] = "custom_llama"
    else:
        modeling = modeling.replace(".configuration_custom", "transformers")
        modeling = modeling.replace("CustomConfig", "LlamaConfig")
    (scratch / "modeling_custom.py").write_text(modeling)
    (scratch / "config.json").write_text(json.dumps(config))


def custom(scratch: Path, *, has_config: bool = True) -> PreTrainedModel:
    """Return the model of such a checkpoint."""
    write_custom(scratch, has_config=has_config)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(scratch, trust_remote_code=True)
    return model


CUSTOM: dict[str, Case] = {
    "custom-again": lambda scratch: low_rank(custom(scratch)),
    "custom-model-only-again": lambda scratch: low_rank(custom(scratch, has_config=False)),
}
FAST: dict[str, Case] = {
    **{family: cases_of(family)[family] for family in FAMILIES},
    "llama-dropped": cases_of("llama")["llama-dropped"],
    "llama-saved-twice": cases_of("llama")["llama-saved-twice"],
    "llama-sharded": lambda _: low_rank(tiny_model("llama")),
    # Dense, narrowed and low-rank linears side by side, in several files, saved twice.
    "llama-narrowed-and-low-rank-sharded": lambda scratch: reopened(
        narrowed(low_rank(tiny_model("llama"))), scratch
    ),
    "llama-seamed-and-low-rank-sharded": lambda _: seamed(low_rank(tiny_model("llama")), (0, 3)),
    "gpt2-seamed-again": lambda _: seamed(tiny_model("gpt2")),
    # Tied before; norms with biases that the head gets; two blocks in one read.
    "qwen2-sliced-sharded": lambda _: sliced(tiny_model("qwen2")),
    "opt-sliced-again": lambda _: sliced(tiny_model("opt")),
    "gpt_neox-sliced": lambda _: sliced(tiny_model("gpt_neox")),
    "gpt2-narrowed-again": lambda _: narrowed(tiny_model("gpt2")),
    # Families that read the weights of linears, to initialise them or to multiply by them.
    "mamba-again": lambda _: low_rank(tiny_model("mamba")),
    "mamba2": lambda _: low_rank(tiny_model("mamba2")),
}
SLOW: dict[str, Case] = {
    **{name: case for family in FAMILIES for name, case in cases_of(family).items()},
    # Cases that test_families.py does not cover, one of each.
    **{
        f"{family}-low-rank-then-dropped-bf16-saved-twice": all_at_once(family)
        for family in ALL_FAMILIES
        if family not in FAMILIES
    },
    **{
        f"{family}-narrowed-then-dropped-bf16-saved-twice": narrowed_and_more(family)
        for family in ALL_FAMILIES
        if family not in MOE_FAMILIES
    },
    **{
        f"{family}-sliced-bf16-saved-twice": partial(
            lambda name, scratch: reopened(sliced(tiny_model(name)), scratch, torch.bfloat16),
            family,
        )
        for family in ("phi3", "gpt2", "falcon_new")
    },
    "opt-tied": lambda _: low_rank(tiny_model("opt", tie_word_embeddings=True)),
    "opt-untied": lambda _: low_rank(tiny_model("opt", tie_word_embeddings=False)),
    "llama-biased-tied": lambda _: low_rank(
        tiny_model("llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    ),
    **{
        f"{family}-seamed-bf16-saved-twice": seamed_twice(family)
        for family in ALL_FAMILIES
        if family != "gpt2"
    },
    # Attention and MLP one after the other, and positions as a bias of the scores.
    "falcon-alibi": lambda _: low_rank(
        tiny_model("falcon", alibi=True, multi_query=False, parallel_attn=False, bias=True)
    ),
    "qwen2-windows-dropped": lambda _: dropped(
        tiny_model(
            "qwen2",
            use_sliding_window=True,
            sliding_window=4,
            layer_types=["full_attention", "sliding_attention"] * 2,
        ),
        (1, 2),
    ),
}
SLOW = {name: case for name, case in SLOW.items() if name not in FAST}
TIERS = {"fast": {**FAST, **CUSTOM}, "slow": SLOW}
GOOD = {
    "problems": [],
    "logits": True,
    "auto_map": False,
    "cached": True,
    "uncached": True,
    "base": True,
}

Outcome = Callable[[str, str], dict[str, Any]]


def save_all(cases: dict[str, Case], root: Path, scratch: Path) -> None:
    for name, case in cases.items():
        model = case(scratch / name)
        before = behaviour(model)
        max_shard_size = "20KB" if "sharded" in name else "5GB"
        save_model(model, root / name, tokenizer=byte_tokenizer(), max_shard_size=max_shard_size)
        after = behaviour(model)
        assert all(torch.equal(after[key], before[key]) for key in before), f"save changed {name}"
        save_file(before, root / f"{name}.safetensors")


def run_child(mode: str, root: Path, working_folder: Path) -> dict[str, dict[str, Any]]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(working_folder / "modules")}
    if "package" in mode:
        environment["PYTHONPATH"] = str(ROOT)
    process = subprocess.run(
        [sys.executable, "-P", "-c", CHILD, mode, str(root)],
        cwd=working_folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    results: dict[str, dict[str, Any]] = json.loads(process.stdout.rpartition("RESULTS")[2])
    return results


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder with the models of one tier, saved when first asked for."""

    @cache
    def tier_folder(tier: str) -> Path:
        root = tmp_path_factory.mktemp(tier)
        save_all(TIERS[tier], root, tmp_path_factory.mktemp("scratch"))
        return root

    return tier_folder


@pytest.fixture(scope="module")
def outcome(saved: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """What a process in one mode saw on opening a model; one process per mode."""
    root = tmp_path_factory.mktemp("all")
    for tier in TIERS:
        for entry in saved(tier).iterdir():
            (root / entry.name).symlink_to(entry)

    @cache
    def results(mode: str) -> dict[str, dict[str, Any]]:
        return run_child(mode, root, tmp_path_factory.mktemp("child"))

    return lambda mode, name: results(mode)[name]


def names(*, plain: bool | None = None, fast: bool = True) -> list[Any]:
    """Names of all cases for parametrisation; plain ones have no low-rank linear."""
    chosen = [
        name
        for name in (*FAST, *SLOW)
        if plain is None or plain == (name.endswith("-dropped") and "low-rank" not in name)
    ]
    return [
        name if fast and name in FAST else pytest.param(name, marks=pytest.mark.slow)
        for name in chosen
    ]


def result_is_good(result: dict[str, Any]) -> bool:
    rest = {key: value for key, value in result.items() if key != "class"}
    assert rest == GOOD
    return bool(result["class"].startswith("transformers.models."))


@pytest.mark.slow
@pytest.mark.parametrize("name", names())
def test_a_saved_model_loads_bit_equal_after_importing_the_package(
    outcome: Outcome, name: str
) -> None:
    assert result_is_good(outcome("package", name))


@pytest.mark.slow
@pytest.mark.parametrize("name", names(plain=False))
def test_loading_without_the_package_stops_instead_of_giving_random_layers(
    outcome: Outcome, name: str
) -> None:
    result = outcome("bare", name)
    assert "mismatch" in result["error"]
    assert "mismatch" in result["base error"]


@pytest.mark.slow
@pytest.mark.parametrize("name", names(plain=True))
def test_a_model_with_dropped_layers_only_loads_without_the_package(
    outcome: Outcome, saved: Callable[[str], Path], name: str
) -> None:
    assert result_is_good(outcome("bare", name))
    folder = saved("fast" if name in FAST else "slow") / name
    assert not {"quantization_config", "auto_map"} & set(read_config(folder))
    assert not (folder / "modeling_grasp.py").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", names())
def test_remote_code_loads_bit_equal_without_the_package(outcome: Outcome, name: str) -> None:
    assert result_is_good(outcome("trust", name))


@pytest.mark.slow
@pytest.mark.parametrize("name", CUSTOM)
def test_a_model_with_code_of_its_own_opens_without_the_package_and_can_be_saved_again(
    outcome: Outcome, name: str
) -> None:
    result = outcome("trust", name)
    assert ".modeling_custom" in result.pop("class")
    assert result == {**GOOD, "auto_map": True}


@pytest.mark.parametrize("name", names(fast=False))
def test_remote_code_next_to_the_package_changes_nothing(outcome: Outcome, name: str) -> None:
    assert result_is_good(outcome("package and trust", name))


def read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def test_the_sharded_case_has_several_files_with_right_factors_under_dense_keys(
    saved: Callable[[str], Path],
) -> None:
    folder = saved("fast") / "llama-sharded"
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    keys = set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"])
    assert {
        "model.layers.1.mlp.up_proj.weight",
        "model.layers.1.mlp.up_proj.left.weight",
    } <= keys
    assert not [key for key in keys if key.endswith(".right.weight")]


def test_the_config_names_ranks_sorted_and_under_current_numbers(tmp_path: Path) -> None:
    save_model(dropped(low_rank(tiny_model())), tmp_path)
    quantization = read_config(tmp_path)["quantization_config"]
    assert quantization["quant_method"] == "grasp_lightning"
    assert list(quantization["ranks"]) == sorted(quantization["ranks"])
    # Layers 0 and 2 were dropped, so layer 1 is now layer 0.
    assert {name.split(".")[2] for name in quantization["ranks"]} == {"0"}
    assert set(quantization["ranks"].values()) == {5}


def test_a_seam_takes_the_key_of_a_parameter_of_another_shape(tmp_path: Path) -> None:
    save_model(seamed(tiny_model(), (1, 3)), tmp_path)
    norm = "model.layers.1.{}_layernorm.weight"
    assert read_config(tmp_path)["quantization_config"] == {
        "quant_method": "grasp_lightning",
        "ranks": {},
        "seams": {
            "model.layers.1.seam": norm.format("input"),
            "model.layers.1.seam_after": norm.format("post_attention"),
        },
    }
    stored = load_file(tmp_path / "model.safetensors")
    assert stored[norm.format("input")].shape == (32, 32)
    assert stored["model.layers.1.seam.held"].shape == (32,)
    assert not [key for key in stored if key.endswith(("seam.weight", "seam_after.weight"))]


@pytest.mark.parametrize("key", ["input_layernorm.weight", "seam.held"])
def test_a_seam_without_its_tensor_is_refused(tmp_path: Path, key: str) -> None:
    save_model(seamed(tiny_model(), (0, 1)), tmp_path)
    file = tmp_path / "model.safetensors"
    stored = load_file(file)
    del stored[f"model.layers.0.{key}"]
    save_file(stored, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"the weight files lack model.layers.0.{key}"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_narrowed_linears_are_stored_under_their_own_names_with_their_shapes(
    tmp_path: Path,
) -> None:
    model = narrowed(tiny_model("phi3"))
    save_model(model, tmp_path)
    quantization = read_config(tmp_path)["quantization_config"]
    assert quantization["ranks"] == {}
    assert quantization["shapes"] == {
        f"model.layers.{layer}.mlp.{name}": shape
        for layer in (1, 3)
        for name, shape in (("down_proj", [32, 20]), ("gate_up_proj", [40, 32]))
    }
    stored = load_file(tmp_path / "model.safetensors")
    assert stored.keys() == tiny_model("phi3").state_dict().keys()
    for name, shape in quantization["shapes"].items():
        assert list(stored[f"{name}.weight"].shape) == shape


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_narrowed_model_saved_without_its_head_loads_with_one(
    family: str, tmp_path: Path
) -> None:
    base: Any = narrowed(tiny_model(family)).base_model  # Any: a plain Module to mypy
    save_model(base, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.arange(8)[None]
    assert torch.equal(model.base_model(ids).last_hidden_state, base(ids).last_hidden_state)
    modules = dict(model.named_modules())
    assert model.config.quantization_config.shapes.keys() <= modules.keys()


def test_a_folder_has_everything_a_user_expects(tmp_path: Path) -> None:
    save_model(low_rank(tiny_model()), tmp_path, tokenizer=byte_tokenizer())
    assert {file.name for file in tmp_path.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "modeling_grasp.py",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_a_second_save_leaves_no_weights_of_the_first(tmp_path: Path) -> None:
    model = low_rank(tiny_model())
    save_model(model, tmp_path)
    save_model(model, tmp_path, max_shard_size="20KB")
    assert not (tmp_path / "model.safetensors").exists()
    plain = tiny_model(seed=1)
    save_model(plain, tmp_path)
    assert [file.name for file in tmp_path.glob("model*")] == ["model.safetensors"]
    ids = torch.arange(8)[None]
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, plain(ids).logits
    )


def test_plain_save_pretrained_after_surgery_is_as_safe_as_save_model(tmp_path: Path) -> None:
    model = low_rank(tiny_model("gpt_neox"))
    ids = torch.arange(8)[None]
    expected = model(ids).logits
    for step in ("in memory", "after loading"):
        folder = tmp_path / step
        model.save_pretrained(folder)
        assert "auto_map" not in read_config(folder)
        keys = load_file(folder / "model.safetensors")
        assert not [key for key in keys if key.endswith((".right.weight", "$"))]
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_saved_without_its_head_loads_with_one(family: str, tmp_path: Path) -> None:
    base: Any = low_rank(tiny_model(family)).base_model  # Any: a plain Module to mypy
    save_model(base, tmp_path)
    load: Any = AutoModelForCausalLM.from_pretrained  # Any: two results with loading info
    model, info = load(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) <= {"lm_head.weight"}
    assert not info["unexpected_keys"]
    ids = torch.arange(8)[None]
    assert torch.equal(model.eval().base_model(ids).last_hidden_state, base(ids).last_hidden_state)
    assert all(
        name in dict(model.named_modules()) for name in model.config.quantization_config.ranks
    )


def test_factors_are_not_initialised_as_their_family_does_with_linears_of_that_name(
    tmp_path: Path,
) -> None:
    model = tiny_model("xlstm")
    factorize_one(model, "backbone.blocks.1.mlstm_layer.igate_preact", 2)
    ids = torch.arange(8)[None]
    expected = model(ids, use_cache=False).logits
    assert torch.equal(reopened(model, tmp_path)(ids, use_cache=False).logits, expected)


def test_a_loaded_model_may_change_dtype_and_train(tmp_path: Path) -> None:
    model = reopened(low_rank(tiny_model()), tmp_path)
    assert model.half().dtype == torch.float16
    model.float()(torch.arange(8)[None]).logits.sum().backward()
    gradients = {key: value.grad for key, value in model.named_parameters()}
    for side in ("left", "right"):
        gradient = gradients[f"model.layers.1.mlp.up_proj.{side}.weight"]
        assert gradient is not None
        assert gradient.abs().sum() > 0


def test_save_refuses_a_rank_whose_right_factor_would_pass_for_the_dense_weight(
    tmp_path: Path,
) -> None:
    model = low_rank(tiny_model(num_key_value_heads=1), rank=8)  # k_proj: 32 -> 8
    with pytest.raises(ModelError, match=r"k_proj has rank 8, as many as its output features"):
        save_model(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    with pytest.raises(ValueError, match=r"k_proj has rank 8, as many as its output features"):
        model.save_pretrained(tmp_path / "model")
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("module", "rank"),
    [("attn.c_proj", 32), ("mlp.c_proj", 32)],  # (in, out): 32 x 32 and 48 x 32
)
def test_save_refuses_a_rank_of_a_transposed_linear_that_saves_nothing(
    tmp_path: Path, module: str, rank: int
) -> None:
    model = tiny_model("gpt2")
    factorize_one(model, f"transformer.h.1.{module}", rank)
    with pytest.raises(ModelError, match=rf"{module} has rank 32, as many as its output features"):
        save_model(model, tmp_path / "model")


@pytest.mark.parametrize(
    ("module", "rank"),
    # The right factor is (rank, in), the stored weight (in, out): 32 x 48, 32 x 32, 32 x 96.
    [("mlp.c_fc", 32), ("attn.c_proj", 31), ("attn.c_attn", 32), ("attn.c_attn", 1)],
)
def test_a_loader_that_ignores_the_ranks_stops_at_a_transposed_linear(
    tmp_path: Path, module: str, rank: int
) -> None:
    model = tiny_model("gpt2")
    factorize_one(model, f"transformer.h.1.{module}", rank)
    save_model(model, tmp_path)
    config = read_config(tmp_path)
    del config["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_save_refuses_a_model_quantized_otherwise(tmp_path: Path) -> None:
    model = tiny_model()
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(ModelError, match="is quantized with bitsandbytes"):
        save_model(model, tmp_path)


def test_save_refuses_a_config_that_would_rebuild_another_model(tmp_path: Path) -> None:
    # Every second layer is sparse in this model: after a drop the wrong ones would be.
    model = dropped(tiny_model("qwen3_moe", decoder_sparse_step=2), (0,))
    with pytest.raises(ModelError, match=r"would rebuild another model: model.layers.0.mlp"):
        save_model(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_save_refuses_a_layer_that_computes_otherwise_than_its_config_says(tmp_path: Path) -> None:
    model = tiny_model("gemma3_text")
    model.get_submodule("model.layers.2.self_attn").is_sliding = False  # type: ignore[assignment]  # plain attribute
    with pytest.raises(ModelError, match=r"self_attn.is_sliding has value True there but False"):
        save_model(model, tmp_path / "model")


def test_numbers_of_dense_layers_follow_a_drop(tmp_path: Path) -> None:
    model = dropped(tiny_model("qwen3_moe", mlp_only_layers=[1]), (0,))
    ids = torch.arange(8)[None]
    loaded = reopened(model, tmp_path)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_save_draws_no_random_numbers(tmp_path: Path) -> None:
    model = low_rank(tiny_model())
    state = torch.get_rng_state()
    save_model(model, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("module", "rank", "message"),
    [
        ("mlp.nothing", 5, "names model.layers.1.mlp.nothing, but LlamaForCausalLM has no such"),
        ("mlp.up_proj", 33, "rank 33 of model.layers.1.mlp.up_proj does not fit"),
        (
            "mlp.up_proj",
            -1,
            "rank of model.layers.1.mlp.up_proj must be an integer of at least 0, got",
        ),
        ("mlp", 5, "model.layers.1.mlp must be a Linear, got LlamaMLP"),
    ],
)
def test_a_wrong_entry_of_the_config_is_named(
    tmp_path: Path, module: str, rank: int, message: str
) -> None:
    save_model(low_rank(tiny_model()), tmp_path)
    config = read_config(tmp_path)
    config["quantization_config"]["ranks"][f"model.layers.1.{module}"] = rank
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_rank_other_than_the_stored_one_does_not_load(tmp_path: Path) -> None:
    save_model(low_rank(tiny_model()), tmp_path)
    config = read_config(tmp_path)
    config["quantization_config"]["ranks"]["model.layers.1.mlp.up_proj"] = 4
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_dense_checkpoint_cannot_be_declared_low_rank(tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match="require the model to be pre-quantized"):
        AutoModelForCausalLM.from_pretrained(
            tiny_folder, quantization_config=GraspConfig({"model.layers.1.mlp.up_proj": 4})
        )
