"""A killed run keeps the weight files that it has finished."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from grasp_lightning.config import ModelConfig
from grasp_lightning.models.loading import LoadedModel
from grasp_lightning.models.streamed import streamed_weights
from grasp_lightning.models.streamed_loading import load_streamed
from grasp_lightning.models.streamed_saving import save_streamed, verify_streamed
from grasp_lightning.run_folder import RunFolder
from grasp_lightning.storage.shards import KeptShards

SHARDS = 3


class _KilledError(Exception):
    pass


@pytest.fixture
def loaded(tiny_folder: Path) -> LoadedModel:
    return load_streamed(ModelConfig(path=str(tiny_folder), device="cpu", loading="streamed"))[0]


def saved(loaded: LoadedModel, folder: Path, shards: KeptShards, killed_at: int = 0) -> int:
    """Save a model in several files, and return how many of them were written."""
    weights = streamed_weights(loaded.model)
    assert weights is not None
    number = 0

    def tensors(names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        nonlocal number
        number += 1
        for position, found in enumerate(weights.tensors(names)):
            if number == killed_at and position > 0:
                raise _KilledError
            yield found

    total = sum(parameter.nbytes for parameter in loaded.model.parameters())
    hashes = save_streamed(
        loaded.model,
        tensors,
        folder,
        tokenizer=loaded.tokenizer,
        max_shard_size=total // (SHARDS - 1),
        write_file=shards,
    )
    verify_streamed(folder, hashes)
    return number


def damage(run: RunFolder) -> None:
    file = min(run.path("checkpoints").glob("model-*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def leave(run: RunFolder) -> None:
    del run


@pytest.mark.parametrize(
    ("key", "change", "written"),
    [("key", leave, SHARDS - 1), ("key", damage, SHARDS), ("other", leave, SHARDS)],
    ids=["killed", "damaged", "another model"],
)
def test_finished_files_are_not_written_again(
    key: str,
    change: Callable[[RunFolder], None],
    written: int,
    loaded: LoadedModel,
    tmp_path: Path,
) -> None:
    run = RunFolder.open(tmp_path / "run", {})
    assert saved(loaded, tmp_path / "whole", KeptShards(run, "earlier")) == SHARDS
    with pytest.raises(_KilledError):
        saved(loaded, tmp_path / "killed", KeptShards(run, "key"), killed_at=2)
    change(run)

    assert saved(loaded, tmp_path / "model", KeptShards(run, key)) == written

    files = sorted((tmp_path / "whole").glob("*.safetensors"))
    assert len(files) == SHARDS
    for file in files:
        left, right = load_file(file), load_file(tmp_path / "model" / file.name)
        assert left.keys() == right.keys()
        assert all(left[name].equal(right[name]) for name in left)
