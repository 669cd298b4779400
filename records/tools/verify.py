"""Decide whether training logs support their claim: python -m records verify PATH...

PATH is a record folder, a log, or a folder of logs at any depth. Runs are grouped by identical source; each group gets
its statistics, a verdict, and every reason. Nothing that is read is run. Exit code 0: all pass, 1: some fail,
2: misuse.

The statistical claim is "the mean final validation loss is below the target": a one-sided t-test over the runs, so one
run never proves it. Groups without any target (public logs, no --target) are checked for consistency only.
"""

import glob
import hashlib
import json
import math
import os
from dataclasses import dataclass, field

import numpy as np

from records.tools import logs, stats
from records.tools.command import BadInput, Parser, between, command, emit, printable
from records.tools.logs import TRACKS, Run, number

ALPHA = 0.01
MAX_FOLDER = 100_000  # bytes of a record folder beside its train_gpt.py
LOG_SUFFIXES = (".txt", ".log", ".out", ".stdout")
# Config fields that say where and how a run was started, not what it computed. The data is named by its hashes.
RUN_LOCAL = (
    "seed",
    "log_dir",
    "argv",
    "run_id",
    "train_files",
    "val_files",
    "micro_batch",
    "rank_timeout",
    "resume",
    "resume_anyway",
    "checkpoint",
    "checkpoint_dir",
    "checkpoint_every",
    "checkpoint_keep",
    "generate",
    "generate_tokens",
    "temperature",
)


@dataclass
class Group:
    """Runs of one source, and what verify thinks of them."""

    name: str
    source_sha256: str | None
    runs: list[Run]
    track: str | None = None
    target: float | None = None
    alpha: float = ALPHA
    p_value: float | None = None
    reasons: list[str] = field(default_factory=list)  # each one is a failure
    notes: list[str] = field(default_factory=list)  # what could not be checked, and other remarks

    @property
    def ok(self) -> bool:
        return not self.reasons

    def as_dict(self) -> dict:
        return dict(
            name=self.name,
            source_sha256=self.source_sha256,
            track=self.track,
            n=len(self.runs),
            val_loss=spread([r.val_loss for r in self.runs]),
            train_time_ms=spread([r.train_time for r in self.runs]),
            target=self.target,
            alpha=self.alpha,
            p_value=self.p_value,
            **{"pass": self.ok},
            reasons=self.reasons,
            notes=self.notes,
            runs=[
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
            ],
        )


def spread(values) -> dict:
    """Mean, sample standard deviation and best (least) of the values that are there."""
    values = [v for v in values if v is not None]
    return stats.mean_std(values) | {"best": min(values, default=None)}


def p_value(losses, target: float) -> tuple[float | None, str]:
    """One-sided p-value of "the mean loss is below target", or None and the reason why there is none."""
    if len(losses) < 2:
        return (
            None,
            "one run proves nothing about the mean: at least two are needed, with different seeds",
        )
    if np.ptp(losses) < 1e-9:
        return (
            None,
            f"all {len(losses)} losses are equal: no test is possible, and the seeds cannot have worked",
        )
    return stats.p_less(losses, target), ""


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
        reasons.append(
            f"is cut off: its last validation is at step {run.val[-1][0]} of {run.planned} planned"
        )
    if run.style == "ours":
        reasons += check_result(run)
    if track is not None:
        reasons += check_track(run, track)
    return reasons


