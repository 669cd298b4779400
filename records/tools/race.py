"""Race trainers against each other on this machine: paired runs in turn, a ratio of train times, and a verdict.

    python -m records race REF CAND --runs 10 [-- flags for both]
    python -m records race train_gpt.py "train_gpt.py --lr_muon 0.03" -- --steps 150
    python -m records race records/laptop/*/ --runs 8           a history: each against the one before it

REF and CAND are scripts or record folders (then their train_gpt.py), each with flags of its own if quoted together
with it. One round runs each of them once with the same seed, and the next round runs them in reverse order with the
next seed (A B, B A, A B, ...), so that whatever slows the machine down hits all of them. A short warm-up run of each
comes first and is thrown away. Time and loss are taken from the last line of each run's log.

The ratio is the geometric mean of candidate time / reference time over the pairs, with the 95 % t interval of the
paired log ratios. `faster: yes` needs two one-sided paired t-tests to pass, both at --alpha:
    the ratio is below 1, and
    the candidate's mean loss is not worse than the reference's by more than --loss_margin.
`faster: no`: the ratio is above 1, or the loss is worse by more than the margin, at the same level. The margin, 0.005
nats unless you say otherwise, is a third of a percent of a loss of 1.5. Where the losses spread much more than that
(the ± in the report), equal losses take many rounds to show: run more, and only then think of a wider margin.

The race stops early, but only at looks planned in advance (after 1/3, 2/3 and all of the rounds, none before the third
round), and every look tests at alpha / number of looks (Bonferroni): looking often does not make luck more likely.
The verdict is that of the look which decided; ratio and interval use every pair there is and are not corrected for
stopping. A script whose pairs are all decided is not run any more.

A run that fails (exit code, no result in its log, --timeout) is noted and tried once more; a round lost even so is
left out of its pairs, and a script that loses two rounds in a row leaves the race. Ctrl-C prints what there is and
exits 130. NPROC=n runs each trainer on n processes with torchrun.
Exit code 0: raced; 1: a script left the race or was edited during it; 2: misuse.
"""

import hashlib
import json
import math
import os
import re
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from records.tools.command import BadInput, Parser, command, number_in, write_json
from records.tools.runs import Failed, Interrupted, call, interruptible, machine
from records.tools.stats import CONFIDENCE, half_interval, mean_std, p_less

MIN_PAIRS = 3  # no look before this many rounds
MAX_LOST = 2  # rounds in a row, each tried twice
GRACE = 15  # seconds between SIGTERM and SIGKILL


@dataclass(frozen=True)
class Entry:
    """A script with flags of its own."""

    name: str  # as given on the command line
    script: Path
    flags: tuple
    sha256: str  # of the script when the race began


@dataclass(frozen=True)
class Result:
    """What one finished run's log says."""

    time_ms: float
    loss: float  # nats per token
    log: Path
    line: dict  # the whole JSON line


# ----------------------------------------------------------------------------------------------------- running trainers


def read_result(folder: Path) -> Result:
    """The result of the only log in `folder`. Raises Failed where there is none."""
    logs = sorted(folder.glob("*.txt"))
    if len(logs) != 1:
        raise Failed(f"it wrote {len(logs)} logs")
    with open(logs[0], "rb") as file:
        file.seek(max(0, os.path.getsize(logs[0]) - (1 << 20)))
        last = file.read().rstrip().rpartition(b"\n")[2]
    try:
        line = json.loads(last)
        result = Result(float(line["train_time_ms"]), float(line["val_loss"]), logs[0], line)
    except (ValueError, TypeError, KeyError):
        raise Failed("its log ends without a result line") from None
    if not (math.isfinite(result.loss) and 0 < result.time_ms < math.inf):
        raise Failed(f"val loss {result.loss}, train time {result.time_ms} ms")
    return result


def train(script: Path, flags, folder: Path, timeout) -> Result:
    """Runs a trainer once, alone, with its log in the new folder `folder`."""
    folder.mkdir(parents=True)
    processes, env = int(os.environ.get("NPROC", 1)), dict(os.environ)
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    call([*command, str(script), *flags, "--log_dir", str(folder)], folder / "output", timeout, env)
    return read_result(folder)


