"""Race two trainers on this machine: paired runs in turn, a ratio of times, and a verdict.

    python -m records race REF CAND --runs 10 [-- flags for both]
    python -m records race train_gpt.py "train_gpt.py --lr_muon 0.03" -- --steps 150

REF and CAND are scripts or record folders (then their train_gpt.py), each with flags of its own if
quoted together with it. One round runs each of them once with the same seed, and the next round
runs them in reverse order with the next seed (A B, B A, A B, ...), so that whatever slows the
machine down hits both.

Time is the wall clock of a run, from its start to the end of its last process, less the
reference's start-up: its run of one step in the same round. On a GPU each side's own run of 64
steps is taken off, because it compiles, but at most twice the reference's. Nothing that a script
prints counts as time. Each process gets one thread unless --threads says otherwise.

The text is the track's or the flags', drawn anew for this race: documents in another order, cut,
reversed or not, renumbered. The loss is ours: of the final checkpoint's model, by load_model, on
validation text that no run is given. Every run starts in a sandbox, in a new folder.

The ratio is the geometric mean of candidate time / reference time over the pairs, with the 95 % t
interval of the paired log ratios. `faster: yes` needs two one-sided paired t-tests to pass, both
at --alpha: the ratio is below 1, and the candidate's mean loss is not worse than the reference's by
more than --loss_margin. `faster: no`: the ratio is above 1, or the loss is worse by more than the
margin, at the same level. Records are held to the defaults.

The race stops early, but only at looks planned in advance (after 1/3, 2/3 and all of the rounds,
none before the third round), and every look tests at alpha / number of looks (Bonferroni). Ratio
and interval use every pair there is and are not corrected for stopping.

A run that fails is noted and tried once more; a round lost even so is left out, and two rounds
lost in a row end the race. Ctrl-C prints what there is and exits 130. NPROC=n runs each trainer on
n processes with torchrun. Exit code 0: raced; 1: a script failed or was edited; 2: misuse.
"""

import hashlib
import itertools
import math
import os
import re
import secrets
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from records.tools import corpus as texts
from records.tools import logs, runs, stats
from records.tools.command import (
    BadInput,
    Interrupted,
    Parser,
    command,
    need,
    new_file,
    number_in,
    write_json,
)
from records.tools.runs import Failed, Place, ask
from records.tools.stats import plus_minus, shown
from records.tools.tracks import TRACKS

BOTH = ("reference", "candidate")
MAX_LOST = 2  # rounds in a row, each tried twice
SPREAD = 1.25  # largest over smallest time of one script: above it, something else used the machine
STARTUP = {False: 1, True: 64}  # steps of the run that is start-up; True: on CUDA, all is compiled
CAP = 2  # times the reference's start-up: so much of a candidate's own is taken off on CUDA
GPU_TOKENS = 2**30  # of the track's text that are enough for a race on a GPU


@dataclass(frozen=True)
class Entry:
    """A script with flags of its own."""

    name: str  # as given on the command line
    path: Path
    flags: tuple
    script: bytes

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.script).hexdigest()


def parse_entry(given: str) -> Entry:
    try:
        path, *flags = [given] if os.path.exists(given) else shlex.split(given) or [given]
    except ValueError as error:
        raise BadInput(f"{given}: {error}; quote the flags as in a shell") from None
    script = Path(path) / "train_gpt.py" if os.path.isdir(path) else Path(path)
    if not script.is_file():
        raise BadInput(
            f"{script}: no such file; give a script, or a record folder with a train_gpt.py"
        )
    return Entry(shlex.join([path, *flags]), script, tuple(flags), script.read_bytes())


def public_name(entry: Entry) -> str:
    """An entry's name for race.json, which others read: within this repository, or its last part,
    so that no folder of a home is published."""
    path, *flags = shlex.split(entry.name)
    full = Path(path).resolve()
    inside = full.is_relative_to(texts.ROOT)
    short = str(full.relative_to(texts.ROOT)) if inside else full.name
    return shlex.join([short, *flags])


# --------------------------------------------------------------------------------------- one run
def race_flags(flags, seed: int, steps: int | None = None) -> list[str]:
    """What a run of a race and of a judging is started with: it keeps its final model."""
    words = texts.taken(list(flags), *texts.LOCAL, *["steps"] * bool(steps))[1]
    words += ["--seed", str(seed), "--checkpoint_every", "1000000"]
    return words + (["--steps", str(steps)] if steps else [])


