"""What the survey does with one family: compress it by every method, and check what was saved."""

import logging
import math
import multiprocessing
import random
import string
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any, Final

import torch
import transformers
from _family_configs import byte_tokenizer, tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from grasp_lightning.callbacks.measure import TrainerMeasure
from grasp_lightning.commands.inputs import prepare
from grasp_lightning.config import (
    CalibrationConfig,
    CompressConfig,
    EvaluationConfig,
    MethodConfig,
    ModelConfig,
)
from grasp_lightning.errors import GraspError
from grasp_lightning.evaluation.phases import Phases
from grasp_lightning.methods import resolve_method
from grasp_lightning.models.checkpoint import save_model
from grasp_lightning.models.formats.dense import densify
from grasp_lightning.models.lowrank import has_replaced
from grasp_lightning.pipeline import compress
from grasp_lightning.plan import Plan
from grasp_lightning.training.finish import FinishDecision

WORKS, REFUSED, FAILED = "works", "refused", "failed"
METHODS: Final[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "grasp_plus": {"name": "grasp_plus", "removed_ratio": 0.1},
        "grasp": {"name": "grasp", "num_layers": 2, "keep_ratio": 0.3},
        "drop": {"name": "drop", "num_layers": 1},
        "svd_llm": {"name": "low_rank", "preset": "svd_llm", "keep_ratio": 0.5},
    }
)

_ADVICE = "set method.refit: none"
_WINDOWS, _SEQLEN = 2, 32
_NEW_TOKENS = 4
_PADDING = 3
_TOLERANCE = 1e-4  # relative to the largest logit
_SECONDS = 120  # for the process that opens the saved models of a family
_FORK = multiprocessing.get_context("fork")


def serve(pipe: Connection, log: Path) -> None:
    """Answer names of families with their results, until the other end is closed.

    Args:
        pipe: Gives a name and names of methods; takes a result per method.
        log: Tracebacks are appended to it.
    """
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # untyped there
    transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # as above
    logging.getLogger("lightning").setLevel(logging.ERROR)
    opener, other = _FORK.Pipe()
    # A process that never runs a model, so that its forks have seen none.
    _FORK.Process(target=_open_for, args=(other, opener), daemon=False).start()
    other.close()
    while True:
        try:
            family, methods = pipe.recv()
        except EOFError:
            return
        with TemporaryDirectory() as root:
            pipe.send(family_results(family, methods, Path(root), log, opener))


def _open_for(pipe: Connection, other: Connection) -> None:
    other.close()
    while True:
        try:
            root = pipe.recv()
        except EOFError:
            return
        process = _FORK.Process(target=_open_all, args=(root,))
        process.start()
        process.join(_SECONDS)
        process.kill()
        pipe.send(None)


def family_results(
    family: str, methods: Sequence[str], root: Path, log: Path, opener: Connection
) -> dict[str, str]:
    """Return for each method what became of a family, in one line.

    Args:
        family: Model type.
        methods: Names in ``METHODS``.
        root: An empty folder.
        log: Tracebacks are appended to it.
        opener: Takes a folder, and answers once its saved models were opened.

    Returns:
        ``works``, or ``refused`` or ``failed`` with the reason, by method.
    """

    def attempt(name: str, work: Callable[[], str]) -> str:
        try:
            return work()
        except GraspError as error:
            return f"{REFUSED}: {' '.join(str(error).split())}"
        except Exception as error:  # noqa: BLE001  a traceback is a result
            with log.open("a", encoding="utf-8") as file:
                file.write(f"=== {family} {name}\n{traceback.format_exc()}\n")
            return f"{FAILED}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"

    built = attempt("build", lambda: _built(family, root))
    if built != WORKS:
        return dict.fromkeys(methods, built)
    found = {name: attempt(name, partial(_compressed, name, root)) for name in methods}
    advised = [name for name, text in found.items() if _ADVICE in text]
    for name in advised:
        found[name] = attempt(name, partial(_compressed, name, root, refit="none"))
    opener.send(root)
    opener.recv()
    note = " with `method.refit: none`, as its error says"
    return {
        name: _checked(root / f"{name}.result", note if name in advised else "")
        if text == WORKS
        else text
        for name, text in found.items()
    }


def _checked(file: Path, note: str) -> str:
    if not file.exists():
        return f"{FAILED}: the process that opens the model was killed"
    text = file.read_text(encoding="utf-8")
    return text + note if text == WORKS else text


def _built(family: str, root: Path) -> str:
    model = tiny_model(family)
    model.save_pretrained(root / "source")
    byte_tokenizer().save_pretrained(root / "source")
    letters = random.Random(0).choices(string.printable, k=4 * _WINDOWS * _SEQLEN)
    text = "".join(letters)
    (root / "text.txt").write_text(text, encoding="utf-8")
    save_file(_behaviour(_opened(root / "source")), root / "source.safetensors")
    return WORKS


