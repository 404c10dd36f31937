"""Files and texts that no command may crash on, by kind."""

import json
import os
import pickle
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

DEEP = "[" * 50_000
LONG_NUMBER = "7" * 5000

NAMES = ("~nouser/x", "a\0b", "n" * 300, "d/" * 3000, "\udcff")
"""Texts that no file can have as a name."""

YAML: Mapping[str, bytes] = {
    "nested": f"seed: {DEEP}".encode(),
    "nested sections": "".join(f"{' ' * i}a:\n" for i in range(500)).encode(),
    "long number": f"seed: {LONG_NUMBER}".encode(),
    "hexadecimal number": f"seed: 0x{'f' * 5000}".encode(),
    "impossible date": b"output_dir: 2020-13-45",
    "key given twice": b"seed: 1\nseed: 2",
    "section given twice": b"model: {}\nmodel: {}",
    "number as key": b"1: 2",
    "truth as key": b"on: 2",
    "list as key": b"[a]: 2",
    "alias of itself": b"model: &a\n  path: *a",
    "aliases of aliases": "\n".join(
        ["k0: &k0 0", *(f"k{i}: &k{i} [{f'*k{i - 1}, ' * 10}]" for i in range(1, 9))]
    ).encode(),
    "bytes": b"\xff\xfe\x00",
    "control character": b"seed: \x07",
    "tag": b"seed: !!python/object/apply:os.system [ls]",
    "tag of another type": b"seed: !!int x",
    "two documents": b"seed: 1\n---\nseed: 2",
    "empty": b"",
    "list": b"- a",
    "section as text": b"model: x",
    "list as text": b"output_dir: [[a], {b: 1}]",
    "infinite": b"trainer: {checkpoint_seconds: .inf}\ntraining: {epochs: .inf}",
    "key of two lines": b'"a\\nb": 1',
}

JSON: Mapping[str, bytes] = {
    "nested": DEEP.encode(),
    "nested keys": ('{"a":' * 50_000).encode(),
    "long number": f'{{"format": {LONG_NUMBER}}}'.encode(),
    "no number": b'{"format": NaN}',
    "bytes": b"\xff\xfe\x00",
    "empty": b"",
    "list": b"[1]",
    "text": b'"a"',
    "null": b"null",
    "half": b'{"format": ',
}

RESULTS: Mapping[str, object] = {
    "no settings": {},
    "settings as list": {"settings": [], "models": []},
    "models as text": {"settings": {}, "models": "abc"},
    "another model": {"settings": {}, "models": [{"model": 3}]},
    "corpora as list": {"settings": {}, "models": [{"model": "m", "sha256": "", "corpora": []}]},
}
"""Contents with the right ``format`` that are not an output of evaluate."""

PLANS: Mapping[str, object] = {
    "inputs as list": {"inputs": ["a"]},
    "inputs of numbers": {"inputs": {"model": 3}},
    "complete as text": {"complete": "yes"},
    "options as list": {"options": [1]},
    "operations as text": {"operations": "abc"},
    "unknown operation": {"operations": [{"kind": [1]}]},
}
"""Values that keys of a plan cannot have."""


