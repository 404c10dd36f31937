import json
from pathlib import Path

import pytest

from grasp_lightning.errors import OutputError
from grasp_lightning.run_folder.folder import RunFolder
from tests.unit.run_folder.helpers import CONFIG, changed, content, refusal


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "x"


def write_run(root: Path, *, finish: bool = False, name: str = "logs") -> None:
    """A run into whose live folder a library has written."""
    with RunFolder.open(root, CONFIG) as run:
        logs = run.live_folder(name)
        (logs / "start_1").mkdir()
        (logs / "start_1" / "metrics.csv").write_text("loss\n1.0\n")
        (logs / "events").write_bytes(b"\x00")
        if finish:
            run.finish()


def manifest_of(root: Path) -> dict[str, object]:
    read: dict[str, object] = json.loads((root / "manifest.json").read_text())
    return read


def refused(run: RunFolder, name: str = "logs") -> str:
    with pytest.raises(OutputError) as caught:
        run.live_folder(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_live_folder_is_there_at_once_under_its_own_name(root: Path) -> None:
    with RunFolder.open(root, CONFIG) as run:
        logs = run.live_folder("logs")
        assert logs == run.root / "logs"
        assert logs.is_dir()
        assert manifest_of(root)["live"] == ["logs"]


def test_files_of_others_are_kept_when_an_unfinished_run_resumes(root: Path) -> None:
    write_run(root)
    before = {name: data for name, data in content(root).items() if name.startswith("logs")}

    with RunFolder.open(root, CONFIG) as run:
        assert run.state == "unfinished"
        logs = run.live_folder("logs")
        (logs / "start_2").mkdir()

    assert len(before) == 4
    assert content(root).items() >= before.items()
    assert (root / "logs" / "start_2").is_dir()


def test_asking_twice_gives_the_same_folder(root: Path) -> None:
    with RunFolder.open(root, CONFIG) as run:
        (run.live_folder("logs") / "a").touch()
        assert (run.live_folder("logs") / "a").exists()


@pytest.mark.parametrize("finish", [True, False])
@pytest.mark.parametrize("name", ["logs", "checkpoints/b/logs"])
def test_overwrite_deletes_a_live_folder_with_its_content_and_nothing_next_to_it(
    root: Path, finish: bool, name: str
) -> None:
    write_run(root, finish=finish, name=name)
    (root / "notes").mkdir()
    (root / "notes" / "mine.txt").write_text("mine")

    with RunFolder.open(root, changed(keep_ratio=0.3), overwrite=True) as run:
        assert run.state == "new"
        found = set(content(root))
    assert found == {*("notes", "notes/mine.txt"), *("config.yaml", "manifest.json", ".lock")}


def test_a_foreign_file_next_to_a_nested_live_folder_is_kept(root: Path) -> None:
    write_run(root, name="checkpoints/logs")
    (root / "checkpoints" / "mine.txt").write_text("mine")

    with RunFolder.open(root, CONFIG, overwrite=True):
        assert {name for name in content(root) if name.startswith("c")} == {
            *("checkpoints", "checkpoints/mine.txt", "config.yaml"),
        }


def test_discarding_deletes_a_live_folder(root: Path, tmp_path: Path) -> None:
    with RunFolder.open(root, CONFIG) as run:
        (run.live_folder("logs") / "a").touch()
        run.discard()
    assert list(tmp_path.iterdir()) == []


def test_a_deletion_that_was_killed_is_completed_by_the_next_run(root: Path) -> None:
    write_run(root)
    (root / "manifest.json").write_text(json.dumps({**manifest_of(root), "state": "deleting"}))
    (root / "logs" / "events").unlink()

    with RunFolder.open(root, changed(keep_ratio=0.3)) as run:
        assert run.state == "new"
        assert not (root / "logs").exists()


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "link"])
def test_what_no_run_wrote_is_not_taken_for_a_live_folder(
    root: Path, tmp_path: Path, kind: str
) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "mine.txt").write_text("mine")
    root.mkdir(parents=True)
    match kind:
        case "folder":
            (tmp_path / "outside").rename(root / "logs")
        case "empty folder":
            (root / "logs").mkdir()
        case "file":
            (root / "logs").write_text("mine")
        case "link":
            (root / "logs").symlink_to(tmp_path / "outside")
    before = content(tmp_path)

    assert refusal(root, overwrite=True) == (
        f"{root}/logs already exists and was not written by this program; move it, or "
        "use another output_dir"
    )
    assert content(tmp_path) == before


