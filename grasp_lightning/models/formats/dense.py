"""Ordinary dense weights: factors are multiplied, narrowed linears padded with zeros."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from grasp_lightning.config import ExportConfig
from grasp_lightning.errors import ModelError, NumericsError
from grasp_lightning.linalg.precision import matmul_precision
from grasp_lightning.models.checkpoint import attach_quantizer, foreign_quantizer, save_model
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.experts import experts_layout, narrowed_experts, set_experts
from grasp_lightning.models.factored_rows import factorized_rows
from grasp_lightning.models.formats.base import ExportFacts, Format, Track
from grasp_lightning.models.linears import DenseModule
from grasp_lightning.models.loading import LoadedModel
from grasp_lightning.models.lowrank import (
    LowRankLinear,
    NarrowedLinear,
    biases_of,
    dense_shape,
    fit_heads,
    has_replaced,
    low_rank_linears,
    narrowed_linears,
    ranks_of,
    shapes_of,
)
from grasp_lightning.models.rebuilding import dense_empty
from grasp_lightning.models.seams import seam_refusal
from grasp_lightning.models.size import count_parameters
from grasp_lightning.models.streamed import StreamedWeights, streamed_weights
from grasp_lightning.models.streamed_saving import save_streamed, verify_streamed
from grasp_lightning.models.units import head_units

# Kept and original rows of each part of a linear.
Parts = Sequence[tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class NumParameters:
    """Parameters of the copy (dense) and of the compressed model."""

    dense: int
    compressed: int


@dataclass(frozen=True, kw_only=True)
class DenseFacts(ExportFacts):
    """What the format ``dense`` wrote.

    Attributes:
        ranks: Rank of each linear whose factors were multiplied, by full name.
        shapes: [out_features, in_features] of each narrowed linear padded with zeros, by full name.
        experts: Width of all narrowed experts padded with zeros, by full name.
        rows: Full names of embedding and head whose factors were multiplied.
    """

    ranks: dict[str, int]
    parameters: NumParameters
    dtype: str
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    experts: dict[str, int] = field(default_factory=dict)
    rows: list[str] = field(default_factory=list)

    def lines(self, folder: Path) -> list[str]:
        """Return the path of the copy, and that it is not smaller."""
        done = [f"factors of {len(self.ranks)} linears multiplied"]
        done = done if self.ranks or not (self.shapes or self.experts or self.rows) else []
        done += [f"factors of {' and '.join(self.rows)} multiplied"] if self.rows else []
        done += [f"{len(self.shapes)} narrowed linears padded with zeros"] if self.shapes else []
        if self.experts:
            done.append(f"narrowed experts of {len(self.experts)} layers padded with zeros")
        first = (
            f"{', '.join(done)}: {self.parameters.dense:,} parameters, the compressed model has "
            f"{self.parameters.compressed:,}; this copy is not smaller"
        )
        return [first, f"model:  {folder}"]


class DenseFormat(Format):
    """Ordinary dense weights: factors are multiplied, and narrowed linears padded with zeros."""

    facts = DenseFacts
    doing = "multiplying factors"

    def refusal(self, model: PreTrainedModel, options: ExportConfig) -> str | None:
        """Return that a model is quantized or has nothing to convert; None if it can be."""
        del options
        quantized = foreign_quantizer(model)
        if quantized is not None:
            return f"is quantized with {quantized} already: export the unquantized model"
        refusal = _refusal(model)
        if refusal is not None or has_replaced(model):
            return refusal
        return (
            "has neither low-rank nor narrowed linears: it is an ordinary checkpoint already, so "
            "there is nothing to export"
        )

    def num_bytes(self, model: PreTrainedModel, options: ExportConfig) -> int:
        """Return the bytes of the dense weights."""
        del options
        densify(model)
        return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())

    def write(
        self, loaded: LoadedModel, folder: Path, options: ExportConfig, track: Track
    ) -> DenseFacts:
        """Write an ordinary Hugging Face folder; the model becomes dense."""
        del options
        model = loaded.model
        ranks, shapes, compressed = ranks_of(model), shapes_of(model), count_parameters(model)
        experts, weights = narrowed_experts(model), streamed_weights(model)
        rows = [*factorized_rows(model)]
        if weights is None:
            densify(model, track)
            save_model(model, folder, tokenizer=loaded.tokenizer)
            number = count_parameters(model)
        else:
            number = _write_streamed(loaded, weights, folder)
        return DenseFacts(
            ranks=ranks,
            parameters=NumParameters(dense=number, compressed=compressed),
            dtype=str(model.dtype).removeprefix("torch."),
            shapes=shapes,
            experts=experts,
            rows=rows,
        )

    def verify(self, loaded: LoadedModel, folder: Path, *, generates: bool) -> None:
        """Check what was written; what is streamed was compared when it was written."""
        if streamed_weights(loaded.model) is None:
            super().verify(loaded, folder, generates=generates)


def _write_streamed(loaded: LoadedModel, weights: StreamedWeights, folder: Path) -> int:
    """Write the dense model one decoder layer at a time; return its number of parameters."""
    model = loaded.model
    view, rebuilt = DecoderView(model), _Rebuilt(model)
    empty = rebuilt.originals

    def state(index: int | None) -> dict[str, Tensor]:
        found = model.state_dict()
        for name in rebuilt.names:
            if index is not None and view.layer_of(name) == index:
                own = rebuilt.module(name).state_dict()
                found |= {f"{name}.{part}": tensor for part, tensor in own.items()}
        return found

    empty.name_or_path = empty.config.name_or_path = model.name_or_path
    if model.can_generate():
        empty.generation_config = model.generation_config
    hashes = save_streamed(
        empty, lambda names: weights.tensors(names, state), folder, tokenizer=loaded.tokenizer
    )
    verify_streamed(folder, hashes)
    return count_parameters(empty)


class _Rebuilt:
    """The dense modules of the replaced linears of a model.

    Attributes:
        originals: The dense model, with all parameters on the meta device.
        names: Full names of the replaced linears, sorted.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.originals = dense_empty(model)
        self._factors, self._narrowed = low_rank_linears(model), narrowed_linears(model)
        self.names = sorted((*self._factors, *self._narrowed))
        self._dense = {name: _dense_original(self.originals, name) for name in self.names}
        heads = _heads(self.originals, self._narrowed)
        self._parts = {
            name: heads.get(name) or _parts(name, self._narrowed, self._dense)
            for name in self._narrowed
        }

    def module(self, name: str) -> DenseModule:
        """Return a dense module with the product of factors, or padded with zeros."""
        dense = copy.deepcopy(self._dense[name])
        if name in self._factors:
            return _product(name, self._factors[name], dense)
        return _padded(self._narrowed[name], dense, self._parts[name])


