"""Scores of more layers than are chosen: some at a time, kept for a later start of the run."""

from pathlib import Path

import pytest
import torch

from grasp_lightning.callbacks.measure import TrainerMeasure
from grasp_lightning.config import CalibrationConfig, MethodConfig, Score
from grasp_lightning.data.datamodules import CalibrationData
from grasp_lightning.methods import build_method, resolve_method
from grasp_lightning.methods.attribution import stored_scores
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.plan import Plan, SelectLayers
from grasp_lightning.run_folder import RunFolder
from grasp_lightning.stats.base import Statistics, Step
from grasp_lightning.storage.progress import RunProgress
from tests.conftest import byte_tokenizer, tiny_model

DATA = CalibrationData(
    CalibrationConfig(source="pydoc", num_samples=3, seqlen=24, batch_size=2), byte_tokenizer()
)


def step_of(view: DecoderView, layers: tuple[int, ...], score: Score, every: bool) -> Step:
    config = MethodConfig(name="grasp", layers=layers, score=score, score_all_layers=every or None)
    plan = Plan(method="grasp").extended((SelectLayers(layers=layers),))
    step = build_method(resolve_method(config), view).next_step(view, plan)
    assert step is not None
    return step


@pytest.mark.parametrize("score", ["taylor", "magnitude"])
def test_other_layers_are_scored_a_group_at_a_time_and_not_again(
    score: Score, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = DecoderView(tiny_model())
    step = step_of(view, (0, 2), score, every=True)
    assert {view.layer_of(name) for name in step.bases} == {0, 2}
    layers = [{view.layer_of(name) for name in group} for group in step.needs.more_groups]
    assert layers == [{1, 3}]
    run = RunFolder.open(str(tmp_path / "run"), {}, overwrite=False, protected=[])
    store = RunProgress(run, Plan(method="grasp"))
    more = TrainerMeasure(DATA, progress=False, store=store)(view, step).more_scores
    whole = step_of(view, (0, 1, 2, 3), score, every=False)
    scores = TrainerMeasure(DATA, progress=False)(view, whole).component_scores
    expected = stored_scores(
        whole.bases, scores or {name: basis.s for name, basis in whole.bases.items()}
    )
    of_others = [key for key in expected if key.rpartition(".")[0] not in step.bases]
    assert sorted(more) == sorted(of_others)
    for key, values in more.items():
        torch.testing.assert_close(values, expected[key], rtol=1e-6, atol=0)
    monkeypatch.setattr(TrainerMeasure, "_pass", lambda *_: Statistics())
    again = TrainerMeasure(DATA, progress=False, store=RunProgress(run, Plan(method="grasp")))
    assert again(view, step).more_scores.keys() == more.keys()
