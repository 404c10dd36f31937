import re
from html.parser import HTMLParser

import pytest

from grasp_lightning.plan import FactorizeLinear, Plan
from grasp_lightning.reporting.metrics import Pair, Seconds
from grasp_lightning.reporting.page import render_report
from tests.unit.reporting.example import (
    CONFIG,
    drop_metrics,
    drop_plan,
    example_metrics,
    example_plan,
    example_scores,
    narrowing_metrics,
    narrowing_plan,
)

HOSTILE = "</title><script>alert(1)</script><img src=x onerror=y>\"'{{ 7 * 7 }}"
VOID = {"meta", "img", "link", "br", "hr", "input"}


class Page(HTMLParser):
    """Collects elements and text, and checks that elements close in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def html() -> str:
    return render_report(example_metrics(), example_plan(), example_scores(), CONFIG)


def test_page_shows_numbers_ranks_settings_times_and_versions(html: str) -> None:
    text = Page(html).text
    for expected in (
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        "134,515,008",
        "x 2.25",
        "16,352 predicted tokens of held-out text",
        "98.4 MB on disk",
        "Ranks of all 56 replaced linears",
        "mlp.down_proj",
        "keep_ratio: 0.1",
        "Score singular components",
        "1 min 1 s",
        "2.13.0+cpu",
    ):
        assert expected in text


def test_page_loads_nothing_from_elsewhere(html: str) -> None:
    page = Page(html)
    assert page.open == []
    assert not page.all("script")
    assert not page.all("link")
    for _, attributes in page.elements:
        for name in ("src", "href", "srcset", "data", "action"):
            assert (attributes.get(name) or "data:").startswith(("data:", "#"))
    assert not re.search(r"@import|url\(|https?://", html)


def test_page_is_accessible(html: str) -> None:
    page = Page(html)
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("img")) == 4
    assert all(image["alt"] for image in page.all("img"))
    assert all("scope" in header for header in page.all("th"))
    assert len(page.all("h1")) == len(page.all("main")) == 1
    identifiers = {attributes.get("id") for _, attributes in page.elements}
    labels = {attributes.get("aria-labelledby") for _, attributes in page.elements}
    assert labels <= identifiers


def test_foreign_text_is_escaped_everywhere() -> None:
    metrics = example_metrics(model=HOSTILE, dtype=HOSTILE, versions={HOSTILE: HOSTILE})
    linear = FactorizeLinear(module=f"model.layers.1.{HOSTILE}", rank=2, components=(0, 1))
    plan = Plan(method="grasp", operations=(linear,))
    config = {"model": {"path": HOSTILE}}
    page = Page(render_report(metrics, plan, {}, config))
    assert not page.all("script")
    assert all(set(image) == {"src", "alt"} for image in page.all("img"))
    assert page.text.count(HOSTILE) >= 5


def test_equal_runs_give_equal_pages() -> None:
    def page() -> str:
        wanted = ("layer_similarity", "model.layers.22.mlp.up_proj")
        scores = {key: value for key, value in example_scores().items() if key.startswith(wanted)}
        return render_report(example_metrics(), example_plan(), scores, CONFIG)

    assert page() == page()


def test_dropped_layers_leave_out_what_they_do_not_have() -> None:
    page = Page(render_report(drop_metrics(), drop_plan(), {}, CONFIG))
    assert "3 decoder layers dropped" in page.text
    assert "Score singular components" not in page.text
    assert "Ranks of all" not in page.text
    assert len(page.all("img")) == 1


def test_an_almost_empty_run_still_renders() -> None:
    metrics = example_metrics(
        perplexity=Pair[float | None](dense=None, compressed=None),
        perplexity_tokens=None,
        source_bytes=None,
        seconds=Seconds(),
        peak_memory_bytes=None,
        versions={},
        layers=(),
    )
    page = Page(render_report(metrics, Plan(method="grasp"), {}, {}))
    assert "not measured" in page.text
    assert "Time per phase" not in page.text
    assert "None" not in page.text


def test_channels_of_narrowed_mlps_are_listed() -> None:
    page = Page(render_report(narrowing_metrics(), narrowing_plan(), {}, {}))
    assert "Channels of all 2 narrowed MLPs" in page.text
    for text in ("mlp.down_proj", "1024", "1536", "66.7%", "25.0%"):
        assert text in page.text
    unknown = Page(render_report(example_metrics(), narrowing_plan(), {}, {}))
    assert "1024" in unknown.text
    assert "66.7%" not in unknown.text


def test_ranks_without_scores_are_listed() -> None:
    linear = FactorizeLinear(module="model.layers.4.mlp.up_proj", rank=37, components=None)
    plan = Plan(method="grasp", operations=(linear,))
    page = Page(render_report(example_metrics(), plan, {}, {}))
    assert "Ranks of all 1 replaced linears" in page.text
    assert "37" in page.text
