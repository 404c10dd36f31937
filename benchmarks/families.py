"""Surveys which families of transformers every method compresses, and writes docs/families.md.

Every decoder-only language model of the installed transformers is built tiny and random, then
compressed, saved, opened in a fresh process, run, saved again and exported. Families run in worker
processes with a time limit: a crash is a result. What is in the output is not done again.
"""

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Lock, local

from _common import exit_code, hardware, markdown_table, whole_lines
from _family_checks import FAILED, METHODS, WORKS, serve
from _family_configs import family_names

from grasp_lightning.errors import GraspError

Results = dict[str, dict[str, str]]  # by family, then by method

_SECONDS = 300  # for one family
_SPAWN = multiprocessing.get_context("spawn")
_BEGIN, _END = "<!-- survey -->", "<!-- end of survey -->"


class _Worker:
    """A process that surveys families one by one; it is replaced when it dies or hangs."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None

    def results(self, family: str, methods: Sequence[str]) -> dict[str, str]:
        """Return the results of a family by method."""
        if self._process is None or not self._process.is_alive():
            self._pipe, other = _SPAWN.Pipe()
            self._process = _SPAWN.Process(target=serve, args=(other, self._log))
            self._process.start()
            other.close()
        assert self._pipe is not None  # opened with the process
        try:
            self._pipe.send((family, methods))
            if self._pipe.poll(_SECONDS):
                found: dict[str, str] = self._pipe.recv()
                return found
            reason = f"no result after {_SECONDS} seconds"
        except (EOFError, OSError):
            reason = "its process died"
        self.end()
        return dict.fromkeys(methods, f"{FAILED}: {reason}")

    def end(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


def main() -> None:
    """Survey the missing families, then write the page or print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="JSON lines, appended to")
    parser.add_argument("--page", type=Path, help="the page whose tables are replaced")
    parser.add_argument("--families", nargs="*", default=[], help="only these; default: all")
    parser.add_argument("--methods", nargs="*", default=[*METHODS], choices=METHODS)
    parser.add_argument("--again", action="store_true", help="repeat families that do not work")
    parser.add_argument("--jobs", type=int, default=1, help="families at the same time")
    arguments = parser.parse_args()
    known = family_names()
    for family in arguments.families:
        if family not in known:
            raise GraspError(f"--families: no family {family}; expected some of {', '.join(known)}")
    results = _read(arguments.output)
    wanted = arguments.families or known
    missing = [
        family
        for family in wanted
        if family not in results
        or not results[family].keys() >= set(arguments.methods)
        or (arguments.again and not all(map(_works, results[family].values())))
    ]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    _survey(missing, arguments.methods, arguments.output, arguments.jobs, results)
    text = report({family: results[family] for family in wanted}, arguments.methods)
    if arguments.page is None:
        print(text)
    else:
        _write(arguments.page, text)


def _survey(
    families: Sequence[str], methods: Sequence[str], output: Path, jobs: int, results: Results
) -> None:
    """Survey families in several workers, and append each result to the output."""
    log, lock, own, workers = output.with_suffix(".log"), Lock(), local(), list[_Worker]()

    def survey(family: str) -> None:
        if not hasattr(own, "worker"):
            own.worker = _Worker(log)
            workers.append(own.worker)
        start = time.monotonic()
        found = own.worker.results(family, methods)
        seconds = round(time.monotonic() - start, 1)
        with lock:
            results[family] = {**results.get(family, {}), **found}
            record = {"family": family, "results": results[family], "seconds": seconds}
            with output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            bad = [f"{m} {text}" for m, text in found.items() if text != WORKS]
            print(f"{family} ({seconds} s): {'; '.join(bad) or WORKS}", flush=True)

    try:
        with ThreadPoolExecutor(max_workers=jobs) as pool:
            list(pool.map(survey, families))
    finally:
        for worker in workers:
            worker.end()


def _read(output: Path) -> Results:
    records = [json.loads(line) for line in whole_lines(output)]
    return {record["family"]: record["results"] for record in records}


def report(results: Mapping[str, Mapping[str, str]], methods: Sequence[str]) -> str:
    """Return the tables, as Markdown.

    Args:
        results: Result by family and method.
        methods: The columns.

    Returns:
        The text.
    """
    whole = sum(all(_works(found[m]) for m in methods) for found in results.values())
    counts = [str(sum(_works(r[m]) for r in results.values())) for m in methods]
    rows = [
        [f"`{family}`", *("yes" if _works(found[m]) else "no" for m in methods)]
        for family, found in results.items()
    ]
    reasons = [
        f"- `{family}`: {reason}"
        for family, found in results.items()
        for reason in _reasons(found, methods)
    ]
    share = f"{whole} of {len(results)} families ({whole / max(1, len(results)):.0%})"
    table = markdown_table(
        ["family", *(f"`{m}`" for m in methods)], [["all of them work with", *counts], *rows]
    )
    return "\n\n".join(
        [
            f"All methods work with {share}.",
            table,
            *(["\n".join(["```text", *reasons, "```"])] if reasons else []),
            hardware(),
        ]
    )


def _works(result: str) -> bool:
    return result.startswith(WORKS)


def _reasons(found: Mapping[str, str], methods: Sequence[str]) -> list[str]:
    by_text: dict[str, list[str]] = {}
    for method in methods:
        if found[method] != WORKS:
            by_text.setdefault(found[method], []).append(f"`{method}`")
    return [f"{', '.join(names)} {text}" for text, names in by_text.items()]


def _write(page: Path, text: str) -> None:
    content = page.read_text(encoding="utf-8") if page.is_file() else ""
    if _BEGIN not in content or _END not in content:
        raise GraspError(f"--page {page}: expected the lines {_BEGIN} and {_END}")
    before, rest = content.split(_BEGIN, 1)
    page.write_text(
        f"{before}{_BEGIN}\n\n{text}\n\n{_END}{rest.split(_END, 1)[1]}", encoding="utf-8"
    )


if __name__ == "__main__":
    sys.exit(exit_code(main))
