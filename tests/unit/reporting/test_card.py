from dataclasses import replace
from typing import Any

import pytest
import yaml

from grasp_lightning.plan import DropLayers, Plan, RemoveBlock, SparsifyLinear
from grasp_lightning.reporting.card import model_card
from grasp_lightning.reporting.metrics import Metrics, Pair
from grasp_lightning.reporting.servers import Servers
from tests.unit.reporting.example import (
    CONFIG,
    LOW_RANK_SERVERS,
    drop_metrics,
    drop_plan,
    example_metrics,
    example_plan,
    narrowing_metrics,
    narrowing_plan,
)

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def card(metrics: Metrics | None = None, **changes: Any) -> str:  # noqa: ANN401  any argument of model_card
    arguments: dict[str, Any] = {
        "plan": example_plan(),
        "origin_name": HUB_NAME,
        "licence": "Apache-2.0",
        "licence_files": ["LICENSE", "NOTICE"],
        "config": CONFIG,
        "servers": LOW_RANK_SERVERS,
    }
    return model_card(metrics or example_metrics(), **{**arguments, **changes})


def front_matter(text: str) -> dict:
    start, matter, _ = text.split("---\n", 2)
    assert start == ""
    content = yaml.safe_load(matter)
    assert isinstance(content, dict)
    return content


def test_front_matter_is_what_the_hub_reads() -> None:
    assert front_matter(card()) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": HUB_NAME,
        "license": "apache-2.0",
        "tags": ["grasp", "compressed", "low-rank"],
    }


def test_card_says_what_was_done_and_what_it_cost() -> None:
    text = card()
    for expected in (
        "56 linears in decoder layers 17, 19-24, 26",
        "19.0% of all parameters were removed",
        "`keep_ratio: 0.1`",
        "`pydoc`, 64 windows of 256 tokens",
        "| parameters | 134,515,008 | 109,013,760 | -19.0% |",
        "| perplexity | 18.25 | 41.02 | x 2.25 |",
        "measured on `pydoc`, in windows of 512 tokens",
        "no guarantee of quality",
        "arXiv:2501.00339",
        "`Apache-2.0`",
        "`LICENSE`, `NOTICE`.",
    ):
        assert expected in text


def test_low_rank_layers_need_the_package_or_remote_code() -> None:
    assert "import grasp_lightning" in card()
    assert "trust_remote_code=True" in card()


def test_narrowed_mlps_are_counted_apart_from_low_rank_linears() -> None:
    text = card(narrowing_metrics(), plan=narrowing_plan())
    assert "decoder layers 3, 5 have\n1 low-rank linear, 2 narrowed MLPs, and 19.0% of" in text
    assert "open the low-rank layers" in text
    plan = narrowing_plan()
    narrowed, only_mlps = Servers(special="narrowed"), plan.operations[2:]
    text = card(narrowing_metrics(), plan=replace(plan, operations=only_mlps), servers=narrowed)
    assert "decoder layers 3, 5 have\n1 narrowed MLP, and 19.0% of" in text
    assert "open the narrowed layers" in text
    assert "trust_remote_code=True" in text
    assert front_matter(text)["tags"] == ["grasp", "compressed", "narrowed"]


def test_an_ordinary_model_with_narrower_mlps_needs_transformers_only() -> None:
    plan = narrowing_plan()
    narrowed = replace(plan, operations=plan.operations[2:])
    text = card(narrowing_metrics(), plan=narrowed, servers=Servers())
    assert "import grasp_lightning" not in text
    assert "trust_remote_code" not in text
    assert "an ordinary model with narrower MLPs: transformers alone opens it" in text
    assert "only drops layers" not in text


def test_a_model_with_dropped_layers_needs_transformers_only() -> None:
    text = card(drop_metrics(), plan=drop_plan(), servers=Servers())
    assert "import grasp_lightning" not in text
    assert "trust_remote_code" not in text
    assert "decoder layers 24-26 are dropped" in text
    assert front_matter(text)["tags"] == ["grasp", "compressed", "layer-pruning"]


def test_a_sparse_model_is_called_no_smaller() -> None:
    dense = Pair(dense=1000, compressed=1000)
    metrics = example_metrics(
        method="wanda", removed_ratio=0.0, zero_ratio=0.2, parameters=dense, bytes=dense
    )
    operation = SparsifyLinear(module="model.layers.0.mlp.up_proj", pattern="2:4", zeros=200)
    plan = Plan(method="wanda", operations=(operation,))
    text = card(metrics, plan=plan, servers=Servers())
    assert "20.0% of all parameters. Zeros are stored like other weights, so the model is" in text
    assert "20.0% of all parameters were set to zero. They are stored like all others" in text
    assert "This is an ordinary model with zeros among its weights" in text
    assert "A smaller version" not in text
    assert "deleted" not in text
    assert "only drops" not in text
    assert front_matter(text)["tags"] == ["grasp", "compressed", "sparse"]


