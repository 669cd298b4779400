"""Record folders: are their files what submit and race write, and do they say what the logs say?"""

import datetime
import functools
import json
import math
import os
import re
import shlex
import stat

from records.tools import logs, stats
from records.tools.command import between, markdown, printable
from records.tools.logs import number
from records.tools.tracks import LOCAL_FLAGS, RUN_LOCAL, TRACKS, Track
from records.tools.verify import (
    Group,
    check_group,
    p_value,
    parse_flags,
    plus_minus,
    spread,
)

RECORDS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MAX_FOLDER = 100_000  # bytes of a record folder beside its train_gpt.py
MAX_SOURCE = 200_000  # bytes of that: room for a trainer, and not for weights or tables
NAME = re.compile(r"(\d{4}-\d\d-\d\d)_[A-Za-z0-9][A-Za-z0-9_-]{0,60}")
FILE = re.compile(r"README\.md|train_gpt\.py|result\.json|race\.json|run_(?:0|[1-9]\d{0,5})\.txt")
GAP = "(fill in"  # what an unfinished README says


# --------------------------------------------------------------------------------- what is written


def summary(group: Group) -> dict:
    """The content of result.json: what the logs say. KeyError where a result line lacks a key."""
    first = group.runs[0]
    runs = []
    for run in sorted(group.runs, key=lambda r: (r.seed, r.path)):
        keys = ("run_id", "seed", "steps", "tokens", "train_time_ms", "step_avg_ms")
        row = {key: run.result[key] for key in keys}
        row["val_loss"] = run.val_loss
        for key in ("warmup_ms", "peak_memory_bytes"):
            row[key] = run.result.get(key)
        runs.append(row)
    return {
        "track": group.track,
        "source_sha256": group.source_sha256,
        "n": len(runs),
        "target": group.target,
        "val_loss": spread([r.val_loss for r in group.runs]),
        "train_time_ms": spread([r["train_time_ms"] for r in runs]),
        "p_value": group.p_value,
        "peak_memory_bytes": max((r["peak_memory_bytes"] or 0 for r in runs), default=0),
        "param_count": first.result.get("param_count"),
        "optimizer_state_bytes": first.result.get("optimizer_state_bytes"),
        "device": first.header.get("device"),
        "cpu": first.header.get("cpu"),
        "torch": first.header.get("torch"),
        "world_size": first.header.get("world_size"),
        "data_sha256": first.data,
        "config": {k: v for k, v in first.config.items() if k not in RUN_LOCAL},
        "runs": runs,
    }


def record_table(result: dict) -> str:
    """The README table of a record, from its result.json."""
    lines = ["| seed | steps | val loss | train time | step avg |", "|---:|---:|---:|---:|---:|"]
    for r in result["runs"]:
        seconds = r["train_time_ms"] / 1000
        lines.append(
            f"| {r['seed']} | {r['steps']} | {r['val_loss']:.4f} | {seconds:.2f} s "
            f"| {r['step_avg_ms']:.2f} ms |"
        )
    time = plus_minus(result["train_time_ms"], 1000, 2)
    lines.append(f"| mean ± std | | {plus_minus(result['val_loss'])} | {time} s | |")
    p, device = result["p_value"], markdown(result["device"], 60)
    claim = (
        f"one-sided p = {p:.2g} that the mean loss is below it" if p is not None else "no p-value"
    )
    size = markdown(result["world_size"], 20)
    lines += ["", f"n = {result['n']}, target {result['target']:g}, {claim}, {device} × {size}."]
    return "\n".join(lines)


# --------------------------------------------------------------------------------------- the check


