"""Where the time of a training step goes, by class of kernel, and how far each class is from its
floor.

    python records/one_gpu/profile_step.py               gpt2_small on a GPU: 5 steps, 3 minutes
    python records/one_gpu/profile_step.py --ceilings    only what this machine can do at most
    python records/one_gpu/profile_step.py --steps 3 -- --preset laptop     flags for train_gpt.py

Two ceilings are measured first: a large matrix product on random numbers (bf16 on a GPU, fp32 on a
CPU) and a large device-to-device copy (bytes read plus bytes written). Then steps on random tokens
are timed without the profiler, and the two halves of a step, forward with backward and the
optimizers' update, are profiled apart. What a step takes beyond its kernels is `gaps`: waiting for
the host. On a CPU the profiler slows every operator, so there `gaps` may come out below zero and
only the proportions count.

Floors: matmul and attention, counted operations over the matmul ceiling; all else, the fewest bytes
over the copy ceiling. The bytes of `elementwise` are an estimate: per token, layer and update 66
numbers of width n_embd, each read or written once in the activations' type, and the logits three
times.

--trainer FILE profiles another train_gpt.py of the same interface. Exit code 0: done; 2: misuse.
"""

import importlib.util
import json
import re
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parents[2]
if not __package__:  # run as a script
    sys.path.insert(0, str(ROOT))
from records.tools.command import BadInput, Parser, number_in, write_json  # noqa: E402

# The first class whose pattern is found in a kernel's name (on a CPU: an operator's) has it
CLASSES = (
    ("attention", r"flash|fmha|flex_attention|sdpa|attention|mha_"),
    ("copies", r"memcpy|memset|direct_copy|aten::copy_|aten::fill_|aten::zero_|aten::clone"),
    ("communication", r"nccl"),
    (
        "matmul",
        r"gemm|nvjet|cutlass|cublas|xmma|wgmma|splitk|scaled_mm|triton_tem|aten::(addmm|mm|bmm|baddbmm|linear|matmul)",
    ),
)
ANNOTATION = re.compile(
    r"^## |Torch-Compiled|CompiledF|ProfilerStep|Optimizer\.|cudaStream|^Command Buffer"
)  # spans of kernels, not kernels
ORDER = ("matmul", "attention", "elementwise", "optimizer", "copies", "communication", "gaps")


def class_of(name: str) -> str:
    return next(
        (label for label, pattern in CLASSES if re.search(pattern, name, re.I)), "elementwise"
    )


# ---------------------------------------------------------------------------------------- ceilings


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def median_seconds(function, device, warm: int, runs: int) -> float:
    """Median time of a call, the device's work included."""
    times = []
    for _i in range(warm + runs):
        synchronize(device)
        begun = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - begun)
    return statistics.median(times[warm:])


