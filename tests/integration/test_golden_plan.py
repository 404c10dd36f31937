"""The plan of a tiny model stays byte-equal: a change of numbers updates the file and says why."""

from pathlib import Path

import torch

from grasp_lightning.callbacks import TrainerMeasure
from grasp_lightning.config import CalibrationConfig, MethodConfig
from grasp_lightning.data.datamodules import CalibrationData
from grasp_lightning.data.windows import TokenWindows
from grasp_lightning.methods import build_method, resolve_method
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.loading import model_hash
from grasp_lightning.pipeline import compress
from grasp_lightning.plan import Plan
from tests.conftest import byte_tokenizer, tiny_model

GOLDEN = Path(__file__).parents[1] / "reference" / "golden_plan.json"


def seeded_windows(count: int = 6, length: int = 40) -> TokenWindows:
    ids = torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(1))
    targets = torch.ones_like(ids, dtype=torch.bool)
    targets[:, 0] = False
    return TokenWindows(ids, torch.ones_like(targets), targets)


def tiny_plan() -> Plan:
    model, config = tiny_model(), CalibrationConfig(batch_size=2)
    data = CalibrationData(config, byte_tokenizer(), windows=seeded_windows())
    method = build_method(
        resolve_method(MethodConfig(name="grasp", num_layers=2, keep_ratio=0.3)), DecoderView(model)
    )
    inputs = {"model": model_hash(model), **data.fingerprint}
    plan = Plan(method=method.name, options=method.options, inputs=inputs)
    measure = TrainerMeasure(data, progress=False)
    return compress(DecoderView(model), method, measure, plan, lambda *_: None)


def test_the_plan_of_a_tiny_model_is_byte_equal_to_the_golden_one() -> None:
    assert tiny_plan().to_json() == GOLDEN.read_text(encoding="utf-8")
