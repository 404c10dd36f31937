"""A process that loads saved models as a user does, and compares them with what was saved.

It is a fresh interpreter that has seen no model. Importing transformers takes seconds, so it
happens once: the process reads one folder per line of standard input and forks for each. It prints
the exit code of the fork, which writes what differs into the folder.
"""

import gc
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

import grasp_lightning  # noqa: F401  (makes compressed models known to transformers)
from grasp_lightning.models.auto_classes import auto_class
from grasp_lightning.models.decoder import frozen
from grasp_lightning.models.integrity import tensor_hashes

REQUEST, EXPECTED, DIFFERENCE, ERRORS = "request.json", "expected.safetensors", "difference", "err"

_PROMPT, _NEW_TOKENS = 8, 3  # numbers of tokens
# Relative to the largest logit. Both processes compute on the CPU with equally many threads.
_TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.02}


def behaviour(model: PreTrainedModel, *, generates: bool) -> dict[str, Tensor]:
    """Return what a model computes for a few tokens, on the CPU, logits as float32.

    These are ``logits``, ``(P, V)``, of a prompt, and if it generates, with its cache, also
    ``new_logits``, ``(T, V)``, and ``new_tokens``, ``(T,)``.
    """
    count = model.config.get_text_config().vocab_size
    ids = (torch.arange(1, _PROMPT + 1, device=model.device) % count)[None]
    run: Any = model  # Any: outputs of every family
    with frozen(model), torch.inference_mode():
        found = {"logits": run(input_ids=ids).logits[0].float().cpu()}
        if generates:
            new = run.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=_NEW_TOKENS,
                min_new_tokens=_NEW_TOKENS,
                do_sample=False,
                num_beams=1,
                use_cache=True,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
            found["new_logits"] = torch.cat(new.logits).float().cpu()
            found["new_tokens"] = new.sequences[0, _PROMPT:].cpu()
    return found


def difference(folder: Path, request: Mapping[str, Any], expected: Mapping[str, Tensor]) -> str:
    """Load a saved model and return how it differs from the expected one; empty if it does not.

    Args:
        folder: The saved model.
        request: ``tensors``: hash by name; ``trust_remote_code``; ``generates``.
        expected: ``behaviour`` of the model that was saved.
    """
    trusted = bool(request["trust_remote_code"])
    load = auto_class(AutoConfig.from_pretrained(folder, trust_remote_code=trusted)).from_pretrained
    model, report = load(folder, dtype="auto", trust_remote_code=trusted, output_loading_info=True)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if report[problem]:
            return f"{problem.replace('_', ' ')}: {min(report[problem])}"
    wanted, loaded = request["tensors"], tensor_hashes(model)
    if wanted != loaded:
        name = min(name for name, _ in wanted.items() ^ loaded.items())
        return f"{name} has other values, shape or type"
    return _difference_in_behaviour(
        behaviour(model, generates=request["generates"]), expected, model.dtype
    )


def _difference_in_behaviour(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], dtype: torch.dtype
) -> str:
    finite = expected["logits"][expected["logits"].isfinite()]
    tolerance = _TOLERANCES[dtype] * float(finite.abs().max()) if finite.numel() else 0.0
    if not _are_close(found["logits"], expected["logits"], tolerance):
        return "it computes other logits"
    for step in range(len(expected.get("new_tokens", ()))):
        new = (found["new_logits"][step], expected["new_logits"][step])
        if not _are_close(*new, tolerance):
            return f"it computes other logits for new token {step + 1}, with its cache"
        if found["new_tokens"][step] != expected["new_tokens"][step]:
            break  # two logits are nearly equal, so the texts differ after this token
    return ""


def _are_close(first: Tensor, second: Tensor, tolerance: float) -> bool:
    finite = second.isfinite()  # some families mask tokens with minus infinity
    if not torch.equal(first.isfinite(), finite):
        return False
    return bool(((first - second)[finite].abs() <= tolerance).all())


def main() -> None:
    """Answer requests until standard input ends."""
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # untyped there
    gc.collect()
    gc.freeze()  # so that forks share the memory of imported modules
    for line in iter(sys.stdin.readline, ""):
        child = os.fork()
        if child == 0:
            _answer(Path(line.rstrip("\n")))
            os._exit(0)  # a normal exit after importing transformers takes seconds
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


def _answer(request: Path) -> None:
    """Compare one model; a traceback ends up next to the request."""
    errors = os.open(request / ERRORS, os.O_WRONLY | os.O_CREAT)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(errors, stream.fileno())
    content = json.loads((request / REQUEST).read_text(encoding="utf-8"))
    found = difference(Path(content["folder"]), content, load_file(request / EXPECTED))
    (request / DIFFERENCE).write_text(found, encoding="utf-8")


if __name__ == "__main__":
    main()
