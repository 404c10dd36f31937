"""The adapter of streamed models answers lm-eval like the adapter of whole ones."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from grasp_lightning.errors import ConfigError
from grasp_lightning.evaluation.adapters import gathering_class
from tests.conftest import tiny_model

huggingface = pytest.importorskip("lm_eval.models.huggingface")
instance = pytest.importorskip("lm_eval.api.instance")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model()


def adapters(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> tuple[Any, Any, list[int]]:  # Any: lm-eval has no usable types
    """Return the adapter of lm-eval, ours, and the number of batches of each of its sweeps."""
    sweeps: list[int] = []

    def predict(inputs: Sequence[Tensor]) -> Iterator[Tensor]:
        sweeps.append(len(inputs))
        for ids in inputs:
            with torch.no_grad():
                yield model(ids).logits

    options = {"pretrained": model, "tokenizer": tokenizer, "batch_size": 2, "max_length": 24}
    whole = huggingface.HFLM(**options)
    return whole, gathering_class()(predict, "a task", **options), sweeps


def asked(kind: str, *texts: tuple[str, ...]) -> list[Any]:
    return [
        instance.Instance(kind, {}, arguments, number) for number, arguments in enumerate(texts)
    ]


def test_log_likelihoods_are_equal_and_take_one_sweep_per_kind(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    whole, gathering, sweeps = adapters(model, tokenizer)
    choices = asked("loglikelihood", *((f"question {n // 3}:", " a" * (n + 1)) for n in range(7)))
    assert gathering.loglikelihood(choices) == whole.loglikelihood(choices)
    # Texts longer than the model's context, in windows.
    texts = asked("loglikelihood_rolling", ("one text of many words " * 4,), ("another",))
    rolling = gathering.loglikelihood_rolling(texts)
    assert rolling == whole.loglikelihood_rolling(texts)
    assert len(sweeps) == 2
    assert min(sweeps) > 1


def test_tasks_that_write_text_are_refused_by_name(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    _, gathering, _ = adapters(model, tokenizer)
    with pytest.raises(ConfigError, match="tasks: a task lets the model generate text"):
        gathering.generate_until(asked("generate_until", ("a", "b")))
