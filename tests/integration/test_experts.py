"""Mixtures of experts as a user compresses them: plans, kills, processes, quality."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from grasp_lightning.cli import main
from grasp_lightning.methods.expert_removal import removals_of_experts
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.expert_numbers import numbered_experts
from grasp_lightning.models.experts import stacked_reader
from grasp_lightning.models.mixtures import experts_in
from grasp_lightning.models.operations.narrow_experts import kept_channels, narrow_experts
from grasp_lightning.models.size import count_parameters
from grasp_lightning.models.surgery import apply_operations, parameters_after
from grasp_lightning.plan import NarrowExperts, Plan
from tests.conftest import STACKED_FAMILIES, byte_tokenizer, save_tiny, tiny_model
from tests.integration.forked import run_ranks
from tests.integration.killing import Kill
from tests.integration.test_methods import LENGTH, held_out_loss, losses, sentences, windows_of
from tests.integration.test_processes import assert_success

TRAINING = "grasp_lightning.training.calibration"
PUBLISHED: dict[str, dict[str, Any]] = {
    "gpt-oss-20b": {
        "model_type": "gpt_oss",
        "architectures": ["GptOssForCausalLM"],
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "vocab_size": 201088,
        "sliding_window": 128,
    },
    "Qwen3-30B-A3B": {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "vocab_size": 151936,
    },
    # DeepSeek-V3 with one tenth of its layers.
    "DeepSeek-V3-like": {
        "model_type": "deepseek_v3",
        "architectures": ["DeepseekV3ForCausalLM"],
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 6,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "n_group": 8,
        "topk_group": 4,
        "first_k_dense_replace": 1,
        "vocab_size": 129280,
    },
    "Mixtral-8x7B": {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 32000,
    },
}
# Families with shared experts, which stay unchanged.
SHARED = ("qwen2_moe", "deepseek_v3", "glm4_moe", "qwen3_next", "llama4_text")
SIZES = {  # billions
    "gpt-oss-20b": 20.9,
    "Qwen3-30B-A3B": 30.5,
    "DeepSeek-V3-like": 60.0,
    "Mixtral-8x7B": 46.7,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_can_lose_half_of_their_parameters(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"dtype": "bfloat16", "tie_word_embeddings": False, **PUBLISHED[name]}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    for ratio in (0.2, 0.3, 0.5):
        assert main(["plan", f"--model.path={tmp_path}", f"--method.removed_ratio={ratio}"]) == 0
        first, budget, *rest = capsys.readouterr().out.splitlines()
        assert first.startswith(f"{100 * ratio:.1f}% of ")
        total = int(first.split(" of ")[1].split(" ")[0].replace(",", ""))
        assert total / 1e9 == pytest.approx(SIZES[name], abs=0.06)
        assert budget.startswith("all linears and experts of")
        assert any("GB" in line for line in rest)


@pytest.mark.slow
@pytest.mark.parametrize("family", STACKED_FAMILIES)
def test_every_family_loses_a_share_and_opens_in_a_fresh_process(
    family: str, tmp_path: Path
) -> None:
    sizes = {"intermediate_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": 2}
    types: dict[str, Any] = {"gpt_oss": {"layer_types": None}}
    source = save_tiny(tmp_path / "tiny", family, **{**sizes, **types.get(family, {})})
    parts = ("calibration", "evaluation")
    words = [f"--{part}.{w}" for part in parts for w in ("source=pydoc", "seqlen=32")]
    words += [f"--{part}.num_samples=3" for part in parts]
    argv = [f"--model.path={source}", "--method.removed_ratio=0.3", *words]
    assert main(["compress", *argv, f"--output_dir={tmp_path / 'run'}"]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["removed_ratio"] >= 0.2999
    assert any(name.endswith("experts") for name in metrics["channels"])
    dense = opened(source).state_dict()
    shared = [name for name in dense if ".shared_expert" in name]
    assert bool(shared) == (family in SHARED)
    saved = opened(tmp_path / "run" / "model").state_dict()
    assert all(torch.equal(saved[name], dense[name]) for name in shared)
    for ratio in (0.2, 0.3, 0.5):
        assert main(["plan", f"--model.path={source}", f"--method.removed_ratio={ratio}"]) == 0


IDLE = (3, 6)  # experts that no token gets


@pytest.mark.slow
def test_a_mixture_without_a_key_for_its_width_becomes_an_ordinary_folder(tmp_path: Path) -> None:
    source = save_tiny(tmp_path / "tiny", "deepseek_v3", n_routed_experts=8)
    parts = ("calibration", "evaluation")
    words = [f"--{part}.{w}" for part in parts for w in ("source=pydoc", "seqlen=32")]
    words += [f"--{part}.num_samples=3" for part in parts]
    argv = [f"--model.path={source}", "--method.removed_ratio=0.1", "--method.target=plain", *words]
    assert main(["compress", *argv, f"--output_dir={tmp_path / 'run'}"]) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert [*metrics["experts"].values()] == 3 * [{"dense": 8, "compressed": 6}]
    content = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert content["n_routed_experts"] == 6
    assert "quantization_config" not in content
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "all mixtures keep 6 of 8 experts" in card
    model = opened(tmp_path / "run" / "model")
    assert model.num_parameters() == metrics["parameters"]["compressed"]


def trained_mixture() -> PreTrainedModel:
    """Two layers of ten experts: four can learn each of two kinds of text, and two get nothing."""
    model = tiny_model(
        "gpt_oss",
        num_hidden_layers=2,
        num_local_experts=10,
        intermediate_size=64,
        head_dim=8,
        layer_types=["full_attention"] * 2,
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.4)
            if name.endswith("router.bias"):
                parameter[[*IDLE]] = -1e4
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0)
    plain, loud = sentences(1, 300), sentences(4, 300).upper()
    windows = windows_of(plain + loud, 400)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0)).tolist()
    for step in range(120):
        batch = windows.batch(order[16 * (step % 25) :][:16])
        optimizer.zero_grad()
        losses(model, batch).mean().backward()
        optimizer.step()
    model.eval()
    return model


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("trained")
    trained_mixture().save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    text = sentences(2, 60) + sentences(5, 60).upper()
    (folder / "text.txt").write_text(text, encoding="utf-8")
    words = (f"path={folder / 'text.txt'}", "source=file", f"seqlen={LENGTH}")
    parts = [f"--{part}.{word}" for part in ("calibration", "evaluation") for word in words]
    return [
        f"--model.path={folder / 'model'}",
        "--method.removed_ratio=0.3",
        *parts,
        "--calibration.num_samples=24",
        "--evaluation.num_samples=4",
        "--trainer.checkpoint_seconds=0",
    ]


@pytest.fixture(scope="module")
def run(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert main(["compress", *settings, f"--output_dir={folder}"]) == 0
    return folder


def opened(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    return model


@torch.no_grad()
def loss_of_both(model: PreTrainedModel) -> float:
    """Nats per token on sentences of both kinds that nothing has seen."""
    texts = (sentences(3, 30), sentences(6, 30).upper())
    found = [losses(model, windows_of(text, 16).batch(range(16))).mean() for text in texts]
    return float(sum(found) / len(found))


def without_rare_experts(model: PreTrainedModel, size: int) -> None:
    """Remove the experts with the fewest calibration tokens until ``size`` parameters are left."""
    view, counts = DecoderView(model), dict[str, Tensor]()
    found = numbered_experts(view)
    assert found is not None

    def count(name: str, given: tuple[Any, ...]) -> None:
        counts[name] = counts.get(name, 0) + given[1].flatten().bincount(minlength=found.number)

    modules = {name: view.module(name) for name in found.mixtures}
    hooks = [
        module.register_forward_pre_hook(lambda _, given, name=name: count(name, given))
        for name, module in modules.items()
    ]
    loss_of_both(model)
    for hook in hooks:
        hook.remove()
    for left in range(found.number - 1, 1, -1):
        kept = {name: number.topk(left).indices.sort().values for name, number in counts.items()}
        operations = removals_of_experts(found, {n: tuple(k.tolist()) for n, k in kept.items()})
        if parameters_after(view, operations) <= size:
            break
    apply_operations(view, operations, {})


def narrowed_by_norm(model: PreTrainedModel, size: int) -> None:
    """Give all experts the smallest width that leaves ``size`` parameters, by norms of weights."""
    view = DecoderView(model)
    layouts = {n: layout for i in view.layer_indices for n, layout in experts_in(view, i).items()}
    step = 8 * sum(layout.channel_size for layout in layouts.values())
    steps = (count_parameters(model) - size) // step
    operations: list[NarrowExperts] = []
    tensors = {}
    for name, layout in layouts.items():
        module = view.module(name)
        reader = stacked_reader(module, layout)
        writer = module.get_parameter(layout.writer).detach()
        squares = (writer.mT if layout.is_transposed else writer).square().sum(2)  # (E, p I)
        rows = layout.rows(torch.arange(layout.width)[:, None])  # (I, p)
        norms = reader.norm(dim=1) * squares[:, rows].sum(2).sqrt()
        kept = norms.topk(layout.width - 8 * steps).indices.sort(-1).values
        operations.append(narrow_experts(name, kept.tolist()))
        assert torch.equal(kept_channels(operations[-1]), kept)
        pairs = zip(reader, kept, strict=True)
        tensors[f"{name}.down_proj"] = torch.stack([weight[:, chosen] for weight, chosen in pairs])
    apply_operations(view, operations, tensors)


@pytest.mark.slow
def test_it_beats_rare_experts_and_norms_of_weights(settings: list[str], run: Path) -> None:
    source = Path(settings[0].partition("=")[2])
    metrics = json.loads((run / "metrics.json").read_text())
    size = metrics["parameters"]["compressed"]
    assert metrics["removed_ratio"] >= 0.2999
    assert any(name.endswith("experts") for name in metrics["channels"])
    removed = Plan.from_json((run / "plan.json").read_text()).experts
    assert {*removed.values()} == {(10 - len(IDLE), 10)}
    dense, ours = loss_of_both(opened(source)), loss_of_both(opened(run / "model"))
    narrow, fewer = opened(source), opened(source)
    narrowed_by_norm(narrow, size)
    without_rare_experts(fewer, size)
    assert count_parameters(narrow) >= size
    # The next number of experts is far from the size.
    assert 0.98 * size <= count_parameters(fewer) <= size
    for rival in (narrow, fewer):
        assert ours - dense < 0.5 * (loss_of_both(rival) - dense), (dense, ours)


@pytest.mark.slow
def test_two_processes_and_groups_of_layers_decide_as_one_does(
    settings: list[str], run: Path, tmp_path: Path
) -> None:
    two = [*settings, "--trainer.devices=2", f"--output_dir={tmp_path / 'two'}"]
    assert_success(["compress", *two], 2)
    groups = [*settings, "--statistics.max_memory=1e-6", f"--output_dir={tmp_path / 'groups'}"]
    assert main(["compress", *groups]) == 0
    assert len([*(tmp_path / "groups").glob("statistics-*-of-00002.safetensors")]) == 2
    for folder in (tmp_path / "two", tmp_path / "groups"):
        assert (folder / "plan.json").read_bytes() == (run / "plan.json").read_bytes()


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_files(
    settings: list[str], run: Path, tmp_path: Path
) -> None:
    argv = ["compress", *settings, f"--output_dir={tmp_path / 'run'}"]
    where = Kill(TRAINING, "CalibrationModule", "training_step", 2)
    assert run_ranks(argv, 1, where).codes == [-signal.SIGKILL]
    assert main(argv) == 0
    for name in ("plan.json", "factors.safetensors", "model/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (run / name).read_bytes()


@pytest.mark.slow
def test_a_run_is_cut_again_and_for_an_ordinary_folder(run: Path, tmp_path: Path) -> None:
    argv = ["compress", f"--from_scores={run}", "--method.removed_ratio=0.4"]
    assert main([*argv, f"--output_dir={tmp_path / 'any'}"]) == 0
    assert main([*argv, "--method.target=plain", f"--output_dir={tmp_path / 'plain'}"]) == 0
    content = json.loads((tmp_path / "plain" / "model" / "config.json").read_text())
    assert "quantization_config" not in content
    assert content["intermediate_size"] == 32
    plan = Plan.from_json((tmp_path / "any" / "plan.json").read_text())
    assert any(isinstance(op, NarrowExperts) for op in plan.operations)
    model = opened(tmp_path / "plain" / "model")
    assert not (tmp_path / "plain" / "model" / "modeling_grasp.py").exists()
    assert held_out_loss(model) < 9
