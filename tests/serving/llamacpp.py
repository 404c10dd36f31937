"""Exports models to GGUF, and runs the files in llama.cpp's own environment."""

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFWriter, TokenType
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from grasp_lightning.cli import main
from tests.conftest import VOCABULARY, byte_tokenizer

PYTHON = Path(__file__).parents[2] / ".venv-serving/llamacpp/bin/python"
RUNNER = Path(__file__).with_name("llamacpp_runner.py")

Job = Mapping[str, object]
Result = dict[str, Any]  # Any: values of JSON


def run_llamacpp(jobs: Sequence[Job], folder: Path) -> list[Result]:
    """Results of the runner, one per job; ``folder`` is for its files."""
    asked, answered = folder / "jobs.json", folder / "results.json"
    asked.write_text(json.dumps(jobs), encoding="utf-8")
    process = subprocess.run(
        [str(PYTHON), str(RUNNER), str(asked), str(answered)],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    results: list[Result] = json.loads(answered.read_text(encoding="utf-8"))
    return results


def export_gguf(source: Path, output: Path, *words: str) -> Path:
    """The GGUF file that the command writes for a folder."""
    arguments = [f"--model={source}", "--format=gguf", f"--output_dir={output}", *words]
    assert main(["export", *arguments]) == 0
    (file,) = (output / "model").glob("*.gguf")
    return file


def byte_base(file: Path) -> Path:
    """A GGUF file with the vocabulary of ``byte_tokenizer``, for ``gguf_base``."""
    texts = {index: text for text, index in byte_tokenizer().get_vocab().items()}
    writer = GGUFWriter(file, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([texts.get(index, f"[PAD{index}]") for index in range(VOCABULARY)])
    kinds = [TokenType.NORMAL] * 256 + [TokenType.CONTROL] * 3 + [TokenType.UNUSED]
    writer.add_token_types(kinds)
    writer.add_token_merges(["a b"])  # llama.cpp wants the list, and no token is "ab"
    writer.add_tensor("token_embd.weight", torch.zeros(VOCABULARY, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def load(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval()
    return model


def logits_of(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([ids])).logits[0]
    return logits


def greedy_of(model: PreTrainedModel, ids: Sequence[int], num_new: int) -> list[int]:
    """The most probable continuation, and nothing stops it."""
    options = {"max_new_tokens": num_new, "min_new_tokens": num_new, "do_sample": False}
    any_model: Any = model  # Any: a mixin declares generate
    any_model.generation_config.eos_token_id = None
    tokens = any_model.generate(torch.tensor([ids]), pad_token_id=0, **options)
    new: list[int] = tokens[0, len(ids) :].tolist()
    return new
