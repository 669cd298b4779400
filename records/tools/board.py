"""Regenerate the leaderboards from the record folders: python -m records board [--check]

Rewrites the parts of records/README.md (and of the repository's README.md, where it has them) that stand between
comments such as `<!-- board:laptop -->` and `<!-- /board:laptop -->`, and draws history.png and loss.png.
--check writes nothing and exits with 1 where a text is stale.

The one_gpu and laptop tracks are ranked by paired races, because seconds of different machines cannot be compared: a
record's race.json, made by race.py, holds the ratio of its train time to a reference record's on one machine, and the
product of these ratios along the chain of references is its time relative to the track's first record.
"""

import math
import os
import re
import sys
from dataclasses import dataclass

from records.tools import logs, plot, verify
from records.tools.command import (
    BadInput,
    Parser,
    between,
    command,
    emit,
    printable,
    replace_between,
    write_atomic,
)
from records.tools.logs import TRACKS, number

RECORDS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ROOT = os.path.dirname(RECORDS)
RACED = ("one_gpu", "laptop")  # ranked by race, not by seconds

# The public 8xH100 record for 3.28 on FineWeb, in minutes: the work of the llm.c and modded-nanogpt contributors.
PUBLIC_HISTORY = (
    (45.0, "llm.c baseline"),
    (12.0, "Muon, QK-norm, ReLU², rotary, zero-init projections"),
    (10.8, "untied head"),
    (8.2, "value and embedding residuals, momentum warm-up, softcap 30"),
    (7.8, "bfloat16 activations (November 2024: where this repository starts)"),
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
    (2.5, "YaRN window extension, async loader, smear, sparse attention gate"),
    (2.3, "bfloat16 cross-entropy, Polar Express, backout, NorMuon, cautious weight decay"),
    (2.0, "batch-size schedule, head tied then untied, multi-token prediction"),
    (1.8, "paired-head attention, fused ReLU² kernel"),
    (1.65, "bigram hash embedding"),
    (1.5, "FP8 head kernels"),
    (1.44, "learning rate decays to 0.15, last layers attend from a saved activation, kernels"),
    (1.41, "queries and keys orthogonalised in pairs of heads"),
    (1.36, "MUDD skips"),
    (1.35, "exclusive self-attention (XSA) of learned strength"),
    (1.32, "sign trick for bigrams, FP8 MLP up-projection"),
    (1.27, "MUDD gates, dynamically composed heads"),
    (1.24, "prefix-token loss, faster ReLU² kernel"),
    (1.23, "FP8 MLP down-projection (July 2026)"),
)
# Claims of pull requests at github.com/KellerJordan/modded-nanogpt that were not merged by September 2026:
# number, minutes, state, what is new.
PENDING = (
    (
        349,
        1.08,
        "closed: #360 replaces it",
        "64.7 s (n = 12): ANVIL optimizer, FP8 throughout, new schedule",
    ),
    (
        366,
        1.13,
        "open",
        "67.9 s (n = 12): hashed n-grams in the host's memory, 80M rows, added to values",
    ),
    (
        360,
        0.67,
        "open; reviewers dispute the table",
        "39.9 s (n = 18): sampled softmax in the training loss, a table of bigrams and trigrams with "
        "84.6M rows (the merged record's has 0.38M), ANVIL, FP8 throughout",
    ),
)


class Broken(Exception):
    """A record folder that cannot be read; one line."""


@dataclass
class Record:
    """One record folder, as its result.json and race.json tell it."""

    name: str
    track: str
    result: dict
    race: dict | None
    reference: str | None = None  # name of the record it raced against
    relative: float | None = None  # train time over that of the track's first record

    @property
    def title(self) -> str:
        return re.sub(r"^\d{4}-\d\d-\d\d_", "", self.name).replace("_", " ")

    @property
    def loss(self) -> str:
        return verify.plus_minus(self.result["val_loss"])


