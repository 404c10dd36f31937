"""The forecast of a distillation: where the teacher counts, and what its cache takes on disk."""

from dataclasses import replace

import pytest
import torch

from grasp_lightning.config import (
    CompensateConfig,
    DistillationConfig,
    InstructionConfig,
    ModelConfig,
    TextConfig,
)
from grasp_lightning.data.batching import TokenSamples
from grasp_lightning.memory.forecast import cached_predictions, compensation_plan
from grasp_lightning.memory.model_shape import model_shape
from grasp_lightning.memory.text import memory_lines
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.storage.teacher_cache import TeacherCache
from tests.conftest import tiny_model

SHAPE = model_shape(DecoderView(tiny_model()))
DENSE = replace(SHAPE, parameters=10**8)  # so large that its weights outweigh all activations
DISTILLED = CompensateConfig(
    model=ModelConfig(path="m"),
    objective="distill",
    text=TextConfig(source="pydoc", num_samples=6, num_validation=2, seqlen=24),
    distillation=DistillationConfig(teacher="dense", data="text", top_k=5),
)


def cached(config: CompensateConfig) -> CompensateConfig:
    return replace(config, distillation=replace(config.distillation, cache=True))


def test_a_cached_teacher_counts_before_training_and_not_in_it() -> None:
    held = compensation_plan(DISTILLED, DENSE, SHAPE).rows["auto"]
    plan = compensation_plan(cached(DISTILLED), DENSE, SHAPE)
    row = plan.rows["auto"]
    assert held.before_training == 0
    assert held.memory.weights == row.memory.weights + DENSE.weights
    assert row.before_training > DENSE.weights + SHAPE.weights > row.memory.total
    assert row.peaks == (row.before_training, row.before_training)
    # A model that will be split is still on the host while the teacher runs.
    assert plan.rows["fsdp"].before_training == row.before_training - SHAPE.weights
    text = "\n".join(memory_lines(None, plan))
    assert "before training, with the dense model: " in text
    assert "calibration" not in text


def test_weights_count_in_the_dtype_in_which_they_are_loaded() -> None:
    half = replace(SHAPE, element_size=2)
    found = {}
    for dtype in ("auto", "float32"):
        config = replace(DISTILLED, model=ModelConfig(path="m", dtype=dtype), objective="text")
        found[dtype] = compensation_plan(config, half, half).modes
    assert found["float32"]["all"].memory.weights == SHAPE.weights
    assert found["auto"]["all"] == found["float32"]["all"]  # weights are not trained in 16 bits
    assert found["float32"]["lora"].memory.weights - found["auto"]["lora"].memory.weights == (
        SHAPE.weights - half.weights
    )


def test_a_teacher_elsewhere_takes_nothing_here() -> None:
    config = cached(DISTILLED)
    config = replace(config, distillation=replace(config.distillation, device="cpu"))
    assert compensation_plan(config, DENSE, SHAPE).rows["auto"].before_training == 0


def test_text_that_the_dense_model_writes_counts_before_training() -> None:
    config = replace(DISTILLED, objective="text", text=replace(DISTILLED.text, source="self"))
    row = compensation_plan(config, DENSE, SHAPE).rows["auto"]
    assert row.before_training > DENSE.weights + SHAPE.weights
    assert row.memory.weights < DENSE.weights


@pytest.mark.parametrize("vocabulary", [300, 10**5])
def test_the_bytes_of_a_cache_are_those_that_it_writes(vocabulary: int) -> None:
    rows = [torch.zeros(24, dtype=torch.long)] * 8
    targets = [torch.tensor([False, *[True] * 23])] * 8
    samples = TokenSamples.from_rows(rows, targets)
    cache = TeacherCache({"train": samples}, {"top_k": 5}, vocabulary=vocabulary)
    found = cached_predictions(cached(DISTILLED), vocabulary)
    assert found is not None
    assert found.num_bytes == cache.num_bytes
    plan = compensation_plan(cached(DISTILLED), DENSE, SHAPE)
    assert "bytes per predicted token" in memory_lines(None, plan)[-1]


def test_the_length_of_instructions_is_not_known() -> None:
    config = replace(
        cached(DISTILLED),
        data=InstructionConfig(num_train=5),
        distillation=replace(cached(DISTILLED).distillation, data="instruction"),
    )
    found = cached_predictions(config, 300)
    assert found is not None
    assert (found.bytes_per_token, found.num_bytes) == (24, None)
    assert cached_predictions(DISTILLED, 300) is None
