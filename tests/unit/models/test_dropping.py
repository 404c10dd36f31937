"""Which layers a model can lose, by the actual behaviour of the remaining layers."""

import re
from typing import Any

import pytest
import torch

from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.dropping import drop_problem, droppable_layers
from tests.conftest import tiny_model

_LAST_ATTENTION = (
    r"^without layers \[3\], the last of their kind, Qwen3_5ForCausalLM cannot generate with its "
    r"cache \(`get_seq_length` can only be called on Attention layers.*; keep one of them$"
)


@pytest.mark.parametrize(
    ("family", "layers", "generates"),
    [
        ("qwen3_5_text", (3,), False),
        ("qwen3_5_text", (1, 3), False),
        ("qwen3_5_text", (0, 1, 2), True),  # a model of attention alone
        ("gemma2", (1, 3), True),  # sliding windows alone
        ("llama", (0, 1, 2), True),
    ],
)
def test_what_is_found_on_the_meta_device_is_what_the_model_does(
    family: str, layers: tuple[int, ...], generates: bool
) -> None:
    view = DecoderView(tiny_model(family))
    assert (drop_problem(view, layers) is None) == generates
    view.drop(layers)
    generate: Any = view.model.generate  # Any: the base class has it only with a head
    if generates:
        assert generate(torch.arange(4)[None], max_new_tokens=3, min_new_tokens=3).shape == (1, 7)
    else:
        with pytest.raises(ValueError, match="can only be called on Attention layers"):
            generate(torch.arange(4)[None], max_new_tokens=3)


def test_the_reason_names_the_layers_to_keep() -> None:
    problem = drop_problem(DecoderView(tiny_model("qwen3_5_text")), (3,))
    assert re.match(_LAST_ATTENTION, problem or "")


@pytest.mark.parametrize(
    ("family", "options", "droppable"),
    [
        ("llama", {}, (1, 2, 3)),
        ("qwen3_5_text", {}, (1, 2)),
        ("gemma2", {}, (1, 2, 3)),
        # Every second layer has experts, by its number.
        ("qwen3_moe", {"decoder_sparse_step": 2}, (3,)),
    ],
)
def test_layers_that_may_go_in_any_combination(
    family: str, options: dict[str, Any], droppable: tuple[int, ...]
) -> None:
    view = DecoderView(tiny_model(family, **options))
    assert droppable_layers(view, (1, 2, 3)) == droppable
