"""What is measured at both ends of a model, and what its rows are predicted to cost."""

from collections.abc import Mapping
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
from grasp_lightning.linalg.row_groups import smoothed_frequencies
from grasp_lightning.methods import build_method, resolve_method
from grasp_lightning.methods.base import untracked
from grasp_lightning.methods.embedding_rows import MeasuredRows, measured_vocabulary, row_shapes
from grasp_lightning.methods.metric import Metric
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.plan import FactorizeRows, Plan, SelectLayers, row_group
from grasp_lightning.stats.base import Moments, Statistics, Step
from grasp_lightning.stats.vocabulary import groups_of
from tests.conftest import byte_tokenizer, tiny_model
from tests.unit.training.test_refit import windows

EMBEDDING = "model.embed_tokens"
METRIC = Metric(weighting="kfac", fisher="sampled", input_damping=1e-2)


def any_tokens(num: int) -> TokenWindows:
    """Return text in which all tokens are as likely as a random model expects."""
    ids = torch.randint(256, (num, 24), generator=torch.Generator().manual_seed(5))
    return replace(windows(num=num), input_ids=ids)


def measured(
    model: PreTrainedModel, found: TokenWindows, *, fisher: FisherChoice = "sampled"
) -> tuple[DecoderView, Step, Statistics]:
    view = DecoderView(model)
    ends = measured_vocabulary(view, METRIC)
    data = CalibrationData(CalibrationConfig(batch_size=2), byte_tokenizer(), windows=found)
    config = MethodConfig(name="grasp_plus", removed_ratio=0.2, embeddings="factors")
    method = build_method(resolve_method(config), view)
    plan = Plan(method=method.name, operations=(SelectLayers(layers=view.layer_indices),))
    step = method.next_step(view, plan)
    assert step is not None
    assert step.needs.vocabulary == ends
    # One linear beside it: no moments are measured without any.
    step = replace(step, needs=replace(step.needs, moments=step.needs.moments[:1], fisher=fisher))
    return view, step, TrainerMeasure(data, progress=False)(view, step)


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
    view, step, stats = measured(model, found, fisher="empirical")
    moments: Mapping[str, Moments] = stats.moments
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
    pooled, squares = embedded.mT @ embedded / number, logits.square().sum(0)
    for group in range(int(groups.max()) + 1):
        own = moments[row_group(EMBEDDING, group)]
        weights = logits[:, groups == group].square().sum(1)
        expected = (hidden * weights[:, None]).mT @ hidden / number
        torch.testing.assert_close(own.input_gram, expected, rtol=1e-3, atol=1e-5)
        inside = embedded[groups[ids] == group]
        mixed = (inside.mT @ inside + 32 * pooled) / (len(inside) + 32)
        expected = mixed * float(squares[groups == group].sum() / squares.sum())
        torch.testing.assert_close(own.gradient_gram, expected, rtol=1e-3, atol=1e-5)
    assert {int(groups[token]) for token in (256, 257, 258)} == {0}
    assert row_shapes(view).keys() == {row_group(EMBEDDING, g) for g in range(1, 6)}
    # More special tokens than the dense group would have: the next group is left without any.
    view.special_tokens = frozenset(range(20))
    rows = MeasuredRows(view, measured_vocabulary(view, METRIC), moments)
    losses = rows.losses({})
    assert (
        losses.keys() == row_shapes(view).keys() == {row_group(EMBEDDING, g) for g in range(2, 6)}
    )
    (operation,) = rows.decision(dict.fromkeys(losses, 1)).operations
    assert isinstance(operation, FactorizeRows)
    assert {operation.groups[token] for token in (*range(20), 256, 257, 258)} == {"0"}


@pytest.mark.parametrize("is_tied", [True, False])
def test_the_predicted_loss_of_a_group_is_the_measured_one(is_tied: bool) -> None:
    found = any_tokens(num=96)
    view, step, stats = measured(tiny_model("llama", tie_word_embeddings=is_tied), found)
    moments = stats.moments
    assert step.needs.vocabulary is not None
    assert moments.keys() >= {row_group(EMBEDDING, group) for group in range(6)}
    rows = MeasuredRows(view, step.needs.vocabulary, moments)
    losses = rows.losses({})
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
    # How often a token is embedded is what the model expects, and this one expects anything.
    known = {name for name in predicted if is_tied or name.startswith("lm_head")}
    sizeable = {name: predicted[name] for name in known if predicted[name] > 1e-3}
    assert len(sizeable) == 3
    for name, loss in sizeable.items():
        assert divergences[name] == pytest.approx(loss, rel=0.5), name


def test_losses_are_scaled_to_those_of_tried_factors() -> None:
    found = windows(num=16)
    view, step, stats = measured(tiny_model("llama", tie_word_embeddings=True), found)
    ends = step.needs.vocabulary
    assert ends is not None
    rows = MeasuredRows(view, ends, stats.moments)
    trial = rows.trial()
    (operation,) = (op for op in trial.operations if isinstance(op, FactorizeRows))
    # The first of every eight windows is measured, and the others are counted.
    counted = torch.bincount(found.input_ids[2:].flatten(), minlength=260)
    groups = groups_of(ends, smoothed_frequencies(counted))
    assert operation.groups == "".join(map(str, groups.tolist()))
    expected = [
        cut_losses(view, operation.cuts, trial.tensors, found.batch([number]), untracked)
        for number in range(2)
    ]
    plain, scaled = rows.losses({}), rows.losses(stats.row_losses)
    assert plain.keys() == scaled.keys() == stats.row_losses.keys() == operation.row_ranks.keys()
    for name, rank in operation.row_ranks.items():
        mean = sum(losses[name] for losses in expected) / 2
        assert stats.row_losses[name] == pytest.approx(mean, rel=1e-4, abs=1e-7)
        if float(plain[name][rank:].sum()) > 0:
            assert float(scaled[name][rank:].sum()) == pytest.approx(stats.row_losses[name])
            ratio = scaled[name] / plain[name]
            torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
