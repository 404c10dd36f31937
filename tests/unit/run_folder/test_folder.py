import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from grasp_lightning.errors import OutputError
from grasp_lightning.run_folder.folder import RunFolder
from tests.unit.run_folder.helpers import CONFIG, changed, content, refusal


def write_run(root: Path, *, finish: bool = True, config: dict[str, Any] = CONFIG) -> None:
    with RunFolder.open(root, config) as run:
        run.write_text("plan.json", "{}\n")
        run.write_text("checkpoints/step.ckpt", "state")
        with run.new_folder("model") as folder:
            (folder / "config.json").write_text("{}")
            (folder / "code").mkdir()
            (folder / "code" / "a.py").write_text("")
        if finish:
            run.finish()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "x"


def test_an_absent_folder_is_a_new_run_with_its_configuration(root: Path) -> None:
    with RunFolder.open(str(root), CONFIG) as run:
        assert run.state == "new"
        assert run.root == root
    assert yaml.safe_load((root / "config.yaml").read_text()) == {
        **CONFIG,
        "method": {"keep_ratio": 0.1, "layers": [1, 2]},
    }


def test_an_empty_folder_is_a_new_run(root: Path) -> None:
    root.mkdir(parents=True)

    assert RunFolder.open(root, CONFIG).state == "new"


def test_an_unfinished_run_with_the_same_configuration_resumes(root: Path) -> None:
    write_run(root, finish=False)

    with RunFolder.open(root, CONFIG) as run:
        assert run.state == "unfinished"
        assert run.path("checkpoints/step.ckpt").read_text() == "state"


def test_an_unfinished_run_with_another_configuration_names_the_key(root: Path) -> None:
    write_run(root, finish=False)

    assert refusal(root, changed(keep_ratio=0.2)) == (
        f"{root} contains a run (unfinished) with a different configuration: method.keep_ratio is "
        f"0.2 here and 0.1 in {root}/config.yaml; use another output_dir or --overwrite"
    )


def test_a_key_that_only_one_side_has_is_named(root: Path) -> None:
    write_run(root)

    assert "method.preset is null here and not set in" in refusal(root, changed(preset=None))


@pytest.mark.parametrize(
    "config",
    [
        {**CONFIG, "output_dir": "elsewhere"},
        {**CONFIG, "overwrite": True},
        changed(layers=[1, 2]),
        {**CONFIG, "seed": 0.0},
    ],
)
def test_where_a_run_is_written_and_how_a_value_is_spelled_do_not_count(
    root: Path, config: dict[str, Any]
) -> None:
    write_run(root)

    assert RunFolder.open(root, config).state == "finished"


def test_a_finished_run_is_found_without_writing_anything(root: Path) -> None:
    write_run(root)
    before = content(root)
    times = {path: path.stat().st_mtime_ns for path in (root, *root.rglob("*"))}

    run = RunFolder.open(root, CONFIG)

    assert run.state == "finished"
    assert content(root) == before
    assert {path: path.stat().st_mtime_ns for path in (root, *root.rglob("*"))} == times
    with pytest.raises(ValueError, match="is finished and cannot be written"):
        run.write_text("plan.json", "")


def test_a_finished_run_is_found_while_its_writer_still_holds_the_lock(root: Path) -> None:
    with RunFolder.open(root, CONFIG) as run:
        run.finish()
        assert RunFolder.open(root, CONFIG).state == "finished"


def test_a_finished_run_with_another_configuration_is_refused(root: Path) -> None:
    write_run(root)

    assert (
        "contains a run (finished) with a different configuration: seed is 1 here and 0 in"
        in refusal(root, {**CONFIG, "seed": 1})
    )


def test_a_configuration_edited_afterwards_does_not_pass_for_the_runs_own(root: Path) -> None:
    write_run(root)
    edited = changed(keep_ratio=0.2)
    (root / "config.yaml").write_text(yaml.safe_dump(edited))

    assert "config.yaml was changed after the run" in refusal(root, edited)


