"""Model cards: README.md of a written model, with the front matter that the hub reads."""

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import yaml
from huggingface_hub import CardData, RepoCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from grasp_lightning.plan import (
    AddBias,
    AddSeam,
    FactorizeRows,
    Plan,
    SetWeights,
    SliceStream,
    SparsifyLinear,
)
from grasp_lightning.reporting import card_phrases as phrases
from grasp_lightning.reporting.card_phrases import Values
from grasp_lightning.reporting.linears import module_place
from grasp_lightning.reporting.metrics import CompensationMetrics, Metrics
from grasp_lightning.reporting.servers import Servers
from grasp_lightning.reporting.tables import comparison_notes, comparison_rows, indices_text

_KEEPING = AddSeam | SetWeights | SparsifyLinear  # these do more than delete layers
_LICENCE_ID = re.compile(r"[a-z0-9][a-z0-9.+-]*")
# As card.md.jinja writes it.
_TITLE = re.compile(r"^# `([^`]+)`, (?:compressed|compensated)$", re.MULTILINE)
_LOADING = re.compile(r"^## How to load[ \t]*$", re.MULTILINE)
_LICENCE = re.compile(r"^## Licen[cs]e[ \t]*$", re.MULTILINE)
_HEADING = re.compile(r"^##? ", re.MULTILINE)
_SECTION = re.compile(r"^## Compensation\b", re.MULTILINE)
# What a card says of a compressed model, and what it says once that model was trained.
_ADAPTED = {
    "It was not trained after compression.": "It was trained after compression: see Compensation.",
    "`plan.json` of the run that wrote this model": "`plan.json` of the run that compressed it",
    "- Perplexity was measured on": "- The perplexity under Numbers was measured on",
    "Zeros are stored like other weights, so the model is no smaller than the base model.": (
        "The training after that may have changed the zeros."
    ),
    "- Quality was not measured.": "- Quality was not measured before Compensation.",
}


def model_card(
    metrics: Metrics,
    plan: Plan,
    *,
    origin_name: str,
    licence: str | None,
    licence_files: Sequence[str],
    config: Values,
    servers: Servers,
) -> str:
    """Return the README.md of a compressed model, without local paths and times."""
    base_model = phrases.public_name(origin_name)
    # Linears no longer have the shapes that the family builds.
    is_narrowed = plan.channels or plan.heads
    is_low_rank = plan.ranks or plan.row_ranks or plan.removed_blocks
    kind = "low-rank" if is_low_rank else "narrowed" if is_narrowed else ""
    kind = "sliced" if _slicing(plan) else kind
    text = _render(
        "card.md.jinja",
        kind="compressed",
        base_model=base_model,
        metrics=metrics,
        version=_version(metrics),
        layers=indices_text(metrics.changed_layers),
        num_linears=len(plan.ranks),
        num_mlps=len(plan.channels),
        num_attentions=len(plan.heads),
        experts=_experts(plan),
        num_biases=sum(isinstance(op, AddBias) for op in plan.operations),
        removed=_removed(plan),
        factored=_factored(plan),
        trimmed=_trimmed(metrics),
        merges=_merges(plan),
        correction=_correction(plan),
        directions=_slicing(plan),
        only_deletes=not any(isinstance(op, _KEEPING) for op in plan.operations),
        zero_share=f"{100 * metrics.zero_ratio:.1f}%" if metrics.zero_ratio else "",
        removed_share=f"{100 * metrics.removed_ratio:.1f}% of all parameters were removed",
        special=servers.special,
        trained_span=_trained_span(plan),
        options=_options(plan),
        calibration=phrases.text_source(config, "calibration"),
        evaluation=phrases.text_source(config, "evaluation"),
        is_measured=metrics.perplexity.compressed is not None,
        rows=comparison_rows(metrics),
        notes=comparison_notes(metrics),
        servers=servers.rows(metrics.parameters.dense - metrics.parameters.compressed),
        licence=licence,
        licence_files=sorted(licence_files),
    )
    kind = kind or ("sparse" if metrics.zero_ratio else "layer-pruning")
    return _card(_front_matter(kind, base_model, licence, licence_files), text)


