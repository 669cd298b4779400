"""Rewrite the leaderboards from the record folders.

    python -m records board [--check]

Writes the parts of records/README.md (and of the repository's README.md, where it has them) that
stand between comments such as `<!-- board:laptop -->` and `<!-- /board:laptop -->`, and draws
history.png and loss.png. --check writes nothing and exits with 1 where a text is stale.

Only folders that pass verify have a place. The one_gpu and laptop tracks are ranked by paired
races, because seconds of different machines cannot be compared: a record's race.json holds the
times of a race against a reference record on one machine, the product of their ratios along the
chain of references is its time relative to the track's first record, and only the first record and
winners of their race are ranked.
"""

import datetime
import os
import re
import sys

from records.tools import folders, plot, stats
from records.tools.command import (
    BadInput,
    Parser,
    between,
    command,
    emit,
    markdown,
    need,
    replace_between,
    write_atomic,
)
from records.tools.folders import Record
from records.tools.logs import number
from records.tools.stats import plus_minus
from records.tools.tracks import TRACKS

MARKED = {7.8: "preset nov2024", 0.665: "preset gpt2_small"}  # of the public history
# The public 8xH100 record for 3.28 on FineWeb, in minutes: the work of the contributors of llm.c
# and modded-nanogpt.
PUBLIC_HISTORY = (
    (45.0, "llm.c baseline"),
    (12.0, "Muon, QK-norm, ReLU², rotary, zero-init projections"),
    (10.8, "untied head"),
    (8.2, "value and embedding residuals, momentum warm-up, softcap 30"),
    (7.8, "bfloat16 activations (8 November 2024: the nov2024 preset)"),
    (7.2, "U-net skips, double learning rate"),
    (5.0, "FlexAttention, 64k-token rows, document masks"),
    (4.7, "attention window warm-up"),
    (4.4, "value embeddings"),
    (3.6, "sparser value embeddings, block sliding window"),
    (3.4, "softcap 15"),
    (3.1, "FP8 head, learning rate decays to 0.1"),
    (3.0, "merged QKV, long and short windows, attention scale 0.12, batched Muon"),
    (2.9, "smaller batch, rows start at a document"),
    (2.7, "symmetric matmul kernel, FlashAttention 3, documents of at most 2048 tokens"),
    (2.5, "YaRN window extension, async loader, smear"),
    (2.3, "bfloat16 cross-entropy, Polar Express, backout, NorMuon, cautious weight decay"),
    (2.0, "batch-size schedule, head tied then untied, multi-token prediction"),
    (1.8, "paired-head attention, fused ReLU² kernel"),
    (1.65, "bigram hash embedding"),
    (1.5, "FP8 head kernels"),
    (1.44, "learning rate decays to 0.15, last layers attend from one saved activation"),
    (1.41, "queries and keys orthogonalised in pairs of heads"),
    (1.36, "MUDD skips"),
    (1.35, "exclusive self-attention (XSA) of learned strength"),
    (1.32, "sign trick for bigrams, FP8 MLP up-projection"),
    (1.27, "MUDD gates, dynamically composed heads"),
    (1.24, "prefix-token loss, faster ReLU² kernel"),
    (1.23, "FP8 MLP down-projection"),
    (1.13, "96-wide queries and keys, FP8 QKV, FP8 in the MLP's backward pass"),
    (1.126, "in validation, tokens that GPT-2's tokenizer never puts next have no probability"),
    (0.665, "sampled softmax, n-gram table of 84.6M rows, ANVIL, CUDA graphs (September 2026)"),
)
# The days of these, by the table in modded-nanogpt's README; where an entry sums up several
# records, that of the last of them.
PUBLIC_DAYS = """
    2024-05-28 2024-10-18 2024-11-03 2024-11-06 2024-11-08 2024-11-10 2024-11-19 2024-11-24
    2024-12-04 2024-12-17 2025-01-04 2025-01-13 2025-01-16 2025-07-13 2025-09-03 2025-09-18
    2025-11-10 2025-12-22 2026-01-10 2026-01-19 2026-01-31 2026-03-06 2026-04-08 2026-04-22
    2026-04-29 2026-05-21 2026-05-27 2026-07-13 2026-07-17 2026-09-18
    2026-09-18 2026-09-28
""".split()


def title(record: Record) -> str:
    return re.sub(r"^\d{4}-\d\d-\d\d_", "", record.name).replace("_", " ")


