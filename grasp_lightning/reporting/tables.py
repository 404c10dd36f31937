"""The before/after comparison as text, for the terminal, the report page and the model card."""

import math
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from typing import NamedTuple, TypeVar, get_args

from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text

from grasp_lightning.config import TargetChoice
from grasp_lightning.reporting.metrics import (
    CompensationMetrics,
    FirstStage,
    Metrics,
    States,
    VocabularyChange,
)

T = TypeVar("T")
AnyMetrics = Metrics | CompensationMetrics

NOT_MEASURED = "not measured"
_MEGA = 1_000_000
_GIGA = 1_000_000_000
_TRAINED = {
    "lora": "LoRA",
    "factors": "factor training",
    "lora_on_factors": "LoRA on the factors",
    "replaced": "training of the replaced weights",
    "all": "training of all layers",
}
_LEARNED = {
    "instruction": "on instruction data",
    "text": "on text",
    "distill": "on a teacher's predictions",
    "local": "on a teacher's hidden states",
}
_SAMPLES = {
    "train": "{:,} for training",
    "validation": "{:,} for validation",
    "read": "{:,} read",
    "empty": "{:,} skipped as empty",
    "cut": "{:,} cut at the maximum length",
    "cut_prompts": "{:,} of these inside the prompt",
    "no_answer": "{:,} skipped because no answer remained",
}


class Row(NamedTuple):
    """One line of the comparison; the change is a percentage, a factor or a difference."""

    quantity: str
    before: str
    after: str
    change: str


class StagesRow(NamedTuple):
    """One line of a comparison over both stages; the change is from the dense model to the last."""

    quantity: str
    dense: str
    compressed: str
    compensated: str
    change: str


def comparison_table(metrics: AnyMetrics) -> Table:
    """Return the model before and after, with the measurements as caption, for the terminal."""
    # Text, not str: a model's name may hold brackets, which rich would read as markup.
    table = Table(
        title=Text(f"{metrics.model}: {summary(metrics)}"),
        caption=Text(" ".join(comparison_notes(metrics))),
        caption_justify="left",
    )
    table.add_column("")
    for heading in state_names(metrics):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in (*comparison_rows(metrics), *cost_rows(metrics)):
        table.add_row(*row)
    return table


def state_names(metrics: AnyMetrics) -> tuple[str, ...]:
    """Return the headings of the columns after the first of ``comparison_rows``."""
    if isinstance(metrics, CompensationMetrics) and metrics.compression is not None:
        return (*StagesRow._fields[1:-1], "against dense")
    return (*metrics.STATES, "change")


def narrow_table(notes: Iterable[str], title: str | None = None) -> Table:
    """Return an empty, narrow table, with notes as caption."""
    # Text, not str: a model's name may hold brackets, which rich would read as markup.
    caption = Text("\n".join(notes))
    return Table(
        title=title,
        caption=caption,
        caption_justify="left",
        box=SIMPLE,
        pad_edge=False,
        collapse_padding=True,
    )


def comparison_rows(metrics: AnyMetrics) -> tuple[Row, ...] | tuple[StagesRow, ...]:
    """Return parameters, bytes and quality before and after, sizes in millions of bytes.

    After ``compress --compensate``, there is a column for each stage.
    """
    if isinstance(metrics, CompensationMetrics) and metrics.compression is not None:
        return _rows_of_stages(metrics, metrics.compression)
    parameters = _row("parameters", metrics.parameters, "{:,}".format, percent_text)
    size = _row(f"MB at {metrics.dtype}", metrics.bytes, megabytes_text, percent_text)
    perplexity = _row("perplexity", metrics.perplexity, perplexity_text, factor_text)
    if isinstance(metrics, CompensationMetrics):
        loss = _row("validation loss", metrics.validation_loss, loss_text, difference_text)
        return parameters, size, perplexity, loss
    linears, vocabulary = metrics.decoder_linears, metrics.vocabulary
    tokens = () if vocabulary is None else (_tokens_row(vocabulary),)
    return (
        *tokens,
        parameters,
        _row("parameters in decoder linears", linears.parameters, "{:,}".format, percent_text),
        size,
        _row("MB in decoder linears", linears.bytes, megabytes_text, percent_text),
        perplexity,
    )


