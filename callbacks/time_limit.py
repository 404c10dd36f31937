"""Ends a compensation within a time, and plans its steps for it."""

import time
from typing import Any, Protocol, runtime_checkable

import lightning as L

from grasp_lightning import processes
from grasp_lightning.callbacks.progress import StepProgressBar
from grasp_lightning.data.datamodules import TrainingData

# The plan is made after this many steps, or this share of all steps or of the time, if sooner,
_MEASURED_STEPS = 10
_MEASURED_SHARE = 0.05
# but not before this many, the first of which is slow, unless they take this share of the time.
_LEAST_STEPS = 3
_LATEST_SHARE = 0.5
_PLANNED_SHARE = 0.95  # of the time; the rest is for slower steps and for checkpoints
_FORWARD = 1 / 3  # cost of validating a token, compared with training on it


@runtime_checkable
class _Planned(Protocol):
    """A module whose schedule follows a number of steps."""

    planned_steps: int | None


class TimeLimit(L.Callback):
    """Plans once how many steps fit into a time, and ends the training there.

    The first steps are timed. Their seconds per token, and the tokens of each later step, give the
    number of steps that fit, with validations, into 95 % of the time. The module's schedule then
    follows this number, and a checkpoint holds it, so a resumed training takes the same steps. If
    they take longer than planned, the training ends before a step that would not fit.

    Only time in training counts, validations and checkpoints included, even a validation before the
    first step. What an interrupted start did after its last checkpoint does not count. Rank 0
    decides for all processes.

    Args:
        seconds: The time.
        data: What is trained on.
        validate_every: Steps between validations, if there are any.

    Attributes:
        planned_steps: None until the steps are planned.
    """

    def __init__(self, seconds: float, data: TrainingData, validate_every: int | None) -> None:
        self._limit = seconds
        self._steps = data.steps()
        self._validate_every = validate_every
        validated = data.samples.validation.num_tokens
        self._validation_tokens = 0.0 if validate_every is None else _FORWARD * validated
        self._earlier = 0.0  # seconds of earlier starts
        self._begun: float | None = None
        self._step_begun = 0.0
        self._durations: list[float] = []
        self._has_ended = False
        self._reserved = 0.0  # seconds of the last validation
        self.planned_steps: int | None = None

    @property
    def seconds(self) -> float:
        """Seconds in training so far, over all starts."""
        return self._earlier + (0.0 if self._begun is None else time.monotonic() - self._begun)

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock: layer-local training needs the error before the first step."""
        self._begun = time.monotonic()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give the module its plan; end at once if the checkpoint was saved at the end."""
        self._give_plan(pl_module)
        trainer.should_stop |= self._has_ended
        self._show(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Start the clock, unless it runs."""
        self._step_begun = time.monotonic()
        if self._begun is None:
            self._begun = self._step_begun

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Plan the steps when enough were timed, and end after the last one that fits."""
        own = self.seconds, time.monotonic() - self._step_begun
        seconds, duration = processes.gather(own)[0]
        done = batch_idx + 1
        if self.planned_steps is None:
            self._durations.append(duration)
            if self._can_plan(done, seconds / self._limit):
                self.planned_steps = self._plan(done, seconds)
                self._give_plan(pl_module)
                self._show(trainer)
        is_done = self.planned_steps is not None and done >= self.planned_steps
        self._has_ended = is_done or seconds + duration + self._reserved > self._limit
        trainer.should_stop |= self._has_ended

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock."""
        self._earlier, self._begun = self.seconds, None

    def _give_plan(self, module: L.LightningModule) -> None:
        assert isinstance(module, _Planned)  # every module that is trained for a time
        module.planned_steps = self.planned_steps

    def _can_plan(self, done: int, share: float) -> bool:
        """Return whether enough steps were timed, or a large share of the time is over."""
        enough = min(_MEASURED_STEPS, _MEASURED_SHARE * len(self._steps))
        is_enough = done >= enough or share >= _MEASURED_SHARE
        least = min(_LEAST_STEPS, len(self._steps))
        return (is_enough and done >= least) or share >= _LATEST_SHARE

    def _plan(self, done: int, seconds: float) -> int:
        """Return how many steps fit into the time, those that are done included."""
        # The first step also prepares what later ones use.
        timed = range(1, done) if done > 1 else range(1)
        tokens = sum(self._steps.num_tokens(step) for step in timed)
        per_token = sum(self._durations[step] for step in timed) / max(tokens, 1)
        # The last step is validated, wherever it is.
        self._reserved = per_token * self._validation_tokens
        left = _PLANNED_SHARE * self._limit - seconds - self._reserved
        planned = done
        while planned < len(self._steps):
            cost = per_token * self._steps.num_tokens(planned)
            if self._validate_every is not None and (planned + 1) % self._validate_every == 0:
                cost += self._reserved
            if cost > left:
                break
            left -= cost
            planned += 1
        return planned

    def _show(self, trainer: L.Trainer) -> None:
        bar = trainer.progress_bar_callback
        if isinstance(bar, StepProgressBar) and self.planned_steps is not None:
            bar.expect(self.planned_steps)

    def state_dict(self) -> dict[str, Any]:  # Any: Lightning's own type
        """Return the plan, or the times that it will be made from, and the seconds so far."""
        return {
            "seconds": self.seconds,
            "durations": self._durations,
            "planned_steps": self.planned_steps,
            "reserved": self._reserved,
            "has_ended": self._has_ended,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:  # Any: Lightning's own type
        """Continue with the time that is left."""
        self._earlier = state_dict["seconds"]
        self._durations = list(state_dict["durations"])
        self.planned_steps = state_dict["planned_steps"]
        self._reserved = state_dict["reserved"]
        self._has_ended = state_dict["has_ended"]
