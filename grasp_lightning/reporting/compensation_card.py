"""Model card of a compensated model: the compressed model's own card, and what training changed."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import yaml

from grasp_lightning.data.instruction_files import HUB_INSTRUCTIONS
from grasp_lightning.reporting.card import (
    base_model_of,
    card_template,
    code_span,
    front_matter,
    is_hub_name,
    last_part,
    public_name,
    text_source,
)
from grasp_lightning.reporting.metrics import CompensationMetrics
from grasp_lightning.reporting.tables import (
    comparison_rows,
    epochs_text,
    measurement_notes,
    samples_text,
    steps_text,
)

Values = Mapping[str, Any]  # Any: values of YAML

_TAG = "compensated"
_FRONT_MATTER = re.compile(r"\A---[ \t]*\n(.*?)^---[ \t]*(?:\n|\Z)", re.MULTILINE | re.DOTALL)
_LOADING = re.compile(r"^## How to load[ \t]*$", re.MULTILINE)
_LICENCE = re.compile(r"^## Licen[cs]e[ \t]*$", re.MULTILINE)
_HEADING = re.compile(r"^##? ", re.MULTILINE)
_SECTION = re.compile(r"^## Compensation\b", re.MULTILINE)
# What card.md.jinja says of a compressed model, and what is true of one that was trained after it.
_ADAPTED = {
    "It was not trained after compression.": "It was trained after compression: see Compensation.",
    "`plan.json` of the run that wrote this model": "`plan.json` of the run that compressed it",
    "- Perplexity was measured on": "- The perplexity under Numbers was measured on",
    "- Quality was not measured.": "- Quality was not measured before Compensation.",
}


class _Card(NamedTuple):
    """A card in two parts.

    Attributes:
        matter: What the hub reads, None if there is nothing that it can read.
        text: Markdown.
    """

    matter: Mapping[str, object] | None
    text: str


def compensated_card(
    source_card: str | None,
    metrics: CompensationMetrics,
    *,
    base_model: str,
    licence: str | None,
    licence_files: Sequence[str],
    config: Values,
) -> str:
    """Return the README.md of a compensated model.

    A card of the compressed model is kept, and gains a section on the training. Nothing that is
    added holds paths of this machine or times, so that equal runs give equal cards.

    Args:
        source_card: The compressed model's own card; None gives a new, short one. It may be of
            foreign origin: then the section comes at its end.
        metrics: Numbers of the run.
        base_model: Name of the model that was compressed, as ``base_model_of`` gives it:
            ``owner/name`` counts as a hub name, so a local folder must not be given that way; of
            any other path only the last part is printed.
        licence: Licence of the base model, None if unknown.
        licence_files: Names of the licence files that lie beside the card.
        config: Resolved configuration, nested, of plain values.

    Returns:
        YAML front matter, then Markdown.
    """
    base_model = public_name(base_model)
    content = _content(metrics, base_model, config)
    new_matter = front_matter(
        _TAG, base_model if is_hub_name(base_model) else None, licence, licence_files
    )
    card = _Card(None, "") if source_card is None else _split(source_card)
    matter = yaml.safe_load(new_matter) if card.matter is None else card.matter
    if card.text.strip():
        text = _extended(card.text, content)
    else:
        text = card_template("compensation_card.md.jinja").render(
            **content,
            number=None,
            licence=licence,
            licence_files=sorted(licence_files),
            version=metrics.versions.get("grasp_lightning"),
        )
    return f"---\n{_with_tags(matter, _dataset(metrics, config))}---\n{text}"


def _split(card: str) -> _Card:
    """Return front matter and text; front matter that cannot be read is left in the text."""
    card = card.removeprefix("\ufeff").replace("\r\n", "\n")
    if found := _FRONT_MATTER.match(card):
        try:
            matter = yaml.safe_load(found[1])
        except (yaml.YAMLError, ValueError):  # ValueError: a date that there is not
            matter = None
        if isinstance(matter, dict):
            return _Card(matter, card[found.end() :])
    return _Card(None, "\n" + card)


def _with_tags(matter: Mapping[str, object], dataset: str | None) -> str:
    """Return front matter with the tag of this card, and the data set where the hub has it."""
    content = {**matter, "tags": _extended_list(matter.get("tags"), _TAG)}
    if dataset is not None:
        content["datasets"] = _extended_list(matter.get("datasets"), dataset)
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _extended_list(value: object, item: str) -> list[object]:
    items = value if isinstance(value, list) else [] if value is None else [value]
    return items if item in items else [*items, item]


def _extended(text: str, content: Values) -> str:
    """Return a card's text with the section on the training, and the licence of the data."""
    if base_model_of(text) is not None:
        for old, new in _ADAPTED.items():
            text = text.replace(old, new)
    earlier = len(_SECTION.findall(text))
    section = card_template("compensation_section.md.jinja").render(
        **content, number=earlier + 1 if earlier else None
    )
    text = _with_licence_line(text, content)
    loading = _LOADING.search(text)
    if loading is None:
        return f"{text.rstrip()}\n\n{section.rstrip()}\n"
    return f"{text[: loading.start()]}{section.rstrip()}\n\n{text[loading.start() :]}"


