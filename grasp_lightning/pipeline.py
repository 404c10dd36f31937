"""The compression loop: measure, decide, apply, until nothing is left to do."""

from collections.abc import Callable

from grasp_lightning.methods.base import CompressionMethod, Decision
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.surgery import apply_operations
from grasp_lightning.plan import Plan
from grasp_lightning.stats.base import Statistics, Step

Measure = Callable[[DecoderView, Step], Statistics]
"""Measures what a step needs: a Trainer in production, stored tensors in tests."""

Finish = Callable[[DecoderView, Decision], Decision]
"""Completes a decision on the model to which it is not yet applied, such as by a refit."""

OnStep = Callable[[Plan, Decision], None]
"""Called after each applied step with the plan so far, so that a crash loses one step at most."""


def compress(
    model: DecoderView,
    method: CompressionMethod,
    measure: Measure,
    plan: Plan,
    on_step: OnStep,
    *,
    finish: Finish | None = None,
) -> Plan:
    """Compress a model in place and return the complete plan.

    The operations of ``plan``, which is empty at the start, must be applied to the model already.

    Raises:
        ValueError: If a method requests a refit without ``finish``.
    """
    while (step := method.next_step(model, plan)) is not None:
        decision = method.decide(step, model, measure(model, step))
        if finish is not None:
            decision = finish(model, decision)
        elif decision.refit != "none":
            raise ValueError(f"method {method.name} requests a refit, which needs windows")
        apply_operations(model, decision.operations, decision.tensors)
        plan = plan.extended(decision.operations)
        on_step(plan, decision)
    return plan.completed()
