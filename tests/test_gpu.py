"""What only a CUDA device can show. Without one, no test here runs, and -m gpu skips them all.

    python -m pytest -q tests/test_gpu.py              most of the time goes into compilation
    python -m pytest -q tests/test_gpu.py -m slow      with 24 GB of memory: the big presets

Tolerances are relative Frobenius errors against fp64 where an operation is tested alone. Losses of
two whole runs are compared with an absolute tolerance: atomic additions make even equal GPU runs
differ in the last bits.
"""

import gc
import json
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from helpers import EVERY_METHOD, ROOT, flags, make_data, run, text, tiny, words, write_shard

import train_gpt

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # of one operation


def start_afresh():
    """No compiled code, no cached memory, and a peak that counts from here."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


@pytest.fixture(autouse=True)
def clean_device():
    """Each test compiles for itself, starts with an empty cache, and leaves no memory limit."""
    start_afresh()
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)


def error(got, wanted) -> float:
    """‖got - wanted‖ / ‖wanted‖ in fp64; inf where anything is not finite."""
    got, wanted = got.detach().double().cpu(), wanted.detach().double().cpu()
    return ((got - wanted).norm() / wanted.norm()).item() if got.isfinite().all() else float("inf")


def values(outcome) -> np.ndarray:
    """Losses of every step line."""
    assert outcome.code == 0, outcome.err
    return np.array([float(loss) for _, _, loss in outcome.losses()])


def micro_of(outcome) -> int:
    """Rows of a micro-batch, where all stages have one batch."""
    return int(re.search(r"micro-batches \{'\d+x\d+': (\d+)\}", outcome.log)[1])


def close(first, second, tolerance: float):
    a, b = values(first), values(second)
    assert len(a) == len(b) > 2 and np.abs(a - b).max() <= tolerance, (a, b)


# --------------------------------------------------------------------------------------- attention
def naive(q, k, v, tokens, window: int, doc_mask: bool):
    """Attention by the book in fp64: explicit mask, softmax, weighted sum; documents start at
    256."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    i = torch.arange(q.size(2), device=q.device)
    allowed = (i[:, None] >= i)[None, None]
    if window:
        allowed = allowed & (i[:, None] - i <= window)
    if doc_mask:
        docs = (tokens == 256).cumsum(1)
        allowed = allowed & (docs[:, None, :, None] == docs[:, None, None, :])
    scores = (q @ k.mT * q.size(-1) ** -0.5).masked_fill(~allowed, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def attention(tokens, q, k, v, window, doc_mask, flex):
    docs = (tokens == 256).cumsum(1) if doc_mask else torch.zeros_like(tokens)
    reach = torch.tensor(window, device=q.device) if window else None
    mask = train_gpt.attention_mask(docs, reach, flex)
    return train_gpt.masked_attention(q * q.size(-1) ** -0.5, k, v, mask)


SHAPES = [(256, 0, True), (256, 64, False), (200, 64, True), (1000, 100, True), (333, 0, False)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "bf16"])
@pytest.mark.parametrize("length, window, doc_mask", SHAPES)
def test_flex_and_sdpa_against_naive(dtype, length, window, doc_mask):
    generator = torch.Generator().manual_seed(length + window)
    tokens = torch.randint(256, (3, length), generator=generator)
    tokens[torch.rand(tokens.shape, generator=generator) < 0.02] = 256
    tokens, shape = tokens.to(CUDA), (3, length, 2, 64)  # [B, T, H, head_dim]
    q, k, v, weight = (torch.randn(shape, generator=generator).to(CUDA, dtype) for _ in range(4))

    def with_gradients(function):
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        out = function(*leaves)
        return out, *torch.autograd.grad((out * weight.to(out.dtype)).sum(), leaves)

    wanted = with_gradients(lambda *x: naive(*x, tokens, window, doc_mask))
    for name in ("flex", "sdpa"):

        def backend(q, k, v, flex=name == "flex"):
            return attention(tokens, q, k, v, window, doc_mask, flex)

        if name == "flex":
            backend = torch.compile(backend, dynamic=False, fullgraph=True)
        for got, true in zip(with_gradients(backend), wanted, strict=True):
            assert got.dtype == dtype and error(got, true) < TOLERANCE[dtype], name


