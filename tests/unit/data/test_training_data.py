import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from grasp_lightning.config import BatchOrder, InstructionConfig, TextConfig, TrainingConfig
from grasp_lightning.data.batching import TokenSamples
from grasp_lightning.data.datamodules import InstructionData, TextData, TrainingData
from grasp_lightning.data.steps import TrainingSteps
from grasp_lightning.errors import ConfigError, DataError

TRAINING = TrainingConfig(batch_size=4, micro_batch_size=3, epochs=2)


def write_instructions(folder: Path, count: int = 20, answer: str = "answer") -> str:
    samples = [
        {"instruction": f"task {number}", "output": f"{answer} {number}" + "." * (number % 5)}
        for number in range(count)
    ]
    file = folder / "samples.jsonl"
    file.write_text("\n".join(json.dumps(sample) for sample in samples), encoding="utf-8")
    return str(file)


def instruction_data(
    path: str,
    tokenizer: PreTrainedTokenizerFast,
    seed: int = 0,
    **options: Any,  # noqa: ANN401  any key of the section
) -> InstructionData:
    given = {"source": "file", "path": path, "num_validation": 6, **options}
    return InstructionData(InstructionConfig(**given), tokenizer, TRAINING, seed)


def text_data(
    tokenizer: PreTrainedTokenizerFast,
    seed: int = 0,
    **options: Any,  # noqa: ANN401  any key of the section
) -> TextData:
    """Windows of the embedded corpus."""
    given = {"source": "pydoc", "num_samples": 10, "num_validation": 4, "seqlen": 12, **options}
    return TextData(TextConfig(**given), tokenizer, TRAINING, seed)


@pytest.fixture
def samples(tmp_path: Path) -> str:
    return write_instructions(tmp_path)


def rows(samples: TokenSamples) -> list[tuple[int, ...]]:
    parts: Sequence[Tensor] = samples.input_ids.split(samples.lengths.tolist())
    return [tuple(part.tolist()) for part in parts]


def text_of(ids: Tensor | Sequence[int], tokenizer: PreTrainedTokenizerFast) -> str:
    return str(tokenizer.decode(torch.as_tensor(ids)))


def validation_rows(data: TrainingData) -> list[tuple[int, ...]]:
    return [
        tuple(ids[mask].tolist())
        for part in data.val_dataloader()
        if isinstance(part, dict)
        for ids, mask in zip(part["input_ids"], part["mask"], strict=True)
    ]


# Instructions


