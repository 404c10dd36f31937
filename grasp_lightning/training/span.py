"""The training of one decoder layer to compute what a span of layers computes.

Legend: B windows of T tokens, D hidden size.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from transformers import get_scheduler

from grasp_lightning import processes
from grasp_lightning.data.datamodules import CalibrationData
from grasp_lightning.data.steps import WindowSteps
from grasp_lightning.errors import NumericsError
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.integrity import nan_advice
from grasp_lightning.stats.base import SpanTraining
from grasp_lightning.training.checkpoints import check_checkpoint
from grasp_lightning.training.layer_streams import HiddenStates, LayerRunner

VALIDATION_ERROR: Final = "validation_squared_error"
WEIGHT_DECAY: Final = 1e-3
LAST_RATE: Final = 0.025  # share of the first learning rate: 2e-4 falls to 5e-6
GRADIENT_CLIP: Final = 1.0
_VALIDATION = 10  # of so many windows, one is set aside
_ENTERING, _LEAVING = "entering", "leaving"
_FINGERPRINT, _BEST = "grasp_lightning_fingerprint", "grasp_lightning_best"

RunLayer = Callable[[Mapping[str, Tensor], Tensor, Mapping[str, Tensor]], Tensor]


def first_weights(view: DecoderView, span: SpanTraining) -> dict[str, Tensor]:
    """Return the parameters of a span's first layer that are trained, by full name."""
    layer, name = view.layer(span.layers[0]), f"{view.layers_name}.{span.layers[0]}"
    return {f"{name}.{key}": layer.get_parameter(key).detach() for key in span.parameters}