def _factored(plan: Plan) -> str:
    """Return the modules whose rows became factors, and of how many tokens; empty if none did."""
    found = []
    for op in plan.operations:
        if isinstance(op, FactorizeRows):
            ranked = (op.groups.count(str(g)) for g, rank in enumerate(op.group_ranks, 1) if rank)
            modules = " and ".join(map(phrases.code_span, op.modules))
            found.append(f"{sum(ranked):,} of {len(op.groups):,} tokens in {modules}")
    return "; of ".join(found)


def _trimmed(metrics: Metrics) -> str:
    """Return the texts whose tokens stayed; empty if all tokens did."""
    texts = () if metrics.vocabulary is None else metrics.vocabulary.texts
    return " and ".join(phrases.code_span(text.name) for text in texts if text.is_named)


def copy_card(
    form: str,
    content: Values,
    *,
    library: str,
    base_model: str,
    licence: str | None,
    licence_files: Sequence[str],
    source_card: str | None,
) -> str:
    """Return the README.md of a copy of a model: exported, or with a smaller vocabulary.

    Args:
        form: Form of the copy: the name of its template, and a tag for the hub.
        content: Values that this template needs besides the others.
        library: Library that opens it, for the hub.
        base_model: Name of the base model.
        licence: Licence of the base model.
        licence_files: Names of the files with its text.
        source_card: Name of the file with the card of the source, None if it had none.
    """
    text = _render(
        f"card_{form}.md.jinja",
        **content,
        base_model=base_model,
        licence=licence,
        licence_files=sorted(licence_files),
        source_card=source_card,
    )
    return _card(_front_matter(form, base_model, licence, licence_files, library), text)


def compensated_card(
    source_card: str | None,
    metrics: CompensationMetrics,
    *,
    base_model: str,
    licence: str | None,
    licence_files: Sequence[str],
    config: Values,
    servers: Servers,
) -> str:
    """Return the README.md of a compensated model, without local paths and times.

    An existing card, also a foreign one, gets a section on the training, before that on loading or
    at its end; otherwise there is a new, short one.
    """
    base_model = phrases.public_name(base_model)
    content = phrases.training_content(metrics, base_model, config)
    card = _parsed(source_card or "")
    data = card.data
    if not len(data):
        data = _front_matter("compensated", base_model, licence, licence_files)
    data["tags"] = _extended_list(data.get("tags"), "compensated")
    if dataset := phrases.dataset_of(metrics, config):
        data["datasets"] = _extended_list(data.get("datasets"), dataset)
    if card.text.strip():
        return _card(data, _extended(card.text, content))
    text = _render(
        "card.md.jinja",
        **content,
        kind="compensated",
        number=None,
        version=_version(metrics),
        special=servers.special,
        is_measured=(metrics.perplexity.after, metrics.validation_loss.after) != (None, None),
        servers=servers.rows(),
        licence=licence,
        licence_files=sorted(licence_files),
    )
    return _card(data, text)


def base_model_of(card: str) -> str | None:
    """Return the base model's name from a card of ours, None from any other."""
    title = _TITLE.search(card)
    return title[1] if title else None


def _render(template: str, **content: object) -> str:
    """Return Markdown; foreign text in a template must pass the filter ``code``."""
    return _template(template).render(content)


