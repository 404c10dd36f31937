"""The program ``grasp-lightning``: commands, exit codes and output.

Commands are imported once their configuration is parsed: ``--help`` and a mistyped key wait for
neither torch nor transformers.
"""

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Final, NamedTuple, NoReturn, TextIO

from grasp_lightning import __version__
from grasp_lightning.config import (
    BenchmarkConfig,
    CompareConfig,
    CompensateConfig,
    CompressConfig,
    EvaluateConfig,
    ExportConfig,
    ModelConfig,
    PlanConfig,
    TrimConfig,
)
from grasp_lightning.config.parsing import parse, with_run_config
from grasp_lightning.config.second_stage import second_stage, split_options
from grasp_lightning.errors import GraspError, Interrupted
from grasp_lightning.launch import joined
from grasp_lightning.reporting.metrics import CompensationMetrics, Metrics
from grasp_lightning.run_folder.names import TRIM
from grasp_lightning.starting import begin

FAILED = 1
BAD_INPUT = 2
CELLS_FAILED = 3
_HANDLER = "grasp-lightning"
_SOON = 0.01  # seconds
_GOES_ON = "run the same command again without --overwrite: it resumes from what was saved"
_STARTS_ANEW = "nothing was saved, so the same command starts from the beginning"
_AGAIN = "run the same command again"
SIGNALLED = 128  # plus the number of the signal, as shells count


class Command(NamedTuple):
    """One command; ``when_interrupted`` is for the user after Ctrl-C, if no run is known."""

    help: str
    run: Callable[[str, Sequence[str]], None]
    when_interrupted: str = "nothing was written"


def _check_source(model: ModelConfig) -> None:
    """Refuse a path that is not there before torch is imported."""
    from grasp_lightning.models.source import resolve_source  # noqa: PLC0415

    resolve_source(model)


def _compress(prog: str, argv: Sequence[str]) -> None:
    own, options = split_options(argv)
    config = parse(CompressConfig, prog, with_run_config(own))
    second = second_stage(config, options)
    _check_source(config.model)
    if second is not None:
        _compress_and_compensate(config, second, argv)
        return
    if config.dry_run:
        from grasp_lightning.commands.dry_run import dry_run_compress  # noqa: PLC0415

        begin()
        print("\n".join(dry_run_compress(config)))
        return
    with joined(config.trainer, config.model.device, "compress", argv) as speaks:
        from grasp_lightning.commands.compress import run_compress  # noqa: PLC0415

        begin()
        run = run_compress(config)
        if speaks:
            _print_run(run.folder, run.metrics)


def _compress_and_compensate(
    config: CompressConfig, second: CompensateConfig, argv: Sequence[str]
) -> None:
    if config.dry_run:
        from grasp_lightning.commands.dry_run_training import dry_run_two_stages  # noqa: PLC0415

        begin()
        print("\n".join(dry_run_two_stages(config, second)))
        return
    with joined(config.trainer, config.model.device, "compress", argv) as speaks:
        from grasp_lightning.commands.two_stages import run_two_stages  # noqa: PLC0415

        begin()
        run = run_two_stages(config, second)
        if speaks:
            _print_compensation(run.folder, run.metrics, run.uploaded)


def _compensate(prog: str, argv: Sequence[str]) -> None:
    config = parse(CompensateConfig, prog, argv)
    _check_source(config.model)
    if config.dry_run:
        from grasp_lightning.commands.dry_run_training import dry_run_compensate  # noqa: PLC0415

        begin()
        print("\n".join(dry_run_compensate(config)))
        return
    with joined(config.trainer, config.model.device, "compensate", argv) as speaks:
        from grasp_lightning.commands.compensate import run_compensate  # noqa: PLC0415

        begin()
        run = run_compensate(config)
        if speaks:
            _print_compensation(run.folder, run.metrics, run.uploaded)


def _print_compensation(folder: Path, metrics: CompensationMetrics, uploaded: str | None) -> None:
    _print_run(folder, metrics)
    if uploaded is not None:
        print(f"upload: {uploaded}")


def _print_run(folder: Path, metrics: Metrics | CompensationMetrics) -> None:
    from rich.console import Console  # noqa: PLC0415

    from grasp_lightning.reporting.tables import comparison_table  # noqa: PLC0415

    Console().print(comparison_table(metrics))
    print(f"model:  {folder / 'model'}")
    print(f"report: {folder / 'report.html'}")


