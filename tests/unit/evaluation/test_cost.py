from grasp_lightning.evaluation.cost import measure_cost
from grasp_lightning.linalg.factors import balanced_factors, factorize
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.surgery import apply_operations
from grasp_lightning.plan import FactorizeLinear
from tests.conftest import VOCABULARY, tiny_model

# Tiny Llama: 4 layers; q, o 32 x 32; k, v 16 x 32; gate, up, down 48 x 32; head 260 x 32.
LINEARS = 4 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32)
HEAD = VOCABULARY * 32
# One token attends to itself alone: 4 heads of width 8, scores and weighted values.
ATTENTION = 4 * 2 * (2 * 4 * 8)


def test_a_token_takes_two_operations_per_weight_it_meets() -> None:
    cost = measure_cost(DecoderView(tiny_model()), disk_bytes=7)
    assert cost.decoder_linear_parameters == LINEARS
    assert cost.flops_per_token - 2 * (LINEARS + HEAD) in (0, ATTENTION)
    assert cost.decoder_linear_bytes == 4 * LINEARS
    assert (cost.dtype, cost.disk_bytes) == ("float32", 7)


def test_factors_take_as_many_operations_as_they_have_parameters() -> None:
    view = DecoderView(tiny_model())
    before = measure_cost(view)
    module, rank = "model.layers.1.mlp.up_proj", 3
    svd = factorize(view.linears(1)[module].weight)
    factors = balanced_factors(svd, range(rank))
    operation = FactorizeLinear(module=module, rank=rank, components=tuple(range(rank)))
    tensors = {f"{module}.left": factors.left, f"{module}.right": factors.right}
    apply_operations(view, [operation], tensors)
    after = measure_cost(view)
    saved = 48 * 32 - rank * (48 + 32)
    assert before.flops_per_token - after.flops_per_token == 2 * saved
    assert before.parameters - after.parameters == saved
