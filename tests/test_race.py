"""race and vs_nanogpt of records/tools with trainers of a few lines that take no time."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from data import shards
from records.tools import race, runs, vs_nanogpt

ROOT = Path(__file__).resolve().parents[1]

# Time and loss are functions of the seed; --speed and --better scale and shift them.
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
line = {"val_loss": loss, "train_time_ms": ms, "steps": int(flags.get("--steps", 100)), "val_tokens": 640,
        "data_sha256": {"v": flags.get("--data", "a")}, "device": "cpu"}
(folder / "run.txt").write_text("=" * 100 + "\\nstep:1/1 val_loss:1.5\\n" + json.dumps(line) + "\\n")
"""


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NPROC", raising=False)
    (tmp_path / "t.py").write_text(TRAINER)
    return "t.py"


def run(*args, out="out"):
    code = race.main(
        [
            *map(str, args[: args.index("--")] if "--" in args else args),
            "--out",
            out,
            *(args[args.index("--") :] if "--" in args else []),
        ]
    )
    path = Path(out, "race.json")
    return code, json.loads(path.read_text()) if path.exists() else None


def calls():
    return Path("calls").read_text().split()


# ---------------------------------------------------------------------------------------------------------- statistics


def results(times, losses):
    return [race.Result(t, loss, Path("x"), {}) for t, loss in zip(times, losses)]


def test_compare_by_hand():
    """Ratios 1/2 and 1/8: geometric mean 1/4; log2 ratios -1 and -3: standard error 1, half an interval 12.706."""
    found = race.compare(list(zip(results([2, 8], [1.5, 1.7]), results([1, 1], [1.4, 1.8]))), 0.3)
    assert found["n"] == 2 and found["ratio"] == pytest.approx(0.25)
    assert found["ci"] == pytest.approx([2 ** (-2 - 12.7062), 2 ** (-2 + 12.7062)], rel=1e-4)
    # t = -2 with 1 degree of freedom: the Cauchy distribution, p = 1/2 - arctan(2) / pi
    assert found["p_value"] == pytest.approx(0.5 - math.atan(2) / math.pi)
    # loss differences -0.1, +0.1 against the margin 0.3: mean 0, standard error 0.1, t = -3
    assert found["p_loss_not_worse"] == pytest.approx(0.5 - math.atan(3) / math.pi)
    assert found["loss_reference"] == {
        "mean": pytest.approx(1.6),
        "std": pytest.approx(math.sqrt(0.02)),
    }
    assert found["loss_candidate"]["mean"] == pytest.approx(1.6)


def test_compare_against_scipy():
    generator = np.random.default_rng(0)
    a, b = generator.uniform(50, 60, 9), generator.uniform(48, 58, 9)
    la, lb = generator.normal(1.5, 0.01, 9), generator.normal(1.5, 0.01, 9)
    found = race.compare(list(zip(results(a, la), results(b, lb))), 0.005)
    test = stats.ttest_rel(np.log(b), np.log(a), alternative="less")
    low, high = stats.ttest_rel(np.log(b), np.log(a)).confidence_interval(0.95)
    assert found["p_value"] == pytest.approx(test.pvalue) and found["p_slower"] == pytest.approx(
        1 - test.pvalue
    )
    assert found["ci"] == pytest.approx([math.exp(low), math.exp(high)])
    loss_test = stats.ttest_1samp(lb - la, 0.005, alternative="less")
    assert found["p_loss_not_worse"] == pytest.approx(loss_test.pvalue)
    assert found["p_loss_worse"] == pytest.approx(1 - loss_test.pvalue)
    assert found["loss_candidate"]["std"] == pytest.approx(np.std(lb, ddof=1))


def test_few_and_equal_values():
    one = race.compare(list(zip(results([2], [1]), results([1], [1]))), 0.005)
    assert (
        one["ratio"] == 0.5
        and one["ci"] is None
        and one["p_value"] is None
        and race.verdict(one, 0.01) is None
    )
    assert race.compare([], 0.005)["ratio"] is None
    same = race.compare(list(zip(results([2, 2], [1, 1]), results([2, 2], [1, 1]))), 0.005)
    assert same["ci"] == [1, 1] and same["p_value"] == 1 and same["p_loss_not_worse"] == 0


@pytest.mark.parametrize(
    "runs, looks, planned",
    [
        (12, 3, [4, 8, 12]),
        (10, 3, [4, 7, 10]),
        (5, 3, [3, 4, 5]),
        (2, 3, [2]),
        (3, 3, [3]),
        (20, 1, [20]),
    ],
)
def test_planned_looks(runs, looks, planned):
    assert race.planned_looks(runs, looks) == planned


