"""Embeddings and heads of factors: values, ties, saved folders, and what they refuse."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from grasp_lightning.errors import ModelError, PlanError
from grasp_lightning.linalg.row_groups import row_factors
from grasp_lightning.models.checkpoint import save_model
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.factored_rows import RowGroups
from grasp_lightning.models.formats.dense import densify
from grasp_lightning.models.seams import rows_refusal
from grasp_lightning.models.size import count_parameters
from grasp_lightning.models.surgery import apply_operations, parameters_after
from grasp_lightning.models.verification import verify_saved
from grasp_lightning.models.vocabulary.ends import vocabulary_ends
from grasp_lightning.plan import FactorizeRows, Plan
from tests.conftest import VOCABULARY, tiny_model

TIED = {"untied": ("llama", False), "tied": ("llama", True), "scaled": ("gemma3_text", True)}
# By hand, in no order: special tokens, and three groups, of which the second stays dense.
GROUPS = "".join("0" if token > 255 else str(1 + token % 3) for token in range(VOCABULARY))


class Cut(NamedTuple):
    """A dense model, and one with factorized rows of a given rank."""

    dense: PreTrainedModel
    model: PreTrainedModel
    operations: tuple[FactorizeRows, ...]


def cut(kind: str, rank: int) -> Cut:
    family, is_tied = TIED[kind]
    dense, model = (tiny_model(family, tie_word_embeddings=is_tied) for _ in range(2))
    view, tensors, operations = DecoderView(model), dict[str, Tensor](), []
    for names in vocabulary_ends(model).matrices:
        weight = view.module(names[0]).get_parameter("weight").detach()
        for group in (1, 3):
            rows = weight[[digit == str(group) for digit in GROUPS]]
            even = torch.ones(len(rows), dtype=torch.float64)
            factors = row_factors(rows, even, torch.eye(32, dtype=torch.float64), rank)
            tensors |= {f"{names[0]}.left_{group}": factors.left.float()}
            tensors |= {f"{names[0]}.right_{group}": factors.right.float()}
        ranks = (rank, 0, rank)
        operations.append(FactorizeRows(modules=names, groups=GROUPS, group_ranks=ranks))
    expected = parameters_after(view, operations)
    apply_operations(view, operations, tensors)
    assert count_parameters(model) == expected
    return Cut(dense, model, tuple(operations))


def ids() -> Tensor:
    return torch.tensor([[256, *range(0, 250, 7), 257], [258, *range(1, 251, 7), 259]])


@pytest.mark.parametrize("kind", TIED)
@torch.no_grad()
def test_full_rank_gives_the_same_rows_logits_and_loss(kind: str) -> None:
    found = cut(kind, 32)
    before, after = (m(ids(), labels=ids()) for m in (found.dense, found.model))
    torch.testing.assert_close(after.logits, before.logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after.loss, before.loss)
    rows = [m.get_input_embeddings()(torch.arange(VOCABULARY)) for m in (found.dense, found.model)]
    torch.testing.assert_close(rows[1], rows[0], rtol=1e-4, atol=1e-5)
    # Dense rows, among them those of special tokens, are equal to the bit.
    kept = [digit in "02" for digit in GROUPS]
    assert torch.equal(rows[1][kept], rows[0][kept])


@pytest.mark.parametrize("kind", TIED)
@torch.no_grad()
def test_a_saved_model_is_the_same_in_a_fresh_process(kind: str, tmp_path: Path) -> None:
    found = cut(kind, 4)
    save_model(found.model, tmp_path)
    verify_saved(found.model, tmp_path)  # loads it, compares logits, and generates
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids()).logits, found.model(ids()).logits)
    assert count_parameters(loaded) == count_parameters(found.model)
    program: Any = loaded  # Any: the types of generate depend on its options
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    texts = [program.generate(ids(), use_cache=cache, **options) for cache in (True, False)]
    assert torch.equal(*texts)
    for model in (loaded, found.model):
        with pytest.raises(ValueError, match="no rows for other tokens: export it with format"):
            model.resize_token_embeddings(300)
    densify(loaded)
    torch.testing.assert_close(
        loaded(ids()).logits, found.model(ids()).logits, rtol=1e-4, atol=1e-5
    )
    assert count_parameters(loaded) == count_parameters(found.dense)
    loaded.resize_token_embeddings(300)


def test_a_program_without_this_format_stops(tmp_path: Path) -> None:
    save_model(cut("tied", 4).model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"], config["auto_map"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match=r"size mismatch|mismatched"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@torch.no_grad()
def test_a_lookup_never_makes_the_whole_matrix() -> None:
    sizes: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
            made = func(*args, **(kwargs or {}))
            sizes.extend([made.numel()] if isinstance(made, Tensor) else [])
            return made

    embedding = cut("tied", 4).model.get_input_embeddings()
    assert isinstance(embedding, RowGroups)
    with Watch():
        embedding(torch.tensor([[0, 1, 2, 257]]))
    assert max(sizes) <= 4 * 32


def test_only_a_known_matrix_is_factorized() -> None:
    (half,) = cut("tied", 4).operations
    half = replace(half, modules=half.modules[:1])
    with pytest.raises(PlanError, match=r"that share one weight, which are .*'lm_head'"):
        parameters_after(DecoderView(tiny_model(tie_word_embeddings=True)), [half])
    found = cut("untied", 4)
    for operation in found.operations:
        assert Plan.from_json(Plan(method="x", operations=(operation,)).to_json()).operations == (
            operation,
        )
        with pytest.raises(PlanError, match="expected a dense embedding or head, the model has"):
            apply_operations(DecoderView(found.model), [operation], {})
    with pytest.raises(ModelError, match=r"model.embed_tokens consists of factors already"):
        vocabulary_ends(found.model)
    assert "which llama.cpp cannot compute" in (rows_refusal(found.model, "llama.cpp") or "")
    shared = tiny_model("llama", tie_word_embeddings=True)
    shared.model.extra = torch.nn.Linear(32, VOCABULARY, bias=False)
    shared.model.extra.weight = shared.lm_head.weight
    with pytest.raises(ModelError, match=r"also has one row per token in model.extra"):
        vocabulary_ends(shared)
