"""Models whose layers were all narrowed to one shape: ordinary ones, with another config."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import product

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.experts import experts_layout, narrowed_experts, set_experts
from grasp_lightning.models.linears import DenseModule
from grasp_lightning.models.lowrank import (
    NarrowedLinear,
    biases_of,
    dense_shape,
    fit_heads,
    low_rank_linears,
    narrowed_linears,
)
from grasp_lightning.models.numbering import unnumbered_settings
from grasp_lightning.models.rebuilding import dense_empty
from grasp_lightning.models.sliced import is_sliced
from grasp_lightning.models.units import Units, head_size, head_units

# Keys for the width in configs where None stands for a multiple of the hidden size.
_UNSET_KEYS = ("n_inner", "ffn_hidden_size")
# What the code of a family raises if it cannot use a value of its config.
_ERRORS = (
    *(ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError),
    StrictDataclassError,
)


def make_plain(model: PreTrainedModel) -> bool:
    """Turn a model with MLPs of one width, and one number of heads, into an ordinary one, in place.

    Experts may have a width of their own. Its narrowed linears become ordinary ones, and its config
    says the width and the heads. It stays as it is if it has a low-rank linear or an added bias, if
    layers differ, or if its config cannot say them. The weights may be on the meta device.

    Returns:
        Whether the model is an ordinary one now.
    """
    narrowed, experts = narrowed_linears(model), narrowed_experts(model)
    if is_sliced(model) or low_rank_linears(model):
        return False
    if not narrowed and not experts:
        return True
    found = None if biases_of(model) else _plain_settings(model, narrowed)
    if found is None:
        return False
    settings, plain = found
    for name, linear in narrowed.items():
        ordinary = plain.get_submodule(name)
        assert isinstance(ordinary, DenseModule)  # _plain_settings compares shapes
        model.set_submodule(name, _filled(ordinary, linear))
    for config in _text_configs(model):
        for key, value in settings.items():
            setattr(config, key, value)
    _settle(model, plain, {name.rpartition(".")[0] for name in narrowed} | experts.keys())
    return True


def _settle(model: nn.Module, plain: nn.Module, names: Iterable[str]) -> None:
    """Let modules keep the same sizes beside their weights as in an ordinary model."""
    for name in names:
        module = model.get_submodule(name)
        for key, value in unnumbered_settings(plain.get_submodule(name)).items():
            setattr(module, key, value)
        fit_heads(module)
        set_experts(module, None, {})


def _plain_settings(
    model: PreTrainedModel, narrowed: Mapping[str, NarrowedLinear]
) -> tuple[dict[str, int], PreTrainedModel] | None:
    """Return keys of the config, and the model that they build on the meta device."""
    dense = dense_empty(model)
    view = DecoderView(dense)
    attentions = [head_units(view, index) for index in view.layer_indices]
    heads = [units for units in attentions if units and units.reader in narrowed]
    in_attention = {name for units in heads for name in units.linears}
    widths = {
        (dense_shape(original)[1], linear.in_features)
        for name, linear in narrowed.items()
        if name not in in_attention
        and isinstance(original := dense.get_submodule(name), DenseModule)
    }
    narrower = {(old, new) for old, new in widths if new < old}
    narrower |= _expert_widths(model, dense)
    found = _head_settings(dense, narrowed, heads)
    if found is None or len({old for old, _ in narrower}) < len(narrower):
        return None
    text = model.config.get_text_config()
    keys = ([(key, new) for key in _candidates(text, old)] for old, new in sorted(narrower))
    for choice in product(*keys):
        settings = {**dict(choice), **found}
        try:
            plain = dense_empty(model, settings)
            type(plain.config).from_dict(plain.config.to_dict())  # it may refuse a combination
        except _ERRORS:
            continue
        if _shapes(plain, ()) == _shapes(model, _transposed(plain, narrowed)):
            return settings, plain
    return None


def _expert_widths(model: PreTrainedModel, dense: PreTrainedModel) -> set[tuple[int, int]]:
    """Return the original width of narrowed experts with the present one."""
    layouts = {n: experts_layout(dense.get_submodule(n)) for n in narrowed_experts(model)}
    widths = narrowed_experts(model)
    return {(layout.width, widths[name]) for name, layout in layouts.items() if layout}


def _head_settings(
    dense: PreTrainedModel, narrowed: Mapping[str, NarrowedLinear], heads: Collection[Units]
) -> dict[str, int] | None:
    """Return the keys for the number of heads; None if it differs, empty if none were removed."""
    kept = {narrowed[units.reader].in_features // units.width for units in heads}
    if len(kept) != 1:
        return {} if not kept else None
    units, (number,) = next(iter(heads)), kept
    size = head_size(dense.get_submodule(units.reader.rpartition(".")[0]))
    return {
        "num_attention_heads": number * units.width // size,
        "num_key_value_heads": number,
        "head_dim": size,
    }


def _candidates(config: PreTrainedConfig, size: int) -> Iterator[str]:
    for key, value in config.to_dict().items():
        is_size = isinstance(value, int) and not isinstance(value, bool) and value == size
        if is_size or (value is None and key in _UNSET_KEYS):
            yield key


def _transposed(plain: PreTrainedModel, names: Mapping[str, object]) -> tuple[str, ...]:
    return tuple(n for n in names if isinstance(plain.get_submodule(n), Conv1D))


def _shapes(model: nn.Module, transposed: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors, those of some linears' weights reversed."""
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    for name in transposed:
        shapes[f"{name}.weight"] = shapes[f"{name}.weight"][::-1]
    return shapes


def _filled(ordinary: DenseModule, narrowed: NarrowedLinear) -> DenseModule:
    """Return an ordinary linear of the same shape with the weight and bias of a narrowed one."""
    weight = narrowed.weight.detach()
    weight = weight.mT.contiguous() if isinstance(ordinary, Conv1D) else weight
    trainable = narrowed.weight.requires_grad
    ordinary.register_parameter("weight", nn.Parameter(weight, requires_grad=trainable))
    ordinary.register_parameter("bias", narrowed.bias)
    return ordinary.train(narrowed.training)


def _text_configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Return the configs that say the width: that of the text, and copies that modules hold."""
    kind = type(model.config.get_text_config())
    held = (getattr(module, "config", None) for module in model.modules())
    found = [model.config.get_text_config(), *(c for c in held if type(c) is kind)]
    return list({id(config): config for config in found}.values())
