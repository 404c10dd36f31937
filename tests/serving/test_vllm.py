"""vLLM, with the plugin installed and no flags, generates what transformers generates."""

import json
import shutil
import socket
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.serving.conftest import VLLM, Generate, running
from tests.serving.reference import PROMPTS, Greedy, differences, greedy
from tests.serving.tiny_models import (
    FAMILIES,
    MIXTURES,
    save_compressed,
    save_ordinary,
    save_ordinary_mixture,
)

pytestmark = pytest.mark.serving
NUM_TOKENS, NUM_TINY_TOKENS = 64, 16
TINY_PROMPTS = [[256, *text.encode()] for text in PROMPTS[:3]]
HALF_DTYPES = ("bfloat16", "float16")
IN_TWO = ("llama with biases", "phi3")  # families for two processes; others differ by name alone


def job(model: Path, prompts: list[list[int]], num_tokens: int, **options: object) -> dict:
    return {
        "model": str(model),
        "prompts": prompts,
        "max_tokens": num_tokens,
        "options": options,
    }


def check(expected: list[Greedy], found: dict[str, Any]) -> None:
    assert "error" not in found, found["error"]
    assert not differences(expected, found["tokens"])
    for reference, logprobs in zip(expected, found["logprobs"], strict=True):
        assert logprobs == pytest.approx(reference.logprobs, abs=2e-3)


@pytest.fixture(scope="module")
def prompts(compressed: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(compressed)
    return [tokenizer(text)["input_ids"] for text in PROMPTS]


@pytest.fixture(scope="module")
def expected(compressed: Path, prompts: list[list[int]]) -> list[Greedy]:
    model = AutoModelForCausalLM.from_pretrained(compressed)
    return [greedy(model, ids, NUM_TOKENS) for ids in prompts]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[Greedy]]]:
    """Folder and expected tokens of each tiny model."""
    found = {}
    for name in FAMILIES:
        folder = tmp_path_factory.mktemp("tiny") / "model"
        model = save_compressed(folder, name)
        found[name] = folder, [greedy(model, ids, NUM_TINY_TOKENS) for ids in TINY_PROMPTS]
    folder = tmp_path_factory.mktemp("tiny") / "model"
    model = save_ordinary(folder)
    found["ordinary"] = folder, [greedy(model, ids, NUM_TINY_TOKENS) for ids in TINY_PROMPTS]
    for name in MIXTURES:
        folder = tmp_path_factory.mktemp("tiny") / "model"
        model = save_ordinary_mixture(folder, name)
        reference = [greedy(model, ids, NUM_TINY_TOKENS) for ids in TINY_PROMPTS]
        found[f"{name} with fewer experts"] = folder, reference
    return found


def test_one_process(
    generate: Generate,
    compressed: Path,
    prompts: list[list[int]],
    expected: list[Greedy],
    tiny: dict[str, tuple[Path, list[Greedy]]],
) -> None:
    jobs = [job(compressed, prompts, NUM_TOKENS)]
    jobs += [job(folder, TINY_PROMPTS, NUM_TINY_TOKENS) for folder, _ in tiny.values()]
    folder, reference = tiny["llama with biases"]
    jobs += [job(folder, TINY_PROMPTS, 1, dtype=dtype) for dtype in HALF_DTYPES]
    first, *others = generate(jobs)
    check(expected, first)
    for (_, wanted), found in zip(tiny.values(), others[: len(tiny)], strict=True):
        check(wanted, found)
    for found in others[len(tiny) :]:
        assert "error" not in found, found["error"]
        for one, ids, logprobs in zip(reference, TINY_PROMPTS, found["logprobs"], strict=True):
            of_prompt = len(ids) - 1
            assert logprobs[:of_prompt] == pytest.approx(one.logprobs[:of_prompt], abs=0.2)


def test_three_processes_hold_uneven_shares(
    generate: Generate, compressed: Path, prompts: list[list[int]], expected: list[Greedy]
) -> None:
    shapes = json.loads((compressed / "config.json").read_text())["quantization_config"]["shapes"]
    assert any(width % 3 for _, width in shapes.values())
    check(expected, generate([job(compressed, prompts, NUM_TOKENS, tensor_parallel_size=3)])[0])


