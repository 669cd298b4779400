"""records/tools/logs.py: every log format there is, written here by hand, and everything that can
be wrong with a file."""

import hashlib
import json
import os
import time
import tracemalloc

import pytest

from records.tools import command, logs
from records.tools.logs import read_log
from records.tools.tracks import TRACKS

SOURCE = '"""A trainer.\n\nstep:1/40 is how a line looks\n"""\nimport torch\nprint("=" * 100)\n'
LINE = "=" * 100 + "\n"
STEPS, BATCH, VAL_TOKENS, TARGET = 40, 1024, 4096, 1.5


def our_log(
    seed=0,
    loss=None,
    source=SOURCE,
    with_source=True,
    config=(),
    result=(),
    header=(),
    data=None,
    notes="",
    step_ms=10.25,
    val_every=10,
) -> str:
    """The text of a log as train_gpt.py writes it. config, result, header: changes to single
    fields."""
    loss = 1.49 + 0.0011 * (seed % 7) + 0.0001 * (seed // 7) if loss is None else loss
    sha = hashlib.sha256(source.encode()).hexdigest()
    data = TRACKS["laptop"].files if data is None else data
    config = dict(
        dict(
            preset="laptop",
            steps=STEPS,
            seed=seed,
            target=TARGET,
            log_dir="logs",
            batch_tokens=BATCH,
            vocab_size=257,
            val_every=val_every,
            val_tokens=VAL_TOKENS,
            lr_muon=0.02,
        ),
        **dict(config),
    )
    steps = config["steps"]
    if "stages" in config:  # since 28 November 2026
        del config["steps"], config["batch_tokens"]
    head = dict(
        dict(
            run_id=f"2026-11-20_12-00-00_{seed:06x}",
            python="3.11.7",
            torch="2.13.0",
            cuda="none",
            driver="none",
            device="cpu",
            cpu="a cpu, 2 threads",
            world_size=1,
            argv=f"--seed {seed}",
            source_sha256=sha,
            data=json.dumps(data),
            config=json.dumps(config),
        ),
        **dict(header),
    )
    lines = [f"{key}: {value}\n" for key, value in head.items()] + [
        LINE,
        "warmup: 812 ms, not in train_time\n",
        notes,
    ]

    def step_line(step, kind, value):
        ms = step * step_ms + 0.1 * seed
        average = ms / max(step, 1)
        return (
            f"step:{step}/{steps} {kind}_loss:{value:.4f} "
            f"train_time:{ms:.0f}ms step_avg:{average:.2f}ms\n"
        )

    for step in range(steps + 1):
        current = 5.5 + (loss - 5.5) * step / steps
        lines += [step_line(step, "train", current + 0.01 + 1e-4 * seed)] * (step > 0)
        lines += [step_line(step, "val", current)] * (step % val_every == 0 or step == steps)
    ms = steps * step_ms + 0.1 * seed
    final = dict(
        dict(
            run_id=head["run_id"],
            preset="laptop",
            seed=seed,
            steps=steps,
            tokens=steps * BATCH,
            val_loss=round(loss, 6),
            val_tokens=config["val_tokens"],
            target_val_loss=config["target"],
            target_reached=loss <= config["target"],
            train_time_ms=round(ms),
            step_avg_ms=round(ms / steps, 3),
            warmup_ms=812,
            world_size=1,
            device=head["device"],
            peak_memory_bytes=1000,
            param_count=870000,
            optimizer_state_bytes=500,
            source_sha256=sha,
            data_sha256=data,
            config=config,
            resumed=False,
        ),
        **dict(result),
    )
    return (source if with_source else "") + LINE + "".join(lines) + json.dumps(final) + "\n"


def write(folder, name, text) -> str:
    path = os.path.join(folder, name)
    with open(path, "wb") as f:
        f.write(text if isinstance(text, bytes) else text.encode())
    return path


def one(folder, text) -> logs.Run:
    runs = read_log(write(folder, "run.txt", text))
    assert len(runs) == 1
    return runs[0]


def test_our_log(tmp_path):
    run = one(tmp_path, our_log(seed=3))
    assert run.problems == [] and run.style == "ours" and not run.resumed
    assert run.source_sha256 == hashlib.sha256(
        SOURCE.encode()
    ).hexdigest() and run.source_bytes == len(SOURCE)
    assert run.config["lr_muon"] == 0.02 and run.seed == 3 and run.tokens(40) == 40 * BATCH
    assert run.data == TRACKS["laptop"].files and run.result["tokens"] == STEPS * BATCH
    assert run.header["cpu"] == "a cpu, 2 threads" and run.header["argv"] == "--seed 3"
    assert [step for step, _, _ in run.val] == [
        0,
        10,
        20,
        30,
        40,
    ] and run.train_lines == STEPS == run.planned
    assert run.val_loss == 1.4933 and run.train_time == 410.0


@pytest.mark.parametrize(
    "value, steps, tokens",
    [
        (10, 7, [0, 10, 20, 30, 40, 50, 60, 70]),
        ([10], 2, [0, 10, 20]),
        ([1, 10], 5, [0, 1, 2, 3, 13, 23]),  # stage of step s: s * 2 // 5
        ([1, 10, 100], 3, [0, 1, 11, 111]),
        ([1, 10, 100], 2, [0, 1, 11]),  # more stages than steps: steps 0 and 1 are in 0 and 1
        ([1, 10, 100], 7, [0, 1, 2, 3, 13, 23, 123, 223]),
        ("many", 7, None),
        ([], 7, None),
        ([1, None], 7, None),
        (10, None, None),
        (10, 2.5, None),
    ],
)
def test_tokens_by_schedule(value, steps, tokens):
    run = logs.Run("x", config=dict(batch_tokens=value, steps=steps))
    if tokens is None:
        assert run.tokens(1) is None
    else:
        assert [run.tokens(step) for step in range(steps + 1)] == tokens
        stages = value if isinstance(value, list) else [value]
        each = [stages[s * len(stages) // steps] for s in range(steps)]
        assert run.tokens(steps) == sum(each)


def test_training_lines_for_pictures(tmp_path):
    """About 500 of a long log, all of a thinned one."""
    line = "step:{0}/5000 train_loss:3.1 train_time:{0}ms step_avg:1.00ms\n".format
    run = one(tmp_path, public([line(step) for step in range(1, 5001)]))
    assert 490 <= len(run.train) <= 501 and run.train[-1][0] > 4900
    run = one(tmp_path, public([line(step) for step in range(7, 5001, 103)]))
    assert [step for step, _, _ in run.train] == list(range(7, 5001, 103))


def test_source_names(tmp_path):
    """The hash is that of the file, whether or not it ends in a newline, and a record's log only
    claims it."""
    bare = SOURCE.rstrip("\n")
    sha = hashlib.sha256(bare.encode()).hexdigest()
    text = our_log(source=bare).replace(bare + LINE, bare + "\n" + LINE)
    path = write(tmp_path, "bare.txt", text)
    assert (read_log(path)[0].source_sha256, read_log(path)[0].problems) == (sha, [])
    assert logs.source_text(path, sha) == bare.encode()
    run = one(tmp_path, our_log(with_source=False))
    assert run.source_bytes == 0 and run.problems == []
    assert run.source_sha256 == hashlib.sha256(SOURCE.encode()).hexdigest()
    with pytest.raises(ValueError, match="does not hold"):
        logs.source_text(tmp_path / "run.txt", run.source_sha256)
    run = one(tmp_path, our_log().replace("import torch", "import  torch"))
    assert any("edited" in p for p in run.problems)
    assert any(
        "source_sha256" in p
        for p in one(tmp_path, our_log(header=dict(source_sha256="none"))).problems
    )


def public(lines, source=SOURCE, opening="", closing="") -> str:
    return (
        opening
        + source
        + LINE
        + "Running python 3.12\n|====+===|\n"
        + LINE
        + "".join(lines)
        + closing
    )


OLD = (
    [
        f"step:{s}/40 train_loss:5.{40 - s:02d} train_time:{300 * s}ms step_avg:nanms\n"
        for s in range(1, 11)
    ]
    + ["step:11/40 train_loss:4.0 train_time:95ms step_avg:nanms\n"]
    + [
        f"step:{s}/40 train_loss:3.9 train_time:{90 * (s - 10)}ms step_avg:{90:.2f}ms\n"
        for s in range(12, 41)
    ]
    + ["step:40/40 val_loss:3.2783 train_time:2701ms step_avg:90.03ms\n"]
)
NEW = [
    "step:0/40 val_loss:10.8288 train_time:0ms step_avg:0.03ms\n",
    "step:10/40 train_time:1001ms step_avg:100.10ms\n",
    "step:40/40 val_loss:3.2783 train_time:4000ms step_avg:100.01ms\n",
]
SECONDS = [
    "step:0/40 val_loss:10.82584 train_time:0.001s step_avg:nanms\n",
    "step:20/40 val_loss:4.66393 train_time:2.870s step_avg:143.50ms\n",  # since it last
    "step:40/40 val_loss:3.27830 train_time:4.704s step_avg:91.70ms\n",
]
EXTRA = [
    "step:20/40 val_loss:3.9 val_ema_loss:3.8 train_time:4.1s step_avg:205.00ms\n",
    "step:40/40 val_loss:3.2783 alpha:1e-3 train_time:8.200s step_avg:205.00ms extrap:3 h:n\n",
]
PUBLIC = {
    "2024": public(OLD, opening=LINE, closing="peak memory consumption: 29 MiB\n"),
    "2025": public(NEW),
    "seconds": public(SECONDS),
    "extra fields": public(EXTRA),
    "one separator": SOURCE + LINE + "".join(NEW),
    "stdout": "logs/4c1b.txt\n" + "".join(NEW),
    "carriage returns": public(NEW).replace("\n", "\r\n"),
    "no last newline": public(NEW)[:-1],
    "no averages": public(["step:40/40 val_loss:3.2783 train_time:4000ms\n"]),
    "short separator": public(NEW).replace(LINE, "=" * 40 + "\n"),
}


@pytest.mark.parametrize("kind", PUBLIC)
def test_public_logs(tmp_path, kind):
    run = one(tmp_path, PUBLIC[kind])
    assert (
        run.problems == [] and run.style == "public" and run.result is None and run.config is None
    )
    assert run.val[-1][:2] == (40, 3.2783) and run.planned == 40 and run.val_loss == 3.2783
    text = SOURCE.replace("\n", "\r\n") if kind == "carriage returns" else SOURCE
    assert run.source_sha256 == (
        None if kind == "stdout" else hashlib.sha256(text.encode()).hexdigest()
    )


def test_several_runs_in_one_public_log(tmp_path):
    runs = read_log(write(tmp_path, "trials.txt", public(NEW * 3)))
    assert [run.name for run in runs] == [
        "trials.txt (run 1)",
        "trials.txt (run 2)",
        "trials.txt (run 3)",
    ]
    assert all(run.problems == [] and len(run.val) == 2 and run.source_sha256 for run in runs)


def test_llmc_log(tmp_path):
    train = "".join(f"s:{s} trl:{9 - s:.4f} lr:0.000001 norm:15.37\n" for s in range(5))
    text = "s:0 tel:11.0\n" + train + "s:5 tel:3.2722\n"
    run = one(tmp_path, text)
    assert (
        run.problems == []
        and run.style == "llm.c"
        and run.planned is None
        and run.train_time is None
    )
    assert run.val == [(0, 11.0, None), (5, 3.2722, None)] and run.train_lines == 5


@pytest.mark.parametrize("block", [1, 7, 64, 101, 997])
@pytest.mark.parametrize(
    "text",
    [
        our_log(seed=2, notes='resumed: {"step": 3}\n'),
        *PUBLIC.values(),
        public(NEW * 3),
        our_log() + NEW[-1],
    ],
)
def test_block_size_does_not_matter(tmp_path, monkeypatch, text, block):
    path = write(tmp_path, "run.txt", text)
    whole = read_log(path)
    monkeypatch.setattr(logs, "BLOCK", block)
    assert read_log(path) == whole


def test_bad_files(tmp_path):
    def problem(path):
        (run,) = read_log(path)
        assert run.problems
        return " ".join(run.problems)

    assert "empty" in problem(write(tmp_path, "empty", b""))
    assert "not text" in problem(write(tmp_path, "binary", bytes(range(256)) * 99))
    assert "not text" in problem(write(tmp_path, "tail", our_log().encode() + b"\0" * 4096))
    assert "not a regular file" in problem(tmp_path)
    assert "cannot be read" in problem(tmp_path / "missing")
    assert "longer than 4 MB" in problem(
        write(tmp_path, "line", SOURCE + LINE + "step:1/2 " * 700_000)
    )
    assert "no step line" in problem(write(tmp_path, "text", "torch==2.13.0\n"))
    assert "no step line" in problem(write(tmp_path, "source", SOURCE[:12]))
    os.mkfifo(tmp_path / "fifo")
    assert "not a regular file" in problem(tmp_path / "fifo")


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("step:20/40 val_loss:3", "step:20/40 val_loss:x3", "cannot be read"),
        ("step:20/40 val_loss:3", "step:20/41 val_loss:3", "planned steps"),
        ("step:40/40 val", "step:39/40 val", "go backwards"),
        ("step:21/40 train", "step:20/40 train", "twice"),
        ("step:40/40", "step:41/40", "beyond"),
        ("train_time:205ms", "train_time:2050ms", "does not fit train_time"),
        ("train_time:205ms", "train_time:105ms", "train_time goes backwards"),
        ("step_avg:10.25ms", "step_avg:9.25ms", "step_avg"),
        ("step_avg:10.25ms", "step_avg:nanms", "step_avg"),
        ("step_avg:10.25ms", "step_avg:1e9999ms", "step_avg"),
        ("val_loss:3.4950", "val_loss:nan", "loss of nan"),
        ("train_loss:3.5050", "train_loss:-inf", "loss of -inf"),
        ("val_loss:3.4950", "val_loss:1e999", "loss of inf"),
        ("config: {", "config: [{", "config line that is not a JSON object"),
        ("config: {", "config: " + "[" * 100_000, "config line"),
        ("device: cpu", "device: cpu\ndevice: cpu", "device twice"),
        ('{"run_id"', '{"run_id" ', "not JSON"),
        ('"val_loss": 1.49', '"val_loss": NaN', "not JSON"),
        (
            '{"run_id"',
            'step:40/40 val_loss:1.4900 train_time:410ms step_avg:10.25ms\n{"run_id"',
            "twice",
        ),
    ],
)
def test_wrong_lines(tmp_path, old, new, said):
    text = our_log()
    assert old in text
    if said == "not JSON" and new.startswith("{"):
        new = '{"run_id": '  # an unbalanced line
    run = one(tmp_path, text.replace(old, new))
    assert any(said in problem for problem in run.problems), run.problems


def test_what_follows_the_result(tmp_path):
    text = our_log()
    result = text.splitlines(keepends=True)[-1]
    assert any("more than one result" in p for p in one(tmp_path, text + result).problems)
    line = "step:40/40 train_loss:1.4 train_time:410ms step_avg:10.25ms\n"
    assert any("after the result" in p for p in one(tmp_path, text + line).problems)


def test_memory_does_not_grow(tmp_path, monkeypatch):
    """A log of 3 MB in blocks of 16 KB."""
    monkeypatch.setattr(logs, "BLOCK", 1 << 14)
    path = tmp_path / "huge.txt"
    with open(path, "w") as f:
        f.write(SOURCE * 5_000 + LINE)
        for s in range(1, 40_001):
            f.write(f"step:{s}/40000 train_loss:3.1234 train_time:{s * 10}ms step_avg:10.00ms\n")
    tracemalloc.start()
    (run,) = read_log(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 2.8e6 and run.train_lines == 40_000 and run.problems == []
    assert peak < 5e5


def test_speed(tmp_path):
    """1,000 public logs of 200 KB in 10 s of one core: here 40, in three times their share: it may
    be busy."""
    lines = [
        f"step:{s}/2600 train_loss:3.{s:04d} train_time:{s * 90}ms step_avg:90.00ms\n"
        for s in range(1, 2601)
    ]
    text = public(lines, source=SOURCE * 440)
    assert len(text) > 200_000
    paths = [write(tmp_path, f"{i}.txt", text) for i in range(40)]
    start = time.process_time()
    assert not any(run.problems for path in paths for run in read_log(path))
    assert time.process_time() - start < 3 * 40 * 0.010


def test_blocks_of_text():
    text = "a\n<!-- board:x -->\nold\n<!-- /board:x -->\nb\n"
    assert command.between(text, "board:x") == "old" and command.between(text, "board:y") is None
    assert (
        command.replace_between(text, "board:x", "new")
        == "a\n<!-- board:x -->\nnew\n<!-- /board:x -->\nb\n"
    )
    with pytest.raises(ValueError, match="board:y"):
        command.replace_between(text, "board:y", "new")


def test_write_atomic_keeps_the_old_file(tmp_path):
    path = write(tmp_path, "a.txt", "old")
    with pytest.raises(TypeError):
        command.write_atomic(path, "not bytes")
    assert open(path).read() == "old" and os.listdir(tmp_path) == ["a.txt"]
    command.write_atomic(path, b"new")
    assert open(path).read() == "new" and os.listdir(tmp_path) == ["a.txt"]
