import base64
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from rich.console import Console

from grasp_lightning.errors import OutputError
from grasp_lightning.reporting.card import base_model_of, compensated_card, model_card
from grasp_lightning.reporting.metrics import (
    Change,
    CompensationMetrics,
    CompensationSeconds,
    FirstStage,
    History,
    LimitedTime,
    Pair,
)
from grasp_lightning.reporting.page import render_compensation_report
from grasp_lightning.reporting.plots import training_plot
from grasp_lightning.reporting.tables import (
    comparison_notes,
    comparison_rows,
    comparison_table,
    cost_rows,
    state_names,
    summary,
)
from tests.unit.reporting.compensation_example import (
    CONFIG,
    example_compensation,
    example_history,
    smallest_compensation,
)
from tests.unit.reporting.example import CONFIG as COMPRESS_CONFIG
from tests.unit.reporting.example import (
    LOW_RANK_SERVERS,
    drop_metrics,
    drop_plan,
    example_metrics,
    example_plan,
)
from tests.unit.reporting.test_page import HOSTILE, Page

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
# The contract for scripts: a key is never renamed or removed.
KEYS = {
    "model",
    "train",
    "objective",
    "dtype",
    "parameters.before",
    "parameters.after",
    "parameters.trainable",
    "bytes.before",
    "bytes.after",
    "perplexity.before",
    "perplexity.after",
    "perplexity_tokens",
    "validation_loss.before",
    "validation_loss.after",
    "validation_tokens",
    "steps",
    "time_limit.max_seconds",
    "time_limit.planned_steps",
    "time_limit.seconds",
    "best_step",
    "epochs",
    "samples",
    "trained_tokens",
    "tokens_per_second",
    "data",
    "data_licence",
    "compression",
    "history.steps",
    "history.loss",
    "history.learning_rate",
    "history.validation_steps",
    "history.validation_loss",
    "seconds.load",
    "seconds.sample",
    "seconds.teacher",
    "seconds.train",
    "seconds.evaluate",
    "seconds.save",
    "seconds.verify",
    "seconds.total",
    "peak_memory_bytes",
    "versions",
    "evaluation",
    "throughput",
}
FREE = ("samples", "versions")  # mappings whose keys are not part of the contract


def leaves(content: dict, prefix: str = "") -> Iterator[str]:
    for key, value in content.items():
        if isinstance(value, dict) and key not in FREE:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key


@pytest.mark.parametrize("metrics", [example_compensation(), smallest_compensation()])
def test_keys_are_those_that_scripts_rely_on(metrics: CompensationMetrics) -> None:
    assert set(leaves(metrics.to_dict())) == KEYS


@pytest.mark.parametrize("metrics", [example_compensation(), smallest_compensation()])
def test_json_round_trip_gives_equal_metrics(metrics: CompensationMetrics) -> None:
    text = json.dumps(metrics.to_dict(), allow_nan=False)
    assert CompensationMetrics.from_dict(json.loads(text)) == metrics


def test_both_stages_are_told_side_by_side() -> None:
    first = FirstStage(
        method="grasp_plus",
        removed_ratio=0.19,
        parameters=Pair(dense=134_515_008, compressed=109_013_760),
        bytes=Pair(dense=538_060_032, compressed=436_055_040),
        perplexity=Pair[float | None](dense=29.5, compressed=None),
        seconds=65.0,
    )
    metrics = example_compensation(compression=first)
    assert CompensationMetrics.from_dict(json.loads(json.dumps(metrics.to_dict()))) == metrics
    assert state_names(metrics) == ("dense", "compressed", "compensated", "against dense")
    rows = {row.quantity: row[1:] for row in (*comparison_rows(metrics), *cost_rows(metrics))}
    assert rows["parameters"] == ("134,515,008", "109,013,760", "109,013,760", "-19.0%")
    assert rows["MB at float32"] == ("538.1", "436.1", "436.1", "-19.0%")
    assert rows["perplexity"] == ("29.50", "not measured", "30.76", "x 1.04")
    assert rows["validation loss"] == ("", "2.650", "1.756", "")
    assert rows["time of the stage"][:2] == ("", "1 min 5 s")
    assert rows["peak memory in MB"][1] == "not measured"
    assert summary(metrics).startswith("grasp_plus, 19.0% of all parameters removed; then LoRA on")
    assert cost_rows(example_compensation()) == ()


