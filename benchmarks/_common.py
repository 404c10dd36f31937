"""What the measurement programs share: fresh processes, a copy that loads fast, tables."""

import multiprocessing
import os
import platform
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ParamSpec, TypeVar

from grasp_lightning.errors import GraspError
from grasp_lightning.evaluation.machine import processor_name

P = ParamSpec("P")
T = TypeVar("T")

DEFAULT_CACHE = Path("runs/benchmarks")
BAD_INPUT = 2


class ProcessDiedError(GraspError):
    """A measuring process ended without a result, for example because memory ran out."""


def run_fresh(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return what a function returns in a new interpreter, which ends afterwards.

    Args:
        function: A function of an importable module.
        *args: Its arguments; they are pickled.
        **kwargs: The same, by name.

    Returns:
        Its result; what it raises is raised here.

    Raises:
        ProcessDiedError: If the process was killed.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        try:
            return pool.submit(function, *args, **kwargs).result()
        except BrokenProcessPool:
            raise ProcessDiedError(
                "a measuring process was killed (out of memory?); earlier measurements are "
                "stored, so run the same command again"
            ) from None


def loadable_folder(model: str, cache: Path) -> Path:
    """Return a Hugging Face folder of a model; a GGUF file is converted once, to float32.

    Reading SmolLM2 from its GGUF file takes half a minute, from safetensors two seconds.

    Args:
        model: A folder, which is returned unchanged, or any other value of ``model.path``.
        cache: Where converted models are kept.

    Returns:
        The folder.
    """
    if Path(model).is_dir():
        return Path(model)
    folder = cache / "models" / re.sub(r"[^\w.-]+", "-", model).strip("-.")
    if not folder.is_dir():
        print(f"converting {model} to {folder}, once", flush=True)
        run_fresh(_convert, model, folder)
    return folder


def _convert(model: str, folder: Path) -> None:
    # Imported here: only the new process needs it.
    from grasp_lightning.config import ModelConfig  # noqa: PLC0415
    from grasp_lightning.models.checkpoint import save_model  # noqa: PLC0415
    from grasp_lightning.models.loading import load_model  # noqa: PLC0415

    loaded = load_model(ModelConfig(path=model, device="cpu"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as unfinished:
        part = Path(unfinished) / folder.name
        save_model(loaded.model, part, tokenizer=loaded.tokenizer)
        part.rename(folder)


def whole_lines(file: Path) -> list[str]:
    """Return the lines of a file of measurements; a line that a kill truncated is removed.

    Args:
        file: A .jsonl file that grows by a line per measurement; it may be missing.

    Returns:
        Its complete lines.
    """
    if not file.exists():
        return []
    text = file.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        file.write_text(whole, encoding="utf-8")
    return whole.splitlines()


def hardware() -> str:
    """Return processor, cores, memory and versions in one line."""
    cores = os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return (
        f"{processor_name()}, {cores} cores, {memory:.0f} GiB, {platform.system()}, "
        f"Python {platform.python_version()}, {versions}"
    )


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table, the first column aligned left, the others right.

    Args:
        header: Names of the columns.
        rows: Cells.

    Returns:
        Lines joined by line feeds.
    """
    rule = [":--", *["--:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def exit_code(program: Callable[[], None]) -> int:
    """Run a program and return its exit code: an error of the user is one line.

    Args:
        program: What to run.

    Returns:
        0, or 2 on bad input.
    """
    try:
        program()
    except GraspError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return BAD_INPUT
    return 0
