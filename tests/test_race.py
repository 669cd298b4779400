"""race and vs_nanogpt of records/tools with trainers of a few lines that take next to no time."""

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats as scipy_stats

from data import shards
from records.tools import logs, race, runs, stats, vs_nanogpt

ROOT = Path(__file__).resolve().parents[1]

# Time and loss are functions of the seed; --speed and --better scale and shift them. The log tells
# --clock of the time.
TRAINER = """
import json, os, pathlib, random, sys, time
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert len(sys.argv) == 1 + 2 * len(flags), "a flag is given twice"
seed, folder = int(flags["--seed"]), pathlib.Path(flags["--log_dir"])
with open(pathlib.Path(__file__).parent / "calls", "a") as f:
    f.write(flags.get("--name", "-") + str(seed) + " ")
if flags.get("--hang") == str(seed):
    (pathlib.Path(__file__).parent / "pid").write_text(str(os.getpid()))
    time.sleep(30)
fail = flags.get("--fail")
once = pathlib.Path(__file__).parent / "failed_once"
if fail in ("always", f"always{seed}") or fail == f"once{seed}" and not once.exists():
    once.touch()
    sys.exit("train_gpt.py: planted failure")
noise = random.Random(f"{seed} {flags.get('--name')}").gauss
ms = 1000 * float(flags.get("--speed", 1)) * (1 + 0.1 * seed) * (1 + noise(0, 0.002))
loss = 1.5 - float(flags.get("--better", 0)) + noise(0, 0.0003)
if flags.get("--nan"):
    loss = float("nan")
step = float(flags.get("--step", 0.03))
threads = os.environ["OMP_NUM_THREADS"]

def write(line):
    with open(folder / "run.txt", "a") as f:
        f.write(line + chr(10))

write("# a source" + chr(10) + "step:1/9 train_loss:9 is how a line looks" + chr(10) + "=" * 100)
write("config: {}" + chr(10) + "=" * 100 + chr(10) + "warm-up: 9 ms")
for i in range(1, int(flags.get("--steps", 1)) + 1):
    time.sleep(step)
    write(f"step:{i}/{flags.get('--steps', 1)} train_loss:{9 / i} train_time:{ms}ms step_avg:1ms")
    if flags.get("--val_every"):
        time.sleep(step)
        print(f"step:{i}/{flags.get('--steps', 1)} val_loss:1.5 train_time:{ms}ms", flush=True)
line = {"val_loss": loss, "train_time_ms": ms * float(flags.get("--clock", 1)), "val_tokens": 640,
        "data_sha256": {"v": flags.get("--data", "a")}, "device": "cpu", "threads": threads}
write(json.dumps(line))
"""


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("NPROC", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "t.py").write_text(TRAINER)
    return "t.py"


@pytest.fixture
def exact(monkeypatch):
    """A stopwatch that reads times off the lines: verdicts do not depend on this machine."""

    def seconds(watch):
        last = next(line for line in reversed(watch.lines) if b"train_loss" in line)
        return float(re.search(rb"train_time:([0-9.]+)ms", last)[1]) / 1000

    monkeypatch.setattr(runs.Stopwatch, "training_seconds", seconds)


def run(*args, out="out"):
    args = [str(arg) for arg in args]
    cut = args.index("--") if "--" in args else len(args)
    code = race.main([*args[:cut], "--out", out, *args[cut:]])
    path = Path(out, "race.json")
    return code, json.loads(path.read_text()) if path.exists() else None


def calls():
    return Path("calls").read_text().split()


# -------------------------------------------------------------------------------------- statistics


def compare(pairs, margin):
    """stats.compare of [((time, loss), (time, loss)), ...], reference first."""
    times = {"reference": [a[0] for a, _ in pairs], "candidate": [b[0] for _, b in pairs]}
    losses = {"reference": [a[1] for a, _ in pairs], "candidate": [b[1] for _, b in pairs]}
    return stats.compare(times, losses, margin)