def load(folder, file_name) -> dict | None:
    path = os.path.join(folder, file_name)
    if not os.path.isfile(path):
        return None
    with open(path, "rb") as f:
        value = logs.parse_json(f.read(1 << 20))
    if not isinstance(value, dict):
        raise Broken(f"{os.path.relpath(path, ROOT)} is not a JSON object; make it again")
    return value


def check_shape(name, result, race):
    """Refuse what the tables below could not print."""
    for key in ("val_loss", "train_time_ms"):
        values = result.get(key)
        if (
            not isinstance(values, dict)
            or number(values.get("mean")) is None
            or "std" not in values
        ):
            raise Broken(
                f"{name}/result.json has no {key} statistics; make the folder with submit.py"
            )
    if (
        number(result.get("n")) is None
        or not isinstance(result.get("runs"), list)
        or not result["runs"]
    ):
        raise Broken(f"{name}/result.json lists no runs; make the folder with submit.py")
    if race is not None:
        ratio, interval = number(race.get("ratio")), race.get("ci")
        if ratio is None or ratio <= 0 or not isinstance(race.get("reference"), str):
            raise Broken(
                f"{name}/race.json needs a reference and a ratio above 0; make it with race.py"
            )
        if not (
            isinstance(interval, list) and len(interval) == 2 and None not in map(number, interval)
        ):
            raise Broken(f"{name}/race.json needs ci, a list of two numbers; make it with race.py")


def read_track(track: str) -> list[Record]:
    """The track's records by date and name, with their time relative to the first one."""
    place = os.path.join(RECORDS, track)
    records = []
    for name in sorted(os.listdir(place)) if os.path.isdir(place) else []:
        folder = os.path.join(place, name)
        if name.startswith(".") or (result := load(folder, "result.json")) is None:
            continue
        race = load(folder, "race.json")
        check_shape(f"{track}/{name}", result, race)
        records.append(Record(name, track, result, race))
    by_name = {record.name: record for record in records}
    for record in records:
        if record.race:
            parts = re.split(r"[/\\\s]+", record.race["reference"])
            record.reference = next((part for part in reversed(parts) if part in by_name), None)
    if records:
        first = next((r for r in records if r.race is None), None)
        for record in records:
            record.relative = relative_time(record, by_name, first)
    return records


def relative_time(record, by_name, first) -> float | None:
    """Product of the race ratios back to the first record; None where the chain breaks or bites its tail."""
    product, seen = 1.0, set()
    while record is not first:
        if record is None or record.race is None or record.name in seen:
            return None
        seen.add(record.name)
        product *= float(record.race["ratio"])
        record = by_name.get(record.reference)
    return product


def ranked(track: str, records: list[Record]) -> list[Record]:
    """Best first."""

    def key(record):
        if track in RACED:
            return record.relative if record.relative is not None else math.inf
        value = (
            record.result.get("peak_memory_bytes")
            if track == "memory"
            else record.result["train_time_ms"]["mean"]
        )
        return value if number(value) is not None else math.inf

    return sorted(records, key=lambda r: (key(r), r.name))


def race_text(record: Record) -> str:
    """ "0.812 [0.795, 0.829]"."""
    if record.race is None:
        return "–"
    low, high = record.race["ci"]
    return f"{record.race['ratio']:.3f} [{low:.3f}, {high:.3f}]"


def row(*cells) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def leaderboard(track: str, records: list[Record]) -> str:
    """The track's table, best record first."""
    if not records:
        return "No record yet."
    if track in RACED:
        lines = [
            row(
                "#",
                "record",
                "time relative to the first",
                "against its reference [95 % CI]",
                "val loss",
                "n",
            ),
            "|---:|---|---:|---:|---:|---:|",
        ]
    elif track == "memory":
        lines = [row("#", "record", "peak memory", "val loss", "n"), "|---:|---|---:|---:|---:|"]
    else:
        lines = [row("#", "record", "train time", "val loss", "n"), "|---:|---|---:|---:|---:|"]
    for place, r in enumerate(ranked(track, records), 1):
        link, n = f"[{r.name}]({track}/{r.name})", r.result["n"]
        if track in RACED:
            relative = f"{r.relative:.3f}" if r.relative is not None else "not raced"
            against = race_text(r) + (f" against {r.reference}" if r.reference else "")
            lines.append(row(place, link, relative, against, r.loss, n))
        elif track == "memory":
            peak = number(r.result.get("peak_memory_bytes"))
            lines.append(row(place, link, f"{peak / 2**30:.2f} GiB" if peak else "–", r.loss, n))
        else:
            lines.append(
                row(
                    place,
                    link,
                    f"{verify.plus_minus(r.result['train_time_ms'], 1000, 2)} s",
                    r.loss,
                    n,
                )
            )
    return "\n".join(lines)


