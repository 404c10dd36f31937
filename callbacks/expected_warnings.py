"""Lightning's warnings about things that are intended here."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_MESSAGES = (
    ".*does not have many workers.*",  # windows and samples are in memory
    ".*returned `None`, this fit will run with no optimizer.*",
    ".*module\\(s\\) in eval mode at the start of training.*",
    "predict returned None.*",  # hooks read what they need; nothing is predicted
    ".*`srun` command is available on your system but is not used.*",  # outside of jobs
    ".*treespec, LeafSpec.*",  # inside Lightning, with torch 2.13
    ".*returned a view tensor. An in-place op on this view.*",  # no model here has such an op
    ".*all_gather_into_tensor` is deprecated.*",  # inside DeepSpeed, with torch 2.13
    ".*self.log\\('validation_loss', ..., sync_dist=True\\).*",  # it covers all processes already
)


@contextmanager
def expected_warnings() -> Iterator[None]:
    """Silence them while a Trainer is made and runs."""
    with warnings.catch_warnings():
        for message in _MESSAGES:
            warnings.filterwarnings("ignore", message=message)
        yield
