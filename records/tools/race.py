"""Race trainers on this machine: paired runs in turn, a ratio of train times, and a verdict.

    python -m records race REF CAND --runs 10 [-- flags for both]
    python -m records race train_gpt.py "train_gpt.py --lr_muon 0.03" -- --steps 150
    python -m records race records/laptop/*/ --runs 8     a history: each against the one before it

REF and CAND are scripts or record folders (then their train_gpt.py), each with flags of its own if
quoted together with it. One round runs each of them once with the same seed, and the next round
runs them in reverse order with the next seed (A B, B A, A B, ...), so that whatever slows the
machine down hits all of them. First each is started and stopped after five updates, to fill caches
and to see that its flags are right.

Time is the race's own: the lines of a run are stamped as they arrive, and training time is what
lies between a training line and the line in front of it. What a log says about time is reported
beside it. Each process gets one thread unless --threads says otherwise: small steps waste more.

The ratio is the geometric mean of candidate time / reference time over the pairs, with the 95 % t
interval of the paired log ratios. `faster: yes` needs two one-sided paired t-tests to pass, both
at --alpha:
    the ratio is below 1, and
    the candidate's mean loss is not worse than the reference's by more than --loss_margin.
`faster: no`: the ratio is above 1, or the loss is worse by more than the margin, at the same level.
Where losses spread much more than the margin (the ± in the report), equal losses take many rounds
to show: run more, and only then think of a wider margin. Records are held to the defaults.
Where the candidate's loss is better, the report says about how many steps it could do without.

The race stops early, but only at looks planned in advance (after 1/3, 2/3 and all of the rounds,
none before the third round), and every look tests at alpha / number of looks (Bonferroni): looking
often does not make luck more likely. Ratio and interval use every pair there is and are not
corrected for stopping. A script whose pairs are all decided is not run any more.

A run that fails (exit code, no result in its log, --timeout) is noted and tried once more; a round
lost even so is left out of its pairs, and a script that loses two rounds in a row leaves the race.
Ctrl-C prints what there is and exits 130. NPROC=n runs each trainer on n processes with torchrun.
Exit code 0: raced; 1: a script left the race or was edited during it; 2: misuse.
"""

import hashlib
import itertools
import math
import os
import re
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from records.tools import logs, stats
from records.tools.command import BadInput, Parser, command, need, new_file, number_in, write_json
from records.tools.runs import Failed, Interrupted, Result, interruptible, machine, train

MAX_LOST = 2  # rounds in a row, each tried twice
WARMUP_STEPS = 5
SPREAD = 1.25  # largest over smallest time of one script: above it, something else used the machine
DISAGREE = 0.02  # of the stopwatch and the log
OUTSIDE = 0.2  # of its training time, that a candidate may spend outside of it beyond the reference


@dataclass(frozen=True)
class Entry:
    """A script with flags of its own."""

    name: str  # as given on the command line
    script: Path
    flags: tuple
    sha256: str  # of the script when the race began


def train_twice(entry: Entry, flags, folder: Path, args, failures, **options) -> Result | None:
    """As runs.train(), but a failed run is appended to `failures` and tried once more; None where
    that fails too."""
    flags = [*entry.flags, *flags]
    for attempt in (folder, folder.with_name(folder.name + "_again")):
        try:
            options = dict(threads=args.threads, processes=args.processes) | options
            return train(entry.script, flags, attempt, args.timeout, **options)
        except Failed as error:
            failures.append({"run": attempt.name, "why": str(error)})
            print(f"    {attempt.name} failed: {error}", flush=True)
    return None


def check_schedule(result: Result, folder: str):
    """Failed where the log shows validations that its flags do not ask for: the stopwatch leaves
    the time in front of a validation line out."""
    every = logs.number((result.line.get("config") or {}).get("val_every"))
    for run in logs.read_log(result.log):
        for step, _, _ in run.val:
            if every is not None and step != run.planned and (not every or step % every):
                raise Failed(f"{folder}: validated at step {step}, though val_every is {every}")


# -------------------------------------------------------------------------------- what could be cut


def slope(runs: list[logs.Run]) -> float | None:
    """How much the training loss falls per e-fold of steps, over the middle half of the runs, in
    nats; None where that cannot be told, or it does not fall."""
    points = []
    for run in runs:
        low, high = run.last_step / 4, run.last_step * 3 / 4
        points += [(math.log(s), loss) for s, loss, _ in run.train if low <= s <= high]
    if len(points) < 20:
        return None
    x, y = zip(*points, strict=True)
    mean_x, mean_y = stats.mean_std(x)["mean"], stats.mean_std(y)["mean"]
    products = math.fsum((a - mean_x) * (b - mean_y) for a, b in points)
    squares = math.fsum((a - mean_x) ** 2 for a in x)
    return -products / squares if squares and products < 0 else None


