import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.mlp import mlps
from grasp_lightning.models.size import count_decoder_linears, count_parameters
from grasp_lightning.models.surgery import apply_operations, parameters_after
from grasp_lightning.plan import (
    DropLayers,
    FactorizeLinear,
    NarrowMlp,
    Operation,
    RemoveBlock,
    SelectLayers,
    SetWeights,
)
from tests.conftest import FAMILIES, tiny_model
from tests.unit.models.helpers import meta_model, random_factors

NUM_LAYERS = 4
families = st.sampled_from(FAMILIES)


@st.composite
def plans(draw: st.DrawFn) -> tuple[str, bool, list[Operation]]:
    """A family, whether it ties embeddings, and operations that fit it."""
    family, tied = draw(families), draw(st.booleans())
    view = DecoderView(meta_model(family, tie_word_embeddings=tied))
    linears = {n: m for index in range(NUM_LAYERS) for n, m in view.linears(index).items()}
    chosen = draw(st.lists(st.sampled_from(sorted(linears)), unique=True, max_size=8))
    operations: list[Operation] = [SelectLayers(layers=(0,))]
    removed = draw(st.sets(st.sampled_from(chosen))) if chosen else set()
    if removed:
        operations.append(RemoveBlock(block="some", modules=tuple(sorted(removed))))
    for module in set(chosen) - removed:
        largest = min(linears[module].in_features, linears[module].out_features)
        rank = draw(st.integers(1, largest))
        operations.append(FactorizeLinear(module=module, rank=rank, components=None))
    for mlp in (mlp for index in range(NUM_LAYERS) for mlp in mlps(view, index)):
        if draw(st.booleans()) and not {mlp.reader, *mlp.writers} & set(chosen):
            most = linears[mlp.reader].in_features - 1
            kept = draw(st.sets(st.integers(0, most), min_size=1, max_size=most))
            operations.append(NarrowMlp(**mlp._asdict(), channels=tuple(sorted(kept))))
    parameters = dict(view.layer(1).named_parameters())
    replaced = tuple(name.partition(".1.")[2] for op in operations for name in op.linears)
    free = sorted(name for name in parameters if not name.startswith(replaced or (" ",)))
    set_names = draw(st.sets(st.sampled_from(free))) if free else set()
    if set_names:
        layer = f"{view.layers_name}.1"
        operations.append(SetWeights(module=layer, parameters=tuple(sorted(set_names))))
    layers = draw(st.sets(st.integers(0, NUM_LAYERS - 1), max_size=NUM_LAYERS - 1))
    if layers:
        operations.append(DropLayers(layers=tuple(sorted(layers))))
    return family, tied, operations


@settings(max_examples=40, deadline=None)
@given(plans())
def test_the_predicted_number_of_parameters_is_the_counted_one(
    plan: tuple[str, bool, list[Operation]],
) -> None:
    family, tied, operations = plan
    view = DecoderView(tiny_model(family, tie_word_embeddings=tied))
    meta = DecoderView(meta_model(family, tie_word_embeddings=tied))
    before, linears_before = count_parameters(view.model), count_decoder_linears(view)
    predicted = parameters_after(view, operations)
    assert parameters_after(meta, operations) == predicted
    assert count_parameters(view.model) == before
    apply_operations(view, operations, random_factors(view, operations))
    assert count_parameters(view.model) == predicted
    if not any(isinstance(operation, DropLayers) for operation in operations):
        # Outside of linears nothing changes.
        assert before - predicted == linears_before - count_decoder_linears(view)


@settings(max_examples=25, deadline=None)
@given(family=families, seed=st.integers(0, 100), layers=st.sets(st.integers(0, 3), min_size=1))
def test_surgery_at_full_rank_leaves_the_logits(family: str, seed: int, layers: set[int]) -> None:
    view = DecoderView(tiny_model(family, seed))
    ids = torch.randint(0, 256, (2, 8), generator=torch.Generator().manual_seed(seed))
    expected = view.model(ids).logits
    operations: list[Operation] = []
    tensors = {}
    for module, linear in (pair for index in layers for pair in view.linears(index).items()):
        u, s, vh = torch.linalg.svd(linear.weight.detach().double(), full_matrices=False)
        tensors[f"{module}.left"], tensors[f"{module}.right"] = u * s.sqrt(), s.sqrt()[:, None] * vh
        components = tuple(range(len(s)))
        operations.append(FactorizeLinear(module=module, rank=len(s), components=components))
    apply_operations(view, operations, tensors)
    actual = view.model(ids).logits
    assert (actual - expected).norm() <= 1e-5 * expected.norm()