def check_record(folder, track=None, target=None, alpha=stats.ALPHA) -> Group:
    """A record folder: its files, its logs, and that the former say what the latter say."""
    folder = os.path.abspath(folder)
    name, parent = os.path.basename(folder), os.path.basename(os.path.dirname(folder))
    problems = check_files(folder)
    stored = read_json(os.path.join(folder, "result.json"), problems)
    named = stored.get("track") if stored else None
    place = parent if parent in TRACKS else None
    if place and stored and named != place:
        problems.append(
            f"result.json names track {printable(named, 20)}, but the folder is in {place}"
        )
    track = track or place or (named if isinstance(named, str) and named in TRACKS else None)
    code = os.path.join(folder, "train_gpt.py")
    sha = source_sha256(code)
    runs = [run for path in logs_of(folder) for run in logs.read_log(path)]
    if not runs:
        reasons = [*problems, "there is no run_*.txt"]
        return Group(name, sha, [], track=track, alpha=alpha, reasons=reasons)
    group = check_group(name, runs, track, target, alpha)
    group.reasons[:0] = problems + check_source(runs, sha)
    if track is None:
        group.reasons.append(
            f"the track is not known: put the folder into {', '.join(TRACKS)}, or name --track"
        )
    # The files state the record's own target and test, whatever --target asks on top of them.
    own = group if target is None else check_group(name, runs, track, None, alpha)
    if own.target is None:
        group.reasons.append("neither the track nor the config sets a target")
    elif stored is not None:
        group.reasons += check_result_file(own, stored) + check_readme(own, folder)
    if track is not None:
        group.reasons += check_copy(folder, track, sha, runs)
        group.reasons += check_date(group, name, TRACKS[track], sha)
        rank(group, folder, TRACKS[track], sha)
    return group


def source_sha256(path) -> str | None:
    """None where there is no source of a size that a record may have."""
    fits = is_file(path) and os.path.getsize(path) <= MAX_SOURCE
    return logs.sha256_file(path) if fits else None


def is_file(path) -> bool:
    """Whether this is a file and nothing else: no link, no device, no pipe."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False


def check_files(folder) -> list[str]:
    """Names, kinds and sizes, before anything is opened."""
    reasons, size = [], 0
    if os.path.islink(folder):
        reasons.append("the folder is a link: copy what it leads to")
    found = NAME.fullmatch(os.path.basename(folder))
    try:
        datetime.date.fromisoformat(found[1] if found else "")
    except ValueError:
        reasons.append("the folder's name is not <date>_<name>, of letters, digits, - and _")
    for name in sorted(set(os.listdir(folder)) - {"__pycache__"}):  # git ignores it
        path = os.path.join(folder, name)
        if not FILE.fullmatch(name):
            reasons.append(f"{printable(name, 60)} does not belong into a record folder")
        elif not is_file(path):
            reasons.append(f"{name} is not a regular file")
        elif name != "train_gpt.py":
            size += os.path.getsize(path)
        elif os.path.getsize(path) > MAX_SOURCE:
            reasons.append(
                f"train_gpt.py has {os.path.getsize(path)} bytes; {MAX_SOURCE} are allowed"
            )
    if size > MAX_FOLDER:
        reasons.append(f"the folder has {size} bytes beside train_gpt.py; {MAX_FOLDER} are allowed")
    return reasons


def check_source(runs, sha) -> list[str]:
    reasons = [] if sha else ["train_gpt.py is missing"]
    for run in runs:
        if run.style != "ours":
            reasons.append(f"{run.name}: has no config header: cut off or edited")
        if sha is not None and run.source_sha256 != sha:
            source = printable(run.source_sha256, 12)
            reasons.append(
                f"{run.name}: was made by source {source}, but train_gpt.py has {sha[:12]}"
            )
        if os.path.basename(run.path) != f"run_{run.seed}.txt":
            reasons.append(f"{run.name}: holds the run of seed {printable(run.seed, 12)}")
    return reasons


def check_result_file(group, stored) -> list[str]:
    """result.json against the logs."""
    try:
        expected = json.loads(json.dumps(summary(group)))
    except (KeyError, TypeError, ValueError, AttributeError):
        return ["result.json cannot be compared: the logs are not complete"]
    wrong = differences(expected, stored)[:10]
    return [f"result.json: {printable(where)} is not what the logs say" for where in wrong]


def differences(a, b, where="") -> list[str]:
    """Paths at which two JSON values differ; numbers may differ by one part in a million."""
    if isinstance(a, dict) and isinstance(b, dict):
        found = []
        for key in sorted(set(a) | set(b)):
            path = f"{where}.{key}".lstrip(".")
            found += differences(a[key], b[key], path) if key in a and key in b else [path]
        return found
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        pairs = enumerate(zip(a, b, strict=True))
        return [d for i, (x, y) in pairs for d in differences(x, y, f"{where}[{i}]")]
    x, y = number(a), number(b)
    if x is not None and y is not None:
        return [] if math.isclose(x, y, rel_tol=1e-6, abs_tol=1e-12) else [where]
    return [] if a == b and type(a) is type(b) else [where]


def check_readme(group, folder) -> list[str]:
    """The README's table against the logs, and that its sentences were written."""
    path = os.path.join(folder, "README.md")
    if not is_file(path):
        return ["README.md is missing"]
    with open(path, encoding="utf-8", errors="replace") as f:
        text = f.read(1 << 20)
    reasons = [f"README.md still says {GAP!r}"] if GAP in text.lower() else []
    try:
        table = record_table(json.loads(json.dumps(summary(group))))
    except (KeyError, TypeError, ValueError, AttributeError):
        return reasons
    found = between(text, "record:table")
    if found is None:
        reasons.append("README.md has no table between the comments record:table and /record:table")
    elif found.split() != table.split():
        reasons.append("README.md: the table is not what the logs say")
    return reasons


