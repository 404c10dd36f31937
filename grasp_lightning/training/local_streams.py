"""Hidden states of the dense and the compressed model, moved from layer to layer side by side.

Legend: B windows of T tokens, D hidden size.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from grasp_lightning import processes
from grasp_lightning.data.batching import collate
from grasp_lightning.data.datamodules import TrainingData
from grasp_lightning.data.steps import ResumableSteps
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.streamed import holding_all
from grasp_lightning.training.layer_streams import HiddenStates, LayerRunner
from grasp_lightning.training.layer_training import ENTERING, LEAVING, LayerData, RunLayers
from grasp_lightning.training.local_stages import LocalStage


class _WindowsOfSteps(ResumableSteps[list[int]]):
    """The windows of every optimizer step, the same for each stage."""

    def __init__(self, data: TrainingData) -> None:
        super().__init__()
        self._steps = data.steps()

    def __len__(self) -> int:
        return len(self._steps)

    def step(self, number: int) -> list[int]:
        """Return the numbers of the windows of a step."""
        return [window for row in self._steps.rows(number) for window in row]


class LocalData(LayerData):
    """Windows of one length, with the hidden states of both models at the present depth.

    ``ENTERING`` belong to the compressed model, ``LEAVING`` to the dense one. The numbers of
    windows for validation follow those of the windows to train on.

    Args:
        data: The windows.
        hidden: Stores the hidden states.
        validates: Whether it holds the windows for validation.
        trains: Whether it holds the windows to train on.
    """

    def __init__(
        self, data: TrainingData, hidden: HiddenStates, *, validates: bool, trains: bool = True
    ) -> None:
        self._train, self._set_aside = data.samples.train, data.samples.validation
        number = len(self._train)
        train = range(number) if trains else ()
        validation = range(number, number + len(self._set_aside)) if validates else ()
        size = data.training.micro_batch_size
        super().__init__(train, validation, size, hidden, data.fingerprint)
        self._windows = data
        self.restart("")

    def restart(self, stage: str) -> None:
        """Begin with the first step again, for the stage of this description."""
        self.steps = _WindowsOfSteps(self._windows)
        self.fingerprint["layers"] = stage

    def batch(self, windows: Sequence[int]) -> dict[str, Tensor]:
        """Return some windows, all to train on or all for validation, as one batch."""
        number = len(self._train)
        if windows[0] < number:
            return collate(self._train, [[window] for window in windows])
        return collate(self._set_aside, [[window - number] for window in windows])

    def num_tokens(self, windows: Sequence[int]) -> int:
        """Return the number of tokens of some windows."""
        lengths = torch.cat([self._train.lengths, self._set_aside.lengths])
        return int(lengths[list(windows)].sum())

    def batches(self) -> dict[int, list[int]]:
        """Return the windows of this process in numbered batches, by their kind."""
        train, validation = sorted(self._own), [w for part in self.validation for w in part]
        return dict(enumerate([*self._split(train), *self._split(validation)]))

    def trains(self, window: int) -> bool:
        """Return whether a window is trained on."""
        return window < len(self._train)


class PairedStreams:
    """Moves the hidden states of the dense and the compressed model from layer to layer.

    Only the present depth is stored. Both models run one stage at a time. Of a streamed model, only
    the layers of this stage have their weights.
    """

    def __init__(self, dense: DecoderView, compressed: DecoderView, data: LocalData) -> None:
        self._data = data
        self._rows = data.batches()
        self._batches = {number: data.batch(rows) for number, rows in self._rows.items()}
        self._dense, self._compressed = _Side(dense), _Side(compressed)
        for name, side in ((ENTERING, self._compressed), (LEAVING, self._dense)):
            for number, hidden in side.runner.inputs_of(0, self._batches):
                data.keep(name, self._rows[number], hidden)

    @contextmanager
    def with_weights(self, stage: LocalStage) -> Iterator[RunLayers]:
        """Run a stage of the compressed model with given parameters during a ``with`` block."""
        with (
            self._compressed.holding(stage.first, stage.last),
            self._compressed.runner.with_weights(stage.first, stage.last) as run,
        ):
            yield run

    def advance_dense(self, stage: LocalStage) -> float:
        """Move those of the dense model to the end of a stage; return their mean square.

        It is the mean over the features of all tokens to train on, over all processes.
        """
        sums = {name: torch.zeros((), dtype=torch.float64) for name in ("squares", "tokens")}
        for rows, hidden in self._advance(
            self._dense, LEAVING, stage.dense_first, stage.dense_last
        ):
            if self._data.trains(rows[0]):
                sums["squares"] += hidden.double().square().mean(-1).sum().cpu()
                sums["tokens"] += self._data.num_tokens(rows)
        sums = processes.summed(sums)
        return float(sums["squares"] / sums["tokens"].clamp_min(1))

    def agree(self, stage: LocalStage) -> bool:
        """Return whether a stage gives exactly the dense hidden states, so that it has no error.

        The dense ones must have been moved to its end. They count as equal if they are so in the
        dtype of the compressed model. All processes must call this.
        """
        with self._compressed.running(stage.first, stage.last) as run:
            pairs = (
                (run(batch, self._data.states(ENTERING, rows)), self._data.states(LEAVING, rows))
                for batch, rows in zip(self._batches.values(), self._rows.values(), strict=True)
            )
            is_equal = all(torch.equal(found, expected.to(found)) for found, expected in pairs)
        return all(processes.gather(is_equal))

    def advance_compressed(self, stage: LocalStage) -> None:
        """Move those of the compressed model through a stage."""
        for _ in self._advance(self._compressed, ENTERING, stage.first, stage.last):
            pass

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the hidden states of the compressed and of the dense model, each ``(B, T, D)``."""
        for rows in self._rows.values():
            yield self._data.states(ENTERING, rows), self._data.states(LEAVING, rows)

    def _advance(
        self, side: "_Side", name: str, first: int, last: int
    ) -> Iterator[tuple[list[int], Tensor]]:
        with side.running(first, last, last + 1) as run:
            for number, batch in self._batches.items():
                rows = self._rows[number]
                hidden = run(batch, self._data.states(name, rows))
                self._data.keep(name, rows, hidden)
                yield rows, hidden


class _Side:
    """One of the two models."""

    def __init__(self, view: DecoderView) -> None:
        self.runner = LayerRunner(view)
        self._view = view

    @contextmanager
    def holding(self, first: int, last: int, following: int | None = None) -> Iterator[None]:
        """Keep the weights of some layers, and read those of the following one, if there is one."""
        after = following if following in self._view.layer_indices else None
        with holding_all(self._view.model, first, last, after):
            yield

    @contextmanager
    def running(
        self, first: int, last: int, following: int | None = None
    ) -> Iterator[Callable[[Mapping[str, Tensor], Tensor], Tensor]]:
        """Hold some layers, and run them alone as ``LayerRunner.only``."""
        with self.holding(first, last, following), self.runner.only(first, last) as run:
            yield run
