"""records/tools/verify.py: verdicts on logs and record folders, honest, wrong, edited and
broken."""

import dataclasses
import json
import math
import os
import random
import re
import subprocess
import sys

import pytest
from test_records_logs import LINE, NEW, PUBLIC, SOURCE, STEPS, our_log, public, write

import train_gpt
from records.tools import checks, folders, verify
from records.tools.tracks import FINEWEB_VAL, TRACKS

RECORDS = folders.RECORDS


@pytest.fixture(autouse=True)
def laptop_rules(monkeypatch):
    set_rules(monkeypatch)


def set_rules(monkeypatch):
    """The laptop track at the size of the golden logs, whatever its real numbers are."""
    rules = dataclasses.replace(TRACKS["laptop"], target=1.5, val_tokens=4096, settled={}, early="")
    monkeypatch.setitem(TRACKS, "laptop", rules)


def logs_in(folder, seeds=(0, 1, 2, 3, 4), **changes):
    os.makedirs(folder, exist_ok=True)
    return [write(folder, f"{seed}.txt", our_log(seed=seed, **changes)) for seed in seeds]


def only(paths, **options) -> checks.Group:
    records, _ = verify.verify([str(p) for p in paths], **options)
    assert len(records) == 1, [r.name for r in records]
    return records[0].group


def said(found, text) -> bool:
    """Of a group or a record."""
    return any(text in reason for reason in getattr(found, "group", found).reasons)


# -------------------------------------------------------------------------------------- statistics

# One-sided critical values of Student's t from printed tables: (degrees of freedom, level, t).
T_TABLE = [
    (1, 0.05, 6.314),
    (4, 0.01, 3.747),
    (9, 0.05, 1.833),
    (9, 0.01, 2.821),
    (29, 0.005, 2.756),
]


@pytest.mark.parametrize("freedom, level, t", T_TABLE)
@pytest.mark.parametrize("sign", [1, -1])
def test_p_value_against_tables(freedom, level, t, sign):
    n = freedom + 1
    raw = [i - freedom / 2 for i in range(n)]
    std = math.sqrt(sum(x * x for x in raw) / freedom)
    losses = [3.28 - sign * t * 0.001 / math.sqrt(n) + 0.001 * x / std for x in raw]
    p, reason = checks.p_value(losses, 3.28)
    assert reason == "" and p == pytest.approx(level if sign > 0 else 1 - level, rel=2e-3)


def test_p_value_by_hand():
    """t = -1.6 * sqrt(5) / sqrt(1.3) on 4 degrees of freedom; the t distribution there has a closed
    form."""
    losses = [1.0, 2.0, 2.0, 3.0, 4.0]  # mean 2.4, variance 1.3
    t = (2.4 - 4.0) / math.sqrt(1.3 / 5)
    x = t / math.sqrt(4 + t * t)
    expected = 0.5 + 0.75 * (x - x**3 / 3)
    assert checks.p_value(losses, 4.0)[0] == pytest.approx(expected, rel=1e-12)
    assert checks.spread(losses) == dict(mean=2.4, std=pytest.approx(math.sqrt(1.3)), best=1.0)


def test_no_p_value():
    for losses, reason in ([1.4], "one run"), ([1.4] * 5, "equal"):
        p, text = checks.p_value(losses, 1.5)
        assert p is None and reason in text
    assert checks.spread([]) == dict(mean=None, std=None, best=None)
    assert checks.spread([2.0, None]) == dict(mean=2.0, std=None, best=2.0)


# ---------------------------------------------------------------------------------------- verdicts


