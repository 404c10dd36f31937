"""Checks by two processes on models whose weights they share; run by test_fsdp.py."""

import sys
import traceback
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from grasp_lightning import processes
from grasp_lightning.callbacks.measure import TrainerMeasure
from grasp_lightning.callbacks.stop_request import StopRequest
from grasp_lightning.commands.workflow import tracked_perplexity
from grasp_lightning.config import CalibrationConfig, Strategy, TrainerConfig
from grasp_lightning.data.datamodules import CalibrationData
from grasp_lightning.data.windows import TokenWindows
from grasp_lightning.errors import ConfigError, ModelError, NumericsError, PlanError
from grasp_lightning.methods.attribution import attribution_step
from grasp_lightning.methods.narrowing import narrowable_mlps
from grasp_lightning.methods.seams import seam_operations
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.expert_numbers import numbered_experts
from grasp_lightning.models.lowrank import narrowed_linears, seams
from grasp_lightning.models.operations.narrow_experts import narrow_experts
from grasp_lightning.models.sampling import BATCH, sample_text
from grasp_lightning.models.sharding import check_runs, is_sharded, process_mesh, shard, whole
from grasp_lightning.models.size import measure_size
from grasp_lightning.models.surgery import apply_operations
from grasp_lightning.plan import (
    DropLayers,
    FactorizeLinear,
    Operation,
    RemoveExperts,
    SetWeights,
)
from grasp_lightning.stats.base import Needs, Scoring, Step
from tests.conftest import ALL_FAMILIES, FAMILIES, MOE_FAMILIES, byte_tokenizer, tiny_model
from tests.unit.models.helpers import narrow_layers, random_factors

CPU = torch.device("cpu")
SIMILARITY = Step(name="select", needs=Needs(layer_metric="similarity"))
IDS = torch.arange(24).reshape(2, 12)


def pair(family: str = "llama") -> tuple[DecoderView, DecoderView]:
    """Return one model whole, and the same one shared."""
    shared = tiny_model(family)
    shard(shared, process_mesh(CPU), CPU)
    check_runs(shared)
    assert is_sharded(shared)
    return DecoderView(tiny_model(family)), DecoderView(shared)


