"""Training of decoder layers on hidden states alone: its windows, and its LightningModule.

Legend: B windows of T tokens, D hidden size.
"""

import hashlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Final

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn

from grasp_lightning import processes
from grasp_lightning.data.steps import ResumableSteps
from grasp_lightning.errors import NumericsError
from grasp_lightning.models.integrity import nan_advice
from grasp_lightning.training.checkpoints import check_checkpoint
from grasp_lightning.training.layer_streams import HiddenStates

ENTERING: Final = "entering"  # hidden states that enter the trained layers
LEAVING: Final = "leaving"  # hidden states that should leave them
_FINGERPRINT, _BEST = "grasp_lightning_fingerprint", "grasp_lightning_best"

RunLayers = Callable[[Mapping[str, Tensor], Tensor, Mapping[str, Tensor]], Tensor]
"""Batch, hidden states ``(B, T, D)``, parameters by full name -> hidden states ``(B, T, D)``."""


class LayerData(ABC):
    """Windows of this process, each with the hidden states ``ENTERING`` and ``LEAVING``.

    Every process keeps its own windows from the start to the end of the training.

    Args:
        train: Numbers of the windows to train on, over all processes.
        validation: Numbers of other windows.
        size: Windows per forward pass.
        hidden: Stores the hidden states.
        told: What identifies the training.

    Attributes:
        steps: The windows of every step, over all processes.
        validation: This process's windows for validation, in equally many batches for all
            processes; surplus ones are empty.
        fingerprint: Hashes of ``told``.
    """

    steps: ResumableSteps[list[int]]

    def __init__(
        self,
        train: Sequence[int],
        validation: Sequence[int],
        size: int,
        hidden: HiddenStates,
        told: Mapping[str, str],
    ) -> None:
        self._size = size
        self._hidden = hidden
        self._own = frozenset(processes.own_share(train))
        shares = processes.own_batches(validation, size) if validation else []
        self.validation = [list(indices) if counts else [] for indices, counts in shares]
        self.fingerprint = {k: hashlib.sha256(v.encode()).hexdigest() for k, v in told.items()}

    @abstractmethod
    def batch(self, windows: Sequence[int]) -> dict[str, Tensor]:
        """Return some windows as ``input_ids`` and ``mask``, ``(B, T)``."""

    @abstractmethod
    def num_tokens(self, windows: Sequence[int]) -> int:
        """Return the number of real tokens of some windows."""

    def batches(self) -> dict[int, list[int]]:
        """Return the windows of this process in numbered batches."""
        own = sorted({*self._own, *(index for part in self.validation for index in part)})
        return dict(enumerate(self._split(own)))

    def parts(
        self, windows: Sequence[int], *, trains: bool = True
    ) -> Iterator[tuple[dict[str, Tensor], Tensor, Tensor]]:
        """Yield this process's share of some windows in batches for one forward pass.

        Args:
            trains: The windows belong to a step, not to a batch for validation.

        Yields:
            A batch, and what enters and should leave the layers in it, each ``(B, T, D)``.
        """
        own = [window for window in windows if window in self._own or not trains]
        for part in self._split(own):
            yield self.batch(part), self.states(ENTERING, part), self.states(LEAVING, part)

    def states(self, name: str, windows: Sequence[int]) -> Tensor:
        """Return a copy of the hidden states of some windows, ``(B, T, D)``."""
        return torch.cat([self._hidden[name, window] for window in windows])

    def keep(self, name: str, windows: Sequence[int], hidden: Tensor) -> None:
        """Store a copy of the hidden states of some windows, ``(B, T, D)``."""
        for window, one in zip(windows, hidden.unbind(), strict=True):
            self._hidden[name, window] = one[None].clone()

    def _split(self, windows: Sequence[int]) -> list[list[int]]:
        return [list(windows[i : i + self._size]) for i in range(0, len(windows), self._size)]


class LayerModule(L.LightningModule, ABC):
    """Trains parameters of decoder layers to give one hidden state from another.

    The model computes in its own dtype, while the trained weights are kept in at least float32.
    Every process takes its share of a step's windows, gradients are summed over processes, and all
    of them make the same step. A checkpoint holds the trained weights and a copy of the best ones.

    Args:
        first: The parameters before training, by full name.
        data: Windows with hidden states.
        run: Runs the layers with given values of their parameters.
        clip: Maximum norm of the whole gradient; None does not clip.
        keeps_best: Whether to keep the weights with the lowest error on the windows set aside.
    """

    error_name: ClassVar[str]
    validation_name: ClassVar[str]
    rate_key: ClassVar[str]

    def __init__(
        self,
        first: Mapping[str, Tensor],
        data: LayerData,
        run: RunLayers,
        *,
        clip: float | None,
        keeps_best: bool,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self._data, self._run, self._clip, self._keeps_best = data, run, clip, keeps_best
        self._dtypes = {name: weight.dtype for name, weight in first.items()}
        self.weights = nn.ParameterList(
            w.to(torch.promote_types(w.dtype, torch.float32), copy=True) for w in first.values()
        )
        self._best: tuple[float, list[Tensor]] | None = None
        self._sums: dict[str, Tensor] = {}

    def trained(self) -> dict[str, Tensor]:
        """Return the kept weights by full name, in the dtype of the model, on the CPU."""
        weights = self.weights if self._best is None else self._best[1]
        return {n: w.detach().cpu() for n, w in self._as_used(weights).items()}

    @abstractmethod
    def token_errors(self, found: Tensor, expected: Tensor) -> Tensor:
        """Return the error of hidden states at each token, ``(B, T, D)`` -> ``(B, T)``."""

    def training_step(self, windows: list[int], batch_idx: int) -> dict[str, Tensor | float]:
        """Take one optimizer step.

        Args:
            windows: Numbers of the step's windows, over all processes.

        Returns:
            ``loss``, the mean error over the tokens of all processes, ``learning_rate`` and
            ``tokens_per_second``.

        Raises:
            NumericsError: If the error is NaN or infinite.
        """
        start = time.perf_counter()
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
            advice = nan_advice(next(iter(self._dtypes.values())), f"lower {self.rate_key}")
            raise NumericsError(
                f"the error of the trained layer is {float(summed['total'])} in step {batch_idx}; "
                f"{advice}"
            )
        for i, weight in enumerate(self.weights):
            weight.grad = summed[str(i)]
        if self._clip is not None:
            nn.utils.clip_grad_norm_(self.weights, self._clip)
        optimizer.step()
        scheduler: Any = self.lr_schedulers()  # Any: Lightning's type allows lists and plateaus
        rate = float(scheduler.get_last_lr()[0])
        scheduler.step()
        self.log(self.error_name, summed["total"], prog_bar=True, batch_size=len(windows))
        speed = num_tokens / (time.perf_counter() - start)
        return {"loss": summed["total"], "learning_rate": rate, "tokens_per_second": speed}

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
        if self._keeps_best and (self._best is None or error < self._best[0]):
            self._best = error, [weight.detach().clone() for weight in self.weights]
        self.log(self.validation_name, error, prog_bar=True, batch_size=1)

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
        """Return the error, summed over real tokens."""
        found = self._run(batch, entering, self._as_used(self.weights)).float()
        errors = self.token_errors(found, leaving.to(found))
        return torch.where(batch["mask"].to(errors.device), errors, 0.0).sum()

    def _as_used(self, weights: Sequence[Tensor] | nn.ParameterList) -> dict[str, Tensor]:
        """Return weights in the dtype of the model, by full name."""
        pairs = zip(self._dtypes.items(), weights, strict=True)
        return {name: weight.to(dtype) for (name, dtype), weight in pairs}
