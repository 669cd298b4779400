"""Draw validation loss over train time and tokens.

    python -m records plot LOG... -o out.png [--train]

Takes logs, record folders, and folders of logs, ours or the public speedrun's. Runs of one source
and one config are one curve, the mean over their seeds; thin lines are the runs. With --train, and
only then, the training loss, smoothed; a dot is the final validation loss. The eight best curves
have colours and names, others are grey.
"""

import io
import json
import os
import re
import textwrap
from dataclasses import dataclass, field

import numpy as np

from records.tools import logs, verify
from records.tools.command import (
    BadInput,
    Parser,
    command,
    emit,
    need,
    number_in,
    printable,
    write_atomic,
)
from records.tools.tracks import RUN_LOCAL

# Told apart by people of any colour vision, and in print.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#e69f00", "#56b4e9", "#8a6d3b")
GREY = "#c4c4c4"
FORMATS = (".png", ".svg", ".pdf")
SMOOTH = 0.15  # of a run: the width of the mean that smooths its training loss
OPENING = 0.08  # of a run, whose losses would flatten all the rest: beyond the picture's upper edge
LINE = 0.035  # of a panel's height, for a line of a name
LETTERS = 44  # of a name, in a line
LETTER = 0.058  # inches that a letter takes
ROUND = re.compile(r"round\d+_([A-Z])_seed\d+")  # a run's folder in a race's
NAMES = {"time": "train time (s)", "tokens": "tokens", "steps": "step (no batch size in the logs)"}


@dataclass
class Curve:
    """Runs of one source and one config."""

    label: str
    runs: list[logs.Run]
    config: dict = field(default_factory=dict)
    scale: float = 1.0  # of the x axis

    @property
    def final(self) -> float:
        """Mean final validation loss."""
        return verify.spread([run.val_loss for run in self.runs])["mean"] or float("inf")


def load(paths) -> list[Curve]:
    """The curves, in the order found; only runs with validation lines."""
    records, named, found = verify.collect(paths)
    curves = {}
    for folder in records:
        names = sorted(n for n in os.listdir(folder) if n.startswith("run_") and n.endswith(".txt"))
        for name in names:
            add(curves, os.path.join(folder, name), os.path.basename(os.path.abspath(folder)))
    for path in named + found:
        add(curves, path, label_of(os.path.dirname(os.path.abspath(path))))
    kept = list(curves.values())
    tell_apart(kept)
    return kept


def label_of(folder: str) -> str:
    """A folder's name; in a race's folder that of the script which ran there."""
    name = os.path.basename(folder)
    found = ROUND.fullmatch(name)
    if not found:
        return name
    try:
        with open(os.path.join(os.path.dirname(folder), "race.json"), encoding="utf-8") as file:
            race = json.load(file)
        pairs = race.get("pairs") or [race]
        scripts = [pairs[0]["reference"], *(pair["candidate"] for pair in pairs)]
        return os.path.basename(scripts[ord(found[1]) - ord("A")])
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return found[1]  # the race is not over


def add(curves: dict, path: str, label: str):
    """Sorts the runs of one log into the curves."""
    for run in logs.read_log(path):
        if run.val and run.val_loss is None:
            emit(f"{printable(path)}: left out, its loss is not finite")
        elif run.val:
            config = {k: v for k, v in (run.config or {}).items() if k not in RUN_LOCAL}
            source = run.source_sha256 or os.path.dirname(os.path.abspath(path))
            key = source, json.dumps(config, sort_keys=True)
            curves.setdefault(key, Curve(label, [], config)).runs.append(run)


def tell_apart(curves: list[Curve]):
    """Curves of one name get what differs between their configs, or their source, added to it."""
    for label in {curve.label for curve in curves}:
        alike = [curve for curve in curves if curve.label == label]
        if len(alike) < 2:
            continue
        best = sorted(alike, key=lambda curve: curve.final)[: len(COLOURS)]  # these get names
        configs = [curve.config for curve in best if curve.config]
        kinds = {
            key: len({str(config.get(key)) for config in configs})
            for key in sorted(set().union(*configs))
        }
        differ = sorted((k for k in kinds if kinds[k] > 1), key=kinds.get, reverse=True)
        for curve in alike:
            values = [f"{key}={curve.config[key]}" for key in differ if key in curve.config]
            source = (curve.runs[0].source_sha256 or "no source")[:8]
            curve.label += " " + (", ".join(values[:3]) or source)


