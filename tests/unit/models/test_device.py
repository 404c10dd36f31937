import pytest
import torch

from grasp_lightning.config import ModelConfig
from grasp_lightning.errors import ConfigError
from grasp_lightning.models.device import resolve_device
from tests.unit.models.loading_helpers import message


def test_an_unknown_device_is_refused_before_anything_is_read() -> None:
    text = message(ModelConfig(path="/none", device="gpu9"), ConfigError)

    assert text == "model.device: unknown device 'gpu9'; expected auto, cpu, cuda or cuda:<index>"


@pytest.mark.parametrize("name", ["cuda:99", "meta", "cpu:99"])
def test_a_device_that_the_machine_lacks_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"model.device: {name} is not available"):
        resolve_device(name)


def test_auto_takes_what_the_machine_has() -> None:
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        pytest.skip("this machine has no GPU")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    for name in ("auto", "cuda"):
        with pytest.raises(ConfigError, match=r"trainer\.devices asks for 1000 processes on this"):
            resolve_device(name)