def test_keys_that_came_later_count_only_where_they_are_set(root: Path) -> None:
    earlier = {**CONFIG, "calibration": {"source": "pydoc"}, "evaluation": {"source": "pydoc"}}
    write_run(root, config=earlier)
    later = {
        **earlier,
        "calibration": {"source": "pydoc", "weights": None, "rows": None},
        "evaluation": {"source": "pydoc", "rows": None},
        "method": {**CONFIG["method"], "fisher": None},
    }
    assert RunFolder.open(root, later).state == "finished"
    later["evaluation"] = {"source": "pydoc", "rows": "0-9"}
    assert 'evaluation.rows is "0-9" here and not set in' in refusal(root, later)


@pytest.mark.parametrize("text", [None, "{", "- 1\n"])
def test_a_missing_or_damaged_configuration_is_reported(root: Path, text: str | None) -> None:
    write_run(root)
    if text is None:
        (root / "config.yaml").unlink()
    else:
        (root / "config.yaml").write_text(text)

    assert "config.yaml is missing or damaged" in refusal(root, changed(keep_ratio=0.2))


def test_a_folder_of_foreign_files_is_refused_and_left_alone(root: Path) -> None:
    root.mkdir(parents=True)
    (root / "notes.txt").write_text("mine")

    assert refusal(root) == (
        f"{root} is not empty and contains no run of this program (it has notes.txt); "
        f"use another output_dir or --overwrite"
    )
    assert content(root) == {"notes.txt": b"mine"}


def test_overwrite_starts_among_foreign_files_that_are_not_in_the_way(root: Path) -> None:
    root.mkdir(parents=True)
    (root / "notes.txt").write_text("mine")

    with RunFolder.open(root, CONFIG, overwrite=True) as run:
        assert run.state == "new"
        run.discard()
    assert content(root) == {"notes.txt": b"mine"}


@pytest.mark.parametrize("name", ["config.yaml", "plan.json", "model/weights.bin", "metrics.json"])
def test_foreign_files_in_the_way_are_never_overwritten(root: Path, name: str) -> None:
    (root / name).parent.mkdir(parents=True)
    (root / name).write_text("mine")

    text = refusal(root, overwrite=True)

    top = root / name.split("/", maxsplit=1)[0]
    assert f"{top} already exists and was not written by this program" in text
    assert (root / name).read_text() == "mine"


@pytest.mark.parametrize("finish", [True, False])
@pytest.mark.parametrize("config", [CONFIG, changed(keep_ratio=0.3)])
def test_overwrite_deletes_what_the_run_wrote_and_nothing_else(
    root: Path, finish: bool, config: dict[str, Any]
) -> None:
    write_run(root, finish=finish)
    (root / "notes.txt").write_text("mine")
    (root / "checkpoints" / "mine.txt").write_text("mine")

    with RunFolder.open(root, config, overwrite=True) as run:
        assert run.state == "new"
        found = set(content(root))
    assert found == {
        *("notes.txt", "checkpoints", "checkpoints/mine.txt"),
        *("config.yaml", "manifest.json", ".lock"),
    }


def test_overwrite_refuses_before_deleting_if_a_foreign_file_is_in_the_model(root: Path) -> None:
    write_run(root)
    (root / "model" / "notes.txt").write_text("mine")
    before = content(root)

    assert f"{root}/model/notes.txt already exists and was not written by this program" in refusal(
        root, overwrite=True
    )
    assert content(root) == before


def test_a_deletion_that_was_killed_is_completed_by_the_next_run(root: Path) -> None:
    write_run(root)
    manifest = json.loads((root / "manifest.json").read_text())
    (root / "manifest.json").write_text(json.dumps({**manifest, "state": "deleting"}))
    (root / "plan.json").unlink()

    with RunFolder.open(root, changed(keep_ratio=0.3)) as run:
        assert run.state == "new"
        assert not run.path("model").exists()


