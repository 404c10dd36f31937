"""Results of a grid survive JSON, and unfit values are named."""

import json
from dataclasses import replace

import pytest

from grasp_lightning.errors import DataError
from grasp_lightning.evaluation.results import task_difference
from grasp_lightning.reporting.comparison.results import CellResult, Comparison
from tests.unit.reporting.comparison.example import COMPARISON, DENSE_CELL, DROP_CELL


def test_results_return_unchanged_from_json() -> None:
    content = json.loads(json.dumps(COMPARISON.to_dict()))
    assert Comparison.from_dict(content, "comparison.json") == COMPARISON


def test_a_cell_of_json_still_pairs_its_tasks() -> None:
    content = json.loads(json.dumps(DROP_CELL.to_dict()))
    cell = CellResult.from_dict(content, "cell.json")
    difference = task_difference(cell.tasks["piqa"], DENSE_CELL.tasks["piqa"], "acc")
    assert difference == (-0.25, 0.25)


def test_only_what_names_the_cell_is_needed() -> None:
    content = {key: DENSE_CELL.to_dict()[key] for key in list(DENSE_CELL.to_dict())[:6]}
    cell = CellResult.from_dict(content, "cell.json")
    assert cell == replace(cell, perplexity={}, removed=None)
    assert cell.is_dense


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": "first"}, "cell.json: seed: expected int, got 'first'"),
        ({"perplexity": {"C4": "low"}}, "cell.json: perplexity.C4: expected float, got 'low'"),
        ({"perplexities": {}}, "cell.json: unknown key perplexities"),
    ],
)
def test_unfit_values_are_one_line_with_the_key(changes: dict[str, object], message: str) -> None:
    with pytest.raises(DataError) as error:
        CellResult.from_dict({**DROP_CELL.to_dict(), **changes}, "cell.json")
    assert str(error.value) == message
