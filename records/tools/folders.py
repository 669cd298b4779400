"""Record folders: what they hold is what was measured; here it is read, checked, and worked out."""

import datetime
import functools
import os
import re
import stat
from dataclasses import dataclass

from records.tools import checks, logs, stats
from records.tools.checks import Group
from records.tools.command import printable
from records.tools.logs import number
from records.tools.tracks import LOCAL_FLAGS, TRACKS, Track

RECORDS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MAX_FOLDER = 100_000  # bytes of a record folder beside its train_gpt.py
MAX_SOURCE = 200_000  # bytes of that: room for a trainer, and not for weights or tables
NAME = re.compile(r"(\d{4}-\d\d-\d\d)_[A-Za-z0-9][A-Za-z0-9_-]{0,60}")
FILE = re.compile(r"README\.md|train_gpt\.py|race\.json|run_(?:0|[1-9]\d{0,5})\.txt")
FLAGS = {*LOCAL_FLAGS, "preset", "val_every"}  # of a record's runs
GAP = "(fill in"  # what an unfinished README says
MARKUP = re.compile(r"<[!/a-zA-Z]|[\x00-\x08\x0b\x0c\x0e-\x1f]")  # HTML, markers of blocks
BOTH = ("reference", "candidate")
LISTS = {  # columns of a race.json, and what their entries are
    "wall_ms": float,
    "startup_ms": float,
    "times_ms": float,
    "logged_ms": float,
    "losses": float,
    "run_ids": str,
}


@dataclass
class Record:
    """One record folder, what verify thinks of it, and what follows from what it holds."""

    folder: str
    group: Group
    race: dict | None = None
    found: dict | None = None  # stats.outcome() of the race, at the margin of records
    level: dict | None = None  # mean and std of the loss, as on the track's own text
    unranked: str = ""  # why it has no place although it passes
    relative: float | None = None  # time over that of the track's first record; by the board

    @property
    def name(self) -> str:
        return os.path.basename(self.folder)

    @property
    def ok(self) -> bool:
        return self.group.ok

    @property
    def reference(self) -> str | None:
        """Name of the record that it raced against."""
        return reference_of(self.race) if self.race else None


def reference_of(race) -> str:
    path = printable(race.get("reference"), 1000).removesuffix("/train_gpt.py")
    return os.path.basename(path.rstrip("/"))


# --------------------------------------------------------------------------------------- the files
def is_file(path) -> bool:
    """Whether this is a file and nothing else: no link, no device, no pipe."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False


def source_sha256(folder) -> str | None:
    """None where there is no source of a size that a record may have."""
    path = os.path.join(folder, "train_gpt.py")
    fits = is_file(path) and os.path.getsize(path) <= MAX_SOURCE
    return logs.sha256_file(path) if fits else None


def logs_of(folder) -> list[str]:
    """A record folder's run_*.txt that are files, and no larger than a folder may be."""
    names = sorted(n for n in os.listdir(folder) if n.startswith("run_") and n.endswith(".txt"))
    paths = [os.path.join(folder, name) for name in names]
    return [path for path in paths if is_file(path) and os.path.getsize(path) <= MAX_FOLDER]


def runs_of(folder) -> list[logs.Run]:
    """The runs in its logs; read again where a file has changed."""
    found = [(path, os.stat(path)) for path in logs_of(folder)]
    return [run for path, s in found for run in runs_in(path, s.st_mtime_ns, s.st_size)]


@functools.cache
def runs_in(path, modified, size) -> list[logs.Run]:
    return logs.read_log(path)


def check_files(folder) -> list[str]:
    """Names, kinds, sizes, and that no text is more than text."""
    reasons, size = [], 0
    if os.path.islink(folder):
        reasons.append("the folder is a link: copy what it leads to")
    found = NAME.fullmatch(os.path.basename(folder))
    try:
        day = datetime.date.fromisoformat(found[1] if found else "").isoformat()
        if day > checks.tomorrow():
            reasons.append(f"it is dated {day}, which is to come")
    except ValueError:
        reasons.append("the folder's name is not <date>_<name>, of letters, digits, - and _")
    for name in sorted(set(os.listdir(folder)) - {"__pycache__"}):  # git ignores it
        path = os.path.join(folder, name)
        if not FILE.fullmatch(name):
            reasons.append(f"{printable(name, 60)} does not belong into a record folder")
        elif not is_file(path):
            reasons.append(f"{name} is not a regular file")
        elif name == "train_gpt.py":
            if os.path.getsize(path) > MAX_SOURCE:
                reasons.append(
                    f"train_gpt.py has {os.path.getsize(path)} bytes; {MAX_SOURCE} are allowed"
                )
        else:
            size += os.path.getsize(path)
            reasons += check_text(path, name)
    if size > MAX_FOLDER:
        reasons.append(f"the folder has {size} bytes beside train_gpt.py; {MAX_FOLDER} are allowed")
    for name in ("README.md", "train_gpt.py"):
        if not os.path.lexists(os.path.join(folder, name)):
            reasons.append(f"{name} is missing")
    return reasons


