"""Names that real runs write are known before they start, so no foreign file stops them later."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from grasp_lightning.cli import main
from grasp_lightning.errors import OutputError
from grasp_lightning.run_folder import RunFolder
from grasp_lightning.run_folder.writer import RunWriter
from tests.conftest import save_tiny
from tests.integration.compensation import compensate_argv
from tests.integration.trimming import save_model_of

TEXT = ["--evaluation.source=pydoc", "--evaluation.num_samples=2", "--evaluation.seqlen=32"]


def commands(base: Path) -> dict[str, Sequence[str]]:
    """One run of each command, each on the result of the one before."""
    tiny = save_tiny(base / "tiny", max_position_embeddings=256)
    calibration = ["source=[pydoc,self]", "num_samples=4", "seqlen=32", "batch_size=2"]
    return {
        "compress": [
            *("compress", f"--model.path={tiny}", *TEXT),
            *(f"--calibration.{word}" for word in calibration),
            *("--statistics.max_memory=1e-5", "--trainer.checkpoint_seconds=0"),
        ],
        "compensate": [
            "compensate",
            *compensate_argv(base / "compress" / "model", base),
            *("--training.keep=best", "--training.validate_every=1"),
            "--trainer.checkpoint_seconds=0",
        ],
        "export": ["export", f"--model={base / 'compress' / 'model'}", "--format=dense"],
        "trim": [
            "trim",
            f"--model.path={save_model_of('byte_level', base / 'sized')}",
            f"--corpora={base / 'corpus.txt'}",
        ],
    }


@pytest.mark.slow
def test_every_name_that_a_run_writes_is_refused_where_something_else_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: set[str] = set()
    original = RunWriter._record_parents

    def noting(self: RunWriter, name: str) -> None:
        written.add(name)
        original(self, name)

    monkeypatch.setattr(RunWriter, "_record_parents", noting)
    for name, argv in commands(tmp_path).items():
        assert main([*argv, f"--output_dir={tmp_path / name}"]) == 0
        files = json.loads((tmp_path / name / "manifest.json").read_text())["files"]
        written |= set(files) | {path.name for path in (tmp_path / name).iterdir()}
    assert {
        *("logs", "model", "export.json", "trim.json", "statistics-00001-of-00004.safetensors"),
        *("checkpoints/last.ckpt", "checkpoints/best.safetensors", "checkpoints/notes.json"),
        *("checkpoints/inputs.json", "checkpoints/steps.json", "checkpoints/pass-0-0.safetensors"),
        *("checkpoints/refit-000001.safetensors", "model/config.json", "sampled_text.safetensors"),
    } <= written
    target = tmp_path / "target"
    target.write_text("mine")
    for number, name in enumerate(sorted(written)):
        path = tmp_path / f"output {number}" / name
        path.parent.mkdir(parents=True)
        path.symlink_to(target)
        for overwrite in (False, True):
            with pytest.raises(OutputError):
                RunFolder.open(tmp_path / f"output {number}", {}, overwrite=overwrite)
        assert target.read_text() == "mine"
        assert [*path.parent.iterdir()] == [path]
