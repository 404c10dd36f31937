import json
import subprocess
import sys
from collections.abc import Iterator

import pytest

import grasp_lightning
from grasp_lightning.errors import OutputError
from grasp_lightning.reporting.metrics import DecoderLinears, Metrics, Pair
from tests.unit.reporting.example import drop_metrics, example_metrics, narrowing_metrics

# The contract for scripts: a key is never renamed or removed.
KEYS = {
    "model",
    "method",
    "dtype",
    "layers",
    "removed_ratio",
    "zero_ratio",
    "parameters.dense",
    "parameters.compressed",
    "bytes.dense",
    "bytes.compressed",
    "decoder_linears.parameters.dense",
    "decoder_linears.parameters.compressed",
    "decoder_linears.bytes.dense",
    "decoder_linears.bytes.compressed",
    "vocabulary",
    "source_bytes",
    "perplexity.dense",
    "perplexity.compressed",
    "perplexity_tokens",
    "loss_change.predicted",
    "loss_change.measured",
    "seconds.load",
    "seconds.sample",
    "seconds.similarity",
    "seconds.attribution",
    "seconds.curvature",
    "seconds.seam",
    "seconds.slice",
    "seconds.spread",
    "seconds.merges",
    "seconds.removals",
    "seconds.gradients",
    "seconds.factorize",
    "seconds.cut_losses",
    "seconds.refit",
    "seconds.save",
    "seconds.verify",
    "seconds.evaluate",
    "seconds.total",
    "peak_memory_bytes",
    "versions.grasp_lightning",
    "versions.python",
    "versions.torch",
    "evaluation",
    "throughput",
}


def leaves(content: dict, prefix: str = "") -> Iterator[str]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def test_keys_are_those_that_scripts_rely_on() -> None:
    content = example_metrics().to_dict()
    assert content.pop("channels") == {}  # a leaf for every narrowed MLP
    assert set(leaves(content)) == KEYS


def test_channels_are_read_back_and_may_be_missing() -> None:
    metrics = narrowing_metrics()
    content = json.loads(json.dumps(metrics.to_dict()))
    assert content["channels"]["model.layers.5.mlp.down_proj"] == {
        "dense": 1536,
        "compressed": 384,
    }
    assert Metrics.from_dict(content) == metrics
    del content["channels"]
    assert Metrics.from_dict(content).channels == {}


def test_what_does_not_apply_is_null_and_its_key_stays() -> None:
    pair = Pair(dense=2, compressed=1)
    metrics = Metrics(
        model="m",
        method="drop",
        dtype="float32",
        layers=(),
        removed_ratio=0.5,
        parameters=pair,
        bytes=pair,
        decoder_linears=DecoderLinears(parameters=pair, bytes=pair),
    )
    content = metrics.to_dict()
    assert content["perplexity"] == {"dense": None, "compressed": None}
    assert content["source_bytes"] is None
    assert set(leaves(content)) == {key for key in KEYS if not key.startswith("versions.")}
    assert Metrics.from_dict(content) == metrics


@pytest.mark.parametrize("metrics", [example_metrics(), drop_metrics()], ids=["grasp", "drop"])
def test_json_round_trip_gives_equal_metrics(metrics: Metrics) -> None:
    text = json.dumps(metrics.to_dict(), allow_nan=False)
    assert Metrics.from_dict(json.loads(text)) == metrics


def test_keys_of_a_later_version_are_ignored() -> None:
    content = {**example_metrics().to_dict(), "later": 1}
    assert Metrics.from_dict(content) == example_metrics()


def test_a_missing_key_is_named() -> None:
    content = example_metrics().to_dict()
    del content["bytes"]
    with pytest.raises(OutputError, match=r"bytes is missing.*metrics\.json"):
        Metrics.from_dict(content)


@pytest.mark.parametrize(
    ("key", "value"),
    [("parameters", 3), ("layers", 5), ("removed_ratio", "much"), ("versions", None)],
)
def test_a_value_of_another_type_is_one_clear_error(key: str, value: object) -> None:
    with pytest.raises(OutputError, match="not the metrics of a run"):
        Metrics.from_dict({**example_metrics().to_dict(), key: value})


def test_metrics_and_tables_load_no_torch_no_plotting_and_no_templates() -> None:
    # A bare package instead of the root, whose own imports are not tested here.
    code = (
        "import sys, types; root = types.ModuleType('grasp_lightning');"
        f"root.__path__ = {list(grasp_lightning.__path__)!r};"
        "sys.modules['grasp_lightning'] = root;"
        "import grasp_lightning.reporting.metrics, grasp_lightning.reporting.tables;"
        "heavy = {'torch', 'numpy', 'matplotlib', 'jinja2', 'yaml', 'transformers', 'lightning'};"
        "print(sorted(heavy & set(sys.modules)), 'rich' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[] True"
