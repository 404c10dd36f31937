"""Measures prefill and decoding of several models in transformers, vLLM and llama.cpp.

Each server holds all models at once, and a round measures them in random order, one request at a
time. Every measurement is appended to the output at once, so a killed run resumes when the same
command is run again.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Final, NamedTuple

from _common import (
    DEFAULT_CACHE,
    ProcessDiedError,
    exit_code,
    hardware,
    loadable_folder,
    markdown_table,
    whole_lines,
)

from grasp_lightning.errors import ConfigError
from grasp_lightning.evaluation.throughput import Spread

_WORKER = Path(__file__).with_name("_serving_worker.py")
_ROOT = Path(__file__).resolve().parents[1]
_DENSE, _AGAIN = "dense", "dense again"
_CONTROL = "dense again, against the first process"
# Tokens of the prompt, and tokens to generate; the larger number is what a request measures.
_REQUESTS: Final[Mapping[str, tuple[int, int]]] = MappingProxyType(
    {"prefill": (512, 1), "decode": (8, 128)}
)


class Server(NamedTuple):
    """A server, its environment, and the type of the GGUF file that it reads, if it does."""

    program: str
    environment: str
    gguf_type: str | None = None


_SERVERS: Final[Mapping[str, Server]] = MappingProxyType(
    {
        "transformers": Server("transformers", ".venv"),
        "vLLM": Server("vllm", ".venv-serving/vllm"),
        "llama.cpp f32": Server("llamacpp", ".venv-serving/llamacpp", "f32"),
        "llama.cpp q8_0": Server("llamacpp", ".venv-serving/llamacpp", "q8_0"),
    }
)


class Key(NamedTuple):
    """One measurement."""

    server: str
    model: str
    request: str
    round: int


def main() -> None:
    """Run the missing measurements, then print the table."""
    arguments = _parser().parse_args()
    for name, folder in arguments.models:
        if not (folder / "config.json").is_file():
            raise ConfigError(f"{name}: {folder} has no config.json; expected a model folder")
    dense = loadable_folder(arguments.dense, arguments.cache)
    settings = json.loads((dense / "config.json").read_text(encoding="utf-8"))
    vocabulary: int = settings["vocab_size"]
    folders = {_DENSE: dense, _AGAIN: dense, **dict(arguments.models)}
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    measured = _stored(arguments.output)
    for name in arguments.servers:
        keys = [key for key in _keys(name, folders, arguments.rounds) if key not in measured]
        if keys:
            files = _files(name, folders, arguments)
            with (
                arguments.output.open("a", encoding="utf-8") as output,
                _workers(name, files, vocabulary, arguments.threads) as workers,
            ):
                for key in keys:
                    measured[key] = _timed(workers[key.model], key)
                    print(json.dumps([*key, measured[key]]), file=output, flush=True)
        print(f"{name}: measured", flush=True)
    print("\n" + report(measured, list(folders), arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", type=_named, metavar="NAME=FOLDER")
    parser.add_argument("--dense", default="smollm2", help="smollm2, a .gguf file or a folder")
    parser.add_argument(
        "--servers", nargs="+", choices=list(_SERVERS), default=list(_SERVERS), metavar="SERVER"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--gguf_base", help="GGUF file of the dense model, for the tokenizer")
    parser.add_argument("--output", type=Path, required=True, help=".jsonl file of measurements")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="for converted models")
    return parser


def _named(text: str) -> tuple[str, Path]:
    name, _, folder = text.partition("=")
    if not folder:
        raise argparse.ArgumentTypeError(f"expected NAME=FOLDER, got {text!r}")
    return name, Path(folder)


def _stored(file: Path) -> dict[Key, float]:
    """Return the measurements of earlier runs."""
    rows = [json.loads(line) for line in whole_lines(file)]
    return {Key(*row[:-1]): row[-1] for row in rows}


def _keys(server: str, models: Mapping[str, Path], rounds: int) -> Iterator[Key]:
    """Yield every measurement of one server; round 0 is a warm-up."""
    order = random.Random(server)
    for number in range(rounds + 1):
        for request in order.sample(list(_REQUESTS), len(_REQUESTS)):
            for model in order.sample(list(models), len(models)):
                yield Key(server, model, request, number)


def _files(
    server: str, folders: Mapping[str, Path], arguments: argparse.Namespace
) -> dict[str, Path]:
    """Return what the server opens of each model."""
    gguf_type = _SERVERS[server].gguf_type
    if gguf_type is None:
        return dict(folders)
    return {name: _gguf(folder, gguf_type, arguments) for name, folder in folders.items()}


def _gguf(folder: Path, gguf_type: str, arguments: argparse.Namespace) -> Path:
    """Return a model's GGUF file, which is exported once."""
    name = "-".join(folder.resolve().parts[-3:]).strip("/")
    output: Path = arguments.cache / "gguf" / f"{name}-{gguf_type}"
    words = [str(_ROOT / "cli.py"), "export", "--model", str(folder), "--format", "gguf"]
    words += ["--gguf_type", gguf_type, "--output_dir", str(output)]
    words += ["--gguf_base", arguments.gguf_base] if arguments.gguf_base else []
    subprocess.run([sys.executable, *words], check=True, stdout=sys.stderr)
    return next(output.rglob("*.gguf"))


