"""``sampled_text.safetensors``: calibration text that the model has generated.

The file grows with the text, so a killed run resumes with the same text even on a machine that
rounds differently. A finished run keeps it for a later cut that reads the text again.
"""

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grasp_lightning import processes
from grasp_lightning.errors import PlanError
from grasp_lightning.evaluation.phases import Phases
from grasp_lightning.models.sampling import Track, sample_text
from grasp_lightning.run_folder import RunFolder
from grasp_lightning.run_folder.names import SAMPLED_TEXT
from grasp_lightning.storage.shared import SharedFolder
from grasp_lightning.storage.tensor_files import TensorFile, save_tensors

SAMPLE = "sample"
"""Name of the phase that writes it."""

_KEY, _IDS = "drawn", "input_ids"


class SampledText:
    """Generates text with a model, or reads earlier text: a ``data.self_text.Sampler``.

    Args:
        model: Returns the model, in ``eval()``; only called if text is missing.
        digest: Hash of its weights.
        phases: Times the generation, as ``sample``.
        earlier: Folder of a finished run whose text is used if it was drawn in the same way.
        shared: Where complete texts are shared with other runs.
        track: Draws a progress bar.
    """

    def __init__(
        self,
        model: Callable[[], PreTrainedModel],
        digest: str,
        phases: Phases,
        *,
        earlier: Path | None = None,
        shared: SharedFolder | None = None,
        track: Track = lambda items, _: items,
    ) -> None:
        self._model = model
        self._digest = digest
        self._phases = phases
        self._earlier = earlier
        self._shared = shared
        self._track = track
        self._run: RunFolder | None = None
        self._kept: tuple[Tensor, str] | None = None

    def keep_in(self, run: RunFolder) -> None:
        """Save earlier and later text in a run folder; only rank 0 writes."""
        if run is not self._run:
            self._run = run
            self._save()

    def __call__(
        self, num_windows: int, length: int, *, starts: Tensor, vocabulary: Tensor, seed: int
    ) -> Tensor:
        """Generate the texts that are missing, and return all; all processes must call this.

        Args:
            num_windows: Number of texts.
            length: Tokens per text.
            starts: Ids of the first token of a text, all equally likely, ``(S,)``.
            vocabulary: Ids of the following tokens, ``(K,)``, ascending.
            seed: Seed of all draws.

        Returns:
            Token ids, ``(num_windows, length)`` int64 on the CPU.
        """
        drawn = hashlib.sha256(f"{self._digest} {num_windows} {length} {seed}".encode())
        for ids in (starts, vocabulary):
            drawn.update(ids.numpy().astype("<i8").tobytes())
        key = drawn.hexdigest()
        written = processes.on_first(lambda: self._found(key, length, vocabulary))
        if written is not None:
            self._keep(written, key)
            if len(written) == num_windows:
                return written

        def sample() -> Tensor:
            return sample_text(
                self._model(),
                num_windows,
                length,
                starts=starts,
                vocabulary=vocabulary,
                seed=seed,
                written=written,
                keep=lambda ids: self._keep(ids, key),
                track=self._track,
            )

        with self._phases(SAMPLE):
            if self._shared is None:
                return sample()
            ids = self._shared.once(
                lambda: {"text": key},
                read=lambda folder: _read_shared(folder / SAMPLED_TEXT, key, length, vocabulary),
                make=sample,
                write=lambda folder, ids: _save(folder / SAMPLED_TEXT, ids, key),
            )
        self._keep(ids, key)
        return ids

    def _found(self, key: str, length: int, vocabulary: Tensor) -> Tensor | None:
        """Return the longest stored text that was drawn in the same way."""
        folders = [self._run.root if self._run else None, self._earlier]
        files = [folder / SAMPLED_TEXT for folder in folders if folder is not None]
        texts = [_read(file, key, length, vocabulary) for file in files]
        return max((ids for ids in texts if ids is not None), key=len, default=None)

    def _keep(self, ids: Tensor, key: str) -> None:
        self._kept = ids, key
        self._save()

    def _save(self) -> None:
        if self._run is not None and self._kept is not None:
            ids, key = self._kept
            self._run.write_with(SAMPLED_TEXT, partial(_save, ids=ids, key=key))


def _read(path: Path, key: str, length: int, vocabulary: Tensor) -> Tensor | None:
    """Return the texts in a file; None if there is none, or they were drawn in another way."""
    file = TensorFile(path, _KEY, advice="delete it to generate the text again")
    if not file or file.metadata()[_KEY] != key:
        return None
    ids = file.check(file.read(), _IDS, torch.int64, -1, length)
    # The first token of a text is one of the starts.
    if not torch.isin(ids[:, 1:], vocabulary).all():
        raise PlanError(file.damaged("it contains tokens that could not have been drawn"))
    return ids


def _read_shared(path: Path, key: str, length: int, vocabulary: Tensor) -> Tensor:
    """Return a shared text, the same in all processes."""
    ids = processes.on_first(lambda: _read(path, key, length, vocabulary))
    if ids is None:
        raise PlanError(f"{path} is damaged: it is not the text of its entry")
    return ids


def _save(path: Path, ids: Tensor, key: str) -> None:
    save_tensors(path, {_IDS: ids}, {_KEY: key}, may_grow=True)
