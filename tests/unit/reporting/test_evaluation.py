from dataclasses import replace

from grasp_lightning.evaluation.paired import Estimate
from grasp_lightning.evaluation.results import PAPER_SEVEN, CorpusResult, ModelEvaluation
from grasp_lightning.evaluation.task_results import TaskResult, TaskRun
from grasp_lightning.reporting.evaluation import (
    evaluation_notes,
    evaluation_rows,
    section_rows,
)
from tests.unit.evaluation.test_results import EVALUATION, RESULT, SEVEN

OTHER = replace(
    RESULT,
    metrics={"acc": Estimate(0.25, 0.25), "acc_norm": Estimate(0.75, 0.2)},
    samples={"acc": [1, 0, 0, 0], "acc_norm": [1, 1, 1, 0]},
)


def evaluation(model: str, results: dict[str, TaskResult], perplexity: float) -> ModelEvaluation:
    corpus = CorpusResult(
        perplexity=perplexity, num_tokens=1000, num_windows=2, windows_sha256="f", seconds=0.5
    )
    return replace(
        EVALUATION,
        model=model,
        corpora={"data/wikitext2_raw/test.txt": corpus},
        tasks={
            name: TaskRun(results={name: result}, seconds=1) for name, result in results.items()
        },
    )


def rows(*evaluations: ModelEvaluation) -> dict[str, tuple[str, ...]]:
    return {row.quantity: row.values for row in evaluation_rows(evaluations)}


def test_differences_are_paired_and_to_the_first_model() -> None:
    found = rows(
        evaluation("a", SEVEN, 10.0), evaluation("b", dict.fromkeys(PAPER_SEVEN, OTHER), 15.0)
    )
    assert found["piqa, acc"] == ("50.0 \u00b1 25.0", "25.0 \u00b1 25.0 (-25.0 \u00b1 25.0)")
    assert found["piqa, acc_norm"][1] == "75.0 \u00b1 20.0 (+0.0 \u00b1 0.0)"
    assert found["mean of the seven, acc"][1] == "25.0 \u00b1 9.4 (-25.0 \u00b1 9.4)"
    assert found["perplexity, wikitext2_raw/test.txt"] == ("10.00", "15.00 (x 1.50)")
    assert found["parameters"] == ("10", "10")


def test_what_one_model_lacks_is_reported() -> None:
    found = rows(evaluation("a", {"piqa": RESULT}, 10.0), evaluation("b", {}, 10.0))
    assert found["piqa, acc"][1] == "not measured"
    assert "mean of the seven, acc" not in found


def test_other_documents_and_other_windows_are_not_compared() -> None:
    second = evaluation("b", {"piqa": replace(OTHER, documents="xyz")}, 15.0)
    corpora = {name: replace(r, windows_sha256="g") for name, r in second.corpora.items()}
    found = rows(evaluation("a", {"piqa": RESULT}, 10.0), replace(second, corpora=corpora))
    assert found["piqa, acc"][1] == "25.0 \u00b1 25.0"
    assert found["perplexity, wikitext2_raw/test.txt"][1] == "15.00"


def test_notes_explain_brackets_only_where_there_are_some() -> None:
    first = evaluation("a", {"piqa": RESULT}, 10.0)
    assert len(evaluation_notes([first])) == 1
    assert "paired difference" in evaluation_notes([first, first])[1]
    assert evaluation_notes([evaluation("a", {}, 10.0)]) == []


def test_the_report_s_rows_come_from_plain_values() -> None:
    section = {
        "cost": {"flops_per_token": 2_500_000, "disk_bytes": None},
        "peak_memory_bytes": 3_000_000,
        "corpora": {"pydoc": {"perplexity": 9.5, "num_tokens": 1234}},
        "tasks": {
            "piqa": {"metrics": {"acc": {"value": 0.5, "stderr": 0.125}}, "num_samples": 16},
            "mmlu": {"metrics": {"acc": {"value": 0.25, "stderr": None}}, "num_samples": 0},
        },
        "mean_of_seven": None,
    }
    assert section_rows(section) == [
        ("MFLOPs per token", "2.5"),
        ("peak memory of the evaluation", "3.0 MB"),
        ("perplexity, pydoc, 1,234 predicted tokens", "9.50"),
        ("piqa, acc, 16 documents", "50.0 \u00b1 12.5"),
        ("mmlu, acc", "25.0"),
    ]


def test_numbers_that_are_not_shares_are_printed_unchanged() -> None:
    metrics = {"word_perplexity": Estimate(25.3, None), "bits_per_byte": Estimate(0.87, 0.012)}
    text = TaskResult(metrics=metrics, num_samples=1, documents="abc")
    found = rows(evaluation("a", {"wikitext": text}, 10.0))
    assert found["wikitext, word_perplexity"] == ("25.3",)
    assert found["wikitext, bits_per_byte"] == ("0.87 \u00b1 0.012",)


def test_the_usual_metrics_come_first() -> None:
    names = [row.quantity for row in evaluation_rows([evaluation("a", {"piqa": RESULT}, 10.0)])]
    assert names[-2:] == ["piqa, acc", "piqa, acc_norm"]
