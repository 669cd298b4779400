"""The judge: an honest trainer that shares no code with ours is legal; what is changed comes out.

The trainer of these tests learns in numpy how often a byte follows another: a run takes a moment.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import text, write_shard

import train_gpt
from records.tools import judge, judge_case, judge_runs

ROOT = Path(__file__).resolve().parents[1]
TRAINER = """
import glob, hashlib, json, os, sys, time
import numpy as np

SOURCE = open(__file__).read()
FLAGS = dict(zip(sys.argv[1::2], sys.argv[2::2]))
T, B, V = 32, 256, 257

def number(name, default):
    return int(FLAGS.get(f"--{name}", default))

def read(pattern):
    return np.fromfile(sorted(glob.glob(pattern))[0], "<u2")[512:].astype(np.int64)

def probabilities(table, tokens):
    odds = np.exp(table[tokens] - table[tokens].max(-1, keepdims=True))
    return odds / odds.sum(-1, keepdims=True)

def evaluate(table, val, count):
    x, y = val[:count], val[1 : count + 1]
    return -np.log(probabilities(table, x)[np.arange(count), y]).mean()

def batch(train, step):
    return train[step * B : step * B + B + 1]

def update(table, tokens):
    end = time.process_time() + 0.01
    x, y = tokens[:-1], tokens[1:]
    p = probabilities(table, x)
    loss = -np.log(p[np.arange(len(x)), y]).mean()
    p[np.arange(len(x)), y] -= 1
    np.add.at(table, x, -0.5 * p)
    while time.process_time() < end:  # a slow computer
        pass
    return loss

def save(table, folder, step):
    os.makedirs(folder, exist_ok=True)
    with open(f"{folder}/new", "wb") as file:
        np.save(file, table)
    os.replace(f"{folder}/new", f"{folder}/step_{step:06d}.pt")

def main():
    steps, every, saves = (number(name, 0) for name in ("steps", "val_every", "checkpoint_every"))
    count, seed = number("val_tokens", 2048), number("seed", 0)
    config = dict(steps=steps, seq_len=T, batch_tokens=B, val_tokens=count, seed=seed)
    run_id, digest = f"{time.time_ns():x}", hashlib.sha256(SOURCE.encode()).hexdigest()
    facts = dict(run_id=run_id, argv=" ".join(sys.argv[1:]), source_sha256=digest)
    facts["config"] = json.dumps(config)
    os.makedirs("logs", exist_ok=True)
    log = open(f"logs/{run_id}.txt", "w", buffering=1)
    head = [SOURCE.removesuffix("\\n"), "=" * 100, *(f"{k}: {v}" for k, v in facts.items())]
    print(*head, "=" * 100, sep="\\n", file=log)
    train = read("data/laptop/laptop_train_*.bin")
    val = read("data/laptop/laptop_val_*.bin")
    table = np.random.default_rng(seed).normal(0, 0.01, (V, V))
    seconds, since = 0.0, time.perf_counter()

    def line(step, kind, loss):
        ms = 1000 * (seconds + (time.perf_counter() - since if since else 0))
        times = f"train_time:{ms:.0f}ms step_avg:{ms / max(1, step):.2f}ms"
        print(f"step:{step}/{steps} {kind}_loss:{loss:.4f} {times}", file=log)

    for step in range(steps + 1):
        if step == steps or every and step % every == 0:
            seconds, since = seconds + time.perf_counter() - since, None
            loss = evaluate(table, val, count)
            line(step, "val", loss)
            since = time.perf_counter() if step < steps else None
        if step < steps:
            line(step + 1, "train", update(table, batch(train, step)))
            if saves and (step + 1 == steps or (step + 1) % saves == 0):
                save(table, f"checkpoints/{run_id}", step + 1)
    result = dict(run_id=run_id, steps=steps, tokens=steps * B, val_loss=round(loss, 6))
    result["train_time_ms"] = round(1000 * seconds)
    print(json.dumps(result), file=log)

