from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from grasp_lightning.config import MethodConfig
from grasp_lightning.errors import ModelError
from grasp_lightning.models.calls import hidden_input, leave_uncalled
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.dropping import drop_problem
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
    sizes |= options
    kinds = ["sliding_attention", "full_attention"] * (sizes["num_hidden_layers"] // 2)
    return built("gemma4_text", **sizes, layer_types=kinds)


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


def test_linears_that_no_gradient_reaches_stay_dense(caplog: pytest.LogCaptureFixture) -> None:
    sizes = {"vocab_size": 260, "hidden_size": 32, "num_hidden_layers": 2, "index_n_heads": 4}
    heads = dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8)
    ranks = {"q_lora_rank": 16, "kv_lora_rank": 16, "index_head_dim": 8, "index_topk": 8}
    counts = dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_routed_experts"), 4)
    experts = {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
    view = DecoderView(built("deepseek_v32", **sizes, **heads, **ranks, **counts, **experts))

    leave_uncalled(view)

    names = {name.partition("self_attn.")[2] for name in view.linears(0)}
    assert names >= {"q_a_proj", "q_b_proj", "kv_b_proj", "o_proj"}
    assert not any(name.startswith("indexer") for name in names)
    (message,) = [r.getMessage() for r in caplog.records if "gradient" in r.getMessage()]
    assert message.startswith("DeepseekV32ForCausalLM passes no gradient to self_attn.indexer.")


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


def test_of_layers_that_share_keys_and_values_only_readers_can_be_dropped() -> None:
    view = DecoderView(gemma4(num_hidden_layers=6, num_kv_shared_layers=4))
    ids = torch.arange(12)[None]

    assert "cannot be shortened" in str(drop_problem(view, [1]))  # layers 3 and 5 read from it
    assert drop_problem(view, [3]) is None
    view.drop([3])

    model: Any = view.model  # Any: outputs of every family
    assert model.config.num_kv_shared_layers == 3
    rebuilt = type(model)(model.config).eval()
    rebuilt.load_state_dict(model.state_dict())
    new = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "use_cache": True}
    assert torch.equal(model.generate(ids, **new), rebuilt.generate(ids, **new))
    assert torch.equal(model(ids).logits, rebuilt(ids).logits)


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


@pytest.mark.parametrize("shape", [(2, 3), (1, 4, 1, 2, 3)])
def test_hidden_states_have_three_or_four_dimensions(shape: tuple[int, ...]) -> None:
    hidden: Tensor = torch.zeros(shape)
    with pytest.raises(ModelError, match="expected \\(windows, tokens, features\\): this family"):
        hidden_input((hidden,), {})
