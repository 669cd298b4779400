"""What every test gets: the repository root on sys.path, one torch thread, and the markers."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# the test models are tiny: more threads make them slower and their sums less repeatable
torch.set_num_threads(1)
MARKERS = {
    "gpu": "needs a CUDA device; skipped where there is none",
    "preflight": "the CUDA path on a stand-in, an hour; runs only when asked for: -m preflight",
    "slow": "takes more than ten seconds; runs only when asked for: pytest -m slow",
}


def pytest_configure(config):
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        for name in ("preflight", "slow"):
            if item.get_closest_marker(name) and name not in config.getoption("-m"):
                item.add_marker(pytest.mark.skip(reason=f"{name}: runs with -m {name}"))
