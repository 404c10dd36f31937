import math
import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from grasp_lightning.data.windows import TokenWindows, batches
from grasp_lightning.errors import NumericsError
from grasp_lightning.evaluation.perplexity import Perplexity, evaluate_perplexity
from grasp_lightning.models.decoder import DecoderView
from tests.conftest import tiny_model


def random_batch(batch: int = 3, length: int = 10, seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(seed))
    targets = torch.ones_like(ids, dtype=torch.bool)
    targets[:, 0] = False
    return {"input_ids": ids, "mask": torch.ones_like(targets), "targets": targets}


def test_perplexity_is_that_of_the_model_s_own_loss() -> None:
    model, batch = tiny_model(), random_batch()
    expected = math.exp(model(batch["input_ids"], labels=batch["input_ids"]).loss.item())
    assert evaluate_perplexity(DecoderView(model), [batch]) == pytest.approx(expected, rel=1e-5)


def test_every_token_weighs_the_same_whatever_its_batch() -> None:
    model, batch = tiny_model(), random_batch()
    batch["targets"][1, 5:] = False
    rows = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(3)]
    one, split = (
        evaluate_perplexity(DecoderView(model), [batch]),
        evaluate_perplexity(DecoderView(model), rows),
    )
    assert split == pytest.approx(one, rel=1e-6)


def test_padding_does_not_count() -> None:
    model, batch = tiny_model(), random_batch(1, 10)
    padded = {key: torch.nn.functional.pad(value, (0, 4)) for key, value in batch.items()}
    assert evaluate_perplexity(DecoderView(model), [padded]) == pytest.approx(
        evaluate_perplexity(DecoderView(model), [batch]), rel=1e-5
    )


def test_states_add_up_as_they_do_over_processes() -> None:
    losses = torch.rand(10)
    whole, left, right = Perplexity(), Perplexity(), Perplexity()
    whole.update(losses)
    left.update(losses[:3])
    right.update(losses[3:])
    merged = Perplexity()
    merged.loss_sum = left.loss_sum + right.loss_sum
    merged.num_tokens = left.num_tokens + right.num_tokens
    merged._update_count = 2
    assert merged.compute().item() == pytest.approx(whole.compute().item(), rel=1e-12)


def test_a_nan_loss_is_an_error_not_a_number() -> None:
    model = tiny_model()
    model.get_parameter("model.embed_tokens.weight").data.fill_(float("nan"))
    with pytest.raises(
        NumericsError, match="NaN or infinite, first in the output of decoder layer 0"
    ):
        evaluate_perplexity(DecoderView(model), [random_batch()])


def seven_windows() -> TokenWindows:
    """Windows that neither two processes nor their own length divide; the last one is padded."""
    batch = random_batch(7, 10)
    batch["mask"][6, 4:] = batch["targets"][6, 4:] = False
    return TokenWindows(batch["input_ids"], batch["mask"], batch["targets"])


def evaluate_in_process(rank: int, world_size: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world_size
    )
    windows = seven_windows()
    own = windows.select(range(rank, len(windows), world_size))
    value = evaluate_perplexity(DecoderView(tiny_model()), batches(own, 1))
    (folder / f"{rank}").write_text(repr(value))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_find_the_perplexity_of_one(tmp_path: Path) -> None:
    windows, model, losses = seven_windows(), tiny_model(), []
    for ids, mask in zip(windows.input_ids, windows.mask, strict=True):
        window = ids[mask]
        with torch.no_grad():
            log_probs = model(window[None]).logits[0].log_softmax(-1)
        losses += [-float(log_probs[i - 1, window[i]]) for i in range(1, len(window))]
    expected = math.exp(math.fsum(losses) / len(losses))
    one = evaluate_perplexity(DecoderView(model), batches(windows, 2))
    assert one == pytest.approx(expected, rel=1e-5)
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=evaluate_in_process, args=(rank, 2, tmp_path)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    both = [float((tmp_path / f"{rank}").read_text()) for rank in range(2)]
    assert both[0] == both[1]
    assert both[0] == pytest.approx(one, rel=1e-6)
