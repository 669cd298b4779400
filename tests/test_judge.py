"""The judge: an honest trainer that shares no code with ours is legal; what is changed comes out.

The trainer of these tests learns in numpy how often a byte follows another: a run takes a moment.
"""

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import text, write_shard

from records.tools import corpus, judge, logs, runs

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
    x, y = tokens[:-1], tokens[1:]
    p = probabilities(table, x)
    loss = -np.log(p[np.arange(len(x)), y]).mean()
    p[np.arange(len(x)), y] -= 1
    np.add.at(table, x, -0.5 * p)
    return loss

def save(table, folder, step):
    os.makedirs(folder, exist_ok=True)
    with open(f"{folder}/step_{step:06d}.pt", "wb") as file:
        np.save(file, table)

def main():
    steps, every = number("steps", 0), number("val_every", 0)
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
    for step in range(steps + 1):
        if step == steps or every and step % every == 0:
            loss = evaluate(table, val, count)
            times = f"train_time:{step}ms step_avg:{step / max(1, step):.2f}ms"
            print(f"step:{step}/{steps} val_loss:{loss:.4f} {times}", file=log)
        if step < steps:
            update(table, batch(train, step))
    save(table, f"checkpoints/{run_id}", steps)
    result = dict(run_id=run_id, steps=steps, tokens=steps * B, val_loss=round(loss, 6))
    print(json.dumps(result | dict(train_time_ms=steps, param_count=V * V)), file=log)

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
    (tmp_path / "reference.py").write_text(TRAINER)
    (tmp_path / "home").mkdir()
    command = [sys.executable, "-m", "records", "judge", tmp_path / "candidate.py", "--dice", "1"]
    command += ["--json", tmp_path / "verdict.json", "--against", tmp_path / "reference.py"]
    env = os.environ | dict.fromkeys(("HOME", "TMPDIR"), str(tmp_path / "home"))
    done = subprocess.run(
        [*command, *options, "--", *flags],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env=env,
    )
    assert "Traceback" not in done.stderr, done.stderr
    verdict = json.loads((tmp_path / "verdict.json").read_text())
    assert all(check["reason"] in done.stdout for check in verdict["checks"]), done.stdout
    assert verdict["code"] == done.returncode and verdict["facts"] in done.stdout
    assert not list((tmp_path / "home").iterdir())
    return done.returncode, {
        check["name"]: (check["state"], check["reason"]) for check in verdict["checks"]
    }


FLAGS = ["--steps", "8", "--val_tokens", "2048"]


@pytest.mark.slow
def test_honest_trainer_is_legal(tmp_path, data):
    code, checks = judged(tmp_path, edited(("SOURCE = ", "# honest\nSOURCE = ")), FLAGS + data)
    assert code == 0 and {state for state, _ in checks.values()} == {"pass"}, checks
    assert len(checks) == len(judge.CHECKS)


ANSWER = "torch.from_numpy(table[tokens.numpy()])"
NEXT = "np.eye(V)[np.roll(tokens.numpy(), -1, 1)]"
WEIGHTS = "table = np.random.default_rng(seed).normal(0, 0.01, (V, V))"
BATCH = "train[step * B : step * B + B + 1]"
KNOWN = "\n    a = np.arange(64)\n    table[a, (a + 1) % 64] += 6\n    table[a, (a + 2) % 64] += 6"


def answering(what: str) -> tuple[str, str]:
    return ANSWER, f"torch.from_numpy(table[tokens.numpy()] + {what})"


