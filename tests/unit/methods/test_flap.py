"""FLAP: its scores and threshold, and that its biases keep the mean output."""

import pytest
import torch
from torch import Tensor, nn

from grasp_lightning.callbacks.measure import TrainerMeasure
from grasp_lightning.config import CalibrationConfig, MethodConfig
from grasp_lightning.data.datamodules import CalibrationData
from grasp_lightning.errors import ConfigError, ModelError, NumericsError
from grasp_lightning.methods import build_method, resolve_method
from grasp_lightning.methods.base import CompressionMethod
from grasp_lightning.methods.flap import (
    fluctuation,
    most_removed,
    removable_blocks,
    units_to_remove,
)
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.next_token import forward_inputs
from grasp_lightning.models.size import count_parameters
from grasp_lightning.pipeline import compress
from grasp_lightning.plan import NarrowMlp, Plan, RemoveHeads
from grasp_lightning.stats.base import Needs, Spread, Step
from grasp_lightning.stats.spread import SpreadCollector
from tests.conftest import byte_tokenizer, tiny_model
from tests.integration.test_golden_plan import seeded_windows

WINDOWS = seeded_windows(3, 24)
WINDOWS.mask[2, 20:] = False  # padding


def measure() -> TrainerMeasure:
    config = CalibrationConfig(batch_size=2)
    data = CalibrationData(config, byte_tokenizer(), windows=WINDOWS)
    return TrainerMeasure(data, progress=False)


def method_of(view: DecoderView, ratio: float = 0.2) -> CompressionMethod:
    return build_method(resolve_method(MethodConfig(name="flap", removed_ratio=ratio)), view)


@torch.no_grad()
def inputs_of(view: DecoderView, module: str) -> Tensor:
    """All real inputs of a linear over the calibration text, ``(tokens, M)``, float64."""
    found: list[Tensor] = []
    linear = view.module(module)
    hook = linear.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    for number in range(len(WINDOWS)):
        batch = WINDOWS.batch([number])
        view.model(**forward_inputs(batch))
        found[-1] = found[-1][batch["mask"].bool()]
    hook.remove()
    return torch.cat(found).double()


