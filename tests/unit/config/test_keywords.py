"""Keywords of a Python call describe what flags and files describe, with the same messages."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from grasp_lightning.config import CompensateConfig, CompressConfig, EvaluateConfig
from grasp_lightning.config.keywords import parse_keywords
from grasp_lightning.config.parsing import parse, to_dict, with_run_config
from grasp_lightning.errors import ConfigError


def parsed(**keywords: object) -> CompressConfig:
    return parse_keywords(CompressConfig, keywords, "compress")


@pytest.mark.parametrize(
    ("keywords", "argv"),
    [
        ({"removed_ratio": 0.2, "seed": 3}, ["--method.removed_ratio=0.2", "--seed=3"]),
        ({"method": {"removed_ratio": 0.2}}, ["--method.removed_ratio=0.2"]),
        ({"method": "grasp", "layers": (1, 2)}, ["--method.name=grasp", "--method.layers=[1,2]"]),
        ({"output_dir": Path("runs/x"), "overwrite": True}, ["--output_dir=runs/x", "--overwrite"]),
        ({"trainer": {"strategy": "fsdp"}}, ["--trainer.strategy=fsdp"]),
        ({"calibration": "pydoc"}, ["--calibration.source=pydoc"]),
        ({"calibration": ["pydoc", "c4"]}, ["--calibration.source=[pydoc,c4]"]),
        (
            {"calibration": {"source": "file", "path": Path("a.txt")}},
            ["--calibration.source=file", "--calibration.path=a.txt"],
        ),
        ({"model": {"path": "a", "dtype": "float32"}}, ["--model.dtype=float32"]),
        ({"removed_ratio": None, "keep_ratio": 0.5}, ["--method.keep_ratio=0.5"]),
    ],
)
def test_keywords_mean_what_flags_mean(keywords: dict[str, Any], argv: list[str]) -> None:
    expected = parse(CompressConfig, "cli.py compress", ["--model.path=a", *argv])
    assert parsed(**{"model": "a", **keywords}) == expected


def test_lists_of_names_may_be_one_name_or_several() -> None:
    for corpora in ("pydoc,c4", ["pydoc", "c4"], ("pydoc", "c4")):
        keywords = {"model": ["a"], "corpora": corpora, "tasks": "piqa"}
        config = parse_keywords(EvaluateConfig, keywords, "evaluate")
        assert (config.corpora, config.tasks) == (("pydoc", "c4"), ("piqa",))
    lora = {"targets": "q_proj"}
    trained = parse_keywords(CompensateConfig, {"model": "a", "lora": lora}, "compensate")
    assert trained.lora.targets == ("q_proj",)


@pytest.mark.parametrize("asked", [{}, {"name": "grasp"}, {"name": "low_rank", "preset": "asvd"}])
def test_keys_of_an_earlier_run_are_taken_over_as_by_the_program(
    asked: dict[str, str], tmp_path: Path
) -> None:
    flags = ["--model.path=a", "--method.name=grasp", "--method.num_layers=3", "--seed=5"]
    run = parse(CompressConfig, "cli.py compress", [*flags, "--method.terms=sigma"])
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(run)))
    argv = [f"--from_scores={tmp_path}", "--method.keep_ratio=0.3"]
    argv += [f"--method.{key}={value}" for key, value in asked.items()]

    config = parsed(from_scores=tmp_path, keep_ratio=0.3, method=asked)

    assert config == parse(CompressConfig, "cli.py compress", with_run_config(argv))
    assert (config.seed, config.method.num_layers) == (5, 3)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"remove_ratio": 0.2}, "compress: unknown key remove_ratio; did you mean removed_ratio?"),
        ({"calibration": {"num_sample": 3}}, "did you mean calibration.num_samples?"),
        ({"keep_ratio": "x"}, "compress: method.keep_ratio: expected a number or null, got 'x'"),
        ({"trainer": {"devices": 0}}, "trainer.devices must be at least 1, got 0"),
        ({"trainer": 2}, "compress: trainer: expected a section of keys, got 2"),
        ({"method": None}, "compress: method: expected a section of keys, got None"),
        ({"seed": None}, "seed: expected a whole number, got null"),
        ({"model": {"dtype": "float32"}}, "compress: model.path is not set"),
        ({"from_scores": "nowhere"}, "from_scores: nowhere is not a finished run with scores"),
        (
            {"keep_ratio": 0.2, "method": {"keep_ratio": 0.3}},
            "compress: keep_ratio is given twice, as 0.2 and in method, as 0.3; leave one out",
        ),
    ],
)
def test_a_mistake_is_one_line(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as told:
        parsed(**{"model": "a", **keywords})
    assert str(told.value).startswith(message) or message in str(told.value)
    assert "\n" not in str(told.value)


def test_keys_of_a_method_belong_to_calls_that_have_one() -> None:
    with pytest.raises(
        ConfigError, match=r"^compensate: unknown key removed_ratio; allowed: data,"
    ):
        parse_keywords(CompensateConfig, {"model": "a", "removed_ratio": 0.2}, "compensate")