def _tokens_row(vocabulary: VocabularyChange) -> Row:
    before, after = vocabulary.tokens.values
    return Row("tokens", f"{before:,}", f"{after:,}", percent_text(before, after))


def _rows_of_stages(metrics: CompensationMetrics, first: FirstStage) -> tuple[StagesRow, ...]:
    before, after = map(loss_text, metrics.validation_loss.values)
    return (
        _stages_row(
            "parameters", first.parameters, metrics.parameters.after, "{:,}".format, percent_text
        ),
        _stages_row(
            f"MB at {metrics.dtype}", first.bytes, metrics.bytes.after, megabytes_text, percent_text
        ),
        _stages_row(
            "perplexity", first.perplexity, metrics.perplexity.after, perplexity_text, factor_text
        ),
        StagesRow("validation loss", "", before, after, ""),
    )


def cost_rows(metrics: AnyMetrics) -> tuple[StagesRow, ...]:
    """Return time and peak memory of each stage after ``compress --compensate``, else nothing."""
    if not isinstance(metrics, CompensationMetrics) or metrics.compression is None:
        return ()
    first = metrics.compression
    times = map(duration_text, (first.seconds, metrics.seconds.total))
    peaks = map(_memory_text, (first.peak_memory_bytes, metrics.peak_memory_bytes))
    return (
        StagesRow("time of the stage", "", next(times), next(times), ""),
        StagesRow("peak memory in MB", "", next(peaks), next(peaks), ""),
    )


def comparison_notes(metrics: AnyMetrics) -> tuple[str, ...]:
    """Return sentences on how to read the comparison, and on the training."""
    if isinstance(metrics, CompensationMetrics):
        return (*measurement_notes(metrics), *_training_notes(metrics))
    return (*measurement_notes(metrics), *_compression_notes(metrics))


def measurement_notes(metrics: AnyMetrics) -> tuple[str, ...]:
    """Return sentences on the text behind perplexity and validation loss."""
    notes = []
    if metrics.perplexity_tokens is not None:
        notes.append(
            f"Perplexity on {metrics.perplexity_tokens:,} predicted tokens of held-out text; lower "
            "is better."
        )
    if isinstance(metrics, CompensationMetrics) and metrics.validation_tokens is not None:
        notes.append(_validation_note(metrics.objective, metrics.validation_tokens))
    return tuple(notes)


def _validation_note(objective: str, tokens: int) -> str:
    if objective == "local":
        return (
            "Validation loss: squared error of the hidden states, relative to those of the dense "
            f"model, mean over layers, on {tokens:,} tokens of samples set aside."
        )
    return (
        f"Validation loss in nats per predicted token, on {tokens:,} predicted tokens of samples "
        "set aside."
    )


def _compression_notes(metrics: Metrics) -> list[str]:
    change, dense = metrics.loss_change, metrics.bytes.dense
    notes = [] if metrics.vocabulary is None else _vocabulary_notes(metrics.vocabulary)
    if metrics.zero_ratio:
        notes.append(
            f"{metrics.zero_ratio:.1%} of all parameters were set to zero. They are stored like "
            "all others, so the model is no smaller."
        )
    if change.predicted is not None and change.measured is not None:
        notes.append(
            f"The loss was predicted to increase by {change.predicted:.2f} nats per token on the "
            f"calibration text; it increased by {change.measured:.2f} on the held-out text."
        )
    if len(metrics.target_losses) > 1:
        notes.append(
            "Predicted increase at this ratio, by method.target: "
            f"{target_losses_text(metrics.target_losses)}."
        )
    if metrics.source_bytes is not None and metrics.source_bytes < dense:
        notes.append(
            f"The source stores its weights in fewer bits: {size_text(metrics.source_bytes)} on "
            f"disk, compared with {size_text(dense)} for its {metrics.dtype} copy and "
            f"{size_text(metrics.bytes.compressed)} for the compressed model. Sizes are compared "
            "at equal dtype."
        )
    return notes