def siblings(folder, track) -> list[str]:
    """The other record folders of the track, where this one lies and in this repository."""
    places = dict.fromkeys([os.path.dirname(folder), os.path.join(RECORDS, track)])
    found = {}
    for place in filter(os.path.isdir, places):
        for name in sorted(os.listdir(place)):
            path = os.path.join(place, name)
            if name != os.path.basename(folder) and NAME.fullmatch(name) and os.path.isdir(path):
                found.setdefault(name, path)
    return list(found.values())


def identities(runs) -> set:
    """What tells runs apart: their ids; their losses and times."""
    measured = {(run.val_loss, run.val[-1][2]) for run in runs if run.val}
    return measured | {run.header.get("run_id") for run in runs} - {None}


@functools.cache
def identities_in(path, modified, size) -> set:
    """Those of the runs in a log; read again where the file has changed."""
    return identities(logs.read_log(path))


def check_copy(folder, track, sha, runs) -> list[str]:
    """That no other record of the track has this source, or one of these runs. Nothing tells which
    of two is the copy, so neither passes; but one that is settled is none."""
    reasons, mine = [], identities(runs)
    if TRACKS[track].settled.get(os.path.basename(folder)) == (sha or ""):
        return []
    for other in siblings(folder, track):
        name, code = os.path.basename(other), os.path.join(other, "train_gpt.py")
        if sha and source_sha256(code) == sha:
            reasons.append(
                f"train_gpt.py is that of {name}: a copy under another name is no record"
            )
        shared = mine & set().union(*map(identities_of, logs_of(other)))
        if shared:
            run = printable(min(map(str, shared)), 40)
            reasons.append(f"run {run} is one of {name}, too")
    return reasons


def logs_of(folder) -> list[str]:
    """A record folder's run_*.txt that are files, and no larger than a folder may be."""
    names = sorted(n for n in os.listdir(folder) if n.startswith("run_") and n.endswith(".txt"))
    paths = [os.path.join(folder, name) for name in names]
    return [path for path in paths if is_file(path) and os.path.getsize(path) <= MAX_FOLDER]


def identities_of(path) -> set:
    """Of the runs in a log."""
    found = os.stat(path)
    return identities_in(path, found.st_mtime_ns, found.st_size)


# ---------------------------------------------------------------------------------------- the race


def check_date(group: Group, name: str, track: Track, sha) -> list[str]:
    """That a record is not dated before what was there first."""
    reasons, newest = [], max(track.settled, default="")
    if name in track.settled and track.settled[name] != sha:
        reasons.append("its train_gpt.py is not the one that is settled under this name")
    if name not in track.settled and name < newest:
        reasons.append(f"it is dated before {newest}, which was here first")
    started = max(str(run.header.get("run_id"))[:10] for run in group.runs)
    if re.fullmatch(r"[0-9-]{10}", started) and started > name[:10]:
        reasons.append(f"it is dated before its own runs, the last of {started}")
    return reasons


def rank(group: Group, folder, track: Track, sha):
    """Whether the folder has a place on the board: on a raced track, by its race.json."""
    path = os.path.join(folder, "race.json")
    name = os.path.basename(folder)
    if not track.raced:
        if os.path.lexists(path):
            group.reasons.append("race.json: this track is not ranked by race; leave it out")
        return
    if not os.path.lexists(path):
        others = [other for other in siblings(folder, group.track) if logs_of(other)]
        earlier = [os.path.basename(other) for other in others if os.path.basename(other) < name]
        first = name == min(track.settled) if track.settled else not earlier
        if not first:
            group.reasons.append("race.json is missing: all but the track's first record are raced")
        return
    for run in group.runs:
        for flag in foreign_flags(run.header.get("argv", "").split(), track):
            group.reasons.append(
                f"{run.name}: was started with --{printable(flag, 40)}; what a record is has to"
                f" stand in its train_gpt.py, which is what is raced"
            )
    reasons = []
    race = read_json(path, reasons)
    if race is not None:
        early = track.settled.get(name) == sha and name <= track.early
        reasons += check_race(race, group, folder, sha, early)
        lost = "" if reasons else why_not_faster(race)
        if lost and early:
            group.unranked = lost
        elif lost:
            reasons.append(lost)
    group.reasons += [f"race.json: {reason}" for reason in reasons]


