"""What only a CUDA device can show. Every test is marked `gpu` and skips itself without one; long ones `slow`, too.

    python -m pytest -q tests/test_gpu.py                   about 6 minutes on one GPU, most of it compilation
    python -m pytest -q tests/test_gpu.py -m "not slow"     about 4

Tolerances are relative Frobenius errors against fp64 where an operation is tested alone. Losses of two whole runs are
compared with an absolute tolerance: atomic additions make even equal GPU runs differ in the last bits.
"""

import dataclasses
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
from helpers import ROOT, flags, free_port, make_data, run, text, tiny, write_shard
from torch import nn

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
    return int(re.search(r"micro-batch (\d+) rows", outcome.log)[1])


def close(first, second, tolerance: float):
    a, b = values(first), values(second)
    assert len(a) == len(b) > 2 and np.abs(a - b).max() <= tolerance, (a, b)


# ------------------------------------------------------------------------------------------------------------ attention


def naive(q, k, v, tokens, window: int, doc_mask: bool, eot: int):
    """Attention by the book in fp64: explicit mask, softmax, weighted sum. A document starts at its eot."""
    q, k, v = (x.double() for x in (q, k, v))
    i = torch.arange(q.size(2), device=q.device)
    allowed = (i[:, None] >= i)[None, None]
    if window:
        allowed = allowed & (i[:, None] - i < window)
    if doc_mask:
        docs = (tokens == eot).cumsum(1)
        allowed = allowed & (docs[:, None, :, None] == docs[:, None, None, :])
    scores = (q @ k.mT * q.size(-1) ** -0.5).masked_fill(~allowed, -torch.inf)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "length, window, doc_mask", [(256, 0, True), (256, 64, False), (200, 64, True), (1000, 100, True), (333, 0, False)]
)
def test_flex_and_sdpa_against_naive(dtype, length, window, doc_mask):
    generator = torch.Generator().manual_seed(length + window)
    config = tiny(doc_mask=doc_mask, window=window, window_pattern="S" if window else "L")
    tokens = torch.randint(256, (3, length), generator=generator)
    tokens[torch.rand(tokens.shape, generator=generator) < 0.02] = config.vocab_size - 1
    tokens = tokens.to(CUDA)
    q, k, v, weight = (torch.randn(3, 2, length, 64, generator=generator).to(CUDA, dtype) for _ in range(4))

    def grads_of(attention):
        leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        out = attention(*leaves)
        return out, *torch.autograd.grad((out * weight.to(out.dtype)).sum(), leaves)

    def backend(name):
        chosen = dataclasses.replace(config, attention=name)

        def attention(q, k, v):
            return train_gpt.attend(q, k, v, train_gpt.attention_mask(tokens, window, chosen))

        return torch.compile(attention, dynamic=False, fullgraph=True) if name == "flex" else attention

    wanted = grads_of(lambda *x: naive(*x, tokens, window, doc_mask, config.vocab_size - 1))
    for name in ("flex", "sdpa"):
        for what, got, true in zip(("out", "dq", "dk", "dv"), grads_of(backend(name)), wanted):
            assert got.dtype == dtype and error(got, true) < TOLERANCE[dtype], (name, what, error(got, true))


def test_masks_of_one_compiled_function_follow_its_tokens():
    """The block mask is made of this call's documents, not of those seen at compilation."""
    config = tiny(attention="flex", doc_mask=True)
    compiled = torch.compile(
        lambda t, q, k, v: train_gpt.attend(q, k, v, train_gpt.attention_mask(t, 0, config)), dynamic=False
    )
    q, k, v = (torch.randn(2, 2, 256, 32, device=CUDA) for _ in range(3))
    for seed in range(3):
        tokens = torch.randint(250, 257, (2, 256), generator=torch.Generator().manual_seed(seed)).to(CUDA)
        assert error(compiled(tokens, q, k, v), naive(q, k, v, tokens, 0, True, 256)) < TOLERANCE[torch.float32]


# ----------------------------------------------------------------------------------------------------------- optimizers


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("rule, shape", [("muon", (4, 64, 64)), ("muon", (3, 128, 32)), ("adam", (3, 64, 32))])
def test_updates_on_the_gpu_are_those_of_the_cpu(rule, shape, compile):
    """Change in the weights after three fp32 updates: to 1e-3 for Muon, which magnifies rounding, 1e-5 for Adam."""
    changes = {}
    for device in ("cpu", "cuda"):
        generator, config = torch.Generator().manual_seed(1), tiny(compile=compile and device == "cuda", device=device)
        named = {f"p{i}": nn.Parameter(torch.randn(shape[1:], generator=generator).to(device)) for i in range(shape[0])}
        optimizer = train_gpt.Method.optimizers[rule](
            named, 0.1, shape[1:], config, train_gpt.Runtime(torch.device(device))
        )
        before = optimizer.weights.clone()
        for _ in range(3):
            optimizer.grads.copy_(torch.randn(shape, generator=generator))
            optimizer.reduce()
            optimizer.step()
            optimizer.finish()
        changes[device] = optimizer.weights - before
    assert error(changes["cuda"], changes["cpu"]) < (1e-3 if rule == "muon" else 1e-5)


