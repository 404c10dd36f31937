"""Measured time of linears, dense and as factors of some rank.

Legend: N outputs, M inputs, T tokens.
"""

import math
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import Tensor
from torch.nn.functional import linear

from grasp_lightning import processes
from grasp_lightning.linalg.ranks import largest_useful_rank
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.stats.base import LinearSeconds, Shape

NUM_TOKENS = 512
_NUM_ROUNDS = (7, 51)  # least and most
_ALL_SECONDS = 5.0  # of all rounds, within these limits
_LEAST_SECONDS = 1e-3  # of a sample: shorter calls are repeated
_QUARTERS = (1, 2, 4)  # of the largest useful rank: where factors are measured
_ALIGNMENT = 8  # of these ranks, if they are that large
_LEAST_SLOPE = 1e-3  # share of the mean time that the largest measured rank costs at least


def linear_seconds(
    view: DecoderView, shapes: Sequence[Shape], num_tokens: int = NUM_TOKENS
) -> dict[Shape, LinearSeconds]:
    """Return how long linears of some shapes take, on the device and in the dtype of a model.

    The first of several processes measures for all, so that they decide alike.

    Args:
        view: The model; its weights are not read.
        shapes: ``(N, M)`` of each kind of linear.
        num_tokens: Tokens that a linear is given at once, T.

    Returns:
        Median times by shape.
    """
    if not shapes:
        return {}
    device, dtype = view.model.device, view.model.dtype
    return processes.on_first(lambda: _measured(shapes, num_tokens, device, dtype))


def fitted(dense: float, ranks: Sequence[int], seconds: Sequence[float]) -> LinearSeconds:
    """Return the line through times of factors that has the least squared error.

    A time falls with no rank, nor is any part of it negative: the line keeps to that.

    Args:
        dense: Seconds of the dense linear.
        ranks: Ranks of the factors, ascending.
        seconds: Their times, one per rank.

    Returns:
        The costs, with ``fixed`` from 0 on and ``per_rank`` above 0.
    """
    mean_rank, mean = sum(ranks) / len(ranks), sum(seconds) / len(seconds)
    spread = sum((rank - mean_rank) ** 2 for rank in ranks)
    shared = sum((k - mean_rank) * t for k, t in zip(ranks, seconds, strict=True))
    per_rank = shared / spread if spread > 0 else math.inf
    if mean < per_rank * mean_rank:  # the line that starts at zero
        squares = sum(rank**2 for rank in ranks)
        per_rank = sum(k * t for k, t in zip(ranks, seconds, strict=True)) / squares
        return LinearSeconds(dense=dense, fixed=0.0, per_rank=per_rank)
    per_rank = max(per_rank, _LEAST_SLOPE * mean / max(ranks))
    return LinearSeconds(dense=dense, fixed=mean - per_rank * mean_rank, per_rank=per_rank)


def measured_ranks(shape: Shape) -> tuple[int, ...]:
    """Return the ranks at which factors are measured.

    Args:
        shape: ``(N, M)`` of the linear.

    Returns:
        Up to three, ascending, from 1 on; the last is about the largest that saves parameters.
    """
    top = largest_useful_rank(*shape)
    ranks = {max(1, top * quarters // _QUARTERS[-1]) for quarters in _QUARTERS}
    return tuple(sorted({k - k % _ALIGNMENT if k >= _ALIGNMENT else k for k in ranks}))


def _measured(
    shapes: Sequence[Shape], num_tokens: int, device: torch.device, dtype: torch.dtype
) -> dict[Shape, LinearSeconds]:
    probes = [(shape, rank) for shape in shapes for rank in (None, *measured_ranks(shape))]
    sizes = [_size(shape, rank) for shape, rank in probes]
    # A generator of its own: calibration draws from the global one.
    generator = torch.Generator(device).manual_seed(0)
    with torch.inference_mode():
        numbers = torch.randn(max(sizes), generator=generator, device=device, dtype=dtype)
        width = max(columns for _, columns in shapes)
        x = torch.randn(num_tokens * width, generator=generator, device=device, dtype=dtype)
        calls = [_call(x, numbers, num_tokens, *probe) for probe in probes]
        seconds = dict(zip(probes, _medians(calls, device), strict=True))
    return {
        shape: fitted(
            seconds[shape, None],
            measured_ranks(shape),
            [seconds[shape, rank] for rank in measured_ranks(shape)],
        )
        for shape in shapes
    }


def _size(shape: Shape, rank: int | None) -> int:
    rows, columns = shape
    return rows * columns if rank is None else rank * (rows + columns)


def _call(
    x: Tensor, numbers: Tensor, num_tokens: int, shape: Shape, rank: int | None
) -> Callable[[], Tensor]:
    """Return one linear; all of them share the memory of their weights."""
    rows, columns = shape
    inputs = x[: num_tokens * columns].view(num_tokens, columns)
    if rank is None:
        weight = numbers[: rows * columns].view(rows, columns)
        return lambda: linear(inputs, weight)
    right = numbers[: rank * columns].view(rank, columns)
    left = numbers[rank * columns : rank * (rows + columns)].view(rows, rank)
    return lambda: linear(linear(inputs, right), left)


def _medians(calls: Sequence[Callable[[], Tensor]], device: torch.device) -> list[float]:
    """Return the median seconds of each call, measured in turns, so that drift meets them alike."""
    for call in calls:
        _seconds(call, 1, device)  # warm-up: kernels are chosen, memory is taken
    once = [max(_seconds(call, 1, device), 1e-6) for call in calls]
    counts = [math.ceil(_LEAST_SECONDS / seconds) for seconds in once]
    one_round = sum(count * seconds for count, seconds in zip(counts, once, strict=True))
    least, most = _NUM_ROUNDS
    rounds = [
        [_seconds(call, count, device) for call, count in zip(calls, counts, strict=True)]
        for _ in range(min(most, max(least, round(_ALL_SECONDS / one_round))))
    ]
    return [median(samples) for samples in zip(*rounds, strict=True)]


def _seconds(call: Callable[[], Tensor], count: int, device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        call()
    _synchronize(device)
    return (time.perf_counter() - start) / count


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
