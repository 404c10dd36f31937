import math

import pytest

from grasp_lightning.evaluation.paired import Estimate, mean_of, paired_difference


def test_paired_difference_by_hand() -> None:
    # Differences 1, 0, 0, -1, 1: mean 0.2, variance 0.7.
    difference = paired_difference([1, 1, 0, 0, 1], [0, 1, 0, 1, 0])
    assert difference.value == pytest.approx(0.2)
    assert difference.stderr == pytest.approx(math.sqrt(0.7 / 5))


def test_equal_samples_differ_by_nothing() -> None:
    assert paired_difference([1, 0, 1], [1, 0, 1]) == Estimate(0.0, 0.0)


def test_a_single_sample_has_no_error() -> None:
    assert paired_difference([1.0], [0.25]) == Estimate(0.75, None)


@pytest.mark.parametrize(("samples", "reference"), [([], []), ([1.0], [1.0, 0.0])])
def test_samples_that_are_not_pairs_are_refused(
    samples: list[float], reference: list[float]
) -> None:
    with pytest.raises(ValueError, match="expected as many samples as the reference has"):
        paired_difference(samples, reference)


def test_mean_of_estimates_adds_their_errors_in_squares() -> None:
    mean = mean_of([Estimate(0.2, 0.03), Estimate(0.4, 0.04)])
    assert mean.value == pytest.approx(0.3)
    assert mean.stderr == pytest.approx(0.025)
    assert mean_of([Estimate(0.2, None), Estimate(0.4, 0.04)]).stderr is None


def test_mean_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one estimate"):
        mean_of([])
