"""Measurements with a progress bar."""

from collections.abc import Iterator

from rich.console import Console
from rich.progress import track
from torch import Tensor

from grasp_lightning import processes
from grasp_lightning.data.windows import TokenWindows, batches
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
    stream = track(
        _own_batches(windows, batch_size, is_padded=is_sharded(view.model)),
        total=_num_batches(windows, batch_size),
        description=description,
        console=console,
    )
    return evaluate_perplexity(view, stream)


def _num_batches(windows: TokenWindows, batch_size: int) -> int:
    """Return the number of batches of the process that has most."""
    most = -(-len(windows) // processes.num_processes())
    return -(-most // batch_size)


def _own_batches(
    windows: TokenWindows, batch_size: int, *, is_padded: bool
) -> Iterator[dict[str, Tensor]]:
    """Yield the batches of this process; padded, all processes have as many."""
    own = windows.select(processes.own_share(range(len(windows))))
    yield from batches(own, batch_size)
    missing = _num_batches(windows, batch_size) - -(-len(own) // batch_size)
    for _ in range(missing if is_padded else 0):
        yield windows.padding()
