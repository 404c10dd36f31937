"""The decoder layers of a model, found by structure and addressed by their original numbers."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from grasp_lightning.errors import ModelError
from grasp_lightning.models.experts import experts_layout
from grasp_lightning.models.linears import (
    DenseLinear,
    DenseModule,
    as_linear,
    dense_modules,
    skipped_modules,
)
from grasp_lightning.models.lowrank import has_replaced, is_replaced
from grasp_lightning.models.numbering import (
    number_dependent_option,
    renumber_layer,
    shorten_config,
    shorten_decoder,
)

logger = logging.getLogger(__name__)


class DecoderView:
    """Decoder layers and linears of a model, under their original names and numbers.

    "Original" means when this view was made; names and numbers stay valid after layers are dropped.
    Works on the meta device too.

    Attributes:
        layers_name: Full name of the list of decoder layers, for example ``model.layers``.
        num_layers: Number of decoder layers of the original model.
        layer_indices: Original numbers of the layers that remain, ascending.
        narrows_experts: Whether the warning about mixtures of experts leaves out those that can
            be narrowed.
        special_tokens: Ids of the special tokens of the tokenizer; set by who knows it.

    Args:
        model: A decoder-only language model, with or without its head.

    Raises:
        ModelError: If the model has an encoder, no decoder layers, or no linears in them.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        family = type(model).__name__
        if getattr(model.config, "is_encoder_decoder", False):
            raise ModelError(f"{family} has an encoder, expected a decoder-only language model")
        layers = _find_layers(model)
        if layers is None:
            raise ModelError(
                f"{family} has no list of decoder layers that grasp_lightning can find"
            )
        if not (has_replaced(layers) or any(True for _ in dense_modules(layers, ""))):
            raise ModelError(f"{family} has no linears in its layers, so it is not supported")
        self.model = model
        self._layers = layers
        self.layers_name = next(name for name, module in model.named_modules() if module is layers)
        self.num_layers = len(layers)
        self.layer_indices = tuple(range(self.num_layers))
        self.narrows_experts = False
        self.special_tokens: frozenset[int] = frozenset()
        self._has_warned = False
        self._left_out: frozenset[str] = frozenset()

    def layer(self, index: int) -> nn.Module:
        """Return a decoder layer; a ``ModelError`` if it does not exist or was dropped."""
        return self._layers[self._position(index)]

    def linears(self, index: int) -> dict[str, DenseLinear]:
        """Return the dense linears of a layer by original name, in module order.

        Weights are ``(N, M)``. The linears exclude low-rank and narrowed linears, and ``skipped``
        ones; the first call that skips any logs a warning.
        """
        self._warn_of_skipped(index)
        return {name: as_linear(module) for name, module in self.dense_modules(index).items()}

    def all_linears(self) -> dict[str, DenseLinear]:
        """Return the ``linears`` of all remaining layers by original name, in model order."""
        return {n: linear for i in self.layer_indices for n, linear in self.linears(i).items()}

    def dense_modules(self, index: int) -> dict[str, DenseModule]:
        """Return the modules behind ``linears`` by original name, without a warning."""
        found = dense_modules(self.layer(index), self._layer_name(index))
        return {name: module for name, module in found if name not in self._left_out}

    def leave_out(self, modules: Iterable[str]) -> None:
        """Exclude linears, by original name, from those that can be replaced."""
        self._left_out |= frozenset(modules)

    def skipped(self, index: int) -> tuple[str, ...]:
        """Return the original names of the parts of a layer that belong to a mixture of experts."""
        return tuple(skipped_modules(self.layer(index), self._layer_name(index)))

    def layer_of(self, module: str) -> int | None:
        """Return the original layer number in a module's original name; None outside the layers."""
        number = module.removeprefix(f"{self.layers_name}.").partition(".")[0]
        inside = module.startswith(f"{self.layers_name}.") and number.isdecimal()
        return int(number) if inside else None

    def current_name(self, module: str) -> str:
        """Return the present name of a module; a ``ModelError`` if its layer was dropped."""
        index = self.layer_of(module)
        if index is None:
            return module
        rest = module.removeprefix(self._layer_name(index))
        return f"{self.layers_name}.{self._position(index)}{rest}"

    def module(self, module: str) -> nn.Module:
        """Return a module by original name; a ``ModelError`` if there is none."""
        try:
            return self.model.get_submodule(self.current_name(module))
        except AttributeError:
            raise ModelError(f"{type(self.model).__name__} has no module {module}") from None

    def set_module(self, module: str, new: nn.Module) -> None:
        """Replace a module, by original name; a ``ModelError`` if there is none."""
        self.module(module)
        self.model.set_submodule(self.current_name(module), new)

    def drop(self, indices: Iterable[int]) -> None:
        """Delete decoder layers by original number, and renumber the rest in modules and config.

        The cache is addressed by the numbers in the modules. Lists of the config with one entry per
        layer are shortened too.

        Raises:
            ModelError: If no layer would remain.
        """
        self.check_droppable()
        gone = set(indices)
        positions = {self._position(index) for index in gone}
        if len(positions) == len(self._layers):
            raise ModelError(f"cannot drop all {len(positions)} decoder layers: one must remain")
        configs = _layer_configs(self.model)
        for position in sorted(positions, reverse=True):
            del self._layers[position]
        kept = [p for p in range(len(self.layer_indices)) if p not in positions]
        for new, old in enumerate(kept):
            renumber_layer(self._layers[new], old, new)
        for config in configs:
            shorten_config(config, positions)
        text, number = self.model.config.get_text_config(), len(self.layer_indices)
        shorten_decoder(_decoder(self.model), text, number, kept)
        self.layer_indices = tuple(index for index in self.layer_indices if index not in gone)

    @property
    def number_dependent_option(self) -> str | None:
        """The option that makes layers compute with their numbers, so that none can be dropped."""
        return number_dependent_option(self.model.config)

    def check_droppable(self) -> None:
        """Raise a ``ModelError`` if the config makes layers compute with their numbers."""
        option = self.number_dependent_option
        if option is not None:
            raise ModelError(
                f"{type(self.model).__name__} has {option}: its decoder layers compute with their "
                "layer numbers, so none can be dropped; replace them with a keep_ratio above 0"
            )

    def _layer_name(self, index: int) -> str:
        return f"{self.layers_name}.{index}"

    def _warn_of_skipped(self, index: int) -> None:
        prefix = f"{self._layer_name(index)}."
        skipped = [name.removeprefix(prefix) for name in self.skipped(index) if self._stays(name)]
        if skipped and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "%s is a mixture of experts: %s of its decoder layers are left unchanged; only "
                "the other linears can be replaced",
                type(self.model).__name__,
                ", ".join(skipped),
            )

    def _stays(self, part: str) -> bool:
        """Return whether a part of a mixture stays unchanged although linears are replaced.

        If experts can be narrowed, that leaves linears such as shared experts, but no routers.
        """
        modules = [*self.module(part).modules()]
        if any(map(is_replaced, modules)):
            return False
        if not self.narrows_experts or any(isinstance(m, DenseModule) for m in modules):
            return True
        return part.endswith("experts") and not any(map(experts_layout, modules))

    def _position(self, index: int) -> int:
        if not 0 <= index < self.num_layers:
            raise ModelError(
                f"no decoder layer {index}: the model has layers 0 to {self.num_layers - 1}"
            )
        if index not in self.layer_indices:
            raise ModelError(
                f"decoder layer {index} was dropped; the remaining layers are "
                f"{list(self.layer_indices)}"
            )
        return self.layer_indices.index(index)


