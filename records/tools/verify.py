"""Decide whether training logs support their claim.

    python -m records verify PATH...
    python -m records verify --audit FOLDER

PATH is a record folder, a log, or a folder of logs at any depth. Runs are grouped by identical
source; each group gets its statistics, a verdict, and every reason. Nothing that is read is run.

The statistical claim is "the mean final validation loss is below the target": a one-sided t-test
over the runs, so one run never proves it. Groups without any target (public logs, no --target) are
checked for consistency only. What a record folder needs besides is in records/README.md.

--audit prints a table by folder of a public collection of logs: n, mean, p, and in words what the
logs themselves show and do not show. It is no judgement of anyone: logs are kept for many purposes.

Exit code: 0 all pass (or the table was printed), 1 some fail, 2 misuse.
"""

import hashlib
import json
import math
import os
import re
from dataclasses import dataclass, field

from records.tools import logs, stats
from records.tools.command import BadInput, Parser, command, emit, need, printable
from records.tools.logs import Run, number
from records.tools.tracks import RUN_LOCAL, TRACKS

LOG_SUFFIXES = (".txt", ".log", ".out", ".stdout")
# Flags whose 0 or "auto" the trainer replaces by what it chose.
RESOLVED = {
    "micro_batch",
    "attention",
    "device",
    "compile",
    "relora_alpha",
    "relora_warm_start",
    "relora_interval",
    "relora_rewarm",
    "lawa_interval",
    "mup_base_width",
}


@dataclass
class Group:
    """Runs of one source, and what verify thinks of them."""

    name: str
    source_sha256: str | None
    runs: list[Run]
    track: str | None = None
    target: float | None = None
    alpha: float = stats.ALPHA
    p_value: float | None = None
    reasons: list[str] = field(default_factory=list)  # each one is a failure
    notes: list[str] = field(default_factory=list)  # what could not be checked, other remarks
    unranked: str = ""  # of a record that passes: why it has no place on the board

    @property
    def ok(self) -> bool:
        return not self.reasons

    def as_dict(self) -> dict:
        runs = [
            dict(
                path=r.path,
                part=r.part,
                style=r.style,
                seed=r.seed,
                planned_steps=r.planned,
                last_step=r.last_step,
                val_loss=r.val_loss,
                train_time_ms=r.train_time,
            )
            for r in self.runs
        ]
        return {
            "name": self.name,
            "source_sha256": self.source_sha256,
            "track": self.track,
            "n": len(self.runs),
            "val_loss": spread([r.val_loss for r in self.runs]),
            "train_time_ms": spread([r.train_time for r in self.runs]),
            "target": self.target,
            "alpha": self.alpha,
            "p_value": self.p_value,
            "pass": self.ok,
            "unranked": self.unranked,
            "reasons": self.reasons,
            "notes": self.notes,
            "runs": runs,
        }


def spread(values) -> dict:
    """Mean, sample standard deviation and best (least) of the values that are there."""
    values = [v for v in values if v is not None]
    return stats.mean_std(values) | {"best": min(values, default=None)}


def plus_minus(values: dict, scale=1.0, digits=4) -> str:
    """ "1.4987 ± 0.0012" of a dict made by spread()."""
    if values["mean"] is None:
        return "?"
    text = f"{values['mean'] / scale:.{digits}f}"
    return text if values["std"] is None else f"{text} ± {values['std'] / scale:.{digits}f}"


def p_value(losses, target: float) -> tuple[float | None, str]:
    """One-sided p-value of "the mean loss is below target", or None and why there is none."""
    if len(losses) < 2:
        return None, "one run proves nothing about the mean: two or more seeds are needed"
    if max(losses) - min(losses) < 1e-9:
        why = "no test is possible, and the seeds cannot have worked"
        return None, f"all {len(losses)} losses are equal: {why}"
    return stats.p_less(losses, target), ""


# ------------------------------------------------------------------------------------------ one run


def check_run(run: Run, track: str | None) -> list[str]:
    """Everything wrong with one run, in words."""
    reasons = list(run.problems)
    if run.style == "none":
        return reasons + ([] if reasons else ["has no step line: cut off"])
    if run.planned is None:
        reasons.append("does not say how many steps were planned")
    if not run.val:
        reasons.append("has no validation line")
    elif run.planned is not None and run.val[-1][0] != run.planned:
        last = run.val[-1][0]
        reasons.append(
            f"is cut off: its last validation is at step {last} of {run.planned} planned"
        )
    if run.style == "ours":
        reasons += check_result(run)
    if track is not None:
        reasons += check_track(run, track)
    return reasons


