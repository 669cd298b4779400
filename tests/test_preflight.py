"""The preflight: what it refuses and counts; with -m preflight, planted faults and all presets."""

import dataclasses
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from records.tools import preflight as tool
from records.tools.nullgpu import against, environment, estimate
from records.tools.nullgpu import report as reporting
from records.tools.nullgpu.cards import CARDS
from records.tools.nullgpu.observe import TrainerLog
from records.tools.nullgpu.run import Run, all_flags

NULLGPU = str(Path(environment.__file__).parent)  # its modules run in their own environment
ROOT = Path(__file__).resolve().parents[1]

# Small shapes: a graph's compilation takes as long as with large ones, the updates do not.
SMALL = (
    "--preset nov2024 --n_layer 2 --n_head 2 --n_embd 128 --seq_len 128 --val_seq_len 128 "
    "--batch_tokens 4096 --val_tokens 4096 --steps 24 --val_every 8"
).split()
# Record 92's five stages, narrow and short
RECIPE = (
    "--preset gpt2_small --vocab_size 257 --n_embd 192 --table_rows 10000 --val_seq_len 256 "
    "--val_tokens 2048 "
    "--batch_tokens 2048 4096 4096 4096 2048 --seq_len 256 512 512 512 256 --max_document 128 "
    "--window 128 --short_window 64 --steps 48 --momentum_cooldown 4"
)

# Each is put in front of the script's last lines, where everything is defined and nothing has run.
FAULTS = {
    "graph break": """
whole = GPT.forward
def planted(self, *args, **named):
    torch._dynamo.graph_break()
    return whole(self, *args, **named)
GPT.forward = planted
""",
    "late compilation": """
whole, calls = GPT.forward, 0
def planted(self, *args, **named):
    global calls
    calls += 1
    return whole(self, *args, **named) * calls
GPT.forward = planted
""",
    "wait": """
whole = Optimizer.step
def planted(self):
    self.weights.sum().item()
    whole(self)
Optimizer.step = planted
""",
    "spill": """
import triton
import triton.language as tl
@triton.jit
def hungry(x, size: tl.constexpr):
    at = tl.arange(0, size)
    kept = tl.load(x + at)
    tl.store(x + at, kept * tl.sum(kept, 0))
whole = Optimizer.step
def planted(self):
    whole(self)
    hungry[(1,)](torch.zeros(2**16, device="cuda"), 8192, num_warps=1)
Optimizer.step = planted
""",
    "does not run": """
import triton
import triton.language as tl
@triton.jit
def huge(x, size: tl.constexpr):
    at = tl.arange(0, size)
    tl.store(x + at, tl.sort(tl.load(x + at)))
whole = Optimizer.step
def planted(self):
    whole(self)
    huge[(1,)](torch.zeros(2**21, device="cuda"), 2**21)
Optimizer.step = planted
""",
}

LINES = {
    "graph break": "torch._dynamo.graph_break()",
    "wait": "self.weights.sum().item()",
    "does not run": "huge[(1,)]",
}