def test_compare_by_hand():
    """Ratios 1/2 and 1/8: geometric mean 1/4; log2 ratios -1 and -3: standard error 1, half an
    interval 12.706."""
    found = compare([((2, 1.5), (1, 1.4)), ((8, 1.7), (1, 1.8))], 0.3)
    assert found["n"] == 2 and found["ratio"] == pytest.approx(0.25)
    assert found["ci"] == pytest.approx([2 ** (-2 - 12.7062), 2 ** (-2 + 12.7062)], rel=1e-4)
    # t = -2 with 1 degree of freedom: the Cauchy distribution, p = 1/2 - arctan(2) / pi
    assert found["p_value"] == pytest.approx(0.5 - math.atan(2) / math.pi)
    # loss differences -0.1, +0.1 against the margin 0.3: mean 0, standard error 0.1, t = -3
    assert found["p_loss_not_worse"] == pytest.approx(0.5 - math.atan(3) / math.pi)
    assert found["loss_reference"]["mean"] == pytest.approx(1.6)
    assert found["loss_reference"]["std"] == pytest.approx(math.sqrt(0.02))
    assert found["loss_candidate"]["mean"] == pytest.approx(1.6)


def test_compare_against_scipy():
    generator = np.random.default_rng(0)
    a, b = generator.uniform(50, 60, 9), generator.uniform(48, 58, 9)
    la, lb = generator.normal(1.5, 0.01, 9), generator.normal(1.5, 0.01, 9)
    pairs = zip(zip(a, la, strict=True), zip(b, lb, strict=True), strict=True)
    found = compare(list(pairs), 0.005)
    test = scipy_stats.ttest_rel(np.log(b), np.log(a), alternative="less")
    low, high = scipy_stats.ttest_rel(np.log(b), np.log(a)).confidence_interval(0.95)
    assert found["p_value"] == pytest.approx(test.pvalue)
    assert found["p_slower"] == pytest.approx(1 - test.pvalue)
    assert found["ci"] == pytest.approx([math.exp(low), math.exp(high)])
    loss_test = scipy_stats.ttest_1samp(lb - la, 0.005, alternative="less")
    assert found["p_loss_not_worse"] == pytest.approx(loss_test.pvalue)
    assert found["p_loss_worse"] == pytest.approx(1 - loss_test.pvalue)
    assert found["loss_candidate"]["std"] == pytest.approx(np.std(lb, ddof=1))


def test_few_and_equal_values():
    one = compare([((2, 1), (1, 1))], 0.005)
    assert (one["ratio"], one["ci"], one["p_value"]) == (0.5, None, None)
    assert stats.verdict(one, 0.01) is None
    assert compare([], 0.005)["ratio"] is None
    same = compare([((2, 1), (2, 1))] * 2, 0.005)
    assert same["ci"] == [1, 1] and same["p_value"] == 1 and same["p_loss_not_worse"] == 0


PLANS = [(12, 3, [4, 8, 12]), (10, 3, [4, 7, 10]), (5, 3, [3, 4, 5]), (2, 3, [2]), (20, 1, [20])]


@pytest.mark.parametrize("rounds, looks, planned", PLANS)
def test_planned_looks(rounds, looks, planned):
    assert stats.planned_looks(rounds, looks) == planned


def test_early_stopping_keeps_the_level():
    """250 races of equal trainers at a level of 10 %: that many say "yes", though each was looked
    at three times."""
    generator, yes = random.Random(1), 0
    looks = stats.planned_looks(12, 3)
    for _ in range(250):
        times = [[math.exp(generator.gauss(0, 0.1)) for _ in "ab"] for _ in range(12)]
        pairs = [((a, 1), (b, 1)) for a, b in times]
        verdicts = [stats.verdict(compare(pairs[:n], 0.005), 0.1 / len(looks)) for n in looks]
        yes += "yes" in verdicts
    assert yes <= 0.1 * 250 + 2 * math.sqrt(250 * 0.1 * 0.9)


