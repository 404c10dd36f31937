import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from grasp_lightning.callbacks import (
    BestWeights,
    ExportMergedModel,
    StopWithoutProgress,
    TrainableParameters,
    TrainingCheckpoint,
    TrainingHistory,
)
from grasp_lightning.callbacks.best_weights import ValidateLastStep
from grasp_lightning.callbacks.stop_request import StopRequest
from grasp_lightning.config import LoraSettings, OptimizerConfig, TrainMode
from grasp_lightning.errors import Interrupted
from grasp_lightning.training.compensation import VALIDATION_LOSS, CompensationModule
from tests.unit.training.test_compensation_module import (
    GivenData,
    compressed,
    make_trainer,
    random_samples,
    steps_of,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:Total length of `list`"),  # nothing to validate on
]

# Random text cannot be learned: the loss on other random text falls while the model forgets its
# own opinions, and rises again when it knows the training samples by heart.
FAST = OptimizerConfig(learning_rate=0.05, schedule="constant", warmup_steps=0)
LORA = LoraSettings(rank=4, dropout=0.0)
NUM_STEPS = 10


class Memory:
    """Keeps copies of tensors."""

    def __init__(self) -> None:
        self.content: dict[str, Tensor] | None = None

    def load(self) -> dict[str, Tensor] | None:
        return self.content

    def save(self, state: Mapping[str, Tensor]) -> None:
        self.content = {name: value.clone() for name, value in state.items()}


class AtValidations(L.Callback):
    """Keeps the trained parameters at each validation, by step."""

    def __init__(self) -> None:
        self.states: dict[int, dict[str, Tensor]] = {}

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, CompensationModule)
        state = pl_module.trained_state()
        self.states[trainer.global_step] = {name: value.clone() for name, value in state.items()}


class Files:
    """Keeps every checkpoint, by the number of optimizer steps before it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.steps: list[int] = []

    def __call__(self, write: Callable[[Path], None]) -> None:
        write(self.folder / "new.ckpt")
        step = torch.load(self.folder / "new.ckpt", weights_only=True)["global_step"]
        (self.folder / "new.ckpt").rename(self.folder / f"{step}.ckpt")
        self.steps.append(step)

    def path(self, step: int) -> Path:
        return self.folder / f"{step}.ckpt"


def make_data(num_steps: int = NUM_STEPS, *, validate: bool = True) -> GivenData:
    validation = random_samples(seed=1) if validate else None
    return GivenData(random_samples(), validation, training=steps_of(8, 8, epochs=num_steps))


def fit(
    *callbacks: L.Callback,
    train: TrainMode = "lora",
    every: int | None = 1,
    data: GivenData | None = None,
    checkpoint: Path | None = None,
    **options: Any,  # noqa: ANN401  any argument of a Trainer
) -> CompensationModule:
    module = CompensationModule(compressed(), FAST)
    if every is not None:
        options |= {"val_check_interval": every, "check_val_every_n_epoch": None}
    trainer = make_trainer(TrainableParameters(train, LORA), *callbacks, **options)
    given = make_data() if data is None else data
    trainer.fit(module, datamodule=given, ckpt_path=checkpoint, weights_only=True)
    return module


def lowest(history: TrainingHistory) -> tuple[int, float]:
    """Step and loss of the best validation."""
    return min(history.validations, key=lambda entry: entry[1])


def checkpoint_into(files: Files, stop: StopRequest | None = None) -> TrainingCheckpoint:
    return TrainingCheckpoint(files, every_seconds=0, stop=stop or StopRequest())


# Best weights


@pytest.mark.parametrize("train", ["lora", "factors"])
def test_the_parameters_of_the_lowest_validation_loss_are_taken_in_the_end(
    train: TrainMode,
) -> None:
    history, states, best = TrainingHistory(), AtValidations(), BestWeights(Memory())

    module = fit(history, states, best, train=train)

    step, _ = lowest(history)
    assert len(history.steps) == len(history.validations) == NUM_STEPS
    assert 1 < step < NUM_STEPS
    assert best.step == step
    kept, last = states.states[step], states.states[NUM_STEPS]
    for name, value in module.trained_state().items():
        assert torch.equal(value, kept[name])
    assert any(not torch.equal(kept[name], last[name]) for name in kept)


def test_the_best_parameters_are_those_that_are_merged() -> None:
    history = TrainingHistory()
    module = fit(history, ExportMergedModel(), BestWeights(Memory()))
    (result,) = make_trainer().validate(module, datamodule=make_data(), verbose=False)
    step, loss = lowest(history)
    assert step < NUM_STEPS
    assert result[VALIDATION_LOSS] == pytest.approx(loss, rel=1e-5)
    assert result[VALIDATION_LOSS] < history.validations[-1][1] - 1e-3


def test_without_a_validation_the_last_parameters_stay() -> None:
    best = BestWeights(Memory())
    data = make_data(2, validate=False)
    module, other = fit(best, data=data), fit(data=data)
    assert best.step is None
    expected = other.trained_state()
    assert all(torch.equal(value, expected[n]) for n, value in module.trained_state().items())


def test_the_best_parameters_outlast_an_interruption(tmp_path: Path) -> None:
    files, memory = Files(tmp_path), Memory()
    history, best = TrainingHistory(), BestWeights(memory)
    whole = fit(history, best, checkpoint_into(files))
    assert best.step is not None
    assert best.step + 1 < NUM_STEPS

    later, rest = BestWeights(memory), TrainingHistory()
    module = fit(rest, later, checkpoint=files.path(best.step + 1))

    assert later.step == best.step
    assert rest.validations == history.validations
    assert rest.steps == history.steps
    expected = whole.trained_state()
    assert all(torch.equal(value, expected[n]) for n, value in module.trained_state().items())


def test_the_last_step_is_validated_wherever_it_is(tmp_path: Path) -> None:
    history, rest, files = TrainingHistory(), TrainingHistory(), Files(tmp_path)
    last = ValidateLastStep(5)
    fit(history, last, checkpoint_into(files), every=3, data=make_data(5))
    assert [step for step, _ in history.validations] == [3, 5]
    assert files.steps == [1, 2, 3, 4, 5]
    fit(rest, last, every=3, data=make_data(5), checkpoint=files.path(5))
    assert rest.validations == history.validations


def test_the_trainers_own_trial_is_not_a_validation() -> None:
    history, best = TrainingHistory(), BestWeights(Memory())
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[TrainableParameters("lora", LORA), history, best],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(CompensationModule(compressed(), FAST), datamodule=make_data(2))
    assert [step for step, _ in history.validations] == [2]
    assert best.step == 2


# End without progress


@pytest.mark.parametrize("patience", [1, 3])
def test_a_training_ends_after_validations_without_a_lower_loss(patience: int) -> None:
    history = TrainingHistory()
    fit(history, StopWithoutProgress(patience), data=make_data(40))
    losses = [loss for _, loss in history.validations]
    num_steps = len(history.steps)
    assert num_steps == len(losses) < 40
    assert losses.index(min(losses)) == num_steps - 1 - patience


def test_a_training_whose_loss_falls_runs_to_its_end() -> None:
    history = TrainingHistory()
    fit(history, StopWithoutProgress(1), data=make_data(3))
    losses = [loss for _, loss in history.validations]
    assert losses == sorted(losses, reverse=True)
    assert len(history.steps) == 3


def test_a_training_that_ended_does_not_go_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    files, history = Files(tmp_path), TrainingHistory()
    data = make_data(40)
    fit(history, StopWithoutProgress(1), checkpoint_into(files), data=data)
    ended_at = files.steps[-1]
    assert ended_at == len(history.steps) < 40

    rest = TrainingHistory()
    fit(rest, StopWithoutProgress(1), data=data, checkpoint=files.path(ended_at))

    assert rest.steps == history.steps
    assert rest.validations == history.validations


# Checkpoints


class Events(L.Callback):
    """Notes what happens, in order."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_train_batch_end(self, trainer: L.Trainer, *args: object) -> None:
        del args
        self.seen.append(f"step {trainer.global_step}")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        del pl_module
        self.seen.append(f"validation {trainer.global_step}")


