"""Models with fewer heads and added biases, from ``compress`` to training and export."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from grasp_lightning.cli import main
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.lowrank import biases_of, has_replaced
from grasp_lightning.models.surgery import apply_operations
from grasp_lightning.plan import AddBias, Plan, RemoveHeads
from tests.conftest import save_tiny
from tests.integration.compensation import compensate_argv

IDS = torch.arange(97, 109)[None]


@torch.no_grad()
def logits(folder: Path) -> Tensor:
    found: Tensor = AutoModelForCausalLM.from_pretrained(folder)(IDS).logits
    return found


def compressed(folder: Path, family: str, *words: str) -> Path:
    """The run folder of a tiny model with 30 % of its parameters removed."""
    source = save_tiny(folder / "source", family, max_position_embeddings=256)
    run = folder / "run"
    windows = [
        f"--{part}.{key}"
        for part in ("calibration", "evaluation")
        for key in ("source=pydoc", "num_samples=2", "seqlen=32")
    ]
    argv = [f"--model.path={source}", f"--output_dir={run}", "--method.removed_ratio=0.3"]
    assert main(["compress", *argv, *windows, *words]) == 0
    return run


def test_biases_are_replayed_trained_and_quantized(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Phi-3 also reads the number of heads."""
    run = compressed(tmp_path, "phi3", "--method.name=flap")
    plan = Plan.from_json((run / "plan.json").read_text())
    assert any(isinstance(op, RemoveHeads) for op in plan.operations)
    replayed = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    apply_operations(DecoderView(replayed), plan.operations, load_file(run / "factors.safetensors"))
    assert torch.equal(replayed(IDS).logits, logits(run / "model"))
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["seconds"]["spread"] > 0
    groups = {name: kept for name, (kept, _) in plan.heads.items()}
    assert {name: pair["compressed"] for name, pair in metrics["heads"].items()} == groups
    num_biases = sum(isinstance(op, AddBias) for op in plan.operations)
    card = (run / "model" / "README.md").read_text()
    assert f"{len(groups)} attention block" in card
    assert f"Biases of {num_biases} linears make up" in card
    assert "Key/value groups of all" in (run / "report.html").read_text()

    capsys.readouterr()
    assert main(["export", f"--model={run / 'model'}", f"--output_dir={tmp_path / 'out'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "has biases that compression has added, the first in" in line
    assert not (tmp_path / "out").exists()

    folder = tmp_path / "int8"
    options = ["--format=torchao", "--type=int8", f"--output_dir={folder}"]
    assert main(["export", f"--model={run / 'model'}", *options]) == 0
    close = logits(folder / "model") - logits(run / "model")
    assert close.norm() < 0.05 * logits(run / "model").norm()

    argv = compensate_argv(run / "model", tmp_path)
    options = ["--train=factors", "--training.max_steps=2", f"--output_dir={tmp_path / 'trained'}"]
    assert main(["compensate", *argv, *options]) == 0
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "trained" / "model")
    assert len(biases_of(trained)) == num_biases
    assert not torch.equal(trained(IDS).logits, logits(run / "model"))


def test_heads_are_padded_with_zeros_in_a_dense_copy(tmp_path: Path) -> None:
    words = ["--method.name=llm_pruner", "--method.importance=taylor_mixed"]
    words += ["--method.protect_first=1", "--method.protect_last=0"]
    run = compressed(tmp_path, "qwen2", *words)
    out = tmp_path / "out"
    assert main(["export", f"--model={run / 'model'}", f"--output_dir={out}"]) == 0
    assert not has_replaced(AutoModelForCausalLM.from_pretrained(out / "model"))
    torch.testing.assert_close(logits(out / "model"), logits(run / "model"), rtol=1e-4, atol=1e-5)
