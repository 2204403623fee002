"""What all tests share: reproducible randomness and no network."""

from __future__ import annotations

import os
import sys
from pathlib import Path

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    # Processes that share the cores, each with threads for all of them, slow each other down. torch reads this once.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():
    # Without a GPU, Triton's interpreter runs the kernels. It must be chosen before anything imports triton.
    os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, str(Path(__file__).parent))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
