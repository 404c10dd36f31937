"""The steps between a decision and surgery: measure cuts, refit tensors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from grasp_lightning.data.datamodules import CalibrationData
from grasp_lightning.data.windows import TokenWindows
from grasp_lightning.evaluation.cut_losses import cut_losses, first_tokens
from grasp_lightning.evaluation.phases import Phases
from grasp_lightning.methods.base import Decision, Track
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.plan import FactorizeRows, Operation, Replacement
from grasp_lightning.training.refit import RefitStore, Refitter

CUT_LOSSES, REFIT = "cut_losses", "refit"


@dataclass(frozen=True, kw_only=True)
class FinishDecision:
    """Measures the cuts of a decision one by one and refits its tensors, both if requested.

    Attributes:
        held_out: Windows to measure cuts on; None skips the measurement.
        data: Windows of a refit; None if there is no data.
        max_bytes: Memory for a refit's hidden states.
        store: Returns the store of refitted layers for a decision's operations; None keeps none.
    """

    held_out: TokenWindows | None
    data: CalibrationData | None
    max_bytes: float
    phases: Phases
    track: Track
    store: Callable[[Sequence[Operation]], RefitStore] | None = None

    def __call__(self, view: DecoderView, decision: Decision) -> Decision:
        """Return the decision with refitted tensors and a score ``<module>.measured`` per cut.

        Args:
            view: The dense model.
            decision: The decision of a method.

        Raises:
            ValueError: If a refit is requested without windows.
        """
        cuts: list[Replacement | FactorizeRows] = []
        for op in decision.operations:
            cuts += op.cuts if isinstance(op, FactorizeRows) else ()
            cuts += [op] if isinstance(op, Replacement) else ()
        if self.held_out is not None and cuts:
            with self.phases(CUT_LOSSES):
                batch = first_tokens(self.held_out.batch(range(len(self.held_out))))
                losses = cut_losses(view, cuts, decision.tensors, batch, self.track)
            measured = {f"{name}.measured": torch.tensor([loss]) for name, loss in losses.items()}
            decision = replace(decision, scores={**decision.scores, **measured})
        if decision.refit == "none":
            return decision
        if self.data is None:
            raise ValueError("a refit needs windows")
        refitter = Refitter(
            self.data, max_bytes=self.max_bytes, track=self.track, pull=decision.refit_pull
        )
        with self.phases(REFIT):
            operations = decision.operations
            store = None if self.store is None else self.store(operations)
            tensors = refitter(view, decision.refit, operations, decision.tensors, store)
        return replace(decision, tensors=tensors)
