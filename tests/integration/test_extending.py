"""The package of docs/extending.md, installed and used exactly as written there."""

import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from grasp_lightning.cli import main
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.operations import APPLIERS
from grasp_lightning.models.size import count_parameters
from grasp_lightning.models.surgery import apply_operations
from grasp_lightning.plan import OPERATIONS, Plan
from tests.conftest import save_tiny, tiny_model
from tests.integration.forked import killed
from tests.integration.killing import ROOT, Kill
from tests.integration.test_packaging import pip

BLOCK = re.compile(r"^```(?:toml|python)\n# (\S+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
BETWEEN_LAYERS = Kill("grasp_lightning.pipeline", "", "apply_operations", 3)
IDS = torch.arange(12).reshape(2, 6)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the package installed, in the search path."""
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    files = dict(BLOCK.findall(text))
    assert len(files) == 3
    for name, content in files.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(content, encoding="utf-8")
    options = ("--no-deps", "--no-index", "--no-build-isolation")
    pip("install", *options, "--target", folder, source, cwd=source)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder
    APPLIERS.pop(OPERATIONS.pop("keep_columns"))
    for name in [name for name in sys.modules if name.startswith("column_selection")]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [
        f"--model.path={save_tiny(tmp_path_factory.mktemp('model') / 'tiny')}",
        *("--method.name=columns", "--method.num_layers=2", "--method.keep_ratio=0.3"),
        *("--calibration.source=pydoc", "--evaluation.source=pydoc"),
        *("--calibration.num_samples=4", "--evaluation.num_samples=2"),
        *("--calibration.seqlen=32", "--evaluation.seqlen=32"),
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("site")
def test_the_method_is_planned_by_its_name(
    settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *settings]) == 0
    told = capsys.readouterr().out
    assert "2 layers are replaced; ranks in one of them:" in told
    assert "mlp.up_proj: rank 5" in told
    assert main(["plan", *settings, "--method.ranks=global"]) == 2
    refusal = capsys.readouterr().err
    assert "method.ranks would be ignored: method columns keeps columns of weights" in refusal
    assert main(["plan", *settings, "--method.name=column"]) == 2
    assert "got 'column'; did you mean columns?" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_run_resumes_and_its_model_loads_with_equal_logits(
    site: Path, settings: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    argv = ["compress", *settings, f"--output_dir={run}"]
    assert killed(BETWEEN_LAYERS, signal.SIGKILL, argv, path=[site]) == -signal.SIGKILL
    done = Plan.from_json((run / "checkpoints" / "steps.json").read_text()).operations
    assert len({module.split(".")[2] for op in done for module in op.linears}) == 1
    assert main(argv) == 0
    plan = Plan.from_json((run / "plan.json").read_text())
    assert plan.operations[: len(done)] == done
    assert len(plan.ranks) == 14
    view = DecoderView(tiny_model())
    apply_operations(view, plan.operations, load_file(run / "factors.safetensors"))
    saved = AutoModelForCausalLM.from_pretrained(run / "model")
    assert torch.equal(saved(IDS).logits, view.model(IDS).logits)
    assert count_parameters(saved) == count_parameters(view.model)
    assert count_parameters(saved) < count_parameters(tiny_model())