def check_result(run: Run) -> list[str]:
    """The result line against the step lines, the header and itself."""
    result, config = run.result, run.config
    if result is None or config is None or run.data is None:
        return [
            f"has no {what} line: cut off or edited"
            for what, value in (("config", config), ("data", run.data), ("result", result))
            if value is None and not any(f" {what} line" in p for p in run.problems)
        ]
    reasons = []

    def equal(what, a, b, tolerance=0.0):
        x, y = number(a), number(b)
        if (a is None or a != b) if x is None or y is None else abs(x - y) > tolerance:
            reasons.append(f"{what} do not agree: {printable(a, 40)} and {printable(b, 40)}")

    steps, time = number(result.get("steps")), number(result.get("train_time_ms"))
    if run.val:
        equal(
            "val_loss of the last line and of the result",
            run.val[-1][1],
            result.get("val_loss"),
            0.51e-4,
        )
        equal("train_time of the last line and of the result", run.val[-1][2], time, 1.0)
    equal("planned steps and the result's steps", run.planned, result.get("steps"))
    equal("steps of config and result", config.get("steps"), result.get("steps"))
    if steps and time is not None:
        equal(
            "step_avg_ms and train_time_ms over steps",
            result.get("step_avg_ms"),
            time / steps,
            0.006 + 0.6 / steps,
        )
    if steps is not None and run.batch_tokens is not None:
        equal("tokens and steps x batch_tokens", result.get("tokens"), steps * run.batch_tokens)
    else:
        reasons.append("config has no batch_tokens")
    for key in ("seed", "val_tokens"):
        equal(f"{key} of config and result", config.get(key), result.get(key))
    equal("config of header and result", digest(config), digest(result.get("config")))
    equal("data hashes of header and result", digest(run.data), digest(result.get("data_sha256")))
    equal(
        "source_sha256 of header and result",
        run.header.get("source_sha256"),
        result.get("source_sha256"),
    )
    equal("run_id of header and result", run.header.get("run_id"), result.get("run_id"))
    equal(
        "world_size of header and result",
        run.header.get("world_size"),
        str(result.get("world_size")),
    )
    equal("device of header and result", run.header.get("device"), result.get("device"))
    target, loss = number(config.get("target")), number(result.get("val_loss"))
    if target is not None:
        equal("target of config and result", target, result.get("target_val_loss"))
        if (
            loss is not None and abs(loss - target) > 1e-6
        ):  # the result line rounds the loss to six decimals
            equal(
                "target_reached and val_loss <= target",
                result.get("target_reached"),
                loss <= target,
            )
    if not run.data:
        reasons.append("names no data file")
    for name, sha in run.data.items():
        if not (isinstance(sha, str) and len(sha) == 64 and set(sha) <= set("0123456789abcdef")):
            reasons.append(f"data hash of {printable(name, 60)} is not a sha256")
    return reasons


