import pytest
import torch

from grasp_lightning.config import MethodConfig
from grasp_lightning.errors import ConfigError, ModelError
from grasp_lightning.methods import build_method, predict, resolve_method
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.lowrank import has_replaced
from grasp_lightning.models.residual import fold_problem
from grasp_lightning.plan import DropLayers, Plan, SelectLayers, SetWeights
from grasp_lightning.stats.base import SeamSums, Statistics
from tests.conftest import ALL_FAMILIES, MOE_FAMILIES, tiny_model
from tests.unit.methods.seam_helpers import IDS, linear_model, run_method
from tests.unit.models.helpers import in_dtype, meta_model

DOWN = "model.layers.0.mlp.down_proj"


def test_a_span_that_is_linear_in_the_mlp_output_is_replaced_exactly() -> None:
    view = linear_model(1, 2, source=DOWN)
    expected = view.model(IDS).logits
    plan = run_method(view, MethodConfig(name="replaceme", layers=(1, 2), ridge=0.0))
    assert plan.operations == (
        SelectLayers(layers=(1, 2)),
        SetWeights(module=DOWN, parameters=("weight",)),
        DropLayers(layers=(1, 2)),
    )
    assert len(view.layer_indices) == 2
    assert not has_replaced(view.model)
    torch.testing.assert_close(view.model(IDS).logits, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("family", "index"), [("gpt2", 1), ("opt", 0), ("llama", 2)])
def test_the_new_weight_is_the_least_squares_solution(family: str, index: int) -> None:
    view = DecoderView(in_dtype(tiny_model(family), torch.float64))
    generator = torch.Generator().manual_seed(0)
    rest, mlp_out, after = torch.randn(3, 200, 32, generator=generator, dtype=torch.float64)
    method = build_method(
        resolve_method(MethodConfig(name="replaceme", layers=(index + 1,), ridge=0.0)), view
    )
    plan = Plan(method="replaceme").extended((SelectLayers(layers=(index + 1,)),))
    step = method.next_step(view, plan)
    assert step is not None
    (seam,) = step.needs.seams
    added = after - (rest + mlp_out)
    sums = SeamSums(gram=mlp_out.mT @ mlp_out, cross=added.mT @ mlp_out)
    decision = method.decide(step, view, Statistics(seams={seam: sums}))
    # T = argmin |M T + Y - L|^2, from the definition.
    expected = torch.linalg.lstsq(mlp_out, after - rest).solution
    assert seam.source is not None
    linear = view.dense_modules(index)[seam.source]
    old = linear.weight.mT if family == "gpt2" else linear.weight
    new = decision.tensors[f"{seam.source}.weight"]
    torch.testing.assert_close(new.mT if family == "gpt2" else new, expected.mT @ old)
    if linear.bias is not None:
        torch.testing.assert_close(decision.tensors[f"{seam.source}.bias"], linear.bias @ expected)
    assert all(tensor.dtype == torch.float64 for tensor in decision.tensors.values())


def test_a_large_ridge_leaves_plain_deletion() -> None:
    view, dropped = DecoderView(tiny_model()), DecoderView(tiny_model())
    dropped.drop([1, 2])
    run_method(view, MethodConfig(name="replaceme", layers=(1, 2), ridge=100.0))
    fitted = DecoderView(tiny_model())
    run_method(fitted, MethodConfig(name="replaceme", layers=(1, 2)))
    far, near = ((v.model(IDS).logits - dropped.model(IDS).logits).norm() for v in (fitted, view))
    assert near < 0.1 * far


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_an_mlp_output_behind_a_norm_or_of_experts_is_refused(family: str) -> None:
    view = DecoderView(meta_model(family))
    config = resolve_method(MethodConfig(name="replaceme", num_layers=2))
    if family in MOE_FAMILIES:
        reason = "it has no MLP whose last linear is known by its shape"
    elif family.startswith("gemma"):
        reason = "its MLP output is not added to the hidden states as it is: a norm, a factor or"
    else:
        assert predict(view, config).num_layers == 2
        return
    with pytest.raises(ModelError, match=f"into decoder layer 0 of .*: {reason}.*method.seam=lin"):
        build_method(config, view)


def test_a_family_that_scales_its_mlp_output_is_refused() -> None:
    view = DecoderView(tiny_model("granite", residual_multiplier=0.5))
    assert "is not added to the hidden states as it is" in str(fold_problem(view, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"layers": (1, 3)},
            r"layers must be contiguous for method replaceme, got \[1, 3\]",
        ),
        ({"layers": (0, 1)}, r"must start at layer 1 or later for method replaceme, got \[0, 1\]"),
        ({"num_layers": 2, "layer_metric": "similarity"}, "similarity, but method replaceme dele"),
        ({"num_layers": 2, "removed_ratio": 0.2}, "method replaceme takes method.removed_ratio or"),
        ({"num_layers": 2, "ridge": -1.0}, "method.ridge must be from 0 to 100, got -1.0"),
        ({"num_layers": 4}, "only 3 decoder layers from layer 1 on"),
        ({"layers": (3, 4)}, "names 4, but the model has layers 0 to 3"),
        ({"num_layers": 2, "keep_ratio": 0.5}, "would be ignored: method replaceme deletes a span"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_method(
            resolve_method(MethodConfig(name="replaceme", **options)),  # type: ignore[arg-type]
            DecoderView(meta_model("llama")),
        )


def test_the_first_layer_is_never_in_the_span() -> None:
    view = DecoderView(tiny_model())
    method = build_method(resolve_method(MethodConfig(name="replaceme", num_layers=2)), view)
    step = method.next_step(view, Plan(method="replaceme"))
    assert step is not None
    distances = torch.tensor([0.0, 0.2, 0.1])
    decision = method.decide(step, view, Statistics(layer_metric=distances))
    assert decision.operations == (SelectLayers(layers=(2, 3)),)
