"""Measurements with a progress bar."""

from rich.console import Console
from rich.progress import track

from grasp_lightning import processes
from grasp_lightning.data.windows import TokenWindows, batches
from grasp_lightning.evaluation.perplexity import evaluate_perplexity
from grasp_lightning.models.decoder import DecoderView


def tracked_perplexity(
    view: DecoderView,
    windows: TokenWindows,
    batch_size: int,
    description: str,
    console: Console | None = None,
) -> float:
    """Return the perplexity of a model on windows of text, with a progress bar.

    Several processes share the windows.

    Args:
        view: The model.
        windows: Held-out windows.
        batch_size: Windows per forward pass.
        description: What the bar says.
        console: Where the bar is drawn; None takes standard output.

    Returns:
        The perplexity.
    """
    own = windows.select(processes.own_share(range(len(windows))))
    stream = track(
        batches(own, batch_size),
        total=-(-len(own) // batch_size),
        description=description,
        console=console,
    )
    return evaluate_perplexity(view, stream)
