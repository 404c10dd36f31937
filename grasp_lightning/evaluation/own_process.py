"""Peak memory of one model, measured in a process that does nothing else."""

import logging
import multiprocessing
import signal
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import torch
import transformers

from grasp_lightning.config import ModelConfig
from grasp_lightning.errors import GraspError, ModelError
from grasp_lightning.evaluation.peak_memory import Covers, PeakMemory, forget_peak, peak_bytes
from grasp_lightning.evaluation.workload import Workload, out_of_memory_as_model_error, time_setting
from grasp_lightning.models.loading import load_model


def measure_peak_memory(model: ModelConfig, workload: Workload, num_threads: int) -> PeakMemory:
    """Load a model in a new interpreter, run the largest settings, and return the peak.

    What a user can cause there is raised here; a process that was killed is a ``ModelError``.

    Args:
        model: Which model.
        workload: Its longest prefill and its largest batch are run.
        num_threads: Threads of torch on the CPU.

    Returns:
        The peak while the settings ran.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(sender, model, workload, num_threads))
    process.daemon = True  # ends with this process
    process.start()
    sender.close()
    try:
        return _received(receiver, process, model.path)
    finally:
        process.kill()
        receiver.close()


def _received(receiver: Connection, process: BaseProcess, name: str) -> PeakMemory:
    """Return what the process sends, or raise what it sends or why it sends nothing."""
    try:
        outcome = receiver.recv()
    except EOFError:
        outcome = None
    process.join()
    if isinstance(outcome, PeakMemory):
        return outcome
    if isinstance(outcome, GraspError):
        raise outcome
    exit_code = process.exitcode or 0
    if exit_code < 0:
        raise ModelError(
            f"the process that measures the memory of {name} was killed (signal {-exit_code}), "
            f"probably for want of memory; use smaller prefill_lengths and decode_batch_sizes"
        )
    raise RuntimeError(f"measuring the memory of {name} failed, its traceback is above")


def _report(sender: Connection, model: ModelConfig, workload: Workload, num_threads: int) -> None:
    """Measure, as the only thing that this process does, and send the result or the error."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C: the process that started this one speaks
    # That process loads the same model, and tells what there is to tell.
    logging.disable(logging.WARNING)
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # untyped there
    torch.set_num_threads(num_threads)
    try:
        sender.send(_measure(model, workload))
    except GraspError as error:
        sender.send(error)


def _measure(config: ModelConfig, workload: Workload) -> PeakMemory:
    model = load_model(config).model
    is_without_loading = forget_peak(model.device)
    with out_of_memory_as_model_error(config.path):
        for setting in workload.largest:
            time_setting(model, workload, setting)
    covers: Covers = "resident" if is_without_loading else "resident_with_loading"
    return PeakMemory(
        bytes=peak_bytes(model.device), covers="cuda" if model.device.type == "cuda" else covers
    )