class Agreement:
    """Collects what does not agree."""

    def __init__(self):
        self.reasons = []

    def equal(self, what, a, b, tolerance=0.0):
        x, y = number(a), number(b)
        if x is None or y is None:
            wrong = a is None or a != b
        else:
            wrong = abs(x - y) > tolerance
        if wrong:
            self.reasons.append(f"{what} do not agree: {printable(a, 40)} and {printable(b, 40)}")


def check_result(run: Run) -> list[str]:
    """The result line against the step lines, the header and itself."""
    result, config = run.result, run.config
    parts = {"config": config, "data": run.data, "result": result}
    missing = [what for what, value in parts.items() if value is None]
    if missing:
        known = " ".join(run.problems)
        return [
            f"has no {what} line: cut off or edited"
            for what in missing
            if f" {what} line" not in known
        ]
    reasons = check_numbers(run) + check_header(run) + check_argv(run)
    every = number(config.get("val_every"))
    odd = [step for step, _, _ in run.val if step != run.planned and (not every or step % every)]
    if every is not None and odd:
        reasons.append(f"validates at step {odd[0]}, which val_every {every:g} does not ask for")
    if not run.data:
        reasons.append("names no data file")
    for name, sha in run.data.items():
        if sha is not None and not (isinstance(sha, str) and re.fullmatch("[0-9a-f]{64}", sha)):
            reasons.append(f"data hash of {printable(name, 60)} is not a sha256")
    return reasons


def check_numbers(run: Run) -> list[str]:
    """Losses, times, steps and tokens of the result line against the step lines and the config."""
    result, config, found = run.result, run.config, Agreement()
    steps, time = number(result.get("steps")), number(result.get("train_time_ms"))
    if run.val:
        _, loss, ms = run.val[-1]
        found.equal(
            "val_loss of the last line and of the result", loss, result.get("val_loss"), 0.51e-4
        )
        found.equal("train_time of the last line and of the result", ms, time, 1.0)
    found.equal("planned steps and the result's steps", run.planned, result.get("steps"))
    found.equal("steps of config and result", config.get("steps"), result.get("steps"))
    if time is not None and time <= 0:
        found.reasons.append(f"train_time_ms is {time:g}: no clock shows that")
    if steps and time is not None:
        average, rounding = result.get("step_avg_ms"), 0.006 + 0.6 / steps
        found.equal("step_avg_ms and train_time_ms over steps", average, time / steps, rounding)
    tokens = run.tokens(run.planned) if run.planned is not None else None
    if tokens is None:
        found.reasons.append("config has no batch_tokens that give the tokens of the run")
    else:
        found.equal("tokens and the schedule of batch_tokens", result.get("tokens"), tokens)
    target, loss = number(config.get("target")), number(result.get("val_loss"))
    if target is not None:
        found.equal("target of config and result", target, result.get("target_val_loss"))
        if loss is not None and abs(loss - target) > 1e-6:  # the result line has six decimals
            reached = result.get("target_reached")
            found.equal("target_reached and val_loss <= target", reached, loss <= target)
    return found.reasons


def check_header(run: Run) -> list[str]:
    """What header and result line both say."""
    result, header, found = run.result, run.header, Agreement()
    for key in ("seed", "val_tokens"):
        if key in result or key == "seed":  # logs of 2026-11-21 and before repeat val_tokens
            found.equal(f"{key} of config and result", run.config.get(key), result.get(key))
    found.equal("config of header and result", digest(run.config), digest(result.get("config")))
    data = digest(result.get("data_sha256"))
    found.equal("data hashes of header and result", digest(run.data), data)
    for key in ("source_sha256", "run_id", "device"):
        found.equal(f"{key} of header and result", header.get(key), result.get(key))
    size = str(result.get("world_size"))
    found.equal("world_size of header and result", header.get("world_size"), size)
    return found.reasons