def test_a_folder_that_appears_during_the_run_is_refused(root: Path) -> None:
    with RunFolder.open(root, CONFIG) as run:
        (root / "logs").mkdir()
        assert "logs already exists and was not written by this program" in refused(run)
        assert manifest_of(root)["live"] == []


def test_a_run_of_an_earlier_version_has_no_live_folders(root: Path) -> None:
    with RunFolder.open(root, CONFIG) as run:
        run.write_text("plan.json", "{}\n")
    manifest = manifest_of(root)
    del manifest["live"]
    (root / "manifest.json").write_text(json.dumps(manifest))

    with RunFolder.open(root, CONFIG) as run:
        assert run.state == "unfinished"
        run.live_folder("logs")
        run.finish()
    assert manifest_of(root)["live"] == ["logs"]
    assert RunFolder.open(root, CONFIG).state == "finished"


@pytest.mark.parametrize(
    "live", ["logs", None, {"logs": 1}, [1], ["../logs"], ["/logs"], [""], ["."]]
)
def test_a_manifest_whose_live_folders_are_damaged_or_outside_is_refused(
    root: Path, live: object
) -> None:
    write_run(root)
    (root / "manifest.json").write_text(json.dumps({**manifest_of(root), "live": live}))

    for overwrite in (False, True):
        assert "manifest.json is damaged, or was not written by this program" in refusal(
            root, overwrite=overwrite
        )
    assert (root / "logs" / "events").exists()


def test_a_link_in_place_of_a_live_folder_is_not_followed_when_deleting(
    root: Path, tmp_path: Path
) -> None:
    write_run(root)
    outside = tmp_path / "outside"
    (root / "logs").rename(outside)
    (root / "logs").symlink_to(outside)

    assert "logs already exists and was not written by this program" in refusal(
        root, overwrite=True
    )
    assert (outside / "start_1" / "metrics.csv").read_text() == "loss\n1.0\n"
    assert (outside / "events").exists()


def test_a_link_in_place_of_a_parent_is_not_followed_when_deleting(
    root: Path, tmp_path: Path
) -> None:
    write_run(root, name="checkpoints/logs")
    outside = tmp_path / "outside"
    (root / "checkpoints").rename(outside)
    (root / "checkpoints").symlink_to(outside)

    assert "checkpoints already exists and was not written by this program" in refusal(
        root, overwrite=True
    )

    assert (outside / "logs" / "events").exists()


def test_a_link_inside_a_live_folder_is_deleted_and_not_followed(
    root: Path, tmp_path: Path
) -> None:
    write_run(root)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "mine.txt").write_text("mine")
    (root / "logs" / "latest").symlink_to(tmp_path / "outside")

    RunFolder.open(root, CONFIG, overwrite=True).close()

    assert not (root / "logs").exists()
    assert (tmp_path / "outside" / "mine.txt").read_text() == "mine"


def test_a_live_folder_that_cannot_be_made_is_one_line(root: Path) -> None:
    root.mkdir(parents=True)
    with RunFolder.open(root, CONFIG, overwrite=True) as run:
        (root / "checkpoints").write_text("mine")
        text = refused(run, "checkpoints/logs")
        assert text.startswith(f"cannot write {root}/checkpoints/logs: ")
        run.discard()
    assert content(root) == {"checkpoints": b"mine"}


@pytest.mark.parametrize("name", ["../logs", "/logs", "logs/../../x", ""])
def test_a_name_outside_the_folder_is_a_fault(root: Path, name: str) -> None:
    with (
        RunFolder.open(root, CONFIG) as run,
        pytest.raises(ValueError, match="expected a relative path inside the run folder"),
    ):
        run.live_folder(name)


def test_a_finished_run_has_no_folder_to_write_into(root: Path) -> None:
    write_run(root, finish=True)
    before = content(root)

    run = RunFolder.open(root, CONFIG)

    with pytest.raises(ValueError, match="is finished and cannot be written"):
        run.live_folder("logs")
    assert content(root) == before
