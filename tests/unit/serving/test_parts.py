from dataclasses import replace

import pytest

from grasp_lightning_vllm.parts import Layer, Linear, Span, allowed_sizes, parts_of, share


@pytest.mark.parametrize("num_processes", [1, 2, 3, 5])
def test_shares_are_neighbours_that_differ_by_at_most_one(num_processes: int) -> None:
    spans = [share(37, process, num_processes) for process in range(num_processes)]
    assert [index for span in spans for index in range(*span)] == list(range(37))
    assert max(span.size for span in spans) - min(span.size for span in spans) <= 1


def test_processes_beyond_the_key_value_heads_hold_copies() -> None:
    layer = Layer(
        outputs=(48, 16, 16), inputs=16, split="outputs", num_processes=6, copies=(1, 3, 3)
    )
    found = [
        parts_of(
            replace(layer, process=process),
            [Linear("q", 4), Linear("k", 0), Linear("v")],
        )
        for process in range(6)
    ]
    assert [q.rows[0].start for q, _, _ in found] == [0, 8, 16, 24, 32, 40]
    assert [k.rows[0].start for _, k, _ in found] == [0, 0, 0, 8, 8, 8]
    assert [part.height for part in found[5]] == [4, 0, 8]


def test_a_linear_with_several_outputs_gives_a_share_of_each() -> None:
    layer = Layer(outputs=(12, 12), inputs=8, split="outputs", process=1, num_processes=2)
    (part,) = parts_of(layer, [Linear("gate_up", shape=(10, 8))])
    assert part.rows == (Span(2, 5), Span(7, 10))  # of 5 gate channels, then of 5 up channels
    assert part.shape == (10, 8)


@pytest.mark.parametrize("shape", [(9, 8), (26, 8), (10, 9)])
def test_a_shape_that_does_not_fit_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(
        ValueError, match=r"gate_up: shape .* does not fit a dense linear of 24 x 8"
    ):
        parts_of(Layer(outputs=(12, 12), inputs=8), [Linear("gate_up", shape=shape)])


def test_linears_of_another_number_are_refused() -> None:
    with pytest.raises(ValueError, match="a, b: expected 3 linears, got 2"):
        parts_of(Layer(outputs=(4, 4, 4), inputs=4), [Linear("a"), Linear("b")])


def test_sizes_that_vllm_can_split_into() -> None:
    assert allowed_sizes(9, 3, 1536) == [1, 3]
    assert allowed_sizes(32, 8, 14336) == [1, 2, 4, 8, 16, 32]
    assert allowed_sizes(12, 2, 96) == [1, 2, 4, 6, 12]
