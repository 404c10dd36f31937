"""Sums over tokens at both ends of a model, for each group of its tokens.

Legend: V tokens, d hidden size, G groups, T tokens of a window.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn

from grasp_lightning.errors import NumericsError
from grasp_lightning.linalg.precision import full_precision
from grasp_lightning.linalg.row_groups import frequency_groups
from grasp_lightning.linalg.triangles import pack_triangle, unpack_triangle
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.plan import row_group
from grasp_lightning.stats.base import Moments, Vocabulary, check_seen

CHUNK: Final = 64  # rows of logits that are squared at a time


class VocabularySums:
    """Sums the gradients of an embedding and the inputs of a head, in float32, window by window.

    Args:
        vocabulary: The two ends.
        counts: How often the text holds each token, ``(V,)``.
        frequencies: How often each token may occur, ``(V,)``, which decides on its group.
        features: d.
        device: Device of the sums.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        counts: Tensor,
        frequencies: Tensor,
        features: int,
        device: torch.device,
    ) -> None:
        self._names = vocabulary
        self._counts = counts.double().cpu()
        # As they are stored: a decision finds the same groups in them.
        self.frequencies = frequencies.float().cpu()
        self._groups = groups_of(vocabulary, self.frequencies).to(device)
        number = int(self._groups.max()) + 1
        self._members = nn.functional.one_hot(self._groups, number).float()  # (V, G)
        self._num_windows = {vocabulary.embedding: 0, vocabulary.head: 0}
        grams = (number, features, features)
        self.sums = {
            "gradients": torch.zeros(grams, device=device),
            "states": torch.zeros(grams, device=device),
            "squares": torch.zeros(len(counts), device=device),
        }

    @torch.no_grad()
    def add_embedding(self, ids: Tensor, gradient: Tensor) -> None:
        """Add one window of the embedding: ids ``(T,)``, gradient of its output ``(T, d)``."""
        self._num_windows[self._names.embedding] += 1
        # Of a row: the output is the scaled row.
        gradient, groups = gradient.float() * self._names.scale, self._groups[ids]
        with full_precision(gradient.device):
            for group in torch.unique(groups).tolist():
                own = gradient[groups == group]
                self.sums["gradients"][group].addmm_(own.mT, own)

    @torch.no_grad()
    def add_head(self, states: Tensor, gradient: Tensor) -> None:
        """Add one window of the head: inputs ``(T, d)``, gradient of the logits ``(T, V)``."""
        self._num_windows[self._names.head] += 1
        parts = (torch.split(tensor, CHUNK) for tensor in (states.float(), gradient))
        with full_precision(states.device):
            for x, part in zip(*parts, strict=True):
                squares = part.float().square()
                self.sums["squares"] += squares.sum(dim=0)
                for group, weights in enumerate((squares @ self._members).unbind(dim=1)):
                    self.sums["states"][group].addmm_((x * weights[:, None]).mT, x)

    def state(self) -> dict[str, Tensor]:
        """Return the sums so far on the CPU, Gram matrices as packed triangles."""
        return {k: (pack_triangle(v) if v.ndim > 1 else v).cpu() for k, v in self.sums.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore sums from ``state``."""
        for key, value in self.sums.items():
            stored = state[key].to(value)
            value.copy_(unpack_triangle(stored) if value.ndim > 1 else stored)

    def check_seen(self) -> None:
        """Raise ``ModelError`` if the model does not call one of both ends."""
        check_seen(self._num_windows, "it cannot be measured", "set method.embeddings=none")

    def mean(self, num_tokens: int) -> dict[str, Moments]:
        """Return the moments of all tokens and of each group, per real token of the text.

        - ``<embedding>``: ``input_square``, the smoothed frequency of each token, which decides on
          its group, and ``gradient_square``, the mean square of the gradient of its logit, both
          ``(V,)``.
        - ``row_group(<embedding>, g)``: ``gradient_gram``, the mean of ``e e^T`` over tokens of the
          group, times its share of all tokens, for gradients e by the embedded rows; and
          ``input_gram``, the mean of ``x x^T`` times the squared gradients of the group's logits.
          Both are ``(d, d)``. Gradients of a group that the text hardly holds are mixed with those
          of all tokens, as if d more of these were in the group. The group has the share of tokens
          that it has of the squared gradients of logits, the variance of the model's predictions:
          counts are too low for rare tokens.

        Raises:
            NumericsError: If a sum is NaN or infinite.
        """
        for key, value in self.sums.items():
            if not value.isfinite().all():
                raise NumericsError(
                    f"the {key} at the ends of the model are NaN or infinite; check the checkpoint "
                    "or compute in float32 (model.dtype, trainer.precision) if it is narrower"
                )
        found = {
            self._names.embedding: Moments(
                input_square=self.frequencies, gradient_square=self.sums["squares"] / num_tokens
            )
        }
        members, gradients = self._members.double().cpu(), self.sums["gradients"]
        squares = self.sums["squares"].double().cpu()
        shares, counts = squares @ members / squares.sum(), self._counts @ members
        prior = gradients.shape[-1]
        pooled = gradients.sum(dim=0) / num_tokens
        for group, (share, count) in enumerate(zip(shares.tolist(), counts.tolist(), strict=True)):
            mixed = (gradients[group] + prior * pooled) / (count + prior)
            found[row_group(self._names.embedding, group)] = Moments(
                gradient_gram=share * mixed, input_gram=self.sums["states"][group] / num_tokens
            )
        return found


def groups_of(vocabulary: Vocabulary, frequencies: Tensor) -> Tensor:
    """Return the group of each token, ``(V,)`` int64, on the CPU."""
    return frequency_groups(frequencies, torch.tensor(vocabulary.special, dtype=torch.int64))


class VocabularyObserver:
    """Passes what a backward pass shows at both ends of a model to ``VocabularySums``.

    All parameters must be frozen: the embedded tokens are detached and require grad, so that the
    backward pass ends there.
    """

    def __init__(self, view: DecoderView, vocabulary: Vocabulary, sums: VocabularySums) -> None:
        self._view = view
        self._names = vocabulary
        self._sums = sums

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hook the model during a ``with`` block."""
        embedding, head = (self._view.module(n) for n in (self._names.embedding, self._names.head))
        with ExitStack() as stack:
            stack.enter_context(embedding.register_forward_hook(self._embed))
            stack.enter_context(head.register_forward_hook(self._score))
            yield

    def _embed(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        leaf = output.detach().requires_grad_(True)
        leaf.register_hook(partial(self._add_embedding, args[0]))  # type: ignore[no-untyped-call]  # untyped in torch
        return leaf.clone()  # some families change it in place

    def _score(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            hook = partial(self._add_head, args[0].detach())
            output.register_hook(hook)  # type: ignore[no-untyped-call]  # untyped in torch

    def _add_embedding(self, ids: Tensor, gradient: Tensor) -> None:
        for own, part in zip(ids, gradient, strict=True):
            self._sums.add_embedding(own, part)

    def _add_head(self, states: Tensor, gradient: Tensor) -> None:
        for x, part in zip(states, gradient, strict=True):
            self._sums.add_head(x, part)