def digest(value) -> str:
    """A short name for a JSON value, equal for equal values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def parse_flags(words) -> dict[str, list[str]]:
    """{name: values} of a command line, without a look at what the flags mean."""
    flags, name = {}, None
    for word in words:
        if word.startswith("--"):
            name, given, value = word[2:].partition("=")
            flags[name] = [value] if given else []
        elif name is not None:
            flags[name].append(word)
    return flags


def check_argv(run: Run) -> list[str]:
    """The command line against the config that is said to come from it."""
    reasons = []
    for name, values in parse_flags(run.header.get("argv", "").split()).items():
        key, said = name, values
        if name not in run.config and name.startswith("no_"):
            key, said = name[3:], ["False"]
        if key == "resume":
            continue  # with or without a checkpoint's name; the line `resumed:` tells
        if key not in run.config:
            reasons.append(f"argv has --{printable(name, 40)}, of which config knows nothing")
        elif not agrees(key, said or ["True"], run.config[key]):
            shown = printable(" ".join(values), 40)
            value = printable(run.config[key], 40)
            reasons.append(f"argv has --{printable(name, 40)} {shown}, but config has {value}")
    return reasons


def agrees(key, said: list[str], value) -> bool:
    """Whether the words of a flag give this value of the config."""
    if key in RESOLVED and said in (["0"], ["0.0"], ["auto"]):
        return True
    values = value if isinstance(value, list) else [value]
    if len(said) != len(values):
        return isinstance(value, str)  # a path with spaces in it
    return all(one_agrees(word, v) for word, v in zip(said, values, strict=True))


def one_agrees(word: str, value) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return word == str(value)
    try:
        return math.isclose(float(word.replace("_", "")), value, rel_tol=1e-9)
    except ValueError:
        return False


def check_track(run: Run, track: str) -> list[str]:
    """What the track demands of each run."""
    rules, config = TRACKS[track], run.config or {}
    if run.style != "ours":
        return [f"is no log of this repository: no config, seed or data, which track {track} needs"]
    reasons = []
    for key in ("val_tokens", "vocab_size"):
        wanted = getattr(rules, key)
        if config.get(key) != wanted:
            given = printable(config.get(key), 20)
            reasons.append(f"has {key} {given}; track {track} demands {wanted}")
    reasons += check_machine(run, track) + check_data(run, track)
    if track == "memory":
        reasons += check_memory(run.result or {})
    if not rules.resumed and (run.resumed or (run.result or {}).get("resumed")):
        reasons.append(f"was resumed from a checkpoint; track {track} demands uninterrupted runs")
    return reasons


def check_memory(result: dict) -> list[str]:
    """That the peak holds at least the optimizer's state, and a byte of each parameter."""
    parts = [number(result.get(key)) for key in ("optimizer_state_bytes", "param_count")]
    peak, least = number(result.get("peak_memory_bytes")), sum(part or 0 for part in parts)
    if peak is None or None in parts or peak < max(1, least):
        given = printable(result.get("peak_memory_bytes"), 40)
        return [f"peak_memory_bytes {given} do not hold its parameters and optimizer state"]
    return []


def check_machine(run: Run, track: str) -> list[str]:
    rules, reasons = TRACKS[track], []
    size, device = run.header.get("world_size", "?"), run.header.get("device", "?")
    if rules.world_size is not None and size != str(rules.world_size):
        reasons.append(
            f"ran on {printable(size, 20)} processes; track {track} demands {rules.world_size}"
        )
    on_cpu = device.strip().lower() == "cpu"
    fits = {None: True, "CPU": on_cpu, "GPU": not on_cpu}.get(rules.device)
    if fits is None:
        fits = rules.device in device
    if not fits:
        reasons.append(f"ran on {printable(device, 40)!r}; track {track} demands {rules.device}")
    return reasons


def check_data(run: Run, track: str) -> list[str]:
    rules, reasons, data = TRACKS[track], [], run.data or {}
    for name, sha in data.items():
        shown = printable(name, 60)
        kind = name.startswith((f"{rules.data}_train_", f"{rules.data}_val_"))
        if not kind or not rules.other_files and name not in rules.files:
            reasons.append(f"used {shown}; track {track} demands {rules.data} shards")
        elif sha is None:
            reasons.append(f"used {shown} unchecked: no manifest.json stood beside it")
        elif rules.files.get(name, sha) != sha:
            reasons.append(
                f"used a {shown} that is not track {track}'s: sha256 {printable(sha, 12)}"
            )
        elif "_val_" in name and name not in rules.files:
            reasons.append(f"used {shown}; track {track} validates on {', '.join(rules.files)}")
    missing = sorted(set(rules.files) - set(data))
    if missing:
        reasons.append(f"did not use {', '.join(missing)}")
    return reasons


