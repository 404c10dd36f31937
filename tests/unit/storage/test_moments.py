from pathlib import Path

import pytest

from grasp_lightning.errors import PlanError
from grasp_lightning.run_folder import RunFolder
from grasp_lightning.storage.moments import MomentFiles


def test_damaged_statistics_are_named_when_a_run_resumes(tmp_path: Path) -> None:
    run = RunFolder.open(str(tmp_path / "run"), {}, overwrite=False, protected=[])
    assert MomentFiles(run).load("", "step") is None
    (run.root / "statistics.safetensors").write_bytes(b"damaged")
    with pytest.raises(PlanError, match=r"statistics.safetensors is damaged: .*; delete it"):
        MomentFiles(run).load("", "step")
