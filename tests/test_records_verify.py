"""records/tools/verify.py: verdicts on logs and record folders, honest, wrong, edited and broken."""

import json
import math
import os
import random
import re
import shutil
import subprocess
import sys

import pytest
from test_records_logs import LINE, NEW, PUBLIC, SOURCE, STEPS, our_log, public, write

from records.tools import logs, submit, verify

RECORDS = submit.RECORDS


@pytest.fixture(autouse=True)
def laptop_rules(monkeypatch):
    """The laptop track at the size of the golden logs, whatever its real numbers are."""
    rules = dict(logs.TRACKS["laptop"], target=1.5, val_tokens=4096)
    monkeypatch.setitem(logs.TRACKS, "laptop", rules)


def logs_in(folder, seeds=(0, 1, 2, 3, 4), **changes):
    os.makedirs(folder, exist_ok=True)
    return [write(folder, f"{seed}.txt", our_log(seed=seed, **changes)) for seed in seeds]


def only(paths, **options) -> verify.Group:
    groups, _ = verify.verify([str(p) for p in paths], **options)
    assert len(groups) == 1, [g.name for g in groups]
    return groups[0]


def said(group, text) -> bool:
    return any(text in reason for reason in group.reasons)


# ------------------------------------------------------------------------------------------------------- statistics

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
    p, reason = verify.p_value(losses, 3.28)
    assert reason == "" and p == pytest.approx(level if sign > 0 else 1 - level, rel=2e-3)


def test_p_value_by_hand():
    """t = -1.6 * sqrt(5) / sqrt(1.3) on 4 degrees of freedom; the t distribution there has a closed form."""
    losses = [1.0, 2.0, 2.0, 3.0, 4.0]  # mean 2.4, variance 1.3
    t = (2.4 - 4.0) / math.sqrt(1.3 / 5)
    x = t / math.sqrt(4 + t * t)
    expected = 0.5 + 0.75 * (x - x**3 / 3)
    assert verify.p_value(losses, 4.0)[0] == pytest.approx(expected, rel=1e-12)
    assert verify.spread(losses) == dict(mean=2.4, std=pytest.approx(math.sqrt(1.3)), best=1.0)


def test_no_p_value():
    for losses, reason in ([1.4], "one run"), ([1.4] * 5, "equal"):
        p, text = verify.p_value(losses, 1.5)
        assert p is None and reason in text
    assert verify.spread([]) == dict(mean=None, std=None, best=None)
    assert verify.spread([2.0, None]) == dict(mean=2.0, std=None, best=2.0)


# --------------------------------------------------------------------------------------------------------- verdicts


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
    assert said(only([tmp_path], target=3.28, track="laptop"), "not a log of this repository")
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
        (dict(result=dict(tokens=1)), "tokens and steps x batch_tokens"),
        (dict(result=dict(tokens=None)), "tokens and steps x batch_tokens"),
        (dict(result=dict(val_tokens=1)), "val_tokens of config and result"),
        (dict(result=dict(seed=77)), "seed of config and result"),
        (dict(result=dict(config={})), "config of header and result"),
        (dict(result=dict(data_sha256={})), "data hashes of header and result"),
        (dict(result=dict(source_sha256="x")), "source_sha256 of header and result"),
        (dict(result=dict(run_id="x")), "run_id of header"),
        (dict(result=dict(world_size=8)), "world_size of header"),
        (dict(result=dict(device="x")), "device of header"),
        (dict(result=dict(target_reached=False)), "target_reached"),
        (dict(result=dict(target_val_loss=3)), "target of config and result"),
        (dict(result=dict(train_time_ms=[1])), "train_time"),
        (dict(result=dict(val_loss=10**400)), "val_loss"),
        (dict(data={}), "names no data file"),
        (dict(data={"laptop_a.bin": 5}), "is not a sha256"),
        (dict(config=dict(batch_tokens="many")), "config has no batch_tokens"),
        (dict(config=dict(val_tokens=64)), "validates on 64 tokens; track laptop demands 4096"),
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


