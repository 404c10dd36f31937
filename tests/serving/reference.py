"""Greedy generation by transformers in this process, to compare servers with."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

PROMPTS = (
    "The capital of France is",
    "A list comprehension in Python is",
    "Once upon a time there was a",
    "To open a file for reading, call",
    "The quick brown fox",
    "Water boils at a temperature of",
    "def fibonacci(n):\n    ",
    "The three primary colours are",
)


class Greedy(NamedTuple):
    """What follows one prompt.

    Attributes:
        tokens: The most likely tokens, one after another.
        margins: How much more likely each is than the second, in nats.
        logprobs: Of the prompt, but for its first token, and of the tokens, in nats.
    """

    tokens: list[int]
    margins: list[float]
    logprobs: list[float]


def greedy(model: PreTrainedModel, prompt: Sequence[int], num_tokens: int) -> Greedy:
    """Generate, past any end-of-text token too."""
    ids, step, cache = list(prompt), torch.tensor([list(prompt)]), None
    with torch.no_grad():
        for _ in range(num_tokens):
            out = model(step, past_key_values=cache, use_cache=True)
            step, cache = out.logits[:, -1:].argmax(dim=-1), out.past_key_values
            ids.append(int(step))
        logprobs = model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
    top = logprobs[len(prompt) - 1 : -1].topk(2).values
    chosen = logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    return Greedy(ids[len(prompt) :], (top[:, 0] - top[:, 1]).tolist(), chosen.tolist())


def differences(expected: Sequence[Greedy], tokens: Sequence[Sequence[int]]) -> list[str]:
    """Say of each prompt whose tokens differ where, and how close the reference's choice was."""
    found = []
    for number, (reference, got) in enumerate(zip(expected, tokens, strict=True)):
        pairs = zip(reference.tokens, got, strict=True)
        place = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if place is not None:
            found.append(
                f"prompt {number}: token {place} is {got[place]}, expected "
                f"{reference.tokens[place]}, by a margin of {reference.margins[place]:.2g} nats"
            )
    return found
