"""submit, board and plot of records/tools: folders from logs, leaderboards from folders, pictures from either."""

import json
import os
import re

import pytest
from test_records_logs import NEW, SOURCE, our_log, public, write
from test_records_verify import RECORDS, logs_in, race

from records.tools import board, logs, plot, submit, verify


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty records folder in an empty repository, with the laptop track at the size of the golden logs."""
    folder = tmp_path / "repo" / "records"
    folder.mkdir(parents=True)
    monkeypatch.setattr(submit, "RECORDS", str(folder))
    monkeypatch.setattr(board, "RECORDS", str(folder))
    monkeypatch.setattr(board, "ROOT", str(folder.parent))
    monkeypatch.setitem(
        logs.TRACKS, "laptop", dict(logs.TRACKS["laptop"], target=1.5, val_tokens=4096)
    )
    with open(os.path.join(RECORDS, "README.md"), encoding="utf-8") as f:
        bare = re.sub(r"(<!-- board:\w+ -->).*?(<!-- /board)", r"\1\n\2", f.read(), flags=re.S)
    (folder / "README.md").write_text(bare, encoding="utf-8")
    return folder


def make(folder, name, date="2026-11-20", source=SOURCE, **changes):
    paths = logs_in(folder.parent / "logs" / name, source=source, **changes)
    assert submit.main([name, *paths, "--track", "laptop", "--date", date]) == 0
    return folder / "laptop" / f"{date}_{name}"


def refused(capsys, function, *argv) -> tuple[int, str]:
    try:
        code = function([str(a) for a in argv])
    except SystemExit as exit:
        code = exit.code
    return code, capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- submit


def test_submit(place):
    record = make(place, "adam_w")
    files = ["README.md", "result.json", *(f"run_{i}.txt" for i in range(5)), "train_gpt.py"]
    assert sorted(os.listdir(record)) == files and verify.check_record(record).ok
    log = (record / "run_0.txt").read_text()
    assert (
        (record / "train_gpt.py").read_text() == SOURCE
        and SOURCE not in log
        and log.startswith("=" * 100)
    )
    readme = (record / "README.md").read_text()
    assert (
        "First record of the laptop track" in readme
        and "(fill in" in readme
        and "| 1.4922 ± 0.0017 |" in readme
    )
    changed = SOURCE.replace("import torch", "import numpy\nimport torch as t")
    second = make(place, "muon", date="2026-11-21", source=changed)
    text = (second / "README.md").read_text()
    assert (
        "Against [2026-11-20_adam_w](../2026-11-20_adam_w): train_gpt.py +2 −1 lines (7 in all)"
        in text
    )
    other = submit.change_line(b"", str(second), "memory")
    assert "(../../laptop/2026-11-21_muon)" in other


def test_long_logs_are_thinned(place, tmp_path):
    """Twelve runs of 1,500 steps: every validation line stays, training lines go until the folder is small enough."""
    paths = logs_in(tmp_path / "long", seeds=range(12), config=dict(steps=1500), val_every=100)
    assert sum(map(os.path.getsize, paths)) > 1e6
    assert submit.main(["long", *paths, "--track", "laptop", "--date", "2026-11-20"]) == 0
    folder = place / "laptop" / "2026-11-20_long"
    assert sum(f.stat().st_size for f in folder.iterdir() if f.name != "train_gpt.py") < 100_000
    assert verify.check_record(folder).ok
    before, after = (logs.read_log(path)[0] for path in (paths[3], folder / "run_3.txt"))
    assert (
        after.val[-1] == before.val[-1] and after.val == before.val and 2 <= after.train_lines < 60
    )
    few = make(place, "few", seeds=(0, 1, 2))
    assert logs.read_log(few / "run_1.txt")[0].train_lines == 40
    thin = submit.thin(paths[0], 1500, 50)
    assert (
        thin.count(b"train_loss") == 50
        and b"step:1/1500 train" in thin
        and b"step:1500/1500 train" in thin
    )


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
    code, error = refused(capsys, submit.main, "bad", *paths, "--track", "laptop")
    assert code == 1 and text in error, error
    assert os.listdir(place) == ["README.md"]


def test_submit_misuse(place, capsys):
    record = make(place, "idea")
    stamp = (record / "result.json").stat().st_mtime_ns
    log = place.parent / "logs" / "idea" / "0.txt"
    for argv, text in [
        (["a b", log], "may hold letters"),
        (["../x", log], "may hold letters"),
        (["x", "nowhere"], "is not a file"),
        (["x", log, "--date", "2026-13-01"], "is no date"),
        (["x", log, "--previous", place], "no train_gpt.py"),
    ]:
        code, error = refused(capsys, submit.main, *argv, "--track", "laptop")
        assert code == 2 and text in error and error.count("\n") == 1, error
    assert refused(capsys, submit.main, "x", log)[0] == 2
    code, error = refused(
        capsys, submit.main, "idea", log, "--track", "laptop", "--date", "2026-11-20"
    )
    assert (
        code == 2
        and "exists already" in error
        and (record / "result.json").stat().st_mtime_ns == stamp
    )


# ------------------------------------------------------------------------------------------------------------ board


def test_ranking_by_races(place):
    for i, name in enumerate(("a_plain", "b_better", "c_worse", "d_alone")):
        make(place, name, date=f"2026-11-2{i}", source=SOURCE + f"# {i}\n")
    for name, reference, ratio in (
        ("2026-11-21_b_better", "records/laptop/2026-11-20_a_plain/train_gpt.py --steps 9", 0.8),
        ("2026-11-22_c_worse", "2026-11-21_b_better", 1.2),
    ):
        text = race(
            reference=reference,
            ratio=ratio,
            ci=[ratio - 0.05, ratio + 0.05],
            times_ms=dict(reference=[1.0], candidate=[ratio]),
        )
        write(place / "laptop" / name, "race.json", text)
    records = board.read_track("laptop")
    assert [r.relative and round(r.relative, 6) for r in records] == [1.0, 0.8, 0.96, None]
    assert [r.name[11:] for r in board.ranked("laptop", records)] == [
        "b_better",
        "c_worse",
        "a_plain",
        "d_alone",
    ]
    table = board.leaderboard("laptop", records).splitlines()
    assert table[2] == (
        "| 1 | [2026-11-21_b_better](laptop/2026-11-21_b_better) | 0.800 | 0.800 [0.750, 0.850] "
        "against 2026-11-20_a_plain | 1.4922 ± 0.0017 | 5 |"
    )
    assert "| not raced | –" in table[-1]
    steps = board.ablation(records).splitlines()[2:]
    assert steps[0] == "| a plain | 1.4922 ± 0.0017 | 5 | – | start | 1.000 |"
    assert steps[1] == "| b better | 1.4922 ± 0.0017 | 5 | 0.800 [0.750, 0.850] | faster | 0.800 |"
    assert steps[2] == "| c worse | 1.4922 ± 0.0017 | 5 | 1.200 [1.150, 1.250] | slower | 0.960 |"
    assert "not raced" in steps[3]
    write(
        place / "laptop" / "2026-11-21_b_better", "race.json", race(reference="2026-11-22_c_worse")
    )
    assert [r.relative for r in board.read_track("laptop")] == [
        1.0,
        None,
        None,
        None,
    ]  # a circle leads nowhere


@pytest.mark.parametrize(
    "changes, word",
    [
        (dict(ci=[0.7, 0.9]), "faster"),
        (dict(ci=[0.7, 1.1]), "no difference shown"),
        (dict(ci=[1.1, 1.2]), "slower"),
        (dict(ci=[0.7, 0.9], faster="yes"), "faster"),
        (dict(ci=[0.7, 0.9], faster="not shown"), "less time; equal loss not shown"),
        (
            dict(ci=[0.7, 0.9], faster="not shown", p_loss_not_worse=0.001, level_per_look=0.005),
            "less time, not at the race's level",
        ),
        (dict(ci=[0.9, 1.1], faster="not shown"), "no difference shown"),
        (dict(ci=[1.1, 1.2], faster="no"), "slower"),
        (dict(ci=[0.7, 0.9], faster="no"), "loses: loss is worse"),
    ],
)
def test_effect(changes, word):
    assert board.effect(board.Record("x", "laptop", {}, json.loads(race(**changes)))) == word


def test_other_tracks_are_ranked_by_what_they_measure():
    def record(name, time, peak):
        return board.Record(
            name,
            "speed",
            dict(
                val_loss=dict(mean=3.27, std=None),
                n=2,
                peak_memory_bytes=peak,
                train_time_ms=dict(mean=time, std=10.0),
            ),
            None,
        )

    records = [record("a", 3000, 2 << 30), record("b", 2000, 3 << 30)]
    assert "| 1 | [b](speed/b) | 2.00 ± 0.01 s | 3.2700 | 2 |" in board.leaderboard(
        "speed", records
    )
    assert "| 1 | [a](memory/a) | 2.00 GiB | 3.2700 | 2 |" in board.leaderboard("memory", records)
    assert board.leaderboard("speed", []) == "No record yet."


def test_board_writes_and_checks(place, capsys):
    make(place, "plain")
    readme, top = place / "README.md", place.parent / "README.md"
    top.write_text("# Repo\n<!-- board:ablation -->\nold\n<!-- /board:ablation -->\nend\n")
    assert (
        board.main(["--check"]) == 1
        and "is stale" in capsys.readouterr().err
        and "old" in top.read_text()
    )
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


@pytest.mark.parametrize(
    "name, old, new, text",
    [
        ("result.json", "{", "[", "not a JSON object"),
        ("result.json", '"val_loss"', '"loss"', "no val_loss statistics"),
        ("result.json", '"runs"', '"rans"', "lists no runs"),
        ("race.json", '"ratio"', '"x"', "needs a reference and a ratio"),
        ("race.json", '"ci"', '"x"', "needs ci"),
        ("../../README.md", "<!-- board:laptop -->", "", "board:laptop"),
    ],
)
def test_board_refuses_broken_records(place, capsys, name, old, new, text):
    record = make(place, "plain")
    write(record, "race.json", race())
    path = record / name
    path.write_text(path.read_text(encoding="utf-8").replace(old, new, 1), encoding="utf-8")
    code, error = refused(capsys, board.main)
    assert (
        code == 2
        and error.startswith("records board: ")
        and text in error
        and error.count("\n") == 1
    )


def test_this_repository_is_up_to_date():
    """A stale leaderboard fails here: run python -m records board."""
    assert board.main(["--check"]) == 0


# ------------------------------------------------------------------------------------------------------------- plot


def test_plot(tmp_path, capsys):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    logs_in(ours)
    theirs.mkdir()
    write(theirs, "a.txt", public(NEW, source=SOURCE + "# theirs\n"))
    out = tmp_path / "out.svg"
    assert plot.main([str(ours), "-o", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: 5 runs of 1 source\n"
    groups = plot.load([str(ours), str(theirs)])
    assert [(label[:4], len(runs)) for label, runs in groups] == [("ours", 5), ("thei", 1)]
    axes = plot.figure(groups[:1], ["time", "tokens"], 1.5).axes
    assert [a.get_xlabel() for a in axes] == ["train time (s)", "tokens"]
    assert [a.get_xlabel() for a in plot.figure(groups, ["time", "tokens"]).axes][1].startswith(
        "step"
    )
    lines = axes[1].get_lines()
    assert len(lines) == 5 + 1 + 1 and list(lines[-1].get_ydata()) == [
        1.5,
        1.5,
    ]  # runs, their mean, the target
    assert list(lines[5].get_xdata()) == [0, 10240, 20480, 30720, 40960]
    assert lines[5].get_ydata()[-1] == pytest.approx(1.4922)
    assert (
        lines[5].get_label().endswith("1.4922 ± 0.0017 (n=5)")
        and axes[0].texts[0].get_text() == "target 1.5"
    )
    low, high = axes[0].get_ylim()
    assert low < 1.49 and 4.0 < high < 5.5  # the first loss of 5.5 is cropped
    for name in ("out.png", "out.pdf"):
        assert plot.main([str(ours), str(theirs), "-o", str(tmp_path / name), "--x", "time"]) == 0


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