# ---------------------------------------------------------------------------- without the stand-in


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty cache folder, where nothing may be installed."""
    monkeypatch.setenv("SPEEDRUN_PREFLIGHT", str(tmp_path / "home"))
    monkeypatch.setattr(environment.Environment, "call", lambda *args: pytest.fail("set-up began"))
    return tmp_path / "home"


def refusal(capsys, *argv) -> str:
    """The one line of a misuse."""
    assert tool.main([str(ROOT / "train_gpt.py"), *argv]) == 2
    lines = capsys.readouterr().err.splitlines()
    return lines[-1]


@pytest.mark.parametrize(
    "argv", [["--gpu", "tpu"], ["--gpus", "3"], ["--memory_gb", "x"], ["--torch", "2"], ["-x"]]
)
def test_misuse_is_one_line(argv, home, capsys):
    assert refusal(capsys, *argv).endswith("see python -m records preflight --help")
    assert not home.exists()


def test_a_missing_script_is_one_line(home, capsys):
    assert tool.main(["nowhere.py"]) == 2
    assert "nowhere.py: no such file" in capsys.readouterr().err


def test_other_machines_are_refused(home, capsys, monkeypatch):
    monkeypatch.setattr(
        os, "uname", lambda: SimpleNamespace(sysname="Darwin", machine="arm64"), raising=True
    )
    assert "Linux x86-64, not Darwin arm64" in refusal(capsys)


@pytest.mark.parametrize(
    "missing, said", [("cc gcc clang", "no C compiler"), ("nm", "nm not found; install binutils")]
)
def test_missing_tools_are_named(missing, said, home, capsys, monkeypatch):
    monkeypatch.setattr(
        environment.shutil, "which", lambda name: None if name in missing.split() else f"/{name}"
    )
    assert said in refusal(capsys)


def test_a_full_disk_is_said_before_the_download(home, capsys, monkeypatch):
    monkeypatch.setattr(environment.shutil, "which", lambda name: f"/{name}")
    monkeypatch.setattr(environment.Environment, "has_headers", lambda self: True)
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**9))
    assert "has 1.0 GB free, 3.5 are needed" in refusal(capsys)


def test_the_users_flags_win(tmp_path):
    files = ["--train_files", "a", "--val_files", "b"]
    assert all_flags(["--steps", "30", *files], tmp_path)[2:] == [*files, "--val_every", "30"]
    assert "--galore_interval" in all_flags(["--galore", "8", *files], tmp_path)
    assert not any(tmp_path.iterdir())
    assert tool.separated(["--a=b=c", "d=e"]) == ["--a", "b=c", "d=e"]


def test_the_log_is_read_by_whole_lines(tmp_path):
    log = TrainerLog(tmp_path)
    assert log.new_lines() == []
    (tmp_path / "run.txt").write_text("one\ntwo\nthr")
    assert log.new_lines() == ["one", "two"]
    (tmp_path / "run.txt").write_text("one\ntwo\nthree\n")
    assert log.new_lines() == ["three"]
    assert log.new_lines() == []


@pytest.mark.parametrize(
    "output, line",
    [
        (
            "Traceback\ntorch.OutOfMemoryError: CUDA out of memory. Tried\n\nSet X=1\n",
            "torch.OutOfM",
        ),
        (
            "train_gpt.py: --window: no\n[W1121 14:16:52.4 ProcessGroup] Warning: leak\n",
            "train_gpt.",
        ),
        (
            "[rank0]: ValueError: x\n[rank0]:[W1121 14:16:52.4 ProcessGroup] Warning\n",
            "ValueError: x",
        ),
        ("step 1\nKilled\n\n", "Killed"),
        ("", "no output"),
    ],
)
def test_the_error_is_found_in_the_output(output, line):
    run = Run.__new__(Run)
    run.output = output
    assert run.last_line().startswith(line)


FLASH = "_ZN13pytorch_flash16flash_fwd_kernelI23Flash_fwd_kernel_traitsILi128ELi128ELi64ELi4E"
ADD = "_ZN2at6native29vectorized_elementwise_kernelILi4ENS0_15CUDAFunctor_addIfEESt5arrayIPcLm3EE"


def test_work_is_counted_from_what_was_launched():
    counts = {
        "matmul bf16 m=2 n=3 k=4 batch=1": [5, 5 * 48],
        "matmul bf16 m=2 n=2 k=2 batch=7": [1, 112],
        # 1024 tokens in blocks of 128, 4 rows, 6 heads of 128
        f"kernel {FLASH} grid 8,4,6": [2, 384],
        f"kernel {ADD} grid 10,1,1 elements": [1, 1000],
        "kernel triton_poi_fused_add_0 grid 1,1,1": [3, 3],
        "kernel mystery grid 1,1,1": [4, 4],
        "collective all_gather": [1, 800],
        "copy device -> device": [1, 50],
        "copy pinned -> device": [1, 1e9],
        "spill triton_poi_fused_add_0": [3, 24],
    }
    update = dict(counts=counts, triton={"triton_poi_fused_add_0": [3, 600.0, 0.0, 9e9]})
    works = {(work.kind, work.name.partition(" ")[0]): work for work in estimate.works_of(update)}
    single = works["matmul", "matmul"]
    assert (single.launches, single.bytes, single.operations) == (5, 5 * 2 * (8 + 12 + 6), 240)
    assert works["matmul, optimizer", "matmul"].bytes == 2 * 7 * 12
    queries = 4 * 6 * 1024 * 128
    attention = works["attention", "flash_fwd_kernel"]
    assert attention.operations == 2 * 4 * queries * 1024 / 2
    assert attention.bytes == 2 * 4 * 2 * queries  # q, k, v and o in bf16
    assert works["eager", ADD].bytes == 1000 * 3 * 4
    added = works["norm, rotary, residual", "triton_poi_fused_add_0"]
    assert (added.bytes, added.instructions) == (600, 9e9)
    assert not works["eager", "mystery"].known
    assert works["copies", "copy"].bytes == 100
    assert len(works) == 8
    assert reporting.spills_of(update) == {"triton_poi_fused_add_0": 8}


def test_the_whole_run_of_a_script_that_exits(tmp_path):
    import observe

    script = str(tmp_path / "script.py")
    Path(script).write_text(
        "import sys\nfrom types import SimpleNamespace\n"
        "def parse_config(flags, preset):\n    return SimpleNamespace(steps=len(flags))\n"
        "def main():\n    sys.exit(0)\nif __name__ == '__main__':\n    main()\n"
    )
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(script, run_name="__main__")
    names = observe.names_at_exit(ended.value, script)
    assert observe.whole_steps(names, ["--seed", "1", "--steps", "120", "--bf16"]) == 3
    assert observe.whole_steps(names, ["--seed", "1"]) is None
    assert observe.whole_steps({}, ["--steps", "1"]) is None


def test_attention_is_what_block_masks_leave():
    triton = {"triton_tem_fused_flex_attention_1": [2, 50.0, 800.0, 0.0]}
    (work,) = estimate.works_of(dict(counts={}, triton=triton, attention=0.1))
    assert (work.kind, work.operations, work.bytes) == ("attention", pytest.approx(80), 50)
    (work,) = estimate.works_of(dict(counts={}, triton=triton, attention=None))
    assert work.operations == 400  # causal


@pytest.mark.long
@pytest.mark.parametrize("largest", [1 << 25, 2048], ids=["all pairs", "nearest pairs"])
@pytest.mark.parametrize("window", [10, 200, 10**6])
def test_block_masks_are_made_again_on_the_host(largest, window, monkeypatch):
    """Of a compiled graph on a CPU, from its tokens: as many blocks as the masks really have."""
    monkeypatch.syspath_prepend(NULLGPU)
    import blocks

    rows, length = 2, 1024
    monkeypatch.setattr(blocks, "LARGEST", largest)
    tokens = torch.randint(1, 300, (rows, length), generator=torch.Generator().manual_seed(0))
    found = []

    def mask_of(tokens):
        docs = (tokens < 3).cumsum(1)

        def allowed(b, h, q, k):
            return (q >= k) & (q - k <= window) & (docs[b, q] == docs[b, k])

        return create_block_mask(allowed, rows, None, length, length, device="cpu")

    def forward(tokens, q):
        return flex_attention(q, q, q, block_mask=mask_of(tokens))

    def compile_graph(module, inputs):
        graph = blocks.Graph(module)

        def run(*inputs):
            found.append(graph.count(list(inputs)))
            return module(*inputs)

        return run

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=compile_graph)
    torch.compile(forward, backend=backend)(tokens, torch.zeros(rows, 1, length, 16))
    mask = mask_of(tokens)
    size = 128 * 128 * 16
    blocks_of_mask = (mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum()).item()
    assert found == [(blocks_of_mask * size, rows * (length // 128) ** 2 * size)]
    assert 0 < found[0][0] < found[0][1] / 2


def test_flash_attention_tiles(monkeypatch):
    monkeypatch.syspath_prepend(NULLGPU)
    import replaced

    assert replaced.tiles([128, 256], -1) == 2
    assert replaced.tiles([512], -1) == 1 + 2 + 3 + 4
    assert replaced.tiles([512], 128) == 1 + 2 + 2 + 2
    assert replaced.tiles([100, 300, 301], 384) == 1 + 3 + 1


def test_bytes_are_those_of_distinct_buffers(monkeypatch):
    monkeypatch.syspath_prepend(NULLGPU)
    import observe

    buffer = torch.zeros(100)
    given = dict(in_ptr0=buffer[:50], in_ptr1=buffer, in_out_ptr0=torch.zeros(10), xnumel=7)
    assert observe.distinct_bytes(given) == 4 * (100 + 10 + 10)
    kernel = SimpleNamespace(
        inductor_meta=dict(kernel_name="k", kernel_num_gb=1.0, kernel_flop=None),
        fn=SimpleNamespace(src="def k():\n    tmp0 = load\n    tmp1 = tmp0 + 1\n    store(tmp1)"),
    )
    given |= dict(r0_numel=3)
    assert observe.fused_work(kernel, given) == ("k", 480.0, 0.0, 2 * 7 * 3)
    kernel.inductor_meta["kernel_num_gb"] = 1e-7
    assert observe.fused_work(kernel, given)[1] == pytest.approx(100)
    own = SimpleNamespace(src="tl.dot", __name__="mine")
    matrices = dict(a=torch.zeros(2, 8, 4), c=torch.zeros(2, 8, 8), M=8, K=4)
    assert observe.own_work(own, matrices) == ("mine", 4 * (64 + 128), 2 * 2 * 8 * 8 * 4, 0.0)


def test_the_estimate_is_the_slowest_of_operations_bytes_and_launches():
    card = CARDS["h100"]

    def seconds(**work):
        fields = dict(kind="matmul", name="", launches=1, bytes=0, operations=0)
        return estimate.seconds(estimate.Work(**fields | work), card, 8)

    shares = estimate.SHARES
    assert seconds(operations=989e12) == pytest.approx(1 / shares.matmul)
    assert seconds(operations=989e12, precision="fp8") == pytest.approx(0.5 / shares.matmul)
    assert seconds(bytes=3.35e12) == pytest.approx(1 / shares.memory)
    assert seconds(launches=1000) == pytest.approx(1000 * shares.launch)
    issued = 132 * 128 * 1.98e9
    assert seconds(instructions=issued) == pytest.approx(1 / shares.issue)
    attention = dict(kind="attention", operations=989e12)
    assert seconds(**attention) == pytest.approx(1 / card.attention)
    flex = seconds(**attention, name="triton_tem_fused_flex_attention_1")
    assert flex == pytest.approx(1 / card.attention / shares.flex)
    ring = seconds(kind="collective", bytes=450e9)
    assert ring == pytest.approx(7 / 8 / shares.link)
    work = estimate.Work("matmul", "", 1000, 0, 0)
    update = estimate.update_seconds([work], card, 8)
    assert update == pytest.approx(shares.update + 1000 * shares.launch)


def update(first, launches, last=None, validated=False):
    """What observe.py says of an update that launched so many kernels."""
    counts = {"kernel k grid 1,1,1": [launches, launches]}
    fields = dict(backwards=1, host_seconds=0.1, waits=[], triton={}, validated=validated)
    return dict(first=first, last=last or first + 1, counts=counts, **fields)


def test_stages_are_described_by_the_mean_of_their_updates():
    """Of a script that reads its loss one update late; validations at 0, 6 and the end."""
    sizes = (6, 1024), (6, 2048), (2, 4096)
    plan = [dict(steps=steps, batch_tokens=tokens, seq_len=128) for steps, tokens in sizes]
    updates = [
        update(0, 8, validated=True),
        update(1, 4),
        update(2, 4),
        update(3, 7),  # a method's rarer work
        update(4, 100, last=6, validated=True),
        update(6, 14),  # two at once: the first one's loss was read late
        *(update(step, 7) for step in range(7, 11)),
        update(11, 9),
        update(12, 100, last=14, validated=True),
    ]
    updates[2]["waits"] = [("wait for a stream", 3)]
    run = SimpleNamespace(seen=dict(updates=updates))
    run.config = lambda: dict(stages=plan)
    run.result = lambda: dict(flops_per_token=6.0)
    options = SimpleNamespace(card=CARDS["h100"], gpus=2, updates=140, dollars_per_hour=3.0)
    stages = reporting.stages_of(run, options)
    assert [stage["stage"]["batch_tokens"] for stage in stages] == [1024, 2048, 4096]
    assert [stage["launches"] for stage in stages] == [5.5, 7, 9]
    assert [stage["micro_batch"] for stage in stages] == [4, 8, 16]
    assert [stage["waits"] for stage in stages] == [0, 0, 0]
    assert [stage["most_waits"] for stage in stages] == [1, 0, 0]
    for stage, seconds in zip(stages, (0.1, 0.2, 0.4), strict=True):
        stage["estimated_seconds"] = seconds
    whole = reporting.whole_run(stages, run, options)
    assert whole["seconds"] == pytest.approx(60 * 0.1 + 60 * 0.2 + 20 * 0.4)
    assert whole["dollars"] == pytest.approx(whole["seconds"] / 3600 * 2 * 3)
    assert "whole run: 26 s" in tool.total_line(whole) and "$0.04" in tool.total_line(whole)
    options.updates = None
    assert reporting.whole_run(stages, run, options) is None


def public_log(source: str, milliseconds, gpus=8) -> str:
    """A log as public scripts write them: update n takes milliseconds(n)."""
    lines = ["=" * 100, source, "=" * 100]
    lines += [f"|   {n}  NVIDIA H200                    On  | x |" for n in range(gpus)]
    total = 0.0
    for n in range(300):
        total += milliseconds(n)
        lines.append(f"step:{n + 1}/300 train_time:{total:.0f}ms step_avg:1.00ms")
    return "\n".join([*lines, f"step:300/300 val_loss:3.2 train_time:{total:.0f}ms"])


PUBLIC = """import torch
#torch._inductor.config.coordinate_descent_tuning = True # banned
config.coordinate_descent_tuning = True
    num_iterations : int = 1750 # number of iterations to run
    num_extension_iterations: int = 40
    num_iterations: int = num_scheduled_iterations + num_extension_iterations
    val_loss_every = 125 # every how many steps
