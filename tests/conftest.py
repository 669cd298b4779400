"""What every test gets: the repository root on sys.path, one torch thread, and the markers `gpu` and `slow`."""
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
torch.set_num_threads(1)  # the test models are tiny: more threads only make them slower and their sums less repeatable


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device; skipped where there is none")
    config.addinivalue_line(
        "markers", "preflight: runs the CUDA path on a stand-in, minutes; only with pytest -m preflight"
    )
    config.addinivalue_line("markers", "slow: takes more than ten seconds; runs only when asked for: pytest -m slow")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("slow") and "slow" not in config.getoption("-m"):
            item.add_marker(pytest.mark.skip(reason="slow: runs with -m slow"))
        if item.get_closest_marker("preflight") and "preflight" not in config.getoption("-m"):
            item.add_marker(pytest.mark.skip(reason="preflight: runs with -m preflight"))
