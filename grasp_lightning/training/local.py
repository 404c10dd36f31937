"""Layer-local training: each layer learns the dense model's hidden state from its own input.

Legend: B windows of T tokens, D hidden size.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import NamedTuple

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from grasp_lightning import processes
from grasp_lightning.config import LocalScale, OptimizerConfig
from grasp_lightning.data.batching import collate
from grasp_lightning.data.datamodules import TrainingData
from grasp_lightning.data.steps import ResumableSteps
from grasp_lightning.errors import ModelError
from grasp_lightning.models.calls import hidden_output
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.next_token import forward_inputs
from grasp_lightning.plan import AddSeam, Plan
from grasp_lightning.training.compensation import VALIDATION_LOSS
from grasp_lightning.training.compensation.optimizer import make_optimizer, rate_share
from grasp_lightning.training.layer_streams import HiddenStates, LayerRunner
from grasp_lightning.training.layer_training import (
    ENTERING,
    LEAVING,
    LayerData,
    LayerModule,
    RunLayers,
)

_LEAST = 1e-30  # a mean square that cannot be divided by


class LocalStage(NamedTuple):
    """Contiguous layers of the compressed model that are trained together.

    Attributes:
        first: The first of them.
        last: The last of them.
        dense_first: The first layer of the dense model that they stand for.
        dense_last: The last one, whose output they learn.
    """

    first: int
    last: int
    dense_first: int
    dense_last: int


def local_stages(
    num_layers: int, num_dense: int, plan: Plan | None, layers_at_once: int
) -> list[LocalStage]:
    """Return the stages of a layer-local training, from the bottom.

    A layer stands for itself and for the deleted layers above it, up to the next remaining one. If
    that one holds a seam for them, the seam stands for them, so the layer stands for itself.

    Args:
        num_layers: Number of decoder layers of the compressed model.
        num_dense: Number of decoder layers of the dense model.
        plan: The plan that deleted layers; None if it is unknown.
        layers_at_once: Number of layers that are trained together.

    Raises:
        ModelError: If the numbers of layers do not fit together.
    """
    operations = () if plan is None else plan.operations
    gone = {index for operation in operations for index in operation.dropped}
    if num_layers + len(gone) != num_dense:
        raise ModelError(
            f"objective: local cannot match the {num_layers} decoder layers of the model to the "
            f"{num_dense} of distillation.teacher: the plan.json beside the model's folder "
            f"{'is missing' if plan is None else f'deletes {len(gone)}'}; use the dense model that "
            "was compressed, and the model/ folder of its run"
        )
    held = {
        index
        for operation in operations
        if isinstance(operation, AddSeam) and not operation.is_after
        for index in operation.layers
    }
    kept = [index for index in range(num_dense) if index not in gone]
    ends = []
    for index, following in zip(kept, [*kept[1:], num_dense], strict=True):
        between = [layer for layer in range(index + 1, following) if layer not in held]
        ends.append(max(between, default=index))
    stages = []
    for first in range(0, num_layers, layers_at_once):
        last = min(first + layers_at_once, num_layers) - 1
        stages.append(LocalStage(first, last, ends[first - 1] + 1 if first else 0, ends[last]))
    return stages


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
        validates: Whether windows are validated during the training.
    """

    def __init__(self, data: TrainingData, hidden: HiddenStates, *, validates: bool) -> None:
        self._train, self._set_aside = data.samples.train, data.samples.validation
        number = len(self._train)
        validation = range(number, number + len(self._set_aside)) if validates else ()
        size = data.training.micro_batch_size
        super().__init__(range(number), validation, size, hidden, data.fingerprint)
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

    Only the present depth is stored. Both models run one stage at a time.
    """

    def __init__(self, dense: DecoderView, compressed: DecoderView, data: LocalData) -> None:
        self._data = data
        self._rows = data.batches()
        self._batches = {number: data.batch(rows) for number, rows in self._rows.items()}
        self._dense, self._compressed = LayerRunner(dense), LayerRunner(compressed)
        for name, runner in ((ENTERING, self._compressed), (LEAVING, self._dense)):
            for number, hidden in runner.inputs_of(0, self._batches):
                data.keep(name, self._rows[number], hidden)

    def with_weights(self, stage: LocalStage) -> AbstractContextManager[RunLayers]:
        """Run a stage of the compressed model with given parameters during a ``with`` block."""
        return self._compressed.with_weights(stage.first, stage.last)

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
        return float(sums["squares"] / sums["tokens"])

    def agree(self, stage: LocalStage) -> bool:
        """Return whether a stage gives exactly the dense hidden states, so that it has no error.

        The dense ones must have been moved to its end. They count as equal if they are so in the
        dtype of the compressed model. All processes must call this.
        """
        with self._compressed.only(stage.first, stage.last) as run:
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

    def _advance(
        self, runner: LayerRunner, name: str, first: int, last: int
    ) -> Iterator[tuple[list[int], Tensor]]:
        with runner.only(first, last) as run:
            for number, batch in self._batches.items():
                rows = self._rows[number]
                hidden = run(batch, self._data.states(name, rows))
                self._data.keep(name, rows, hidden)
                yield rows, hidden


class LocalModule(LayerModule):
    """Trains the parameters of one stage on the normalised error of its hidden states.

    With ``h`` what leaves the stage in the dense model, ``g`` the same in the compressed one, given
    what its own trained layers below pass on, the loss is a mean over tokens t:

        scale layer:  L = mean_t |g_t - h_t|^2 / mean_t |h_t|^2
        scale token:  L = mean_t (|g_t - h_t|^2 / |h_t|^2)

    ``mean_t |h_t|^2`` is taken once over all tokens to train on, so that L is comparable between
    layers: 1 is the error of zeros. With ``layer``, the few tokens with massive activations weigh
    most; with ``token``, all tokens weigh the same.

    Source: Li et al., "BRECQ", arXiv:2102.05426, section 3.2: reconstruction of a block's output,
    one block after the other, from inputs of the compressed model; Yao et al., "ZeroQuant",
    arXiv:2206.01861, section 4.3: layer-by-layer distillation with the MSE. Both quantize. Here
    weights are trained that were factorised or narrowed, or all of a layer. BRECQ weights the error
    by the Fisher information, and ZeroQuant takes inputs of the original model: neither is done.

    Args:
        first: The parameters before training, by full name.
        data: Windows with hidden states.
        run: Runs the stage with given values of its parameters.
        optimizer: AdamW and its learning rate.
        mean_square: Mean square of the dense hidden states for scale ``layer``; None for ``token``.
        done: Number of optimizer steps of earlier stages, for loggers.
        is_limited: Whether a ``TimeLimit`` plans the steps, and with them the schedule.
        keeps_best: Whether to keep the weights with the lowest validated error.

    Attributes:
        planned_steps: Number of steps that a ``TimeLimit`` has planned; None before.
    """

    error_name = "loss"
    validation_name = VALIDATION_LOSS
    rate_key = "optimizer.learning_rate"

    def __init__(
        self,
        first: Mapping[str, Tensor],
        data: LocalData,
        run: RunLayers,
        optimizer: OptimizerConfig,
        *,
        mean_square: float | None,
        done: int = 0,
        is_limited: bool = False,
        keeps_best: bool = False,
    ) -> None:
        clip = optimizer.gradient_clip
        super().__init__(first, data, run, clip=clip, keeps_best=keeps_best)
        self.planned_steps: int | None = None
        self._optimizer, self._mean_square, self._done = optimizer, mean_square, done
        self._is_limited, self._num_steps = is_limited, len(data.steps)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW over the parameters, with a schedule by step."""
        optimizer = make_optimizer(self._optimizer, self.weights, is_sharded=False)

        def share(step: int) -> float:
            steps = self.planned_steps if self._is_limited else self._num_steps
            return rate_share(self._optimizer, step, steps, is_limited=self._is_limited)

        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, share)}}

    def training_step(self, windows: list[int], batch_idx: int) -> dict[str, Tensor | float]:
        """Take one optimizer step, and count it among those of all stages in the logs."""
        result = super().training_step(windows, batch_idx)
        step = {"step": float(self._done + batch_idx + 1), "learning_rate": result["learning_rate"]}
        self.log_dict(step, batch_size=len(windows))
        return result

    def token_errors(self, found: Tensor, expected: Tensor) -> Tensor:
        """Return the normalised squared error of each token."""
        squares = (found - expected).square().mean(dim=-1)
        if self._mean_square is not None:
            return squares / max(self._mean_square, _LEAST)
        return squares / expected.square().mean(dim=-1).clamp_min(_LEAST)