def test_early_stopping_keeps_the_level():
    """250 races of equal trainers at a level of 10 %: that many say "yes", though each was looked at three times."""
    generator, yes = random.Random(1), 0
    looks = race.planned_looks(12, 3)
    for _ in range(250):
        pairs = [
            tuple(results([math.exp(generator.gauss(0, 0.1)) for _ in "ab"], [1, 1]))
            for _ in range(12)
        ]
        yes += any(
            race.verdict(race.compare(pairs[:n], 0.005), 0.1 / len(looks)) == "yes" for n in looks
        )
    assert yes <= 0.1 * 250 + 2 * math.sqrt(250 * 0.1 * 0.9)


# ---------------------------------------------------------------------------------------------------------------- races


def test_faster_at_equal_loss_stops_early(trainer, capsys):
    code, found = run(
        trainer,
        trainer,
        "--runs",
        12,
        "--ref_flags",
        "--name A",
        "--cand_flags",
        "--name B --speed 0.9",
        "--",
        "--steps",
        "70",
    )
    assert code == 0
    assert found["faster"] == "yes" and found["decided_at"] == found["n"] == 4
    assert found["ratio"] == pytest.approx(0.9, rel=0.01) and found["ci"][0] < 0.9 < found["ci"][1]
    assert (
        found["reference"] == "t.py --name A" and found["candidate"] == "t.py --name B --speed 0.9"
    )
    assert found["looks"] == [4, 8, 12] and found["level_per_look"] == pytest.approx(0.01 / 3)
    assert found["machine"] and found["failures"] == [] and found["same_data"]
    assert len(found["times_ms"]["candidate"]) == len(found["losses"]["reference"]) == 4
    # a short warm-up of each, then pairs with one seed in alternating order
    assert calls() == "A0 B0 A0 B0 B1 A1 A2 B2 B3 A3".split()
    assert json.loads(Path("out/warmup0_A/run.txt").read_text().splitlines()[-1])["steps"] == 5
    assert (
        json.loads(Path("out/round000_A_seed0/run.txt").read_text().splitlines()[-1])["steps"] == 70
    )
    assert "faster: yes" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, faster",
    [
        ("--speed 1.1", "no"),  # slower
        ("--speed 0.5 --better -0.02", "no"),  # fast, but at a worse loss
        ("--speed 1", "not shown"),
    ],
)
def test_not_faster(trainer, flags, faster):
    code, found = run(
        trainer, f"{trainer} --name B {flags}", "--runs", 4, "--looks", 1, "--warmup_runs", 0
    )
    assert (code, found["faster"], found["n"]) == (0, faster, 4)


def test_history_in_one_race(trainer, capsys):
    Path("record").mkdir()
    Path("record/train_gpt.py").write_text(TRAINER)
    scripts = ["record", "t.py --name B --speed 0.8", "t.py --name C --speed 0.8 --data other"]
    code, found = run(
        *scripts,
        "--runs",
        6,
        "--looks",
        2,
        "--warmup_runs",
        0,
        "--first_seed",
        3,
        "--picture",
        "picture.png",
    )
    assert code == 0
    first, second = found["pairs"]
    assert (first["reference"], first["candidate"], first["faster"], first["decided_at"]) == (
        *scripts[:2],
        "yes",
        3,
    )
    assert (second["candidate"], second["faster"], second["n"]) == (scripts[2], "not shown", 6)
    assert first["same_data"] is False or second["same_data"] is False
    assert (
        calls() == "B3 C3 C4 B4 B5 C5 C6 B6 B7 C7 C8 B8".split()
    )  # the decided A is left out after round 3
    assert Path("record/calls").read_text().split() == ["-3", "-4", "-5"]
    assert json.loads(Path("out/race_BC.json").read_text()) == second
    assert Path("picture.png").read_bytes()[:4] == b"\x89PNG"
    assert "did not read the same data" in capsys.readouterr().out


def test_one_failed_run_is_tried_again(trainer):
    code, found = run(
        trainer, f"{trainer} --name B --speed 0.9 --fail once1", "--runs", 3, "--warmup_runs", 0
    )
    assert (code, found["n"], found["faster"]) == (0, 3, "yes")
    assert found["failures"] == [
        {"run": "round001_B_seed1", "why": "exit code 1: train_gpt.py: planted failure"}
    ]


def test_a_round_lost_leaves_the_pair(trainer):
    candidate = f"{trainer} --name B --speed 0.9 --fail always1"
    code, found = run(trainer, candidate, "--runs", 4, "--looks", 1, "--warmup_runs", 0)
    assert (code, found["n"], len(found["failures"])) == (0, 3, 2)
    assert [round(t / 1000, 1) for t in found["times_ms"]["reference"]] == [1.0, 1.2, 1.3]


def test_a_broken_script_leaves_the_race(trainer):
    code, found = run(trainer, f"{trainer} --fail always", "--runs", 9, "--warmup_runs", 0)
    assert (code, found["faster"], found["n"], found["ratio"]) == (1, "failed", 0, None)
    assert calls() == "-0 -0 -0 -1 -1 -1".split()


