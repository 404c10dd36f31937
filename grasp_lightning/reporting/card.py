"""Model cards: README.md of what is written, with the front matter that the hub reads."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from grasp_lightning.data.mixture import shares
from grasp_lightning.data.sources import source_licence
from grasp_lightning.plan import Plan
from grasp_lightning.reporting.linears import module_place
from grasp_lightning.reporting.metrics import Metrics, Pair
from grasp_lightning.reporting.tables import comparison_notes, comparison_rows, indices_text

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LICENCE_ID = re.compile(r"[a-z0-9][a-z0-9.+-]*")
# As card.md.jinja and compensation_card.md.jinja write it.
_TITLE = re.compile(r"^# `([^`]+)`, (?:compressed|compensated)$", re.MULTILINE)
_UNNAMED_SOURCES = {
    "file": "a local file",
    "instructions": "a local file of instructions",
    "self": "text that the base model wrote",
}


def model_card(
    metrics: Metrics,
    plan: Plan,
    *,
    origin_name: str,
    licence: str | None,
    licence_files: Sequence[str],
    config: Mapping[str, Any],  # Any: values of YAML
) -> str:
    """Return the README.md of a compressed model.

    It holds no paths of this machine and no times, so that equal runs give equal cards.

    Args:
        metrics: Numbers of the run.
        plan: Its decisions.
        origin_name: Name of the base model: ``owner/name`` counts as a hub name, so a local folder
            must not be given that way; of any other path only the last part is printed.
        licence: Licence of the base model as its own card or file names it, None if unknown.
        licence_files: Names of the licence files that lie beside the card.
        config: Resolved configuration, nested, of plain values.

    Returns:
        YAML front matter, then Markdown.
    """
    base_model = public_name(origin_name)
    return card_template("card.md.jinja").render(
        front_matter=front_matter(
            _kind(plan),
            base_model if is_hub_name(base_model) else None,
            licence,
            licence_files,
        ),
        base_model=base_model,
        metrics=metrics,
        layers=indices_text(metrics.layers),
        num_linears=len(plan.ranks),
        num_mlps=len(plan.channels),
        removed=_removed(plan),
        is_replaced=_is_replaced(plan),
        options=_options(plan),
        calibration=text_source(config, "calibration"),
        evaluation=text_source(config, "evaluation"),
        rows=comparison_rows(metrics),
        notes=comparison_notes(metrics),
        licence=licence,
        licence_files=sorted(licence_files),
    )


def export_card(
    *,
    base_model: str,
    num_linears: int,
    num_narrowed: int = 0,
    parameters: Pair[int],
    dtype: str,
    licence: str | None,
    licence_files: Sequence[str],
    source_card: str | None,
) -> str:
    """Return the README.md of a dense copy of a compressed model; it says that nothing is gained.

    Args:
        base_model: Name of the model that was compressed, as ``base_model_of`` gives it, so that
            ``owner/name`` is a hub name.
        num_linears: Number of linears whose factors were multiplied.
        num_narrowed: Number of narrowed linears that were filled up with zeros.
        parameters: Of the copy (dense) and of the model that it was made from (compressed).
        dtype: Floating point type of the weights.
        licence: Licence of the base model, None if unknown.
        licence_files: Names of the licence files that lie beside the card.
        source_card: Name of the compressed model's own card beside this one, None if it has none.

    Returns:
        YAML front matter, then Markdown.
    """
    hub_name = base_model if is_hub_name(base_model) else None
    return card_template("export_card.md.jinja").render(
        front_matter=front_matter("dense", hub_name, licence, licence_files),
        base_model=base_model,
        num_linears=num_linears,
        num_narrowed=num_narrowed,
        parameters=parameters,
        dtype=dtype,
        licence=licence,
        licence_files=sorted(licence_files),
        source_card=source_card,
    )


def base_model_of(card: str) -> str | None:
    """Return the base model's name that a card of a compressed or compensated model holds.

    Args:
        card: Content of a README.md.

    Returns:
        Hub name, or the name of a folder or file; None if the card is not one of ours.
    """
    title = _TITLE.search(card)
    return title[1] if title else None


def card_template(name: str) -> Template:
    """Return a Markdown template.

    Args:
        name: File in this package. Foreign text in it must pass the filter ``code``.

    Returns:
        The template; a name that it is not given is an error.
    """
    environment = Environment(
        loader=PackageLoader("grasp_lightning", "reporting"),
        autoescape=False,  # Markdown: code_span quotes what is not ours
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["code"] = code_span
    return environment.get_template(name)


def front_matter(
    kind: str, base_model: str | None, licence: str | None, licence_files: Sequence[str]
) -> str:
    """Return what the hub reads of a card, without the lines of dashes around it.

    Args:
        kind: Last tag.
        base_model: Hub name of the base model, None if it has none.
        licence: Licence of the base model, None if unknown.
        licence_files: Names of the licence files that lie beside the card.

    Returns:
        A mapping as YAML.
    """
    content: dict[str, object] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if base_model is not None:
        content["base_model"] = base_model
    if licence is not None:
        content |= _licence_keys(licence, licence_files)
    content["tags"] = ["grasp", "compressed", kind]
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _licence_keys(licence: str, licence_files: Sequence[str]) -> dict[str, str]:
    """Return the hub's keys; it takes its own identifiers only, and a name of any other licence."""
    if _LICENCE_ID.fullmatch(licence.lower()):
        return {"license": licence.lower()}
    keys = {"license": "other", "license_name": licence}
    return {**keys, "license_link": min(licence_files)} if licence_files else keys


