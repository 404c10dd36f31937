"""Time and memory of a random model with layers of the shape of Llama-3-8B."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from grasp_lightning import compress
from tests.conftest import byte_tokenizer

LAYERS = 32  # of Llama-3-8B
_SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 224,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 260,
}
# Phases whose time grows with the layers, and how often each token goes through them.
_PER_LAYER = {"curvature": 1, "factorize": 0, "refit": 1, "evaluate": 2}


def model_of(device: str, num_layers: int) -> PreTrainedModel:
    """Return a random bfloat16 model on a device; on a CPU, a small one."""
    shape = _SMALL if device == "cpu" else _SHAPE
    config = AutoConfig.for_model("llama", num_hidden_layers=num_layers, **shape)
    torch.manual_seed(0)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.train(False)
    return model


def measured(device: str, folder: Path, *, num_layers: int, windows: int, seqlen: int) -> Any:  # noqa: ANN401  values of JSON
    """Compress the model to 80 %, and return the metrics of the run."""
    text = {"source": "pydoc", "num_samples": windows, "seqlen": seqlen}
    run = compress(
        model_of(device, num_layers),
        tokenizer=byte_tokenizer(),
        output_dir=folder,
        removed_ratio=0.2 if num_layers == LAYERS else 0.05,  # embeddings are most of the model
        calibration=text,
        evaluation=text,
        statistics={"measured_windows": 0, "store": False, "max_memory": 16},
    )
    return run.metrics


def table(metrics: Mapping[str, Any], *, num_layers: int, tokens: int) -> str:
    """Return seconds and tokens per second by phase, here and for all layers, as Markdown."""
    rows = [
        f"| phase | seconds, {num_layers} layers | tokens per second | seconds, {LAYERS} layers |",
        "|:--|--:|--:|--:|",
    ]
    for phase, passes in _PER_LAYER.items():
        seconds = metrics["seconds"][phase]
        speed = f"{passes * tokens / seconds:,.0f}" if passes else ""
        rows.append(f"| {phase} | {seconds:.1f} | {speed} | {seconds * LAYERS / num_layers:.0f} |")
    memory = metrics["peak_memory_bytes"] / 1e9
    return "\n".join([*rows, "", f"peak memory: {memory:.1f} GB with {num_layers} layers"])
