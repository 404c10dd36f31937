import pytest
import torch
from torch import Tensor

from grasp_lightning.errors import NumericsError
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.stats.base import Seam, SeamSums
from grasp_lightning.stats.seams import SeamCollector
from tests.conftest import FAMILIES, tiny_model
from tests.unit.evaluation.test_perplexity import random_batch
from tests.unit.models.helpers import in_dtype
from tests.unit.stats.test_layers import hidden_states

MLP_OUTPUTS = {
    "llama": "model.layers.0.mlp.down_proj",
    "qwen2": "model.layers.0.mlp.down_proj",
    "opt": "model.decoder.layers.0.fc2",
    "gpt_neox": "gpt_neox.layers.0.mlp.dense_4h_to_h",
}


def padded_batch() -> dict[str, Tensor]:
    batch = random_batch(3, 8)
    batch["mask"][2, 3:] = False
    return batch


def measure(
    view: DecoderView, seams: list[Seam], batches: list[dict[str, Tensor]]
) -> dict[Seam, SeamSums]:
    collector = SeamCollector(view, seams)
    with collector.attached(), torch.no_grad():
        for batch in batches:
            collector.start_batch(batch["mask"])
            view.model.base_model(batch["input_ids"])
    return collector.sums()


@pytest.mark.parametrize("family", FAMILIES)
def test_sums_equal_naive_sums_over_real_tokens(family: str) -> None:
    batch, view = padded_batch(), DecoderView(tiny_model(family))
    outputs: list[Tensor] = []
    linear = view.module(MLP_OUTPUTS[family])
    handle = linear.register_forward_hook(lambda *call: outputs.append(call[-1].clone()))
    with torch.no_grad():
        view.model(batch["input_ids"])
    handle.remove()
    stream, mask = hidden_states(family, batch), batch["mask"]
    seams = [
        Seam(layers=(1, 2), source=MLP_OUTPUTS[family]),
        Seam(layers=(1, 2)),
        Seam(layers=(3,)),
    ]
    reads = [outputs[0].reshape(stream[1].shape), stream[1], stream[3]]
    measured = measure(view, seams, [batch])
    for seam, read in zip(seams, reads, strict=True):
        first, last = seam.layers[0], seam.layers[-1]
        added = (stream[last + 1].double() - stream[first].double())[mask]
        x = read.double()[mask]
        gram, cross = measured[seam]
        torch.testing.assert_close(gram, sum(torch.outer(t, t) for t in x), rtol=1e-5, atol=1e-6)
        expected = sum(torch.outer(d, t) for d, t in zip(added, x, strict=True))
        torch.testing.assert_close(cross, expected, rtol=1e-5, atol=1e-6)
    assert not any(module._forward_hooks for module in view.model.modules())


def test_sums_do_not_depend_on_the_batch_size_and_continue_from_a_state() -> None:
    batch, view = padded_batch(), DecoderView(in_dtype(tiny_model(), torch.float64))
    seams = [Seam(layers=(1, 2)), Seam(layers=(1,), source=MLP_OUTPUTS["llama"])]
    rows = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(3)]
    whole, single = (measure(view, seams, batches) for batches in ([batch], rows))
    for seam in seams:
        torch.testing.assert_close(whole[seam], single[seam], rtol=1e-12, atol=1e-12)
    first, second = (SeamCollector(view, seams) for _ in range(2))
    for collector, part in ((first, rows[:2]), (second, rows[2:])):
        if collector is second:
            collector.load_state(first.state())
        with collector.attached(), torch.no_grad():
            for one in part:
                collector.start_batch(one["mask"])
                view.model.base_model(one["input_ids"])
    for seam in seams:
        assert all(map(torch.equal, second.sums()[seam], single[seam]))


def test_states_that_are_not_finite_are_named() -> None:
    view = DecoderView(tiny_model())
    with torch.no_grad():
        view.linears(2)["model.layers.2.mlp.up_proj"].weight[0, 0] = torch.nan
    with pytest.raises(NumericsError, match=r"hidden states at layers \[2\] are NaN or infinite"):
        measure(view, [Seam(layers=(2,))], [padded_batch()])
