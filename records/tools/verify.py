"""Decide whether training logs and record folders support their claim.

    python -m records verify PATH...
    python -m records verify records/laptop/NAME --rerun 3
    python -m records verify --audit FOLDER

PATH is a record folder, a log, or a folder of logs at any depth. Runs are grouped by identical
source; each group gets its statistics, a verdict, and every reason. Nothing that is read is run.

The statistical claim is "the mean final validation loss is below the target": a one-sided t-test
over the runs, so one run never proves it. Groups without any target (public logs, no --target) are
checked for consistency only. What a record folder needs besides is in records/README.md.

Reading shows mistakes, copies and careless edits. A forgery from which everything else follows
cannot be seen by reading: --rerun N races the folder's train_gpt.py against its reference's, N
rounds, here, and fails where that shows it to be slower or worse.

--audit prints a table by folder of a public collection of logs: n, mean, p, what a loss was bought
with, and in words what the logs themselves show and do not show. It is no judgement of anyone.

Exit code: 0 all pass (or the table was printed), 1 some fail, 2 misuse.
"""

import json
import math
import os

from records.tools import checks, folders, logs, stats
from records.tools.checks import Group, spread  # noqa: F401  plot uses spread
from records.tools.command import BadInput, Parser, command, emit, need, number_in, printable
from records.tools.folders import Record
from records.tools.logs import Run
from records.tools.stats import plus_minus  # noqa: F401  plot uses it
from records.tools.tracks import TRACKS

LOG_SUFFIXES = (".txt", ".log", ".out", ".stdout")
NO_LOGS = {".git", ".venv", "__pycache__"}


# --------------------------------------------------------------------------------- what is read
def unreadable(error: OSError):
    """os.walk would pass over a folder that it cannot read; a verdict must not."""
    raise error


def is_record(folder) -> bool:
    names = set(os.listdir(folder))
    has_logs = any(name.startswith("run_") and name.endswith(".txt") for name in names)
    return ("train_gpt.py" in names) + bool(names & {"race.json", "README.md"}) + has_logs >= 2


def collect(paths) -> tuple[list[str], list[str], list[str]]:
    """Record folders, logs named outright, and logs found in folders, hidden ones too."""
    records, named, found = [], [], []
    for path in paths:
        if not os.path.isdir(path):
            named.append(path)
            continue
        for top, below, files in os.walk(path, onerror=unreadable):
            below[:] = sorted(set(below) - NO_LOGS)
            if is_record(top) and folders.logs_of(top):
                records.append(top)
                below.clear()
            else:
                found += [os.path.join(top, f) for f in sorted(files) if f.endswith(LOG_SUFFIXES)]
    seen = set()

    def fresh(path):
        real = os.path.realpath(path)
        return not (real in seen or seen.add(real))

    records, named = [p for p in records if fresh(p)], [p for p in named if fresh(p)]
    return records, named, [p for p in found if fresh(p)]


def is_foreign(run: Run) -> bool:
    """A text file in a folder of logs that is no log: no step line, and it does not begin like a
    trainer's source."""
    if run.style != "none" or run.source_bytes or run.header:
        return False
    if not any("no step line" in problem for problem in run.problems):
        return False
    with open(run.path, "rb") as f:
        head = f.read(100).lstrip()
    code = head.startswith((b'"', b"'", b"#", b"=", b"import", b"from"))
    return os.path.basename(run.path).startswith("requirements") or not code


def verify(paths, track=None, target=None, alpha=stats.ALPHA) -> tuple[list[Record], list[str]]:
    """Records (a group of logs is one without a folder's rules), and files that are no logs."""
    records, named, found = collect(paths)
    done = [folders.check_record(folder, track, target, alpha) for folder in records]
    by_source, skipped = {}, []
    for path in named + found:
        for run in logs.read_log(path):
            if path in found and is_foreign(run):
                skipped.append(path)
                continue
            # Logs without any source are one group per folder if they hold runs, else stand alone.
            place = run.path if run.style == "none" else os.path.dirname(run.path) + "/"
            by_source.setdefault(run.source_sha256 or place, []).append(run)
    for runs in by_source.values():
        group = checks.check_group(common_name(runs), runs, track, target, alpha)
        done.append(Record(group.name, group))
    return done, skipped


def common_name(runs) -> str:
    places = sorted({os.path.dirname(run.path) for run in runs})
    if len(runs) == 1:
        return runs[0].path
    if len(places) == 1:
        return places[0] or "."
    return os.path.commonpath([os.path.abspath(place) for place in places])


