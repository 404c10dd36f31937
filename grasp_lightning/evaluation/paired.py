"""Means over samples, and differences of two models on the same samples, with standard errors."""

import math
from collections.abc import Sequence
from typing import NamedTuple


class Estimate(NamedTuple):
    """A mean over samples.

    Attributes:
        value: The mean, in the unit of the metric.
        stderr: Its standard error in the same unit; None where it is unknown.
    """

    value: float
    stderr: float | None


def paired_difference(samples: Sequence[float], reference: Sequence[float]) -> Estimate:
    """Return how much the mean over some samples differs from that of a reference.

    What is hard about a sample is hard for both models, so the error of the mean difference is
    smaller than the errors of the two means suggest.

    Args:
        samples: Metric of a model on each sample.
        reference: The same of the model that it is compared with, on the same samples in the same
            order.

    Returns:
        Mean of ``samples - reference``; its standard error is that of the mean of independent
        draws, with n - 1 degrees of freedom, and None for a single sample.

    Raises:
        ValueError: If the numbers of samples differ, or there are none.
    """
    if len(samples) != len(reference) or not samples:
        raise ValueError(
            f"expected as many samples as of the reference, at least one, got {len(samples)} and "
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
    """Return the mean of independent estimates, each weighing the same.

    Args:
        estimates: At least one, in one unit.

    Returns:
        Their mean; its standard error is None if one of theirs is unknown.

    Raises:
        ValueError: If there is none.
    """
    if not estimates:
        raise ValueError("expected at least one estimate, got none")
    count = len(estimates)
    value = math.fsum(estimate.value for estimate in estimates) / count
    errors = [estimate.stderr for estimate in estimates if estimate.stderr is not None]
    if len(errors) < count:
        return Estimate(value, None)
    return Estimate(value, math.sqrt(math.fsum(error**2 for error in errors)) / count)
