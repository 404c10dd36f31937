"""The memory of pricing rows of embedding and head, against what torch allocates."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from grasp_lightning.commands.plan import planned
from grasp_lightning.config import CompressConfig, EmbeddingsChoice, MethodConfig, ModelConfig
from grasp_lightning.linalg.row_groups import frequency_groups, group_sizes, row_factors
from grasp_lightning.memory.activations import FLOAT32, LOSS_PARTS
from grasp_lightning.memory.calibration import (
    row_update_bytes,
    vocabulary_activations,
    vocabulary_bytes,
)
from grasp_lightning.memory.model_shape import model_shape
from grasp_lightning.memory.shapes import Pass
from grasp_lightning.methods import resolve_method
from grasp_lightning.methods.embedding_rows import measured_vocabulary
from grasp_lightning.methods.metric import Metric
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.next_token import forward_inputs
from grasp_lightning.stats.vocabulary import VocabularyObserver, VocabularySums
from grasp_lightning.training.calibration import calibration_losses
from tests.conftest import tiny_model

SIZE, HIDDEN = 4096, 64
RUN = Pass(batch_size=2, seqlen=48, on_cpu=True)
METRIC = Metric(weighting="kfac", fisher="sampled")


def peak_bytes(found: profile) -> int:
    """Return the most bytes that were allocated at a time, beyond those at the start."""
    used = peak = 0
    for event in found.profiler.kineto_results.events():  # type: ignore[union-attr]  # private
        if event.name() == "[memory]":
            used += getattr(event, "nbytes")()  # noqa: B009  not in its stub
            peak = max(peak, used)
    return peak


def watched() -> profile:
    return profile(activities=[ProfilerActivity.CPU], profile_memory=True)


def test_the_pass_over_both_ends_takes_what_is_modelled() -> None:
    view = DecoderView(
        tiny_model("llama", vocab_size=SIZE, hidden_size=HIDDEN, tie_word_embeddings=True)
    )
    view.model.requires_grad_(False)
    ends = measured_vocabulary(view, METRIC)
    ids = torch.randint(1, SIZE, (RUN.batch_size, RUN.seqlen))
    ones = torch.ones_like(ids, dtype=torch.bool)
    batch = {"input_ids": ids, "mask": ones, "targets": ones, "index": torch.arange(len(ids))}
    counts = torch.bincount(ids.flatten(), minlength=SIZE)
    with watched() as found:
        sums = VocabularySums(ends, counts, counts / counts.sum(), HIDDEN, torch.device("cpu"))
        with VocabularyObserver(view, ends, sums).attached():
            logits = view.model(**forward_inputs(batch), use_cache=False).logits
            losses = calibration_losses("sampled", logits, batch)
            del logits
            losses.sum().backward()
        means = sums.mean(ids.numel())
    assert means
    modelled = vocabulary_bytes(SIZE, HIDDEN) + vocabulary_activations(model_shape(view), RUN)
    # The loss takes all rows of so few logits at a time.
    modelled += 3 * FLOAT32 * RUN.num_tokens * SIZE - LOSS_PARTS
    assert 0.6 * modelled < peak_bytes(found) < modelled


def test_sums_and_means_take_what_is_modelled() -> None:
    view = DecoderView(tiny_model("llama", vocab_size=SIZE, hidden_size=HIDDEN))
    ends = measured_vocabulary(view, METRIC)
    even = torch.ones(SIZE)
    with watched() as found:
        sums = VocabularySums(ends, even, even / SIZE, HIDDEN, torch.device("cpu"))
        means = sums.mean(100)
    assert means
    modelled = vocabulary_bytes(SIZE, HIDDEN)
    assert 0.9 * modelled < peak_bytes(found) < 1.1 * modelled


def test_factors_of_a_group_take_what_is_modelled() -> None:
    num_rows = group_sizes(SIZE, 0)[-1]
    weight, root = torch.randn(SIZE, HIDDEN), torch.eye(HIDDEN, dtype=torch.float64)
    groups = frequency_groups(torch.arange(SIZE), torch.tensor([], dtype=torch.int64))
    weights, rank = torch.ones(num_rows), num_rows * HIDDEN // (num_rows + HIDDEN)
    with watched() as found:
        factors = row_factors(weight[groups == 5], weights, root, rank)
    assert factors.left.shape == (num_rows, rank)
    modelled = row_update_bytes((num_rows, HIDDEN), weight.element_size())
    assert modelled == pytest.approx(peak_bytes(found), rel=0.25)


def test_a_plan_counts_it() -> None:
    model = tiny_model("llama", vocab_size=SIZE, hidden_size=HIDDEN)
    view, found = DecoderView(model), {}
    choices: tuple[EmbeddingsChoice, ...] = ("none", "factors")
    for choice in choices:
        method = resolve_method(MethodConfig(removed_ratio=0.01, layers=(1,), embeddings=choice))
        config = CompressConfig(model=ModelConfig(path="tiny"), method=method)
        found[choice] = planned(config, None, view).calibration.rows["auto"]
    assert found["factors"].statistics == vocabulary_bytes(SIZE, HIDDEN)
    assert found["none"].statistics < found["factors"].statistics
    # Both matrices, without the 1/32 of each that stays dense.
    assert found["factors"].factors > FLOAT32 * 2 * SIZE * HIDDEN * 31 // 32
