"""What a multiplier is worth: the minimum of a separable sum, without a budget."""

from collections.abc import Sequence

from grasp_lightning.linalg.allocation import Allocation, solve
from grasp_lightning.linalg.choices import Choice, prepared


def allocation_at(choices: Sequence[Choice], multiplier: float) -> Allocation:
    """Return the allocation of the smallest ``loss + multiplier size``, of equals the smallest."""
    solution = solve(prepared(choices), multiplier)
    return solution.allocation(solution.loss)
