"""Weights in the pattern 2:4, stored without their zeros, and computed by torch on NVIDIA GPUs.

Legend: N output and M input features of a linear.
"""

from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from grasp_lightning.errors import ModelError
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.weight_files import weight_files
from grasp_lightning.reading.tensors import read_tensors

POSITIONS: Final = "_positions"  # appended to the name of a weight
DTYPES: Final = (torch.float16, torch.bfloat16)
_CAPABILITY: Final = (8, 0)
_GROUP, _KEPT = 4, 2
_ROWS, _COLUMNS = 32, 64  # torch needs multiples of these
_BITS = 2  # of a position in a group


def device_problem() -> str | None:
    """Return why this machine cannot compute 2:4 weights, as the rest of a sentence, or None."""
    expected = "expected an NVIDIA GPU of compute capability 8.0 or higher"
    if not torch.cuda.is_available():
        return f"{expected}, and torch finds none"
    found = torch.cuda.get_device_capability()
    if found < _CAPABILITY:
        name = torch.cuda.get_device_name()
        return f"{expected}, and {name} has {found[0]}.{found[1]}"
    return None


def semi_sparse_problem(model: PreTrainedModel) -> str | None:
    """Return why the shapes or the dtype of a model do not fit, as the rest of a sentence, or None.

    Its weights may be on the meta device.
    """
    if model.dtype not in DTYPES:
        dtype = str(model.dtype).removeprefix("torch.")
        return (
            f"has weights in {dtype}, and 2:4 products exist in bfloat16 and float16: compress "
            "with model.dtype=bfloat16"
        )
    for name, module in _linears(model).items():
        if isinstance(module, Conv1D):
            return f"has Conv1D linears such as {name}, which torch cannot compute in 2:4 form"
        rows, columns = module.weight.shape
        if rows % _ROWS or columns % _COLUMNS:
            return (
                f"has the linear {name} of shape {(rows, columns)}: for 2:4 products, torch "
                f"expects multiples of {(_ROWS, _COLUMNS)}"
            )
    return None


def semi_sparse_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the tensors of a model to store, with the weights of all its linears in 2:4 form.

    A weight ``(N, M)`` becomes its values ``(N, M/2)`` under its own name, so that nothing takes it
    for an ordinary weight, and ``<name>_positions``. Tied weights are stored once.

    Raises:
        ModelError: If a weight has more than two values in a group.
    """
    tensors: dict[str, Tensor] = {}
    places: set[tuple[int, torch.Size]] = set()
    for name, value in model.state_dict().items():
        place = value.data_ptr(), value.shape
        if place not in places:
            places.add(place)
            tensors[name] = value.contiguous()
    for name in _linears(model):
        key = f"{name}.weight"
        packed = packed_2_4(tensors[key])
        if packed is None:
            raise ModelError(
                f"{name} is not 2:4: some of its rows have more than two values in four "
                "consecutive weights; compress with method.name=wanda or sparsegpt and "
                "method.pattern=2:4, without method.layers"
            )
        tensors[key], tensors[key + POSITIONS] = packed
    return tensors


def _linears(model: PreTrainedModel) -> dict[str, nn.Linear | Conv1D]:
    view = DecoderView(model)
    return {n: m for i in view.layer_indices for n, m in view.dense_modules(i).items()}


def packed_2_4(weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the values ``(N, M/2)`` of a weight ``(N, M)`` and their positions, or None.

    A byte has the positions of two groups, two bits each, the first in the lowest bits:
    ``(N, M/8)``, uint8. None if a group of four has more than two values.
    """
    groups = weight.reshape(len(weight), -1, _GROUP)
    if bool((groups.count_nonzero(dim=-1) > _KEPT).any()):
        return None
    # Values first, in their order; a zero fills up a group that has fewer.
    order = (groups == 0).to(torch.uint8).sort(dim=-1, stable=True).indices
    positions = order[..., :_KEPT].sort(dim=-1).values
    values = groups.gather(-1, positions).flatten(1)
    shifts = _BITS * torch.arange(2 * _KEPT, device=weight.device)
    codes = (positions.reshape(len(weight), -1, 2 * _KEPT) << shifts).sum(dim=-1)
    return values, codes.to(torch.uint8)


def unpacked_2_4(values: Tensor, positions: Tensor) -> Tensor:
    """Return the weight that ``packed_2_4`` packed."""
    shifts = _BITS * torch.arange(2 * _KEPT, device=values.device)
    found = (positions.long().unsqueeze(-1) >> shifts) & (_GROUP - 1)
    places = found.reshape(len(values), -1, _KEPT)
    groups = values.new_zeros((*places.shape[:2], _GROUP))
    return groups.scatter(-1, places, values.reshape(places.shape)).flatten(1)


def open_2_4(folder: str | Path, device: str = "cuda") -> PreTrainedModel:
    """Open a model that ``export --format 2_4`` wrote, in eval mode.

    On a GPU its linears compute with 2:4 weights, of half the size. On the CPU, which has no such
    products, the weights are ordinary ones with zeros.

    Args:
        folder: The folder ``model`` of the export.
        device: Where it will run.

    Raises:
        ModelError: If the folder holds no such model, or the GPU cannot compute 2:4 weights.
    """
    on_gpu = torch.device(device).type == "cuda"
    problem = device_problem() if on_gpu else None
    if problem is not None:
        raise ModelError(f"{folder} cannot be opened on {device}: {problem}; open it on the CPU")
    tensors: dict[str, Tensor] = {}
    for file in weight_files(Path(folder)):
        tensors |= read_tensors(file, ModelError)
    packed = [key.removesuffix(POSITIONS) for key in tensors if key.endswith(POSITIONS)]
    if not packed:
        raise ModelError(f"{folder} has no 2:4 weights: expected what export --format 2_4 wrote")
    dtype = tensors[packed[0]].dtype
    for key in packed:
        tensors[key] = unpacked_2_4(tensors[key], tensors.pop(key + POSITIONS))
    config = AutoConfig.from_pretrained(folder)
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]  # Any: a class, or a tuple of classes
    kind = found[0] if isinstance(found, tuple) else found
    model: PreTrainedModel = kind.from_pretrained(
        None, config=config, state_dict=tensors, dtype=dtype
    )
    model.to(device)  # type: ignore[arg-type]  # transformers wraps it with a too narrow type
    for key in packed if on_gpu else ():
        linear = model.get_submodule(key.removesuffix(".weight"))
        sparse = to_sparse_semi_structured(linear.get_parameter("weight").detach())
        linear.register_parameter("weight", nn.Parameter(sparse, requires_grad=False))
    model.train(False)
    return model