# ---------------------------------------------------------------------------------- the stopwatch


def watched(*events):
    """A stopwatch that saw these (second, text) pairs."""
    moments = iter([0.0, *(second for second, _ in events)])
    watch = runs.Stopwatch(lambda: next(moments))
    for _, text in events:
        watch.read("log", text.encode())
    return watch


def test_stopwatch_counts_training_alone():
    line = "step:{}/4 {}_loss:1.0 train_time:1ms\n"
    start = (3, "source\nstep:2/4 train_loss:9 in a docstring\n" + "=" * 100 + "\nwarm-up: 1 ms\n")
    train = [(4, line.format(1, "train")), (6, line.format(2, "train"))]
    assert watched(start, *train).training_seconds() == 6  # 3 s for two of four steps
    pause = [
        (9, line.format(2, "val")),
        (10, line.format(3, "train")),
        (11, line.format(4, "train")),
    ]
    assert watched(start, *train, *pause).training_seconds() == 5
    late = [(12, line.format(4, "train")), (12.5, line.format(4, "train"))]  # a line seen again
    assert watched(start, *train, *late).training_seconds() == 9
    half = [
        (4, "step:1/4 tra"),
        (5, "in_loss:1.0\n"),
    ]  # a line in two pieces came when it was whole
    assert watched(start, *half).training_seconds() == 8
    with pytest.raises(runs.Failed, match="no training lines"):
        watched(start, (5, line.format(4, "val"))).training_seconds()


def test_times_are_measured_and_not_believed(trainer, capsys):
    """A log that tells a third of its time: the race sees the truth, and says so. Validation lines,
    which only the pipe shows, are left out."""
    code, found = run(
        f"{trainer} --step 0.05 --steps 6",
        f"{trainer} --step 0.05 --steps 6 --val_every 1",
        "--runs",
        2,
        "--warmup_runs",
        0,
    )
    assert code == 0
    for times in found["times_ms"].values():
        assert all(290 < ms < 700 for ms in times), times
    for logged in found["logged_ms"].values():
        assert all(ms > 900 for ms in logged)
    out = capsys.readouterr().out
    assert "of the time that the race measured; the race's own counts" in out
    assert "of its training time outside of it" in out


def test_environment_of_a_run(trainer, exact, monkeypatch):
    monkeypatch.setenv("MALLOC_TOP_PAD_", "1")
    monkeypatch.setenv("KEPT", "yes")
    env = runs.environment(3)
    assert env["KEPT"] == "yes" and env["OMP_NUM_THREADS"] == "3"
    assert (env["MALLOC_MMAP_MAX_"], env["MALLOC_TOP_PAD_"]) == ("0", "268435456")
    assert env["MALLOC_TRIM_THRESHOLD_"] == "2147483647"

    def threads(*flags, out):
        code, found = run(
            trainer, f"{trainer} --name B", "--runs", 1, "--warmup_runs", 0, *flags, out=out
        )
        text = Path(out, "round000_A_seed0/run.txt").read_text()
        return found["threads"], json.loads(text.splitlines()[-1])["threads"]

    assert threads(out="one") == (1, "1")
    assert threads("--threads", 2, out="two") == (2, "2")
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert threads(out="four") == (4, "4")


# ------------------------------------------------------------------------------------------- races