def ceilings(device: torch.device) -> dict:
    """{"matmul_flops": operations per second, "copy_bytes": bytes read plus written per second}."""
    cuda = device.type == "cuda"
    n, dtype = (8192, torch.bfloat16) if cuda else (768, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    c = torch.empty(n, n, device=device, dtype=dtype)
    matmul = median_seconds(lambda: torch.mm(a, b, out=c), device, 5, 20)
    source = torch.randn((1 << 30) if cuda else (1 << 23), device=device)
    target = torch.empty_like(source)
    copy = median_seconds(lambda: target.copy_(source), device, 3, 10)
    return dict(
        matmul_flops=2 * n**3 / matmul,
        copy_bytes=2 * source.nbytes / copy,
        matmul=f"{n}x{n}x{n} {dtype}".replace("torch.", ""),
    )


# ----------------------------------------------------------------------------------------- profile


def load(path: Path):
    """A trainer as a module. Raises BadInput where there is none."""
    if not path.is_file():
        raise BadInput(f"{path}: no such file; give a train_gpt.py")
    spec = importlib.util.spec_from_file_location("profiled_trainer", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def make_step(trainer, flags: list[str]):
    """(run, micro-batch, forward-and-backward, update) of a run's first stage, on random tokens."""
    config = trainer.parse_config(flags, "gpt2_small" if torch.cuda.is_available() else "laptop")
    runtime = trainer.init_runtime(config)
    config = trainer.resolve(config, runtime)
    silent = SimpleNamespace(progress=lambda text: None)
    found = trainer.warm_up(config, runtime, silent)
    run = trainer.build(config, runtime)
    run.optimizers = trainer.make_optimizers(run)
    run.micro, run.recomputed, run.val_len = found
    trainer.set_stage(run)
    stage = config.stages[0]
    count = stage.batch_tokens // stage.seq_len
    generator = torch.Generator().manual_seed(0)
    last = config.vocab_size - 1
    rows = torch.randint(last, (count, stage.seq_len + 1), generator=generator)
    rows[torch.rand(rows.shape, generator=generator) < 1 / 500] = last  # documents of 500 tokens
    batch = trainer.make_batch(run, rows.numpy(), 0, [])
    return (
        run,
        run.micro[count, stage.seq_len],
        lambda: trainer.forward_backward(run, batch),
        lambda: trainer.step_optimizers(run),
    )


def kernels(function, device, runs: int) -> dict[str, list]:
    """{kernel's name: [milliseconds per run, calls per run]}."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiled:
        for _ in range(runs):
            function()
        synchronize(device)
    found = {}
    for event in profiled.key_averages():
        if device.type == "cuda":
            wanted = event.device_type == torch.autograd.DeviceType.CUDA and not ANNOTATION.search(
                event.key
            )
            wanted, microseconds = (
                wanted and not getattr(event, "is_user_annotation", False),
                event.self_device_time_total,
            )
        else:
            wanted, microseconds = True, event.self_cpu_time_total
        if wanted and microseconds > 0:
            found[event.key] = [microseconds / 1000 / runs, event.count / runs]
    return found


def floors(run, trainer, limits: dict) -> dict[str, float]:
    """Fewest milliseconds of a step per class, by operations and bytes that cannot be avoided."""
    c, model = run.config, run.model
    tokens, size = c.stages[0].batch_tokens, 2 if c.bf16 else 4
    linears = [m for m in model.modules() if isinstance(m, trainer.Linear)]
    weights = sum(linear.weight.numel() for linear in linears)
    attention = max(0.0, model.flops_per_token() - 6 * weights)
    activations = tokens * size * (66 * len(model.blocks) * c.n_embd + 3 * c.padded_vocab)
    state = sum(optimizer.state_bytes() for optimizer in run.optimizers)
    held = sum(p.nbytes for p in model.parameters())
    update_bytes = (
        2 * state + 2 * held + 2 * held
    )  # state and weights read and written; gradients read and set to zero
    newton = 0
    for optimizer in run.optimizers:
        if optimizer.trains_matrices and "momentum" in optimizer.state:
            n, (short, long) = len(optimizer.weights), sorted(optimizer.weights.shape[1:])
            newton += 5 * n * (4 * short * short * long + 2 * short**3)
    return dict(
        matmul=1000 * 6 * weights * tokens / limits["matmul_flops"],
        attention=1000 * attention * tokens / limits["matmul_flops"],
        elementwise=1000 * activations / limits["copy_bytes"],
        optimizer=1000 * (update_bytes / limits["copy_bytes"] + newton / limits["matmul_flops"]),
    )


def measure(trainer, flags: list[str], steps: int) -> dict:
    run, micro, forward_backward, update = make_step(trainer, flags)
    config, device = run.config, run.runtime.device

    def step():
        forward_backward()
        update()

    limits = ceilings(device)
    for _ in range(2):
        step()
    times = []
    for _ in range(steps):
        synchronize(device)
        begun = time.perf_counter()
        step()
        synchronize(device)
        times.append(1000 * (time.perf_counter() - begun))
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    step_ms, low = statistics.median(times), floors(run, trainer, limits)
    halves = {
        "forward and backward": kernels(forward_backward, device, steps),
        "update": kernels(update, device, steps),
    }
    spent = dict.fromkeys(ORDER, 0.0)
    calls = dict.fromkeys(ORDER, 0.0)
    for half, found in halves.items():
        for name, (ms, count) in found.items():
            label = "optimizer" if half == "update" else class_of(name)
            spent[label] += ms
            calls[label] += count
    spent["gaps"] = step_ms - sum(spent.values())
    rows = {
        name: dict(
            ms=spent[name],
            share=spent[name] / step_ms,
            calls=calls[name],
            floor_ms=low.get(name),
            over_floor=spent[name] / low[name] if low.get(name) else None,
        )
        for name in ORDER
    }
    top = sorted(
        (
            (ms, count, half, name)
            for half, found in halves.items()
            for name, (ms, count) in found.items()
        ),
        reverse=True,
    )[:25]
    rate = config.stages[0].batch_tokens / step_ms * 1000
    return dict(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        torch=torch.__version__,
        flags=flags,
        micro_batch=micro,
        steps=steps,
        step_ms=step_ms,
        step_ms_all=times,
        tokens_per_second=rate,
        mfu_of_measured=rate * run.model.flops_per_token() / limits["matmul_flops"],
        peak_memory_bytes=peak,
        ceilings=limits,
        classes=rows,
        floor_ms=sum(low.values()),
        top=[
            dict(ms=ms, calls=count, half=half, kernel=name[:160]) for ms, count, half, name in top
        ],
    )


def table(result: dict) -> str:
    limits = result["ceilings"]
    lines = [
        f"{result['device']}, torch {result['torch']}, micro-batch {result['micro_batch']} rows: "
        f"step {result['step_ms']:.1f} ms, "
        f"{result['tokens_per_second']:,.0f} tokens/s, {result['mfu_of_measured']:.1%} of the "
        f"measured matmul rate",
        f"ceilings: {limits['matmul_flops'] / 1e12:.2f} TFLOP/s ({limits['matmul']}), "
        f"{limits['copy_bytes'] / 1e9:.0f} GB/s",
        "",
        "| class | ms | share | kernels | floor, ms | times its floor |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in result["classes"].items():
        floor, over = (
            f"{row[key]:{form}}" if row[key] is not None else ""
            for key, form in (("floor_ms", ".2f"), ("over_floor", ".1f"))
        )
        lines.append(
            f"| {name} | {row['ms']:.2f} | {row['share']:.1%} | {row['calls']:.0f} | {floor} | "
            f"{over} |"
        )
    lines += [
        f"| **step** | {result['step_ms']:.2f} | | | {result['floor_ms']:.2f} | "
        f"{result['step_ms'] / result['floor_ms']:.1f} |",
        "",
        "| ms | calls | half | kernel |",
        "|---|---|---|---|",
    ]
    return "\n".join(
        lines
        + [
            f"| {row['ms']:.3f} | {row['calls']:.0f} | {row['half']} | `{row['kernel'][:100]}` |"
            for row in result["top"][:15]
        ]
    )


def main(argv=None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = Parser(
        "",
        __doc__,
        prog="profile_step.py",
        usage="profile_step.py [options] [-- flags for train_gpt.py]",
    )
    parser.add_argument(
        "--steps",
        type=number_in(int, 1),
        default=5,
        metavar="N",
        help="steps that are timed, and profiled (5)",
    )
    parser.add_argument(
        "--trainer",
        type=Path,
        default=ROOT / "train_gpt.py",
        metavar="FILE",
        help="the trainer (this repository's)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there, too")
    parser.add_argument(
        "--ceilings", action="store_true", help="only measure the machine, and print JSON"
    )
    try:
        args = parser.parse_args(argv[:cut])
        if args.ceilings:
            print(
                json.dumps(ceilings(torch.device("cuda" if torch.cuda.is_available() else "cpu")))
            )
            return 0
        trainer = load(args.trainer)
        try:
            result = measure(trainer, argv[cut + 1 :], args.steps)
        except trainer.UserError as error:
            raise BadInput(str(error)) from None
        if args.json:
            write_json(args.json, result)
        print(table(result))
        return 0
    except (BadInput, OSError) as error:
        print(f"profile_step.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
