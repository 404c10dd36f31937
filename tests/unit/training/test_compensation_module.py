import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import PreTrainedModel

from grasp_lightning.callbacks import ExportMergedModel, TrainableParameters, TrainingHistory
from grasp_lightning.config import (
    BatchOrder,
    LearningRateSchedule,
    LoraSettings,
    OptimizerConfig,
    TrainingConfig,
    TrainMode,
)
from grasp_lightning.data.batching import TokenSamples
from grasp_lightning.data.datamodules import TrainingData, TrainingSamples
from grasp_lightning.errors import ModelError, NumericsError
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.lowrank import ranks_of
from grasp_lightning.models.surgery import apply_operations
from grasp_lightning.training.compensation import (
    VALIDATION_LOSS,
    CompensationModule,
    Teacher,
    make_trainable,
)
from tests.conftest import byte_tokenizer, tiny_model
from tests.unit.models.helpers import factorize_layers

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:Total length of `list`"),  # nothing to validate on
]

LENGTHS = (5, 14, 3, 9, 12, 4, 7, 11)
IDS = torch.arange(12)[None]
LORA = LoraSettings(rank=4, alpha=8.0, dropout=0.0)
# Steps in proportion to gradients: Adam's own ratio makes rounding errors of tiny gradients large.
PLAIN = OptimizerConfig(
    learning_rate=1.0, epsilon=1.0, schedule="constant", warmup_steps=0, gradient_clip=None
)


