from pathlib import Path

import pytest
import torch
from torch import nn

from grasp_lightning.config import OptimizerConfig
from grasp_lightning.config.compensate import OptimizerName
from grasp_lightning.training.compensation.optimizer import make_optimizer, rate_share

CONFIG = OptimizerConfig(learning_rate=0.01, weight_decay=0.1)
SIZE = 64  # of a weight with as many values as 8-bit states need


def weight() -> nn.Parameter:
    return nn.Parameter(torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(0)))


def gradient(step: int) -> torch.Tensor:
    return torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(step + 1))


def naive_adamw(steps: int) -> torch.Tensor:
    """Loshchilov and Hutter, arXiv:1711.05101, Algorithm 2, in float64."""
    value = weight().detach().double()
    mean, square = torch.zeros_like(value), torch.zeros_like(value)
    for step in range(steps):
        grad = gradient(step).double()
        mean = CONFIG.beta1 * mean + (1 - CONFIG.beta1) * grad
        square = CONFIG.beta2 * square + (1 - CONFIG.beta2) * grad**2
        first = mean / (1 - CONFIG.beta1 ** (step + 1))
        second = square / (1 - CONFIG.beta2 ** (step + 1))
        value = value * (1 - CONFIG.learning_rate * CONFIG.weight_decay)
        value = value - CONFIG.learning_rate * first / (second.sqrt() + CONFIG.epsilon)
    return value


@pytest.mark.parametrize(
    ("name", "is_sharded", "tolerance"),
    [("adamw", False, 1e-4), ("adamw", True, 1e-4), ("adamw_8bit", False, 0.05)],
)
def test_every_optimizer_is_adamw_and_continues_from_its_checkpoint_bit_for_bit(
    name: OptimizerName, is_sharded: bool, tolerance: float, tmp_path: Path
) -> None:
    config = OptimizerConfig(name=name, learning_rate=0.01, weight_decay=0.1)
    values = []
    for resumes in (False, True):
        parameter = weight()
        optimizer = make_optimizer(config, [parameter], is_sharded=is_sharded)
        for step in range(6):
            if resumes and step == 3:
                torch.save(optimizer.state_dict(), tmp_path / "state.pt")
                optimizer = make_optimizer(config, [parameter], is_sharded=is_sharded)
                optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
            parameter.grad = gradient(step)
            optimizer.step()
        values_of = optimizer.state[parameter].values()
        dtypes = {value.dtype for value in values_of if torch.is_tensor(value)}
        assert (torch.uint8 in dtypes) == (name == "adamw_8bit")
        values.append(parameter.detach())
    assert torch.equal(*values)
    moved = float((naive_adamw(6) - weight().detach()).abs().max())
    assert float((values[0] - naive_adamw(6)).abs().max()) < tolerance * moved


def test_a_planned_warm_up_takes_at_most_a_tenth_of_the_steps() -> None:
    config = OptimizerConfig(warmup_steps=100, schedule="linear")
    rates = [rate_share(config, step, 40, is_limited=True) for step in range(41)]
    assert rates[:5] == [0, 0.25, 0.5, 0.75, 1]
    assert rates[4:] == pytest.approx([1 - step / 36 for step in range(37)])
    assert rate_share(config, 4, None, is_limited=True) == 0.04  # not planned yet
    assert rate_share(config, 500, None, is_limited=True) == 1
    assert rate_share(config, 99, 2000, is_limited=True) == 0.99
