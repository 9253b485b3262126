"""What every test may use."""

import os

import pytest

# Tests run side by side; a thread for each core of each of them only gets in the way.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    """Seed torch where a test uses it, without importing it where none does."""
    torch = request.module.__dict__.get("torch")
    if torch is not None:
        torch.manual_seed(0)
