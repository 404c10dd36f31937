"""What holds for every method, on a tiny model that was trained on a toy corpus.

A new method is one line in ``CASES``. Two neighbouring layers of the model do nothing, and the
others matter unequally, so that good and bad choices differ.
"""

import json
import signal
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from grasp_lightning import pipeline
from grasp_lightning.callbacks.measure import TrainerMeasure
from grasp_lightning.cli import main
from grasp_lightning.config import CalibrationConfig, MethodConfig
from grasp_lightning.data.datamodules import CalibrationData
from grasp_lightning.data.windows import TokenWindows
from grasp_lightning.methods import METHODS, build_method, resolve_method
from grasp_lightning.methods.base import CompressionMethod, Decision
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.next_token import forward_inputs, next_token_losses
from grasp_lightning.models.surgery import apply_operations
from grasp_lightning.plan import DropLayers, Plan
from grasp_lightning.stats.base import Statistics, Step
from tests.conftest import byte_tokenizer, tiny_model
from tests.integration.forked import killed, run_ranks
from tests.integration.killing import Kill
from tests.integration.test_artefact import GOOD, behaviour, run_child

pytestmark = pytest.mark.slow  # several runs of the program for each method

NUM_LAYERS = 8
IDLE = (3, 4)
NUM_DROPPED = 3
NUM_WINDOWS, LENGTH = 6, 48
IDS = torch.arange(97, 121)[None]

CALIBRATION = "grasp_lightning.training.calibration"
IN_A_FORWARD_PASS = Kill(CALIBRATION, "CalibrationModule", "predict_step", 2)
IN_A_LATER_SEARCH = Kill(CALIBRATION, "CalibrationModule", "predict_step", 5)
IN_A_GRADIENT_PASS = Kill(CALIBRATION, "CalibrationModule", "training_step", 2)
BETWEEN_STEPS = Kill("grasp_lightning.pipeline", "", "apply_operations", 2)


@dataclass(frozen=True, kw_only=True)
class Case:
    """How the suite runs a method.

    Attributes:
        options: Keys of ``method`` besides its name and, unless given, ``removed_ratio``.
        idle: Keys with which it changes the idle layers only, so that nothing is lost; None if it
            cannot.
        is_sparse: It sets weights to zero, and removes none: its models need no code of ours.
        drops: It deletes whole layers, so it meets a share with the nearest number of them, and its
            models need no code of ours.
        is_random: It is the control that others must beat.
        kill: Where a run of it is killed.
    """

    options: Mapping[str, Any] = field(default_factory=dict)  # Any: values of all types
    idle: Mapping[str, Any] | None = field(default_factory=lambda: {"num_layers": len(IDLE)})
    is_sparse: bool = False
    drops: bool = True
    is_random: bool = False
    kill: Kill = IN_A_FORWARD_PASS


CASES = {
    "drop": Case(),
    "shortgpt": Case(),
    "sleb": Case(kill=IN_A_LATER_SEARCH),
    "random": Case(idle=None, is_random=True, kill=BETWEEN_STEPS),
    "shortened_llama": Case(options={"criterion": "taylor"}, kill=IN_A_GRADIENT_PASS),
    "shortened_llama-perplexity": Case(options={"criterion": "perplexity"}),
    "laco": Case(
        options={"merge_layers": 2, "interval": 1, "threshold": 0.95},
        idle={"num_layers": 1, "merge_layers": 2, "interval": 1, "threshold": 0.99999},
        kill=BETWEEN_STEPS,
    ),
    "llm_streamline": Case(idle={"layers": IDLE, "epochs": 0}),
    "replaceme": Case(idle={"layers": IDLE}),
    "grasp": Case(
        options={"num_layers": 4},
        idle={"num_layers": 2, "keep_ratio": 0.3},
        drops=False,
        kill=IN_A_GRADIENT_PASS,
    ),
    "low_rank": Case(
        options={"preset": "svd_llm"}, idle={"layers": IDLE, "keep_ratio": 0.3}, drops=False
    ),
    "grasp_plus": Case(
        idle={"layers": IDLE, "keep_ratio": 0.3, "refit": "none"},
        drops=False,
        kill=IN_A_GRADIENT_PASS,
    ),
    "wanda": Case(
        idle={"layers": IDLE, "removed_ratio": 0.1},
        is_sparse=True,
        drops=False,
        kill=IN_A_LATER_SEARCH,
    ),
    "sparsegpt": Case(
        idle={"layers": IDLE, "removed_ratio": 0.1},
        is_sparse=True,
        drops=False,
        kill=IN_A_LATER_SEARCH,
    ),
}


def name_of(case: str) -> str:
    return case.partition("-")[0]


