from pathlib import Path

import pytest

from grasp_lightning.errors import OutputError
from grasp_lightning.models.lowrank import REMOTE_MODULE
from grasp_lightning.models.side_files import copy_side_files, is_licence, side_files

HANDED_ON = [
    "LICENSE",
    "NOTICE.txt",
    "chat_template.json",
    "configuration_own.py",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.model",
]
LEFT_OUT = [
    ".gitattributes",
    "README.md",
    "config.json",
    "consolidated.00.pth",
    "flax_model.msgpack",
    "model-00001-of-00002.safetensors",
    "model.safetensors.index.json",
    "modeling_grasp.py",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "tf_model.h5",
    "weights.onnx_data",
]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    (folder / "original").mkdir(parents=True)
    for name in (*HANDED_ON, *LEFT_OUT, "original/params.json"):
        (folder / name).write_text(name)
    return folder


def test_all_is_handed_on_but_weights_and_what_a_copy_has_of_its_own(source: Path) -> None:
    assert [file.name for file in side_files(source)] == HANDED_ON
    assert [file.name for file in side_files(source) if is_licence(file)] == HANDED_ON[:2]


def test_what_was_saved_is_kept(source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "tokenizer.model").write_text("saved")

    copy_side_files(side_files(source), copy)

    assert sorted(file.name for file in copy.iterdir()) == HANDED_ON
    assert (copy / "tokenizer.model").read_text() == "saved"
    assert (copy / "LICENSE").read_text() == "LICENSE"


def test_links_are_not_followed_out_of_the_folder(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "secret").write_text("secret")
    (source / "away.json").symlink_to(tmp_path / "secret")
    (source / "here.json").symlink_to(source / "original" / "params.json")
    copy = tmp_path / "copy"
    copy.mkdir()

    copy_side_files(side_files(source), copy)

    assert not (copy / "away.json").exists()
    assert (copy / "here.json").read_text() == "original/params.json"
    (text,) = caplog.messages
    assert text == "not copied, because these are links that leave the source folder: away.json"


def test_links_of_the_hubs_cache_are_followed(source: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    blob = (source / "LICENSE").rename(tmp_path / "models--a--b" / "blobs" / "4567")
    (snapshot / "LICENSE").symlink_to(blob)
    copy = tmp_path / "copy"
    copy.mkdir()

    copy_side_files(side_files(snapshot), copy)

    assert (copy / "LICENSE").read_text() == "LICENSE"


def test_a_missing_file_is_named(source: Path, tmp_path: Path) -> None:
    files = side_files(source)
    (source / "LICENSE").unlink()

    with pytest.raises(OutputError, match=r"cannot copy .*LICENSE into the model \(No such file"):
        copy_side_files(files, tmp_path)


def test_the_code_of_saved_linears_is_left_out() -> None:
    assert f"{REMOTE_MODULE}.py" in LEFT_OUT
