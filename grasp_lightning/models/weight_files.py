"""The weight files of a Hugging Face folder."""

from pathlib import Path

from grasp_lightning.errors import ModelError
from grasp_lightning.reading.text import check_file, read_json

_NAMES = ("model.safetensors", "pytorch_model.bin")  # in the order of transformers
ADVICE = "download it again"


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files that transformers reads from a folder, sorted by name; maybe none.

    A ``ModelError`` reports a missing file, or an index that is damaged or names files outside the
    folder.
    """
    for name in _NAMES:
        file, index = folder / name, folder / f"{name}.index.json"
        if _is_there(file):
            return [_checked(file)]
        if _is_there(index):
            return [_checked(folder / shard) for shard in _shard_names(index)]
    return []


def _is_there(file: Path) -> bool:
    return file.exists() or file.is_symlink()


def fault(file: Path) -> str:
    """Return the beginning of a message about a weight file."""
    return f"cannot load {file.parent.resolve().name}: {file.name}"


def _checked(file: Path) -> Path:
    check_file(file, ModelError, fault(file), ADVICE)
    return file


def _shard_names(index: Path) -> list[str]:
    content = read_json(index, ModelError, fault(index), ADVICE)
    content = content if isinstance(content, dict) else {}
    names, metadata = content.get("weight_map"), content.get("metadata")
    if not isinstance(names, dict) or not names or not isinstance(metadata, dict):
        raise ModelError(f"{fault(index)} lacks its metadata or weight_map; {ADVICE}")
    for name in names.values():
        if not isinstance(name, str) or name in {"", ".", ".."} or set(name) & set("/\\\0"):
            raise ModelError(
                f"{fault(index)} names {name!r:.80}; expected names of files next to it, without "
                "a folder"
            )
    return sorted(set(names.values()))