def steps_enough(pairs) -> dict | None:
    """About how many steps the candidate needs for the reference's loss, if its own is better: a
    shorter run ends higher by the slope of its training loss. None where it is not better, or
    nothing can be said."""
    gains = [a.loss - b.loss for a, b in pairs]
    half = stats.half_interval(gains)
    runs = [logs.read_log(b.log)[0] for _, b in pairs]
    steps = runs[0].planned if runs else None
    if half is None or steps is None or stats.mean_std(gains)["mean"] <= half:
        return None
    fall = slope(runs)
    if fall is None:
        return None
    gain = stats.mean_std(gains)["mean"]
    least, most = (steps * math.exp(-(gain + sign * half) / fall) for sign in (1, -1))
    return {
        "steps": steps,
        "enough": round(steps * math.exp(-gain / fall)),
        "interval": [math.floor(least), math.ceil(most)],
        "nats_per_efold": fall,
    }


# ----------------------------------------------------------------------------------------- the race


class Race:
    """Entries, their results by round, and the verdicts of neighbouring pairs."""

    def __init__(self, entries, args, flags):
        self.entries, self.args, self.flags = entries, args, flags
        self.results = [{} for _ in entries]  # round -> Result
        self.lost = [0] * len(entries)  # rounds in a row
        self.failures = []
        self.looks = stats.planned_looks(args.runs, args.looks)
        self.level = args.alpha / len(self.looks)
        self.verdicts = {}  # index of the candidate -> (verdict, round)
        self.machine = machine()

    def letter(self, i) -> str:
        return chr(ord("A") + i) if i < 26 else f"#{i + 1}"

    def pairs(self, i) -> list[tuple[Result, Result]]:
        """Results of entry i - 1 and entry i with the same seed."""
        a, b = self.results[i - 1], self.results[i]
        return [(a[r], b[r]) for r in sorted(a.keys() & b.keys())]

    def undecided(self):
        return [i for i in range(1, len(self.entries)) if i not in self.verdicts]

    def warm_up(self):
        """A few updates of each, thrown away. Raises BadInput where they fail."""
        for k, i in itertools.product(range(self.args.warmup_runs), range(len(self.entries))):
            print(f"warm-up {self.letter(i)}", flush=True)
            flags = [*self.flags, "--seed", str(self.args.first_seed)]
            folder = self.args.out / f"warmup{k}_{self.letter(i)}"
            failed = len(self.failures)
            train_twice(
                self.entries[i], flags, folder, self.args, self.failures, enough=WARMUP_STEPS
            )
            if len(self.failures) == failed + 2:
                raise BadInput(
                    f"{self.entries[i].name}: its warm-up run fails: {self.failures[-1]['why']}; "
                    f"see {folder / 'output'}, or skip warm-ups with --warmup_runs 0"
                )

    def run(self):
        """The rounds, until all pairs are decided, or time is up."""
        start, longest = time.monotonic(), 0.0
        for number in range(self.args.runs):
            begun = time.monotonic()
            if self.args.max_hours and begun - start + longest > self.args.max_hours * 3600:
                print(f"stopped: another round would not end within {self.args.max_hours:g} hours")
                return
            active = {j for i in self.undecided() for j in (i - 1, i)}
            for i in sorted(active, reverse=number % 2 == 1):
                self.one_run(i, number)
            longest = max(longest, time.monotonic() - begun)
            for i in self.undecided():
                self.decide(i, number + 1)
            self.save()
            if not self.undecided():
                return
        self.verdicts.update({i: ("not shown", None) for i in self.undecided()})

    def decide(self, i, rounds):
        decision = None
        if max(self.lost[i - 1], self.lost[i]) >= MAX_LOST:
            decision = "failed"
        elif rounds in self.looks:
            decision = stats.verdict(self.compare(i), self.level)
        if decision:
            self.verdicts[i] = (decision, rounds)

    def one_run(self, i, number):
        entry, seed = self.entries[i], self.args.first_seed + number
        if sha256(entry.script) != entry.sha256:
            raise BadInput(
                f"{entry.script} was edited during the race; race a copy that nobody works on"
            )
        folder = self.args.out / f"round{number:03d}_{self.letter(i)}_seed{seed}"
        flags = [*self.flags, "--seed", str(seed)]
        result = train_twice(entry, flags, folder, self.args, self.failures)
        if result:
            try:
                check_schedule(result, folder.name)
            except Failed as error:
                self.failures.append({"run": folder.name, "why": str(error)})
                result = None
        self.lost[i] = 0 if result else self.lost[i] + 1
        if result:
            self.results[i][number] = result
            print(
                f"round {number + 1}/{self.args.runs}  {self.letter(i)}  seed {seed}  "
                f"{result.time_ms / 1e3:.2f} s  loss {result.loss:.4f}",
                flush=True,
            )

    def columns(self, i, value) -> dict:
        """{"reference": [...], "candidate": [...]}: value(result) of every pair."""
        pairs = self.pairs(i)
        return {
            "reference": [value(a) for a, _ in pairs],
            "candidate": [value(b) for _, b in pairs],
        }

    def compare(self, i) -> dict:
        times = self.columns(i, lambda result: result.time_ms)
        losses = self.columns(i, lambda result: result.loss)
        return stats.compare(times, losses, self.args.loss_margin)

    def report(self, i) -> dict:
        """All about entry i against the one before it: the content of race.json."""
        pairs, args = self.pairs(i), self.args
        faster, decided_at = self.verdicts.get(i, ("undecided", None))
        reference, candidate = self.entries[i - 1], self.entries[i]
        data = {result.data for pair in pairs for result in pair}
        names = tuple(f"_{self.letter(j)}" for j in (i - 1, i))
        failures = [
            failure
            for failure in self.failures
            if failure["run"].startswith("round") and any(name in failure["run"] for name in names)
        ]
        return {
            "reference": reference.name,
            "candidate": candidate.name,
            "flags": shlex.join(self.flags),
            **self.compare(i),
            "faster": faster,
            "decided_at": decided_at,
            "runs_planned": args.runs,
            "looks": self.looks,
            "alpha": args.alpha,
            "level_per_look": self.level,
            "loss_margin": args.loss_margin,
            "times_ms": self.columns(i, lambda result: result.time_ms),
            "logged_ms": self.columns(i, lambda result: result.logged_ms),
            "wall_ms": self.columns(i, lambda result: result.wall_ms),
            "losses": self.columns(i, lambda result: result.loss),
            "steps_enough": steps_enough(pairs),
            "same_data": len(data) <= 1,
            "source_sha256": {"reference": reference.sha256, "candidate": candidate.sha256},
            "failures": failures,
            "machine": self.machine,
            "device": pairs[0][1].line.get("device") if pairs else None,
            "processes": args.processes,
            "threads": args.threads,
        }

    def reports(self) -> list[dict]:
        return [self.report(i) for i in range(1, len(self.entries))]

    def save(self):
        """race.json: the pair's report, or {"pairs": [...]} and a file for each of them."""
        reports = self.reports()
        path = self.args.json or self.args.out / "race.json"
        if len(reports) == 1:
            write_json(path, reports[0])
            return
        write_json(path, {"machine": self.machine, "pairs": reports})
        for i, report in enumerate(reports, 1):
            letters = self.letter(i - 1) + self.letter(i)
            write_json(path.with_name(f"{path.stem}_{letters}.json"), report)

    def print_report(self):
        print()
        for i, entry in enumerate(self.entries):
            print(f"{self.letter(i)} = {entry.name}")
        for i, report in enumerate(self.reports(), 1):
            print(f"\n{self.letter(i)} against {self.letter(i - 1)}: ", end="")
            print("\n".join(text_of(report)))
        if self.failures:
            print("\nfailed runs:")
        for failure in self.failures:
            print(f"  {failure['run']}: {failure['why']}")