def test_muon_in_bf16_orthogonalises():
    """Singular values of Newton-Schulz's result lie near 1, as in fp32 on the CPU; bf16 may add 0.1."""
    g = torch.randn(4, 96, 256, generator=torch.Generator().manual_seed(2))
    s = torch.linalg.svdvals(train_gpt.newton_schulz(g.to(CUDA), torch.bfloat16).float().cpu())
    assert 0.5 < s.min() and s.max() < 1.35


# ----------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("gpu"))


def on_gpu(folder, **changes):
    return run(flags(folder, **dict(device="cuda", compile=False) | changes))


def test_a_gpu_run_is_the_cpu_run_loss_for_loss(data):
    gpu, cpu = on_gpu(data), run(flags(data, device="cpu"))
    close(gpu, cpu, 2e-3)
    assert gpu.result()["device"] == torch.cuda.get_device_name() and gpu.facts()["cuda"] == torch.version.cuda


@pytest.mark.parametrize(
    "changes, tolerance",
    [
        (dict(), 2e-3),
        (dict(doc_mask=True, window=16, window_pattern="SL"), 2e-3),
        (dict(bf16=True), 0.05),
        (dict(bf16=True, doc_mask=True), 0.05),
        (dict(untie_head=False, value_residual=False, embed_residual=False), 2e-3),
    ],
)
def test_compiled_and_eager_runs_give_close_losses(data, changes, tolerance):
    changes = changes | dict(n_embd=64)  # FlexAttention wants heads of 16 or more
    compiled = on_gpu(data, compile=True, **changes)
    close(compiled, on_gpu(data, **changes), tolerance)
    assert f"attention {'flex' if 'doc_mask' in changes else 'sdpa'}, compile True" in compiled.log


def test_warm_up_puts_weights_and_state_back(data):
    config = train_gpt.resolve(tiny(device="cuda", compile=True), CUDA)
    model = train_gpt.GPT(config)
    train_gpt.init_weights(model, config)
    model.to(CUDA)
    runtime = train_gpt.init_runtime(config)
    ran = train_gpt.Run(config, runtime, model, [], train_gpt.make_optimizers(model, config, runtime, []))
    before, forward = ran.state(), torch.compile(model)
    assert train_gpt.warm_up(ran, forward) == config.rows
    for (name, old), new in zip(before["model"].items(), ran.state()["model"].values()):
        assert torch.equal(old, new), name
    assert all(set(state) == {"steps"} and state["steps"] == 0 for state in ran.state()["optimizers"].values())
    assert all(not optimizer.grads.any() for optimizer in ran.optimizers)


def test_what_does_not_fit_is_halved_and_trains_the_same_global_batch(tmp_path):
    """Under a memory limit the micro-batch falls; the losses are those of that --micro_batch, and of the full one."""
    for name, count in (("train_0", 200_000), ("val_0", 20_000)):
        write_shard(tmp_path / f"{name}.bin", text(count, 5))
    sizes = dict(n_layer=4, n_embd=128, seq_len=256, batch_tokens=128 * 256, val_tokens=4096, steps=4)
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
def test_the_full_gpt2_small_batch_fits_into_24_gb(tmp_path):
    tokens = np.random.default_rng(0).zipf(1.2, 2_200_000) % 50256
    tokens[::700] = 50256
    for name in ("train", "val"):
        write_shard(tmp_path / f"{name}_0.bin", tokens)
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, 24e9 / total))
    for changes in ([], ["--doc_mask", "--window", "256", "--window_pattern", "SSSL"]):
        outcome = run(
            [
                "--preset",
                "gpt2_small",
                "--steps",
                "3",
                "--val_tokens",
                "65536",
                "--val_every",
                "0",
                "--momentum_warmup",
                "1",
                "--train_files",
                f"{tmp_path}/train_*.bin",
                "--val_files",
                f"{tmp_path}/val_*.bin",
                "--log_dir",
                f"{tmp_path}/logs",
                *changes,
            ]
        )
        losses = values(outcome)
        assert losses[-1] < 10.9 and np.isfinite(losses).all()
        assert outcome.result()["peak_memory_bytes"] <= 24e9 and 512 % micro_of(outcome) == 0
        start_afresh()