def test_resumed_runs_count_on_the_memory_track(tmp_path):
    fineweb = {"fineweb_val_000000.bin": "0" * 64}
    paths = logs_in(
        tmp_path, data=fineweb, config=dict(val_tokens=10_485_760), notes='resumed: {"step": 9}\n'
    )
    assert only(paths, track="memory").ok
    assert said(only(paths, track="one_gpu"), "was resumed")


def test_nothing_is_run(tmp_path):
    marker = tmp_path / "ran"
    source = f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n"
    assert only(logs_in(tmp_path / "logs", source=source)).ok and not marker.exists()


# -------------------------------------------------------------------------------------------------------- mutations


def fails(tmp_path, text) -> bool:
    """Whether four good runs and this one fail, without a traceback."""
    write(tmp_path, "4.txt", text)
    groups, _ = verify.verify([str(tmp_path)], track="laptop")
    return not all(group.ok for group in groups)


def test_every_edit_is_seen(tmp_path):
    """Single digits of the lines that carry the claim, lines taken out, and truncation at any place."""
    logs_in(tmp_path, seeds=(0, 1, 2, 3))
    good = our_log(seed=4)
    assert not fails(tmp_path, good)
    rng = random.Random(0)
    final = good.index(f"step:{STEPS}/{STEPS} val_loss")
    result = good.index('{"run_id"')
    config = good.index("config: {")
    # Where a change of one digit must be seen: source, data and config lines, the last step line, the result line but
    # for what only it says (warm-up, sizes).
    spans = [
        (0, len(SOURCE)),
        (good.index("source_sha256: "), good.index("\n", config)),
        (final, good.index(" step_avg", final)),
        (result, good.index('"warmup_ms"', result)),
    ]
    places = [i for start, end in spans for i in range(start, end) if good[i].isdigit()]
    for i in rng.sample(places, 120):
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
    for cut in [*rng.sample(range(len(good) - 1), 60), len(good) - 2]:
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
    for _ in range(250):
        data = rng.choice(texts)
        for _ in range(rng.randrange(1, 4)):
            data = mutate(rng, data) or b"x"
        write(tmp_path / "logs", "2.txt", data)
        assert verify.main([str(tmp_path / "logs"), "--json", "--target", "3.3"]) in (0, 1)
        json.loads(capsys.readouterr().out)
    assert not recwarn.list


# --------------------------------------------------------------------------------------------------- record folders


@pytest.fixture
def record(tmp_path, monkeypatch):
    monkeypatch.setattr(submit, "RECORDS", str(tmp_path))
    assert (
        submit.main(
            ["idea", *logs_in(tmp_path / "logs"), "--track", "laptop", "--date", "2026-11-20"]
        )
        == 0
    )
    return tmp_path / "laptop" / "2026-11-20_idea"


def edit(path, old, new):
    text = open(path, encoding="utf-8").read()
    assert old in text
    open(path, "w", encoding="utf-8").write(text.replace(old, new, 1))


def test_record_passes(record, tmp_path, capsys):
    assert verify.main([str(record)]) == 0 and "track laptop" in capsys.readouterr().out
    assert verify.main([str(tmp_path / "laptop")]) == 0  # found at any depth
    group = verify.check_record(record, target=1.4)
    assert group.reasons == [r for r in group.reasons if "not shown to be below 1.4" in r] != []
    moved = tmp_path / "moved"
    shutil.copytree(record, moved)
    assert verify.check_record(moved).ok  # result.json names the track