def logits(view: DecoderView, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        result: Tensor = view.model(input_ids=ids, use_cache=False).logits
    return result


def measure(view: DecoderView, windows: TokenWindows | None = None) -> TrainerMeasure:
    data = CalibrationData(
        CalibrationConfig(source="pydoc", num_samples=3, seqlen=16),  # odd: one is padded
        byte_tokenizer(),
        windows=windows,
    )
    strategy: Strategy = "fsdp" if is_sharded(view.model) else "auto"
    config = TrainerConfig(devices=2, strategy=strategy)
    return TrainerMeasure(data, config, progress=False)


def check_every_family_is_scored_and_changed_as_a_whole_model_is() -> None:
    for family in ALL_FAMILIES:
        views = pair(family)
        assert torch.equal(*map(logits, views)), family
        scores = []
        for view in views:
            step = attribution_step(view, [*view.linears(1), *view.linears(2)], Scoring())
            scores.append(measure(view)(view, step).component_scores)
        assert scores[0].keys() == scores[1].keys()
        for name, values in scores[0].items():
            torch.testing.assert_close(scores[1][name], values, rtol=1e-5, atol=0)
        names = [*views[0].linears(1), *views[0].linears(3)]
        operations = [FactorizeLinear(module=name, rank=3, components=None) for name in names]
        for view in views:
            factors: dict[str, Tensor] = {}
            for name in names:
                factors |= some_factors(view, name)
            apply_operations(view, operations, factors)
        assert torch.equal(*map(logits, views)), family
        for view in views:
            apply_operations(view, [DropLayers(layers=(0, 3))], {})
        assert torch.equal(*map(logits, views)), family


def check_mlps_are_narrowed_as_those_of_a_whole_model_are() -> None:
    for family in ALL_FAMILIES:
        views = pair(family)
        operations, tensors = narrow_layers(views[0], (1, 3), range(5, 31, 2))
        for view in views:
            apply_operations(view, operations, tensors)
        assert torch.equal(*map(logits, views)), family
        linears, shared = (narrowed_linears(view.model) for view in views)
        assert len(linears) == (0 if family in MOE_FAMILIES else len(shared) or 1)
        for name, linear in linears.items():
            assert isinstance(shared[name].weight, DTensor)
            assert torch.equal(whole(shared[name].weight.detach()), linear.weight)
        assert not [n for n in shared if n in views[1].dense_modules(1)]
        assert measure_size(views[0]) == measure_size(views[1]), family


def check_a_mixture_keeps_its_experts_and_their_channels() -> None:
    view = pair("mixtral")[1]
    with pytest.raises(ConfigError, match=r"fsdp does not support: use auto or ddp, or set method"):
        narrowable_mlps(view, view.layer_indices)
    for operations in _removals_of_experts(view):
        before = logits(view)
        with pytest.raises(PlanError, match=r"fsdp does not support: use auto or ddp, or set"):
            apply_operations(view, operations, {})
        assert torch.equal(logits(view), before)


def _removals_of_experts(view: DecoderView) -> tuple[list[Operation], list[Operation]]:
    found = numbered_experts(view)
    assert found is not None
    mixtures = found.mixtures.values()
    return (
        [
            RemoveExperts(mixture=x.name, experts=x.experts, kept=(0, 2, 3), num_experts=4)
            for x in mixtures
        ],
        [narrow_experts(x.experts, [range(8)] * 4) for x in mixtures],
    )


def check_weights_are_set_as_those_of_a_whole_model_are() -> None:
    for family in FAMILIES:
        views = pair(family)
        values = {name: p.detach() for name, p in views[0].layer(2).named_parameters()}
        layer = f"{views[0].layers_name}.1"
        tensors = {f"{layer}.{name}": value for name, value in values.items()}
        for view in views:
            operation = SetWeights(module=layer, parameters=tuple(values))
            apply_operations(view, [operation, DropLayers(layers=(3,))], tensors)
        assert torch.equal(*map(logits, views)), family
        assert is_sharded(views[1].layer(1)), family


def check_seams_are_added_as_to_a_whole_model() -> None:
    for family in FAMILIES:
        views = pair(family)
        layers = (0, 2, 3)
        operations = [DropLayers(layers=layers), *seam_operations(views[0], layers)]
        tensors = random_factors(views[0], operations)
        for view in views:
            apply_operations(view, operations, tensors)
        assert torch.equal(*map(logits, views)), family
        assert all(isinstance(seam.weight, DTensor) for seam in seams(views[1].model).values())


def some_factors(view: DecoderView, name: str) -> dict[str, Tensor]:
    rows, columns = view.linears(view.layer_of(name) or 0)[name].weight.shape
    right = torch.linspace(-1, 1, 3 * columns).reshape(3, columns)
    return {f"{name}.left": torch.ones(rows, 3), f"{name}.right": right}


def check_layers_are_compared_as_those_of_a_whole_model() -> None:
    for family in FAMILIES:
        metrics = [measure(view)(view, SIMILARITY).layer_metric for view in pair(family)]
        assert metrics[0] is not None
        assert metrics[1] is not None
        assert torch.equal(metrics[0], metrics[1]), family


def check_a_process_holds_its_part_and_can_ask_for_the_whole() -> None:
    model = tiny_model()
    weights = [weakref.ref(p.untyped_storage()) for p in model.parameters() if p.dim() > 1]
    shard(model, process_mesh(CPU), CPU)
    assert not [ref for ref in weights if ref() is not None]
    view, shared = DecoderView(tiny_model()), DecoderView(model)
    for name, weight in view.model.named_parameters():
        part = shared.model.get_parameter(name)
        if weight.dim() > 1:
            assert isinstance(part, DTensor)
            assert 2 * part.to_local().numel() == weight.numel()
        assert torch.equal(whole(part.detach()), weight)


def check_nothing_is_left_of_what_is_replaced_or_dropped() -> None:
    _, view = pair()
    for _ in range(2):
        measure(view)(view, attribution_step(view, list(view.linears(2)), Scoring()))
    gone = [
        weakref.ref(_local(module).untyped_storage())
        for index in (2, 3)
        for module in view.dense_modules(index).values()
    ]
    name = next(iter(view.linears(2)))
    replaced = FactorizeLinear(module=name, rank=3, components=None)
    apply_operations(view, [replaced, DropLayers(layers=(3,))], some_factors(view, name))
    assert sum(ref() is not None for ref in gone) == len(view.dense_modules(2))
    new = view.module(name)
    assert all(isinstance(parameter, DTensor) for parameter in new.parameters())


def _local(module: nn.Module) -> Tensor:
    weight = next(module.parameters())
    assert isinstance(weight, DTensor)
    return weight.to_local()


def check_perplexity_is_that_of_a_whole_model() -> None:
    for number in (1, 2, 3, 5):
        ids = torch.randint(0, 200, (number, 9), generator=torch.Generator().manual_seed(number))
        everywhere = torch.ones_like(ids, dtype=torch.bool)
        windows = TokenWindows(ids, everywhere, everywhere)
        values = [tracked_perplexity(view, windows, 2, "perplexity") for view in pair()]
        assert values[0] == values[1]


def check_text_is_that_of_a_whole_model() -> None:
    """Also if one process has one batch more than the other."""
    num_windows, ids = 2 * BATCH + 3, torch.arange(256)
    first, second = (
        sample_text(view.model, num_windows, 12, starts=ids, vocabulary=ids, seed=0)
        for view in pair()
    )
    assert first.shape == (num_windows, 12)
    assert torch.equal(first, second)
    assert all(torch.equal(second, ids) for ids in processes.gather(second))


def check_all_processes_say_where_the_text_of_one_is_not_finite() -> None:
    vocabulary = torch.arange(255)
    starts = torch.arange(256)
    seed = 25  # the second batch alone, which is written by rank 1, has a text that begins with 255
    for is_whole in (True, False):
        model = tiny_model()
        with torch.no_grad():
            model.get_parameter("model.embed_tokens.weight")[255] = float("inf")
        if not is_whole:
            shard(model, process_mesh(CPU), CPU)
        kept: list[Tensor] = []
        with pytest.raises(NumericsError, match="first in the output of decoder layer 0"):
            sample_text(
                model,
                2 * BATCH,
                12,
                starts=starts,
                vocabulary=vocabulary,
                seed=seed,
                keep=kept.append,
            )
        assert not kept


def check_all_processes_say_where_the_windows_of_one_are_not_finite() -> None:
    ids = torch.randint(0, 200, (3, 9), generator=torch.Generator().manual_seed(0))
    everywhere = torch.ones_like(ids, dtype=torch.bool)
    ids[1, 4] = 255  # a window of rank 1
    windows = TokenWindows(ids, everywhere, everywhere)
    model = tiny_model()
    with torch.no_grad():
        model.get_parameter("model.embed_tokens.weight")[255] = float("inf")
    shard(model, process_mesh(CPU), CPU)
    view = DecoderView(model)
    step = attribution_step(view, list(view.linears(2)), Scoring())
    with pytest.raises(NumericsError, match="first in the output of decoder layer 0"):
        measure(view, windows)(view, step)
    with pytest.raises(NumericsError, match="first in the output of decoder layer 0"):
        tracked_perplexity(view, windows, 1, "perplexity")


def check_a_model_that_reads_weights_itself_is_named() -> None:
    model = tiny_model()
    head = model.lm_head
    head.forward = lambda x: nn.functional.linear(x, model.model.layers[0].self_attn.q_proj.weight)
    shard(model, process_mesh(CPU), CPU)
    with pytest.raises(ModelError, match=r"LlamaForCausalLM reads weights .*strategy fsdp"):
        check_runs(model)


def check_a_whole_model_is_refused_where_a_shared_one_is_expected() -> None:
    view = DecoderView(tiny_model())
    fsdp = TrainerConfig(devices=2, strategy="fsdp")
    data = CalibrationData(CalibrationConfig(source="pydoc", num_samples=3), byte_tokenizer())
    with pytest.raises(ValueError, match="every process holds the whole model"):
        TrainerMeasure(data, fsdp, progress=False)(view, SIMILARITY)


def check_work_is_done_in_turns_and_fails_in_all_processes() -> None:
    path = Path(sys.argv[1]) / "turns"

    def work() -> int:
        with path.open("a") as file:
            file.write(f"start {processes.rank()}\n")
            file.write(f"end {processes.rank()}\n")
        return processes.rank()

    assert processes.in_turns(work) == processes.rank()
    assert path.read_text().split("\n")[:-1] == ["start 0", "end 0", "start 1", "end 1"]

    def fail() -> None:
        if processes.rank() == 1:
            raise ModelError("broken")

    with pytest.raises(ModelError, match="broken"):
        processes.in_turns(fail)


def check_a_signal_of_one_process_counts_for_all() -> None:
    stop = StopRequest()
    assert stop.agreed() is None
    stop.signal_number = (None, 15)[processes.rank()]
    assert stop.agreed() == 15
    assert stop.signal_number == 15
    stop.signal_number = (10, 2)[processes.rank()]  # requeue, and Ctrl-C
    assert stop.agreed() == 2


CHECKS: Sequence[Callable[[], None]] = [
    check_every_family_is_scored_and_changed_as_a_whole_model_is,
    check_mlps_are_narrowed_as_those_of_a_whole_model_are,
    check_a_mixture_keeps_its_experts_and_their_channels,
    check_weights_are_set_as_those_of_a_whole_model_are,
    check_seams_are_added_as_to_a_whole_model,
    check_layers_are_compared_as_those_of_a_whole_model,
    check_a_process_holds_its_part_and_can_ask_for_the_whole,
    check_nothing_is_left_of_what_is_replaced_or_dropped,
    check_perplexity_is_that_of_a_whole_model,
    check_text_is_that_of_a_whole_model,
    check_all_processes_say_where_the_text_of_one_is_not_finite,
    check_all_processes_say_where_the_windows_of_one_are_not_finite,
    check_a_model_that_reads_weights_itself_is_named,
    check_a_whole_model_is_refused_where_a_shared_one_is_expected,
    check_work_is_done_in_turns_and_fails_in_all_processes,
    check_a_signal_of_one_process_counts_for_all,
]


def main() -> None:
    """Write the result of each check into a file per process, up to the first failure."""
    processes.join(CPU)
    folder = Path(sys.argv[1])
    for check in CHECKS:
        try:
            check()
            result = "ok"
        except (Exception, pytest.fail.Exception):  # noqa: BLE001  written down below
            result = traceback.format_exc()
        (folder / f"{check.__name__}.{processes.rank()}").write_text(result)
        if result != "ok":
            sys.exit(1)
    processes.end(0)


if __name__ == "__main__":
    main()