def effect(record: Record) -> str:
    """What the race says in a word or two: its own verdict, which also weighs the loss, else the interval."""
    if record.race is None:
        return "start" if record.relative == 1.0 else "not raced"
    low, high = record.race["ci"]
    by_interval = "faster" if high < 1 else "slower" if low > 1 else "no difference shown"
    verdict = record.race.get("faster")
    if verdict == "no":
        return "slower" if by_interval == "slower" else "loses: loss is worse"
    level = record.race.get("level_per_look", 0.0)
    if verdict == "not shown" and by_interval == "faster":
        return (
            "less time, not at the race's level"
            if record.race.get("p_loss_not_worse", 1.0) <= level
            else "less time; equal loss not shown"
        )
    return {"yes": "faster", None: by_interval}.get(verdict, "no difference shown")


def ablation(records: list[Record]) -> str:
    """What each piece buys: the laptop records in order, each against the one it was raced against."""
    if not records:
        return "No laptop record yet."
    lines = [
        row(
            "step",
            "val loss",
            "n",
            "train time against the step before [95 % CI]",
            "verdict",
            "in all",
        ),
        "|---|---:|---:|---:|---|---:|",
    ]
    previous = None
    for r in records:
        against = race_text(r)
        if r.race is not None and r.reference != previous:
            against += f" (against {r.reference or printable(r.race['reference'], 60)})"
        total = f"{r.relative:.3f}" if r.relative is not None else "–"
        lines.append(row(r.title, r.loss, r.result["n"], against, effect(r), total))
        previous = r.name
    return "\n".join(lines)


def public_table() -> str:
    lines = [row("minutes", "what was new"), "|---:|---|"]
    lines += [row(f"{minutes:g}", what) for minutes, what in PUBLIC_HISTORY]
    lines += ["", "Claimed, not merged (as of September 2026):", ""]
    lines += [row("minutes", "pull request", "state", "what is new"), "|---:|---|---|---|"]
    for pull, minutes, state, what in PENDING:
        link = f"[#{pull}](https://github.com/KellerJordan/modded-nanogpt/pull/{pull})"
        lines.append(row(f"{minutes:g}", link, state, what))
    return "\n".join(lines)


def texts(tracks: dict) -> dict[str, dict[str, str]]:
    """path -> block name -> text, for every file that board.py keeps."""
    laptop = tracks["laptop"]
    blocks = {f"board:{track}": leaderboard(track, records) for track, records in tracks.items()}
    blocks["board:ablation"] = ablation(laptop)
    blocks["board:public"] = public_table()
    blocks["board:pictures"] = "![Public and laptop history](history.png)" + (
        "\n\n![Validation loss of the laptop records over train time](loss.png)" if laptop else ""
    )
    wanted = {os.path.join(RECORDS, "README.md"): blocks}
    top = os.path.join(ROOT, "README.md")
    if os.path.isfile(top) and between(read(top), "board:ablation") is not None:
        wanted[top] = {"board:ablation": blocks["board:ablation"]}
    return wanted


def read(path) -> str:
    with open(path, encoding="utf-8", newline="") as f:
        return f.read()


