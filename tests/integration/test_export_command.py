"""``export`` as a user runs it, and its result in a process that knows transformers only."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from grasp_lightning.cli import main
from grasp_lightning.models.checkpoint import save_model
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.surgery import apply_operations
from grasp_lightning.plan import DropLayers, Operation
from tests.conftest import ALL_FAMILIES, FAMILIES, byte_tokenizer, save_tiny, tiny_model
from tests.unit.models.helpers import factorize_layers, in_dtype, narrow_layers

FAST = (*FAMILIES, "gpt2", "llama-dropped", "llama-bfloat16", "llama-narrowed", "phi3-narrowed")
SLOW = tuple(family for family in ALL_FAMILIES if family not in FAST)
CASES = [*FAST, *(pytest.param(family, marks=pytest.mark.slow) for family in SLOW)]

# One process opens all folders: importing transformers takes seconds.
CHILD = """
import sys
from pathlib import Path

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "grasp_lightning":
            raise ModuleNotFoundError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
try:
    import grasp_lightning
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("grasp_lightning must not be importable here")

import torch

torch.set_num_threads(1)  # as in the tests: products of experts round by the number of threads
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

root, results = Path(sys.argv[1]), {}
for folder in sorted(root.glob("*-dense/model")):
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", output_loading_info=True
    )
    problems = [key for keys in info.values() for key in keys]
    if problems:
        raise SystemExit(f"{folder}: {problems}")
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(["any text"])["input_ids"])
    with torch.no_grad():
        name = folder.parent.name.removesuffix("-dense")
        results[f"{name} logits"] = model.eval()(ids).logits
        results[f"{name} tokens"] = model.generate(ids, max_new_tokens=4, do_sample=False)
        results[f"{name} parameters"] = torch.tensor(sum(p.numel() for p in model.parameters()))
