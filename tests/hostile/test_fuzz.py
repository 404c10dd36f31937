"""Random values and files: exit code 2, one line, and nothing written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grasp_lightning.cli import COMMANDS
from grasp_lightning.config import CONFIGS
from grasp_lightning.config.keys import leaves
from grasp_lightning.errors import PlanError
from grasp_lightning.plan import Plan
from grasp_lightning.reading.tensors import read_checkpoint, read_metadata, read_tensors
from tests.hostile import corpus
from tests.hostile.test_corpus import refuse

KEYS = [
    (command, key)
    for command, kind in CONFIGS.items()
    for key, _ in leaves(kind)
    # A small number of these starts processes; and names of models of the hub are looked up there.
    if key not in ("trainer.devices", "trainer.num_nodes", "model", "model.path")
]
TEXTS = st.one_of(
    st.text(max_size=30),
    st.text(alphabet="[]{},:&*!|>'\"#%@`~-.0123456789eEx_\n\t\0 ", max_size=40),
    st.sampled_from((*corpus.NAMES, corpus.DEEP, corpus.LONG_NUMBER, "0x" + "f" * 5000)),
    st.sampled_from(("1e999", "-1", ".nan", "-.inf", "null", "1_000", "10e10", "[1,[2]]", "=")),
    st.sampled_from(("{a:1}", "true", "2020-13-45", "<<", "!!int x", "&a [*a]", "--help")),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS),
    lambda part: st.lists(part, max_size=3) | st.dictionaries(TEXTS, part, max_size=3),
    max_leaves=6,
)
FEW = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def absent(command: str) -> list[str]:
    """A command line with a missing model, so that no run can begin."""
    key = "model.path" if hasattr(CONFIGS[command], "trainer") else "model"
    has_output = "output_dir" in dict(leaves(CONFIGS[command]))
    return [command, f"--{key}=./absent", *(["--output_dir=run"] if has_output else [])]


@FEW
@given(place=st.sampled_from(KEYS), text=TEXTS)
def test_any_text_as_a_value(
    place: tuple[str, str], text: str, work: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    command, key = place
    refuse([*absent(command), f"--{key}={text}"], work.parent, capfd)


@FEW
@given(place=st.sampled_from(KEYS), value=VALUES, more=st.dictionaries(TEXTS, VALUES, max_size=1))
def test_any_value_in_a_file(
    place: tuple[str, str],
    value: object,
    more: dict[str, object],
    work: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    command, key = place
    content = value
    for name in reversed(key.split(".")):
        content = {name: content}
    assert isinstance(content, dict)
    text = yaml.safe_dump({**content, **more}, allow_unicode=True)
    (work.parent / "a.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    refuse([*absent(command), "--config=../a.yaml"], work.parent, capfd)


@FEW
@given(command=st.sampled_from(list(COMMANDS)), content=st.binary(max_size=60) | TEXTS)
def test_any_bytes_as_a_file(
    command: str, content: bytes | str, work: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    raw = content if isinstance(content, bytes) else content.encode(errors="surrogatepass")
    (work.parent / "a.yaml").write_bytes(raw)
    refuse([*absent(command), "--config=../a.yaml"], work.parent, capfd)


@FEW
@given(key=st.sampled_from(["method", "options", "inputs", "operations", "complete"]), value=VALUES)
def test_any_value_in_a_plan(key: str, value: object) -> None:
    text = json.dumps({**json.loads(Plan(method="grasp").to_json()), key: value})
    try:
        plan = Plan.from_json(text)
    except PlanError as error:
        refusal = str(error)
    else:
        refusal = "; expected the content of a plan.json"
        assert Plan.from_json(plan.to_json()) == plan
    assert "\n" not in refusal
    assert refusal.endswith("; expected the content of a plan.json")


@FEW
@given(content=st.binary(max_size=80))
@pytest.mark.parametrize("read", [read_tensors, read_metadata, read_checkpoint])
def test_any_bytes_as_tensors(read: Callable[[Path], Any], content: bytes, work: Path) -> None:
    file = work / "a.safetensors"
    file.write_bytes(content)
    with pytest.raises(PlanError, match=r"a\.safetensors is damaged: ") as raised:
        read(file)
    assert "\n" not in str(raised.value)