def test_timeout_and_nan_are_failed_runs(trainer):
    code, found = run(
        trainer, f"{trainer} --hang 0", "--runs", 1, "--warmup_runs", 0, "--timeout", 0.5
    )
    assert (
        code == 0
        and found["n"] == 0
        and {f["why"] for f in found["failures"]} == {"not finished after 0.5 s"}
    )
    code, found = run(trainer, f"{trainer} --nan yes", "--runs", 1, "--warmup_runs", 0, out="out2")
    assert found["n"] == 0 and "val loss nan" in found["failures"][0]["why"]


def test_max_hours(trainer, capsys):
    code, found = run(
        trainer, trainer, "--runs", 9, "--looks", 1, "--warmup_runs", 0, "--max_hours", 1e-9
    )
    assert code == 0 and found["n"] == 1 and found["faster"] == "undecided"
    assert "hours" in capsys.readouterr().out


def test_edited_during_the_race(trainer, monkeypatch, capsys):
    train = race.train

    def edit(script, flags, folder, timeout):
        if "round001" in folder.name:
            Path(trainer).write_text(TRAINER + "# edited\n")
        return train(script, flags, folder, timeout)

    monkeypatch.setattr(race, "train", edit)
    code, found = run(trainer, trainer, "--runs", 5, "--warmup_runs", 0)
    assert code == 1 and found["n"] == 1 and "edited during the race" in capsys.readouterr().err


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupt_prints_what_there_is(trainer, number, code):
    command = [
        sys.executable,
        ROOT / "records", "race",
        trainer,
        f"{trainer} --name B --hang 2",
        "--out",
        "out",
    ]
    process = subprocess.Popen(
        [*command, "--warmup_runs", "0"], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
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


@pytest.mark.parametrize(
    "args, message",
    [
        (["t.py"], "needs two scripts"),
        (["t.py", "missing.py"], "missing.py: no such file"),
        (["t.py", "."], "train_gpt.py: no such file"),
        (["t.py", "t.py", "--runs", "0"], "0 is not between 1"),
        (["t.py", "t.py", "--rusn", "3"], "--rusn"),
        (["t.py", "t.py", "t.py", "--cand_flags", "--x 1"], "for two scripts"),
        (["t.py", "t.py", "--cand_flags", "--x '1"], "quote"),
        (["t.py", "t.py", "--", "--seed", "3"], "--first_seed"),
        (["t.py", "t.py", "--cand_flags", "--log_dir=x"], "--out"),
        (["t.py", "t.py", "--out", "full"], "full: already there"),
        (["t.py", "t.py", "--json", "none/x.json"], "none/x.json"),
        (["t.py", "t.py", "--picture", "x.bmp"], "use .png"),
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


def test_runs_from_anywhere():
    done = subprocess.run(
        [sys.executable, ROOT / "records", "race", "--help"],
        capture_output=True,
        text=True,
        cwd="/",
    )
    assert done.returncode == 0 and "--loss_margin" in done.stdout


# ----------------------------------------------------------------------------------------------------- against nanoGPT

# Prints what nanoGPT's train.py prints, with a first iteration that holds an evaluation; its "checkpoint" is empty.
NANOGPT = """
import os, pathlib, sys
flags = dict(a[2:].split("=") for a in sys.argv[2:])
steps = int(flags["max_iters"])
assert os.path.exists("data/laptop_bytes/train.bin") and flags["eval_interval"] == flags["lr_decay_iters"] == str(steps)
print("step 0: train loss 5.5, val loss 5.6")
for i in range(steps):
    print(f"iter {i}: loss 5.0, time {9999 if i == 0 else 20 + i % 2:.2f}ms, mfu -100.00%")
print(f"step {steps}: train loss 1.6, val loss 1.65\\nsaving checkpoint")
print(f"iter {steps}: loss 1.6, time 777.00ms, mfu 1%")
pathlib.Path(flags["out_dir"], "ckpt.pt").touch()
"""
OURS = """
import json, pathlib, sys
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert flags["--preset"] == "laptop" and flags["--val_every"] == "10" and flags["--extra"] == "1"
lines = [f"step:{s}/40 val_loss:{2 - s / 100:.4f} train_time:{s}ms step_avg:1.00ms" for s in range(0, 50, 10)]
lines.append(json.dumps({"val_loss": 1.6, "train_time_ms": 40, "val_tokens": 128}))
pathlib.Path(flags["--log_dir"], "run.txt").write_text("\\n".join(lines))
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
        "step:0/9 val_loss:5.5 train_time:0ms step_avg:0ms\nstep:4/9 val_loss:1.7000 train_time:40ms step_avg:1ms\n"
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
