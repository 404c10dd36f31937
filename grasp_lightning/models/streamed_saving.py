"""Saves a streamed model as an ordinary Hugging Face folder, one tensor in memory at a time."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grasp_lightning.errors import GraspError, ModelError, OutputError
from grasp_lightning.models.checkpoint import prepare_folder, write_remote_code
from grasp_lightning.models.integrity import bytes_of
from grasp_lightning.models.lowrank import check_fails_closed, has_replaced
from grasp_lightning.models.quiet import quiet_transformers
from grasp_lightning.models.rebuilding import rebuild_problem
from grasp_lightning.models.streamed_loading import stored_names
from grasp_lightning.reading.tensors import open_tensors, read_shapes

Tensors = Callable[[Sequence[str]], Iterator[tuple[str, Tensor]]]
WriteFile = Callable[[Path, Callable[[Path], dict[str, str]]], dict[str, str]]
"""Puts a file that a function writes in its place, and returns what the function returns."""

_FILES: Final = "model{suffix}.safetensors"
_INDEX: Final = "model.safetensors.index.json"
DTYPE_NAMES: Final = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def save_streamed(
    model: PreTrainedModel,
    tensors: Tensors,
    folder: Path,
    *,
    tokenizer: PreTrainedTokenizerBase,
    max_shard_size: int | str = "5GB",
    write_file: WriteFile | None = None,
) -> dict[str, str]:
    """Write a streamed model as a folder that ``from_pretrained`` opens, as ``save_model`` does.

    Args:
        model: The model.
        tensors: Yields tensors of its state dict by name, in order.
        folder: Created if absent.
        tokenizer: Saved with the model.
        max_shard_size: Maximum size of a weight file, in bytes or as text such as ``5GB``.
        write_file: Writes a weight file, which it may have kept from an earlier start; None writes
            each one.

    Returns:
        The sha256 of the values of each stored tensor, by its name in the files.

    Raises:
        ModelError: As ``save_model``.
    """
    try:
        check_fails_closed(model)
    except ValueError as error:
        raise ModelError(str(error)) from error
    problem = rebuild_problem(model)
    if problem is not None:
        raise ModelError(problem)
    prepare_folder(folder)
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    with quiet_transformers():
        model.config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
    hashes = _write_weights(model, tensors, folder, max_shard_size, write_file or _written)
    if has_replaced(model):
        write_remote_code(model, folder)
    tokenizer.save_pretrained(folder)
    return hashes


def verify_streamed(folder: Path, hashes: Mapping[str, str]) -> None:
    """Read every tensor of a saved model, one by one, and compare it with what was written.

    Args:
        folder: Folder of the saved model.
        hashes: The sha256 of the values of each tensor, by name.

    Raises:
        OutputError: If a tensor is missing, or has other values.
    """
    found: dict[str, str] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        found |= file_hashes(path, OutputError)
    wrong = sorted(name for name, digest in hashes.items() if found.get(name) != digest)
    if wrong or found.keys() != hashes.keys():
        raise OutputError(
            f"the saved weights differ from what was written, first in {wrong[:1] or sorted(found)}"
            ": the disk may be damaged or full; run the same command again"
        )


def file_hashes(path: Path, error: type[GraspError]) -> dict[str, str]:
    """Return the sha256 of each tensor of a file, by name; a damaged file raises ``error``."""
    found: dict[str, str] = {}
    for name in read_shapes(path, error):
        # Opened for each tensor: what is read stays mapped until the file is closed.
        with open_tensors(path, error) as content:
            found[name] = _sha256(content.get_tensor(name))
    return found


def _written(path: Path, write: Callable[[Path], dict[str, str]]) -> dict[str, str]:
    return write(path)


def _write_weights(
    model: PreTrainedModel,
    tensors: Tensors,
    folder: Path,
    max_shard_size: int | str,
    write_file: WriteFile,
) -> dict[str, str]:
    names, metadata = stored_names(model)
    shapes = model.state_dict()
    stored = {stored: shapes[name] for name, stored in names.items()}
    split = split_torch_state_dict_into_shards(
        stored, filename_pattern=_FILES, max_shard_size=max_shard_size
    )
    own = {stored: name for name, stored in names.items()}
    hashes: dict[str, str] = {}
    for file, keys in split.filename_to_tensors.items():
        header = {key: stored[key] for key in keys}

        def write(path: Path, header: Mapping[str, Tensor] = header) -> dict[str, str]:
            found = (tensor for _, tensor in tensors([own[key] for key in header]))
            return _write_file(path, header, found, {**metadata, "format": "pt"})

        hashes |= write_file(folder / file, write)
    if split.is_sharded:
        content = {
            "metadata": {"total_parameters": model.num_parameters(), **split.metadata},
            "weight_map": split.tensor_to_filename,
        }
        text = json.dumps(content, indent=2, sort_keys=True) + "\n"
        (folder / _INDEX).write_text(text, encoding="utf-8")
    return hashes


def _write_file(
    path: Path, header: Mapping[str, Tensor], tensors: Iterator[Tensor], metadata: Mapping[str, str]
) -> dict[str, str]:
    """Write a safetensors file, whose header needs only shapes; return the sha256 of each tensor.

    Args:
        path: The file.
        header: Tensors of the right shape and dtype by name, in the order of ``tensors``.
        tensors: The tensors, on any device.
        metadata: Metadata of the file.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}  # Any: JSON
    end = 0
    for name, tensor in header.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        entries[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    hashes: dict[str, str] = {}
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, expected), tensor in zip(header.items(), tensors, strict=True):
            assert tensor.shape == expected.shape, name  # a load applies the same operations
            file.write(bytes_of(tensor))
            hashes[name] = _sha256(tensor)
    return hashes


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(bytes_of(tensor)).hexdigest()
