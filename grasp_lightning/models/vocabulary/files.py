"""The files of a tokenizer, with the tokens that stay and their new ids."""

import json
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from grasp_lightning.errors import ModelError
from grasp_lightning.models.formats.gguf.pretokenizers import NAME_KEY
from grasp_lightning.models.quiet import quiet_transformers
from grasp_lightning.models.vocabulary.pieces import Json, pieces_of

TOKENIZER: Final = "tokenizer.json"
_CONFIG: Final = "tokenizer_config.json"
# Other forms of the whole vocabulary, which would contradict the trimmed one.
_STALE: Final = (
    "vocab.*",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "tokenizer*.json",
)


def tokenizer_content(tokenizer: PreTrainedTokenizerBase, *, has_file: bool) -> Json:
    """Return the content of a tokenizer.json as the tokenizer would write it.

    Args:
        has_file: Whether the model comes with that file, or transformers makes it from a GGUF file.

    Raises:
        ModelError: If it does not, or the tokenizer is a slow one.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not has_file:
        raise ModelError(
            f"the model has no {TOKENIZER}, which trim rewrites: its {type(tokenizer).__name__} "
            "comes in another form, such as a SentencePiece model; convert it with "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder), and check the result"
        )
    content: Json = json.loads(backend.to_str())
    return content


def processor_tokens(content: Json) -> frozenset[int]:
    """Return the ids that a tokenizer puts around a text, or pads it with."""
    found: set[int] = set()

    def note(token: int) -> int:
        found.add(token)
        return token

    _with_ids(content, note)
    return frozenset(found)


def trimmed_content(content: Json, new_ids: Mapping[int, int]) -> Json:
    """Return the content of a tokenizer.json with the tokens that stay.

    Args:
        content: Content with all tokens.
        new_ids: New id of each old id that stays.
    """
    pieces = pieces_of(content)
    ids = {piece: new_ids[old] for piece, old in pieces.ids.items() if old in new_ids}
    return {**_with_ids(content, new_ids.__getitem__), "model": pieces.trimmed(ids)}


def write_tokenizer(
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    new_ids: Mapping[int, int],
    pre_tokenizer: str | None = None,
) -> None:
    """Write a tokenizer with the tokens that stay.

    Args:
        folder: Folder of the model, written before.
        new_ids: New id of each old id that stays.
        pre_tokenizer: llama.cpp's name of its pre-tokenizer, which is recognised by old ids only.
    """
    tokenizer.save_pretrained(folder)
    _rewrite(folder / TOKENIZER, lambda content: trimmed_content(content, new_ids))

    def renumbered(content: Json) -> Json:
        name = {} if pre_tokenizer is None else {NAME_KEY: pre_tokenizer}
        added = content.get("added_tokens_decoder")
        if added is None:
            return {**content, **name}
        by_id = {str(new_ids[int(old)]): token for old, token in added.items()}
        return {**content, **name, "added_tokens_decoder": by_id}

    _rewrite(folder / _CONFIG, renumbered)


def read_tokenizer(
    folder: Path, expected: Mapping[str, int], *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a written folder.

    Args:
        expected: Ids that its tokens must have, and no others.
        trust_remote_code: Run code that comes with the tokenizer.

    Raises:
        ModelError: If transformers reads others.
    """
    with quiet_transformers():
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code
        )
    found = tokenizer.get_vocab()
    if found != expected:
        text, index = min(found.items() ^ expected.items(), key=lambda item: item[1])
        raise ModelError(
            f"the tokenizer cannot be trimmed: transformers would read {text!r} with another id "
            f"than {expected.get(text, index)} from its {TOKENIZER}"
        )
    return tokenizer


def fitting_files(files: Iterable[Path]) -> tuple[Path, ...]:
    """Return the side files of a model without those that hold its old vocabulary."""
    return tuple(file for file in files if not any(fnmatchcase(file.name, name) for name in _STALE))


def _rewrite(file: Path, change: Callable[[Json], Json]) -> None:
    content = change(json.loads(file.read_text(encoding="utf-8")))
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _with_ids(content: Json, new_id: Callable[[int], int]) -> Json:
    """Return a tokenizer with new ids of added tokens, and of those put around a text."""
    added = [{**token, "id": new_id(token["id"])} for token in content.get("added_tokens") or ()]
    padding = content.get("padding")
    if padding is not None:
        padding = {**padding, "pad_id": new_id(padding["pad_id"])}
    processor = _processor(content.get("post_processor"), new_id)
    return {**content, "added_tokens": added, "padding": padding, "post_processor": processor}


def _processor(processor: Json | None, new_id: Callable[[int], int]) -> Json | None:
    """Return a post-processor with new ids: a template, a pair of tokens, or a sequence of them."""
    if processor is None:
        return None
    changed = dict(processor)
    if "processors" in changed:
        changed["processors"] = [_processor(part, new_id) for part in changed["processors"]]
    if "special_tokens" in changed:
        changed["special_tokens"] = {
            name: {**token, "ids": [new_id(old) for old in token["ids"]]}
            for name, token in changed["special_tokens"].items()
        }
    for key in {"sep", "cls"} & changed.keys():
        token, old = changed[key]
        changed[key] = [token, new_id(old)]
    return changed
