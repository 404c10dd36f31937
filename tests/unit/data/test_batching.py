import re
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from grasp_lightning.config import BatchOrder
from grasp_lightning.data.batching import Rows, TokenSamples, collate, epoch_batches
from grasp_lightning.data.packing import packed_inputs, packing_form
from grasp_lightning.errors import ModelError
from grasp_lightning.models.next_token import forward_inputs, next_token_losses
from tests.conftest import ALL_FAMILIES, FAMILIES, tiny_model

ORDERS: tuple[BatchOrder, ...] = ("shuffled", "length_grouped", "packed")
ROW = 40


def random_samples(count: int, seed: int = 0, longest: int = 32) -> TokenSamples:
    """Samples of 1 to 32 tokens; about half of their tokens are predicted."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    ids = [torch.randint(0, 256, (length,), generator=generator) for length in lengths]
    targets = [torch.rand(length, generator=generator) < 0.5 for length in lengths]
    for row in targets:
        row[0] = False
    return TokenSamples.from_rows(ids, targets)


def hand_made() -> TokenSamples:
    """Samples of 3, 1 and 2 tokens."""
    return TokenSamples(
        torch.tensor([10, 11, 12, 20, 30, 31]),
        torch.tensor([False, True, True, False, False, True]),
        torch.tensor([3, 1, 2]),
    )


def indices(batches: list[Rows]) -> Iterator[int]:
    return (index for rows in batches for row in rows for index in row)


def epoch(
    samples: TokenSamples, order: BatchOrder, number: int = 0, seed: int = 0, batch_size: int = 4
) -> list[Rows]:
    return epoch_batches(samples, batch_size, order=order, row_length=ROW, seed=seed, epoch=number)


# Samples


def test_samples_know_their_numbers() -> None:
    samples = hand_made()
    assert (len(samples), samples.num_tokens, samples.num_targets) == (3, 6, 3)
    assert samples.starts.tolist() == [0, 3, 4]


def test_the_hash_sees_ids_targets_and_where_samples_begin() -> None:
    samples = hand_made()
    none = torch.zeros(6, dtype=torch.bool)
    variants = [
        samples,
        TokenSamples(samples.input_ids + 1, samples.targets, samples.lengths),
        TokenSamples(samples.input_ids, none, samples.lengths),
        TokenSamples(samples.input_ids, none, torch.tensor([3, 2, 1])),
    ]
    assert len({variant.sha256 for variant in variants}) == 4
    assert samples.sha256 == hand_made().sha256


def test_inconsistent_samples_are_refused() -> None:
    ids, targets, lengths = hand_made().input_ids, hand_made().targets, hand_made().lengths
    with pytest.raises(ValueError, match="expected ids and targets of 5 tokens"):
        TokenSamples(ids, targets, torch.tensor([3, 2]))
    with pytest.raises(ValueError, match="expected int64 ids and lengths"):
        TokenSamples(ids.int(), targets, lengths)
    with pytest.raises(ValueError, match="every sample must have at least one token"):
        TokenSamples(ids, targets, torch.tensor([3, 0, 3]))
    with pytest.raises(ValueError, match="the first token of a sample has nothing before it"):
        TokenSamples(ids, targets, torch.tensor([2, 2, 2]))


# The batches of an epoch


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("count", [0, 1, 103, 450])
def test_every_sample_is_in_one_batch_of_an_epoch(order: BatchOrder, count: int) -> None:
    batches = epoch(random_samples(count), order)
    assert sorted(indices(batches)) == list(range(count))
    assert all(len(rows) == 4 for rows in batches[:-1]) or order == "length_grouped"
    assert all(1 <= len(rows) <= 4 for rows in batches)


@pytest.mark.parametrize("order", ORDERS)
def test_seed_and_epoch_alone_decide_the_batches(order: BatchOrder) -> None:
    samples = random_samples(103)
    assert epoch(samples, order) == epoch(random_samples(103), order)
    different = [epoch(samples, order, number, seed) for seed in (0, 1) for number in (0, 1)]
    assert all(different.count(batches) == 1 for batches in different)


@pytest.mark.parametrize("order", ORDERS)
def test_all_epochs_have_as_many_batches(order: BatchOrder) -> None:
    samples = random_samples(450)
    assert len({len(epoch(samples, order, number)) for number in range(5)}) == 1


@pytest.mark.parametrize("order", ORDERS)
def test_samples_are_not_in_order_of_length(order: BatchOrder) -> None:
    samples = random_samples(450)
    longest = [
        max(samples.lengths[i] for row in rows for i in row) for rows in epoch(samples, order)
    ]
    assert longest != sorted(longest)
    assert longest != sorted(longest, reverse=True)


def padding(samples: TokenSamples, batches: list[Rows]) -> float:
    """Return the share of padding."""
    masks = [collate(samples, rows)["mask"] for rows in batches]
    return 1 - samples.num_tokens / sum(mask.numel() for mask in masks)


def test_grouping_by_length_and_packing_leave_little_padding() -> None:
    samples = random_samples(450)
    shuffled, grouped, packed = (padding(samples, epoch(samples, order)) for order in ORDERS)
    assert shuffled > 0.3
    assert grouped < 0.05
    assert packed < 0.05


def test_the_first_of_the_length_grouped_batches_has_the_longest_sample() -> None:
    samples = random_samples(450, longest=ROW)
    for number in range(3):
        first = epoch(samples, "length_grouped", number)[0]
        assert max(samples.lengths[row[0]] for row in first) == samples.lengths.max()


def test_packed_rows_are_no_longer_than_allowed() -> None:
    samples = random_samples(450)
    rows = [row for rows in epoch(samples, "packed") for row in rows]
    lengths = [sum(int(samples.lengths[index]) for index in row) for row in rows]
    assert max(lengths) <= ROW
    assert max(len(row) for row in rows) > 1


def test_a_sample_as_long_as_a_row_has_one_of_its_own() -> None:
    samples = TokenSamples.from_rows(
        [torch.zeros(n, dtype=torch.int64) for n in (ROW, 1, ROW)],
        [torch.zeros(n, dtype=torch.bool) for n in (ROW, 1, ROW)],
    )
    assert sorted(row for rows in epoch(samples, "packed") for row in rows) == [[0], [1], [2]]


def test_impossible_batches_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        epoch(random_samples(3), "shuffled", batch_size=0)
    samples = random_samples(30, longest=50)
    longest = int(samples.lengths.max())
    with pytest.raises(ValueError, match=f"a sample has {longest} tokens, but a row has {ROW}"):
        epoch(samples, "packed")


# Collation


def test_a_batch_is_padded_to_its_longest_row_and_padding_is_ignored() -> None:
    batch = collate(hand_made(), [[2], [0], [1]])
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[30, 31, 0], [10, 11, 12], [20, 0, 0]],
        "mask": [[True, True, False], [True, True, True], [True, False, False]],
        "targets": [[False, True, False], [False, True, True], [False, False, False]],
        "position_ids": [[0, 1, 0], [0, 1, 2], [0, 0, 0]],
    }
    assert collate(hand_made(), [[2]])["input_ids"].tolist() == [[30, 31]]


def test_a_packed_batch_holds_samples_one_after_another() -> None:
    batch = collate(hand_made(), [[0, 2], [1]])
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[10, 11, 12, 30, 31], [20, 0, 0, 0, 0]],
        "mask": [[True] * 5, [True, False, False, False, False]],
        "targets": [[False, True, True, False, True], [False] * 5],
        "position_ids": [[0, 1, 2, 0, 1], [0, 0, 0, 0, 0]],
    }


def test_the_mask_of_a_packed_row_is_causal_and_block_diagonal() -> None:
    batch = collate(hand_made(), [[0, 1], [2]])
    inputs = packed_inputs(batch, "mask", torch.float16)
    mask = inputs["attention_mask"]
    assert isinstance(mask, Tensor)
    assert mask.dtype == torch.float16
    assert set(mask.unique().tolist()) == {0.0, torch.finfo(torch.float16).min}
    assert (mask == 0).int().tolist() == [
        [[[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]]],
        [[[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]],
    ]
    assert "attention_mask" not in packed_inputs(batch, "positions", torch.float16)


# Packing equals separate samples

FORMS = {
    family: "mask" if family in ("opt", "falcon", "falcon_new") else "positions"
    for family in ALL_FAMILIES
    if family != "bloom"
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_form_of_packing_is_found_by_trying(family: str, attention: str) -> None:
    model = tiny_model(family, attn_implementation=attention)
    assert packing_form(model, 32) == FORMS[family]


@pytest.mark.parametrize("family", sorted(set(FORMS) - set(FAMILIES)))
def test_the_form_of_packing_is_found_for_other_families(family: str) -> None:
    assert packing_form(tiny_model(family), 32) == FORMS[family]


def test_the_form_of_packing_is_found_in_low_precision_too() -> None:
    assert packing_form(tiny_model("opt").bfloat16(), 32) == "mask"
    assert packing_form(tiny_model("mixtral").bfloat16(), 32) == "positions"


def test_looking_for_the_form_of_packing_leaves_the_model_as_it_was() -> None:
    model = tiny_model("opt", dropout=0.5).train()
    assert packing_form(model, 32) == "mask"
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_family_that_cannot_be_packed_is_named() -> None:
    message = (
        "packing does not work with bloom models and attention eager: samples that share a row do "
        "not get the logits that they get alone; choose length_grouped or shuffled batches"
    )
    with pytest.raises(ModelError, match=f"^{re.escape(message)}$"):
        packing_form(tiny_model("bloom"), 32)


def test_a_row_that_holds_no_trial_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="row_length must be at least 8, got 7"):
        packing_form(tiny_model(), 7)


def packed_logits(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    form = packing_form(model, ROW)
    logits: Tensor = model(**packed_inputs(batch, form, model.dtype)).logits
    return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_give_the_logits_of_their_samples(family: str) -> None:
    model, samples = tiny_model(family), random_samples(12)
    for rows in epoch(samples, "packed", batch_size=2):
        batch = collate(samples, rows)
        logits = packed_logits(model, batch)
        assert logits.isfinite().all()
        parts = [model(collate(samples, [[i]])["input_ids"]).logits[0] for row in rows for i in row]
        torch.testing.assert_close(logits[batch["mask"]], torch.cat(parts), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("order", ORDERS)
def test_summed_loss_and_gradient_equal_those_of_the_samples_alone(
    family: str, order: BatchOrder
) -> None:
    model, samples = tiny_model(family), random_samples(12)
    weight = next(model.parameters())

    def loss_and_gradient(batches: list[Rows]) -> tuple[Tensor, Tensor]:
        total = torch.zeros(())
        for rows in batches:
            batch = collate(samples, rows)
            if order == "packed" and batches is not alone:
                logits = packed_logits(model, batch)
            else:
                logits = model(**forward_inputs(batch), use_cache=False).logits
            total = total + next_token_losses(logits, batch["input_ids"], batch["targets"]).sum()
        (gradient,) = torch.autograd.grad(total, weight)
        return total.detach(), gradient

    alone: list[Rows] = [[[index]] for index in range(len(samples))]
    loss, gradient = loss_and_gradient(alone)
    others = loss_and_gradient(epoch(samples, order))
    torch.testing.assert_close(others[0], loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(others[1], gradient, rtol=1e-3, atol=1e-4)
