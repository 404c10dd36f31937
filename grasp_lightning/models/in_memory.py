"""A model that the caller has in memory, with its tokenizer."""

import copy
import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Self

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from grasp_lightning.config import ModelConfig
from grasp_lightning.errors import ConfigError, GraspError, ModelError
from grasp_lightning.models.auto_classes import class_of_wrapper
from grasp_lightning.models.checkpoint import check_not_quantized
from grasp_lightning.models.completeness import check_config_builds
from grasp_lightning.models.integrity import check_finite, config_values, model_hash
from grasp_lightning.models.loading import LoadedModel, ModelOrigin
from grasp_lightning.models.rebuilding import rebuild_problem
from grasp_lightning.models.source import describe_origin, resolve_source

_REMOTE = "transformers_modules."  # module of classes that come with a checkpoint
_DIGITS = 16  # of a hash that names a model


@dataclass(frozen=True, kw_only=True)
class ModelInMemory:
    """A model and a tokenizer of the caller. They never change: a run works on copies."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def checked(cls, model: object, tokenizer: object) -> Self:
        """Check that a model can be saved and loaded again, and return it with its tokenizer.

        Raises:
            ConfigError: If one of them has another type.
            ModelError: If the model cannot be saved and loaded again.
        """
        if not isinstance(model, PreTrainedModel):
            raise ConfigError(
                "model: expected a path, a hub name or a PreTrainedModel of transformers, got "
                f"{type(model).__name__}"
            )
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ConfigError(
                f"tokenizer: expected the tokenizer of the model, got {type(tokenizer).__name__}"
            )
        check_not_quantized(model, ModelError)
        _check_class(model)
        devices = sorted({str(parameter.device) for parameter in model.parameters()})
        if len(devices) > 1 or devices == ["meta"]:
            raise ModelError(f"the model is on {', '.join(devices)}; move it to one device")
        check_config_builds(type(model).__name__, model)
        problem = rebuild_problem(model)
        if problem is not None:
            raise ModelError(problem)
        return cls(model=model, tokenizer=tokenizer)

    @cached_property
    def digest(self) -> str:
        """Hash of the weights, see ``model_hash``."""
        return model_hash(self.model)

    @property
    def settings(self) -> ModelConfig:
        """The section ``model`` of a run; its path is a name with a hash of the content."""
        content = [self.digest, config_values(self.model), self.tokenizer.get_vocab()]
        text = json.dumps(content, sort_keys=True, default=str)
        name = hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]
        return ModelConfig(
            path=f"{type(self.model).__name__} in memory, sha256 {name}",
            device=str(self.model.device),
            trust_remote_code=_is_remote(self.model),
        )

    @property
    def origin(self) -> ModelOrigin:
        """Where the model was loaded from, if that is known and still exists."""
        name = self.model.name_or_path or type(self.model).__name__
        try:
            origin = describe_origin(resolve_source(ModelConfig(path=name)))
        except GraspError:  # the folder no longer exists, or the name is not that of a model
            return ModelOrigin(
                name=Path(name).name,
                licence=None,
                side_files=(),
                source_bytes=None,
                quantized_source=False,
                folder=None,
            )
        # The caller gives the tokenizer, and the weights may have another dtype than the files.
        kept = {
            *origin.licence_files,
            *(file for file in origin.side_files if file.suffix == ".py"),
        }
        return replace(
            origin, side_files=tuple(sorted(kept)), source_bytes=None, quantized_source=False
        )

    def copied(self) -> LoadedModel:
        """Return a copy that is checked and prepared like a loaded model.

        Raises:
            ModelError: If the device has too little memory.
        """
        check_finite(self.model)
        try:
            model = copy.deepcopy(self.model)
        except torch.OutOfMemoryError as error:
            raise ModelError(
                "the device has too little memory for a copy of the model: give its path instead"
            ) from error
        model.train(False)
        model.requires_grad_(True)
        origin, tokenizer = self.origin, copy.deepcopy(self.tokenizer)
        model.config.name_or_path = model.name_or_path = tokenizer.name_or_path = origin.name
        return LoadedModel(model=model, tokenizer=tokenizer, origin=origin)


def _check_class(model: PreTrainedModel) -> None:
    """Refuse classes that the auto classes cannot load in a fresh process."""
    if _is_remote(model):
        return
    expected: object = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), None)
    is_expected = type(model) in (expected, class_of_wrapper(model.config))
    if not is_expected or not type(model).__module__.startswith("transformers."):
        name = getattr(expected, "__name__", "a class of transformers")
        raise ModelError(
            f"the model is a {type(model).__name__}; expected {name}, which AutoModelForCausalLM "
            "loads for its config"
        )


def _is_remote(model: PreTrainedModel) -> bool:
    return type(model).__module__.startswith(_REMOTE)
