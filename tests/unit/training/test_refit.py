"""Refit of cut linears, against known solutions, in all kinds of decoder layers."""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from grasp_lightning.config import CalibrationConfig, MethodConfig, RefitChoice
from grasp_lightning.data.datamodules import CalibrationData
from grasp_lightning.data.windows import TokenWindows
from grasp_lightning.evaluation.phases import Phases
from grasp_lightning.linalg.regression import pulled_regression
from grasp_lightning.methods import build_method, resolve_method
from grasp_lightning.methods.base import Decision
from grasp_lightning.methods.blocks import blocks
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.surgery import apply_operations
from grasp_lightning.plan import (
    DropLayers,
    FactorizeLinear,
    Operation,
    Plan,
    RemoveBlock,
    Replacement,
    SelectLayers,
)
from grasp_lightning.run_folder import RunFolder
from grasp_lightning.stats.base import Statistics
from grasp_lightning.storage.progress import RefitLayers
from grasp_lightning.training import layer_refit
from grasp_lightning.training.finish import FinishDecision
from grasp_lightning.training.refit import Refitter
from tests.conftest import byte_tokenizer, tiny_model
from tests.unit.methods.test_weighted import moments_on

MODES: tuple[RefitChoice, ...] = ("prefix", "residual")


def windows(num: int = 12, length: int = 24) -> TokenWindows:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(1, 90, (num, length), generator=generator)
    ones = torch.ones_like(ids, dtype=torch.bool)
    targets = ones.clone()
    targets[:, 0] = False
    return TokenWindows(input_ids=ids, mask=ones, targets=targets)


def untracked(items: Sequence[str], description: str) -> Iterable[str]:
    del description
    return items


def data(found: TokenWindows) -> CalibrationData:
    config = CalibrationConfig(source="pydoc", batch_size=5)
    return CalibrationData(config, byte_tokenizer(), windows=found)


def refitter(found: TokenWindows, max_bytes: float = math.inf) -> Refitter:
    return Refitter(data(found), max_bytes=max_bytes, track=untracked)


def decision(
    view: DecoderView, found: TokenWindows, config: MethodConfig | None = None
) -> Decision:
    """Return what a method, grasp_plus by default, decides on the windows."""
    config = config or MethodConfig(name="grasp_plus", removed_ratio=0.3)
    method = build_method(resolve_method(config), view)
    selected = Plan(method=method.name, operations=(SelectLayers(layers=view.layer_indices),))
    step = method.next_step(view, selected)
    assert step is not None
    batch = found.batch(range(len(found)))
    return method.decide(
        step, view, Statistics(moments=moments_on(view, step.needs.moments, batch))
    )


def light(family: str) -> MethodConfig:
    """Return a small cut of linears alone: experts are not refitted."""
    config = MethodConfig(name="grasp_plus", removed_ratio=0.1)
    return replace(config, mlp="factors") if family == "mixtral" else config


def hidden_error(
    model: PreTrainedModel,
    dense: Tensor,
    found: TokenWindows,
    operations: Sequence[Operation],
    tensors: dict[str, Tensor],
) -> float:
    """Return how far the last hidden states of the compressed model are from the dense ones."""
    apply_operations(DecoderView(model), operations, tensors)
    return float((last_hidden(model, found) - dense).square().mean())


def last_hidden(model: PreTrainedModel, found: TokenWindows) -> Tensor:
    with torch.inference_mode():
        output = model(input_ids=found.input_ids, output_hidden_states=True)
    hidden: Tensor = output.hidden_states[-1]
    return hidden


@pytest.mark.parametrize("mode", MODES)
def test_with_nothing_compressed_before_a_truncation_by_inputs_does_not_change(
    mode: RefitChoice,
) -> None:
    view, found = DecoderView(tiny_model()), windows()
    module = "model.layers.0.self_attn.q_proj"
    config = MethodConfig(name="low_rank", weighting="input_gram", keep_ratio=0.4)
    decided = decision(view, found, config)
    operations = [op for op in decided.operations if module in str(op)]
    refitted = refitter(found)(view, mode, operations, decided.tensors)
    key = f"{module}.left"
    torch.testing.assert_close(refitted[key], decided.tensors[key], rtol=1e-3, atol=1e-5)


