"""Ours and the public trainers on one GPU, one after the other, on the same shards: speed, memory,
loss over time and over tokens, and the time to one loss.

    git clone https://github.com/KellerJordan/modded-nanogpt
    git clone https://github.com/karpathy/nanoGPT
    python records/one_gpu/side_by_side.py --modded modded-nanogpt --nanogpt nanoGPT --out FOLDER \\
        --train_files 'data/fineweb10B/fineweb_train_*.bin' \\
        --val_files 'data/fineweb10B/fineweb_val_*.bin'

Contenders (--only picks some; what --out holds already is kept, so an hour may be spent in pieces):

    ours, ours2, ...  train_gpt.py, once per --ours 'flags' (--preset nov2024, --preset gpt2_small)
    record            modded-nanogpt's script of 8 November 2024, out of its log
    simple            modded-nanogpt's records/track_3_optimization/train_gpt_simple.py
    newest            modded-nanogpt's script of 23 August 2025, out of its log: the last before the
                      public records took to a prebuilt FlashAttention 3, downloaded at every start
    nanogpt           nanoGPT's train.py

Everyone's own run is shrunk by the same two factors: its updates by --steps over 3242, its batch
by --batch_tokens over 524,288; all that is counted in updates shrinks with them. So a recipe that
needs a quarter of the tokens takes a quarter here, too. The target is what `record` ends at.

A peer's code is read from its checkout at run time, written into a temporary folder and run there
with the text substitutions that SUBSTITUTIONS lists and the report repeats: batch, updates,
validation and lengths of schedules, no more. Each run is a process of its own, started through a
few lines that record a CUDA event after each update, and the peak memory at the end.

A step's time is that between two updates' events; where a validation or the first ten updates
(compilation) lie between them, the median of the steps around stands in. The time to a loss is the
sum of these, linear between two validations. MFU: operations per token (ours as the trainer counts
them; the peers' are GPT-2 Small's at rows of 1,024) over the rate that a large bf16 matrix product
reaches on this card.

Writes side_by_side.json, .md, .png and one .txt per run into --out. Exit code 0: all ran; 1: a run
failed, which the report says in one line; 2: misuse; 130: interrupted."""

import dataclasses
import glob
import json
import os
import re
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if not __package__:  # run as a script
    sys.path.insert(0, str(ROOT))
import train_gpt  # noqa: E402
from data import shards  # noqa: E402
from records.tools.command import BadInput, Parser, need, number_in, write_json  # noqa: E402
from records.tools.runs import Failed, Interrupted, call, interruptible  # noqa: E402

ROW = 1024
STEPS, BATCH = 3242, 524_288  # of nov2024, the measure of how much everyone is shrunk
NEWEST_ROW, NEWEST_STEPS = 48 * 1024, 1695  # its one long row; eight of them are a batch
FLOPS_PER_TOKEN = 6 * (12 * 12 * 768**2 + 50304 * 768) + 12 * 768 * 12 * ROW // 2
LOGS = {"record": "2024-11-08_CastBf16", "newest": "2025-08-23_SparseAttnGate"}
SIMPLE = "records/track_3_optimization/train_gpt_simple.py"
VAL = re.compile(r"^step[: ](\d+)(?:/\d+)?:? .*?val[_ ]loss[: ]+(?:tensor\()?([\d.]+)", re.M)
IN_UPDATES = ("steps", "momentum_warmup", "momentum_cooldown")


@dataclass(frozen=True)
class Plan:
    """One comparison, the same for all contenders."""

    steps: int
    batch_tokens: int
    val_tokens: int
    val_every: int

    def updates(self, count: int) -> int:
        """A length in updates of somebody's whole run, shrunk."""
        return max(1, round(count * self.steps / STEPS))

    @property
    def rows(self) -> int:
        return self.batch_tokens // ROW

    @property
    def newest_micros(self) -> int:
        return max(1, round(8 * self.batch_tokens / BATCH))


@dataclass
class Job:
    """How a contender is run. tokens: of each of its updates."""

    command: list[str]
    tokens: list[int]
    val_every: int
    changes: list[tuple[str, str]] = field(default_factory=list)
    ours: bool = False


