"""What an unfinished run keeps in ``checkpoints/``: finished steps, and the pass that runs."""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from grasp_lightning.errors import OutputError
from grasp_lightning.methods.base import Decision
from grasp_lightning.plan import Plan
from grasp_lightning.run_folder import RunFolder
from grasp_lightning.stats.base import Moments
from grasp_lightning.storage.moments import MomentFiles, stored_moments
from grasp_lightning.storage.passes import PassFile, PassFiles
from grasp_lightning.storage.sampled_text import SAMPLED_TEXT

_FOLDER = "checkpoints"
_PLAN = f"{_FOLDER}/steps.json"
_NOTES = f"{_FOLDER}/notes.json"
TRAINING_CHECKPOINT = f"{_FOLDER}/last.ckpt"
_SCORE_PREFIX, _FACTOR_PREFIX = "scores:", "factors:"


class RunNotes:
    """Numbers of an unfinished run that would take time to measure again.

    Args:
        run: The run folder.
    """

    def __init__(self, run: RunFolder) -> None:
        self._run = run

    def note(self, key: str, value: float) -> None:
        """Keep a number that would take time to measure again.

        Args:
            key: What it is.
            value: The number.
        """
        self._run.write_json(_NOTES, {**self._notes(), key: value})

    def noted(self, key: str) -> float | None:
        """Return a number that ``note`` has kept.

        Args:
            key: What it is.

        Returns:
            The number, None if it was not kept.
        """
        value = self._notes().get(key)
        return None if value is None else float(value)

    def _notes(self) -> dict[str, Any]:  # Any: parsed JSON
        path = self._run.path(_NOTES)
        notes: dict[str, Any] = {}
        if path.is_file():
            notes = json.loads(path.read_text(encoding="utf-8"))
        return notes

    def clear(self) -> None:
        """Delete the checkpoints of a run that needs them no more."""
        folder: Path = self._run.path(_FOLDER)
        for file in sorted(folder.glob("*")):
            self._run.remove(f"{_FOLDER}/{file.name}")
        with suppress(OSError):  # a foreign file in it stays, and so does the folder
            folder.rmdir()


def has_progress(run: RunFolder) -> bool:
    """Tell whether a run has saved anything that a later start could go on from.

    Args:
        run: The run folder.

    Returns:
        True if it has.
    """
    has_pass = bool(PassFile.found_in(run.path(_FOLDER)) or stored_moments(run.root))
    files = (_PLAN, TRAINING_CHECKPOINT, SAMPLED_TEXT)
    return has_pass or any(run.path(name).exists() for name in files)


def check_same_model(run: RunFolder, digest: str) -> None:
    """Check that an unfinished run goes on with its own model, before anything of it is replaced.

    Args:
        run: The run folder.
        digest: Hash of the model's weights.

    Raises:
        OutputError: If the steps that the run has finished are of another model.
    """
    stored = _stored_plan(run)
    if stored is not None and stored.inputs.get("model") != digest:
        raise OutputError(_changed(run))


def _stored_plan(run: RunFolder) -> Plan | None:
    path = run.path(_PLAN)
    return Plan.from_json(path.read_text(encoding="utf-8")) if path.is_file() else None


def _changed(run: RunFolder) -> str:
    return (
        f"{run.root} holds a run whose model or calibration text has changed since it was "
        "started; use another output_dir or --overwrite"
    )


class PassProgress:
    """The state of one pass.

    Args:
        files: Files that hold it.
        key: What tells this pass from all others of the run.
    """

    def __init__(self, files: PassFiles, key: str) -> None:
        self._files = files
        self._key = key

    def load(self) -> dict[str, Tensor] | None:
        """Return the state, if one was saved.

        Returns:
            The state; None if there is none, or it belongs to another pass.
        """
        return self._files.load(self._key)

    def save(self, state: Mapping[str, Tensor]) -> None:
        """Save the state.

        Args:
            state: Sums over windows, and which windows are in them.
        """
        self._files.save(state, self._key)


class RunProgress(RunNotes):
    """The steps of a run, each saved in one step, and the state of the pass that runs.

    A step is a file with its scores and factors; it counts once the plan that holds its operations
    has taken its place. So a crash loses one step at most, and of a pass what came after its last
    save.

    Args:
        run: The run folder.
        plan: The plan before the first step, with the hashes of what it is made from.

    Attributes:
        plan: Decisions so far.
        scores: Scores of all steps so far.
        factors: Factors of all steps so far.

    Raises:
        OutputError: If the model or the text has changed since the run was started.
    """

    def __init__(self, run: RunFolder, plan: Plan) -> None:
        super().__init__(run)
        self._pass = PassFiles(run, _FOLDER)
        self._moments = MomentFiles(run)
        self.plan = plan
        self.scores: dict[str, Tensor] = {}
        self.factors: dict[str, Tensor] = {}
        stored = _stored_plan(run)
        if stored is None:
            return
        if (stored.inputs, stored.options) != (plan.inputs, plan.options):
            raise OutputError(_changed(run))
        self.plan = stored
        for file in sorted(run.path(_FOLDER).glob("step-*.safetensors")):
            self._take(load_file(file))

    def _take(self, tensors: Mapping[str, Tensor]) -> None:
        for key, value in tensors.items():
            if key.startswith(_SCORE_PREFIX):
                self.scores[key.removeprefix(_SCORE_PREFIX)] = value
            else:
                self.factors[key.removeprefix(_FACTOR_PREFIX)] = value

    def add_step(self, plan: Plan, decision: Decision) -> None:
        """Save a step after it was applied.

        Args:
            plan: The plan with its operations.
            decision: Its scores and factors.
        """
        tensors = {f"{_SCORE_PREFIX}{key}": value for key, value in decision.scores.items()}
        tensors |= {f"{_FACTOR_PREFIX}{key}": value for key, value in decision.tensors.items()}
        stored = {key: value.cpu().contiguous().clone() for key, value in tensors.items()}
        # Numbered by the operations before it: a step that is done again takes its old place.
        name = f"{_FOLDER}/step-{len(self.plan.operations):06d}.safetensors"
        self._run.write_with(name, lambda path: save_file(stored, path))
        self._run.write_text(_PLAN, plan.to_json())
        self._take(stored)
        self.plan = plan

    def pass_store(self, part: str) -> PassProgress:
        """Return what keeps the state of a pass that follows the plan so far.

        Args:
            part: Which of the passes of the step.

        Returns:
            The store.
        """
        return PassProgress(self._pass, self._step_key() + part)

    def load_moments(self, part: str) -> Mapping[str, Moments] | None:
        """Return the moments of the step that follows the plan so far, if they were kept.

        Args:
            part: Which of the passes of the step.

        Returns:
            The moments; None if there are none, or they belong to an earlier step.
        """
        return self._moments.load(part, self._step_key())

    def keep_moments(self, moments: Mapping[str, Moments], part: str) -> Mapping[str, Moments]:
        """Keep the moments of the step that follows the plan so far.

        Args:
            moments: What was measured, complete.
            part: Which of the passes of the step.

        Returns:
            The same moments, to be read from their file.
        """
        self._moments.save(moments, part, self._step_key())
        kept = self.load_moments(part)
        assert kept is not None  # it was written just now
        return kept

    def forget_moments(self) -> None:
        """Delete the moments of all steps."""
        self._moments.remove()

    def _step_key(self) -> str:
        return hashlib.sha256(self.plan.to_json().encode()).hexdigest()