def check_race(race, group: Group, folder, sha, early: bool) -> list[str]:
    """That a race was of these sources, by the rules, and that its numbers fit each other."""
    track = TRACKS[group.track]
    reasons = check_entries(race, folder, group.track, sha)
    reasons += check_flags(race, track)
    margin, alpha = number(race.get("loss_margin")), number(race.get("alpha"))
    if margin is None or margin != stats.LOSS_MARGIN and not early:
        shown = printable(race.get("loss_margin"), 20)
        reasons.append(f"the loss margin is {shown}; records are raced at {stats.LOSS_MARGIN:g}")
    if alpha != stats.ALPHA:
        reasons.append(f"alpha is {printable(race.get('alpha'), 20)}; records need {stats.ALPHA:g}")
    if margin is None:
        return reasons
    reasons += check_times(race, track, margin)
    return reasons if early else reasons + check_same_runs(race, group)


def check_same_runs(race, group: Group) -> list[str]:
    """That the folder holds the candidate's runs, all of them: the same losses, seed by seed."""
    logged = [run.val_loss for run in sorted(group.runs, key=lambda run: number(run.seed) or 0)]
    raced = columns(race, "losses")["candidate"]
    reasons = []
    if differences(logged, raced):
        reasons.append("its candidate's losses are not those of the runs here, seed by seed")
    if race.get("failures") != []:
        reasons.append("runs failed in it: race again")
    return reasons


def check_entries(race, folder, track: str, sha) -> list[str]:
    """The two sources, and the record that was raced against."""
    reasons, sources = [], race.get("source_sha256")
    sources = sources if isinstance(sources, dict) else {}
    if sources.get("candidate") != sha:
        reasons.append(
            "the candidate was another source than train_gpt.py, or is not named by hash"
        )
    name = reference_of(race)
    shown, mine = printable(name, 60), os.path.basename(folder)
    known = {os.path.basename(other): other for other in siblings(folder, track)}
    if name == mine or sources.get("reference") == sha:
        return [*reasons, "it is a race against itself"]
    if name not in known:
        return [*reasons, f"the reference {shown!r} is no other record of this track"]
    code = os.path.join(known[name], "train_gpt.py")
    if source_sha256(code) is None or source_sha256(code) != sources.get("reference"):
        reasons.append(f"the reference was another source than record {name}, or has no hash")
    if name > mine:
        reasons.append(f"the reference {shown} is a later record, by the order of the names")
    return reasons


def reference_of(race) -> str:
    """Name of the record that was raced against."""
    try:
        path = [*shlex.split(printable(race.get("reference"), 1000)), ""][0]
    except ValueError:
        path = ""
    return os.path.basename(path.removesuffix("/train_gpt.py").rstrip("/"))


def check_flags(race, track: Track) -> list[str]:
    """Only flags of the track: what a record is stands in its train_gpt.py."""
    reasons = []
    for who in ("reference", "candidate", "flags"):
        given = race.get(who)
        try:
            words = shlex.split(given) if isinstance(given, str) else ["--"]
        except ValueError:
            words = ["--"]
        own = foreign_flags(words, track, local=()) if who == "flags" else parse_flags(words)
        for name in own:
            reasons.append(f"{who} had --{printable(name, 40)}, which is no flag of the track")
        if who == "flags" and words and not words[0].startswith("--"):
            reasons.append(f"flags begin with {printable(words[0], 40)}, which is none")
        if who != "flags" and len(words) != 1:
            reasons.append(f"{who} is not one path: {printable(given, 60)}")
    return reasons


def foreign_flags(words, track: Track, local=LOCAL_FLAGS) -> list[str]:
    """Flags that say what is computed, beside the track's preset and when to validate."""
    flags = parse_flags(words)
    if track.preset is None or flags.get("preset") == [track.preset]:
        flags.pop("preset", None)
    return [name for name in flags if name != "val_every" and name not in local]