def random_samples(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> TokenSamples:
    """Samples of which about two thirds of the tokens are learned, and the last one always."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(256, (length,), generator=generator) for length in lengths]
    targets = [torch.rand(length, generator=generator) < 0.67 for length in lengths]
    for learned in targets:
        learned[0], learned[-1] = False, True
    return TokenSamples.from_rows(ids, targets)


class GivenData(TrainingData):
    """Existing samples."""

    def __init__(
        self,
        train: TokenSamples,
        validation: TokenSamples | None = None,
        *,
        order: BatchOrder = "shuffled",
        training: TrainingConfig,
    ) -> None:
        super().__init__(byte_tokenizer(), training, seed=0)
        none = TokenSamples.from_rows([], [])
        self._samples = TrainingSamples(train, none if validation is None else validation, {})
        self._order = order

    @property
    def order(self) -> BatchOrder:
        return self._order

    @property
    def row_length(self) -> int:
        return 16

    @property
    def samples(self) -> TrainingSamples:
        return self._samples


class Recorder(L.Callback):
    """Keeps the initial parameters, and the gradients of every step."""

    def __init__(self) -> None:
        self.first: dict[str, Tensor] = {}
        self.gradients: list[dict[str, Tensor]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        del trainer
        self.first = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: object
    ) -> None:
        del trainer, optimizer
        self.gradients.append(
            {n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None}
        )


def compressed(family: str = "llama", seed: int = 0, **overrides: object) -> PreTrainedModel:
    """A tiny model of two layers, the second of them low-rank."""
    options: dict[str, object] = {"num_hidden_layers": 2}
    # Dropout of the model itself would hide what these tests compare.
    if family == "gpt2":
        options = {"n_layer": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    elif family == "opt":
        options["dropout"] = 0.0
    view = DecoderView(tiny_model(family, seed, **options, **overrides))
    apply_operations(view, *factorize_layers(view, [1], 8))
    return view.model


def make_trainer(
    *callbacks: L.Callback,
    num_sanity_val_steps: int = 0,
    **options: Any,  # noqa: ANN401  any argument of a Trainer
) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[*callbacks],
        num_sanity_val_steps=num_sanity_val_steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def steps_of(
    batch_size: int = 8, micro_batch_size: int = 8, *, epochs: int = 1, max_steps: int | None = None
) -> TrainingConfig:
    return TrainingConfig(
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        epochs=epochs,
        max_steps=max_steps,
    )


def fit(
    module: CompensationModule,
    data: TrainingData,
    train: TrainMode = "lora",
    lora: LoraSettings = LORA,
    checkpoint: Path | None = None,
) -> tuple[Recorder, TrainingHistory, L.Trainer]:
    recorder, history = Recorder(), TrainingHistory()
    trainer = make_trainer(TrainableParameters(train, lora), recorder, history)
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return recorder, history, trainer


def with_filled_adapters(
    model: PreTrainedModel,
    lora: LoraSettings = LORA,
    optimizer: OptimizerConfig = PLAIN,
    seed: int = 0,
) -> CompensationModule:
    """A module with existing, non-zero adapters."""
    module = CompensationModule(model, optimizer, seed=seed)
    module.trained = make_trainable(module.view, "lora", lora)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return module


def naive_losses(model: PreTrainedModel, samples: TokenSamples) -> Tensor:
    """The cross-entropy of every learned token, sample by sample, without padding."""
    losses = []
    ids, targets = samples.input_ids, samples.targets
    for start, length in zip(samples.starts.tolist(), samples.lengths.tolist(), strict=True):
        row, learned = ids[start : start + length], targets[start : start + length]
        logits = model(row[None]).logits[0]
        losses.append(
            cross_entropy(logits[:-1][learned[1:]], row[1:][learned[1:]], reduction="none")
        )
    return torch.cat(losses)


def assert_near(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Largest difference at most a share of the largest expected number."""
    assert actual.keys() == expected.keys()
    largest = max(float(value.abs().max()) for value in expected.values())
    worst = max(float((actual[name] - expected[name]).abs().max()) for name in expected)
    assert worst <= tolerance * largest


# Gradients and what moves


@pytest.mark.parametrize("train", ["lora", "all"])
@pytest.mark.parametrize("micro_batch_size", [1, 3, 8])
def test_a_step_has_the_gradient_of_the_mean_over_all_its_tokens(
    train: TrainMode, micro_batch_size: int
) -> None:
    samples = random_samples()
    model = compressed()
    if train == "lora":
        module = with_filled_adapters(model)
    else:
        module = CompensationModule(model, PLAIN)
        module.trained = make_trainable(module.view, train, LORA)
    loss = naive_losses(model, samples).mean()
    loss.backward()
    naive = {f"model.{n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    expected = float(loss.detach())

    data = GivenData(samples, training=steps_of(micro_batch_size=micro_batch_size))
    recorder, history, _ = fit(module, data, train)

    assert [loss for loss, _ in history.steps] == [pytest.approx(expected, rel=1e-6)]
    (gradients,) = recorder.gradients
    assert_near(gradients, naive, 1e-6)


def test_what_is_learned_does_not_depend_on_micro_batches() -> None:
    weights = {}
    for size in (8, 1, 3):
        module = with_filled_adapters(compressed())
        fit(module, GivenData(random_samples(), training=steps_of(4, size, epochs=2)))
        weights[size] = {name: p.clone() for name, p in module.trained_state().items()}
        assert module.num_trained_tokens == 2 * random_samples().num_targets
    assert_near(weights[1], weights[8], 1e-6)
    assert_near(weights[3], weights[8], 1e-6)


@pytest.mark.parametrize("train", get_args(TrainMode))
def test_only_trained_parameters_move(train: TrainMode) -> None:
    module = CompensationModule(compressed(), OptimizerConfig(warmup_steps=0))
    data = GivenData(random_samples(), training=steps_of(4, 2, epochs=2))
    recorder, _, _ = fit(module, data, train)
    moved = {n for n, p in module.named_parameters() if not torch.equal(p, recorder.first[n])}
    assert moved == module.trained_state().keys()
    assert moved == recorder.gradients[0].keys() != recorder.first.keys()


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "gpt_neox"])
def test_padding_does_not_change_the_loss(family: str) -> None:
    samples = random_samples()
    module = CompensationModule(compressed(family), PLAIN)
    expected = float(naive_losses(module.model, samples).detach().mean())
    _, history, _ = fit(module, GivenData(samples, training=steps_of()))
    assert history.steps[0][0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_samples_that_share_a_row_are_learned_as_if_alone(family: str) -> None:
    found = {}
    orders: tuple[BatchOrder, ...] = ("shuffled", "packed", "length_grouped")
    for order in orders:
        data = GivenData(random_samples(), order=order, training=steps_of(micro_batch_size=2))
        module = with_filled_adapters(compressed(family))
        recorder, history, _ = fit(module, data)
        ((loss, _),), (gradients,) = history.steps, recorder.gradients
        found[order] = (loss, gradients)
    assert {len(row) for row in data.steps().rows(0)} == {1}
    packed = GivenData(random_samples(), order="packed", training=steps_of())
    assert max(len(row) for row in packed.steps().rows(0)) > 1
    for order in orders[1:]:
        assert found[order][0] == pytest.approx(found["shuffled"][0], rel=1e-6)
        assert_near(found[order][1], found["shuffled"][1], 1e-5)


def test_gradients_are_clipped_to_a_norm_together() -> None:
    norms = {}
    for clip in (None, 0.05, 1e6):
        config = OptimizerConfig(gradient_clip=clip, warmup_steps=0)
        module = with_filled_adapters(compressed(), optimizer=config)
        recorder, _, _ = fit(module, GivenData(random_samples(), training=steps_of(4, 2)))
        norms[clip] = [
            float(torch.cat([grad.flatten() for grad in gradients.values()]).norm())
            for gradients in recorder.gradients
        ]
    assert min(norms[None]) > 0.05
    assert norms[0.05] == pytest.approx([0.05, 0.05], rel=1e-4)
    assert norms[1e6] == norms[None]


def counted(calls: list[int], *args: object) -> None:
    calls.append(len(args))


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
def test_activations_that_are_computed_again_change_nothing() -> None:
    found = {}
    for again in (False, True):
        model = compressed()
        module = CompensationModule(model, PLAIN)
        calls: list[int] = []
        part = model.get_submodule("model.layers.0.mlp")
        part.register_forward_pre_hook(partial(counted, calls))
        trainable = TrainableParameters("lora", LORA, gradient_checkpointing=again)
        recorder = Recorder()
        trainer = make_trainer(trainable, recorder)
        trainer.fit(module, datamodule=GivenData(random_samples(), training=steps_of()))
        found[again] = (recorder.gradients[0], len(calls))
        model.train()(IDS).logits.sum().backward()
        assert len(calls) == found[again][1] + 1  # a fit leaves no trace
    assert (found[False][1], found[True][1]) == (1, 2)
    assert_near(found[True][0], found[False][0], 1e-6)


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
def test_activations_that_were_computed_again_leave_no_hook_on_the_model() -> None:
    model = compressed()
    trainer = make_trainer(TrainableParameters("lora", LORA, gradient_checkpointing=True))
    data = GivenData(random_samples(), training=steps_of())
    trainer.fit(CompensationModule(model, PLAIN), datamodule=data)
    assert not model.get_input_embeddings()(IDS).requires_grad


# Learning rate and dropout


@pytest.mark.parametrize(
    ("schedule", "after_warmup"),
    [
        ("linear", lambda share: 1 - share),
        ("cosine", lambda share: (1 + math.cos(math.pi * share)) / 2),
        ("constant", lambda _: 1.0),
    ],
)
def test_the_learning_rate_rises_and_then_falls_by_step(
    schedule: LearningRateSchedule, after_warmup: Callable[[float], float]
) -> None:
    config = OptimizerConfig(learning_rate=1e-3, warmup_steps=3, schedule=schedule)
    data = GivenData(random_samples(), training=steps_of(1, 1, max_steps=7))
    _, history, _ = fit(CompensationModule(compressed(), config), data)
    warm = config.warmup_steps
    expected = [1e-3 * step / warm for step in range(warm)]
    expected += [1e-3 * after_warmup((step - warm) / (7 - warm)) for step in range(warm, 7)]
    assert [rate for _, rate in history.steps] == pytest.approx(expected, abs=1e-12)


def test_dropout_differs_between_steps_and_not_between_runs() -> None:
    still = OptimizerConfig(learning_rate=0.0, schedule="constant", warmup_steps=0)
    lora = LoraSettings(rank=4, dropout=0.5)
    losses = {}
    for run, seed, start in (("first", 0, 1), ("second", 0, 2), ("other seed", 1, 1)):
        module = with_filled_adapters(compressed(), lora, optimizer=still, seed=seed)
        torch.manual_seed(start)  # earlier random draws do not matter
        data = GivenData(random_samples((14,)), training=steps_of(1, 1, epochs=3))
        _, history, _ = fit(module, data, lora=lora)
        losses[run] = [loss for loss, _ in history.steps]
    assert losses["first"] == losses["second"]
    assert len({*losses["first"], *losses["other seed"]}) == 6


def test_dropout_is_off_after_a_fit_and_in_every_validation() -> None:
    lora = LoraSettings(rank=4, dropout=0.5)
    module = with_filled_adapters(compressed(), lora)
    data = GivenData(random_samples(), random_samples(seed=1), training=steps_of(epochs=3))
    trainer = make_trainer(
        TrainableParameters("lora", lora), val_check_interval=1, check_val_every_n_epoch=None
    )
    trainer.fit(module, datamodule=data)
    with torch.no_grad():
        expected = float(naive_losses(module.model, data.samples.validation).mean())
    assert not any(part.training for part in module.model.modules())
    assert float(trainer.callback_metrics[VALIDATION_LOSS]) == pytest.approx(expected, rel=1e-5)


# Validation


@pytest.mark.parametrize("order", ["shuffled", "packed"])
def test_the_validation_loss_is_the_mean_over_all_tokens(order: BatchOrder) -> None:
    validation = random_samples(seed=1)
    module = CompensationModule(compressed())
    training = steps_of(micro_batch_size=3)
    data = GivenData(random_samples(), validation, order=order, training=training)
    with torch.no_grad():
        expected = float(naive_losses(module.model, validation).double().mean())
    for _ in range(2):  # the second time from the start, too
        (result,) = make_trainer().validate(module, datamodule=data, verbose=False)
        assert result[VALIDATION_LOSS] == pytest.approx(expected, rel=1e-6)


# Distillation


@pytest.mark.parametrize("train", ["lora", "factors"])
@pytest.mark.parametrize("order", ["shuffled", "packed"])
def test_a_teacher_that_is_the_model_itself_has_nothing_to_teach(
    train: TrainMode, order: BatchOrder
) -> None:
    model = compressed()
    teacher = Teacher(copy.deepcopy(model).requires_grad_(False), temperature=2.0, mix=1.0)
    module = CompensationModule(model, OptimizerConfig(warmup_steps=0), teacher=teacher)
    data = GivenData(random_samples(), order=order, training=steps_of(2, 2))
    recorder, history, _ = fit(module, data, train)
    assert {loss for loss, _ in history.steps} == {0.0}
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, recorder.first[name])