def read_track(track: str) -> list[Record]:
    """The track's records by date and name, with their time relative to the first one."""
    place = os.path.join(folders.RECORDS, track)
    names = sorted(os.listdir(place)) if os.path.isdir(place) else []
    paths = [os.path.join(place, name) for name in names if name != "__pycache__"]
    records = [folders.check_record(path, track) for path in paths if os.path.isdir(path)]
    good = [record for record in records if record.ok]
    by_name, settled = {record.name: record for record in good}, TRACKS[track].settled
    best = good[0] if good else None
    for record in good if TRACKS[track].raced else ():
        record.relative = relative_time(record, by_name, good[0])
        if record.relative is None:
            record.unranked = record.unranked or "its race leads to no record that is here"
        elif record is not best and record.reference != best.name and record.name not in settled:
            # a ratio against a slower one says nothing of who is faster
            words = f"it was raced against {record.reference}, when {best.name} was the fastest"
            record.unranked = record.unranked or words
        if not record.unranked and record.relative < best.relative:
            best = record
    return records


def relative_time(record, by_name, first) -> float | None:
    """Product of the race ratios back to the first record; None where the chain breaks or bites its
    tail."""
    product, seen = 1.0, set()
    while record is not first:
        if record is None or record.found is None or record.name in seen:
            return None
        seen.add(record.name)
        product *= record.found["ratio"]
        record = by_name.get(record.reference)
    return product


def peak(record: Record) -> float:
    """Bytes of memory of the run that took most."""
    return max(
        number((run.result or {}).get("peak_memory_bytes")) or 0 for run in record.group.runs
    )


def ranked(track: str, records: list[Record]) -> list[Record]:
    """Those that have a place, best first."""

    def key(record):
        if TRACKS[track].raced:
            return record.relative, record.name
        if track == "memory":
            return peak(record), record.name
        return record.group.train_time["mean"], record.name

    return sorted((r for r in records if r.ok and not r.unranked), key=key)


def row(*cells) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def leaderboard(track: str, records: list[Record]) -> str:
    """The track's table, best record first, and what has no place in it."""
    if not records:
        return "No record yet."
    if TRACKS[track].raced:
        columns = ["time relative to the first", "against its reference [95 % CI]"]
    else:
        columns = ["peak memory" if track == "memory" else "train time"]
    lines = [row("#", "record", *columns, "val loss", "n")]
    lines.append("|---:|---|" + "---:|" * (len(columns) + 2))
    for place, record in enumerate(ranked(track, records), 1):
        link = f"[{record.name}]({track}/{record.name})"
        n = len(record.group.runs)
        lines.append(row(place, link, *measured(track, record), plus_minus(record.level), n))
    lines += [""] * any(record.unranked or not record.ok for record in records)
    for record in records:
        if not record.ok:
            name, why = markdown(record.name, 80), markdown(record.group.reasons[0], 300)
            lines.append(f"- Refused by verify: {name}: {why}.")
        elif record.unranked:
            link = f"[{record.name}]({track}/{record.name})"
            lines.append(f"- Not ranked: {link}: {markdown(record.unranked, 300)}.")
    return "\n".join(lines)


def measured(track: str, record: Record) -> list[str]:
    """The cells of what the track is ranked by."""
    if TRACKS[track].raced:
        race = f"{stats.interval(record.found)} against {record.reference}" if record.found else "–"
        return [f"{record.relative:.3f}", race]
    if track == "memory":
        return [f"{peak(record) / 2**30:.2f} GiB"]
    return [f"{plus_minus(record.group.train_time, 1000, 2)} s"]


def ablation(records: list[Record]) -> str:
    """What each piece buys: the laptop records in order, each against the one it was raced
    against."""
    records = [record for record in records if record.ok]
    if not records:
        return "No laptop record yet."
    against = "train time against the step before [95 % CI]"
    lines = [row("step", "val loss", "n", against, "verdict", "in all")]
    lines.append("|---|---:|---:|---:|---|---:|")
    previous = None
    for r in records:
        text = stats.interval(r.found) if r.found else "–"
        if r.found and r.reference != previous:
            text += f" (against {r.reference})"
        total = f"{r.relative:.3f}" if r.relative is not None else "–"
        word = r.found["word"] if r.found else "start"
        lines.append(row(title(r), plus_minus(r.level), len(r.group.runs), text, word, total))
        previous = r.name
    return "\n".join(lines)