def load_model(path, device="cpu"):
    import torch
    table = np.load(path)
    return lambda tokens: torch.from_numpy(table[tokens.numpy()])

if __name__ == "__main__":
    main()
"""


def edited(*edits: tuple[str, str]) -> str:
    script = TRAINER
    for old, new in edits:
        assert script.count(old) == 1, old
        script = script.replace(old, new)
    return script


@pytest.fixture
def data(tmp_path):
    """Flags that name shards of text: training tokens for some hundred steps."""
    write_shard(tmp_path / "train_000000.bin", text(60_000, 1))
    write_shard(tmp_path / "val_000000.bin", text(5_000, 2))
    return [f"--{name}_files={tmp_path}/{name}_*.bin" for name in ("train", "val")]


def judged(tmp_path, script: str, flags: list[str], *options) -> tuple[int, dict]:
    """(exit code, {check: (state, reason)})"""
    (tmp_path / "candidate.py").write_text(script)
    (tmp_path / "home").mkdir()
    command = [sys.executable, "-m", "records", "judge", tmp_path / "candidate.py"]
    command += ["--json", tmp_path / "verdict.json", "--dice", "1", *options, "--", *flags]
    env = os.environ | dict.fromkeys(("HOME", "TMPDIR"), str(tmp_path / "home"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, env=env)
    assert "Traceback" not in done.stderr, done.stderr
    verdict = json.loads((tmp_path / "verdict.json").read_text())
    assert all(
        check["reason"] in done.stdout or "for the same" in done.stdout
        for check in verdict["checks"]
    )
    return done.returncode, {
        check["name"]: (check["state"], check["reason"]) for check in verdict["checks"]
    }


FLAGS = ["--steps", "30", "--val_every", "10", "--val_tokens", "2048"]


@pytest.mark.slow
def test_honest_trainer_is_legal(tmp_path, data):
    code, checks = judged(tmp_path, TRAINER, FLAGS + data)
    assert code == 0 and {state for state, _ in checks.values()} == {"pass"}, checks
    assert len(checks) == len(judge.CHECKS)
    assert not list((tmp_path / "home").iterdir())


def test_the_first_proof_ends_the_judging(tmp_path, data):
    script = edited(
        ("SOURCE = open(__file__).read()", "SOURCE = open(__file__).read() + '# honest'")
    )
    code, checks = judged(tmp_path, script, FLAGS + data)
    assert code == 1 and checks["source"] == ("fail", "the log's source is not the file that ran")
    assert [state for state, _ in checks.values()].count("skipped") > 8


ANSWER = "torch.from_numpy(table[tokens.numpy()])"
NEXT = "np.eye(V)[np.roll(tokens.numpy(), -1, 1)]"
WEIGHTS = "table = np.random.default_rng(seed).normal(0, 0.01, (V, V))"
CLOCK = "    seconds, since = 0.0"
BATCH = "train[step * B : step * B + B + 1]"


def answering(what: str) -> tuple[str, str]:
    return ANSWER, f"torch.from_numpy(table[tokens.numpy()] + {what})"


def validating(line: str) -> tuple[str, str]:
    call = "loss = evaluate(table, val, count)\n"
    return call, f"{call}            {line}\n"


CHEATS = {  # name: (check that fails, words of its reason, edits)
    "validation tokens in a batch": (
        "first batch",
        "only validation tokens",
        [(f"return {BATCH}", f"return np.append({BATCH}, read('data/laptop/laptop_val*')[:99])")],
    ),
    "a look at the next token": ("causality", "on later tokens", [answering(f"0.1 * {NEXT}")]),
    "a look at position 7 alone": (
        "causality",
        "such as 7)",
        [answering(f"(np.arange(tokens.shape[1]) == 7)[:, None] * {NEXT}")],
    ),
    "rows that see each other": (
        "causality",
        "among other rows",
        [answering("table[np.roll(tokens.numpy(), 1, 0)]")],
    ),
    "a loss of half the tokens": (
        "val loss",
        "the log says",
        [("    x, y = val[:count]", "    count //= 2\n    x, y = val[:count]")],
    ),
    "the least of all losses": (
        "rising loss",
        "worse at the end",
        [(CLOCK, "    best = 99.0\n" + CLOCK), validating("loss = best = min(best, loss)")],
    ),
    "rows beyond the schedule": (
        "other tokens",
        "beyond the schedule",
        [(f"return {BATCH}", f"return np.append({BATCH}, train[-50 * step - 51 :][:51])")],
    ),
    "training before the clock": (
        "first batch",
        "after one update",
        [(CLOCK, "    for i in range(9):\n        update(table, batch(train, i))\n" + CLOCK)],
    ),
    "the work of a run before the clock": (
        "beside the clock",
        "when the first line comes",
        [(CLOCK, "    for i in range(25 * steps):\n        update(table * 1, val[:9])\n" + CLOCK)],
    ),
    "work in the last validation": (
        "beside the clock",
        "for the last validation",
        [
            (
                "            loss = evaluate(table, val, count)\n",
                "            for i in range(200 * (step == steps)):\n"
                "                update(table * 1, batch(train, 0))\n"
                "            loss = evaluate(table, val, count)\n",
            )
        ],
    ),
    "a slow clock": ("clock", "pass between lines that log", [("ms = 1000 *", "ms = 100 *")]),
    "weights that know the bytes": (
        "renumbered tokens",
        "numbers",
        [
            ("-0.5 * p", "-0.05 * p"),
            (WEIGHTS, f"{WEIGHTS}\n    a = np.arange(62)\n    table[a, a + 1] += 3"),
        ],
    ),
    "work in the validations": ("plain run", "the losses differ", [validating("table *= 1.01")]),
    "a process left behind": (
        "left behind",
        "still there",
        [
            (
                '__":\n    main()\n',
                '__":\n    main()\n    if os.fork() == 0:\n        os.setsid(), time.sleep(60)\n',
            )
        ],
    ),
    "weights of an earlier run": (
        "plain run",
        "in the folder of another run",
        [
            (
                WEIGHTS,
                f"{WEIGHTS}\n    for path in glob.glob('checkpoints/*/*'):\n"
                "        table = np.load(path)",
            )
        ],
    ),
    "time taken back": (
        "clock",
        "while it stood",
        [validating("seconds *= 0.7")],
    ),
    "one model for all seeds": (
        "first update",
        "another seed",
        [("default_rng(seed).normal", "default_rng(0).normal")],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHEATS)
def test_cheat_is_named(name, tmp_path, data):
    check, words, edits = CHEATS[name]
    code, checks = judged(tmp_path, edited(*edits), FLAGS + data, "--every_check")
    assert code == 1 and checks[check][0] == "fail" and words in checks[check][1], checks


HONEST = {
    "a mean of weights": [
        ("    seconds, since = 0.0", "    raw = table.copy()\n    seconds, since = 0.0"),
        (
            "update(table, batch(train, step)))",
            "update(raw, batch(train, step)))\n            table += 0.5 * (raw - table)",
        ),
    ],
    "dropout": [
        (
            "    p = probabilities(table, x)\n    loss",
            "    kept = np.random.default_rng(int(x[0])).random(V) < 0.9\n"
            "    p = probabilities(table * kept, x)\n    loss",
        )
    ],
    "smaller batches at first": [
        ("step * B : step * B + B + 1", "step * B : step * B + (B if step > 9 else B // 2) + 1")
    ],
    "a sample after the end": [
        (
            "    print(json.dumps(result), file=log)",
            "    print(json.dumps(result), file=log)\n    print('sample: abc', file=log)",
        )
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HONEST)
def test_honest_variant_is_legal(name, tmp_path, data):
    code, checks = judged(tmp_path, edited(*HONEST[name]), FLAGS + data)
    assert code == 0, checks


@pytest.mark.slow
@pytest.mark.parametrize(
    "edits, words",
    [
        ([("def load_model", "def other_name")], "no load_model"),
        ([("default_rng(seed)", "default_rng()")], "other losses each time"),
        ([("buffering=1", "buffering=2**20")], "too few lines"),
        (
            [
                (
                    "step * B : step * B + B + 1",
                    "(97 * step) % 200 * B + 9000 : (97 * step) % 200 * B + 9000 + B + 1",
                )
            ],
            "order of its own",
        ),
    ],
)
def test_what_cannot_be_seen_is_said_and_blames_nobody(edits, words, tmp_path, data):
    code, checks = judged(tmp_path, edited(*edits), FLAGS + data)
    assert code == 3 and "fail" not in {state for state, _ in checks.values()}, checks
    assert any(words in reason for state, reason in checks.values() if state == "not seen"), checks


# ------------------------------------------------------------------------------------------ checks

RUNS = ("base", "plain", "first", "early", "inside", "reseeded", "again", "changed", "only_val")
RUNS += ("rising", "renumbered")


def steps_of(pace=1.0, pause=1.0, logs=1.0, refund=0.0):
    """Step lines of a run with a validation after every tenth step; seconds."""
    lines, seen, logged = [], 3.0, 0.0
    for step in range(1, 41):
        seen, logged = seen + pace, logged + pace * logs
        lines.append(judge_runs.Line(seen, seen, step, "train", f"{9 - step / 10}", logged))
        if step % 10 == 0:
            seen += pause
            lines.append(judge_runs.Line(seen, seen, step, "val", "2.0", logged))
            logged -= refund
    return lines


class Made:
    """What a job left, made up: nothing can be said against it."""

    ok, why, left, flags, checkpoints, touched = True, "", [], ["--val_tokens", "64"], 1, False
    answering = 1.0

    def __init__(self, name):
        self.name, self.value, self.parameters = name, {}, {}
        self.run = SimpleNamespace(val_loss=2.0, config={"val_tokens": 64}, source_bytes=9)
        self.run.source_sha256 = hashlib.sha256(b"script").hexdigest()
        self.run.header = {"argv": "--val_tokens 64"}
        self.log(steps_of())

    def log(self, lines):
        self.lines = lines
        self.losses = {line.step: line.loss for line in lines if line.kind == "train"}


@pytest.fixture
def case(corpus):
    case = judge_case.Case.__new__(judge_case.Case)
    case.script, case.cuda, case.seed, case.val_tokens, case.corpus = (
        b"script",
        False,
        0,
        64,
        corpus,
    )
    case.args = SimpleNamespace(note="", claims={0: 2.0, 1: 2.01})
    case.trainings, case.scores = [Made(name) for name in RUNS], {}
    case.row_order, case.config = np.arange(4), SimpleNamespace(steps=40)
    score = Made("score")
    for name, run in zip(RUNS, case.trainings, strict=True):
        setattr(case, name, run)
        case.scores[run] = score
        score.value[run] = np.full((4, 16), 2.0)
        score.parameters[run] = {"a": name}
    case.base_score = case.prefixes = score
    score.value[case.first] = score.value[case.early] = np.full((4, 16), 5.5)
    score.value[case.inside] = score.value[case.reseeded] = np.full((4, 16), 5.25)
    case.again.why = judge_runs.NOT_NEEDED
    case.asked_row, case.asked_at = np.arange(64) % 4, np.arange(64) // 4
    case.prefix_losses = lambda: np.full(64, 2.0)
    return case


ALL = [look for look, _ in judge.CHECKS] + [judge.claim]


@pytest.mark.parametrize("look", ALL, ids=lambda look: look.__name__)
def test_check_passes(look, case):
    assert look(case)[0] == "pass"


def scores(case, **values):
    """Other losses of these runs' models."""
    for name, value in values.items():
        run = getattr(case, name)
        case.scores[run].value[run] = case.scores[run].value[run] + value


