"""The device of these tests."""

import os

import pytest


@pytest.fixture(scope="session")
def device() -> str:
    """``cuda``; with GRASP_GPU_DEVICE=cpu the same tests run without one, on smaller shapes."""
    return os.environ.get("GRASP_GPU_DEVICE", "cuda")