@contextmanager
def _workers(
    server: str, files: Mapping[str, Path], vocabulary: int, threads: int
) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Start one process per model, and end them all."""
    program, environment, _ = _SERVERS[server]
    python = _ROOT / environment / "bin/python"
    if not python.is_file():
        raise ConfigError(f"--servers {server}: there is no {python}; run make test-serving first")
    settings = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }
    with ExitStack() as stack:
        workers = {}
        for model, file in files.items():
            worker = subprocess.Popen(
                [python, _WORKER, program, file, str(vocabulary)],
                env=settings,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            # Waits for the process, whose standard input has ended by then.
            workers[model] = stack.enter_context(worker)
            _answer(worker, server, model)
        yield workers


def _answer(worker: subprocess.Popen[str], server: str, model: str) -> str:
    assert worker.stdout is not None
    answer = worker.stdout.readline()
    if not answer:
        raise ProcessDiedError(f"{server} ended while it ran {model}; its messages are above")
    return answer


def _timed(worker: subprocess.Popen[str], key: Key) -> float:
    assert worker.stdin is not None
    length, count = _REQUESTS[key.request]
    print(length, count, key.round, file=worker.stdin, flush=True)
    return float(_answer(worker, key.server, key.model))


def report(
    measured: Mapping[Key, float], models: Sequence[str], arguments: argparse.Namespace
) -> str:
    """Return the table, as Markdown.

    Args:
        measured: Seconds of each measurement.
        models: Names of the models, the dense one first.
        arguments: Servers, rounds and threads.

    Returns:
        Tokens per second of the dense model, and the ratio of each other model to it in the same
        round: median and quartiles. The dense model runs in two processes, whose speeds can differ
        by several percent in all rounds; its time is their mean.
    """
    columns = [(server, request) for server in arguments.servers for request in _REQUESTS]
    header = ["", *(f"{server}, {request}" for server, request in columns)]
    rounds = range(1, arguments.rounds + 1)

    def seconds(server: str, model: str, request: str) -> list[float]:
        return [measured[Key(server, model, request, number)] for number in rounds]

    def dense(server: str, request: str) -> list[float]:
        pairs = zip(*(seconds(server, name, request) for name in (_DENSE, _AGAIN)), strict=True)
        return [statistics.mean(pair) for pair in pairs]

    def ratio(reference: Sequence[float], times: Sequence[float]) -> str:
        pairs = zip(reference, times, strict=True)
        spread = Spread.of([theirs / ours for theirs, ours in pairs])
        return f"{spread.median:.2f} ({spread.first_quartile:.2f}-{spread.third_quartile:.2f})"

    speeds = [
        f"{max(_REQUESTS[request]) / statistics.median(dense(server, request)):.1f}"
        for server, request in columns
    ]
    rows = [[f"{_DENSE}, tokens per second", *speeds]]
    for model in models[1:]:
        cells = []
        for server, request in columns:
            is_control = model == _AGAIN
            reference = seconds(server, _DENSE, request) if is_control else dense(server, request)
            cells.append(ratio(reference, seconds(server, model, request)))
        rows.append([_CONTROL if model == _AGAIN else model, *cells])
    return "\n".join([markdown_table(header, rows), "", hardware()])


if __name__ == "__main__":
    sys.exit(exit_code(main))