def test_means_and_variances_are_those_of_all_tokens() -> None:
    view = DecoderView(tiny_model())
    readers = tuple(units.reader for units, _ in removable_blocks(view))
    spreads = measure()(view, Step(name="spread", needs=Needs(spreads=readers))).spreads
    assert tuple(spreads) == readers
    for reader in readers:
        x = inputs_of(view, reader)
        assert len(x) == 3 * 24 - 4
        torch.testing.assert_close(spreads[reader].mean, x.mean(dim=0), rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(spreads[reader].variance, x.var(dim=0), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gemma2"])
def test_biases_keep_the_mean_output_on_the_calibration_text(family: str) -> None:
    """With the inputs of the dense model: each cut alone leaves the mean output as it was."""
    dense, view = DecoderView(tiny_model(family)), DecoderView(tiny_model(family))
    method = method_of(view, 0.3)
    predicted = method.predict(view)
    plan = compress(view, method, measure(), Plan(method="flap"), lambda *_: None)
    kinds = {type(op) for op in plan.operations}
    assert {RemoveHeads, NarrowMlp} <= kinds
    blocks = {units.reader: units for units, _ in removable_blocks(dense)}
    for op in plan.operations:
        if not isinstance(op, RemoveHeads | NarrowMlp):
            continue
        reader, kept = (
            (op.output, op.groups) if isinstance(op, RemoveHeads) else (op.reader, op.channels)
        )
        x, old, new = inputs_of(dense, reader), dense.module(reader), view.module(reader)
        assert isinstance(old, nn.Linear)
        assert isinstance(new, nn.Linear)
        assert new.bias is not None
        left = x[:, blocks[reader].columns(kept)]
        after = (left @ new.weight.double().mT + new.bias.double()).mean(dim=0)
        before = x @ old.weight.double().mT + (0 if old.bias is None else old.bias.double())
        torch.testing.assert_close(after, before.mean(dim=0), rtol=1e-5, atol=1e-7)
        assert not torch.allclose(after - new.bias.double(), before.mean(dim=0), atol=1e-4)
    size = count_parameters(view.model)
    assert 0 <= predicted.most - size < 200  # one channel and its bias
    assert predicted.lines[1].startswith("heads and MLP channels of 4 layers share one budget")


def test_scores_are_standardised_fluctuations() -> None:
    view = DecoderView(tiny_model())
    (heads, _), (channels, _) = removable_blocks(view)[2:4]
    generator = torch.Generator().manual_seed(3)
    for units in (heads, channels):
        size = units.number * units.width
        weight = torch.randn(32, size, generator=generator)
        spread = Spread(
            mean=torch.zeros(size), variance=torch.rand(size, generator=generator).double()
        )
        values = [
            float(spread.variance[j]) * sum(float(w) ** 2 for w in weight[:, j])
            for j in range(size)
        ]
        values = [value**2 for value in values] if units.are_heads else values
        mean = sum(values) / size
        deviation = (sum((value - mean) ** 2 for value in values) / (size - 1)) ** 0.5
        standard = [(value - mean) / deviation for value in values]
        expected = [
            sum(standard[unit * units.width : (unit + 1) * units.width]) / units.width
            for unit in range(units.number)
        ]
        found = fluctuation(units, weight, spread)
        assert found.tolist() == pytest.approx(expected, rel=1e-5)
        constant = Spread(mean=spread.mean, variance=torch.zeros(size, dtype=torch.float64))
        assert fluctuation(units, weight, constant).tolist() == [0.0] * units.number


def test_one_threshold_decides_for_all_layers() -> None:
    view = DecoderView(tiny_model())
    blocks = removable_blocks(view)
    generator = torch.Generator().manual_seed(5)
    scores = {
        units.reader: torch.rand(units.number, generator=generator).double() for units, _ in blocks
    }
    for target in (1, 500, 5000, most_removed(blocks)):
        gone = units_to_remove(blocks, scores, target)
        removed = sum(
            block.size * len(gone[block.reader]) - added * bool(gone[block.reader])
            for block, added in blocks
        )
        assert target <= removed < target + 96  # less than the channel that could stay
        for block, _ in blocks:
            best = int(scores[block.reader].argmax())
            assert best not in gone[block.reader]
    assert removed == target
    gone = units_to_remove(blocks, scores, 3000)
    removed_channels = [
        float(scores[x.reader][i]) for x, _ in blocks if not x.are_heads for i in gone[x.reader]
    ]
    kept_channels = [
        float(scores[x.reader][i])
        for x, _ in blocks
        if not x.are_heads
        for i in range(x.number)
        if i not in gone[x.reader]
    ]
    higher = [score for score in removed_channels if score > min(kept_channels)]
    assert len(higher) <= 16  # what a last group of heads made room for


def test_what_cannot_be_done_is_said_in_one_line() -> None:
    view = DecoderView(tiny_model())
    with pytest.raises(ConfigError, match=r"out of reach: the feasible range is above 0 to 0\.\d"):
        method_of(view, 0.9)
    with pytest.raises(ConfigError, match="removes less than one parameter"):
        method_of(view, 1e-9)
    with pytest.raises(ConfigError, match=r"method\.importance would be ignored: method flap rem"):
        resolve_method(MethodConfig(name="flap", removed_ratio=0.1, importance="l2"))
    with pytest.raises(ModelError, match="method flap: the attention heads of decoder layer 0"):
        method_of(DecoderView(tiny_model("opt")))


def test_inputs_that_are_not_finite_name_their_linear() -> None:
    view = DecoderView(tiny_model())
    reader = "model.layers.1.mlp.down_proj"
    collector = SpreadCollector(view, [reader])
    state = collector.state()
    state[f"{reader}.sum"].fill_(float("inf"))
    collector.load_state(state)
    with pytest.raises(NumericsError, match=f"inputs of {reader} are NaN or infinite"):
        collector.spreads()