def test_a_teacher_is_learned_from_and_does_not_change() -> None:
    samples, model, other = random_samples(), compressed(), compressed(seed=1)
    module = CompensationModule(model, PLAIN, teacher=Teacher(other, temperature=2.0, mix=0.25))
    before = {name: p.clone() for name, p in other.named_parameters()}
    with torch.no_grad():
        entropy = naive_losses(model, samples).mean()
        divergence = naive_divergence(model, other, samples, 2.0)
    expected = float(0.25 * 4 * divergence + 0.75 * entropy)

    _, history, _ = fit(module, GivenData(samples, training=steps_of(micro_batch_size=3)))

    assert history.steps[0][0] == pytest.approx(expected, rel=1e-5)
    assert all(torch.equal(p, before[name]) for name, p in other.named_parameters())
    assert all(p.grad is None for p in other.parameters())
    assert not any("teacher" in name for name, _ in module.named_parameters())


def naive_divergence(
    model: PreTrainedModel, teacher: PreTrainedModel, samples: TokenSamples, temperature: float
) -> Tensor:
    """The mean over learned tokens of KL(teacher || model), both at a temperature."""
    total = torch.zeros(())
    for start, length in zip(samples.starts.tolist(), samples.lengths.tolist(), strict=True):
        row = samples.input_ids[start : start + length]
        learned = samples.targets[start + 1 : start + length]
        own, given = (
            log_softmax(m(row[None]).logits[0, :-1][learned] / temperature, dim=-1)
            for m in (model, teacher)
        )
        total += kl_div(own, given, reduction="sum", log_target=True)
    return total / samples.num_targets


