"""What a method predicts for each linear: numbers, plot, table and sentence."""

import math
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest
import torch

from grasp_lightning.plan import FactorizeLinear, Plan, SelectLayers
from grasp_lightning.reporting.heat_maps import losses_plot
from grasp_lightning.reporting.linears import predicted_losses
from grasp_lightning.reporting.metrics import LossChange
from grasp_lightning.reporting.page import render_report
from grasp_lightning.reporting.tables import comparison_notes
from tests.unit.reporting.example import CONFIG, example_metrics

UP, DOWN = "model.layers.2.mlp.up_proj", "model.layers.3.mlp.down_proj"
SCORES = {
    f"{UP}.scores": torch.tensor([4.0, 2.0, 1.0, 0.5]) / 10,
    f"{UP}.singular_values": torch.ones(4),
    f"{DOWN}.scores": torch.tensor([3.0, 2.0, 1.0]) / 100,
    f"{DOWN}.singular_values": torch.ones(3),
    "model.layers.4.mlp.up_proj.scores": torch.ones(4),  # it stays dense
}
PLAN = Plan(
    method="grasp_plus",
    options={"weighting": "kfac"},
    operations=(
        SelectLayers(layers=(2, 3, 4)),
        FactorizeLinear(module=UP, rank=2, components=None),
        FactorizeLinear(module=DOWN, rank=1, components=None),
    ),
)


def test_the_dropped_components_are_summed() -> None:
    losses = predicted_losses(PLAN, SCORES)
    assert list(losses) == [UP, DOWN]
    assert losses[UP] == pytest.approx(0.15)
    assert losses[DOWN] == pytest.approx(0.03)


def test_other_metrics_predict_no_loss() -> None:
    plan = replace(PLAN, options={"weighting": "input_gram"})
    assert predicted_losses(plan, SCORES) == {}
    assert losses_plot(plan, SCORES) is None


def test_the_plot_names_total_and_worst() -> None:
    plot = losses_plot(PLAN, SCORES)
    assert plot is not None
    assert plot.title == "All cuts together are predicted to cost 0.18 nats per token"
    assert "most, 0.1500 nats, in mlp.up_proj of layer 2" in plot.alt
    assert ET.fromstring(plot.svg).tag.endswith("svg")


def test_the_report_shows_predicted_next_to_measured() -> None:
    change = LossChange(predicted=0.18, measured=math.log(2))
    metrics = example_metrics(method="grasp_plus", layers=(2, 3, 4), loss_change=change)
    page = render_report(metrics, PLAN, SCORES, CONFIG)
    assert "Predicted loss, nats per token" in page
    assert ">0.1500<" in page
    assert "Squared norm kept" not in page
    notes = " ".join(comparison_notes(metrics))
    assert "predicted to increase by 0.18 nats per token on the calibration text; it" in notes
    assert "increased by 0.69 on the held-out text" in notes
