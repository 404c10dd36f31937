"""Compresses and evaluates a random Llama, layer by layer, under a limit on memory.

Each command runs in a process of its own, in a control group whose memory the kernel limits, which
takes root. The peak is compared with what ``plan`` computes. What is in the output is not measured
again.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from _common import DEFAULT_CACHE, exit_code, hardware, markdown_table, run_fresh, whole_lines
from _limited import run_limited

from grasp_lightning.errors import GraspError

Record = dict[str, Any]  # command, size, limit, code, seconds, peak_bytes, modelled

_GIGA = 1e9
# From this size on glibc gives memory back to the system at once; by default it keeps freed memory.
_RETURN_FREED = {"MALLOC_MMAP_THRESHOLD_": "131072", "OMP_NUM_THREADS": "1"}
_COMMANDS = ("plan", "compress", "evaluate")


class Size(NamedTuple):
    """Sizes of a Llama; its vocabulary must hold the 259 ids of the tokenizer."""

    hidden: int
    layers: int
    heads: int
    keys: int
    inner: int
    vocabulary: int

    @property
    def label(self) -> str:
        """The sizes as a name of a folder."""
        return "x".join(map(str, self))


# So small that all but the libraries is negligible.
_SMALLEST = Size(64, 2, 4, 2, 128, 320)


def main() -> None:
    """Make the missing measurements, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    names = "hidden size, layers, heads, key heads, intermediate size, vocabulary"
    parser.add_argument(
        "--size", type=int, nargs=6, default=(2048, 22, 32, 4, 5632, 32000), help=names
    )
    parser.add_argument("--limit", type=float, default=3.0, help="GB per command")
    parser.add_argument("--dtype", default="float32", help="of the computation")
    parser.add_argument("--max_memory", type=float, default=0.1, help="GB for hidden states")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines, appended to")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="for models and runs")
    arguments = parser.parse_args()
    os.environ.update(_RETURN_FREED)
    size = Size(*arguments.size)
    records = [json.loads(line) for line in whole_lines(arguments.output)]
    for each in (_SMALLEST, size):
        for command in _COMMANDS:
            key = {"command": command, "size": each.label, "limit": arguments.limit}
            key["dtype"] = arguments.dtype
            if any(key.items() <= record.items() for record in records):
                continue
            records.append({**key, **_measured(command, each, arguments)})
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            with arguments.output.open("a", encoding="utf-8") as file:
                file.write(json.dumps(records[-1]) + "\n")
    print(report(records, size))


def _measured(command: str, size: Size, arguments: argparse.Namespace) -> Record:
    folder, root = arguments.cache / "models" / size.label, arguments.cache / "streamed"
    if not (folder / "tokenizer.json").exists():
        print(f"writing a random model to {folder}", flush=True)
        run_fresh(write_model, size, folder)
    run = root / size.label
    chosen = settings(folder, run, arguments.max_memory, arguments.dtype)
    argv = _command(command, chosen, run)
    print(f"measuring {' '.join(argv)}", flush=True)
    found = run_limited(argv, int(arguments.limit * _GIGA))
    if found["code"] != 0:
        raise GraspError(f"grasp {command} ended with exit code {found['code']:.0f}")
    modelled = run_fresh(modelled_bytes, chosen, run)
    return {**found, "modelled": modelled.get(command)}


def _command(command: str, chosen: list[str], run: Path) -> list[str]:
    if command == "evaluate":
        windows = ["--evaluation.num_samples=8", "--evaluation.seqlen=128"]
        windows += ["--evaluation.batch_size=1", "--loading=streamed"]
        return ["evaluate", f"--model={run / 'model'}", "--corpora=pydoc", *windows]
    return [command, *chosen]


def settings(folder: Path, run: Path, max_memory: float, dtype: str) -> list[str]:
    """Return the arguments of a compression.

    Args:
        folder: The model.
        run: The run folder.
        max_memory: GB for hidden states.
        dtype: In which the model is computed.
    """
    text = ["source=pydoc", "num_samples=8", "seqlen=128", "batch_size=1"]
    sections = [f"--{section}.{key}" for section in ("calibration", "evaluation") for key in text]
    return [
        f"--model.path={folder}",
        "--model.loading=streamed",
        f"--model.dtype={dtype}",
        f"--output_dir={run}",
        "--method.name=grasp_plus",
        "--method.removed_ratio=0.2",
        "--statistics.measured_windows=0",
        f"--statistics.max_memory={max_memory}",
        *sections,
    ]


def write_model(size: Size, folder: Path) -> None:
    """Write a random Llama in bfloat16, with a tokenizer of bytes.

    Args:
        size: Its sizes.
        folder: Where.
    """
    import torch  # noqa: PLC0415  only the new process needs it
    from _family_configs import byte_tokenizer  # noqa: PLC0415
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.keys,
        intermediate_size=size.inner,
        vocab_size=size.vocabulary,
        dtype="bfloat16",
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
    )
    build: Any = LlamaForCausalLM._from_config  # Any: untyped in transformers
    model = build(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="500MB")
    byte_tokenizer().save_pretrained(folder)


def modelled_bytes(chosen: list[str], run: Path) -> dict[str, int]:
    """Return the peak memory of commands that ``plan`` computes, without libraries.

    Args:
        chosen: The arguments of the compression.
        run: The run folder.
    """
    from grasp_lightning.commands.plan import run_plan  # noqa: PLC0415  only the new process
    from grasp_lightning.config import ModelConfig, PlanConfig  # noqa: PLC0415
    from grasp_lightning.config.parsing import parse  # noqa: PLC0415
    from grasp_lightning.memory.model_shape import model_shape  # noqa: PLC0415
    from grasp_lightning.memory.shapes import Pass  # noqa: PLC0415
    from grasp_lightning.memory.streamed import streamed_evaluation  # noqa: PLC0415
    from grasp_lightning.models.decoder import DecoderView  # noqa: PLC0415
    from grasp_lightning.models.loading import load_meta_model  # noqa: PLC0415

    planned = run_plan(parse(PlanConfig, "plan", chosen))
    streamed = planned.calibration.streamed
    assert streamed is not None  # grasp_plus can be streamed
    found = {"compress": streamed.together}
    if (run / "model").exists():
        shape = model_shape(DecoderView(load_meta_model(ModelConfig(path=str(run / "model")))))
        hidden = 2 * 8 * 128 * shape.hidden * shape.element_size
        one = Pass(batch_size=1, seqlen=128)
        found["evaluate"] = streamed_evaluation(shape, one, hidden)
    return found


def report(records: Sequence[Mapping[str, Any]], size: Size) -> str:
    """Return the table of a size, as Markdown.

    Args:
        records: All measurements.
        size: The size.
    """
    libraries = {
        record["command"]: record["peak_bytes"]
        for record in records
        if record["size"] == _SMALLEST.label
    }
    rows = []
    for record in records:
        if record["size"] != size.label:
            continue
        beside = libraries[record["command"]]
        own, modelled = record["peak_bytes"] - beside, record["modelled"]
        cells = [f"{record['peak_bytes'] / _GIGA:.2f}", f"{own / _GIGA:.2f}"]
        cells += (
            ["", ""]
            if modelled is None
            else [f"{modelled / _GIGA:.2f}", f"{modelled / own - 1:+.0%}"]
        )
        rows.append([record["command"], f"{record['seconds']:.0f}", *cells])
    header = ("command", "seconds", "peak", "without libraries", "modelled", "difference")
    return f"{markdown_table(header, rows)}\n\nGB. {hardware()}"


if __name__ == "__main__":
    sys.exit(exit_code(main))
