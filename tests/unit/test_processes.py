import pytest
import torch

from grasp_lightning import processes
from grasp_lightning.data import windows
from grasp_lightning.data.windows import TokenWindows


@pytest.mark.parametrize("count", [1, 2, 5, 6, 7])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_process_has_as_many_batches_and_every_item_counts_once(
    count: int, size: int, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "num_processes", lambda: world)
    shares = []
    for rank in range(world):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        shares.append(processes.own_batches(range(count), size))
    assert len({len(share) for share in shares}) == 1
    counted = [item for share in shares for batch, counts in share if counts for item in batch]
    assert sorted(counted) == list(range(count))
    assert all(1 <= len(batch) <= size for share in shares for batch, _ in share)


def test_a_batch_for_company_has_no_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "num_processes", lambda: 2)
    monkeypatch.setattr(processes, "rank", lambda: 1)
    ids = torch.arange(12).view(3, 4)
    held_out = TokenWindows(ids, ids >= 0, ids % 4 > 0)
    own, company = windows.own_batches(held_out, 1)
    assert torch.equal(own["input_ids"], ids[1:2])
    assert torch.equal(own["targets"], held_out.targets[1:2])
    assert torch.equal(own["position_ids"], torch.arange(4)[None])
    assert not company["targets"].any()
    assert company["mask"].all()
