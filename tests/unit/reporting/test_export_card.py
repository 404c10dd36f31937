import pytest
import yaml

from grasp_lightning.reporting.card import base_model_of, copy_card, model_card
from tests.unit.reporting.example import CONFIG, LOW_RANK_SERVERS, example_metrics, example_plan

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def card(
    base_model: str = HUB_NAME,
    licence: str | None = "Apache-2.0",
    source_card: str | None = "C.md",
    num_linears: int = 56,
    num_narrowed: int = 0,
) -> str:
    facts = {
        "ranks": {f"linear {index}": 3 for index in range(num_linears)},
        "shapes": {f"linear {index}": [2, 3] for index in range(num_narrowed)},
        "parameters": {"dense": 134_515_008, "compressed": 109_013_760},
        "dtype": "bfloat16",
    }
    return copy_card(
        "dense",
        {"facts": facts},
        library="transformers",
        base_model=base_model,
        licence=licence,
        licence_files=["NOTICE", "LICENSE"] if licence else [],
        source_card=source_card,
    )


def front_matter(text: str) -> dict:
    content = yaml.safe_load(text.split("---\n", 2)[1])
    assert isinstance(content, dict)
    return content


def compressed_card(origin_name: str) -> str:
    return model_card(
        example_metrics(),
        example_plan(),
        origin_name=origin_name,
        licence=None,
        licence_files=[],
        config=CONFIG,
        servers=LOW_RANK_SERVERS,
    )


def test_the_card_says_that_the_copy_is_not_smaller() -> None:
    text = card()
    for expected in (
        "**This copy is neither smaller nor faster**",
        "| parameters | 109,013,760 | 134,515,008 |",
        "The factors of\n56 linears",
        "Weights are stored in bfloat16.",
        "The card of the compressed model, `C.md`,",
        "Its text is in `LICENSE`, `NOTICE`.",
    ):
        assert expected in text
    assert "trust_remote_code" not in text


def test_narrowed_linears_are_named_apart() -> None:
    text = card(num_narrowed=6)
    assert "factors of 56 linears are multiplied" in text
    assert "6 narrowed linears are padded with zeros" in text
    assert "factors" not in card(num_linears=0, num_narrowed=6)
    assert "zeros" not in card()


def test_front_matter_names_base_model_and_licence() -> None:
    assert front_matter(card()) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": HUB_NAME,
        "license": "apache-2.0",
        "tags": ["grasp", "compressed", "dense"],
    }
    assert "base_model" not in front_matter(card("llama"))


def test_unknown_facts_are_stated() -> None:
    text = card(licence=None, source_card=None)
    assert "license" not in front_matter(text)
    assert "does not know the licence of the base model" in text
    assert "had no card" in text
    assert "None" not in text


@pytest.mark.parametrize(
    ("origin_name", "expected"),
    [(HUB_NAME, HUB_NAME), ("/home/ann/llama", "llama"), ("f/model.Q4_1.gguf", "model.Q4_1.gguf")],
)
def test_the_base_model_is_read_from_the_compressed_card(origin_name: str, expected: str) -> None:
    assert base_model_of(compressed_card(origin_name)) == expected


def test_a_foreign_card_names_no_base_model() -> None:
    assert base_model_of("# A model\n\nIt was compressed.\n") is None
