import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from grasp_lightning.data import instruction_files
from grasp_lightning.data.instruction_files import (
    HUB_INSTRUCTIONS,
    Instructions,
    InstructionSample,
    read_instructions,
)
from grasp_lightning.data.instructions import (
    alpaca_prompt,
    split_instructions,
    tokenize_instructions,
)
from grasp_lightning.errors import ConfigError, DataError

BOS, EOS = 256, 257  # of the byte tokenizer, as text <s> and </s>

SAMPLE = InstructionSample("Add {1} and 2.", "", "Three.")
PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n"
    "\n"
    "### Instruction:\n"
    "Add {1} and 2.\n"
    "\n"
    "### Response:\n"
)
LENGTH = len(PROMPT)  # also in tokens: one per byte
ANSWER = len("Three.")


def instructions(*samples: InstructionSample) -> Instructions:
    return Instructions(samples, "some samples")


def with_output(*outputs: str) -> Instructions:
    return instructions(*(replace(SAMPLE, output=output) for output in outputs))


def numbered(count: int) -> Instructions:
    return instructions(*(InstructionSample(f"task {n}", "", f"answer {n}") for n in range(count)))


# Template


def test_the_prompt_without_input_is_the_published_one() -> None:
    assert alpaca_prompt(SAMPLE) == PROMPT


def test_the_prompt_with_input_is_the_published_one() -> None:
    assert alpaca_prompt(InstructionSample("Sort the words.", "b\na", "a b")) == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n"
        "\n"
        "### Instruction:\n"
        "Sort the words.\n"
        "\n"
        "### Input:\n"
        "b\na\n"
        "\n"
        "### Response:\n"
    )


# Tokens