def test_a_link_out_of_the_folder_is_not_followed_when_deleting(root: Path, tmp_path: Path) -> None:
    write_run(root)
    outside = tmp_path / "outside"
    (root / "checkpoints").rename(outside)
    (root / "checkpoints").symlink_to(outside)

    assert "checkpoints already exists and was not written by this program" in refusal(
        root, overwrite=True
    )
    assert (outside / "step.ckpt").read_text() == "state"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"format": "other"}', "\x00\xff", "MANIFEST"]
)
def test_a_manifest_that_is_damaged_or_foreign_is_one_line(root: Path, text: str) -> None:
    write_run(root)
    good = (root / "manifest.json").read_text()
    (root / "manifest.json").write_text(good[: len(good) // 2] if text == "MANIFEST" else text)

    for overwrite in (False, True):
        assert "manifest.json is damaged, or was not written by this program" in refusal(
            root, overwrite=overwrite
        )


@pytest.mark.parametrize("name", ["../precious.txt", "/etc/precious", "model/../../precious.txt"])
def test_a_manifest_that_lists_a_path_outside_is_refused(root: Path, name: str) -> None:
    write_run(root)
    manifest = json.loads((root / "manifest.json").read_text())
    (root / "manifest.json").write_text(json.dumps({**manifest, "files": [name]}))

    assert "is not inside the folder" in refusal(root, overwrite=True)


def protected_cases(base: Path) -> Iterator[tuple[Path, Path]]:
    """Output folders and the protected folder or file that each would damage."""
    model = base / "models" / "llama"
    model.mkdir(parents=True)
    (model / "m.gguf").touch()
    (base / "link").symlink_to(model)
    (base / "up").symlink_to(base / "models")
    yield model, model
    yield model / "run", model
    yield base / "models", model
    yield base / "link", model
    yield base / "link" / "run", model
    yield base / "up" / "llama" / "x", model
    yield model / "run", base / "link"
    yield model, model / "m.gguf"


def test_the_models_folder_is_refused_also_through_links(tmp_path: Path) -> None:
    for output, protected in protected_cases(tmp_path):
        assert "which must not change" in refusal(output, protected=[protected], overwrite=True)
    assert set(content(tmp_path / "models" / "llama")) == {"m.gguf"}


def test_folders_next_to_the_model_and_absent_protected_ones_are_fine(tmp_path: Path) -> None:
    (tmp_path / "llama").mkdir()
    protected = [str(tmp_path / "llama"), "org/name", "smollm2"]

    with RunFolder.open(tmp_path / "llama-run", CONFIG, protected=protected) as run:
        assert run.state == "new"


def test_the_working_directory_and_its_parents_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    monkeypatch.chdir(tmp_path / "a" / "b")

    for output in ("", ".", "..", "/", tmp_path / "a", tmp_path / "link"):
        assert "is or contains the working directory" in refusal(output, overwrite=True)
    with RunFolder.open("run", CONFIG) as run:
        assert run.root == tmp_path / "a" / "b" / "run"


def test_the_home_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()

    for output in ("~", tmp_path / "home", tmp_path):
        assert "is or contains the home directory" in refusal(output, overwrite=True)


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    assert "is a file, expected a folder" in refusal(tmp_path / "file")
    assert "is a file, expected a folder" in refusal(tmp_path / "file" / "run")


@pytest.mark.skipif(sys.platform != "linux", reason="/proc refuses new folders on Linux only")
def test_a_folder_that_cannot_be_made_is_one_line() -> None:
    assert refusal("/proc/grasp-run").startswith("cannot create output_dir /proc/grasp-run: ")


def test_a_loop_of_links_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")

    assert str(tmp_path) in refusal(tmp_path / "a")


def test_the_lock_file_is_deleted_after_closing(root: Path) -> None:
    with RunFolder.open(root, CONFIG):
        assert (root / ".lock").exists()
    assert not (root / ".lock").exists()


def test_a_failed_write_leaves_neither_a_file_nor_the_old_one_damaged(root: Path) -> None:
    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with RunFolder.open(root, CONFIG) as run:
        run.write_text("plan.json", "old")
        with pytest.raises(
            OutputError, match=r"cannot write .*plan\.json: No space left on device"
        ):
            run.write_with("plan.json", fail)
        with (
            pytest.raises(OutputError, match=r"cannot write .*model: No space left"),
            run.new_folder("model") as folder,
        ):
            fail(folder / "weights.bin")
        assert set(content(root)) == {"config.yaml", "plan.json", "manifest.json", ".lock"}
        assert run.path("plan.json").read_text() == "old"


def test_an_error_inside_a_new_folder_is_raised_and_the_folder_deleted(root: Path) -> None:
    with RunFolder.open(root, CONFIG) as run:
        with pytest.raises(ZeroDivisionError), run.new_folder("model"):
            _ = 1 / 0
        assert set(content(root)) == {"config.yaml", "manifest.json", ".lock"}


def test_a_new_folder_replaces_what_the_run_wrote_there(root: Path) -> None:
    write_run(root, finish=False)

    with RunFolder.open(root, CONFIG) as run:
        with run.new_folder("model") as folder:
            (folder / "other.json").write_text("{}")
        assert set(content(root / "model")) == {"other.json"}


def test_a_foreign_file_in_the_old_model_stops_its_replacement(root: Path) -> None:
    write_run(root, finish=False)
    (root / "model" / "notes.txt").write_text("mine")

    with RunFolder.open(root, CONFIG) as run:
        in_the_way = r"notes\.txt already exists and was not written by this program"
        with pytest.raises(OutputError, match=in_the_way), run.new_folder("model"):
            pytest.fail("the block must not start")
        assert (root / "model" / "notes.txt").exists()
        assert (root / "model" / "config.json").exists()


def test_json_has_sorted_keys_and_refuses_nan(root: Path) -> None:
    with RunFolder.open(root, CONFIG) as run:
        assert run.write_json("metrics.json", {"b": 1, "a": [0.5]}).read_text() == (
            '{\n  "a": [\n    0.5\n  ],\n  "b": 1\n}\n'
        )
        with pytest.raises(ValueError, match="not JSON compliant"):
            run.write_json("metrics.json", {"a": float("nan")})


def test_every_path_is_in_the_manifest_before_it_is_written(root: Path) -> None:
    def listed_already(path: Path) -> None:
        assert "checkpoints/b.bin" in json.loads((root / "manifest.json").read_text())["files"]
        path.write_bytes(b"x")

    with RunFolder.open(root, CONFIG) as run:
        run.write_with("checkpoints/b.bin", listed_already)


@pytest.mark.parametrize("name", ["../x", "/x", ""])
def test_a_name_outside_the_folder_is_a_fault(root: Path, name: str) -> None:
    with RunFolder.open(root, CONFIG) as run, pytest.raises(ValueError, match="relative path"):
        run.write_text(name, "")


def test_removing_takes_only_the_runs_own_files(root: Path) -> None:
    with RunFolder.open(root, CONFIG) as run:
        run.write_text("checkpoints/a.ckpt", "")
        run.remove("checkpoints/a.ckpt")
        assert not run.path("checkpoints/a.ckpt").exists()
        run.path("notes.txt").write_text("mine")
        with pytest.raises(ValueError, match="not a file of this run"):
            run.remove("notes.txt")


def test_discarding_removes_the_run_and_the_folders_it_made(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path / "a" / "b" / "c", CONFIG) as run:
        run.write_text("checkpoints/y/z.txt", "")
        run.discard()

    assert content(tmp_path) == {}


def test_discarding_keeps_a_folder_that_was_there_before(root: Path) -> None:
    root.mkdir(parents=True)
    with RunFolder.open(root, CONFIG) as run:
        run.discard()

    assert content(root) == {}


def test_a_start_that_fails_leaves_no_folder(root: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        RunFolder.open(root, {"model": object()})

    assert content(tmp_path) == {}


def test_too_little_free_space_names_both_numbers(root: Path) -> None:
    with RunFolder.open(root, CONFIG) as run:
        run.check_free_space(1)
        with pytest.raises(OutputError, match=r"needs 1000000000000\.0 MB, but [\d.]+ MB are free"):
            run.check_free_space(10**18)


def test_a_finished_run_can_be_reopened_to_add_to_it(root: Path) -> None:
    write_run(root)
    run = RunFolder.reopen(root)
    assert run is not None
    with run:
        run.write_text("plan.json", "amended")
        with pytest.raises(OutputError, match="another process is writing to"):
            RunFolder.reopen(root)
    assert (root / "plan.json").read_text() == "amended"
    assert RunFolder.open(root, CONFIG).state == "finished"
    assert not (root / ".lock").exists()


@pytest.mark.parametrize("finish", [None, False])
def test_only_a_finished_run_is_reopened(root: Path, finish: bool | None) -> None:
    root.mkdir(parents=True)
    if finish is not None:
        write_run(root, finish=finish)
    assert RunFolder.reopen(root) is None
