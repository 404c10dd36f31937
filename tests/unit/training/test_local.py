"""Layer-local training: what each layer stands for, and the error that it learns."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from grasp_lightning.config import LocalScale, OptimizerConfig, TrainingConfig
from grasp_lightning.errors import ModelError
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.surgery import apply_operations
from grasp_lightning.plan import AddSeam, DropLayers, MergeLayers, Operation, Plan
from grasp_lightning.training.layer_streams import HiddenStates
from grasp_lightning.training.layer_training import ENTERING, LEAVING
from grasp_lightning.training.local import LocalModule, stage_errors
from grasp_lightning.training.local_stages import LocalStage, local_stages
from grasp_lightning.training.local_streams import LocalData, PairedStreams
from tests.conftest import tiny_model
from tests.unit.training.test_compensation_module import GivenData, random_samples

TOLERANCE = 1e-10  # of squared errors that are zero but for rounding


def plan(*operations: Operation) -> Plan:
    return Plan(method="made up", operations=operations)


def ends(made: Plan | None, num_layers: int, num_dense: int = 8, at_once: int = 1) -> list[int]:
    stages = local_stages(num_layers, num_dense, made, at_once)
    assert stages[0].first == stages[0].dense_first == 0
    assert stages[-1].last == num_layers - 1
    for below, above in pairwise(stages):
        assert above.first == below.last + 1
        assert above.dense_first == below.dense_last + 1
    return [stage.dense_last for stage in stages]


def test_a_layer_stands_for_the_deleted_ones_above_it() -> None:
    assert ends(None, 8) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert ends(plan(DropLayers(layers=(2, 3, 6))), 5) == [0, 3, 4, 6, 7]
    assert ends(plan(DropLayers(layers=(0, 7))), 6) == [1, 2, 3, 4, 5, 7]
    merged = MergeLayers(base=4, absorbed=(5, 6), rule="paper")
    assert ends(plan(merged), 6) == [0, 1, 2, 3, 6, 7]
    assert ends(plan(merged), 6, at_once=4) == [3, 7]


def test_a_seam_stands_for_the_layers_that_it_replaces() -> None:
    dropped = DropLayers(layers=(2, 3))
    before = AddSeam(layers=(2, 3), holder=4, is_after=False)
    assert ends(plan(dropped, before), 6) == [0, 1, 4, 5, 6, 7]
    after = AddSeam(layers=(6, 7), holder=5, is_after=True)
    assert ends(plan(DropLayers(layers=(6, 7)), after), 6) == [0, 1, 2, 3, 4, 7]


def test_layers_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(ModelError, match=r"to the 8 of distillation\.teacher: the plan\.json b"):
        local_stages(6, 8, None, 1)
    with pytest.raises(ModelError, match="deletes 1; use the dense model"):
        local_stages(6, 8, plan(DropLayers(layers=(3,))), 1)


def without_effect(view: DecoderView, layers: tuple[int, ...]) -> None:
    """Let some layers of a Llama pass on their input."""
    for index in layers:
        for name, module in view.layer(index).named_modules():
            if isinstance(module, nn.Linear) and name.endswith(("o_proj", "down_proj")):
                nn.init.zeros_(module.weight)


def streams(
    dense: DecoderView,
    compressed: DecoderView,
    folder: Path,
    limit: float = 1e9,
    *,
    trains: bool = True,
) -> tuple[LocalData, PairedStreams, GivenData]:
    training = TrainingConfig(batch_size=2, micro_batch_size=2)
    given = GivenData(random_samples((12,) * 5), random_samples((12,) * 3), training=training)
    data = LocalData(given, HiddenStates(folder, limit), validates=True, trains=trains)
    return data, PairedStreams(dense, compressed, data), given


@pytest.mark.parametrize("scale", ["layer", "token"])
@pytest.mark.parametrize("at_once", [1, 3])
def test_deleted_layers_without_effect_leave_no_error(
    scale: LocalScale, at_once: int, tmp_path: Path
) -> None:
    dense = DecoderView(tiny_model(num_hidden_layers=6))
    without_effect(dense, (2, 3))
    compressed = DecoderView(tiny_model(num_hidden_layers=6))
    dropped = DropLayers(layers=(2, 3))
    apply_operations(compressed, [dropped], {})
    compressed = DecoderView(compressed.model)
    stages = local_stages(4, 6, plan(dropped), at_once)
    _, validated, _ = streams(dense, compressed, tmp_path, trains=False)
    assert max(stage_errors(validated, stages, scale)) < TOLERANCE
    # A wrong match of layers would show.
    wrong = [LocalStage(i, i, i, i) for i in range(4)]
    _, validated, _ = streams(dense, compressed, tmp_path, trains=False)
    assert max(stage_errors(validated, wrong, scale)) > 1e-3
    data, moving, given = streams(dense, compressed, tmp_path)
    for stage in stages:
        moving.advance_dense(stage)
        moving.advance_compressed(stage)
        windows = range(len(given.samples.train))
        assert torch.allclose(data.states(ENTERING, windows), data.states(LEAVING, windows))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_hidden_states_move_as_the_whole_models_compute_them(family: str, tmp_path: Path) -> None:
    dense, compressed = (DecoderView(tiny_model(family, seed=seed)) for seed in (0, 1))
    data, moving, _ = streams(dense, compressed, tmp_path, limit=1e4)
    mean_squares = []
    for stage in local_stages(4, 4, None, 2):
        mean_squares.append(moving.advance_dense(stage))
        moving.advance_compressed(stage)
    windows = [0, 1, 2, 3, 4]
    expected = {}
    for name, view in ((ENTERING, compressed), (LEAVING, dense)):
        found: list[torch.Tensor] = []
        handle = view.layer(3).register_forward_hook(lambda *seen, to=found: to.append(seen[2]))
        with torch.no_grad():
            view.model(data.batch(windows)["input_ids"])
        handle.remove()
        expected[name] = found[0] if isinstance(found[0], torch.Tensor) else found[0][0]
        torch.testing.assert_close(data.states(name, windows), expected[name])
    assert mean_squares[-1] == pytest.approx(float(expected[LEAVING].square().mean()), rel=1e-5)


def test_the_error_is_relative_to_the_dense_hidden_states(tmp_path: Path) -> None:
    dense, compressed = DecoderView(tiny_model()), DecoderView(tiny_model(seed=1))
    data, moving, _ = streams(dense, compressed, tmp_path)
    (stage,) = local_stages(4, 4, None, 4)
    mean_square = moving.advance_dense(stage)
    target = data.states(LEAVING, [0, 1, 2, 3, 4])
    for scale in (mean_square, None):
        with moving.with_weights(stage) as run:
            weight = {"weight": torch.zeros(1)}
            module = LocalModule(weight, data, run, OptimizerConfig(), mean_square=scale)
        zeros = module.token_errors(torch.zeros_like(target), target)
        assert float(zeros.mean()) == pytest.approx(1.0, rel=1e-5)
        off = module.token_errors(1.1 * target, target)
        assert float(off.mean()) == pytest.approx(0.01, rel=1e-4)
        if scale is None:
            torch.testing.assert_close(zeros, torch.ones_like(zeros))