def test_instructions_to_validate_on_are_not_trained_on(
    samples: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    train, validation, _ = instruction_data(samples, tokenizer).samples
    assert (len(train), len(validation)) == (14, 6)
    texts = [text_of(row, tokenizer) for row in rows(train) + rows(validation)]
    assert len(set(texts)) == 20
    assert all(f"task {n}\n" in "".join(texts) for n in range(20))


def test_instructions_are_counted(samples: str, tokenizer: PreTrainedTokenizerFast) -> None:
    lengths = instruction_data(samples, tokenizer).samples.train.lengths
    longest = int(lengths.max())
    is_cut = int((lengths == longest).sum())
    data = instruction_data(samples, tokenizer, max_length=longest - 1)
    assert data.row_length == longest - 1
    assert int(data.samples.train.lengths.max()) == longest - 1
    assert data.samples.counts["cut"] == is_cut > 0
    assert (data.samples.counts["train"], data.samples.counts["validation"]) == (14, 6)


def test_the_section_says_how_many_instructions_are_trained_on(
    samples: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    some = instruction_data(samples, tokenizer, num_train=5, num_validation=0).samples
    assert (len(some.train), len(some.validation)) == (5, 0)
    assert (some.counts["train"], some.counts["validation"]) == (5, 0)


@pytest.mark.parametrize(
    ("option", "start", "end"),
    [
        ({"train_on_inputs": False}, "Below", "answer"),
        ({"add_eos": True}, "Below", "</s>"),
        ({"add_bos": True}, "<s>", "answer"),
    ],
)
def test_options_of_the_section_reach_the_tokens(
    samples: str, tokenizer: PreTrainedTokenizerFast, option: dict[str, Any], start: str, end: str
) -> None:
    data = instruction_data(samples, tokenizer, **option).samples.train
    length = int(data.lengths[0])
    text = text_of(data.input_ids[:length], tokenizer)
    assert text.startswith(start)
    assert end in text[-12:]
    learned = text_of(data.input_ids[:length][data.targets[:length]], tokenizer)
    assert learned.startswith("answer") == ("train_on_inputs" in option)


def test_answers_of_both_parts_are_learned_by_the_same_rule(
    samples: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    for part in instruction_data(samples, tokenizer, train_on_inputs=False).samples[:2]:
        assert text_of(part.input_ids[part.targets], tokenizer).count("answer") == len(part)


@pytest.mark.parametrize("order", ["shuffled", "length_grouped", "packed"])
def test_the_order_is_that_of_the_section(
    samples: str, tokenizer: PreTrainedTokenizerFast, order: BatchOrder
) -> None:
    data = instruction_data(samples, tokenizer, order=order, max_length=512)
    assert data.order == order
    shared = max(len(row) for row in data.steps().rows(0))
    assert (shared > 1) == (order == "packed")
    assert len(data.train_dataloader()) == (4 if order == "packed" else 8)


@pytest.mark.parametrize("length", [1, 0, -3])
def test_a_row_of_fewer_than_two_tokens_is_refused_at_once(
    samples: str, tokenizer: PreTrainedTokenizerFast, length: int
) -> None:
    with pytest.raises(ConfigError) as caught:
        instruction_data(samples, tokenizer, max_length=length)
    assert str(caught.value) == f"data.max_length must be at least 2, got {length}"


def test_too_few_instructions_are_an_error_of_setup(
    samples: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    data = instruction_data(samples, tokenizer, num_validation=20)
    with pytest.raises(ConfigError) as caught:
        data.setup("fit")
    assert str(caught.value) == (
        "data.num_validation is 20: with 1 for training, more than the 20 samples of "
        f"{samples}; lower data.num_validation"
    )


def test_instructions_that_are_all_too_long_are_an_error(
    samples: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(DataError, match="has no sample with an answer within max_length 16"):
        instruction_data(samples, tokenizer, max_length=16).setup("fit")


def test_an_unknown_source_of_instructions_is_an_error(
    samples: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ConfigError, match=r"data\.source 'dolly' is unknown; expected one of"):
        instruction_data(samples, tokenizer, source="dolly").setup("fit")


# Text


def test_windows_to_validate_on_are_not_trained_on(tokenizer: PreTrainedTokenizerFast) -> None:
    data = text_data(tokenizer)
    train, validation, counts = data.samples
    assert set(train.lengths.tolist()) == set(validation.lengths.tolist()) == {12}
    assert (len(train), len(validation)) == (10, 4)
    assert counts == {"train": 10, "validation": 4}
    assert len({*rows(train), *rows(validation)}) == 14
    assert (data.order, data.row_length) == ("shuffled", 12)


def test_windows_of_a_file_are_all_different_pieces_of_it(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    text = "".join(f"{number:04d}" for number in range(42))  # 14 windows of 12 bytes
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    data = text_data(tokenizer, source="file", path=str(tmp_path / "a.txt"))
    train, validation, _ = data.samples
    pieces = {text_of(row, tokenizer) for row in rows(train) + rows(validation)}
    assert pieces == {text[start : start + 12] for start in range(0, len(text), 12)}
    assert not train.targets[train.starts].any()
    assert int(train.num_targets) == 10 * 11


def test_both_parts_of_a_mixture_have_its_shares(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    paths = []
    for name in ("lower", "upper"):
        words = [f"{number:05d}" + (name[0] * 7) for number in range(20)]  # 20 windows
        paths.append(str(tmp_path / f"{name}.txt"))
        Path(paths[-1]).write_text("".join(words), encoding="utf-8")

    def written(num_windows: int, length: int, **_: object) -> Tensor:
        return 65 + torch.arange(num_windows)[:, None].expand(-1, length)

    config = TextConfig(
        source=("file", "file", "self"),
        path=tuple(paths),
        weights=(2, 1, 1),
        num_samples=16,
        num_validation=8,
        seqlen=12,
    )
    data = TextData(config, tokenizer, TRAINING, 0, written)
    train, validation, _ = data.samples
    kinds = [
        [text_of(row, tokenizer)[-1] for row in rows(part)[:count]]
        for part, count in ((train, 8), (train, 16), (validation, 8))
    ]
    assert [(kind.count("l"), kind.count("u")) for kind in kinds] == [(4, 2), (8, 4), (4, 2)]
    assert len({*rows(train), *rows(validation)}) == 24


def test_windows_may_start_with_a_token_of_their_own(tokenizer: PreTrainedTokenizerFast) -> None:
    train = text_data(tokenizer, add_bos=True).samples.train
    assert {row[0] for row in rows(train)} == {tokenizer.bos_token_id}


@pytest.mark.parametrize("numbers", [(0, 4), (-1, 0), (3, -1)])
def test_a_number_of_windows_that_is_too_small_is_refused_at_once(
    tokenizer: PreTrainedTokenizerFast, numbers: tuple[int, int]
) -> None:
    num_samples, num_validation = numbers
    with pytest.raises(ConfigError) as caught:
        text_data(tokenizer, num_samples=num_samples, num_validation=num_validation)
    assert str(caught.value) == (
        "text.num_samples must be at least 1 and text.num_validation at least 0, got "
        f"{num_samples} and {num_validation}"
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"seqlen": 1}, ConfigError, "text.seqlen must be at least 2, got 1"),
        ({"source": "news"}, ConfigError, "text.source 'news' is unknown; expected one of pydoc,"),
        (
            {"source": "file"},
            ConfigError,
            "text.source file needs text.path: a .txt, .jsonl or .parquet file",
        ),
        (
            {"path": "a.txt"},
            ConfigError,
            "text.path 'a.txt' has no effect with text.source pydoc; remove it",
        ),
        (
            {"field": "body"},
            ConfigError,
            "text.field 'body' has no effect: text.source is pydoc; remove it",
        ),
        ({"split": "dev"}, ConfigError, "text.split 'dev' is unknown"),
        ({"seqlen": 50_000}, DataError, "text: "),
    ],
)
def test_messages_name_the_section_of_the_text(
    tokenizer: PreTrainedTokenizerFast,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error) as caught:
        text_data(tokenizer, **options).setup("fit")
    assert str(caught.value).startswith(message)
    assert "calibration" not in str(caught.value)


def test_too_short_a_text_is_said_in_the_numbers_of_the_section(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    (tmp_path / "a.txt").write_text("0123456789" * 12, encoding="utf-8")  # 10 windows
    data = text_data(tokenizer, source="file", path=str(tmp_path / "a.txt"))
    with pytest.raises(DataError) as caught:
        data.setup("fit")
    assert "10 windows of 12 tokens; lower text.num_samples" in str(caught.value)
    assert "num_samples is 14" not in str(caught.value)


# Both


@pytest.fixture(params=["instructions", "text"])
def data(
    request: pytest.FixtureRequest, samples: str, tokenizer: PreTrainedTokenizerFast
) -> TrainingData:
    if request.param == "text":
        return text_data(tokenizer)
    return instruction_data(samples, tokenizer)


def test_the_seed_changes_which_samples_are_set_aside(
    data: TrainingData, samples: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    other: TrainingData = instruction_data(samples, tokenizer, seed=1)
    if isinstance(data, TextData):
        other = text_data(tokenizer, seed=1)
    assert rows(other.samples.validation) != rows(data.samples.validation)
    assert other.fingerprint.keys() == data.fingerprint.keys() == {"train", "validation", "seed"}
    for key in ("train", "validation", "seed"):
        assert other.fingerprint[key] != data.fingerprint[key]


def test_instructions_of_other_content_have_another_fingerprint(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    found = []
    for answer in ("answer", "answer", "Answer"):
        path = write_instructions(tmp_path, answer=answer)
        found.append(instruction_data(path, tokenizer).fingerprint)
    assert found[0] == found[1]
    assert found[0]["train"] != found[2]["train"]
    assert found[0]["validation"] != found[2]["validation"]


def test_what_is_learned_of_a_sample_is_in_the_fingerprint(
    samples: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    whole = instruction_data(samples, tokenizer)
    answers = instruction_data(samples, tokenizer, train_on_inputs=False)
    assert torch.equal(whole.samples.train.input_ids, answers.samples.train.input_ids)
    assert whole.fingerprint["train"] != answers.fingerprint["train"]


def test_another_length_of_windows_is_another_fingerprint(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    first, second = text_data(tokenizer), text_data(tokenizer, seqlen=13)
    assert first.fingerprint["train"] != second.fingerprint["train"]


def test_samples_are_read_once(data: TrainingData) -> None:
    data.setup("fit")
    assert data.samples is data.samples


def test_each_loader_starts_at_the_first_step(data: TrainingData) -> None:
    first = data.train_dataloader()
    assert isinstance(first, TrainingSteps)
    next(iter(first))
    assert data.train_dataloader().state_dict() == {"position": 0}
    assert len(first) == 2 * first.steps_per_epoch == 2 * -(-len(data.samples.train) // 4)


def test_validation_samples_come_once_in_the_same_micro_batches(data: TrainingData) -> None:
    first = validation_rows(data)
    assert validation_rows(data) == first
    assert len(data.val_dataloader()) == 2  # of at most 3 samples each
    assert sorted(first) == sorted(rows(data.samples.validation))


def test_no_validation_samples_give_no_loaders(
    samples: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert instruction_data(samples, tokenizer, num_validation=0).val_dataloader() == []
    assert text_data(tokenizer, num_validation=0).val_dataloader() == []


def test_packed_validation_samples_share_rows(
    samples: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    data = instruction_data(samples, tokenizer, order="packed", max_length=400)
    (part,) = data.val_dataloader()
    assert isinstance(part, dict)
    assert int((part["mask"] & (part["position_ids"] == 0)).sum()) == 6
    assert len(part["input_ids"]) < 6
