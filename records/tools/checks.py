"""What is wrong with runs, one alone and several together. Reading only.

Consistency shows mistakes and careless edits. A forgery from which everything else follows cannot
be seen by reading: `verify --rerun` runs it again."""

import datetime
import hashlib
import json
import re
from dataclasses import dataclass, field

from records.tools import stats
from records.tools.command import printable
from records.tools.logs import Run, number
from records.tools.tracks import RUN_LOCAL, TRACKS

LATER = (0.05, 1000.0)  # share and ms by which the result's time may be later than the last line's
RUN_ID = re.compile(r"(\d{4}-\d\d-\d\d)_\d\d-\d\d-\d\d_\w{1,40}")


@dataclass
class Group:
    """Runs of one source, and what is thought of them."""

    name: str
    source_sha256: str | None
    runs: list[Run]
    track: str | None = None
    target: float | None = None
    alpha: float = stats.ALPHA
    p_value: float | None = None
    reasons: list[str] = field(default_factory=list)  # each one is a failure
    notes: list[str] = field(default_factory=list)  # what could not be checked, other remarks

    @property
    def ok(self) -> bool:
        return not self.reasons

    @property
    def val_loss(self) -> dict:
        return spread([run.val_loss for run in self.runs])

    @property
    def train_time(self) -> dict:
        return spread([run.train_time for run in self.runs])

    def refuse(self, wrong, reason: str):
        if wrong:
            self.reasons.append(reason)


def spread(values) -> dict:
    """Mean, sample standard deviation and best (least) of the values that are there."""
    values = [v for v in values if v is not None]
    return stats.mean_std(values) | {"best": min(values, default=None)}


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
        return reasons or ["has no step line: cut off"]
    if run.planned is None:
        reasons.append("does not say how many steps were planned")
    if not run.val:
        reasons.append("has no validation line")
    elif run.planned not in (None, run.val[-1][0]):
        last = run.val[-1][0]
        reasons.append(
            f"is cut off: its last validation is at step {last} of {run.planned} planned"
        )
    if run.style == "ours":
        reasons += check_result(run)
    if track is not None:
        reasons += check_track(run, track)
    return reasons


def check_result(run: Run) -> list[str]:
    """The result line against the step lines, the header and itself."""
    result, config, header = run.result, run.config, run.header
    parts = {"config": config, "data": run.data, "result": result}
    known = " ".join(run.problems)
    missing = [what for what, value in parts.items() if value is None]
    if missing:
        lacking = [what for what in missing if f" {what} line" not in known]
        return [f"has no {what} line: cut off or edited" for what in lacking]
    steps, time = number(result.get("steps")), number(result.get("train_time_ms"))
    loss, target = number(result.get("val_loss")), number(config.get("target"))
    last_loss, last_time = run.val[-1][1:] if run.val else (loss, time)
    tokens = run.tokens(run.planned) if run.planned is not None else None
    average = None if not steps or time is None else time / steps
    facts = [  # what, here, there, how far apart
        ("val_loss of the last line and of the result", last_loss, loss, 0.51e-4),
        ("planned steps and the result's steps", run.planned, steps, 0),
        ("tokens and the schedule of batch_tokens", result.get("tokens"), tokens, 0),
        (
            "step_avg_ms and train_time_ms over steps",
            result.get("step_avg_ms"),
            average,
            0.01 + 1 / (steps or 1),
        ),
        (
            "data hashes of header and result",
            digest(run.data),
            digest(result.get("data_sha256")),
            0,
        ),
        ("config of header and result", digest(config), digest(result.get("config")), 0),
    ]
    said = header | {"world_size": number_of(header.get("world_size"))} | config
    said["steps"] = run.config_steps
    known = set(said) & set(result) - {"config", "data_sha256"}
    for key in sorted(known | {"run_id", "source_sha256", "device", "world_size", "seed", "steps"}):
        facts.append((f"{key} of header and result", said.get(key), result.get(key), 0))
    if target is not None and loss is not None and abs(loss - target) > 1e-6:  # six decimals
        facts.append(("target of config and result", target, result.get("target_val_loss"), 0))
        reached = result.get("target_reached")
        facts.append(("target_reached and val_loss <= target", reached, loss <= target, 0))
    reasons = [disagreement(*fact) for fact in facts if disagreement(*fact)]
    if time is None or time <= 0:
        reasons.append(f"train_time_ms is {printable(time, 20)}: no clock shows that")
    elif not -1 <= time - last_time <= LATER[0] * time + LATER[1]:
        reasons.append(
            f"train_time of the last line and of the result do not agree: {last_time} and {time}"
        )
    return reasons + check_lines(run)


