"""What every test shares: few threads, and the one way to real data."""

import os
from pathlib import Path

# Before torch is imported: several workers with many threads each would only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import matplotlib
import pytest
import torch

matplotlib.use("Agg")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True)
def _alike() -> None:
    """Each test draws the same numbers and computes by the same rules, whichever ran before it."""
    torch.manual_seed(0)
    torch.set_flush_denormal(False)  # training switches it on for the whole process


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder that LONGSEQ_DATA names. Not set: skip. Set, and pointing nowhere: fail."""
    named = os.environ.get("LONGSEQ_DATA")
    if not named:
        pytest.skip("LONGSEQ_DATA is not set: no real data here")
    folder = Path(named)
    if not folder.is_dir():
        pytest.fail(f"LONGSEQ_DATA={named} is no folder. Correct it, or unset it to skip these tests.")
    return folder