# Checkpoints


@pytest.mark.parametrize("train", ["lora", "factors"])
def test_a_checkpoint_holds_what_is_trained_and_nothing_else(
    train: TrainMode, tmp_path: Path
) -> None:
    model = compressed(hidden_size=128, intermediate_size=256)
    module = CompensationModule(model, OptimizerConfig(warmup_steps=0))
    data = GivenData(random_samples(), training=steps_of(4, 4))
    _, history, trainer = fit(module, data, train, LoraSettings(rank=32))
    file = tmp_path / "a.ckpt"
    trainer.save_checkpoint(file, weights_only=False)

    stored = torch.load(file, weights_only=True)
    assert module.trained is not None
    state = module.trained_state()
    assert stored["state_dict"].keys() == state.keys()
    assert all(torch.equal(stored["state_dict"][name], state[name]) for name in state)
    assert len(state) < len(dict(module.named_parameters()))
    number = module.trained.num_parameters
    assert 12 * number < file.stat().st_size < 14 * number + 60_000
    assert stored["callbacks"]["TrainingHistory"]["steps"] == history.steps


def saved(folder: Path, module: CompensationModule, data: TrainingData) -> Path:
    """The checkpoint of a training after two of its steps."""

    class AfterTwo(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: object) -> None:
            if args[-1] == 1:
                trainer.save_checkpoint(folder / "a.ckpt", weights_only=False)

    trainable = TrainableParameters("lora", LoraSettings(rank=4, dropout=0.3))
    make_trainer(trainable, AfterTwo()).fit(module, datamodule=data)
    return folder / "a.ckpt"


