"""The cost of removing layers and blocks."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from grasp_lightning.callbacks.measure import TrainerMeasure
from grasp_lightning.config import CalibrationConfig, TrainerConfig
from grasp_lightning.data.datamodules import CalibrationData
from grasp_lightning.data.windows import TokenWindows
from grasp_lightning.errors import ConfigError
from grasp_lightning.evaluation.cut_losses import divergence
from grasp_lightning.methods.base import untracked
from grasp_lightning.methods.removal import removable_parts, removal_operations
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.next_token import forward_inputs
from grasp_lightning.models.surgery import apply_operations
from grasp_lightning.plan import DropLayers, FactorizeLinear, Plan
from grasp_lightning.run_folder import RunFolder
from grasp_lightning.stats.base import Needs, Removable, Step
from grasp_lightning.storage.progress import RunProgress
from grasp_lightning.training.calibration import CalibrationModule
from grasp_lightning.training.removal_losses import removal_losses, summed_losses_without
from tests.conftest import byte_tokenizer, tiny_model
from tests.unit.models.helpers import random_factors
from tests.unit.training.test_refit import windows


def parts(view: DecoderView) -> tuple[Removable, ...]:
    return removable_parts(view, view.layer_indices, "layers_and_blocks")


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox"])
def test_a_price_is_the_divergence_of_the_model_without_the_part(family: str) -> None:
    batches = [windows().batch([row]) for row in range(2)]
    dense = DecoderView(tiny_model(family))
    prices = removal_losses(dense, parts(dense), batches, untracked)
    assert list(prices) == [part.name for part in parts(dense)]
    reference: PreTrainedModel = tiny_model(family)
    for part in parts(dense):
        view = DecoderView(tiny_model(family))
        apply_operations(view, removal_operations([part], [part.name]), {})
        expected = sum(_divergence(view.model, reference, batch) for batch in batches) / 2
        assert prices[part.name] == pytest.approx(max(expected, 0), rel=1e-3, abs=1e-7)


@torch.no_grad()
def _divergence(
    model: PreTrainedModel, reference: PreTrainedModel, batch: dict[str, Tensor]
) -> float:
    logits, dense = (m(**forward_inputs(batch)).logits for m in (model, reference))
    return divergence(logits, dense, batch)


def test_the_model_stays_as_it_was() -> None:
    view = DecoderView(tiny_model())
    before = {key: value.clone() for key, value in view.model.state_dict().items()}
    modules = [type(module) for module in view.model.modules()]
    batch = windows().batch([0])
    logits = view.model(**forward_inputs(batch)).logits
    removal_losses(view, parts(view), [batch], untracked)
    assert torch.equal(view.model(**forward_inputs(batch)).logits, logits)
    assert [type(module) for module in view.model.modules()] == modules
    after = view.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_mlp_block_of_a_mixture_of_experts_stays() -> None:
    view = DecoderView(tiny_model("qwen3_moe", mlp_only_layers=[1]))
    kinds = {(part.layer, part.name.rpartition(".")[2]) for part in parts(view)}
    assert (1, "mlp") in kinds
    assert (2, "mlp") not in kinds
    assert (2, "layer") in kinds


def test_a_block_is_what_is_there_as_a_whole() -> None:
    view = DecoderView(tiny_model())
    linears = view.linears(1)
    cut = [
        FactorizeLinear(module=name, rank=2, components=None)
        for name in linears
        if name.endswith("q_proj")
    ]
    tensors = random_factors(view, cut)
    apply_operations(view, cut, tensors)
    kinds = {part.name.rpartition(".")[2] for part in parts(view) if part.layer == 1}
    assert kinds == {"layer", "mlp"}


def test_layers_that_compute_with_their_numbers_stay() -> None:
    view = DecoderView(tiny_model("gpt2", scale_attn_by_inverse_layer_idx=True))
    assert {part.is_block for part in parts(view)} == {True}
    with pytest.raises(
        ConfigError, match=r"scale_attn_by_inverse_layer_idx.* to remove blocks only"
    ):
        removable_parts(view, view.layer_indices, "layers")


def test_one_layer_always_remains() -> None:
    view = DecoderView(tiny_model())
    layers = [p.layer for p in removable_parts(view, view.layer_indices, "layers")]
    assert layers == [1, 2, 3]
    assert [p.layer for p in removable_parts(view, (0, 2), "layers")] == [0, 2]
    assert removable_parts(view, (0, 2), "none") == ()


def loss_step(view: DecoderView) -> Step:
    step = Step(name="removals", needs=Needs(removables=parts(view), removal_measure="loss"))
    assert not step.needs.is_empty
    return step


def calibration_data(found: TokenWindows, batch_size: int) -> CalibrationData:
    config = CalibrationConfig(source="pydoc", batch_size=batch_size)
    return CalibrationData(config, byte_tokenizer(), windows=found)


def padded_windows(num: int) -> TokenWindows:
    found = windows(num)
    found.mask[0, -5:] = found.targets[0, -5:] = False
    return found


@torch.no_grad()
def mean_loss(model: PreTrainedModel, found: TokenWindows) -> float:
    batch = found.batch(range(len(found)))
    logits = model(**forward_inputs(batch)).logits[:, :-1]
    is_predicted, labels = batch["targets"][:, 1:], batch["input_ids"][:, 1:]
    return float(cross_entropy(logits[is_predicted], labels[is_predicted]))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_loss_without_a_part_is_that_of_the_model_after_its_removal(family: str) -> None:
    def shortened() -> DecoderView:
        view = DecoderView(tiny_model(family))
        apply_operations(view, [DropLayers(layers=(1,))], {})
        return view

    found, view = padded_windows(5), shortened()
    before = {key: value.clone() for key, value in view.model.state_dict().items()}
    measured = TrainerMeasure(calibration_data(found, 2), progress=False)(view, loss_step(view))
    assert list(measured.removal_losses) == [part.name for part in parts(view)]
    for part in parts(view):
        without = shortened()
        apply_operations(without, removal_operations([part], [part.name]), {})
        loss = measured.removal_losses[part.name]
        assert loss == pytest.approx(mean_loss(without.model, found), rel=1e-5)
    after = view.model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_losses_resume_after_the_last_batch_that_was_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    view, data = DecoderView(tiny_model()), calibration_data(padded_windows(5), 2)
    step = loss_step(view)
    whole = TrainerMeasure(data, progress=False)(view, step).removal_losses
    run = RunFolder.open(str(tmp_path / "run"), {}, overwrite=False, protected=[])
    ran: list[list[int]] = []

    def failing(module: CalibrationModule, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        ran.append(batch["index"].tolist())
        if batch_idx == 1 and len(ran) == 2:
            raise InterruptedError
        return summed_losses_without(module.view, module.removables, batch)

    monkeypatch.setattr(CalibrationModule, "predict_step", failing)

    def measured() -> Mapping[str, float]:
        store = RunProgress(run, Plan(method="sleb"))
        config = TrainerConfig(checkpoint_seconds=0)
        return TrainerMeasure(data, config, progress=False, store=store)(view, step).removal_losses

    with pytest.raises(InterruptedError):
        measured()
    assert measured() == whole
    assert ran == [[0, 1], [2, 3], [2, 3], [4]]
