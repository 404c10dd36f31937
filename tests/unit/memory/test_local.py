"""The memory forecast of a layer-local training against what it keeps."""

from dataclasses import replace
from pathlib import Path

from grasp_lightning.config import (
    CompensateConfig,
    DistillationConfig,
    LocalConfig,
    ModelConfig,
    TextConfig,
    TrainingConfig,
)
from grasp_lightning.memory.compensation import trained_parameters
from grasp_lightning.memory.local import hidden_state_bytes, local_memory
from grasp_lightning.memory.model_shape import model_shape
from grasp_lightning.memory.shapes import Adapters, Pass
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.training.layer_streams import HiddenStates
from grasp_lightning.training.layer_training import ENTERING, LEAVING
from grasp_lightning.training.local_stages import LocalStage
from grasp_lightning.training.local_streams import LocalData, PairedStreams
from tests.conftest import tiny_model
from tests.unit.memory.test_memory import bytes_kept, compressed_view, kept_by_autograd
from tests.unit.training.test_compensation_module import GivenData, random_samples

TOKENS = 16
CONFIG = CompensateConfig(
    model=ModelConfig(path="m"),
    train="all",
    objective="local",
    text=TextConfig(num_samples=5, num_validation=3, seqlen=TOKENS),
    training=TrainingConfig(validate_every=1, micro_batch_size=2, batch_size=2),
    local=LocalConfig(layers_at_once=2),
    distillation=DistillationConfig(teacher="dense"),
)
ALL = Adapters(rank=None, on_dense=True)


def test_only_the_largest_stage_is_trained() -> None:
    dense, model = model_shape(DecoderView(tiny_model())), model_shape(compressed_view())
    run = Pass(batch_size=2, seqlen=TOKENS)
    stages = [replace(model, layers=model.layers[i : i + 2]) for i in (0, 2)]
    trained = max(trained_parameters(stage, ALL) for stage in stages)
    alone = local_memory(CONFIG, dense, model, run, ALL, num_processes=1)
    assert alone.weights == dense.weights + model.weights + 4 * trained
    assert (alone.gradients, alone.optimizer) == (4 * trained, 8 * trained)
    best = replace(CONFIG, training=replace(CONFIG.training, keep="best"))
    copied = local_memory(best, dense, model, run, ALL, num_processes=1)
    assert copied.weights == alone.weights + 4 * trained
    assert local_memory(CONFIG, dense, model, run, ALL, num_processes=2).gradients == 8 * trained
    streamed = replace(CONFIG, model=ModelConfig(path="m", loading="streamed"))
    layer = local_memory(streamed, dense, model, run, ALL, num_processes=1)
    outside = dense.outside + model.outside
    layers = dense.largest_layer + 2 * model.largest_layer
    assert layer == alone._replace(weights=outside + layers + 4 * trained)
    elsewhere = replace(CONFIG, distillation=DistillationConfig(teacher="d", device="cpu"))
    there = local_memory(elsewhere, dense, model, run, ALL, num_processes=1)
    assert there.weights == alone.weights - dense.weights


def test_hidden_states_and_activations_are_covered(tmp_path: Path) -> None:
    dense, view = DecoderView(tiny_model()), compressed_view()
    samples = random_samples((TOKENS,) * 5), random_samples((TOKENS,) * 3)
    given = GivenData(*samples, training=CONFIG.training)
    data = LocalData(given, HiddenStates(tmp_path, 0), validates=True)
    streams = PairedStreams(dense, view, data)
    kept = sum(
        data.states(name, [window]).nbytes for name in (ENTERING, LEAVING) for window in range(8)
    )
    shapes = model_shape(dense), model_shape(view)
    assert hidden_state_bytes(CONFIG, *shapes, 1) == kept
    unlimited = local_memory(
        CONFIG, *shapes, Pass(batch_size=2, seqlen=TOKENS), ALL, num_processes=1
    )
    little = replace(CONFIG, local=replace(CONFIG.local, max_memory=1e-9))
    limited = local_memory(little, *shapes, Pass(batch_size=2, seqlen=TOKENS), ALL, num_processes=1)
    assert unlimited.activations - limited.activations == kept - 1
    with kept_by_autograd(view.model) as tensors:
        hidden = data.states(ENTERING, [0, 1]).requires_grad_(True)
        with streams.with_weights(LocalStage(0, 1, 0, 1)) as run:
            run(data.batch([0, 1]), hidden, {})
    assert 0 < bytes_kept(tensors) < limited.activations < 4 * bytes_kept(tensors)