def check_lines(run: Run) -> list[str]:
    """That it validates when its config says, and names its data by hash."""
    every, reasons = number(run.config.get("val_every")), []
    odd = [step for step, _, _ in run.val if step != run.planned and (not every or step % every)]
    if every is not None and odd:
        reasons.append(f"validates at step {odd[0]}, which val_every {every:g} does not ask for")
    if not run.data:
        reasons.append("names no data file")
    for name, sha in run.data.items():
        if sha is not None and not (isinstance(sha, str) and re.fullmatch("[0-9a-f]{64}", sha)):
            reasons.append(f"data hash of {printable(name, 60)} is not a sha256")
    return reasons


def disagreement(what: str, a, b, tolerance: float) -> str:
    """Empty where two values agree."""
    x, y = number(a), number(b)
    wrong = a is None or a != b if x is None or y is None else abs(x - y) > tolerance
    return f"{what} do not agree: {printable(a, 40)} and {printable(b, 40)}" if wrong else ""


def number_of(text):
    return int(text) if re.fullmatch(r"[0-9]{1,6}", str(text)) else text


def digest(value) -> str:
    """A short name for a JSON value, equal for equal values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def check_track(run: Run, track: str) -> list[str]:
    """What the track demands of each run, but for its data."""
    rules, config, result = TRACKS[track], run.config or {}, run.result or {}
    if run.style != "ours":
        return [f"is no log of this repository: no config, seed or data, which track {track} needs"]
    reasons = []
    for key in ("val_tokens", "vocab_size"):
        if config.get(key) != getattr(rules, key):
            given = printable(config.get(key), 20)
            reasons.append(f"has {key} {given}; track {track} demands {getattr(rules, key)}")
    size, device = run.header.get("world_size", "?"), run.header.get("device", "?")
    if rules.world_size is not None and size != str(rules.world_size):
        given = printable(size, 20)
        reasons.append(f"ran on {given} processes; track {track} demands {rules.world_size}")
    on_cpu = device.strip().lower() == "cpu"
    fits = {None: True, "CPU": on_cpu, "GPU": not on_cpu}.get(rules.device)
    if not (rules.device in device if fits is None else fits):
        reasons.append(f"ran on {printable(device, 40)!r}; track {track} demands {rules.device}")
    if track == "memory":
        parts = [number(result.get(key)) for key in ("optimizer_state_bytes", "param_count")]
        peak, least = number(result.get("peak_memory_bytes")), sum(part or 0 for part in parts)
        if peak is None or None in parts or peak < max(1, least):
            given = printable(result.get("peak_memory_bytes"), 40)
            reasons.append(
                f"peak_memory_bytes {given} do not hold its parameters and optimizer state"
            )
    if not rules.resumed and (run.resumed or result.get("resumed")):
        reasons.append(f"was resumed from a checkpoint; track {track} demands uninterrupted runs")
    found = RUN_ID.fullmatch(str(run.header.get("run_id")))
    if not found:
        reasons.append("its run_id is not the date, the time and a few letters")
    elif found[1] > tomorrow():
        reasons.append(f"its run_id is of {found[1]}, which is to come")
    return reasons


def tomorrow() -> str:
    """The latest day that it is anywhere."""
    return (datetime.datetime.now() + datetime.timedelta(days=1)).date().isoformat()


def check_data(run: Run, track: str) -> list[str]:
    """That a run used the track's own text."""
    rules, reasons, data = TRACKS[track], [], run.data or {}
    for name, sha in data.items():
        shown = printable(name, 60)
        kind = name.startswith((f"{rules.data}_train_", f"{rules.data}_val_"))
        if not kind or not rules.other_files and name not in rules.files:
            reasons.append(f"used {shown}; track {track} demands {rules.data} shards")
        elif sha is None:
            reasons.append(f"used {shown} unchecked: no manifest.json stood beside it")
        elif rules.files.get(name, sha) != sha:
            given = printable(sha, 12)
            reasons.append(f"used a {shown} that is not track {track}'s: sha256 {given}")
        elif "_val_" in name and name not in rules.files:
            reasons.append(f"used {shown}; track {track} validates on {', '.join(rules.files)}")
    missing = sorted(set(rules.files) - set(data))
    return reasons + [f"did not use {', '.join(missing)}"] * bool(missing)


