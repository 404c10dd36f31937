"""Wanda and SparseGPT, layer by layer on the compressed stream."""

from typing import Any

import pytest
import torch
from torch import Tensor

from grasp_lightning.callbacks.measure import TrainerMeasure
from grasp_lightning.config import CalibrationConfig, MethodConfig, PatternChoice
from grasp_lightning.data.datamodules import CalibrationData
from grasp_lightning.data.windows import TokenWindows
from grasp_lightning.errors import ConfigError, ModelError, PlanError
from grasp_lightning.linalg.sparsity import sparse_gpt, wanda
from grasp_lightning.methods import build_method, predict, resolve_method
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.surgery import apply_operations
from grasp_lightning.pipeline import compress
from grasp_lightning.plan import Plan, SparsifyLinear, groups_of
from grasp_lightning.stats.base import Statistics, Step
from tests.conftest import byte_tokenizer, tiny_model

GENERATOR = torch.Generator().manual_seed(3)
IDS = torch.randint(0, 200, (6, 16), generator=GENERATOR)
WINDOWS = TokenWindows(IDS, torch.ones_like(IDS, dtype=torch.bool), torch.ones_like(IDS) > 0)


def resolved(name: str, **options: Any) -> MethodConfig:  # noqa: ANN401  values of all types
    return resolve_method(MethodConfig(name=name, **options))


def pruned(view: DecoderView, config: MethodConfig, *, caches: bool) -> tuple[float, list[int]]:
    """Prune a model in place; return the sparsity, and how often first and last layer ran."""
    data = CalibrationData(CalibrationConfig(batch_size=4), byte_tokenizer(), windows=WINDOWS)
    measure = TrainerMeasure(data, progress=False, caches=caches)
    found, calls = [], [0, 0]

    def noting(view: DecoderView, step: Step) -> Statistics:
        if step.sparsity is not None:
            found.append(step.sparsity)
        return measure(view, step)

    def count(position: int) -> None:
        calls[position] += 1

    for position, index in enumerate((0, view.num_layers - 1)):
        norm = view.module(f"{view.layers_name}.{index}.input_layernorm")
        norm.register_forward_hook(lambda *_, position=position: count(position))
    plan = Plan(method=config.name)
    assert compress(view, build_method(config, view), noting, plan, lambda *_: None).complete
    assert len(set(found)) == 1
    return found[0], calls


