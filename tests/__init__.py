"""Tests. No hub is asked: libraries read these variables when they are first imported."""

import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
# transformers keeps the code of checkpoints by the name of their folder. Tests that run at the same
# time must not share it.
_MODULES = tempfile.TemporaryDirectory()
os.environ["HF_MODULES_CACHE"] = _MODULES.name
