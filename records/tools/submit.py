"""Build a record folder from logs: python -m records submit NAME LOG... --track laptop

The folder records/<track>/<date>_<name>/ gets one train_gpt.py (out of the logs), the logs without it and with thinned
training lines, result.json, and a README.md whose table is machine-written and whose two sentences are yours. It is
built aside and verified; a folder that would fail is not made, and the reasons are printed (exit code 1).
"""

import datetime
import difflib
import json
import os
import re
import shutil
import sys
import tempfile

from records.tools import logs, verify
from records.tools.command import BadInput, Parser, command, printable, write_atomic
from records.tools.logs import TRACKS

RECORDS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TRAIN_LINES = (50, 20, 8, 2)  # training lines kept per log: the first that fits verify.MAX_FOLDER

README = """# {title}

{change}

**What changed.** (fill in: one or two sentences)

**Why it works.** (fill in: the idea, who had it first, a link)

<!-- record:table -->
{table}
<!-- /record:table -->

Made with: `{argv}`
"""


class Refused(Exception):
    """Why no folder is made: one or more lines."""


def previous_record(track: str, before: str) -> str | None:
    """The folder of the track whose name sorts last before `before`."""
    place = os.path.join(RECORDS, track)
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
    link = (
        f"[{name}](../{'' if other == track else f'../{other}/'}{name})"
        if other in TRACKS
        else name
    )
    return f"Against {link}: train_gpt.py +{added} −{removed} lines ({length} in all)."


def thin(path: str, train_lines: int, keep: int) -> bytes:
    """The log without its source, with every validation line and about `keep` of its `train_lines` training lines."""
    if train_lines <= max(keep, 60) and keep == TRAIN_LINES[0]:
        keep = train_lines
    chosen = (
        {round(i * (train_lines - 1) / max(keep - 1, 1)) for i in range(keep)}
        if train_lines
        else set()
    )
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
            raise Refused(
                f"{printable(path)}: "
                + "; ".join(run.problems or ["not a log of one run of train_gpt.py"])
            )
        if reasons := verify.check_run(run, None):
            raise Refused("\n".join(f"{printable(path)}: {reason}" for reason in reasons))
        if not run.source_bytes:
            raise Refused(f"{printable(path)}: holds no source; give the original log from logs/")
        if not isinstance(run.seed, int):
            raise Refused(f"{printable(path)}: its config has no seed")
        runs.append(run)
    sources = sorted({run.source_sha256 for run in runs})
    if len(sources) > 1:
        raise Refused(
            f"the logs come from {len(sources)} different sources: {', '.join(s[:12] for s in sources)}"
        )
    seeds = [run.seed for run in runs]
    if len(set(seeds)) < len(seeds):
        raise Refused(f"seeds repeat: {sorted(seeds)}; every run needs its own")
    return sorted(runs, key=lambda run: run.seed)


def build(folder, name, track, runs, previous):
    """Fill `folder`; raises Refused with verify's reasons."""
    source = logs.source_text(runs[0].path, runs[0].source_sha256)
    write_atomic(os.path.join(folder, "train_gpt.py"), source)
    for keep in TRAIN_LINES:
        texts = {f"run_{run.seed}.txt": thin(run.path, run.train_lines, keep) for run in runs}
        if (
            sum(map(len, texts.values())) < 0.9 * verify.MAX_FOLDER
        ):  # the rest is for result.json and the README
            break
    for file_name, text in texts.items():
        write_atomic(os.path.join(folder, file_name), text)
    kept = [
        run for file_name in sorted(texts) for run in logs.read_log(os.path.join(folder, file_name))
    ]
    group = verify.check_group(name, kept, track)
    try:
        result = verify.summary(group)
        table = verify.record_table(result)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Refused(
            "\n".join(group.reasons or [f"a result line is not complete: {error}"])
        ) from None
    write_atomic(
        os.path.join(folder, "result.json"), (json.dumps(result, indent=1) + "\n").encode()
    )
    argv = printable(runs[0].header.get("argv", ""), 1000).replace("`", "'")
    readme = README.format(
        title=name.replace("_", " "),
        change=change_line(source, previous, track),
        table=table,
        argv=f"python train_gpt.py {argv}".strip(),
    )
    write_atomic(os.path.join(folder, "README.md"), readme.encode())
    group = verify.check_record(folder, track)
    if not group.ok:
        raise Refused("\n".join(group.reasons))


@command("submit")
def main(argv) -> int:
    parser = Parser("submit", __doc__)
    parser.add_argument(
        "name", metavar="NAME", help="letters, digits, - and _: what changed, in a word or two"
    )
    parser.add_argument(
        "logs", nargs="+", metavar="LOG", help="logs of one source, each with its own seed"
    )
    parser.add_argument("--track", required=True, choices=sorted(TRACKS))
    parser.add_argument(
        "--date", default=datetime.date.today().isoformat(), help="YYYY-MM-DD (default: today)"
    )
    parser.add_argument(
        "--previous", metavar="FOLDER", help="record to compare with (default: the track's latest)"
    )
    args = parser.parse_args(argv)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,60}", args.name):
        raise BadInput(
            f"NAME {printable(args.name)!r} may hold letters, digits, - and _ only, at most 61 of them"
        )
    try:
        date = datetime.datetime.strptime(args.date, "%Y-%m-%d").date().isoformat()
    except ValueError:
        raise BadInput(f"--date {printable(args.date)!r} is no date; write it as YYYY-MM-DD")
    for path in args.logs:
        if not os.path.isfile(path):
            raise BadInput(
                f"{printable(path)} is not a file; give the logs one by one or by a glob"
            )
    if args.previous and not os.path.isfile(os.path.join(args.previous, "train_gpt.py")):
        raise BadInput(
            f"--previous {printable(args.previous)} holds no train_gpt.py; give a record folder"
        )
    name = f"{date}_{args.name}"
    place = os.path.join(RECORDS, args.track)
    folder = os.path.join(place, name)
    if os.path.lexists(folder):
        raise BadInput(f"{folder} exists already; choose another name or date")
    previous = (
        os.path.normpath(args.previous) if args.previous else previous_record(args.track, name)
    )
    made_place = not os.path.isdir(place)
    temporary = None
    try:
        os.makedirs(place, exist_ok=True)
        temporary = tempfile.mkdtemp(prefix=".tmp_", dir=place)
        runs = read_runs(args.logs)
        build(temporary, name, args.track, runs, previous)
        os.chmod(temporary, 0o755)
        os.rename(temporary, folder)
    except Refused as refused:
        lines = str(refused).splitlines()
        print(
            "submit.py: not submitted, verify would fail:\n"
            + "\n".join(f"  - {printable(x, 300)}" for x in lines),
            file=sys.stderr,
        )
        return 1
    except OSError as error:
        raise BadInput(f"cannot build {folder}: {error.strerror or error}; nothing was left behind")
    finally:
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)
        if made_place and os.path.isdir(place) and not os.listdir(place):
            os.rmdir(place)
    print(
        f"{os.path.relpath(folder)}: {len(runs)} runs. Next: fill in its README.md, race it where races rank the "
        f"track, then python -m records board"
    )
    return 0
