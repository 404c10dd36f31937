from functools import partial

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from grasp_lightning.config import CalibrationConfig
from grasp_lightning.data.datamodules import CalibrationData
from grasp_lightning.data.section_windows import calibration_windows
from grasp_lightning.data.self_text import Sampler
from grasp_lightning.data.windows import TokenWindows
from grasp_lightning.errors import ConfigError
from grasp_lightning.models.sampling import sample_text
from tests.conftest import tiny_model

BOS, SPECIAL = 256, {256, 257, 258}
CONFIG = CalibrationConfig(source="self", num_samples=20, seqlen=12)


@pytest.fixture
def sample() -> Sampler:
    return partial(sample_text, tiny_model())


def windows(
    config: CalibrationConfig, tokenizer: PreTrainedTokenizerFast, sample: Sampler, seed: int = 0
) -> TokenWindows:
    return calibration_windows(config, tokenizer, seed, sample=sample)


def test_the_model_writes_full_windows(tokenizer: PreTrainedTokenizerFast, sample: Sampler) -> None:
    written = windows(CONFIG, tokenizer, sample)
    assert written.input_ids.shape == (20, 12)
    assert written.mask.all()
    assert not written.targets[:, 0].any()
    assert written.targets[:, 1:].all()
    assert not set(written.input_ids[:, 0].tolist()) & SPECIAL
    assert int(written.input_ids.max()) < len(tokenizer)  # 260 ids in the model


def test_the_seed_alone_chooses_what_is_written(
    tokenizer: PreTrainedTokenizerFast, sample: Sampler
) -> None:
    hashes = [windows(CONFIG, tokenizer, sample, seed).sha256 for seed in (0, 0, 1)]
    assert hashes[0] == hashes[1] != hashes[2]


def test_windows_begin_with_bos_where_it_is_asked_for(
    tokenizer: PreTrainedTokenizerFast, sample: Sampler
) -> None:
    config = CalibrationConfig(source="self", num_samples=4, seqlen=8, add_bos=True)
    written = windows(config, tokenizer, sample)
    assert (written.input_ids[:, 0] == BOS).all()
    tokenizer.bos_token = None
    with pytest.raises(ConfigError, match="no beginning-of-sequence token; set add_bos: false"):
        windows(config, tokenizer, sample)


def test_own_text_is_mixed_with_other_text(
    tokenizer: PreTrainedTokenizerFast, sample: Sampler
) -> None:
    config = CalibrationConfig(source=("pydoc", "self"), num_samples=10, seqlen=12)
    mixed = {tuple(row) for row in windows(config, tokenizer, sample).input_ids.tolist()}
    for source in ("pydoc", "self"):
        alone = CalibrationConfig(source=source, num_samples=5, seqlen=12)
        rows = windows(alone, tokenizer, sample).input_ids.tolist()
        assert {tuple(row) for row in rows} <= mixed
    assert len(mixed) == 10


def test_a_data_module_writes_when_it_is_first_asked(
    tokenizer: PreTrainedTokenizerFast, sample: Sampler
) -> None:
    data = CalibrationData(CONFIG, tokenizer, seed=3, sample=sample)
    assert data.fingerprint["calibration"] == windows(CONFIG, tokenizer, sample, 3).sha256
    assert torch.equal(data.without([0]).windows.input_ids, data.windows.input_ids)


def test_without_a_model_nothing_can_be_written(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="source self needs sample"):
        calibration_windows(CONFIG, tokenizer, seed=0)
