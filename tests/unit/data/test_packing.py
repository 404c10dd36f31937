import re

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from grasp_lightning.config import BatchOrder
from grasp_lightning.data.batching import Rows, collate
from grasp_lightning.data.packing import packed_inputs, packing_form
from grasp_lightning.errors import ModelError
from grasp_lightning.models.next_token import forward_inputs, next_token_losses
from tests.conftest import ALL_FAMILIES, FAMILIES, tiny_model
from tests.unit.data.test_batching import ORDERS, ROW, epoch, hand_made, random_samples


def test_the_mask_of_a_packed_row_is_causal_and_block_diagonal() -> None:
    batch = collate(hand_made(), [[0, 1], [2]])
    inputs = packed_inputs(batch, "mask", torch.float16)
    mask = inputs["attention_mask"]
    assert isinstance(mask, Tensor)
    assert mask.dtype == torch.float16
    assert set(mask.unique().tolist()) == {0.0, torch.finfo(torch.float16).min}
    assert (mask == 0).int().tolist() == [
        [[[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]]],
        [[[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]],
    ]
    assert "attention_mask" not in packed_inputs(batch, "positions", torch.float16)


FORMS = {
    family: "mask" if family in ("opt", "falcon", "falcon_new") else "positions"
    for family in ALL_FAMILIES
    if family != "bloom"
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_form_of_packing_is_found_by_trying(family: str, attention: str) -> None:
    model = tiny_model(family, attn_implementation=attention)
    assert packing_form(model, 32) == FORMS[family]


@pytest.mark.parametrize("family", sorted(set(FORMS) - set(FAMILIES)))
def test_the_form_of_packing_is_found_for_other_families(family: str) -> None:
    assert packing_form(tiny_model(family), 32) == FORMS[family]


def test_the_form_of_packing_is_found_in_low_precision_too() -> None:
    assert packing_form(tiny_model("opt").bfloat16(), 32) == "mask"
    assert packing_form(tiny_model("mixtral").bfloat16(), 32) == "positions"


def test_looking_for_the_form_of_packing_leaves_the_model_as_it_was() -> None:
    model = tiny_model("opt", dropout=0.5).train()
    assert packing_form(model, 32) == "mask"
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_family_that_cannot_be_packed_is_named() -> None:
    message = (
        "packing does not work with bloom models and attention eager: samples in a shared row do "
        "not get the same logits as alone; use length_grouped or shuffled batches"
    )
    with pytest.raises(ModelError, match=f"^{re.escape(message)}$"):
        packing_form(tiny_model("bloom"), 32)


def test_a_row_that_holds_no_trial_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="row_length must be at least 8, got 7"):
        packing_form(tiny_model(), 7)


def packed_logits(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    form = packing_form(model, ROW)
    logits: Tensor = model(**packed_inputs(batch, form, model.dtype)).logits
    return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_give_the_logits_of_their_samples(family: str) -> None:
    model, samples = tiny_model(family), random_samples(12)
    for rows in epoch(samples, "packed", batch_size=2):
        batch = collate(samples, rows)
        logits = packed_logits(model, batch)
        assert logits.isfinite().all()
        parts = [model(collate(samples, [[i]])["input_ids"]).logits[0] for row in rows for i in row]
        torch.testing.assert_close(logits[batch["mask"]], torch.cat(parts), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("order", ORDERS)
def test_summed_loss_and_gradient_equal_those_of_the_samples_alone(
    family: str, order: BatchOrder
) -> None:
    model, samples = tiny_model(family), random_samples(12)
    weight = next(model.parameters())

    def loss_and_gradient(batches: list[Rows]) -> tuple[Tensor, Tensor]:
        total = torch.zeros(())
        for rows in batches:
            batch = collate(samples, rows)
            if order == "packed" and batches is not alone:
                logits = packed_logits(model, batch)
            else:
                logits = model(**forward_inputs(batch), use_cache=False).logits
            total = total + next_token_losses(logits, batch["input_ids"], batch["targets"]).sum()
        (gradient,) = torch.autograd.grad(total, weight)
        return total.detach(), gradient

    alone: list[Rows] = [[[index]] for index in range(len(samples))]
    loss, gradient = loss_and_gradient(alone)
    others = loss_and_gradient(epoch(samples, order))
    torch.testing.assert_close(others[0], loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(others[1], gradient, rtol=1e-3, atol=1e-4)