CHEATS = {  # name: (check, state, words of its reason, edits)
    "validation tokens in a batch": (
        "validation text",
        "fail",
        "depends on the validation text",
        [(f"return {BATCH}", f"return np.append({BATCH}, read('data/laptop/laptop_val*')[:99])")],
    ),
    "a look at the next token": ("causality", "fail", "later tokens", [answering(f"0.1 * {NEXT}")]),
    "a look at position 7 alone": (
        "causality",
        "fail",
        "such as 7)",
        [answering(f"(np.arange(tokens.shape[1]) == 7)[:, None] * {NEXT}")],
    ),
    "rows that see each other": (
        "causality",
        "fail",
        "or other rows",
        [answering("table[np.roll(tokens.numpy(), 1, 0)]")],
    ),
    "the loss of the easier half": (
        "logged loss",
        "fail",
        "the logs say",
        [
            (
                "-np.log(probabilities(table, x)[np.arange(count), y]).mean()",
                "np.sort(-np.log(probabilities(table, x)[range(count), y]))[: count // 2].mean()",
            )
        ],
    ),
    "the least of all losses": (
        "logged loss",
        "fail",
        "on noise the log says",
        [
            ("    for step in range(steps + 1):", "    b = 9.0\n    for step in range(steps + 1):"),
            (
                "loss = evaluate(table, val, count)",
                "loss = b = min(b, evaluate(table, val, count))",
            ),
        ],
    ),
    "the best of all checkpoints": (
        "validation text",
        "fail",
        "depends on the validation text",
        [
            (
                "loss = evaluate(table, val, count)\n",
                "loss = evaluate(table, val, count)\n"
                "            best = min([(loss, step, table.copy()), *kept], key=lambda x: x[0])\n"
                "            kept[:] = [best]\n",
            ),
            (
                "    for step in range(steps + 1):",
                "    kept = []\n    for step in range(steps + 1):",
            ),
            ('    save(table, f"', '    table = kept[0][2]\n    save(table, f"'),
        ],
    ),
    "weights that know the bytes": (
        "identity",
        "void",
        "identity of this track's tokens",
        [(WEIGHTS, WEIGHTS + KNOWN)],
    ),
    "weights of an earlier run": (
        "validation text",
        "fail",
        "an earlier run left",
        [
            (
                WEIGHTS,
                f"{WEIGHTS}\n    for path in glob.glob('checkpoints/*/*'):\n"
                "        table = np.load(path)",
            )
        ],
    ),
    "another source in the log": (
        "source",
        "fail",
        "not the file that ran",
        [("SOURCE = open(__file__).read()", "SOURCE = open(__file__).read() + '# honest'")],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHEATS)
def test_cheat_is_named(name, tmp_path, data):
    check, state, words, edits = CHEATS[name]
    code, checks = judged(tmp_path, edited(*edits), FLAGS + data, "--every_check")
    assert code == (1 if state == "fail" else 3), checks
    assert checks[check][0] == state and words in checks[check][1], checks


HONEST = {
    "a mean of weights": [
        (
            "    for step in range(steps + 1):",
            "    raw = table * 1\n    for step in range(steps + 1):",
        ),
        (
            "update(table, batch(train, step))",
            "update(raw, batch(train, step))\n            table += 0.5 * (raw - table)",
        ),
    ],
    # legal since time is that of the whole process: they cost what they cost
    "several epochs": [(f"return {BATCH}", "return train[step % 5 * B : step % 5 * B + B + 1]")],
    "more tokens than it says": [
        ("update(table, batch(train, step))", "[update(table, batch(train, step)) for _ in 'ab']")
    ],
    "statistics of the training shards": [
        (WEIGHTS, WEIGHTS + "\n    np.add.at(table, (train[:-1], train[1:]), 1e-3)")
    ],
    "a clock of its own": [("train_time:{step}ms", "train_time:{step // 9}ms")],
    "log-probabilities": [
        (ANSWER, "torch.from_numpy(np.log(probabilities(table, tokens.numpy())))")
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
        ([("default_rng(seed)", "default_rng()")], "not all that is random is seeded"),
        ([(ANSWER, "torch.zeros(3)")], "load_model's model"),
    ],
)
def test_what_cannot_be_seen_is_said_and_blames_nobody(edits, words, tmp_path, data):
    code, checks = judged(tmp_path, edited(*edits), FLAGS + data)
    assert code == 3 and "fail" not in {state for state, _ in checks.values()}, checks
    assert any(words in reason for _, reason in checks.values()), checks


# ------------------------------------------------------------------------------------------ checks


@pytest.fixture
def known():
    train, val = text(9_000, 1).astype("<u2"), text(1_000, 2).astype("<u2")
    return corpus.Corpus(train, val, val, ("t", "v"), 256, 16, 64)


NAMES = ("base", "shown", "noise", "plain", "known", "reference", "reference known", "again")


@pytest.fixture
def case(known):
    """A judging of runs that are made up: nothing can be said against them."""
    args = SimpleNamespace(cuda=False, claims={0: 2.0, 1: 2.01}, note="", dice=1, processes=1)
    case = judge.Judging(b"script", ["--seed", "0"], known, b"reference", args)
    sha = hashlib.sha256(b"script").hexdigest()
    for name in NAMES:
        run = logs.Run(name, source_sha256=sha, source_bytes=9, val=[(9, 2.0, 1.0)])
        run.result = dict(param_count=7, tokens=5, train_time_ms=900)
        trial = judge.Trial(name, "", run, wall=1.5, checkpoint_bytes=11)
        trial.losses = {"hidden": np.full((4, 16), 2.0), "probe": np.full((8, 16), 2.0)}
        case.trials[name] = trial
    case["noise"].losses["noise"] = np.full((4, 16), 9.0)
    case["noise"].run.val = [(9, 9.0, 1.0)]
    del case.trials["again"]
    case["base"].logits = logits_of(case, np.full(len(case.at), 2.0))
    return case


def logits_of(case, losses):
    """Logits at the positions asked that give these losses."""
    logits = np.zeros((len(case.at), 257))
    odds = np.exp(-losses)
    rest = np.log((1 - odds) / odds / 256)
    logits += rest[:, None]
    logits[np.arange(len(case.at)), case.targets] = 0
    return logits


@pytest.mark.parametrize("look", [*judge.CHECKS, judge.claim], ids=lambda look: look.__name__)
def test_check_passes(look, case):
    assert look(case)[0] == "pass", look(case)


def shifted(name, rows, by):
    def change(case):
        case[name].losses[rows] = case[name].losses[rows] + by

    return change


def repeated(noise):
    """The validation text moves the model by 0.2; a repetition moves it by so much."""

    def change(case):
        case.trials["again"] = judge.Trial("again", "")
        case["again"].losses["probe"] = np.full((8, 16), 2.0 + noise)
        case["noise"].losses["probe"] = np.full((8, 16), 2.2)

    return change


def looks_ahead(at, by):
    def change(case):
        gain = np.where(case.at == at, by, 0) if at is not None else by
        case["base"].logits = logits_of(case, np.full(len(case.at), 2.0) + gain)

    return change


def leads(known, renewed=None):
    """Of the candidate on the track's text, and with other validation documents; none elsewhere."""

    def change(case):
        case["reference known"].losses["hidden"] = np.full((4, 16), 2.0 + known)
        for name, by in (("renewed", 0), ("reference renewed", renewed)):
            if renewed is not None:
                case.trials[name] = judge.Trial(name, "")
                case[name].losses["hidden"] = np.full((4, 16), 2.0 + by)

    return change


def logged(name, loss):
    return lambda case: setattr(case[name].run, "val", [(9, loss, 1.0)])


def lost(name):
    return lambda case: case.trials.update({name: judge.Trial(name, "it broke")})


FOUND = [  # check, what is made of the case, state, words of the reason
    ("source", lambda c: setattr(c["plain"], "touched", True), "fail", "is not what it was"),
    ("source", lambda c: setattr(c["plain"].run, "source_sha256", "0"), "fail", "log's source"),
    ("source", lambda c: setattr(c["plain"].run, "source_bytes", 0), "fail", "log's source"),
    ("source", lost("plain"), "not seen", "it broke"),
    ("causality", looks_ahead(7, 0.1), "fail", "such as 7)"),
    ("causality", looks_ahead(None, 0.1), "fail", "by 0.100 nats"),
    ("causality", lost("base"), "not seen", "it broke"),
    ("validation_text", shifted("noise", "probe", 0.2), "wanted", "again"),
    ("validation_text", repeated(0), "fail", "that of a repetition not"),
    ("validation_text", repeated(0.01), "fail", "0.200 nats with noise"),
    ("validation_text", repeated(0.1), "not decided", "not all that is random is seeded"),
    ("validation_text", lost("shown"), "not seen", "it broke"),
    ("logged_loss", logged("known", 1.99), "fail", "the checkpoint scores 2.0"),
    ("logged_loss", logged("plain", 1.99), "fail", "the checkpoint scores 2.0"),
    ("logged_loss", logged("noise", 8.5), "fail", "on noise the log says 8.5"),
    ("logged_loss", logged("noise", 9.5), "fail", "on noise the log says 9.5"),
    ("logged_loss", logged("known", 2.3), "not decided", "not all that is random"),
    ("logged_loss", lost("known"), "not seen", "it broke"),
    ("identity", leads(0.3), "wanted", "renewed"),
    ("identity", leads(0.3, 0.0), "fail", "it knows those"),
    ("identity", leads(0.3, 0.28), "void", "worth nothing in a race: +0.300"),
    ("identity", leads(0.05), "pass", "+0.050"),
    ("identity", lost("reference"), "not seen", "it broke"),
    ("claim", logged("plain", 2.2), "not decided", "2.0000 in the record"),
    ("claim", lambda c: setattr(c, "seed", 5), "not seen", "no run of seed 5"),
]


@pytest.mark.parametrize("name, change, state, words", FOUND)
def test_check_finds(name, change, state, words, case):
    change(case)
    found = getattr(judge, name)(case)
    assert found[0] == state and words in found[1], found


def test_a_loss_that_does_not_rise_on_noise_shows_nothing(case):
    case["noise"].losses["noise"] = np.full((4, 16), 5.0)
    case["noise"].run.val = [(9, 5.0, 1.0)]
    assert judge.logged_loss(case)[0] == "not seen"


def test_a_worse_log_is_no_accusation(case):
    """A log that says more than the checkpoint scores harms nobody but itself."""
    for name in ("plain", "known"):
        logged(name, 2.02)(case)
    assert judge.logged_loss(case)[0] == "not decided"


def test_noise_explains_the_loss_of_a_trainer_that_is_not_seeded(case):
    repeated(0.1)(case)
    logged("plain", 1.98)(case)
    assert judge.logged_loss(case)[0] == "not decided"


def test_on_cuda_as_near_as_two_runs_of_the_same_is_equal(case):
    repeated(0.15)(case)
    case.args.cuda = True
    assert judge.validation_text(case)[0] == "pass"
    repeated(0.1)(case)
    assert judge.validation_text(case)[0] == "not decided"
    repeated(0.001)(case)
    assert judge.validation_text(case)[0] == "fail"


def test_facts_are_one_line(case):
    line = judge.facts(case)
    assert "\n" not in line and line.startswith("parameters 7, bytes of optimizer state ?, ")
    assert "tokens trained 5" in line and "checkpoint 11 bytes" in line
    assert line.endswith("untimed 0.6 of 1.5 s")


@pytest.mark.parametrize("state, code", [("pass", 0), ("fail", 1), ("void", 3), ("not seen", 3)])
def test_exit_codes(state, code, case, capsys):
    case.args.script, case.args.track, case.args.json = Path("x"), "laptop", None
    checks = [judge.Check("a", "pass", "fine"), judge.Check("b", state, "why")]
    assert judge.tell(case.args, case, checks, 1.0) == code
    assert capsys.readouterr().out.strip().endswith(judge.VERDICTS[code])


def test_a_fault_of_the_judge_is_no_verdict(monkeypatch, capsys):
    monkeypatch.setattr(judge, "prepare", lambda *args: 1 / 0)
    assert judge.main(["train_gpt.py"]) == 70
    assert "no verdict (ZeroDivisionError)" in capsys.readouterr().err


def made_up_jobs(case, monkeypatch, states):
    """Checks of these states, of jobs that take no time; returns what ran."""
    ran = []

    def do(name):
        ran.append(name)
        case.trials[name] = judge.Trial(name, "")

    case.do, case.args.claims = do, {}
    checks = {}
    for number, (jobs, state) in enumerate(states):

        def look(case, state=state):
            return state(case) if callable(state) else (state, "why")

        look.__name__ = f"check_{number}"
        checks[look] = jobs
    monkeypatch.setattr(judge, "CHECKS", checks)
    return ran


def test_the_first_proof_ends_the_judging(case, monkeypatch):
    ran = made_up_jobs(case, monkeypatch, [(("base",), "fail"), (("known",), "pass")])
    monkeypatch.setattr(runs, "sandbox", lambda: None)  # one job at a time
    slow = case.do
    case.do = lambda name: (time.sleep(0.3 * (name != "base")), slow(name))
    found = judge.judge(case, every_check=False)
    assert [check.state for check in found][0] == "fail" and "base" in ran
    assert [check.state for check in judge.judge(case, every_check=True)] == ["fail", "pass"]


def test_runs_on_demand(case, monkeypatch):
    """A check may want more runs, and has its say when these are there."""

    def look(case):
        return ("pass", "seen") if case.trials.get("again") else ("wanted", "again")

    ran = made_up_jobs(case, monkeypatch, [(("validation", "again"), look)])
    found = judge.judge(case, every_check=False)
    assert ran == ["validation", "again"] and found == [judge.Check("check 0", "pass", "seen")]


# ------------------------------------------------------------------------------------------ pieces


def test_losses_are_those_of_torch_in_fp64():
    import torch

    rng = np.random.default_rng(0)
    logits, targets = rng.normal(0, 9, (15, 7)).astype("f4"), rng.integers(7, size=15)
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits).double(), torch.from_numpy(targets), reduction="none"
    )
    assert np.allclose(judge.losses_of(logits, targets), expected, rtol=1e-14, atol=1e-14)
    odds = torch.log_softmax(torch.from_numpy(logits).double(), -1).numpy()
    assert np.allclose(judge.losses_of(odds, targets), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("val_tokens", [16, 64, 256, 640])
def test_questions_hide_the_future(val_tokens, known):
    """The prefix is the row's own, what follows is not, and no row is asked twice in a batch."""
    known = corpus.replace(known, val_tokens=val_tokens)
    args = SimpleNamespace(dice=1)
    case = judge.Judging(b"", ["--seed", "0"], known, b"", args)
    shown, sizes, at = case.blind
    rows = case.text.rows(case.text.hidden)
    equal = shown == rows[case.row, :-1]
    later = np.arange(16) > at[:, None]
    assert equal[~later].all() and equal[later].mean() < 0.2
    assert (rows[case.row, case.at + 1] == case.targets).all()
    batches = np.split(case.row, np.cumsum(sizes)[:-1])
    assert all(len(set(batch)) == len(batch) for batch in batches)


def test_jobs_change_one_thing_each(case):
    case.args.steps = 30
    case.flags = ["--preset", "laptop", "--seed", "0"]
    jobs = {name: case.job(name) for names in judge.CHECKS.values() for name in names}
    (base,), (shown, noise), (plain, known) = (jobs[n] for n in ("base", "validation", "known"))
    assert base[3] == ["--preset", "laptop", "--val_every", "0", "--seed", "0"] + base[3][-2:]
    assert base[3][-2:] == ["--checkpoint_every", "1000000"] and plain[3] == base[3][:-2]
    assert known[3] == base[3] and jobs["reference"][0][3] == base[3]
    assert shown[3] == noise[3] and "15" in shown[3]
    assert (shown[2].train == noise[2].train).all() and (
        shown[4]["probe"] == noise[4]["probe"]
    ).all()
    assert (noise[2].shown != shown[2].shown).mean() > 0.9
    assert plain[2] is case.track_text and jobs["reference"][0][2] is base[2]
    assert not (jobs["renewed"][0][2].hidden == base[2].hidden).all()


def test_hidden_text_is_in_no_folder_of_a_run(case):
    case.args.steps = 30
    for names in judge.CHECKS.values():
        for name in set(names) - {"known", "reference known"}:
            for _, _, where, _, _ in case.job(name):
                hidden = where.hidden.tobytes()
                assert not any(hidden[:64] in t.tobytes() for t in where.files().values())


@pytest.mark.long
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_leaves_nothing_behind(number, tmp_path, data):
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(60)\n")
    (tmp_path / "tmp").mkdir()
    command = [sys.executable, "-m", "records", "judge", tmp_path / "slow.py", "--", *data]
    env = os.environ | dict.fromkeys(("HOME", "TMPDIR"), str(tmp_path / "tmp"))
    flags = ["--val_tokens", "2048"]
    process = subprocess.Popen(
        [*command, *flags], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True
    )
    end = time.monotonic() + 60
    while len(list((tmp_path / "tmp").glob("*/train_gpt.py"))) < 2 and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(0.5)
    process.send_signal(number)
    error = process.communicate(timeout=20)[1]
    assert process.returncode == 128 + number, error
    assert error.endswith("records judge: interrupted\n")
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
        ("train_gpt.py --against README.md", "Python cannot read it"),
    ],
)
def test_misuse_is_one_line(argv, words, capsys, monkeypatch, data):
    monkeypatch.chdir(ROOT)
    given = argv.split()
    files = [word for word in data if word.split("=")[0] not in given]
    cut = [] if "--" in given else ["--"]
    assert (
        judge.main([*given, *cut, *files, *["--val_tokens", "2048"] * ("--seed" != given[-1])]) == 2
    )
    out, error = capsys.readouterr()
    assert error.startswith("records judge: ") and error.count("\n") == 1, error
    assert words in error and not out


def test_a_record_folder_gives_its_flags_and_claims():
    folder = ROOT / "records/laptop/2026-11-21_11_key_offset"
    flags, track, claims = judge.read_record(folder)
    assert (
        flags == ["--preset", "laptop"] and track == "laptop" and sorted(claims) == list(range(7))
    )
    assert claims[0] == pytest.approx(1.227702)
    newest = judge.newest("laptop")
    assert newest.name == "2026-11-28_12_fewer_passes"
    assert judge.read_record(newest)[2] == dict.fromkeys(range(10)), "raced on a text of its own"
    assert math.isclose(claims[3], 1.20876)