# ------------------------------------------------------------------------------------------- groups
def check_group(name, runs, track=None, target=None, alpha=stats.ALPHA, raced=False) -> Group:
    """Checks on each run, on the runs together, and the statistical claim. raced: the runs are of a
    race, whose text is its own, and whose losses are in race.json."""
    group = Group(name, runs[0].source_sha256, runs, track=track, alpha=alpha)
    for run in runs:
        reasons = check_run(run, track)
        if track is not None and run.style == "ours" and not raced:
            reasons += check_data(run, track)
        group.reasons += [f"{run.name}: {reason}" for reason in reasons]
    no_source = "no source: the log neither holds nor names the code that made it"
    group.refuse(group.source_sha256 is None, no_source)
    ours = [r for r in runs if r.style == "ours" and r.config is not None]
    mixed = 0 < len(ours) < len(runs) and any(r.style == "public" for r in runs)
    group.refuse(mixed, "some logs of one source have a config line and some have none")
    compare_runs(group, ours)
    if len(ours) < len(runs):
        group.notes.append(
            "not our log format: seeds, config, data hashes and token counts could not be checked"
        )
    targets = sorted({number(r.config.get("target")) for r in ours} - {None})
    rule = TRACKS[track].target if track else None
    group.target = next((t for t in (target, rule, *targets[:1]) if t is not None), None)
    if not raced:
        losses = [r.val_loss for r in runs if r.val_loss is not None]
        test(group, losses)
    return group


def compare_runs(group: Group, ours: list[Run]):
    """What has to be alike in all runs, and what must not."""
    configs = {
        r.name: {k: v for k, v in r.config.items() if k not in RUN_LOCAL | {"argv", "run_id"}}
        for r in ours
    }
    same(group, "config", configs)
    same(group, "data", {r.name: r.data for r in ours if r.data is not None})
    for key in ("world_size", "device", "torch", "cuda", "driver", "cpu"):
        values = {r.header.get(key) for r in ours}
        if len(values) > 1:
            where = group.reasons if key in ("world_size", "device") else group.notes
            shown = ", ".join(sorted(printable(v) for v in values))
            where.append(f"{key} differs between the runs: {shown}")
    if any(None in r.data.values() for r in ours if r.data):
        group.notes.append("some data was not checked: no manifest.json stood beside it")
    names = {"run_id {}": lambda r: r.header.get("run_id"), "seed {}": lambda r: r.seed}
    for what, name in names.items():
        repeated(group, what, [(printable(name(r), 40), r) for r in ours])
    timed = [(str(run.val), run) for run in group.runs if run.train_time]
    repeated(group, "the same validation lines", timed)
    for i, run in enumerate(group.runs):
        for other in group.runs[:i]:
            line = f"{other.name} and {run.name} have the same training lines: they are one run"
            group.refuse(alike(run, other), line)
    seeds = [r.seed for r in ours]
    if group.track is not None and ours:
        whole = all(isinstance(seed, int) for seed in seeds)
        if not whole or sorted(seeds) != list(range(len(seeds))):
            shown = ", ".join(printable(seed, 12) for seed in seeds)
            group.reasons.append(f"the seeds are {shown}, not 0, 1, 2, ... without a gap")


def alike(a: Run, b: Run) -> bool:
    """Have two runs the same training losses in their second half? Only one and the same has."""
    one, two = (
        {s: loss for s, loss, _ in run.train if 2 * s > (run.planned or 0)} for run in (a, b)
    )
    shared = one.keys() & two.keys()
    return len(shared) >= 3 and sum(one[s] == two[s] for s in shared) > len(shared) / 2


def same(group, what, by_name):
    """All values alike, key by key."""
    first, *others = by_name.items() or [("", {})]
    for name, value in others:
        keys = sorted(k for k in set(value) | set(first[1]) if value.get(k) != first[1].get(k))
        shown = printable(", ".join(keys))
        group.refuse(keys, f"{what} differs between {first[0]} and {name}: {shown}")


def repeated(group, what, pairs):
    seen = {}
    for key, run in pairs:
        if key in seen:
            text = f"{seen[key].name} and {run.name} have {what.format(key)}: not independent runs"
            group.reasons.append(text)
        seen.setdefault(key, run)


def test(group: Group, losses):
    """The claim about the mean."""
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