def test_a_time_limit_is_told_with_what_was_planned_and_done() -> None:
    limit = LimitedTime(max_seconds=1800, planned_steps=105, seconds=1754.2)
    metrics = example_compensation(time_limit=limit)
    told = "Time limit of 1,800 s: 105 steps planned, 100 done in 1,754 s."
    assert told in comparison_notes(metrics)
    assert told in render_compensation_report(metrics, CONFIG)


def test_keys_of_a_later_version_are_ignored() -> None:
    content = {**example_compensation().to_dict(), "later": 1}
    assert CompensationMetrics.from_dict(content) == example_compensation()


def test_a_missing_key_is_named() -> None:
    content = example_compensation().to_dict()
    del content["parameters"]["trainable"]
    with pytest.raises(OutputError, match=r"parameters\.trainable is missing.*metrics\.json"):
        CompensationMetrics.from_dict(content)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("parameters", 3),
        ("bytes", {"before": None, "after": 1}),
        ("steps", None),
        ("samples", "many"),
        ("versions", None),
        ("history", {"steps": 5}),
        ("history", {**example_compensation().to_dict()["history"], "loss": [1.0]}),
    ],
)
def test_a_value_of_another_type_is_one_clear_error(key: str, value: object) -> None:
    with pytest.raises(OutputError, match="not the metrics of a run") as caught:
        CompensationMetrics.from_dict({**example_compensation().to_dict(), key: value})
    assert "\n" not in str(caught.value)


def test_a_history_has_one_value_per_step() -> None:
    with pytest.raises(ValueError, match=r"one loss and learning rate per step, got \[2, 1, 2\]"):
        History(steps=(1, 2), loss=(1.0,), learning_rate=(0.1, 0.1))
    with pytest.raises(ValueError, match=r"one loss per validation, got \[1, 0\]"):
        History(validation_steps=(1,))


def printed(metrics: CompensationMetrics) -> str:
    """Return the printed table with its line breaks folded, since rich wraps title and caption."""
    console = Console(width=200)
    with console.capture() as captured:
        console.print(comparison_table(metrics))
    return " ".join(captured.get().split())


def test_rows_hold_both_states_and_the_change() -> None:
    rows = {row.quantity: row[1:] for row in comparison_rows(example_compensation())}
    assert rows == {
        "parameters": ("109,013,760", "109,013,760", "+0.0%"),
        "MB at float32": ("436.1", "436.1", "+0.0%"),
        "perplexity": ("41.02", "30.76", "x 0.75"),
        "validation loss": ("2.650", "1.756", "-0.894"),
    }


def test_table_prints_every_row_and_what_was_measured() -> None:
    text = printed(example_compensation())
    for row in comparison_rows(example_compensation()):
        for cell in row:
            assert cell in text
    assert "LoRA on instruction data, 100 steps, 9.8 M trainable parameters" in text
    assert "16,352 predicted tokens of held-out text" in text
    assert "312,345 predicted tokens of samples set aside" in text


def test_notes_say_how_samples_were_used_and_which_weights_are_kept() -> None:
    metrics = example_compensation(
        best_step=75, samples={"strange_ones": 3, "train": 1200, "cut": 0}
    )
    trained, samples, kept = comparison_notes(metrics)[2:]
    assert trained.startswith("Trained on alpaca (yahma/alpaca-cleaned): 498,765 predicted tokens")
    assert trained.endswith("in 100 steps, 0.0643 epochs.")
    assert samples == "Samples: 1,200 for training, 3 strange ones."
    assert kept == "The weights after step 75 are kept."


def test_what_was_not_measured_is_said_so() -> None:
    rows = comparison_rows(smallest_compensation())
    assert rows[2] == ("perplexity", "not measured", "not measured", "")
    assert rows[3] == ("validation loss", "not measured", "not measured", "")
    assert "held-out" not in " ".join(comparison_notes(smallest_compensation()))


