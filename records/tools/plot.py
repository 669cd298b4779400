"""Draw validation loss against train time and tokens: python -m records plot LOG... -o out.png

Takes logs, record folders, and folders of logs, ours or the public speedrun's. Runs of one source share a colour: thin
lines for the runs, a thick one for their mean. Runs validated only once or twice are shown by their training losses, which jump.
"""

import io
import os

from records.tools import logs, verify
from records.tools.command import BadInput, Parser, command, emit, printable, write_atomic

COLOURS = (
    "#1f5fa8",
    "#d1651e",
    "#2e8b57",
    "#b8324a",
    "#7a4fb5",
    "#8a6d3b",
    "#c94f9b",
    "#4d4d4d",
    "#9a9a1c",
    "#2199ad",
)
FORMATS = (".png", ".svg", ".pdf")


def load(paths) -> list[tuple[str, list[logs.Run]]]:
    """(label, runs) for each source, in the order found; only runs with validation lines."""
    records, named, found = verify.collect(paths)
    groups = {}
    for folder in records:
        runs = [
            r
            for f in sorted(os.listdir(folder))
            if f.startswith("run_") and f.endswith(".txt")
            for r in logs.read_log(os.path.join(folder, f))
        ]
        groups[folder] = (os.path.basename(os.path.abspath(folder)), runs)
    for path in named + found:
        for run in logs.read_log(path):
            place = os.path.dirname(os.path.abspath(path))
            key = run.source_sha256 or place
            label = os.path.basename(place) + (f" {key[:8]}" if run.source_sha256 else "")
            groups.setdefault(key, (label, []))[1].append(run)
    return [
        (label, kept) for label, runs in groups.values() if (kept := [r for r in runs if r.val])
    ]


def points(run, x: str, lines: list | None = None) -> list[tuple[float, float]]:
    """(x, loss) of a run's validation lines, or of those given; x is "time" in seconds, "tokens", or "steps"."""
    lines = run.val if lines is None else lines
    if x == "time":
        return [(time / 1000, loss) for _, loss, time in lines if time is not None]
    scale = run.batch_tokens if x == "tokens" else 1
    return [(step * scale, loss) for step, loss, _ in lines]


def mean_line(runs, x: str) -> list[tuple[float, float]]:
    """Mean x and mean loss over the runs, at the steps that all of them validated."""
    shared = set.intersection(*({step for step, _, _ in run.val} for run in runs))
    lines = [
        [p for p, (step, _, _) in zip(points(run, x), run.val) if step in shared] for run in runs
    ]
    if len({len(line) for line in lines}) > 1:
        return []
    return [tuple(sum(values) / len(values) for values in zip(*column)) for column in zip(*lines)]


