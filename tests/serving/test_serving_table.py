"""The benchmark of servers runs a tiny model in each of them, and resumes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from grasp_lightning.models.checkpoint import save_model
from tests.conftest import byte_tokenizer, tiny_model
from tests.serving.llamacpp import byte_base
from tests.serving.tiny_models import TINY_SIZES

pytestmark = pytest.mark.serving
PROGRAM = Path(__file__).parents[2] / "benchmarks/serving_table.py"
SERVERS = ("transformers", "vLLM", "llama.cpp f32")


def run(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, PROGRAM, *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


def save(folder: Path, **sizes: object) -> Path:
    longer = {**TINY_SIZES, "max_position_embeddings": 1024, **sizes}
    save_model(tiny_model("llama", 0, **longer), folder, tokenizer=byte_tokenizer())
    return folder


def test_every_server_is_measured_and_a_killed_run_resumes(tmp_path: Path) -> None:
    dense, narrow = save(tmp_path / "dense"), save(tmp_path / "narrow", intermediate_size=64)
    output = tmp_path / "times.jsonl"
    arguments = [f"narrow={narrow}", "--dense", dense, "--rounds", 1, "--output", output]
    arguments += ["--gguf_base", byte_base(tmp_path / "base.gguf"), "--servers", *SERVERS]
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[2:]] == [
        "| dense, tokens per second",
        "| dense again, against the first process",
        "| narrow",
    ]
    for cell in rows[2].strip("| ").split(" | ")[1:]:
        assert float(cell) > 0
    lines = output.read_text().splitlines()
    # Three models, two requests, a warm-up and one round.
    assert len(lines) == len(SERVERS) * 3 * 2 * 2

    # All is measured but the last line, which a kill has truncated.
    output.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:20])
    again = run(*arguments, cwd=tmp_path)
    assert again.returncode == 0, again.stderr[-3000:]
    assert output.read_text().splitlines()[:-1] == lines[:-1]
    assert len(output.read_text().splitlines()) == len(lines)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    done = run(f"x={tmp_path}", "--output", tmp_path / "times.jsonl", cwd=tmp_path)
    assert done.returncode == 2
    assert f"x: {tmp_path} has no config.json; expected a model folder" in done.stderr