def test_two_processes(generate: Generate, tiny: dict[str, tuple[Path, list[Greedy]]]) -> None:
    chosen = [tiny[name] for name in IN_TWO]
    options = {"tensor_parallel_size": 2}
    jobs = [job(folder, TINY_PROMPTS, NUM_TINY_TOKENS, **options) for folder, _ in chosen]
    for (_, reference), found in zip(chosen, generate(jobs), strict=True):
        check(reference, found)


def damaged(folder: Path, source: Path, change: Callable[[dict], None], file: str) -> Path:
    """Copy a folder, and change one of its files of JSON or tensors."""
    shutil.copytree(source, folder)
    path = folder / file
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    else:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})
    return folder


def without(key: str) -> Callable[[dict], None]:
    return lambda tensors: tensors.pop(key)


def test_what_cannot_be_served_is_refused_in_one_line(
    generate: Generate,
    compressed: Path,
    tiny: dict[str, tuple[Path, list[Greedy]]],
    tmp_path: Path,
) -> None:
    source, _ = tiny["llama with biases"]
    layer = "model.layers.0"
    missing = {
        f"{layer}.self_attn.q_proj.left.weight": "the checkpoint lacks {}",
        f"{layer}.self_attn.q_proj.left.bias": "the checkpoint lacks {}",
        "model.layers.3.mlp.up_proj.weight": "the checkpoint lacks {}",  # a dense one
        f"{layer}.input_layernorm.weight": "not initialized from checkpoint: {{'{}'}}",
    }
    cases: list[tuple[Path, str, dict[str, object]]] = [
        (damaged(tmp_path / key, source, without(key), "model.safetensors"), text.format(key), {})
        for key, text in missing.items()
    ]
    newer = lambda config: config["quantization_config"].update(groups={})  # noqa: E731
    folder = damaged(tmp_path / "newer", source, newer, "config.json")
    cases.append((folder, "unknown keys ['groups']: the model was saved by a newer version", {}))
    cases.append((source, "merge the adapter", {"enable_lora": True}))
    heads = "attention heads (9) must be divisible by tensor parallel size (2)"
    cases.append((compressed, heads, {"tensor_parallel_size": 2}))
    jobs = [job(folder, TINY_PROMPTS, 1, **options) for folder, _, options in cases]
    for (_, text, _), found in zip(cases, generate(jobs), strict=True):
        assert text in found.get("error", "")


@pytest.fixture(scope="module")
def server(
    compressed: Path, vllm_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Address of the OpenAI-compatible server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # `vllm serve` calls the same module, but looks for a distribution that the CPU build is not.
    options = ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    options += ["--enforce-eager", "--max-model-len", "512", "--served-model-name", "small"]
    module = "vllm.entrypoints.openai.api_server"
    command: list[str | Path] = [VLLM, "-m", module, "--model", compressed, *options]
    address = f"http://127.0.0.1:{port}"
    folder = tmp_path_factory.mktemp("server")
    ready = partial(answers, f"{address}/health")
    with running(command, folder / "log", ready, vllm_environment):
        yield address


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def post(server: str, **request: object) -> bytes:
    body = {"model": "small", "temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True}
    asked = urllib.request.Request(
        f"{server}/v1/completions",
        data=json.dumps(body | request).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(asked, timeout=120) as response:
        content: bytes = response.read()
    return content


def choice(content: bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(content)["choices"][0]
    return found


def test_server_answers_eight_requests_at_once(
    server: str, compressed: Path, expected: list[Greedy]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(compressed)
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        found = list(pool.map(lambda text: choice(post(server, prompt=text)), PROMPTS))
    texts = [tokenizer.decode(reference.tokens) for reference in expected]
    assert [one["text"] for one in found] == texts


def test_server_returns_logprobs(server: str, expected: list[Greedy]) -> None:
    found = choice(post(server, prompt=PROMPTS[0], logprobs=1))["logprobs"]["token_logprobs"]
    assert found == pytest.approx(expected[0].logprobs[-NUM_TOKENS:], abs=2e-3)


def test_server_streams(server: str) -> None:
    whole = choice(post(server, prompt=PROMPTS[1]))["text"]
    lines = post(server, prompt=PROMPTS[1], stream=True).decode().splitlines()
    events = [line.removeprefix("data: ") for line in lines if line]
    assert events[-1] == "[DONE]"
    pieces = [json.loads(event)["choices"][0]["text"] for event in events[:-1]]
    assert len(pieces) > 8
    assert "".join(pieces) == whole