def train_twice(script, flags, folder, timeout, failures) -> Result | None:
    """As train(), but a failed run is appended to `failures` and tried once more; None where that fails too."""
    for attempt in (folder, folder.with_name(folder.name + "_again")):
        try:
            return train(script, flags, attempt, timeout)
        except Failed as error:
            failures.append({"run": attempt.name, "why": str(error)})
            print(f"    {attempt.name} failed: {error}", flush=True)
    return None


# ------------------------------------------------------------------------------------------------- the statistics


def compare(pairs, margin) -> dict:
    """Statistics of [(reference, candidate), ...] Results: ratio of times, interval, p-values, losses."""
    logs = [math.log(b.time_ms / a.time_ms) for a, b in pairs]
    worse = [b.loss - a.loss for a, b in pairs]
    of = mean_std(logs)
    half = half_interval(logs)
    return {
        "n": len(pairs),
        "ratio": math.exp(of["mean"]) if pairs else None,
        "ci": [math.exp(of["mean"] - half), math.exp(of["mean"] + half)]
        if half is not None
        else None,
        "p_value": p_less(logs),
        "p_slower": p_less([-x for x in logs]),
        "p_loss_not_worse": p_less(worse, margin),
        "p_loss_worse": p_less([-x for x in worse], -margin),
        "loss_reference": mean_std([a.loss for a, _ in pairs]),
        "loss_candidate": mean_std([b.loss for _, b in pairs]),
    }


def verdict(stats, level) -> str | None:
    """ "yes", "no", or None where `level` decides neither."""
    if stats["n"] < 2:
        return None
    if stats["p_value"] < level and stats["p_loss_not_worse"] < level:
        return "yes"
    return "no" if stats["p_slower"] < level or stats["p_loss_worse"] < level else None


def planned_looks(runs: int, looks: int) -> list[int]:
    """Rounds after which the race may be decided."""
    return sorted(
        {min(runs, max(MIN_PAIRS, math.ceil(runs * i / looks))) for i in range(1, looks + 1)}
    )


# ------------------------------------------------------------------------------------------------------------- the race


