"""Sliced hidden states: from ``compress`` to export and training, and equal to the dense model."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from grasp_lightning import pipeline
from grasp_lightning.callbacks.measure import TrainerMeasure
from grasp_lightning.cli import main
from grasp_lightning.config import CalibrationConfig, MethodConfig
from grasp_lightning.data.datamodules import CalibrationData
from grasp_lightning.data.windows import TokenWindows
from grasp_lightning.methods import build_method, resolve_method
from grasp_lightning.methods.slicegpt import SliceGpt
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.size import count_parameters
from grasp_lightning.models.sliced import is_sliced, shortcuts, stream_settings
from grasp_lightning.models.stream import stream_of
from grasp_lightning.plan import Plan, SliceStream
from tests.conftest import byte_tokenizer, save_tiny, tiny_model
from tests.integration.compensation import compensate_argv

IDS = torch.arange(12)[None]
# RMS norms and tied embeddings; layer norms and positions; parallel blocks with two norms each.
IDENTITIES = ("qwen2", "opt", "gpt_neox")


def windows(count: int = 3, length: int = 16) -> TokenWindows:
    ids = torch.randint(0, 250, (count, length), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, -5:] = False
    return TokenWindows(ids, mask, mask)


def with_norms(model: PreTrainedModel) -> PreTrainedModel:
    """Give all norms different gains and biases."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def of_rank(model: PreTrainedModel, rank: int) -> PreTrainedModel:
    """Let all embeddings and blocks write in the same directions, of this number."""
    view = DecoderView(model)
    stream, size = stream_of(view), model.config.hidden_size
    basis = torch.linalg.qr(torch.randn(size, rank, generator=torch.Generator().manual_seed(2)))[0]
    into = basis @ basis.mT
    with torch.no_grad():
        for name in stream.embeddings:
            weight = view.module(name).get_parameter("weight")
            weight.copy_(weight @ into)
        for name in (name for read in stream.reads for name in read.writers):
            module = view.module(name)
            module.get_parameter("weight").copy_(into @ module.get_parameter("weight"))
            if getattr(module, "bias", None) is not None:
                module.get_parameter("bias").copy_(into @ module.get_parameter("bias"))
    return model


def sliced(model: PreTrainedModel, width: int, directions_of: str = "input") -> dict[str, Tensor]:
    """Slice a model, and return the scores of the decision."""
    method = SliceGpt(width, directions_of, 1)  # type: ignore[arg-type]  # one of its values
    settings = CalibrationConfig(batch_size=2)
    data = CalibrationData(settings, byte_tokenizer(), windows=windows())
    measure = TrainerMeasure(data, progress=False)
    scores: dict[str, Tensor] = {}
    pipeline.compress(
        DecoderView(model),
        method,
        measure,
        Plan(method=method.name),
        lambda _, decision: scores.update(decision.scores),
    )
    assert is_sliced(model)
    return scores


def logits(model: PreTrainedModel) -> Tensor:
    found: Tensor = model(IDS).logits.detach()
    return found


@pytest.mark.parametrize("family", IDENTITIES)
def test_without_slicing_the_logits_are_the_same(family: str) -> None:
    model = with_norms(tiny_model(family))
    before = logits(model)
    sliced(model, 32)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    # All bases are turned towards the first one.
    largest = max(float(s.weight.detach().abs().max()) for s in shortcuts(model).values())
    assert largest < 1e-5