def score(place: Place, corpus, which: dict, cuda: bool, timeout: float, rng) -> dict:
    """{name: our losses [N, T]} of the newest checkpoint on the rows of `which`, in an order and in
    batches that tell nothing. Raises Failed."""
    asked, back = {}, {}
    for name, rows in which.items():
        order = rng.permutation(len(rows))
        asked[name] = rows[order], corpus.batches(len(rows), rng), None
        back[name] = np.argsort(order)
    answers = ask(place.script, place.checkpoint(), corpus.files(), asked, cuda, timeout)
    found = {name: answers[name][back[name]] for name in which}
    if not all(np.isfinite(values).all() for values in found.values()):
        raise Failed("its final model gives losses that are not finite")
    return found


class Race:
    """Two entries, and race.json: what was planned and what was measured, nothing else."""

    def __init__(self, entries: dict[str, Entry], args, flags, corpus):
        self.entries, self.args, self.flags, self.corpus = entries, args, flags, corpus
        self.cuda = args.cuda
        self.rng = np.random.default_rng(secrets.randbits(64))
        self.lost = 0  # rounds in a row
        self.decided = None
        self.race = {
            **{who: public_name(entry) for who, entry in entries.items()},
            "flags": shlex.join(flags),
            "source_sha256": {who: entry.sha256 for who, entry in entries.items()},
            "runs_planned": args.runs,
            "looks": stats.planned_looks(args.runs, args.looks),
            "alpha": args.alpha,
            "loss_margin": args.loss_margin,
            "machine": runs.machine(),
            "sandbox": runs.sandbox(),
            "device": None,
            "processes": args.processes,
            "threads": args.threads,
            "data_sha256": {
                Path(path).name: hashlib.sha256(
                    texts.shards.header(len(t)) + t.tobytes()
                ).hexdigest()
                for path, t in corpus.files().items()
            },
            "seeds": [],
            "rounds": 0,
            **{key: {who: [] for who in BOTH} for key in ("wall_ms", "startup_ms")},
            **{key: {who: [] for who in BOTH} for key in ("logged_ms", "losses", "run_ids")},
            "failures": [],
        }

    def once(self, who: str, seed: int, name: str, steps: int | None = None) -> dict | None:
        """One run: what was measured. Tried again where it fails; None where that fails, too."""
        entry = self.entries[who]
        if entry.path.read_bytes() != entry.script:
            raise BadInput(
                f"{entry.path} was edited during the race; race a copy that nobody works on"
            )
        for attempt in (name, f"{name}_again"):
            try:
                words = race_flags([*self.flags, *entry.flags], seed, steps)
                return self.attempt(entry, words, attempt)
            except Failed as error:
                self.race["failures"].append({"run": attempt, "why": str(error)})
                print(f"    {attempt} failed: {error}", flush=True)

    def attempt(self, entry, words, name: str) -> dict:
        args = self.args
        with Place(entry.script, self.corpus.files()) as place:
            try:
                wall = place.train(words, args.timeout, args.threads, args.processes)
                found = {"wall_ms": round(1000 * wall, 1)}
                if not name.removesuffix("_again").endswith("startup"):
                    run = logs.read_log(place.log())[0]
                    result = run.result or {}
                    rows = {"hidden": self.corpus.rows(self.corpus.hidden)}
                    losses = score(place, self.corpus, rows, self.cuda, args.timeout, self.rng)
                    found["losses"] = round(float(losses["hidden"].mean()), 6)
                    found["logged_ms"] = logs.number(result.get("train_time_ms"))
                    found["run_ids"] = str(run.header.get("run_id"))
                    self.race["device"] = str(run.header.get("device"))
                return found
            finally:
                place.keep(args.out / name)

    def warm_up(self):
        """A short run of each, scored and thrown away. Raises BadInput where that fails."""
        for who in BOTH:
            print(f"warm-up {who}", flush=True)
            name = f"warmup_{who}"
            if not self.once(who, self.args.first_seed, name, STARTUP[self.cuda]):
                raise BadInput(
                    f"{self.entries[who].name}: its run of {STARTUP[self.cuda]} steps fails: "
                    f"{self.race['failures'][-1]['why']}; see {self.args.out / name / 'output'}"
                )
        self.race["failures"].clear()

    def start_ups(self, name: str, seed: int) -> dict | None:
        """What is taken off each side's time."""
        steps = STARTUP[self.cuda]
        reference = self.once("reference", seed, f"{name}_startup", steps)
        own = reference
        if self.cuda and reference:
            own = self.once("candidate", seed, f"{name}_candidate_startup", steps)
        if not (reference and own):
            return None
        theirs = reference["wall_ms"]
        return {"reference": theirs, "candidate": min(own["wall_ms"], CAP * theirs)}

    def round(self, number: int):
        """Both sides once; the round counts where both have a result."""
        seed, name = self.args.first_seed + number, f"round{number:03d}"
        starts, found = self.start_ups(name, seed), {}
        for who in BOTH[:: -1 if number % 2 else 1] if starts else ():
            found[who] = self.once(who, seed, f"{name}_{who}")
            if found[who]:
                seconds = (found[who]["wall_ms"] - starts[who]) / 1e3
                print(
                    f"round {number + 1}/{self.args.runs}  {who:<9}  seed {seed}  "
                    f"{seconds:.2f} s  loss {found[who]['losses']:.4f}",
                    flush=True,
                )
        self.race["rounds"] = number + 1
        if (
            starts
            and all(found.values())
            and all(f["wall_ms"] > starts[w] for w, f in found.items())
        ):
            self.lost = 0
            self.race["seeds"].append(seed)
            for who in BOTH:
                self.race["startup_ms"][who].append(starts[who])
                for key, value in found[who].items():
                    self.race[key][who].append(value)
        else:
            self.lost += 1

    def run(self):
        """The rounds, until the pair is decided, or time is up."""
        start = time.monotonic()
        for number in range(self.args.runs):
            begun = time.monotonic()
            self.round(number)
            self.save()
            took = time.monotonic() - begun
            if self.lost >= MAX_LOST:
                self.decided = "failed"
                return
            if number + 1 in self.race["looks"]:
                self.decided = stats.outcome(self.race)["faster"]
                if self.decided != "not shown":
                    return
            left = took * (self.args.runs - number - 1)
            if left:
                print(f"    at most {left / 60:.0f} minutes left", flush=True)
            hours = self.args.max_hours
            if hours and time.monotonic() - start + took > hours * 3600:
                print(f"stopped: another round would not end within {hours:g} hours")
                return

    def save(self):
        write_json(self.args.json or self.args.out / "race.json", self.race)

    def print_report(self):
        print("\n" + "\n".join(report(self.race, self.cut())))
        print(f"  faster: {self.decided or 'undecided'}")

    def cut(self) -> str:
        """About how many steps would do, where the candidate's loss is better: a shorter run ends
        higher by the slope of its training loss."""
        found, race = stats.outcome(self.race), self.race
        gains = [a - b for a, b in zip(*(race["losses"][who] for who in BOTH), strict=True)]
        half = stats.half_interval(gains)
        paths = sorted(self.args.out.glob("round???_candidate/*.txt"))
        candidates = [run for path in paths for run in logs.read_log(path) if run.result]
        fall = slope(candidates)
        if half is None or fall is None or found["n"] == 0 or np.mean(gains) <= half:
            return ""
        steps = candidates[0].planned
        low, enough, high = (
            round(steps * math.exp(-(np.mean(gains) + sign * half) / fall)) for sign in (1, 0, -1)
        )
        return f"about {enough} of {steps} steps ({low} to {high}) should reach its loss"