def public_table() -> str:
    lines = [row("minutes", "what was new"), "|---:|---|"]
    lines += [row(f"{minutes:g}", what) for minutes, what in PUBLIC_HISTORY]
    return "\n".join(lines)


def texts(tracks: dict) -> dict[str, dict[str, str]]:
    """path -> block name -> text, for every file that board keeps."""
    laptop = tracks["laptop"]
    blocks = {f"board:{track}": leaderboard(track, records) for track, records in tracks.items()}
    blocks["board:ablation"] = ablation(laptop)
    blocks["board:public"] = public_table()
    blocks["board:pictures"] = "![Public and laptop history](history.png)"
    if laptop:
        blocks["board:pictures"] += "\n\n![Loss of the ranked laptop records](loss.png)"
    wanted = {os.path.join(folders.RECORDS, "README.md"): blocks}
    top = os.path.join(root(), "README.md")
    if os.path.isfile(top) and between(read(top), "board:ablation") is not None:
        wanted[top] = {"board:ablation": blocks["board:ablation"]}
    return wanted


def root() -> str:
    return os.path.dirname(folders.RECORDS)


def read(path) -> str:
    with open(path, encoding="utf-8", newline="") as f:
        return f.read()


def draw_public(axis):
    """The public record: others' work, for reference."""
    minutes = [m for m, _ in PUBLIC_HISTORY]
    days = [datetime.date.fromisoformat(day) for day in PUBLIC_DAYS]
    axis.step(days, minutes, where="post", color="#888888", linewidth=1.5)
    axis.plot(days, minutes, "o", color="#888888", markersize=4)
    text = dict(textcoords="offset points", fontsize=9)
    for i, offset in ((0, (6, 2)), (-1, (-34, 9))):
        axis.annotate(f"{minutes[i]:g} min", (days[i], minutes[i]), xytext=offset, **text)
    for time, preset in MARKED.items():
        end, orange = (days[minutes.index(time)], time), plot.COLOURS[1]
        axis.plot(*end, "o", color=orange, markersize=8)
        late = end[0] > days[len(days) // 2]  # then there is room at its lower left
        place = dict(xytext=(-8, -14), ha="right") if late else dict(xytext=(8, 8))
        axis.annotate(f"{time:g} min: {preset}", end, color=orange, **place, **text)
    log_scale(axis, (0.5, 1, 2, 5, 10, 20, 50))
    axis.tick_params(axis="x", labelrotation=35)
    axis.set_ylabel("minutes to val loss 3.28 on 8×H100")
    axis.set_title("Public record: the work of others, for reference only", fontsize=11)


def log_scale(axis, ticks):
    axis.set_yscale("log")
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()


def draw_laptop(axis, laptop: list[Record]):
    """Our laptop records, relative to the first; those without a place are hollow."""
    known = [r for r in laptop if r.relative is not None]
    values = [r.relative for r in known]
    axis.step(range(len(known)), values, where="post", color=plot.COLOURS[0], linewidth=1.5)
    for i, record in enumerate(known):
        face = "white" if record.unranked else plot.COLOURS[0]
        axis.plot(i, record.relative, "o", color=plot.COLOURS[0], markerfacecolor=face)
        text = dict(xytext=(4, 6), textcoords="offset points", fontsize=9)
        axis.annotate(f"{record.relative:.3f}", (i, record.relative), **text)
    axis.set_xticks(
        range(len(known)), [title(r) for r in known], rotation=35, ha="right", fontsize=8
    )
    log_scale(axis, (0.1, 0.2, 0.5, 1))
    axis.set_ylim(min(0.08, *values) * 0.9, max(values) * 1.35)
    axis.margins(x=0.1)
    if any(record.unranked for record in known):
        axis.plot([], [], "o", color=plot.COLOURS[0], markerfacecolor="white", label="not ranked")
        axis.legend(loc="upper right", frameon=False, fontsize=9)


def draw_history(path, laptop: list[Record]):
    """Left: the public record, others' work. Right: our laptop records."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(13, 5.2), dpi=110, layout="constrained")
    left, right = picture.subplots(1, 2)
    draw_public(left)
    if any(r.relative is not None for r in laptop):
        draw_laptop(right, laptop)
    else:
        right.set_axis_off()
        right.text(0.5, 0.5, "no laptop record yet", ha="center", transform=right.transAxes)
    right.set_ylabel("train time relative to the first record")
    right.set_title("This repository's laptop track, by paired race", fontsize=11)
    for axis in (left, right):
        axis.grid(alpha=0.25, linewidth=0.6)
    plot.save(picture, path)


def draw_loss(path, laptop: list[Record]):
    """Final validation loss of the ranked laptop records over their time relative to the first
    record's: the one axis on which different machines compare."""
    from matplotlib.figure import Figure

    best = ranked("laptop", laptop)[::-1]
    picture = Figure(figsize=(8.5, 4.6), dpi=110, layout="constrained")
    axis = picture.subplots()
    place = os.path.join(folders.RECORDS, "laptop")
    for record, colour in zip(best[-len(plot.COLOURS) :], plot.COLOURS, strict=False):
        curve = plot.load([os.path.join(place, record.name)])[0]
        curve.scale = record.relative / curve.runs[0].planned
        line = plot.mean_line(curve, "steps", train=True)
        axis.plot(*line.T, color=colour, linewidth=1.6)
        end = record.relative, record.level["mean"]
        axis.errorbar(*end, yerr=record.level["std"], fmt="o", color=colour, capsize=2)
    draw_names(axis, best[-len(plot.COLOURS) :])
    target = TRACKS["laptop"].target
    axis.axhline(target, color="black", linewidth=0.9, linestyle=(0, (4, 3)))
    axis.annotate(
        f"target {target:g}",
        (0.01, target),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        fontsize=8,
    )
    axis.set_xscale("log")
    ticks = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.set_xlim(0.06, 1.3)
    axis.margins(y=0.3)
    axis.set_xlabel("train time relative to that of the first record, by paired race")
    axis.set_ylabel("final validation loss, mean and deviation over seeds")
    axis.grid(alpha=0.25, linewidth=0.6)
    plot.save(picture, path)


def draw_names(axis, records: list[Record]):
    """The records' names below their last points, stacked where these are close."""
    level, previous = 0, None
    lowest = min(record.level["mean"] for record in records)
    for record, colour in sorted(
        zip(records, plot.COLOURS, strict=False), key=lambda pair: pair[0].relative
    ):
        close = previous is not None and record.relative < 1.8 * previous
        level = level + 1 if close else 0
        end, previous = (record.relative, lowest), record.relative
        axis.annotate(
            title(record),
            end,
            xytext=(0, -24 - 11 * level),
            color=colour,
            textcoords="offset points",
            fontsize=8,
            ha="center",
        )


def draw_pictures(laptop: list[Record]):
    draw_history(os.path.join(folders.RECORDS, "history.png"), laptop)
    if ranked("laptop", laptop):
        draw_loss(os.path.join(folders.RECORDS, "loss.png"), laptop)


@command("board")
def main(argv) -> int:
    parser = Parser("board", __doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 where a text is stale"
    )
    args = parser.parse_args(argv)
    need("scipy", *([] if args.check else ["matplotlib"]))
    tracks = {track: read_track(track) for track in TRACKS}
    stale = {}
    for path, blocks in texts(tracks).items():
        old = new = read(path)
        for name, text in blocks.items():
            try:
                new = replace_between(new, name, text)
            except ValueError as error:
                raise BadInput(f"{os.path.relpath(path, root())}: {error}; put it back") from None
        if new != old:
            stale[path] = new
    names = ", ".join(os.path.relpath(path, root()) for path in stale)
    if args.check and stale:
        print(f"records board: {names} is stale; run python -m records board", file=sys.stderr)
        return 1
    if not args.check:
        for path, new in stale.items():
            write_atomic(path, new.encode())
        draw_pictures(tracks["laptop"])
    for track, records in tracks.items():
        for record in records:
            if not record.ok:
                why = record.group.reasons[0]
                print(f"records board: {track}/{record.name}: {why}", file=sys.stderr)
            elif TRACKS[track].raced and record.name not in TRACKS[track].settled:
                line = f'"{record.name}": "{record.group.source_sha256}"'
                print(f"records board: new; once it is in, settle it in tools/tracks.py: {line}")
    count = sum(map(len, tracks.values()))
    done = f"rewrote {names}" if stale else "the text was up to date"
    emit(f"{count} record{'s' * (count != 1)}; {done}")
    return 0
