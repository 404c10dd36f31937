from dataclasses import replace

import pytest
import torch

from grasp_lightning.config import MethodConfig
from grasp_lightning.errors import ConfigError, ModelError
from grasp_lightning.methods import build_method, predict, resolve_method
from grasp_lightning.methods.seams import runs_of
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.lowrank import seams
from grasp_lightning.models.size import count_parameters
from grasp_lightning.plan import AddSeam, DropLayers, SelectLayers
from tests.conftest import FAMILIES, tiny_model
from tests.unit.methods.seam_helpers import IDS, linear_model, run_method
from tests.unit.models.helpers import meta_model

SEAM = MethodConfig(name="drop", seam="linear")


@pytest.mark.parametrize("layers", [(1, 2), (0,), (3,), (2, 3), (0, 2), (1, 3)])
def test_runs_that_are_linear_in_the_hidden_states_are_replaced_exactly(
    layers: tuple[int, ...],
) -> None:
    view = linear_model(*layers)
    expected = view.model(IDS).logits
    plan = run_method(view, replace(SEAM, layers=layers, ridge=0.0))
    assert plan.operations[:2] == (SelectLayers(layers=layers), DropLayers(layers=layers))
    runs = [op.layers for op in plan.operations if isinstance(op, AddSeam)]
    assert runs == runs_of(layers, range(4))
    assert len(view.layer_indices) == 4 - len(layers)
    torch.testing.assert_close(view.model(IDS).logits, expected, rtol=1e-9, atol=1e-9)


def test_each_seam_belongs_to_the_layer_that_follows() -> None:
    view = DecoderView(tiny_model())
    plan = run_method(view, replace(SEAM, layers=(0, 2, 3)))
    assert plan.operations[2:] == (
        AddSeam(layers=(0,), holder=1, is_after=False),
        AddSeam(layers=(2, 3), holder=1, is_after=True),
    )
    assert list(seams(view.model)) == ["model.layers.0.seam", "model.layers.0.seam_after"]
    assert not view.linears(1).keys() & set(seams(view.model))


def test_runs_are_maximal_without_a_remaining_layer_in_between() -> None:
    assert runs_of((1, 2, 4), range(6)) == [(1, 2), (4,)]
    assert runs_of((1, 4), (0, 1, 4, 5)) == [(1, 4)]
    assert runs_of((), range(3)) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_seam_counts_as_parameters(family: str) -> None:
    view, meta = DecoderView(tiny_model(family)), DecoderView(meta_model(family))
    config = resolve_method(replace(SEAM, layers=(1, 2)))
    predicted = predict(meta, config)
    run_method(view, replace(SEAM, layers=(1, 2)))
    assert predicted.most == predicted.least == count_parameters(view.model)
    plain = predict(meta, resolve_method(MethodConfig(name="drop", layers=(1, 2))))
    assert predicted.most == plain.most + 32 * 32


def test_the_budget_counts_one_seam_and_the_prediction_all() -> None:
    view = DecoderView(meta_model("llama"))
    layer = count_parameters(view.layer(0))
    dense = count_parameters(view.model)
    # Two layers without a seam are as far from it as one layer with one is.
    between = (1.5 * layer - 0.4 * 32 * 32) / dense
    plain = MethodConfig(name="drop", removed_ratio=between)
    counts = [
        predict(view, resolve_method(config)) for config in (plain, replace(plain, seam="linear"))
    ]
    assert [found.num_layers for found in counts] == [1, 2]
    assert counts[1].most - counts[1].least == 32 * 32
    angular = replace(SEAM, removed_ratio=between, layer_metric="angular")
    found = predict(view, resolve_method(angular))
    assert found.most == found.least


def test_a_ridge_without_a_seam_and_other_values_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"method\.ridge would be ignored: method.seam is none"):
        resolve_method(MethodConfig(name="drop", num_layers=2, ridge=0.1))
    with pytest.raises(ConfigError, match=r"method\.ridge must be from 0 to 100, got 101"):
        resolve_method(replace(SEAM, num_layers=2, ridge=101.0))
    with pytest.raises(ConfigError, match=r"method\.seam would be ignored: method replaceme"):
        resolve_method(MethodConfig(name="replaceme", num_layers=2, seam="linear"))


def test_a_model_with_seams_is_not_compressed_again() -> None:
    view = DecoderView(tiny_model())
    run_method(view, replace(SEAM, layers=(1,)))
    with pytest.raises(ModelError, match="has seams from an earlier compression"):
        build_method(resolve_method(MethodConfig(name="drop", num_layers=1)), view)
