"""Build a record folder.

    python -m records submit NAME idea.py --track laptop --what TEXT --why TEXT   races it first
    python -m records submit NAME logs/race_<date> --track laptop ...             a race's folder
    python -m records submit NAME LOG... --track speed ...                        runs by their logs

On the tracks that are ranked by race, a script is raced against the track's fastest record; where
it wins, the folder is made of that race. The folder records/<track>/<date>_<name>/ gets one
train_gpt.py, the logs without it and with thinned training lines, race.json, and a README.md whose
two sentences are yours. It is built aside and verified; a folder that would fail is not made, and
the reasons are printed.

Exit code: 0 made, 1 verify would refuse it, 2 misuse.
"""

import datetime
import difflib
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

from records.tools import board, checks, folders, logs, race
from records.tools.command import BadInput, Parser, command, need, printable, write_atomic
from records.tools.tracks import TRACKS

TRAIN_LINES = (50, 20, 8, 2)  # training lines kept per log: the first that fits MAX_FOLDER

README = """# {title}

{change}

**What changed.** {what}

**Why it works.** {why}

Made with: `{argv}`
"""


class Refused(Exception):
    """Why no folder is made: one or more lines."""


def previous_record(track: str, before: str) -> str | None:
    """The folder of the track whose name sorts last before `before`."""
    place = os.path.join(folders.RECORDS, track)
    names = sorted(os.listdir(place)) if os.path.isdir(place) else []
    names = [
        n for n in names if n < before and os.path.isfile(os.path.join(place, n, "train_gpt.py"))
    ]
    return os.path.join(place, names[-1]) if names else None


def diff_stat(old: bytes, new: bytes) -> tuple[int, int]:
    """Lines added and removed."""
    a, b = (text.decode("utf-8", "replace").splitlines() for text in (old, new))
    lines = [line for line in difflib.unified_diff(a, b, n=0, lineterm="")][2:]
    return sum(line.startswith("+") for line in lines), sum(line.startswith("-") for line in lines)


def change_line(source: bytes, previous: str | None, track: str) -> str:
    """One sentence: how far this train_gpt.py is from the previous record's."""
    length = len(source.splitlines())
    if previous is None:
        return f"First record of the {track} track; train_gpt.py has {length} lines."
    with open(os.path.join(previous, "train_gpt.py"), "rb") as f:
        added, removed = diff_stat(f.read(), source)
    name = os.path.basename(previous)
    link = f"[{name}](../{name})"
    return f"Against {link}: train_gpt.py +{added} −{removed} lines ({length} in all)."


def thin(path: str, train_lines: int, keep: int) -> bytes:
    """The log without its source, with every validation line and about `keep` of its `train_lines`
    training lines."""
    if train_lines <= max(keep, 60) and keep == TRAIN_LINES[0]:
        keep = train_lines
    last = train_lines - 1
    chosen = {round(i * last / max(keep - 1, 1)) for i in range(keep) if train_lines}
    kept, index = [], 0
    for line in logs.body_lines(path):
        if line.startswith(b"step:") and b" val_loss:" not in line:
            index += 1
            if index - 1 not in chosen:
                continue
        kept.append(line)
    return b"".join(kept)


def read_runs(paths, track: str) -> list[logs.Run]:
    """One good run per log, all of one source that is in the logs. Raises Refused with every
    reason, each once."""
    runs, wrong = [], {}  # reason -> the logs that it is true of
    for path in paths:
        found = logs.read_log(path)
        run = found[0]
        reasons = checks.check_run(run, track)
        if len(found) > 1 or run.style != "ours":
            reasons = run.problems or ["not a log of one run of train_gpt.py"]
        elif not run.source_bytes:
            reasons.append("holds no source; give the original log from logs/")
        elif not isinstance(run.seed, int):
            reasons.append("its config has no seed")
        for reason in reasons:
            wrong.setdefault(reason, []).append(os.path.basename(path))
        runs.append(run)
    sources = sorted({str(run.source_sha256) for run in runs})
    lines = [f"{printable(', '.join(names), 100)}: {reason}" for reason, names in wrong.items()]
    if len(sources) > 1:
        shown = ", ".join(source[:12] for source in sources)
        lines.append(f"the logs come from {len(sources)} different sources: {shown}")
    seeds = [str(run.seed) for run in runs]
    if len(set(seeds)) < len(seeds):
        lines.append(f"seeds repeat: {', '.join(sorted(seeds))}; every run needs its own")
    if lines:
        raise Refused("\n".join(lines))
    return sorted(runs, key=lambda run: run.seed)