def test_faster_at_equal_loss_stops_early(trainer, exact, capsys):
    names = f"{trainer} --name A", f"{trainer} --name B --speed 0.9"
    code, found = run(*names, "--runs", 12, "--", "--steps", "2")
    assert code == 0
    assert found["faster"] == "yes" and found["decided_at"] == found["n"] == 4
    assert found["ratio"] == pytest.approx(0.9, rel=0.01) and found["ci"][0] < 0.9 < found["ci"][1]
    assert (found["reference"], found["candidate"], found["flags"]) == (*names, "--steps 2")
    assert found["looks"] == [4, 8, 12] and found["level_per_look"] == pytest.approx(0.01 / 3)
    assert found["machine"] and found["failures"] == [] and found["same_data"]
    assert len(found["times_ms"]["candidate"]) == len(found["losses"]["reference"]) == 4
    # a warm-up of each, then pairs with one seed in alternating order
    assert calls() == "A0 B0 A0 B0 B1 A1 A2 B2 B3 A3".split()
    assert "faster: yes" in capsys.readouterr().out


def test_warm_up_is_stopped(trainer, exact):
    """Five updates of each, then the run is ended."""
    flags = ["--steps", "300"]
    begun = time.monotonic()
    with pytest.raises(runs.Failed, match="not finished"):
        runs.train(Path(trainer), [*flags, "--seed", "0"], Path("long"), 0.3)
    assert runs.train(Path(trainer), [*flags, "--seed", "0"], Path("short"), 9, enough=5) is None
    assert time.monotonic() - begun < 6
    assert 5 <= Path("short/run.txt").read_text().count("train_time") < 60


@pytest.mark.parametrize(
    "flags, faster",
    [
        ("--speed 1.1", "no"),  # slower
        ("--speed 0.5 --better -0.02", "no"),  # fast, but at a worse loss
        ("--speed 1", "not shown"),
    ],
)
def test_not_faster(trainer, exact, flags, faster):
    candidate = f"{trainer} --name B {flags}"
    code, found = run(trainer, candidate, "--runs", 4, "--looks", 1, "--warmup_runs", 0)
    assert (code, found["faster"], found["n"]) == (0, faster, 4)


def test_history_in_one_race(trainer, exact, capsys):
    Path("record").mkdir()
    Path("record/train_gpt.py").write_text(TRAINER)
    scripts = ["record", "t.py --name B --speed 0.8", "t.py --name C --speed 0.8 --data other"]
    flags = ["--runs", 6, "--looks", 2, "--warmup_runs", 0, "--first_seed", 3]
    code, found = run(*scripts, *flags)
    assert code == 0
    first, second = found["pairs"]
    assert (first["reference"], first["candidate"]) == (scripts[0], scripts[1])
    assert (first["faster"], first["decided_at"]) == ("yes", 3)
    assert (second["candidate"], second["faster"], second["n"]) == (scripts[2], "not shown", 6)
    assert first["same_data"] is False or second["same_data"] is False
    # the decided A is left out after round 3
    assert calls() == "B3 C3 C4 B4 B5 C5 C6 B6 B7 C7 C8 B8".split()
    assert Path("record/calls").read_text().split() == ["-3", "-4", "-5"]
    assert json.loads(Path("out/race_BC.json").read_text()) == second
    assert "did not read the same data" in capsys.readouterr().out


def test_one_failed_run_is_tried_again(trainer, exact):
    candidate = f"{trainer} --name B --speed 0.9 --fail once1"
    code, found = run(trainer, candidate, "--runs", 3, "--warmup_runs", 0)
    assert (code, found["n"], found["faster"]) == (0, 3, "yes")
    why = "exit code 1: train_gpt.py: planted failure"
    assert found["failures"] == [{"run": "round001_B_seed1", "why": why}]


def test_a_round_lost_leaves_the_pair(trainer, exact):
    candidate = f"{trainer} --name B --speed 0.9 --fail always1"
    code, found = run(trainer, candidate, "--runs", 4, "--looks", 1, "--warmup_runs", 0)
    assert (code, found["n"], len(found["failures"])) == (0, 3, 2)
    assert [round(t / 1000, 1) for t in found["times_ms"]["reference"]] == [1.0, 1.2, 1.3]