def test_good_runs_pass(tmp_path, capsys):
    logs_in(tmp_path / "deep" / "er")
    write(tmp_path, "requirements.txt", "torch==2.13.0\n")
    group = only([tmp_path], track="laptop")
    assert group.ok and group.target == 1.5 and group.p_value < 1e-3
    assert verify.main([str(tmp_path), "--track", "laptop"]) == 0
    out = capsys.readouterr().out
    assert (
        "PASS" in out
        and "1.49220 ± 0.00174" in out
        and "1 of 1 groups pass; 1 other files skipped" in out
    )
    assert verify.main([str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (
        report["pass"]
        and report["groups"][0]["n"] == 5
        and report["groups"][0]["val_loss"]["best"] == 1.49
    )
    assert (
        report["skipped"] == [str(tmp_path / "requirements.txt")]
        and len(report["groups"][0]["runs"]) == 5
    )


def test_target_and_alpha(tmp_path):
    paths = logs_in(tmp_path)
    assert said(only(paths, target=1.49), "not shown to be below 1.49")
    assert only(paths, target=1.495, alpha=0.05).ok
    assert said(only(paths, target=1.495, alpha=0.001), "needed < 0.001")
    assert said(only(paths[:1]), "one run proves nothing")
    assert said(only(logs_in(tmp_path / "b", loss=1.49)), "equal")


@pytest.mark.parametrize(
    "seconds",
    [
        dict(config=dict(lr_muon=0.03)),
        dict(data={"laptop_val_000000.bin": "0" * 64}),
        dict(header=dict(device="NVIDIA X")),
        dict(header=dict(run_id="a"), result=dict(seed=0), config=dict(seed=0)),
    ],
)
def test_runs_that_differ(tmp_path, seconds):
    paths = logs_in(tmp_path, seeds=(0, 1)) + [
        write(tmp_path, "odd.txt", our_log(seed=2, **seconds))
    ]
    group = only(paths)
    assert not group.ok
    assert said(
        group,
        {
            "config": "config differs between 0.txt and odd.txt: lr_muon",
            "data": "data differs",
            "header": "device differs",
        }[list(seconds)[0]],
    ) or said(group, "have seed 0")


def test_where_it_ran_is_no_difference(tmp_path):
    paths = logs_in(tmp_path, seeds=(0, 1, 2))
    odd = our_log(seed=3, config=dict(log_dir="elsewhere"), header=dict(argv="x", cpu="b"))
    paths.append(write(tmp_path, "odd.txt", odd))
    group = only(paths)
    assert group.ok and any("cpu differs" in note for note in group.notes)


def test_repeats(tmp_path):
    a, b = logs_in(tmp_path, seeds=(0, 1))
    write(tmp_path, "copy.txt", open(a).read())
    group = only([tmp_path])
    assert said(group, "have seed 0") and said(group, "the same validation lines")
    assert (
        only([a, b, tmp_path / "." / "0.txt"]).ok is only([a, b]).ok
    )  # one file named twice is one file


def test_two_sources_are_two_groups(tmp_path):
    logs_in(tmp_path)
    logs_in(tmp_path / "other", source=SOURCE + "# another\n")
    groups, _ = verify.verify([str(tmp_path)])
    assert len(groups) == 2 and all(group.ok for group in groups)


def test_public_logs(tmp_path, capsys):
    for i, last in enumerate((3.2783, 3.2779, 3.2771, 3.2780)):
        write(tmp_path, f"{i}.txt", public(NEW).replace("3.2783", str(last)))
    group = only([tmp_path])
    assert group.ok and group.target is None and any("no target" in note for note in group.notes)
    assert only([tmp_path], target=3.28).ok and said(only([tmp_path], target=3.278), "not shown")
    assert said(only([tmp_path], target=3.28, track="laptop"), "no log of this repository")
    assert said(
        only([write(tmp_path, "cut.txt", public(NEW[:2]))]),
        "cut off: its last validation is at step 0 of 40",
    )
    for kind, text in PUBLIC.items():
        group = only([write(tmp_path / "..", "one.log", text)])
        assert group.ok or kind == "stdout" and said(group, "no source")


@pytest.mark.parametrize(
    "changes, text",
    [
        (dict(result=dict(val_loss=1.48)), "val_loss of the last line and of the result"),
        (dict(result=dict(train_time_ms=400)), "train_time of the last line and of the result"),
        (dict(result=dict(step_avg_ms=9.9)), "step_avg_ms"),
        (dict(result=dict(steps=39)), "planned steps"),
        (dict(result=dict(tokens=1)), "tokens and the schedule of batch_tokens"),
        (dict(result=dict(tokens=None)), "tokens and the schedule of batch_tokens"),
        (dict(result=dict(val_tokens=1)), "val_tokens of header and result"),
        (dict(result=dict(seed=77)), "seed of header and result"),
        (dict(result=dict(config={})), "config of header and result"),
        (dict(result=dict(data_sha256={})), "data hashes of header and result"),
        (dict(result=dict(source_sha256="x")), "source_sha256 of header and result"),
        (dict(result=dict(run_id="x")), "run_id of header"),
        (dict(result=dict(world_size=8)), "world_size of header"),
        (dict(result=dict(device="x")), "device of header"),
        (dict(result=dict(target_reached=False)), "target_reached"),
        (dict(result=dict(target_val_loss=3)), "target of config and result"),
        (dict(result=dict(train_time_ms=[1])), "train_time"),
        (dict(result=dict(val_loss=10**400)), "a result line that is not JSON"),
        (dict(data={}), "names no data file"),
        (dict(data={"laptop_a.bin": 5}), "is not a sha256"),
        (dict(config=dict(batch_tokens="many")), "schedule of batch_tokens do not agree"),
        (dict(config=dict(batch_tokens=[1024, 2048])), "schedule of batch_tokens do not agree"),
        (dict(config=dict(vocab_size=300)), "has vocab_size 300; track laptop demands 257"),
        (dict(config=dict(val_every=7)), "validates at step 10, which val_every 7 does not ask"),
        (dict(config=dict(val_every=0)), "validates at step 0, which val_every 0 does not ask"),
        (dict(data={"laptop_val_000000.bin": None}), "unchecked: no manifest.json"),
        (dict(config=dict(val_tokens=64)), "has val_tokens 64; track laptop demands 4096"),
        (
            dict(header=dict(device="NVIDIA H100"), result=dict(device="NVIDIA H100")),
            "track laptop demands CPU",
        ),
        (dict(header=dict(world_size=2), result=dict(world_size=2)), "ran on 2 processes"),
        (dict(data={"fineweb_val_000000.bin": "0" * 64}), "demands laptop shards"),
        (dict(data={"laptop_val_000000.bin": "0" * 64}), "is not track laptop's"),
        (dict(data={"laptop_val_000000.bin": "0" * 64}), "did not use laptop_train_000000.bin"),
        (dict(result=dict(resumed=True)), "was resumed"),
        (dict(notes='resumed: {"step": 9}\n'), "was resumed"),
    ],
)
def test_runs_that_do_not_agree_with_themselves(tmp_path, changes, text):
    group = only(logs_in(tmp_path, **changes), track="laptop")
    assert said(group, text), group.reasons


def fineweb_logs(folder, val=FINEWEB_VAL, **changes):
    config = dict(val_tokens=10_485_760, vocab_size=50257) | changes.pop("config", {})
    data = val | {"fineweb_train_000001.bin": "1" * 64}
    result = dict(peak_memory_bytes=10**10) | changes.pop("result", {})
    return logs_in(folder, data=data, config=config, result=result, **changes)


def test_resumed_runs_count_on_the_memory_track(tmp_path):
    paths = fineweb_logs(tmp_path, notes='resumed: {"step": 9}\n')
    assert only(paths, track="memory").ok
    assert said(only(paths, track="one_gpu"), "was resumed")


@pytest.mark.parametrize(
    "changes, text",
    [
        (dict(val={"fineweb_val_000000.bin": "0" * 64}), "is not track memory's: sha256 0000"),
        (dict(val={}), "did not use fineweb_val_000000.bin"),
        (dict(val=FINEWEB_VAL | {"fineweb_val_000001.bin": "0" * 64}), "track memory validates on"),
        (dict(val=FINEWEB_VAL | {"wiki_000001.bin": "0" * 64}), "demands fineweb shards"),
        (dict(val=FINEWEB_VAL | {"fineweb_edu_train_1.bin": "0" * 64}), "demands fineweb shards"),
        (dict(result=dict(peak_memory_bytes=-5e9)), "-5000000000.0 do not hold its parameters"),
        (dict(result=dict(peak_memory_bytes=None)), "None do not hold its parameters"),
        (dict(result=dict(peak_memory_bytes=1)), "1 do not hold its parameters"),
        (dict(step_ms=0.0), "train_time_ms is 0.0: no clock shows that"),
        (dict(config=dict(vocab_size=50304)), "has vocab_size 50304; track memory demands 50257"),
    ],
)
def test_fineweb_is_pinned(tmp_path, changes, text):
    group = only(fineweb_logs(tmp_path, **changes), track="memory")
    assert said(group, text), group.reasons


@pytest.mark.parametrize("seeds, fine", [((0, 1, 2), True), ((1, 2, 3), False), ((0, 1, 3), False)])
def test_seeds_in_order(tmp_path, seeds, fine):
    paths = logs_in(tmp_path, seeds=seeds)
    assert only(paths).ok  # outside of a track any seeds will do
    group = only(paths, track="laptop")
    assert group.ok if fine else said(group, "not 0, 1, 2, ... without a gap")


def newer(text: str) -> str:
    """A log with the header and result of trainers since the schedules: no driver, the data named
    as in the result line, nothing twice that config holds."""
    head, _, last = text.rstrip().rpartition("\n")
    result = json.loads(last)
    for key in ("val_tokens", "resumed"):
        del result[key]
    head = head.replace("\ndriver: none", "").replace("\ndata: {", "\ndata_sha256: {")
    return f"{head}\n{json.dumps(result)}\n"


def test_newer_logs(tmp_path):
    paths = [write(tmp_path, f"{i}.txt", newer(our_log(seed=i))) for i in range(3)]
    assert only(paths, track="laptop").ok
    text = newer(our_log(seed=2)).replace(
        '"laptop_val_000000.bin": "f9', '"laptop_val_000000.bin": "e9', 1
    )
    write(tmp_path, "2.txt", text)
    assert said(only(paths, track="laptop"), "data hashes of header and result do not agree")
    write(tmp_path, "2.txt", newer(our_log(seed=2)).replace("\ndata_sha256: ", "\nx: "))
    assert said(only(paths, track="laptop"), "has no data line")


def test_schedules_are_lists(tmp_path):
    """Tokens of the result line against a batch schedule: 20 steps of 1,024, then 20 of 3,072."""
    changes = dict(config=dict(batch_tokens=[1024, 3072]), result=dict(tokens=81920))
    assert only(logs_in(tmp_path, **changes)).ok
    changes["result"]["tokens"] -= 1
    assert said(only(logs_in(tmp_path, **changes)), "tokens and the schedule")


def test_schedules_are_stages(tmp_path):
    """As train_gpt.py writes them: its log has neither steps nor batch_tokens of the whole run."""
    stages = train_gpt.edit_stages(
        train_gpt.PRESETS["laptop"].stages, dict(steps=[15, 25], batch_tokens=[1024, 3072])
    )
    tokens = 15 * 1024 + 25 * 3072
    changes = dict(
        config=dict(stages=list(map(dataclasses.asdict, stages))), result=dict(tokens=tokens)
    )
    assert only(logs_in(tmp_path, **changes)).ok
    changes["result"]["tokens"] -= 1
    assert said(only(logs_in(tmp_path, **changes)), "tokens and the schedule")
    changes["result"]["tokens"] += 1
    changes["config"]["stages"][0]["steps"] -= 1
    assert said(only(logs_in(tmp_path, **changes)), "steps of header and result do not agree")
    for bad in ("x", [1], [{}], [dict(steps="a", batch_tokens=1)], [None]):
        changes["config"]["stages"] = bad
        assert not only(logs_in(tmp_path, **changes)).ok


@pytest.mark.parametrize(
    "later, fine", [(0, True), (22, True), (900, True), (2000, False), (-9, False)]
)
def test_the_result_may_be_later_than_the_last_line(tmp_path, later, fine):
    """Writing the last line takes a while on a busy machine; the later time counts."""
    ms = [round(STEPS * 10.25 + 0.1 * seed) + later for seed in range(3)]
    paths = [
        write(
            tmp_path,
            f"{i}.txt",
            our_log(seed=i, result=dict(train_time_ms=m, step_avg_ms=m / STEPS)),
        )
        for i, m in enumerate(ms)
    ]
    group = only(paths, track="laptop")
    assert group.ok is fine, group.reasons
    assert not fine or [run.train_time for run in group.runs] == ms


def test_nothing_is_run(tmp_path):
    marker = tmp_path / "ran"
    source = f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n"
    assert only(logs_in(tmp_path / "logs", source=source)).ok and not marker.exists()


# --------------------------------------------------------------------------------------- mutations


def fails(tmp_path, text) -> bool:
    """Whether four good runs and this one fail, without a traceback."""
    write(tmp_path, "4.txt", text)
    groups, _ = verify.verify([str(tmp_path)], track="laptop")
    return not all(group.ok for group in groups)


def test_every_edit_is_seen(tmp_path):
    """Single digits of the lines that carry the claim, lines taken out, and truncation at any
    place."""
    logs_in(tmp_path, seeds=(0, 1, 2, 3))
    good = our_log(seed=4)
    assert not fails(tmp_path, good)
    rng = random.Random(0)
    final = good.index(f"step:{STEPS}/{STEPS} val_loss")
    result = good.index('{"run_id"')
    config = good.index("config: {")
    # Where a change of one digit must be seen: source, data and config lines, the last step line,
    # the result line but for what only it says (warm-up, sizes).
    spans = [
        (0, len(SOURCE)),
        (good.index("source_sha256: "), good.index("\n", config)),
        (final, good.index(" step_avg", final)),
        (result, good.index('"warmup_ms"', result)),
    ]
    places = [i for start, end in spans for i in range(start, end) if good[i].isdigit()]
    for i in rng.sample(places, 60):
        if (
            good[i - 11 : i - 1] == "train_time"
            or good[i + 1 : i + 3] == "ms"
            or '"step_avg_ms": 10.2' in good[i - 19 : i]
        ):
            continue  # the last digit of a time is within rounding
        digit = rng.choice([d for d in "0123456789" if d != good[i]])
        assert fails(tmp_path, good[:i] + digit + good[i + 1 :]), (
            good[i - 20 : i] + ">" + digit + "<" + good[i + 1 : i + 20]
        )
    for cut in [*rng.sample(range(len(good) - 1), 30), len(good) - 2]:
        assert fails(tmp_path, good[:cut]), good[cut - 40 : cut]
    lines = good.splitlines(keepends=True)
    for text in (
        "source_sha256",
        "data: ",
        "config: ",
        f"step:{STEPS}/{STEPS} val",
        '{"run_id"',
        LINE,
    ):
        i = next(i for i, line in enumerate(lines) if line.startswith(text))
        assert fails(tmp_path, "".join(lines[:i] + lines[i + 1 :])), text


def mutate(rng, data: bytes) -> bytes:
    """One random damage of a kind that files suffer."""
    i, j = sorted(rng.randrange(len(data)) for _ in range(2))
    lines = data.split(b"\n")
    k, m = rng.randrange(len(lines)), rng.randrange(len(lines))
    kind = rng.randrange(9)
    if kind == 0:
        return data[:i] + bytes([rng.randrange(256)]) + data[i + 1 :]
    if kind == 1:
        return data[:i] + data[j:]
    if kind == 2:
        return data[:i] + rng.randbytes(rng.randrange(1, 50)) + data[i:]
    if kind == 3:
        lines[k], lines[m] = lines[m], lines[k]
    elif kind == 4:
        lines[k:k] = [lines[m]]
    elif kind == 5:
        lines[k] = re.sub(
            rb"\d+", lambda d: str(rng.randrange(10 ** rng.randrange(1, 20))).encode(), lines[k]
        )
    elif kind == 6:
        lines[k] = lines[k] * rng.randrange(2, 30)
    elif kind == 7:
        odd = rng.choice([b"nan", b"inf", b"-1", b"1e400", b"9" * 4400, b"", b"[" * 2000])
        lines[k] = re.sub(rb"[0-9.]+", odd, lines[k])
    else:
        return data[i:j]
    return b"\n".join(lines)


def test_no_damage_makes_a_traceback(tmp_path, capsys, recwarn):
    """Damaged logs of every format, and damaged record folders: a verdict for each."""
    rng = random.Random(1)
    texts = [
        t.encode() for t in (our_log(seed=4), our_log(seed=4, with_source=False), *PUBLIC.values())
    ]
    logs_in(tmp_path / "logs", seeds=(0, 1))
    for _ in range(120):
        data = rng.choice(texts)
        for _ in range(rng.randrange(1, 4)):
            data = mutate(rng, data) or b"x"
        write(tmp_path / "logs", "2.txt", data)
        assert verify.main([str(tmp_path / "logs"), "--json", "--target", "3.3"]) in (0, 1)
        json.loads(capsys.readouterr().out)
    assert not recwarn.list


# ------------------------------------------------------------------------------------ command line


@pytest.mark.parametrize(
    "argv, text",
    [
        ([], "required: PATH"),
        (["nowhere"], "nowhere does not exist"),
        (["."], "no log in"),
        ([".", "--alpha", "2"], "--alpha"),
        ([".", "--target", "nan"], "--target"),
        ([".", "--track", "moon"], "moon"),
        ([".", "--fast"], "--fast"),
        (["--audit", "."], "no log in"),
        ([".", "--audit", "--json"], "leave --track, --json, --rerun out"),
    ],
)
def test_misuse(tmp_path, monkeypatch, capsys, argv, text):
    monkeypatch.chdir(tmp_path)
    code = verify.main(argv)
    error = capsys.readouterr().err
    assert (
        code == 2
        and error.startswith("records verify: ")
        and text in error
        and error.count("\n") == 1
    )


def test_bad_files_are_reported(tmp_path, capsys):
    write(tmp_path, "empty.txt", "")
    write(tmp_path, "binary.log", bytes(range(256)))
    write(tmp_path, "cut.txt", "# a trainer\nimport os\n")
    assert verify.main([str(tmp_path), str(tmp_path / "empty.txt")]) == 1
    out = capsys.readouterr().out
    assert (
        out.count("FAIL") == 3
        and "empty.txt: is empty" in out
        and "is not text" in out
        and "cut off" in out
    )


@pytest.mark.parametrize("script", ["verify", "submit", "board", "plot", "race", "judge"])
def test_scripts_run_from_anywhere(tmp_path, script):
    done = subprocess.run(
        [sys.executable, RECORDS, script, "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 0
        and "usage: python -m records " + script in done.stdout
        and done.stderr == ""
    )


def test_closed_pipe(tmp_path):
    logs_in(tmp_path)
    command = f"{sys.executable} {RECORDS} verify {tmp_path} --json | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stderr == ""


def test_audit(tmp_path, capsys):
    """A table by folder, in words that say what is there and what is not; no verdict."""
    for i, last in enumerate((3.2783, 3.2779, 3.2771, 3.2780)):
        (tmp_path / "a").mkdir(exist_ok=True)
        write(tmp_path / "a", f"{i}.txt", public(NEW).replace("3.2783", str(last)))
    (tmp_path / "b").mkdir()
    write(tmp_path / "b", "one.log", public(NEW, source=SOURCE + "# b\n"))
    write(tmp_path / "b", "copy.log", public(NEW).replace("3.2783", "3.2779"))
    write(tmp_path / "b", "cut.log", public(NEW[:2]))
    (tmp_path / "c").mkdir()
    write(tmp_path / "c", "odd.log", public(NEW).replace("step_avg:100.01", "step_avg:55.5"))
    write(tmp_path, "notes.txt", "a note\n")
    assert verify.main(["--audit", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line for line in out.splitlines() if line[:2] in ("a ", "b ", "c ")}
    assert rows["a"].split()[1:5] == ["4", "3.2778", "±", "0.0005"]
    assert "mean below 3.28, one source, steps and times that agree | –" in rows["a"]
    assert "one source: there are 2" in rows["b"] and "the end of 1 run" in rows["b"]
    assert "runs that stand in a, too" in rows["b"]
    assert "one run has no spread" in rows["c"] and "does not fit train_time" in rows["c"]
    assert "8 runs in 3 folders; 1 other text files" in out and "FAIL" not in out
    assert verify.main(["--audit", "--target", "3.27", str(tmp_path / "a")]) == 0
    assert "mean below 3.27 at p < 0.01" in capsys.readouterr().out