@contextmanager
def frozen(model: PreTrainedModel) -> Iterator[None]:
    """Keep a model in eval mode, without trainable parameters or cache; restore it on exit."""
    training = [(module, module.training) for module in model.modules()]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    caching = [(c, c.use_cache) for c in configs_of(model) if hasattr(c, "use_cache")]
    try:
        model.train(False)
        model.requires_grad_(False)
        for config, _ in caching:
            config.use_cache = False
        yield
    finally:
        for module, mode in training:
            module.training = mode
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)
        for config, use_cache in caching:
            config.use_cache = use_cache


def _decoder(model: PreTrainedModel) -> nn.Module:
    decoder: nn.Module = model.get_decoder()  # type: ignore[no-untyped-call]  # no annotation there
    # Of some families, it is the head.
    return model.base_model if isinstance(decoder, nn.Linear) else decoder


def _held_configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    held = (getattr(module, "config", None) for module in _decoder(model).modules())
    return [config for config in held if isinstance(config, PreTrainedConfig)]


def _find_layers(model: PreTrainedModel) -> nn.ModuleList | None:
    decoder = _decoder(model)
    layers = getattr(decoder, "layers", None)
    if isinstance(layers, nn.ModuleList) and len(layers) > 0:
        return layers
    num_layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = (module for module in decoder.modules() if isinstance(module, nn.ModuleList))
    return next((found for found in lists if len(found) == num_layers), None)


def configs_of(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Return the distinct configs that the model and its decoder read, usually one."""
    configs = [model.config, model.config.get_text_config(), *_held_configs(model)]
    return list({id(config): config for config in configs}.values())


def _layer_configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Return the distinct configs that count decoder layers, including those of single modules."""
    configs = [model.config.get_text_config(), *_held_configs(model)]
    counting = [c for c in configs if getattr(c, "num_hidden_layers", None) is not None]
    return list({id(config): config for config in counting}.values())