# ------------------------------------------------------------------------------------------ groups


def check_group(name, runs, track=None, target=None, alpha=stats.ALPHA) -> Group:
    """Checks on each run, on the runs together, and the statistical claim."""
    group = Group(name, runs[0].source_sha256, runs, track=track, alpha=alpha)
    for run in runs:
        group.reasons += [f"{run.name}: {reason}" for reason in check_run(run, track)]
    if group.source_sha256 is None:
        group.reasons.append("no source: the log neither holds nor names the code that made it")
    ours = [r for r in runs if r.style == "ours" and r.config is not None]
    if 0 < len(ours) < len(runs) and any(r.style == "public" for r in runs):
        group.reasons.append("some logs of one source have a config line and some have none")
    compare_runs(group, ours)
    if len(ours) < len(runs):
        group.notes.append(
            "not our log format: seeds, config, data hashes and token counts could not be checked"
        )
    targets = sorted({number(r.config.get("target")) for r in ours} - {None})
    rule = TRACKS[track].target if track else None
    group.target = next((t for t in (target, rule, *targets[:1]) if t is not None), None)
    test(group)
    return group


def compare_runs(group: Group, ours: list[Run]):
    """What has to be alike in all runs, and what must not."""
    configs = {
        r.name: {k: v for k, v in r.config.items() if k not in RUN_LOCAL | {"argv", "run_id"}}
        for r in ours
    }
    same(group, "config", configs)
    same(group, "data", {r.name: r.data for r in ours if r.data is not None})
    for keys, where in (
        (("world_size", "device"), group.reasons),
        (("torch", "cuda", "driver", "cpu"), group.notes),
    ):
        for key in keys:
            values = {r.header.get(key) for r in ours}
            if len(values) > 1:
                shown = ", ".join(sorted(printable(v) for v in values))
                where.append(f"{key} differs between the runs: {shown}")
    if any(None in r.data.values() for r in ours if r.data):
        group.notes.append("some data was not checked: no manifest.json stood beside it")
    repeated(group, "run_id {}", [(printable(r.header.get("run_id"), 40), r) for r in ours])
    repeated(group, "seed {}", [(printable(r.seed, 30), r) for r in ours])
    # Two runs that agree in every validation loss and time are one run.
    repeated(
        group, "the same validation lines", [(str(r.val), r) for r in group.runs if r.train_time]
    )
    if group.track is not None and ours:
        seeds = [r.seed for r in ours]
        if not all(isinstance(seed, int) for seed in seeds) or sorted(seeds) != list(
            range(len(seeds))
        ):
            shown = ", ".join(printable(seed, 12) for seed in seeds)
            group.reasons.append(f"the seeds are {shown}, not 0, 1, 2, ... without a gap")


def same(group, what, by_name):
    """All values alike, key by key."""
    first, *others = by_name.items() or [("", {})]
    for name, value in others:
        keys = sorted(k for k in set(value) | set(first[1]) if value.get(k) != first[1].get(k))
        if keys:
            shown = printable(", ".join(keys))
            group.reasons.append(f"{what} differs between {first[0]} and {name}: {shown}")


def repeated(group, what, pairs):
    seen = {}
    for key, run in pairs:
        if key in seen:
            text = f"{seen[key].name} and {run.name} have {what.format(key)}: not independent runs"
            group.reasons.append(text)
        seen.setdefault(key, run)


def test(group: Group):
    """The claim about the mean."""
    losses = [r.val_loss for r in group.runs if r.val_loss is not None]
    if group.target is None:
        group.notes.append("no target: consistency only (--target X tests the mean loss)")
        return
    group.p_value, reason = p_value(losses, group.target)
    if group.p_value is None:
        group.reasons.append(reason)
    elif not group.p_value < group.alpha:
        group.reasons.append(
            f"mean val loss {stats.mean_std(losses)['mean']:.5f} is not shown to be below "
            f"{group.target:g}: p = {group.p_value:.2g}, needed < {group.alpha:g}"
        )