def test_what_is_removed_entirely_is_named() -> None:
    options = {"removable": "layers_and_blocks"}
    blocks = [
        RemoveBlock(block=f"model.layers.{index}.{kind}", modules=(f"model.layers.{index}.x",))
        for index, kind in ((3, "attention"), (5, "attention"), (4, "mlp"))
    ]
    plan = Plan(method="grasp_plus", options=options, operations=tuple(blocks))
    text = card(narrowing_metrics(), plan=plan)
    removed = "Removed entirely: the attention of layers 3, 5, the MLP of layer 4. In total,"
    assert removed in " ".join(text.split())
    assert "open the low-rank layers" in text
    assert "only drops layers" not in text
    assert front_matter(text)["tags"] == ["grasp", "compressed", "low-rank"]
    plan = replace(plan, operations=(DropLayers(layers=(7, 8)),))
    text = card(narrowing_metrics(), plan=plan, servers=Servers())
    assert ". Removed entirely: layers 7-8. In total," in " ".join(text.split())
    assert "transformers alone opens it" in text


@pytest.mark.parametrize(
    "origin_name",
    ["/home/ann/models/llama", "../models/llama", "C:\\models\\llama", "~/models/llama/", "llama"],
)
def test_a_local_model_shows_no_path_and_no_base_model(origin_name: str) -> None:
    text = card(origin_name=origin_name)
    assert "base_model" not in front_matter(text)
    assert "# `llama`, compressed" in text
    for private in ("ann", "models/llama", "models\\llama"):
        assert f"/{private}" not in text
        assert f"`{private}" not in text


def test_a_gguf_file_in_a_folder_is_not_a_hub_name() -> None:
    assert "base_model" not in front_matter(card(origin_name="folder/model.Q4_1.gguf"))


def test_paths_of_the_configuration_stay_private() -> None:
    secret = "/srv/secret/corpus.txt"
    config = {
        "output_dir": "/srv/secret/run",
        "model": {"path": "/srv/secret/model"},
        "calibration": {"source": "file", "path": secret, "num_samples": 4, "seqlen": 8},
        "evaluation": {"source": "file", "path": secret, "seqlen": 8},
    }
    text = card(config=config)
    assert "secret" not in text
    assert "Calibration text: a local file, 4 windows of 8 tokens." in text


def test_all_sources_of_a_mixture_are_named_with_their_windows_and_conditions() -> None:
    calibration = {
        "source": ["wikitext2", "file", "instructions", "alpaca", "self"],
        "path": ["/srv/secret/a.jsonl", "/srv/secret/b.json"],
        "weights": [4, 1, 1, 1, 1],
        "num_samples": 16,
        "seqlen": 8,
    }
    text = card(config={"calibration": calibration})
    assert "secret" not in text
    assert (
        "Calibration text: `wikitext2` (8), a local file (2), a local file of instructions (2), "
        "`alpaca` (2), text that the base model generated (2), 16 windows of 8 tokens."
    ) in text
    assert (
        "Terms of use of that text: `wikitext2` CC BY-SA 3.0 and GFDL; `alpaca` CC BY-NC 4.0."
    ) in text
    alone = card(config={"calibration": {"source": "self", "num_samples": 2, "seqlen": 8}})
    assert "Calibration text: text that the base model generated, 2 windows of 8 tokens." in alone
    assert "Terms of use of" not in alone


def test_times_of_the_run_do_not_change_the_card() -> None:
    slow = example_metrics(peak_memory_bytes=1, seconds=drop_metrics().seconds)
    assert card(slow) == card()


def test_a_licence_that_the_hub_does_not_know_gets_a_name_and_a_link() -> None:
    matter = front_matter(card(licence="My: own licence\nv2", licence_files=["LICENSE.txt"]))
    assert matter["license"] == "other"
    assert matter["license_name"] == "My: own licence\nv2"
    assert matter["license_link"] == "LICENSE.txt"


def test_an_unknown_licence_is_not_invented() -> None:
    text = card(licence=None, licence_files=[])
    assert "license" not in front_matter(text)
    assert "does not know the licence of the base model" in text
    assert "Its text is in" not in text


def test_foreign_text_stays_inside_code_spans() -> None:
    text = card(origin_name="a`b\n---\n# <script>x{{ 1 }}")
    assert "# `a'b --- # <script>x{{ 1 }}`, compressed" in text
    assert front_matter(text)["tags"][0] == "grasp"


def test_unmeasured_perplexity_is_said_so() -> None:
    pair = Pair[float | None](dense=None, compressed=None)
    text = card(example_metrics(perplexity=pair, perplexity_tokens=None))
    assert "Quality was not measured." in text
    assert "Perplexity was measured" not in text


def test_card_without_configuration_or_versions_is_whole() -> None:
    text = card(example_metrics(versions={}), config={})
    assert "Calibration text" not in text
    assert "None" not in text
    assert "measured on held-out text" in text
