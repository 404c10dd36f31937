import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from grasp_lightning.config import MethodConfig
from grasp_lightning.errors import ModelError
from grasp_lightning.models.calls import hidden_input, leave_uncalled
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.training.hidden_cache import check_independent, pass_on_hidden_states_only
from tests.conftest import FAMILIES, tiny_model


def built(family: str, **options: object) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **options)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    model.eval()
    return model


def gemma4(**options: int) -> PreTrainedModel:
    sizes = {
        "vocab_size": 260,
        "vocab_size_per_layer_input": 260,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 4,
        "head_dim": 8,
        "sliding_window": 8,
    }
    kinds = ["sliding_attention", "full_attention"] * 2
    return built("gemma4_text", **sizes, **options, layer_types=kinds)


def mamba() -> PreTrainedModel:
    return built("mamba", vocab_size=260, hidden_size=16, num_hidden_layers=2, state_size=4)


def test_linears_that_are_not_called_stay_dense(caplog: pytest.LogCaptureFixture) -> None:
    view = DecoderView(mamba())

    leave_uncalled(view)

    names = {name.rpartition(".")[2] for name in view.linears(0)}
    assert names == {"in_proj", "x_proj", "out_proj"}
    assert [record.getMessage() for record in caplog.records if "grasp" in record.name] == [
        (
            "MambaForCausalLM does not call mixer.dt_proj once per pass: these linears are left "
            "unchanged"
        )
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_families_call_all_their_linears_and_layers_may_run_alone(
    family: str, caplog: pytest.LogCaptureFixture
) -> None:
    view = DecoderView(tiny_model(family))
    before = list(view.all_linears())

    leave_uncalled(view)

    assert list(view.all_linears()) == before
    assert not caplog.records
    assert pass_on_hidden_states_only(view)


def test_layers_that_share_keys_and_values_cannot_run_one_by_one() -> None:
    view = DecoderView(gemma4(num_kv_shared_layers=2, hidden_size_per_layer_input=8))

    check_independent(view, MethodConfig(refit="none"))
    with pytest.raises(ModelError) as raised:
        check_independent(view, MethodConfig(refit="residual", removable="layers"))
    assert str(raised.value) == (
        "decoder layers of Gemma4ForCausalLM pass on more than hidden states, such as keys "
        "and values, so they cannot be run one by one: set method.refit: none and "
        "method.removable: none"
    )
    with pytest.raises(ModelError, match=r"one by one: use another method than sleb$"):
        check_independent(view, MethodConfig(name="sleb"), skips_parts=True)
    per_layer = DecoderView(gemma4(num_kv_shared_layers=0, hidden_size_per_layer_input=8))
    check_independent(per_layer, MethodConfig(refit="residual"), skips_parts=True)


def test_values_of_single_layers_follow_a_drop() -> None:
    model = gemma4(num_kv_shared_layers=0, hidden_size_per_layer_input=0)
    DecoderView(model).drop([0])

    own = model.config.to_dict()["per_layer_config"]
    assert {int(number) for number in own} == {0, 2}
    assert model(input_ids=torch.tensor([[1, 2]])).logits.shape == (1, 2, 260)


@pytest.mark.parametrize("shape", [(2, 3), (4, 1, 2, 3)])
def test_hidden_states_have_three_dimensions(shape: tuple[int, ...]) -> None:
    hidden: Tensor = torch.zeros(shape)
    with pytest.raises(ModelError, match="expected \\(windows, tokens, features\\): this family"):
        hidden_input((hidden,), {})