def test_a_broken_script_leaves_the_race(trainer, exact):
    code, found = run(trainer, f"{trainer} --fail always", "--runs", 9, "--warmup_runs", 0)
    assert (code, found["faster"], found["n"], found["ratio"]) == (1, "failed", 0, None)
    assert calls() == "-0 -0 -0 -1 -1 -1".split()


def test_timeout_and_nan_are_failed_runs(trainer, exact):
    flags = "--runs", 1, "--warmup_runs", 0
    code, found = run(trainer, f"{trainer} --hang 0", *flags, "--timeout", 0.5)
    assert code == 1 and found["n"] == 0, "nothing was raced"
    assert {f["why"] for f in found["failures"]} == {"not finished after 0.5 s"}
    code, found = run(trainer, f"{trainer} --nan yes", *flags, out="out2")
    assert found["n"] == 0 and "val loss nan" in found["failures"][0]["why"]


def test_max_hours(trainer, exact, capsys):
    flags = "--runs", 9, "--looks", 1, "--warmup_runs", 0, "--max_hours", 1e-9
    code, found = run(trainer, trainer, *flags)
    assert code == 0 and found["n"] == 1 and found["faster"] == "undecided"
    assert "hours" in capsys.readouterr().out


def test_edited_during_the_race(trainer, exact, monkeypatch, capsys):
    train = race.train

    def edit(script, flags, folder, *args, **options):
        if "round001" in folder.name:
            Path(trainer).write_text(TRAINER + "# edited\n")
        return train(script, flags, folder, *args, **options)

    monkeypatch.setattr(race, "train", edit)
    code, found = run(trainer, trainer, "--runs", 5, "--warmup_runs", 0)
    assert code == 1 and found["n"] == 1 and "edited during the race" in capsys.readouterr().err


@pytest.mark.parametrize(
    "number, code",
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)],
)
def test_interrupt_prints_what_there_is(trainer, number, code):
    command = [sys.executable, ROOT / "records", "race", trainer, f"{trainer} --name B --hang 2"]
    process = subprocess.Popen(
        [*command, "--out", "out", "--warmup_runs", "0"],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 15
    while not (Path("pid").exists() and Path("pid").read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    out, err = process.communicate(timeout=10)
    assert process.returncode == code and err == ""
    assert "2 pairs" in out and "faster: undecided" in out
    assert json.loads(Path("out/race.json").read_text())["n"] == 2
    with pytest.raises(ProcessLookupError):  # no trainer is left behind
        os.kill(int(Path("pid").read_text()), 0)


def test_a_second_signal_leaves_no_trainer(tmp_path):
    """One that does not listen is killed, also when the wait for it is interrupted."""
    deaf = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True)"
    )
    process = runs.launch([sys.executable, "-c", f"{deaf}; time.sleep(60)"], subprocess.PIPE)
    process.stdout.read(2)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGHUP)).start()
    with pytest.raises(runs.Interrupted) as stopped, runs.interruptible():
        runs.stop(process)
    assert stopped.value.args == (128 + signal.SIGHUP,) and process.returncode == -signal.SIGKILL
    process.stdout.close()


def test_nohup_stays_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with runs.interruptible():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_two_races_in_one_second(trainer, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda form: "race_now")
    assert [race.new_folder(None) for _ in "abc"] == [
        Path("logs", name) for name in ("race_now", "race_now_2", "race_now_3")
    ]


# ------------------------------------------------------------------------------------ the report


def report(**changes):
    column = {"reference": [100.0, 101.0], "candidate": [90.0, 91.0]}
    return dict(times_ms=column, logged_ms=column, wall_ms=column, same_data=True) | changes


