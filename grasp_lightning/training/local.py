"""Layer-local training: each layer learns the dense model's hidden state from its own input.

Legend: B windows of T tokens, D hidden size.
"""

from collections.abc import Iterable, Mapping

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from grasp_lightning import processes
from grasp_lightning.config import LocalScale, OptimizerConfig
from grasp_lightning.training.compensation import VALIDATION_LOSS
from grasp_lightning.training.compensation.optimizer import make_optimizer, rate_share
from grasp_lightning.training.layer_training import LayerModule, RunLayers
from grasp_lightning.training.local_stages import LocalStage
from grasp_lightning.training.local_streams import LocalData, PairedStreams

_LEAST = 1e-30  # a mean square that cannot be divided by


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
    streams: PairedStreams, stages: Iterable[LocalStage], scale: LocalScale
) -> list[float]:
    """Return the normalised error of the hidden states after each stage, see ``LocalModule``.

    The means are over all tokens of all processes' windows, which have no padding; all processes
    must call this. Afterwards, the hidden states are at the end of the last stage.
    """
    sums = []  # of errors, and of what they are divided by
    for stage in stages:
        streams.advance_dense(stage)
        streams.advance_compressed(stage)
        both = torch.zeros(2, dtype=torch.float64)
        for entering, leaving in streams.pairs():
            found, target = entering.float(), leaving.to(entering.device).float()
            errors, squares = (found - target).square().mean(-1), target.square().mean(-1)
            if scale == "token":
                errors, squares = errors / squares.clamp_min(_LEAST), torch.ones_like(squares)
            both += torch.stack([errors.double().sum(), squares.double().sum()]).cpu()
        sums.append(both)
    total = processes.summed({"sums": torch.stack(sums)})["sums"]
    return [float(errors / max(squares, _LEAST)) for errors, squares in total]
