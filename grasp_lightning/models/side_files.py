"""Files next to the weights of a source that a copy needs: processors, licences, code."""

import logging
import shutil
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

import huggingface_hub

from grasp_lightning.errors import OutputError
from grasp_lightning.models.quiet_hub import quiet_hub

logger = logging.getLogger(__name__)

_LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
WEIGHTS = (  # of all frameworks
    "*.safetensors",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.h5",
    "*.msgpack",
    "*.onnx",
    "*.onnx_data",
    "*.gguf",
    "rust_model.*",
    "*.npz",
    "*.pkl",
    "*.tflite",
    "*.mlmodel",
)
# Also indices, hidden files, and files that every copy writes itself.
_LEFT_OUT = (
    *WEIGHTS,
    "*.index.json",
    ".*",
    "config.json",
    "README.md",
    "modeling_grasp.py",  # the code of our linears: lowrank.REMOTE_MODULE
)


def side_files(folder: Path) -> tuple[Path, ...]:
    """Return the files of a model folder, without subfolders, that a copy of the model needs.

    These are all but weights, indices, hidden files and the files that every copy writes itself.
    """
    return tuple(
        file
        for file in sorted(folder.iterdir())
        if file.is_file() and not any(fnmatchcase(file.name, pattern) for pattern in _LEFT_OUT)
    )


def is_licence(file: Path) -> bool:
    """Return whether a file is a licence or a notice, by its name."""
    return any(fnmatchcase(file.name, pattern) for pattern in _LICENCES)


def fetch_side_files(name: str, revision: str | None, folder: Path | None) -> None:
    """Fetch the side files of a hub model into the cache, unless its folder there has them."""
    if folder is not None and (folder / "README.md").exists():  # already fetched
        return
    try:
        with quiet_hub():
            huggingface_hub.snapshot_download(
                name, revision=revision, ignore_patterns=[*_LEFT_OUT[:-2], "*/*"]
            )
    except OSError as error:  # covers all errors of the hub; the weights are already cached
        reason = " ".join(str(error).split())
        logger.warning("files next to the weights of %s cannot be fetched: %.200s", name, reason)


def copy_side_files(files: Iterable[Path], folder: Path) -> None:
    """Copy files that a saved model lacks, but no links out of the folder of the source."""
    elsewhere = []
    for file in files:
        if (folder / file.name).exists():
            continue
        if not _is_inside(file):
            elsewhere.append(file.name)
            continue
        try:
            shutil.copyfile(file, folder / file.name)
        except OSError as error:
            raise OutputError(
                f"cannot copy {file} into the model ({error.strerror}); run the same command again"
            ) from error
    if elsewhere:
        logger.warning(
            "not copied, because these are links that leave the source folder: %s",
            ", ".join(elsewhere),
        )


def _is_inside(file: Path) -> bool:
    # Snapshots in the hub's cache hold links to files next to all snapshots.
    is_snapshot = file.parent.parent.name == "snapshots"
    root = file.parent.parent.parent if is_snapshot else file.parent
    return file.resolve().is_relative_to(root.resolve())
