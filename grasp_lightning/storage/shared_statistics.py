"""Statistics of steps, measured once for all runs that need the same."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from grasp_lightning import processes
from grasp_lightning.errors import Interrupted, PlanError
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.integrity import tensor_hash
from grasp_lightning.pipeline import Measure
from grasp_lightning.plan import Plan
from grasp_lightning.reading.tensors import read_tensors
from grasp_lightning.reading.typed import to_plain
from grasp_lightning.run_folder import check_free_space
from grasp_lightning.run_folder.files import link
from grasp_lightning.run_folder.names import STATISTICS
from grasp_lightning.stats.base import Statistics, Step
from grasp_lightning.storage.packed import pack, unpack
from grasp_lightning.storage.progress import RunProgress, step_key
from grasp_lightning.storage.shared import Facts, SharedFolder
from grasp_lightning.storage.tensor_files import TensorFile, save_tensors

_FILE: Final = "measured.safetensors"
_CONTENT: Final = "content"
_ADVICE: Final = "delete its folder"


class SharedMeasure:
    """A ``Measure`` that asks a shared folder first.

    An entry depends on the windows, on the operations and tensors that were applied to the model,
    on the ``Needs`` and the decompositions of the step, and on ``facts``.

    Args:
        measure: Measures what the folder lacks, and keeps moments in the run folder.
        folder: Where statistics are shared; its facts identify the dense model.
        progress: The progress of the run.
        facts: The settings that statistics depend on.
    """

    def __init__(
        self, measure: Measure, folder: SharedFolder, progress: RunProgress, facts: Facts
    ) -> None:
        self._measure = measure
        self._folder = folder
        self._progress = progress
        self._facts = facts
        self._hashes: dict[str, tuple[Tensor, str]] = {}

    def __call__(self, view: DecoderView, step: Step) -> Statistics:
        """Return the statistics of a step; all processes of a run must call this."""
        if not step.needs.is_shareable:
            return self._measure(view, step)
        return self._folder.once(
            lambda: self._depends_on(step),
            read=self._read,
            make=lambda: self._measured(view, step),
            write=self._write,
        )

    def _measured(self, view: DecoderView, step: Step) -> Statistics:
        """Measure, and count the time that an interrupted start of the run has spent on it."""
        name = f"seconds of step {step_key(self._progress.plan)}"
        phases = self._folder.phases
        earlier, start = self._progress.noted(name) or 0.0, phases.total
        try:
            stats = self._measure(view, step)
        except Interrupted:
            self._progress.note(name, earlier + phases.total - start)
            raise
        phases.add(earlier)
        self._progress.note(name, phases.total - start)
        return stats

    def _depends_on(self, step: Step) -> Facts:
        plan = self._progress.plan
        same = Plan(method="", inputs=plan.inputs, operations=plan.operations)
        return {
            **self._facts,
            "fields": [field.name for field in fields(Statistics)],
            "plan": json.loads(same.to_json()),
            "tensors": {k: self._hash(k, v) for k, v in self._progress.factors.items()},
            "needs": plain_needs(step),
            "bases": {
                module: [tensor_hash(part) for part in basis]
                for module, basis in step.bases.items()
            },
        }

    def _hash(self, name: str, tensor: Tensor) -> str:
        known = self._hashes.get(name)
        if known is None or known[0] is not tensor:
            known = self._hashes[name] = tensor, tensor_hash(tensor)
        return known[1]

    def _write(self, folder: Path, stats: Statistics) -> None:
        tensors, content = pack(replace(stats, moments={}))
        # Packed triangles, which the run keeps anyway.
        moments = self._progress.moment_files() if stats.moments else []
        check_free_space(folder, sum(value.nbytes for value in tensors.values()))
        save_tensors(folder / _FILE, tensors, {_CONTENT: content})
        for file in moments:
            link(file, folder / file.name)

    def _read(self, folder: Path) -> Statistics:
        stats = processes.on_first(lambda: _stored(folder / _FILE))
        moments = processes.on_first(lambda: sorted(folder.glob(STATISTICS)))
        return replace(stats, moments=self._progress.adopt_moments(moments)) if moments else stats


def plain_needs(step: Step) -> Any:  # noqa: ANN401  values of JSON
    """Return what a step needs as values of JSON, the same for equal needs."""
    return json.loads(json.dumps(to_plain(step.needs), default=_as_list))


def _as_list(value: object) -> list[Any]:
    if isinstance(value, frozenset):
        return sorted(value)
    raise TypeError(
        f"Needs has a {type(value).__name__}: expected numbers, text, and tuples, sets, mappings "
        "or dataclasses of these"
    )


def _stored(path: Path) -> Statistics:
    file = TensorFile(path, _CONTENT, advice=_ADVICE)
    content = file.metadata()[_CONTENT]
    return unpack(Statistics, read_tensors(path, PlanError), content, str(path))
