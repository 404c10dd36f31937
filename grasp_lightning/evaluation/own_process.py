"""Peak memory of one model, measured in a separate process."""

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
    """Return the peak memory of a model at the largest settings, run in a new interpreter.

    User errors of that process are raised here; if it is killed, that is a ``ModelError``.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(sender, model, workload, num_threads))
    process.daemon = True  # ends with this process
    # A new process takes over what is blocked: Ctrl-C is for this one, which ends the other.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    sender.close()
    try:
        return _received(receiver, process, model.path)
    finally:
        process.kill()
        receiver.close()


def _received(receiver: Connection, process: BaseProcess, name: str) -> PeakMemory:
    """Return the process's result, raise its error, or explain why it sent nothing."""
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
            "probably because memory ran out; use smaller prefill_lengths and decode_batch_sizes"
        )
    raise RuntimeError(f"measuring the memory of {name} failed; its traceback is above")


def _report(sender: Connection, model: ModelConfig, workload: Workload, num_threads: int) -> None:
    """Measure in this otherwise idle process, and send the result or the error."""
    # The parent loads the same model and logs its warnings.
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
    if model.device.type == "cuda":
        covers = "cuda"
    return PeakMemory(bytes=peak_bytes(model.device), covers=covers)
