"""Scores parts of a model by gradients, in as many passes as the memory of these requires."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from grasp_lightning.callbacks.calibration_checkpoint import GroupStore
from grasp_lightning.callbacks.measurement import Measurement
from grasp_lightning.progress import expect_passes, skip_pass
from grasp_lightning.stats.base import Step
from grasp_lightning.training.calibration import Batch, CalibrationModule

_NUM_TARGETS = "num_targets"


class Observer(Protocol):
    """Hooks on a model."""

    def attached(self) -> AbstractContextManager[None]:
        """Hook the model during a ``with`` block."""


class Gradients(Protocol):
    """Sums of gradients that an observer of the model adds up."""

    @property
    def observer(self) -> Observer:
        """The hooks."""

    def check_seen(self) -> None:
        """Refuse parameters that the hooks cannot see."""

    def state(self) -> dict[str, Tensor]:
        """Return the sums so far."""

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore sums from ``state``."""


G = TypeVar("G", bound=Gradients)
Group = TypeVar("Group")


class GradientScores(Measurement, Generic[G]):
    """A measurement of a given step whose sums are in what ``gradients`` makes."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self._given: Step | None = step
        self._gradients: G  # set while hooks are attached
        self._num_targets = 0

    @abstractmethod
    def gradients(self, module: CalibrationModule, step: Step) -> G:
        """Return empty sums."""

    def next_step(self, module: CalibrationModule) -> Step | None:
        """Return the given step."""
        del module
        return self._given

    def observe(self, module: CalibrationModule, step: Step) -> AbstractContextManager[None]:
        """Return the hooks of the sums."""
        self._gradients = self.gradients(module, step)
        self._num_targets = 0
        return self._gradients.observer.attached()

    def start_batch(self, batch: Batch) -> None:
        """Count the predicted tokens."""
        self._num_targets += int(batch["targets"][:, 1:].sum())

    def check_seen(self) -> None:
        """Refuse parameters that the hooks cannot see."""
        self._gradients.check_seen()

    def release(self) -> None:
        """Release the sums."""
        del self._gradients
        self._given = None

    def sums(self) -> dict[str, Tensor]:
        """Return the sums, and the number of predicted tokens."""
        return {**self._gradients.state(), _NUM_TARGETS: torch.tensor(self._num_targets)}

    def load_sums(self, sums: Mapping[str, Tensor]) -> None:
        """Continue from sums over earlier windows."""
        self._gradients.load_state(sums)
        self._num_targets = int(sums[_NUM_TARGETS])


def in_groups(
    groups: Sequence[Group],
    measure: Callable[[Group, int], Mapping[str, Tensor]],
    store: GroupStore | None,
) -> Iterator[tuple[Group, Mapping[str, Tensor]]]:
    """Yield each group with its scores, measured one group per pass.

    Args:
        groups: Parts whose summed gradients fit into memory.
        measure: Scores a group in a pass; its second argument tells passes apart.
        store: Keeps finished groups; None keeps none.
    """
    expect_passes(len(groups))
    for number, group in enumerate(groups):
        kept: Mapping[str, Tensor] | None = None if store is None else store.load(number)
        if kept is None:
            kept = measure(group, number)
            if store is not None:
                store.save(number, kept)
        else:
            skip_pass()
        yield group, kept
