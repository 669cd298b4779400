"""The preflight: what it refuses and counts; with -m preflight, planted faults and all presets."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Small shapes: a graph's compilation takes as long as with large ones, the updates do not.
SMALL = (
    "--n_layer 2 --n_head 2 --n_embd 128 --seq_len 128 --batch_tokens 4096 --val_tokens 4096"
).split()

# Each is put in front of the script's last lines, where everything is defined and nothing has run.
FAULTS = {
    "graph break": """
whole = GPT.forward
def forward(self, *args):
    torch._dynamo.graph_break()
    return whole(self, *args)
GPT.forward = forward
""",
    "late compilation": """
whole, calls = GPT.forward, 0
def forward(self, *args):
    global calls
    calls += 1
    return whole(self, *args) * calls
GPT.forward = forward
""",
    "wait": """
step = Optimizer.step
def waiting_step(self):
    self.weights.sum().item()
    step(self)
Optimizer.step = waiting_step
""",
    "spill": """
import triton
import triton.language as tl
@triton.jit
def hungry(x, size: tl.constexpr):
    at = tl.arange(0, size)
    kept = tl.load(x + at)
    total = kept
    for i in range(4):
        other = tl.load(x + at * i)
        total = total * tl.sort(kept + other) + tl.sort(other * total)
    tl.store(x + at, total + kept)
step = Optimizer.step
def spilling_step(self):
    step(self)
    hungry[(1,)](torch.zeros(2**16, device="cuda"), 8192, num_warps=1)
Optimizer.step = spilling_step
""",
    "does not run": """
import triton
import triton.language as tl
@triton.jit
def huge(x, size: tl.constexpr):
    at = tl.arange(0, size)
    tl.store(x + at, tl.sort(tl.load(x + at)))
step = Optimizer.step
def wide_step(self):
    step(self)
    huge[(1,)](torch.zeros(2**21, device="cuda"), 2**21)
Optimizer.step = wide_step
""",
}


def preflight(script, *flags, options=()) -> tuple[int, dict]:
    """(exit code, report) of `python -m records preflight`."""
    command = [sys.executable, "-m", "records", "preflight", str(script), "--json", *options]
    done = subprocess.run(
        [*command, "--", *SMALL, *flags], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, json.loads(done.stdout)


def with_fault(folder: Path, fault: str) -> Path:
    """A copy of the trainer with a planted fault."""
    source = (ROOT / "train_gpt.py").read_text()
    head, main, tail = source.rpartition('if __name__ == "__main__":')
    path = folder / "train_gpt.py"
    path.write_text(head + FAULTS[fault].lstrip() + main + tail)
    return path


def line_number(path: Path, text: str) -> int:
    lines = path.read_text().splitlines()
    return 1 + next(i for i, line in enumerate(lines) if text in line)


@pytest.mark.preflight
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults(fault, tmp_path):
    script = with_fault(tmp_path, fault)
    code, report = preflight(script)
    found = {entry["what"]: entry for entry in report["failures"] + report["warnings"]}
    print(json.dumps(found, indent=1))
    assert fault in found


@pytest.mark.preflight
def test_planted_model_too_large():
    code, report = preflight(ROOT / "train_gpt.py", "--n_embd", "768", options=["--memory_gb", "1"])
    print(json.dumps(report["failures"], indent=1))
    assert code == 1 and report["failures"][0]["what"] == "does not fit"
