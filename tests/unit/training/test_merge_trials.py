"""The similarity of a model with merged layers to the dense one."""

import pytest
import torch
from torch import Tensor

from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.next_token import forward_inputs
from grasp_lightning.models.surgery import apply_operations
from grasp_lightning.plan import MergeLayers, Operation
from grasp_lightning.training.merge_trials import MergeTrials, final_states
from tests.conftest import tiny_model
from tests.unit.training.test_refit import windows

FIRST = MergeLayers(base=2, absorbed=(3,), rule="paper")


@torch.no_grad()
def naive(family: str, operations: list[Operation], batches: list[dict[str, Tensor]]) -> float:
    """Return the mean cosine of single tokens after real surgery."""
    dense, merged = tiny_model(family), tiny_model(family)
    apply_operations(DecoderView(merged), operations, {})
    cosines = []
    for batch in batches:
        states = [m.base_model(**forward_inputs(batch))[0].double() for m in (dense, merged)]
        for left, right, is_real in zip(*(s[0] for s in states), batch["mask"][0], strict=True):
            if is_real:
                cosines.append(float(left @ right / left.norm() / right.norm()))
    return sum(cosines) / len(cosines)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox"])
def test_a_trial_compares_with_the_dense_model_and_leaves_no_trace(family: str) -> None:
    batches = [windows().batch([row]) for row in range(3)]
    batches[2]["mask"][:, 20:] = False  # padding
    view = DecoderView(tiny_model(family))
    dense = final_states(view, batches)
    trials = MergeTrials(batches, dense)
    before = {name: value.clone() for name, value in view.model.state_dict().items()}
    tried = [
        FIRST,
        MergeLayers(base=0, absorbed=(1, 2), rule="released"),
        MergeLayers(base=1, absorbed=(), rule="paper"),
    ]
    found = [trials(view, merge) for merge in tried]
    for merge, similarity in zip(tried, found, strict=True):
        assert similarity == pytest.approx(naive(family, [merge], batches), abs=1e-5)
    assert found[2] == pytest.approx(1, abs=1e-12)
    assert min(found[:2]) < 0.99
    assert all(torch.equal(before[name], v) for name, v in view.model.state_dict().items())
    assert torch.equal(final_states(view, batches), dense)

    apply_operations(view, [FIRST], {})
    again = MergeLayers(base=1, absorbed=(2,), rule="paper")
    expected = naive(family, [FIRST, again], batches)
    assert trials(view, again) == pytest.approx(expected, abs=1e-5)