def test_warnings():
    assert race.warnings(report()) == []
    spread = {"reference": [3800.0, 37000.0], "candidate": [3800.0, 3900.0]}
    found = race.warnings(report(times_ms=spread, logged_ms=spread, wall_ms=spread))
    assert len(found) == 1 and "the reference's times spread from 3.8 to 37.0 s" in found[0]
    half = {"reference": [100.0, 101.0], "candidate": [45.0, 45.5]}
    assert "the candidate's logs tell 0.500 of" in race.warnings(report(logged_ms=half))[0]
    wall = {"reference": [110.0, 111.0], "candidate": [180.0, 182.0]}
    assert (
        "the candidate spends 1.00 of its training time" in race.warnings(report(wall_ms=wall))[0]
    )
    assert "same data" in race.warnings(report(same_data=False))[0]


def test_how_far_the_steps_could_be_cut(tmp_path):
    """Losses that fall by 0.2 per e-fold of steps: 0.02 better is worth 1 - exp(-0.1) of them."""
    lines = [
        f"step:{s}/400 train_loss:{3 - 0.2 * math.log(s):.4f} train_time:{s}ms step_avg:1.00ms\n"
        for s in range(1, 401)
    ]
    path = tmp_path / "run.txt"
    path.write_text("".join(lines) + "step:400/400 val_loss:1.8 train_time:400ms step_avg:1.00ms\n")
    assert race.slope(logs.read_log(path)) == pytest.approx(0.2, abs=0.001)

    def pairs(*gains):
        made = [runs.Result(1.0, 1.0, 1.8 + gain, path, {}) for gain in gains]
        return [(other, runs.Result(1.0, 1.0, 1.8, path, {})) for other in made]

    found = race.steps_enough(pairs(0.019, 0.02, 0.021))
    assert found["steps"] == 400 and found["enough"] == pytest.approx(400 * math.exp(-0.1), abs=1)
    assert found["interval"][0] < found["enough"] < found["interval"][1] < 400
    assert race.steps_enough(pairs(-0.02, 0.02, 0.021)) is None  # not shown to be better
    assert race.steps_enough(pairs(0.02)) is None
    text = race.text_of(
        report(
            n=2,
            device="cpu",
            machine="m",
            ratio=0.9,
            ci=[0.8, 1.0],
            p_value=0.1,
            loss_margin=0.005,
            p_loss_not_worse=0.1,
            loss_reference={"mean": 1.82, "std": 0.001},
            faster="not shown",
            loss_candidate={"mean": 1.8, "std": 0.001},
            decided_at=None,
            steps_enough=found,
        )
    )
    assert any("about 362 of 400 steps" in line for line in text), text


def test_validation_that_was_not_asked_for(tmp_path):
    """What lies in front of a validation line is not timed, so there must be no more of them."""
    path = tmp_path / "run.txt"
    line = "step:{}/4 {}_loss:1.8 train_time:{}ms step_avg:1.00ms\n"
    path.write_text("".join(line.format(s, kind, s) for s in (2, 4) for kind in ("train", "val")))
    for every, fine in ((2, True), (0, False), (3, False), (None, True)):
        result = runs.Result(1.0, 1.0, 1.8, path, {"config": {"val_every": every}})
        if fine:
            race.check_schedule(result, "x")
        else:
            with pytest.raises(runs.Failed, match="validated at step 2"):
                race.check_schedule(result, "x")


@pytest.mark.parametrize(
    "args, message",
    [
        (["t.py"], "needs two scripts"),
        (["t.py", "missing.py"], "missing.py: no such file"),
        (["t.py", "."], "train_gpt.py: no such file"),
        (["t.py", "t.py", "--runs", "0"], "0 is not between 1"),
        (["t.py", "t.py", "--rusn", "3"], "--rusn"),
        (["t.py", "t.py --x '1"], "quote"),
        (["t.py", "t.py", "--", "--seed", "3"], "--first_seed"),
        (["t.py", "t.py --log_dir=x"], "--out"),
        (["t.py", "t.py", "--out", "full"], "full: already there"),
        (["t.py", "t.py", "--json", "none/x.json"], "none/x.json"),
        (["t.py", "t.py", "--json", "full/precious"], "give a new file"),
        (["t.py", "t.py --fail always"], "its warm-up run"),
    ],
)
def test_bad_input_is_one_line(trainer, capsys, args, message):
    Path("full").mkdir()
    Path("full/precious").write_text("x")
    assert race.main(args) == 2
    err = capsys.readouterr().err
    assert err.startswith("records race: ") and message in err and err.count("\n") == 1
    assert Path("full/precious").read_text() == "x" and not Path("full/race.json").exists()


