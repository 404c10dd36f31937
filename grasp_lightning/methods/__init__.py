"""All compression methods: a new method is one file and one entry here."""

import difflib
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Final

from grasp_lightning.config import METHOD_OPTIONS, MethodConfig
from grasp_lightning.errors import ConfigError, ModelError
from grasp_lightning.methods.base import CompressionMethod, Registered, Track, untracked
from grasp_lightning.methods.budget import resolve_num_layers
from grasp_lightning.methods.drop import DROP_METHOD
from grasp_lightning.methods.flap import FLAP
from grasp_lightning.methods.grasp import GRASP
from grasp_lightning.methods.grasp_plus import GRASP_PLUS
from grasp_lightning.methods.laco import LACO
from grasp_lightning.methods.llm_pruner import LLM_PRUNER
from grasp_lightning.methods.llm_streamline import LLM_STREAMLINE
from grasp_lightning.methods.low_rank import LOW_RANK
from grasp_lightning.methods.options import keys_of, refuse_ignored
from grasp_lightning.methods.prediction import Prediction
from grasp_lightning.methods.random_layers import RANDOM
from grasp_lightning.methods.replaceme import REPLACEME_METHOD
from grasp_lightning.methods.shortened_llama import SHORTENED_LLAMA_METHOD
from grasp_lightning.methods.shortgpt import SHORTGPT
from grasp_lightning.methods.sleb import SLEB_METHOD
from grasp_lightning.methods.slicegpt import SLICEGPT_METHOD
from grasp_lightning.methods.sparsegpt import SPARSEGPT
from grasp_lightning.methods.wanda import WANDA
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.lowrank import seams
from grasp_lightning.models.sliced import is_sliced
from grasp_lightning.plugins import load_method, method_plugins

__all__ = ["METHODS", "build_method", "predict", "resolve_method", "resolve_num_layers"]

METHODS: Final[Mapping[str, Registered]] = MappingProxyType(
    {
        method.name: method
        for method in (
            *(GRASP, GRASP_PLUS, LOW_RANK, DROP_METHOD),
            *(SHORTGPT, SLEB_METHOD, SHORTENED_LLAMA_METHOD),
            *(LACO, LLM_STREAMLINE, REPLACEME_METHOD),
            *(LLM_PRUNER, FLAP, SLICEGPT_METHOD, WANDA, SPARSEGPT, RANDOM),
        )
    }
)


def named_method(name: str) -> Registered:
    """Return a method of this package or of an installed plugin."""
    method = METHODS.get(name) or load_method(name)
    if isinstance(method, Registered):
        return method
    if method is not None:
        raise ConfigError(
            f"method.name: {name}, the entry point gives a {type(method).__name__}: expected a "
            f"Registered of grasp_lightning.methods.base"
        )
    names = [*METHODS, *sorted(method_plugins())]
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(f"method.name: expected one of {', '.join(names)}, got {name!r}{hint}")


def resolve_method(config: MethodConfig, seed: int = 0) -> MethodConfig:
    """Fill in the preset and the defaults; in the result None means "has no effect here".

    A value out of range, contradicting keys, and a key without effect are a ``ConfigError``.

    Args:
        seed: The seed of the run, for a method that draws and has none of its own.
    """
    method = named_method(config.name)
    if method is not GRASP_PLUS:
        reason, remedy = (
            "only method grasp_plus factorizes embeddings",
            "set method.name=grasp_plus",
        )
        refuse_ignored(config, ("embeddings",), reason, remedy)
    read = keys_of(METHOD_OPTIONS.get(config.name, method.options))
    ignored = set(keys_of(MethodConfig)) - set(read)
    refuse_ignored(config, ignored, f"method {config.name} {method.ignores}", method.remedy)
    if "layer_seed" in read and config.layer_seed is None:
        config = replace(config, layer_seed=seed)
    return method.resolve(config)


def build_method(
    config: MethodConfig, view: DecoderView, track: Track = untracked
) -> CompressionMethod:
    """Return the method that a resolved configuration names.

    A budget is a share of the dense model ``view``; one that is out of reach is a ``ConfigError``.

    Raises:
        ModelError: If the model has seams, or its hidden states are sliced.
    """
    if is_sliced(view.model):
        raise ModelError(
            f"the hidden states of {type(view.model).__name__} are sliced (method.name=slicegpt), "
            "and such a model cannot be compressed again: compress the original model"
        )
    if seams(view.model):
        raise ModelError(
            f"{type(view.model).__name__} has seams from an earlier compression "
            "(method.seam=linear), and such a model cannot be compressed again: compress the "
            "original model"
        )
    return named_method(config.name).build(config, view, track)


def predict(view: DecoderView, config: MethodConfig) -> Prediction:
    """Return the sizes before and after compression, from shapes alone.

    Weights may be on the meta device. More layers than the model has, or a budget out of reach, are
    a ``ConfigError``.
    """
    return build_method(config, view).predict(view)