def points(run: logs.Run, x: str, train=False) -> list[tuple[float, float]]:
    """(x, loss) of a run's lines; x is "time" in seconds, "tokens" or "steps"."""
    lines = run.train if train else run.val
    if x == "time":
        return [(ms / 1000, loss) for _, loss, ms in lines if ms is not None]
    if x == "tokens":
        return [(run.tokens(step), loss) for step, loss, _ in lines]
    return [(step, loss) for step, loss, _ in lines]


def mean_line(curve: Curve, x: str, train=False) -> np.ndarray:
    """float [points, 2]: mean x and mean loss over the runs, at the steps that all of them have."""
    lines = []
    steps = [{step for step, _, _ in (r.train if train else r.val)} for r in curve.runs]
    shared = set.intersection(*steps)
    for run in curve.runs:
        numbered = zip(run.train if train else run.val, points(run, x, train), strict=False)
        lines.append([point for (step, _, _), point in numbered if step in shared])
    if len({len(line) for line in lines}) != 1 or not lines[0]:
        return np.empty((0, 2))
    line = np.mean(lines, axis=0) * [curve.scale, 1.0]
    return smooth(line) if train else line


def smooth(line: np.ndarray) -> np.ndarray:
    """Means over a moving part of the run; narrower at its steep beginning."""
    reach = round(SMOOTH * len(line) / 2)
    out = line.copy()
    for i in range(len(line)):
        near = min(reach, i)
        out[i, 1] = line[i - near : i + near + 1, 1].mean()
    return out


def draw(axis, curves: list[Curve], x: str, train=False, target=None) -> list:
    """One panel. Returns (curve, its end, its colour) of those that get a name."""
    best = sorted(curves, key=lambda curve: curve.final)[: len(COLOURS)]
    colours = iter(COLOURS)
    ends = []
    for curve in curves:
        named = any(curve is other for other in best)
        colour, layer = (next(colours), 3) if named else (GREY, 1)
        line = mean_line(curve, x, train)
        if not train and len(curve.runs) > 1:
            for run in curve.runs:
                own = np.array(points(run, x)).reshape(-1, 2) * [curve.scale, 1.0]
                axis.plot(*own.T, color=colour, linewidth=0.6, alpha=0.35, zorder=layer)
        if len(line) > 1:
            axis.plot(*line.T, color=colour, linewidth=1.8, zorder=layer)
        last = mean_line(curve, x)[-1:]
        axis.plot(*last.T, "o", color=colour, markersize=5, zorder=layer + 1)
        if named and len(last):
            ends.append((curve, last[0], colour))
    if target is not None:
        axis.axhline(target, color="black", linewidth=0.9, linestyle=(0, (4, 3)), zorder=2)
        place = {"xy": (0.01, target), "xycoords": ("axes fraction", "data")}
        axis.annotate(
            f"target {target:g}", **place, xytext=(0, 3), textcoords="offset points", fontsize=8
        )
    axis.set_xlabel(NAMES[x])
    if x != "time":
        from matplotlib.ticker import EngFormatter

        axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 2.5M, 10k
    axis.set_ylabel("training loss (lines), validation loss (dots)" if train else "validation loss")
    axis.grid(alpha=0.25, linewidth=0.6)
    crop(axis, curves, train, target)
    return ends


def crop(axis, curves, train, target):
    """The first few per cent of a run would flatten all the rest: start below them."""
    late = [target] if target is not None else []
    for curve in curves:
        for run in curve.runs:
            lines = run.val + (run.train if train else [])
            fine = [(step, loss) for step, loss, _ in lines if loss < logs.MAX_LOSS]
            late += [loss for step, loss in fine if step >= OPENING * run.last_step]
    if late and max(late) > min(late):
        margin = 0.05 * (max(late) - min(late))
        axis.set_ylim(min(late) - margin, max(late) + margin)


def name_ends(axis, ends):
    """Each curve's name beside the panel, in its colour, at the height of its end or near it."""
    low, high = axis.get_ylim()
    heights = [(end[1] - low) / (high - low) for _, end, _ in ends]
    texts = [name_of(curve) for curve, _, _ in ends]
    places, floor = {}, 0.0
    for i in sorted(range(len(ends)), key=heights.__getitem__):
        half = LINE * (1 + texts[i].count("\n")) / 2
        places[i] = max(heights[i], floor + half)
        floor = places[i] + half
    over = max(0.0, floor - 1.0)
    right = axis.get_xlim()[1]
    for i, (_, end, colour) in enumerate(ends):
        near = end[0] > 0.8 * right  # a line to an end far away would cross the others
        arrow = {"arrowstyle": "-", "color": colour, "linewidth": 0.5, "relpos": (0, 0.5)}
        note = axis.annotate(
            texts[i],
            end,
            xytext=(1.03, places[i] - over),
            textcoords="axes fraction",
            color=colour,
            fontsize=7,
            va="center",
            annotation_clip=False,
            arrowprops=arrow if near else None,
        )
        note.set_in_layout(False)  # the figure leaves room for it