def digest(value) -> str:
    """A short name for a JSON value, equal for equal values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def check_track(run: Run, track: str) -> list[str]:
    """What the track demands of each run."""
    rules, reasons = TRACKS[track], []
    if run.style != "ours":
        return [
            f"is not a log of this repository: no config, seed or data hashes, which track {track} needs"
        ]
    val_tokens = (run.config or {}).get("val_tokens")
    if rules["val_tokens"] is not None and val_tokens != rules["val_tokens"]:
        reasons.append(
            f"validates on {printable(val_tokens, 20)} tokens; track {track} demands {rules['val_tokens']}"
        )
    world_size, device = run.header.get("world_size", "?"), run.header.get("device", "?")
    if rules["world_size"] is not None and world_size != str(rules["world_size"]):
        reasons.append(
            f"ran on {printable(world_size, 20)} processes; track {track} demands {rules['world_size']}"
        )
    wanted = rules["device"]
    on_cpu = device.strip().lower() == "cpu"
    if wanted and not (
        on_cpu if wanted == "CPU" else not on_cpu if wanted == "GPU" else wanted in device
    ):
        reasons.append(f"ran on {printable(device, 40)!r}; track {track} demands {wanted}")
    for name, sha in (run.data or {}).items():
        if not name.startswith(rules["data"]):
            reasons.append(
                f"used {printable(name, 60)}; track {track} demands {rules['data']} shards"
            )
        elif rules["files"] and rules["files"].get(name) != sha:
            reasons.append(
                f"used a {printable(name, 60)} that is not track {track}'s: sha256 {printable(sha, 12)}"
            )
    if rules["files"] and set(rules["files"]) - set(run.data or {}):
        reasons.append(
            f"did not use {', '.join(sorted(set(rules['files']) - set(run.data or {})))}"
        )
    if not rules["resumed"] and (run.resumed or (run.result or {}).get("resumed")):
        reasons.append(f"was resumed from a checkpoint; track {track} demands uninterrupted runs")
    return reasons


def check_group(name, runs, track=None, target=None, alpha=ALPHA) -> Group:
    """Checks on each run, on the runs together, and the statistical claim."""
    group = Group(name, runs[0].source_sha256, runs, track=track, alpha=alpha)
    for run in runs:
        group.reasons += [f"{run.name}: {reason}" for reason in check_run(run, track)]
    if group.source_sha256 is None:
        group.reasons.append("no source: the log neither holds nor names the code that made it")
    ours = [r for r in runs if r.style == "ours" and r.config is not None]
    if 0 < len(ours) < len(runs) and any(r.style == "public" for r in runs):
        group.reasons.append("some logs of one source have a config line and some have none")

    same(
        group,
        "config",
        {r.name: {k: v for k, v in r.config.items() if k not in RUN_LOCAL} for r in ours},
    )
    same(group, "data", {r.name: r.data for r in ours if r.data is not None})
    for key in ("world_size", "device"):
        if len(values := {r.header.get(key) for r in ours}) > 1:
            group.reasons.append(
                f"{key} differs between the runs: {', '.join(sorted(printable(v) for v in values))}"
            )
    for key in ("torch", "cuda", "driver", "cpu"):
        if len(values := {r.header.get(key) for r in ours}) > 1:
            group.notes.append(
                f"{key} differs between the runs: {', '.join(sorted(printable(v) for v in values))}"
            )
    repeated(group, "seed {}", [(printable(r.seed, 30), r) for r in ours])
    # Two runs that agree in every validation loss and time are one run.
    repeated(group, "the same validation lines", [(str(r.val), r) for r in runs if r.train_time])
    if len(ours) < len(runs):
        group.notes.append(
            "not our log format: seeds, config, data hashes and token counts could not be checked"
        )
    targets = {number(r.config.get("target")) for r in ours} - {None}
    rule = TRACKS[track]["target"] if track else None
    group.target = next((t for t in (target, rule, *sorted(targets)[:1]) if t is not None), None)
    losses = [r.val_loss for r in runs if r.val_loss is not None]
    if group.target is None:
        group.notes.append("no target: consistency only (--target X tests the mean loss)")
        return group
    group.p_value, reason = p_value(losses, group.target)
    if group.p_value is None:
        group.reasons.append(reason)
    elif not group.p_value < alpha:
        group.reasons.append(
            f"mean val loss {np.mean(losses):.5f} is not shown to be below {group.target:g}: "
            f"p = {group.p_value:.2g}, needed < {alpha:g}"
        )
    return group


def same(group, what, by_name):
    """All values alike, key by key."""
    first, *others = by_name.items() or [("", {})]
    for name, value in others:
        keys = sorted(k for k in set(value) | set(first[1]) if value.get(k) != first[1].get(k))
        if keys:
            group.reasons.append(
                f"{what} differs between {first[0]} and {name}: {printable(', '.join(keys))}"
            )


def repeated(group, what, pairs):
    seen = {}
    for key, run in pairs:
        if key in seen:
            group.reasons.append(
                f"{seen[key].name} and {run.name} have {what.format(key)}: not independent runs"
            )
        seen.setdefault(key, run)


def summary(group: Group) -> dict:
    """The content of a record's result.json: only what the logs say. KeyError where a result line lacks a key."""
    first = group.runs[0]
    runs = []
    for run in sorted(group.runs, key=lambda r: (r.seed, r.path)):
        row = {
            k: run.result[k]
            for k in ("run_id", "seed", "steps", "tokens", "train_time_ms", "step_avg_ms")
        }
        row.update(
            val_loss=run.val_loss,
            warmup_ms=run.result.get("warmup_ms"),
            peak_memory_bytes=run.result.get("peak_memory_bytes"),
        )
        runs.append(row)
    return dict(
        track=group.track,
        source_sha256=group.source_sha256,
        n=len(runs),
        target=group.target,
        val_loss=spread([r.val_loss for r in group.runs]),
        train_time_ms=spread([r["train_time_ms"] for r in runs]),
        p_value=group.p_value,
        peak_memory_bytes=max((r["peak_memory_bytes"] or 0 for r in runs), default=0),
        param_count=first.result.get("param_count"),
        optimizer_state_bytes=first.result.get("optimizer_state_bytes"),
        device=first.header.get("device"),
        cpu=first.header.get("cpu"),
        torch=first.header.get("torch"),
        world_size=first.header.get("world_size"),
        data_sha256=first.data,
        config={k: v for k, v in first.config.items() if k not in RUN_LOCAL},
        runs=runs,
    )


