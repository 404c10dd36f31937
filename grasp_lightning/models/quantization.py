"""Quantizes the linears of a loaded model in place, and makes it savable."""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any, Final, Literal, get_args

import torch
from torch import nn
from torch.nn.functional import pad
from transformers import BitsAndBytesConfig, PreTrainedModel, TorchAoConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer

from grasp_lightning.errors import ModelError
from grasp_lightning.models.checkpoint import check_not_quantized
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.int4 import INT4_GROUP, Int4Linear
from grasp_lightning.models.linears import DenseModule
from grasp_lightning.models.lowrank import (
    GraspConfig,
    config_of,
    finish_quantized,
    low_rank_linears,
    narrowed_linears,
)
from grasp_lightning.models.seams import computation_refusal
from grasp_lightning.registration import without_warnings

logger = logging.getLogger(__name__)

Kind = Literal["int8", "int4", "nf4"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
LIBRARIES: Final[Mapping[Kind, str]] = MappingProxyType(
    {"int8": "torchao", "int4": "torchao", "nf4": "bitsandbytes"}
)

QUANTIZED_FORMAT: Final = "the format of quantized weights"

_NF4_BLOCK = 64  # weights that share a scale


def quantize_model(
    model: PreTrainedModel,
    kind: Kind = "int8",
    track: Callable[[Sequence[str]], Iterable[str]] = tuple,
) -> tuple[str, ...]:
    """Quantize the weights of all linears in decoder layers, in place, and return their names.

    These are dense and narrowed linears, and both factors of low-rank ones. Embeddings, norms,
    biases, the language-model head and mixtures of experts stay in floating point.
    ``save_pretrained`` then writes a folder that ``from_pretrained`` opens, after ``import
    grasp_lightning`` unless all linears are dense and the kind is int8 or nf4.

    Args:
        model: A model with floating-point weights, on the device where it will run.
        kind: int8 (one scale per output) and int4 (one scale and zero point per 32 weights) of
            torchao; NF4 (one scale per 64 weights) of bitsandbytes.
        track: Shows progress: names of the linears -> the same names.

    Raises:
        ValueError: If there is no such kind.
        ModelError: If the model is quantized already or has seams, or the library or a kernel is
            missing.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    check_not_quantized(model, ModelError)
    refusal = computation_refusal(model, QUANTIZED_FORMAT)
    if refusal is not None:
        raise ModelError(f"{type(model).__name__} {refusal}")
    problem = quantization_problem(kind, model.device.type)
    if problem is not None:
        raise ModelError(problem)
    _import_quietly(LIBRARIES[kind])
    shapes, linears = config_of(model), dict(_linears(DecoderView(model), kind))
    if not linears:
        raise ModelError(
            f"{type(model).__name__} has no linear that {LIBRARIES[kind]} can quantize to {kind}: "
            "its linears are Conv1D; use nf4"
        )
    weights = _config(kind, model, linears)
    for name in track(list(linears)):
        model.set_submodule(name, _QUANTIZE[kind](linears[name]))
    finish_quantized(model)
    _attach(model, shapes, weights)
    return tuple(linears)


def _import_quietly(library: str) -> None:
    with without_warnings():
        import_module("torchao.quantization" if library == "torchao" else library)


def quantization_problem(kind: Kind, device_type: str) -> str | None:
    """Return in one line why a kind cannot be used on a type of device; None if it can."""
    library = LIBRARIES[kind]
    needed = [library, *(["mslk"] if kind == "int4" and device_type != "cpu" else [])]
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        return (
            f"{kind} weights need {missing[0]}, which is not installed: "
            f"pip install {missing[0]}" + (" (the extra quantize)" if missing[0] == library else "")
        )
    return None


def _linears(view: DecoderView, kind: Kind) -> Iterator[tuple[str, DenseModule]]:
    """Yield the linears whose weights are quantized, by full name."""
    names = {module: name for name, module in view.model.named_modules()}
    num_skipped = 0
    for index in view.layer_indices:
        layer = view.layer(index)
        found: list[DenseModule] = [*view.dense_modules(index).values()]
        found += narrowed_linears(layer).values()
        for linear in low_rank_linears(layer).values():
            # A weight of rank 0 is an empty buffer.
            found += [linear.right, linear.left] if linear.rank else []
        for module in found:
            if isinstance(module, Conv1D) and kind != "nf4":
                num_skipped += 1
            elif not (kind == "int8" and isinstance(module, nn.Linear) and module.in_features == 1):
                # A scale per output would be larger than the one number that it scales.
                yield names[module], module
    if num_skipped:
        logger.warning(
            "%d linears of %s stay in floating point: they are Conv1D, which torchao does not "
            "quantize; nf4 does",
            num_skipped,
            type(view.model).__name__,
        )


def _config(
    kind: Kind, model: PreTrainedModel, linears: Mapping[str, nn.Module]
) -> TorchAoConfig | BitsAndBytesConfig:
    """Return the config of transformers for the quantizer that loads such weights."""
    if kind == "nf4":
        others = _others(model, linears)
        options: Any = BitsAndBytesConfig  # Any: untyped in transformers
        made: BitsAndBytesConfig = options(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=model.dtype,
            llm_int8_skip_modules=others,
        )
        return made
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig  # noqa: PLC0415

    form = Int8WeightOnlyConfig() if kind == "int8" else Int4WeightOnlyConfig(group_size=INT4_GROUP)
    return TorchAoConfig(form)


def _others(model: PreTrainedModel, linears: Mapping[str, nn.Module]) -> list[str]:
    """Return the names of the linears that stay in floating point."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and name not in linears
    ]