def sentences(seed: int, count: int) -> str:
    """Text of a small grammar: what follows depends on words far back, so several layers help."""
    random = Random(seed)
    animals, verbs = ("cat", "dog", "fox", "hen"), ("sees", "hears", "likes")
    lines = []
    for _ in range(count):
        first, second, verb = random.choice(animals), random.choice(animals), random.choice(verbs)
        lines.append(f"the {first} {verb} a {second}, so the {second} fears the {first}.\n")
    return "".join(lines)


def windows_of(text: str, count: int) -> TokenWindows:
    ids = torch.tensor(byte_tokenizer()(text)["input_ids"])[: count * LENGTH].reshape(count, LENGTH)
    targets = torch.ones_like(ids, dtype=torch.bool)
    targets[:, 0] = False
    return TokenWindows(ids, torch.ones_like(targets), targets)


def trained_model() -> PreTrainedModel:
    """A Llama that has learned the sentences, in which the layers ``IDLE`` return their input."""
    model = tiny_model(num_hidden_layers=NUM_LAYERS)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(0.4)
    view = DecoderView(model)
    for index in IDLE:
        for name, linear in view.linears(index).items():
            if name.endswith(("o_proj", "down_proj")):
                linear.weight.data.zero_()
                linear.weight.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=4e-3)
    windows = windows_of(sentences(1, 600), 400)
    for step in range(120):
        batch = windows.batch(range(16 * (step % 25), 16 * (step % 25) + 16))
        optimizer.zero_grad()
        losses(model, batch).mean().backward()
        optimizer.step()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.eval()
    return model


def losses(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    logits = model(**forward_inputs(batch), use_cache=False).logits
    return next_token_losses(logits, batch["input_ids"], batch["targets"])


@torch.no_grad()
def held_out_loss(model: PreTrainedModel) -> float:
    """Nats per token on sentences that nothing has seen."""
    return float(losses(model, windows_of(sentences(3, 30), 16).batch(range(16))).mean())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model in a folder, beside its calibration text."""
    folder = tmp_path_factory.mktemp("trained")
    trained_model().save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text(sentences(2, 60), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def one_layer(source: Path) -> float:
    """Share of the model's parameters in one decoder layer."""
    view = DecoderView(opened(source / "model"))
    layer = sum(parameter.numel() for parameter in view.layer(0).parameters())
    return layer / view.model.num_parameters()


def opened(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    return model


Words = Callable[[str, Path], list[str]]
Runs = Callable[[str], Path]


@pytest.fixture(scope="module")
def words(source: Path, one_layer: float) -> Words:
    """The command line of a case in a run folder."""

    def of(case: str, run: Path) -> list[str]:
        options = {"removed_ratio": (NUM_DROPPED - 0.2) * one_layer, **CASES[case].options}
        text = (f"path={source / 'text.txt'}", "source=file", f"seqlen={LENGTH}")
        return [
            "compress",
            f"--model.path={source / 'model'}",
            f"--output_dir={run}",
            f"--method.name={name_of(case)}",
            *(f"--method.{key}={value}" for key, value in options.items()),
            *(f"--calibration.{word}" for word in (*text, f"num_samples={NUM_WINDOWS}")),
            *(f"--evaluation.{word}" for word in (*text, "num_samples=2")),
            "--calibration.batch_size=2",
            "--trainer.checkpoint_seconds=0",
        ]

    return of


def check_decisions(method: CompressionMethod) -> None:
    """Make a method compare the model before and after each decision."""
    decide = method.decide

    def checked(step: Step, model: DecoderView, stats: Statistics) -> Decision:
        before = contents(model)
        decision = decide(step, model, stats)
        after = contents(model)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        return decision

    method.decide = checked  # type: ignore[method-assign]  # of this instance


def contents(model: DecoderView) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.model.state_dict().items()}


@pytest.fixture(scope="module")
def run_of(words: Words, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """The finished run of a case, in which no decision changed the model."""
    compress = pipeline.compress

    def checking(
        model: DecoderView,
        method: CompressionMethod,
        *args: Any,  # noqa: ANN401  those of pipeline.compress
        **more: Any,  # noqa: ANN401
    ) -> Plan:
        check_decisions(method)
        return compress(model, method, *args, **more)

    @cache
    def run(case: str) -> Path:
        folder = tmp_path_factory.mktemp("whole") / case
        assert main(words(case, folder)) == 0
        return folder

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("grasp_lightning.commands.compress.compress", checking)
        yield run


def test_every_method_has_a_case() -> None:
    assert {name_of(case) for case in CASES} == set(METHODS)


@pytest.mark.parametrize("case", CASES)
def test_the_share_is_met(case: str, run_of: Runs, one_layer: float) -> None:
    metrics = json.loads((run_of(case) / "metrics.json").read_text(encoding="utf-8"))
    target, share = (NUM_DROPPED - 0.2) * one_layer, metrics["removed_ratio"]
    if CASES[case].is_sparse:
        assert share == 0
        share = metrics["zero_ratio"]
    if CASES[case].drops:
        assert abs(share - target) <= one_layer / 2
    else:
        # One unit of rank of a tiny matrix, or one weight in each row of all of them.
        assert target <= share < target + (0.02 if CASES[case].is_sparse else 0.01)
    assert opened(run_of(case) / "model").num_parameters() == metrics["parameters"]["compressed"]


@pytest.fixture(scope="module")
def random_loss(source: Path) -> float:
    """Mean loss over all choices of layers to delete: what a random choice can expect."""
    found, model = [], opened(source / "model")
    for layers in combinations(range(NUM_LAYERS), NUM_DROPPED):
        view = DecoderView(deepcopy(model))
        apply_operations(view, (DropLayers(layers=layers),), {})
        found.append(held_out_loss(view.model))
    return sum(found) / len(found)


@pytest.mark.parametrize("case", [case for case in CASES if not CASES[case].is_random])
def test_the_result_is_better_than_a_random_choice_of_layers(
    case: str, run_of: Runs, source: Path, random_loss: float
) -> None:
    dense = held_out_loss(opened(source / "model"))
    compressed = held_out_loss(opened(run_of(case) / "model"))
    assert compressed - dense < 0.7 * (random_loss - dense)


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case].idle is not None])
def test_changing_only_what_does_nothing_leaves_the_logits(case: str, source: Path) -> None:
    view = DecoderView(opened(source / "model"))
    before = view.model(IDS).logits
    idle = CASES[case].idle
    assert idle is not None
    options = {"name": name_of(case), **CASES[case].options, **idle}
    method = build_method(resolve_method(MethodConfig(**options)), view)
    text = (source / "text.txt").read_text(encoding="utf-8")
    data = CalibrationData(
        CalibrationConfig(batch_size=2), byte_tokenizer(), windows=windows_of(text, NUM_WINDOWS)
    )
    measure = TrainerMeasure(data, progress=False)
    plan = pipeline.compress(view, method, measure, Plan(method=method.name), lambda *_: None)
    assert plan.complete
    assert changed_size(view.model) < changed_size(opened(source / "model"))
    torch.testing.assert_close(view.model(IDS).logits, before, rtol=1e-4, atol=1e-5)