def _tensors(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


TENSORS: Mapping[str, bytes] = {
    "empty": b"",
    "foreign": b"PK\x03\x04 and more than eight bytes",
    "header without end": struct.pack("<Q", 2**60),
    "header nested": _tensors(DEEP.encode()),
    "cut": _tensors(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', b"\0"),
    "unknown type": _tensors(b'{"a":{"dtype":"X9","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
}


class Foreign:
    """An object that a pickle must not create."""


CHECKPOINTS: Mapping[str, bytes] = {
    "pickle": pickle.dumps(Foreign(), protocol=2),
    "pickle of torch": pickle.dumps({"a": torch.ones(1)}, protocol=2),
    "empty": b"",
    "foreign": b"GGUF and more than eight bytes",
    "cut zip": b"PK\x03\x04",
}

MODEL_CONFIGS: Mapping[str, Mapping[str, object]] = {
    "no heads": {"num_attention_heads": 0},
    "negative vocabulary": {"vocab_size": -1},
    "no vocabulary": {"vocab_size": 0},
    "negative layers": {"num_hidden_layers": -1},
    "no hidden size": {"hidden_size": 0},
    "hidden size as text": {"hidden_size": "x"},
    "heads that do not divide": {"num_attention_heads": 3, "num_key_value_heads": 2},
    "unknown activation": {"hidden_act": "none such"},
    "unknown family": {"model_type": "none such"},
    "family as number": {"model_type": 3},
    "quantization of another kind": {"quantization_config": 3},
    "type of no number": {"dtype": "none such"},
}
"""Keys of a config.json that no model has."""


def place_odd_files(folder: Path, suffix: str = "") -> dict[str, Path]:
    """Make paths that are not regular files, and return them by kind."""
    found = {
        kind: folder / f"{kind}{suffix}" for kind in ("fifo", "dangling", "loop", "folder", "null")
    }
    os.mkfifo(found["fifo"])
    found["dangling"].symlink_to("gone")
    found["loop"].symlink_to(found["loop"].name)
    found["folder"].mkdir()
    found["null"].symlink_to("/dev/zero")
    return found


def data_files(folder: Path) -> dict[str, Path]:
    """Write files without the text or instructions they should contain, and return them by kind."""
    written = {
        "nested.jsonl": DEEP.encode(),
        "number.jsonl": f'{{"text": {LONG_NUMBER}}}'.encode(),
        "bytes.jsonl": b'{"text": "\xff"}',
        "bytes.txt": b"\xff",
        "surrogate.jsonl": b'{"text": "\\ud800", "instruction": "\\ud800", "output": ""}',
        "list.jsonl": b"[1]",
        "foreign.parquet": b"PAR1 and no more",
        "empty.parquet": b"",
        "nested.json": DEEP.encode(),
        "object.json": b'{"a": 1}',
        "zeros.txt": b"",
    }
    for name, content in written.items():
        (folder / name).write_bytes(content)
    pq.write_table(pa.table({"text": [[1]], "instruction": [[1]]}), folder / "lists.parquet")
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(twice, folder / "twice.parquet")
    whole = (folder / "lists.parquet").read_bytes()
    (folder / "cut.parquet").write_bytes(whole[: len(whole) // 2] + whole[-40:])
    files = {name: folder / name for name in (*written, "lists.parquet", "twice.parquet")}
    return files | {"cut.parquet": folder / "cut.parquet"}


Damage = Callable[[Path], None]


def damaged_models() -> dict[str, Damage]:
    """Return ways to damage the folder of a model, by kind."""
    index = json.dumps({"metadata": {}, "weight_map": {"a": "../../a.safetensors"}}).encode()
    weights, index_name = "model.safetensors", "model.safetensors.index.json"
    return {
        **{f"config: {kind}": _file("config.json", content) for kind, content in JSON.items()},
        **{f"config with {kind}": _config(keys) for kind, keys in MODEL_CONFIGS.items()},
        **{f"weights: {kind}": _file(weights, content) for kind, content in TENSORS.items()},
        **{f"pickled: {k}": _weights("pytorch_model.bin", v) for k, v in CHECKPOINTS.items()},
        **{f"tokenizer: {kind}": _file("tokenizer.json", text) for kind, text in JSON.items()},
        "weights: dangling": _link(weights, "gone"),
        "weights: loop": _link(weights, weights),
        "weights: fifo": _fifo(weights),
        "config: fifo": _fifo("config.json"),
        "tokenizer: fifo": _fifo("tokenizer.json"),
        "index out of the folder": _weights(index_name, index),
        "index nested": _weights(index_name, DEEP.encode()),
    }


def _file(name: str, content: bytes) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return damage


def _weights(name: str, content: bytes) -> Damage:
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(content)

    return damage


def _link(name: str, target: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return damage


def _fifo(name: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return damage


def _config(keys: Mapping[str, object]) -> Damage:
    def damage(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))

    return damage
