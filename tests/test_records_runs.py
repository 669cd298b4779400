"""python -m records runs: one table of training runs."""

import csv
import io
import os
import sys

import pytest
from helpers import flags, make_data, run

from records.tools import runs_table

LOG = """print("the source")
====================================================================================================
run_id: {name}
source_sha256: {sha}
config: {{"seed": {seed}, "steps": 40, "batch_tokens": [100, 300], "lr_muon": 0.02, "log_dir": "x"}}
====================================================================================================
step:0/40 val_loss:5.0000 train_time:0ms step_avg:0.00ms
step:20/40 train_loss:3.5000 train_time:1000ms step_avg:50.00ms
"""
VALIDATED = "step:40/40 val_loss:4.2500 train_time:4000ms step_avg:100.00ms\n"


@pytest.fixture
def folder(tmp_path):
    """A finished run of the trainer, and logs of a run that ended early and of one that was
    stopped."""
    data = make_data(tmp_path)
    assert run(flags(data, steps=12)).code == 0
    sha = "0" * 64
    for seed, (name, end) in enumerate(
        {"early": "", "stopped": VALIDATED + "stopped by a signal after step 40\n"}.items()
    ):
        path = tmp_path / "logs" / f"{name}.txt"
        path.write_text(LOG.format(name=name, sha=sha, seed=seed) + end)
        os.utime(path, (1, 1))
    (tmp_path / "logs" / "notes.txt").write_text("no log")
    return tmp_path / "logs"


def test_a_table_of_runs(folder, capsys):
    assert runs_table.main([folder]) == 0
    head, early, stopped, done = capsys.readouterr().out.splitlines()[:4]
    # 20 steps of 100 tokens in a second; all of 8,000 tokens in 4
    assert early.split() == ["early", *early.split()[1:-5], "20/40", "5.0000", "1.0", "2k", "ended"]
    assert stopped.split()[-5:] == ["40/40", "4.2500", "4.0", "2k", "stopped"]
    assert done.split()[-1] == "done" and done.split()[-5] == "12/12"
    for name in ("seed", "source", "batch_tokens", "lr_muon"):
        assert (name in head.split()) == (name != "lr_muon")  # it is 0.02 in all of them
    assert "log_dir" not in head


def test_csv_has_every_number(folder, capsys):
    assert runs_table.main(["--csv", folder]) == 0
    rows = {row["run"]: row for row in csv.DictReader(io.StringIO(capsys.readouterr().out))}
    assert len(rows) == 3 and rows["early"]["tokens_per_second"] == "2000.0"
    assert rows["stopped"]["seed"] == "1" and rows["stopped"]["batch_tokens"] == "100,300"
    (done,) = (row for row in rows.values() if row["state"] == "done")
    assert float(done["loss"]) > 0 and done["file"].endswith(".txt")


def test_a_log_that_grows_is_running(folder, capsys):
    os.utime(folder / "early.txt")
    runs_table.main([folder / "early.txt"])
    assert capsys.readouterr().out.rstrip().endswith("running")


def test_misuse_is_one_line(tmp_path, capsys, monkeypatch):
    assert runs_table.main([tmp_path / "none"]) == 2
    assert "no such file or folder" in capsys.readouterr().err
    (tmp_path / "notes.txt").write_text("no log")
    assert runs_table.main([tmp_path]) == 2
    assert "no run in" in capsys.readouterr().err


def test_tensorboard_needs_its_package(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert runs_table.main(["--tensorboard", folder / "events", folder]) == 2
    assert "tensorboard is not installed; pip install tensorboard" in capsys.readouterr().err


def test_tensorboard_holds_the_losses(folder, capsys):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for _ in range(2):  # the second call replaces what the first wrote
        assert runs_table.main(["--tensorboard", folder / "events", folder]) == 0
    events = EventAccumulator(str(folder / "events" / "stopped"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss/val")]
    assert found == [(0, 5.0), (40, 4.25)]
    assert len(list((folder / "events" / "stopped").iterdir())) == 1