@pytest.mark.parametrize(
    ("changes", "start"),
    [
        ({"train": "factors", "objective": "text"}, "factor training on text, 100 steps"),
        ({"train": "lora_on_factors", "steps": 1}, "LoRA on the factors on instruction data, 1 s"),
        ({"objective": "distill"}, "LoRA on a teacher's predictions, 100 steps"),
    ],
)
def test_summary_names_what_is_trained_on_what(changes: dict, start: str) -> None:
    assert summary(example_compensation(**changes)).startswith(start)


def test_brackets_in_a_model_name_are_printed_unchanged() -> None:
    assert "evil[/bold][red]name" in printed(example_compensation(model="evil[/bold][red]name"))


def test_plot_is_well_formed_svg_with_words() -> None:
    plot = training_plot(example_history())
    assert ET.fromstring(plot.svg).tag.endswith("svg")
    assert plot.title == (
        "Validation loss falls from 2.650 to 1.756 nats per predicted token in 100 steps"
    )
    assert "the line is the mean of 5 steps" in plot.explanation
    assert "1.756 at its lowest" in plot.alt
    assert plot == training_plot(example_history())


def test_title_of_the_plot_is_about_the_weights_that_are_kept() -> None:
    plot = training_plot(example_history(), kept_step=25)
    assert "to 2.008 nats per predicted token in 25 steps" in plot.title
    assert "Dashed line: step 25" in plot.explanation


@pytest.mark.parametrize(
    ("losses", "title"),
    [
        ((2.0, 3.0), "Training loss rises from 2.000 to 3.000 nats per predicted token in 2 steps"),
        ((2.0,), "Training loss stays at 2.000 nats per predicted token"),
    ],
)
def test_without_validations_the_training_loss_speaks(losses: tuple, title: str) -> None:
    steps = tuple(range(1, len(losses) + 1))
    plot = training_plot(History(steps=steps, loss=losses, learning_rate=losses))
    assert plot.title == title
    assert "alidation" not in plot.explanation + plot.alt


def test_a_long_training_stays_a_small_plot() -> None:
    steps = tuple(range(1, 4001))
    losses = tuple(2 + (step * 7919 % 100) / 100 for step in steps)
    plot = training_plot(History(steps=steps, loss=losses, learning_rate=losses))
    assert len(plot.svg) < 300_000


def test_a_history_without_steps_cannot_be_drawn() -> None:
    with pytest.raises(ValueError, match="history has no step"):
        training_plot(History())


@pytest.fixture(scope="module")
def html() -> str:
    return render_compensation_report(example_compensation(), CONFIG)


def test_page_shows_numbers_settings_times_and_versions(html: str) -> None:
    text = Page(html).text
    for expected in (
        "Compensation report",
        "SmolLM2-135M-Instruct",
        "LoRA on instruction data, 100 steps",
        "x 0.75",
        "9.0% of the model's size",
        "0.0643 epochs, 498,765 tokens",
        "alpaca (yahma/alpaca-cleaned)",
        "49,732 for training",
        "micro_batch_size: 4",
        "13 min 32 s",
        "peak memory 3.10 GB",
        "2.13.0+cpu",
    ):
        assert expected in text
    assert "compression report" not in text.lower()
    assert "plan.json" not in text


def test_page_holds_the_plot_and_is_accessible(html: str) -> None:
    page = Page(html)
    assert page.open == []
    (image,) = page.all("img")
    assert image["alt"]
    kind, data = (image["src"] or "").split(",")
    assert kind == "data:image/svg+xml;base64"
    assert ET.fromstring(base64.b64decode(data)).tag.endswith("svg")
    assert all("scope" in header for header in page.all("th"))
    assert len(page.all("h1")) == len(page.all("main")) == 1
    identifiers = {attributes.get("id") for _, attributes in page.elements}
    assert {attributes.get("aria-labelledby") for _, attributes in page.elements} <= identifiers
    assert not re.search(r"@import|url\(|https?://", html)


def test_equal_runs_give_equal_pages(html: str) -> None:
    assert render_compensation_report(example_compensation(), CONFIG) == html


