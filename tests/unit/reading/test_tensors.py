"""Files of tensors: a truncated, empty or foreign file is one line."""

import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from grasp_lightning.errors import GraspError, OutputError
from grasp_lightning.reading.tensors import (
    open_tensors,
    read_checkpoint,
    read_metadata,
    read_tensors,
)

READERS: list[Callable[..., Any]] = [read_tensors, read_metadata, read_checkpoint]


class Foreign:
    """An object that a pickle must not create."""


def damaged_files() -> dict[str, bytes]:
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    unknown = header.replace(b"F32", b"X99")
    return {
        "empty": b"",
        "short": b"\x01\x02",
        "foreign": b"GGUF and more bytes than eight",
        "huge header": struct.pack("<Q", 2**60),
        "deep header": struct.pack("<Q", 50_000) + b"[" * 50_000,
        "cut": struct.pack("<Q", len(header)) + header + b"\0\0",
        "unknown dtype": struct.pack("<Q", len(unknown)) + unknown + bytes(8),
        "pickle": pickle.dumps(Foreign()),
        "zip": b"PK\x03\x04 and nothing of a zip file",
    }


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("name", damaged_files())
def test_a_damaged_or_foreign_file_is_one_line(
    tmp_path: Path, read: Callable[..., Any], name: str
) -> None:
    file = tmp_path / name
    file.write_bytes(damaged_files()[name])
    with pytest.raises(OutputError) as raised:
        read(file, OutputError, "file", "delete it to measure again")
    text = str(raised.value)
    assert text.startswith("file is damaged: ")
    assert text.endswith("; delete it to measure again")
    assert "\n" not in text


@pytest.mark.parametrize("read", READERS)
def test_a_dangling_link_is_one_line(tmp_path: Path, read: Callable[..., Any]) -> None:
    link = tmp_path / "model.safetensors"
    link.symlink_to("gone")
    with pytest.raises(GraspError, match="cannot be read: a link to gone, which does not exist"):
        read(link)


def test_what_was_saved_is_read(tmp_path: Path) -> None:
    file, checkpoint = tmp_path / "a.safetensors", tmp_path / "a.ckpt"
    save_file({"a": torch.ones(2)}, file, metadata={"step": "1"})
    torch.save({"a": 1}, checkpoint)
    assert read_metadata(file) == {"step": "1"}
    assert read_tensors(file)["a"].tolist() == [1, 1]
    assert read_checkpoint(checkpoint) == {"a": 1}
    with open_tensors(file) as content:
        assert content.get_tensor("a").tolist() == [1, 1]
    with (
        pytest.raises(OutputError, match=r"is damaged: .*b"),
        open_tensors(file, OutputError) as content,
    ):
        content.get_tensor("b")