class SpanData:
    """Hidden states around a span, for this process's share of the calibration windows.

    One window of ten, chosen by the seed, is set aside for validation; a single window is only
    trained on.

    Args:
        hidden: Stores the hidden states.

    Attributes:
        steps: The windows of every step, over all processes.
        validation: This process's windows for validation, in equally many batches for all
            processes; surplus ones are empty.
    """

    def __init__(self, data: CalibrationData, span: SpanTraining, hidden: HiddenStates) -> None:
        self.windows, self._size = data.windows, data.batch_size
        self._span, self._hidden = span, hidden
        number = len(self.windows)
        order = torch.randperm(number, generator=torch.Generator().manual_seed(data.seed)).tolist()
        set_aside = -(-number // _VALIDATION) if number > 1 else 0
        train, validation = sorted(order[set_aside:]), sorted(order[:set_aside])
        self.steps = WindowSteps(train, size=span.step_windows, epochs=span.epochs, seed=data.seed)
        self._own = frozenset(processes.own_share(train))
        shares = processes.own_batches(validation, self._size) if validation else []
        self.validation = [list(indices) if counts else [] for indices, counts in shares]
        told = {"span": str(span), **data.fingerprint}
        self.fingerprint = {k: hashlib.sha256(v.encode()).hexdigest() for k, v in told.items()}

    def batches(self) -> dict[int, list[int]]:
        """Return the windows of this process in numbered batches."""
        own = sorted({*self._own, *(index for part in self.validation for index in part)})
        return dict(enumerate(self._split(own)))

    def fill(self, runner: LayerRunner, numbers: Sequence[str]) -> None:
        """Store what enters and what leaves the span in some of the ``batches``."""
        rows = self.batches()
        chosen = {int(number): self.windows.batch(rows[int(number)]) for number in numbers}
        first, last = self._span.layers[0], self._span.layers[-1]
        for number, *states in runner.states_around(first, last, chosen):
            for name, hidden in zip((_ENTERING, _LEAVING), states, strict=True):
                for window, one in zip(rows[number], hidden.unbind(), strict=True):
                    self._hidden[name, window] = one[None].clone()

    def parts(
        self, windows: Sequence[int], *, trains: bool = True
    ) -> Iterator[tuple[dict[str, Tensor], Tensor, Tensor]]:
        """Yield this process's share of some windows in batches for one forward pass.

        Args:
            trains: The windows belong to a step, not to a batch for validation.

        Yields:
            A batch, and what enters and leaves the span in it, each ``(B, T, D)``.
        """
        own = [window for window in windows if window in self._own or not trains]
        for part in self._split(own):
            entering, leaving = (
                torch.cat([self._hidden[name, window] for window in part])
                for name in (_ENTERING, _LEAVING)
            )
            yield self.windows.batch(part), entering, leaving

    def num_tokens(self, windows: Sequence[int]) -> int:
        """Return the number of real tokens of some windows."""
        return int(self.windows.mask[list(windows)].sum())

    def _split(self, windows: Sequence[int]) -> list[list[int]]:
        return [list(windows[i : i + self._size]) for i in range(0, len(windows), self._size)]


class SpanModule(L.LightningModule):
    """Trains the first layer of a span: the mean squared error to what leaves the span.

    The error is averaged over real tokens and features. It is dominated by the few features with
    massive activations, as in the publication. The model computes in its own dtype, while the
    trained weights are kept in at least float32. Every process takes its share of a step's windows,
    gradients are summed over processes, and all of them make the same step.

    The weights with the lowest error on the windows set aside are kept, and those before the first
    step count too. A checkpoint holds the trained weights and a copy of the best ones.

    Source: Chen et al., "Streamlining Redundant Layers to Compress Large Language Models",
    arXiv:2403.19135: loss, AdamW, weight decay, and the cosine from 2e-4 to 5e-6. Gradient clipping
    and the number of epochs are ours.

    Args:
        view: The model, frozen, with the removals of the span in place.
        run: Runs the layer with given values of its parameters.
    """

    def __init__(
        self, view: DecoderView, span: SpanTraining, data: SpanData, run: RunLayer
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self._span, self._data, self._run = span, data, run
        first = first_weights(view, span)
        self._dtypes = {name: weight.dtype for name, weight in first.items()}
        self.weights = nn.ParameterList(
            w.to(torch.promote_types(w.dtype, torch.float32), copy=True) for w in first.values()
        )
        self._best: tuple[float, list[Tensor]] | None = None
        self._sums: dict[str, Tensor] = {}

    def trained(self) -> dict[str, Tensor]:
        """Return the best weights by full name, in the dtype of the model, on the CPU."""
        weights = self.weights if self._best is None else self._best[1]
        return {n: w.cpu() for n, w in self._as_used(weights).items()}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW with a cosine schedule."""
        optimizer = torch.optim.AdamW(
            self.weights, lr=self._span.learning_rate, weight_decay=WEIGHT_DECAY
        )
        scheduler = get_scheduler(
            "cosine_with_min_lr",
            optimizer,
            num_warmup_steps=0,
            num_training_steps=len(self._data.steps),
            scheduler_specific_kwargs={"min_lr_rate": LAST_RATE},
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler}}

    def training_step(self, windows: list[int], batch_idx: int) -> None:
        """Take one optimizer step.

        Args:
            windows: Numbers of the step's windows, over all processes.

        Raises:
            NumericsError: If the error is NaN or infinite.
        """
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)  # there is one
        optimizer.zero_grad()
        num_tokens = max(self._data.num_tokens(windows), 1)
        total = torch.zeros((), device=self.weights[0].device)
        for part in self._data.parts(windows):
            error = self._error(*part) / num_tokens
            self.manual_backward(error)
            total += error.detach()
        gradients = {
            str(i): torch.zeros_like(w) if w.grad is None else w.grad
            for i, w in enumerate(self.weights)
        }
        summed = processes.summed({**gradients, "total": total})
        if not summed["total"].isfinite():
            advice = nan_advice(next(iter(self._dtypes.values())), "lower method.learning_rate")
            raise NumericsError(
                f"the error of the trained layer is {float(summed['total'])} in step {batch_idx}; "
                f"{advice}"
            )
        for i, weight in enumerate(self.weights):
            weight.grad = summed[str(i)]
        nn.utils.clip_grad_norm_(self.weights, GRADIENT_CLIP)
        optimizer.step()
        scheduler: Any = self.lr_schedulers()  # Any: Lightning's type allows lists and plateaus
        scheduler.step()
        self.log("squared_error", summed["total"], prog_bar=True, batch_size=len(windows))

    def on_validation_epoch_start(self) -> None:
        """Start a new mean."""
        names = ("error", "tokens")
        self._sums = {name: torch.zeros((), dtype=torch.float64) for name in names}

    def validation_step(self, windows: list[int], batch_idx: int) -> None:
        """Add the error of one batch, which may be empty."""
        del batch_idx
        for part in self._data.parts(windows, trains=False):
            self._sums["error"] += self._error(*part).double().cpu()
        self._sums["tokens"] += self._data.num_tokens(windows)

    def on_validation_epoch_end(self) -> None:
        """Copy the weights if their error is the lowest so far."""
        sums = processes.summed(self._sums)
        error = float(sums["error"] / sums["tokens"])
        if self._best is None or error < self._best[0]:
            self._best = error, [weight.detach().clone() for weight in self.weights]
        self.log(VALIDATION_ERROR, error, prog_bar=True, batch_size=1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:  # Any: Lightning's own type
        """Add the best weights, and what identifies this training."""
        checkpoint[_FINGERPRINT] = self._data.fingerprint
        checkpoint[_BEST] = self._best

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:  # Any: Lightning's own type
        """Take the best weights; another training is refused, see ``check_checkpoint``."""
        shapes = {name: tuple(weight.shape) for name, weight in self.state_dict().items()}
        stored, path = checkpoint.get(_FINGERPRINT, {}), self.trainer.ckpt_path
        check_checkpoint(checkpoint, stored, self._data.fingerprint, shapes, path)
        if checkpoint[_BEST] is not None:
            error, weights = checkpoint[_BEST]
            self._best = error, [w.to(own) for w, own in zip(weights, self.weights, strict=True)]

    def _error(self, batch: Mapping[str, Tensor], entering: Tensor, leaving: Tensor) -> Tensor:
        """Return the squared error, averaged over features and summed over real tokens."""
        found = self._run(batch, entering, self._as_used(self.weights))
        squares = (found.float() - leaving.float()).square().mean(dim=-1)  # (B, T)
        return torch.where(batch["mask"].to(squares.device), squares, 0.0).sum()

    def _as_used(self, weights: Sequence[Tensor] | nn.ParameterList) -> dict[str, Tensor]:
        """Return weights in the dtype of the model, by full name."""
        pairs = zip(self._dtypes.items(), weights, strict=True)
        return {name: weight.to(dtype) for (name, dtype), weight in pairs}
