"""Ours and the peers' trainers on one GPU, on the same tokens, one after the other: speed, memory,
and loss over time.

    git clone https://github.com/KellerJordan/modded-nanogpt
    git clone https://github.com/karpathy/nanoGPT
    python records/one_gpu/side_by_side.py --modded modded-nanogpt --nanogpt nanoGPT \\
        --train_files 'data/fineweb10B/fineweb_train_*.bin' --val_files
        'data/fineweb10B/fineweb_val_*.bin' \\ --out side_by_side

Contenders (--only picks some; what --out already holds is kept, so a comparison may be made in
several calls):
    ours        train_gpt.py, once per --ours 'flags' (--preset nov2024, --preset gpt2_small)
    record      modded-nanogpt's record script of 2024-11-08, out of its log
    simple      modded-nanogpt's records/track_3_optimization/train_gpt_simple.py
    newest      modded-nanogpt's record script of 2025-08-23, out of its log: the last before the
                public records took to a prebuilt FlashAttention 3, downloaded at every start
    nanogpt     nanoGPT's train.py

A peer's code is read from its checkout at run time, written to a temporary folder, and run there
after the text substitutions that SUBSTITUTIONS below lists and the report repeats: they set batch,
steps, validation and schedule lengths, no more. Every schedule length shrinks as the steps do. Each
run is a process of its own, started through a few lines that record a CUDA event after each update,
and the peak memory at the end.

A step's time is that between two updates' events; where a validation or the first ten updates
(compilation) lie between them, the median of the steps around stands in. The time to a loss is the
sum of these, interpolated linearly between two validations. MFU counts the operations of GPT-2
Small at rows of 1,024, the same for everyone, over the rate that a large bf16 matrix product
reaches on this card. The target is what `record` ends at.

Writes side_by_side.json, .md, .png and one .txt per run into --out. Exit code 0: all ran; 1: a run
failed, which the report says in one line; 2: misuse; 130: interrupted. """

import dataclasses
import glob
import importlib.util
import json
import os
import re
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if not __package__:  # run as a script
    sys.path.insert(0, str(ROOT))
from data import shards  # noqa: E402
from records.tools.command import BadInput, Parser, number_in, write_json  # noqa: E402
from records.tools.runs import Failed, Interrupted, call, interruptible  # noqa: E402

ROW = 1024
NEWEST_MICRO = 48 * 1024  # tokens of its one long row
RECORDS = "records/track_1_short"
FLOPS_PER_TOKEN = 6 * (12 * 12 * 768**2 + 50304 * 768) + 12 * 768 * 12 * ROW // 2
VAL = re.compile(r"^step[: ](\d+)(?:/\d+)?:? .*?val[_ ]loss[: ]+(?:tensor\()?([\d.]+)", re.M)
OWN_TIME = re.compile(r"train_time:([\d.]+)(m?s)")

# What is changed in a peer's script, as (old, new): each old text must be there exactly once
SUBSTITUTIONS = {
    "record": lambda p: [
        ("batch_size : int = 8*64 ", f"batch_size : int = {p.batch_tokens // ROW} "),
        (
            "device_batch_size : int = 64 ",
            f"device_batch_size : int = {min(64, p.batch_tokens // ROW)} ",
        ),
        ("num_iterations : int = 3242 ", f"num_iterations : int = {p.steps} "),
        ("warmdown_iters : int = 926 ", f"warmdown_iters : int = {p.scaled(926, 3242)} "),
        ("val_loss_every : int = 125 ", f"val_loss_every : int = {p.val_every} "),
        ("val_tokens : int = 10485760 ", f"val_tokens : int = {p.val_tokens} "),
        ("frac = min(step/500, 1)", f"frac = min(step/{p.scaled(500, 3242)}, 1)"),
        (
            "torch.save(log, 'logs/%s/state_step%06d.pt' % (run_id, step))",
            "pass  # no checkpoint: it takes disk, and no training time",
        ),
    ],
    "simple": lambda p: [
        ("val_tokens = 20 * 524288", f"val_tokens = {p.val_tokens}"),
        ("batch_size = 8 * 64 * 1024", f"batch_size = {p.batch_tokens}"),
        ("mbs = 64", f"mbs = {min(64, p.batch_tokens // ROW)}"),
        ("train_steps = 3250", f"train_steps = {p.steps}"),
        (
            "val_step_freq = 125 if step / train_steps < 0.9 else 25",
            f"val_step_freq = {p.val_every}",
        ),
    ],
    "newest": lambda p: [
        ("grad_accum_steps = 8 // world_size", f"grad_accum_steps = {p.newest_micros}"),
        ("num_iterations = 1695 ", f"num_iterations = {p.newest_steps} "),
        ("val_loss_every = 125 ", f"val_loss_every = {p.newest_val_every} "),
        ("val_tokens = 10485760 ", f"val_tokens = {p.val_tokens} "),
        (
            "frac = min(step / 300, 1)",
            f"frac = min(step / {max(1, round(300 * p.newest_steps / 1695))}, 1)",
        ),
        # else it drops tokens up to the next document, and stops at a document longer than its row
        ("align_to_bos=True", "align_to_bos=False"),
    ],
    "nanogpt": lambda p: [
        (
            "best_val_loss = 1e9",
            "best_val_loss = -1e9  # no checkpoint: it takes disk, and no training time",
        )
    ],
}
REPEATED = {"align_to_bos=True"}  # may stand there more than once

