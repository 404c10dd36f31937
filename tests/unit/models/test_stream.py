"""Where models read and write their hidden states."""

import pytest
import torch

from grasp_lightning.errors import ModelError
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.operations.slice import basis_key
from grasp_lightning.models.size import count_parameters
from grasp_lightning.models.sliced import shortcut_name
from grasp_lightning.models.stream import NormForm, norm_form, stream_of
from grasp_lightning.models.surgery import apply_operations, parameters_after
from grasp_lightning.plan import SliceStream
from tests.conftest import tiny_model

# Besides those of test_slicegpt: a fused projection, transposed weights, one norm for two blocks,
# two norms, and a gain of one plus the weight in a hybrid.
FAMILIES = ("phi3", "gpt2", "falcon", "falcon_new", "qwen3_5_text")
REFUSED = {
    "gemma2": "something else than embeddings and outputs of linears is added to them",
    "granite": "something else than embeddings and outputs of linears is added to them",
    "mixtral": "something else than norms and linears reads them, such as experts",
    "bloom": "something else than norms and linears reads them",
    "mamba": "its kernels for GPUs may read weights of linears without calling them",
}
IDS = torch.arange(12)[None]


@pytest.mark.parametrize("family", FAMILIES)
def test_any_rotation_of_any_family_leaves_the_logits_and_counts_what_it_adds(family: str) -> None:
    model = tiny_model(family)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    view, before = DecoderView(model), model(IDS).logits.detach()
    stream = stream_of(view)
    operation = SliceStream(width=32, embeddings=stream.embeddings, reads=stream.reads)
    bases = {
        basis_key(read): torch.linalg.qr(torch.randn(32, 32, generator=generator))[0]
        for read in stream.reads
    }
    expected = parameters_after(view, (operation,))
    apply_operations(view, (operation,), bases)
    assert count_parameters(model) == expected
    torch.testing.assert_close(model(IDS).logits.detach(), before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", REFUSED)
def test_other_structures_are_refused_with_the_reason(family: str) -> None:
    expected = f"cannot be rotated: {REFUSED[family]}"
    with pytest.raises(ModelError, match=expected):
        stream_of(DecoderView(tiny_model(family)))


def test_norms_are_known_by_what_they_compute() -> None:
    layer_norm = torch.nn.LayerNorm(8, eps=1e-3)
    assert norm_form(layer_norm, 8) == NormForm(eps=1e-3, centers=True, offset=0.0)
    rms_norm = torch.nn.RMSNorm(8, eps=1e-3, device="meta")
    assert norm_form(rms_norm, 8) == NormForm(eps=1e-3, centers=False, offset=0.0)
    assert norm_form(rms_norm, 16) is None
    assert norm_form(torch.nn.PReLU(8), 8) is None

    class Cubed(torch.nn.RMSNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) ** 3

    assert norm_form(Cubed(8, eps=1e-3), 8) is None


def test_a_shortcut_is_in_the_module_that_holds_both_of_its_ends() -> None:
    assert shortcut_name("h.0.ln_1", "h.0.attn.c_proj") == "h.0.ln_1_shortcut"
    assert shortcut_name("h.0.a.norm", "h.0.b.out") == "h.0.a_norm_shortcut"