# --------------------------------------------------------------------------------- against nanoGPT

# Prints what nanoGPT's train.py prints, with a first iteration that holds an evaluation; its
# "checkpoint" is empty.
NANOGPT = """
import os, pathlib, sys
flags = dict(a[2:].split("=") for a in sys.argv[2:])
steps = int(flags["max_iters"])
assert os.path.exists("data/laptop_bytes/train.bin")
assert flags["eval_interval"] == flags["lr_decay_iters"] == str(steps)
print("step 0: train loss 5.5, val loss 5.6")
for i in range(steps):
    print(f"iter {i}: loss 5.0, time {9999 if i == 0 else 20 + i % 2:.2f}ms, mfu -100.00%")
print(f"step {steps}: train loss 1.6, val loss 1.65\\nsaving checkpoint")
print(f"iter {steps}: loss 1.6, time 777.00ms, mfu 1%")
pathlib.Path(flags["out_dir"], "ckpt.pt").touch()
"""
OURS = """
import json, pathlib, sys, time
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert flags["--preset"] == "laptop" and flags["--val_every"] == "10" and flags["--extra"] == "1"
log = pathlib.Path(flags["--log_dir"], "run.txt")
log.write_text("warm-up: 1 ms\\n")
time.sleep(0.05)
line = "step:{}/40 {}_loss:{:.4f} train_time:{}ms step_avg:1.00ms".format
lines = [line(40, "train", 1.0, 40)]
lines += [line(s, "val", 2 - s / 100, s) for s in range(0, 50, 10)]
lines.append(json.dumps({"val_loss": 1.6, "train_time_ms": 40, "config": {"val_tokens": 128}}))
log.open("a").write("\\n".join(lines))
"""
# A model whose "loss" is the mean of the tokens it is to predict.
MODEL = """
import torch
class GPTConfig(dict): pass
class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(1))
    def forward(self, x, y):
        assert x.shape[1] == 64 and (x[:, 1:] == y[:, :-1]).all()
        return None, y.float().mean()
"""


@pytest.fixture
def nanogpt(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NPROC", raising=False)
    for name, text in (
        ("train.py", NANOGPT),
        ("model.py", MODEL),
        ("config/train_shakespeare_char.py", ""),
    ):
        path = tmp_path / "nanoGPT" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "ours.py").write_text(OURS)
    for name, count in (("train", 1000), ("val", 300)):
        shards.write_shard(tmp_path / f"{name}_0.bin", np.arange(count) % 257)
    return (
        "nanoGPT --script ours.py --train_files train_*.bin --val_files val_*.bin --out out".split()
    )


def test_nanogpt_time_leaves_evaluations_out():
    output = "".join(
        f"iter {i}: loss 1.0, time {ms}ms, mfu 1%\n" for i, ms in enumerate([900, 10, 14, 12, 800])
    )
    found = vs_nanogpt.read_nanogpt(output + "step 4: train loss 1.0, val loss 2.5\n", 4)
    assert found == {"time_ms": 10 + 14 + 12 + 12, "own_estimate": 2.5}
    with pytest.raises(runs.Failed):
        vs_nanogpt.read_nanogpt(output, 4)
    with pytest.raises(runs.Failed):
        vs_nanogpt.read_nanogpt("step 6: train loss 1.0, val loss 2.5\n" + output, 6)


