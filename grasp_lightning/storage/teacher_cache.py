"""The likeliest next tokens of a teacher, written once for every predicted token of the samples.

Files of some thousand tokens each appear when they are complete, so a killed run continues after
the last one. They are kept in the run folder until it is finished, or in a folder of their own for
other runs with the same teacher and samples.

Legend: n predicted tokens, k tokens kept of each prediction, V words in the vocabulary.
"""

import json
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from grasp_lightning import processes
from grasp_lightning.data.batching import Extras, TokenSamples
from grasp_lightning.errors import ConfigError, OutputError, PlanError
from grasp_lightning.models.next_token import (
    PREDICTION_KEYS,
    TopPredictions,
    stored_bytes,
    stored_id_type,
)
from grasp_lightning.progress import track
from grasp_lightning.reading.tensors import open_tensors
from grasp_lightning.run_folder import RunFolder, check_free_space, write_file
from grasp_lightning.run_folder.files import remove_partials
from grasp_lightning.run_folder.names import CHECKPOINTS
from grasp_lightning.storage.shared import locked
from grasp_lightning.storage.tensor_files import TensorFile, save_tensors
from grasp_lightning.storage.training import inputs_changed

TEACHER: Final = "teacher"
"""Name of the phase that writes the files."""

IDS, LOG_PROBS, TAIL = PREDICTION_KEYS
HASHED: Final = ("teacher", "text")
"""Facts whose values are hashes."""

Facts = Mapping[str, str | int | float]
"""What the predictions depend on: ``HASHED``, ``top_k``, and others by the words of messages."""
Predict = Callable[[TokenSamples, Sequence[int]], TopPredictions]
"""Predictions for all predicted tokens of some samples, in order."""

_FACTS = "facts"
_KEY = "distillation.cache_dir"
_AGAIN = "delete it to run the teacher on that part again"
_MANY_FILES = 64
_FEWEST_TOKENS, _MOST_TOKENS = 2**11, 2**16  # per file
_MOST_OPEN = 128


class _Shard(NamedTuple):
    """One file: samples ``first`` to ``last - 1`` of a part, and their n predicted tokens."""

    part: str
    number: int
    first: int
    last: int
    size: int

    @property
    def name(self) -> str:
        return f"teacher-{self.part}-{self.number:05d}.safetensors"


def has_shards(folder: Path) -> bool:
    """Return whether a folder, which may be absent, has files of predictions."""
    return any(folder.glob("teacher-*"))