def _with_licence_line(text: str, content: Values) -> str:
    heading = _LICENCE.search(text)
    line = card_template("data_licence.md.jinja").render(**content).strip()
    if heading is None or line in text:
        return text
    following = _HEADING.search(text, heading.end())
    end = len(text) if following is None else following.start()
    rest = "\n" + text[end:] if text[end:] else ""
    return f"{text[:end].rstrip()}\n\n{line}\n{rest}"


def _content(metrics: CompensationMetrics, base_model: str, config: Values) -> dict[str, object]:
    """Return what the templates print."""
    return {
        "base_model": base_model,
        "metrics": metrics,
        "what": _what(metrics, config),
        "goal": _goal(metrics, base_model, config),
        "schedule": _schedule(metrics, config),
        "samples": samples_text(metrics.samples),
        "length": _length(metrics, config),
        "evaluation": text_source(config, "evaluation"),
        "rows": comparison_rows(metrics),
        "notes": measurement_notes(metrics),
    }


def _what(metrics: CompensationMetrics, config: Values) -> str:
    """Return what was trained, as a sentence's end."""
    if metrics.train == "factors":
        return "the factors of the low-rank linears themselves"
    lora = _section(config, "lora")
    if targets := lora.get("targets"):
        place = ", ".join(code_span(str(target)) for target in targets)
    elif metrics.train == "lora_on_factors":
        place = "the factors of the low-rank linears"
    else:
        place = "all linears of the decoder layers"
    options = _options(lora, "rank", "alpha", "dropout")
    return f"LoRA adapters{options} on {place}, merged into the weights at the end"


def _goal(metrics: CompensationMetrics, base_model: str, config: Values) -> str:
    """Return what was learned, as a sentence's end."""
    if metrics.objective == "distill":
        return _teacher(base_model, _section(config, "distillation"))
    if metrics.objective == "text":
        return "the next token of plain text"
    if metrics.objective != "instruction":
        return code_span(metrics.objective)
    learned = _section(config, "data").get("train_on_inputs")
    if learned is None:
        return "instructions with answers"
    return "instructions and their answers" if learned else "answers to instructions alone"


def _teacher(base_model: str, distillation: Values) -> str:
    teacher = str(distillation.get("teacher") or "")
    # A path like models/llama has the form of a hub name: only a known one is printed whole.
    name = teacher if teacher == base_model else last_part(teacher)
    who = f"the teacher {code_span(name)}" if name else "a teacher"
    return f"the distribution that {who} predicts{_options(distillation, 'temperature', 'mix')}"


def _options(values: Values, *names: str) -> str:
    """Return those options that are set, in brackets after a space."""
    options = [f"{name} {values[name]}" for name in names if values.get(name) is not None]
    return f" ({', '.join(options)})" if options else ""


def _schedule(metrics: CompensationMetrics, config: Values) -> str:
    """Return steps, batches and learning rate."""
    optimizer, training = _section(config, "optimizer"), _section(config, "training")
    settings = {
        "batch size": training.get("batch_size"),
        "learning rate": optimizer.get("learning_rate"),
        "schedule": optimizer.get("schedule"),
        "warm-up steps": optimizer.get("warmup_steps"),
        "weight decay": optimizer.get("weight_decay"),
        "gradients clipped to norm": optimizer.get("gradient_clip"),
    }
    options = [f"{name} {value}" for name, value in settings.items() if value is not None]
    return ", ".join([steps_text(metrics.steps), epochs_text(metrics.epochs), *options])


def _length(metrics: CompensationMetrics, config: Values) -> str | None:
    """Return how long samples are."""
    if _learns_text(metrics, config):
        seqlen = _section(config, "text").get("seqlen")
        return None if seqlen is None else f"{seqlen} tokens each"
    longest = _section(config, "data").get("max_length")
    return None if longest is None else f"at most {longest} tokens each"


def _dataset(metrics: CompensationMetrics, config: Values) -> str | None:
    """Return the hub's name of the data set that was learned from, None if it is no such one."""
    source = _section(config, "data").get("source")
    known = None if _learns_text(metrics, config) else HUB_INSTRUCTIONS.get(str(source))
    return None if known is None else known.repository


def _learns_text(metrics: CompensationMetrics, config: Values) -> bool:
    if metrics.objective == "distill":
        return bool(_section(config, "distillation").get("data") == "text")
    return metrics.objective == "text"


def _section(config: Values, name: str) -> Values:
    values = config.get(name)
    return values if isinstance(values, Mapping) else {}
