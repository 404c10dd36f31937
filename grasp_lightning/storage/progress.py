"""Progress of an unfinished run in ``checkpoints/``: finished steps, and the running pass."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from grasp_lightning import processes
from grasp_lightning.errors import OutputError, PlanError
from grasp_lightning.methods.base import Decision
from grasp_lightning.plan import Operation, Plan
from grasp_lightning.reading.on_access import OnAccess, merged
from grasp_lightning.reading.text import read_json, read_text, told
from grasp_lightning.run_folder import RunFolder
from grasp_lightning.run_folder.names import CHECKPOINTS, SAMPLED_TEXT
from grasp_lightning.stats.base import Moments
from grasp_lightning.storage.linear_files import DECIDED, LinearFiles, read_on_access
from grasp_lightning.storage.moments import MomentFiles, stored_moments
from grasp_lightning.storage.passes import PassFile, PassFiles
from grasp_lightning.storage.shards import SHARDS, KeptShards
from grasp_lightning.storage.stages import has_stages
from grasp_lightning.storage.teacher_cache import has_shards
from grasp_lightning.storage.tensor_files import (
    MEASURE_AGAIN,
    TensorFile,
    save_tensors,
    write_tensors,
)
from grasp_lightning.storage.training import TRAINING_CHECKPOINT, RunNotes, TrainingFile

T = TypeVar("T")

_PLAN = f"{CHECKPOINTS}/steps.json"
_STEP = CHECKPOINTS + "/step-{number:06d}.safetensors"
_FINAL_STATES = f"{CHECKPOINTS}/final_states.safetensors"
_END, _KEY = "end", "key"
_STATES, _NUM_DIMENSIONS = "states", 3  # windows, tokens, features
_START_AGAIN = "start the run again with --overwrite"
_DECIDE_AGAIN = "delete it to repeat the steps from there on"
_SCORE_PREFIX, _FACTOR_PREFIX = "scores:", "factors:"


def has_progress(run: RunFolder) -> bool:
    """Return whether a run has saved anything that a later start could resume from."""
    has_pass = bool(PassFile.found_in(run.path(CHECKPOINTS)) or stored_moments(run.root))
    folder = run.path(CHECKPOINTS)
    patterns = ("scores-*", "truncations-*", "decided-*")
    has_scores = any(path for pattern in patterns for path in folder.glob(pattern))
    has_cache = has_shards(folder) or has_stages(folder)
    files = (_PLAN, TRAINING_CHECKPOINT, SAMPLED_TEXT)
    return has_pass or has_scores or has_cache or any(run.path(name).exists() for name in files)


def check_same_model(run: RunFolder, digest: str) -> None:
    """Refuse to resume a run whose finished steps belong to a model with another digest."""
    stored = _stored_plan(run)
    if stored is not None and stored.inputs.get("model") != digest:
        raise OutputError(_changed(run))


def _stored_plan(run: RunFolder) -> Plan | None:
    path = run.path(_PLAN)
    if not path.exists():
        return None
    read_json(path, PlanError, advice=_DECIDE_AGAIN)
    try:
        return Plan.from_json(read_text(path, PlanError, advice=_DECIDE_AGAIN))
    except PlanError as error:
        raise PlanError(told(path, f"is damaged: {error}", _DECIDE_AGAIN)) from error


def _changed(run: RunFolder) -> str:
    return (
        f"{run.root} contains a run whose model or calibration text has changed since it started; "
        "use another output_dir or --overwrite"
    )


class PassProgress:
    """The state of one pass, which the key identifies within the run."""

    def __init__(self, files: PassFiles, key: str) -> None:
        self._files = files
        self._key = key

    def load(self) -> dict[str, Tensor] | None:
        """Return the saved state; None if there is none of this pass."""
        return self._files.load(self._key)

    def save(self, state: Mapping[str, Tensor]) -> None:
        """Save the state: sums over windows, and the windows in them."""
        self._files.save(state, self._key)


class RefitLayers:
    """The layers that a refit has finished; the key identifies the refit within the run."""

    _name = CHECKPOINTS + "/refit-{number:06d}.safetensors"
    _advice = "delete it to refit that layer again"

    def __init__(self, run: RunFolder, key: str) -> None:
        self._run = run
        self._key = key

    def load(self, number: int) -> dict[str, Tensor] | None:
        """Return the tensors of a finished layer or group, or None; all processes must call it."""
        processes.barrier()  # rank 0 may be writing it
        path = self._run.path(self._name.format(number=number))
        file = TensorFile(path, _KEY, advice=self._advice)
        return file.read() if file and file.metadata()[_KEY] == self._key else None

    def save(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Save the tensors of a layer or group."""
        self._run.write_with(
            self._name.format(number=number),
            lambda path: save_tensors(path, tensors, {_KEY: self._key}),
        )

    def saved(self, number: int) -> Mapping[str, Tensor]:
        """Return the tensors of a finished layer or group, read on access; all must call it."""
        processes.barrier()  # rank 0 may be writing it
        path = self._run.path(self._name.format(number=number))
        file = TensorFile(path, _KEY, advice=self._advice)
        file.metadata()
        return read_on_access(file, {name: name for name in file.shapes})


