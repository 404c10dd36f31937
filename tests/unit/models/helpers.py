"""Helpers of several tests of models: models without weights, and random factors."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.linears import DenseModule, as_linear
from grasp_lightning.models.lowrank import dense_shape
from grasp_lightning.models.mlp import mlps
from grasp_lightning.models.operations import applier_of
from grasp_lightning.models.size import LinearShape
from grasp_lightning.models.units import head_units
from grasp_lightning.plan import FactorizeLinear, NarrowMlp, Operation, RemoveHeads
from tests.conftest import tiny_model

META = torch.device("meta")


def meta_model(family: str, **overrides: object) -> PreTrainedModel:
    """A model on the meta device; moving a real one there with ``.to`` would untie it."""
    config = tiny_model(family, 0, **overrides).config
    with META:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    to: Any = model.to  # Any: transformers annotates its wrapper of .to wrongly
    converted: PreTrainedModel = to(dtype)
    return converted


def as_shape(view: DecoderView, name: str) -> tuple[int, int]:
    linear = view.module(name)
    assert isinstance(linear, DenseModule)
    return dense_shape(linear)


def random_factors(
    view: DecoderView, operations: Sequence[Operation], seed: int = 1
) -> dict[str, Tensor]:
    """Random factors of the right shapes for all operations that need some."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for operation in operations:
        dense = {name: LinearShape(*as_shape(view, name)) for name in operation.linears}
        applier = applier_of(operation)
        shapes = applier.tensor_shapes(operation, dense)
        shapes |= {k: tuple(t.shape) for k, t in applier.own_tensors(operation, view).items()}
        for key, shape in shapes.items():
            tensors[key] = torch.randn(shape, generator=generator) * 0.2
    return tensors


def factorize_layers(
    view: DecoderView, layers: Sequence[int], rank: int
) -> tuple[list[Operation], dict[str, Tensor]]:
    """Operations and factors that replace all linears of some layers."""
    operations: list[Operation] = [
        FactorizeLinear(module=module, rank=rank, components=None)
        for layer in layers
        for module in view.linears(layer)
    ]
    return operations, random_factors(view, operations)


def narrow_layers(
    view: DecoderView, layers: Sequence[int], channels: Sequence[int]
) -> tuple[list[Operation], dict[str, Tensor]]:
    """Operations and weights that keep some channels of all MLPs of some layers, unchanged."""
    operations, tensors = [], {}
    for layer in layers:
        for mlp in mlps(view, layer):
            reader = view.module(mlp.reader)
            assert isinstance(reader, DenseModule)
            weight = as_linear(reader).weight.detach()
            kept = weight.new_zeros((len(weight), len(channels)))
            tensors[f"{mlp.reader}.weight"] = kept if weight.is_meta else weight[:, list(channels)]
            operation = NarrowMlp(reader=mlp.reader, writers=mlp.writers, channels=tuple(channels))
            operations.append(operation)
    return [*operations], tensors


def removal(view: DecoderView, index: int, groups: Sequence[int]) -> RemoveHeads:
    """The removal of all key/value groups of a layer but some."""
    units = head_units(view, index)
    assert units is not None
    return RemoveHeads(
        output=units.reader, inputs=units.writers, groups=tuple(groups), num_groups=units.number
    )