class Race:
    """Entries, their results by round, and the verdicts of neighbouring pairs."""

    def __init__(self, entries, args, flags):
        self.entries, self.args, self.flags = entries, args, flags
        self.results = [{} for _ in entries]  # round -> Result
        self.lost = [0] * len(entries)  # rounds in a row
        self.failures = []
        self.looks = planned_looks(args.runs, args.looks)
        self.level = args.alpha / len(self.looks)
        self.verdicts = {}  # index of the candidate -> (verdict, round)
        self.machine = machine()

    def letter(self, i):
        return chr(ord("A") + i) if i < 26 else f"#{i + 1}"

    def pairs(self, i):
        """Results of entry i - 1 and entry i with the same seed."""
        a, b = self.results[i - 1], self.results[i]
        return [(a[r], b[r]) for r in sorted(a.keys() & b.keys())]

    def undecided(self):
        return [i for i in range(1, len(self.entries)) if i not in self.verdicts]

    def warm_up(self):
        """One short run of each, thrown away: it fills caches and shows a wrong flag before hours have gone by."""
        for k in range(self.args.warmup_runs):
            for i, entry in enumerate(self.entries):
                print(f"warm-up {self.letter(i)}", flush=True)
                flags = without([*entry.flags, *self.flags], "--steps")
                folder = self.args.out / f"warmup{k}_{self.letter(i)}"
                flags += ["--steps", "5", "--seed", str(self.args.first_seed)]
                if re.search(
                    r"^    warmup: int",
                    entry.script.read_text(encoding="utf-8", errors="replace"),
                    re.M,
                ):
                    flags = [
                        *without(flags, "--warmup"),
                        "--warmup",
                        "0",
                    ]  # a recipe's own would outlast five steps
                if not train_twice(entry.script, flags, folder, self.args.timeout, self.failures):
                    raise BadInput(
                        f"{entry.name}: its warm-up run (--steps 5) fails: {self.failures[-1]['why']}; "
                        f"see {folder / 'output'}, or skip warm-ups with --warmup_runs 0"
                    )

    def run(self):
        """The rounds, until all pairs are decided, or time is up."""
        start, longest = time.monotonic(), 0.0
        for number in range(self.args.runs):
            round_start = time.monotonic()
            if self.args.max_hours and round_start - start + longest > self.args.max_hours * 3600:
                print(f"stopped: another round would not end within {self.args.max_hours:g} hours")
                return
            active = sorted(
                {j for i in self.undecided() for j in (i - 1, i)}, reverse=number % 2 == 1
            )
            for i in active:
                self.one_run(i, number)
            longest = max(longest, time.monotonic() - round_start)
            for i in self.undecided():
                decision = "failed" if max(self.lost[i - 1], self.lost[i]) >= MAX_LOST else None
                if not decision and number + 1 in self.looks:
                    decision = verdict(compare(self.pairs(i), self.args.loss_margin), self.level)
                if decision:
                    self.verdicts[i] = (decision, number + 1)
            self.save()
            if not self.undecided():
                return
        self.verdicts.update({i: ("not shown", None) for i in self.undecided()})

    def one_run(self, i, number):
        entry, seed = self.entries[i], self.args.first_seed + number
        if sha256(entry.script) != entry.sha256:
            raise BadInput(
                f"{entry.script} was edited during the race; race a copy that nobody works on"
            )
        folder = self.args.out / f"round{number:03d}_{self.letter(i)}_seed{seed}"
        flags = [*entry.flags, *self.flags, "--seed", str(seed)]
        result = train_twice(entry.script, flags, folder, self.args.timeout, self.failures)
        self.lost[i] = 0 if result else self.lost[i] + 1
        if result:
            self.results[i][number] = result
            print(
                f"round {number + 1}/{self.args.runs}  {self.letter(i)}  seed {seed}  {result.time_ms / 1e3:.2f} s  "
                f"loss {result.loss:.4f}",
                flush=True,
            )

    def report(self) -> list[dict]:
        """One dictionary for each neighbouring pair."""
        return [self.report_pair(i) for i in range(1, len(self.entries))]

    def report_pair(self, i) -> dict:
        pairs = self.pairs(i)
        faster, decided_at = self.verdicts.get(i, ("undecided", None))
        a, b = self.entries[i - 1], self.entries[i]
        read = {
            json.dumps(
                [result.line.get(key) for key in ("val_tokens", "data_sha256")], sort_keys=True
            )
            for pair in pairs
            for result in pair
        }
        names = tuple(f"_{self.letter(j)}" for j in (i - 1, i))
        return {
            "reference": a.name,
            "candidate": b.name,
            "flags": shlex.join(self.flags),
            **compare(pairs, self.args.loss_margin),
            "faster": faster,
            "decided_at": decided_at,
            "runs_planned": self.args.runs,
            "looks": self.looks,
            "alpha": self.args.alpha,
            "level_per_look": self.level,
            "loss_margin": self.args.loss_margin,
            "times_ms": {
                "reference": [r.time_ms for r, _ in pairs],
                "candidate": [c.time_ms for _, c in pairs],
            },
            "losses": {
                "reference": [r.loss for r, _ in pairs],
                "candidate": [c.loss for _, c in pairs],
            },
            "same_data": len(read) <= 1,
            "source_sha256": {"reference": a.sha256, "candidate": b.sha256},
            "failures": [
                failure
                for failure in self.failures
                if any(name in failure["run"] for name in names)
            ],
            "machine": self.machine,
            "device": pairs[0][1].line.get("device") if pairs else None,
            "processes": int(os.environ.get("NPROC", 1)),
        }

    def save(self):
        """race.json: the pair's dictionary, or {"pairs": [...]} and a file for each pair where there are several."""
        reports = self.report()
        path = self.args.json or self.args.out / "race.json"
        if len(reports) == 1:
            return write_json(path, reports[0])
        write_json(path, {"machine": self.machine, "pairs": reports})
        for i, report in enumerate(reports, 1):
            write_json(
                path.with_name(f"{path.stem}_{self.letter(i - 1)}{self.letter(i)}.json"), report
            )

    def print_report(self):
        print()
        for i, entry in enumerate(self.entries):
            print(f"{self.letter(i)} = {entry.name}")
        for i, r in enumerate(self.report(), 1):
            print(
                f"\n{self.letter(i)} against {self.letter(i - 1)}: {r['n']} pairs on {r['device']} ({r['machine']})"
            )
            if r["n"]:
                interval = "[{:.4f}, {:.4f}]".format(*r["ci"]) if r["ci"] else "needs two pairs"
                new, old = (
                    "{} ± {}".format(text(r[key]["mean"], ".4f"), text(r[key]["std"], ".4f"))
                    for key in ("loss_candidate", "loss_reference")
                )
                print(
                    f"  train time × {r['ratio']:.4f}, {CONFIDENCE:.0%} interval {interval}; below 1: p = "
                    f"{text(r['p_value'])}"
                )
                print(
                    f"  loss {new} against {old}; not worse by {r['loss_margin']:g}: "
                    f"p = {text(r['p_loss_not_worse'])}"
                )
            if not r["same_data"]:
                print("  note: the two did not read the same data, so their losses may not compare")
            print(
                f"  faster: {r['faster']}"
                + (
                    f", decided after {r['decided_at']} of {r['runs_planned']} rounds "
                    f"at p < {r['level_per_look']:.4g}"
                    if r["decided_at"]
                    else ""
                )
            )
        if self.failures:
            print("\nfailed runs:")
            for failure in self.failures:
                print(f"  {failure['run']}: {failure['why']}")

    def draw(self, path: Path):
        """Train times and losses of every round, a line for each seed."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(1, 2, figsize=(10, 4.5), layout="constrained")
        letters = [self.letter(i) for i in range(len(self.entries))]
        panels = (
            ("train time [s]", lambda result: result.time_ms / 1e3),
            ("val loss", lambda result: result.loss),
        )
        for axis, (title, value) in zip(axes, panels):
            for number in sorted({number for results in self.results for number in results}):
                points = [
                    (i, value(results[number]))
                    for i, results in enumerate(self.results)
                    if number in results
                ]
                axis.plot(*zip(*points), "o-", color="tab:blue", alpha=0.4, lw=1, ms=4)
            for i, results in enumerate(self.results):
                if results:
                    mean = mean_std([value(result) for result in results.values()])["mean"]
                    axis.plot(i, mean, "_", color="black", ms=24, mew=2)
            axis.set_xticks(range(len(letters)), letters)
            axis.set_title(title)
            axis.margins(x=0.25)
        names = [f"{letter}: {entry.name}" for letter, entry in zip(letters, self.entries)]
        figure.suptitle("\n".join(names), fontsize=9)
        temp = path.with_name(path.name + ".tmp")
        figure.savefig(temp, format=path.suffix[1:], dpi=120)
        pyplot.close(figure)
        os.replace(temp, path)


def text(value, form=".2g") -> str:
    return "?" if value is None else format(value, form)


def sha256(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def without(flags, name) -> list[str]:
    """`flags` less `name value` and `name=value`."""
    kept, skip = [], False
    for flag in flags:
        if not skip and flag != name and not flag.startswith(name + "="):
            kept.append(flag)
        skip = not skip and flag == name
    return kept


# --------------------------------------------------------------------------------------------------------- command line


def parse_entry(given: str, extra: str) -> Entry:
    try:
        path, *flags = [given] if os.path.exists(given) else shlex.split(given) or [given]
        flags += shlex.split(extra)
    except ValueError as error:
        raise BadInput(f"{given} {extra}: {error}; quote the flags as in a shell") from None
    script = Path(path) / "train_gpt.py" if os.path.isdir(path) else Path(path)
    if not script.is_file():
        raise BadInput(
            f"{script}: no such file; give a script, or a record folder with a train_gpt.py"
        )
    return Entry(" ".join([given, extra]).strip(), script, tuple(flags), sha256(script))


def parse_args(argv):
    argv = list(argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    for i in reversed(range(cut - 1)):
        if argv[i] in (
            "--ref_flags",
            "--cand_flags",
        ):  # argparse takes a value like --no_bf16 for its own flag
            argv[i : i + 2], cut = [f"{argv[i]}={argv[i + 1]}"], cut - 1
    parser = Parser(
        "race",
        __doc__,
        usage="python -m records race REF CAND [MORE ...] [options] [-- flags for all]",
    )
    add = parser.add_argument
    add("scripts", nargs="+", help="scripts or record folders, the reference first")
    add("--runs", type=number_in(int, 1), default=10, metavar="N", help="rounds at most (10)")
    add("--ref_flags", default="", help="flags of the reference alone (two scripts only)")
    add("--cand_flags", default="", help="flags of the candidate alone (two scripts only)")
    add(
        "--first_seed",
        type=number_in(int, 0),
        default=0,
        metavar="N",
        help="seed of the first round (0)",
    )
    add(
        "--warmup_runs",
        type=number_in(int, 0),
        default=1,
        metavar="N",
        help="discarded runs of 5 steps of each (1)",
    )
    add(
        "--alpha",
        type=number_in(float, 1e-9, 0.5),
        default=0.01,
        help="level of the whole race (0.01)",
    )
    add(
        "--looks",
        type=number_in(int, 1),
        default=3,
        metavar="N",
        help="how often it may stop; 1: not early (3)",
    )
    add(
        "--loss_margin",
        type=number_in(float, 0),
        default=0.005,
        metavar="NATS",
        help="a loss worse by this much still counts as equal (0.005)",
    )
    add(
        "--timeout",
        type=number_in(float, 0.1),
        default=7200,
        metavar="S",
        help="seconds after which a run has failed (7200)",
    )
    add(
        "--max_hours",
        type=number_in(float, 0),
        metavar="H",
        help="no new round that would end later",
    )
    add("--out", type=Path, metavar="DIR", help="new folder for the logs (logs/race_<date>)")
    add("--json", type=Path, metavar="FILE", help="the result (DIR/race.json)")
    add("--picture", type=Path, metavar="FILE", help="times and losses as .png, .svg or .pdf")
    args, flags = parser.parse_args(argv[:cut]), argv[cut + 1 :]

    if len(args.scripts) < 2:
        raise BadInput(
            "a race needs two scripts; to race flags, name the script twice and use --cand_flags"
        )
    if len(args.scripts) > 2 and (args.ref_flags or args.cand_flags):
        raise BadInput(
            "--ref_flags and --cand_flags are for two scripts; with more, quote each script with its flags"
        )
    extra = (
        [args.ref_flags, args.cand_flags] if len(args.scripts) == 2 else [""] * len(args.scripts)
    )
    entries = [parse_entry(*pair) for pair in zip(args.scripts, extra)]
    for flag in [*flags, *(flag for entry in entries for flag in entry.flags)]:
        if flag.split("=")[0] in ("--seed", "--log_dir"):
            raise BadInput(
                f"{flag}: the race sets seeds and log folders itself; use --first_seed and --out"
            )
    if not re.fullmatch("[1-9][0-9]*", os.environ.get("NPROC", "1")):
        raise BadInput(f"NPROC={os.environ['NPROC']} is not a number of processes; give 1 or more")
    args.out = args.out or Path("logs") / time.strftime("race_%Y-%m-%d_%H-%M-%S")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise BadInput(f"{args.out}: already there; give a new folder, nothing is overwritten")
    for path in filter(None, (args.json, args.picture)):
        if not path.parent.is_dir() or path.is_dir():
            raise BadInput(f"{path}: cannot be written there; give a file in a folder that exists")
    if args.picture and args.picture.suffix not in (".png", ".svg", ".pdf"):
        raise BadInput(f"{args.picture}: unknown kind of picture; use .png, .svg or .pdf")
    for module in ["scipy", "matplotlib"][: 2 if args.picture else 1]:
        try:
            __import__(module)
        except ImportError:
            raise BadInput(
                f"{module} is not installed; pip install -r records/requirements.txt"
            ) from None
    return entries, args, flags


@command("race")
def main(argv) -> int:
    try:
        with interruptible():
            entries, args, flags = parse_args(argv)
            args.out.mkdir(parents=True, exist_ok=True)
            race, code = Race(entries, args, flags), 0
            race.warm_up()
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
            if args.picture:
                race.draw(args.picture)
            print(f"\nlogs and race.json: {args.out}")
            return code or int(any(decision == "failed" for decision, _ in race.verdicts.values()))
    except Interrupted as stopped:
        return stopped.args[0]