def plus_minus(values: dict, scale=1.0, digits=4) -> str:
    """ "1.4987 ± 0.0012" of a dict made by spread()."""
    text = f"{values['mean'] / scale:.{digits}f}"
    return text if values["std"] is None else f"{text} ± {values['std'] / scale:.{digits}f}"


def record_table(result: dict) -> str:
    """The README table of a record, from its result.json."""
    lines = ["| seed | steps | val loss | train time | step avg |", "|---:|---:|---:|---:|---:|"]
    for r in result["runs"]:
        lines.append(
            f"| {r['seed']} | {r['steps']} | {r['val_loss']:.4f} | {r['train_time_ms'] / 1000:.2f} s "
            f"| {r['step_avg_ms']:.2f} ms |"
        )
    lines.append(
        f"| mean ± std | | {plus_minus(result['val_loss'])} "
        f"| {plus_minus(result['train_time_ms'], 1000, 2)} s | |"
    )
    p = result["p_value"]
    lines += [
        "",
        f"n = {result['n']}, target {result['target']:g}, "
        + ("no p-value" if p is None else f"one-sided p = {p:.2g} that the mean loss is below it")
        + f", {printable(result['device'], 60)} × {printable(result['world_size'], 20)}.",
    ]
    return "\n".join(lines)