def _to_int8(linear: nn.Module) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_  # noqa: PLC0415

    quantize_(linear, Int8WeightOnlyConfig())
    return linear


def _to_int4(linear: nn.Module) -> nn.Module:
    """Return a linear whose weight is int4, padded with zeros to whole groups in both directions.

    Only a weight with whole groups of inputs can be quantized, and the CPU's kernel needs a
    multiple of 16 outputs.
    """
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig  # noqa: PLC0415
    from torchao.quantization import Int4WeightOnlyConfig, quantize_  # noqa: PLC0415

    assert isinstance(linear, nn.Linear)  # Conv1D is skipped
    missing = [-size % INT4_GROUP for size in linear.weight.shape]
    weight = pad(linear.weight.detach(), (0, missing[1], 0, missing[0])).to(torch.bfloat16)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    on_cpu = weight.device.type == "cpu"
    form = PrototypeInt4WeightOnlyConfig if on_cpu else Int4WeightOnlyConfig
    quantize_(linear, form(group_size=INT4_GROUP))
    return linear


def _to_nf4(linear: nn.Module) -> nn.Module:
    """Return a linear whose weight is NF4, with zeros that make each row whole blocks.

    bitsandbytes 0.50 reads rows of 32, 96, ... weights, half a block more than whole blocks, with
    the wrong scales on CPUs that have AVX-512.
    """
    from bitsandbytes.nn import modules  # noqa: PLC0415

    library: Any = modules  # Any: its types are narrower than what it takes
    assert isinstance(linear, DenseModule)
    weight = linear.weight.detach()
    weight = weight.mT if isinstance(linear, Conv1D) else weight
    rows, columns = weight.shape
    weight = pad(weight, (0, -columns % _NF4_BLOCK)).contiguous()
    options = {"compress_statistics": False, "quant_type": "nf4"}
    with torch.device("meta"):
        made = library.Linear4bit(columns, rows, bias=False, compute_dtype=weight.dtype, **options)
    made.weight = library.Params4bit(weight, module=made, **options).to(weight.device)
    made.register_parameter("bias", linear.bias)
    finished: nn.Module = made.train(linear.training)
    return finished


_QUANTIZE: Final[Mapping[Kind, Callable[[nn.Module], nn.Module]]] = MappingProxyType(
    {"int8": _to_int8, "int4": _to_int4, "nf4": _to_nf4}
)


def _attach(
    model: PreTrainedModel, shapes: GraspConfig, weights: TorchAoConfig | BitsAndBytesConfig
) -> None:
    """Make ``save_pretrained`` write what ``from_pretrained`` reads."""
    holder: Any = model  # Any: transformers does not declare the attributes it sets
    content = json.loads(weights.to_json_string(use_diff=False))
    # An ordinary model with a kind that transformers supports alone is an ordinary folder.
    is_ordinary = not (shapes.ranks or shapes.shapes or _needs_finish(model))
    config = (
        weights
        if is_ordinary
        else GraspConfig(shapes.ranks, shapes=shapes.shapes, biases=shapes.biases, weights=content)
    )
    model.config.quantization_config = config
    holder.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    holder.is_quantized, holder.quantization_method = True, weights.quant_method
    if isinstance(weights, BitsAndBytesConfig):
        holder.is_loaded_in_4bit = True


def _needs_finish(model: nn.Module) -> bool:
    """Return whether some linear computes with more than what transformers restores."""
    return any(
        isinstance(module, Int4Linear) or module._forward_pre_hooks for module in model.modules()
    )