def draw_history(path, laptop: list[Record]):
    """Left: the public record, others' work. Right: our laptop records, relative to the first."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(13, 5.2), dpi=110, layout="constrained")
    left, right = picture.subplots(1, 2)
    minutes = [m for m, _ in PUBLIC_HISTORY]
    left.step(range(len(minutes)), minutes, where="post", color="#888888", linewidth=1.5)
    left.plot(range(len(minutes)), minutes, "o", color="#888888", markersize=4)
    start = minutes.index(7.8)
    left.plot([start], [7.8], "o", color=plot.COLOURS[1], markersize=8)
    for i, place in ((0, (6, 2)), (start, (8, 6)), (len(minutes) - 1, (-34, 9))):
        left.annotate(
            f"{minutes[i]:g} min",
            (i, minutes[i]),
            xytext=place,
            textcoords="offset points",
            fontsize=9,
        )
    left.annotate(
        "this repository starts here",
        (start, 7.8),
        xytext=(8, 20),
        textcoords="offset points",
        fontsize=9,
        color=plot.COLOURS[1],
    )
    left.set_yscale("log")
    left.set_yticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
    left.minorticks_off()
    left.set_xticks([])
    left.set_xlabel("records in order, 2024 to July 2026")
    left.set_ylabel("minutes to val loss 3.28 on 8×H100")
    left.set_title("Public record: the work of others, for reference only", fontsize=11)
    known = [r for r in laptop if r.relative is not None]
    if known:
        right.step(
            range(len(known)),
            [r.relative for r in known],
            where="post",
            color=plot.COLOURS[0],
            linewidth=1.5,
        )
        right.plot(
            range(len(known)), [r.relative for r in known], "o", color=plot.COLOURS[0], markersize=5
        )
        for i, r in enumerate(known):
            right.annotate(
                f"{r.relative:.2f}",
                (i, r.relative),
                xytext=(4, 6),
                textcoords="offset points",
                fontsize=9,
            )
        right.set_xticks(
            range(len(known)), [r.title for r in known], rotation=35, ha="right", fontsize=8
        )
        right.set_ylim(0, max(r.relative for r in known) * 1.15)
        right.margins(x=0.08)
    else:
        right.set_xticks([])
        right.set_yticks([])
        right.text(
            0.5, 0.5, "no laptop record yet", ha="center", va="center", transform=right.transAxes
        )
    right.set_ylabel("train time relative to the first record")
    right.set_title("This repository's laptop track, by paired race", fontsize=11)
    for axis in (left, right):
        axis.grid(alpha=0.25, linewidth=0.6)
    plot.save(picture, path)


def draw_pictures(laptop: list[Record]):
    draw_history(os.path.join(RECORDS, "history.png"), laptop)
    if laptop:
        groups = plot.load([os.path.join(RECORDS, "laptop", r.name) for r in laptop])
        target = logs.number(laptop[-1].result.get("target"))
        plot.save(
            plot.figure(
                groups, ["time"], target, "Laptop records, each on the machine it was made on"
            ),
            os.path.join(RECORDS, "loss.png"),
        )


@command("board")
def main(argv) -> int:
    parser = Parser("board", __doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 where a text is stale"
    )
    args = parser.parse_args(argv)
    try:
        tracks = {track: read_track(track) for track in TRACKS}
        stale = {}
        for path, blocks in texts(tracks).items():
            old = new = read(path)
            for name, text in blocks.items():
                new = replace_between(new, name, text)
            if new != old:
                stale[path] = new
        if not args.check:
            for path, new in stale.items():
                write_atomic(path, new.encode())
            draw_pictures(tracks["laptop"])
    except (Broken, ValueError) as error:
        raise BadInput(str(error))
    except OSError as error:
        raise BadInput(f"{error.filename or RECORDS}: {error.strerror}")
    names = ", ".join(os.path.relpath(path, ROOT) for path in stale)
    if args.check and stale:
        print(f"board.py: {names} is stale; run python -m records board", file=sys.stderr)
        return 1
    count = sum(map(len, tracks.values()))
    emit(
        f"{count} record{'s' * (count != 1)}; "
        + (f"rewrote {names}" if stale else "the text was up to date")
    )
    return 0
