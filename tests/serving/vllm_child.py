"""Generates with vLLM, in vLLM's own environment: ``python vllm_child.py JOBS RESULTS``.

JOBS is a JSON list of objects with ``model``, ``prompts`` (token ids), ``max_tokens`` and
``options`` of vLLM. RESULTS gets one object per job: for each prompt ``tokens`` and ``logprobs``,
those of the prompt itself, but for its first token, and of the tokens; or ``error``.
"""

import gc
import json
import sys
from pathlib import Path
from typing import Any

from vllm import LLM, RequestOutput, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory


def generate(job: dict[str, Any]) -> dict[str, Any]:
    options = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 512,
        "max_num_seqs": 8,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
    }
    llm = LLM(job["model"], **{**options, **job.get("options", {})})
    sampling = SamplingParams(
        temperature=0, max_tokens=job["max_tokens"], ignore_eos=True, logprobs=0, prompt_logprobs=0
    )
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    outputs = llm.generate(prompts, sampling, use_tqdm=False)
    llm.llm_engine.engine_core.shutdown()
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "logprobs": [logprobs(output) for output in outputs],
    }


def logprobs(output: RequestOutput) -> list[float]:
    ids = [*output.prompt_token_ids, *output.outputs[0].token_ids][1:]
    places = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
    return [place[token].logprob for place, token in zip(places, ids, strict=True)]


def main(jobs: Path, results: Path) -> None:
    found = []
    for job in json.loads(jobs.read_text()):
        try:
            found.append(generate(job))
        except Exception as error:  # noqa: BLE001  # the test asks for its text
            found.append({"error": str(error)})
        gc.collect()
        cleanup_dist_env_and_memory()
    results.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
