"""Which auto class of transformers opens a model: a language model, or one inside a wrapper."""

from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
)


def auto_class(config: PreTrainedConfig) -> Any:  # noqa: ANN401  untyped in transformers
    """Return the auto class that opens the architecture that a config names.

    A wrapper with images, such as LLaVA, is opened as it is: its language model is compressed, and
    the rest stays. Everything else is opened as a causal language model.
    """
    wrapper, causal = class_of_wrapper(config), MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    is_named = wrapper is not None and wrapper.__name__ in (config.architectures or ())
    if is_named or (wrapper is not None and causal is None):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def class_of_wrapper(config: PreTrainedConfig) -> type | None:
    """Return the class with images that transformers has for a config, if any."""
    found = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
    return found if isinstance(found, type) else None
