import math

import pytest
import torch

from grasp_lightning.errors import NumericsError
from grasp_lightning.evaluation.perplexity import Perplexity, evaluate_perplexity
from grasp_lightning.models.decoder import DecoderView
from tests.conftest import tiny_model


def random_batch(batch: int = 3, length: int = 10, seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(seed))
    targets = torch.ones_like(ids, dtype=torch.bool)
    targets[:, 0] = False
    return {"input_ids": ids, "mask": torch.ones_like(targets), "targets": targets}


def test_perplexity_is_that_of_the_model_s_own_loss() -> None:
    model, batch = tiny_model(), random_batch()
    expected = math.exp(model(batch["input_ids"], labels=batch["input_ids"]).loss.item())
    assert evaluate_perplexity(DecoderView(model), [batch]) == pytest.approx(expected, rel=1e-5)


def test_every_token_weighs_the_same_whatever_its_batch() -> None:
    model, batch = tiny_model(), random_batch()
    batch["targets"][1, 5:] = False
    rows = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(3)]
    one, split = (
        evaluate_perplexity(DecoderView(model), [batch]),
        evaluate_perplexity(DecoderView(model), rows),
    )
    assert split == pytest.approx(one, rel=1e-6)


def test_padding_does_not_count() -> None:
    model, batch = tiny_model(), random_batch(1, 10)
    padded = {key: torch.nn.functional.pad(value, (0, 4)) for key, value in batch.items()}
    assert evaluate_perplexity(DecoderView(model), [padded]) == pytest.approx(
        evaluate_perplexity(DecoderView(model), [batch]), rel=1e-5
    )


def test_states_add_up_as_they_do_over_processes() -> None:
    losses = torch.rand(10)
    whole, left, right = Perplexity(), Perplexity(), Perplexity()
    whole.update(losses)
    left.update(losses[:3])
    right.update(losses[3:])
    merged = Perplexity()
    merged.loss_sum = left.loss_sum + right.loss_sum
    merged.num_tokens = left.num_tokens + right.num_tokens
    merged._update_count = 2
    assert merged.compute().item() == pytest.approx(whole.compute().item(), rel=1e-12)


def test_a_nan_loss_is_an_error_not_a_number() -> None:
    model = tiny_model()
    model.get_parameter("model.embed_tokens.weight").data.fill_(float("nan"))
    with pytest.raises(
        NumericsError, match="NaN or infinite, first in the output of decoder layer 0"
    ):
        evaluate_perplexity(DecoderView(model), [random_batch()])
