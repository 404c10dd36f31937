"""The tokenizer of a GGUF file: copied from another one, or made from a Hugging Face folder."""

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from gguf import GGUFReader, GGUFValueType, GGUFWriter, SpecialVocab, TokenType
from transformers import PreTrainedTokenizerBase

from grasp_lightning.errors import ModelError
from grasp_lightning.models.formats.gguf.pretokenizers import pre_tokenizer_of
from grasp_lightning.models.gguf import read_header

_PREFIX: Final = "tokenizer."
_TOKENS, _TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
_BYTE: Final = re.compile("<0x[0-9A-Fa-f]{2}>")
_SPACE: Final = "\u2581"  # what sentencepiece writes for a space
_ADVICE: Final = "pass --gguf_base, a GGUF file of the base model, whose tokenizer is copied"
# Added tokens that are not marked as special, though models use them like control tokens.
_CONTROL: Final = (("<|", "|>"), ("<\uff5c", "\uff5c>"))


class Key(NamedTuple):
    """An entry of the file's metadata."""

    name: str
    value: Any  # Any: of a type that the format has
    kind: GGUFValueType
    item_kind: GGUFValueType | None = None


def base_keys(file: Path, tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> list[Key]:
    """Return the tokenizer of a GGUF file.

    Raises:
        ModelError: If the file is damaged, or has another vocabulary.
    """
    read_header(file)
    fields = GGUFReader(file).fields
    keys = [
        Key(name, field.contents(), field.types[0], _item_kind(field.types))
        for name, field in fields.items()
        if name.startswith(_PREFIX)
    ]
    values = {key.name: key.value for key in keys}
    tokens, kinds = values.get(_TOKENS, []), values.get(_TYPES, [])
    if len(tokens) != num_tokens:
        raise ModelError(
            f"gguf_base: {file} has {len(tokens)} tokens, but the model has {num_tokens}: expected "
            "a GGUF file of the model that was compressed"
        )
    own = {index: token for token, index in tokenizer.get_vocab().items()}
    for index, (token, kind) in enumerate(zip(tokens, kinds, strict=True)):
        if kind == TokenType.NORMAL and own.get(index, token) != token:
            raise ModelError(
                f"gguf_base: {file} has another vocabulary: token {index} is {token!r} there and "
                f"{own[index]!r} in the model; expected a GGUF file of the compressed model's base"
            )
    return keys


def _item_kind(kinds: list[GGUFValueType]) -> GGUFValueType | None:
    return kinds[-1] if kinds[0] == GGUFValueType.ARRAY else None


def folder_keys(folder: Path, tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> list[Key]:
    """Return the tokenizer of a Hugging Face folder.

    Raises:
        ModelError: If llama.cpp has no such tokenizer, or does not know its pre-tokenizer.
    """
    content = _tokenizer_json(folder)
    is_sentencepiece = bool(content["model"].get("byte_fallback"))
    writer = GGUFWriter(path=None, arch="llama")
    if is_sentencepiece:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(_adds_space(content))
    else:
        name = pre_tokenizer_of(tokenizer)
        if name is None:
            raise ModelError(
                f"llama.cpp has no name for the pre-tokenizer of this model; {_ADVICE}"
            )
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(name)
    tokens = list(_tokens(tokenizer, num_tokens, is_sentencepiece=is_sentencepiece))
    writer.add_token_list([text for text, _ in tokens])
    writer.add_token_types([kind for _, kind in tokens])
    if is_sentencepiece:
        scores = _scores(content["model"])
        writer.add_token_scores([scores.get(text, -1e6) for text, _ in tokens])
    special = _quietly(SpecialVocab, folder, load_merges=not is_sentencepiece, n_vocab=num_tokens)
    special.add_special_token = _added_tokens(tokenizer)
    special.add_to_gguf(writer, quiet=True)
    return [
        Key(name, entry.value, entry.type, entry.sub_type)
        for name, entry in writer.kv_data[0].items()
        if name.startswith(_PREFIX)
    ]


def _tokenizer_json(folder: Path) -> dict[str, Any]:  # Any: values of JSON
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ModelError(f"{folder} has no tokenizer.json, which format gguf reads; {_ADVICE}")
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    kind = content["model"].get("type")
    if kind != "BPE":
        raise ModelError(
            f"the tokenizer is of type {kind}, but format gguf converts only byte-level and "
            f"sentencepiece BPE; {_ADVICE}"
        )
    return content


def _tokens(
    tokenizer: PreTrainedTokenizerBase, num_tokens: int, *, is_sentencepiece: bool
) -> Iterator[tuple[str, TokenType]]:
    """Yield text and type of every token, also of the rows of the embedding without one."""
    texts = {index: text for text, index in tokenizer.get_vocab().items()}
    added: dict[int, Any] = tokenizer.added_tokens_decoder  # Any: AddedToken
    for index in range(num_tokens):
        text = texts.get(index)
        if text is None:
            yield f"[PAD{index}]", TokenType.UNUSED
        elif index in added:
            yield _added(tokenizer, text, added[index])
        elif is_sentencepiece and _BYTE.fullmatch(text):
            yield text, TokenType.BYTE
        else:
            yield text, TokenType.NORMAL


def _added(tokenizer: PreTrainedTokenizerBase, text: str, token: Any) -> tuple[str, TokenType]:  # noqa: ANN401  AddedToken
    if text == tokenizer.unk_token:
        return text, TokenType.UNKNOWN
    looks_special = any(text.startswith(a) and text.endswith(b) for a, b in _CONTROL)
    if token.special or looks_special:
        return text, TokenType.CONTROL
    return text.replace(_SPACE, " "), TokenType.USER_DEFINED


def _added_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, bool]:
    """Return whether the tokenizer puts its special tokens around a text."""
    ids = tokenizer("a")["input_ids"]
    return {
        "bos": tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id,
    }


def _scores(model: dict[str, Any]) -> dict[str, float]:  # Any: values of JSON
    """Return scores by which llama.cpp merges in the order of the list of merges."""
    scores: dict[str, float] = {}
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
        scores.setdefault(left + right, -float(rank))
    return scores


def _adds_space(content: dict[str, Any]) -> bool:  # Any: values of JSON
    """Return whether a space is put in front of a text."""
    normalizer, splitter = content.get("normalizer") or {}, content.get("pre_tokenizer") or {}
    parts = normalizer.get("normalizers", [normalizer])
    prepends = any(part.get("type") == "Prepend" for part in parts)
    return prepends or splitter.get("prepend_scheme") in {"first", "always"}


def _quietly(kind: Any, *arguments: object, **options: object) -> Any:  # noqa: ANN401  a class of gguf
    logger = logging.getLogger("gguf")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return kind(*arguments, **options)
    finally:
        logger.setLevel(level)
