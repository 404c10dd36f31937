import pytest
import torch

from grasp_lightning.errors import NumericsError
from grasp_lightning.models.integrity import check_finite, model_hash
from tests.conftest import tiny_model


def test_infinity_counts_as_not_finite() -> None:
    model = tiny_model()
    check_finite(model)
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[:2] = torch.tensor([torch.inf, -torch.inf])

    with pytest.raises(NumericsError, match=r"model\.norm\.weight .* \(2 of 32 values\)"):
        check_finite(model)


def test_equal_weights_have_equal_hashes_and_one_changed_bit_does_not() -> None:
    model = tiny_model()
    before = model_hash(model)
    assert model_hash(tiny_model()) == before

    with torch.no_grad():
        model.get_parameter("lm_head.weight")[0, 0] += 1e-3
    assert model_hash(model) != before


def test_hash_covers_dtype_and_name() -> None:
    bits = torch.tensor([1.0, 2.0], dtype=torch.bfloat16)

    def holder(name: str, values: torch.Tensor) -> torch.nn.Module:
        module = torch.nn.Module()
        module.register_buffer(name, values)
        return module

    hashes = {
        model_hash(holder("a", bits)),
        model_hash(holder("b", bits)),
        model_hash(holder("a", bits.view(torch.float16))),
        model_hash(holder("a", bits.reshape(2, 1))),
    }
    assert len(hashes) == 4
