"""A run is finished only if a fresh process finds in its folder the model that was in memory."""

import json
import os
from pathlib import Path

import pytest

from grasp_lightning.cli import main
from tests.conftest import byte_tokenizer, save_tiny
from tests.integration.test_artefact import write_custom

FORWARD = """
    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        if os.getpid() != {process}:
            outputs.logits = outputs.logits.flip(-1)
        return outputs
"""
SMALL = (
    *("--calibration.source=pydoc", "--calibration.num_samples=2", "--calibration.seqlen=32"),
    *("--evaluation.source=pydoc", "--evaluation.num_samples=2", "--evaluation.seqlen=32"),
)


def drop_one(source: Path, run: Path) -> int:
    options = [f"--model.path={source}", f"--output_dir={run}", "--method.name=drop"]
    return main(["compress", *options, "--method.num_layers=1", *SMALL])


def test_a_run_says_how_long_it_was_verified(tmp_path: Path) -> None:
    assert drop_one(save_tiny(tmp_path / "source"), tmp_path / "run") == 0
    seconds = json.loads((tmp_path / "run" / "metrics.json").read_text())["seconds"]
    assert 0 < seconds["verify"] < seconds["total"]


@pytest.mark.parametrize("command", ["compress", "compensate"])
def test_a_model_that_is_another_one_in_a_fresh_process_is_not_kept(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, run = tmp_path / "source", tmp_path / "run"
    write_custom(source)
    byte_tokenizer().save_pretrained(source)
    # Names of its own: transformers takes a class that another test has registered under a name.
    for file in (*source.glob("*.py"), source / "config.json"):
        text = file.read_text().replace("Custom", "Flipping").replace("custom_llama", "flipping")
        file.write_text(text)
    file = source / "modeling_custom.py"
    file.write_text(f"import os\n{file.read_text()}{FORWARD.format(process=os.getpid())}")
    options = [f"--model.path={source}", f"--output_dir={run}", "--model.trust_remote_code=true"]
    if command == "compress":
        options += ["--method.name=drop", "--method.num_layers=1", *SMALL]
    else:
        options += [
            *("--objective=text", "--text.source=pydoc", "--text.num_samples=4"),
            *("--text.seqlen=32", "--training.max_steps=2", "--training.batch_size=2"),
            *("--training.micro_batch_size=2", "--optimizer.warmup_steps=0", *SMALL[3:]),
        ]
    assert main([command, *options]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(
        "error: a fresh process that loads the saved model gets a different one: "
    )
    assert "it computes other logits; it is not kept" in error
    assert not run.exists()