class TeacherCache:
    """The predictions of a teacher for the samples of a training, on disk.

    Args:
        samples: Samples by the name of their part.
        facts: What the predictions depend on, ``top_k`` included; files with others are refused.
        vocabulary: V.
        folder: Where the files are shared; None keeps them in ``run``.
        run: The run folder; it may be None until ``fill``.

    """

    def __init__(
        self,
        samples: Mapping[str, TokenSamples],
        facts: Facts,
        *,
        vocabulary: int,
        folder: Path | None = None,
        run: RunFolder | None = None,
    ) -> None:
        self._samples = samples
        self._facts = json.dumps(facts, sort_keys=True)
        self._top_k = int(facts["top_k"])
        self._vocabulary = vocabulary
        self._id_type = stored_id_type(vocabulary)
        self._shared = folder
        self._run = run
        self._shards = {part: _shards(part, whole) for part, whole in samples.items()}
        # Predicted tokens of the part before each sample, (N + 1,).
        self._starts = {part: _sums(whole.num_targets_of) for part, whole in samples.items()}
        self._open: dict[_Shard, Any] = {}  # Any: safe_open has no public type
        self._opened = ExitStack()

    @property
    def num_bytes(self) -> int:
        """Size of all files, without their headers."""
        return sum(map(self._bytes, self._all))

    def keep_in(self, run: RunFolder) -> None:
        """Keep the files in a run folder, unless they are shared; that run writes them."""
        self._run = run

    def check_free_space(self, bytes_more: int = 0) -> None:
        """Refuse a disk without room for the files that are missing, by an ``OutputError``.

        Args:
            bytes_more: What else the run writes, for files that are kept in its folder.
        """
        needed = sum(map(self._bytes, self._missing()))
        if self._shared is not None:
            check_free_space(self._shared, needed, _KEY)
        elif self._run is not None:
            self._run.check_free_space(needed + bytes_more)

    @property
    def is_complete(self) -> bool:
        """Whether no file is missing.

        Other predictions in the shared folder are a ``ConfigError``, in the run folder an
        ``OutputError``. A damaged file is a ``PlanError``.
        """
        return not self._missing()

    def fill(self, predict: Predict) -> None:
        """Write the files that are missing; all processes of a run must call this.

        Processes share the files. A second run that shares the folder waits. A full disk is an
        ``OutputError``, and complete files stay.

        Args:
            predict: Runs the teacher; not called if no file is missing.
        """
        with ExitStack() as held:
            if self._shared is not None:
                held.enter_context(locked(self._shared / "teacher.lock"))
            missing = processes.on_first(self._missing)
            if not missing:
                return
            processes.on_first(lambda: self._claim(missing))
            _together(lambda: self._write(missing, predict))

    def extras(self, part: str) -> Extras:
        """Return a reader of the predictions for some samples of a part, as ``TopPredictions``."""
        return partial(self._read, part)

    @property
    def _all(self) -> list[_Shard]:
        return [shard for shards in self._shards.values() for shard in shards]

    def _bytes(self, shard: _Shard) -> int:
        return shard.size * stored_bytes(self._top_k, self._vocabulary)

    def _path(self, shard: _Shard) -> Path:
        if self._shared is not None:
            return self._shared / shard.name
        assert self._run is not None  # see _missing
        return self._run.path(f"{CHECKPOINTS}/{shard.name}")

    def _missing(self) -> list[_Shard]:
        if self._shared is None and self._run is None:
            return self._all
        return [shard for shard in self._all if not self._is_there(shard)]

    def _is_there(self, shard: _Shard) -> bool:
        file = self._file(shard)
        if not file:
            return False
        stored = file.metadata()[_FACTS]
        if stored != self._facts:
            if self._shared is None and self._run is not None:
                raise OutputError(inputs_changed(self._run))
            raise ConfigError(self._other(shard, stored))
        expected = {IDS: (shard.size, self._top_k), TAIL: (shard.size,)}
        if any(file.shapes.get(name) != shape for name, shape in expected.items()):
            raise PlanError(file.damaged("it has another number of tokens"))
        return True

    def _file(self, shard: _Shard) -> TensorFile:
        return TensorFile(self._path(shard), _FACTS, advice=_AGAIN)

    def _other(self, shard: _Shard, stored: str) -> str:
        """Return the message about a file that was written under other facts."""
        theirs, ours = json.loads(stored), json.loads(self._facts)
        name = next(key for key in ours if theirs.get(key) != ours[key])
        which = f"another {name}"
        if name not in HASHED:
            which = f"{name} {theirs.get(name)}, not {ours[name]}"
        return (
            f"{_KEY}: {self._path(shard).parent} holds the predictions of {which}; use another "
            "folder, or delete its teacher-*.safetensors"
        )

    def _claim(self, missing: Sequence[_Shard]) -> None:
        if self._shared is not None:
            remove_partials(self._shared)
            return
        assert self._run is not None  # see keep_in
        for shard in missing:
            self._run.claim(f"{CHECKPOINTS}/{shard.name}")

    def _write(self, missing: Sequence[_Shard], predict: Predict) -> None:
        size = sum(map(self._bytes, missing)) / 1e6
        own = processes.own_share(missing)
        for shard in track(own, f"cache the teacher ({size:.1f} MB)"):
            samples = self._samples[shard.part]
            ids, log_probs, tail = predict(samples, range(shard.first, shard.last))
            tensors = {
                IDS: ids.to("cpu", self._id_type),
                LOG_PROBS: log_probs.to("cpu", torch.bfloat16),
                TAIL: tail.to("cpu", torch.float32),
            }
            write = partial(save_tensors, tensors=tensors, metadata={_FACTS: self._facts})
            if self._shared is not None:
                write_file(self._path(shard), write)
            else:
                assert self._run is not None  # see keep_in
                self._run.write_claimed(f"{CHECKPOINTS}/{shard.name}", write)

    def _read(self, part: str, samples: Sequence[int]) -> dict[str, Tensor]:
        """Return the predictions for some samples, in the order of their predicted tokens."""
        found = [self._of_sample(part, sample) for sample in samples]
        if not found:
            empty = torch.empty(0, self._top_k)
            return {IDS: empty.long(), LOG_PROBS: empty.bfloat16(), TAIL: empty.new_empty(0)}
        ids, log_probs, tail = (torch.cat(column) for column in zip(*found, strict=True))
        return {IDS: ids.long(), LOG_PROBS: log_probs, TAIL: tail}

    def _of_sample(self, part: str, sample: int) -> TopPredictions:
        shards = self._shards[part]
        shard = shards[bisect_right(shards, sample, key=lambda one: one.first) - 1]
        starts = self._starts[part]
        first, last = (int(starts[i] - starts[shard.first]) for i in (sample, sample + 1))
        content = self._content(shard)
        found = TopPredictions(*(content.get_slice(name)[first:last] for name in PREDICTION_KEYS))
        if last > first and (
            int(found.ids.long().max()) >= self._vocabulary
            or found.log_probs.isnan().any()
            or not found.tail.isfinite().all()
        ):
            raise PlanError(self._file(shard).damaged("it has predictions that cannot be"))
        return found

    def _content(self, shard: _Shard) -> Any:  # noqa: ANN401  safe_open has no public type
        if shard not in self._open:
            if len(self._open) == _MOST_OPEN:
                self._opened.close()
                self._open.clear()
            opened = open_tensors(self._path(shard), PlanError, advice=_AGAIN)
            self._open[shard] = self._opened.enter_context(opened)
        return self._open[shard]


def _together(work: Callable[[], None]) -> None:
    """Do work in all processes; the error of one is raised in all."""
    error = None
    try:
        work()
    except Exception as raised:  # noqa: BLE001  raised again below
        error = raised
    for failure in processes.gather(error):
        if failure is not None:
            raise failure


def _sums(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _shards(part: str, samples: TokenSamples) -> list[_Shard]:
    """Divide samples into files: about 64, each of a size that a few seconds or minutes fill."""
    size = min(max(samples.num_targets // _MANY_FILES, _FEWEST_TOKENS), _MOST_TOKENS)
    shards: list[_Shard] = []
    first = tokens = 0
    counts = samples.num_targets_of.tolist()
    for index, count in enumerate(counts, start=1):
        tokens += count
        if tokens >= size or index == len(counts):
            shards.append(_Shard(part, len(shards), first, index, tokens))
            first, tokens = index, 0
    return shards