def check_text(path, name: str) -> list[str]:
    with open(path, encoding="utf-8", errors="replace") as file:
        text = file.read(1 << 20)
    found = MARKUP.search(text)
    reasons = (
        [f"{name} holds HTML or a marker: {printable(text[found.start() :], 20)!r}"]
        if found
        else []
    )
    if name == "README.md" and GAP in text.lower():
        reasons.append(f"README.md still says {GAP!r}")
    return reasons


def read_json(path) -> tuple[dict | None, str]:
    """The JSON object in a small file, and what is wrong with it."""
    name = os.path.basename(path)
    if not is_file(path):
        return None, f"{name} is missing, or not a regular file"
    with open(path, "rb") as f:
        value = logs.parse_json(f.read(1 << 20))
    return (value, "") if isinstance(value, dict) else (None, f"{name} is not a JSON object")


# ---------------------------------------------------------------------------------------- the check
def check_record(folder, track=None, target=None, alpha=stats.ALPHA) -> Record:
    """A record folder: its files, its logs, its race."""
    folder = os.path.abspath(folder)
    name, parent = os.path.basename(folder), os.path.basename(os.path.dirname(folder))
    track, sha = track or (parent if parent in TRACKS else None), source_sha256(folder)
    problems, runs = check_files(folder), runs_of(folder)
    race, wrong = None, ""
    if os.path.lexists(os.path.join(folder, "race.json")):
        race, wrong = read_json(os.path.join(folder, "race.json"))
        wrong = wrong or malformed(race)
    if wrong or not runs:
        reasons = [
            *problems,
            *[f"race.json: {wrong}"] * bool(wrong),
            *["there is no run_*.txt"] * (not runs),
        ]
        return Record(folder, Group(name, sha, runs, track, alpha=alpha, reasons=reasons))
    secret = race is not None and "startup_ms" in race
    group = checks.check_group(name, runs, track, target, alpha, raced=secret)
    group.reasons[:0] = problems + check_source(runs, sha)
    record = Record(folder, group, race, level=group.val_loss)
    if track is None:
        group.reasons.append(
            f"the track is not known: put the folder into {', '.join(TRACKS)}, or name --track"
        )
        return record
    rules = TRACKS[track]
    group.reasons += check_copy(folder, track, sha, runs) + check_date(name, runs, rules, sha)
    if race is None:
        group.refuse(
            rules.raced and not is_first(record, rules),
            "race.json is missing: all but the track's first record are raced",
        )
    elif not rules.raced:
        group.reasons.append("race.json: this track is not ranked by race; leave it out")
    else:
        rank(record, rules, sha)
    return record


def is_first(record: Record, rules: Track) -> bool:
    others = [
        os.path.basename(o) for o in siblings(record.folder, record.group.track) if logs_of(o)
    ]
    return (
        record.name == min(rules.settled)
        if rules.settled
        else not [o for o in others if o < record.name]
    )


def check_source(runs, sha) -> list[str]:
    reasons = []
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


def check_copy(folder, track, sha, runs) -> list[str]:
    """That no other record of the track has this source, or one of these runs. Nothing tells which
    of two is the copy, so neither passes; but one that is settled is none."""
    reasons, mine = [], {run.header.get("run_id") for run in runs} - {None}
    if TRACKS[track].settled.get(os.path.basename(folder)) == (sha or ""):
        return []
    for other in siblings(folder, track):
        name, theirs = os.path.basename(other), runs_of(other)
        if sha and source_sha256(other) == sha:
            reasons.append(
                f"train_gpt.py is that of {name}: a copy under another name is no record"
            )
        shared = [run for run in theirs if run.header.get("run_id") in mine]
        shared += [run for run in theirs if any(checks.alike(run, own) for own in runs)]
        if shared:
            reasons.append(f"one of its runs is {shared[0].name} of {name}, too")
    return reasons


def check_date(name: str, runs, track: Track, sha) -> list[str]:
    """That a record is not dated before what was there first."""
    reasons, newest = [], max(track.settled, default="")
    if name in track.settled and track.settled[name] != sha:
        reasons.append("its train_gpt.py is not the one that is settled under this name")
    if name not in track.settled and name < newest:
        reasons.append(f"it is dated before {newest}, which was here first")
    started = max(str(run.header.get("run_id"))[:10] for run in runs)
    if re.fullmatch(r"[0-9-]{10}", started) and started > name[:10]:
        reasons.append(f"it is dated before its own runs, the last of {started}")
    return reasons