def test_later_measurements_have_their_sections() -> None:
    evaluation = {
        "cost": None,
        "peak_memory_bytes": None,
        "corpora": {"wikitext2": {"perplexity": 31.25, "num_tokens": 4321}},
        "tasks": {},
        "mean_of_seven": None,
    }
    timing = {"length": 128, "tokens_per_second": {"median": 1024.0}, "ratio": {"median": 1.25}}
    models = [
        {"name": name, "is_control": False, "prefill": [timing], "decode": []}
        for name in ("dense", "ours")
    ]
    throughput = {"model": "ours", "models": models}
    metrics = example_compensation(evaluation=evaluation, throughput=throughput)
    text = Page(render_compensation_report(metrics, {})).text
    for expected in ("perplexity, wikitext2", "31.25", "prefill, 128 tokens", "1,024", "1.25"):
        assert expected in text
    assert "Throughput of the compensated model" in text
    assert "Ratio: relative to dense" in text


def test_an_almost_empty_run_still_renders() -> None:
    page = Page(render_compensation_report(smallest_compensation(), {}))
    assert not page.all("img")
    for absent in ("Time per phase", "None", "Versions"):
        assert absent not in page.text.replace("Settings and versions", "")


def test_foreign_text_on_the_page_is_escaped() -> None:
    metrics = example_compensation(
        model=HOSTILE,
        dtype=HOSTILE,
        data=HOSTILE,
        objective=HOSTILE,
        samples={HOSTILE: 1},
        versions={HOSTILE: HOSTILE},
    )
    page = Page(render_compensation_report(metrics, {"model": {"path": HOSTILE}}))
    assert not page.all("script")
    assert len(page.all("img")) == 1
    assert page.text.count(HOSTILE) >= 5


def compressed_card(**changes: Any) -> str:  # noqa: ANN401  any argument of model_card
    arguments: dict[str, Any] = {
        "metrics": example_metrics(),
        "plan": example_plan(),
        "origin_name": HUB_NAME,
        "licence": "Apache-2.0",
        "licence_files": ["LICENSE"],
        "config": COMPRESS_CONFIG,
        "servers": LOW_RANK_SERVERS,
    }
    return model_card(**{**arguments, **changes})


def card(
    source_card: str | None,
    metrics: CompensationMetrics | None = None,
    **changes: Any,  # noqa: ANN401  as above
) -> str:
    arguments: dict[str, Any] = {
        "base_model": HUB_NAME,
        "licence": "Apache-2.0",
        "licence_files": ["LICENSE"],
        "config": CONFIG,
        "servers": LOW_RANK_SERVERS,
    }
    return compensated_card(
        source_card, metrics or example_compensation(), **{**arguments, **changes}
    )


def front_matter(text: str) -> dict:
    start, matter, _ = text.split("---\n", 2)
    assert start == ""
    content = yaml.safe_load(matter)
    assert isinstance(content, dict)
    return content


def sections(text: str) -> list[str]:
    return re.findall(r"^## (.*)$", text, re.MULTILINE)


def test_card_keeps_the_compressed_model_s_card_and_describes_the_training() -> None:
    source, text = compressed_card(), card(compressed_card())
    expected = sections(source)
    expected.insert(expected.index("How to load"), "Compensation")
    assert sections(text) == expected
    for line in source.split("---\n", 2)[2].splitlines():
        is_adapted = any(
            words in line for words in ("not trained", "plan.json", "Perplexity was measured")
        )
        assert is_adapted or line in text.splitlines()
    for told in (
        "It was trained after compression: see Compensation.",
        "LoRA adapters (rank 8, alpha 16.0, dropout 0.05) on all linears of the decoder layers",
        "`instruction`, instructions and their answers",
        "`alpaca (yahma/alpaca-cleaned)`, at most 256 tokens each. Licence of the data: `CC-BY",
        "Samples: 49,732 for training, 2,000 for validation",
        "100 steps, 0.0643 epochs, batch size 32, learning rate 0.0003, schedule linear",
        "| perplexity | 41.02 | 30.76 | x 0.75 |",
        "| validation loss | 2.650 | 1.756 | -0.894 |",
        "Held-out text: `pydoc`, in windows of 512 tokens.",
    ):
        assert told in text
    assert "not trained after" not in text


