import mmap
import sys

import pytest
import torch

from grasp_lightning.evaluation.peak_memory import forget_peak, peak_bytes

CPU = torch.device("cpu")
SIZE = 200 * 2**20


def hold_for_a_moment() -> None:
    # New memory from the system: malloc may return memory that earlier tests freed.
    with mmap.mmap(-1, SIZE) as memory:
        for place in range(0, SIZE, mmap.PAGESIZE):
            memory[place] = 1


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can forget a peak")
def test_the_peak_counts_from_when_it_was_forgotten() -> None:
    hold_for_a_moment()
    with_it = peak_bytes(CPU)
    assert forget_peak(CPU)
    without_it = peak_bytes(CPU)
    assert without_it < with_it - SIZE / 2
    hold_for_a_moment()
    assert peak_bytes(CPU) > without_it + SIZE / 2


@pytest.mark.gpu
def test_the_peak_of_a_cuda_device_is_what_torch_allocated() -> None:
    device = torch.device("cuda")
    forget_peak(device)
    before = peak_bytes(device)
    torch.ones(SIZE, dtype=torch.uint8, device=device)
    assert peak_bytes(device) == before + SIZE
