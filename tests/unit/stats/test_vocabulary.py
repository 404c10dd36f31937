"""What is measured at both ends of a model, and what its rows are predicted to cost."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from grasp_lightning.callbacks.measure import TrainerMeasure
from grasp_lightning.config import CalibrationConfig, FisherChoice, MethodConfig
from grasp_lightning.data.datamodules import CalibrationData
from grasp_lightning.data.windows import TokenWindows
from grasp_lightning.evaluation.cut_losses import cut_losses
from grasp_lightning.methods import build_method, resolve_method
from grasp_lightning.methods.base import untracked
from grasp_lightning.methods.embedding_rows import MeasuredRows, measured_vocabulary, row_shapes
from grasp_lightning.methods.metric import Metric
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.plan import FactorizeRows, Plan, SelectLayers, row_group
from grasp_lightning.stats.base import Moments, Needs, Step
from grasp_lightning.stats.vocabulary import groups_of
from tests.conftest import byte_tokenizer, tiny_model
from tests.unit.training.test_refit import windows

EMBEDDING = "model.embed_tokens"


def measured(
    model: PreTrainedModel, found: TokenWindows, *, fisher: FisherChoice = "sampled"
) -> tuple[DecoderView, Step, dict[str, Moments]]:
    view = DecoderView(model)
    needs = Needs(vocabulary=measured_vocabulary(view), fisher=fisher)
    data = CalibrationData(CalibrationConfig(batch_size=2), byte_tokenizer(), windows=found)
    config = MethodConfig(name="grasp_plus", removed_ratio=0.2, embeddings="factors")
    method = build_method(resolve_method(config), view)
    plan = Plan(method=method.name, operations=(SelectLayers(layers=view.layer_indices),))
    step = method.next_step(view, plan)
    assert step is not None
    assert step.needs.vocabulary == needs.vocabulary
    # One linear beside it: no moments are measured without any.
    step = replace(step, needs=replace(step.needs, moments=step.needs.moments[:1], fisher=fisher))
    return view, step, dict(TrainerMeasure(data, progress=False)(view, step).moments)


def naive_ends(model: PreTrainedModel, found: TokenWindows) -> tuple[Tensor, Tensor, Tensor]:
    """Return gradients by embedded tokens, inputs of the head, gradients of logits, per token."""
    embedded = model.get_input_embeddings()(found.input_ids).detach().requires_grad_(True)
    hidden = model.model(inputs_embeds=embedded)[0]
    logits = model.lm_head(hidden)
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), found.input_ids[:, 1:].flatten(), reduction="sum"
    )
    gradients = torch.autograd.grad(losses, [embedded, logits])
    return gradients[0].flatten(0, 1), hidden.detach().flatten(0, 1), gradients[1].flatten(0, 1)


def test_sums_equal_those_of_single_tokens() -> None:
    found = windows(num=4, length=10)
    # Its embedding scales its rows, so the gradient of a row is the scaled gradient of the output.
    model = tiny_model("gemma3_text", final_logit_softcapping=None)
    view, step, moments = measured(model, found, fisher="empirical")
    ids, number = found.input_ids.flatten(), found.num_tokens
    embedded, hidden, logits = naive_ends(tiny_model("gemma3_text"), found)
    embedded = embedded * model.get_input_embeddings().scalar_embed_scale  # type: ignore[operator]
    vocabulary = step.needs.vocabulary
    assert vocabulary is not None
    frequencies = moments[EMBEDDING].input_square
    assert frequencies is not None
    groups = groups_of(vocabulary, frequencies)
    torch.testing.assert_close(
        moments[EMBEDDING].gradient_square, logits.square().sum(0) / number, rtol=1e-3, atol=1e-6
    )
    pooled = embedded.mT @ embedded / number
    for group in range(int(groups.max()) + 1):
        own = moments[row_group(EMBEDDING, group)]
        weights = logits[:, groups == group].square().sum(1)
        expected = (hidden * weights[:, None]).mT @ hidden / number
        torch.testing.assert_close(own.input_gram, expected, rtol=1e-3, atol=1e-5)
        inside = embedded[groups[ids] == group]
        mixed = (inside.mT @ inside + 32 * pooled) / (len(inside) + 32)
        expected = mixed * float(frequencies[groups == group].sum())
        torch.testing.assert_close(own.gradient_gram, expected, rtol=1e-3, atol=1e-5)
    assert {int(groups[token]) for token in (256, 257, 258)} == {0}
    assert row_shapes(view).keys() == {row_group(EMBEDDING, g) for g in range(1, 6)}
    # More special tokens than the dense group would have: the next group is left without any.
    view.special_tokens = frozenset(range(20))
    rows = MeasuredRows(view, measured_vocabulary(view), Metric(weighting="kfac"), moments)
    losses = rows.losses()
    assert (
        losses.keys() == row_shapes(view).keys() == {row_group(EMBEDDING, g) for g in range(2, 6)}
    )
    (operation,) = rows.decision(dict.fromkeys(losses, 1)).operations
    assert isinstance(operation, FactorizeRows)
    assert {operation.groups[token] for token in (*range(20), 256, 257, 258)} == {"0"}


@pytest.mark.parametrize("is_tied", [True, False])
def test_the_predicted_loss_of_a_group_is_the_measured_one(is_tied: bool) -> None:
    found = windows(num=48)
    view, step, moments = measured(tiny_model("llama", tie_word_embeddings=is_tied), found)
    assert step.needs.vocabulary is not None
    assert moments.keys() >= {row_group(EMBEDDING, group) for group in range(6)}
    metric = Metric(weighting="kfac", fisher="sampled")
    rows = MeasuredRows(view, step.needs.vocabulary, metric, moments)
    losses = rows.losses()
    decision = rows.decision({name: min(16, len(loss)) for name, loss in losses.items()})
    operations = [op for op in decision.operations if isinstance(op, FactorizeRows)]
    assert [len(op.modules) for op in operations] == ([2] if is_tied else [1, 1])
    cuts = [cut for op in operations for cut in op.cuts]
    assert len(cuts) == len(losses)
    batch = found.batch(range(len(found)))
    divergences = cut_losses(view, cuts, decision.tensors, batch, untracked)
    predicted = {name: float(losses[name][16:].sum()) for name in divergences}
    # Of a group with at most 16 tokens, nothing is dropped.
    assert all(abs(divergences[name]) < 1e-6 for name, loss in predicted.items() if loss == 0)
    # The text never reads the tokens of the last group, but the head scores them.
    read = {name: loss for name, loss in predicted.items() if loss > 1e-3}
    assert len(read) == (3 if is_tied else 5)
    for name, loss in read.items():
        assert divergences[name] == pytest.approx(loss, rel=0.5), name