save_file(results, root / "results.safetensors")
"""


class Exported(NamedTuple):
    root: Path
    results: dict[str, torch.Tensor]


def save_compressed(case: str, folder: Path) -> Path:
    family, _, variant = case.partition("-")
    model = tiny_model(family)
    view = DecoderView(in_dtype(model, torch.bfloat16) if variant == "bfloat16" else model)
    operations, tensors = factorize_layers(view, (1, 2), rank=5)
    drop: list[Operation] = [DropLayers(layers=(0,))] if variant == "dropped" else []
    apply_operations(view, [*operations, *drop], tensors)
    if variant == "narrowed":
        apply_operations(view, *narrow_layers(view, (0, 3), range(3, 40, 3)))
    save_model(view.model, folder, tokenizer=byte_tokenizer())
    return folder


def export_all(cases: Sequence[str], root: Path, working_folder: Path) -> Exported:
    for case in cases:
        save_compressed(case, root / case)
        output = root / f"{case}-dense"
        words = ["--model", str(root / case), "--format", "dense", "--output_dir", str(output)]
        assert main(["export", *words]) == 0
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    process = subprocess.run(
        [sys.executable, "-P", "-c", CHILD, str(root)],
        env=environment | {"HF_HUB_OFFLINE": "1"},
        cwd=working_folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return Exported(root, load_file(root / "results.safetensors"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """The exports of one tier of cases, made when first asked for."""

    @cache
    def of_tier(cases: tuple[str, ...]) -> Exported:
        return export_all(cases, tmp_path_factory.mktemp("e"), tmp_path_factory.mktemp("child"))

    return lambda case: of_tier(FAST if case in FAST else SLOW)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_compressed("llama", tmp_path / "compressed")


def export(source: Path, *words: str) -> int:
    return main(["export", f"--model={source}", f"--output_dir={source.parent / 'out'}", *words])


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_copy_computes_what_the_compressed_model_does(
    exported: Callable[[str], Exported], case: str
) -> None:
    compressed = AutoModelForCausalLM.from_pretrained(
        exported(case).root / case, dtype="auto"
    ).eval()
    ids = torch.tensor(byte_tokenizer()(["any text"])["input_ids"])
    with torch.no_grad():
        logits = compressed(ids).logits
    got = exported(case).results[f"{case} logits"]
    assert got.dtype == logits.dtype
    # Two roundings to bfloat16 per linear against one: some units in its last place of 2^-8.
    tolerance = 0.05 if case.endswith("bfloat16") else 1e-4
    assert (got - logits).abs().max() <= tolerance * logits.abs().max()
    assert exported(case).results[f"{case} tokens"].shape == (1, 8 + 4)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_copy_has_the_parameters_of_the_dense_model_without_dropped_layers(
    exported: Callable[[str], Exported], case: str
) -> None:
    dense = tiny_model(case.partition("-")[0])
    expected = sum(parameter.numel() for parameter in dense.parameters())
    if case.endswith("dropped"):
        expected -= sum(p.numel() for p in DecoderView(dense).layer(0).parameters())
    assert exported(case).results[f"{case} parameters"] == expected
    facts = json.loads((exported(case).root / f"{case}-dense" / "export.json").read_text())
    assert facts["parameters"]["dense"] == expected
    assert facts["parameters"]["compressed"] < expected


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_nothing_of_the_low_rank_format_is_left(
    exported: Callable[[str], Exported], case: str
) -> None:
    folder = exported(case).root / f"{case}-dense" / "model"
    assert not {"quantization_config", "auto_map"} & set(
        json.loads((folder / "config.json").read_text())
    )
    assert not list(folder.glob("*.py"))
    stored = load_file(folder / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {
        torch.bfloat16 if case.endswith("bfloat16") else torch.float32
    }


def test_the_output_says_where_the_copy_is_and_that_it_is_not_smaller(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(source) == 0
    captured = capsys.readouterr()
    first, second = captured.out.splitlines()
    assert first.startswith("factors of 14 linears multiplied: ")
    assert "this copy is not smaller" in first
    assert second == f"model:  {source.parent / 'out' / 'model'}"
    assert "multiplying factors" in captured.err


def test_narrowed_linears_are_reported_and_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "narrowed"
    view = DecoderView(tiny_model("opt"))
    apply_operations(view, *narrow_layers(view, (1,), range(20)))
    save_model(view.model, source, tokenizer=byte_tokenizer())
    for _ in range(2):  # the second time, from what is stored
        assert export(source) == 0
        assert capsys.readouterr().out.startswith("2 narrowed linears padded with zeros: ")
    facts = json.loads((tmp_path / "out" / "export.json").read_text())
    assert facts["ranks"] == {}
    assert facts["shapes"] == {
        "model.decoder.layers.1.fc1": [20, 32],
        "model.decoder.layers.1.fc2": [32, 20],
    }


def test_a_compressed_run_gets_a_card_that_names_its_source(tmp_path: Path) -> None:
    dense = save_tiny(tmp_path / "tiny-llama")
    (dense / "LICENSE").write_text("Do what you like.\n")
    (dense / "README.md").write_text("---\nlicense: mit\n---\nA tiny model.\n")
    words = ["--method.name=grasp", "--method.num_layers=2", "--method.keep_ratio=0.3"]
    words += ["--calibration.num_samples=2"]
    words += ["--evaluation.num_samples=1", "--evaluation.seqlen=32", "--calibration.seqlen=32"]
    words += ["--calibration.source=pydoc", "--evaluation.source=pydoc"]
    run = tmp_path / "run"
    assert main(["compress", f"--model.path={dense}", f"--output_dir={run}", *words]) == 0
    assert main(["export", f"--model={run / 'model'}", f"--output_dir={tmp_path / 'out'}"]) == 0
    folder = tmp_path / "out" / "model"
    card = (folder / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "mit"
    assert "# `tiny-llama`, compressed, in dense form" in card
    assert "This copy is neither smaller nor faster" in card
    assert "`COMPRESSED_MODEL_CARD.md`" in card
    assert "trust_remote_code" not in card
    for name in ("README.md", "LICENSE"):
        copied = folder / {"README.md": "COMPRESSED_MODEL_CARD.md"}.get(name, name)
        assert copied.read_bytes() == (run / "model" / name).read_bytes()
    assert str(tmp_path) not in "".join(
        file.read_text() for file in folder.iterdir() if file.suffix != ".safetensors"
    )


def test_a_finished_export_is_only_read(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(source) == 0
    first = capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in (source.parent / "out").rglob("*")}
    assert export(source) == 0
    assert capsys.readouterr().out == first
    after = {path: path.stat().st_mtime_ns for path in (source.parent / "out").rglob("*")}
    assert before == after


def test_an_export_of_an_earlier_model_is_not_taken_for_this_one(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(source) == 0
    shutil.rmtree(source)
    save_compressed("llama-dropped", source)
    assert export(source) == 2
    assert "contains the export of an earlier version of" in capsys.readouterr().err
    assert export(source, "--overwrite") == 0
    copy = AutoModelForCausalLM.from_pretrained(source.parent / "out" / "model")
    assert copy.config.num_hidden_layers == 3


def test_a_damaged_export_is_named(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(source) == 0
    (source.parent / "out" / "export.json").unlink()
    assert export(source) == 2
    assert "export.json is missing or damaged; export again with --overwrite" in (
        capsys.readouterr().err
    )


def test_foreign_files_are_neither_overwritten_nor_deleted(
    source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = source.parent / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert export(source) == 2
    assert "is not empty and contains no run of this program" in capsys.readouterr().err
    assert contents(out) == {"notes.txt": b"mine"}
    assert export(source, "--overwrite") == 0
    assert export(source, "--overwrite") == 0
    assert (out / "notes.txt").read_text() == "mine"
    (out / "model" / "mine.txt").write_text("mine")
    before = contents(out)
    assert export(source, "--overwrite") == 2
    assert "mine.txt already exists and was not written by this program" in capsys.readouterr().err
    assert contents(out) == before


def test_the_source_does_not_change(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(source)
    for output in (source, source / "inner", source.parent):
        assert main(["export", f"--model={source}", f"--output_dir={output}", "--overwrite"]) == 2
        assert "must not change" in capsys.readouterr().err
    assert export(source) == 0
    assert contents(source) == before


def test_a_full_disk_is_found_before_the_weights_are_read(
    source: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(source)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    (source / "model.safetensors").write_bytes(b"not looked at")
    assert export(source) == 2
    # 39,488 parameters or so at four bytes, and a tenth for the other files.
    assert "needs 0.2 MB, but 0.1 MB are free" in capsys.readouterr().err
    assert not (source.parent / "out").exists()


def bad_sources(root: Path) -> dict[str, tuple[list[str], str]]:
    """Arguments and message of each mistake."""
    out = f"--output_dir={root / 'out'}"
    save_compressed("llama", root / "run" / "model")
    dense = save_tiny(root / "dense")
    dropped = tiny_model()
    apply_operations(DecoderView(dropped), [DropLayers(layers=(1,))], {})
    save_model(dropped, root / "dropped", tokenizer=byte_tokenizer())
    damaged = shutil.copytree(root / "run" / "model", root / "damaged")
    (damaged / "model.safetensors").write_bytes(b"damaged")
    return {
        "absent": (
            [f"--model={root}/no", out],
            "no: the folder does not exist; expected the model/",
        ),
        "file": ([f"--model={dense / 'config.json'}", out], "config.json: is a file; expected"),
        "run folder": ([f"--model={root / 'run'}", out], f"did you mean {root / 'run' / 'model'}?"),
        "empty": ([f"--model={root}", out], "has no config.json; expected the model/ folder"),
        "dense": (
            [f"--model={dense}", out],
            "has neither low-rank nor narrowed linears: it is an",
        ),
        "dropped": ([f"--model={root / 'dropped'}", out], "has neither low-rank nor narrowed"),
        "damaged": ([f"--model={damaged}", out], "cannot load damaged"),
        "format": (["--format=onnx", f"--model={dense}", out], "format: expected one of dense"),
        "key of another format": (
            ["--gguf_type=f16", f"--model={dense}", out],
            "gguf_type: has no effect with format dense; leave it out, or set format=gguf",
        ),
        "no output": ([f"--model={dense}"], "output_dir is not set"),
        "no model": ([out], "model is not set"),
        "key": ([f"--model.path={dense}", out], "unknown option --model.path"),
    }


def test_every_mistake_is_one_line_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, (words, message) in bad_sources(tmp_path).items():
        capsys.readouterr()
        assert main(["export", *words]) == 2, name
        error = capsys.readouterr().err
        last = error.splitlines()[-1]
        assert last.startswith("error: "), name
        assert message in last, name
        assert "Traceback" not in error
        assert not (tmp_path / "out").exists(), name