def _removed(plan: Plan) -> str:
    """Return what else went where linears were cut, too, as text; empty for methods that drop."""
    if plan.options.get("removable") is None:
        return ""
    layers: dict[str, list[int]] = {"layer": list(plan.dropped_layers)}
    for index, kind in map(module_place, plan.removed_blocks):
        layers.setdefault(kind, []).append(index)
    names = {"layer": "", "attention": "the attention of ", "mlp": "the MLP of "}
    found = {kind: indices for kind, indices in layers.items() if indices}
    return ", ".join(
        f"{names[kind]}layer{'s' if len(indices) > 1 else ''} {indices_text(sorted(indices))}"
        for kind, indices in found.items()
    )


def _is_replaced(plan: Plan) -> bool:
    """Return whether linears are no longer what the family makes of them."""
    return bool(plan.ranks or plan.channels or plan.removed_blocks)


def _kind(plan: Plan) -> str:
    if plan.ranks or plan.removed_blocks:
        return "low-rank"
    return "narrowed" if plan.channels else "layer-pruning"


def _options(plan: Plan) -> dict[str, str]:
    """Return the plan's options as text, without those that the method left unset."""
    return {
        name: indices_text(value) if isinstance(value, tuple) else str(value)
        for name, value in sorted(plan.options.items())
        if value is not None
    }


def text_source(config: Mapping[str, Any], section: str) -> dict[str, Any]:  # Any: values of YAML
    """Return the sources, their licences, number of windows and their length.

    A file's path is private, so it goes.
    """
    values = config.get(section) or {}
    source, num_samples = values.get("source"), values.get("num_samples")
    names = [source] if isinstance(source, str) else list(source or ())
    words = [_UNNAMED_SOURCES.get(name, code_span(name)) for name in names]
    if len(names) > 1 and num_samples:
        counts = shares(num_samples, values.get("weights") or [1] * len(names))
        words = [f"{word} ({count})" for word, count in zip(words, counts, strict=True)]
    licences = {name: source_licence(name) for name in names}
    return {
        "source": ", ".join(words) or None,
        "licences": [f"{code_span(name)} {text}" for name, text in licences.items() if text],
        "num_samples": num_samples,
        "seqlen": values.get("seqlen"),
    }


def public_name(name: str) -> str:
    """Return a hub name as it is, and of any path the last part."""
    return name if is_hub_name(name) else last_part(name)


def last_part(name: str) -> str:
    """Return the last part of a path, whichever system wrote it."""
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1]


def is_hub_name(name: str) -> bool:
    """Return whether a name has the form ``owner/name``."""
    return _HUB_NAME.fullmatch(name) is not None and not name.lower().endswith(".gguf")


def code_span(text: str) -> str:
    """Return foreign text as a Markdown code span, where nothing in it has a meaning."""
    return "`" + " ".join(text.replace("`", "'").split()) + "`"
