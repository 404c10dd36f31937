"""The decoder layers of a model, found by structure and addressed by their original numbers."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from grasp_lightning.errors import ModelError
from grasp_lightning.models.linears import (
    DenseLinear,
    DenseModule,
    as_linear,
    dense_modules,
    skipped_modules,
)
from grasp_lightning.models.lowrank import has_replaced
from grasp_lightning.models.numbering import (
    number_dependent_option,
    renumber_layer,
    shorten_config,
)

logger = logging.getLogger(__name__)


class DecoderView:
    """Decoder layers and linears of a model, under the names and numbers of the original model.

    Names and numbers stay valid after layers were dropped: "original" means at the time this view
    was made. Works on the meta device too.

    Attributes:
        model: The model that is looked at.
        layers_name: Full name of the list of decoder layers, for example ``model.layers``.
        num_layers: Number of decoder layers of the original model.
        layer_indices: Original index of every layer that is still there, ascending.

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
            raise ModelError(
                f"{family} is a model without linears in its layers, so it is not supported"
            )
        self.model = model
        self._layers = layers
        self.layers_name = next(name for name, module in model.named_modules() if module is layers)
        self.num_layers = len(layers)
        self.layer_indices = tuple(range(self.num_layers))
        self._has_warned = False
        self._left_out: frozenset[str] = frozenset()

    def layer(self, index: int) -> nn.Module:
        """Return one decoder layer; a ``ModelError`` says that it is not, or no longer, there.

        Args:
            index: Its number in the original model.

        Returns:
            The module.
        """
        return self._layers[self._position(index)]

    def linears(self, index: int) -> dict[str, DenseLinear]:
        """Return the dense linears of one decoder layer, in module order, weights as ``(N, M)``.

        The two factors of a low-rank linear are not among them, nor narrowed linears, nor what
        ``skipped`` names; the first call that leaves something out says so in a warning. A
        ``ModelError`` says that the layer is not, or no longer, there.

        Args:
            index: The layer's number in the original model.

        Returns:
            Full name in the original model -> linear: the ``nn.Linear`` itself, or an adapter of
            a ``Conv1D``.
        """
        self._warn_of_skipped(index)
        return {name: as_linear(module) for name, module in self.dense_modules(index).items()}

    def all_linears(self) -> dict[str, DenseLinear]:
        """Return the ``linears`` of all decoder layers that are there, in model order.

        Returns:
            Full name in the original model -> linear.
        """
        return {n: linear for i in self.layer_indices for n, linear in self.linears(i).items()}

    def dense_modules(self, index: int) -> dict[str, DenseModule]:
        """Return the modules behind ``linears``, without a warning.

        Args:
            index: The layer's number in the original model.

        Returns:
            Full name in the original model -> module.
        """
        found = dense_modules(self.layer(index), self._layer_name(index))
        return {name: module for name, module in found if name not in self._left_out}

    def leave_out(self, modules: Iterable[str]) -> None:
        """Count some linears no longer among those that can be replaced.

        Args:
            modules: Full names in the original model.
        """
        self._left_out |= frozenset(modules)

    def skipped(self, index: int) -> tuple[str, ...]:
        """Return what is left out of a decoder layer's linears: parts of a mixture of experts.

        Args:
            index: The layer's number in the original model.

        Returns:
            Full names in the original model: experts, router, shared expert and its gate.
        """
        return tuple(skipped_modules(self.layer(index), self._layer_name(index)))

    def layer_of(self, module: str) -> int | None:
        """Return the original number of the decoder layer that a module name lies in.

        Args:
            module: Full name in the original model; not checked to exist.

        Returns:
            The number, or None for a module outside the layer list.
        """
        number = module.removeprefix(f"{self.layers_name}.").partition(".")[0]
        inside = module.startswith(f"{self.layers_name}.") and number.isdecimal()
        return int(number) if inside else None

    def current_name(self, module: str) -> str:
        """Return the name that a module has now, after layers before it may have been dropped.

        A ``ModelError`` says that its layer is not, or no longer, there.

        Args:
            module: Full name in the original model.

        Returns:
            Full name in the present model; not checked to exist outside the layer list.
        """
        index = self.layer_of(module)
        if index is None:
            return module
        rest = module.removeprefix(self._layer_name(index))
        return f"{self.layers_name}.{self._position(index)}{rest}"

    def module(self, module: str) -> nn.Module:
        """Return a module.

        Args:
            module: Full name in the original model.

        Returns:
            The module.

        Raises:
            ModelError: If there is no such module, or its layer was dropped.
        """
        try:
            return self.model.get_submodule(self.current_name(module))
        except AttributeError:
            raise ModelError(f"{type(self.model).__name__} has no module {module}") from None

    def set_module(self, module: str, new: nn.Module) -> None:
        """Put another module in the place of one; a ``ModelError`` says that it is not there.

        Args:
            module: Full name in the original model.
            new: The module that takes its place.
        """
        self.module(module)
        self.model.set_submodule(self.current_name(module), new)

    def drop(self, indices: Iterable[int]) -> None:
        """Delete decoder layers, and renumber all that holds a layer number or one entry per layer.

        These are the modules' own numbers (the cache of keys and values is addressed by them),
        ``num_hidden_layers``, and lists of the config.

        Args:
            indices: Numbers of the layers in the original model.

        Raises:
            ModelError: If a layer is not there, none would be left, or layers compute with their
                numbers.
        """
        self.check_droppable()
        gone = set(indices)
        positions = {self._position(index) for index in gone}
        if len(positions) == len(self._layers):
            raise ModelError(f"cannot drop all {len(positions)} decoder layers: one must be left")
        configs = _layer_configs(self.model)
        for position in sorted(positions, reverse=True):
            del self._layers[position]
        kept = [p for p in range(len(self.layer_indices)) if p not in positions]
        for new, old in enumerate(kept):
            renumber_layer(self._layers[new], old, new)
        for config in configs:
            shorten_config(config, positions)
        self.layer_indices = tuple(index for index in self.layer_indices if index not in gone)

    @property
    def number_dependent_option(self) -> str | None:
        """The option by which layers compute with their numbers, so that none can be dropped."""
        return number_dependent_option(self.model.config)

    def check_droppable(self) -> None:
        """Check that layers stay what they are under new numbers.

        Raises:
            ModelError: If the config makes layers compute with their numbers.
        """
        option = self.number_dependent_option
        if option is not None:
            raise ModelError(
                f"{type(self.model).__name__} has {option}: its decoder layers compute with their "
                f"numbers, so none can be dropped; replace them with a keep_ratio above 0"
            )

    def _layer_name(self, index: int) -> str:
        return f"{self.layers_name}.{index}"

    def _warn_of_skipped(self, index: int) -> None:
        prefix = f"{self._layer_name(index)}."
        skipped = [name.removeprefix(prefix) for name in self.skipped(index)]
        if skipped and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "%s is a mixture of experts: %s of its decoder layers stay as they are; only the "
                "other linears can be replaced",
                type(self.model).__name__,
                ", ".join(skipped),
            )

    def _position(self, index: int) -> int:
        if not 0 <= index < self.num_layers:
            raise ModelError(
                f"no decoder layer {index}: the model has layers 0 to {self.num_layers - 1}"
            )
        if index not in self.layer_indices:
            raise ModelError(
                f"decoder layer {index} was dropped; left are {list(self.layer_indices)}"
            )
        return self.layer_indices.index(index)


@contextmanager
def frozen(model: PreTrainedModel) -> Iterator[None]:
    """Keep a model in eval mode, with no trainable parameters and no cache of keys and values.

    Args:
        model: The model; its state is restored on exit, also after an exception.

    Yields:
        Nothing.
    """
    training = [(module, module.training) for module in model.modules()]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    caching = [(c, c.use_cache) for c in _configs(model) if hasattr(c, "use_cache")]
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
    return decoder


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


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Return the distinct configs that the model and its decoder read; usually it is one."""
    configs = [model.config, model.config.get_text_config(), *_held_configs(model)]
    return list({id(config): config for config in configs}.values())


def _layer_configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Return the distinct configs that count decoder layers, those of single modules included."""
    configs = [model.config.get_text_config(), *_held_configs(model)]
    counting = [c for c in configs if getattr(c, "num_hidden_layers", None) is not None]
    return list({id(config): config for config in counting}.values())