# ---------------------------------------------------------------------------------- files, reports


def unreadable(error: OSError):
    """os.walk would pass over a folder that it cannot read; a verdict must not."""
    raise error


def is_record(folder) -> bool:
    names = set(os.listdir(folder))
    has_logs = any(name.startswith("run_") and name.endswith(".txt") for name in names)
    return ("train_gpt.py" in names) + ("result.json" in names) + has_logs >= 2


def collect(paths) -> tuple[list[str], list[str], list[str]]:
    """Record folders, logs named outright, and logs found in folders."""
    records, named, found = [], [], []
    for path in paths:
        if not os.path.isdir(path):
            named.append(path)
            continue
        for top, folders, files in os.walk(path, onerror=unreadable):
            folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__pycache__")
            if is_record(top):
                records.append(top)
                folders.clear()
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


def verify(paths, track=None, target=None, alpha=stats.ALPHA) -> tuple[list[Group], list[str]]:
    """Groups with verdicts, and files in folders that are no logs."""
    from records.tools import folders  # which needs this module

    records, named, found = collect(paths)
    groups = [folders.check_record(folder, track, target, alpha) for folder in records]
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
        groups.append(check_group(common_name(runs), runs, track, target, alpha))
    return groups, skipped


def common_name(runs) -> str:
    places = sorted({os.path.dirname(run.path) for run in runs})
    if len(runs) == 1:
        return runs[0].path
    if len(places) == 1:
        return places[0] or "."
    return os.path.commonpath([os.path.abspath(place) for place in places])


def report(group: Group) -> str:
    """The verdict as text."""
    val = spread([run.val_loss for run in group.runs])
    time = spread([run.train_time for run in group.runs])
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
        lines.append(
            f"      val loss    {plus_minus(val, 1, 5)}, best {val['best']:.5f}{target}{p}"
        )
    if time["mean"] is not None:
        best = time["best"] / 1000
        lines.append(f"      train time  {plus_minus(time, 1000, 2)} s, best {best:.2f} s")
    lines += [f"      - {printable(reason, 300)}" for reason in group.reasons]
    if group.ok and group.unranked:
        lines.append(f"      not ranked: {printable(group.unranked, 300)}")
    lines += [f"      note: {printable(note, 300)}" for note in group.notes]
    return "\n".join(lines)


def parse_args(argv):
    parser = Parser("verify", __doc__)
    add = parser.add_argument
    add("paths", nargs="+", metavar="PATH", help="record folder, log, or folder of logs")
    add("--target", type=float, help="loss to reach (default: the track's, else the logs' own)")
    add("--alpha", type=float, default=stats.ALPHA, help="level of the test (default %(default)s)")
    add("--track", choices=sorted(TRACKS), help="hold every group to this track's rules")
    add("--json", action="store_true", help="print one JSON object instead of text")
    add(
        "--audit",
        action="store_true",
        help="print a table by folder; the target is 3.28, or --target",
    )
    args = parser.parse_args(argv)
    if args.target is not None and not (math.isfinite(args.target) and args.target > 0):
        raise BadInput("--target must be a positive number")
    if not 0 < args.alpha < 1:
        raise BadInput("--alpha must lie between 0 and 1")
    if args.audit and (args.track or args.json):
        raise BadInput("--audit prints a table of its own: leave --track and --json out")
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

        emit(audit.table(args.paths, 3.28 if args.target is None else args.target))
        return 0
    groups, skipped = verify(args.paths, args.track, args.target, args.alpha)
    if not groups:
        raise BadInput(
            f"no log in {printable(' '.join(args.paths))}; logs end in {', '.join(LOG_SUFFIXES)}"
        )
    passed = all(g.ok for g in groups)
    if args.json:
        found = [g.as_dict() for g in groups]
        emit(json.dumps({"pass": passed, "groups": found, "skipped": skipped}, indent=1))
    else:
        last = f"{sum(g.ok for g in groups)} of {len(groups)} groups pass"
        if skipped:
            last += f"; {len(skipped)} other files skipped"
        emit("\n".join([*map(report, groups), last]))
    return 0 if passed else 1
