import json
from dataclasses import replace

import pytest

from grasp_lightning.evaluation.cost import ModelCost
from grasp_lightning.evaluation.paired import Estimate
from grasp_lightning.evaluation.results import (
    PAPER_SEVEN,
    CorpusResult,
    ModelEvaluation,
    paper_mean,
    paper_mean_difference,
    task_difference,
)
from grasp_lightning.evaluation.task_results import TaskResult, TaskRun
from grasp_lightning.reading.typed import as_type

RESULT = TaskResult(
    metrics={"acc": Estimate(0.5, 0.25), "acc_norm": Estimate(0.75, 0.2)},
    num_samples=4,
    num_fewshot=0,
    version="1.0",
    samples={"acc": [1, 0, 1, 0], "acc_norm": [1, 1, 1, 0]},
    documents="abc",
)
SEVEN = dict.fromkeys(PAPER_SEVEN, RESULT)
EVALUATION = ModelEvaluation(
    model="a",
    sha256="123",
    cost=ModelCost(
        parameters=10,
        decoder_linear_parameters=8,
        bytes=40,
        decoder_linear_bytes=32,
        flops_per_token=20,
        disk_bytes=None,
        dtype="float32",
    ),
    peak_memory_bytes=1000,
    corpora={
        "pydoc": CorpusResult(
            perplexity=9.5, num_tokens=70, num_windows=2, windows_sha256="f", seconds=0.5
        )
    },
    tasks={"piqa": TaskRun(results={"piqa": RESULT}, seconds=1.5)},
)


def test_an_evaluation_survives_json() -> None:
    content = json.loads(json.dumps(EVALUATION.to_dict()))
    assert as_type(ModelEvaluation, content, "file") == EVALUATION


def test_the_paper_s_mean_takes_acc_of_all_seven() -> None:
    mean = paper_mean(SEVEN)
    assert mean is not None
    assert mean.value == 0.5
    assert mean.stderr == pytest.approx(0.25 / 7**0.5)
    assert paper_mean(dict.fromkeys(PAPER_SEVEN[1:], RESULT)) is None


def test_differences_pair_documents() -> None:
    other = replace(
        RESULT,
        metrics={**RESULT.metrics, "acc": Estimate(0.25, 0.25)},
        samples={"acc": [0, 0, 1, 0], "acc_norm": [1, 1, 1, 0]},
    )
    assert task_difference(RESULT, other, "acc") == Estimate(0.25, 0.25)
    assert task_difference(RESULT, other, "acc_norm") == Estimate(0.0, 0.0)
    difference = paper_mean_difference(SEVEN, dict.fromkeys(PAPER_SEVEN, other))
    assert difference is not None
    assert difference.value == 0.25


def test_different_documents_are_not_paired() -> None:
    assert task_difference(RESULT, replace(RESULT, documents="xyz"), "acc") is None
    assert task_difference(RESULT, None, "acc") is None
    assert task_difference(RESULT, RESULT, "word_perplexity") is None
    others = {**SEVEN, "piqa": replace(RESULT, documents="xyz")}
    assert paper_mean_difference(SEVEN, others) is None


def test_a_metric_that_is_not_a_mean_over_documents_has_no_paired_difference() -> None:
    likelihoods = {"perplexity": [-1.0, -2.0, -3.0, -2.0]}
    perplexity = {"perplexity": Estimate(7.39, None)}
    result = replace(RESULT, metrics=perplexity, samples=likelihoods)
    assert task_difference(result, result, "perplexity") is None
    short = replace(RESULT, samples={"acc": [1, 0, 1]})
    assert task_difference(short, RESULT, "acc") is None
