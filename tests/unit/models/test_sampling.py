import math

import pytest
import torch
from torch import Tensor

from grasp_lightning.errors import ModelError, NumericsError
from grasp_lightning.models import sampling
from grasp_lightning.models.sampling import sample_text
from tests.conftest import ALL_FAMILIES, tiny_model

BYTES = torch.arange(256)


def sampled(num_windows: int = 5, length: int = 12, seed: int = 0, family: str = "llama") -> Tensor:
    return sample_text(
        tiny_model(family), num_windows, length, starts=BYTES, vocabulary=BYTES, seed=seed
    )


def test_the_seed_alone_chooses_the_text() -> None:
    first = sampled()
    assert first.shape == (5, 12)
    assert first.dtype == torch.int64
    assert torch.equal(first, sampled())
    assert not torch.equal(first, sampled(seed=1))
    assert len({tuple(row) for row in first.tolist()}) == 5


def test_more_windows_begin_with_the_same_ones() -> None:
    longer = sampled(num_windows=sampling.BATCH + 3)
    assert longer.shape == (sampling.BATCH + 3, 12)
    assert torch.equal(longer[: sampling.BATCH], sampled(num_windows=sampling.BATCH))


def test_what_is_kept_is_not_written_again() -> None:
    kept: list[Tensor] = []
    num_windows = 2 * sampling.BATCH + 3
    whole = sample_text(
        tiny_model(), num_windows, 6, starts=BYTES, vocabulary=BYTES, seed=0, keep=kept.append
    )
    assert [len(texts) for texts in kept] == [sampling.BATCH, 2 * sampling.BATCH, num_windows]
    more: list[Tensor] = []
    again = sample_text(
        tiny_model(),
        num_windows,
        6,
        starts=BYTES,
        vocabulary=BYTES,
        seed=0,
        written=kept[0],
        keep=more.append,
    )
    assert torch.equal(again, whole)
    assert [len(texts) for texts in more] == [2 * sampling.BATCH, num_windows]


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_each_token_is_the_one_that_the_whole_text_before_it_gives(family: str) -> None:
    """The cache changes nothing: the same draws from full forward passes give the same text."""
    model = tiny_model(family)
    written = sampled(num_windows=3, length=10, seed=2, family=family)
    generator = torch.Generator().manual_seed(2)
    draws = torch.rand(3, 10, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        for position in range(1, 10):
            logits = model(written[:, :position], use_cache=False).logits[:, -1, :256]
            edges = logits.double().softmax(-1).cumsum(-1)
            for row in range(3):
                token, draw = int(written[row, position]), float(draws[row, position])
                below = float(edges[row, token - 1]) if token else 0.0
                assert below - 1e-5 <= draw <= float(edges[row, token]) + 1e-5


def test_tokens_are_as_frequent_as_the_model_says() -> None:
    model = tiny_model()
    start = torch.tensor([7])
    written = sample_text(model, 2000, 2, starts=start, vocabulary=BYTES, seed=0)
    with torch.no_grad():
        expected = model(start[None]).logits[0, -1, :256].double().softmax(-1)
    counts = written[:, 1].bincount(minlength=256)
    assert (written[:, 0] == 7).all()
    error = (counts / 2000 - expected).abs()
    assert (error < 5 * (expected * (1 - expected) / 2000).sqrt() + 1 / 2000).all()


def test_only_the_vocabulary_is_drawn() -> None:
    starts, vocabulary = torch.tensor([3, 200]), torch.tensor([5, 6, 7, 999])
    written = sample_text(tiny_model(), 40, 8, starts=starts, vocabulary=vocabulary, seed=0)
    assert set(written[:, 0].tolist()) == {3, 200}
    assert set(written[:, 1:].flatten().tolist()) == {5, 6, 7}


def test_a_tokenizer_of_another_model_is_refused() -> None:
    ids = torch.tensor([999])
    with pytest.raises(ModelError, match="token 999, but the model has only 260 tokens"):
        sample_text(tiny_model(), 1, 4, starts=ids, vocabulary=ids, seed=0)


def test_nan_is_named_by_layer() -> None:
    model = tiny_model()
    model.get_parameter("model.layers.2.mlp.up_proj.weight").data.fill_(math.nan)
    with pytest.raises(NumericsError, match="first in the output of decoder layer 2"):
        sample_text(model, 1, 4, starts=BYTES, vocabulary=BYTES, seed=0)
