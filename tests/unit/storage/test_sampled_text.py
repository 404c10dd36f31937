from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from grasp_lightning.errors import PlanError
from grasp_lightning.evaluation.phases import Phases
from grasp_lightning.models.sampling import BATCH
from grasp_lightning.run_folder import RunFolder
from grasp_lightning.run_folder.names import SAMPLED_TEXT
from grasp_lightning.storage import sampled_text
from grasp_lightning.storage.sampled_text import SampledText
from tests.conftest import tiny_model

BYTES = torch.arange(256)
NUM_WINDOWS = BATCH + 3


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.open(str(tmp_path / "run"), {}, overwrite=False, protected=[])


def text_in(
    run: RunFolder | None, digest: str = "model", earlier: Path | None = None
) -> SampledText:
    text = SampledText(tiny_model, digest, Phases(), earlier=earlier)
    if run is not None:
        text.keep_in(run)
    return text


def draw(text: SampledText, seed: int = 0) -> Tensor:
    return text(NUM_WINDOWS, 12, starts=BYTES, vocabulary=BYTES, seed=seed)


def stored(folder: Path) -> Tensor:
    with safe_open(folder / SAMPLED_TEXT, framework="pt") as content:
        ids: Tensor = content.get_tensor("input_ids")
    return ids


def test_text_is_kept_as_it_grows(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    text = SampledText(tiny_model, "model", Phases())
    text.keep_in(run)
    original, lengths = text._keep, []

    def noting(ids: Tensor, key: str) -> None:
        original(ids, key)
        lengths.append(len(stored(run.root)))

    monkeypatch.setattr(text, "_keep", noting)
    written = draw(text)
    assert lengths == [BATCH, NUM_WINDOWS]
    assert torch.equal(stored(run.root), written)


def test_what_was_written_is_not_written_again(run: RunFolder) -> None:
    first = draw(text_in(run))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampled_text, "sample_text", lambda *_, **__: pytest.fail("written again"))
        assert torch.equal(draw(text_in(run)), first)


def test_what_was_cut_short_is_continued_with_what_is_there(run: RunFolder) -> None:
    whole = draw(text_in(run))
    with safe_open(run.root / SAMPLED_TEXT, framework="pt") as content:
        metadata = content.metadata()
    rounded = whole[:BATCH].clone()
    rounded[0, 5] = (rounded[0, 5] + 1) % 256  # as drawn by a machine that rounds differently
    save_file({"input_ids": rounded}, run.root / SAMPLED_TEXT, metadata=metadata)
    again = draw(text_in(run))
    assert torch.equal(again[:BATCH], rounded)
    assert torch.equal(again[BATCH:], whole[BATCH:])
    assert torch.equal(stored(run.root), again)


def test_text_of_another_model_or_draw_is_replaced(run: RunFolder) -> None:
    first = draw(text_in(run))
    second = draw(text_in(run), seed=1)
    assert not torch.equal(first, second)
    assert torch.equal(stored(run.root), second)
    marked = {"input_ids": torch.zeros_like(second)}
    with safe_open(run.root / SAMPLED_TEXT, framework="pt") as content:
        save_file(marked, run.root / SAMPLED_TEXT, metadata=content.metadata())
    assert not draw(text_in(run), seed=1).any()
    assert torch.equal(draw(text_in(run, digest="another"), seed=1), second)


def test_text_that_was_written_before_the_folder_was_open_is_kept_then(run: RunFolder) -> None:
    text = text_in(None)
    written = draw(text)
    assert not (run.root / SAMPLED_TEXT).exists()
    text.keep_in(run)
    assert torch.equal(stored(run.root), written)


def test_text_of_an_earlier_run_is_taken_over(run: RunFolder, tmp_path: Path) -> None:
    earlier = RunFolder.open(str(tmp_path / "earlier"), {}, overwrite=False, protected=[])
    written = draw(text_in(earlier))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampled_text, "sample_text", lambda *_, **__: pytest.fail("written again"))
        assert torch.equal(draw(text_in(run, earlier=earlier.root)), written)
    assert torch.equal(stored(run.root), written)


def test_a_damaged_file_is_named(run: RunFolder) -> None:
    draw(text_in(run))
    (run.root / SAMPLED_TEXT).write_bytes(b"damaged")
    with pytest.raises(PlanError, match=r"sampled_text.safetensors is damaged: .*; delete it"):
        draw(text_in(run))