def _vocabulary_notes(vocabulary: VocabularyChange) -> list[str]:
    trimmed, *lengths = change_lines(vocabulary)
    return [
        f"The vocabulary was trimmed first: {trimmed}.",
        *(f"{line[0].upper()}{line[1:]}." for line in lengths),
        "Perplexity of the dense model is measured after trimming, on the same tokens.",
    ]


def change_lines(vocabulary: VocabularyChange) -> list[str]:
    """Return what trimming the vocabulary removes, and how much longer texts become."""
    (tokens, left), (parameters, size) = vocabulary.tokens.values, vocabulary.parameters.values
    share = (parameters - size) / parameters
    lengths = [
        f"{text.name}{'' if text.is_named else ' (not named)'} "
        f"{factor_text(*text.tokens_per_byte.values)}"
        for text in vocabulary.texts
    ]
    gone = f"{tokens - left:,} of {tokens:,} tokens are removed"
    return [
        f"{gone}, with {parameters - size:,} parameters ({share:.1%})",
        f"tokens per byte of text: {', '.join(lengths)}",
    ]


def _training_notes(metrics: CompensationMetrics) -> list[str]:
    length = f"{steps_text(metrics.steps)}, {epochs_text(metrics.epochs)}"
    tokens = f"{metrics.trained_tokens:,} predicted tokens"
    if metrics.objective == "local":
        tokens = f"{metrics.trained_tokens:,} tokens, over all layers,"
    notes = [f"Trained on {metrics.data}: {tokens} in {length}."]
    if counts := samples_text(metrics.samples):
        notes.append(f"Samples: {counts}.")
    limit = metrics.time_limit
    if limit.max_seconds is not None and limit.seconds is not None:
        planned = "no" if limit.planned_steps is None else f"{limit.planned_steps:,}"
        notes.append(
            f"Time limit of {limit.max_seconds:,.0f} s: {planned} steps planned, "
            f"{metrics.steps:,} done in {limit.seconds:,.0f} s."
        )
    if metrics.best_step is not None:
        notes.append(f"The weights after step {metrics.best_step:,} are kept.")
    return notes


def summary(metrics: AnyMetrics) -> str:
    """Return what was done as a phrase: layers and removed parameters, or training and steps."""
    if isinstance(metrics, CompensationMetrics):
        trained = _TRAINED.get(metrics.train, metrics.train)
        learned = _LEARNED.get(metrics.objective, f"on {metrics.objective}")
        first = metrics.compression
        before = ""
        if first is not None:
            before = f"{first.method}, {first.removed_ratio:.1%} of all parameters removed; then "
        return (
            f"{before}{trained} {learned}, {steps_text(metrics.steps)}, "
            f"{count_text(metrics.parameters.trainable)} trainable parameters"
        )
    count = len(metrics.changed_layers)
    noun = "decoder layer" if count == 1 else "decoder layers"
    removed = f"{metrics.removed_ratio:.1%} of all parameters removed"
    if metrics.zero_ratio:
        removed += f", {metrics.zero_ratio:.1%} set to zero"
    return f"{count} {noun} {done_to_layers(metrics)}{_changed_parts(metrics)}, {removed}"


def done_to_layers(metrics: Metrics) -> str:
    """Return what was done to the layers, as a participle."""
    if metrics.method == "laco":
        return "merged"
    if metrics.zero_ratio:
        return "made sparse"
    if not any(metrics.layer_changes.values()):
        if metrics.method == "drop":
            return "dropped"
        if metrics.layer_changes:
            return "deleted"
    return "replaced" if metrics.method == "grasp" else "compressed"


def _changed_parts(metrics: Metrics) -> str:
    """Return the changed parts in brackets after a space; nothing if all were changed."""
    changes = [change for change in metrics.layer_changes.values() if change is not None]
    num_deleted = len(metrics.layer_changes) - len(changes)
    if metrics.method == "laco":
        return f" into {len(changes)}"
    blocks = {"attention": [c.attention for c in changes], "MLP": [c.mlp for c in changes]}
    sums = {
        name: (sum(count.changed for count in counts), sum(count.total for count in counts))
        for name, counts in blocks.items()
    }
    if not changes or (not num_deleted and all(c == total > 0 for c, total in sums.values())):
        return ""
    texts = [f"{c} of {total} {name} linears" for name, (c, total) in sums.items() if total]
    return f" ({', '.join([*texts, *[f'{num_deleted} deleted'] * bool(num_deleted)])})"