def test_masks_of_one_compiled_function_follow_its_tokens():
    """The block mask is made of this call's documents, not of those seen at compilation."""
    compiled = torch.compile(attention, dynamic=False)
    q, k, v = (torch.randn(2, 256, 2, 32, device=CUDA) for _ in range(3))
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(250, 257, (2, 256), generator=generator).to(CUDA)
        found = compiled(tokens, q, k, v, 0, True, True)
        assert error(found, naive(q, k, v, tokens, 0, True)) < TOLERANCE[torch.float32]


# -------------------------------------------------------------------------------------- optimizers
RULES = [("muon", (4, 64, 64)), ("muon", (3, 128, 32)), ("anvil", (3, 64, 32))]
RULES += [("adam", (3, 64, 32))]


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("rule, shape", RULES)
def test_updates_on_the_gpu_are_those_of_the_cpu(rule, shape, compile):
    """Three fp32 updates: to 1e-3 for Muon, which magnifies rounding, 1e-5 for Adam."""
    changes = {}
    for device in ("cpu", "cuda"):
        generator = torch.Generator().manual_seed(1)
        config = tiny(compile=compile and device == "cuda", device=device)
        start = torch.randn(shape, generator=generator).to(device)
        named = {
            f"p{i}": train_gpt.parameter(matrix.clone(), "matrix") for i, matrix in enumerate(start)
        }
        ran = train_gpt.Run(config, train_gpt.Runtime(torch.device(device)), None, [])
        group = train_gpt.Group("lr_muon", 5.0)  # a rate of 0.1
        optimizer = train_gpt.MATRIX_RULES[rule](named, group, shape[1:], ran)
        for _ in range(3):
            for p, g in zip(named.values(), torch.randn(shape, generator=generator), strict=True):
                p.grad = g.to(device)
            optimizer.reduce()
            optimizer.step()
            optimizer.finish()
        changes[device] = optimizer.weights - start
    assert error(changes["cuda"], changes["cpu"]) < (1e-5 if rule == "adam" else 1e-3)


@pytest.mark.parametrize(
    "maps", [(), (train_gpt.Anvil.MAPS, train_gpt.Anvil.MARGIN, 1e-6)], ids=["muon", "anvil"]
)
def test_muon_in_bf16_orthogonalises(maps):
    """Singular values lie near 1, as in fp32 on the CPU; bf16 may add 0.1."""
    g = torch.randn(4, 96, 256, generator=torch.Generator().manual_seed(2)).to(CUDA)
    u = train_gpt.newton_schulz(g, torch.bfloat16, *maps)
    s = torch.linalg.svdvals(u.float().cpu())
    assert 0.5 < s.min() and s.max() < 1.35


# -------------------------------------------------------------------------------------- whole runs
@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("gpu"))


def on_gpu(folder, **changes):
    return run(flags(folder, **dict(device="cuda", compile=False) | changes))


def test_a_gpu_run_is_the_cpu_run_loss_for_loss(data):
    gpu, cpu = on_gpu(data), run(flags(data, device="cpu"))
    close(gpu, cpu, 2e-3)
    assert gpu.result()["device"] == torch.cuda.get_device_name()
    assert gpu.facts()["cuda"] == torch.version.cuda


