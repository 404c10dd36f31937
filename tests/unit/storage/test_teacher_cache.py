from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from grasp_lightning.data.batching import TokenSamples
from grasp_lightning.errors import ConfigError, NumericsError, OutputError, PlanError
from grasp_lightning.models.next_token import PREDICTION_KEYS, TopPredictions, top_predictions
from grasp_lightning.run_folder import RunFolder
from grasp_lightning.storage import teacher_cache
from grasp_lightning.storage.progress import has_progress
from grasp_lightning.storage.teacher_cache import Facts, TeacherCache
from grasp_lightning.storage.tensor_files import save_tensors
from grasp_lightning.training.compensation import predictions_of
from tests.conftest import tiny_model

FACTS: Facts = {"teacher": "a", "text": "b", "top_k": 8, "temperature": 1.0, "dtype": "float32"}
VOCABULARY = 260


def samples(seed: int = 0, count: int = 9) -> TokenSamples:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 20, (count,), generator=generator).tolist()
    ids = [torch.randint(256, (length,), generator=generator) for length in lengths]
    targets = [torch.rand(length, generator=generator) < 0.7 for length in lengths]
    for flags in targets:
        flags[0] = False
    return TokenSamples.from_rows(ids, targets)


PARTS = {"train": samples(), "validation": samples(1, 3)}


def predicted(part: TokenSamples, indices: Sequence[int]) -> TopPredictions:
    return predictions_of(
        tiny_model(vocab_size=VOCABULARY),
        part,
        indices,
        batch_size=2,
        top_k=8,
        temperature=1.0,
        precision="32-true",
    )


def unexpected(part: TokenSamples, indices: Sequence[int]) -> TopPredictions:
    del part, indices
    pytest.fail("the teacher runs again")


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_cache, "_FEWEST_TOKENS", 12)


def cache_in(
    folder: Path | None, run: RunFolder | None = None, facts: Facts | None = None
) -> TeacherCache:
    given = {**FACTS, **(facts or {})}
    return TeacherCache(PARTS, given, vocabulary=VOCABULARY, folder=folder, run=run)


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    cache_in(tmp_path).fill(predicted)
    return tmp_path


def test_every_sample_gets_what_the_teacher_says_of_it_alone(filled: Path) -> None:
    cache = cache_in(filled)
    assert cache.is_complete
    model, part = tiny_model(vocab_size=VOCABULARY), PARTS["train"]
    order = [5, 0, 8, 3]
    found = cache.extras("train")(order)
    expected = []
    for index in order:
        place = slice(int(part.starts[index]), int(part.starts[index] + part.lengths[index]))
        ids, targets = part.input_ids[place][None], part.targets[place][None]
        with torch.no_grad():
            logits = model(ids).logits
        expected.append(top_predictions(logits, ids, targets, top_k=8, temperature=1.0))
    for key, column in zip(PREDICTION_KEYS, zip(*expected, strict=True), strict=True):
        values = torch.cat(column)
        exact = key == "teacher_ids"
        torch.testing.assert_close(
            found[key].to(values.dtype), values, rtol=0 if exact else 5e-3, atol=1e-6
        )
    empty = cache.extras("validation")([])
    assert [tuple(empty[key].shape) for key in PREDICTION_KEYS] == [(0, 8), (0, 8), (0,)]
    size = sum(file.stat().st_size for file in filled.glob("*.safetensors"))
    assert cache.num_bytes < size < cache.num_bytes + 700 * len(list(filled.glob("*.safetensors")))


def test_a_complete_file_is_not_written_again(filled: Path) -> None:
    cache_in(filled).fill(unexpected)
    files = sorted(filled.glob("teacher-train-*"))
    assert len(files) > 3
    files[1].unlink()
    (filled / f".partial.{'0' * 16}.safetensors").write_bytes(b"of a killed process")
    kept = {file: file.stat().st_ino for file in filled.glob("teacher-*")}
    asked: list[Sequence[int]] = []

    def noting(part: TokenSamples, indices: Sequence[int]) -> TopPredictions:
        asked.append(indices)
        return predicted(part, indices)

    cache_in(filled).fill(noting)
    assert len(asked) == 1
    now = {file: file.stat().st_ino for file in filled.glob("teacher-*")}
    assert now.keys() == kept.keys() | {files[1]}
    assert all(now[file] == kept[file] for file in kept)
    assert not list(filled.glob(".partial*"))


@pytest.mark.parametrize(
    ("facts", "which"),
    [
        ({"teacher": "c"}, "another teacher"),
        ({"text": "c"}, "another text"),
        ({"top_k": 9}, "top_k 8, not 9"),
        ({"temperature": 2.0}, "temperature 1.0, not 2.0"),
        ({"dtype": "bfloat16"}, "dtype float32, not bfloat16"),
    ],
)
def test_other_predictions_are_refused(filled: Path, facts: Facts, which: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cache_in(filled, facts=facts).fill(unexpected)
    assert str(caught.value) == (
        f"distillation.cache_dir: {filled} holds the predictions of {which}; use another folder, "
        "or delete its teacher-*.safetensors"
    )


def test_a_damaged_file_is_named(filled: Path) -> None:
    file = filled / "teacher-train-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(PlanError, match=r"teacher-train-00001\.safetensors.*delete it to run the"):
        cache_in(filled).fill(unexpected)


def test_files_in_a_run_folder_are_progress_that_a_full_disk_leaves(tmp_path: Path) -> None:
    run = RunFolder.open(tmp_path / "run", {})
    calls = [0]

    def writing(path: Path, **content: Any) -> None:  # noqa: ANN401  tensors and metadata
        calls[0] += 1
        if calls[0] == 3:
            raise OSError(28, "No space left on device")
        save_tensors(path, **content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher_cache, "save_tensors", writing)
        with pytest.raises(OutputError, match="No space left on device"):
            cache_in(None, run).fill(predicted)
    assert has_progress(run)
    assert len(list((run.root / "checkpoints").glob("teacher-*"))) == 2
    cache_in(None, run).fill(predicted)
    assert cache_in(None, run).is_complete
    with pytest.raises(OutputError, match="free some space or use another output_dir"):
        cache_in(None, run).check_free_space(10**18)


def test_a_teacher_that_gives_nan_is_one_line() -> None:
    model = tiny_model(vocab_size=VOCABULARY)
    with torch.no_grad():
        model.lm_head.weight[3] = 3e38
    predict = partial(
        predictions_of, model, batch_size=2, top_k=8, temperature=1.0, precision="32-true"
    )
    with pytest.raises(NumericsError, match=r"^distillation\.teacher: the teacher gives NaN"):
        predict(PARTS["train"], range(2))
