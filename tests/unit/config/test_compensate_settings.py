import sys
from dataclasses import replace
from typing import Any, Literal

import pytest

from grasp_lightning.config import (
    CompensateConfig,
    DistillationConfig,
    InstructionConfig,
    LoggersConfig,
    LoraSettings,
    ModelConfig,
    TextConfig,
    TrainerConfig,
    TrainingConfig,
)
from grasp_lightning.config.compensate_settings import check_settings, uses_instructions
from grasp_lightning.errors import ConfigError

NAN, LARGEST_SEED = float("nan"), 2**63 - 1
AT_LEAST_0_BELOW_1 = "at least 0 and below 1"


def config(**options: Any) -> CompensateConfig:  # noqa: ANN401  any key
    return CompensateConfig(model=ModelConfig(path="runs/first/model"), **options)


def with_key(given: CompensateConfig, key: str, value: object) -> CompensateConfig:
    """A configuration in which one dotted key has another value."""
    section, _, name = key.rpartition(".")
    changes: dict[str, Any] = {name: value}
    if section:
        changes = {section: replace(getattr(given, section), **changes)}
    return replace(given, **changes)


def refusal(given: CompensateConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        check_settings(given)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Defaults


def test_the_defaults_are_the_published_settings() -> None:
    """Liu et al., "GRASP", arXiv:2501.00339, Table 6."""
    given = config()
    training, data, lora, optimizer = given.training, given.data, given.lora, given.optimizer
    assert (given.preset, given.train, given.objective) == ("paper", "lora", "instruction")
    assert (training.batch_size, training.micro_batch_size, training.epochs) == (32, 4, 1)
    assert (training.max_steps, training.keep) == (None, "last")
    assert (optimizer.learning_rate, optimizer.weight_decay) == (3e-4, 0.0)
    assert (data.source, data.max_length) == ("alpaca", 256)
    assert (data.train_on_inputs, data.add_eos) == (True, False)
    assert (lora.rank, lora.alpha, lora.dropout, lora.targets) == (256, 16, 0.05, ())
    check_settings(given)


def test_only_a_layer_local_training_streams_its_model() -> None:
    model = ModelConfig(path="runs/first/model", loading="streamed")
    teacher = DistillationConfig(teacher="models/dense")
    given = replace(config(objective="local", train="all", distillation=teacher), model=model)
    check_settings(given)
    for more, expected in (
        ({"objective": "distill"}, "objective distill trains the whole model: set objective=local"),
        ({"text": TextConfig(source=("pydoc", "self"))}, "the whole model would generate text"),
        ({"trainer": TrainerConfig(precision="bf16-mixed")}, "layers compute in their own dtype"),
        ({"trainer": TrainerConfig(num_nodes=2)}, "its processes share files"),
    ):
        assert refusal(replace(given, **more)).startswith(
            f"model.loading is streamed, but {expected}"
        )


# Bounds


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("seed", -1, f"from 0 to {LARGEST_SEED}"),
        ("seed", 2**63, f"from 0 to {LARGEST_SEED}"),
        ("lora.rank", 0, "at least 1"),
        ("lora.alpha", 0.0, "above 0"),
        ("lora.alpha", NAN, "above 0"),
        ("lora.dropout", -0.1, AT_LEAST_0_BELOW_1),
        ("lora.dropout", 1.0, AT_LEAST_0_BELOW_1),
        ("lora.dropout", NAN, AT_LEAST_0_BELOW_1),
        ("optimizer.learning_rate", 0.0, "above 0 and at most 1"),
        ("optimizer.learning_rate", -3e-4, "above 0 and at most 1"),
        ("optimizer.learning_rate", NAN, "above 0 and at most 1"),
        ("optimizer.weight_decay", -0.1, "at least 0"),
        ("optimizer.beta1", 1.0, AT_LEAST_0_BELOW_1),
        ("optimizer.beta1", -0.1, AT_LEAST_0_BELOW_1),
        ("optimizer.beta2", 1.0, AT_LEAST_0_BELOW_1),
        ("optimizer.beta2", -0.1, AT_LEAST_0_BELOW_1),
        ("optimizer.epsilon", 0.0, "above 0"),
        ("optimizer.warmup_steps", -1, "at least 0"),
        ("optimizer.gradient_clip", 0.0, "above 0"),
        ("optimizer.gradient_clip", NAN, "above 0"),
        ("training.epochs", 0, "at least 1"),
        ("training.max_steps", 0, "at least 1"),
        ("training.batch_size", 0, "at least 1"),
        ("training.micro_batch_size", 0, "at least 1"),
        ("training.validate_every", 0, "at least 1"),
        ("training.patience", 0, "at least 1"),
    ],
)
def test_a_number_out_of_range_is_named_with_its_bound(
    key: str, value: float, expected: str
) -> None:
    assert refusal(with_key(config(), key, value)) == f"{key} must be {expected}, got {value}"


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("distillation.temperature", 0.0, "above 0"),
        ("distillation.temperature", -1.0, "above 0"),
        ("distillation.mix", 0.0, "above 0 and at most 1"),
        ("distillation.mix", 1.1, "above 0 and at most 1"),
        ("distillation.mix", NAN, "above 0 and at most 1"),
    ],
)
def test_a_number_of_a_teacher_out_of_range_is_named_with_its_bound(
    key: str, value: float, expected: str
) -> None:
    given = config(objective="distill", distillation=DistillationConfig(teacher="dense"))
    assert refusal(with_key(given, key, value)) == f"{key} must be {expected}, got {value}"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 0),
        ("seed", LARGEST_SEED),
        ("lora.rank", 1),
        ("lora.dropout", 0.0),
        ("optimizer.weight_decay", 0.01),
        ("optimizer.beta1", 0.0),
        ("optimizer.beta2", 0.0),
        ("optimizer.warmup_steps", 0),
        ("optimizer.gradient_clip", None),
        ("optimizer.gradient_clip", 0.1),
        ("training.max_steps", None),
        ("training.max_steps", 1),
        ("training.batch_size", 1),
        ("training.micro_batch_size", 1),
        ("training.validate_every", 1),
        ("trainer.checkpoint_seconds", 0.0),
    ],
)
def test_numbers_at_their_bounds_are_accepted(key: str, value: float | None) -> None:
    check_settings(with_key(config(), key, value))