@pytest.mark.parametrize("compile", [False, True])
def test_resuming_on_the_gpu_goes_on_where_it_stopped(data, tmp_path, compile):
    own = dict(
        compile=compile, log_dir=f"{tmp_path}/logs", checkpoint_dir=f"{tmp_path}/checkpoints", checkpoint_every=6
    )
    whole = on_gpu(data, **own)
    (checkpoint,) = tmp_path.glob("checkpoints/*/step_000006.pt")
    resumed = on_gpu(data, **own, resume=str(checkpoint))
    assert resumed.code == 0 and resumed.result()["resumed"], resumed.err
    late = [
        {key: float(loss) for *key, loss in o.losses() for key in [tuple(key)] if int(key[0]) > 6}
        for o in (whole, resumed)
    ]
    assert set(late[0]) == set(late[1]) and len(late[0]) >= 6
    assert max(abs(late[0][key] - late[1][key]) for key in late[0]) < 2e-3


@pytest.mark.parametrize(
    "changes",
    [
        dict(relora=4, relora_warm_start=2, relora_interval=2),
        dict(relora=4, relora_warm_start=2, relora_optimizer="muon"),
        dict(galore=4, galore_interval=3),
        dict(galore=4, galore_bits=8, galore_interval=3),
        dict(galore=4, galore_per_layer=True),
        dict(galore=4, galore_inner="muon"),
        dict(lawa=3, lawa_interval=1),
        dict(lawa=3, lawa_interval=1, lawa_mode="replace"),
        dict(sparsity=0.5),
        dict(mup_base_width=16),
        dict(matrix_optimizer="adam"),
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_methods_train_compiled(data, changes):
    """Six updates, once compiled and once not: finite, falling, and within 0.05 of each other."""
    compiled, eager = (on_gpu(data, steps=6, val_every=3, compile=compile, **changes) for compile in (True, False))
    close(compiled, eager, 0.05)
    assert values(compiled)[-1] < values(compiled)[0]


def test_generate_on_the_gpu(data, tmp_path):
    own = dict(checkpoint_dir=f"{tmp_path}/checkpoints", checkpoint_every=6)
    assert on_gpu(data, **own).code == 0
    words = [
        "--device",
        "cuda",
        "--generate",
        "abc",
        "--checkpoint",
        "latest",
        "--checkpoint_dir",
        f"{tmp_path}/checkpoints",
        "--generate_tokens",
        "20",
        "--temperature",
        "0",
    ]
    first, second = run(words), run(words)
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
    clock.start()
    torch.cuda._sleep(1_000_000_000)
    clock.stop()
    assert queued < 0.1 * true and abs(clock.seconds - true) < 0.3 * true


# ----------------------------------------------------------------------------------------------------------------- NCCL

# One rank counts as many: every collective runs, on NCCL, over a group of one. Its sums are those of a single process.
ALONE = """
import os, sys, threading
sys.path.insert(0, {root!r})
from datetime import timedelta
import torch, torch.distributed as dist
import train_gpt

class Many(int):
    def __gt__(self, other): return True

def init_runtime(config):
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    store = next(dist.rendezvous("env://"))[0]
    dist.init_process_group("nccl", store=dist.PrefixStore("group", store), rank=0, world_size=1, device_id=device,
                            timeout=timedelta(seconds=60))
    runtime = train_gpt.Runtime(device, 0, Many(1), store)
    runtime.watcher = threading.Thread(target=int)
    runtime.watcher.start()
    return runtime

calls = []
for name in ("all_reduce", "reduce_scatter_single", "reduce_scatter_tensor", "all_gather_single",
             "all_gather_into_tensor", "all_gather"):
    if hasattr(dist, name):
        def counted(*args, real=getattr(dist, name), name=name, **kwargs):
            calls.append(name)
            return real(*args, **kwargs)
        setattr(dist, name, counted)
train_gpt.reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
train_gpt.all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
train_gpt.init_runtime = init_runtime
code = train_gpt.main(sys.argv[1:])
print("collectives", *sorted(set(calls)), flush=True)
os._exit(code)
"""


def test_nccl_collectives_in_a_group_of_one(data, tmp_path):
    script = tmp_path / "alone.py"
    script.write_text(ALONE.format(root=str(ROOT)))
    words = flags(
        data,
        device="cuda",
        compile=True,
        checkpoint_every=6,
        log_dir=f"{tmp_path}/logs",
        checkpoint_dir=f"{tmp_path}/checkpoints",
    )
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", str(script), *words],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    used = next(line for line in done.stdout.splitlines() if line.startswith("collectives"))
    assert "all_reduce" in used and "reduce_scatter" in used and "all_gather" in used
    (log,) = tmp_path.glob("logs/*.txt")
    alone = on_gpu(data, compile=True)
    assert abs(json.loads(log.read_text().splitlines()[-1])["val_loss"] - alone.result()["val_loss"]) < 2e-3


def test_torchrun_with_one_gpu_is_a_plain_run(data, tmp_path):
    words = flags(data, device="cuda", compile=False, log_dir=f"{tmp_path}/logs")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--master_port={free_port()}",
            "--nproc_per_node=1",
            str(ROOT / "train_gpt.py"),
            *words,
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and "target 1." in done.stdout, done.stderr[-2000:]
