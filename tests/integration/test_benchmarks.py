"""The programs in ``benchmarks/`` on a tiny model: what they print, and that they resume."""

import importlib
import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from grasp_lightning.cli import main
from grasp_lightning.config import Strategy
from grasp_lightning.training.strategies import is_sharded_strategy
from tests.conftest import save_tiny
from tests.integration.compensation import compressed_folder
from tests.integration.forked_benchmarks import BENCHMARKS
from tests.integration.forked_benchmarks import run_benchmark as run

TEXT = "The quick brown fox jumps over the lazy dog, and nobody knows why.\n" * 40

pytestmark = pytest.mark.slow  # every measurement starts a process


def cost(model: Path, output: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    settings = ["--model", model, "--layers", "1,3", "--keep_ratio", 0.3, "--windows", 3]
    settings += ["--seqlen", 32, "--rounds", 1, "--output", output]
    return run("compression_cost.py", *settings, *arguments, cwd=output.parent)


def test_the_cost_program_resumes_after_a_kill_and_compares_decisions(
    tiny_folder: Path, tmp_path: Path
) -> None:
    output = tmp_path / "cost.jsonl"
    variants = ("--variants", "reference_frozen", "iterative")
    done = cost(tiny_folder, output, *variants)
    assert done.returncode == 0, done.stderr
    first, second = output.read_text().splitlines()
    measured = {record["variant"]: record for record in map(json.loads, (first, second))}
    reference, ours = measured["reference_frozen"], measured["iterative"]
    # Two layers of two blocks: one pass over three windows each.
    assert reference["passes"] == reference["layer_passes"] == 4
    assert ours["passes"] == 4
    assert ours["layer_passes"] <= 4  # lower layers need not run again
    assert reference["kept"].keys() == ours["kept"].keys()
    num_kept = sum(len(components) for components in reference["kept"].values())
    assert f"iterative keeps {num_kept} of the {num_kept} components" in done.stdout
    assert all(record["peak_bytes"] > record["loaded_bytes"] for record in measured.values())

    # A kill while the second line was written: only that one is measured again.
    output.write_text(first + "\n" + second[:40])
    again = cost(tiny_folder, output, *variants)
    assert again.returncode == 0, again.stderr
    lines = output.read_text().splitlines()
    assert lines[0] == first
    assert json.loads(lines[1])["variant"] == json.loads(second)["variant"]
    assert again.stdout.count("round 1 of 1:") == 1

    other = cost(tiny_folder, output, *variants, "--seed", 1)
    assert other.returncode == 2
    assert "contains measurements with seed 0, now it is 1" in other.stderr


def test_the_floor_and_estimates_are_reported(tiny_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "cost.jsonl"
    variants = ("--variants", "reference_all", "floor", "--estimate_blocks", 1)
    done = cost(tiny_folder, output, *variants)
    assert done.returncode == 0, done.stderr
    records = {r["variant"]: r for r in map(json.loads, output.read_text().splitlines())}
    assert records["floor"]["parts"].keys() == {"svd", "forward", "backward"}
    assert records["floor"]["passes"] == 2
    assert records["reference_all"]["scale"] == 4  # one of four blocks was timed
    assert records["reference_all"]["passes"] == 4
    assert "| reference, gradients everywhere, estimated | " in done.stdout


def test_the_scaling_program_measures_what_is_missing(tiny_folder: Path, tmp_path: Path) -> None:
    settings = ("--model", tiny_folder, "--shrink", 8, "--output", tmp_path / "scaling.jsonl")
    keys = ("windows", "seqlen", "layers", "processes")
    counts = [(2, 16, 1, 1), (4, 16, 1, 1), (8, 16, 1, 1), (16, 16, 1, 1)]
    counts += [(windows, 16, 1, 2) for windows in (2, 4, 8, 16)]
    counts += [(2, 32, 1, 1), (2, 64, 1, 1), (2, 16, 2, 1)]
    seconds = {"similarity": 1.0, "attribution": 2.0, "factorize": 0.5}
    known = [{**dict(zip(keys, case, strict=True)), **seconds} for case in counts]
    left = known.pop(0)
    text = "".join(json.dumps(record) + "\n" for record in known)
    (tmp_path / "scaling.jsonl").write_text(text)
    done = run("scaling.py", *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "scaling.jsonl").read_text().splitlines()
    assert len(lines) == len(known) + 1
    measured = json.loads(lines[-1])
    assert {key: measured[key] for key in keys} == {key: left[key] for key in keys}
    assert measured["attribution"] > 0
    assert "| 16 | 16 | 1 | 1 | 1.0 | 2.0 | 0.5 | 3.5 |" in done.stdout


def test_the_memory_program_measures_what_is_missing(tiny_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "memory.jsonl"
    settings = ("--model", tiny_folder, "--shrink", 8, "--output", output)
    shapes = [(1, 16, 1), (1, 64, 1), (4, 16, 1), (2, 32, 1), (2, 32, 4), (4, 32, 4)]
    keys = (
        "batch_size",
        "seqlen",
        "num_layers",
        "rank",
        "checkpointing",
        "num_processes",
        "strategy",
    )
    known = [("calibration", *case, 0, False, 1, "ddp") for case in shapes]
    known += [("calibration", 1, 32, 1, 0, False, 2, name) for name in ("ddp", "fsdp")]
    for checkpointing in (False, True):
        for seqlen, rank, processes in ((16, 32, 1), (32, 256, 1), (16, 32, 2)):
            known.append(("compensation", 2, seqlen, 0, rank, checkpointing, processes, "ddp"))
    split = [name for name in get_args(Strategy) if is_sharded_strategy(name)]
    known += [("compensation", 2, 16, 0, 32, False, 2, name) for name in split]
    parts = dict.fromkeys(("libraries", "loaded", "factorize", "attribution", "training"), 10**9)
    records = [{**dict(zip(("stage", *keys), case, strict=True)), "bytes": parts} for case in known]
    left = {0, 7, len(known) - len(split)}  # calibrations, and a compensation, the last with fsdp
    lines = [json.dumps(record) for i, record in enumerate(records) if i not in left]
    output.write_text("".join(f"{line}\n" for line in lines))
    done = run("memory.py", *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    added = [json.loads(line) for line in output.read_text().splitlines()[len(lines) :]]
    assert [{**record, "bytes": parts} for record in added] == [records[i] for i in sorted(left)]
    for record, part in zip(added, ("attribution", "attribution", "training"), strict=True):
        assert record["bytes"][part] >= record["bytes"]["loaded"] > record["bytes"]["libraries"]
    assert (
        "| strategy | processes | batch_size | seqlen | num_layers | factorize: measured |"
        in done.stdout
    )
    assert done.stdout.count("\n| ddp | 2 |") == 3
    assert done.stdout.count("\n| fsdp | 2 |") == 2


def test_the_startup_program_measures_two_checkouts(tmp_path: Path) -> None:
    """Two small ones, whose processes start at once."""
    checkout = tmp_path / "checkout"
    for module in ("commands/plan.py", "commands/compress.py", "models/reloading.py"):
        file = checkout / "grasp_lightning" / module
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    (checkout / "cli.py").write_text(
        "import sys\nsys.exit(2 if sys.argv[-1].startswith(('--metod.', '--method.')) else 0)\n"
    )
    (checkout / "benchmarks").mkdir()
    for name in ("startup.py", "_common.py"):
        shutil.copy(BENCHMARKS / name, checkout / "benchmarks")
    other = shutil.copytree(checkout, tmp_path / "other")
    program = str(checkout / "benchmarks" / "startup.py")
    words = [sys.executable, program, "--rounds=1", f"--against={other}"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    rows = [line.strip("| ").split(" | ") for line in table[2:]]
    assert [case for case, *_ in rows] == list(startup_cases())
    assert all(float(before) >= 0 <= float(now) for _, before, now in rows)
    assert "| CPU seconds | before | now |" in done.stdout
    assert "Medians of 1 processes" in done.stdout

    (other / "cli.py").write_text("import sys\nsys.exit('too old')\n")
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.endswith("other: expected exit code 0, got 1 ['too old']")


def startup_cases() -> dict[str, tuple[tuple[str, ...], int]]:
    """What the program runs, and the exit codes that it expects."""
    cases: dict[str, tuple[tuple[str, ...], int]]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        cases = runpy.run_path(str(BENCHMARKS / "startup.py"))["_CASES"]
    return cases


@pytest.mark.parametrize("case", startup_cases())
def test_what_the_startup_program_runs_ends_as_it_expects(case: str) -> None:
    (program, *words), expected = startup_cases()[case]
    if program == "-c":
        exec(words[0])  # it raises where a module is missing
    else:
        assert main(words) == expected


def test_the_startup_program_refuses_what_is_no_checkout(tmp_path: Path) -> None:
    done = run("startup.py", "--against", tmp_path, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("expected a checkout, which has a cli.py")


def test_quantized_models_are_measured_beside_their_originals(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(TEXT.splitlines()))
    dense, compressed = save_tiny(tmp_path / "dense"), compressed_folder(tmp_path)
    settings = ["--model", dense, "--compressed", compressed, "--text", text, "--cache", tmp_path]
    settings += ["--windows", 2, "--seqlen", 32, "--rounds", 1, "--output", tmp_path / "q.json"]
    done = run("quantized_table.py", *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "q.json").read_text())["rows"]
    for name in ("dense", "compressed"):
        sizes = {kind: rows[f"{name}, {kind}"]["memory_bytes"] for kind in ("float32", "int8")}
        assert sizes["int8"] < sizes["float32"]
        assert f"| {name}, nf4 | " in done.stdout


# Latent, sliding and linear attention, state spaces, experts, and shared keys and values.
SAMPLE = (
    *("cohere2", "deepseek_v3", "gemma4_text", "glm4", "gpt_oss"),
    *("granitemoehybrid", "jamba", "lfm2", "nemotron_h", "olmo2"),
)


def test_a_sample_of_families_works_with_every_method(tmp_path: Path) -> None:
    output, page = tmp_path / "families.jsonl", tmp_path / "page.md"
    page.write_text("before\n<!-- survey -->\n<!-- end of survey -->\nafter\n")
    arguments = ("--output", output, "--page", page, "--families", *SAMPLE)
    done = run("families.py", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    results = {line["family"]: set(line["results"].values()) for line in lines}
    notes = {"gemma4_text": {"works with `method.refit: none`, as its error says"}}
    assert results == {family: {"works"} | notes.get(family, set()) for family in SAMPLE}
    text = page.read_text()
    assert "All methods work with 10 of 10 families (100%)." in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")

    again = run("families.py", *arguments, cwd=tmp_path)  # nothing is left to do
    assert again.returncode == 0, again.stderr
    assert len(output.read_text().splitlines()) == len(SAMPLE)

    wrong = run("families.py", "--output", output, "--families", "llamas", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "--families: no family llamas; expected some of afmoe, " in wrong.stderr


def test_every_step_of_the_decompositions_runs_and_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    program = importlib.import_module("decompositions")
    shapes, grams = program.Shapes().shrunk(64), tmp_path / "grams.pt"
    records = [program.measure(step, shapes, grams) for step in program.STEPS]
    assert all(record["seconds"] > 0 for record in records)
    lines = program.report(records).splitlines()
    assert len([line for line in lines if line.startswith("|")]) == 2 + len(records) + 1
    for step in program.STEPS:
        assert sum(program.operations(step, program.Shapes())) > 1e9