def test_a_teacher_alone_may_be_learned_from() -> None:
    teacher = DistillationConfig(teacher="dense", mix=1.0)
    check_settings(config(objective="distill", distillation=teacher))


# Keys without effect


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"train": "factors", "lora": LoraSettings(rank=8)},
            ("lora.rank is 8, but would be ignored: train: factors has no adapters; leave it out"),
        ),
        (
            {"train": "factors", "lora": LoraSettings(dropout=0.1)},
            (
                "lora.dropout is 0.1, but would be ignored: train: factors has no adapters; leave "
                "it out"
            ),
        ),
        (
            {"distillation": DistillationConfig(teacher="dense")},
            (
                "distillation.teacher is 'dense', but would be ignored: objective: instruction has "
                "no teacher; leave it out"
            ),
        ),
        (
            {"objective": "text", "distillation": DistillationConfig(mix=0.7)},
            (
                "distillation.mix is 0.7, but would be ignored: objective: text has no teacher; "
                "leave it out"
            ),
        ),
        (
            {"text": TextConfig(num_samples=7)},
            (
                "text.num_samples is 7, but would be ignored: "
                "the model is trained on instructions; leave it out"
            ),
        ),
        (
            {"objective": "text", "data": InstructionConfig(source="file")},
            (
                "data.source is 'file', but would be ignored: "
                "the model is trained on plain text; leave it out"
            ),
        ),
        (
            {
                "objective": "distill",
                "distillation": DistillationConfig(teacher="dense"),
                "text": TextConfig(seqlen=64),
            },
            (
                "text.seqlen is 64, but would be ignored: "
                "the model is trained on instructions; leave it out"
            ),
        ),
        (
            {
                "objective": "distill",
                "distillation": DistillationConfig(teacher="dense", data="text"),
                "data": InstructionConfig(add_eos=True),
            },
            (
                "data.add_eos is True, but would be ignored: "
                "the model is trained on plain text; leave it out"
            ),
        ),
    ],
)
def test_a_key_that_would_be_ignored_is_refused(options: dict[str, Any], message: str) -> None:
    assert refusal(config(**options)) == message


