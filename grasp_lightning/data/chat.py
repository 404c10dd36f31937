"""Instruction samples as documents: what a chat model reads of a request and its answer."""

from datetime import datetime
from typing import NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from grasp_lightning.data.instruction_files import (
    HUB_INSTRUCTIONS,
    Instructions,
    InstructionSample,
    read_instructions,
)
from grasp_lightning.data.instructions import alpaca_prompt
from grasp_lightning.data.mixture import INSTRUCTIONS, MixturePart
from grasp_lightning.data.rows import ALL_ROWS, RowRange
from grasp_lightning.data.sources import Documents, Part, read_documents
from grasp_lightning.errors import DataError

# Some templates write the day; the text must be the same on every day. This is the one that the
# templates of Llama 3 write where they are given none. A macro, since values that are handed to a
# template cannot be functions.
_TODAY = datetime(2024, 7, 26)
_FIXED_DAY = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(f".replace('%{code}', '{_TODAY.strftime('%' + code)}')" for code in "aAbBdHjmMSyY")
    + " }}{%- endmacro -%}"
)


class Message(NamedTuple):
    """One turn of a conversation.

    Attributes:
        role: ``user`` or ``assistant``.
        content: What is said.
    """

    role: str
    content: str


def calibration_documents(
    corpus: MixturePart, tokenizer: PreTrainedTokenizerBase, part: Part
) -> Documents:
    """Read one source of the calibration text.

    Args:
        corpus: Any source but the model itself.
        tokenizer: Tokenizer of the model; its chat template puts instruction samples into words.
        part: Section of the configuration, for messages.

    Returns:
        The documents, in the order of the source; instruction samples without an answer are left
        out.

    Raises:
        DataError: If the source cannot be read, or has no text.
    """
    if corpus.source not in (INSTRUCTIONS, *HUB_INSTRUCTIONS):
        return read_documents(corpus, part)
    instructions = _instructions(corpus, part)
    answered = [sample for sample in instructions.samples if sample.output.strip()]
    if not answered:
        raise DataError(f"{instructions.name}: every sample has a blank output; name another file")
    texts = tuple(chat_text(sample, tokenizer) for sample in answered)
    return Documents(texts, instructions.name)


def chat_text(sample: InstructionSample, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a sample as the text of a conversation of two turns.

    Args:
        sample: The sample; its input, where it has one, follows the instruction after a blank line.
        tokenizer: Its chat template is used; the Alpaca template where it has none.

    Returns:
        Request and answer; special tokens are written out, and the tokenizer knows them.

    Raises:
        DataError: If the chat template refuses the conversation.
    """
    if not tokenizer.chat_template:
        return alpaca_prompt(sample) + sample.output
    request = "\n\n".join(text for text in (sample.instruction, sample.input) if text)
    turns = (Message("user", request), Message("assistant", sample.output))
    try:
        template = tokenizer.get_chat_template()
        text = tokenizer.apply_chat_template(
            [turn._asdict() for turn in turns],
            chat_template=_FIXED_DAY + template if "strftime_now" in template else template,
            tokenize=False,
        )
    except (TemplateError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise DataError(
            f"the tokenizer's chat template gives no text for a request and its answer: {reason}; "
            "use plain text"
        ) from error
    return str(text)


def _instructions(corpus: MixturePart, part: Part) -> Instructions:
    is_file = corpus.source == INSTRUCTIONS
    instructions = read_instructions(
        "file" if is_file else corpus.source, corpus.path, part, file_source=INSTRUCTIONS
    )
    key = f"{part}.rows"
    rows = ALL_ROWS if corpus.rows is None else RowRange.parse(corpus.rows, key)
    if rows == ALL_ROWS:
        return instructions
    samples = rows.cut(instructions.samples, instructions.name, key)
    return Instructions(samples, f"rows {rows} of {instructions.name}")