@cache
def _template(name: str) -> Template:
    environment = Environment(
        loader=PackageLoader("grasp_lightning", "reporting"),
        autoescape=False,  # Markdown: code_span quotes foreign text
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["code"] = phrases.code_span
    return environment.get_template(name)


def _card(data: CardData, text: str) -> str:
    return f"---\n{data.to_yaml()}\n---\n{text}"


def _parsed(card: str) -> RepoCard:
    """Return front matter and text of a card; unreadable front matter stays in the text.

    It is no ``ModelCard``, which would read a single tag as a list of letters.
    """
    text, empty = card.removeprefix("\ufeff").replace("\r\n", "\n"), "---\n{}\n---\n\n"
    try:
        return RepoCard(text if REGEX_YAML_BLOCK.search(text) else empty + text)
    # An impossible date, a key that is not a string, thousands of brackets.
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        return RepoCard(empty + text)


def _front_matter(
    tag: str,
    base_model: str,
    licence: str | None,
    licence_files: Sequence[str],
    library: str = "transformers",
) -> CardData:
    content: dict[str, Any] = {  # Any: values of YAML
        "library_name": library,
        "pipeline_tag": "text-generation",
    }
    if phrases.is_hub_name(base_model):
        content["base_model"] = base_model
    # The hub accepts only its own identifiers, and a name for any other licence.
    if licence is not None and _LICENCE_ID.fullmatch(licence.lower()):
        content["license"] = licence.lower()
    elif licence is not None:
        content |= {"license": "other", "license_name": licence}
        content |= {"license_link": min(licence_files)} if licence_files else {}
    return CardData(**content, tags=["grasp", "compressed", tag])


def _extended_list(value: object, item: str) -> list[object]:
    items = value if isinstance(value, list) else [] if value is None else [value]
    return items if item in items else [*items, item]


def _extended(text: str, content: Values) -> str:
    if base_model_of(text) is not None:
        for old, new in _ADAPTED.items():
            text = text.replace(old, new)
    earlier = len(_SECTION.findall(text))
    section = _render(
        "card_compensation.md.jinja", **content, number=earlier + 1 if earlier else None
    ).rstrip()
    text = _with_licence_line(text, content["data_licence"])
    loading = _LOADING.search(text)
    if loading is None:
        return f"{text.rstrip()}\n\n{section}\n"
    return f"{text[: loading.start()]}{section}\n\n{text[loading.start() :]}"


def _with_licence_line(text: str, line: str) -> str:
    heading = _LICENCE.search(text)
    if heading is None or line in text:
        return text
    following = _HEADING.search(text, heading.end())
    end = len(text) if following is None else following.start()
    rest = "\n" + text[end:] if text[end:] else ""
    return f"{text[:end].rstrip()}\n\n{line}\n{rest}"


def _removed(plan: Plan) -> str:
    """Return the removed layers and blocks as text, empty for methods that only drop layers."""
    if plan.options.get("removable") is None and not plan.removed_blocks:
        return ""
    layers: dict[str, list[int]] = {"layer": list(plan.dropped_layers)}
    for index, kind in map(module_place, plan.removed_blocks):
        layers.setdefault(kind, []).append(index)
    names = {"layer": "", "attention": "the attention of ", "mlp": "the MLP of "}
    return ", ".join(
        f"{names[kind]}layer{'s' if len(indices) > 1 else ''} {indices_text(sorted(indices))}"
        for kind, indices in layers.items()
        if indices
    )


def _merges(plan: Plan) -> str:
    """Return which layers were merged as text, empty for methods that merge none."""
    return "; ".join(
        f"layer{'s' if len(absorbed) > 1 else ''} {indices_text(absorbed)} into layer {base}"
        for base, absorbed in plan.merged_layers.items()
    )


def _trained_span(plan: Plan) -> tuple[int, int] | None:
    """Return the first and last of the layers that one trained layer replaces, or None."""
    layers = plan.selected_layers
    if not plan.options.get("epochs") or not layers:
        return None
    return layers[0], layers[-1]


def _experts(plan: Plan) -> str:
    """Return how many experts all mixtures keep; empty if none lose any."""
    numbers = {*plan.experts.values()}
    return "".join(f"all mixtures keep {kept} of {total} experts" for kept, total in numbers)


def _slicing(plan: Plan) -> int:
    """Return the number of kept directions of the hidden states, 0 if they are not sliced."""
    return next((op.width for op in plan.operations if isinstance(op, SliceStream)), 0)


def _correction(plan: Plan) -> str:
    """Return a sentence on what makes up for deleted layers, empty if nothing does."""
    num_seams = sum(isinstance(operation, AddSeam) for operation in plan.operations)
    if num_seams:
        maps = "A linear map corrects" if num_seams == 1 else f"{num_seams} linear maps correct"
        return f"{maps} the hidden states where they were."
    if plan.dropped_layers and any(isinstance(op, SetWeights) for op in plan.operations):
        return "Weights before them were changed to make up for it."
    return ""


def _options(plan: Plan) -> dict[str, str]:
    return {
        name: indices_text(value) if isinstance(value, tuple) else str(value)
        for name, value in sorted(plan.options.items())
        if value is not None
    }


def _version(metrics: Metrics | CompensationMetrics) -> str:
    version = metrics.versions.get("grasp_lightning")
    return "" if version is None else f" {phrases.code_span(version)}"