def other_plain_run(case, again: bool):
    """The plain run ends elsewhere; is the base run, run again, as it was?"""
    case.plain.run.val_loss = 2.1
    case.plain.losses = case.plain.losses | {17: "9"}
    case.again.why = ""
    case.again.losses = case.base.losses if again else {}


def left_tables(case):
    """Later runs are better than the first, each in its own way."""
    other_plain_run(case, again=False)
    for run, gain in ((case.plain, 0.4), (case.again, 0.5)):
        run.losses = {step: f"{float(x) - gain}" for step, x in case.base.losses.items()}


def logged(**how):
    def change(case):
        case.base.log(steps_of(**how))
        case.plain.log(steps_of(**how))

    return change


def prefix(at, gain):
    def change(case):
        case.prefix_losses = lambda: np.full(64, 2.0) + gain * (case.asked_at % 16 == at)

    return change


def own_order(case):
    scores(case, early=1.0, changed=1.0, inside=0.25)


FOUND = [  # check, what is made of the case, state, words of the reason
    ("source", lambda c: setattr(c.base, "touched", True), "fail", "is not what it was"),
    ("source", lambda c: setattr(c.base.run, "source_sha256", "0"), "fail", "log's source"),
    ("source", lambda c: setattr(c, "script", os.urandom(60_000)), "fail", "bytes compressed"),
    ("source", lambda c: c.base.run.header.update(argv="--seed 1"), "fail", "the log says"),
    ("val_loss", lambda c: setattr(c.base.run, "val_loss", 1.99), "fail", "scores 2.0"),
    ("val_loss", lambda c: c.base.run.config.update(val_tokens=9), "fail", "validation tokens"),
    ("rising_loss", lambda c: setattr(c.rising.run, "val_loss", 1.9), "fail", "the log says 1.9"),
    ("causality", prefix(7, 0.1), "fail", "such as 7)"),
    ("causality", lambda c: setattr(c, "prefix_losses", lambda: np.full(64, 2.1)), "fail", "0.100"),
    ("plain_run", lambda c: other_plain_run(c, again=True), "fail", "from step 17 on"),
    ("plain_run", lambda c: other_plain_run(c, again=False), "not seen", "other losses each time"),
    ("plain_run", left_tables, "fail", "they find something"),
    ("clock", logged(logs=0.9), "fail", "are not logged"),
    ("clock", logged(refund=0.9), "fail", "while it stood"),
    ("clock", lambda c: c.plain.log(steps_of(logs=0.98)), "not seen", "the other run is in time"),
    ("clock", lambda c: c.plain.log(steps_of(logs=0.9)), "fail", "plain"),
    ("first_batch", lambda c: scores(c, early=0.1), "fail", "after one update"),
    ("first_batch", own_order, "not seen", "order of its own"),
    ("first_update", lambda c: scores(c, reseeded=0.25), "fail", "another seed"),
    ("first_update", lambda c: scores(c, first=-2), "fail", "of what the run learns"),
    ("other_tokens", lambda c: scores(c, changed=0.1), "fail", "beyond the schedule"),
    ("other_tokens", own_order, "not seen", "order of its own"),
    ("renumbered_tokens", lambda c: scores(c, renumbered=0.1), "fail", "numbers"),
    ("beside_the_clock", logged(pause=9), "fail", "9.0 s of computing for a validation"),
    ("left_behind", lambda c: setattr(c.first, "left", ["sleep"]), "fail", "sleep"),
    ("claim", lambda c: setattr(c.plain.run, "val_loss", 2.2), "fail", "2.0000 in the record"),
]


