"""Means and paired differences over samples, with standard errors."""

import math
from collections.abc import Sequence
from typing import NamedTuple


class Estimate(NamedTuple):
    """A mean over samples and its standard error, in the metric's unit; None where unknown."""

    value: float
    stderr: float | None


def paired_difference(samples: Sequence[float], reference: Sequence[float]) -> Estimate:
    """Return the mean of ``samples - reference``: two models' metric on the same samples, in order.

    Samples that are hard are hard for both models, so the error of the mean difference is smaller
    than the errors of both means suggest. The standard error assumes independent draws, with n -
    1 degrees of freedom; None for a single sample.

    Raises:
        ValueError: If the numbers of samples differ, or there are none.
    """
    if len(samples) != len(reference) or not samples:
        raise ValueError(
            f"expected as many samples as the reference has, at least one, got {len(samples)} and "
            f"{len(reference)}"
        )
    differences = [one - other for one, other in zip(samples, reference, strict=True)]
    count = len(differences)
    mean = math.fsum(differences) / count
    if count == 1:
        return Estimate(mean, None)
    variance = math.fsum((value - mean) ** 2 for value in differences) / (count - 1)
    return Estimate(mean, math.sqrt(variance / count))


def mean_of(estimates: Sequence[Estimate]) -> Estimate:
    """Return the unweighted mean of independent estimates; its error is None if any of theirs is.

    Raises:
        ValueError: If there are none.
    """
    if not estimates:
        raise ValueError("expected at least one estimate, got none")
    count = len(estimates)
    value = math.fsum(estimate.value for estimate in estimates) / count
    errors = [estimate.stderr for estimate in estimates if estimate.stderr is not None]
    if len(errors) < count:
        return Estimate(value, None)
    return Estimate(value, math.sqrt(math.fsum(error**2 for error in errors)) / count)