def test_first_validation_at_or_below():
    log = (
        "step:0/9 val_loss:5.5 train_time:0ms step_avg:0ms\nstep:4/9 val_loss:1.7000 "
        "train_time:40ms step_avg:1ms\n"
        "step:5/9 train_loss:1.1 train_time:50ms step_avg:1ms\n"
        "step:8/9 val_loss:1.6000 train_time:80ms step_avg:1ms\n"
    )
    assert vs_nanogpt.first_at(log, 1.7) == (4, 40) and vs_nanogpt.first_at(log, 1.65) == (8, 80)
    assert vs_nanogpt.first_at(log, 1.5) is None


def test_vs_nanogpt_pairs(nanogpt, monkeypatch, capsys):
    monkeypatch.setattr(
        vs_nanogpt,
        "evaluate_nanogpt",
        lambda folder, out, count, timeout: 1.75 if count == 128 else 9,
    )
    assert vs_nanogpt.main([*nanogpt, "--runs", "2", "--steps", "10", "--", "--extra", "1"]) == 0
    found = json.loads(Path("out/vs_nanogpt.json").read_text())
    pair = found["pairs"][1]
    # iterations 1 to 9 take 21, 20, ..., 21 ms; the median, 21, stands for iteration 0
    assert pair["nanogpt_time_ms"] == 5 * 21 + 4 * 20 + 21 and pair["nanogpt_own_estimate"] == 1.65
    assert (pair["our_step"], pair["our_time_ms"], pair["ratio"]) == (30, 30, 30 / 206)
    assert found["ratio_median"] == 30 / 206 and found["n"] == 2
    out = capsys.readouterr().out
    order = [line.split(": ")[1] for line in out.splitlines() if line.endswith("...")]
    assert (
        order == ["nanoGPT ...", "ours ...", "ours ...", "nanoGPT ..."]
        and "0.146 of nanoGPT's time" in out
    )
    assert np.array_equal(
        np.fromfile("nanoGPT/data/laptop_bytes/val.bin", np.uint16), np.arange(300) % 257
    )
    assert vs_nanogpt.main([*nanogpt, "--runs", "1"]) == 2  # out is there: nothing is overwritten


def test_vs_nanogpt_never_reached(nanogpt, monkeypatch, capsys):
    monkeypatch.setattr(vs_nanogpt, "evaluate_nanogpt", lambda *args: 1.0)
    assert vs_nanogpt.main([*nanogpt, "--runs", "1", "--steps", "10", "--", "--extra", "1"]) == 0
    assert "never reached" in capsys.readouterr().out
    assert json.loads(Path("out/vs_nanogpt.json").read_text())["ratio_median"] is None


def test_checkpoint_is_evaluated_on_the_right_tokens(nanogpt, tmp_path):
    torch.save({"model": {"w": torch.zeros(1)}, "model_args": {}}, tmp_path / "ckpt.pt")
    vs_nanogpt.convert(
        Path("nanoGPT"), np.zeros(1, np.uint16), (np.arange(300) % 257).astype(np.uint16)
    )
    loss = vs_nanogpt.evaluate_nanogpt(Path("nanoGPT"), tmp_path, 256, 60)
    assert loss == sum(range(1, 257)) / 256


@pytest.mark.parametrize(
    "change, code, message",
    [
        ({0: "empty"}, 2, "no train.py in it"),
        ({4: "none_*.bin"}, 2, "run: python data/laptop.py"),
        ({4: "ours.py"}, 2, "ours.py"),
        ({2: "missing.py"}, 2, "missing.py: no such file"),
        ({}, 1, "a run failed: exit code 1"),  # the stand-in for our trainer misses --extra
    ],
)
def test_vs_nanogpt_bad_input(nanogpt, capsys, change, code, message):
    args = [change.get(i, arg) for i, arg in enumerate(nanogpt)]
    assert vs_nanogpt.main([*args, "--steps", "10"]) == code
    err = capsys.readouterr().err
    assert err.startswith("records vs_nanogpt: ") and message in err and err.count("\n") == 1