def test_every_step_is_saved_and_one_before_a_validation_only_after_it(tmp_path: Path) -> None:
    events, files = Events(), Files(tmp_path)

    def store(write: Callable[[Path], None]) -> None:
        files(write)
        events.seen.append(f"save {files.steps[-1]}")

    checkpoint = TrainingCheckpoint(store, every_seconds=0, stop=StopRequest())
    fit(events, TrainingHistory(), checkpoint, every=2, data=make_data(5))

    assert events.seen == [
        *("step 1", "save 1"),
        *("step 2", "validation 2", "save 2"),
        *("step 3", "save 3"),
        *("step 4", "validation 4", "save 4"),
        *("step 5", "save 5"),
    ]
    stored = [torch.load(files.path(step), weights_only=True) for step in range(1, 6)]
    histories = [content["callbacks"]["TrainingHistory"] for content in stored]
    assert [len(history["steps"]) for history in histories] == [1, 2, 3, 4, 5]
    assert [len(history["validations"]) for history in histories] == [0, 1, 1, 2, 2]


def test_every_step_is_saved_where_validation_is_off(tmp_path: Path) -> None:
    files = Files(tmp_path)
    fit(checkpoint_into(files), every=2, data=make_data(3), limit_val_batches=0)
    assert files.steps == [1, 2, 3]


@pytest.mark.parametrize("every", [None, 2])
def test_every_step_is_saved_where_there_is_nothing_to_validate_on(
    tmp_path: Path, every: int | None
) -> None:
    files = Files(tmp_path)
    fit(checkpoint_into(files), every=every, data=make_data(3, validate=False))
    assert files.steps == [1, 2, 3]


def test_nothing_is_saved_before_it_is_time(tmp_path: Path) -> None:
    files = Files(tmp_path)
    fit(
        TrainingCheckpoint(files, every_seconds=1e6, stop=StopRequest()),
        every=2,
        data=make_data(4),
    )
    assert files.steps == []


@pytest.mark.parametrize(
    ("asked_in", "saved", "num_validations"),
    [(1, 1, 0), (2, 2, 1), (3, 3, 1)],
)
def test_a_run_that_shall_end_is_saved_and_ends_at_the_next_safe_moment(
    tmp_path: Path, asked_in: int, saved: int, num_validations: int
) -> None:
    stop, files, history = StopRequest(), Files(tmp_path), TrainingHistory()

    class Ask(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *args: object) -> None:
            del args
            if trainer.global_step + 1 == asked_in:
                stop.signal_number = signal.SIGTERM

    checkpoint = TrainingCheckpoint(files, every_seconds=1e6, stop=stop)
    with pytest.raises(Interrupted, match=f"interrupted by signal {int(signal.SIGTERM)}"):
        fit(Ask(), history, checkpoint, every=2, data=make_data(6))
    assert files.steps == [saved]
    assert len(history.steps) == saved
    assert len(history.validations) == num_validations
