"""Writes a GGUF file, one tensor at a time."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from gguf import (
    GGML_QUANT_SIZES,
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
    RopeScalingType,
)
from gguf.quants import quantize
from numpy.typing import NDArray
from transformers import PreTrainedModel

from grasp_lightning.errors import ModelError, NumericsError
from grasp_lightning.models.formats.base import Track
from grasp_lightning.models.formats.gguf.layout import Layout, context_length
from grasp_lightning.models.formats.gguf.tensors import Entry, head_size
from grasp_lightning.models.formats.gguf.vocabulary import Key

_SMALL: Final = {
    GGMLQuantizationType.Q4_0,
    GGMLQuantizationType.Q4_1,
    GGMLQuantizationType.Q5_0,
    GGMLQuantizationType.Q5_1,
}


def kind_of(entry: Entry, type_name: str) -> GGMLQuantizationType:
    """Return how a tensor is stored in a file of a type, such as ``q4_0``.

    Vectors stay in float32. The output keeps 8 bits at least, as in files of llama.cpp's own tool.
    """
    kind = GGMLQuantizationType[type_name.upper()]
    if len(entry.shape) == 1:
        return GGMLQuantizationType.F32
    return GGMLQuantizationType.Q8_0 if entry.is_output and kind in _SMALL else kind


def num_bytes(entries: Iterable[Entry], type_name: str) -> int:
    """Return the size of all tensors of a file."""
    return sum(_num_bytes(entry, kind_of(entry, type_name)) for entry in entries)


def misfit(entries: Iterable[Entry], type_name: str) -> str | None:
    """Return why a tensor does not fit a type, as the rest of a sentence; None if all do."""
    for entry in entries:
        kind = kind_of(entry, type_name)
        block, _ = GGML_QUANT_SIZES[kind]
        if entry.shape[-1] % block:
            return (
                f"does not fit gguf_type {type_name}: rows of {entry.name} have {entry.shape[-1]} "
                f"values, but {kind.name} stores blocks of {block}; use f32, f16 or bf16"
            )
    return None


def write_file(
    file: Path,
    model: PreTrainedModel,
    layout: Layout,
    entries: Sequence[Entry],
    vocabulary: Sequence[Key],
    *,
    type_name: str,
    name: str,
    licence: str | None,
    track: Track,
) -> None:
    """Write a GGUF file, one tensor after another; a ``NumericsError`` names one that overflows."""
    writer = GGUFWriter(file, layout.architecture.name)
    writer.add_type("model")
    writer.add_name(name)
    if licence is not None:
        writer.add_license(licence)
    writer.add_file_type(_file_type(type_name))
    writer.add_quantization_version(2)
    _add_sizes(writer, model, layout)
    _add_rope(writer, model)
    for key in vocabulary:
        writer.add_key_value(key.name, key.value, key.kind, key.item_kind)
    for entry in entries:
        kind = kind_of(entry, type_name)
        size = _num_bytes(entry, kind)
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), size, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    try:
        for entry, _ in zip(entries, track([entry.name for entry in entries]), strict=True):
            writer.write_tensor_data(_stored(entry, kind_of(entry, type_name)))
    finally:
        writer.close()


def _num_bytes(entry: Entry, kind: GGMLQuantizationType) -> int:
    block, size = GGML_QUANT_SIZES[kind]
    return int(np.prod(entry.shape, dtype=np.int64)) // block * size


def _stored(entry: Entry, kind: GGMLQuantizationType) -> NDArray[np.generic]:
    values = entry.build().contiguous().numpy()
    if values.shape != entry.shape:
        raise ModelError(f"{entry.name} must be {entry.shape}, got {values.shape}")
    if kind == GGMLQuantizationType.F16 and np.abs(values).max() > np.finfo(np.float16).max:
        raise NumericsError(
            f"weights of {entry.name} are too large for gguf_type f16; use bf16 or f32"
        )
    stored: NDArray[np.generic] = quantize(values, kind)
    return stored


def _file_type(type_name: str) -> LlamaFileType:
    name = type_name.upper()
    return LlamaFileType.ALL_F32 if name == "F32" else LlamaFileType[f"MOSTLY_{name}"]


def _add_sizes(writer: GGUFWriter, model: PreTrainedModel, layout: Layout) -> None:
    config = model.config
    size = head_size(config)
    is_per_layer = layout.architecture.is_per_layer
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(context_length(model))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(list(layout.widths) if is_per_layer else layout.widths[0])
    writer.add_head_count(list(layout.heads) if is_per_layer else layout.heads[0])
    counts = layout.key_value_heads
    writer.add_head_count_kv(list(counts) if is_per_layer else counts[0])
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _add_rope(writer: GGUFWriter, model: PreTrainedModel) -> None:
    """Add base and scaling of the rotary embedding; those of Llama 3 are a tensor."""
    rope = model.config.rope_parameters
    kind = rope.get("rope_type", "default")
    writer.add_rope_freq_base(rope["rope_theta"])
    if kind not in {"linear", "yarn"}:
        return
    writer.add_rope_scaling_type(RopeScalingType(kind))
    writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings")
        writer.add_rope_scaling_orig_ctx_len(original or model.config.max_position_embeddings)
