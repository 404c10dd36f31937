"""The model that its config alone builds, as when a saved model is loaded."""

from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from grasp_lightning.models.lowrank import GraspQuantizer, config_of, has_replaced
from grasp_lightning.models.numbering import numbered_settings


def rebuilt_empty(model: PreTrainedModel) -> PreTrainedModel:
    """Build a model from its config and the names of its replaced linears, on the meta device."""
    rebuilt = dense_empty(model)
    if has_replaced(model):
        GraspQuantizer(config_of(model)).preprocess_model(rebuilt)
    rebuilt.train(False)
    return rebuilt


def dense_empty(
    model: PreTrainedModel, settings: Mapping[str, int] | None = None
) -> PreTrainedModel:
    """Build the dense model of a copy of a config, on the meta device.

    ``settings`` replace those of the text's config.
    """
    content = model.config.to_dict()
    content.pop("quantization_config", None)
    config = type(model.config).from_dict(content)
    for key, value in (settings or {}).items():
        setattr(config.get_text_config(), key, value)
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        return type(model)(config)


def rebuild_problem(model: PreTrainedModel) -> str | None:
    """Return in one line how the model that a config builds would differ; None if it would not."""
    rebuilt = rebuilt_empty(model)
    there, here = numbered_settings(rebuilt), numbered_settings(model)
    common = there.keys() & here.keys()
    problem = _first_difference("shape", _shapes(rebuilt), _shapes(model)) or _first_difference(
        "value", {key: there[key] for key in common}, {key: here[key] for key in common}
    )
    if problem is None:
        return None
    return f"the config of {type(model).__name__} would rebuild another model: {problem}"


def _first_difference(
    kind: str, expected: Mapping[str, object], actual: Mapping[str, object]
) -> str | None:
    if expected == actual:
        return None
    key = min(key for key, _ in expected.items() ^ actual.items())
    there, here = expected.get(key), actual.get(key)
    return f"{key} has {kind} {there} there but {here} in the model to save"


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
