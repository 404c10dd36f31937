import time

import pytest
import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from grasp_lightning.errors import ModelError
from grasp_lightning.evaluation.workload import (
    Setting,
    Stopwatch,
    Workload,
    decode_greedily,
    time_setting,
)
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.surgery import apply_operations
from tests.conftest import ALL_FAMILIES, FAMILIES, VOCABULARY, tiny_model
from tests.unit.models.helpers import factorize_layers

PREFILL, DECODE = Setting("prefill", 16), Setting("decode", 3)
SLOW = tuple(family for family in ALL_FAMILIES if family not in FAMILIES)


def workload(vocabulary: int = VOCABULARY) -> Workload:
    return Workload(
        prefill_lengths=(8, 16),
        decode_batch_sizes=(1, 3),
        prompt_length=6,
        new_tokens=4,
        num_rounds=2,
        seed=7,
        vocabulary=vocabulary,
    )


def embedded_shapes(model: PreTrainedModel) -> list[tuple[int, ...]]:
    """Return a list to which every forward pass adds the shape of its token ids."""
    shapes: list[tuple[int, ...]] = []
    model.get_input_embeddings().register_forward_pre_hook(
        lambda _, args: shapes.append(tuple(args[0].shape))
    )
    return shapes


def slow_prompts(model: PreTrainedModel, seconds: float) -> None:
    """Delay a forward pass if it gets more than one token per sequence."""

    def wait(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        del module
        if args[0].shape[1] > 1:
            time.sleep(seconds)

    model.get_input_embeddings().register_forward_pre_hook(wait)


def decoded(model: PreTrainedModel, prompt: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return decode_greedily(model, prompt, 11, Stopwatch(model.device))


def generated(model: PreTrainedModel, prompt: torch.Tensor) -> torch.Tensor:
    output = model.generate(  # type: ignore[operator]  # a mixin's method
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=12,
        min_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    tokens: torch.Tensor = output[:, prompt.shape[1] :]
    return tokens


@pytest.mark.parametrize(
    "family", [*FAMILIES, *(pytest.param(family, marks=pytest.mark.slow) for family in SLOW)]
)
def test_what_is_timed_decodes_the_tokens_that_generate_gives(family: str) -> None:
    model, prompt = tiny_model(family), workload().prompt(DECODE)
    assert torch.equal(decoded(model, prompt), generated(model, prompt))


def test_a_compressed_model_decodes_the_tokens_that_generate_gives() -> None:
    view = DecoderView(tiny_model())
    operations, tensors = factorize_layers(view, (1, 2), rank=5)
    apply_operations(view, operations, tensors)
    prompt = workload().prompt(DECODE)
    assert torch.equal(decoded(view.model, prompt), generated(view.model, prompt))


def test_decoding_runs_the_prompt_once_and_then_one_token_at_a_time() -> None:
    model = tiny_model()
    shapes = embedded_shapes(model)
    time_setting(model, workload(), DECODE)
    assert shapes == [(3, 6), (3, 1), (3, 1), (3, 1), (3, 1)]


@pytest.mark.parametrize("setting", [PREFILL, DECODE])
def test_only_the_logits_of_the_last_position_are_computed(setting: Setting) -> None:
    model, lengths = tiny_model(), set()

    def note(module: object, args: object, output: CausalLMOutputWithPast) -> None:
        del module, args
        assert output.logits is not None
        lengths.add(output.logits.shape[1])

    model.register_forward_hook(note)
    time_setting(model, workload(), setting)
    assert lengths == {1}


def test_the_prompt_counts_for_prefill_and_not_for_decoding() -> None:
    model = tiny_model()
    slow_prompts(model, 0.5)
    assert time_setting(model, workload(), PREFILL).seconds >= 0.5
    assert time_setting(model, workload(), DECODE).seconds < 0.5


def test_the_first_token_comes_after_the_prefill() -> None:
    sample = time_setting(tiny_model(), workload(), PREFILL)
    assert sample.first_token_seconds is not None
    assert sample.first_token_seconds > sample.seconds > 0
    assert time_setting(tiny_model(), workload(), DECODE).first_token_seconds is None


def test_all_models_get_the_same_prompts_from_the_smallest_vocabulary() -> None:
    first, second = workload(5).prompt(PREFILL), workload(5).prompt(PREFILL)
    assert torch.equal(first, second)
    assert first.shape == (1, 16)
    assert set(first.flatten().tolist()) == {0, 1, 2, 3, 4}
    assert workload(5).prompt(DECODE).shape == (3, 6)


def test_counted_tokens_are_those_of_the_prompt_or_those_decoded_over_the_batch() -> None:
    assert workload().num_tokens(PREFILL) == 16
    assert workload().num_tokens(DECODE) == 3 * 4


def test_a_model_without_a_cache_is_named() -> None:
    model = tiny_model()

    def forget(module: object, args: object, output: CausalLMOutputWithPast) -> None:
        del module, args
        output.past_key_values = None

    model.register_forward_hook(forget)
    with pytest.raises(ModelError, match="LlamaForCausalLM keeps no cache of keys and values"):
        time_setting(model, workload(), DECODE)


@pytest.mark.gpu
def test_cuda_events_measure_what_the_device_does() -> None:
    device = torch.device("cuda")
    watch, matrix = Stopwatch(device), torch.rand(4096, 4096, device=device)
    start = time.perf_counter()
    watch.start()
    for _ in range(20):
        matrix @ matrix
    watch.mark()
    (seconds,) = watch.seconds()
    assert 0 < seconds <= time.perf_counter() - start