def densify(model: PreTrainedModel, track: Track = tuple) -> tuple[str, ...]:
    """Multiply factors into dense weights, pad narrowed linears and experts with zeros, in place.

    The model becomes an ordinary one of its class and original size; biases do not change. Products
    are computed in float32 or better and stored in the dtype and on the device of the factors; the
    meta device works. Channels of an MLP have no order, nor do key/value groups, so the kept ones
    come first. The model
    changes only once all weights are finite; a ``NumericsError`` names a linear whose product
    overflows.

    Args:
        model: A model with low-rank or narrowed linears.
        track: Shows progress: names of the linears -> the same names.

    Returns:
        Sorted full names of the linears that became dense, then of experts, embedding and head.

    Raises:
        ModelError: If the model has no such linears, or has seams or added biases.
    """
    refusal = _refusal(model)
    if refusal is not None:
        raise ModelError(f"{type(model).__name__} {refusal}")
    experts, rows = narrowed_experts(model), factorized_rows(model)
    if not (low_rank_linears(model) or narrowed_linears(model) or experts or rows):
        raise ModelError(
            f"{type(model).__name__} has neither low-rank nor narrowed linears, so there is "
            "nothing to multiply or pad: expected a model whose linears were replaced by compress"
        )
    rebuilt = _Rebuilt(model)
    weights = {name: rebuilt.module(name) for name in track(rebuilt.names)}
    for name, module in weights.items():
        model.set_submodule(name, module)
    for parent in {name.rpartition(".")[0] for name in weights}:
        fit_heads(model.get_submodule(parent))
    for name in experts:
        _pad_experts(model.get_submodule(name), rebuilt.originals.get_submodule(name))
    for name, end in _multiplied_rows(rows, rebuilt.originals).items():
        model.set_submodule(name, end)
    attach_quantizer(model)
    return (*weights, *experts, *rows)


def _multiplied_rows(
    rows: Mapping[str, nn.Module], originals: PreTrainedModel
) -> dict[str, nn.Module]:
    """Return the dense embedding and head; tied ones share their matrix again."""
    found: dict[str, nn.Module] = {}
    matrices: dict[int, nn.Parameter] = {}
    for name, module in rows.items():
        holder: Any = getattr(module, "embedding", module)  # Any: of three classes
        dense: Any = originals.get_submodule(name)  # Any: an embedding or a linear
        if id(holder) not in matrices:
            with matmul_precision("highest"):
                weight = holder.dense()
            if not weight.is_meta and not torch.isfinite(weight).all():
                raise NumericsError(
                    f"the product of the factors of {name} is not finite in {weight.dtype}; "
                    "compress with a wider model.dtype"
                )
            trainable = holder.weight.requires_grad
            matrices[id(holder)] = nn.Parameter(weight, requires_grad=trainable)
        dense.weight = matrices[id(holder)]
        for key, buffer in dense.named_buffers(recurse=False):  # the scale of an embedding
            own = torch.full_like(buffer, holder.scale, device=dense.weight.device)
            setattr(dense, key, own)
        if isinstance(dense, nn.Linear):
            dense.register_parameter("bias", getattr(module, "bias", None))
        found[name] = dense.train(module.training)
    return found