def test_a_training_resumes_from_a_checkpoint_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    config = OptimizerConfig(warmup_steps=1)
    data = GivenData(random_samples(), training=steps_of(4, 3, epochs=2))
    whole = CompensationModule(compressed(), config)
    file = saved(tmp_path, whole, data)
    rest = CompensationModule(compressed(), config)

    recorder, history, _ = fit(rest, data, lora=LoraSettings(rank=4, dropout=0.3), checkpoint=file)

    assert len(recorder.gradients) == len(history.steps) == 2
    assert rest.num_trained_tokens == whole.num_trained_tokens == 2 * random_samples().num_targets
    expected = whole.trained_state()
    assert rest.trained_state().keys() == expected.keys()
    for name, value in rest.trained_state().items():
        assert torch.equal(value, expected[name])


@pytest.mark.parametrize(
    ("seed", "samples", "rank", "difference"),
    [
        (1, 0, 4, "model"),
        (0, 1, 4, "samples"),
        (0, 0, 3, "trained parameters"),
        (1, 1, 4, "model, samples"),
    ],
)
def test_a_checkpoint_of_another_training_is_refused(
    tmp_path: Path, seed: int, samples: int, rank: int, difference: str
) -> None:
    training = steps_of(4, 4)
    data = GivenData(random_samples(), training=training)
    file = saved(tmp_path, CompensationModule(compressed()), data)
    module = CompensationModule(compressed(seed=seed))
    other = GivenData(random_samples(seed=samples), training=training)
    with pytest.raises(ModelError) as caught:
        fit(module, other, lora=LoraSettings(rank=rank, dropout=0.3), checkpoint=file)
    assert str(caught.value) == (
        f"the checkpoint belongs to a different training: it differs in {difference}; start again, "
        "or use the settings it was made with"
    )


def test_a_checkpoint_of_another_objective_is_refused(tmp_path: Path) -> None:
    data = GivenData(random_samples(), training=steps_of(4, 4))
    file = saved(tmp_path, CompensationModule(compressed()), data)
    teacher = Teacher(compressed(seed=1), temperature=1.0, mix=0.5)
    module = CompensationModule(compressed(), teacher=teacher)
    with pytest.raises(ModelError, match="the checkpoint belongs to a different training"):
        fit(module, data, lora=LoraSettings(rank=4, dropout=0.3), checkpoint=file)