@pytest.mark.parametrize("name, change, state, words", FOUND)
def test_check_finds(name, change, state, words, case):
    change(case)
    found = getattr(judge, name)(case)
    assert found[0] == state and words in found[1]


def test_work_in_the_last_validation_and_before_the_clock(case):
    *lines, last = steps_of()
    case.rising.log([*lines, replace(last, spent=last.spent + 3)])
    assert "4.0 s of computing for the last validation" in judge.beside_the_clock(case)[1]
    case.rising.log([replace(line, spent=line.spent - 2.5) for line in steps_of()])
    case.base.log([replace(line, spent=line.spent + 1.5) for line in steps_of()])
    case.plain.log([replace(line, spent=line.spent + 1.4) for line in steps_of()])
    assert judge.beside_the_clock(case)[0] == "fail"
    assert "4.4 s of computing are not logged" in judge.beside_the_clock(case)[1]
    case.plain.log([replace(line, spent=line.spent - 2.5) for line in steps_of()])
    assert judge.beside_the_clock(case)[0] == "pass", "a compiler's cache was cold"


def test_parameters_that_stand_still_are_told(case):
    case.scores[case.base].parameters[case.base]["b"] = "same"
    case.scores[case.first].parameters[case.first]["b"] = "same"
    state, reason = judge.first_update(case)
    assert state == "pass" and reason.endswith("never moved after that: b")