def draw(axis, groups, x: str, target: float | None = None):
    """One panel: every group's runs and mean."""
    longest = 0.0
    for i, (label, runs) in enumerate(groups):
        colour = COLOURS[i % len(COLOURS)]
        style = ("-", "--", ":", "-.")[i // len(COLOURS) % 4]
        lines = [line for run in runs if (line := points(run, x))]
        if not lines:
            continue
        shown = [
            points(run, x, run.train) if len(run.val) < 3 and run.train else points(run, x)
            for run in runs
        ]
        for line in filter(None, shown):
            axis.plot(*zip(*line), color=colour, linewidth=0.7, alpha=0.35)
        mean = mean_line(runs, x) or max(lines, key=len)
        final = verify.spread([run.val_loss for run in runs])
        note = (
            f"{label}: {verify.plus_minus(final)} (n={len(runs)})"
            if final["mean"] is not None
            else label
        )
        axis.plot(
            *zip(*mean),
            color=colour,
            linewidth=1.8,
            linestyle=style,
            marker="o",
            markersize=2.5,
            label=note,
        )
        longest = max(longest, *(line[-1][0] for line in lines))
    if target is not None:
        axis.axhline(target, color="black", linewidth=0.9, linestyle=(0, (4, 3)))
        axis.annotate(
            f"target {target:g}",
            (0, target),
            xycoords=("axes fraction", "data"),
            xytext=(5, 3),
            textcoords="offset points",
            fontsize=8,
        )  # curves are high above the target at the left
    axis.set_xlabel(
        {
            "time": "train time (s)",
            "tokens": "tokens",
            "steps": "step (batch size not in every log)",
        }[x]
    )
    by_training = any(len(run.val) < 3 and run.train for _, runs in groups for run in runs)
    axis.set_ylabel("validation loss" + " (dots) and training loss (lines)" * by_training)
    axis.grid(alpha=0.25, linewidth=0.6)
    crop(axis, groups, target)
    if longest:
        axis.set_xlim(0, longest * 1.02)


def crop(axis, groups, target):
    """The first few per cent of a run would flatten all the rest: start below them."""
    shown = [
        run.train + run.val if len(run.val) < 3 else run.val for _, runs in groups for run in runs
    ]
    finite = [[loss for _, loss, _ in lines if loss < 1e6] for lines in shown]
    late = [
        loss
        for lines in shown
        for step, loss, _ in lines
        if len(lines) > 3 and step >= 0.08 * lines[-1][0] and loss < 1e6
    ]
    low = min(
        [min(losses) for losses in finite if losses] + ([target] if target is not None else []),
        default=None,
    )
    if late and low is not None and max(late) > low:
        margin = 0.05 * (max(late) - low)
        axis.set_ylim(low - margin, max(late) + margin)


def figure(groups, axes, target=None, title=""):
    """A figure with one panel per entry of `axes` ("time", "tokens") and a legend below."""
    from matplotlib.figure import (
        Figure,
    )  # takes a while to import, so only when a picture is asked for

    if "tokens" in axes and any(run.batch_tokens is None for _, runs in groups for run in runs):
        axes = ["steps" if x == "tokens" else x for x in axes]
    rows = len(groups)
    picture = Figure(
        figsize=(6.2 * len(axes) + 0.6, 4.6 + 0.2 * rows), dpi=120, layout="constrained"
    )
    panels = picture.subplots(1, len(axes), squeeze=False)[0]
    for panel, x in zip(panels, axes):
        draw(panel, groups, x, target)
    handles = max(
        (panel.get_legend_handles_labels() for panel in panels), key=lambda pair: len(pair[0])
    )
    picture.legend(
        *handles,
        loc="outside lower center",
        fontsize=8 if len(axes) > 1 else 7,
        frameon=False,
        ncols=1 if rows < 5 else 2,
    )
    if title:
        picture.suptitle(title, fontsize=11)
    return picture


def save(picture, path):
    """Write the picture, in the format that the file's ending names."""
    buffer = io.BytesIO()
    suffix = os.path.splitext(path)[1][1:]
    picture.savefig(buffer, format=suffix, metadata={"Software": None} if suffix == "png" else None)
    write_atomic(path, buffer.getvalue())


@command("plot")
def main(argv) -> int:
    parser = Parser("plot", __doc__)
    parser.add_argument(
        "logs", nargs="+", metavar="LOG", help="logs, record folders, or folders of logs"
    )
    parser.add_argument(
        "-o", "--out", required=True, metavar="FILE", help=f"picture to write: {', '.join(FORMATS)}"
    )
    parser.add_argument(
        "--target",
        type=float,
        help="draw a line at this loss (default: the logs' own, if they agree)",
    )
    parser.add_argument(
        "--x", choices=("time", "tokens", "both"), default="both", help="default: %(default)s"
    )
    args = parser.parse_args(argv)
    if os.path.splitext(args.out)[1] not in FORMATS:
        raise BadInput(f"{printable(args.out)} must end in {', '.join(FORMATS)}")
    if not os.path.isdir(os.path.dirname(os.path.abspath(args.out))):
        raise BadInput(f"the folder of {printable(args.out)} does not exist; make it first")
    for path in args.logs:
        if not os.path.exists(path):
            raise BadInput(f"{printable(path)} does not exist; give logs or folders")
    groups = load(args.logs)
    if not groups:
        raise BadInput(
            f"no validation line in {printable(' '.join(args.logs))}; give training logs"
        )
    targets = {logs.number((run.config or {}).get("target")) for _, runs in groups for run in runs}
    target = (
        args.target if args.target is not None else targets.pop() if len(targets) == 1 else None
    )
    axes = ["time", "tokens"] if args.x == "both" else [args.x]
    if all(time is None for _, runs in groups for run in runs for _, _, time in run.val):
        if args.x == "time":
            raise BadInput("these logs hold no times; use --x tokens")
        axes = ["tokens"]
    save(figure(groups, axes, target), args.out)
    runs = sum(len(runs) for _, runs in groups)
    emit(
        f"{args.out}: {runs} run{'s' * (runs != 1)} of {len(groups)} source{'s' * (len(groups) != 1)}"
    )
    return 0
