"""Sums up gradients and hidden states at both ends of a model over the windows of a pass."""

from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from grasp_lightning.callbacks.measurement import Measurement
from grasp_lightning.data.windows import TokenWindows
from grasp_lightning.stats.base import Statistics, Step
from grasp_lightning.stats.vocabulary import VocabularyObserver, VocabularySums
from grasp_lightning.training.calibration import Batch, CalibrationModule

_NUM_TOKENS = "num_tokens"


class VocabularyMoments(Measurement):
    """Measures how much rows of embedding and head matter, as a step of a method requires.

    Args:
        step: A step that needs ``vocabulary``.
        windows: All calibration windows, whose tokens are counted.
    """

    def __init__(self, step: Step, windows: TokenWindows) -> None:
        super().__init__()
        self._given: Step | None = step
        self._tokens = windows.input_ids[windows.mask]
        self._sums: VocabularySums  # set while hooks are attached
        self._num_tokens = 0

    def next_step(self, module: CalibrationModule) -> Step | None:
        """Return the given step."""
        del module
        return self._given

    def observe(self, module: CalibrationModule, step: Step) -> AbstractContextManager[None]:
        """Return the hooks on embedding and head."""
        view, names = module.view, step.needs.vocabulary
        assert names is not None  # the caller only asks in that case
        size, features = view.module(names.embedding).get_parameter("weight").shape
        counts = torch.bincount(self._tokens, minlength=size)
        self._sums = VocabularySums(names, counts, features, view.model.device)
        self._num_tokens = 0
        return VocabularyObserver(view, names, self._sums).attached()

    def start_batch(self, batch: Batch) -> None:
        """Count the tokens."""
        self._num_tokens += int(batch["mask"].sum())

    def check_seen(self) -> None:
        """Refuse an end that the model does not call."""
        self._sums.check_seen()

    def release(self) -> None:
        """Release the sums."""
        del self._sums
        self._given = None

    def sums(self) -> dict[str, Tensor]:
        """Return the sums of both ends, and the number of tokens."""
        return {**self._sums.state(), _NUM_TOKENS: torch.tensor(self._num_tokens)}

    def load_sums(self, sums: Mapping[str, Tensor]) -> None:
        """Continue from sums over earlier windows."""
        self._sums.load_state(sums)
        self._num_tokens = int(sums[_NUM_TOKENS])

    def statistics(self) -> Statistics:
        """Return the moments of all tokens and of each group."""
        return Statistics(moments=self._sums.mean(self._num_tokens))