def count_text(count: int) -> str:
    """Return a number of parameters with three or four digits and its unit, such as ``134.5 M``."""
    if count >= _GIGA:
        return f"{count / _GIGA:.2f} B"
    return f"{count / _MEGA:.1f} M" if count >= _MEGA else f"{count:,}"


def size_text(size: int) -> str:
    """Return a number of bytes in decimal units, such as ``538.1 MB`` or ``13.48 GB``."""
    return f"{size / _GIGA:,.2f} GB" if size >= _GIGA else f"{megabytes_text(size)} MB"


def megabytes_text(size: int) -> str:
    """Return a number of bytes in millions, without the unit."""
    megabytes = size / _MEGA
    return f"{megabytes:,.1f}" if megabytes >= 1 else f"{megabytes:.3f}"


def target_losses_text(losses: Mapping[str, float]) -> str:
    """Return the predicted losses of targets, such as ``any 0.082, plain 0.217``."""
    known = [target for target in get_args(TargetChoice) if target in losses]
    return ", ".join(f"{target} {losses[target]:.3f}" for target in known)


def percent_text(before: int, after: int) -> str:
    """Return the relative change of a count, such as ``-19.0%``; empty if undefined."""
    return f"{after / before - 1:+.1%}" if before else ""


def perplexity_text(perplexity: float | None) -> str:
    """Return a perplexity with two decimals."""
    return NOT_MEASURED if perplexity is None else f"{perplexity:,.2f}"


def factor_text(before: float | None, after: float | None) -> str:
    """Return the factor between values, such as ``x 1.53``; empty if one is missing."""
    if not before or after is None or not math.isfinite(before):
        return ""
    return f"x {after / before:,.2f}"


def _memory_text(size: int | None) -> str:
    return NOT_MEASURED if size is None else megabytes_text(size)


def loss_text(loss: float | None) -> str:
    """Return a loss with three decimals."""
    return NOT_MEASURED if loss is None else f"{loss:.3f}"


def difference_text(before: float | None, after: float | None) -> str:
    """Return the change of a loss, such as ``-0.250``; empty if one is missing."""
    return "" if before is None or after is None else f"{after - before:+.3f}"


def steps_text(steps: int) -> str:
    """Return a number of optimizer steps with its unit."""
    return "1 step" if steps == 1 else f"{steps:,} steps"


def epochs_text(epochs: float) -> str:
    """Return a number of epochs with three digits and its unit."""
    return "1 epoch" if epochs == 1 else f"{epochs:.3g} epochs"


def samples_text(samples: Mapping[str, int]) -> str:
    """Return the numbers of samples by their fate as a phrase, without zeros."""
    known = {name: text.format(samples[name]) for name, text in _SAMPLES.items() if name in samples}
    others = {name: f"{samples[name]:,} {name.replace('_', ' ')}" for name in sorted(samples)}
    return ", ".join(text for name, text in {**known, **others, **known}.items() if samples[name])


def duration_text(seconds: float | None) -> str:
    """Return seconds as people say them, such as ``3 min 12 s``."""
    if seconds is None:
        return NOT_MEASURED
    minutes, rest = divmod(round(seconds), 60)
    if minutes == 0:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def indices_text(indices: Iterable[int]) -> str:
    """Return ascending indices with joined runs, such as ``3, 20-23, 25``; ``none`` if empty."""
    runs = [
        [index for _, index in run]
        for _, run in groupby(enumerate(indices), key=lambda pair: pair[1] - pair[0])
    ]
    return (
        ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) or "none"
    )


def _row(
    quantity: str, states: States[T], text: Callable[[T], str], change: Callable[[T, T], str]
) -> Row:
    before, after = states.values
    return Row(quantity, text(before), text(after), change(before, after))


def _stages_row(
    quantity: str,
    first: States[T],
    compensated: T,
    text: Callable[[T], str],
    change: Callable[[T, T], str],
) -> StagesRow:
    dense, compressed = first.values
    return StagesRow(
        quantity, text(dense), text(compressed), text(compensated), change(dense, compensated)
    )