def build(folder, track, runs, race_file, args, previous):
    """Fill `folder`; raises Refused with verify's reasons."""
    source = logs.source_text(runs[0].path, runs[0].source_sha256)
    write_atomic(os.path.join(folder, "train_gpt.py"), source)
    for keep in TRAIN_LINES:
        texts = {f"run_{run.seed}.txt": thin(run.path, run.train_lines, keep) for run in runs}
        if sum(map(len, texts.values())) < 0.9 * folders.MAX_FOLDER:  # the rest is for the others
            break
    for name, text in texts.items():
        write_atomic(os.path.join(folder, name), text)
    if race_file:
        shutil.copyfile(race_file, os.path.join(folder, "race.json"))
    argv = printable(runs[0].header.get("argv", ""), 1000).replace("`", "'")
    readme = README.format(
        title=os.path.basename(folder).replace("_", " "),
        change=change_line(source, previous, track),
        what=args.what.strip(),
        why=args.why.strip(),
        argv=f"python train_gpt.py {argv}".strip(),
    )
    write_atomic(os.path.join(folder, "README.md"), readme.encode())
    record = folders.check_record(folder, track)
    if not record.ok:
        raise Refused("\n".join(record.group.reasons))


def fastest(track: str) -> str | None:
    """The folder of the record that a new one has to beat."""
    best = board.ranked(track, board.read_track(track))
    return best[0].folder if best else None


def hold(script: str, args) -> str:
    """Races a script against the fastest record. Returns the race's folder."""
    best = fastest(args.track)
    if best is None or not TRACKS[args.track].raced:
        raise BadInput(f"track {args.track} has nothing to race against: give logs")
    words = [best, script]
    for name in ("runs", "first_seed", "looks", "timeout", "threads", "max_hours", "out"):
        value = getattr(args, name)
        words += [f"--{name}", str(value)] if value is not None else []
    preset = TRACKS[args.track].preset
    flags = ["--preset", preset] if preset else []
    own, entries, flags = race.parse_args([*words, "--", *flags, "--val_every", "0"])
    held = race.prepare(own, entries, flags)
    if race.hold(held) or held.decided != "yes":
        said = held.decided or "undecided"
        raise Refused(f"the race was not won: {said}; its folder is {own.out}")
    return str(own.out)


def parse_args(argv):
    parser = Parser("submit", __doc__)
    add = parser.add_argument
    add("name", metavar="NAME", help="letters, digits, - and _: what changed, in a word or two")
    add("paths", nargs="+", metavar="PATH", help="a script, a race's folder, or logs of one source")
    add("--track", required=True, choices=sorted(TRACKS))
    add("--what", required=True, metavar="TEXT", help="what changed, in one or two sentences")
    add("--why", required=True, metavar="TEXT", help="why it works, who had the idea, a link")
    today = datetime.date.today().isoformat()
    add("--date", default=today, help="YYYY-MM-DD (default: today)")
    race.add_options(parser)
    args = parser.parse_args(argv)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,60}", args.name):
        raise BadInput(
            f"NAME {printable(args.name)!r} may hold letters, digits, - and _ only, at most 61"
        )
    try:
        args.date = datetime.datetime.strptime(args.date, "%Y-%m-%d").date().isoformat()
    except ValueError:
        raise BadInput(
            f"--date {printable(args.date)!r} is no date; write it as YYYY-MM-DD"
        ) from None
    for flag in ("what", "why"):
        text = getattr(args, flag)
        if not text.strip() or folders.GAP in text.lower() or folders.MARKUP.search(text):
            raise BadInput(f"--{flag} is not filled in; write a sentence or two of plain text")
    for path in args.paths:
        if not os.path.exists(path):
            raise BadInput(f"{printable(path)} does not exist; give a script, a race or logs")
    need("scipy")
    return args


@command("submit")
def main(argv) -> int:
    args = parse_args(argv)
    name = f"{args.date}_{args.name}"
    place = os.path.join(folders.RECORDS, args.track)
    folder = os.path.join(place, name)
    if os.path.lexists(folder):
        raise BadInput(f"{folder} exists already; choose another name or date")
    previous = previous_record(args.track, name)
    made_place = not os.path.isdir(place)
    os.makedirs(place, exist_ok=True)
    temporary = tempfile.mkdtemp(prefix=".tmp_", dir=place)
    try:
        (path, *more), race_file = args.paths, None
        if path.endswith(".py") and not more:
            path = hold(path, args)
        if os.path.isdir(path) and not more:
            race_file = os.path.join(path, "race.json")
            args.paths = sorted(map(str, Path(path).glob("round???_candidate/*.txt")))
            if not args.paths or not os.path.isfile(race_file):
                raise BadInput(f"{path}: no race.json and candidate's logs; give a race's folder")
        runs = read_runs(args.paths, args.track)
        built = os.path.join(temporary, name)
        os.mkdir(built)
        build(built, args.track, runs, race_file, args, previous)
        os.rename(built, folder)
    except Refused as refused:
        lines = [f"  - {printable(line, 300)}" for line in str(refused).splitlines()]
        print("records submit: not submitted:", *lines, sep="\n", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if made_place and not os.listdir(place):
            os.rmdir(place)
    plural = "s" * (len(runs) != 1)
    print(f"{os.path.relpath(folder)}: {len(runs)} run{plural}. Next: python -m records board")
    return 0