def test_licence_of_the_data_is_next_to_that_of_the_base_model() -> None:
    _, licences = card(compressed_card()).split("## Licence\n")
    licences, _ = licences.split("## Citation")
    assert "base model's licence is `Apache-2.0`" in licences
    assert "training data, `alpaca (yahma/alpaca-cleaned)`, has the licence `CC-BY-4.0`" in licences


@pytest.mark.parametrize("source", [None, compressed_card()], ids=["no card", "card"])
def test_an_unknown_licence_of_the_data_is_not_invented(source: str | None) -> None:
    text = card(source, example_compensation(data_licence=None))
    assert "Licence of the data: not known." in text
    told = (
        "does not know the licence of the training data, `alpaca (yahma/alpaca-cleaned)`, so look"
    )
    assert told in text


def test_front_matter_keeps_what_it_says_and_gains_tag_and_data_set() -> None:
    assert front_matter(card(compressed_card())) == {
        **front_matter(compressed_card()),
        "tags": ["grasp", "compressed", "low-rank", "compensated"],
        "datasets": ["yahma/alpaca-cleaned"],
    }


@pytest.mark.parametrize(
    ("objective", "changes", "has_data_set"),
    [
        ("instruction", {}, True),
        ("instruction", {"data": {"source": "file", "path": "/srv/secret/data.jsonl"}}, False),
        ("text", {}, False),
        ("distill", {}, True),
        ("distill", {"distillation": {"data": "text"}}, False),
    ],
)
def test_only_a_data_set_of_the_hub_that_was_learned_from_is_named(
    objective: str, changes: dict, has_data_set: bool
) -> None:
    text = card(
        compressed_card(), example_compensation(objective=objective), config={**CONFIG, **changes}
    )
    assert ("datasets" in front_matter(text)) == has_data_set


def test_without_a_card_a_short_one_is_complete() -> None:
    text = card(None)
    assert sections(text) == ["Compensation", "How to load", "Who can run it", "Limits", "Licence"]
    assert front_matter(text) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": HUB_NAME,
        "license": "apache-2.0",
        "tags": ["grasp", "compressed", "compensated"],
        "datasets": ["yahma/alpaca-cleaned"],
    }
    assert base_model_of(text) == HUB_NAME
    assert base_model_of(card(compressed_card())) == HUB_NAME


@pytest.mark.parametrize(
    ("foreign", "kept"),
    [
        ("", {}),
        ("plain words", {}),
        ("---\nno front matter, a rule\n", {}),
        ("---\n- a list\n---\nwords", {}),
        ("---\n: {broken\n---\nwords", {}),
        ("---\nwhen: 2024-99-99\n---\nwords", {}),
        ("---\n1: one\n---\nwords", {}),
        (f"---\ndeep: {'[' * 5000}\n---\nwords", {}),
        ("---\nlicense: mit\ntags: one\ndatasets: x/y\n---\n", {"license": "mit"}),
        ("---\nlicense: mit\n---", {"license": "mit"}),
        ("\ufeff---\r\nlicense: mit\r\n---\r\n# Foreign\r\n", {"license": "mit"}),
    ],
)
def test_a_foreign_card_is_kept_and_extended(foreign: str, kept: dict) -> None:
    text = card(foreign)
    matter = front_matter(text)
    assert {key: matter[key] for key in kept} == kept
    assert "compensated" in matter["tags"]
    assert "yahma/alpaca-cleaned" in matter["datasets"]
    assert "## Compensation\n" in text
    assert foreign.splitlines()[-1:] == [] or foreign.splitlines()[-1] in text


def test_tags_and_data_sets_of_a_foreign_card_stay() -> None:
    matter = front_matter(card("---\ntags: one\ndatasets: [x/y]\n---\nwords"))
    assert matter["tags"] == ["one", "compensated"]
    assert matter["datasets"] == ["x/y", "yahma/alpaca-cleaned"]


