from collections.abc import Iterator

import pytest
import torch

from grasp_lightning.config import BatchOrder
from grasp_lightning.data.batching import Rows, TokenSamples, collate, epoch_batches

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