# What goes wrong

IGNORED = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True")


@IGNORED
@pytest.mark.parametrize("micro_batch_size", [8, 3])
def test_a_loss_that_is_not_finite_ends_the_training(micro_batch_size: int) -> None:
    model = compressed()
    model.get_parameter("model.norm.weight").data[3] = float("nan")
    data = GivenData(random_samples(), training=steps_of(micro_batch_size=micro_batch_size))
    with pytest.raises(NumericsError) as caught:
        fit(CompensationModule(model), data)
    assert str(caught.value) == "the training loss is nan in step 0; lower optimizer.learning_rate"


def test_a_loss_that_is_not_finite_is_said_without_a_warning() -> None:
    torch.set_warn_always(True)  # torch says it once per process otherwise
    model = compressed()
    model.get_parameter("model.norm.weight").data[3] = float("nan")
    try:
        with pytest.raises(NumericsError):
            fit(CompensationModule(model), GivenData(random_samples(), training=steps_of()))
    finally:
        torch.set_warn_always(False)


@IGNORED
def test_a_training_that_diverges_names_its_step() -> None:
    config = OptimizerConfig(learning_rate=1e30, warmup_steps=0, gradient_clip=None)
    data = GivenData(random_samples(), training=steps_of(4, 4, epochs=3))
    with pytest.raises(NumericsError, match=r"the training loss is (nan|inf) in step [1-5]; lower"):
        fit(CompensationModule(compressed(), config), data, "factors")


@pytest.mark.filterwarnings("ignore:Encountered `nan` values")
def test_a_validation_loss_that_is_not_finite_is_an_error() -> None:
    model = compressed()
    model.get_parameter("model.norm.weight").data[3] = float("nan")
    data = GivenData(random_samples(), random_samples(seed=1), training=steps_of())
    with pytest.raises(NumericsError) as caught:
        make_trainer().validate(CompensationModule(model), datamodule=data, verbose=False)
    assert str(caught.value) == "the validation loss is nan; lower optimizer.learning_rate"


def test_a_single_sample_whose_loss_is_not_finite_is_an_error_of_a_validation() -> None:
    model, validation = compressed(), random_samples(seed=1)
    token = int(validation.input_ids[0])
    model.get_parameter("model.embed_tokens.weight").data[token] = float("nan")
    data = GivenData(random_samples(), validation, training=steps_of())
    with pytest.raises(NumericsError, match="the validation loss is nan"):
        make_trainer().validate(CompensationModule(model), datamodule=data, verbose=False)


def test_callbacks_of_a_compensation_refuse_another_module() -> None:
    with pytest.raises(TypeError, match="works on a CompensationModule, got LightningModule"):
        TrainableParameters().setup(make_trainer(), L.LightningModule(), "fit")


def test_a_model_is_not_exported_if_nothing_was_made_trainable() -> None:
    trainer = make_trainer(ExportMergedModel())
    data = GivenData(random_samples(), training=steps_of(max_steps=1))
    with pytest.raises(RuntimeError, match="add TrainableParameters to the callbacks"):
        trainer.fit(CompensationModule(compressed()), datamodule=data)


def test_an_exported_model_is_an_ordinary_low_rank_model_of_the_same_size(tmp_path: Path) -> None:
    model = compressed()
    before, number = ranks_of(model), model.num_parameters()
    module = CompensationModule(model, OptimizerConfig(warmup_steps=0, learning_rate=0.01))
    trainer = make_trainer(
        TrainableParameters("lora", LORA), ExportMergedModel(tmp_path / "model", byte_tokenizer())
    )
    trainer.fit(module, datamodule=GivenData(random_samples(), training=steps_of(4, 4)))
    loaded = type(model).from_pretrained(tmp_path / "model")
    assert ranks_of(loaded) == ranks_of(model) == before
    assert loaded.num_parameters() == model.num_parameters() == number
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name))
