"""The divergence of a single cut equals the divergence of a model with this cut alone."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from grasp_lightning.config import MethodConfig
from grasp_lightning.data.windows import TokenWindows
from grasp_lightning.evaluation.cut_losses import cut_losses
from grasp_lightning.methods.base import untracked
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.surgery import apply_operations
from grasp_lightning.plan import FactorizeLinear, NarrowMlp, Replacement
from tests.conftest import tiny_model
from tests.unit.training.test_refit import decision, windows


def decided(found: TokenWindows) -> tuple[list[Replacement], dict[str, Tensor]]:
    config = MethodConfig(name="grasp_plus", removed_ratio=0.2)
    made = decision(DecoderView(tiny_model()), found, config)
    cuts: list[Replacement] = [
        op for op in made.operations if isinstance(op, FactorizeLinear | NarrowMlp)
    ]
    return cuts, dict(made.tensors)


def predictions(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(ids).logits.log_softmax(-1)[:, :-1]
    return found


def test_each_cut_is_measured_alone() -> None:
    found = windows()
    cuts, tensors = decided(found)
    batch, view = found.batch(range(3)), DecoderView(tiny_model())
    measured = cut_losses(view, cuts, tensors, batch, untracked)
    assert list(measured) == [cut.solved for cut in cuts]
    dense = predictions(tiny_model(), batch["input_ids"])
    for cut in (cuts[0], cuts[-1]):
        model = tiny_model()
        apply_operations(DecoderView(model), [cut], tensors)
        moved = predictions(model, batch["input_ids"])
        expected = float((dense.exp() * (dense - moved)).sum(-1).mean())
        assert measured[cut.solved] == pytest.approx(expected, rel=1e-3, abs=1e-7)


def test_the_model_stays_as_it_was() -> None:
    found = windows()
    cuts, tensors = decided(found)
    model = tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cut_losses(DecoderView(model), cuts, tensors, found.batch([0]), untracked)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert getattr(model.config, "quantization_config", None) is None