@pytest.mark.parametrize(
    "changes, tolerance",
    [
        (dict(), 2e-3),
        (dict(doc_mask=True, window=16), 2e-3),
        (dict(batch_tokens=(128, 256, 256), window=(8, 16, 24)), 2e-3),
        (dict(bf16=True), 0.05),
        (dict(bf16=True, doc_mask=True), 0.05),
        (dict(untie_head=False, value_residual=False, embed_residual=False), 2e-3),
    ],
    ids=str,
)
def test_compiled_and_eager_runs_give_close_losses(data, changes, tolerance):
    changes = changes | dict(n_embd=64)  # FlexAttention wants heads of 16 or more
    compiled = on_gpu(data, compile=True, **changes)
    close(compiled, on_gpu(data, **changes), tolerance)
    assert compiled.result()["config"]["compile"]


def test_nothing_is_compiled_after_the_warm_up(data, monkeypatch):
    """Dynamo's counters stand still, over stages and their validations."""
    counters, seen, warm_up = torch._dynamo.utils.counters, [], train_gpt.warm_up

    def watch(*given):
        found = warm_up(*given)
        seen.append(dict(counters["stats"]))
        return found

    monkeypatch.setattr(train_gpt, "warm_up", watch)
    stages = dict(batch_tokens=(128, 256, 256), window=(8, 12, 24), normuon=0.9)
    assert on_gpu(data, compile=True, **stages).code == 0
    assert dict(counters["stats"]) == seen[0]


def test_the_loop_never_waits_for_the_device(data, monkeypatch):
    """CUDA itself raises where the clock runs and something synchronises."""
    switch = train_gpt.Clock.switch

    def watched(clock, on):
        torch.cuda.set_sync_debug_mode("default")
        switch(clock, on)
        torch.cuda.set_sync_debug_mode("error" if on else "default")

    monkeypatch.setattr(train_gpt.Clock, "switch", watched)
    try:
        assert on_gpu(data, compile=True, bf16=True).code == 0
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_what_does_not_fit_is_halved_and_trains_the_same_global_batch(tmp_path):
    """Under a memory limit the micro-batch falls; the losses are those of the full one."""
    for name, count in (("train_0", 200_000), ("val_0", 20_000)):
        write_shard(tmp_path / f"{name}.bin", text(count, 5))
    sizes = dict(n_layer=4, n_embd=128, seq_len=256, batch_tokens=128 * 256)
    sizes |= dict(val_tokens=4096, steps=4)
    full = on_gpu(tmp_path, **sizes)
    peak, total = full.result()["peak_memory_bytes"], torch.cuda.mem_get_info()[1]
    assert micro_of(full) == 128
    start_afresh()
    torch.cuda.set_per_process_memory_fraction(0.6 * peak / total)
    halved = on_gpu(tmp_path, **sizes)
    torch.cuda.set_per_process_memory_fraction(1.0)
    assert micro_of(halved) < 128 and halved.result()["peak_memory_bytes"] <= 0.6 * peak
    close(halved, on_gpu(tmp_path, **sizes, micro_batch=micro_of(halved)), 1e-3)
    close(halved, full, 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["nov2024", "gpt2_small"])
def test_the_full_batch_of_a_preset_fits_into_24_gb(preset, tmp_path):
    tokens = np.random.default_rng(0).zipf(1.2, 2_600_000) % 50256
    tokens[::700] = 50256
    for name in ("train", "val"):
        write_shard(tmp_path / f"{name}_0.bin", tokens)
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, 24e9 / total))
    sizes = dict(preset=preset, steps=4, val_tokens=262144, val_every=0)
    files = dict(train_files=f"{tmp_path}/train_*.bin", val_files=f"{tmp_path}/val_*.bin")
    outcome = run(words(**sizes, **files, log_dir=tmp_path / "logs"))
    losses = values(outcome)
    assert losses[-1] < 11.5 and np.isfinite(losses).all()
    assert outcome.result()["peak_memory_bytes"] <= 24e9


