"""Small trained tokenizers of all kinds that ``trim`` knows, and tiny models that use them."""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from grasp_lightning.data.pydoc import pydoc_documents
from tests.conftest import tiny_model

KINDS = ("byte_level", "byte_fallback", "unigram", "wordpiece")
SPECIAL = ["<unk>", "<s>", "</s>"]
NUM_TOKENS = 4000
NUM_ROWS = 4032  # rows without a token at the end


def texts() -> Iterator[str]:
    """Yield what the tokenizers are trained on: more than the tests name."""
    yield from pydoc_documents("train")
    yield from pydoc_documents("test")
    yield from (file.read_text() for file in sorted(Path(json.__file__).parent.glob("*.py")))


def corpus() -> str:
    """Return the text that the tests name."""
    return "\n\n".join(pydoc_documents("test"))


@cache
def trained(kind: str) -> str:
    """Return the tokenizer.json of a kind."""
    trainer: trainers.Trainer
    if kind == "byte_level":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=NUM_TOKENS, special_tokens=SPECIAL, initial_alphabet=alphabet
        )
    elif kind == "byte_fallback":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        trainer = trainers.BpeTrainer(vocab_size=NUM_TOKENS - 256, special_tokens=SPECIAL)
    elif kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=NUM_TOKENS, special_tokens=SPECIAL, unk_token="<unk>"
        )
    else:
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.decoder = decoders.WordPiece(cleanup=False)
        trainer = trainers.WordPieceTrainer(vocab_size=NUM_TOKENS, special_tokens=SPECIAL)
    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    # Added behind all others, so that its id changes.
    tokenizer.add_special_tokens(["<|end|>"])
    content = json.loads(tokenizer.to_str())
    if kind == "byte_fallback":
        _add_bytes(content)
    return json.dumps(content)


def _add_bytes(content: dict) -> None:
    vocabulary = content["model"]["vocab"]
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    content["added_tokens"][-1]["id"] = len(vocabulary)


def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(trained(kind)),
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<|end|>",
    )


def save_model_of(kind: str, folder: Path, family: str = "llama", **overrides: object) -> Path:
    """Write a tiny model with a tokenizer of a kind, and the corpus next to it."""
    tokenizer = tokenizer_of(kind)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": [tokenizer.eos_token_id, 2]}
    ids |= {"pad_token_id": tokenizer.eos_token_id}
    model = tiny_model(family, **{"vocab_size": NUM_ROWS, **ids, **overrides})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder.parent / "corpus.txt").write_text(corpus(), encoding="utf-8")
    return folder
