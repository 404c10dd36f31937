"""Instruction samples as calibration documents, in the chat format of the model."""

from datetime import datetime

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from grasp_lightning.data.instruction_files import (
    HUB_INSTRUCTIONS,
    Instructions,
    InstructionSample,
    read_instructions,
)
from grasp_lightning.data.instructions import alpaca_prompt
from grasp_lightning.data.mixture import INSTRUCTIONS
from grasp_lightning.data.rows import ALL_ROWS, RowRange
from grasp_lightning.data.sources import Documents, MixturePart, Part, read_documents
from grasp_lightning.errors import DataError

# Some templates insert the date, but the text must not change from day to day. This date is the
# default of Llama 3's templates. A macro, because template arguments cannot be functions.
_TODAY = datetime(2024, 7, 26)
_FIXED_DAY = (
    "{%- macro strftime_now(format) -%}{{ format"
    + "".join(f".replace('%{code}', '{_TODAY.strftime('%' + code)}')" for code in "aAbBdHjmMSyY")
    + " }}{%- endmacro -%}"
)


def calibration_documents(
    corpus: MixturePart, tokenizer: PreTrainedTokenizerBase, part: Part
) -> Documents:
    """Read one source of calibration text, in order, without samples that lack an answer."""
    if corpus.source not in (INSTRUCTIONS, *HUB_INSTRUCTIONS):
        return read_documents(corpus, part)
    instructions = _instructions(corpus, part)
    answered = [sample for sample in instructions.samples if sample.output.strip()]
    if not answered:
        raise DataError(f"{instructions.name}: every sample has a blank output; use another file")
    texts = tuple(chat_text(sample, tokenizer) for sample in answered)
    return Documents(texts, instructions.name)


def chat_text(sample: InstructionSample, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a sample as a conversation of two turns, in the tokenizer's chat template.

    The input, if any, follows the instruction after a blank line. A tokenizer without a chat
    template gets the Alpaca template. Special tokens appear as text, which the tokenizer parses.

    Raises:
        DataError: If the chat template refuses the conversation.
    """
    if not tokenizer.chat_template:
        return alpaca_prompt(sample) + sample.output
    request = "\n\n".join(text for text in (sample.instruction, sample.input) if text)
    try:
        template = tokenizer.get_chat_template()
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": request}, {"role": "assistant", "content": sample.output}],
            chat_template=_FIXED_DAY + template if "strftime_now" in template else template,
            tokenize=False,
        )
    except (TemplateError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise DataError(
            "the tokenizer's chat template cannot render an instruction with its answer: "
            f"{reason}; use plain text"
        ) from error
    return str(text)


def _instructions(corpus: MixturePart, part: Part) -> Instructions:
    is_file = corpus.source == INSTRUCTIONS
    instructions = read_instructions(
        "file" if is_file else corpus.source, corpus.path, part, file_source=INSTRUCTIONS
    )
    key = f"{part}.rows"
    rows = RowRange.parse(corpus.rows, key)
    if rows == ALL_ROWS:
        return instructions
    samples = rows.cut(instructions.samples, instructions.name, key)
    return Instructions(samples, f"rows {rows} of {instructions.name}")
