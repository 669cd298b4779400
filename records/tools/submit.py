"""Build a record folder from logs.

    python -m records submit NAME LOG... --track laptop --race race.json --what TEXT --why TEXT

The folder records/<track>/<date>_<name>/ gets one train_gpt.py (out of the logs), the logs without
it and with thinned training lines, result.json, the race's race.json on the tracks that are ranked
by race, and a README.md whose table is machine-written and whose two sentences are yours. It is
built aside and verified; a folder that would fail is not made, and the reasons are printed.

Exit code: 0 made, 1 verify would refuse it, 2 misuse.
"""

import datetime
import difflib
import os
import re
import shutil
import sys
import tempfile

from records.tools import folders, logs, verify
from records.tools.command import (
    BadInput,
    Parser,
    command,
    markdown,
    need,
    printable,
    write_atomic,
    write_json,
)
from records.tools.runs import Interrupted, interruptible
from records.tools.tracks import TRACKS

TRAIN_LINES = (50, 20, 8, 2)  # training lines kept per log: the first that fits MAX_FOLDER

README = """# {title}

{change}

**What changed.** {what}

**Why it works.** {why}

<!-- record:table -->
{table}
<!-- /record:table -->

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
    name = os.path.basename(os.path.abspath(previous))
    other = os.path.basename(os.path.dirname(os.path.abspath(previous)))
    link = markdown(name)
    if other in TRACKS and folders.NAME.fullmatch(name):
        way = "" if other == track else f"../{other}/"
        link = f"[{name}](../{way}{name})"
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


def read_runs(paths) -> list[logs.Run]:
    """One good run per log, all of one source that is in the logs."""
    runs = []
    for path in paths:
        found = logs.read_log(path)
        run = found[0]
        if len(found) > 1 or run.style != "ours":
            why = "; ".join(run.problems) or "not a log of one run of train_gpt.py"
            raise Refused(f"{printable(path)}: {why}")
        reasons = verify.check_run(run, None)
        if reasons:
            raise Refused("\n".join(f"{printable(path)}: {reason}" for reason in reasons))
        if not run.source_bytes:
            raise Refused(f"{printable(path)}: holds no source; give the original log from logs/")
        if not isinstance(run.seed, int):
            raise Refused(f"{printable(path)}: its config has no seed")
        runs.append(run)
    sources = sorted({run.source_sha256 for run in runs})
    if len(sources) > 1:
        shown = ", ".join(source[:12] for source in sources)
        raise Refused(f"the logs come from {len(sources)} different sources: {shown}")
    seeds = [run.seed for run in runs]
    if len(set(seeds)) < len(seeds):
        raise Refused(f"seeds repeat: {sorted(seeds)}; every run needs its own")
    return sorted(runs, key=lambda run: run.seed)


def build(folder, track, runs, args, previous):
    """Fill `folder`; raises Refused with verify's reasons."""
    source = logs.source_text(runs[0].path, runs[0].source_sha256)
    write_atomic(os.path.join(folder, "train_gpt.py"), source)
    for keep in TRAIN_LINES:
        texts = {f"run_{run.seed}.txt": thin(run.path, run.train_lines, keep) for run in runs}
        if sum(map(len, texts.values())) < 0.9 * folders.MAX_FOLDER:  # the rest is for the others
            break
    for name, text in texts.items():
        write_atomic(os.path.join(folder, name), text)
    if args.race:
        shutil.copyfile(args.race, os.path.join(folder, "race.json"))
    kept = [run for name in sorted(texts) for run in logs.read_log(os.path.join(folder, name))]
    group = verify.check_group(args.name, kept, track)
    try:
        result = folders.summary(group)
        table = folders.record_table(result)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        why = group.reasons or [f"a result line is not complete: {error}"]
        raise Refused("\n".join(why)) from None
    write_json(os.path.join(folder, "result.json"), result)
    argv = printable(runs[0].header.get("argv", ""), 1000).replace("`", "'")
    readme = README.format(
        title=os.path.basename(folder).replace("_", " "),
        change=change_line(source, previous, track),
        what=args.what.strip(),
        why=args.why.strip(),
        table=table,
        argv=f"python train_gpt.py {argv}".strip(),
    )
    write_atomic(os.path.join(folder, "README.md"), readme.encode())
    group = folders.check_record(folder, track)
    if not group.ok:
        raise Refused("\n".join(group.reasons))


def parse_args(argv):
    parser = Parser("submit", __doc__)
    add = parser.add_argument
    add("name", metavar="NAME", help="letters, digits, - and _: what changed, in a word or two")
    add("logs", nargs="+", metavar="LOG", help="logs of one source, of seeds 0, 1, 2, ...")
    add("--track", required=True, choices=sorted(TRACKS))
    add("--what", required=True, metavar="TEXT", help="what changed, in one or two sentences")
    add("--why", required=True, metavar="TEXT", help="why it works, who had the idea, a link")
    add("--race", metavar="FILE", help="race.json against a record, where races rank the track")
    today = datetime.date.today().isoformat()
    add("--date", default=today, help="YYYY-MM-DD (default: today)")
    add("--previous", metavar="FOLDER", help="record to compare with (default: the track's latest)")
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
        if not text.strip() or folders.GAP in text.lower():
            raise BadInput(f"--{flag} is not filled in; write a sentence or two")
    for path in filter(None, [*args.logs, args.race]):
        if not os.path.isfile(path):
            raise BadInput(f"{printable(path)} is not a file; give files one by one or by a glob")
    if args.previous and not os.path.isfile(os.path.join(args.previous, "train_gpt.py")):
        raise BadInput(
            f"--previous {printable(args.previous)} holds no train_gpt.py; give a record folder"
        )
    need("scipy")
    return args


@command("submit")
def main(argv) -> int:
    args = parse_args(argv)
    try:
        with interruptible():  # so that the folder that is being made goes, too
            return submit(args)
    except Interrupted as stopped:
        return stopped.args[0]


def submit(args) -> int:
    name = f"{args.date}_{args.name}"
    place = os.path.join(folders.RECORDS, args.track)
    folder = os.path.join(place, name)
    if os.path.lexists(folder):
        raise BadInput(f"{folder} exists already; choose another name or date")
    previous = previous_record(args.track, name)
    if args.previous:
        previous = os.path.normpath(args.previous)
    made_place = not os.path.isdir(place)
    os.makedirs(place, exist_ok=True)
    temporary = tempfile.mkdtemp(prefix=".tmp_", dir=place)
    try:
        runs = read_runs(args.logs)
        built = os.path.join(temporary, name)
        os.mkdir(built)
        build(built, args.track, runs, args, previous)
        os.rename(built, folder)
    except Refused as refused:
        lines = [f"  - {printable(line, 300)}" for line in str(refused).splitlines()]
        print(
            "records submit: not submitted, verify would fail:", *lines, sep="\n", file=sys.stderr
        )
        return 1
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if made_place and not os.listdir(place):
            os.rmdir(place)
    plural = "s" * (len(runs) != 1)
    print(f"{os.path.relpath(folder)}: {len(runs)} run{plural}. Next: python -m records board")
    return 0
