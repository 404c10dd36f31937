"""Every supported family from ``compress`` to generation in a fresh process."""

import json
import logging
from collections.abc import Callable
from functools import cache
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from grasp_lightning.cli import main
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.surgery import apply_operations
from grasp_lightning.plan import Plan
from tests.conftest import ALL_FAMILIES, MOE_FAMILIES, save_tiny
from tests.integration.test_artefact import behaviour, result_is_good, run_child

METHODS = ("grasp", "drop")
ALL = tuple(f"{family}-{method}" for family in ALL_FAMILIES for method in METHODS)
NUM_LAYERS = 2

Outcome = Callable[[str, str], dict[str, Any]]

pytestmark = pytest.mark.slow  # every family is compressed, and opened in fresh processes


def compressed(name: str, root: Path, scratch: Path) -> None:
    """Compress one family, and store its model with its outputs before saving, and its warnings.

    The source with plan and factors applied in memory gives the expected behaviour.
    """
    family, _, method = name.rpartition("-")
    source, run = save_tiny(scratch / f"{name}-source", family), scratch / name
    settings = [
        f"--model.path={source}",
        f"--output_dir={run}",
        f"--method.name={method}",
        f"--method.num_layers={NUM_LAYERS}",
        "--method.keep_ratio=" + ("0.3" if method == "grasp" else "null"),
        *("--calibration.source=pydoc", "--calibration.num_samples=2", "--calibration.seqlen=32"),
        *("--evaluation.source=pydoc", "--evaluation.num_samples=2", "--evaluation.seqlen=32"),
    ]
    warnings = BufferingHandler(100)
    logger = logging.getLogger("grasp_lightning")
    logger.addHandler(warnings)
    assert main(["compress", *settings]) == 0
    logger.removeHandler(warnings)
    messages = [record.getMessage() for record in warnings.buffer]
    (scratch / f"{name}.warnings").write_text("\n".join(messages), encoding="utf-8")
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source)
    plan = Plan.from_json((run / "plan.json").read_text())
    factors = load_file(run / "factors.safetensors") if method == "grasp" else {}
    apply_operations(DecoderView(model), plan.operations, factors)
    (run / "model").rename(root / name)
    save_file(behaviour(model), root / f"{name}.safetensors")


class Runs(NamedTuple):
    """Folder of the models and folder of the runs, by name."""

    models: Path
    folder: Path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    found = Runs(tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("runs"))
    for name in ALL:
        compressed(name, found.models, found.folder)
    return found


@pytest.fixture(scope="module")
def outcome(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """What one process of a mode saw on opening a model; one process per mode."""

    @cache
    def results(mode: str) -> dict[str, dict[str, Any]]:
        return run_child(mode, runs.models, tmp_path_factory.mktemp("child"))

    return lambda mode, name: results(mode)[name]


def names(method: str) -> list[str]:
    return [name for name in ALL if name.endswith(method)]


@pytest.mark.parametrize("name", ALL)
def test_a_compressed_model_loads_equal_and_generates_with_and_without_cache(
    outcome: Outcome, name: str
) -> None:
    assert result_is_good(outcome("package", name))


@pytest.mark.parametrize("name", names("grasp"))
def test_loading_without_the_package_stops(outcome: Outcome, name: str) -> None:
    result = outcome("bare", name)
    assert "mismatch" in result["error"]
    assert "mismatch" in result["base error"]


@pytest.mark.parametrize("name", names("drop"))
def test_a_model_with_dropped_layers_needs_no_package(outcome: Outcome, name: str) -> None:
    assert result_is_good(outcome("bare", name))


@pytest.mark.parametrize("name", ALL)
def test_remote_code_loads_equal_without_the_package(outcome: Outcome, name: str) -> None:
    assert result_is_good(outcome("trust", name))


@pytest.mark.parametrize("name", ALL)
def test_sizes_are_those_of_the_plan(runs: Runs, name: str) -> None:
    folder, run = (path / name for path in runs)
    parameters = json.loads((run / "metrics.json").read_text())["parameters"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.num_parameters() == parameters["compressed"] < parameters["dense"]
    plan = Plan.from_json((run / "plan.json").read_text())
    assert len(plan.selected_layers or ()) == NUM_LAYERS
    source = DecoderView(AutoModelForCausalLM.from_pretrained(runs.folder / f"{name}-source"))
    chosen = [*(plan.selected_layers or ())]
    if plan.ranks:
        assert [*plan.ranks] == [linear for index in chosen for linear in source.linears(index)]
    else:
        assert [*plan.dropped_layers] == chosen


@pytest.mark.parametrize("family", MOE_FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_a_run_names_skipped_experts_once_where_they_are_skipped(
    family: str, method: str, runs: Runs
) -> None:
    file = runs.folder / f"{family}-{method}.warnings"
    messages = file.read_text(encoding="utf-8").splitlines()
    named = [message for message in messages if "is a mixture of experts: mlp." in message]
    assert len(named) == (1 if method == "grasp" else 0)
