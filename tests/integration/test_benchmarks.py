"""The programs in ``benchmarks/`` on a tiny model: what they print, and that they resume."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from grasp_lightning.config import Strategy
from grasp_lightning.training.strategies import is_sharded_strategy
from tests.conftest import save_tiny
from tests.integration.compensation import compressed_folder

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TEXT = "The quick brown fox jumps over the lazy dog, and nobody knows why.\n" * 40

pytestmark = pytest.mark.slow  # every measurement starts an interpreter


def run(program: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, BENCHMARKS / program, *map(str, arguments)],
        cwd=cwd,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )


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
    left = known.pop(4)  # of two processes
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
    done = run("startup.py", "--rounds", 1, "--against", BENCHMARKS.parent, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if "`" in line]
    seconds = {case: (float(before), float(now)) for case, before, now in rows}
    assert seconds["`--help`"][1] < seconds["imports of `compress`"][1]
    assert "Medians of 1 processes" in done.stdout


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
