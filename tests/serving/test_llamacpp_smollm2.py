"""SmolLM2 with low-rank attention and MLPs of many widths, in llama.cpp and in transformers."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from grasp_lightning.config import ModelConfig
from grasp_lightning.models.checkpoint import save_model
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.loading import load_model
from grasp_lightning.models.surgery import apply_operations
from grasp_lightning.plan import FactorizeLinear, Operation
from tests.serving.llamacpp import Result, export_gguf, load, logits_of, run_llamacpp
from tests.serving.reference import PROMPTS, greedy
from tests.unit.models.helpers import narrow_layers

pytestmark = pytest.mark.serving

NUM_WINDOWS, WINDOW, NUM_NEW = 4, 512, 64
# Runs of spaces, digits, letters of several scripts, emojis, control tokens.
TEXTS = (
    *PROMPTS,
    "  two  spaces\t\ttabs\n\n\nlines 1234567 3.14 it's WE'LL",
    "na\u00efve \u0431\u044a\u043b\u0433\u0430\u0440\u0441\u043a\u0438 \u5929\u6c14 \U0001f680",
    "<|im_start|>user\nHi<|im_end|>\n",
)

MESSAGES = [{"role": "user", "content": "Name the capital of France."}]


class Runs(NamedTuple):
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    windows: list[list[int]]
    float32: Result
    from_base: Result
    quantized: Result


def cut(view: DecoderView) -> None:
    """Narrow the MLPs to 1400 to 1477 of 1536 channels, and cut the ranks of some attention."""
    for layer in range(view.num_layers):
        apply_operations(view, *narrow_layers(view, (layer,), range(1400 + layer * 53 % 80)))
    operations: list[Operation] = []
    tensors = {}
    for layer in range(0, view.num_layers, 4):
        name = f"model.layers.{layer}.self_attn.q_proj"
        u, s, vh = torch.linalg.svd(view.linears(layer)[name].weight.detach())
        rank = 200 + layer
        operations.append(FactorizeLinear(module=name, rank=rank, components=None))
        tensors[f"{name}.left"], tensors[f"{name}.right"] = u[:, :rank] * s[:rank], vh[:rank]
    apply_operations(view, operations, tensors)


def windows_of(tokenizer: PreTrainedTokenizerBase, grasp_data: Path) -> list[list[int]]:
    text = (grasp_data / "wikitext2_raw/test.txt").read_text(encoding="utf-8")
    ids = tokenizer(text[: 20_000 * NUM_WINDOWS])["input_ids"]
    step = len(ids) // NUM_WINDOWS
    return [ids[start : start + WINDOW] for start in range(0, step * NUM_WINDOWS, step)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, grasp_data: Path) -> Iterator[Runs]:
    root = tmp_path_factory.mktemp("smollm2")
    loaded = load_model(ModelConfig(path="smollm2", device="cpu"))
    view = DecoderView(loaded.model)
    cut(view)
    source = root / "compressed"
    save_model(view.model, source, tokenizer=loaded.tokenizer)
    tokenizer = AutoTokenizer.from_pretrained(source)
    windows, prompts = windows_of(tokenizer, grasp_data), tokenizer(list(PROMPTS))["input_ids"]
    job = {"losses": windows, "greedy": prompts, "num_new": NUM_NEW, "texts": TEXTS}
    files = (
        export_gguf(source, root / "f32"),
        export_gguf(source, root / "base", "--gguf_type=f16", "--gguf_base=smollm2"),
        export_gguf(source, root / "q8_0", "--gguf_type=q8_0"),
    )
    jobs = ({**job, "file": str(files[0])}, {"texts": TEXTS, "file": str(files[1])})
    quantized = {"losses": windows, "file": str(files[2]), "chat": MESSAGES}
    yield Runs(load(source), tokenizer, windows, *run_llamacpp([*jobs, quantized], root))
    for file in files:
        file.unlink()


def mean_loss(model: PreTrainedModel, windows: list[list[int]]) -> float:
    losses = [
        torch.nn.functional.cross_entropy(logits_of(model, ids)[:-1], torch.tensor(ids[1:])).item()
        for ids in windows
    ]
    return sum(losses) / len(losses)


def test_perplexity_is_that_of_transformers(runs: Runs) -> None:
    expected = math.exp(mean_loss(runs.model, runs.windows))
    losses, quantized = runs.float32["losses"], runs.quantized["losses"]
    assert math.exp(sum(losses) / len(losses)) == pytest.approx(expected, rel=1e-3)
    assert math.exp(sum(quantized) / len(quantized)) == pytest.approx(expected, rel=0.02)


def test_greedy_tokens_are_those_of_transformers(runs: Runs) -> None:
    prompts = runs.tokenizer(list(PROMPTS))["input_ids"]
    assert runs.float32["greedy"] == [greedy(runs.model, ids, NUM_NEW).tokens for ids in prompts]


@pytest.mark.parametrize("source", ["float32", "from_base"])
def test_llamacpp_splits_texts_into_the_same_tokens(runs: Runs, source: str) -> None:
    assert getattr(runs, source)["tokens"] == runs.tokenizer(list(TEXTS))["input_ids"]


def test_the_server_applies_the_chat_template(runs: Runs) -> None:
    tokenizer: Any = runs.tokenizer  # Any: what a call returns depends on its arguments
    prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    expected = tokenizer(prompt)["input_ids"]
    answer = runs.quantized["chat"]
    assert answer["usage"]["prompt_tokens"] == len(expected)
    assert answer["choices"][0]["message"]["content"]
