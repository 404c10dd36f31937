"""What a fresh process reports about a folder with a different model than expected."""

import json
import logging
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from grasp_lightning.errors import ModelError, OutputError
from grasp_lightning.models import verification
from grasp_lightning.models.checkpoint import save_model
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.verification import can_generate, verify_saved
from tests.conftest import tiny_model
from tests.integration.test_artefact import custom, dropped, low_rank, narrowed


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def turn_a_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][3, 4] += 1e-3
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def forget_a_weight(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


DAMAGES = {
    "a weight": (turn_a_weight, "lm_head.weight has other values, shape or type"),
    "a missing weight": (forget_a_weight, "missing keys: model.norm.weight"),
    "what is computed": (
        lambda folder: edit_config(folder, rms_norm_eps=10.0),
        "it computes other logits",
    ),
    "what cannot be built": (
        lambda folder: edit_config(folder, num_hidden_layers="four"),
        "it stops with ",
    ),
}


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(lambda: low_rank(tiny_model("gpt2")), id="gpt2-low-rank"),
        pytest.param(lambda: narrowed(tiny_model()).bfloat16(), id="llama-narrowed-bf16"),
        pytest.param(lambda: dropped(tiny_model("gemma2")), id="gemma2-dropped"),
    ],
)
def test_a_model_that_was_saved_well_passes_and_is_left_as_it_was(
    model: object, tmp_path: Path
) -> None:
    made: PreTrainedModel = model()  # type: ignore[operator]  # a function without arguments
    made.train()
    save_model(made, tmp_path)
    state = torch.get_rng_state()
    assert can_generate(made)
    verify_saved(made, tmp_path)
    assert made.training
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("damage", DAMAGES)
def test_other_content_of_the_folder_is_reported_in_one_line(damage: str, tmp_path: Path) -> None:
    change, message = DAMAGES[damage]
    model = tiny_model()
    save_model(model, tmp_path)
    change(tmp_path)
    expected = f"a fresh process that loads the saved model gets a different one: {message}"
    with pytest.raises(ModelError, match=re.escape(expected)) as caught:
        verify_saved(model, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_model_that_lost_the_cache_it_needs_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("qwen3_5_text")
    DecoderView(model).drop([3])
    save_model(model, tmp_path)
    message = "the model cannot generate with its cache (`get_seq_length` can only be called on"
    with pytest.raises(ModelError, match=re.escape(message)):
        verify_saved(model, tmp_path)
    # A source that has none in the first place is named once, and passes.
    assert not can_generate(model)
    assert "Qwen3_5ForCausalLM does not generate with its cache (`get_seq_length`" in caplog.text
    verify_saved(model, tmp_path, generates=False)


def test_without_memory_for_another_model_one_warning_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(verification, "_BYTES_BESIDE", 10**18)
    with caplog.at_level(logging.WARNING):
        verify_saved(tiny_model(), tmp_path / "nothing")
    assert len(caplog.messages) == 1
    assert "the saved model is not loaded again to verify it: " in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "seconds", "message"),
    [
        (
            "import os; os.kill(os.getpid(), 9)",
            600,
            "was ended by SIGKILL, possibly because memory",
        ),
        ("import time; time.sleep(600)", 4, "took too long, possibly because memory ran out"),
    ],
)
def test_a_process_that_ends_early_or_never_can_be_tried_again(
    code: str, seconds: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = custom(tmp_path / "source")
    save_model(model, tmp_path / "model")
    file = tmp_path / "model" / "modeling_custom.py"
    file.write_text(f"{code}\n{file.read_text()}")
    monkeypatch.setattr(verification, "_PATIENCE", seconds)
    with pytest.raises(OutputError, match=f"verify it {message}"):
        verify_saved(model, tmp_path / "model")
