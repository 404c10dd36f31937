from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from grasp_lightning import processes
from grasp_lightning.config import BatchOrder, TrainingConfig
from grasp_lightning.data.batching import TokenSamples, collate
from grasp_lightning.data.steps import StepBatch, StepOptions, TrainingSteps

ORDERS: list[BatchOrder] = ["shuffled", "length_grouped", "packed"]


def numbered(count: int = 23) -> TokenSamples:
    """Samples of 2 to 8 tokens, all of which are the number of the sample."""
    lengths = [2 + 5 * number % 7 for number in range(count)]
    ids = [torch.full((length,), number) for number, length in enumerate(lengths)]
    return TokenSamples.from_rows(ids, [torch.arange(length) > 0 for length in lengths])


def steps(
    samples: TokenSamples | None = None,
    **options: Any,  # noqa: ANN401  any field of StepOptions
) -> TrainingSteps:
    defaults: dict[str, Any] = {
        "batch_size": 4,
        "micro_batch_size": 3,
        "order": "shuffled",
        "row_length": 16,
        "epochs": 2,
        "max_steps": None,
        "seed": 0,
    }
    return TrainingSteps(
        numbered() if samples is None else samples, StepOptions(**{**defaults, **options})
    )


def numbers(batch: StepBatch) -> list[int]:
    """The samples of a step, in no particular order."""
    return sorted(
        {int(number) for part in batch.parts for number in part["input_ids"][part["mask"]]}
    )


def are_equal(first: list[StepBatch], second: list[StepBatch]) -> bool:
    def tensors(batches: list[StepBatch]) -> list[Tensor]:
        return [part[name] for batch in batches for part in batch.parts for name in sorted(part)]

    pairs = list(zip(tensors(first), tensors(second), strict=True))
    return len(pairs) > 0 and all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("order", ORDERS)
def test_every_epoch_holds_every_sample_once(order: BatchOrder) -> None:
    sequence = steps(order=order, epochs=3)
    batches = list(sequence)
    size = sequence.steps_per_epoch
    epochs = [batches[start : start + size] for start in range(0, len(batches), size)]
    assert len(epochs) == 3
    for epoch in epochs:
        assert sorted(number for batch in epoch for number in numbers(batch)) == list(range(23))
    orders = [[numbers(batch) for batch in epoch] for epoch in epochs]
    assert orders[0] != orders[1] != orders[2]


def test_every_token_of_a_sample_is_there_once_per_epoch() -> None:
    samples = numbered()
    seen: Counter[int] = Counter()
    for batch in steps(samples, order="packed", epochs=2):
        for part in batch.parts:
            seen.update(part["input_ids"][part["mask"]].tolist())
            is_first = part["position_ids"] == 0
            assert torch.equal(part["targets"], part["mask"] & ~is_first)
    assert seen == {number: 2 * int(size) for number, size in enumerate(samples.lengths)}


@pytest.mark.parametrize(
    ("batch_size", "epochs", "max_steps", "expected"),
    [
        (4, 1, None, 6),
        (4, 2, None, 12),
        (23, 3, None, 3),
        (24, 3, None, 3),
        (22, 3, None, 6),
        (4, 2, 7, 7),
        (4, 2, 12, 12),
        (4, 2, 100, 12),
        (4, 1, 1, 1),
    ],
)
def test_the_length_is_the_number_of_steps(
    batch_size: int, epochs: int, max_steps: int | None, expected: int
) -> None:
    sequence = steps(batch_size=batch_size, epochs=epochs, max_steps=max_steps)
    assert len(sequence) == expected
    assert len(list(sequence)) == expected


def test_fewer_steps_are_the_first_ones() -> None:
    assert are_equal(list(steps(max_steps=7)), list(steps())[:7])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("done", [0, 1, 4, 5, 7])
def test_iteration_resumes_after_the_steps_that_were_yielded(order: BatchOrder, done: int) -> None:
    first = steps(order=order, batch_size=2)
    whole = list(first)
    assert len(whole) > 7
    iterator = iter(first)
    for _ in range(done):
        next(iterator)

    second = steps(order=order, batch_size=2)
    second.load_state_dict(first.state_dict())
    rest = list(second)

    assert first.state_dict() == {"position": done}
    assert len(rest) == len(whole) - done
    assert are_equal(rest, whole[done:])


