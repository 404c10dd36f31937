"""Measurements with a progress bar."""

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.progress import track
from torch import Tensor

from grasp_lightning import processes
from grasp_lightning.data.windows import TokenWindows
from grasp_lightning.evaluation.perplexity import evaluate_perplexity
from grasp_lightning.models.decoder import DecoderView
from grasp_lightning.models.sharding import is_sharded


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
    shares = processes.own_batches(range(len(windows)), batch_size)
    stream = track(
        _windows(windows, shares, is_padded=is_sharded(view.model)),
        total=len(shares),
        description=description,
        console=console,
    )
    return evaluate_perplexity(view, stream)


def _windows(
    windows: TokenWindows, shares: Sequence[tuple[Sequence[int], bool]], *, is_padded: bool
) -> Iterator[dict[str, Tensor]]:
    """Yield the batches of this process; padded, all processes have as many."""
    for indices, counts in shares:
        if counts:
            yield windows.batch(indices)
        elif is_padded:
            yield windows.padding()
