"""Shared fixtures: poisoned empty memory, one thread, and the optional folder of real checkpoints and texts."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)
# uninitialised memory becomes NaN, so that nothing can read it and pass by luck
torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture
def deterministic():
    """Fills torch.empty with NaN for the length of a test."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real checkpoints and texts that are not part of the project (POLYATTN_DATA, or a sibling folder)."""
    here = Path(__file__).resolve().parents[1]
    for folder in (os.environ.get("POLYATTN_DATA"), here.parent / "shared" / "data"):
        if folder and Path(folder).is_dir():
            return Path(folder)
    pytest.skip("no folder of real checkpoints: set POLYATTN_DATA to run this test")