@pytest.mark.parametrize("compile", [False, True])
def test_resuming_on_the_gpu_goes_on_where_it_stopped(data, tmp_path, compile):
    own = dict(log_dir=tmp_path / "logs", checkpoint_dir=tmp_path / "checkpoints")
    own |= dict(compile=compile, checkpoint_every=6)
    whole = on_gpu(data, **own)
    (checkpoint,) = tmp_path.glob("checkpoints/*/step_000006.pt")
    close(on_gpu(data, **own, resume=checkpoint), whole, 2e-3)


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_methods_train_compiled(data, method):
    """Once compiled and once not: finite, falling, and within 0.05 of each other."""
    changes = EVERY_METHOD[method]
    on = not changes.get("galore_per_layer")
    compiled, eager = (on_gpu(data, compile=c, **changes) for c in (on, False))
    close(compiled, eager, 0.05)
    assert values(compiled)[-1] < values(compiled)[0]


def test_generate_on_the_gpu(data, tmp_path):
    own = dict(checkpoint_dir=tmp_path / "checkpoints", checkpoint_every=6)
    assert on_gpu(data, **own).code == 0
    line = dict(device="cuda", generate="abc", checkpoint="latest", temperature=0)
    line |= dict(checkpoint_dir=tmp_path / "checkpoints", generate_tokens=20)
    first, second = run(words(**line)), run(words(**line))
    assert first.code == 0 and first.out.startswith("abc") and first.out == second.out, first.err


def test_the_clock_waits_for_the_device():
    clock = train_gpt.Clock(CUDA)
    torch.cuda._sleep(500_000_000)  # the first call loads it, and the card's clock rises
    torch.cuda.synchronize()
    begun = time.perf_counter()
    torch.cuda._sleep(1_000_000_000)
    queued = time.perf_counter() - begun
    torch.cuda.synchronize()
    true = time.perf_counter() - begun
    clock.switch(on=True)
    torch.cuda._sleep(1_000_000_000)
    clock.switch(on=False)
    assert queued < 0.1 * true and abs(clock.seconds - true) < 0.3 * true


# -------------------------------------------------------------------------------------------- NCCL
# One rank counts as many: every collective runs, on NCCL, over a group of one.
ALONE = """
import os, sys
sys.path.insert(0, {root!r})
import torch, torch.distributed as dist
import train_gpt

class Many(int):
    def __gt__(self, other):
        return True

def init_runtime(config):
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return train_gpt.Runtime(device, 0, Many(1))

calls = []
def counted(name, function):
    def call(*args, **kwargs):
        calls.append(name)
        return function(*args, **kwargs)
    return call

dist.all_reduce = counted("all_reduce", dist.all_reduce)
train_gpt.reduce_scatter = counted("reduce_scatter", train_gpt.reduce_scatter)
train_gpt.all_gather = counted("all_gather", train_gpt.all_gather)
train_gpt.init_runtime = init_runtime
code = train_gpt.main()
print("collectives", *sorted(set(calls)), flush=True)
os._exit(code)
"""


def under_torchrun(script, line):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command += [str(script), *line]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def test_nccl_collectives_in_a_group_of_one(data, tmp_path):
    """Their sums are those of a single process."""
    script = tmp_path / "alone.py"
    script.write_text(ALONE.format(root=str(ROOT)))
    files = dict(log_dir=tmp_path / "logs", checkpoint_dir=tmp_path / "checkpoints")
    line = flags(data, device="cuda", compile=True, checkpoint_every=6, **files)
    done = under_torchrun(script, line)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "collectives all_gather all_reduce reduce_scatter" in done.stdout
    (log,) = tmp_path.glob("logs/*.txt")
    result = json.loads(log.read_text().splitlines()[-1])
    alone = on_gpu(data, compile=True).result()
    assert abs(result["val_loss"] - alone["val_loss"]) < 2e-3


def test_torchrun_with_one_gpu_is_a_plain_run(data, tmp_path):
    line = flags(data, device="cuda", compile=False, log_dir=tmp_path / "logs")
    done = under_torchrun(ROOT / "train_gpt.py", line)
    assert done.returncode == 0 and "target 3.28" in done.stdout, done.stderr[-2000:]