def test_all_tokens_but_the_first_are_learned_with_inputs(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokens, counts = tokenize_instructions(instructions(SAMPLE), tokenizer, max_length=256)
    assert tokenizer.decode(tokens.input_ids) == PROMPT + "Three."
    assert tokens.targets.tolist() == [False] + [True] * (LENGTH - 1 + ANSWER)
    assert (counts.read, counts.kept, counts.cut) == (1, 1, 0)


def test_only_the_answer_is_learned_without_inputs(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens, _ = tokenize_instructions(
        instructions(SAMPLE), tokenizer, max_length=256, train_on_inputs=False
    )
    assert tokens.targets.tolist() == [False] * LENGTH + [True] * ANSWER
    assert tokenizer.decode(tokens.input_ids[tokens.targets]) == "Three."


@pytest.mark.parametrize("train_on_inputs", [True, False])
def test_the_end_of_sequence_is_an_option_and_is_learned(
    tokenizer: PreTrainedTokenizerFast, train_on_inputs: bool
) -> None:
    tokens, counts = tokenize_instructions(
        instructions(SAMPLE),
        tokenizer,
        max_length=LENGTH + ANSWER + 1,
        train_on_inputs=train_on_inputs,
        add_eos=True,
    )
    assert tokens.input_ids[-1] == EOS
    assert tokens.targets[-1]
    assert counts.cut == 0


def test_an_end_of_sequence_that_has_no_room_is_left_out_and_counts_as_cut(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokens, counts = tokenize_instructions(
        instructions(SAMPLE), tokenizer, max_length=LENGTH + ANSWER, add_eos=True
    )
    assert tokenizer.decode(tokens.input_ids) == PROMPT + "Three."
    assert (counts.cut, counts.cut_prompts, counts.kept) == (1, 0, 1)


@pytest.mark.parametrize("add_bos", [True, None])
def test_a_beginning_of_sequence_is_added_on_request_or_where_the_tokenizer_adds_one(
    tokenizer: PreTrainedTokenizerFast, add_bos: bool | None
) -> None:
    if add_bos is None:
        template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
        tokenizer.backend_tokenizer.post_processor = template
    tokens, _ = tokenize_instructions(
        instructions(SAMPLE), tokenizer, max_length=256, train_on_inputs=False, add_bos=add_bos
    )
    assert tokens.input_ids[0] == BOS
    assert tokenizer.decode(tokens.input_ids[1:]) == PROMPT + "Three."
    assert tokens.targets.tolist() == [False] * (1 + LENGTH) + [True] * ANSWER


def test_no_beginning_of_sequence_is_added_where_the_tokenizer_adds_none(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokens, _ = tokenize_instructions(instructions(SAMPLE), tokenizer, max_length=256)
    assert BOS not in tokens.input_ids


def test_a_token_that_joins_prompt_and_answer_belongs_to_the_answer() -> None:
    newline = "\u010a"  # a line feed, as byte-level tokenizers write it
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate([*alphabet, newline * 2])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[(newline, newline)]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    merging = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokens, _ = tokenize_instructions(
        with_output("\nThree."), merging, max_length=256, train_on_inputs=False
    )
    learned = tokens.input_ids[tokens.targets].tolist()
    assert learned[0] == vocabulary[newline * 2]
    assert len(learned) == 1 + ANSWER


def test_an_answer_is_cut_at_the_maximal_length_and_counted(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokens, counts = tokenize_instructions(
        with_output("ab", "abcd", "abc"), tokenizer, max_length=LENGTH + 3, train_on_inputs=False
    )
    assert tokens.lengths.tolist() == [LENGTH + 2, LENGTH + 3, LENGTH + 3]
    assert tokenizer.decode(tokens.input_ids[tokens.targets]) == "ab" + "abc" + "abc"
    assert (counts.kept, counts.cut, counts.cut_prompts, counts.no_answer) == (3, 1, 0, 0)


def test_samples_without_an_answer_are_left_out_and_counted(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    samples = instructions(
        replace(SAMPLE, output="kept"),
        replace(SAMPLE, instruction=SAMPLE.instruction + "+" * 5),  # the prompt itself is cut
        replace(SAMPLE, instruction=SAMPLE.instruction + "+" * 4),  # it fits, and no more
        replace(SAMPLE, instruction=SAMPLE.instruction + "+" * 3),  # one token of the answer
        replace(SAMPLE, output=" \n"),
    )
    tokens, counts = tokenize_instructions(samples, tokenizer, max_length=LENGTH + 4)
    assert tokens.lengths.tolist() == [LENGTH + 4, LENGTH + 4]
    assert (counts.read, counts.kept) == (5, 2)
    assert (counts.cut, counts.cut_prompts, counts.no_answer, counts.empty) == (3, 1, 2, 1)
    assert str(counts) == (
        "2 of 5 samples; 3 were too long and were cut, 1 of them inside the prompt; skipped: 2 "
        "whose answer was cut off, 1 with a blank output"
    )


def test_no_sample_left_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    message = (
        f"some samples has no sample with an answer within max_length {LENGTH}: 0 of 1 samples"
    )
    with pytest.raises(DataError, match=re.escape(message)):
        tokenize_instructions(instructions(SAMPLE), tokenizer, max_length=LENGTH)


def test_no_samples_give_no_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens, counts = tokenize_instructions(instructions(), tokenizer, max_length=8)
    assert (len(tokens), counts.read) == (0, 0)


@pytest.mark.parametrize(
    ("name", "token"), [("eos", "end-of-sequence"), ("bos", "beginning-of-sequence")]
)
def test_a_special_token_that_the_tokenizer_lacks_is_refused(
    tokenizer: PreTrainedTokenizerFast, name: str, token: str
) -> None:
    setattr(tokenizer, f"{name}_token", None)
    options: dict[str, Any] = {f"add_{name}": True}
    message = f"add_{name} is set, but the tokenizer has no {token} token; set add_{name}: false"
    with pytest.raises(ConfigError, match=re.escape(message)):
        tokenize_instructions(instructions(SAMPLE), tokenizer, max_length=256, **options)


def test_a_maximal_length_below_two_is_a_mistake(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="max_length must be at least 2, got 1"):
        tokenize_instructions(instructions(SAMPLE), tokenizer, max_length=1)


def test_samples_stay_in_order_however_many_there_are(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    samples = numbered(1003)
    tokens, _ = tokenize_instructions(samples, tokenizer, max_length=256, train_on_inputs=False)
    learned = tokenizer.decode(tokens.input_ids[tokens.targets])
    assert learned == "".join(sample.output for sample in samples.samples)


# Split


def test_a_split_takes_every_sample_once() -> None:
    train, validation = split_instructions(numbered(20), num_validation=6, seed=0)
    assert (len(train), len(validation)) == (14, 6)
    assert set(train.samples) | set(validation.samples) == set(numbered(20).samples)


def test_the_seed_alone_chooses_the_validation_samples() -> None:
    first = split_instructions(numbered(20), num_validation=6, seed=0)
    fewer = split_instructions(numbered(20), num_validation=6, seed=0, num_train=5)
    other = split_instructions(numbered(20), num_validation=6, seed=1)
    assert first.validation == fewer.validation != other.validation
    assert len(fewer.train) == 5
    assert set(fewer.train.samples) < set(first.train.samples)


def test_both_parts_keep_the_order_of_the_source() -> None:
    for part in split_instructions(numbered(20), num_validation=6, seed=0):
        positions = [numbered(20).samples.index(sample) for sample in part.samples]
        assert positions == sorted(positions)


def test_no_validation_is_possible() -> None:
    train, validation = split_instructions(numbered(3), num_validation=0, seed=0)
    assert (train, len(validation)) == (numbered(3), 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"num_validation": 20},
            (
                "data.num_validation is 20: with 1 for training, more than the 20 samples "
                "of some samples; lower data.num_validation"
            ),
        ),
        (
            {"num_validation": 6, "num_train": 15},
            (
                "data.num_validation is 6: with 15 for training, more than the 20 samples "
                "of some samples; lower data.num_validation or data.num_train"
            ),
        ),
        ({"num_validation": -1}, "data.num_validation must be at least 0, got -1"),
        ({"num_validation": 0, "num_train": 0}, "data.num_train must be at least 1, got 0"),
    ],
)
def test_a_split_that_is_not_possible_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        split_instructions(numbered(20), seed=0, **options)
    assert str(caught.value) == message


# Sources

ROWS = [
    {"instruction": "one\u2028still one", "input": "", "output": "a", "text": "ignored"},
    {"output": "b", "instruction": "two"},
    {"instruction": "three", "input": None, "output": ""},
    {"instruction": "four", "input": "x", "output": "d"},
]
READ = (
    InstructionSample("one\u2028still one", "", "a"),
    InstructionSample("two", "", "b"),
    InstructionSample("three", "", ""),
    InstructionSample("four", "x", "d"),
)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def from_file(path: Path) -> Instructions:
    return read_instructions("file", str(path), "data")


def test_samples_are_read_from_json_lines(tmp_path: Path) -> None:
    lines = "\n  \n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    path = write(tmp_path / "a.jsonl", "\ufeff\n" + lines)
    assert from_file(path) == Instructions(READ, str(path))


def test_samples_are_read_from_a_json_list(tmp_path: Path) -> None:
    path = write(tmp_path / "a.JSON", json.dumps(ROWS, indent=2))
    assert from_file(path).samples == READ


def test_samples_are_read_from_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert from_file(tmp_path / "a.parquet").samples == READ


def test_a_parquet_file_without_inputs_has_none(tmp_path: Path) -> None:
    pq.write_table(pa.table({"instruction": ["a"], "output": ["b"]}), tmp_path / "a.parquet")
    assert from_file(tmp_path / "a.parquet").samples == (InstructionSample("a", "", "b"),)


def test_a_tilde_in_a_path_is_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.json", json.dumps(ROWS))
    assert read_instructions("file", "~/a.json", "data").samples == READ


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"instruction": ', "line 3 is not JSON (Expecting value); expected one object per line"),
        (
            '["a", "b"]',
            "line 3 is not a JSON object; expected one with the fields instruction, output, input",
        ),
        ('{"output": "a"}', "line 3 has no field 'instruction'; it has: output"),
        ('{"instruction": "a", "input": ""}', "line 3 has no field 'output'; it has: instruction,"),
        ("{}", "line 3 has no field 'instruction'; it has: nothing"),
        (
            '{"instruction": 5, "output": "a"}',
            "line 3: field 'instruction' is int; expected a string",
        ),
        (
            '{"instruction": "a", "output": null}',
            "line 3: field 'output' is NoneType; expected a string",
        ),
        (
            '{"instruction": "a", "output": "b", "input": ["c"]}',
            "line 3: field 'input' is list; expected a string",
        ),
        (
            '{"instruction": "a", "output": "\\ud83d"}',
            "line 3: field 'output' contains half of a surrogate pair, which is not text",
        ),
    ],
)
def test_a_wrong_json_line_is_named_by_file_and_number(
    tmp_path: Path, line: str, message: str
) -> None:
    good = '{"instruction": "fine", "output": "fine"}'
    path = write(tmp_path / "a.jsonl", f"{good}\n\n{line}\n{good}\n")
    with pytest.raises(DataError) as caught:
        from_file(path)
    assert str(caught.value).startswith(f"{path}, {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '[{"instruction": "a",\n "output": b}]',
            " is not JSON (Expecting value in line 2); expected a list of objects",
        ),
        (
            '{"instruction": "a"}\n{"instruction": "b"}\n',
            (
                " is not JSON (Extra data in line 2); expected a list of objects; one object per "
                "line belongs in a .jsonl file"
            ),
        ),
        ('{"data": []}', " is not a JSON list; expected a list of objects"),
        ('[{"instruction": "a", "output": "b"}, 5]', ", item 2 is not a JSON object"),
        ("[{}]", ", item 1 has no field 'instruction'; it has: nothing"),
        ("[" * 100_000, " is not JSON (maximum recursion depth exceeded"),
    ],
)
def test_a_wrong_json_list_is_named_by_file_and_item(
    tmp_path: Path, content: str, message: str
) -> None:
    path = write(tmp_path / "a.json", content)
    with pytest.raises(DataError) as caught:
        from_file(path)
    assert str(caught.value).startswith(f"{path}{message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"instruction": ["a"], "answer": ["b"]}, " has no column 'output'; it has: instruction,"),
        (
            {"instruction": ["a", "b"], "output": ["a", None]},
            ", row 1: field 'output' is NoneType; expected a string",
        ),
        (
            {"instruction": [1], "output": ["a"]},
            ", row 0: field 'instruction' is int; expected a string",
        ),
    ],
)
def test_a_wrong_parquet_file_is_named_by_column_or_row(
    tmp_path: Path, columns: dict[str, list[object]], message: str
) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(columns), path)
    with pytest.raises(DataError) as caught:
        from_file(path)
    assert str(caught.value).startswith(f"{path}{message}")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "is empty; expected samples with instruction, input and output"),
        ("a.jsonl", "\n \n", "is empty; expected samples"),
        ("a.json", "", "is empty; expected samples"),
        ("a.json", "[]", "is empty; expected samples"),
        ("a.parquet", "", "is not a readable parquet file: "),
        ("a.jsonl", b"\xff", "is not UTF-8 text (invalid start byte); convert it to UTF-8"),
        ("a.csv", "a,b", "has the suffix '.csv'; expected a .jsonl, .json or .parquet file"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(DataError) as caught:
        from_file(path)
    assert str(caught.value).startswith(f"{path} {message}")
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.jsonl does not exist; expected a \.jsonl, \.json or"):
        from_file(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"is a folder; expected a \.jsonl, \.json or \.parquet"):
        from_file(tmp_path)


@pytest.mark.parametrize(
    ("source", "path", "message"),
    [
        ("dolly", None, "data.source 'dolly' is unknown; expected one of alpaca, file"),
        ("file", None, "data.source file needs data.path: a .jsonl, .json or .parquet file"),
        (
            "alpaca",
            "a.jsonl",
            (
                "data.path 'a.jsonl' has no effect with data.source alpaca; remove it, or set "
                "data.source to file"
            ),
        ),
    ],
)
def test_keys_that_cannot_be_followed_are_refused(
    source: str, path: str | None, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        read_instructions(source, path, "data")
    assert str(caught.value) == message


@pytest.mark.skipif(not datasets.config.HF_HUB_OFFLINE, reason="HF_HUB_OFFLINE is not set")
def test_without_internet_the_hub_source_gives_one_line_that_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)  # this machine may have it
    with pytest.raises(DataError) as caught:
        read_instructions("alpaca", None, "data")
    line = str(caught.value)
    assert line.startswith("alpaca (yahma/alpaca-cleaned) cannot be loaded from the Hugging Face")
    assert line.endswith("use data.source: file with data.path: a .jsonl, .json or .parquet file")
    assert "\n" not in line


def test_the_hub_source_is_read_by_the_real_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder laid out as the repository on the hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "alpaca-cleaned"
    folder.mkdir()
    rows = [{"output": s.output, "input": s.input, "instruction": s.instruction} for s in READ]
    write(folder / "alpaca_data_cleaned.json", json.dumps(rows))
    local = replace(HUB_INSTRUCTIONS["alpaca"], repository=str(folder))
    monkeypatch.setitem(instruction_files.HUB_INSTRUCTIONS, "alpaca", local)
    assert read_instructions("alpaca", None, "data").samples == READ


@pytest.mark.network
def test_alpaca_loads_from_the_hub() -> None:
    samples = read_instructions("alpaca", None, "data").samples
    assert len(samples) == 51_760
    assert samples[0].instruction == "Give three tips for staying healthy."


def test_real_samples_are_mostly_kept(grasp_data: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    everything = from_file(grasp_data / "alpaca" / "train.jsonl")
    assert len(everything) == 2000
    train, validation = split_instructions(everything, num_validation=200, seed=0)
    tokens, counts = tokenize_instructions(train, tokenizer, max_length=1024)
    assert len(tokens) == counts.kept > 1750
    assert counts.cut_prompts <= counts.no_answer <= counts.cut < 100
    assert len(validation) == 200