def slope(found: list[logs.Run]) -> float | None:
    """How much the training loss falls per e-fold of steps, over the middle half of the runs, in
    nats; None where that cannot be told, or it does not fall."""
    points = [
        (math.log(step), loss)
        for run in found
        for step, loss, _ in run.train
        if run.last_step / 4 <= step <= run.last_step * 3 / 4
    ]
    if len(points) < 20:
        return None
    fall = -float(np.polyfit(*zip(*points, strict=True), 1)[0])
    return fall if fall > 0 else None


def report(race: dict, cut: str = "") -> list[str]:
    """What a race.json says, for people."""
    found, times = stats.outcome(race), stats.times_of(race)
    lines = [f"{race['candidate']} against {race['reference']}"]
    lines += [f"  {found['n']} pairs on {race['device']} ({race['machine']})"]
    if found["n"]:
        new, old = plus_minus(found["loss_candidate"]), plus_minus(found["loss_reference"])
        lines += [
            f"  time × {stats.interval(found)}; below 1: p = {shown(found['p_value'])}",
            f"  loss {new} against {old}; not worse by {found['margin']:g}: "
            f"p = {shown(found['p_loss_not_worse'])}",
        ]
    if cut:
        lines.append(f"  the loss is better: {cut}; race it with fewer")
    if race.get("failures"):
        lines.append("  warning: runs failed, so this race makes no record; race again for one")
        lines += [f"    {failure['run']}: {failure['why']}" for failure in race["failures"]]
    for who, column in times.items():
        if column and max(column) > SPREAD * min(column):
            lines.append(
                f"  warning: the {who}'s times spread from {min(column) / 1e3:.1f} to "
                f"{max(column) / 1e3:.1f} s: something else used the machine; race again"
            )
    return lines


