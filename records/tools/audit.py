"""A table of a public collection of logs, by folder: what the logs show by themselves, what not."""

import os

from records.tools import logs, stats, verify
from records.tools.command import BadInput, printable
from records.tools.logs import Run

LONGEST = 46  # characters of a folder's name


def table(paths, target: float) -> str:
    """Raises BadInput where there are no logs."""
    by_folder = {}
    skipped = 0
    for path in logs_in(paths):
        for run in logs.read_log(path):
            if verify.is_foreign(run):
                skipped += 1
            else:
                by_folder.setdefault(os.path.dirname(path), []).append(run)
    if not by_folder:
        shown = printable(" ".join(paths))
        raise BadInput(f"no log in {shown}; logs end in {', '.join(verify.LOG_SUFFIXES)}")
    top = os.path.commonpath([os.path.abspath(path) for path in paths])
    head = f"{'folder':{LONGEST}}  {'n':>4}  {'val loss':>16}  {'p':>8}  {'train time':>10}  "
    homes = {}  # validation lines -> the first folder that has them
    lines = [head + "its logs show | do not show"]
    for folder, runs in sorted(by_folder.items()):
        name = os.path.relpath(folder, top)
        elsewhere = {homes.setdefault(str(run.val), name) for run in runs if run.train_time}
        lines.append(row(name, runs, target) + also_in(elsewhere - {name}))
    return "\n".join([*lines, "", *legend(by_folder, target, skipped)])


def logs_in(paths) -> list[str]:
    """Every log below the paths, record folders included."""
    records, named, found = verify.collect(paths)
    for folder in records:
        names = (name for name in sorted(os.listdir(folder)) if name.endswith(verify.LOG_SUFFIXES))
        found += [os.path.join(folder, name) for name in names]
    return named + found


def also_in(others: set[str]) -> str:
    return f"; runs that stand in {printable(', '.join(sorted(others)))}, too" if others else ""


def finished(run: Run) -> bool:
    return run.val_loss is not None and run.planned in (None, run.val[-1][0])


def row(folder: str, runs: list[Run], target: float) -> str:
    whole = [run for run in runs if finished(run)]
    losses = [run.val_loss for run in whole]
    found, p = stats.mean_std(losses), None
    if len(losses) > 1:
        p = stats.p_less(losses, target)
    loss = "–" if found["mean"] is None else verify.plus_minus(found | {"best": None})
    times = [run.train_time for run in whole if run.train_time]
    time = f"{stats.mean_std(times)['mean'] / 1000:.1f} s" if times else "–"
    name = folder if len(folder) <= LONGEST else "…" + folder[1 - LONGEST :]
    shows, lacks = words(runs, whole, p, target)
    text = f"{', '.join(shows) or '–'} | {', '.join(lacks) or '–'}"
    shown = "–" if p is None else f"{p:.1g}"
    return (
        f"{printable(name):{LONGEST}}  {len(whole):>4}  {loss:>16}  {shown:>8}  {time:>10}  {text}"
    )


def words(runs, whole, p, target: float) -> tuple[list[str], list[str]]:
    """(what the logs show, what they do not show), in a few words each."""
    shows, lacks = [], []
    below = f"mean below {target:g}"
    if p is not None and p < stats.ALPHA:
        shows.append(below)
    elif p is not None:
        lacks.append(f"{below} at p < {stats.ALPHA:g}")
    elif whole:
        lacks.append(f"{below}: one run has no spread")
    cut = len(runs) - len(whole)
    if cut:
        lacks.append(f"the end of {cut} run{'s' * (cut > 1)}")
    sources = {run.source_sha256 for run in runs}
    if None in sources:
        lacks.append("the source of every run")
    elif len(sources) == 1:
        shows.append("one source" if len(runs) > 1 else "its source")
    else:
        lacks.append(f"one source: there are {len(sources)}")
    if not any(run.train_time for run in whole):
        lacks.append("times")
    odd = [run for run in whole if run.problems]
    if odd:
        first = printable(f"{odd[0].problems[0]}", 90)
        lacks.append(f"steps and times that agree in {len(odd)}, as: {first}")
    elif whole:
        shows.append("steps and times that agree")
    if any(run.style == "ours" for run in runs):
        shows.append("config and data")
    return shows, lacks


def legend(by_folder, target: float, skipped: int) -> list[str]:
    runs = sum(map(len, by_folder.values()))
    files = f"; {skipped} other text files" if skipped else ""
    return [
        f"{runs} runs in {len(by_folder)} folders{files}. n: those that reach their last step.",
        f"p: one-sided t-test that the mean of these is below {target:g}. A folder may hold runs",
        "of several settings, trials, baselines: a row describes, it is no verdict. Seeds, data",
        "and machine stand in few public logs and were not looked for.",
    ]