from kernels import get_kernel

----------------------------------------
# triton_kernels.py
----------------------------------------
import triton
"""


def test_a_public_log_is_read(tmp_path):
    path = tmp_path / "log.txt"
    # In turn 10 and 20 ms, from the 100th on 30 and 40, with a hiccup in between
    path.write_text(public_log(PUBLIC, lambda n: 10 + 10 * (n % 2) + 20 * (n >= 100) + (n == 50)))
    public = against.read(path)
    assert public.measured == pytest.approx([15, 35, 35])
    assert (public.card.name, public.gpus) == ("NVIDIA H200", 8)
    main = public.files["train_gpt.py"]
    assert public.files["triton_kernels.py"].strip() == "import triton"
    assert "num_iterations : int = 54 #" in main and "num_extension_iterations: int = 1\n" in main
    assert "= num_scheduled_iterations + num_extension_iterations" in main
    assert "val_loss_every = 0 #" in main and "config.coordinate_descent_tuning = False" in main
    assert "#torch._inductor.config.coordinate_descent_tuning = True" in main
    assert len(public.changes) == 2


@pytest.mark.parametrize("text", ["", "step:1/2 train_time:1ms", public_log("a = 1", float)])
def test_other_logs_are_refused(text, tmp_path, home, capsys, monkeypatch):
    monkeypatch.setattr(environment.Environment, "prepare", lambda self: None)
    path = tmp_path / "log.txt"
    path.write_text(text)
    assert tool.main(["--against", str(path)]) == 2
    assert "no log of a public script" in capsys.readouterr().err


def test_constants_are_judged_on_the_other_half(monkeypatch, capsys):
    """Of cards whose memory is a little faster, and that need 2 ms more an update."""
    true = dataclasses.replace(estimate.Shares(), memory=0.9, update=7e-3)
    publics, counted = [], {}
    for i in range(4):
        loss = [[estimate.Work("loss", "", 1, size * 1e9, 0)] for size in (50, 100, 150 + i)]
        parts = [[works, works] for works in loss]
        public = against.Public(f"log {i}", CARDS["h100"], 8, {}, [], [])
        public.measured = against.estimated(public, parts, true)
        publics.append(public)
        counted[public.name] = parts
    monkeypatch.setattr(against, "counted", lambda public, _: counted[public.name])
    found = against.compare(publics, None)
    assert found["error"] < 0.01
    assert found["fitted"]["memory"] == pytest.approx(0.9, rel=0.02)
    assert found["fitted"]["update"] == pytest.approx(7e-3, rel=0.1)
    assert "| log 3 | 8 x NVIDIA H100" in tool.comparison(found)


PREFIX = "W1121 14:03:38 4153 torch/_dynamo/convert_frame.py:1995] [0/8] "
LIMIT = f"""{PREFIX}torch._dynamo hit config.recompile_limit (8)
{PREFIX}   function: 'planted' (/t.py:1102)
"""


def ended(code=0, output="", total=(), compilations=()):
    """What failures() looks at, of a run and its report."""
    run = SimpleNamespace(code=code, output=output, seen=dict(total=dict.fromkeys(total)))
    run.last_line = lambda: output
    run.line_of_error = lambda: 7
    return dict(graph_breaks=[], compilations=compilations, stages=[]), run


@pytest.mark.parametrize(
    "what, run",
    {
        None: ended(),
        "does not end": ended(code=None),
        "does not run": ended(code=1, output="ValueError"),
        "does not fit": ended(code=2, output="train_gpt.py: no", total=["memory refused"]),
        "too many forms": ended(output=LIMIT),
        "refused": ended(total=["refused launch k grid 1,70000,1"]),
        "late compilation": ended(
            compilations=[dict(late=True, seconds=2.0, reason=None, line=3)],
        ),
    }.items(),
)
def test_what_would_fail_there(what, run):
    found = reporting.failures(*run)
    assert [entry["what"] for entry in found] == ([what] if what else [])


# ------------------------------------------------------------------------------- on the stand-in


def preflight(script, *flags, options=()) -> tuple[int, dict]:
    """(exit code, report) of `python -m records preflight`."""
    command = [sys.executable, "-m", "records", "preflight", str(script), "--json", *options]
    # What a case sets itself replaces the small default: no flag is given twice.
    given = {}
    for word in flags if "gpt2_small" in flags else [*SMALL, *flags]:
        if word.startswith("--"):
            given[word] = values = []
        else:
            values.append(word)
    words = [word for name, values in given.items() for word in (name, *values)]
    done = subprocess.run([*command, "--", *words], cwd=ROOT, capture_output=True, text=True)
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


def found(report: dict) -> dict[str, dict]:
    return {entry["what"]: entry for entry in report["failures"] + report["warnings"]}


@pytest.mark.preflight
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault, tmp_path):
    script = with_fault(tmp_path, fault)
    code, report = preflight(script)
    entry = found(report)[fault]
    assert code == (0 if fault == "spill" else 1)
    if fault in LINES:
        assert entry["line"] == line_number(script, LINES[fault])


@pytest.mark.preflight
def test_a_model_too_large_for_the_card_is_found():
    large = ["--n_embd", "768"]
    code, report = preflight(ROOT / "train_gpt.py", *large, options=["--memory_gb", "1"])
    assert code == 1 and report["failures"][0]["what"] == "does not fit"


CASES = {
    "nov2024": "",
    "gpt2_small": RECIPE,
    "gpt2_medium": "--preset gpt2_medium",
    "gpt2_xl": "--preset gpt2_xl",
    "laptop": "--preset laptop",
    "stages": "--batch_tokens 4096 8192 --window 32 64",
    "documents": "--doc_mask --window 64",
    "eager": "--no_compile",
    "fp32": "--no_bf16",
    "tied": "--no_untie_head",
    "ngram": "--ngram 3",
    "micro-batches": "--micro_batch 8",
    "adam": "--matrix_optimizer adam",
    "sparsity": "--sparsity 0.5",
    "mup": "--mup_base_width 64",
    "relora": "--relora 8 --relora_warm_start 4 --relora_interval 3",
    "relora, adam": "--relora 8 --relora_warm_start 4 --matrix_optimizer adam",
    "galore": "--galore 8",
    "galore, 8 bits": "--galore 8 --galore_bits 8",
    "galore, adam": "--galore 8 --matrix_optimizer adam",
    "galore, per layer": "--galore 8 --galore_per_layer --no_compile",
    "lawa": "--lawa 2 --lawa_interval 2",
    "lawa, replace": "--lawa 2 --lawa_interval 2 --lawa_mode replace",
    "checkpoints": "--checkpoint_every 4",
}
OTHER_CARDS = [
    ("h100", "8", ""),
    ("h100", "8", "--lawa 2 --lawa_interval 2"),
    ("a100", "1", "--doc_mask --window 64"),
    ("4090", "1", "--doc_mask --window 64"),
    ("3090", "1", "--doc_mask --window 64"),
]


@pytest.mark.preflight
@pytest.mark.parametrize("flags", CASES.values(), ids=CASES)
def test_presets_and_methods_pass(flags):
    code, report = preflight(ROOT / "train_gpt.py", *flags.split())
    assert (code, report["failures"]) == (0, [])
    assert report["stages"], "no whole update was seen"


@pytest.mark.preflight
@pytest.mark.parametrize("gpu, gpus, flags", OTHER_CARDS)
def test_cards_pass(gpu, gpus, flags):
    options = ["--gpu", gpu, "--gpus", gpus]
    code, report = preflight(ROOT / "train_gpt.py", *flags.split(), options=options)
    assert (code, report["failures"]) == (0, [])


def test_a_plan_of_stages_is_read_by_its_rows():
    plan = [dict(steps=2, batch_tokens=64, window=8, prefix=[0.1], extension=False)]
    plan.append(dict(steps=6, batch_tokens=128, window=8, prefix=[0.0], extension=True))
    rows = [reporting.stage_at(step, dict(stages=plan)) for step in (0, 1, 2, 7)]
    assert rows == [(("batch_tokens", 64),)] * 2 + [(("batch_tokens", 128),)] * 2
    longer = dict(stages=plan, steps=80)
    assert reporting.stage_at(19, longer) == rows[0] and reporting.stage_at(20, longer) == rows[3]
