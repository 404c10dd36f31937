"""What a layer-local training keeps of its finished stages, and of the running one."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from grasp_lightning import processes
from grasp_lightning.models.streamed import StoredAt
from grasp_lightning.run_folder import RunFolder
from grasp_lightning.run_folder.names import CHECKPOINTS
from grasp_lightning.storage.tensor_files import TensorFile, save_tensors
from grasp_lightning.storage.training import TrainingFile

_PREFIX = "stage-"
_WEIGHT, _STEPS, _VALIDATIONS, _TIME = "weight:", "steps", "validations", "time"


class StageResult(NamedTuple):
    """The result of one stage.

    Attributes:
        weights: Trained parameters by full name.
        steps: Loss, learning rate and tokens per second of each step.
        validations: Number of steps taken, over all stages, and loss.
        seconds: Time in the training so far, over all stages.
        planned_steps: Number of steps planned from a time limit, over all stages so far.
    """

    weights: Mapping[str, Tensor]
    steps: Sequence[tuple[float, float, float]]
    validations: Sequence[tuple[int, float]]
    seconds: float
    planned_steps: int


class StageFiles:
    """Files of the stages in a run folder, by number."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run

    def load(self, number: int) -> StageResult | None:
        """Return the result of a finished stage, or None; all processes must call this.

        A damaged file is a ``PlanError``.
        """
        advice = f"delete {self._run.path(CHECKPOINTS)} to train again from the start"
        file = TensorFile(self._run.path(self._name(number)), advice=advice)
        if not processes.on_first(lambda: bool(file)):
            return None
        file.metadata()
        tensors = file.read()
        kinds = {_STEPS: (-1, 3), _VALIDATIONS: (-1, 2), _TIME: (2,)}
        steps, validations, time = (
            file.check(tensors, key, torch.float64, *shape).tolist() for key, shape in kinds.items()
        )
        return StageResult(
            weights={
                key.removeprefix(_WEIGHT): value
                for key, value in tensors.items()
                if key.startswith(_WEIGHT)
            },
            steps=[(loss, rate, speed) for loss, rate, speed in steps],
            validations=[(int(step), loss) for step, loss in validations],
            seconds=time[0],
            planned_steps=int(time[1]),
        )

    def save(self, number: int, result: StageResult) -> None:
        """Write the result of a stage, and delete the checkpoint of its training."""
        tensors = {f"{_WEIGHT}{name}": value for name, value in result.weights.items()}
        rows = {_STEPS: (result.steps, 3), _VALIDATIONS: (result.validations, 2)}
        for key, (values, width) in rows.items():
            tensors[key] = torch.tensor(values, dtype=torch.float64).reshape(-1, width)
        tensors[_TIME] = torch.tensor([result.seconds, result.planned_steps], dtype=torch.float64)
        self._run.write_with(self._name(number), partial(save_tensors, tensors=tensors))
        self._run.remove_all(self._running(number))

    def stored(self, number: int, names: Iterable[str]) -> dict[str, StoredAt]:
        """Return where the trained parameters of a finished stage are, by full name."""
        path = self._run.path(self._name(number))
        return {name: StoredAt(path, f"{_WEIGHT}{name}") for name in names}

    def running(self, number: int) -> TrainingFile:
        """Return the checkpoint of the training of a stage."""
        return TrainingFile(self._run, self._running(number))

    @staticmethod
    def _name(number: int) -> str:
        return f"{CHECKPOINTS}/{_PREFIX}{number:04d}.safetensors"

    @staticmethod
    def _running(number: int) -> str:
        return f"{CHECKPOINTS}/{_PREFIX}{number:04d}.ckpt"


def has_stages(folder: Path) -> bool:
    """Return whether a folder has a finished or a running stage."""
    return any(folder.glob(f"{_PREFIX}*"))
