"""What a compensation did, as text, as a plot, and as a page."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table

from grasp_lightning.reporting.compensation_metrics import CompensationMetrics, History
from grasp_lightning.reporting.drawing import draw_training, svg_text
from grasp_lightning.reporting.page import (
    Headline,
    perplexity_headline,
    phase_bars,
    render_page,
    time_headlines,
)
from grasp_lightning.reporting.plots import Plot
from grasp_lightning.reporting.tables import (
    NOT_MEASURED,
    change_table,
    count_text,
    factor_text,
    megabytes_text,
    percent_text,
    perplexity_note,
    perplexity_text,
)

_PHASES = {
    "load": "Load model and data",
    "train": "Train",
    "evaluate": "Evaluate before and after",
    "save": "Save the model",
    "verify": "Load it in a fresh process",
}
_TRAINED = {"factors": "factor training", "lora_on_factors": "lora of the factors"}
_LEARNED = {
    "instruction": "on instruction data",
    "text": "on text",
    "distill": "on what a teacher predicts",
}
_SAMPLES = {
    "train": "{:,} to train on",
    "validation": "{:,} to validate on",
    "read": "{:,} read",
    "empty": "{:,} left out as empty",
    "cut": "{:,} cut to the maximal length",
    "cut_prompts": "{:,} of these inside the prompt",
    "no_answer": "{:,} left out because no answer remained",
}
_MAX_POINTS = 20  # more steps than that get a moving mean over 1/20 of them


class ChangeRow(NamedTuple):
    """One line of the comparison, ready to print.

    Attributes:
        quantity: What is compared, with its unit.
        before: Value before training.
        after: Value after it.
        change: Percentage for sizes, a factor for perplexity, a difference for a loss.
    """

    quantity: str
    before: str
    after: str
    change: str


def compensation_table(metrics: CompensationMetrics) -> Table:
    """Return the model before and after training, for the terminal.

    Args:
        metrics: Numbers of one compensation.

    Returns:
        A table with a title, one line per quantity, and a caption on what was measured.
    """
    return change_table(
        f"{metrics.model}: {compensation_summary(metrics)}",
        ("before", "after", "change"),
        compensation_rows(metrics),
        compensation_notes(metrics),
    )


def compensation_summary(metrics: CompensationMetrics) -> str:
    """Return what was trained, on what, and for how long, as a phrase."""
    trained = _TRAINED.get(metrics.train, metrics.train)
    learned = _LEARNED.get(metrics.objective, f"on {metrics.objective}")
    return (
        f"{trained} {learned}, {steps_text(metrics.steps)}, "
        f"{count_text(metrics.parameters.trainable)} trainable parameters"
    )


def compensation_rows(metrics: CompensationMetrics) -> tuple[ChangeRow, ...]:
    """Return parameters, bytes, perplexity and validation loss, before and after, as text.

    Args:
        metrics: Numbers of one compensation.

    Returns:
        One row per quantity.
    """
    parameters, size = metrics.parameters, metrics.bytes
    perplexity, loss = metrics.perplexity, metrics.validation_loss
    return (
        _count_row("parameters", parameters.before, parameters.after, "{:,}".format),
        _count_row(f"MB at {metrics.dtype}", size.before, size.after, megabytes_text),
        ChangeRow(
            "perplexity",
            perplexity_text(perplexity.before),
            perplexity_text(perplexity.after),
            factor_text(perplexity.before, perplexity.after),
        ),
        ChangeRow(
            "validation loss",
            loss_text(loss.before),
            loss_text(loss.after),
            difference_text(loss.before, loss.after),
        ),
    )


def compensation_notes(metrics: CompensationMetrics) -> tuple[str, ...]:
    """Return the sentences a reader needs to judge the comparison.

    Args:
        metrics: Numbers of one compensation.

    Returns:
        What was measured on what, what was learned from, and which weights were kept.
    """
    notes = [*measurement_notes(metrics)]
    notes.append(
        f"Trained on {metrics.data}: {metrics.trained_tokens:,} predicted tokens in "
        f"{steps_text(metrics.steps)}, {epochs_text(metrics.epochs)}."
    )
    if counts := samples_text(metrics.samples):
        notes.append(f"Samples: {counts}.")
    if metrics.best_step is not None:
        notes.append(f"The weights after step {metrics.best_step:,} are kept.")
    return tuple(notes)


def measurement_notes(metrics: CompensationMetrics) -> tuple[str, ...]:
    """Return what perplexity and validation loss were measured on, in sentences."""
    notes = []
    if metrics.perplexity_tokens is not None:
        notes.append(perplexity_note(metrics.perplexity_tokens))
    if metrics.validation_tokens is not None:
        notes.append(
            "Validation loss in nats per predicted token, on "
            f"{metrics.validation_tokens:,} predicted tokens of samples set aside."
        )
    return tuple(notes)


def loss_text(loss: float | None) -> str:
    """Return a loss with three decimals."""
    return NOT_MEASURED if loss is None else f"{loss:.3f}"


def difference_text(before: float | None, after: float | None) -> str:
    """Return by how much a loss changed, such as ``-0.250``; empty where one is missing."""
    return "" if before is None or after is None else f"{after - before:+.3f}"


def steps_text(steps: int) -> str:
    """Return a number of optimizer steps with its unit."""
    return "1 step" if steps == 1 else f"{steps:,} steps"


def epochs_text(epochs: float) -> str:
    """Return how often each sample was seen, with three digits and the unit."""
    return "1 epoch" if epochs == 1 else f"{epochs:.3g} epochs"


def samples_text(samples: Mapping[str, int]) -> str:
    """Return what became of samples as a phrase; counts of zero are left out."""
    known = {name: text.format(samples[name]) for name, text in _SAMPLES.items() if name in samples}
    others = {name: f"{samples[name]:,} {name.replace('_', ' ')}" for name in sorted(samples)}
    return ", ".join(text for name, text in {**known, **others, **known}.items() if samples[name])


def training_plot(history: History, *, kept_step: int | None = None) -> Plot:
    """Return the training loss of every step with its moving mean, and the validation losses.

    Args:
        history: Losses over the steps; at least one step.
        kept_step: Step whose weights were kept, marked by a line; None marks none.

    Returns:
        A line plot; its title compares the first validation with that of the kept weights, or
        where there are not two, the means of the first and the last tenth of all steps.

    Raises:
        ValueError: If the history has no step.
    """
    if not history.steps:
        raise ValueError("history has no step, so there is nothing to draw")
    steps, loss = np.array(history.steps, dtype=float), np.array(history.loss)
    window = max(1, len(steps) // _MAX_POINTS)
    validation = None
    if history.validation_steps:
        validation = (
            np.array(history.validation_steps, dtype=float),
            np.array(history.validation_loss),
        )

    def draw(figure: Figure) -> None:
        draw_training(figure, steps, loss, validation, window=window, kept_step=kept_step)

    mean = f"; the line is the mean of {window} steps" if window > 1 else ""
    explanation = f"Each small point is the mean loss of one optimizer step{mean}."
    if validation is not None:
        explanation += " Validation is on samples that are not trained on."
    if kept_step is not None:
        explanation += f" Dashed: step {kept_step:,}, whose weights are kept."
    return Plot(
        title=_finding(history, kept_step),
        explanation=explanation,
        alt=_alt(history),
        svg=svg_text(3.6, draw),
    )


def render_compensation_report(
    metrics: CompensationMetrics,
    config: Mapping[str, Any],  # Any: values of YAML
) -> str:
    """Return the page that tells what a compensation did, and what it cost.

    Args:
        metrics: Numbers of the run.
        config: Resolved configuration, nested, of plain values.

    Returns:
        A complete HTML document; equal inputs give equal text.
    """
    history = metrics.history
    return render_page(
        "compensation.html.jinja",
        metrics,
        config,
        [training_plot(history, kept_step=metrics.best_step)] if history.steps else [],
        summary=compensation_summary(metrics),
        headlines=_headlines(metrics),
        rows=compensation_rows(metrics),
        notes=compensation_notes(metrics),
        phases=phase_bars(metrics, _PHASES),
    )


def _headlines(metrics: CompensationMetrics) -> list[Headline]:
    parameters, loss = metrics.parameters, metrics.validation_loss
    share = parameters.trainable / parameters.after if parameters.after else 0.0
    return [
        perplexity_headline(metrics.perplexity.before, metrics.perplexity.after),
        Headline(
            "Validation loss",
            difference_text(loss.before, loss.after) or NOT_MEASURED,
            f"{loss_text(loss.before)} \u2192 {loss_text(loss.after)}",
        ),
        Headline(
            "Trainable parameters",
            count_text(parameters.trainable),
            f"{share:.1%} of the model's size",
        ),
        Headline(
            "Optimizer steps",
            f"{metrics.steps:,}",
            f"{epochs_text(metrics.epochs)}, {count_text(metrics.trained_tokens)} tokens",
        ),
        *time_headlines(metrics),
    ]


def _count_row(quantity: str, before: int, after: int, text: Callable[[int], str]) -> ChangeRow:
    return ChangeRow(quantity, text(before), text(after), percent_text(before, after))


def _finding(history: History, kept_step: int | None) -> str:
    validations = dict(zip(history.validation_steps, history.validation_loss, strict=True))
    end = history.steps[-1]
    if len(validations) > 1:
        end = kept_step if kept_step in validations else history.validation_steps[-1]
        name, first, last = "Validation", history.validation_loss[0], validations[end]
    else:
        name, num = "Training", max(1, len(history.loss) // 10)
        first, last = float(np.mean(history.loss[:num])), float(np.mean(history.loss[-num:]))
    before, after = loss_text(first), loss_text(last)
    if before == after:
        return f"{name} loss stays at {before} nats per predicted token"
    verb = "falls" if last < first else "rises"
    return (
        f"{name} loss {verb} from {before} to {after} nats per predicted token in {steps_text(end)}"
    )


def _alt(history: History) -> str:
    text = (
        f"Line plot of the training loss over {steps_text(len(history.steps))}, "
        f"{loss_text(min(history.loss))} to {loss_text(max(history.loss))}."
    )
    losses = history.validation_loss
    if not losses:
        return text
    return (
        f"{text} Validation loss: {loss_text(losses[0])} at first, {loss_text(min(losses))} at its "
        f"lowest, {loss_text(losses[-1])} at last."
    )
