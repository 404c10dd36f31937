"""Adapters through which lm-eval asks a model for log-likelihoods."""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from grasp_lightning.errors import ConfigError
from grasp_lightning.evaluation.shared_prefixes import Answer, batched, grouped, log_likelihoods
from grasp_lightning.progress.bars import track

Predict = Callable[[Sequence[Tensor]], Iterator[Tensor]]
"""Maps batches of token ids, each ``(B, T)``, to their logits, ``(B, T, V)``, in order."""

Request = tuple[tuple[str, str], list[int], list[int]]
"""Context and continuation as texts, then the token ids of each."""


def lm_eval_library() -> Any:  # noqa: ANN401  lm-eval has no usable types
    """Import lm-eval, an optional dependency that is slow to import."""
    try:
        import lm_eval.models.huggingface  # noqa: F401, PLC0415
        import lm_eval.tasks  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(
            f"tasks need lm-eval, which cannot be imported ({error}); install it with "
            "pip install 'grasp-lightning[eval]'"
        ) from error
    return lm_eval


@cache
def sharing_class() -> Any:  # noqa: ANN401  lm-eval has no usable types
    """Return a model class of lm-eval that reads what several texts begin with once.

    The results match lm-eval's own class, apart from rounding. The choices of a question
    begin with the question.
    """

    class Sharing(lm_eval_library().models.huggingface.HFLM):  # type: ignore[misc]  # untyped there
        """Groups the requests; those that share nothing run as in lm-eval."""

        def _loglikelihood_tokens(
            self,
            requests: list[Request],
            disable_tqdm: bool = False,
            override_bs: int | None = None,
        ) -> list[tuple[float, bool]]:
            most = self.max_length + 1
            answers = [
                Answer(tuple([*context, *end][-most:]), len(end)) for _, context, end in requests
            ]
            size = override_bs or self.batch_size
            longest = max((len(answer.tokens) for answer in answers), default=0)
            groups = grouped(answers, size * longest)
            alone = [group.members[0] for group in groups if len(group.members) == 1]
            plain = super()._loglikelihood_tokens(
                [requests[index] for index in alone], disable_tqdm, override_bs
            )
            found: dict[int, tuple[float, bool]] = dict(zip(alone, plain, strict=True))
            together = [group for group in groups if len(group.members) > 1]
            for batch in track(list(batched(together, size)), "answer questions"):
                for index, score, is_greedy in log_likelihoods(self.model, answers, batch):
                    found[index] = score, is_greedy
            return [found[index] for index in range(len(requests))]

    return Sharing


@cache
def gathering_class() -> Any:  # noqa: ANN401  lm-eval has no usable types
    """Return a model class of lm-eval that computes the logits of all its requests together."""

    class Gathering(lm_eval_library().models.huggingface.HFLM):  # type: ignore[misc]  # untyped there
        """Collects the batches of all requests first; these are the same each time.

        The windows of long texts, which lm-eval answers in groups, are collected together, too.

        Args:
            predict: As in ``Harness.run``.
            task: Name of the task, for messages.
            **options: Arguments of lm-eval's class.
        """

        # Any: lm-eval has no usable types for requests and results.

        def __init__(self, predict: Predict, task: str, **options: Any) -> None:  # noqa: ANN401
            super().__init__(**options)
            self._predict = predict
            self._task = task
            self._collected: list[Tensor] | None = None
            self._logits: Iterator[Tensor] = iter(())

        def _model_call(self, inps: Tensor, *_: object, **__: object) -> Tensor:
            if self._collected is None:
                return next(self._logits)
            self._collected.append(inps.cpu())
            return torch.zeros((), device=inps.device).expand(*inps.shape, self.vocab_size)

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
            return self._from_one_sweep(super().loglikelihood, requests, disable_tqdm)

        def loglikelihood_rolling(
            self, requests: list[Any], disable_tqdm: bool = False
        ) -> list[Any]:
            return self._from_one_sweep(super().loglikelihood_rolling, requests, disable_tqdm)

        def _from_one_sweep(
            self, answer: Callable[..., list[Any]], requests: list[Any], disable_tqdm: bool
        ) -> list[Any]:
            collected: list[Tensor] = []
            self._collected = collected
            answer(requests, disable_tqdm=True)
            self._collected, self._logits = None, self._predict(collected)
            found = answer(requests, disable_tqdm=disable_tqdm)
            assert next(self._logits, None) is None  # which also ends the sweep
            return found

        def generate_until(self, *_: object, **__: object) -> list[str]:
            raise ConfigError(
                f"tasks: {self._task} lets the model generate text, and each token would have to "
                "read all layers: leave the task out, or set loading=whole"
            )

    return Gathering