def _pad_experts(narrowed: nn.Module, original: nn.Module) -> None:
    """Give experts their original width, with zeros for the removed channels."""
    layout, kept = experts_layout(original), experts_layout(narrowed)
    assert layout is not None  # loading and surgery accept no others
    assert kept is not None
    rows = layout.rows(torch.arange(kept.width))
    full: dict[str, Tensor] = {}
    for name, shape in layout.shapes(layout.width).items():
        old = narrowed.get_parameter(name).detach()
        if tuple(old.shape) == shape:
            continue
        (axis,) = (axis for axis in range(len(shape)) if old.shape[axis] != shape[axis])
        places = rows if name.startswith(layout.writer) else torch.arange(kept.width)
        full[name] = old.new_zeros(shape).index_copy(axis, places.to(old.device), old)
    set_experts(narrowed, None, full)


def _refusal(model: PreTrainedModel) -> str | None:
    """Return why an ordinary model cannot hold what compression has added; None if it can."""
    biases = biases_of(model)
    if biases:
        return (
            f"has biases that compression has added, the first in {biases[0]}, which an ordinary "
            "model of its family cannot hold; serve it as it is, or compress with another method "
            "than flap"
        )
    return seam_refusal(model, "an ordinary model")


def _dense_original(originals: PreTrainedModel, name: str) -> DenseModule:
    linear = originals.get_submodule(name)
    if not isinstance(linear, DenseModule):
        raise ModelError(f"{name} must be a Linear, the config builds {type(linear).__name__}")
    return linear


def _heads(originals: PreTrainedModel, narrowed: Mapping[str, NarrowedLinear]) -> dict[str, Parts]:
    """Return the parts of the linears that write heads of narrowed attention, by name."""
    view, found = DecoderView(originals), dict[str, Parts]()
    for index in view.layer_indices:
        units = head_units(view, index)
        if units is None or units.reader not in narrowed:
            continue
        kept = narrowed[units.reader].in_features // units.width
        for writer, sizes in zip(units.writers, units.parts, strict=True):
            found[writer] = [(size * kept, size * units.number) for size in sizes]
    return found


def _parts(
    name: str, narrowed: Mapping[str, NarrowedLinear], dense: Mapping[str, DenseModule]
) -> Parts | None:
    """Return the parts of a linear that writes the channels of an MLP; None for a reader.

    Both the writer's original and its kept outputs must be the same multiple of the channels of a
    reader in the same module.

    Raises:
        ModelError: If there is no such reader.
    """
    new, old = narrowed[name].out_features, dense_shape(dense[name])[0]
    if new == old:
        return None
    for other, reader in narrowed.items():
        kept, channels = reader.in_features, dense_shape(dense[other])[1]
        is_near = other.rpartition(".")[0] == name.rpartition(".")[0] and kept < channels
        if is_near and old % channels == 0 and old // channels * kept == new:
            return [(kept, channels)] * (old // channels)
    raise ModelError(
        f"{name} has {new} of {old} outputs, but no linear in the same module reads that many "
        "channels"
    )


def _padded(narrowed: NarrowedLinear, dense: DenseModule, parts: Parts | None) -> DenseModule:
    """Return the dense module with zeros for the removed channels or heads."""
    weight, bias = narrowed.weight.detach(), narrowed.bias
    trainable = narrowed.weight.requires_grad
    if parts is None:
        full = weight.new_zeros(dense_shape(dense))
        full[:, : weight.shape[1]] = weight
    else:
        full = _padded_parts(weight, parts)
        if bias is not None:
            filled = _padded_parts(bias.detach(), parts)
            bias = nn.Parameter(filled, requires_grad=bias.requires_grad)
    stored = full.mT.contiguous() if isinstance(dense, Conv1D) else full
    dense.register_parameter("weight", nn.Parameter(stored, requires_grad=trainable))
    dense.register_parameter("bias", bias)
    return dense.train(narrowed.training)


def _padded_parts(tensor: Tensor, parts: Parts) -> Tensor:
    """Return a weight or bias with zeros at the end of every part."""
    found = []
    for part, (kept, size) in zip(torch.split(tensor, [n for n, _ in parts]), parts, strict=True):
        found += [part, part.new_zeros((size - kept, *part.shape[1:]))]
    return torch.cat(found)


def _product(name: str, factors: LowRankLinear, dense: DenseModule) -> DenseModule:
    """Return the dense module with the product of the factors as its weight."""
    left, right = factors.left.weight.detach(), factors.right.weight.detach()
    wide = torch.promote_types(left.dtype, torch.float32)
    with matmul_precision("highest"):
        weight = (left.to(wide) @ right.to(wide)).to(left.dtype)  # (N, M)
    # Finite factors can overflow in float16. Values on the meta device cannot be inspected.
    if not weight.is_meta and not torch.isfinite(weight).all():
        raise NumericsError(
            f"the product of the factors of {name} is not finite in {left.dtype}; "
            f"compress with a wider model.dtype"
        )
    stored = weight.mT.contiguous() if isinstance(dense, Conv1D) else weight
    trainable = factors.left.weight.requires_grad
    dense.register_parameter("weight", nn.Parameter(stored, requires_grad=trainable))
    dense.register_parameter("bias", factors.left.bias)
    return dense.train(factors.training)
