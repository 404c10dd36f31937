"""The format ``gguf``: a file that llama.cpp and the programs built on it open."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from grasp_lightning.config import ExportConfig
from grasp_lightning.errors import ModelError
from grasp_lightning.models.formats.base import ExportFacts, Format, Track
from grasp_lightning.models.formats.gguf.layout import (
    MULTIPLE,
    Layout,
    context_length,
    layout_of,
    layout_refusal,
)
from grasp_lightning.models.gguf import ALIAS, find_alias, read_header
from grasp_lightning.models.loading import LoadedModel
from grasp_lightning.models.lowrank import ranks_of
from grasp_lightning.models.rebuilding import dense_empty
from grasp_lightning.reading.text import user_path

_TYPES = {"torch.float32": "f32", "torch.float16": "f16", "torch.bfloat16": "bf16"}


@dataclass(frozen=True, kw_only=True)
class GgufBytes:
    """Sizes in bytes.

    Attributes:
        compressed: Of the compressed model's weights.
        file: Of this file.
        dense: Of a file of the same type with every linear of these layers at full size.
    """

    compressed: int
    file: int
    dense: int


@dataclass(frozen=True, kw_only=True)
class GgufFacts(ExportFacts):
    """What the format ``gguf`` wrote.

    Attributes:
        file: Name of the file.
        type: Type of its matrices, such as ``q8_0``.
        architecture: Architecture of llama.cpp that computes what the model does.
        tokenizer: Where the tokenizer comes from: a file's name, or ``folder``.
        context_length: Longest text on which it computes the same, in tokens.
        dtype: Type of the compressed model's weights.
        widths: Channels of each MLP in the file.
        zero_channels: How many of them are zeros, which fill up the width.
        without_attention: Layers that have no attention in the file.
        ranks: Rank of each linear whose factors were multiplied, by full name.
    """

    file: str
    type: str
    architecture: str
    tokenizer: str
    context_length: int
    dtype: str
    bytes: GgufBytes
    widths: tuple[int, ...]
    zero_channels: tuple[int, ...]
    without_attention: tuple[int, ...]
    ranks: dict[str, int]

    def lines(self, folder: Path) -> list[str]:
        """Return sizes, what was multiplied and filled up, and the path of the file."""
        size = self.bytes
        # A model with fewer layers or one smaller width is what its config calls dense.
        dense = f" (dense: {size.dense / 1e6:.1f} MB)" if size.dense > size.file else ""
        first = (
            f"gguf {self.type}, architecture {self.architecture}: {size.file / 1e6:.1f} MB{dense}; "
            f"the compressed model has {size.compressed / 1e6:.1f} MB in {self.dtype}"
        )
        done = [first]
        if self.ranks:
            done.append(
                f"factors of {len(self.ranks)} linears multiplied: llama.cpp has no low-rank "
                "linears, so these are as large as dense ones"
            )
        if any(self.zero_channels):
            num = sum(1 for number in self.zero_channels if number)
            done.append(
                f"{sum(self.zero_channels)} zero channels pad the MLPs of {num} layers to "
                f"multiples of {MULTIPLE}"
            )
        return [*done, f"model:  {folder / self.file}"]


class GgufFormat(Format):
    """One file with weights, tokenizer and chat template."""

    facts = GgufFacts
    doing = "writing tensors"
    library = "gguf"

    def refusal(self, model: PreTrainedModel, options: ExportConfig) -> str | None:
        """Return why llama.cpp cannot compute a model, or why a type does not fit."""
        _require_package()
        _base_file(options)
        refusal = layout_refusal(model)
        if refusal is not None:
            return refusal
        from grasp_lightning.models.formats.gguf.tensors import entries  # noqa: PLC0415
        from grasp_lightning.models.formats.gguf.writing import misfit  # noqa: PLC0415

        return misfit(entries(model, layout_of(model)), _type_name(model, options))

    def num_bytes(self, model: PreTrainedModel, options: ExportConfig) -> int:
        """Return the bytes of the tensors."""
        return _tensor_bytes(model, layout_of(model), _type_name(model, options))

    def write(
        self, loaded: LoadedModel, folder: Path, options: ExportConfig, track: Track
    ) -> GgufFacts:
        """Write the file."""
        from grasp_lightning.models.formats.gguf.tensors import entries  # noqa: PLC0415
        from grasp_lightning.models.formats.gguf.writing import write_file  # noqa: PLC0415

        model, type_name = loaded.model, _type_name(loaded.model, options)
        layout = layout_of(model)
        base = _base_file(options)
        file = folder / f"model-{type_name}.gguf"
        write_file(
            file,
            model,
            layout,
            list(entries(model, layout)),
            _vocabulary(loaded, base, Path(options.model).expanduser()),
            type_name=type_name,
            name=loaded.origin.name,
            licence=loaded.origin.licence,
            track=track,
        )
        empty, size = dense_empty(model), file.stat().st_size
        beside = size - _tensor_bytes(model, layout, type_name)  # mostly the tokenizer
        return GgufFacts(
            file=file.name,
            type=type_name,
            architecture=layout.architecture.name,
            tokenizer="folder" if base is None else base.name,
            context_length=context_length(model),
            dtype=str(model.dtype).removeprefix("torch."),
            bytes=GgufBytes(
                compressed=sum(p.numel() * p.element_size() for p in model.parameters()),
                file=size,
                dense=beside + _tensor_bytes(empty, layout_of(empty), type_name),
            ),
            widths=layout.widths,
            zero_channels=layout.padded,
            without_attention=tuple(i for i, heads in enumerate(layout.heads) if not heads),
            ranks=ranks_of(model),
        )

    def verify(self, loaded: LoadedModel, folder: Path, *, generates: bool) -> None:
        """Check that the file is complete."""
        del loaded, generates
        for file in folder.glob("*.gguf"):
            read_header(file)


def _require_package() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(
            "format gguf needs the package gguf, which is not installed: "
            'pip install "grasp-lightning[gguf]"'
        )


def _type_name(model: PreTrainedModel, options: ExportConfig) -> str:
    return options.gguf_type or _TYPES.get(str(model.dtype), "f32")


def _tensor_bytes(model: PreTrainedModel, layout: Layout, type_name: str) -> int:
    from grasp_lightning.models.formats.gguf.tensors import entries  # noqa: PLC0415
    from grasp_lightning.models.formats.gguf.writing import num_bytes  # noqa: PLC0415

    return num_bytes(entries(model, layout), type_name)


def _base_file(options: ExportConfig) -> Path | None:
    if options.gguf_base is None:
        return None
    if options.gguf_base == ALIAS:
        return find_alias()
    file = user_path(options.gguf_base, "gguf_base", ModelError)
    if not file.is_file():
        raise ModelError(f"gguf_base: no such file: {file}; expected a GGUF file of the base model")
    return file


def _vocabulary(loaded: LoadedModel, base: Path | None, folder: Path) -> list[Any]:  # Any: Key
    from grasp_lightning.models.formats.gguf import vocabulary  # noqa: PLC0415

    num_tokens = loaded.model.config.vocab_size
    if base is not None:
        return [*vocabulary.base_keys(base, loaded.tokenizer, num_tokens)]
    return [*vocabulary.folder_keys(folder, loaded.tokenizer, num_tokens)]
