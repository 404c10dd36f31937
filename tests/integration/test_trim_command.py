"""``trim`` as a user runs it, and its result in transformers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from grasp_lightning import trim_vocabulary
from grasp_lightning.cli import main
from grasp_lightning.models.checkpoint import save_model
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.formats.gguf.pretokenizers import NAME_KEY
from grasp_lightning.models.surgery import apply_operations
from tests.conftest import save_tiny, tiny_model
from tests.integration.trimming import (
    NUM_ROWS,
    SPECIAL,
    corpus,
    save_model_of,
    tokenizer_of,
)
from tests.unit.models.helpers import factorize_layers

OTHER = (
    "Zw\u00f6lf Boxk\u00e4mpfer jagen Viktor, \u732b und \U0001f600, \u00fcber den Sylter Deich.\n"
)
UNREADABLE = "def f(x): return zip(x, 'trombone') # jovial quartz"


def trim(source: Path, *words: str) -> int:
    folder = source.parent
    corpora = [] if any("--corpora" in word for word in words) else ["--corpora=corpus.txt"]
    corpora = [word.replace("corpus.txt", str(folder / "corpus.txt")) for word in corpora]
    return main(
        ["trim", f"--model.path={source}", f"--output_dir={folder / 'out'}", *corpora, *words]
    )


def facts_of(source: Path) -> dict:
    content: dict = json.loads((source.parent / "out" / "trim.json").read_text())
    return content


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("kind", "is_tied"),
    [
        ("byte_level", False),
        pytest.param("byte_fallback", True, marks=pytest.mark.slow),
        pytest.param("unigram", True, marks=pytest.mark.slow),
        pytest.param("wordpiece", False, marks=pytest.mark.slow),
    ],
)
def test_text_keeps_its_pieces_and_their_logits(tmp_path: Path, kind: str, is_tied: bool) -> None:
    source = save_model_of(kind, tmp_path / "tiny", tie_word_embeddings=is_tied)
    assert trim(source) == 0
    folder = tmp_path / "out" / "model"
    old, new = (AutoTokenizer.from_pretrained(path) for path in (source, folder))
    dense, small = (
        AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval() for path in (source, folder)
    )
    assert old.get_vocab() == tokenizer_of(kind).get_vocab()
    before, after = (t(corpus(), add_special_tokens=False)["input_ids"] for t in (old, new))
    assert old.convert_ids_to_tokens(before) == new.convert_ids_to_tokens(after)
    kept = [
        old.get_vocab()[token] for token in sorted(new.get_vocab(), key=new.get_vocab().__getitem__)
    ]
    assert len(kept) == len(small.get_input_embeddings().weight) < NUM_ROWS
    assert len(kept) % 64 == 0
    with torch.no_grad():
        expected = dense(torch.tensor([before[:64]])).logits[..., kept]
        logits = small(torch.tensor([after[:64]])).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    for text in (OTHER, UNREADABLE):
        assert new.decode(new(text)["input_ids"]) == old.decode(old(text)["input_ids"])
    assert new("any")["input_ids"][0] == new.bos_token_id == small.config.bos_token_id
    end = new.convert_tokens_to_ids("<|end|>")
    ids = [end, new.convert_tokens_to_ids("</s>")]
    assert small.config.eos_token_id == small.generation_config.eos_token_id == ids
    assert small.config.pad_token_id == small.generation_config.pad_token_id == end
    assert small.config.vocab_size == len(kept)
    assert small.get_input_embeddings().padding_idx == end
    facts = facts_of(source)
    assert facts["special_tokens"] == {t: new.get_vocab()[t] for t in (*SPECIAL, "<|end|>")}
    tied = [
        m.get_output_embeddings().weight is m.get_input_embeddings().weight for m in (dense, small)
    ]
    assert tied == [is_tied, is_tied]
    assert facts["parameters"]["after"] == sum(p.numel() for p in small.parameters())
    assert facts["parameters"]["before"] == sum(p.numel() for p in dense.parameters())


def test_the_table_reports_sizes_and_lengths(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_model_of("byte_level", tmp_path / "tiny")
    other = Path(json.__file__).read_text()
    (tmp_path / "other.txt").write_text(other, encoding="utf-8")
    (source / "vocab.json").write_text("{}")
    (source / "LICENSE").write_text("Do what you like.\n")
    (source / "README.md").write_text("---\nlicense: mit\n---\nA tiny model.\n")
    words = [f"--unnamed={tmp_path / 'other.txt'}", "--multiple_of=1"]
    assert trim(source, *words) == 0
    output = capsys.readouterr().out
    facts, folder = facts_of(source), tmp_path / "out" / "model"
    named, unnamed = facts["texts"]
    assert named["tokens"]["before"] == named["tokens"]["after"]
    assert unnamed["tokens"]["before"] < unnamed["tokens"]["after"]
    assert (named["is_named"], unnamed["is_named"]) == (True, False)
    number = len(tokenizer_of("byte_level")(other, add_special_tokens=False).input_ids)
    assert unnamed["tokens"]["before"] == number
    assert unnamed["tokens_per_byte"]["before"] == number / len(other)
    assert facts["filling_tokens"] == 0
    assert f"{facts['tokens']['after']:,}" in output
    assert "tokens per byte, other.txt *" in output
    assert "The corpora are split into the same pieces as before." in output
    assert f"model:  {folder}" in output
    card = (folder / "README.md").read_text()
    assert "license: mit" in card
    assert "`SOURCE_MODEL_CARD.md`" in card
    assert (folder / "SOURCE_MODEL_CARD.md").read_text().endswith("A tiny model.\n")
    assert (folder / "LICENSE").is_file()
    assert not (folder / "vocab.json").exists()
    written = "".join(f.read_text() for f in folder.iterdir() if f.suffix != ".safetensors")
    assert str(tmp_path) not in written


@pytest.mark.slow
def test_a_finished_trim_is_only_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save_model_of("byte_level", tmp_path / "tiny")
    assert trim(source) == 0
    first, before = capsys.readouterr().out, contents(tmp_path / "out")
    assert trim(source) == 0
    assert capsys.readouterr().out == first
    assert trim(source, "--multiple_of=32") == 2
    assert "multiple_of" in capsys.readouterr().err
    assert contents(tmp_path / "out") == before
    shutil.rmtree(source)
    save_model_of("byte_level", source, seed=1)
    assert trim(source) == 2
    assert "contains the trim of an earlier version of" in capsys.readouterr().err
    (tmp_path / "out" / "trim.json").unlink()
    assert trim(source) == 2
    assert "trim.json is missing or damaged; trim again with --overwrite" in capsys.readouterr().err
    assert trim(source, "--overwrite", "--multiple_of=32") == 0
    assert facts_of(source)["tokens"]["after"] % 32 == 0


@pytest.mark.slow
def test_the_most_frequent_tokens_can_be_chosen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_model_of("byte_level", tmp_path / "tiny")
    facts = trim_vocabulary(
        source,
        corpora=tmp_path / "corpus.txt",
        output_dir=tmp_path / "out",
        num_tokens=1200,
        multiple_of=100,
    )
    assert facts == {k: v for k, v in facts_of(source).items() if k != "source_sha256"}
    assert facts["tokens"] == {"before": NUM_ROWS, "after": 1200}
    assert facts["same_pieces"] is False
    named = facts["texts"][0]["tokens"]
    assert named["after"] > named["before"]
    assert trim(source, "--num_tokens=1200", "--multiple_of=100") == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "into other pieces than before, because of num_tokens" in output


@pytest.mark.slow
def test_a_compressed_model_stays_compressed(tmp_path: Path) -> None:
    source = save_model_of("byte_level", tmp_path / "tiny")
    model = tiny_model("llama", vocab_size=NUM_ROWS)
    view = DecoderView(model)
    apply_operations(view, *factorize_layers(view, (1, 2), rank=5))
    save_model(model, source, tokenizer=tokenizer_of("byte_level"))
    assert trim(source) == 0
    before, after = (
        json.loads((folder / "config.json").read_text())
        for folder in (source, tmp_path / "out" / "model")
    )
    assert after["quantization_config"] == before["quantization_config"]
    assert after["auto_map"] == before["auto_map"]
    assert (tmp_path / "out" / "model" / "modeling_grasp.py").is_file()


@pytest.mark.parametrize(
    ("kind", "name"),
    [("byte_level", "gpt-2"), pytest.param("byte_fallback", "default", marks=pytest.mark.slow)],
)
def test_llama_cpp_gets_the_trimmed_vocabulary(tmp_path: Path, kind: str, name: str) -> None:
    source = save_model_of(kind, tmp_path / "tiny")
    file = source / "tokenizer_config.json"
    # A known tokenizer is recognised by its ids, another one by this key.
    file.write_text(json.dumps({**json.loads(file.read_text()), NAME_KEY: name}))
    assert trim(source) == 0
    words = ["--format=gguf", f"--output_dir={tmp_path / 'gguf'}"]
    assert main(["export", f"--model={tmp_path / 'out' / 'model'}", *words]) == 0
    (file,) = (tmp_path / "gguf" / "model").glob("*.gguf")
    reader, size = GGUFReader(file), facts_of(source)["tokens"]["after"]
    assert reader.fields["tokenizer.ggml.pre"].contents() == name
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    new = AutoTokenizer.from_pretrained(tmp_path / "out" / "model").get_vocab()
    assert tokens == sorted(new, key=new.__getitem__)
    shapes = {tensor.name: tuple(tensor.shape) for tensor in reader.tensors}
    assert shapes["token_embd.weight"] == shapes["output.weight"] == (32, size)


def bad_inputs(root: Path) -> dict[str, tuple[list[str], str]]:
    """Arguments and message of each mistake."""
    source = save_model_of("byte_level", root / "tiny")
    text = f"--corpora={root / 'corpus.txt'}"
    (root / "short.txt").write_text("A short text.", encoding="utf-8")
    content = json.loads((source / "tokenizer.json").read_text())
    words = {token: index for index, token in enumerate(content["model"]["vocab"])}

    def copy(name: str, **changed: object) -> str:
        folder = shutil.copytree(source, root / name)
        (folder / "tokenizer.json").write_text(json.dumps({**content, **changed}))
        return f"--model.path={folder}"

    level = {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"}
    suffix = {**content["model"], "end_of_word_suffix": "</w>"}
    slow = shutil.copytree(source, root / "slow")
    (slow / "tokenizer.json").unlink()
    _save_other_form(content, slow)
    config = json.loads((source / "generation_config.json").read_text())
    biased = shutil.copytree(source, root / "biased")
    config |= {"sequence_bias": [[[5], -1.0]]}
    (biased / "generation_config.json").write_text(json.dumps(config))
    per_layer = save_model_of("byte_level", root / "gemma", "gemma3n_text", **PER_LAYER)
    tiny, full = (
        f"--model.path={source}",
        save_model_of("byte_level", root / "full", vocab_size=4001),
    )
    return {
        "no text": ([tiny], "corpora is not set"),
        "empty": ([tiny, "--corpora="], "corpora is empty"),
        "twice": ([tiny, "--corpora=pydoc,pydoc"], "corpora: pydoc is named twice"),
        "unknown": ([tiny, "--corpora=wikitext3"], "corpora: expected pydoc, wikitext2"),
        "unnamed": ([tiny, text, f"--unnamed={root / 'corpus.txt'}"], "is one of the corpora"),
        "field": ([tiny, text, "--field=content"], "field 'content' has no effect"),
        "short": ([tiny, f"--corpora={root / 'short.txt'}"], "different tokens, expected at least"),
        "too few": ([tiny, text, "--num_tokens=20"], "num_tokens is 20, but 260 tokens must stay"),
        "all": (
            [f"--model.path={full}", text, "--num_tokens=4001", "--multiple_of=1"],
            "corpora: all 4,001 tokens would stay, so there is nothing to remove",
        ),
        "words": ([copy("words", model=level), text], "of type WordLevel, which cannot be trimmed"),
        "suffix": ([copy("suffix", model=suffix), text], "has end_of_word_suffix '</w>', with"),
        "no file": ([f"--model.path={slow}", text], "has no tokenizer.json, which trim rewrites"),
        "bias": ([f"--model.path={biased}", text], "has sequence_bias, whose token ids"),
        "per layer": (
            [f"--model.path={per_layer}", text],
            "also has one row per token in model.embed_tokens_per_layer; expected an embedding",
        ),
    }


PER_LAYER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "layer_types": ["full_attention"] * 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size_per_layer_input": NUM_ROWS,
    "hidden_size_per_layer_input": 4,
    "num_kv_shared_layers": 0,
    "laurel_rank": 4,
    "altup_num_inputs": 2,
    "activation_sparsity_pattern": [0.0, 0.0],
}


def _save_other_form(content: dict, folder: Path) -> None:
    """Write a vocabulary in the older form that transformers converts when it reads it."""
    model = content["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(merge) for merge in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "GPT2Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.slow
def test_every_mistake_is_one_line_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, (words, message) in bad_inputs(tmp_path).items():
        capsys.readouterr()
        assert main(["trim", f"--output_dir={tmp_path / 'out'}", *words]) == 2, name
        lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
        assert message in lines[-1], name
        assert not (tmp_path / "out").exists(), name


def test_a_model_of_fewer_tokens_is_too_small_to_trim(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_tiny(tmp_path / "bytes")
    (tmp_path / "corpus.txt").write_text(corpus(), encoding="utf-8")
    assert trim(source) == 2
    assert "different tokens, expected at least 1,000" in capsys.readouterr().err


@pytest.mark.slow
def test_a_tokenizer_that_would_read_a_text_differently_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The letter \u0436 has no piece, but ##q\u0436 would fit once qqq is removed."""
    source = save_model_of("wordpiece", tmp_path / "tiny")
    content = json.loads((source / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    replaced = [token for token in vocabulary if len(token) > 6][-2:]
    for old, new in zip(replaced, ("qqq", "##q\u0436"), strict=True):
        vocabulary[new] = vocabulary.pop(old)
    (source / "tokenizer.json").write_text(json.dumps(content))
    old = Tokenizer.from_file(str(source / "tokenizer.json"))
    assert old.encode("qqq\u0436", add_special_tokens=False).tokens == ["<unk>"]
    (tmp_path / "corpus.txt").write_text(f"{corpus()} qqq\u0436 xq\u0436", encoding="utf-8")
    assert trim(source) == 2
    error = capsys.readouterr().err
    assert "the tokenizer cannot be trimmed: a text of" in error
    assert "corpus.txt that begins with" in error
    assert not (tmp_path / "out").exists()