# ----------------------------------------------------------------------------------- command line
def add_options(parser: Parser):
    """What race and submit have in common."""
    add, count, time_s = parser.add_argument, number_in(int, 1), number_in(float, 0.1)
    add("--runs", type=count, default=10, metavar="N", help="rounds at most (10)")
    add("--first_seed", type=number_in(int, 0), default=0, metavar="N", help="of round one (0)")
    add("--threads", type=count, metavar="N", help="of each process (OMP_NUM_THREADS, or 1)")
    add("--looks", type=count, default=3, metavar="N", help="how often it may stop (3)")
    add("--timeout", type=time_s, default=7200, metavar="S", help="of a run, in seconds (7200)")
    add("--max_hours", type=number_in(float, 0), metavar="H", help="no round that would end later")
    add("--out", type=Path, metavar="DIR", help="new folder for the logs (logs/race_<date>)")


def parse_args(argv):
    cut = argv.index("--") if "--" in argv else len(argv)
    usage = "python -m records race REF CAND [options] [-- flags for both]"
    parser = Parser("race", __doc__, usage=usage)
    add = parser.add_argument
    add("scripts", nargs=2, metavar="SCRIPT", help="scripts or record folders, reference first")
    add_options(parser)
    add("--alpha", type=number_in(float, 1e-9, 0.5), default=stats.ALPHA, help="(%(default)s)")
    add(
        "--loss_margin",
        type=number_in(float, 0),
        default=stats.LOSS_MARGIN,
        metavar="NATS",
        help="a loss worse by this much still counts as equal (%(default)s)",
    )
    add("--json", type=new_file, metavar="FILE", help="the result (DIR/race.json)")
    args, flags = parser.parse_args(argv[:cut]), argv[cut + 1 :]
    return args, dict(zip(BOTH, map(parse_entry, args.scripts), strict=True)), flags


def positive(name: str, default: int) -> int:
    given = os.environ.get(name) or str(default)
    if not re.fullmatch("[1-9][0-9]*", given):
        raise BadInput(f"{name}={given} is not a number of at least 1; set another or none")
    return int(given)


def prepare(args, entries, flags) -> Race:
    """The text, the folder, the plan. Raises BadInput."""
    need("scipy", "psutil", "torch")
    for flag in [*flags, *(flag for entry in entries.values() for flag in entry.flags)]:
        if flag.split("=")[0] in ("--seed", "--log_dir", "--checkpoint_dir", "--checkpoint_every"):
            raise BadInput(f"{flag}: the race sets it itself; --first_seed, --out are its own")
    import torch

    device = texts.taken(flags, "device")[0]["device"]
    args.cuda = torch.cuda.is_available() and device != "cpu"
    name, preset = texts.preset_of(flags, "gpt2_small" if args.cuda else "laptop")
    digests = TRACKS["laptop"].files if name == "laptop" else None
    corpus = texts.track_corpus(flags, preset, GPU_TOKENS if args.cuda else None, digests)
    args.processes = positive("NPROC", 1)
    args.threads = args.threads or positive("OMP_NUM_THREADS", 1)
    args.out = new_folder(args.out)
    rng = np.random.default_rng(secrets.randbits(64))
    return Race(entries, args, flags, corpus.drawn(rng))


def new_folder(given: Path | None) -> Path:
    """A folder of this race alone, also when another one starts in the same second."""
    if given:
        if given.exists() and (not given.is_dir() or any(given.iterdir())):
            raise BadInput(f"{given}: already there; give a new folder, nothing is overwritten")
        given.mkdir(parents=True, exist_ok=True)
        return given
    name = time.strftime("race_%Y-%m-%d_%H-%M-%S")
    Path("logs").mkdir(exist_ok=True)
    for number in itertools.count(1):
        folder = Path("logs", name if number == 1 else f"{name}_{number}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            continue


def hold(race: Race) -> int:
    """The race itself, to its end or its interruption. Returns the exit code."""
    print(runs.about_the_sandbox(), flush=True)
    race.warm_up()
    code = 0
    try:
        race.run()
    except Interrupted as stopped:
        print("\ninterrupted: this is what there is")
        code = stopped.args[0]
    except BadInput as error:
        print(f"records race: {error}", file=sys.stderr)
        code = 1
    race.save()
    race.print_report()
    print(f"\nlogs and race.json: {race.args.out}")
    return code or int(race.decided == "failed" or not race.race["seeds"])


@command("race")
def main(argv) -> int:
    args, entries, flags = parse_args(argv)
    return hold(prepare(args, entries, flags))