def differences(a, b, where="") -> list[str]:
    """Paths at which two JSON values differ; numbers may differ by one part in a million."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [
            d
            for k in sorted(set(a) | set(b))
            for d in (
                differences(a[k], b[k], f"{where}.{k}".lstrip("."))
                if k in a and k in b
                else [f"{where}.{k}".lstrip(".")]
            )
        ]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f"{where}[{i}]")]
    x, y = number(a), number(b)
    if x is not None and y is not None:
        return [] if math.isclose(x, y, rel_tol=1e-6, abs_tol=1e-12) else [where]
    return [] if a == b and type(a) is type(b) else [where]


def is_record(folder) -> bool:
    has_code = os.path.isfile(os.path.join(folder, "train_gpt.py"))
    has_result = os.path.isfile(os.path.join(folder, "result.json"))
    has_logs = any(True for _ in glob.iglob(os.path.join(glob.escape(folder), "run_*.txt")))
    return has_code + has_result + has_logs >= 2


def check_record(folder, track=None, target=None, alpha=ALPHA) -> Group:
    """A record folder: its logs, and that its files say what the logs say."""
    folder = os.path.abspath(folder)
    name, parent = os.path.basename(folder), os.path.basename(os.path.dirname(folder))
    problems = []
    stored = read_json(os.path.join(folder, "result.json"), problems)
    named = stored.get("track") if isinstance(stored, dict) else None
    place = parent if parent in TRACKS else None
    if place and isinstance(stored, dict) and named != place:
        problems.append(
            f"result.json names track {printable(named, 20)}, but the folder is in {place}"
        )
    track = track or place or (named if isinstance(named, str) and named in TRACKS else None)
    paths = sorted(glob.glob(os.path.join(glob.escape(folder), "run_*.txt")))
    runs = [run for path in paths for run in logs.read_log(path)]
    code = os.path.join(folder, "train_gpt.py")
    sha = logs.sha256_file(code) if os.path.isfile(code) else None
    if sha is None:
        problems.append("train_gpt.py is missing")
    if not runs:
        return Group(
            name, sha, [], track=track, alpha=alpha, reasons=problems + ["there is no run_*.txt"]
        )
    for run in runs:
        if run.style != "ours":
            problems.append(f"{run.name}: has no config header: cut off or edited")
        if sha is not None and run.source_sha256 != sha:
            problems.append(
                f"{run.name}: was made by source {printable(run.source_sha256, 12)}, "
                f"but train_gpt.py has {sha[:12]}"
            )
    group = check_group(name, runs, track, target, alpha)
    group.reasons[:0] = problems
    size = sum(
        os.path.getsize(os.path.join(top, f))
        for top, _, files in os.walk(folder)
        for f in files
        if os.path.join(top, f) != code and "__pycache__" not in top
    )
    if size > MAX_FOLDER:
        group.reasons.append(
            f"the folder has {size} bytes beside train_gpt.py; at most {MAX_FOLDER} are allowed"
        )
    if track is None:
        group.reasons.append(
            f"the track is not known: put the folder into one of {', '.join(TRACKS)}, or give --track"
        )
    # The files state the record's own target and test, whatever --target asks on top of them.
    own = group if target is None else check_group(name, runs, track, None, alpha)
    if own.target is None:
        group.reasons.append("neither the track nor the config sets a target")
    elif stored is not None:
        group.reasons += check_files(own, folder, stored)
    if os.path.lexists(os.path.join(folder, "race.json")):
        group.reasons += check_race(folder, sha)
    return group


def check_race(folder, sha) -> list[str]:
    """race.json: of this source, against the source of the reference it names, and its ratio fits its times."""
    problems = []
    race = read_json(os.path.join(folder, "race.json"), problems)
    if race is None:
        return problems
    sources, times = race.get("source_sha256"), race.get("times_ms")
    sources, times = (value if isinstance(value, dict) else {} for value in (sources, times))
    if sources.get("candidate", sha) != sha:
        problems.append("race.json: the candidate was another source than train_gpt.py")
    reference = (
        (printable(race.get("reference"), 1000).split() or [""])[0]
        .removesuffix("/train_gpt.py")
        .rstrip("/")
    )
    code = os.path.join(os.path.dirname(folder), os.path.basename(reference), "train_gpt.py")
    if (
        "reference" in sources
        and os.path.isfile(code)
        and logs.sha256_file(code) != sources["reference"]
    ):
        problems.append("race.json: the reference was another source than the record of that name")
    ratio, interval = number(race.get("ratio")), race.get("ci")
    if ratio is None or ratio <= 0:
        return problems + ["race.json has no ratio above 0"]
    if not (
        isinstance(interval, list)
        and len(interval) == 2
        and None not in map(number, interval)
        and interval[0] <= ratio <= interval[1]
    ):
        problems.append("race.json: ci is not an interval around the ratio")
    a, b = (
        times.get(k) if isinstance(times.get(k), list) else [] for k in ("reference", "candidate")
    )
    if a and len(a) == len(b) and all(number(x) and x > 0 for x in a + b):
        expected = math.exp(sum(math.log(y / x) for x, y in zip(a, b)) / len(a))
        if not math.isclose(ratio, expected, rel_tol=1e-6):
            problems.append(
                f"race.json: ratio {ratio:.4f} does not fit its times, which give {expected:.4f}"
            )
    elif times:
        problems.append("race.json: its times are not pairs of positive numbers")
    return problems


def check_files(group, folder, stored) -> list[str]:
    """result.json and the README table against the logs."""
    try:
        expected = json.loads(json.dumps(summary(group)))
        table = record_table(expected)
    except (KeyError, TypeError, ValueError, AttributeError):
        return ["result.json cannot be compared: the logs are not complete"]
    reasons = [
        f"result.json: {printable(where)} is not what the logs say"
        for where in differences(expected, stored)[:10]
    ]
    try:
        with open(os.path.join(folder, "README.md"), encoding="utf-8", errors="replace") as f:
            found = between(f.read(1 << 20), "record:table")
    except OSError:
        return reasons + ["README.md is missing"]
    if found is None:
        reasons.append(
            "README.md has no table between <!-- record:table --> and <!-- /record:table -->"
        )
    elif found.split() != table.split():
        reasons.append("README.md: the table is not what the logs say")
    return reasons


def read_json(path, problems):
    """The JSON object in a small file, or None with the problem noted."""
    name = os.path.basename(path)
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


def unreadable(error: OSError):
    """os.walk would pass over a folder that it cannot read; a verdict must not."""
    raise error


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

    return (
        [p for p in records if fresh(p)],
        [p for p in named if fresh(p)],
        [p for p in found if fresh(p)],
    )


def is_foreign(run: Run) -> bool:
    """A text file in a folder of logs that is no log: no step line, and it does not begin like a trainer's source."""
    if (
        run.style != "none"
        or run.source_bytes
        or run.header
        or not any("no step line" in p for p in run.problems)
    ):
        return False
    with open(run.path, "rb") as f:
        head = f.read(100).lstrip()
    return os.path.basename(run.path).startswith("requirements") or not head.startswith(
        (b'"', b"'", b"#", b"=", b"import", b"from")
    )


