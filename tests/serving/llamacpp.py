"""Exports models to GGUF, and runs the files in llama.cpp's own environment."""

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFWriter, TokenType
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from grasp_lightning.cli import main
from grasp_lightning.models.checkpoint import save_model
from tests.conftest import VOCABULARY, byte_tokenizer, tiny_model

PYTHON = Path(__file__).parents[2] / ".venv-serving/llamacpp/bin/python"
RUNNER = Path(__file__).with_name("llamacpp_runner.py")

Job = Mapping[str, object]
Result = dict[str, Any]  # Any: values of JSON


def run_llamacpp(jobs: Sequence[Job], folder: Path) -> list[Result]:
    """Results of the runner, one per job; ``folder`` is for its files."""
    assert PYTHON.is_file(), f"{PYTHON} is missing: make test-serving makes it"
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


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer like that of Llama 2, converted from sentencepiece."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(["the cat sat on the mat, and the other cat sat there"], trainer)
    # Bytes are ordinary tokens of a model, so only the first three stay special.
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:3]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    start = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.post_processor = start
    tokenizer.add_tokens([AddedToken("<|extra|>", normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template="{{ messages[0].content }}",
    )


def sentencepiece_model(folder: Path) -> Path:
    """A tiny Mistral with such a tokenizer, and two rows of its embedding without a token."""
    tokenizer = sentencepiece_tokenizer()
    model = tiny_model("mistral", 0, vocab_size=len(tokenizer) + 2)
    save_model(model, folder, tokenizer=tokenizer)
    return folder


def load(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.eval()
    return model


def logits_of(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([ids])).logits[0]
    return logits