def test_a_state_counts_the_step_that_was_given_out_last() -> None:
    sequence = steps()
    positions = [sequence.state_dict()["position"] for _ in sequence]
    assert positions == list(range(1, 13))


def test_a_state_after_the_last_step_leaves_nothing() -> None:
    sequence = steps()
    sequence.load_state_dict({"position": 12})
    assert list(sequence) == []


def test_a_new_iteration_after_the_end_starts_at_the_beginning() -> None:
    sequence = steps()
    first = list(sequence)
    assert sequence.state_dict() == {"position": 0}
    assert are_equal(list(sequence), first)
    sequence.load_state_dict({"position": 9})
    assert are_equal(list(sequence), first[9:])
    assert are_equal(list(sequence), first)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("micro_batch_size", [1, 3, 4, 9])
def test_micro_batches_of_a_step_are_its_rows_one_after_another(
    order: BatchOrder, micro_batch_size: int
) -> None:
    samples = numbered()
    sequence = steps(samples, order=order, micro_batch_size=micro_batch_size)
    for number, batch in enumerate(sequence):
        rows = sequence.rows(number)
        sizes = [len(part["input_ids"]) for part in batch.parts]
        assert sum(sizes) == len(rows) <= 4
        assert set(sizes[:-1]) <= {micro_batch_size}
        assert sizes[-1] <= micro_batch_size
        whole = collate(samples, rows)
        for name in whole:
            length = whole[name].shape[1]
            padded = [
                torch.nn.functional.pad(part[name], (0, length - part[name].shape[1]))
                for part in batch.parts
            ]
            assert torch.equal(torch.cat(padded), whole[name])


def test_a_step_says_how_many_tokens_it_predicts() -> None:
    samples = numbered()
    sequence = steps(samples, order="packed", epochs=1)
    counts = [batch.num_targets for batch in sequence]
    assert sum(counts) == samples.num_targets
    assert counts == [
        sum(int(samples.lengths[index]) - 1 for row in sequence.rows(step) for index in row)
        for step in range(len(sequence))
    ]


def test_processes_share_the_rows_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(steps(batch_size=2, epochs=1))  # the last step has one row
    shares = []
    monkeypatch.setattr(processes, "num_processes", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        shares.append(list(steps(batch_size=2, epochs=1)))
    for step, batch in enumerate(whole):
        parts = [part for share in shares for part in share[step].parts]
        assert len(parts) == 3  # each process has something to compute
        assert {share[step].num_targets for share in shares} == {batch.num_targets}
        assert sum(int(part["targets"].sum()) for part in parts) == batch.num_targets
        learned = {int(n) for part in parts for n in part["input_ids"][part["targets"]]}
        assert sorted(learned) == numbers(batch)


def test_a_micro_batch_is_no_longer_than_its_own_longest_row() -> None:
    for batch in steps(micro_batch_size=1):
        for part in batch.parts:
            assert part["mask"].all()


def test_micro_batches_do_not_change_which_samples_meet_in_a_step() -> None:
    rows = [[steps(micro_batch_size=size).rows(step) for step in range(12)] for size in (1, 3, 4)]
    assert rows[0] == rows[1] == rows[2]


def test_the_seed_alone_chooses_the_order() -> None:
    assert are_equal(list(steps(seed=3)), list(steps(seed=3)))
    first, second = ([numbers(batch) for batch in steps(seed=seed)] for seed in (3, 4))
    assert first != second


def test_rows_of_any_step_can_be_asked_for_in_any_order() -> None:
    sequence = steps()
    forwards = [sequence.rows(step) for step in range(12)]
    assert [sequence.rows(step) for step in reversed(range(12))] == forwards[::-1]
    assert sequence.state_dict() == {"position": 0}


def test_options_are_those_of_the_configuration() -> None:
    config = TrainingConfig(batch_size=6, micro_batch_size=2, epochs=3, max_steps=5)
    options = StepOptions.of(config, order="packed", row_length=9, seed=7)
    assert options == StepOptions(
        batch_size=6,
        micro_batch_size=2,
        order="packed",
        row_length=9,
        epochs=3,
        max_steps=5,
        seed=7,
    )
