"""The optimum for a multiplier: the minimum of a separable sum, without a budget."""

from collections.abc import Sequence

from grasp_lightning.linalg.allocation import Allocation, solve
from grasp_lightning.linalg.choices import Choice, prepared


def allocation_at(choices: Sequence[Choice], multiplier: float) -> Allocation:
    """Return the allocation of the least ``loss + multiplier size``; ties take the smaller size."""
    solution = solve(prepared(choices), multiplier)
    return solution.allocation(solution.loss)