@torch.no_grad()
def stage_errors(
    dense: DecoderView,
    compressed: DecoderView,
    stages: Sequence[LocalStage],
    batches: Iterator[Mapping[str, Tensor]],
    scale: LocalScale,
) -> list[float]:
    """Return the normalised error of the hidden states after each stage, see ``LocalModule``.

    Both models run as a whole. The means are taken over all tokens of all processes' batches, which
    have no padding; all processes must call this.
    """
    sums = torch.zeros(len(stages), 2, dtype=torch.float64)  # of errors, and to divide them by
    expected: list[Tensor] = []

    def keep(_module: nn.Module, _args: object, output: object) -> None:
        expected.append(hidden_output(output).float())

    def compare(number: int, _module: nn.Module, _args: object, output: object) -> None:
        found = hidden_output(output).float()
        target = expected[number].to(found.device)
        errors, squares = (found - target).square().mean(-1), target.square().mean(-1)
        if scale == "token":
            errors, squares = errors / squares.clamp_min(_LEAST), torch.ones_like(squares)
        sums[number] += torch.stack([errors.double().sum(), squares.double().sum()]).cpu()

    with ExitStack() as hooks:
        for number, stage in enumerate(stages):
            layer, last = dense.layer(stage.dense_last), compressed.layer(stage.last)
            hooks.enter_context(layer.register_forward_hook(keep))
            hooks.enter_context(last.register_forward_hook(partial(compare, number)))
        for batch in batches:
            expected.clear()
            for view in (dense, compressed):
                inputs = {k: v.to(view.model.device) for k, v in forward_inputs(batch).items()}
                view.model.base_model(**inputs, use_cache=False)
    total = processes.summed({"sums": sums})["sums"]
    return [float(errors / max(squares, _LEAST)) for errors, squares in total]