def input_grams(view: DecoderView, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the mean of x x^T of some linears, one window at a time, float64."""
    found: dict[str, Tensor] = {}

    def note(name: str, x: Tensor) -> None:
        wide = x.double().flatten(0, -2)
        found[name] = found.get(name, 0) + wide.mT @ wide / IDS.numel()

    hooks = [
        view.module(name).register_forward_pre_hook(lambda _, args, name=name: note(name, args[0]))
        for name in names
    ]
    with torch.no_grad():
        for window in IDS:
            view.model(input_ids=window[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def prune_naively(view: DecoderView, config: MethodConfig, sparsity: float) -> None:
    """Prune a model in place as the papers say: measure a layer, prune it, continue."""
    groups = groups_of(config.pattern or "unstructured")
    for index in view.layer_indices:
        linears = view.linears(index)
        grams = input_grams(view, tuple(linears))
        for name, linear in linears.items():
            weight, gram = linear.weight.detach(), grams[name]
            if config.name == "wanda":
                new = wanda(weight, gram.diagonal().float(), sparsity=sparsity, groups=groups)
            else:
                new = sparse_gpt(weight, gram, sparsity=sparsity, groups=groups)
            weight.copy_(new)


@pytest.mark.parametrize("name", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_each_layer_is_pruned_on_what_the_layers_before_it_leave(
    name: str, pattern: PatternChoice
) -> None:
    config = resolved(name, pattern=pattern)
    view, naive, whole = (DecoderView(tiny_model()) for _ in range(3))
    before = {key: value.clone() for key, value in view.model.state_dict().items()}
    sparsity, calls = pruned(view, config, caches=True)
    prune_naively(naive, config, sparsity)
    after = view.model.state_dict()
    for key, value in naive.model.state_dict().items():
        assert torch.equal(after[key] == 0, value == 0), key
        torch.testing.assert_close(after[key], value, rtol=1e-4, atol=1e-5)
    linears = {f"{module}.weight" for module in view.all_linears()}
    same = {key for key, value in before.items() if torch.equal(value, after[key])}
    assert same == before.keys() - linears  # embeddings, head and norms

    _, whole_calls = pruned(whole, config, caches=False)
    assert all(torch.equal(after[key], value) for key, value in whole.model.state_dict().items())
    # Besides the passes over two batches, one short pass in each of four steps.
    assert whole_calls == [4 * 2 + 4] * 2
    assert calls == [2 * 2 + 4] * 2


@pytest.mark.parametrize("name", ["wanda", "sparsegpt"])
def test_the_zeros_are_the_share_of_all_parameters_that_was_asked_for(name: str) -> None:
    view = DecoderView(tiny_model())
    config = resolved(name, removed_ratio=0.3, layers=(0, 2, 3))
    prediction = predict(view, config)
    dense = view.model.num_parameters()
    assert prediction.most == prediction.least == prediction.dense == dense
    assert prediction.lines[0] == f"0.0% of {dense:,} parameters removed: {dense:,} remain"
    assert "the model is no smaller" in prediction.lines[1]
    pruned(view, config, caches=True)
    found = sum(int((linear.weight == 0).sum()) for linear in view.all_linears().values())
    assert found == prediction.zeros
    rows = sum(linear.out_features for linear in view.all_linears().values())
    assert round(0.3 * dense) <= found < round(0.3 * dense) + rows
    assert not any((linear.weight == 0).any() for linear in view.linears(1).values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"pattern": "2:4", "removed_ratio": 0.2},
            "method.removed_ratio would be ignored: pattern 2:4 sets half of the linears' weights",
        ),
        (
            {"removed_ratio": 0.64},
            "method.removed_ratio 0.64 is out of reach: the feasible range is 0 to 0.6259, the",
        ),
        ({"layer_metric": "angular"}, "method.layer_metric would be ignored: all layers are"),
        ({"keep_ratio": 0.5}, "method.keep_ratio would be ignored: method wanda sets single"),
    ],
)
def test_options_that_cannot_be_met_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        predict(DecoderView(tiny_model()), resolved("wanda", **options))
    assert str(caught.value).startswith(message)


def test_a_linear_that_the_pattern_does_not_divide_is_named() -> None:
    view = DecoderView(tiny_model(intermediate_size=42))
    expected = "model.layers.0.mlp.down_proj has 42 inputs, which pattern 4:8 cannot divide into"
    with pytest.raises(ModelError, match=expected):
        predict(view, resolved("sparsegpt", pattern="4:8"))


def test_a_transposed_weight_is_pruned_along_its_inputs() -> None:
    view = DecoderView(tiny_model("gpt2"))
    data = CalibrationData(CalibrationConfig(batch_size=4), byte_tokenizer(), windows=WINDOWS)
    method = build_method(resolved("wanda", pattern="2:4"), view)
    measure = TrainerMeasure(data, progress=False)
    compress(view, method, measure, Plan(method="wanda"), lambda *_: None)
    for linear in view.all_linears().values():
        assert ((linear.weight == 0).unflatten(1, (-1, 4)).sum(dim=-1) == 2).all()


@pytest.mark.parametrize(
    ("pattern", "zeros", "message"),
    [
        ("unstructured", 32 * 32 + 1, "must be from 0 to 1024, the plan says 1025"),
        ("2:4", 511, "511 weights of .* to zero, which is not the pattern 2:4 of its shape"),
    ],
)
def test_a_plan_with_impossible_zeros_is_refused(
    pattern: PatternChoice, zeros: int, message: str
) -> None:
    view = DecoderView(tiny_model())
    module = "model.layers.0.self_attn.q_proj"
    operation = SparsifyLinear(module=module, pattern=pattern, zeros=zeros)
    with pytest.raises(PlanError, match=message):
        apply_operations(view, (operation,), {f"{module}.weight": torch.zeros(32, 32)})