def _print_files(*files: Path | None) -> None:
    for file in files:
        if file is not None:
            print(f"results: {file}")


def _plan(prog: str, argv: Sequence[str]) -> None:
    own, options = split_options(argv)
    config = parse(PlanConfig, prog, with_run_config(own))
    compensate = second_stage(config, options)
    _check_source(config.model)
    from grasp_lightning.commands.plan import run_plan  # noqa: PLC0415

    begin()
    print("\n".join(run_plan(config, compensate).lines))


def _export(prog: str, argv: Sequence[str]) -> None:
    config = parse(ExportConfig, prog, argv)
    from grasp_lightning.commands.export import run_export  # noqa: PLC0415

    begin()
    run = run_export(config)
    print("\n".join(run.facts.lines(run.model_folder)))


def _trim(prog: str, argv: Sequence[str]) -> None:
    config = parse(TrimConfig, prog, argv)
    _check_source(config.model)
    from rich.console import Console  # noqa: PLC0415

    from grasp_lightning.commands.trim import run_trim  # noqa: PLC0415
    from grasp_lightning.reporting.trimming import trim_table  # noqa: PLC0415

    begin()
    run = run_trim(config)
    Console().print(trim_table(run.facts))
    print(f"model:  {run.model_folder}")
    _print_files(run.folder / TRIM)


def _evaluate(prog: str, argv: Sequence[str]) -> None:
    config = parse(EvaluateConfig, prog, argv)
    from rich.console import Console  # noqa: PLC0415

    from grasp_lightning.commands.evaluate import run_evaluate  # noqa: PLC0415
    from grasp_lightning.reporting.evaluation import evaluation_table  # noqa: PLC0415

    begin()
    run = run_evaluate(config)
    Console().print(evaluation_table(run.evaluations))
    _print_files(*run.amended, run.output)


def _benchmark(prog: str, argv: Sequence[str]) -> None:
    config = parse(BenchmarkConfig, prog, argv)
    from rich.console import Console  # noqa: PLC0415

    from grasp_lightning.commands.benchmark import run_benchmark  # noqa: PLC0415
    from grasp_lightning.reporting.throughput import throughput_table  # noqa: PLC0415

    begin()
    run = run_benchmark(config)
    Console().print(throughput_table(run.result))
    _print_files(*run.amended, run.output, run.plot)


def _compare(prog: str, argv: Sequence[str]) -> None:
    config = parse(CompareConfig, prog, argv)
    from rich.console import Console  # noqa: PLC0415

    from grasp_lightning.commands.compare import run_compare  # noqa: PLC0415
    from grasp_lightning.reporting.comparison.table import comparison_table  # noqa: PLC0415

    begin()
    run = run_compare(config, tell=lambda line: print(line, flush=True))
    if run.comparison is not None:
        Console().print(comparison_table(run.comparison))
        print(f"results: {run.folder}")
        print(f"total time of all cells: {_hours(run.comparison.seconds)}")
    if run.num_failed:
        print(f"error: {_count(run.num_failed)} failed; see above", file=sys.stderr)
        raise SystemExit(CELLS_FAILED)


def _count(number: int) -> str:
    return f"{number} cell{'s' if number > 1 else ''}"


