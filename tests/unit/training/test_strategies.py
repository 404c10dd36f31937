import pytest
import torch

from grasp_lightning.config import Strategy
from grasp_lightning.errors import ConfigError
from grasp_lightning.training import strategies
from grasp_lightning.training.strategies import (
    CompensationDeepSpeed,
    CompensationFSDP,
    check_strategy,
    sharded_strategy,
)


@pytest.mark.parametrize(
    ("name", "stage", "offloaded"),
    [
        ("deepspeed_stage_1", 1, set()),
        ("deepspeed_stage_2", 2, set()),
        ("deepspeed_stage_3", 3, set()),
        ("deepspeed_stage_2_offload", 2, {"offload_optimizer"}),
        ("deepspeed_stage_3_offload", 3, {"offload_optimizer", "offload_param"}),
    ],
)
def test_names_of_deepspeed_mean_what_they_mean_to_lightning(
    name: Strategy, stage: int, offloaded: set[str]
) -> None:
    strategy = sharded_strategy(name, gradient_clip=0.5)
    assert isinstance(strategy, CompensationDeepSpeed)
    assert isinstance(strategy.config, dict)
    zero = strategy.config["zero_optimization"]
    assert zero["stage"] == stage
    assert {key for key in zero if key.startswith("offload")} == offloaded
    assert all(zero[key]["device"] == "cpu" for key in offloaded)
    assert strategy.config["gradient_clipping"] == 0.5
    assert strategy.config["zero_force_ds_cpu_optimizer"] is False


def test_no_gradient_clip_clips_nothing() -> None:
    strategy = sharded_strategy("deepspeed_stage_2", gradient_clip=None)
    assert isinstance(strategy, CompensationDeepSpeed)
    assert isinstance(strategy.config, dict)
    assert strategy.config["gradient_clipping"] == 0


def test_fsdp_needs_no_other_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategies, "find_spec", lambda _: None)
    check_strategy("fsdp", torch.device("cpu"))
    assert isinstance(sharded_strategy("fsdp", 1.0), CompensationFSDP)


def test_a_missing_deepspeed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategies, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'grasp-lightning\[deepspeed\]'"):
        check_strategy("deepspeed_stage_2", torch.device("cuda", 0))


@pytest.mark.parametrize(
    ("device", "message"),
    [("cpu", "needs CUDA devices, but the model is on cpu"), ("cuda:1", "CUDA_VISIBLE_DEVICES")],
)
def test_deepspeed_runs_on_the_first_cuda_device(device: str, message: str) -> None:
    check_strategy("deepspeed_stage_3", torch.device("cuda", 0))
    with pytest.raises(ConfigError, match=message):
        check_strategy("deepspeed_stage_3", torch.device(device))
