"""Taylor scores of whole layers against autograd, with all their parameters."""

import pytest
import torch
from torch import Tensor

from grasp_lightning.callbacks.measure import TrainerMeasure
from grasp_lightning.config import CalibrationConfig
from grasp_lightning.data.datamodules import CalibrationData
from grasp_lightning.errors import ModelError, NumericsError
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.next_token import forward_inputs, next_token_losses
from grasp_lightning.stats.base import Needs, Step
from grasp_lightning.stats.layer_gradients import LayerGradients, gradient_groups
from tests.conftest import byte_tokenizer, tiny_model
from tests.integration.test_golden_plan import seeded_windows

WINDOWS = seeded_windows(3, 24)
# RMSNorm, also with an offset and with more norms, fused linears, LayerNorm with biases, Conv1D,
# and experts.
FAMILIES = ("llama", "gemma2", "gemma3_text", "qwen3", "phi3", "opt", "gpt_neox", "gpt2", "bloom")


def measured(view: DecoderView, layers: tuple[int, ...], batch_size: int = 2) -> dict[int, float]:
    config = CalibrationConfig(batch_size=batch_size)
    data = CalibrationData(config, byte_tokenizer(), windows=WINDOWS)
    step = Step(name="gradients", needs=Needs(layer_gradients=layers))
    return dict(TrainerMeasure(data, progress=False)(view, step).layer_scores)


def by_autograd(view: DecoderView) -> dict[int, float]:
    """The definition, written out: |w dL/dw| of the mean loss over all windows."""
    batch = WINDOWS.batch(list(range(len(WINDOWS))))
    view.model.requires_grad_(True)
    logits = view.model(**forward_inputs(batch)).logits
    next_token_losses(logits, batch["input_ids"], batch["targets"]).mean().backward()
    return {
        index: sum(_product(p) for p in view.layer(index).parameters())
        for index in view.layer_indices
    }


def _product(parameter: Tensor) -> float:
    assert parameter.grad is not None
    return float((parameter.detach() * parameter.grad).abs().sum(dtype=torch.float64))


@pytest.mark.parametrize("family", [*FAMILIES, "mixtral", "qwen3_moe", "falcon"])
def test_scores_are_those_of_autograd(family: str) -> None:
    view = DecoderView(tiny_model(family))
    expected = by_autograd(DecoderView(tiny_model(family)))
    assert measured(view, view.layer_indices) == pytest.approx(expected, rel=1e-4)
    assert all(parameter.grad is None for parameter in view.model.parameters())


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt"])
def test_norms_count(family: str) -> None:
    view = DecoderView(tiny_model(family))
    gradients = LayerGradients(view, (1,))
    names = {name.rpartition(".layers.1.")[2] for name in gradients.sums}
    assert names == {name for name, _ in view.layer(1).named_parameters()}
    assert any("norm" in name for name in names)


def test_neither_batches_nor_groups_matter() -> None:
    view = DecoderView(tiny_model("gemma2"))
    together = measured(view, view.layer_indices)
    assert measured(view, view.layer_indices, batch_size=3) == pytest.approx(together, rel=1e-5)
    assert measured(view, (2,)) == pytest.approx({2: together[2]}, rel=1e-5)


def test_groups_of_layers_fit_into_memory() -> None:
    view = DecoderView(tiny_model())
    size = 4 * sum(parameter.numel() for parameter in view.layer(0).parameters())
    assert gradient_groups(view, view.layer_indices, 2.5 * size) == [(0, 1), (2, 3)]
    assert gradient_groups(view, view.layer_indices, 1) == [(0,), (1,), (2,), (3,)]
    config = CalibrationConfig(batch_size=2)
    data = CalibrationData(config, byte_tokenizer(), windows=WINDOWS)
    step = Step(name="gradients", needs=Needs(layer_gradients=view.layer_indices))
    in_parts = TrainerMeasure(data, progress=False, max_bytes=2.5 * size)(view, step).layer_scores
    assert in_parts == pytest.approx(measured(view, view.layer_indices), rel=1e-6)


def test_parameters_that_are_read_without_a_call_are_named() -> None:
    view = DecoderView(tiny_model("mamba"))
    with pytest.raises(ModelError, match=r"reads the parameters of \S+ without calling it, so"):
        measured(view, view.layer_indices)


def test_a_gradient_that_is_not_finite_names_its_layer() -> None:
    view = DecoderView(tiny_model())
    gradients = LayerGradients(view, (1, 2))
    weight = next(name for name in gradients.sums if ".layers.2." in name)
    gradients.sums[weight].fill_(float("nan"))
    with pytest.raises(NumericsError, match="the gradient of decoder layer 2 is NaN or infinite"):
        gradients.scores(1)