def _hours(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min {rest % 60} s"


COMMANDS: Final[Mapping[str, Command]] = MappingProxyType(
    {
        "compress": Command(
            "compress a model: calibrate, decide, replace, save, report", _compress, _AGAIN
        ),
        "compensate": Command(
            "train a compressed model to recover quality, save, report", _compensate, _AGAIN
        ),
        "plan": Command(
            "predict what would be removed, and the memory per process; reads no weights", _plan
        ),
        "evaluate": Command(
            "compare models: perplexity, task accuracy and cost",
            _evaluate,
            "run the same command again: with --output and without --overwrite, it resumes",
        ),
        "benchmark": Command("compare models: prefill and decode throughput", _benchmark),
        "compare": Command(
            "compress models with several methods to several sizes; compare them in one table",
            _compare,
            "run the same command again: it continues where it stopped",
        ),
        "export": Command(
            "write a compressed model in a format that other programs can read", _export
        ),
        "trim": Command("remove tokens that your texts never use, with their weights", _trim),
    }
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code.

    0 on success, also if a SLURM job was requeued; 2 on bad input, with one line on standard error;
    3 if cells of ``compare`` failed; 130 after Ctrl-C and 143 after SIGTERM. ``argv`` is None for
    the arguments of this process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    name = words[0] if words else ""
    if name in ("-h", "--help"):
        print(_usage())
        return 0
    if name == "--version":
        print(f"grasp-lightning {__version__}")
        return 0
    if name == "completion":
        return _completion(words[1:])
    if name not in COMMANDS:
        came = f"unknown command {name!r}" if words else "no command"
        return _fail(f"{came}; expected one of {', '.join(COMMANDS)}, completion")
    _configure_logging()
    return _run(name, words[1:])


def run_program(argv: Sequence[str] | None = None) -> NoReturn:
    """Run ``main`` and end the process with its exit code."""
    sys.unraisablehook = _raise_again
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what may follow on its line
        from grasp_lightning.config.completion import complete  # noqa: PLC0415

        complete({name: command.help for name, command in COMMANDS.items()})
    try:
        code = main(argv)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output has ended, such as head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = SIGNALLED + signal.SIGPIPE
    except KeyboardInterrupt:  # a second one, while the first was being reported
        code = SIGNALLED + signal.SIGINT
    except Exception:  # noqa: BLE001  a bug: reported as Python does
        sys.excepthook(*sys.exc_info())
        code = FAILED
    # Everything is printed: from here on Ctrl-C only ends the process sooner.
    signal.signal(signal.SIGINT, lambda *_: os._exit(code))
    if "grasp_lightning.processes" in sys.modules:  # else there is no group to leave
        from grasp_lightning import processes  # noqa: PLC0415

        processes.end(code)
    sys.exit(code)


def _raise_again(unraisable: "sys.UnraisableHookArgs") -> None:
    """Resend a signal whose exception was lost in a callback of the interpreter."""
    stop = unraisable.exc_value
    if not isinstance(stop, Interrupted | KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
        return
    number = getattr(stop, "signal_number", signal.SIGINT)
    # A little later: at once, the exception would come out of this function.
    threading.Timer(_SOON, os.kill, (os.getpid(), number)).start()


def _run(name: str, argv: Sequence[str]) -> int:
    try:
        COMMANDS[name].run(f"{_program()} {name}", argv)
    except GraspError as error:
        return _fail(str(error))
    except (Interrupted, KeyboardInterrupt) as stop:
        return _interrupted(name, stop)
    except SystemExit as leave:  # --help and --print_config of a command's parser
        return int(leave.code or 0)
    return 0


def _completion(argv: Sequence[str]) -> int:
    from grasp_lightning.config.completion import completion  # noqa: PLC0415

    try:
        print(completion(_program(), argv))
    except GraspError as error:
        return _fail(str(error))
    return 0


def _interrupted(name: str, stop: Interrupted | KeyboardInterrupt) -> int:
    how, number, then = "interrupted", int(signal.SIGINT), COMMANDS[name].when_interrupted
    if isinstance(stop, Interrupted):
        number, then = stop.signal_number, _GOES_ON if stop.has_saved else _STARTS_ANEW
    if number == signal.SIGUSR1:
        from grasp_lightning.callbacks.requeue import requeue_job  # noqa: PLC0415

        refusal = requeue_job()
        if refusal is None:
            # Any other code would let srun, or our own launcher, end the ranks that still save.
            return 0
        how = f"interrupted, and the job could not be requeued ({refusal})"
    _fail(f"{how}; {then}")
    return SIGNALLED + number


def _fail(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return BAD_INPUT


def _program() -> str:
    return os.path.basename(sys.argv[0]) or "grasp-lightning"  # noqa: PTH119  a string, not a path


def _usage() -> str:
    lines = [f"usage: {_program()} COMMAND [--config FILE.yaml] [--key value ...]", "", "commands:"]
    lines += [f"  {name:10} {command.help}" for name, command in COMMANDS.items()]
    lines.append(f"  {'completion':10} print a completion script for bash or zsh")
    return "\n".join([*lines, "", f"{_program()} COMMAND --help lists a command's options."])


class _StandardErrorHandler(logging.StreamHandler[TextIO]):
    """Writes to the standard error of the moment: above a progress bar while there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def _configure_logging() -> None:
    root = logging.getLogger()
    if any(handler.name == _HANDLER for handler in root.handlers):
        return  # main was called before in this process
    # The level is set on the handler: libraries set their own loggers to INFO when imported.
    handler = _StandardErrorHandler()
    handler.name = _HANDLER
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    root.addHandler(handler)
    # Lightning brings a handler of its own, and announces devices and tips here.
    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(f"{library}.utilities.rank_zero").setLevel(logging.WARNING)
