"""A table of a public collection of logs, by folder: what the logs show by themselves, what not."""

import os

from records.tools import checks, logs, stats
from records.tools.command import BadInput, printable
from records.tools.logs import Run, number

LONGEST = 46  # characters of a folder's name
# What a loss was bought with, as the logs say: a name, and its column's width.
BOUGHT = {"parameters": 10, "state": 10, "trained": 10, "read": 10, "memory": 10, "untimed": 8}


def table(records, named, found, target: float) -> str:
    """Of what verify.collect found. Raises BadInput where there are no logs."""
    from records.tools.verify import is_foreign

    paths = [
        os.path.join(f, n) for f in records for n in sorted(os.listdir(f)) if n.endswith(".txt")
    ]
    by_folder, skipped = {}, 0
    for path in [*paths, *named, *found]:
        for run in logs.read_log(path):
            if is_foreign(run):
                skipped += 1
            else:
                by_folder.setdefault(os.path.dirname(path), []).append(run)
    if not by_folder:
        raise BadInput("no log in there; logs end in .txt, .log, .out or .stdout")
    top = os.path.commonpath([os.path.abspath(path) for path in by_folder])
    bought = "  ".join(f"{name:>{width}}" for name, width in BOUGHT.items())
    head = (
        f"{'folder':{LONGEST}}  {'n':>4}  {'val loss':>16}  {'p':>8}  {'train time':>10}  {bought}"
    )
    homes = {}  # validation lines -> the first folder that has them
    lines = [head + "  its logs show | do not show"]
    for folder, runs in sorted(by_folder.items()):
        name = os.path.relpath(folder, top)
        elsewhere = {homes.setdefault(str(run.val), name) for run in runs if run.train_time}
        others = printable(", ".join(sorted(elsewhere - {name})))
        too = f"; runs that stand in {others}, too" if others else ""
        lines.append(row(name, runs, target) + too)
    return "\n".join([*lines, "", *legend(by_folder, target, skipped)])


def finished(run: Run) -> bool:
    return run.val_loss is not None and run.planned in (None, run.val[-1][0])


def amount(value) -> str:
    """ "2.7M"; a dash for what the log does not say."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if value is not None and value >= size:
            return f"{value / size:.3g}{unit}"
    return "–" if value is None else f"{value:.3g}"


def bought(run: Run) -> dict[str, str]:
    """Declared parameters, bytes of optimizer state, tokens trained and read, peak memory, and
    seconds that are not in train_time."""
    said = run.result or {}
    values = {
        "parameters": number(said.get("param_count")),
        "state": number(said.get("optimizer_state_bytes")),
        "trained": number(said.get("tokens")) or run.tokens(run.planned or 0),
        "read": number(said.get("tokens_read")),
        "memory": number(said.get("peak_memory_bytes")) or run.memory,
        "untimed": number(said.get("warmup_ms")),
    }
    values["untimed"] = None if values["untimed"] is None else values["untimed"] / 1000
    return {name: amount(value) for name, value in values.items()}


def row(folder: str, runs: list[Run], target: float) -> str:
    whole = [run for run in runs if finished(run)]
    losses = [run.val_loss for run in whole]
    found = stats.mean_std(losses)
    p = stats.p_less(losses, target) if len(losses) > 1 else None
    loss = "–" if found["mean"] is None else stats.plus_minus(found)
    mean_time = checks.spread([run.train_time for run in whole])["mean"]
    time = "–" if mean_time is None else f"{mean_time / 1000:.1f} s"
    name = folder if len(folder) <= LONGEST else "…" + folder[1 - LONGEST :]
    cells = "  ".join(f"{cell:>{BOUGHT[key]}}" for key, cell in bought((whole or runs)[0]).items())
    shows, lacks = words(runs, whole, p, target)
    text = f"{', '.join(shows) or '–'} | {', '.join(lacks) or '–'}"
    shown = "–" if p is None else f"{p:.1g}"
    name = f"{printable(name):{LONGEST}}"
    return f"{name}  {len(whole):>4}  {loss:>16}  {shown:>8}  {time:>10}  {cells}  {text}"


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
        "and machine stand in few public logs and were not looked for. From parameters on: what",
        "the first whole run declares (bytes of optimizer state, tokens trained and read, bytes of",
        "peak memory, seconds outside of train_time); –: its log does not say.",
    ]
