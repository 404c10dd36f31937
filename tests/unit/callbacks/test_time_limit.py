"""A training in simulated time: every step takes as long as the test says."""

from pathlib import Path

import lightning as L
import pytest
import torch

from grasp_lightning.callbacks import TrainableParameters, TrainingHistory
from grasp_lightning.callbacks.time_limit import TimeLimit
from grasp_lightning.config import OptimizerConfig, TrainingConfig
from grasp_lightning.training.compensation import CompensationModule
from tests.unit.training.test_compensation_module import (
    GivenData,
    compressed,
    make_trainer,
    random_samples,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec"),
]
LIMIT = 40.0
OPTIMIZER = OptimizerConfig(learning_rate=0.01, warmup_steps=3)


class Clock(L.Callback):
    """Simulated time."""

    def __init__(self, seconds: float = 1.0, *, later: float | None = None) -> None:
        self.now = 0.0
        self._seconds = seconds
        self._later = seconds if later is None else later

    def __call__(self) -> float:
        return self.now

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: object
    ) -> None:
        del pl_module, optimizer
        self.now += self._seconds if trainer.global_step < 10 else self._later


class SlowTrial(L.Callback):
    """Takes 10 seconds of simulated time for the validation before the first step."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        del trainer, pl_module
        self._clock.now += 10


class Saving(L.Callback):
    """Saves a checkpoint after a step; the last callback, as in a run."""

    def __init__(self, step: int, file: Path) -> None:
        self._step = step
        self._file = file

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: object
    ) -> None:
        del pl_module, args
        if trainer.global_step == self._step:
            trainer.save_checkpoint(self._file, weights_only=False)


def trained(
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    *more: L.Callback,
    epochs: int = 100,
    checkpoint: Path | None = None,
    num_sanity_val_steps: int = 0,
) -> tuple[CompensationModule, TrainingHistory, TimeLimit]:
    """Train on samples of one length, one a step, and validate after every 20 steps."""
    monkeypatch.setattr("grasp_lightning.callbacks.time_limit.time.monotonic", clock)
    training = TrainingConfig(batch_size=1, micro_batch_size=1, epochs=epochs)
    data = GivenData(random_samples((9,)), random_samples((12, 12, 12)), training=training)
    module = CompensationModule(compressed(), OPTIMIZER, is_limited=True)
    limit, history = TimeLimit(LIMIT, data, 20), TrainingHistory()
    trainer = make_trainer(
        TrainableParameters("all"),
        history,
        limit,
        clock,
        *more,
        num_sanity_val_steps=num_sanity_val_steps,
        val_check_interval=20,
        check_val_every_n_epoch=None,
    )
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return module, history, limit


def test_steps_and_schedule_are_planned_from_the_first_steps_and_kept_by_a_resume(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "a.ckpt"
    module, history, limit = trained(Clock(), monkeypatch, Saving(15, file))
    # 95 % of 40 s, less (12 + 24) / 9 / 3 s for each of two validations.
    assert limit.planned_steps == len(history.steps) == 35
    assert [step for step, _ in history.validations] == [20, 35]
    assert limit.seconds == 35
    rates = [rate for _, rate in history.steps]
    assert rates[-1] == pytest.approx(0.01 / (35 - 3))
    assert max(rates) == rates[3] == pytest.approx(0.01)

    again, resumed, later = trained(Clock(1.1), monkeypatch, checkpoint=file)
    assert later.planned_steps == 35
    assert later.seconds == pytest.approx(15 + 20 * 1.1)
    assert resumed.steps == history.steps
    assert resumed.validations == history.validations
    weights = again.trained_state()
    assert all(torch.equal(weights[k], v) for k, v in module.trained_state().items())


def test_slower_steps_than_planned_end_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(later=3.0)
    _, history, limit = trained(clock, monkeypatch)
    assert limit.planned_steps == 35
    assert len(history.steps) == 19  # 10 s, then 3 s each, and time for a validation
    assert clock.now == limit.seconds == 37


def test_fewer_steps_than_fit_are_all_done(monkeypatch: pytest.MonkeyPatch) -> None:
    _, history, limit = trained(Clock(), monkeypatch, epochs=12)
    assert limit.planned_steps == len(history.steps) == 12
    assert history.steps[-1][1] == pytest.approx(0.01 / (12 - 1))


def test_a_validation_before_the_first_step_takes_part_of_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    _, history, limit = trained(clock, monkeypatch, SlowTrial(clock), num_sanity_val_steps=-1)
    assert limit.planned_steps == len(history.steps) == 25  # 10 fewer
    assert clock.now == limit.seconds == 35
