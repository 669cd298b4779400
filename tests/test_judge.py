"""The judge: an honest trainer that shares no code with ours is legal; what is changed comes out.

The trainer of these tests learns in numpy how often a byte follows another: a run takes a moment.
"""

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
    end = time.process_time() + 0.02
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
    os.makedirs("logs")
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
    command = [sys.executable, "-m", "records", "judge", tmp_path / "candidate.py", "--quiet"]
    command += ["--json", tmp_path / "verdict.json", "--dice", "1", *options, "--", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
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


def test_honest_trainer_is_legal(tmp_path, data):
    code, checks = judged(tmp_path, TRAINER, FLAGS + data)
    assert code == 0 and {state for state, _ in checks.values()} == {"pass"}, checks
    assert len(checks) == len(judge.CHECKS)


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
        "validation tokens",
        "only the validation tokens differ",
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
        "val loss",
        "worse at the end",
        [(CLOCK, "    best = 99.0\n" + CLOCK), validating("loss = best = min(best, loss)")],
    ),
    "rows beyond the schedule": (
        "training tokens",
        "beyond the schedule",
        [(f"return {BATCH}", f"return np.append({BATCH}, train[-50 * step - 51 :][:51])")],
    ),
    "training before the clock": (
        "training tokens",
        "after one update",
        [(CLOCK, "    for i in range(9):\n        update(table, batch(train, i))\n" + CLOCK)],
    ),
    "the work of a run before the clock": (
        "beside the clock",
        "when the first line comes",
        [(CLOCK, "    for i in range(9 * steps):\n        update(table * 1, val[:9])\n" + CLOCK)],
    ),
    "work in the last validation": (
        "beside the clock",
        "of computing for a validation",
        [
            (
                "            loss = evaluate(table, val, count)\n",
                "            for i in range(150 * (step == steps)):\n"
                "                update(table * 1, batch(train, 0))\n"
                "            loss = evaluate(table, val, count)\n",
            )
        ],
    ),
    "a slow clock": ("clock", "pass between lines that log", [("ms = 1000 *", "ms = 100 *")]),
    "another source in the log": (
        "source",
        "the log's source is not",
        [("SOURCE = open(__file__).read()", "SOURCE = open(__file__).read() + '# honest'")],
    ),
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
    code, checks = judged(tmp_path, edited(*edits), FLAGS + data)
    assert code == 1 and checks[check][0] == "fail" and words in checks[check][1], checks


HONEST = {
    "losses written at the end": [("buffering=1", "buffering=2**20")],
    "validation lines alone": [
        (
            "    def line(step, kind, loss):\n",
            "    def line(step, kind, loss):\n        if kind == 'train':\n            return\n",
        )
    ],
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


# ------------------------------------------------------------------------------------------ pieces


def test_losses_are_those_of_torch_in_fp64():
    import torch

    rng = np.random.default_rng(0)
    logits, targets = rng.normal(0, 9, (3, 5, 7)).astype("f4"), rng.integers(7, size=(3, 5))
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits).double().flatten(0, 1),
        torch.from_numpy(targets).flatten(),
        reduction="none",
    )
    assert np.allclose(judge_case.losses(logits, targets).ravel(), expected, rtol=1e-14)
    with pytest.raises(ValueError, match="7 logits for target 7"):
        judge_case.losses(logits, targets + 1)


def test_flags():
    flags = ["--preset", "laptop", "--no_bf16", "--steps=9", "--window", "1", "2", "--seed", "3"]
    assert judge_case.without(flags, "bf16", "window", "steps") == [
        "--preset",
        "laptop",
        "--seed",
        "3",
    ]
    assert [judge_case.value_of(flags, name) for name in ("steps", "seed", "lr")] == [
        "9",
        "3",
        None,
    ]
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


def test_scheduled_tokens_are_those_of_the_loader(corpus, tmp_path):
    config = replace(train_gpt.PRESETS["laptop"], seq_len=32, batch_tokens=[256, 512], steps=12)
    used = judge_case.scheduled(corpus, config, 3, 5)
    assert used.sum() == 2 * 8 * 33  # rows lie far apart
    write_shard(tmp_path / "train.bin", used)
    shards = train_gpt.Shards(f"{tmp_path}/train.bin", "train_files", 32)
    batches = train_gpt.Batches(shards, replace(config, spread_rows=True))
    assert [int(batches.batch_at(step).min()) for step in (3, 4, 5)] == [1, 1, 0]
    used = judge_case.scheduled(corpus, replace(config, max_document=20), 0, 2)
    assert (corpus.train[np.flatnonzero(used[1:] & ~used[:-1]) + 1] == 256).all()


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
        )
    )
    assert judge.between_lines(run) == [4, 3, 4]
    assert judge.pauses(run) == [13 - 8 - 1]


def test_processes_that_hide_are_found_and_ended(tmp_path):
    script = b"import os, time\nif os.fork() == 0:\n    os.setsid(), time.sleep(60)\n"
    command = (
        "from records.tools import judge_runs as r\n"
        f"job = r.Training('run', {script!r}, [], {{'d/x.bin': [1]}})\n"
        "r.run_all([job], 1)\n"
        "print(job.why, len(job.left), r.children(), job.home.exists())"
    )
    done = subprocess.run(
        [sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=30
    )
    assert done.stdout == "it wrote no log into logs/ 1 set() False\n", done


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_nothing_behind(number, tmp_path, data):
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(60)\n")
    (tmp_path / "tmp").mkdir()
    command = [sys.executable, "-m", "records", "judge", tmp_path / "slow.py", "--", *data]
    env = os.environ | {"TMPDIR": str(tmp_path / "tmp")}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 30
    while len(list((tmp_path / "tmp").glob("*/output"))) < 2 and time.monotonic() < end:
        time.sleep(0.02)
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
