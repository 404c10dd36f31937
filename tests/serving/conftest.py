"""A compressed model, and the environments of servers that ``make test-serving`` creates."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from grasp_lightning.cli import main

ROOT = Path(__file__).parents[2]
VLLM = ROOT / ".venv-serving/vllm/bin/python"
_FAST = (
    "--calibration.num_samples=2",
    "--calibration.batch_size=1",
    "--evaluation.num_samples=1",
    "--evaluation.batch_size=1",
)
_VLLM_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    # The classes of models that vLLM has inspected, which takes seconds each.
    "VLLM_CACHE_ROOT": str(VLLM.parents[2] / "vllm-cache"),
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}

Generate = Callable[[Sequence[dict[str, Any]]], list[dict[str, Any]]]


@pytest.fixture(scope="session")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's model folder, calibrated on less text."""
    run = tmp_path_factory.mktemp("serving") / "run"
    config = f"--config={ROOT / 'configs/quickstart.yaml'}"
    assert main(["compress", config, f"--output_dir={run}", *_FAST]) == 0
    return run / "model"


@pytest.fixture(scope="session")
def vllm_environment() -> dict[str, str]:
    """Variables of a process that runs vLLM."""
    assert VLLM.exists(), f"{VLLM} is missing: `make test-serving` creates it"
    return os.environ | _VLLM_ENVIRONMENT


@pytest.fixture
def generate(tmp_path: Path, vllm_environment: dict[str, str]) -> Generate:
    """Run jobs of ``vllm_child.py`` in one process, and return their results."""

    def run(jobs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        asked, results = tmp_path / "jobs.json", tmp_path / "results.json"
        asked.write_text(json.dumps(jobs))
        script = Path(__file__).with_name("vllm_child.py")
        done = subprocess.run(
            [VLLM, script, asked, results],
            # The engine in the process itself: it need not import vLLM again for each model.
            env=vllm_environment | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=900,
        )
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
        found: list[dict[str, Any]] = json.loads(results.read_text())
        return found

    return run


@contextmanager
def running(
    command: Sequence[str | Path],
    log: Path,
    is_ready: Callable[[], bool],
    environment: dict[str, str],
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server until the block ends."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, cwd=log.parent, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            end = time.monotonic() + 300
            while not is_ready():
                assert process.poll() is None, log.read_text()[-5000:]
                assert time.monotonic() < end, log.read_text()[-5000:]
                time.sleep(0.5)
            yield process
        finally:
            process.terminate()
            process.wait(timeout=60)
