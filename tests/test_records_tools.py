"""submit, board and plot of records/tools: folders from logs, boards from folders, pictures."""

import json
import os
import re
import shutil

import numpy as np
import pytest
from test_records_folders import FIRST, LOSSES, TIMES, race_folder, run_id
from test_records_logs import NEW, SOURCE, our_log, public, write
from test_records_verify import RECORDS, laptop_rules, logs_in  # noqa: F401

from records.tools import board, checks, folders, logs, plot, race, stats, submit
from records.tools.tracks import RUN_LOCAL

WORDS = ["--track", "laptop", "--what", "A new idea.", "--why", "It works."]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty records folder in an empty repository."""
    folder = tmp_path / "repo" / "records"
    folder.mkdir(parents=True)
    monkeypatch.setattr(folders, "RECORDS", str(folder))
    with open(os.path.join(RECORDS, "README.md"), encoding="utf-8") as f:
        bare = re.sub(r"(<!-- board:\w+ -->).*?(<!-- /board)", r"\1\n\2", f.read(), flags=re.S)
    (folder / "README.md").write_text(bare, encoding="utf-8")
    return folder


def make(folder, name, date="2026-11-20", source=SOURCE, race=None, **changes):
    """A record folder by submit, each run with an id of its own; race: (reference, ratio)."""
    flags = [*WORDS, "--date", date]
    if race:
        reference, ratio = race
        times = TIMES | {"candidate": [t * ratio for t in TIMES["reference"]]}
        times["candidate"][0] *= 1.001
        path = race_folder(folder.parent, reference, source, date, times=times)
        shift_losses(path, len(name))
        paths = [str(path)]
    else:
        where = folder.parent / "logs" / name
        paths = []
        for seed in range(5):
            header = dict(run_id=run_id(date, 100 * len(name) + seed))
            paths += logs_in(
                where / str(seed), seeds=(seed,), source=source, header=header, **changes
            )
    assert submit.main([name, *paths, *flags]) == 0
    return folder / "laptop" / f"{date}_{name}"


def shift_losses(path, number: int):
    """Other training lines in the logs of every race."""
    for log in path.glob("round*/*.txt"):
        text = log.read_text()
        shift = number / 1000

        def other(line):
            return f"train_loss:{float(line[1]) + shift:.4f}"  # noqa: B023

        log.write_text(re.sub(r"train_loss:(\d\.\d+)", other, text))


def refused(capsys, function, *argv) -> tuple[int, str]:
    return function([str(a) for a in argv]), capsys.readouterr().err


# ------------------------------------------------------------------------------------------ submit


def test_submit(place):
    record = make(place, "adam_w")
    files = ["README.md", *(f"run_{i}.txt" for i in range(5)), "train_gpt.py"]
    assert sorted(os.listdir(record)) == files and folders.check_record(record).ok
    log = (record / "run_0.txt").read_text()
    assert (record / "train_gpt.py").read_text() == SOURCE
    assert SOURCE not in log and log.startswith("=" * 100)
    readme = (record / "README.md").read_text()
    assert "First record of the laptop track" in readme and "1.49" not in readme
    assert "**What changed.** A new idea." in readme and "**Why it works.** It works." in readme
    changed = SOURCE.replace("import torch", "import numpy\nimport torch as t")
    second = make(place, "muon", date="2026-11-21", source=changed, race=(record, 0.8))
    assert "race.json" in os.listdir(second) and folders.check_record(second).ok
    text = (second / "README.md").read_text()
    link = "[2026-11-20_adam_w](../2026-11-20_adam_w)"
    assert f"Against {link}: train_gpt.py +2 −1 lines (7 in all)" in text


def test_long_logs_are_thinned(place, tmp_path):
    """Twelve runs of 1,500 steps: every validation line stays, training lines go until the folder
    is small enough."""
    paths = logs_in(tmp_path / "long", seeds=range(12), config=dict(steps=1500), val_every=100)
    assert sum(map(os.path.getsize, paths)) > 1e6
    assert submit.main(["long", *paths, *WORDS, "--date", "2026-11-20"]) == 0
    folder = place / "laptop" / "2026-11-20_long"
    assert sum(f.stat().st_size for f in folder.iterdir() if f.name != "train_gpt.py") < 100_000
    assert folders.check_record(folder).ok
    before, after = (logs.read_log(path)[0] for path in (paths[3], folder / "run_3.txt"))
    assert after.val == before.val and 2 <= after.train_lines < 60
    thin = submit.thin(paths[0], 1500, 50)
    assert thin.count(b"train_loss") == 50
    assert b"step:1/1500 train" in thin and b"step:1500/1500 train" in thin
    assert submit.thin(paths[0], 40, 50).count(b"train_loss") == 40


@pytest.mark.parametrize(
    "case, text",
    [
        ("one", "one run proves nothing"),
        ("seeds", "seeds repeat"),
        ("sources", "different sources"),
        ("cut", "cut off"),
        ("bare", "holds no source"),
        ("public", "not a log of one run"),
        ("target", "not shown to be below 1.5"),
        ("result", "no result line"),
        ("config", "config differs"),
        ("edited", "edited"),
        ("size", "bytes beside train_gpt.py"),
    ],
)
def test_submit_refuses_and_leaves_nothing(place, tmp_path, capsys, case, text):
    folder = tmp_path / "logs"
    paths = logs_in(folder)
    if case == "one":
        paths = paths[:1]
    elif case == "seeds":
        paths.append(write(folder, "copy.txt", our_log(seed=0)))
    elif case == "sources":
        paths.append(write(folder, "other.txt", our_log(seed=9, source=SOURCE + "\n")))
    elif case == "cut":
        write(folder, "0.txt", our_log()[:-900])
    elif case == "bare":
        write(folder, "0.txt", our_log(with_source=False))
    elif case == "public":
        write(folder, "0.txt", public(NEW))
    elif case == "target":
        paths = [write(folder, f"{i}.txt", our_log(seed=i, loss=1.6 + i / 1000)) for i in range(5)]
    elif case == "result":
        write(folder, "0.txt", "".join(our_log().splitlines(keepends=True)[:-1]))
    elif case == "config":
        write(folder, "0.txt", our_log(config=dict(lr_muon=1)))
    elif case == "edited":
        write(folder, "0.txt", our_log().replace("import", "Import"))
    elif case == "size":
        paths = logs_in(folder, notes="a note\n" * 20_000)
    code, error = refused(capsys, submit.main, "bad", *paths, *WORDS)
    assert code == 1 and text in error, error
    assert os.listdir(place) == ["README.md"]


def test_submit_misuse(place, capsys):
    record = make(place, "idea")
    stamp = (record / "README.md").stat().st_mtime_ns
    log = place.parent / "logs" / "idea" / "0" / "0.txt"
    for argv, text in [
        (["a b", log], "may hold letters"),
        (["../x", log], "may hold letters"),
        (["x", "nowhere"], "does not exist"),
        (["x", log, "--date", "2026-13-01"], "is no date"),
        (["x", place], "no race.json and candidate's logs"),
        (["x", log, "--what", "<b>new</b>"], "--what is not filled in"),
        (["x", log, "--what", " "], "--what is not filled in"),
        (["x", log, "--why", "(Fill in: the idea)"], "--why is not filled in"),
    ]:
        code, error = refused(capsys, submit.main, *WORDS, *argv)
        assert code == 2 and text in error and error.count("\n") == 1, error
    assert refused(capsys, submit.main, "x", log)[0] == 2
    code, error = refused(capsys, submit.main, "idea", log, *WORDS, "--date", "2026-11-20")
    assert (
        code == 2
        and "exists already" in error
        and (record / "README.md").stat().st_mtime_ns == stamp
    )


def test_a_second_record_needs_a_race(place, capsys):
    make(place, "first")
    source = SOURCE + "# x\n"
    paths = []
    for seed in range(4):
        header = dict(run_id=run_id("2026-11-20", 900 + seed))
        where = place.parent / "x" / str(seed)
        paths += logs_in(where, seeds=(seed,), source=source, header=header, loss=1.48 + seed / 1e3)
    code, error = refused(capsys, submit.main, "x", *paths, *WORDS)
    assert code == 1 and "race.json is missing" in error
    assert sorted(os.listdir(place / "laptop")) == ["2026-11-20_first"]


# ------------------------------------------------------------------------------------------- board


def chain(place):
    """Three records, each raced against the one before, the last of them slower than the second."""
    first = make(place, "plain")
    second = make(place, "better", "2026-11-21", SOURCE + "# 1\n", race=(first, 0.8))
    third = make(place, "best", "2026-11-22", SOURCE + "# 2\n", race=(second, 0.5))
    return first, second, third


def test_ranking_by_races(place):
    first, second, third = chain(place)
    records = board.read_track("laptop")
    ratios = [record.relative for record in records]
    assert ratios == pytest.approx([1.0, 0.8, 0.4], rel=1e-3)
    assert [r.name[11:] for r in board.ranked("laptop", records)] == ["best", "better", "plain"]
    table = board.leaderboard("laptop", records).splitlines()
    assert len(table) == 5 and table[3].startswith(
        "| 2 | [2026-11-21_better](laptop/2026-11-21_better) | 0.800 | 0.800 [0.800, 0.801] "
        "against 2026-11-20_plain | 1.492"
    )
    steps = board.ablation(records).splitlines()[2:]
    assert steps[0] == "| plain | 1.4922 ± 0.0017 | 5 | – | start | 1.000 |"
    assert steps[1].endswith("| faster | 0.800 |") and steps[2].endswith("| faster | 0.400 |")
    # levels go along the chain: the reference's, and what the race adds
    worse = sum(b - a for a, b in zip(*LOSSES.values(), strict=True)) / 4
    assert records[2].level["mean"] == pytest.approx(records[0].level["mean"] + 2 * worse)


def test_only_winners_are_ranked(place, capsys):
    first, second, third = chain(place)
    race = json.loads((third / "race.json").read_text())
    slow = race["wall_ms"] | {"candidate": race["wall_ms"]["reference"][::-1]}
    write(third, "race.json", json.dumps(race | {"wall_ms": slow}))  # edited
    hidden = place / "laptop" / ".hidden"
    hidden.mkdir()
    records = board.read_track("laptop")
    assert [r.name[11:] for r in board.ranked("laptop", records)] == ["better", "plain"]
    table = board.leaderboard("laptop", records)
    assert "- Refused by verify: 2026-11-22_best: race.json: it does not show less time" in table
    assert "- Refused by verify: .hidden: the folder's name is not" in table
    assert "best" not in board.ablation(records)
    assert board.main([]) == 0
    printed = capsys.readouterr()
    assert "laptop/2026-11-22_best: race.json" in printed.err
    assert f'settle it in tools/tracks.py: "{second.name}": "' in printed.out


def test_a_place_takes_a_race_against_the_fastest(place):
    first, second, third = chain(place)
    lucky = make(place, "lucky_one", "2026-11-23", SOURCE + "# 3\n", race=(second, 0.4))
    records = board.read_track("laptop")
    assert lucky.name not in [r.name for r in board.ranked("laptop", records)]
    said = "it was raced against 2026-11-21_better, when 2026-11-22_best was the fastest"
    assert f"{lucky.name}): {said}." in board.leaderboard("laptop", records)


def test_names_in_tables_are_text(place):
    make(place, "plain")
    odd = place / "laptop" / "x](http:__evil) | <b>"
    shutil.copytree(place / "laptop" / FIRST.replace("idea", "plain"), odd)
    table = board.leaderboard("laptop", board.read_track("laptop"))
    line = next(line for line in table.splitlines() if "Refused" in line and "evil" in line)
    assert "x\\]\\(http:\\_\\_evil\\) \\| \\<b\\>" in line


@pytest.mark.parametrize(
    "candidate, losses, word",
    [
        ([800.0, 810.0, 805.0], [1.5, 1.5, 1.5001], "faster"),
        ([1200.0, 1210.0, 1205.0], [1.5, 1.5, 1.5001], "slower"),
        ([800.0, 810.0, 805.0], [1.6, 1.6, 1.6001], "less time; equal loss not shown"),
        ([1000.0, 990.0, 1012.0], [1.5, 1.5, 1.5001], "no difference shown"),
    ],
)
def test_effect(candidate, losses, word):
    """What the race shows, whether or not the record has a place."""
    race = dict(
        wall_ms={"reference": [1100.0, 1105.0, 1103.0], "candidate": [t + 100 for t in candidate]},
        startup_ms={who: [100.0] * 3 for who in TIMES},
        losses={"reference": [1.5, 1.5001, 1.5], "candidate": losses},
        looks=[3],
        alpha=0.01,
        loss_margin=0.005,
    )
    found = stats.outcome(race)
    assert found["word"] == word and bool(stats.why_not_faster(found)) is (word != "faster")
    assert stats.times_of(race)["candidate"] == candidate


def test_other_tracks_are_ranked_by_what_they_measure():
    def made(name, time, peak):
        runs = []
        for loss in (3.27, 3.271):
            result = dict(peak_memory_bytes=peak, train_time_ms=time)
            runs.append(logs.Run("x", val=[(1, loss, time)], result=result))
        group = checks.Group(name, "0", runs)
        return folders.Record(f"x/{name}", group, level=group.val_loss)

    records = [made("a", 3000, 2 << 30), made("b", 2000, 3 << 30)]
    row = "| 1 | [b](speed/b) | 2.00 ± 0.00 s | 3.2705 ± 0.0007 | 2 |"
    assert row in board.leaderboard("speed", records)
    row = "| 1 | [a](memory/a) | 2.00 GiB | 3.2705 ± 0.0007 | 2 |"
    assert row in board.leaderboard("memory", records)
    assert board.leaderboard("speed", []) == "No record yet."


def test_submit_races_a_script(place, monkeypatch, capsys):
    """It holds the race itself, against the fastest record, and makes the folder of it."""
    first = make(place, "plain")
    second = make(place, "better", "2026-11-21", SOURCE + "# 1\n", race=(first, 0.8))
    script = place.parent / "idea.py"
    script.write_text(SOURCE + "# 2\n")
    asked = []

    class Held:
        decided = "yes"

    def prepare(args, entries, flags):
        args.out = race_folder(place.parent, second, script.read_text(), "2026-11-22")
        shift_losses(args.out, 7)
        asked.append((str(entries["reference"].path), args.runs, flags))
        return Held

    monkeypatch.setattr(race, "prepare", prepare)
    monkeypatch.setattr(race, "hold", lambda held: 0)
    words = [*WORDS, "--date", "2026-11-22", "--runs", "4"]
    assert submit.main(["idea", str(script), *words]) == 0
    flags = ["--preset", "laptop", "--val_every", "0"]
    assert asked == [(str(second / "train_gpt.py"), 4, flags)]
    assert folders.check_record(place / "laptop" / "2026-11-22_idea").ok
    Held.decided = "no"
    script.write_text(SOURCE + "# 3\n")
    code, error = refused(capsys, submit.main, "worse", script, *words)
    assert code == 1 and "the race was not won: no" in error


def test_board_writes_and_checks(place, capsys):
    make(place, "plain")
    readme, top = place / "README.md", place.parent / "README.md"
    top.write_text("# Repo\n<!-- board:ablation -->\nold\n<!-- /board:ablation -->\nend\n")
    assert board.main(["--check"]) == 1 and "is stale" in capsys.readouterr().err
    assert "old" in top.read_text()
    assert board.main([]) == 0 and board.main(["--check"]) == 0
    assert "| plain | 1.4922 ± 0.0017 | 5 | – | start | 1.000 |" in top.read_text()
    assert top.read_text().endswith("end\n")
    text = readme.read_text(encoding="utf-8")
    assert "[2026-11-20_plain](laptop/2026-11-20_plain)" in text and "| 45 | llm.c" in text
    for name in ("history.png", "loss.png"):
        assert (place / name).read_bytes().startswith(b"\x89PNG")
    before = (place / "history.png").read_bytes()
    assert board.main([]) == 0 and (place / "history.png").read_bytes() == before  # no noise in git
    top.write_text("# Repo without the block\n")
    assert board.main(["--check"]) == 0
    readme.write_text(text.replace("<!-- board:laptop -->", ""))
    code, error = refused(capsys, board.main)
    assert code == 2 and "board:laptop" in error and error.count("\n") == 1


def test_this_repository_is_up_to_date(monkeypatch):
    """A stale leaderboard fails here: run python -m records board."""
    monkeypatch.undo()
    assert board.main(["--check"]) == 0


def test_what_may_differ_between_runs_is_what_the_trainer_says():
    import train_gpt

    assert RUN_LOCAL == train_gpt.LOCAL_FIELDS | {"seed"}


def test_the_public_history_has_a_day_for_every_record():
    assert len(board.PUBLIC_DAYS) == len(board.PUBLIC_HISTORY)
    assert board.PUBLIC_DAYS == sorted(board.PUBLIC_DAYS)
    minutes = [m for m, _ in board.PUBLIC_HISTORY]
    assert board.PUBLIC_DAYS[minutes.index(7.8)] == "2024-11-08"
    assert board.PUBLIC_DAYS[minutes.index(1.65)] == "2026-01-19"


# -------------------------------------------------------------------------------------------- plot


def test_plot(tmp_path, capsys):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    logs_in(ours)
    theirs.mkdir()
    write(theirs, "a.txt", public(NEW, source=SOURCE + "# theirs\n"))
    out = tmp_path / "out.svg"
    assert plot.main([str(ours), "-o", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: 5 runs in 1 curve\n"
    curves = plot.load([str(ours), str(theirs)])
    assert [(curve.label, len(curve.runs)) for curve in curves] == [("ours", 5), ("theirs", 1)]
    axes = plot.figure(curves[:1], ["time", "tokens"], target=1.5).axes
    assert [a.get_xlabel() for a in axes] == ["train time (s)", "tokens"]
    assert plot.figure(curves, ["time", "tokens"]).axes[1].get_xlabel().startswith("step")
    lines = axes[1].get_lines()
    assert len(lines) == 5 + 1 + 1 + 1  # runs, their mean, its end, the target
    assert list(lines[5].get_xdata()) == [0, 10240, 20480, 30720, 40960]
    assert lines[5].get_ydata()[-1] == pytest.approx(1.4922)
    names = [text.get_text() for text in axes[1].texts]
    assert names == ["target 1.5", "ours  1.4922\xa0±\xa00.0017\xa0(5)"]
    ticks = axes[1].xaxis.get_major_formatter()
    assert [ticks(value) for value in (0, 40960, 2.5e6)] == ["0", "40.96k", "2.5M"]
    low, high = axes[0].get_ylim()
    assert low < 1.49 and 4.0 < high < 5.5  # the first loss of 5.5 is cropped
    for name in ("out.png", "out.pdf"):
        flags = ["-o", str(tmp_path / name), "--x", "time", "--train"]
        assert plot.main([str(ours), *flags]) == 0


def test_curves_are_told_apart_by_config(tmp_path):
    """One source and several settings are several curves, whose names say what differs."""
    for rate in (0.02, 0.03):
        for seed in (0, 1):
            config = dict(lr_muon=rate, window=[1, 2] if rate == 0.03 else [1])
            write(tmp_path, f"{rate}_{seed}.txt", our_log(seed=seed, config=config))
    write(tmp_path, "public.txt", public(NEW))
    write(tmp_path, "public2.txt", public(NEW, source=SOURCE + "# 2\n"))
    labels = [curve.label for curve in plot.load([str(tmp_path)])]
    name = tmp_path.name
    assert labels[:2] == [f"{name} lr_muon=0.02, window=[1]", f"{name} lr_muon=0.03, window=[1, 2]"]
    assert len(set(labels)) == 4


def test_names_say_what_differs_most(tmp_path):
    """Not what comes first in the alphabet and is the same in most of them."""
    for i in range(4):
        config = dict(a=i == 3, b=i == 3, c=i == 3, steps_of=i, lr_muon=i % 2)
        write(tmp_path, f"{i}.txt", our_log(loss=1.4 + i / 100, config=config))
    labels = [curve.label for curve in plot.load([str(tmp_path)])]
    assert len(set(labels)) == 4 and all("steps_of" in label for label in labels)


def test_a_run_that_diverged_is_left_out(tmp_path, capsys):
    write(tmp_path, "good.txt", our_log())
    write(tmp_path, "bad.txt", re.sub(r"val_loss:\d\.\d+", "val_loss:nan", our_log(seed=1)))
    out = str(tmp_path / "out.png")
    assert plot.main([str(tmp_path), "-o", out]) == 0
    said = capsys.readouterr().out
    assert "bad.txt: left out, its loss is not finite" in said and "1 run in 1 curve" in said


def test_long_names_are_inside_the_picture(tmp_path, recwarn):
    """Wrapped, without a warning of the layout, and not over each other."""
    for i in range(8):
        config = dict(lr_muon=i / 7, window=[i] * 4, train_files=f"some/long/path/number_{i}.bin")
        write(tmp_path, f"{i}.txt", our_log(loss=1.4 + i / 1000, config=config))
    picture = plot.figure(plot.load([str(tmp_path)]), ["time", "tokens"])
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    canvas = FigureCanvasAgg(picture)
    canvas.draw()
    where = canvas.get_renderer()  # of the names alone, without the lines to them
    boxes = [Text.get_window_extent(text, where) for text in picture.axes[-1].texts]
    wide, high = picture.bbox.width, picture.bbox.height
    assert len(boxes) == 8 and not recwarn.list
    for box in boxes:
        assert 0 <= box.x0 and box.x1 <= wide and 0 <= box.y0 and box.y1 <= high
    boxes.sort(key=lambda box: box.y0)
    assert all(one.y1 <= other.y0 + 1 for one, other in zip(boxes, boxes[1:], strict=False))


def test_a_races_curves_are_called_by_their_scripts(tmp_path):
    for i, letter in enumerate("ABAB"):
        folder = tmp_path / f"round00{i}_{letter}_seed{i}"
        folder.mkdir()
        config = dict(lr_muon=0.1 if letter == "B" else 0.2)
        write(folder, "a.txt", our_log(seed=i, config=config))
    assert [curve.label for curve in plot.load([str(tmp_path)])] == ["A", "B"]
    names = dict(reference="records/laptop/old", candidate="idea.py")
    (tmp_path / "race.json").write_text(json.dumps(names))
    assert [curve.label for curve in plot.load([str(tmp_path)])] == ["old", "idea.py"]


def test_at_most_eight_colours(tmp_path):
    """The eight best curves have colours that differ, and names; others are grey."""
    for i in range(11):
        write(tmp_path, f"{i}.txt", our_log(loss=1.4 + i / 100, config=dict(lr_muon=i / 100)))
    axis = plot.figure(plot.load([str(tmp_path)]), ["time"]).axes[0]
    colours = [line.get_color() for line in axis.get_lines()]
    assert len(set(colours)) == 9 and colours.count(plot.GREY) == 2 * 3
    assert len(axis.texts) == 8 and not any("lr_muon=0.1 " in t.get_text() for t in axis.texts)
    heights = sorted(text.get_position()[1] for text in axis.texts)
    assert min(np.diff(heights)) > 0.9 * plot.LINE  # names do not cover each other


def test_training_loss_on_demand_and_smoothed(tmp_path, capsys):
    lines = [
        f"step:{s}/1000 train_loss:{3 + (s % 2):.4f} train_time:{s}ms step_avg:1.00ms\n"
        for s in range(1, 1001)
    ]
    last = "step:1000/1000 val_loss:3.2 train_time:1000ms step_avg:1.00ms\n"
    path = write(tmp_path, "a.txt", public([*lines, last]))
    out = tmp_path / "x.png"
    assert plot.main([path, "-o", str(out)]) == 0
    assert "validated once, --train draws" in capsys.readouterr().out
    curve = plot.load([path])[0]
    assert len(plot.mean_line(curve, "time")) == 1
    smooth = plot.mean_line(curve, "time", train=True)
    assert len(smooth) > 400 and np.ptp(smooth[100:-60, 1]) < 0.1
    llmc = write(tmp_path, "llmc.log", "s:0 tel:11.0\ns:10 tel:4.0\n")
    code, error = refused(capsys, plot.main, llmc, "-o", out, "--train")
    assert code == 2 and "no training losses" in error


def test_plot_misuse(tmp_path, capsys):
    logs_in(tmp_path / "a")
    llmc = write(tmp_path, "llmc.log", "s:0 tel:11.0\ns:10 tel:4.0\n")
    empty = write(tmp_path, "empty.txt", "")
    out = tmp_path / "x.png"
    for argv, text in [
        (["nowhere", "-o", out], "does not exist"),
        ([empty, "-o", out], "no validation line"),
        ([tmp_path / "a", "-o", "x.bmp"], "must end in .png"),
        ([tmp_path / "a", "-o", "no/x.png"], "make it first"),
        ([llmc, "-o", out, "--x", "time"], "hold no times"),
        ([tmp_path / "a"], "-o"),
    ]:
        code, error = refused(capsys, plot.main, *argv)
        assert code == 2 and text in error and error.count("\n") == 1 and not out.exists(), error
    assert plot.main([llmc, "-o", str(out)]) == 0 and out.exists()
