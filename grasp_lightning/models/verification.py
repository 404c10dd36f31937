"""Checks that a saved model, loaded by a fresh process, equals the one in memory."""

import atexit
import json
import logging
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from grasp_lightning.errors import ModelError, OutputError
from grasp_lightning.models import reloading
from grasp_lightning.models.integrity import tensor_hashes
from grasp_lightning.models.quiet import quiet_transformers
from grasp_lightning.models.source import first_line

logger = logging.getLogger(__name__)

_PATIENCE, _PATIENCE_PER_GB = 600.0, 60.0  # seconds
_BYTES_BESIDE = 10**9  # for an interpreter with torch, and activations
_SAFETY = 1.2
# The process runs alone, on the CPU and without the hub.
_SHARED = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
_ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore",
}
# Errors of a family's code that cannot generate.
_ERRORS = (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError)


def can_generate(model: PreTrainedModel) -> bool:
    """Return whether a model generates with its cache; a warning says why it does not."""
    if not model.can_generate():
        return False
    try:
        with quiet_transformers():
            reloading.behaviour(model, generates=True)
    except torch.OutOfMemoryError:
        raise
    except _ERRORS as error:
        logger.warning(
            "%s does not generate with its cache (%s), and neither will the model made from it",
            type(model).__name__,
            first_line(error),
        )
        return False
    return True


def verify_saved(model: PreTrainedModel, folder: Path, *, generates: bool = True) -> None:
    """Let a fresh process load a saved model on the CPU, compare tensors and logits, and generate.

    If memory is too short for another copy of the model, this is skipped with a warning. A
    ``ModelError`` means that the saved model differs, or does not load or generate; an
    ``OutputError`` that the process was killed or took too long. ``generates`` is the result of
    ``can_generate`` before compression.
    """
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    copies = 1 if model.device.type == "cpu" else 2
    free, needed = _free_memory(), copies * _SAFETY * size + _BYTES_BESIDE
    if free is not None and free < needed:
        logger.warning(
            "the saved model is not loaded again to verify it: %.1f GB of memory are free, but "
            "that takes %.1f",
            free / 1e9,
            needed / 1e9,
        )
        return
    with tempfile.TemporaryDirectory() as name:
        request = Path(name)
        _write_request(request, model, folder, generates=generates and model.can_generate())
        code = _exit_code(request, _PATIENCE + _PATIENCE_PER_GB * size / 1e9)
        _judge(request, code)


def _write_request(request: Path, model: PreTrainedModel, folder: Path, *, generates: bool) -> None:
    try:
        with quiet_transformers(), _on_cpu(model):
            expected = reloading.behaviour(model, generates=generates)
    except _ERRORS as error:
        raise ModelError(
            f"the model cannot generate with its cache ({first_line(error)}), so it is not kept"
        ) from error
    save_file(expected, request / reloading.EXPECTED)
    content = {
        "folder": str(folder),
        "generates": generates,
        "tensors": tensor_hashes(model),
        "trust_remote_code": not type(model).__module__.startswith("transformers."),
    }
    (request / reloading.REQUEST).write_text(json.dumps(content), encoding="utf-8")


def _judge(request: Path, code: int | None) -> None:
    if code is None or code < 0:
        how = "took too long" if code is None else f"was ended by {signal.Signals(-code).name}"
        raise OutputError(
            f"the process that loads the saved model to verify it {how}, possibly because memory "
            "ran out: run the same command again, it resumes from what was saved"
        )
    if code > 0:
        lines = (request / reloading.ERRORS).read_text(errors="replace").strip().splitlines()
        problem = f"it stops with {lines[-1] if lines else f'exit code {code}'}"
    else:
        problem = (request / reloading.DIFFERENCE).read_text(encoding="utf-8")
    if problem:
        raise ModelError(
            f"a fresh process that loads the saved model gets a different one: {problem}; it is "
            "not kept; this is a bug in grasp_lightning: please report it"
        )


@contextmanager
def _on_cpu(model: PreTrainedModel) -> Iterator[None]:
    """Move a model to the CPU temporarily: its logits depend on the device, experts most of all."""
    device = model.device
    model.to("cpu")  # type: ignore[arg-type]  # transformers wraps it with a too narrow type
    try:
        yield
    finally:
        model.to(device)  # type: ignore[arg-type]  # as above


def _free_memory() -> int | None:
    """Return the free memory in bytes of this machine or of this process's control group."""
    lines = [line.split() for line in _content("/proc/meminfo").splitlines()]
    limits = [int(words[1]) * 1024 for words in lines if words[0] == "MemAvailable:"]
    most, used = (_content(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if most.strip().isdecimal() and used.strip().isdecimal():
        limits.append(int(most) - int(used))
    return min(limits, default=None)


def _content(path: str) -> str:
    file = Path(path)
    return file.read_text() if file.is_file() else ""


class _Interpreter:
    """The process of ``reloading``, started when first needed and then kept."""

    def __init__(self) -> None:
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  as long as the process
        root = str(Path(__file__).parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {key: value for key, value in os.environ.items() if key not in _SHARED}
        env |= _ENVIRONMENT | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
        env["PYTHONPATH"] = os.pathsep.join(paths)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", reloading.__name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            bufsize=0,
            cwd=root,
            env=env,
            start_new_session=True,  # Ctrl-C is handled by the process that waits
        )
        atexit.register(self.end)

    @property
    def is_alive(self) -> bool:
        """Whether the process is running."""
        return self._process.poll() is None

    def ask(self, request: Path, seconds: float) -> int | None:
        """Return the exit code of the fork for a request; None if it took too long."""
        assert self._process.stdin is not None  # piped
        assert self._process.stdout is not None
        self._process.stdin.write(f"{request}\n".encode())
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        line = self._process.stdout.readline() if ready else b""
        if line:
            return int(line)
        self.end()
        if not ready:
            return None
        self._errors.seek(0)
        last = self._errors.read().decode(errors="replace").strip().splitlines()[-1:]
        raise OutputError(
            "cannot start the process that loads the saved model to verify it "
            f"({last[0] if last else 'it has ended'}); run the same command again"
        )

    def end(self) -> None:
        """End the process and all that it started."""
        if self.is_alive:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


_interpreters: list[_Interpreter] = []


def _exit_code(request: Path, seconds: float) -> int | None:
    if not (_interpreters and _interpreters[-1].is_alive):
        _interpreters[:] = [_Interpreter()]
    return _interpreters[-1].ask(request, seconds)
