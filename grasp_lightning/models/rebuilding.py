"""The model that a config alone builds, as whoever loads a saved model starts from."""

from collections.abc import Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from grasp_lightning.models.lowrank import GraspQuantizer, config_of, has_replaced
from grasp_lightning.models.numbering import numbered_settings


def rebuilt_empty(model: PreTrainedModel) -> PreTrainedModel:
    """Build a model once more from its config, as it will be read.

    Args:
        model: The model; not read beyond its config and the names of what is replaced in it.

    Returns:
        A model of the same class on the meta device, in eval mode, with a config of its own.
    """
    content = model.config.to_dict()
    content.pop("quantization_config", None)
    config = type(model.config).from_dict(content)
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        rebuilt: PreTrainedModel = type(model)(config)
    if has_replaced(model):
        GraspQuantizer(config_of(model)).preprocess_model(rebuilt)
    rebuilt.train(False)
    return rebuilt


def rebuild_problem(model: PreTrainedModel) -> str | None:
    """Return what would be otherwise in the model that a config builds.

    Args:
        model: The model; its weights may be on the meta device.

    Returns:
        One line; None if loading would leave no tensor random or wrong.
    """
    rebuilt = rebuilt_empty(model)
    problem = _first_difference("shape", _shapes(rebuilt), _shapes(model)) or _first_difference(
        "value", *_common(numbered_settings(rebuilt), numbered_settings(model))
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
    return f"{key} has {kind} {there} there and {here} in the model to save"


def _common(
    first: Mapping[str, object], second: Mapping[str, object]
) -> tuple[dict[str, object], dict[str, object]]:
    keys = first.keys() & second.keys()
    return {key: first[key] for key in keys}, {key: second[key] for key in keys}


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
