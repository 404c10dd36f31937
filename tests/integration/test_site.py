"""The documentation site: built without warnings, and without anything to fetch."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


def build(folder: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [Path(sys.executable).with_name("mkdocs"), "build", "--strict", "--site-dir", "built"],
        cwd=folder,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of all that the site is made from, and that its pages link to."""
    for name in ("docs", "scripts", "benchmarks", "configs", "plugins"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    return tmp_path


def test_the_site_is_built_and_fetches_nothing(sources: Path) -> None:
    done = build(sources)
    assert done.returncode == 0, done.stderr
    pages = list((sources / "built").rglob("*.html"))
    assert len(pages) >= len(list((ROOT / "docs").rglob("*.md")))
    fetched = r"<(?:script|img|iframe)\b[^>]*\bsrc=\"https?:|<link\b[^>]*\bhref=\"https?:"
    assert [page.name for page in pages if re.search(fetched, page.read_text("utf-8"))] == []


def test_lost_pages_and_links_stop_the_build(sources: Path) -> None:
    page = "# A page\n\n[a](nowhere.md), [b](results.md#nowhere)\n"
    (sources / "docs/extra.md").write_text(page, encoding="utf-8")
    done = build(sources)
    assert done.returncode != 0
    for reason in ('included in the "nav"', "'nowhere.md', but the target", "anchor '#nowhere'"):
        assert reason in done.stderr


def test_a_lost_file_outside_stops_the_build(sources: Path) -> None:
    (sources / "docs/index.md").write_text("# Outside\n\n[x](../nowhere.md)\n", encoding="utf-8")
    done = build(sources)
    assert done.returncode != 0
    assert "index.md links to ../nowhere.md, which does not exist" in done.stderr


def test_a_link_to_a_file_outside_becomes_its_path(sources: Path) -> None:
    index = sources / "docs/index.md"
    link = "See [the programs](../benchmarks/README.md#memory)."
    index.write_text(f"{index.read_text(encoding='utf-8')}\n{link}\n", encoding="utf-8")
    assert build(sources).returncode == 0
    built = (sources / "built/index.html").read_text(encoding="utf-8")
    assert "<p>See <code>benchmarks/README.md</code>.</p>" in built
