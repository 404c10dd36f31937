"""Runs one model in one server, and times the requests that come on standard input.

It imports nothing of this project, since each server has an environment of its own. Each line of
standard input is ``PROMPT_TOKENS NEW_TOKENS SEED``; the answer is the number of seconds. Prompts
have random tokens below the given size of the vocabulary.
"""

import json
import os
import random
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

_FIRST_TOKEN: Final = 100  # special tokens often have the lowest numbers
_CONTEXT: Final = 1024

Generate = Callable[[Sequence[int], int], object]
"""Generates exactly that many tokens after a prompt, greedily, without a cache of prompts."""


def _transformers(model: str) -> Generate:
    import torch  # noqa: PLC0415 - not in every environment
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    import grasp_lightning  # noqa: F401, PLC0415 - opens compressed layers

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)  # untyped

    def generate(prompt: Sequence[int], count: int) -> object:
        ids = torch.tensor([prompt])
        return loaded.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=count,
            max_new_tokens=count,
            pad_token_id=0,
        )

    return generate


def _vllm(model: str) -> Generate:
    from vllm import LLM, SamplingParams  # noqa: PLC0415

    server = LLM(
        model,
        dtype="float32",
        enforce_eager=True,
        max_model_len=_CONTEXT,
        max_num_seqs=1,
        enable_prefix_caching=False,
    )

    def generate(prompt: Sequence[int], count: int) -> object:
        sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        return server.generate({"prompt_token_ids": list(prompt)}, sampling, use_tqdm=False)

    return generate


def _llamacpp(model: str) -> Generate:
    import xllamacpp  # noqa: PLC0415

    threads = int(os.environ["OMP_NUM_THREADS"])
    settings = xllamacpp.CommonParams()
    settings.model.path = model
    settings.n_ctx, settings.n_parallel = _CONTEXT, 1
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(settings)

    def generate(prompt: Sequence[int], count: int) -> object:
        body = {
            "prompt": list(prompt),
            "n_predict": count,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
        }
        request = urllib.request.Request(
            f"{server.listening_address}/completion",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            content: dict[str, Any] = json.load(answer)  # Any: values of JSON
        assert content["tokens_predicted"] == count, content
        return content

    return generate


SERVERS: Final[Mapping[str, Callable[[str], Generate]]] = MappingProxyType(
    {"transformers": _transformers, "vllm": _vllm, "llamacpp": _llamacpp}
)


def main() -> None:
    """Load a model in a server, then answer until standard input ends."""
    server, model, vocabulary = sys.argv[1:]
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    generate = SERVERS[server](model)
    print("ready", file=answers)
    for line in sys.stdin:
        length, count, seed = map(int, line.split())
        prompt = random.Random(seed).choices(range(_FIRST_TOKEN, int(vocabulary)), k=length)
        start = time.perf_counter()
        generate(prompt, count)
        print(time.perf_counter() - start, file=answers)


if __name__ == "__main__":
    main()
