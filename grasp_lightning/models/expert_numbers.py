"""Mixtures with fewer experts: what belongs to one expert, and its removal.

transformers has one number of experts for all layers of a model, in its config. So all mixtures of
a model keep equally many, and the result is an ordinary model. What depends on that number is found
by building the model with another one on the meta device: no family is named anywhere.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grasp_lightning.models.decoder import DecoderView, configs_of
from grasp_lightning.models.experts import ExpertsLayout, experts_layout
from grasp_lightning.models.numbering import unnumbered_settings
from grasp_lightning.models.rebuilding import dense_empty

_TOP_K = "num_experts_per_tok"
_GROUPS, _CHOSEN_GROUPS = "n_group", "topk_group"  # as in DeepSeek-V3
_PER_GROUP = 2  # how many experts of a group its score needs
# What the code of a family raises if it cannot use a value of its config.
_ERRORS = (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError)

Settings = Mapping[str, bool | int | float | str]


class Mixture(NamedTuple):
    """A router with its experts, of which some can be removed.

    Attributes:
        name: Original full name of the module that holds both.
        experts: Original full name of the experts.
        layout: The layout of the experts in the dense model.
        dims: Each tensor in the mixture with an entry per expert, by its name there, and the
            dimension of these entries.
        expert_size: Parameters of one dense expert, with those that its router has for it.
    """

    name: str
    experts: str
    layout: ExpertsLayout
    dims: Mapping[str, int]
    expert_size: int


class NumberedExperts(NamedTuple):
    """All mixtures of a model from which experts can be removed.

    Attributes:
        key: Key of the config that says the number of experts.
        number: That number.
        mixtures: By the name of their experts, in model order.
        num_groups: How many groups of neighbouring experts a router chooses from first; 1 if it
            has no groups. Each group must lose as many experts.
        least: Smallest number that the routers can work with.
    """

    key: str
    number: int
    mixtures: Mapping[str, Mixture]
    num_groups: int
    least: int

    def allows(self, left: int) -> bool:
        """Return whether the routers can work with this smaller number of experts."""
        return self.least <= left < self.number and left % self.num_groups == 0


_found: WeakKeyDictionary[DecoderView, dict[tuple[int, ...], NumberedExperts | None]] = (
    WeakKeyDictionary()
)
_settings: WeakKeyDictionary[
    DecoderView, dict[tuple[tuple[int, ...], int], dict[str, Settings]]
] = WeakKeyDictionary()


def numbered_experts(view: DecoderView) -> NumberedExperts | None:
    """Return the mixtures that the config describes if experts can be removed; else None.

    All experts must have stacked weights and one number, which the config says, nothing outside of
    the mixtures may depend on it, and the config must say how many experts a token gets. The
    weights may be on the meta device.
    """
    cache = _found.setdefault(view, {})
    if view.layer_indices not in cache:
        cache[view.layer_indices] = _find(view)
    return cache[view.layer_indices]


def without_experts(view: DecoderView, mixture: Mixture, kept: Sequence[int]) -> nn.Module:
    """Return a copy of a mixture with some of its experts, which shares all other parameters."""
    old = view.module(mixture.name)
    shared = [
        *old.parameters(),
        *old.buffers(),
        *(getattr(m, "config", None) for m in old.modules()),
    ]
    new = copy.deepcopy(old, {id(value): value for value in shared if value is not None})
    for name, dim in mixture.dims.items():
        path, _, key = name.rpartition(".")
        owner = new.get_submodule(path)
        value: Tensor = getattr(owner, key)
        smaller = value.detach().index_select(dim, torch.tensor(kept, device=value.device))
        if isinstance(value, nn.Parameter):
            owner.register_parameter(key, nn.Parameter(smaller, requires_grad=value.requires_grad))
        else:
            setattr(owner, key, smaller)
    prefix = view.current_name(mixture.name)
    for name, settings in _changed_settings(view, len(kept)).items():
        if f"{name}.".startswith(f"{prefix}."):
            _set(new.get_submodule(name.removeprefix(prefix).removeprefix(".")), settings)
    return new


def settle_number(view: DecoderView, left: int) -> None:
    """Let the config, and modules outside of the mixtures, say another number of experts."""
    found = numbered_experts(view)
    assert found is not None  # the operations were checked
    for name, settings in _changed_settings(view, left).items():
        _set(view.model.get_submodule(name), settings)
    for config in configs_of(view.model):
        if getattr(config, found.key, None) == found.number:
            setattr(config, found.key, left)
    _found.pop(view)
    _settings.pop(view)


def _find(view: DecoderView) -> NumberedExperts | None:
    if not any(experts_layout(module) for module in view.model.modules()):
        return None
    dense = dense_empty(view.model)
    layouts = {n: x for n, m in dense.named_modules() if (x := experts_layout(m)) is not None}
    numbers = {layout.number for layout in layouts.values()}
    rules = _rules(view.model, *numbers) if len(numbers) == 1 else None
    if rules is None:
        return None
    (number,), (num_groups, least) = numbers, rules
    trial = number - num_groups
    changed = _changed(dense, number, trial) if trial >= least else None
    mixtures = None if changed is None else _mixtures(view, dense, layouts, changed[1])
    if changed is None or mixtures is None:
        return None
    return NumberedExperts(changed[0], number, mixtures, num_groups, least)


def _mixtures(
    view: DecoderView,
    dense: PreTrainedModel,
    layouts: Mapping[str, ExpertsLayout],
    dims: Mapping[str, int],
) -> dict[str, Mixture] | None:
    """Return all mixtures by the name of their experts; None if anything else has experts.

    Args:
        dense: The dense model, on the meta device.
        layouts: The layouts of all its experts, by present name.
        dims: The dimension of each tensor that has an entry per expert, by present name.
    """
    prefixes = {f"{view.current_name(name)}.": f"{name}." for name in _layer_names(view)}
    found: dict[str, Mixture] = {}
    for experts, layout in layouts.items():
        name = experts.rpartition(".")[0]
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        module = dense.get_submodule(name)
        tables = [buffer for buffer in module.buffers() if not buffer.is_floating_point()]
        if prefix is None or tables:
            return None
        tensors = _tensors(module)
        inside = {key: dims[f"{name}.{key}"] for key in tensors if f"{name}.{key}" in dims}
        parameters = [tensors[key] for key in inside if isinstance(tensors[key], nn.Parameter)]
        size = sum(parameter.numel() // layout.number for parameter in parameters)
        mixture, full = (prefixes[prefix] + x.removeprefix(prefix) for x in (name, experts))
        found[full] = Mixture(mixture, full, layout, inside, size)
    return found if sum(len(mixture.dims) for mixture in found.values()) == len(dims) else None


def _layer_names(view: DecoderView) -> list[str]:
    return [f"{view.layers_name}.{index}" for index in view.layer_indices]


def _rules(model: PreTrainedModel, number: int) -> tuple[int, int] | None:
    """Return the number of groups of experts, and the least number of experts; None if unknown."""
    config = model.config.get_text_config()
    top_k, groups = getattr(config, _TOP_K, None), getattr(config, _GROUPS, None) or 1
    if not isinstance(top_k, int) or top_k < 1 or number % groups:
        return None
    if groups == 1:
        return 1, top_k
    chosen = getattr(config, _CHOSEN_GROUPS, None) or 1
    return groups, groups * max(-(-top_k // chosen), _PER_GROUP)


def _changed(dense: PreTrainedModel, number: int, left: int) -> tuple[str, dict[str, int]] | None:
    """Return the key of the config that says the number of experts, and what it changes.

    That is the dimension of each tensor with an entry per expert, by name. None if there is no such
    key, or it changes anything else.
    """
    for key, value in dense.config.get_text_config().to_dict().items():
        if isinstance(value, int) and not isinstance(value, bool) and value == number:
            dims = _changed_dims(dense, key, number, left)
            if dims:
                return key, dims
    return None


def _changed_dims(
    dense: PreTrainedModel, key: str, number: int, left: int
) -> dict[str, int] | None:
    try:
        plain = dense_empty(dense, {key: left})
    except _ERRORS:
        return None
    before, after = _tensors(dense), _tensors(plain)
    if before.keys() != after.keys():
        return None
    found: dict[str, int] = {}
    for name, tensor in before.items():
        pairs = list(zip(tensor.shape, after[name].shape, strict=True))
        dims = [dim for dim, (old, new) in enumerate(pairs) if old != new]
        if len(dims) > 1 or any(pairs[dim] != (number, left) for dim in dims):
            return None
        if dims:
            found[name] = dims[0]
    experts = [n for n, module in dense.named_modules() if experts_layout(module) is not None]
    is_theirs = all(any(name.startswith(f"{n}.") for name in found) for n in experts)
    return found if is_theirs else None


def _changed_settings(view: DecoderView, left: int) -> dict[str, Settings]:
    """Return the attributes of modules that another number of experts changes, by module."""
    cache, found = _settings.setdefault(view, {}), numbered_experts(view)
    key = view.layer_indices, left
    if key not in cache and found is not None:
        dense = dict(dense_empty(view.model).named_modules())
        plain = dense_empty(view.model, {found.key: left})
        cache[key] = {
            name: changed
            for name, module in plain.named_modules()
            if (changed := _difference(dense[name], module))
        }
    return cache[key]


def _difference(before: nn.Module, after: nn.Module) -> Settings:
    usual = unnumbered_settings(before)
    return {k: v for k, v in unnumbered_settings(after).items() if usual.get(k) != v}


def _set(module: nn.Module, settings: Settings) -> None:
    for key, value in settings.items():
        setattr(module, key, value)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