@pytest.mark.parametrize(
    "options",
    [
        {"lora": LoraSettings(rank=8)},
        {"train": "lora_on_factors", "lora": LoraSettings(rank=8)},
        {"train": "factors"},
        {"data": InstructionConfig(source="file", path="a.json")},
        {"objective": "text", "text": TextConfig(seqlen=64)},
        {
            "objective": "distill",
            "distillation": DistillationConfig(teacher="dense", data="text", temperature=2.0),
            "text": TextConfig(seqlen=64),
        },
        {
            "objective": "distill",
            "distillation": DistillationConfig(teacher="dense"),
            "data": InstructionConfig(add_eos=True),
        },
    ],
)
def test_keys_that_are_read_are_accepted(options: dict[str, Any]) -> None:
    check_settings(config(**options))


def test_distillation_without_a_teacher_is_refused() -> None:
    assert refusal(config(objective="distill")) == (
        "objective: distill needs distillation.teacher: the dense model, as a folder, hub name, "
        ".gguf file or smollm2"
    )


@pytest.mark.parametrize(
    ("objective", "data", "expected"),
    [
        ("instruction", "instruction", True),
        ("text", "instruction", False),
        ("distill", "instruction", True),
        ("distill", "text", False),
    ],
)
def test_the_objective_says_whether_instructions_are_learned(
    objective: str, data: Literal["instruction", "text"], expected: bool
) -> None:
    given = config(objective=objective, distillation=DistillationConfig(data=data))
    assert uses_instructions(given) is expected


# Validation


@pytest.mark.parametrize(
    ("key", "value"),
    [("patience", 3), ("keep", "best")],
)
def test_options_that_use_validations_need_some(key: str, value: object) -> None:
    without = with_key(config(), f"training.{key}", value)
    assert refusal(without) == (
        f"training.{key} is {value}, but would be ignored: set training.validate_every"
    )
    check_settings(with_key(without, "training.validate_every", 10))


@pytest.mark.parametrize(
    ("options", "section"),
    [
        ({"data": InstructionConfig(num_validation=0)}, "data"),
        ({"objective": "text", "text": TextConfig(num_validation=0)}, "text"),
        (
            {
                "objective": "distill",
                "distillation": DistillationConfig(teacher="dense", data="text"),
                "text": TextConfig(num_validation=0),
            },
            "text",
        ),
    ],
)
def test_validations_need_samples(options: dict[str, Any], section: str) -> None:
    check_settings(config(**options))
    every = TrainingConfig(validate_every=50)
    assert refusal(config(training=every, **options)) == (
        f"training.validate_every is 50, but {section}.num_validation is 0: set samples aside, or "
        "leave it out"
    )


# Packages


def test_8_bit_states_need_their_package_and_are_not_sharded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = with_key(config(), "optimizer.name", "adamw_8bit")
    assert refusal(with_key(given, "trainer.strategy", "deepspeed_stage_2")) == (
        "optimizer.name adamw_8bit cannot divide its states between processes, as "
        "trainer.strategy deepspeed_stage_2 does: use adamw, or trainer.strategy auto or ddp"
    )
    check_settings(given)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert refusal(given) == (
        "optimizer.name adamw_8bit needs the package bitsandbytes: pip install "
        "'grasp-lightning[quantize]', or use adamw"
    )


@pytest.mark.parametrize(
    ("loggers", "message"),
    [
        (
            LoggersConfig(wandb="project"),
            "loggers.wandb needs the package wandb: pip install wandb, or leave it out",
        ),
        (
            LoggersConfig(tensorboard=True),
            (
                "loggers.tensorboard needs the package tensorboard: pip install "
                "'grasp-lightning[tensorboard]', or leave it out"
            ),
        ),
    ],
)
def test_a_logger_whose_package_is_missing_is_refused(
    loggers: LoggersConfig, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("wandb", "tensorboard"):
        monkeypatch.setitem(sys.modules, package, None)
    check_settings(config())
    assert refusal(config(loggers=loggers)) == message
