"""``export`` with quantized weights as a user runs it, and what its result is good for."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from grasp_lightning.cli import main
from grasp_lightning.config import ModelConfig
from grasp_lightning.models.loading import load_model
from grasp_lightning.models.quantization import quantize_model
from tests.integration.test_export_command import contents, save_compressed

TINY_TEXT = {
    "compress": ["--calibration.source=pydoc", "--evaluation.source=pydoc"],
    "compensate": ["--objective=text", "--text.source=pydoc"],
}
TYPES = [("torchao", "int8"), ("torchao", "int4"), ("bitsandbytes", "nf4")]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_compressed("llama-narrowed", tmp_path / "compressed")


def export(source: Path, *words: str) -> int:
    return main(["export", f"--model={source}", f"--output_dir={source.parent / 'out'}", *words])


@pytest.mark.slow
@pytest.mark.parametrize(("library", "kind"), TYPES)
def test_the_copy_is_what_quantize_gives(
    source: Path, library: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(source, f"--format={library}", f"--type={kind}") == 0
    folder = source.parent / "out/model"
    before = load_model(ModelConfig(path=str(source))).model
    quantize_model(before, kind)  # type: ignore[arg-type]  # one of the kinds
    after = load_model(ModelConfig(path=str(folder)))
    ids = torch.tensor(after.tokenizer(["any text"])["input_ids"])
    with torch.no_grad():
        assert torch.equal(after.model(ids).logits, before(ids).logits)
    facts = json.loads((source.parent / "out/export.json").read_text())
    assert facts["type"] == kind
    assert facts["bytes"]["quantized"] < facts["bytes"]["compressed"]
    stored = sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    assert stored == pytest.approx(facts["bytes"]["quantized"], rel=0.2)  # tables of NF4
    card = (folder / "README.md").read_text()
    assert f"with {kind} weights" in card
    assert f"The package {library} must be installed." in card
    assert f"{facts['num_linears']} matrices in {kind}" in capsys.readouterr().out
    files = contents(source.parent / "out")
    assert export(source, f"--format={library}", f"--type={kind}") == 0  # only reads
    assert contents(source.parent / "out") == files


@pytest.mark.slow
def test_a_quantized_copy_can_be_evaluated_but_not_exported_again(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(source, "--format=torchao") == 0
    folder, text = tmp_path / "out/model", tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Paragraph {number} of a text." for number in range(200)))
    sizes = ["--evaluation.num_samples=2", "--evaluation.seqlen=32"]
    assert main(["evaluate", f"--model={folder}", f"--corpora={text}", *sizes]) == 0
    capsys.readouterr()
    for words in (["--format=dense"], ["--format=bitsandbytes"]):
        out = f"--output_dir={tmp_path / 'again'}"
        assert main(["export", f"--model={folder}", out, *words]) == 2
        error = capsys.readouterr().err
        assert "is quantized with torchao already: export the unquantized model" in error
        assert not (tmp_path / "again").exists()
    out = [f"--model.path={folder}", f"--output_dir={tmp_path / 'run'}"]
    for command in (["compress"], ["compress", "--dry_run"], ["compensate"]):
        assert main([*command, *out, *TINY_TEXT[command[0]]]) == 2
        assert "the model is quantized with torchao" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--format=dense", "--type=int8"],
            "type: dense has no type int8: leave it out, or set format=torchao",
        ),
        (
            ["--format=torchao", "--type=nf4"],
            "type: torchao has no type nf4: expected int8 or int4, or set format=bitsandbytes",
        ),
    ],
)
def test_a_type_of_another_format_is_refused(
    source: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(source, *words) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    assert not (source.parent / "out").exists()


def test_a_missing_library_is_named_before_anything_is_written(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("grasp_lightning.models.quantization.find_spec", lambda _: None)
    assert export(source, "--format=torchao") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "int8 weights need torchao, which is not installed: pip install torchao" in error
    assert not (source.parent / "out").exists()
