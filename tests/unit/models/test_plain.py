"""Models with MLPs of one width become ordinary ones of their family."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, PreTrainedModel

from grasp_lightning.models.checkpoint import save_model
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.lowrank import has_replaced
from grasp_lightning.models.plain import make_plain
from grasp_lightning.models.rebuilding import rebuild_problem
from grasp_lightning.models.surgery import apply_operations
from tests.conftest import ALL_FAMILIES, MOE_FAMILIES, tiny_model
from tests.unit.models.helpers import factorize_layers, narrow_layers

IDS = torch.arange(12)[None]
PLAIN_FAMILIES = [f for f in ALL_FAMILIES if f not in ("bloom", *MOE_FAMILIES)]
KEYS = {"opt": "ffn_dim", "gpt2": "n_inner", "falcon": "ffn_hidden_size"}


def narrowed(family: str, widths: tuple[int, ...] = (20, 20, 20, 20)) -> PreTrainedModel:
    model = tiny_model(family)
    view = DecoderView(model)
    for layer, width in enumerate(widths):
        apply_operations(view, *narrow_layers(view, [layer], range(width)))
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("family", PLAIN_FAMILIES)
def test_one_width_gives_an_ordinary_model_that_computes_the_same(family: str) -> None:
    model = narrowed(family)
    before = logits(model)
    assert make_plain(model)
    assert not has_replaced(model)
    key = KEYS.get(family.removesuffix("_new"), "intermediate_size")
    assert getattr(model.config, key) == 20
    assert rebuild_problem(model) is None
    torch.testing.assert_close(logits(model), before)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_the_saved_folder_is_an_ordinary_one(family: str, tmp_path: Path) -> None:
    model = narrowed(family)
    before = logits(model)
    save_model(model, tmp_path)
    assert not (tmp_path / "modeling_grasp.py").exists()
    config = AutoConfig.from_pretrained(tmp_path)
    assert not hasattr(config, "quantization_config")
    assert not hasattr(config, "auto_map")
    loaded = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded), before)


def test_dropped_layers_do_not_count() -> None:
    model = tiny_model()
    view = DecoderView(model)
    apply_operations(view, *narrow_layers(view, [0, 2, 3], range(20)))
    assert not make_plain(model)
    view.drop([1])
    before = logits(model)
    assert make_plain(model)
    torch.testing.assert_close(logits(model), before)


@pytest.mark.parametrize("widths", [(20, 20, 20, 24), (20, 20, 20)])
def test_different_widths_stay_narrowed(widths: tuple[int, ...]) -> None:
    model = narrowed("llama", widths)
    assert not make_plain(model)
    assert has_replaced(model)
    assert model.config.intermediate_size == 48


def test_a_low_rank_linear_or_a_config_without_the_width_leaves_the_model_as_it_is() -> None:
    model = narrowed("llama", (20, 20, 20))
    view = DecoderView(model)
    apply_operations(view, *factorize_layers(view, [3], 4))
    assert not make_plain(model)
    bloom = tiny_model("bloom")
    apply_operations(DecoderView(bloom), *narrow_layers(DecoderView(bloom), range(4), range(20)))
    assert not make_plain(bloom)
    assert make_plain(tiny_model())
