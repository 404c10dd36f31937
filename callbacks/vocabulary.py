"""Sums up gradients and hidden states at both ends of a model over the windows of a pass."""

from contextlib import AbstractContextManager

import torch

from grasp_lightning.callbacks.moments import MomentMeasurement
from grasp_lightning.data.windows import TokenWindows
from grasp_lightning.linalg.row_groups import smoothed_frequencies
from grasp_lightning.stats.base import Step
from grasp_lightning.stats.vocabulary import VocabularyObserver, VocabularySums
from grasp_lightning.training.calibration import CalibrationModule


class VocabularyMoments(MomentMeasurement[VocabularySums]):
    """Measures how much rows of embedding and head matter.

    Args:
        step: A step that needs ``vocabulary``.
        windows: All calibration windows.
        num_tried: Number of windows at the start on which factors are tried. They do not decide on
            the groups if there are others.
        corpus: How often a larger text holds each token, ``(V,)``; None without one.
    """

    def __init__(
        self, step: Step, windows: TokenWindows, num_tried: int, corpus: torch.Tensor | None = None
    ) -> None:
        super().__init__(step)
        self._windows = windows
        self._counted = slice(num_tried % len(windows), None)
        self._corpus = corpus

    def observe(self, module: CalibrationModule, step: Step) -> AbstractContextManager[None]:
        """Return the hooks on embedding and head."""
        view, names = module.view, step.needs.vocabulary
        assert names is not None  # the caller only asks in that case
        size, features = view.module(names.embedding).get_parameter("weight").shape
        ids, mask = self._windows.input_ids, self._windows.mask
        counts, grouping = (
            torch.bincount(ids[part][mask[part]], minlength=size)
            for part in (slice(None), self._counted)
        )
        frequencies = smoothed_frequencies(grouping, self._corpus)
        self._sums = VocabularySums(names, counts, frequencies, features, view.model.device)
        self._num_tokens = 0
        return VocabularyObserver(view, names, self._sums).attached()