# What is changed in a peer's script, as (old, new): each old text must be there exactly once
SUBSTITUTIONS = {
    "record": lambda p: [
        ("batch_size : int = 8*64 ", f"batch_size : int = {p.rows} "),
        ("device_batch_size : int = 64 ", f"device_batch_size : int = {min(64, p.rows)} "),
        ("num_iterations : int = 3242 ", f"num_iterations : int = {p.steps} "),
        ("warmdown_iters : int = 926 ", f"warmdown_iters : int = {p.updates(926)} "),
        ("val_loss_every : int = 125 ", f"val_loss_every : int = {p.val_every} "),
        ("val_tokens : int = 10485760 ", f"val_tokens : int = {p.val_tokens} "),
        ("frac = min(step/500, 1)", f"frac = min(step/{p.updates(500)}, 1)"),
        # no checkpoint: it takes disk, and no training time
        ("torch.save(log, 'logs/%s/state_step%06d.pt' % (run_id, step))", "pass"),
    ],
    "simple": lambda p: [
        ("val_tokens = 20 * 524288", f"val_tokens = {p.val_tokens}"),
        ("batch_size = 8 * 64 * 1024", f"batch_size = {p.batch_tokens}"),
        ("mbs = 64", f"mbs = {min(64, p.rows)}"),
        ("train_steps = 3250", f"train_steps = {p.updates(3250)}"),
        (
            "val_step_freq = 125 if step / train_steps < 0.9 else 25",
            f"val_step_freq = {p.val_every}",
        ),
    ],
    "newest": lambda p: [
        ("grad_accum_steps = 8 // world_size", f"grad_accum_steps = {p.newest_micros}"),
        ("num_iterations = 1695 ", f"num_iterations = {p.updates(NEWEST_STEPS)} "),
        ("val_loss_every = 125 ", f"val_loss_every = {p.val_every} "),
        ("val_tokens = 10485760 ", f"val_tokens = {p.val_tokens} "),
        ("frac = min(step / 300, 1)", f"frac = min(step / {p.updates(300)}, 1)"),
        # else it drops tokens up to the next document, and stops at a document longer than its row
        ("align_to_bos=True", "align_to_bos=False"),
    ],
    # no checkpoint
    "nanogpt": lambda p: [("best_val_loss = 1e9", "best_val_loss = -1e9")],
}
REPEATED = {"align_to_bos=True"}  # may stand there more than once

# Runs a script as if by itself; after each update of the first optimizer (ours: after update()) an
# event is recorded.
LAUNCH = """
import atexit, json, os, runpy, sys
import torch
script, ours, sys.argv = sys.argv[1], sys.argv[2] == "ours", sys.argv[1:2] + sys.argv[3:]
sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
events, first = [], []

def mark():
    events.append(torch.cuda.Event(enable_timing=True))
    events[-1].record()

def after_step(optimizer, args, kwargs):
    first[:] = first or [id(optimizer)]
    if id(optimizer) == first[0]:
        mark()

@atexit.register
def report():
    torch.cuda.synchronize()
    with open("stats.json", "w") as file:
        json.dump(dict(peak_memory_bytes=torch.cuda.max_memory_allocated(),
                       intervals_ms=[a.elapsed_time(b) for a, b in zip(events, events[1:])]), file)

if ours:
    import train_gpt
    step_optimizers = train_gpt.step_optimizers
    def marked(run):
        step_optimizers(run)
        mark()
    train_gpt.step_optimizers = marked
    sys.exit(train_gpt.main())
torch.optim.optimizer.register_optimizer_step_post_hook(after_step)
runpy.run_path(script, run_name="__main__")
"""


# ------------------------------------------------------------------------------------ contenders