# ---------------------------------------------------------------------------------- what is told
def as_dict(record: Record) -> dict:
    group = record.group
    runs = [
        dict(path=r.path, part=r.part, style=r.style, seed=r.seed, planned_steps=r.planned)
        | dict(last_step=r.last_step, val_loss=r.val_loss, train_time_ms=r.train_time)
        for r in group.runs
    ]
    return {
        "name": group.name,
        "source_sha256": group.source_sha256,
        "track": group.track,
        "n": len(runs),
        "val_loss": group.val_loss,
        "train_time_ms": group.train_time,
        "target": group.target,
        "p_value": group.p_value,
        "pass": group.ok,
        "race": record.found,
        "unranked": record.unranked,
        "reasons": group.reasons,
        "notes": group.notes,
        "runs": runs,
    }


def report(record: Record) -> str:
    """The verdict as text."""
    group, val, time = record.group, record.group.val_loss, record.group.train_time
    plural = "s" * (len(group.runs) != 1)
    track = f", track {group.track}" if group.track else ""
    source = (group.source_sha256 or "unknown")[:12]
    lines = [
        f"{'PASS' if group.ok else 'FAIL'}  {printable(group.name)}  "
        f"({len(group.runs)} run{plural}, source {source}{track})"
    ]
    if val["mean"] is not None:
        target = f", target {group.target:g}" if group.target is not None else ""
        p = f", p = {group.p_value:.2g}" if group.p_value is not None else ""
        best = f"best {val['best']:.5f}"
        lines.append(f"      val loss    {plus_minus(val, 1, 5)}, {best}{target}{p}")
    if time["mean"] is not None:
        best = f"best {time['best'] / 1000:.2f} s"
        lines.append(f"      train time  {plus_minus(time, 1000, 2)} s, {best}")
    if record.found:
        race = f"{record.found['word']}, {record.found['n']} pairs"
        lines.append(f"      race        × {stats.interval(record.found)}: {race}")
    lines += [f"      - {printable(reason, 300)}" for reason in group.reasons]
    if group.ok and record.unranked:
        lines.append(f"      not ranked: {printable(record.unranked, 300)}")
    lines += [f"      note: {printable(note, 300)}" for note in group.notes]
    return "\n".join(lines)


def rerun(records: list[Record], rounds: int) -> int:
    """Races each record against its reference, here. Returns the exit code."""
    from records.tools import race

    code = 0
    for record in records:
        if not record.race:
            raise BadInput(f"{record.name}: no race.json, so there is nothing to race again")
        parent = os.path.dirname(record.folder)
        entries = [os.path.join(parent, record.reference), record.folder]
        argv = [*entries, "--runs", str(rounds), "--looks", "1"]
        args, parsed, flags = race.parse_args([*argv, "--", *record.race["flags"].split()])
        held = race.prepare(args, parsed, flags)
        code = race.hold(held) or code
        print(f"the record says × {stats.interval(record.found)}\n")
        code = code or int(held.decided == "no")
    return code


def parse_args(argv):
    parser = Parser("verify", __doc__)
    add = parser.add_argument
    add("paths", nargs="+", metavar="PATH", help="record folder, log, or folder of logs")
    add("--target", type=float, help="loss to reach (default: the track's, else the logs' own)")
    add("--alpha", type=float, default=stats.ALPHA, help="level of the test (default %(default)s)")
    add("--track", choices=sorted(TRACKS), help="hold every group to this track's rules")
    add("--json", action="store_true", help="print one JSON object instead of text")
    add("--rerun", type=number_in(int, 2), metavar="N", help="race the records again, N rounds")
    add("--audit", action="store_true", help="a table by folder; the target is 3.28, or --target")
    args = parser.parse_args(argv)
    if args.target is not None and not (math.isfinite(args.target) and args.target > 0):
        raise BadInput("--target must be a positive number")
    if not 0 < args.alpha < 1:
        raise BadInput("--alpha must lie between 0 and 1")
    if args.audit and (args.track or args.json or args.rerun):
        raise BadInput("--audit prints a table of its own: leave --track, --json, --rerun out")
    for path in args.paths:
        if not os.path.lexists(path):
            raise BadInput(
                f"{printable(path)} does not exist; give a record folder, a log, a folder of logs"
            )
    need("scipy")
    return args


@command("verify")
def main(argv) -> int:
    args = parse_args(argv)
    if args.audit:
        from records.tools import audit

        emit(audit.table(*collect(args.paths), 3.28 if args.target is None else args.target))
        return 0
    records, skipped = verify(args.paths, args.track, args.target, args.alpha)
    if not records:
        raise BadInput(
            f"no log in {printable(' '.join(args.paths))}; logs end in {', '.join(LOG_SUFFIXES)}"
        )
    passed = all(record.ok for record in records)
    if args.json:
        found = [as_dict(record) for record in records]
        emit(json.dumps({"pass": passed, "groups": found, "skipped": skipped}, indent=1))
    else:
        last = f"{sum(record.ok for record in records)} of {len(records)} groups pass"
        if skipped:
            last += f"; {len(skipped)} other files skipped"
        emit("\n".join([*map(report, records), last]))
    if args.rerun and passed:
        return rerun([record for record in records if os.path.isdir(record.folder)], args.rerun)
    return 0 if passed else 1