def test_a_second_compensation_has_a_section_of_its_own() -> None:
    first = card(compressed_card())
    second = card(first, example_compensation(train="factors"))
    assert [name for name in sections(second) if "Compensation" in name] == [
        "Compensation",
        "Compensation 2",
    ]
    assert second.index("LoRA adapters") < second.index("the factors of the low-rank linears them")
    assert second.count("has the licence `CC-BY-4.0`") == 1
    assert front_matter(second) == front_matter(first)


@pytest.mark.parametrize(
    ("changes", "lora", "expected"),
    [
        ({"train": "factors"}, {}, "Trained: the factors of the low-rank linears themselves."),
        ({"train": "lora_on_factors"}, {}, "LoRA adapters on the factors of the low-rank linears,"),
        (
            {},
            {"rank": 4, "targets": ("q_proj", "v_proj")},
            "(rank 4) on `q_proj`, `v_proj`, merged",
        ),
        ({"best_step": 75}, {}, "Weights: from step 75."),
    ],
)
def test_card_says_what_was_trained(changes: dict, lora: dict, expected: str) -> None:
    text = card(None, example_compensation(**changes), config={**CONFIG, "lora": lora})
    assert expected in text


@pytest.mark.parametrize("source", [None, compressed_card(), "foreign"])
@pytest.mark.parametrize("objective", ["instruction", "text", "distill"])
def test_card_shows_no_path_of_this_machine(source: str | None, objective: str) -> None:
    secret = {"source": "file", "path": "/srv/secret/file.jsonl"}
    config = {
        **CONFIG,
        "data": secret,
        "text": secret,
        "evaluation": secret,
        "distillation": {"teacher": "/srv/secret/models/llama"},
    }
    text = card(
        source,
        example_compensation(objective=objective, data="a local file"),
        base_model="/srv/secret/base",
        config=config,
    )
    assert "secret" not in text
    assert "models/llama" not in text
    if objective == "distill":
        assert "the teacher `llama` predicts" in text


@pytest.mark.parametrize(("teacher", "shown"), [(HUB_NAME, HUB_NAME), ("models/llama", "llama")])
def test_only_a_teacher_that_is_known_to_be_on_the_hub_is_named_in_full(
    teacher: str, shown: str
) -> None:
    metrics, config = (
        example_compensation(objective="distill"),
        {"distillation": {"teacher": teacher}},
    )
    assert f"the teacher `{shown}` predicts" in card(None, metrics, config=config)


def test_times_of_the_run_do_not_change_the_card() -> None:
    slow = example_compensation(peak_memory_bytes=1, seconds=CompensationSeconds(total=1e6))
    assert card(compressed_card(), slow) == card(compressed_card())
    assert card(None, slow) == card(None)


@pytest.mark.parametrize("source", [None, compressed_card(), "foreign"])
def test_card_without_configuration_is_whole(source: str | None) -> None:
    text = card(source, smallest_compensation(), config={}, licence=None, licence_files=[])
    assert "None" not in text
    assert "Training: 0 steps, 0 epochs." in text


def test_card_of_dropped_layers_is_extended_too() -> None:
    source = compressed_card(
        metrics=drop_metrics(), plan=drop_plan(), licence=None, licence_files=[]
    )
    assert sections(card(source)).count("Compensation") == 1


def test_a_card_without_measured_quality_does_not_deny_that_of_the_training() -> None:
    pair = Pair[float | None](dense=None, compressed=None)
    metrics = example_metrics(perplexity=pair, perplexity_tokens=None)
    text = card(compressed_card(metrics=metrics))
    assert "- Quality was not measured before Compensation." in text


def test_foreign_text_in_the_card_stays_inside_code_spans() -> None:
    text = card(None, example_compensation(data="a`b\n---\n# <script>", data_licence="x`\n# y"))
    assert "`a'b --- # <script>`" in text
    assert "`x' # y`" in text


def test_unmeasured_quality_is_said_so_in_a_short_card() -> None:
    nothing = Change[float | None](before=None, after=None)
    text = card(None, example_compensation(perplexity=nothing, validation_loss=nothing))
    assert "- Quality was not measured." in text