@pytest.mark.parametrize(
    "name, old, new, text",
    [
        ("train_gpt.py", "torch", "numpy", "but train_gpt.py has"),
        (
            "result.json",
            '"mean": 1.49',
            '"mean": 1.48',
            "result.json: val_loss.mean is not what the logs say",
        ),
        ("result.json", '"seed": 3', '"seed": 33', "result.json: runs[3].seed"),
        ("result.json", '"n": 5', '"m": 5', "result.json: m "),
        (
            "result.json",
            '"track": "laptop"',
            '"track": "speed"',
            "names track speed, but the folder is in laptop",
        ),
        ("result.json", "{", "[", "result.json is not a JSON object"),
        ("README.md", "| 1.4911 |", "| 1.4811 |", "README.md: the table is not"),
        ("README.md", "p = ", "p = 0", "README.md: the table is not"),
        ("README.md", "<!-- record:table -->", "", "README.md has no table"),
        (
            "run_2.txt",
            "step:40/40 val_loss:1.4922",
            "step:40/40 val_loss:1.4822",
            "val_loss of the last line",
        ),
        ("run_2.txt", "source_sha256: ", "source_sha256: 0", "run_2.txt"),
        ("run_2.txt", "step:40/40 val_loss", "step:40/40 vol_loss", "cut off"),
    ],
)
def test_edited_record(record, name, old, new, text):
    edit(record / name, old, new)
    assert said(verify.check_record(record), text), verify.check_record(record).reasons


@pytest.mark.parametrize(
    "name, text",
    [
        ("train_gpt.py", "train_gpt.py is missing"),
        ("result.json", "result.json: No such"),
        ("README.md", "README.md is missing"),
        ("run_1.txt", "result.json: n is not"),
    ],
)
def test_missing_file(record, name, text):
    os.unlink(record / name)
    group = only([record])
    assert said(group, text), group.reasons


def test_fat_or_empty_record(record):
    write(record, "notes.md", "x" * 100_000)
    assert said(verify.check_record(record), "bytes beside train_gpt.py")
    for seed in range(5):
        os.unlink(record / f"run_{seed}.txt")
    assert said(verify.check_record(record), "no run_*.txt")


def race(**changes):
    return json.dumps(
        dict(
            dict(
                reference="records/laptop/2026-11-20_idea",
                ratio=0.8,
                ci=[0.7, 0.9],
                n=2,
                times_ms=dict(reference=[10, 10], candidate=[8, 8]),
            ),
            **changes,
        )
    )


@pytest.mark.parametrize(
    "changes, text",
    [
        (dict(), ""),
        (dict(ratio=0.7), "does not fit its times"),
        (dict(ratio=None), "no ratio above 0"),
        (dict(ci=[0.81, 0.9]), "ci is not an interval"),
        (dict(ci=None), "ci is not an interval"),
        (dict(times_ms=dict(reference=[1], candidate=[0])), "not pairs of positive"),
        (dict(source_sha256=dict(candidate="0" * 64)), "candidate was another source"),
        (dict(source_sha256=dict(reference="0" * 64)), "reference was another source"),
    ],
)
def test_race(record, changes, text):
    write(record, "race.json", race(**changes))
    group = verify.check_record(record)
    assert said(group, text) if text else group.ok, group.reasons


def test_damaged_record_makes_no_traceback(record, tmp_path, capsys):
    rng = random.Random(2)
    write(record, "race.json", race())
    for _ in range(50):
        copy = tmp_path / "laptop" / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(record, copy)
        path = copy / rng.choice(
            ["result.json", "README.md", "run_2.txt", "train_gpt.py", "race.json"]
        )
        path.write_bytes(mutate(rng, path.read_bytes()))
        assert verify.main([str(copy)]) in (0, 1)
        capsys.readouterr()


def test_all_records_of_this_repository_pass(monkeypatch):
    monkeypatch.undo()  # by the real rules
    folders = [top for top, _, _ in os.walk(RECORDS) if verify.is_record(top)]
    for folder in folders:
        track = os.path.basename(os.path.dirname(folder))
        group = verify.check_record(folder, track)
        assert group.ok, (folder, group.reasons)
    assert len(folders) >= 8


# ------------------------------------------------------------------------------------------------------ command line


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


@pytest.mark.parametrize("script", ["verify", "submit", "board", "plot"])
def test_scripts_run_from_anywhere(tmp_path, script):
    done = subprocess.run(
        [sys.executable, RECORDS, script, "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "usage: python -m records " + script in done.stdout and done.stderr == ""


def test_closed_pipe(tmp_path):
    logs_in(tmp_path)
    command = f"{sys.executable} {RECORDS} verify {tmp_path} --json | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.stderr == ""
