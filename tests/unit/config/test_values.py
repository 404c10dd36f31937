"""Values that no command can use, whatever the other keys say."""

import os
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any, get_args, get_origin, get_type_hints

import pytest

from grasp_lightning.config import (
    BenchmarkConfig,
    CompensateConfig,
    CompressConfig,
    EvaluateConfig,
    ExportConfig,
    ModelConfig,
    PlanConfig,
    TrainerConfig,
    TrimConfig,
)
from grasp_lightning.config.parsing import parse
from grasp_lightning.config.values import check_values
from grasp_lightning.errors import ConfigError
from grasp_lightning.launch import joined

INFINITE = (float("inf"), float("-inf"), float("nan"))
COMMANDS: dict[str, Any] = {
    "compress": CompressConfig(model=ModelConfig(path="m")),
    "plan": PlanConfig(model=ModelConfig(path="m")),
    "compensate": CompensateConfig(model=ModelConfig(path="m")),
    "evaluate": EvaluateConfig(model=("m",)),
    "benchmark": BenchmarkConfig(model="m"),
    "export": ExportConfig(model="m", output_dir="x"),
    "trim": TrimConfig(model=ModelConfig(path="m"), corpora=("pydoc",), output_dir="x"),
}
PATHS = (
    *("output_dir", "from_scores", "compensate", "model.path", "model.gguf_file", "output"),
    *("model", "corpora", "task_data", "against", "calibration.path", "evaluation.path"),
    *("data.path", "text.path", "distillation.teacher", "unnamed"),
)


def keys(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:  # noqa: ANN401  a dataclass
    """Yield (dotted key, type) of every value."""
    hints = get_type_hints(type(config))
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from keys(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, hints[field.name]


def refusal(config: Any, key: str, kind: Any, value: object) -> str:  # noqa: ANN401  any key
    """The message about a configuration in which one key has another value."""
    kinds = (kind,) if get_origin(kind) in (None, tuple) else get_args(kind)
    changed: Any = value if {int, float, str} & set(kinds) else (value,)
    section, _, name = key.rpartition(".")
    if section:
        changed = replace(getattr(config, section), **{name: changed})
        name = section
    with pytest.raises(ConfigError) as caught:
        check_values(replace(config, **{name: changed}))
    text = str(caught.value)
    assert text.startswith(key)
    assert "\n" not in text
    assert len(text) < 400
    return text


def holds(kind: Any, wanted: type) -> bool:  # noqa: ANN401  a type annotation
    return kind is wanted or any(holds(part, wanted) for part in get_args(kind))


@pytest.mark.parametrize("command", COMMANDS)
def test_no_number_is_infinite_or_absurd_and_no_text_ends_early(command: str) -> None:
    config = COMMANDS[command]
    for key, kind in keys(config):
        if holds(kind, int):
            for number in (10**20, -(10**20), 10**4000, 1 << 20_000):
                refusal(config, key, kind, number)
        if holds(kind, float):
            for infinite in INFINITE:
                assert "must " in refusal(config, key, kind, infinite)
        if holds(kind, str):
            assert "contains a NUL byte" in refusal(config, key, kind, "a\0b")
            assert "is not UTF-8 text" in refusal(config, key, kind, "a\udcff")
        if key in PATHS:
            assert "~nouser has no home folder" in refusal(config, key, kind, "~nouser/x")
            assert "File name too long" in refusal(config, key, kind, "a" * 300)


def test_a_count_is_named_with_its_bound() -> None:
    config = COMMANDS["compress"]
    assert (
        refusal(config, "statistics.measured_windows", int, 10**20)
        == "statistics.measured_windows must be at most 2147483647, got 100000000000000000000"
    )
    assert (
        refusal(config, "statistics.max_memory", float, float("inf"))
        == "statistics.max_memory must be a finite number, got inf"
    )
    assert (
        refusal(config, "method.keep_ratio", float, float("nan"))
        == "method.keep_ratio must be a finite number, got nan"
    )
    assert (
        refusal(COMMANDS["benchmark"], "prefill_lengths", tuple[int, ...], 10**20)
        == "prefill_lengths must hold numbers of at most 2147483647, got 100000000000000000000"
    )


def test_the_help_shows_the_range_of_a_number(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(CompensateConfig, "cli.py", ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "at least 0 and below 1" in shown
    assert "object at 0x" not in shown


def test_more_processes_than_a_machine_runs_are_refused() -> None:
    trainer = TrainerConfig(devices=1_000_000)
    with (
        pytest.raises(ConfigError, match=rf"1000000, but this machine has {os.cpu_count()} cores"),
        joined(trainer, "auto", "compress", []),
    ):
        pytest.fail("it has started")