def _compressed(method: str, root: Path, **more: str) -> str:
    """Compress the source by a method and save it, and store what the model in memory computes.

    These are the steps of the command ``compress``, without perplexity and report.
    """
    text: dict[str, Any] = {"source": "file", "path": str(root / "text.txt")}
    text |= {"num_samples": _WINDOWS, "seqlen": _SEQLEN}
    config = CompressConfig(
        model=ModelConfig(path=str(root / "source"), device="cpu"),
        method=resolve_method(MethodConfig(**{**METHODS[method], **more}), 0),
        calibration=CalibrationConfig(**text),
        evaluation=EvaluationConfig(**text),
    )
    inputs = prepare(config, Phases())
    assert inputs.data is not None  # there are windows
    measure = TrainerMeasure(
        inputs.data, config.trainer, root / "logs", progress=False, caches=False
    )
    finish = FinishDecision(
        held_out=None, data=inputs.data, max_bytes=math.inf, phases=Phases(), track=_untracked
    )
    plan = Plan(method=inputs.method.name, options=inputs.method.options, inputs=inputs.hashes)
    compress(inputs.view, inputs.method, measure, plan, lambda *_: None, finish=finish)
    save_file(_behaviour(inputs.loaded.model), root / f"{method}.safetensors")
    save_model(inputs.loaded.model, root / method / "model", tokenizer=inputs.loaded.tokenizer)
    return WORKS


def _untracked(names: Sequence[Any], _: str = "") -> Sequence[Any]:  # Any: whatever is tracked
    return names


def _open_all(root: Path) -> None:
    """Check all saved models of a family, in a process that has seen none of them."""
    dense = load_file(root / "source.safetensors")
    for method in METHODS:
        expected = root / f"{method}.safetensors"
        if expected.exists():
            try:
                problem = _problem(root / method, load_file(expected), dense)
            except Exception as error:  # noqa: BLE001  a traceback is a result
                problem = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            text = f"{FAILED}: {problem}" if problem else WORKS
            (root / f"{method}.result").write_text(text, encoding="utf-8")


def _problem(run: Path, expected: Mapping[str, Tensor], dense: Mapping[str, Tensor]) -> str | None:
    """Return how a saved model differs from the one in memory; None if it does not."""
    model = _opened(run / "model")
    found = _behaviour(model)
    for key in dense:  # what the family itself can do
        if key not in found or not _are_close(found[key], expected[key]):
            return f"{key}: the saved model differs from the one in memory"
    if _takes_padding(dense) and not _takes_padding(found):
        return "padding on the left changes what it generates"
    model.save_pretrained(run / "again")
    if not _are_close(_logits(_opened(run / "again")), expected["logits"]):
        return "saved again, it differs"
    if has_replaced(model):
        densify(model)
        model.save_pretrained(run / "dense")
        model = _opened(run / "dense")
        if has_replaced(model) or not _are_close(_logits(model), expected["logits"], 1e-3):
            return "exported as a dense model, it differs"
    return None


def _takes_padding(found: Mapping[str, Tensor]) -> bool:
    return "padded" in found and _are_close(found["padded"], found["alone"])


def _opened(folder: Path) -> PreTrainedModel:
    load: Any = AutoModelForCausalLM.from_pretrained  # Any: its type ignores the report
    model, report = load(folder, dtype=torch.float32, output_loading_info=True)
    problems = sorted(str(key) for keys in report.values() for key in keys)
    if problems:
        raise ValueError(f"it does not load completely: {problems[0]}")
    found: PreTrainedModel = model.eval()
    return found


def _prompts() -> Tensor:
    return torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def _logits(model: PreTrainedModel) -> Tensor:
    run: Any = model  # Any: outputs of every family
    found: Tensor = run(input_ids=_prompts()).logits
    return found.contiguous()


@torch.no_grad()
def _new_logits(model: PreTrainedModel, ids: Tensor, padding: int, *, use_cache: bool) -> Tensor:
    """Return the logits of new tokens, ``(B, T, V)``; the first prompt gets padding."""
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    run: Any = model  # Any: outputs of every family
    new = run.generate(
        torch.where(mask.bool(), ids, 258),
        attention_mask=mask,
        max_new_tokens=_NEW_TOKENS,
        min_new_tokens=_NEW_TOKENS,
        do_sample=False,
        use_cache=use_cache,
        pad_token_id=258,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.stack(new.logits, dim=1)


def _behaviour(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return logits of two prompts, and of new tokens as far as the family generates.

    ``padded`` and ``alone`` continue the end of the first prompt, with padding on its left in a
    batch, and alone.
    """
    ids = _prompts()
    trials: dict[str, Callable[[], Tensor]] = {
        "cached": lambda: _new_logits(model, ids, 0, use_cache=True),
        "uncached": lambda: _new_logits(model, ids, 0, use_cache=False),
        "padded": lambda: _new_logits(model, ids, _PADDING, use_cache=True)[:1],
        "alone": lambda: _new_logits(model, ids[:1, _PADDING:], 0, use_cache=True),
    }
    found = {"logits": _logits(model)}
    for key, trial in trials.items():
        try:
            found[key] = trial().contiguous()
        except Exception:  # noqa: BLE001  the family cannot do it
            continue
    return found


def _are_close(first: Tensor, second: Tensor, tolerance: float = _TOLERANCE) -> bool:
    finite = second.isfinite()  # some families mask tokens with minus infinity
    if first.shape != second.shape or not torch.equal(first.isfinite(), finite):
        return False
    limit = tolerance * float(second[finite].abs().max()) if finite.any() else 0.0
    return bool(((first - second)[finite].abs() <= limit).all())
