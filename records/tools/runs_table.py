"""One table of training runs: what differs between them, loss, time, speed, and how they ended.

    python -m records runs [LOG...]       logs, folders of logs; logs/ unless given

A column for each setting that is not the same in all runs. loss is the last validation loss, or the
last training loss, marked with a t, where nothing was validated yet. A run is done (its log ends in
its result), stopped (by a signal), running (its log grew within the last minute), or ended.
"""

import csv
import io
import os
import re
import shutil
import time
from pathlib import Path

from records.tools import logs
from records.tools.command import BadInput, Parser, command, emit, need, printable

# No part of a recipe; the steps have a column of their own
LOCAL = {"log_dir", "checkpoint_dir", "resume", "train_files", "val_files", "steps"}
MINUTE = 60  # seconds without a new line before a log counts as ended
MOST_SETTINGS = 6  # columns; the others are in --csv
SETTING_WIDTH, NAME_WIDTH = 16, 40  # letters


def find_logs(paths) -> list[Path]:
    """The .txt files among and below the paths, oldest first."""
    found = []
    for path in map(Path, paths):
        if not path.exists():
            raise BadInput(f"{path}: no such file or folder; give logs, or folders of logs")
        found += [path] if path.is_file() else [p for p in path.rglob("*.txt") if p.is_file()]
    return sorted(set(found), key=lambda path: (path.stat().st_mtime, str(path)))


def read_runs(paths) -> list[logs.Run]:
    """Every run that has at least begun."""
    return [run for path in paths for run in logs.read_log(path) if run.style != "none"]


def state_of(run: logs.Run) -> str:
    if run.result:
        return "done"
    with open(run.path, "rb") as file:
        file.seek(max(0, os.path.getsize(run.path) - 4096))
        if re.search(rb"^stopped by a signal", file.read(), re.M):
            return "stopped"
    if time.time() - os.path.getmtime(run.path) < MINUTE:
        return "running"
    return "done" if run.last_step == run.planned else "ended"


def row_of(run: logs.Run) -> dict:
    """What is said of every run; a value is None where its log does not tell."""
    loss, kind = run.val_loss, ""
    if loss is None and run.train:
        loss, kind = run.train[-1][1], "t"
    seconds = run.last_time / 1000 if run.last_time > 0 else None
    tokens = run.tokens(run.last_step) if run.last_step > 0 else None
    return dict(
        run=run.header.get("run_id") or run.name,
        step=max(run.last_step, 0),
        steps=run.planned,
        loss=loss,
        kind=kind,
        seconds=seconds,
        tokens=tokens,
        tokens_per_second=tokens / seconds if tokens and seconds else None,
        state=state_of(run),
    )


def settings(runs: list[logs.Run]) -> dict[str, list[str]]:
    """{setting: its value in each run} of those that differ among the runs that have them; with the
    most values first."""
    configs = [flat(run.config or {}) for run in runs]
    for run, config in zip(runs, configs, strict=True):
        config["source"] = (run.source_sha256 or "")[:8]
    names = {name: None for config in configs for name in config if name not in LOCAL}
    table = {name: [written(config.get(name)) for config in configs] for name in names}
    differ = {name: values for name, values in table.items() if len({*values} - {"-"}) > 1}
    return dict(sorted(differ.items(), key=lambda item: -len(set(item[1]))))


def flat(config: dict) -> dict:
    """A config whose plan's columns stand beside the other settings."""
    plan = config.get("stages") or []
    columns = {name: [stage.get(name) for stage in plan] for name in (plan[0] if plan else ())}
    rest = {name: value for name, value in config.items() if name != "stages"}
    return rest | {name: v[0] if len(v) == 1 else v for name, v in columns.items()}


def written(value) -> str:
    if isinstance(value, list):
        return ",".join(map(written, value))
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def short(number: float | None) -> str:
    """1234567 as 1.23M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number is not None and number >= size:
            return f"{number / size:.3g}{letter}"
    return "-" if number is None else f"{number:.3g}"


def table(runs: list[logs.Run]) -> str:
    """For a terminal: a line a run, best loss last, where it is seen first."""
    differ = settings(runs)
    shown = list(differ)[:MOST_SETTINGS]
    lines = [["run", *shown, "step", "loss", "time s", "tokens/s", "state"]]
    rows = [row_of(run) for run in runs]
    order = sorted(range(len(runs)), key=lambda i: -(rows[i]["loss"] or float("inf")))
    for i in order:
        row = rows[i]
        lines.append(
            [
                printable(row["run"], NAME_WIDTH),
                *(printable(differ[name][i], SETTING_WIDTH) for name in shown),
                f"{row['step']}/{row['steps']}",
                "-" if row["loss"] is None else f"{row['loss']:.4f}{row['kind']}",
                "-" if row["seconds"] is None else f"{row['seconds']:,.1f}",
                short(row["tokens_per_second"]),
                row["state"],
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = 1 + len(shown)
    text = [
        "  ".join(
            cell.ljust(width) if at < left else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    hidden = list(differ)[MOST_SETTINGS:]
    if hidden:
        text.append(f"also different, see --csv: {printable(', '.join(hidden), 200)}")
    return "\n".join(text)


def as_csv(runs: list[logs.Run]) -> str:
    """Every setting that differs, and every number in full."""
    differ = settings(runs)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    rows = [row_of(run) for run in runs]
    writer.writerow(["file", *rows[0], *differ])
    for i, (run, row) in enumerate(zip(runs, rows, strict=True)):
        writer.writerow([run.path, *row.values(), *(values[i] for values in differ.values())])
    return out.getvalue().rstrip("\n")


def write_tensorboard(runs: list[logs.Run], folder: Path):
    """The losses of every run, over steps, as event files in a new folder each."""
    need("torch")
    if not importable("tensorboard"):
        raise BadInput("tensorboard is not installed; pip install tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    for run in runs:
        target = folder / str(row_of(run)["run"])
        if is_events(target):  # of an earlier call
            shutil.rmtree(target)
        with SummaryWriter(str(target)) as writer:
            for kind, lines in (("val", run.val), ("train", run.train)):
                for step, loss, _ in lines:
                    writer.add_scalar(f"loss/{kind}", loss, step)


def importable(package: str) -> bool:
    try:
        __import__(package)
    except ImportError:
        return False
    return True


def is_events(folder: Path) -> bool:
    """Whether a folder holds event files and nothing else, so that they may be written again."""
    return folder.is_dir() and all(p.name.startswith("events.out.") for p in folder.iterdir())


@command("runs")
def main(argv) -> int:
    parser = Parser("runs", __doc__)
    parser.add_argument("logs", nargs="*", default=["logs"], metavar="LOG", help="default: logs")
    parser.add_argument("--csv", action="store_true", help="all settings and numbers, as CSV")
    parser.add_argument(
        "--tensorboard", type=Path, metavar="DIR", help="write the losses there (needs tensorboard)"
    )
    args = parser.parse_args(argv)
    runs = read_runs(find_logs(args.logs))
    if not runs:
        raise BadInput(f"no run in {printable(' '.join(args.logs))}; give training logs")
    if args.tensorboard:
        write_tensorboard(runs, args.tensorboard)
        emit(f"{len(runs)} runs: tensorboard --logdir {args.tensorboard}")
    else:
        emit(as_csv(runs) if args.csv else table(runs))
    return 0
