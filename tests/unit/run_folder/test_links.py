"""No file outside of a run folder changes, whatever links it contains."""

import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from grasp_lightning.errors import OutputError
from grasp_lightning.run_folder import names, write_file
from grasp_lightning.run_folder.folder import RunFolder
from tests.unit.run_folder.helpers import CONFIG, content, refusal

TOKEN = "0123456789abcdef"  # a random name, if it could be predicted
FILES = [
    *(names.CONFIG, names.PLAN, names.SCORES, names.METRICS, names.REPORT, names.EXPORT),
    *(names.SAMPLED_TEXT, "statistics.safetensors", "statistics-00001-of-00002.safetensors"),
    *("manifest.json", ".lock", ".partial.manifest.json", ".partial.config.yaml"),
    *(".partial.plan.json", f".partial.{TOKEN}", f".partial.{TOKEN}.json"),
    *(f".partial.{TOKEN}.yaml", "model/config.json", "model/README.md", "logs/pass_1/metrics.csv"),
    *("checkpoints/steps.json", f"checkpoints/.partial.{TOKEN}.json", "model.partial/config.json"),
]
FOLDERS = ["model", "logs", "checkpoints", "model.partial", "logs/pass_1", f".partial.{TOKEN}"]


def whole_run(root: Path, overwrite: bool) -> None:
    with RunFolder.open(root, CONFIG, overwrite=overwrite) as run:
        run.write_text("checkpoints/steps.json", "{}")
        for name in FILES[:9]:
            if name != names.CONFIG:
                run.write_text(name, "{}")
        with run.new_folder("logs") as logs:
            (logs / "pass_1").mkdir()
            (logs / "pass_1" / "metrics.csv").write_text("")
        with run.new_folder("model") as model:
            (model / "config.json").write_text("{}")
            (model / "README.md").write_text("")
        run.remove_all("checkpoints/*")
        run.finish()


def half_run(root: Path) -> None:
    with RunFolder.open(root, CONFIG) as run:
        run.write_text("checkpoints/steps.json", "{}")
        with run.new_folder("model") as model:
            (model / "config.json").write_text("{}")


@pytest.mark.parametrize("start", ["new", "overwrite", "unfinished", "unfinished, overwrite"])
@pytest.mark.parametrize("name", [*FILES, *FOLDERS])
def test_a_link_under_any_name_changes_nothing_outside(
    start: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, outside = tmp_path / "run", tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("mine")
    (outside / "config.json").write_text("mine")
    (outside / "precious").chmod(0o640)
    (outside / "empty").mkdir()
    if start.startswith("unfinished"):
        half_run(root)
    link = root / name
    link.parent.mkdir(parents=True, exist_ok=True)
    if link.exists():
        link.rename(tmp_path / "moved")
    link.symlink_to(outside if name in FOLDERS else outside / "precious")
    before = content(outside)
    monkeypatch.setattr(secrets, "token_hex", lambda _: TOKEN)

    with suppress(OutputError):
        whole_run(root, overwrite="overwrite" in start)

    assert content(outside) == before
    assert (outside / "precious").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("name", [".lock", "manifest.json", "config.yaml", "model"])
def test_a_link_where_a_run_writes_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "target")

    assert refusal(tmp_path / "run", overwrite=True) == (
        f"{tmp_path}/run/{name} already exists and was not written by this program; move it, or "
        "use another output_dir"
    )


def test_a_foreign_file_in_place_of_the_lock_is_not_deleted(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("of another program")

    assert ".lock already exists and was not written by this program" in refusal(
        tmp_path, overwrite=True
    )
    assert content(tmp_path) == {".lock": b"of another program"}


def test_only_half_written_files_of_a_run_are_deleted(tmp_path: Path) -> None:
    half_run(tmp_path)
    stale = tmp_path / "checkpoints" / f".partial.{TOKEN}.safetensors"
    kept = [f".partial.{TOKEN[1:]}.json", f".partial.{TOKEN}.json.bak", ".partial.plan.json"]
    for path in (stale, *(tmp_path / name for name in kept)):
        path.write_text("half")
    (tmp_path / f".partial.{TOKEN}.yaml").mkdir()

    RunFolder.open(tmp_path, CONFIG).close()

    assert not stale.exists()
    assert {name for name in content(tmp_path) if name.startswith(".")} == {
        *kept,
        f".partial.{TOKEN}.yaml",
    }


def write_inside(folder: Path) -> None:
    (folder / "inner").mkdir(mode=0o700)
    (folder / "inner" / "file").touch(mode=0o600)


def in_live_folder(run: RunFolder) -> None:
    run.live_folder("logs")


def in_new_folder(run: RunFolder) -> None:
    with run.new_folder("model") as folder:
        write_inside(folder)


def in_file(run: RunFolder) -> None:
    run.write_with("checkpoints/last.ckpt", lambda path: path.touch(mode=0o600))


@pytest.mark.parametrize("write", [in_live_folder, in_new_folder, in_file])
def test_all_that_a_run_writes_has_the_usual_permissions(
    write: Callable[[RunFolder], None], tmp_path: Path
) -> None:
    umask = os.umask(0)
    os.umask(umask)
    with RunFolder.open(tmp_path / "run", CONFIG) as run:
        write(run)
    for path in (tmp_path / "run", *(tmp_path / "run").rglob("*")):
        usual = 0o777 if path.is_dir() else 0o666
        assert path.stat().st_mode & 0o777 == usual & ~umask, path


def test_a_file_next_to_a_result_is_not_a_link_to_another(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "result.json").symlink_to(tmp_path / "precious")

    write_file(tmp_path / "result.json", lambda path: path.write_text("{}"))

    assert (tmp_path / "precious").read_text() == "mine"
    assert (tmp_path / "result.json").read_text() == "{}"
