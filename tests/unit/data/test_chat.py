import json
import re
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
from transformers import PreTrainedTokenizerFast

from grasp_lightning.config import CalibrationConfig
from grasp_lightning.data.chat import calibration_documents, chat_text
from grasp_lightning.data.instruction_files import InstructionSample
from grasp_lightning.data.instructions import alpaca_prompt
from grasp_lightning.data.mixture import mixture_parts
from grasp_lightning.data.section_windows import calibration_windows
from grasp_lightning.data.sources import Documents, MixturePart, source_licence
from grasp_lightning.errors import ConfigError, DataError

TEMPLATE = (
    "{% for message in messages %}<s>{{ message.role }}: {{ message.content }}</s>{% endfor %}"
)
SAMPLE = InstructionSample(instruction="Add.", input="1 and 2", output="3")


@pytest.fixture
def samples_file(tmp_path: Path) -> str:
    samples = [
        {"instruction": f"Say {number}.", "input": "", "output": "" if number == 1 else f"{number}"}
        for number in range(20)
    ]
    path = tmp_path / "samples.json"
    path.write_text(json.dumps(samples))
    return str(path)


def documents(tokenizer: PreTrainedTokenizerFast, path: str, rows: str | None = None) -> Documents:
    config = CalibrationConfig(source="instructions", path=path, rows=rows)
    (part,) = mixture_parts(config, "calibration")
    return calibration_documents(part, tokenizer, "calibration")


def test_a_sample_is_a_conversation_in_the_words_of_the_chat_template(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.chat_template = TEMPLATE
    assert chat_text(SAMPLE, tokenizer) == "<s>user: Add.\n\n1 and 2</s><s>assistant: 3</s>"
    short = replace(SAMPLE, input="")
    assert chat_text(short, tokenizer) == "<s>user: Add.</s><s>assistant: 3</s>"


def test_without_a_chat_template_a_sample_is_in_the_words_of_alpaca(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    text = chat_text(SAMPLE, tokenizer)
    assert text == alpaca_prompt(SAMPLE) + "3"
    assert text.endswith("### Input:\n1 and 2\n\n### Response:\n3")


def test_the_day_does_not_change_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = (
        "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y, %Y-%m-%d') }}{% endif %}"
        + TEMPLATE
    )
    assert chat_text(SAMPLE, tokenizer).startswith("26 Jul 2024, 2024-07-26<s>user")


def test_a_template_that_refuses_the_conversation_is_one_line(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.chat_template = "{{ raise_exception('no\nsystem message') }}"
    with pytest.raises(DataError) as caught:
        chat_text(SAMPLE, tokenizer)
    assert str(caught.value) == (
        "the tokenizer's chat template cannot render an instruction with its answer: no; "
        "use plain text"
    )


def test_special_tokens_of_the_template_become_tokens(
    tokenizer: PreTrainedTokenizerFast, samples_file: str
) -> None:
    tokenizer.chat_template = TEMPLATE
    config = CalibrationConfig(source="instructions", path=samples_file, num_samples=3, seqlen=64)
    windows = calibration_windows(config, tokenizer, seed=0)
    assert windows.input_ids.shape == (3, 64)
    assert {256, 257} <= set(windows.input_ids.flatten().tolist())
    assert "<s>user: Say" in str(tokenizer.decode(windows.input_ids.flatten()))


def test_rows_are_samples_and_blank_answers_are_left_out(
    tokenizer: PreTrainedTokenizerFast, samples_file: str
) -> None:
    assert len(documents(tokenizer, samples_file).texts) == 19
    some = documents(tokenizer, samples_file, "1-3")
    assert [text[-1] for text in some.texts] == ["2", "3"]
    assert some.name == f"rows 1-3 of {samples_file}"
    with pytest.raises(DataError, match=r"calibration\.rows 1-20 is out of range: .* has 20 rows"):
        documents(tokenizer, samples_file, "1-20")
    with pytest.raises(DataError, match="every sample has a blank output"):
        documents(tokenizer, samples_file, "1-1")


def test_a_file_of_another_kind_is_named(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=re.escape("expected a .jsonl, .json or .parquet file")):
        documents(tokenizer, str(tmp_path / "a.txt"))


@pytest.mark.skipif(not datasets.config.HF_HUB_OFFLINE, reason="HF_HUB_OFFLINE is not set")
def test_without_internet_alpaca_says_what_to_do(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    part = MixturePart(source="alpaca", num_samples=1)
    with pytest.raises(DataError) as caught:
        calibration_documents(part, tokenizer, "calibration")
    assert str(caught.value).startswith("alpaca (yahma/alpaca-cleaned) cannot be loaded")
    assert str(caught.value).endswith(
        "use calibration.source: instructions with calibration.path: a .jsonl, .json or .parquet "
        "file"
    )


def test_licences_of_what_can_be_named() -> None:
    assert source_licence("alpaca") == "CC BY-NC 4.0"
    assert source_licence("self") is None
    assert source_licence("instructions") is None


def test_real_samples_are_packed(tokenizer: PreTrainedTokenizerFast, grasp_data: Path) -> None:
    path = str(grasp_data / "alpaca" / "train.jsonl")
    config = CalibrationConfig(
        source="instructions", path=path, rows="0-99", num_samples=8, seqlen=128
    )
    assert len(calibration_windows(config, tokenizer, seed=0)) == 8
    with pytest.raises(ConfigError, match=r"calibration\.field 'body' has no effect"):
        calibration_windows(replace(config, field="body"), tokenizer, seed=0)