def name_of(curve: Curve) -> str:
    """Label, final loss and number of runs, in lines that are short enough."""
    final = verify.plus_minus(verify.spread([run.val_loss for run in curve.runs]))
    numbers = f"{final} ({len(curve.runs)})".replace(" ", "\xa0")  # no line ends inside
    return "\n".join(textwrap.wrap(f"{printable(curve.label)}  {numbers}", LETTERS))


def figure(curves, axes, train=False, target=None, title=""):
    """A figure with one panel per entry of `axes` ("time", "tokens"), names at its right."""
    from matplotlib.figure import Figure  # takes a while to import

    if any(run.tokens(0) is None for curve in curves for run in curve.runs):
        axes = ["steps" if x == "tokens" else x for x in axes]
    best = sorted(curves, key=lambda curve: curve.final)[: len(COLOURS)]
    longest = max((len(line) for c in best for line in name_of(c).split("\n")), default=0)
    room = 0.4 + LETTER * longest
    width = 5.2 * len(axes) + room
    picture = Figure(figsize=(width, 4.8), dpi=120, layout="constrained")
    picture.get_layout_engine().set(rect=(0, 0, 1 - room / width, 1))
    panels = picture.subplots(1, len(axes), squeeze=False)[0]
    for panel, x in zip(panels, axes, strict=True):
        ends = draw(panel, curves, x, train, target)
    name_ends(panels[-1], ends)
    if title:
        picture.suptitle(title, fontsize=11)
    return picture


def save(picture, path):
    """Write the picture, in the format that the file's ending names."""
    buffer = io.BytesIO()
    suffix = os.path.splitext(path)[1][1:]
    # No version of the library in it: the same picture is the same file.
    picture.savefig(buffer, format=suffix, metadata={"Software": None} if suffix == "png" else None)
    write_atomic(path, buffer.getvalue())


def parse_args(argv):
    parser = Parser("plot", __doc__)
    add = parser.add_argument
    add("logs", nargs="+", metavar="LOG", help="logs, record folders, or folders of logs")
    add("-o", "--out", required=True, metavar="FILE", help=f"to write: {', '.join(FORMATS)}")
    add("--train", action="store_true", help="the smoothed training loss, too")
    add(
        "--target",
        type=number_in(float, 0),
        help="a line at this loss (default: the logs' own, if they agree)",
    )
    add("--x", choices=("time", "tokens", "both"), default="both", help="default: %(default)s")
    args = parser.parse_args(argv)
    if os.path.splitext(args.out)[1] not in FORMATS:
        raise BadInput(f"{printable(args.out)} must end in {', '.join(FORMATS)}")
    if not os.path.isdir(os.path.dirname(os.path.abspath(args.out))):
        raise BadInput(f"the folder of {printable(args.out)} does not exist; make it first")
    for path in args.logs:
        if not os.path.exists(path):
            raise BadInput(f"{printable(path)} does not exist; give logs or folders")
    need("matplotlib")
    return args


@command("plot")
def main(argv) -> int:
    args = parse_args(argv)
    curves = load(args.logs)
    if not curves:
        shown = printable(" ".join(args.logs))
        raise BadInput(f"no validation line in {shown}; give training logs")
    runs = [run for curve in curves for run in curve.runs]
    targets = {logs.number((run.config or {}).get("target")) for run in runs}
    target = args.target
    if target is None and len(targets) == 1:
        target = targets.pop()
    axes = ["time", "tokens"] if args.x == "both" else [args.x]
    if all(ms is None for run in runs for _, _, ms in run.val):
        if args.x == "time":
            raise BadInput("these logs hold no times; use --x tokens")
        axes = ["tokens"]
    if args.train and not any(run.train for run in runs):
        raise BadInput("these logs hold no training losses; leave --train out")
    save(figure(curves, axes, args.train, target), args.out)
    done = f"{args.out}: {len(runs)} run{'s' * (len(runs) != 1)} in {len(curves)} curve"
    done += "s" * (len(curves) != 1)
    if not args.train and all(len(run.val) < 2 for run in runs):
        done += "; each was validated once, --train draws what came before"
    emit(done)
    return 0