class ScoredGroups(RefitLayers):
    """The groups of layers with scored components."""

    _name = CHECKPOINTS + "/scores-{number:06d}.safetensors"
    _advice = MEASURE_AGAIN


class TriedTruncations(RefitLayers):
    """The measured losses of a search, in one file."""

    _name = CHECKPOINTS + "/truncations-{number:06d}.safetensors"
    _advice = MEASURE_AGAIN


class RunProgress(RunNotes):
    """The finished steps of a run, and the state of the running pass.

    A step is one file with its scores and factors. It counts once the plan with its operations is
    in place. So a crash loses at most one step, and within a pass only the work after its last
    save. A model or text that has changed since the run started raises ``OutputError``.

    Args:
        plan: The plan before the first step, with the hashes of its inputs.
        on_disk: Factors are read from files on access, and not kept in memory.

    Attributes:
        plan: Decisions so far.
        scores: Scores of all steps so far.
        factors: Factors of all steps so far.
    """

    def __init__(self, run: RunFolder, plan: Plan, *, on_disk: bool = False) -> None:
        super().__init__(run)
        self._on_disk = on_disk
        self._pass = PassFiles(run, CHECKPOINTS)
        self._moments = MomentFiles(run)
        self.plan = plan
        self.scores: dict[str, Tensor] = {}
        self.factors: Mapping[str, Tensor] = {}
        stored = _stored_plan(run)
        if stored is None:
            return
        if (stored.inputs, stored.options) != (plan.inputs, plan.options):
            raise OutputError(_changed(run))
        self._take_steps(stored)

    def _take_steps(self, stored: Plan) -> None:
        """Load the steps of a stored plan, up to the first one without its file."""
        end = 0
        while end < len(stored.operations):
            file = TensorFile(self._run.path(_STEP.format(number=end)), _END, advice=_DECIDE_AGAIN)
            if not file:
                break
            told_end = file.metadata()[_END]
            if not (told_end.isdecimal() and end < int(told_end) <= len(stored.operations)):
                raise PlanError(
                    file.damaged(f"it ends with operation {told_end} of {len(stored.operations)}")
                )
            end = int(told_end)
            if self._on_disk:
                self._take_on_access(file)
            else:
                self._take(file.read(ignoring=".measured"))
        self.plan = replace(stored, operations=stored.operations[:end])

    def _take(self, tensors: Mapping[str, Tensor]) -> None:
        self.scores |= _without(_SCORE_PREFIX, tensors)
        self.factors = {**self.factors, **_without(_FACTOR_PREFIX, tensors)}

    def _take_on_access(self, file: TensorFile) -> None:
        """Load the scores of a step whose metadata was checked; its factors stay in the file."""
        scores = [key for key in file.shapes if key.startswith(_SCORE_PREFIX)]
        self.scores |= _without(_SCORE_PREFIX, file.read(scores, ignoring=".measured"))
        factors = _without(_FACTOR_PREFIX, {key: key for key in file.shapes})
        self.factors = merged(self.factors, read_on_access(file, factors))

    def add_step(self, plan: Plan, decision: Decision) -> None:
        """Save a step that was applied, and its plan; all processes must call it."""
        scores = {f"{_SCORE_PREFIX}{key}": value for key, value in decision.scores.items()}
        factors = {f"{_FACTOR_PREFIX}{key}": key for key in decision.tensors}
        tensors = merged(
            scores,
            OnAccess({k: partial(decision.tensors.__getitem__, v) for k, v in factors.items()}),
        )
        if not self._on_disk:
            tensors = {key: value.cpu().contiguous().clone() for key, value in tensors.items()}
        # Numbered by the operations before it: a repeated step replaces its old file.
        path = self._run.write_with(
            _STEP.format(number=len(self.plan.operations)),
            lambda path: write_tensors(path, tensors, {_END: str(len(plan.operations))}),
        )
        self._run.write_text(_PLAN, plan.to_json())
        processes.barrier()  # the others may be reading what is deleted, and will read the file
        self._run.remove_all(f"{CHECKPOINTS}/refit-*")
        self._run.remove_all(DECIDED)
        self._run.remove_all(TRAINING_CHECKPOINT)
        self._run.remove_all(SHARDS)
        if self._on_disk:
            file = TensorFile(path, _END, advice=_DECIDE_AGAIN)
            file.metadata()
            self._take_on_access(file)
        else:
            self._take(tensors)
        self.plan = plan

    def pass_store(self, part: str) -> PassProgress:
        """Return the store for the state of one pass (``part``) of the current step."""
        return PassProgress(self._pass, step_key(self.plan) + part)

    @property
    def decided(self) -> LinearFiles | None:
        """Store for what the decision of the current step computes; None: it stays in memory."""
        return LinearFiles(self._run, step_key(self.plan)) if self._on_disk else None

    def refit_layers(self, operations: Sequence[Operation]) -> RefitLayers:
        """Return the store for the layers of a refit after these decisions of the current step."""
        return RefitLayers(self._run, step_key(self.plan.extended(tuple(operations))))

    @property
    def shards(self) -> KeptShards:
        """Store for the weight files of the model with all steps applied."""
        return KeptShards(self._run, step_key(self.plan))

    @property
    def training(self) -> TrainingFile:
        """Store for the training of the current step."""
        return TrainingFile(self._run)

    @property
    def scored_groups(self) -> ScoredGroups:
        """Store for the scores of a step that scores more layers than it decides on."""
        return ScoredGroups(self._run, step_key(self.plan))

    @property
    def tried_truncations(self) -> TriedTruncations:
        """Store for the losses that a search has measured in the current step."""
        return TriedTruncations(self._run, step_key(self.plan))

    def load_moments(self, part: str) -> Mapping[str, Moments] | None:
        """Return the saved moments of one pass of the current step; None if there are none."""
        return self._moments.load(part, moments_key(self.plan))

    def keep_moments(self, moments: Mapping[str, Moments], part: str) -> Mapping[str, Moments]:
        """Save the complete moments of one pass of the current step, and return them from disk."""
        self._moments.save(moments, part, moments_key(self.plan))
        kept = self.load_moments(part)
        assert kept is not None  # it was written just now
        return kept

    def moment_files(self) -> list[Path]:
        """Return the files with the moments of the current step."""
        return self._moments.paths(moments_key(self.plan))

    def adopt_moments(self, files: Sequence[Path]) -> Mapping[str, Moments]:
        """Take the moments of the current step from files of another run, and return them."""
        return self._moments.adopt(files)

    def load_final_states(self) -> Tensor | None:
        """Return the dense model's final hidden states; all processes must call it."""
        processes.barrier()  # rank 0 may be writing it
        file = TensorFile(self._run.path(_FINAL_STATES), _KEY, advice=_START_AGAIN)
        if not file or file.metadata()[_KEY] != _inputs_key(self.plan):
            return None
        tensors = file.read()
        found = tensors.get(_STATES)
        if found is None or found.ndim != _NUM_DIMENSIONS or not found.is_floating_point():
            raise PlanError(file.damaged(f"it has no {_STATES} of three dimensions"))
        return found

    def keep_final_states(self, states: Tensor) -> None:
        """Save the dense model's final hidden states, against which changes are measured."""
        key = {_KEY: _inputs_key(self.plan)}
        self._run.write_with(_FINAL_STATES, lambda path: save_tensors(path, {_STATES: states}, key))

    def forget_moments(self) -> None:
        """Delete the moments of all steps."""
        self._moments.remove()


def _without(prefix: str, values: Mapping[str, T]) -> dict[str, T]:
    """Return the values whose names have a prefix, by their names without it."""
    named = {key: value for key, value in values.items() if key.startswith(prefix)}
    return {key.removeprefix(prefix): value for key, value in named.items()}


def step_key(plan: Plan) -> str:
    """Return the key of the step that follows a plan."""
    return hashlib.sha256(plan.to_json().encode()).hexdigest()


def moments_key(plan: Plan) -> str:
    """Return the key of moments after a plan: the same for all methods and ratios.

    Moments depend on the inputs, on what was applied before, and on whose gradients they sum up.
    """
    options = {key: plan.options[key] for key in ("fisher",) if key in plan.options}
    same = Plan(method="", options=options, inputs=plan.inputs, operations=plan.operations)
    return step_key(same)


def _inputs_key(plan: Plan) -> str:
    """Return the key of what was measured on the dense model."""
    return step_key(replace(plan, operations=()))
