"""Log-likelihoods of texts with the same beginning, against a pass over each text alone."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from grasp_lightning.evaluation.shared_prefixes import (
    Answer,
    Group,
    batched,
    can_share,
    grouped,
    log_likelihoods,
)
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.surgery import apply_operations
from grasp_lightning.plan import RemoveBlock
from tests.conftest import ALL_FAMILIES, tiny_model

SIZE = 4


def questions(number: int = 6) -> list[Answer]:
    """Return choices of questions of all lengths; in some, the choices are a single token."""
    draw = random.Random(0)

    def text(length: int) -> tuple[int, ...]:
        return tuple(draw.randrange(256) for _ in range(length))

    answers = []
    for question in range(number):
        context = text(draw.randrange(12, 30))
        for _ in range(4):
            end = text(1 if question % 3 == 0 else draw.randrange(1, 9))
            answers.append(Answer(context + end, len(end)))
    # Another beginning and the same end, as in winogrande.
    sentence, end = text(11), text(5)
    answers += [Answer((*sentence, *text(2), *end), len(end)) for _ in range(2)]
    return answers


def alone(model: PreTrainedModel, answer: Answer) -> tuple[float, bool]:
    with torch.no_grad():
        logits = model(torch.tensor([answer.read])).logits[0, -answer.length :]
    expected = torch.tensor(answer.tokens[-answer.length :])
    scores = logits.log_softmax(-1).gather(-1, expected[:, None])
    return float(scores.sum()), torch.equal(logits.argmax(-1), expected)


def together(model: PreTrainedModel, answers: Sequence[Answer]) -> dict[int, tuple[float, bool]]:
    groups = grouped(answers, SIZE * 40)
    assert any(len(group.members) > 1 for group in groups)
    return {
        index: (score, is_greedy)
        for batch in batched(groups, SIZE)
        for index, score, is_greedy in log_likelihoods(model, answers, batch)
    }


def check(model: PreTrainedModel) -> None:
    answers = questions()
    # One that is the likeliest text.
    context = answers[4].tokens[:12]
    with torch.no_grad():
        likeliest = int(model(torch.tensor([context])).logits[0, -1].argmax())
    answers += [Answer((*context, token), 1) for token in (likeliest, (likeliest + 1) % 256)]
    found = together(model, answers)
    expected = [alone(model, answer) for answer in answers]
    assert sorted(found) == list(range(len(answers)))
    assert [found[index][1] for index in range(len(answers))] == [greedy for _, greedy in expected]
    assert any(greedy for _, greedy in expected)
    scores = torch.tensor([found[index][0] for index in range(len(answers))])
    torch.testing.assert_close(scores, torch.tensor([score for score, _ in expected]))


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_scores_are_those_of_each_text_alone(family: str) -> None:
    model = tiny_model(family)
    assert can_share(model)
    check(model)


def test_a_model_without_its_first_attention_scores_as_alone() -> None:
    view = DecoderView(tiny_model())
    linears = tuple(f"model.layers.0.self_attn.{name}_proj" for name in "qkvo")
    apply_operations(view, [RemoveBlock(block="model.layers.0.attention", modules=linears)], {})
    check(view.model)


def test_a_recurrent_family_is_not_shared() -> None:
    assert not can_share(tiny_model("mamba"))


def test_shared_tokens_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = tiny_model(), 0
    forward = model.forward

    def counted(input_ids: Tensor, **options: Any) -> Any:  # noqa: ANN401
        nonlocal read
        read += input_ids.numel()
        return forward(input_ids, **options)

    monkeypatch.setattr(model, "forward", counted)
    context = tuple(range(20))
    answers = [Answer((*context, 30 + choice, 40, 41), 3) for choice in range(4)]
    together(model, answers)
    assert read == 20 + 4 * 2


def test_groups_share_half_and_stay_within_the_tokens_of_a_batch() -> None:
    def answer(*tokens: int) -> Answer:
        return Answer((*tokens, 0), 1)

    answers = [answer(1, 2, 3, 4), answer(9, 9), answer(1, 2, 3, 5), answer(1, 7, 7, 7)]
    assert grouped(answers, 100) == [Group((3,), 4), Group((0, 2), 3), Group((1,), 2)]
    # Two answers read one more token each, which is more than a batch may.
    assert max(len(group.members) for group in grouped(answers, 1)) == 1


def test_beginnings_of_a_batch_are_cut_to_the_shortest() -> None:
    groups = [Group((0, 1), 9), Group((2, 3), 8), Group((4,), 8), Group((5, 6), 6)]
    cut = [Group((0, 1), 8), Group((2, 3), 8)]
    assert list(batched(groups, 4)) == [cut, [groups[2]], [groups[3]]]
    assert list(batched(groups, 9)) == [[*cut, groups[2]], [groups[3]]]
    assert list(batched(groups, 1)) == [[group] for group in groups]