def changed_size(model: PreTrainedModel) -> int:
    """Number of parameters that are not zero."""
    return sum(int(parameter.count_nonzero()) for parameter in model.parameters())


@pytest.fixture(scope="module")
def reopened(run_of: Runs, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What a fresh process without the package sees on opening the models of all runs."""
    root = tmp_path_factory.mktemp("models")
    for case in CASES:
        (root / case).symlink_to(run_of(case) / "model")
        save_file(behaviour(opened(run_of(case) / "model")), root / f"{case}.safetensors")
    return run_child("trust", root, tmp_path_factory.mktemp("child"))


@pytest.mark.parametrize("case", CASES)
def test_the_model_opens_equal_without_the_package(
    case: str, reopened: dict[str, dict[str, Any]], run_of: Runs
) -> None:
    is_plain = CASES[case].drops or CASES[case].is_sparse
    config = json.loads((run_of(case) / "model" / "config.json").read_text(encoding="utf-8"))
    assert ("auto_map" not in config) == is_plain
    assert {key: reopened[case].get(key) for key in GOOD} == GOOD, reopened[case]


@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_goes_on_in_two_processes_to_the_plan_of_one(
    case: str, words: Words, run_of: Runs, tmp_path: Path
) -> None:
    argv, whole = words(case, tmp_path / "run"), run_of(case)
    assert killed(CASES[case].kill, signal.SIGKILL, argv) == -signal.SIGKILL
    assert not (tmp_path / "run" / "plan.json").exists()
    done = run_ranks([*argv, "--trainer.devices=2"], 2)
    assert done.codes == [0, 0], done.text
    assert (tmp_path / "run" / "plan.json").read_bytes() == (whole / "plan.json").read_bytes()
    if CASES[case].is_random:
        return  # it scores nothing
    name = "factors" if CASES[case].is_sparse else "scores"
    ours, theirs = (load_file(run / f"{name}.safetensors") for run in (tmp_path / "run", whole))
    assert ours.keys() == theirs.keys()
    if CASES[case].is_sparse:  # another order of the same sums may swap weights of equal cost
        same = [((ours[key] == 0) == (theirs[key] == 0)).float().mean() for key in ours]
        assert min(same) > 0.99