def check_times(race, track: Track, margin: float) -> list[str]:
    """Times and losses: there, pair by pair, and what the other numbers follow from."""
    times, losses = columns(race, "times_ms"), columns(race, "losses")
    counts = {len(column) for found in (times, losses) for column in found.values()}
    if len(counts) != 1 or counts == {0}:
        return ["it needs times_ms and losses of reference and candidate, pair by pair, above 0"]
    n, reasons = counts.pop(), []
    found = stats.compare(times, losses, margin)
    for key in ("n", "ratio", "ci", "p_value", "p_slower", "p_loss_not_worse", "p_loss_worse"):
        if key not in race or differences(found[key], race[key]):
            given = printable(race.get(key), 60)
            reasons.append(f"{key} {given} does not follow from its times and losses")
    reasons += check_looks(race, n)
    if len({b / a for a, b in zip(times["reference"], times["candidate"], strict=True)}) == 1:
        reasons.append("all pairs have the same ratio of times, which no machine measures")
    for who, column in losses.items():
        p, why = p_value(column, track.target)
        if p is None or not p < stats.ALPHA:
            why = why or f"p = {p:.2g}"
            reasons.append(f"the {who}'s losses are not shown to be below {track.target:g}: {why}")
    if track.world_size is not None and race.get("processes") != track.world_size:
        given = printable(race.get("processes"), 20)
        reasons.append(f"it ran {given} processes; the track demands {track.world_size}")
    if race.get("same_data") is not True:
        reasons.append("the two did not read the same data")
    return reasons


def check_looks(race, n: int) -> list[str]:
    """That the race ended after one of the looks that its plan has, and decided at their level."""
    planned, looks = number(race.get("runs_planned")), race.get("looks")
    if planned is None or planned % 1 or n > planned or n < stats.MIN_PAIRS:
        given = printable(race.get("runs_planned"), 20)
        return [f"{n} pairs of {given} planned; at least {stats.MIN_PAIRS} are needed"]
    plans = [stats.planned_looks(int(planned), k) for k in range(1, min(int(planned), 100) + 1)]
    if looks not in plans:
        return [f"looks {printable(looks, 40)} are not those of {planned:g} rounds"]
    if n not in looks:
        return [f"it has {n} pairs, but would end after {printable(looks, 40)}"]
    if differences(race.get("level_per_look"), stats.ALPHA / len(looks)):
        return ["level_per_look is not alpha over the number of looks"]
    return []


def columns(race, key) -> dict[str, list[float]]:
    """The numbers under `key`, of reference and candidate; empty where one cannot be a time in ms
    or a loss."""
    found = race.get(key) if isinstance(race.get(key), dict) else {}
    both = {}
    for who in ("reference", "candidate"):
        column = found.get(who) if isinstance(found.get(who), list) else []
        values = [number(value) for value in column]
        both[who] = values if all(value and 1e-3 < value < 1e12 for value in values) else []
    return both


def why_not_faster(race) -> str:
    """Empty where the race's own times and losses show at the default margin that the candidate is
    faster; else what they do not show."""
    found = stats.compare(columns(race, "times_ms"), columns(race, "losses"), stats.LOSS_MARGIN)
    level = stats.ALPHA / len(race["looks"])
    decided = stats.verdict(found, level)
    if decided == "yes" and race.get("faster") == "yes":
        return ""
    if decided == "yes":
        return f"its verdict is {printable(race.get('faster'), 20)!r}"
    if found["p_value"] >= level:
        return f"it does not show less time: ratio {found['ratio']:.3f}, p = {found['p_value']:.2g}"
    worse = found["loss_candidate"]["mean"] - found["loss_reference"]["mean"]
    return (
        f"it does not show a loss as good: {worse:+.4f} against the reference, "
        f"p = {found['p_loss_not_worse']:.2g} at a margin of {stats.LOSS_MARGIN:g}"
    )


def read_json(path, problems) -> dict | None:
    """The JSON object in a small file, or None with the problem noted."""
    name = os.path.basename(path)
    if not is_file(path):
        problems.append(f"{name} is missing, or not a regular file")
        return None
    try:
        with open(path, "rb") as f:
            value = logs.parse_json(f.read(1 << 20))
    except OSError as error:
        problems.append(f"{name}: {error.strerror}")
        return None
    if not isinstance(value, dict):
        problems.append(f"{name} is not a JSON object")
        return None
    return value
