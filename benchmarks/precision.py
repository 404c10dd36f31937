"""Measures how bfloat16 changes the decisions of a compression, on a small trained model.

A Llama of 0.6 million parameters learns bytes of Python's documentation for a minute, and is
compressed in float32 and in narrower types. Another choice of calibration windows shows how much
decisions differ anyway.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from _common import DEFAULT_CACHE, exit_code, hardware, markdown_table
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from grasp_lightning import compress
from grasp_lightning.config import CalibrationConfig
from grasp_lightning.data.datamodules import CalibrationData

_VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "float32": {},
    "bfloat16 weights": {"model": {"dtype": "bfloat16"}},
    "bf16-mixed": {"trainer": {"precision": "bf16-mixed"}},
    "float32, other windows": {"seed": 1},
}
_REFERENCE = "float32"
_SEQLEN = 128
_ROWS = 16  # per training step


def main() -> None:
    """Train, compress and compare; what a killed program has finished is only read."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="for the trained model")
    parser.add_argument("--steps", type=int, default=150, help="training steps")
    arguments = parser.parse_args()
    model = trained_model(arguments.cache / f"bytes-{arguments.steps}", arguments.steps)
    text = {"source": "pydoc", "num_samples": 32, "seqlen": _SEQLEN}
    for name, keys in _VARIANTS.items():
        section = {"path": str(model), **keys.get("model", {})}
        more = {key: value for key, value in keys.items() if key != "model"}
        compress(
            section,
            output_dir=arguments.output / name.replace(" ", "_"),
            removed_ratio=0.2,
            calibration=text,
            evaluation=text,
            **more,
        )
    print(report({name: arguments.output / name.replace(" ", "_") for name in _VARIANTS}))


def trained_model(folder: Path, steps: int) -> Path:
    """Return the folder of a model that has learned bytes; it is trained once.

    Args:
        folder: Where it is kept.
        steps: Number of training steps.

    Returns:
        The folder.
    """
    if folder.is_dir():
        return folder
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=_SEQLEN,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    tokenizer = _byte_tokenizer()
    settings = CalibrationConfig(source="pydoc", num_samples=1900, seqlen=_SEQLEN)
    ids = CalibrationData(settings, tokenizer, 7).windows.input_ids
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        batch = ids[torch.randint(len(ids), (_ROWS,))]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}: loss {float(loss.detach()):.3f}", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found: PreTrainedTokenizerFast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # untyped there
        tokenizer_object=tokenizer
    )
    return found


def report(runs: Mapping[str, Path]) -> str:
    """Return the table, as Markdown.

    Args:
        runs: Run folders by variant.

    Returns:
        The text.
    """
    header = ["model", "removed", "sizes that differ", "by at most", "channels that differ"]
    header += ["predicted losses differ by at most", "perplexity, dense", "compressed"]
    rows = [_row(name, run, runs[_REFERENCE]) for name, run in runs.items()]
    return "\n".join([markdown_table(header, rows), "", hardware()])


def _row(name: str, run: Path, reference: Path) -> Sequence[str]:
    metrics = json.loads((run / "metrics.json").read_text())
    sizes, kept, losses = _decisions(run)
    other_sizes, other_kept, other_losses = _decisions(reference)
    everything = sizes.keys() | other_sizes.keys()
    changes = [
        abs(sizes.get(key, full) - other_sizes.get(key, full)) / full
        for key in everything
        for full in [len(losses.get(key, other_losses.get(key, ())))]
    ]
    differing = sum(
        len(kept[key] ^ other_kept[key]) // 2 for key in kept.keys() & other_kept.keys()
    )
    number = sum(len(kept[key]) for key in kept.keys() & other_kept.keys())
    gaps = [
        float((losses[key].sum() - other_losses[key].sum()).abs() / other_losses[key].sum())
        for key in losses.keys() & other_losses.keys()
    ]
    perplexity = metrics["perplexity"]
    return [
        name,
        f"{metrics['removed_ratio']:.2%}",
        f"{sum(change > 0 for change in changes)} of {len(changes)}",
        f"{max(changes):.1%}",
        f"{differing} of {number}",
        f"{max(gaps):.1%}",
        f"{perplexity['dense']:.3f}",
        f"{perplexity['compressed']:.3f}",
    ]


def _decisions(run: Path) -> tuple[dict[str, int], dict[str, set[int]], dict[str, torch.Tensor]]:
    """Return ranks and numbers of channels, kept channels, and predicted losses, by module."""
    plan = json.loads((run / "plan.json").read_text())
    sizes: dict[str, int] = {}
    kept: dict[str, set[int]] = {}
    for operation in plan["operations"]:
        if "rank" in operation:
            sizes[operation["module"]] = operation["rank"]
        elif "channels" in operation:
            kept[operation["reader"]] = set(operation["channels"])
            sizes[operation["reader"]] = len(operation["channels"])
    scores = load_file(run / "scores.safetensors")
    losses = {
        key.removesuffix(".scores"): value
        for key, value in scores.items()
        if key.endswith("scores")
    }
    return sizes, kept, losses


if __name__ == "__main__":
    sys.exit(exit_code(main))