@pytest.mark.parametrize("family", IDENTITIES)
@pytest.mark.parametrize("directions_of", ["input", "normed"])
def test_slicing_to_the_rank_of_the_hidden_states_is_exact(family: str, directions_of: str) -> None:
    model = of_rank(with_norms(tiny_model(family)), 10)
    before = logits(model)
    sliced(model, 11 if family != "qwen2" else 10, directions_of)
    torch.testing.assert_close(logits(model), before, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", IDENTITIES)
def test_every_block_reads_the_largest_directions_of_what_the_sliced_model_gives_it(
    family: str,
) -> None:
    model, kept, data = with_norms(tiny_model(family)), 8, windows()
    stream, mask = stream_of(DecoderView(model)), data.mask
    scores = sliced(model, kept)
    entering: dict[str, Tensor] = {}
    for read in stream.reads:
        hook = partial(lambda name, _, args: entering.update({name: args[0]}), read.norms[0])
        model.get_submodule(read.norms[0]).register_forward_pre_hook(hook)
    with torch.no_grad():
        model(input_ids=data.input_ids, attention_mask=mask.long())
    assert len(entering) == len(stream.reads) == len(scores)
    lost = []
    for name, states in entering.items():
        held = states.reshape(*mask.shape, kept)[mask].square().sum()
        variances = scores[f"{name}.variances"]
        torch.testing.assert_close(held, variances[:kept].sum(), rtol=1e-4, atol=0)
        lost.append(1 - float(held / variances.sum()))
    assert max(lost) > 0.005  # far more than the tolerance


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(
        tmp_path_factory.mktemp("models") / "source", "qwen2", max_position_embeddings=256
    )


def words(source: Path, run: Path, *more: str) -> list[str]:
    texts = [
        f"--{part}.{key}"
        for part in ("calibration", "evaluation")
        for key in ("source=pydoc", "num_samples=5", "seqlen=32")
    ]
    options = more or ("--method.removed_ratio=0.3",)
    return [
        *("compress", f"--model.path={source}", f"--output_dir={run}"),
        *("--method.name=slicegpt", *options, *texts),
    ]


@pytest.fixture(scope="module")
def run(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "sliced"
    assert main(words(source, folder)) == 0
    return folder


@pytest.mark.slow
def test_a_run_unties_and_counts_everything(run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    (operation,) = Plan.from_json((run / "plan.json").read_text()).operations
    assert isinstance(operation, SliceStream)
    assert not model.config.tie_word_embeddings
    assert metrics["parameters"]["compressed"] == count_parameters(model)
    assert 0.3 <= metrics["removed_ratio"] < 0.35
    assert stream_settings(model)["size"] == operation.width
    card = (run / "model" / "README.md").read_text()
    assert f"the hidden states keep {operation.width} directions in all layers" in card
    assert card.count("its sliced hidden states") == 3
    assert metrics["seconds"]["slice"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("form", ["dense", "gguf", "torchao"])
def test_no_other_format_takes_a_sliced_model(
    form: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [f"--model={run / 'model'}", f"--format={form}", f"--output_dir={tmp_path / 'out'}"]
    assert main(["export", *argv]) == 2
    assert "has sliced hidden states (method.name=slicegpt)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_sliced_model_is_trained_measured_and_not_compressed_again(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = run / "model"
    argv = compensate_argv(model, tmp_path)
    assert main(["compensate", *argv, "--train=lora", f"--output_dir={tmp_path / 'out'}"]) == 0
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder) for folder in (model, tmp_path / "out/model")
    )
    assert not torch.equal(logits(before), logits(after))
    assert all(
        torch.equal(s.weight, shortcuts(after)[n].weight) for n, s in shortcuts(before).items()
    )
    for command in ("plan", "compress"):
        again = words(model, tmp_path / "again")
        again = again[1:] if command == "compress" else [w for w in again[1:] if "output" not in w]
        assert main([command, *again]) == 2
        assert "are sliced (method.name=slicegpt)" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--method.keep_ratio=0.9",), "the model would grow by"),
        (("--method.removed_ratio=0.999",), "the feasible range is 0 to"),
        (("--method.keep_ratio=0.5", "--method.removed_ratio=0.2"), "both are set"),
        (("--method.keep_ratio=0.5", "--method.num_layers=2"), "num_layers would be ignored"),
        (("--method.keep_ratio=0.01",), "keeps none of the 32 directions"),
    ],
)
def test_sizes_out_of_reach_are_refused_in_one_line(
    options: tuple[str, ...],
    expected: str,
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(words(source, tmp_path / "run", *options)) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_width_is_the_largest_that_removes_enough() -> None:
    view = DecoderView(tiny_model("qwen2"))
    config = resolve_method(MethodConfig(name="slicegpt", removed_ratio=0.3))
    method = build_method(config, view)
    prediction = method.predict(view)
    assert prediction.directions is not None
    width = prediction.directions[0]
    wider = SliceGpt(width + 1, "input", 1).predict(view)
    assert prediction.most <= 0.7 * prediction.dense < wider.most
