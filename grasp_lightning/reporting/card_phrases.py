"""Phrases of the card on text and training, without local paths."""

import re
from collections.abc import Mapping
from typing import Any

from grasp_lightning.data.instruction_files import HUB_INSTRUCTIONS
from grasp_lightning.data.mixture import shares
from grasp_lightning.data.sources import source_licence
from grasp_lightning.reporting.metrics import CompensationMetrics
from grasp_lightning.reporting.tables import (
    comparison_rows,
    epochs_text,
    measurement_notes,
    samples_text,
    state_names,
    steps_text,
)

Values = Mapping[str, Any]  # Any: values of YAML

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_UNNAMED_SOURCES = {
    "file": "a local file",
    "instructions": "a local file of instructions",
    "self": "text that the base model generated",
}


def public_name(name: str) -> str:
    """Return a hub name unchanged, or the last part of a path; ``owner/name`` is a hub name."""
    return name if is_hub_name(name) else _last_part(name)


def _last_part(name: str) -> str:
    """Return the last part of a path of any operating system."""
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1]


def is_hub_name(name: str) -> bool:
    """Return whether a name has the form ``owner/name``."""
    return _HUB_NAME.fullmatch(name) is not None and not name.lower().endswith(".gguf")


def code_span(text: str) -> str:
    """Return foreign text as a Markdown code span, without any markup."""
    return "`" + " ".join(text.replace("`", "'").split()) + "`"


def text_source(config: Values, section: str) -> dict[str, Any]:  # Any: values of YAML
    """Return sources with licences, number and length of windows; file paths stay private."""
    values = _section(config, section)
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


def training_content(
    metrics: CompensationMetrics, base_model: str, config: Values
) -> dict[str, object]:
    """Return the template variables of a training."""
    data = f"training data, {code_span(metrics.data)},"
    if metrics.data_licence:
        data_licence = (
            f"The {data} has the licence {code_span(metrics.data_licence)}: check its terms for "
            "models that are trained on it."
        )
    else:
        data_licence = (
            f"The program that wrote this card does not know the licence of the {data} so look it "
            "up before you use or share this model."
        )
    return {
        "base_model": base_model,
        "metrics": metrics,
        "what": _what(metrics, config),
        "goal": _goal(metrics, base_model, config),
        "schedule": _schedule(metrics, config),
        "samples": samples_text(metrics.samples),
        "length": _length(metrics, config),
        "evaluation": text_source(config, "evaluation"),
        "data_licence": data_licence,
        "states": state_names(metrics),
        "rows": comparison_rows(metrics),
        "notes": measurement_notes(metrics),
    }


def _what(metrics: CompensationMetrics, config: Values) -> str:
    """Return what was trained, as the end of a sentence."""
    if metrics.train == "factors":
        return "the factors of the low-rank linears themselves"
    if metrics.train == "replaced":
        return "the weights that compression replaced or changed"
    if metrics.train == "all":
        return "all weights of the decoder layers"
    lora = _section(config, "lora")
    if targets := lora.get("targets"):
        place = ", ".join(code_span(str(target)) for target in targets)
    elif metrics.train == "lora_on_factors":
        place = "the factors of the low-rank linears"
    else:
        place = "all linears of the decoder layers"
    options = _set_options(lora, "rank", "alpha", "dropout")
    return f"LoRA adapters{options} on {place}, merged into the weights at the end"


def _goal(metrics: CompensationMetrics, base_model: str, config: Values) -> str:
    """Return what was learned, as the end of a sentence."""
    if metrics.objective == "distill":
        distillation = _section(config, "distillation")
        names = ("temperature", "mix", *(["top_k"] if distillation.get("cache") else []))
        who = _teacher(base_model, distillation)
        return f"the distribution that {who} predicts{_set_options(distillation, *names)}"
    if metrics.objective == "local":
        who = _teacher(base_model, _section(config, "distillation"))
        return f"the hidden states of {who} after each layer, one layer after the other"
    if metrics.objective == "text":
        return "the next token of plain text"
    if metrics.objective != "instruction":
        return code_span(metrics.objective)
    learned = _section(config, "data").get("train_on_inputs")
    if learned is None:
        return "instructions with answers"
    return "instructions and their answers" if learned else "answers to instructions only"


def _teacher(base_model: str, distillation: Values) -> str:
    teacher = str(distillation.get("teacher") or "")
    # A path like models/llama has the form of a hub name: only a known one is printed whole.
    name = teacher if teacher == base_model else _last_part(teacher)
    return f"the teacher {code_span(name)}" if name else "a teacher"


def _set_options(values: Values, *names: str) -> str:
    """Return the options that are set, in brackets after a space."""
    options = [f"{name} {values[name]}" for name in names if values.get(name) is not None]
    return f" ({', '.join(options)})" if options else ""


def _schedule(metrics: CompensationMetrics, config: Values) -> str:
    optimizer, training = _section(config, "optimizer"), _section(config, "training")
    is_limited = metrics.time_limit.max_seconds is not None
    settings = {
        "time limit": training.get("max_time"),
        "planned steps": metrics.time_limit.planned_steps,
        "batch size": training.get("batch_size"),
        "learning rate": optimizer.get("learning_rate"),
        "schedule": optimizer.get("schedule"),
        "optimizer": None if (name := optimizer.get("name")) == "adamw" else name,
        "warm-up steps": None if is_limited else optimizer.get("warmup_steps"),
        "weight decay": optimizer.get("weight_decay"),
        "gradients clipped to norm": optimizer.get("gradient_clip"),
    }
    options = [f"{name} {value}" for name, value in settings.items() if value is not None]
    return ", ".join([steps_text(metrics.steps), epochs_text(metrics.epochs), *options])


def _length(metrics: CompensationMetrics, config: Values) -> str | None:
    if _learns_text(metrics, config):
        seqlen = _section(config, "text").get("seqlen")
        return None if seqlen is None else f"{seqlen} tokens each"
    longest = _section(config, "data").get("max_length")
    return None if longest is None else f"at most {longest} tokens each"


def dataset_of(metrics: CompensationMetrics, config: Values) -> str | None:
    """Return the hub name of the training data, None if it is not from the hub."""
    source = _section(config, "data").get("source")
    known = None if _learns_text(metrics, config) else HUB_INSTRUCTIONS.get(str(source))
    return None if known is None else known.repository


def _learns_text(metrics: CompensationMetrics, config: Values) -> bool:
    if metrics.objective == "distill":
        return bool(_section(config, "distillation").get("data") == "text")
    return metrics.objective in {"text", "local"}


def _section(config: Values, name: str) -> Values:
    values = config.get(name)
    return values if isinstance(values, Mapping) else {}
