"""The whole model after a training in which it was split over processes."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from grasp_lightning.config import CompensateConfig
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.loading import LoadedModel, load_model
from grasp_lightning.training.compensation import make_trainable, merge_adapters


def consolidated(config: CompensateConfig, state: Mapping[str, Tensor]) -> LoadedModel:
    """Load the model anew on the CPU, and give it what was trained, adapters merged.

    Weights that did not change are read from where they came, so none of them is ever gathered.

    Args:
        config: The configuration of the run.
        state: Name -> values of every trained parameter.

    Returns:
        The model as it is to be written.
    """
    loaded = load_model(replace(config.model, device="cpu"))
    trained = make_trainable(DecoderView(loaded.model), config.train, config.lora)
    parameters = dict(loaded.model.named_parameters())
    assert {name for name, p in parameters.items() if p.requires_grad} == set(state)
    with torch.no_grad():
        for name, value in state.items():
            parameters[name].copy_(value)
    merge_adapters(trained)
    return loaded
