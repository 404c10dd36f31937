import pytest
from rich.console import Console

from grasp_lightning.reporting.metrics import Metrics, Pair
from grasp_lightning.reporting.tables import (
    comparison_notes,
    comparison_rows,
    comparison_table,
    count_text,
    duration_text,
    factor_text,
    indices_text,
    size_text,
    summary,
)
from tests.unit.reporting.example import drop_metrics, example_metrics


def printed(metrics: Metrics) -> str:
    """Return the printed table with its line breaks folded, since rich wraps title and caption."""
    console = Console(width=200)
    with console.capture() as captured:
        console.print(comparison_table(metrics))
    return " ".join(captured.get().split())


def test_rows_hold_both_models_and_the_change() -> None:
    rows = {row.quantity: row[1:] for row in comparison_rows(example_metrics())}
    assert rows == {
        "parameters": ("134,515,008", "109,013,760", "-19.0%"),
        "parameters in decoder linears": ("106,168,320", "80,667,072", "-24.0%"),
        "MB at float32": ("538.1", "436.1", "-19.0%"),
        "MB in decoder linears": ("424.7", "322.7", "-24.0%"),
        "perplexity": ("18.25", "41.02", "x 2.25"),
    }


def test_targets_are_compared_if_several_were_predicted() -> None:
    losses = {"plain": 0.2312, "any": 0.0821, "gguf": 0.1153}
    notes = " ".join(comparison_notes(example_metrics(target_losses=losses)))
    assert "by method.target: any 0.082, gguf 0.115, plain 0.231." in notes
    alone = " ".join(comparison_notes(example_metrics(target_losses={"any": 0.1})))
    assert "method.target" not in alone


def test_table_prints_every_row_and_what_was_measured() -> None:
    text = printed(example_metrics())
    for row in comparison_rows(example_metrics()):
        for cell in row:
            assert cell in text
    assert "16,352 predicted tokens of held-out text" in text
    assert "8 decoder layers replaced, 19.0% of all parameters removed" in text


def test_a_source_in_fewer_bits_is_pointed_out() -> None:
    notes = " ".join(comparison_notes(example_metrics()))
    assert "98.4 MB on disk, compared with 538.1 MB for its float32 copy" in notes
    assert "equal dtype" in notes


@pytest.mark.parametrize("source_bytes", [None, 538_060_032, 600_000_000])
def test_a_source_of_equal_size_needs_no_note(source_bytes: int | None) -> None:
    assert len(comparison_notes(example_metrics(source_bytes=source_bytes))) == 1


def test_unmeasured_perplexity_is_said_so() -> None:
    pair = Pair[float | None](dense=None, compressed=None)
    metrics = example_metrics(perplexity=pair, perplexity_tokens=None)
    assert comparison_rows(metrics)[-1] == ("perplexity", "not measured", "not measured", "")
    assert "held-out" not in " ".join(comparison_notes(metrics))


def test_brackets_in_a_model_name_are_printed_unchanged() -> None:
    assert "evil[/bold][red]name" in printed(example_metrics(model="evil[/bold][red]name"))


def test_layers_are_named_after_what_was_done_to_them() -> None:
    assert summary(drop_metrics()).startswith("3 decoder layers dropped")
    assert summary(example_metrics(layers=(4,))).startswith("1 decoder layer replaced")
    cut = summary(example_metrics(method="grasp_plus"))
    assert cut.startswith("8 decoder layers compressed")
    zeros = summary(example_metrics(method="wanda", removed_ratio=0.0, zero_ratio=0.2))
    assert zeros.startswith("8 decoder layers made sparse")
    assert zeros.endswith("0.0% of all parameters removed, 20.0% set to zero")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (count_text(999), "999"),
        (count_text(134_515_008), "134.5 M"),
        (count_text(6_738_415_616), "6.74 B"),
        (size_text(98_420_000), "98.4 MB"),
        (size_text(240_000), "0.240 MB"),
        (size_text(13_476_831_232), "13.48 GB"),
        (duration_text(None), "not measured"),
        (duration_text(2.44), "2.4 s"),
        (duration_text(59.97), "1 min 0 s"),
        (duration_text(192), "3 min 12 s"),
        (duration_text(7265), "2 h 1 min"),
        (factor_text(20, 5000.0), "x 250.00"),
        (factor_text(float("inf"), 3.0), ""),
        (factor_text(None, 3.0), ""),
        (indices_text((3, 20, 21, 22, 23, 25)), "3, 20-23, 25"),
        (indices_text(()), "none"),
    ],
)
def test_numbers_read_well(text: str, expected: str) -> None:
    assert text == expected