# Runs a script as if by itself; after each update of the first optimizer (ours: after update()) an
# event is recorded.
LAUNCH = """
import atexit, json, os, runpy, sys
import torch
script, sys.argv = sys.argv[1], sys.argv[1:]
sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
events, first = [], []

def mark(*_):
    events.append(torch.cuda.Event(enable_timing=True))
    events[-1].record()

def after_step(optimizer, args, kwargs):
    first[:] = first or [id(optimizer)]
    if id(optimizer) == first[0]:
        mark()

@atexit.register
def report():
    torch.cuda.synchronize()
    with open(os.environ["SIDE_BY_SIDE_STATS"], "w") as file:
        json.dump(dict(peak_memory_bytes=torch.cuda.max_memory_allocated(),
                       reserved_bytes=torch.cuda.max_memory_reserved(),
                       intervals_ms=[a.elapsed_time(b) for a, b in zip(events, events[1:])],
                       torch=torch.__version__, device=torch.cuda.get_device_name()), file)

if os.environ.get("SIDE_BY_SIDE_OURS"):
    import train_gpt
    update = train_gpt.update
    def marked(*args):
        update(*args)
        mark()
    train_gpt.update = marked
    code = train_gpt.main(sys.argv[1:])
    if code:
        sys.exit(code)
else:
    torch.optim.optimizer.register_optimizer_step_post_hook(after_step)
    runpy.run_path(script, run_name="__main__")
"""


