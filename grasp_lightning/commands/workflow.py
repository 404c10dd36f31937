"""The workflow of commands that write a run folder: open it, prepare, work, finish."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from torch import Tensor

from grasp_lightning import processes
from grasp_lightning.callbacks.requeue import is_requeued, job_name
from grasp_lightning.callbacks.stop_request import StopRequest
from grasp_lightning.config import CompensateConfig, CompressConfig
from grasp_lightning.config.parsing import to_dict
from grasp_lightning.data.windows import TokenWindows
from grasp_lightning.errors import ConfigError, GraspError, Interrupted, ModelError, OutputError
from grasp_lightning.evaluation.perplexity import evaluate_perplexity
from grasp_lightning.linalg.precision import matmul_precision
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.sharding import is_sharded
from grasp_lightning.progress import track
from grasp_lightning.reading.text import read_json
from grasp_lightning.run_folder import FollowedRun, RunFolder
from grasp_lightning.run_folder.folder import RunState
from grasp_lightning.run_folder.rules import is_begun_by
from grasp_lightning.storage.progress import has_progress

Settings = Mapping[str, Any]  # Any: values of YAML or JSON
Inputs = TypeVar("Inputs")
Result = TypeVar("Result")


def output_folder(config: CompressConfig | CompensateConfig, example: str) -> str:
    """Return the run folder of a configuration, which must name one, such as ``example``."""
    if config.output_dir is None:
        raise ConfigError(
            f"output_dir is not set; name the run folder to write, for example {example}"
        )
    return config.output_dir


def run_in_folder(
    config: CompressConfig | CompensateConfig,
    *,
    protected: Sequence[Path],
    memory_advice: str,
    prepare: Callable[[RunFolder | None], Inputs],
    execute: Callable[[RunFolder, Inputs, StopRequest], Result],
    read: Callable[[Settings], Result],
    settings: Settings | None = None,
) -> Result:
    """Do the work of a run in its folder once, and return the result; a finished run is only read.

    Every process of the run must call it. SIGINT and SIGTERM end the work at the next safe point. A
    run that ``overwrite`` replaces is only deleted after the new inputs are prepared.

    Args:
        protected: Folders that must stay unchanged.
        memory_advice: Keys to lower if the device runs out of memory.
        prepare: Loads and checks the inputs; takes the folder if it is open already.
        read: Turns the metrics.json of a finished run into the result.
        settings: The configuration as it is written and compared; None takes it as it is.
    """
    settings, output_dir = settings or to_dict(config), config.output_dir
    assert output_dir is not None  # see output_folder
    stop = StopRequest()
    with stop.installed(), matmul_precision("highest"):
        anew = begins_anew(output_dir, settings, overwrite=config.overwrite)
        inputs = [prepare(None)] if anew else []
        with _open_together(output_dir, settings, overwrite=anew, protected=protected) as run:
            if run.state == "finished":
                what = f"the finished run in {run.root} has no readable metrics.json: it"
                advice = "run it again with --overwrite"
                return read(read_json(run.path("metrics.json"), OutputError, what, advice))
            with _attempt(run, memory_advice):
                inputs = inputs or [prepare(run)]
                with matmul_precision(config.trainer.matmul_precision):
                    return execute(run, inputs[0], stop)


def begins_anew(output_dir: str, config: Settings, *, overwrite: bool) -> bool:
    """Return whether ``overwrite`` deletes what is in the run folder.

    A job that SLURM has requeued is started by the same command, and resumes its own run.
    """
    if not (overwrite and is_requeued()):
        return overwrite
    return not processes.on_first(lambda: is_begun_by(job_name(), output_dir, config))


def _open_together(
    output_dir: str, config: Settings, *, overwrite: bool, protected: Sequence[Path]
) -> RunFolder:
    """Open a run folder in all processes of a run; only rank 0 writes it."""
    opened: list[RunFolder] = []

    def work() -> tuple[Path, RunState]:
        run = RunFolder.open(
            output_dir, config, overwrite=overwrite, protected=protected, job=job_name()
        )
        opened.append(run)
        return run.root, run.state

    root, state = processes.on_first(work)
    return opened[0] if opened else FollowedRun(root, state)


@contextmanager
def _attempt(run: RunFolder, memory_advice: str) -> Iterator[None]:
    """Leave a finished run, a run that can be resumed, or no trace."""
    is_new = run.state == "new"
    try:
        yield
    except BaseException as error:
        # A wrong input makes earlier measurements worthless; a full disk or a crash does not.
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
    """Return the perplexity on held-out windows, shared by all processes, with a progress bar.

    ``batch_size`` is in windows per forward pass; the bar goes to standard output without
    ``console``.
    """
    shares = processes.own_batches(range(len(windows)), batch_size)
    batches = _windows(windows, shares, is_padded=is_sharded(view.model))
    stream = track(batches, description, total=len(shares), console=console)
    return evaluate_perplexity(view, stream)


def _windows(
    windows: TokenWindows, shares: Sequence[tuple[Sequence[int], bool]], *, is_padded: bool
) -> Iterator[dict[str, Tensor]]:
    """Yield the batches of this process; with padding, all processes have equally many."""
    for indices, counts in shares:
        if counts:
            yield windows.batch(indices)
        elif is_padded:
            yield windows.padding()