def our_job(flags: str, plan: Plan) -> Job:
    """train_gpt.py with its preset shrunk. Raises Failed where its rows do not fit the batch."""
    try:
        whole = train_gpt.parse_config(shlex.split(flags), "gpt2_small")
        lengths = {name: getattr(whole, name) for name in IN_UPDATES}
        values = {name: length and plan.updates(length) for name, length in lengths.items()}
        values["val_every"] = plan.val_every
        small = [stage.batch_tokens * plan.batch_tokens // BATCH for stage in whole.stages]
        values["batch_tokens"] = small
        if whole.model == "gpt2026":  # a row is an eighth of an update's tokens
            values["seq_len"] = [tokens // 8 for tokens in small]
        values["val_tokens"] = plan.val_tokens
        values |= {
            f"{kind}_files": f"data/fineweb10B/fineweb_{kind}_*.bin" for kind in ("train", "val")
        }
        words = shlex.split(flags)
        for name, value in values.items():
            several = value if isinstance(value, list) else [value]
            words += [f"--{name}", *map(str, several)]
        c = train_gpt.parse_config(words, "gpt2_small")
    except train_gpt.UserError as error:
        raise Failed(str(error)) from None
    tokens = [stage.batch_tokens for stage in c.stages for _ in range(stage.steps)]
    return Job([str(ROOT / "train_gpt.py"), "ours", *words], tokens, plan.val_every, ours=True)


def nanogpt_job(folder: Path, plan: Plan, work: Path) -> Job:
    rows = min(64, plan.rows)
    for file in ("model.py", "configurator.py"):
        (work / file).write_text((folder / file).read_text())
    flags = dict(
        dataset="shards",
        out_dir="out",
        batch_size=rows,
        gradient_accumulation_steps=plan.rows // rows,
        max_iters=plan.steps,
        lr_decay_iters=plan.steps,
        warmup_iters=max(1, plan.steps // 50),  # its 2,000 of 600,000 would be one or two
        eval_interval=plan.val_every,
        eval_iters=max(1, plan.val_tokens // ROW // rows),
        always_save_checkpoint=False,
    )
    job = peer_job("nanogpt", (folder / "train.py").read_text(), plan, work)
    words = [f"--{key}={value}" for key, value in flags.items()]
    job.command += words
    job.changes.append(("(flags)", " ".join(words)))
    return job


def peer_job(name: str, source: str, plan: Plan, work: Path) -> Job:
    """A peer's script after its substitutions. Raises Failed where a text is not there."""
    changes = SUBSTITUTIONS[name](plan)
    for old, new in changes:
        count = source.count(old)
        if not count or count > 1 and old not in REPEATED:
            line = f"its source holds {old!r} {count} times, not once"
            raise Failed(f"{line}: another version of the checkout?")
        source = source.replace(old, new)
    (work / f"{name}.py").write_text(source)
    batch = plan.newest_micros * NEWEST_ROW if name == "newest" else plan.batch_tokens
    whole = {"newest": NEWEST_STEPS, "simple": 3250}.get(name, STEPS)
    tokens = [batch] * plan.updates(whole)
    return Job([str(work / f"{name}.py"), "peer"], tokens, plan.val_every, changes)


def source_of_log(folder: Path) -> str:
    """The script that a record's log begins with, up to the first line of '=' after it."""
    found = sorted(folder.glob("*.txt"))
    if not found:
        raise Failed(f"{folder}: no log there; is the checkout complete?")
    text = found[0].read_text(encoding="utf-8", errors="replace")
    return next(part for part in re.split(r"^=+\n", text, flags=re.M) if part.strip())


def job_of(name: str, args, plan: Plan, work: Path) -> Job:
    if name.startswith("ours"):
        return our_job(flags_of(name, args), plan)
    if name == "nanogpt":
        return nanogpt_job(args.nanogpt, plan, work)
    if name == "simple":
        source = (args.modded / SIMPLE).read_text()
    else:
        source = source_of_log(args.modded / "records/track_1_short" / LOGS[name])
    return peer_job(name, source, plan, work)


def flags_of(name: str, args) -> str:
    return args.ours[int(name[4:] or 1) - 1] if name.startswith("ours") else ""


def lay_out(name: str, work: Path, train: list[str], val: list[str]):
    """The shards under the names that modded-nanogpt's scripts look for; for nanoGPT as one file of
    bare uint16 for each split."""
    folder = work / "data" / ("shards" if name == "nanogpt" else "fineweb10B")
    folder.mkdir(parents=True)
    (work / "logs" / "final").mkdir(parents=True)  # `newest` logs there, and expects it
    for kind, paths in (("train", train), ("val", val)):
        if name == "nanogpt":
            with open(folder / f"{kind}.bin", "wb") as file:
                for path in paths:
                    shards.open_shard(path).tofile(file)
            continue
        for number, path in enumerate(paths):
            link = folder / f"fineweb_{kind}_{number:06d}.bin"
            link.symlink_to(Path(path).resolve())


# ----------------------------------------------------------------------------------------- a run


def step_times(intervals: list[float], steps: int, val_every: int) -> list[float]:
    """Milliseconds of each of `steps` updates. intervals: between neighbouring updates, warm-up's
    first. Where a validation or a compilation lies in one, the median of those around it."""
    if len(intervals) < steps - 1:
        raise Failed(f"{len(intervals) + 1} updates seen, {steps} planned")
    times = [None, *intervals[len(intervals) - (steps - 1) :]]
    good = [k for k in range(10, steps) if k % val_every]  # times[k]: of update k + 1
    if not good:
        raise Failed("too few steps to time: give more --steps")
    for k in set(range(steps)) - set(good):
        nearest = sorted(good, key=lambda j: abs(j - k))[:10]
        times[k] = statistics.median(times[j] for j in nearest)
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


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_one(name: str, args, plan: Plan, limits: dict) -> dict:
    """Run a contender and measure it. Raises Failed."""
    with tempfile.TemporaryDirectory(prefix="side_by_side_") as temporary:
        work = Path(temporary)
        try:
            lay_out(name, work, args.train, args.val)
            job = job_of(name, args, plan, work)
        except OSError as error:
            raise Failed(f"{error.filename}: {error.strerror}; is the checkout complete?") from None
        (work / "launch.py").write_text(LAUNCH)
        env = os.environ | dict(PYTHONUNBUFFERED="1")
        if name in ("record", "simple", "newest"):  # they insist on a process group
            env |= dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
            env |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
        output = args.out / f"{name}.txt"
        command = [sys.executable, work / "launch.py", *job.command]
        call(command, output, args.timeout, env, work)
        measured = json.loads((work / "stats.json").read_text())
        text, flops = output.read_text(errors="replace"), FLOPS_PER_TOKEN
        if job.ours:
            (log,) = (work / "logs").glob("*.txt")
            text = log.read_text(errors="replace").rpartition("=" * 100)[2]
            flops = json.loads(text.splitlines()[-1])["flops_per_token"]
    if name == "nanogpt":  # it does one more, after its last validation
        measured["intervals_ms"].pop()
    steps = len(job.tokens)
    times = step_times(measured["intervals_ms"], steps, job.val_every)
    curve = [
        (int(step), float(loss), sum(times[: int(step)]) / 1000)
        for step, loss in VAL.findall(text)
        if int(step) <= steps
    ]
    if not curve or curve[-1][0] != steps:
        raise Failed("it printed no validation loss of the last step")
    rate, timed = 1000 * sum(job.tokens) / sum(times), sorted(times[10:])
    return dict(
        name=name,
        flags=flags_of(name, args),
        tokens=sum(job.tokens),
        steps=steps,
        step_ms=[timed[len(timed) * share // 10] for share in (1, 5, 9)],
        tokens_per_second=rate,
        mfu=rate * flops / limits["matmul_flops"],
        peak_memory_bytes=measured["peak_memory_bytes"],
        val_loss=curve[-1][1],
        seconds=sum(times) / 1000,
        curve=curve,
        tokens_at=[sum(job.tokens[:step]) for step, _, _ in curve],
        substitutions=job.changes,
    )


# ---------------------------------------------------------------------------------------- report


def label(run: dict) -> str:
    return f"{run['name']} `{run['flags']}`" if run["flags"] else run["name"]


def row(run: dict, base: dict | None) -> str:
    """A line of the table; base: `record`, if it has run."""
    if "failed" in run:
        return f"| {label(run)} | failed: {run['failed'].replace('|', '/')} | | | | | | | | |"
    reached = time_to(run["curve"], base["val_loss"]) if base else None
    cells = [
        label(run),
        f"{run['tokens'] / 1e6:,.1f} M",
        f"{run['tokens_per_second']:,.0f}",
        f"{run['tokens_per_second'] / base['tokens_per_second']:.2f}" if base else "",
        f"{run['mfu']:.1%}",
        f"{run['peak_memory_bytes'] / 1e9:.1f}",
        " / ".join(f"{ms:.1f}" for ms in run["step_ms"]),
        f"{run['val_loss']:.4f}",
        "not reached" if reached is None else f"{reached:.1f}",
        "" if reached is None else f"{reached / base['seconds']:.3f}",
    ]
    return f"| {' | '.join(cells)} |"


def table(report: dict) -> str:
    limits, runs = report["ceilings"], report["runs"]
    base = next((run for run in runs if run["name"] == "record" and "failed" not in run), None)
    target = f"{base['val_loss']:.4f}, what `record` ends at" if base else "`record` has not run"
    lines = [
        f"# {report['device']}, torch {report['torch']}",
        "",
        f"Measured: {limits['matmul_flops'] / 1e12:.0f} TFLOP/s ({limits['matmul']}), copies "
        f"{limits['copy_bytes'] / 1e9:.0f} GB/s. Target: {target}.",
        "",
        "| run | tokens | tokens/s | of `record` | MFU | peak GB | step ms, p10 / p50 / p90 "
        "| final val loss | seconds to the target | of `record` |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
        *(row(run, base) for run in runs),
        "",
        "Changed in the peers' scripts:",
        "",
    ]
    for run in runs:
        for old, new in run.get("substitutions", []):
            lines.append(f"- {run['name']}: `{old.strip()}` → `{new.strip()}`")
    return "\n".join(lines) + "\n"


def draw(report: dict, path: Path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    for run in report["runs"]:
        if "failed" in run:
            continue
        name = f"{run['name']} {run['flags'].replace('--', '')}".strip()
        curve = [(step, loss, s) for step, loss, s in run["curve"] if step]
        tokens = [n / 1e6 for n in run["tokens_at"] if n]
        left.plot([s for _, _, s in curve], [loss for _, loss, _ in curve], marker=".", label=name)
        right.plot(tokens, [loss for _, loss, _ in curve], marker=".")
    left.set(xlabel="training time, s", ylabel="val loss, nats per token")
    left.set_ylim(top=min(7.0, left.get_ylim()[1]))
    right.set(xlabel="tokens, millions")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend()
    figure.suptitle(report["device"])
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def save(out: Path, report: dict):
    write_json(out / "side_by_side.json", report)
    (out / "side_by_side.md").write_text(table(report), encoding="utf-8")
    if any("failed" not in run for run in report["runs"]):
        draw(report, out / "side_by_side.png")


# ---------------------------------------------------------------------------------- command line


def parse_args(argv: list[str]):
    for i in reversed(range(len(argv) - 1)):
        if argv[i] == "--ours":  # argparse takes a value like --preset for its own flag
            argv[i : i + 2] = [f"--ours={argv[i + 1]}"]
    parser = Parser("", __doc__, prog="side_by_side.py")
    add, whole = parser.add_argument, number_in(int, 1)
    add("--modded", type=Path, metavar="DIR", help="a checkout of modded-nanogpt")
    add("--nanogpt", type=Path, metavar="DIR", help="a checkout of nanoGPT")
    add("--train_files", required=True, metavar="GLOB", help="GPT-2 token shards to train on")
    add("--val_files", required=True, metavar="GLOB", help="GPT-2 token shards to validate on")
    add("--out", type=Path, required=True, metavar="DIR", help="for the results")
    add("--ours", action="append", metavar="FLAGS", help="flags of one of our runs, several times")
    add("--only", nargs="+", metavar="NAME", help="run these contenders only")
    add("--again", action="store_true", help="also those that --out holds")
    add("--steps", type=number_in(int, 20), default=600, help="nov2024's updates [600 of 3242]")
    add("--batch_tokens", type=whole, default=65536, help="nov2024's batch [65536 of 524288]")
    add("--val_tokens", type=whole, default=1048576, help="validation tokens [1048576]")
    add("--val_every", type=number_in(int, 2), default=50, help="updates between validations [50]")
    add("--timeout", type=number_in(float, 1), default=900, help="seconds a run may take [900]")
    args = parser.parse_args(argv)
    args.ours = args.ours or ["--preset nov2024", "--preset gpt2_small"]
    known = [f"ours{i + 1}" if i else "ours" for i in range(len(args.ours))]
    known += [*SUBSTITUTIONS][:3] * bool(args.modded) + ["nanogpt"] * bool(args.nanogpt)
    if unknown := set(args.only or []) - set(known):
        line = f"--only {' '.join(sorted(unknown))}: not among {', '.join(known)}"
        raise BadInput(f"{line}; peers need --modded or --nanogpt")
    args.names = [name for name in known if name in (args.only or known)]
    for flag in ("modded", "nanogpt"):
        folder = getattr(args, flag)
        if folder and not folder.is_dir():
            raise BadInput(f"--{flag} {folder}: no such folder; clone it first")
    if args.batch_tokens % 65536 or args.val_tokens % 262144:
        raise BadInput("--batch_tokens must be a multiple of 65536, --val_tokens of 262144")
    args.train, args.val = sorted(glob.glob(args.train_files)), sorted(glob.glob(args.val_files))
    check_shards(args.train_files, args.train, args.steps * args.batch_tokens, args.batch_tokens)
    check_shards(args.val_files, args.val[:1], args.val_tokens, 1)
    return args


def check_shards(pattern: str, paths: list[str], wanted: int, batch: int):
    """A shard's last, incomplete batch is left out by the peers' loaders."""
    usable = sum((shards.read_header(path) - 1) // batch * batch for path in paths)
    if usable < wanted:
        held = f"{pattern}: {len(paths)} files hold {usable:,} usable tokens"
        raise BadInput(f"{held}, {wanted:,} are needed; give more shards or fewer --steps")


def look_at_card() -> dict:
    """In processes of their own, so that none of their memory stays."""
    code = "import torch; print(torch.__version__); print(torch.cuda.get_device_name())"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if asked.returncode:
        raise BadInput("no CUDA device that torch can use; this comparison needs one")
    version, device = asked.stdout.splitlines()[-2:]
    profile = [sys.executable, str(ROOT / "records/one_gpu/profile_step.py"), "--ceilings"]
    measured = subprocess.run(profile, capture_output=True, text=True)
    if measured.returncode:
        last = (measured.stderr.strip().splitlines() or ["?"])[-1]
        raise BadInput(f"the card's ceilings cannot be measured: {last}")
    return dict(torch=version, device=device, ceilings=json.loads(measured.stdout))


def compare(argv: list[str]) -> int:
    args = parse_args(argv)
    need("matplotlib")
    plan = Plan(args.steps, args.batch_tokens, args.val_tokens, args.val_every)
    path, report = args.out / "side_by_side.json", dict(plan=dataclasses.asdict(plan), runs=[])
    if path.exists():
        report = json.loads(path.read_text())
        if report["plan"] != dataclasses.asdict(plan):
            made = f"{path}: made with {report['plan']}"
            raise BadInput(f"{made}; give the same sizes, or another --out")
    report |= look_at_card()
    args.out.mkdir(parents=True, exist_ok=True)
    runs = {run["name"]: run for run in report["runs"]}
    for name in args.names:
        if "curve" in runs.get(name, {}) and not args.again:
            print(f"{name}: kept from {path}", flush=True)
            continue
        try:
            runs[name] = run_one(name, args, plan, report["ceilings"])
            print(f"{name}: {runs[name]['tokens_per_second']:,.0f} tokens/s", flush=True)
        except Failed as error:
            runs[name] = dict(name=name, flags=flags_of(name, args), failed=str(error))
            print(f"{name}: failed: {error}", flush=True)
        report["runs"] = list(runs.values())
        save(args.out, report)
    print(table(report))
    return int(any("failed" in run for run in runs.values()))


def main(argv=None) -> int:
    try:
        with interruptible():
            return compare(list(sys.argv[1:] if argv is None else argv))
    except (BadInput, shards.BadInput, OSError) as error:
        print(f"side_by_side.py: {error}", file=sys.stderr)
        return 2
    except Interrupted as stopped:
        return stopped.args[0]


if __name__ == "__main__":
    sys.exit(main())
