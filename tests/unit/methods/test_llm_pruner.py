"""LLM-Pruner: scores against autograd in float64, and how many units go."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from grasp_lightning.callbacks.measure import TrainerMeasure
from grasp_lightning.config import CalibrationConfig, Grouping, Importance, MethodConfig
from grasp_lightning.data.datamodules import CalibrationData
from grasp_lightning.data.windows import TokenWindows
from grasp_lightning.errors import ConfigError, ModelError, NumericsError
from grasp_lightning.methods import build_method, resolve_method
from grasp_lightning.methods.llm_pruner import numbers_to_remove
from grasp_lightning.methods.unit_removal import removable_units
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.next_token import forward_inputs, next_token_losses
from grasp_lightning.models.size import count_parameters
from grasp_lightning.models.units import Units
from grasp_lightning.pipeline import compress
from grasp_lightning.plan import NarrowMlp, Plan, RemoveHeads
from grasp_lightning.stats.base import Needs, Statistics, Step
from grasp_lightning.stats.unit_gradients import UnitGradients, unit_groups
from tests.conftest import byte_tokenizer, tiny_model
from tests.integration.test_golden_plan import seeded_windows
from tests.unit.models.helpers import META

WINDOWS = seeded_windows(3, 24)
WINDOWS.targets[1, :15] = False  # windows with different numbers of predicted tokens
IMPORTANCES: tuple[Importance, ...] = ("taylor", "taylor_second", "taylor_mixed", "l2")


def data_of(windows: TokenWindows, batch_size: int) -> CalibrationData:
    config = CalibrationConfig(batch_size=batch_size)
    return CalibrationData(config, byte_tokenizer(), windows=windows)


def pruned(importance: Importance, view: DecoderView, batch_size: int = 2) -> Plan:
    config = MethodConfig(
        name="llm_pruner", removed_ratio=0.1, importance=importance, protect_first=1, protect_last=1
    )
    method = build_method(resolve_method(config), view)
    measure = TrainerMeasure(data_of(WINDOWS, batch_size), progress=False)
    return compress(view, method, measure, Plan(method="llm_pruner"), lambda *_: None)


def gradients(view: DecoderView, windows: list[int]) -> dict[str, Tensor]:
    """The gradient of the mean loss of some windows, by parameter."""
    view.model.zero_grad()
    view.model.requires_grad_(True)
    batch = WINDOWS.batch(windows)
    logits = view.model(**forward_inputs(batch)).logits
    next_token_losses(logits, batch["input_ids"], batch["targets"]).mean().backward()
    found = {}
    for name, parameter in view.model.named_parameters():
        assert parameter.grad is not None
        found[name] = parameter.grad.clone()
    return found


def counted(units: Units, module: str, unit: int, grouping: Grouping) -> Tensor:
    """Columns of the reader, or rows of a writer, whose scores count for a unit."""
    is_reader = module == units.reader
    own = units.columns([unit]) if is_reader else units.rows(module, [unit])
    has_queries = units.are_heads and (is_reader or module == units.writers[0])
    if grouping == "heads" or not has_queries:
        return own
    size = min(min(sizes) for sizes in units.parts)
    heads = range(unit, units.width // size * units.number, units.number)
    dealt = torch.cat([torch.arange(head * size, (head + 1) * size) for head in heads])
    return torch.cat([dealt, own[units.width :]])  # queries come first


def by_autograd(
    view: DecoderView, units: Units, importance: Importance, grouping: Grouping = "heads"
) -> list[float]:
    """The definition, written out weight by weight and unit by unit."""
    everything = list(range(len(WINDOWS)))
    whole = gradients(view, everything)
    single = [gradients(view, [number]) for number in everything]
    scores = [0.0] * units.number
    for module in units.linears:
        linear = view.module(module)
        assert isinstance(linear, nn.Linear)
        for key, trained in linear.named_parameters():
            if key == "bias" and module == units.reader:
                continue
            name = f"{module}.{key}"
            parameter = trained.detach()
            first = parameter * whole[name]
            hessian = torch.stack([found[name].square() for found in single]).mean(dim=0)
            second = parameter.square() * hessian
            values = {
                "taylor": first.abs(),
                "taylor_second": second,
                "taylor_mixed": (first - second / 2).abs(),
                "l2": parameter.square(),
            }[importance]
            for unit in range(units.number):
                chosen = counted(units, module, unit, grouping)
                found = values[:, chosen] if module == units.reader else values[chosen]
                scores[unit] += float(found.sum())
    return scores


@pytest.mark.parametrize(
    ("family", "importance"),
    [("qwen2", importance) for importance in IMPORTANCES]
    + [("phi3", "taylor_mixed"), ("gemma3_text", "taylor")],
)
def test_scores_are_those_of_autograd(family: str, importance: Importance) -> None:
    view, naive = DecoderView(tiny_model(family)), DecoderView(tiny_model(family).double())
    units = removable_units(view, (1, 2), "test")
    if importance == "l2":
        plan = pruned("l2", view)
        for op in plan.operations:
            blocks = {block.reader: block for block in units}
            if isinstance(op, NarrowMlp):
                order = torch.tensor(by_autograd(naive, blocks[op.reader], "l2")).argsort()
                assert op.channels == tuple(sorted(order[-len(op.channels) :].tolist()))
        assert any(isinstance(op, NarrowMlp) for op in plan.operations)
        return
    step = Step(name="gradients", needs=Needs(units=units, importance=importance))
    scores = TrainerMeasure(data_of(WINDOWS, 2), progress=False)(view, step).unit_scores
    for block in units:
        expected = by_autograd(naive, block, importance)
        assert scores[block.reader].tolist() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("family", ["qwen2", "phi3"])
def test_released_scores_deal_query_heads_to_the_groups_in_turn(family: str) -> None:
    view, naive = DecoderView(tiny_model(family)), DecoderView(tiny_model(family).double())
    units = removable_units(view, (1,), "test")
    needs = Needs(units=units, importance="taylor_mixed", grouping="released")
    measure = TrainerMeasure(data_of(WINDOWS, 2), progress=False)
    scores = measure(view, Step(name="gradients", needs=needs)).unit_scores
    for block in units:
        expected = by_autograd(naive, block, "taylor_mixed", "released")
        assert scores[block.reader].tolist() == pytest.approx(expected, rel=1e-4)
        own = by_autograd(naive, block, "taylor_mixed", "heads")
        assert (own == pytest.approx(expected, rel=1e-4)) is not block.are_heads


@pytest.mark.parametrize(("grouping", "kept"), [(None, 0), ("heads", 0), ("released", 1)])
def test_a_large_query_head_saves_the_group_that_it_counts_for(
    grouping: Grouping | None, kept: int
) -> None:
    view = DecoderView(tiny_model())  # heads 0 and 1 read group 0
    size = view.model.config.head_dim
    for index in (1, 2):
        with torch.no_grad():
            view.layer(index).get_parameter("self_attn.q_proj.weight")[size : 2 * size] *= 100
    config = MethodConfig(name="llm_pruner", removed_ratio=0.15, importance="l2", grouping=grouping)
    config = replace(config, protect_first=1, protect_last=1)
    method = build_method(resolve_method(config), view)
    plan = compress(view, method, lambda *_: Statistics(), Plan(method="llm_pruner"), _no)
    heads = [op.groups for op in plan.operations if isinstance(op, RemoveHeads)]
    assert heads == [(kept,), (kept,)]


def test_neither_batches_nor_groups_matter() -> None:
    view = DecoderView(tiny_model())
    units = removable_units(view, view.layer_indices, "test")
    step = Step(name="gradients", needs=Needs(units=units, importance="taylor_mixed"))
    together = TrainerMeasure(data_of(WINDOWS, 3), progress=False)(view, step).unit_scores
    size = 8 * sum(block.size * block.number for block in units[:2])
    assert unit_groups(view, units, "taylor_mixed", 2.5 * size) == [units[:4], units[4:]]
    assert unit_groups(view, units, "taylor", 1) == [units[i : i + 2] for i in range(0, 8, 2)]
    measure = TrainerMeasure(data_of(WINDOWS, 1), progress=False, max_bytes=2.5 * size)
    in_parts = measure(view, step).unit_scores
    assert in_parts.keys() == together.keys()
    for reader, scores in together.items():
        torch.testing.assert_close(in_parts[reader], scores, rtol=1e-4, atol=1e-9)


def test_the_units_with_the_lowest_scores_go() -> None:
    view = DecoderView(tiny_model())
    config = MethodConfig(name="llm_pruner", removed_ratio=0.15, protect_first=1, protect_last=1)
    method = build_method(resolve_method(config), view)
    step = method.next_step(view, Plan(method="llm_pruner"))
    assert step is not None
    scores = {x.reader: torch.arange(x.number).flip(0).double() for x in step.needs.units}
    scores[step.needs.units[0].reader][0] = -1.0
    decision = method.decide(step, view, Statistics(unit_scores=scores))
    heads = [op.groups for op in decision.operations if isinstance(op, RemoveHeads)]
    assert heads == [(1,), (0,)]
    channels = [op.channels for op in decision.operations if isinstance(op, NarrowMlp)]
    assert channels == [tuple(range(len(channels[0])))] * 2
    predicted = method.predict(view)
    plan = compress(view, method, lambda *_: Statistics(unit_scores=scores), Plan(method="x"), _no)
    assert count_parameters(view.model) == predicted.most == predicted.least
    assert plan.options == {}
    lines = predicted.lines
    assert "2 attention blocks lose heads:" in lines
    assert "  model.layers.1.self_attn: 1 of 2 key/value groups" in lines


def _no(*_: object) -> None:
    """Store nothing."""


def smollm2() -> DecoderView:
    """The shapes of SmolLM2-135M, without weights."""
    config = AutoConfig.for_model(
        "llama",
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    with META:
        return DecoderView(AutoModelForCausalLM.from_config(config))


def test_the_published_setting_is_that_of_the_public_code_on_smollm2() -> None:
    view = smollm2()
    assert count_parameters(view.model) == 134_515_008
    config = resolve_method(MethodConfig(name="llm_pruner", removed_ratio=0.2043))
    method = build_method(config, view)
    predicted = method.predict(view)
    assert predicted.layers == tuple(range(4, 28))
    assert set(predicted.heads.values()) == {(2, 3)}
    assert set(predicted.widths.values()) == {(1536 - 492, 1536)}  # 32 %
    assert 1 - predicted.most / predicted.dense == pytest.approx(0.20430, abs=5e-5)


@pytest.mark.parametrize("ratio", [0.02, 0.1, 0.3, 0.45])
def test_heads_and_channels_lose_about_the_same_share(ratio: float) -> None:
    view = smollm2()
    blocks = removable_units(view, view.layer_indices, "test")
    dense = count_parameters(view.model)
    cut = numbers_to_remove(blocks, ratio, dense)
    removed = sum(block.size * cut[block.reader] for block in blocks)
    assert ratio * dense <= removed + 1 < ratio * dense + 30 * 1728 + 1  # a channel in each layer
    groups = {cut[block.reader] for block in blocks if block.are_heads}
    channels = {cut[block.reader] for block in blocks if not block.are_heads}
    assert len(groups) == len(channels) == 1
    assert abs(groups.pop() / 3 - channels.pop() / 1536) <= 0.2


def test_what_cannot_be_done_is_said_in_one_line() -> None:
    config = MethodConfig(name="llm_pruner", removed_ratio=0.2)
    wrong = {
        "needs method.removed_ratio, which is not set": replace(config, removed_ratio=None),
        "method.num_layers would be ignored": replace(config, num_layers=2),
        "method.protect_last is a number of layers and cannot": replace(config, protect_last=-1),
        "protects the first 4 and the last 2 of the model's 4": config,
        r"is out of reach: the feasible range is above 0 to 0\.\d+, with one": replace(
            config, removed_ratio=0.9, protect_first=0, protect_last=0
        ),
        "removes less than one parameter": replace(
            config, removed_ratio=1e-9, protect_first=0, protect_last=0
        ),
    }
    view = DecoderView(tiny_model())
    for message, options in wrong.items():
        with pytest.raises(ConfigError, match=message) as caught:
            build_method(resolve_method(options), view)
        assert "\n" not in str(caught.value)
    config = replace(config, protect_first=0, protect_last=0)
    for family, message in {
        "gpt2": "attention heads of decoder layer 0 of GPT2LMHeadModel cannot be removed",
        "mixtral": "attention heads of decoder layer 0 of MixtralForCausalLM cannot be removed",
    }.items():
        with pytest.raises(ModelError, match=f"method llm_pruner: the {message}"):
            build_method(resolve_method(config), DecoderView(tiny_model(family)))


def test_gradients_that_are_not_finite_name_their_block() -> None:
    view = DecoderView(tiny_model())
    found = UnitGradients(view, removable_units(view, (1, 2), "test"), "taylor")
    found.sums["model.layers.2.mlp.up_proj.weight"].fill_(float("nan"))
    with pytest.raises(NumericsError, match=r"model\.layers\.2\.mlp\.down_proj reads are NaN or"):
        found.scores(1)
