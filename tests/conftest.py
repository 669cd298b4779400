"""What every test gets: the repository root on sys.path, one torch thread, and the markers."""

import signal
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
# the test models are tiny: more threads make them slower and their sums less repeatable
torch.set_num_threads(1)
MARKERS = {
    "gpu": "needs a CUDA device; without one it runs only when asked for: -m gpu, and skips",
    "preflight": "the CUDA path on a stand-in, an hour; runs only when asked for: -m preflight",
    "long": "whole runs, fetches, processes; left out unless asked for, as .ci/run does: -m long",
    "slow": "takes more than ten seconds; runs only when asked for: pytest -m slow",
}


def pytest_configure(config):
    # started by nohup or behind &, these are ignored, and tests of them would inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")


def pytest_collection_modifyitems(config, items):
    """Leaves out what nobody asked for; a skip says what this machine lacks, and nothing else."""
    no_gpu, asked = not torch.cuda.is_available(), config.getoption("-m")
    left_out = {name for name in MARKERS if name not in asked and (name != "gpu" or no_gpu)}
    kinds = [{mark.name for mark in item.iter_markers()} for item in items]
    for item, kind in zip(items, kinds, strict=True):
        if "gpu" in kind and no_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    pairs = list(zip(items, kinds, strict=True))
    config.hook.pytest_deselected(items=[item for item, kind in pairs if kind & left_out])
    items[:] = [item for item, kind in pairs if not kind & left_out]