# ----------------------------------------------------------------------------------------- the race
def malformed(race: dict) -> str:
    """Empty where a race.json has what is computed from, in the right form."""
    columns = [key for key in LISTS if key in race]
    secret = "startup_ms" in race
    wanted = ("wall_ms", "startup_ms", "losses", "run_ids") if secret else ("times_ms", "losses")
    lengths = set()
    for key in {*columns, *wanted}:
        both = race.get(key)
        if not isinstance(both, dict) or set(both) != set(BOTH):
            return f"it needs {key} of reference and candidate"
        for column in both.values():
            if not isinstance(column, list) or not all(fits(LISTS[key], value) for value in column):
                return f"{key} holds what is none"
            lengths.add(len(column))
    looks = race.get("looks")
    if len(lengths) != 1 or not isinstance(looks, list) or not looks:
        return "its columns are not alike in length, or it has no looks"
    for key in ("runs_planned", "alpha", "loss_margin"):
        if number(race.get(key)) is None:
            return f"it needs {key}"
    if not 0 < race["alpha"] < 1 or min(lengths) < 2:
        return "it needs two pairs, and an alpha between 0 and 1"
    times = stats.times_of(race)
    if not all(time > 0 for column in times.values() for time in column):
        return "a time less the start-up is not above 0"
    return ""


def fits(kind, value) -> bool:
    """A name, or a number that can be a time in ms or a loss."""
    x = number(value)
    return isinstance(value, str) if kind is str else x is not None and 1e-3 < x < 1e12


def rank(record: Record, rules: Track, sha):
    """Whether its race gives it a place on the board."""
    race, group, name = record.race, record.group, record.name
    settled = rules.settled.get(name) == sha
    early = settled and name <= rules.early
    reasons = check_entries(record, sha) + check_plan(race, rules, early)
    secret = "startup_ms" in race
    if not secret and not settled:
        reasons.append("its times are not of whole processes: race it again")
    reasons += [] if early else check_runs(record)
    record.found = stats.outcome(race, stats.LOSS_MARGIN)
    losses = race["losses"]
    if secret and not reasons:
        record.level = level_of(record.folder, group.track)
        worse = [b - a for a, b in zip(*(losses[who] for who in BOTH), strict=True)]
        losses = {"candidate": [record.level["reference"] + x for x in worse]}
    for who, column in losses.items():
        p, why = checks.p_value(column, rules.target)
        if p is None or not p < stats.ALPHA:
            why = why or f"p = {p:.2g}"
            reasons.append(f"the {who}'s losses are not shown to be below {rules.target:g}: {why}")
        if who == "candidate" and secret:
            group.p_value = p
    lost = "" if reasons else stats.why_not_faster(record.found)
    if lost and early:
        record.unranked = lost
    group.reasons += [
        f"race.json: {reason}" for reason in [*reasons, *[lost] * (bool(lost) and not early)]
    ]
    for run in group.runs:
        foreign = set(re.findall(r"--(\w+)", run.header.get("argv", ""))) - FLAGS
        group.refuse(
            foreign,
            f"{run.name}: was started with --{printable(' --'.join(foreign), 40)}; "
            "what a record is has to stand in its train_gpt.py, which is what is raced",
        )


def level_of(folder, track) -> dict:
    """Mean and std of a record's loss as on the track's own text: of its logs, or where it was
    raced on text of the race's own, its reference's and the difference in that race."""
    race, _ = read_json(os.path.join(folder, "race.json"))
    if not race or "startup_ms" not in race or malformed(race):
        return checks.spread([run.val_loss for run in runs_of(folder)])
    worse = [b - a for a, b in zip(*(race["losses"][who] for who in BOTH), strict=True)]
    known = {os.path.basename(other): other for other in siblings(folder, track)}
    reference = reference_of(race)
    if reference not in known or reference >= os.path.basename(folder):
        return checks.spread([])
    start = level_of(known[reference], track)["mean"]
    found = checks.spread([start + x for x in worse] if start is not None else [])
    return found | {"reference": start}