# ------------------------------------------------------------------------------------------ pieces


def test_losses_are_those_of_torch_in_fp64():
    import torch

    rng = np.random.default_rng(0)
    logits, targets = rng.normal(0, 9, (15, 7)).astype("f4"), rng.integers(7, size=15)
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits).double(), torch.from_numpy(targets), reduction="none"
    )
    assert np.allclose(judge_case.losses(logits, targets), expected, rtol=1e-14, atol=1e-14)


def test_batches_of_random_sizes():
    sizes = judge_case.batch_sizes(1000, 8, np.random.default_rng(0))
    assert sum(sizes) == 1000 and set(sizes) == set(range(1, 9))


def test_flags():
    flags = ["--preset", "laptop", "--no_bf16", "--steps=9", "--window", "1", "2", "--seed", "3"]
    values, rest = judge_case.taken(flags, "steps", "seed", "lr")
    assert values == dict(steps="9", seed="3", lr=None)
    assert rest == ["--preset", "laptop", "--no_bf16", "--window", "1", "2"]
    assert judge_case.with_flags(["--seed", "3", "--compile"], seed=4) == [
        "--compile",
        "--seed",
        "4",
    ]


@pytest.fixture
def corpus():
    return judge_case.Corpus(
        text(9_000, 1).astype("<u2"), text(700, 2).astype("<u2"), ("t", "v"), 256
    )


