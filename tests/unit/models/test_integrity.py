import pytest
import torch

from grasp_lightning.errors import NumericsError
from grasp_lightning.models.integrity import check_finite, model_hash, nan_advice
from tests.conftest import tiny_model


def test_infinity_counts_as_not_finite() -> None:
    model = tiny_model()
    check_finite(model)
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[:2] = torch.tensor([torch.inf, -torch.inf])

    with pytest.raises(NumericsError, match=r"model\.norm\.weight .* \(2 of 32 values\)"):
        check_finite(model)


@pytest.mark.parametrize(
    ("dtype", "weight", "output"),
    [
        (torch.float32, "the checkpoint is damaged; download it again", "check the checkpoint"),
        (
            torch.bfloat16,
            (
                "the checkpoint is damaged, or torch.bfloat16 is too narrow for it; try "
                "model.dtype=float32"
            ),
            "check the checkpoint, or try model.dtype float32",
        ),
    ],
)
def test_a_wider_type_is_advised_only_where_there_is_one(
    dtype: torch.dtype, weight: str, output: str
) -> None:
    model = torch.nn.Linear(1, 1, bias=False, dtype=dtype)
    torch.nn.init.constant_(model.weight, torch.nan)

    with pytest.raises(NumericsError) as raised:
        check_finite(model)
    assert str(raised.value).endswith(f": {weight}")
    assert nan_advice(dtype) == output


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