def text_of(report: dict) -> list[str]:
    """The report of one pair, for people."""
    lines = [f"{report['n']} pairs on {report['device']} ({report['machine']})"]
    if report["n"]:
        interval = "[{:.4f}, {:.4f}]".format(*report["ci"]) if report["ci"] else "needs two pairs"
        lines.append(
            f"  train time × {report['ratio']:.4f}, {stats.CONFIDENCE:.0%} interval {interval}; "
            f"below 1: p = {shown(report['p_value'])}"
        )
        new, old = plus_minus(report["loss_candidate"]), plus_minus(report["loss_reference"])
        lines.append(
            f"  loss {new} against {old}; not worse by {report['loss_margin']:g}: "
            f"p = {shown(report['p_loss_not_worse'])}"
        )
    if cut := report["steps_enough"]:
        low, high = cut["interval"]
        lines.append(
            f"  the loss is better: about {cut['enough']} of {cut['steps']} steps ({low} to {high})"
            f" should reach the reference's; race it with fewer"
        )
    lines += [f"  warning: {warning}" for warning in warnings(report)]
    decided = ""
    if report["decided_at"]:
        decided = (
            f", decided after {report['decided_at']} of {report['runs_planned']} rounds "
            f"at p < {report['level_per_look']:.4g}"
        )
    return [*lines, f"  faster: {report['faster']}{decided}"]