def test_corpus_variants_change_what_they_should(corpus):
    rng = np.random.default_rng(0)
    other = corpus.renumbered(rng)
    assert ((other.train == 256) == (corpus.train == 256)).all()
    assert (
        np.sort(np.bincount(other.val))
        == np.sort(np.bincount(corpus.val, minlength=len(np.bincount(other.val))))
    ).all()
    assert (other.train != corpus.train).mean() > 0.9
    assert (corpus.other_val(rng) != corpus.val).mean() > 0.5 and len(corpus.other_val(rng)) == 700
    changed = np.arange(9_000) >= 5_000
    train = corpus.other_train(changed, rng)
    assert (train[:5_000] == corpus.train[:5_000]).all() and (
        train[5_000:] != corpus.train[5_000:]
    ).mean() > 0.9
    assert ((train == 256) == (corpus.train == 256)).all()


def test_scheduled_tokens_are_those_of_the_loader(case, tmp_path):
    config = replace(train_gpt.PRESETS["laptop"], seq_len=32, batch_tokens=[256, 512], steps=12)
    used = case.scheduled(config, 3, 5)
    assert used[768 : 2 * 1280].all() and used.sum() > 2 * 1280 - 768
    write_shard(tmp_path / "train.bin", used)
    shards = train_gpt.Shards(f"{tmp_path}/train.bin", "train_files", 32)
    for spread in (True, False):
        batches = train_gpt.Batches(shards, replace(config, spread_rows=spread))
        assert [int(batches.batch_at(step).min()) for step in (3, 4, 0)] == [1, 1, 0]