def verify(paths, track=None, target=None, alpha=ALPHA) -> tuple[list[Group], list[str]]:
    """Groups with verdicts, and files in folders that are no logs."""
    records, named, found = collect(paths)
    groups = [check_record(folder, track, target, alpha) for folder in records]
    by_source, skipped = {}, []
    for path in named + found:
        for run in logs.read_log(path):
            if path in found and is_foreign(run):
                skipped.append(path)
                continue
            # Logs without any source are one group per folder if they hold runs, else each stands alone.
            key = run.source_sha256 or (
                run.path if run.style == "none" else os.path.dirname(run.path) + "/"
            )
            by_source.setdefault(key, []).append(run)
    for runs in by_source.values():
        folders = sorted({os.path.dirname(r.path) for r in runs})
        name = (
            runs[0].path
            if len(runs) == 1
            else folders[0] or "."
            if len(folders) == 1
            else os.path.commonpath([os.path.abspath(f) for f in folders])
        )
        groups.append(check_group(name, runs, track, target, alpha))
    return groups, skipped


def report(group: Group) -> str:
    """The verdict as text."""
    val, time = (
        spread([getattr(r, key) for r in group.runs]) for key in ("val_loss", "train_time")
    )
    lines = [
        f"{'PASS' if group.ok else 'FAIL'}  {printable(group.name)}  ({len(group.runs)} "
        f"run{'s' * (len(group.runs) != 1)}, source {(group.source_sha256 or 'unknown')[:12]}"
        + (f", track {group.track})" if group.track else ")")
    ]
    if val["mean"] is not None:
        lines.append(
            f"      val loss    {plus_minus(val, 1, 5)}, best {val['best']:.5f}"
            + (f", target {group.target:g}" if group.target is not None else "")
            + (f", p = {group.p_value:.2g}" if group.p_value is not None else "")
        )
    if time["mean"] is not None:
        lines.append(
            f"      train time  {plus_minus(time, 1000, 2)} s, best {time['best'] / 1000:.2f} s"
        )
    lines += [f"      - {printable(reason, 300)}" for reason in group.reasons]
    lines += [f"      note: {printable(note, 300)}" for note in group.notes]
    return "\n".join(lines)


@command("verify")
def main(argv) -> int:
    parser = Parser("verify", __doc__, epilog="exit code: 0 all pass, 1 some fail, 2 misuse")
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="PATH",
        help="record folder, log, or folder of logs at any depth",
    )
    parser.add_argument(
        "--target", type=float, help="loss to reach (default: the track's, else the logs' own)"
    )
    parser.add_argument(
        "--alpha", type=float, default=ALPHA, help="level of the test (default %(default)s)"
    )
    parser.add_argument(
        "--track", choices=sorted(TRACKS), help="hold every group to this track's rules"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    args = parser.parse_args(argv)
    if args.target is not None and not (math.isfinite(args.target) and args.target > 0):
        raise BadInput("--target must be a positive number")
    if not 0 < args.alpha < 1:
        raise BadInput("--alpha must lie between 0 and 1")
    for path in args.paths:
        if not os.path.lexists(path):
            raise BadInput(
                f"{printable(path)} does not exist; give a record folder, a log, or a folder of logs"
            )
    try:
        groups, skipped = verify(args.paths, args.track, args.target, args.alpha)
    except OSError as error:
        raise BadInput(
            f"cannot read {printable(error.filename)}: {error.strerror}; check its permissions"
        )
    if not groups:
        raise BadInput(
            f"no log in {printable(' '.join(args.paths))}; logs end in {', '.join(LOG_SUFFIXES)}"
        )
    passed = all(g.ok for g in groups)
    if args.json:
        emit(
            json.dumps(
                {"pass": passed, "groups": [g.as_dict() for g in groups], "skipped": skipped},
                indent=1,
            )
        )
    else:
        last = f"{sum(g.ok for g in groups)} of {len(groups)} groups pass"
        if skipped:
            last += f"; {len(skipped)} other files skipped"
        emit("\n".join([report(group) for group in groups] + [last]))
    return 0 if passed else 1
