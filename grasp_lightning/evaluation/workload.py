"""The work of a throughput measurement: prefill of one prompt, cached decoding of a batch.

Legend: B sequences, T tokens of a prompt.
"""

import gc
import inspect
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grasp_lightning.errors import ModelError

Kind = Literal["prefill", "decode"]


class Setting(NamedTuple):
    """One point on an axis of the measurement.

    Attributes:
        kind: What is timed.
        size: Tokens of the prompt (prefill), or sequences decoded together (decode).
    """

    kind: Kind
    size: int


class Sample(NamedTuple):
    """One measurement of one model at one setting.

    Attributes:
        seconds: Time of the tokens that the setting counts.
        first_token_seconds: Time until the first new token is known; None for decode.
    """

    seconds: float
    first_token_seconds: float | None


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The work that every model is measured on.

    Attributes:
        prefill_lengths: Tokens of the prompts whose prefill is timed, one prompt at a time.
        decode_batch_sizes: Numbers of sequences decoded together.
        prompt_length: Tokens per sequence before decoding; not timed.
        new_tokens: Tokens to decode per sequence.
        num_rounds: Measurements of each model at each setting.
        seed: Seed of the prompts and of the order.
        vocabulary: Upper bound of token ids in prompts, exclusive.
    """

    prefill_lengths: tuple[int, ...]
    decode_batch_sizes: tuple[int, ...]
    prompt_length: int
    new_tokens: int
    num_rounds: int
    seed: int
    vocabulary: int

    @property
    def settings(self) -> tuple[Setting, ...]:
        """Every setting, prefill first."""
        prefill = (Setting("prefill", length) for length in self.prefill_lengths)
        return (*prefill, *(Setting("decode", size) for size in self.decode_batch_sizes))

    @property
    def largest(self) -> tuple[Setting, Setting]:
        """The longest prefill and the largest decoded batch."""
        return (
            Setting("prefill", max(self.prefill_lengths)),
            Setting("decode", max(self.decode_batch_sizes)),
        )

    def num_tokens(self, setting: Setting) -> int:
        """Return how many tokens a setting counts: of the prompt, or decoded over all sequences."""
        return setting.size if setting.kind == "prefill" else setting.size * self.new_tokens

    def prompt(self, setting: Setting) -> Tensor:
        """Return a setting's random token ids, ``(B, T)``, int64, the same at every call."""
        decode_shape = (setting.size, self.prompt_length)
        shape = (1, setting.size) if setting.kind == "prefill" else decode_shape
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(self.vocabulary, shape, generator=generator)


class Stopwatch:
    """Times work on a device; CUDA events avoid waits for the host."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: list[torch.cuda.Event] = []
        self._times: list[float] = []

    def start(self) -> None:
        """Wait until the device is idle, and mark the start."""
        self._synchronize()
        self.mark()

    def mark(self) -> None:
        """Mark the moment when all work so far is done."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # untyped there
            event.record(torch.cuda.current_stream(self._device))
            self._events.append(event)
        else:
            self._synchronize()
            self._times.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Return the seconds from ``start`` to each later ``mark``."""
        if self._device.type == "cuda":
            self._synchronize()
            return [self._events[0].elapsed_time(event) / 1000 for event in self._events[1:]]
        return [moment - self._times[0] for moment in self._times[1:]]

    def _synchronize(self) -> None:
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)


def time_setting(model: PreTrainedModel, workload: Workload, setting: Setting) -> Sample:
    """Run a model in eval mode once at one setting; fails like ``decode_greedily``."""
    prompt = workload.prompt(setting).to(model.device)
    watch = Stopwatch(model.device)
    with torch.inference_mode(), _no_garbage_collection():
        if setting.kind == "prefill":
            _prefill(model, prompt, watch)
            forward, first_token = watch.seconds()
            return Sample(forward, first_token)
        decode_greedily(model, prompt, workload.new_tokens, watch)
        return Sample(watch.seconds()[-1], None)


def decode_greedily(
    model: PreTrainedModel, prompt: Tensor, new_tokens: int, watch: Stopwatch
) -> Tensor:
    """Decode a batch token by token with a key-value cache; only the decoding is timed.

    Args:
        model: The model in eval mode.
        prompt: Token ids on the model's device, ``(B, T)``.
        new_tokens: Number of timed steps.
        watch: An unused stopwatch, started before the first step and marked after the last.

    Returns:
        Token ids after the prompt, ``(B, new_tokens + 1)``: the prefill gives the first.

    Raises:
        ModelError: If the model keeps no cache.
    """
    output = _prefill(model, prompt, Stopwatch(model.device))
    cache = getattr(output, "past_key_values", None)
    if cache is None:
        raise ModelError(f"{type(model).__name__} keeps no cache of keys and values to decode with")
    options = cache_options(model)
    tokens = [_likeliest(output)]
    watch.start()
    for _ in range(new_tokens):
        output = model(input_ids=tokens[-1], past_key_values=cache, **options)
        cache = output.past_key_values
        tokens.append(_likeliest(output))
    watch.mark()
    return torch.cat(tokens, dim=1)


def _prefill(model: PreTrainedModel, prompt: Tensor, watch: Stopwatch) -> Any:  # noqa: ANN401  each family has an output class of its own
    """Run the prompt, and mark the ends of the forward pass and of the choice of a token."""
    options = cache_options(model)
    watch.start()
    output = model(input_ids=prompt, **options)
    watch.mark()
    _likeliest(output)
    watch.mark()
    return output


def _likeliest(output: Any) -> Tensor:  # noqa: ANN401  each family has an output class of its own
    logits: Tensor = output.logits
    return logits[:, -1:].argmax(dim=-1)  # (B, 1)


def cache_options(model: PreTrainedModel, positions: int = 1) -> dict[str, int | bool]:
    """Return keyword arguments for a forward pass that keeps a cache, as ``generate`` passes them.

    A model that can computes the logits of the last ``positions`` only.
    """
    takes_limit = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {"use_cache": True, **({"logits_to_keep": positions} if takes_limit else {})}


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Disable garbage collection during a measurement."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def out_of_memory_as_model_error(name: str) -> Iterator[None]:
    """Turn a device's out-of-memory error into a ``ModelError`` that names the model."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"the device has too little memory to run {name}; use smaller prefill_lengths and "
            "decode_batch_sizes, or compare fewer models"
        ) from error