@pytest.mark.parametrize("count", [1, 4, 16, 40])
def test_questions_hide_the_future(count, case):
    """The prefix is the row's own, what follows is not, and no row is asked twice in a batch."""
    case.config, case.row_order = SimpleNamespace(val_len=16), np.arange(count)
    case.rng = np.random.default_rng(0)
    case.other_val = case.corpus.other_val(case.rng)
    shown, sizes, at = case.ask_prefixes(None)
    equal = shown == case.rows(case.corpus)[case.asked_row, :-1]
    later = np.arange(16) > np.array(at)[:, None]
    assert equal[~later].all() and equal[later].mean() < 0.2
    batches = np.split(case.asked_row, np.cumsum(sizes)[:-1])
    assert all(len(set(batch)) == len(batch) for batch in batches)


def lines(*rows):
    return [
        judge_runs.Line(seen, seen, step, kind, "1.0", logged) for step, kind, seen, logged in rows
    ]


def test_stopwatch_counts_time_between_training_lines_only():
    run = SimpleNamespace(
        lines=lines(
            (0, "val", 5, 0),
            (1, "train", 6, 1),
            (2, "train", 8, 3),
            (2, "val", 12, 3),
            (3, "train", 13, 4),
            (4, "train", 15, 5),
            (4, "val", 19, 5),
            (5, "train", 20, 5.5),
        )
    )
    assert judge.lateness(run) == (4, 1)
    assert judge.taken_back(run) == pytest.approx(1.1 - 1 + 1.1 - 1 + 1.1 - 0.5)  # steps: 2, 1 s
    assert judge.pauses(run) == [12 - 8, 19 - 15 + 0.5]


def test_processes_that_hide_are_found_and_ended(tmp_path):
    script = b"import os, time\nif os.fork() == 0:\n    os.setsid(), time.sleep(60)\n"
    command = (
        "from records.tools import judge_runs as r\n"
        f"job = r.Training('run', {script!r}, list, lambda: {{'d/x.bin': [1]}})\n"
        "r.run_all([job], 1, print, bool)\n"
        "print(job.why, len(job.left), r.children(), job.folder.exists())"
    )
    done = subprocess.run(
        [sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=30
    )
    assert done.stdout.endswith("\nit wrote no log into logs/ 1 set() False\n"), done


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_leaves_nothing_behind(number, tmp_path, data):
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(60)\n")
    (tmp_path / "tmp").mkdir()
    command = [sys.executable, "-m", "records", "judge", tmp_path / "slow.py", "--", *data]
    env = os.environ | dict.fromkeys(("HOME", "TMPDIR"), str(tmp_path / "tmp"))
    process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 30
    while not list((tmp_path / "tmp").glob("*/train_gpt.py")) and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(0.2)
    running = [
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/cwd")
        if str(tmp_path) in os.path.realpath(path)
    ]
    process.send_signal(number)
    error = process.communicate(timeout=20)[1]
    assert (
        process.returncode == 128 + number and error == "records judge: interrupted, no verdict\n"
    )
    assert running and not any(Path(f"/proc/{pid}").exists() for pid in running)
    assert not list((tmp_path / "tmp").iterdir())


@pytest.mark.parametrize(
    "argv, words",
    [
        ("nowhere.py", "no such trainer"),
        ("train_gpt.py -- --preset none", "--preset none"),
        ("train_gpt.py --new", "unrecognized"),
        ("train_gpt.py -- --seed one", "--seed one: must be a whole number"),
        ("train_gpt.py -- --seed", "expected one argument"),
        ("train_gpt.py -- --seed ²", "--seed ²: must be a whole number"),
        ("train_gpt.py --dice -1", "-1 is not between 0"),
        ("train_gpt.py --timeout nan", "nan is not between 1"),
        ("train_gpt.py --json README.md", "README.md: give a new file"),
        ("train_gpt.py -- --train_files README.md", "README.md: not a"),
        ("README.md", "Python cannot read it"),
        ("data", "no such trainer"),
        ("train_gpt.py -- --val_files nowhere/*.bin", "no such data"),
    ],
)
def test_misuse_is_one_line(argv, words, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(judge, "change_name", lambda: None)
    assert judge.main(argv.split()) == 2
    out, error = capsys.readouterr()
    assert (
        error.startswith("records judge: ")
        and error.count("\n") == 1
        and words in error
        and not out
    )