def calls(
    model: PreTrainedModel, found: TokenWindows, names: Iterable[str]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return inputs and outputs of some modules, ``(tokens, features)``."""
    kept: dict[str, tuple[Tensor, Tensor]] = {}
    with torch.no_grad(), ExitStack() as stack:
        for name in names:

            def keep(_: nn.Module, args: tuple[Tensor], output: Tensor, name: str = name) -> None:
                kept[name] = args[0].flatten(0, -2), output.flatten(0, -2)

            stack.enter_context(model.get_submodule(name).register_forward_hook(keep))
        model(input_ids=found.input_ids)
    return kept


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_update_of_svd_llm_is_least_squares_layer_after_layer(family: str) -> None:
    found, view = windows(), DecoderView(tiny_model(family))
    decided = decision(
        view, found, MethodConfig(name="low_rank", preset="svd_llm_update", removed_ratio=0.2)
    )
    assert (decided.refit, decided.refit_pull) == ("prefix", 0)
    finish = FinishDecision(
        held_out=None, data=data(found), max_bytes=math.inf, phases=Phases(), track=untracked
    )
    refitted = finish(view, decided).tensors
    dense, cut = tiny_model(family), tiny_model(family)
    for model in (dense, cut):
        nn.Module.to(model, torch.float64).requires_grad_(False)
    apply_operations(
        DecoderView(cut), decided.operations, {k: v.double() for k, v in refitted.items()}
    )
    names = [op.module for op in decided.operations if isinstance(op, FactorizeLinear)]
    assert len(names) == 28
    targets = calls(dense, found, names)
    inner = calls(cut, found, [f"{name}.left" for name in names])
    for name in names:
        bias = getattr(dense.get_submodule(name), "bias", None)
        z, target = inner[f"{name}.left"][0], targets[name][1]
        target = target if bias is None else target - bias
        naive = torch.linalg.lstsq(z, target).solution.mT
        left = refitted[f"{name}.left"].double()
        assert float((left - naive).norm()) < 1e-2 * float(naive.norm()), name
        before = decided.tensors[f"{name}.left"].double()
        errors = [float((z @ part.mT - target).norm()) for part in (before, left, naive)]
        assert errors[1] == pytest.approx(errors[2], rel=1e-5), name
        if ".layers.0." not in name:  # where the inputs are the dense ones
            assert errors[1] < 0.99 * errors[0], name


@pytest.mark.parametrize("mode", MODES)
def test_the_model_is_as_it_was_and_right_factors_stay(mode: RefitChoice) -> None:
    model, found = tiny_model(), windows()
    view = DecoderView(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    decided = decision(view, found)
    refitted = refitter(found)(view, mode, decided.operations, decided.tensors)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert getattr(model.config, "quantization_config", None) is None
    assert refitted.keys() == decided.tensors.keys()
    for name, value in decided.tensors.items():
        assert refitted[name].shape == value.shape
        is_writer = "o_proj" in name or "down_proj" in name
        is_fitted = not name.endswith(".right") and (mode == "prefix" or is_writer)
        assert torch.equal(refitted[name], value) != is_fitted, name


@pytest.mark.parametrize(
    "family",
    ["llama", "phi3", "gpt2", "opt", "gpt_neox", "falcon", "gemma2", "bloom", "mixtral"],
)
@pytest.mark.parametrize("mode", MODES)
def test_the_stream_gets_closer_to_the_dense_one(mode: RefitChoice, family: str) -> None:
    found = windows()
    dense = last_hidden(tiny_model(family), found)
    view = DecoderView(tiny_model(family))
    decided = decision(view, found, light(family))
    refitted = refitter(found)(view, mode, decided.operations, decided.tensors)
    given = (dense, found, decided.operations)
    before = hidden_error(tiny_model(family), *given, dict(decided.tensors))
    assert hidden_error(tiny_model(family), *given, dict(refitted)) < before


@pytest.mark.slow
def test_hidden_states_on_disk_give_the_same() -> None:
    view, found = DecoderView(tiny_model()), windows()
    decided = decision(view, found)
    kept, stored = (
        refitter(found, limit)(view, "residual", decided.operations, decided.tensors)
        for limit in (math.inf, 0.0)
    )
    assert all(torch.equal(kept[name], stored[name]) for name in kept)


def test_padding_counts_nothing() -> None:
    found = windows()
    padded = TokenWindows(
        input_ids=torch.cat([found.input_ids, torch.full((12, 6), 7)], dim=1),
        mask=torch.cat([found.mask, torch.zeros(12, 6, dtype=torch.bool)], dim=1),
        targets=torch.cat([found.targets, torch.zeros(12, 6, dtype=torch.bool)], dim=1),
    )
    view = DecoderView(tiny_model())
    decided = decision(view, found)
    plain, wider = (
        refitter(given)(view, "residual", decided.operations, decided.tensors)
        for given in (found, padded)
    )
    for name in plain:
        torch.testing.assert_close(plain[name], wider[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
def test_the_rest_compensates_for_removed_parts(mode: RefitChoice) -> None:
    found = windows()
    dense, view = last_hidden(tiny_model(), found), DecoderView(tiny_model())
    decided = decision(view, found, MethodConfig(name="grasp_plus", removed_ratio=0.1))
    attention, layer = blocks(view, 1)[1], view.linears(2)
    cuts = [op for op in decided.operations if op.linears]
    kept = [op for op in cuts if not {*op.linears} & {*attention, *layer}]
    assert kept
    operations: list[Operation] = [
        *kept,
        RemoveBlock(block="attention", modules=attention),
        DropLayers(layers=(2,)),
    ]
    refitted = refitter(found)(view, mode, operations, decided.tensors)
    given = (dense, found, operations)
    before = hidden_error(tiny_model(), *given, dict(decided.tensors))
    assert hidden_error(tiny_model(), *given, dict(refitted)) < before


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["llama", "phi3", "gpt2", "opt", "gpt_neox", "falcon", "gemma2", "bloom", "mixtral"]
)
@pytest.mark.parametrize("mode", MODES)
def test_passes_that_end_early_give_what_whole_ones_do(
    mode: RefitChoice, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    view, found = DecoderView(tiny_model(family)), windows()
    decided = decision(view, found, light(family))
    short = refitter(found)(view, mode, decided.operations, decided.tensors)
    monkeypatch.setattr(layer_refit, "is_sharded", lambda _: True)
    whole = refitter(found)(view, mode, decided.operations, decided.tensors)
    for name, value in whole.items():
        torch.testing.assert_close(short[name], value, rtol=1e-3, atol=1e-6)


class Killed(Exception):  # noqa: N818  what a signal would do
    pass


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_killed_refit_resumes_after_its_last_layer_with_the_same_bytes(
    family: str, mode: RefitChoice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    view, found = DecoderView(tiny_model(family)), windows()
    decided = decision(view, found)
    given = view, mode, decided.operations, decided.tensors
    whole = refitter(found)(*given)
    run = RunFolder.open(tmp_path / "run", {})
    store = RefitLayers(run, "key")

    def save(layer: int, tensors: Mapping[str, Tensor]) -> None:
        store.save(layer, tensors)
        if layer == 2:
            raise Killed

    stopping = RefitLayers(run, "key")
    monkeypatch.setattr(stopping, "save", save)
    with pytest.raises(Killed):
        refitter(found)(*given, stopping)
    solved: list[int] = []

    def counting(*args: Tensor, pull: float, ridge: float) -> Tensor:
        solved.append(1)
        return pulled_regression(*args, pull=pull, ridge=ridge)

    monkeypatch.setattr(layer_refit, "pulled_regression", counting)
    resumed = refitter(found)(*given, store)
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)
    in_last = [op for op in decided.operations if isinstance(op, Replacement)]
    assert len(solved) <= len([op for op in in_last if view.layer_of(op.solved) == 3])
    assert RefitLayers(run, "another").load(0) is None
    run.close()