@dataclasses.dataclass
class Plan:
    """One comparison: the same for all contenders."""

    steps: int
    batch_tokens: int
    val_tokens: int
    val_every: int

    def scaled(self, length: int, full: int) -> int:
        """A schedule's length in updates, for this many steps instead of `full`."""
        return max(1, round(length * self.steps / full))

    newest_micros = property(lambda self: max(1, round(self.batch_tokens / NEWEST_MICRO)))
    newest_batch = property(lambda self: self.newest_micros * NEWEST_MICRO)
    newest_steps = property(lambda self: self.steps * self.batch_tokens // self.newest_batch)
    newest_val_every = property(
        lambda self: max(1, self.val_every * self.batch_tokens // self.newest_batch)
    )


# ------------------------------------------------------------------------------ the peers' scripts


def substitute(name: str, source: str, plan: Plan) -> tuple[str, list]:
    """(adapted source, what was changed). Raises Failed where a text to change is not there as
    expected."""
    changes = SUBSTITUTIONS[name](plan)
    for old, new in changes:
        count = source.count(old)
        if not count or count > 1 and old not in REPEATED:
            raise Failed(
                f"its source holds {old!r} {count} times, not once: another version of the "
                f"checkout?"
            )
        source = source.replace(old, new)
    return source, changes


def source_of_log(modded: Path, folder: str) -> str:
    """The script that a record's log begins with, up to the first line of '=' after it."""
    logs = sorted((modded / RECORDS / folder).glob("*.txt"))
    if not logs:
        raise Failed(f"{modded / RECORDS / folder}: no log there; is the checkout complete?")
    text = logs[0].read_text(encoding="utf-8", errors="replace")
    parts = [part for part in re.split(r"^=+\n", text, flags=re.M) if part.strip()]
    return parts[0]


def link_shards(work: Path, train: list[str], val: list[str]):
    """The shards under the names that modded-nanogpt's scripts look for."""
    folder = work / "data" / "fineweb10B"
    folder.mkdir(parents=True)
    (work / "logs" / "final").mkdir(parents=True)  # `newest` logs there, and expects it
    for kind, paths in (("train", train), ("val", val)):
        for number, path in enumerate(paths):
            (folder / f"fineweb_{kind}_{number:06d}.bin").symlink_to(Path(path).resolve())


def bare_tokens(work: Path, train: list[str], val: list[str]):
    """The same tokens as nanoGPT wants them: one file of bare uint16 for each split."""
    folder = work / "data" / "shards"
    folder.mkdir(parents=True)
    for kind, paths in (("train", train), ("val", val)):
        with open(folder / f"{kind}.bin", "wb") as file:
            for path in paths:
                shards.open_shard(path).tofile(file)


def prepare(name: str, args, plan: Plan, work: Path) -> tuple[list[str], list, dict]:
    """(script and flags, substitutions, more environment) of a contender, ready to run in the
    folder `work`."""
    if name.startswith("ours"):
        flags = args.ours[0 if name == "ours" else int(name[4:]) - 1]
        momentum = (
            []
            if "--momentum_warmup" in flags
            else ["--momentum_warmup", str(plan.scaled(300, 3242))]
        )
        return (
            [
                str(ROOT / "train_gpt.py"),
                *shlex.split(flags),
                *momentum,
                "--steps",
                str(plan.steps),
                "--batch_tokens",
                str(plan.batch_tokens),
                "--val_tokens",
                str(plan.val_tokens),
                "--val_every",
                str(plan.val_every),
                "--train_files",
                str(work / "data/fineweb10B/fineweb_train_*.bin"),
                "--val_files",
                str(work / "data/fineweb10B/fineweb_val_*.bin"),
                "--log_dir",
                str(work / "logs"),
            ],
            [],
            {"SIDE_BY_SIDE_OURS": "1"},
        )
    if name == "nanogpt":
        rows = min(64, plan.batch_tokens // ROW)
        for file in ("model.py", "configurator.py"):
            (work / file).write_text((args.nanogpt / file).read_text())
        source = (args.nanogpt / "train.py").read_text()
        warm = max(1, plan.steps // 50)  # its 2,000 of 600,000 would be one or two
        flags = dict(
            dataset="shards",
            out_dir="out",
            batch_size=rows,
            gradient_accumulation_steps=plan.batch_tokens // ROW // rows,
            max_iters=plan.steps,
            lr_decay_iters=plan.steps,
            warmup_iters=warm,
            eval_interval=plan.val_every,
            eval_iters=max(1, plan.val_tokens // ROW // rows),
            always_save_checkpoint=False,
        )
        extra = [f"--{key}={value}" for key, value in flags.items()]
    else:
        folder = {"record": "2024-11-08_CastBf16", "newest": "2025-08-23_SparseAttnGate"}.get(name)
        path = args.modded / "records/track_3_optimization/train_gpt_simple.py"
        source, extra = source_of_log(args.modded, folder) if folder else path.read_text(), []
    source, changes = substitute(name, source, plan)
    (work / f"{name}.py").write_text(source)
    return (
        [str(work / f"{name}.py"), *extra],
        [list(change) for change in changes] + [["(flags)", " ".join(extra)]] * bool(extra),
        {},
    )


# ------------------------------------------------------------------------------------------- a run


def step_times(intervals: list[float], steps: int, val_every: int) -> list[float]:
    """Milliseconds of each of `steps` updates. intervals: between consecutive updates, warm-up's
    first."""
    times = [None] + intervals[len(intervals) - (steps - 1) :]
    if len(times) != steps:
        raise Failed(f"{len(intervals) + 1} updates seen, {steps} planned")
    good = [
        k >= 10 and k % val_every != 0 for k in range(steps)
    ]  # times[k]: update k + 1; a validation after k updates lies in it
    if not any(good):
        raise Failed("too few steps to time: give more --steps")
    for k in range(steps):
        if not good[k]:
            near = [times[j] for j in range(max(0, k - 10), steps) if good[j]][:20]
            times[k] = statistics.median(
                near or [t for t, ok in zip(times, good, strict=False) if ok]
            )
    return times


def time_to(curve: list, target: float) -> float | None:
    """Seconds at which a curve of (step, loss, seconds) reaches a loss, linear between validations;
    None: never."""
    before = None
    for _, loss, seconds in curve:
        if loss <= target:
            if before is None:
                return seconds
            share = (before[0] - target) / (before[0] - loss)
            return before[1] + share * (seconds - before[1])
        before = loss, seconds
    return None


def run_one(name: str, args, plan: Plan, limits: dict) -> dict:
    """Runs a contender and measures it. Raises Failed."""
    with tempfile.TemporaryDirectory(prefix="side_by_side_") as temporary:
        work = Path(temporary)
        bare_tokens(work, args.train, args.val) if name == "nanogpt" else link_shards(
            work, args.train, args.val
        )
        try:
            command, changes, more = prepare(name, args, plan, work)
        except OSError as error:
            raise Failed(f"{error.filename}: {error.strerror}; is the checkout complete?") from None
        (work / "launch.py").write_text(LAUNCH)
        stats = work / "stats.json"
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        env = os.environ | more | dict(SIDE_BY_SIDE_STATS=str(stats), PYTHONUNBUFFERED="1")
        if name in ("record", "simple", "newest"):
            env |= dict(
                RANK="0",
                LOCAL_RANK="0",
                WORLD_SIZE="1",
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
            )
        output = args.out / f"{name}.txt"
        call([sys.executable, str(work / "launch.py"), *command], output, args.timeout, env, work)
        text = output.read_text(errors="replace")
        if name.startswith("ours"):
            text = (
                next((work / "logs").glob("*.txt"))
                .read_text(errors="replace")
                .rpartition("=" * 100)[2]
            )
        measured = json.loads(stats.read_text())
    newest = name == "newest"
    steps, batch, every = (
        (plan.newest_steps, plan.newest_batch, plan.newest_val_every)
        if newest
        else (plan.steps, plan.batch_tokens, plan.val_every)
    )
    if name == "nanogpt":  # it does one more, after its last validation
        measured["intervals_ms"].pop()
    times = step_times(measured["intervals_ms"], steps, every)
    curve = [
        (int(step), float(loss), sum(times[: int(step)]) / 1000)
        for step, loss in VAL.findall(text)
        if int(step) <= steps
    ]
    if not curve or curve[-1][0] != steps:
        raise Failed("it printed no validation loss of the last step")
    timed = sorted(times[10:])
    mean = statistics.mean(timed)
    own = OWN_TIME.findall(text)
    return dict(
        name=name,
        flags=args.ours[0 if name == "ours" else int(name[4:]) - 1]
        if name.startswith("ours")
        else "",
        batch_tokens=batch,
        steps=steps,
        tokens=steps * batch,
        step_ms=mean,
        step_ms_p10=timed[len(timed) // 10],
        step_ms_p50=statistics.median(timed),
        step_ms_p90=timed[9 * len(timed) // 10],
        tokens_per_second=1000 * batch / mean,
        mfu=1000 * batch / mean * FLOPS_PER_TOKEN / limits["matmul_flops"],
        peak_memory_bytes=measured["peak_memory_bytes"],
        reserved_bytes=measured["reserved_bytes"],
        val_loss=curve[-1][1],
        seconds=sum(times) / 1000,
        curve=curve,
        own_clock_seconds=float(own[-1][0]) / (1000 if own[-1][1] == "ms" else 1) if own else None,
        substitutions=changes,
        torch=measured["torch"],
        device=measured["device"],
    )


# ------------------------------------------------------------------------------------------ report


def table(report: dict) -> str:
    limits, target, runs = report["ceilings"], report["target"], report["runs"]
    base = next((run for run in runs if run["name"] == "record" and "failed" not in run), None)
    lines = [
        f"# {report['device']}, torch {report['torch']}, {report['tokens']:,} tokens",
        "",
        f"Measured: {limits['matmul_flops'] / 1e12:.0f} TFLOP/s ({limits['matmul']}), "
        f"copies {limits['copy_bytes'] / 1e9:.0f} GB/s. "
        f"Target: "
        f"{f'{target:.4f}, what `record` ends at' if target else 'none, `record` has not run'}.",
        "",
        "| run | tokens/s | of `record` | MFU | peak GB | step ms, p10 / p50 / p90 | final val "
        "loss | "
        "seconds to the target | of `record` |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        label = f"{run['name']} `{run['flags']}`" if run.get("flags") else run["name"]
        if "failed" in run:
            lines.append(f"| {label} | failed: {run['failed'].replace('|', '/')} | | | | | | | |")
            continue
        reached = time_to(run["curve"], target) if target else None
        goal = time_to(base["curve"], target) if base and target else None
        lines.append(
            f"| {label} | {run['tokens_per_second']:,.0f} | "
            f"{run['tokens_per_second'] / base['tokens_per_second']:.2f} | "
            if base
            else f"| {label} | {run['tokens_per_second']:,.0f} | | "
        )
        lines[-1] += (
            f"{run['mfu']:.1%} | {run['peak_memory_bytes'] / 1e9:.1f} | "
            f"{run['step_ms_p10']:.1f} / {run['step_ms_p50']:.1f} / "
            f"{run['step_ms_p90']:.1f} | {run['val_loss']:.4f} | "
            f"{f'{reached:.1f}' if reached is not None else 'not reached'} | "
            f"{f'{reached / goal:.2f}' if reached is not None and goal else ''} |"
        )
    lines += ["", "Changed in the peers' scripts:", ""]
    for run in runs:
        lines += [
            f"- {run['name']}: `{old.strip()}` → `{new.strip()}`"
            for old, new in run.get("substitutions", [])
        ]
    return "\n".join(lines) + "\n"


def draw(report: dict, path: Path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for run in report["runs"]:
        if "failed" not in run:
            points = [(seconds, loss) for step, loss, seconds in run["curve"] if step]
            axes.plot(
                *zip(*points, strict=False),
                marker=".",
                label=" ".join([run["name"], run["flags"].replace("--", "")]).strip(),
            )
    if report["target"]:
        axes.axhline(report["target"], color="gray", linewidth=1, linestyle=":")
    axes.set(
        xlabel="training time, s",
        ylabel="val loss, nats per token",
        title=f"{report['device']}, {report['tokens'] / 1e6:.0f}M tokens",
    )
    axes.set_ylim(top=min(7.0, axes.get_ylim()[1]))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def save(args, report: dict):
    done = [run for run in report["runs"] if run["name"] == "record" and "failed" not in run]
    report["target"] = done[0]["val_loss"] if done else None
    write_json(args.out / "side_by_side.json", report)
    (args.out / "side_by_side.md").write_text(table(report), encoding="utf-8")
    if not importlib.util.find_spec("matplotlib"):
        print("no picture: matplotlib is not installed", flush=True)
    elif any("failed" not in run for run in report["runs"]):
        draw(report, args.out / "side_by_side.png")


# ------------------------------------------------------------------------------------ command line


def parse_args(argv):
    argv = list(sys.argv[1:] if argv is None else argv)
    for i in reversed(range(len(argv) - 1)):
        if argv[i] == "--ours":  # argparse takes a value like --preset for its own flag
            argv[i : i + 2] = [f"--ours={argv[i + 1]}"]
    parser = Parser("", __doc__, prog="side_by_side.py")
    add = parser.add_argument
    add("--modded", type=Path, metavar="DIR", help="a checkout of modded-nanogpt")
    add("--nanogpt", type=Path, metavar="DIR", help="a checkout of nanoGPT")
    add("--train_files", required=True, metavar="GLOB", help="GPT-2 token shards to train on")
    add("--val_files", required=True, metavar="GLOB", help="GPT-2 token shards to validate on")
    add(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="for the results; runs that it already holds are kept",
    )
    add(
        "--ours",
        action="append",
        metavar="FLAGS",
        help="flags of one of our runs; several: ours, ours2, ... (nov2024 and gpt2_small)",
    )
    add("--only", nargs="+", metavar="NAME", help="run these contenders only")
    add("--again", action="store_true", help="run contenders again that --out holds, too")
    add(
        "--steps",
        type=number_in(int, 20),
        default=600,
        metavar="N",
        help="updates of everyone (600)",
    )
    add(
        "--batch_tokens",
        type=number_in(int, ROW),
        default=65536,
        metavar="N",
        help="tokens per update (65536)",
    )
    add(
        "--val_tokens",
        type=number_in(int, 262144),
        default=1048576,
        metavar="N",
        help="validation tokens (1048576)",
    )
    add(
        "--val_every",
        type=number_in(int, 2),
        default=50,
        metavar="N",
        help="updates between validations (50)",
    )
    add(
        "--timeout",
        type=number_in(float, 1),
        default=900,
        metavar="S",
        help="seconds after which a run has failed (900)",
    )
    args = parser.parse_args(argv)
    args.ours = args.ours or ["--preset nov2024", "--preset gpt2_small"]
    known = [f"ours{i + 1}" if i else "ours" for i in range(len(args.ours))]
    known += ["record", "simple", "newest"] * bool(args.modded) + ["nanogpt"] * bool(args.nanogpt)
    if unknown := set(args.only or []) - set(known):
        raise BadInput(
            f"--only {' '.join(sorted(unknown))}: not among {', '.join(known)}; peers need "
            f"--modded or --nanogpt"
        )
    args.names = [name for name in known if name in (args.only or known)]
    for folder, flag in ((args.modded, "modded"), (args.nanogpt, "nanogpt")):
        if folder and not folder.is_dir():
            raise BadInput(f"--{flag} {folder}: no such folder; clone it first")
    if args.batch_tokens % (ROW * min(64, args.batch_tokens // ROW)) or args.val_tokens % 262144:
        raise BadInput(
            "--batch_tokens must be whole rows of 1024, above 64 rows a multiple of 65536; "
            "--val_tokens a multiple of 262144"
        )
    if args.steps % args.val_every:
        raise BadInput(f"--steps {args.steps} is not a multiple of --val_every {args.val_every}")
    args.train, args.val = sorted(glob.glob(args.train_files)), sorted(glob.glob(args.val_files))
    for pattern, paths, need in (
        (args.train_files, args.train, args.steps * args.batch_tokens + 1),
        (args.val_files, args.val[:1], args.val_tokens + 1),
    ):
        held = [shards.read_header(path) for path in paths]
        # a shard's last, incomplete batch is left out by the peers' loaders
        usable = (
            sum((count - 1) // args.batch_tokens * args.batch_tokens + 1 for count in held)
            if pattern == args.train_files
            else sum(held)
        )
        if usable < need:
            raise BadInput(
                f"{pattern}: {len(paths)} files hold {usable:,} usable tokens, {need:,} are "
                f"needed; "
                f"give more shards or fewer --steps"
            )
    return args


def main(argv=None) -> int:
    try:
        with interruptible():
            args = parse_args(argv)
            plan, path = (
                Plan(args.steps, args.batch_tokens, args.val_tokens, args.val_every),
                args.out / "side_by_side.json",
            )
            report = (
                json.loads(path.read_text())
                if path.exists()
                else {"plan": dataclasses.asdict(plan), "runs": []}
            )
            if report["plan"] != dataclasses.asdict(plan):
                raise BadInput(
                    f"{path}: made with {report['plan']}; give the same sizes, or another --out"
                )
            asked = subprocess.run(
                [
                    sys.executable,
                    "-c",
                    "import torch; print(torch.__version__); print(torch.cuda.get_device_name())",
                ],
                capture_output=True,
                text=True,
            )
            if asked.returncode:
                raise BadInput("no CUDA device that torch can use; this comparison needs one")
            report["torch"], report["device"] = asked.stdout.splitlines()[-2:]
            measured = subprocess.run(
                [sys.executable, str(ROOT / "records/one_gpu/profile_step.py"), "--ceilings"],
                capture_output=True,
                text=True,
            )
            if measured.returncode:
                raise BadInput(
                    f"the card's ceilings cannot be measured: "
                    f"{(measured.stderr.strip().splitlines() or ['?'])[-1]}"
                )
            report["ceilings"], report["tokens"] = (
                json.loads(measured.stdout.splitlines()[-1]),
                plan.steps * plan.batch_tokens,
            )
            args.out.mkdir(parents=True, exist_ok=True)
            for name in args.names:
                old = next((run for run in report["runs"] if run["name"] == name), None)
                if old and "failed" not in old and not args.again:
                    print(f"{name}: kept from {path}", flush=True)
                    continue
                try:
                    run = run_one(name, args, plan, report["ceilings"])
                    print(
                        f"{name}: {run['tokens_per_second']:,.0f} tokens/s, val loss "
                        f"{run['val_loss']:.4f}",
                        flush=True,
                    )
                except Failed as error:
                    run = dict(name=name, flags="", failed=str(error))
                    print(f"{name}: failed: {error}", flush=True)
                report["runs"] = [other for other in report["runs"] if other["name"] != name] + [
                    run
                ]
                save(args, report)
            print(table(report))
            return int(any("failed" in run for run in report["runs"]))
    except (BadInput, shards.BadInput, OSError) as error:
        print(f"side_by_side.py: {error}", file=sys.stderr)
        return 2
    except Interrupted as stopped:
        return stopped.args[0]


if __name__ == "__main__":
    sys.exit(main())
