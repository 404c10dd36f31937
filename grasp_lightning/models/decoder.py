"""The decoder layers of a model, found by structure and addressed by their original numbers."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from grasp_lightning.errors import ModelError
from grasp_lightning.models.lowrank import is_low_rank

# What transformers' modules call the number of the layer they are in.
_LAYER_NUMBER_NAMES = ("layer_idx", "layer_id", "layer_index", "layer_number", "layer_num")


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
        ModelError: If the model has an encoder, no decoder layers, or none with an ``nn.Linear``.
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
        if not any(isinstance(module, nn.Linear) for module in layers.modules()):
            raise ModelError(
                f"{family} is a model without linears in its layers, so it is not supported"
            )
        self.model = model
        self._layers = layers
        self.layers_name = next(name for name, module in model.named_modules() if module is layers)
        self.num_layers = len(layers)
        self.layer_indices = tuple(range(self.num_layers))

    def layer(self, index: int) -> nn.Module:
        """Return one decoder layer; a ``ModelError`` says that it is not, or no longer, there.

        Args:
            index: Its number in the original model.

        Returns:
            The module.
        """
        return self._layers[self._position(index)]

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """Return the dense linears of one decoder layer, in module order.

        The two factors of a low-rank linear are not among them. A ``ModelError`` says that the
        layer is not, or no longer, there.

        Args:
            index: The layer's number in the original model.

        Returns:
            Full name in the original model -> linear.
        """
        return dict(_leaf_linears(self.layer(index), f"{self.layers_name}.{index}"))

    def current_name(self, module: str) -> str:
        """Return the name that a module has now, after layers before it may have been dropped.

        A ``ModelError`` says that its layer is not, or no longer, there.

        Args:
            module: Full name in the original model.

        Returns:
            Full name in the present model; not checked to exist outside the layer list.
        """
        number, dot, rest = module.removeprefix(f"{self.layers_name}.").partition(".")
        if not module.startswith(f"{self.layers_name}.") or not number.isdecimal():
            return module
        return f"{self.layers_name}.{self._position(int(number))}{dot}{rest}"

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

        Renumbered are the modules' own numbers (the cache of keys and values is addressed by them),
        ``num_hidden_layers``, and lists of the config with one entry per layer.

        Args:
            indices: Numbers of the layers in the original model.

        Raises:
            ModelError: If a layer is not there, or none would be left.
        """
        gone = set(indices)
        positions = {self._position(index) for index in gone}
        if len(positions) == len(self._layers):
            raise ModelError(f"cannot drop all {len(positions)} decoder layers: one must be left")
        configs = _layer_configs(self.model)
        for position in sorted(positions, reverse=True):
            del self._layers[position]
        kept = [p for p in range(len(self.layer_indices)) if p not in positions]
        for new, old in enumerate(kept):
            _renumber(self._layers[new], old, new)
        for config in configs:
            _shorten(config, positions)
        self.layer_indices = tuple(index for index in self.layer_indices if index not in gone)

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


def _leaf_linears(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Linear]]:
    for child_name, child in module.named_children():
        if isinstance(child, nn.Linear):
            yield f"{name}.{child_name}", child
        elif not is_low_rank(child):
            yield from _leaf_linears(child, f"{name}.{child_name}")


def _configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Return the distinct configs that the model and its decoder read; usually it is one."""
    configs = [model.config, model.config.get_text_config(), *_held_configs(model)]
    return list({id(config): config for config in configs}.values())


def _layer_configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Return the distinct configs that count decoder layers, those of single modules included."""
    configs = [model.config.get_text_config(), *_held_configs(model)]
    counting = [c for c in configs if getattr(c, "num_hidden_layers", None) is not None]
    return list({id(config): config for config in counting}.values())


def _renumber(layer: nn.Module, old: int, new: int) -> None:
    for module in layer.modules():
        for name in _LAYER_NUMBER_NAMES:
            # Some modules count otherwise under the same name; those keep what they have.
            if getattr(module, name, None) == old:
                setattr(module, name, new)


def _shorten(config: PreTrainedConfig, positions: set[int]) -> None:
    num_layers = config.num_hidden_layers
    for key, value in list(vars(config).items()):
        # Lists of token ids and class names can have that length by chance.
        per_layer = not key.endswith("_token_id") and key != "architectures"
        if per_layer and isinstance(value, list | tuple) and len(value) == num_layers:
            kept = [entry for position, entry in enumerate(value) if position not in positions]
            setattr(config, key, type(value)(kept))
    config.num_hidden_layers = num_layers - len(positions)
