"""Notes of an unfinished run, and the state of its training."""

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from grasp_lightning import processes
from grasp_lightning.errors import OutputError, PlanError
from grasp_lightning.reading.tensors import read_checkpoint
from grasp_lightning.reading.text import read_json, told
from grasp_lightning.run_folder import RunFolder
from grasp_lightning.run_folder.names import CHECKPOINTS
from grasp_lightning.storage.tensor_files import MEASURE_AGAIN

_NOTES = f"{CHECKPOINTS}/notes.json"
_INPUTS = f"{CHECKPOINTS}/inputs.json"
TRAINING_CHECKPOINT = f"{CHECKPOINTS}/last.ckpt"
_KEYS = ("state_dict", "optimizer_states", "lr_schedulers", "loops", "callbacks")
_TRAIN_AGAIN = "delete it to train again from the start"


class RunNotes:
    """Numbers of an unfinished run that are expensive to measure again."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run

    def note(self, key: str, value: float) -> None:
        """Save a number under a key."""
        self.note_all({key: value})

    def note_all(self, values: Mapping[str, float]) -> None:
        """Save numbers under their keys."""
        self._run.write_json(_NOTES, {**self._notes(), **values})

    def noted(self, key: str) -> float | None:
        """Return a saved number; None if there is none."""
        return self._notes().get(key)

    def _notes(self) -> dict[str, float]:
        path = self._run.path(_NOTES)
        if not path.exists():
            return {}
        notes = read_json(path, PlanError, advice=MEASURE_AGAIN)
        values = notes.values() if isinstance(notes, dict) else [None]
        if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
            raise PlanError(
                told(path, "is damaged: it must contain numbers by name", MEASURE_AGAIN)
            )
        return {key: float(value) for key, value in notes.items()}

    def clear(self) -> None:
        """Delete the checkpoints of a run that no longer needs them."""
        self._run.remove_all(f"{CHECKPOINTS}/*")
        with suppress(OSError):  # a foreign file in it stays, and so does the folder
            self._run.path(CHECKPOINTS).rmdir()


def check_inputs(run: RunFolder, hashes: Mapping[str, str]) -> None:
    """Refuse to resume a training with another model or other samples, and save their hashes.

    Raises:
        OutputError: If they have changed, or the file with the hashes is damaged.
    """
    file = run.path(_INPUTS)
    advice = f"delete {file.parent} to train again from the start"
    if file.exists():
        stored = read_json(file, OutputError, advice=advice)
        if not isinstance(stored, dict):
            raise OutputError(told(file, "is damaged: it must contain hashes by name", advice))
        if stored != hashes:
            raise OutputError(inputs_changed(run))
    run.write_json(_INPUTS, hashes)


def inputs_changed(run: RunFolder) -> str:
    """Return the message about a run whose inputs are no longer those of its start."""
    return (
        f"{run.root} contains a run whose model, teacher or training data has changed since it "
        "started; use another output_dir or --overwrite"
    )


class TrainingFile:
    """The checkpoint of the running training, or of a part of it under another name."""

    def __init__(self, run: RunFolder, name: str = TRAINING_CHECKPOINT) -> None:
        self._run = run
        self._name = name

    def load(self) -> str | None:
        """Return its path, or None; all processes must call this."""
        return training_checkpoint(self._run, self._name)

    def save(self, write: Callable[[Path], None]) -> None:
        """Let a function write it; processes other than rank 0 take part and write nothing."""
        if processes.is_first():
            self._run.write_with(self._name, write)
        else:
            write(self._run.path(self._name))


def training_checkpoint(run: RunFolder, name: str = TRAINING_CHECKPOINT) -> str | None:
    """Return the path of a training's checkpoint, or None; all processes must call this."""

    def check() -> str | None:
        path = run.path(name)
        if not path.exists():
            return None
        content = read_checkpoint(path, PlanError, advice=_TRAIN_AGAIN)
        held = content.keys() if isinstance(content, dict) else ()
        missing = [key for key in _KEYS if key not in held]
        if missing:
            raise PlanError(told(path, f"is damaged: it has no {missing[0]}", _TRAIN_AGAIN))
        for key, value in content["state_dict"].items():
            if not value.isfinite().all():
                raise PlanError(
                    told(path, f"is damaged: {key} has values that are not finite", _TRAIN_AGAIN)
                )
        return str(path)

    return processes.on_first(check)