def check_entries(record: Record, sha) -> list[str]:
    """The two sources, and the record that was raced against."""
    race, mine, reasons = record.race, record.name, []
    sources = race.get("source_sha256") if isinstance(race.get("source_sha256"), dict) else {}
    if sources.get("candidate") != sha:
        reasons.append(
            "the candidate was another source than train_gpt.py, or is not named by hash"
        )
    name = record.reference
    shown = printable(name, 60)
    known = {os.path.basename(o): o for o in siblings(record.folder, record.group.track)}
    if name == mine or sources.get("reference") == sha:
        return [*reasons, "it is a race against itself"]
    if name not in known:
        return [*reasons, f"the reference {shown!r} is no other record of this track"]
    code = source_sha256(known[name])
    if code is None or code != sources.get("reference"):
        reasons.append(f"the reference was another source than record {name}, or has no hash")
    if name > mine:
        reasons.append(f"the reference {shown} is a later record, by the order of the names")
    return reasons


def check_plan(race, rules: Track, early: bool) -> list[str]:
    """That a race was held by the rules: margin, level, looks, flags, processes."""
    reasons, n = [], len(race["losses"]["candidate"])
    if race["loss_margin"] != stats.LOSS_MARGIN and not early:
        given = printable(race["loss_margin"], 20)
        reasons.append(f"the loss margin is {given}; records are raced at {stats.LOSS_MARGIN:g}")
    if race["alpha"] != stats.ALPHA:
        given = printable(race["alpha"], 20)
        reasons.append(f"alpha is {given}; records need {stats.ALPHA:g}")
    planned, looks = race["runs_planned"], race["looks"]
    most = min(int(planned), 100)
    plans = (
        [stats.planned_looks(int(planned), k) for k in range(1, most + 1)] if planned >= 1 else []
    )
    if n < stats.MIN_PAIRS or n > planned or planned % 1:
        given = printable(planned, 20)
        reasons.append(f"{n} pairs of {given} planned; at least {stats.MIN_PAIRS} are needed")
    elif looks not in plans:
        reasons.append(f"looks {printable(looks, 40)} are not those of {planned:g} rounds")
    elif n not in looks:
        reasons.append(f"it has {n} pairs, but would end after {printable(looks, 40)}")
    if rules.world_size is not None and race.get("processes") != rules.world_size:
        given = printable(race.get("processes"), 20)
        reasons.append(f"it ran {given} processes; the track demands {rules.world_size}")
    if not early and race.get("failures") != []:
        reasons.append("runs failed in it: race again")
    wanted = f"(--preset {rules.preset or '[a-z0-9_]+'})?( ?--val_every 0)?"
    if not re.fullmatch(wanted, str(race.get("flags"))):
        given = printable(race.get("flags"), 60)
        reasons.append(f"its flags are {given!r}, not the track's preset and --val_every 0 alone")
    for who in BOTH:
        if not re.fullmatch(r"[\w./-]+", str(race.get(who))):
            reasons.append(f"{who} is not one path: {printable(race.get(who), 60)}")
    return reasons


def check_runs(record: Record) -> list[str]:
    """That the folder holds the candidate's runs, all of them, on the race's machine: the same
    losses, or runs by name, and times that can be those of these logs."""
    race, reasons = record.race, []
    runs = sorted(record.group.runs, key=lambda run: number(run.seed) or 0)
    if "startup_ms" in race:
        if race["run_ids"]["candidate"] != [run.header.get("run_id") for run in runs]:
            reasons.append("its candidate's runs are not those here, seed by seed")
        if any(run.data != race.get("data_sha256") for run in runs):
            reasons.append("the runs here read other text than that of the race")
        walls = zip(race["wall_ms"]["candidate"], runs, strict=False)
        if any(run.train_time is None or wall < run.train_time for wall, run in walls):
            reasons.append("a run here logs more time than the race measured in all")
    else:
        raced = zip(race["losses"]["candidate"], race["times_ms"]["candidate"], runs, strict=False)
        if len(runs) != len(race["losses"]["candidate"]) or any(
            run.val_loss is None or abs(loss - run.val_loss) > 1e-6 for loss, _, run in raced
        ):
            reasons.append("its candidate's losses are not those of the runs here, seed by seed")
        timed = zip(race["times_ms"]["candidate"], runs, strict=False)
        if any(abs(ms - (run.train_time or 0)) > 0.02 * ms for ms, run in timed):
            reasons.append("its candidate's times are not those of the runs here")
    cpus = [str(run.header.get("cpu")) for run in runs]
    threads = {(re.findall(r"(\d+) threads", cpu) or ["?"])[-1] for cpu in cpus}
    if "threads" in race and threads != {str(race["threads"])}:
        here, there = ", ".join(sorted(threads)), printable(race["threads"], 20)
        reasons.append(f"it ran {there} threads, the runs here {here}")
    if {run.header.get("device") for run in runs} != {race.get("device")}:
        reasons.append(f"it ran on {printable(race.get('device'), 40)}, the runs here did not")
    return reasons