def warnings(report: dict) -> list[str]:
    """What makes this pair's numbers less than they seem."""
    found = []
    if report.get("failures"):
        found.append("runs failed, so this race makes no record; race again for one")
    if not report["same_data"]:
        found.append("the two did not read the same data, so their losses may not compare")
    outside = {}
    for name, times in report["times_ms"].items():
        if not times:
            continue
        if max(times) > SPREAD * min(times):
            found.append(
                f"the {name}'s times spread from {min(times) / 1e3:.1f} to"
                f" {max(times) / 1e3:.1f} s: something else used the machine; stop it and race "
                f"again"
            )
        ratio = math.fsum(report["logged_ms"][name]) / math.fsum(times)
        if abs(ratio - 1) > DISAGREE:
            found.append(
                f"the {name}'s logs tell {ratio:.3f} of the time that the race measured; "
                f"the race's own counts"
            )
        outside[name] = math.fsum(report["wall_ms"][name]) / math.fsum(times) - 1
    if len(outside) == 2 and outside["candidate"] > outside["reference"] + OUTSIDE:
        found.append(
            f"the candidate spends {outside['candidate']:.2f} of its training time outside of it, "
            f"the reference {outside['reference']:.2f}: start, warm-up, validation, saving"
        )
    return found


def shown(value, form=".2g") -> str:
    return "?" if value is None else format(value, form)


def plus_minus(found: dict) -> str:
    return f"{shown(found['mean'], '.4f')} ± {shown(found['std'], '.4f')}"


def sha256(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


# ------------------------------------------------------------------------------------- command line


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
    return Entry(shlex.join([path, *flags]), script, tuple(flags), sha256(script))


def make_parser() -> Parser:
    usage = "python -m records race REF CAND [MORE ...] [options] [-- flags for all]"
    parser = Parser("race", __doc__, usage=usage)
    add, count, time_s = parser.add_argument, number_in(int, 1), number_in(float, 0.1)
    add("scripts", nargs="+", help="scripts or record folders, the reference first")
    add("--runs", type=count, default=10, metavar="N", help="rounds at most (10)")
    add("--first_seed", type=number_in(int, 0), default=0, metavar="N", help="of round one (0)")
    add("--threads", type=count, metavar="N", help="of each process (OMP_NUM_THREADS, or 1)")
    add("--warmup_runs", type=number_in(int, 0), default=1, metavar="N", help="of each (1)")
    add("--alpha", type=number_in(float, 1e-9, 0.5), default=stats.ALPHA, help="(%(default)s)")
    add(
        "--looks",
        type=count,
        default=3,
        metavar="N",
        help="how often it may stop; 1: at the end (3)",
    )
    add(
        "--loss_margin",
        type=number_in(float, 0),
        default=stats.LOSS_MARGIN,
        metavar="NATS",
        help="a loss worse by this much still counts as equal (%(default)s)",
    )
    add("--timeout", type=time_s, default=7200, metavar="S", help="of a run, in seconds (7200)")
    add(
        "--max_hours",
        type=number_in(float, 0),
        metavar="H",
        help="no new round that would end later",
    )
    add("--out", type=Path, metavar="DIR", help="new folder for the logs (logs/race_<date>)")
    add("--json", type=new_file, metavar="FILE", help="the result (DIR/race.json)")
    return parser


def positive(name: str, default: int) -> int:
    given = os.environ.get(name) or str(default)
    if not re.fullmatch("[1-9][0-9]*", given):
        raise BadInput(f"{name}={given} is not a number of at least 1; set another or none")
    return int(given)


def parse_args(argv):
    cut = argv.index("--") if "--" in argv else len(argv)
    args, flags = make_parser().parse_args(argv[:cut]), argv[cut + 1 :]
    if len(args.scripts) < 2:
        raise BadInput(
            'a race needs two scripts; to race a flag: "train_gpt.py" "train_gpt.py --flag value"'
        )
    entries = [parse_entry(given) for given in args.scripts]
    for flag in [*flags, *(flag for entry in entries for flag in entry.flags)]:
        if flag.split("=")[0] in ("--seed", "--log_dir"):
            raise BadInput(
                f"{flag}: the race sets seeds and log folders itself; use --first_seed and --out"
            )
    args.processes = positive("NPROC", 1)
    args.threads = args.threads or positive("OMP_NUM_THREADS", 1)
    need("scipy")
    args.out = new_folder(args.out)
    return entries, args, flags


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
    failed = any(decision == "failed" for decision, _ in race.verdicts.values())
    return code or int(failed or not all(report["n"] for report in race.reports()))


@command("race")
def main(argv) -> int:
    try:
        with interruptible():
            entries, args, flags = parse_args(argv)
            return hold(Race(entries, args, flags))
    except Interrupted as stopped:
        return stopped.args[0]
