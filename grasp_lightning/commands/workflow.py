"""The course of every command that writes a run folder: open it, prepare, work, finish."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from grasp_lightning import processes
from grasp_lightning.callbacks.requeue import is_requeued, job_name
from grasp_lightning.callbacks.stop_request import StopRequest
from grasp_lightning.config import CompensateConfig, CompressConfig
from grasp_lightning.config.parsing import to_dict
from grasp_lightning.data.windows import TokenWindows
from grasp_lightning.errors import ConfigError, GraspError, Interrupted, ModelError, OutputError
from grasp_lightning.evaluation.perplexity import evaluate_perplexity
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.sharding import is_sharded
from grasp_lightning.run_folder import FollowedRun, RunFolder
from grasp_lightning.run_folder.folder import RunState
from grasp_lightning.run_folder.rules import is_begun_by
from grasp_lightning.storage.progress import has_progress

Inputs = TypeVar("Inputs")
Result = TypeVar("Result")


def output_folder(config: CompressConfig | CompensateConfig, example: str) -> str:
    """Return the run folder that a configuration names.

    Args:
        config: What the user set.
        example: A name to suggest.

    Returns:
        Path of the folder.

    Raises:
        ConfigError: If it names none.
    """
    if config.output_dir is None:
        raise ConfigError(f"output_dir is not set: name the run folder to write, e.g. {example}")
    return config.output_dir


def run_in_folder(
    config: CompressConfig | CompensateConfig,
    *,
    protected: Sequence[Path],
    memory_advice: str,
    prepare: Callable[[RunFolder | None], Inputs],
    execute: Callable[[RunFolder, Inputs, StopRequest], Result],
    read: Callable[[Mapping[str, Any]], Result],  # Any: values of JSON
) -> Result:
    """Do the work of a run in its folder, once: a finished run is only read.

    Every process of the run must call it. SIGINT and SIGTERM end the work at the next safe moment.
    A run that ``overwrite`` would replace is deleted only after the new inputs are prepared.

    Args:
        config: The resolved configuration, with ``output_dir``.
        protected: Folders that must stay as they are.
        memory_advice: Keys to lower where the device has too little memory.
        prepare: Loads and checks the inputs; takes the folder if it is open already.
        execute: Does the work, from the last checkpoint on if there is one.
        read: Makes the result from the metrics.json of a finished run.

    Returns:
        The result, new or stored.
    """
    settings, output_dir = to_dict(config), config.output_dir
    assert output_dir is not None  # see output_folder
    stop = StopRequest()
    with stop.installed():
        anew = _begins_anew(output_dir, settings, overwrite=config.overwrite)
        inputs = [prepare(None)] if anew else []
        with _open_together(output_dir, settings, overwrite=anew, protected=protected) as run:
            if run.state == "finished":
                return read(_stored_metrics(run))
            with _attempt(run, memory_advice):
                return execute(run, inputs[0] if inputs else prepare(run), stop)


def _begins_anew(
    output_dir: str,
    config: Mapping[str, Any],  # Any: resolved configuration
    *,
    overwrite: bool,
) -> bool:
    """Tell whether ``overwrite`` deletes what is in the run folder.

    A job that SLURM has put back into its queue is started by the same command, and goes on with
    what it has begun itself.
    """
    if not (overwrite and is_requeued()):
        return overwrite
    return not processes.on_first(lambda: is_begun_by(job_name(), output_dir, config))


def _open_together(
    output_dir: str,
    config: Mapping[str, Any],  # Any: resolved configuration
    *,
    overwrite: bool,
    protected: Sequence[Path],
) -> RunFolder:
    """Open a run folder in all processes of a run; rank 0 alone writes it."""
    opened: list[RunFolder] = []

    def work() -> tuple[Path, RunState]:
        run = RunFolder.open(
            output_dir, config, overwrite=overwrite, protected=protected, job=job_name()
        )
        opened.append(run)
        return run.root, run.state

    root, state = processes.on_first(work)
    return opened[0] if opened else FollowedRun(root, state)


def _stored_metrics(run: RunFolder) -> dict[str, Any]:  # Any: values of JSON
    """Return the content of the metrics.json of a finished run."""
    try:
        content: dict[str, Any] = json.loads(run.path("metrics.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise OutputError(
            f"the finished run in {run.root} has no readable metrics.json ({error}); make it again "
            "with --overwrite"
        ) from error
    return content


@contextmanager
def _attempt(run: RunFolder, memory_advice: str) -> Iterator[None]:
    """Leave behind either a result, or what a later start can go on from, or nothing."""
    is_new = run.state == "new"
    try:
        yield
    except BaseException as error:
        # A wrong input makes what was measured worthless; a full disk or a crash does not.
        is_wrong_input = isinstance(error, GraspError) and not isinstance(error, OutputError)
        has_saved = has_progress(run)
        if isinstance(error, Interrupted):
            error.has_saved = has_saved
        if is_new and (is_wrong_input or not has_saved):
            run.discard()
        if isinstance(error, torch.OutOfMemoryError):
            raise ModelError(f"the device has too little memory; lower {memory_advice}") from error
        raise


def tracked_perplexity(
    view: DecoderView,
    windows: TokenWindows,
    batch_size: int,
    description: str,
    console: Console | None = None,
) -> float:
    """Return the perplexity of a model on windows of text, with a progress bar.

    Several processes share the windows.

    Args:
        view: The model.
        windows: Held-out windows.
        batch_size: Windows per forward pass.
        description: What the bar says.
        console: Where the bar is drawn; None takes standard output.

    Returns:
        The perplexity.
    """
    shares = processes.own_batches(range(len(windows)), batch_size)
    stream = track(
        _windows(windows, shares, is_padded=is_sharded(view.model)),
        total=len(shares),
        description=description,
        console=console,
    )
    return evaluate_perplexity(view, stream)


def _windows(
    windows: TokenWindows, shares: Sequence[tuple[Sequence[int], bool]], *, is_padded: bool
) -> Iterator[dict[str, Tensor]]:
    """Yield the batches of this process; padded, all processes have as many."""
    for indices, counts in shares:
        if counts:
            yield windows.batch(indices)
        elif is_padded:
            yield windows.padding()
