"""records/one_gpu: what can be checked of its scripts without a GPU."""

import json
import sys
from types import SimpleNamespace

import pytest
from helpers import ROOT, flags, make_data

sys.path.insert(0, str(ROOT / "records" / "one_gpu"))
import profile_step
import prove
import side_by_side

import train_gpt

PLAN = side_by_side.Plan(steps=600, batch_tokens=65536, val_tokens=262144, val_every=50)


def flag(job, name: str) -> list[str]:
    words = job.command[job.command.index(f"--{name}") + 1 :]
    ends = [i for i, word in enumerate(words) if word.startswith("--")]
    return words[: ends[0]] if ends else words


def test_our_presets_shrink_by_the_same_two_factors():
    """600 of nov2024's 3242 updates, an eighth of its batch: 221 of gpt2_small's 1194."""
    ours = side_by_side.our_job("--preset nov2024", PLAN)
    assert ours.tokens == [65536] * 600 and flag(ours, "momentum_warmup") == ["93"]
    small = side_by_side.our_job("--preset gpt2_small --lawa 3", PLAN)
    assert flag(small, "batch_tokens") == ["16384", "32768", "49152", "40960", "16384"]
    assert flag(small, "seq_len") == ["2048", "4096", "6144", "5120", "2048"]
    assert (len(small.tokens), flag(small, "lawa")) == (221, ["3"])
    tokens = train_gpt.tokens_of(train_gpt.PRESETS["gpt2_small"])
    assert sum(small.tokens) == pytest.approx(tokens / 8 * 600 / 3242, rel=0.01)
    with pytest.raises(side_by_side.Failed, match="no_such"):
        side_by_side.our_job("--no_such 1", PLAN)


def test_a_peers_script_is_changed_where_it_must_be(tmp_path):
    wanted = side_by_side.SUBSTITUTIONS["simple"](PLAN)
    source = "\n".join(old for old, _ in wanted)
    job = side_by_side.peer_job("simple", source, PLAN, tmp_path)
    assert (tmp_path / "simple.py").read_text() == "\n".join(new for _, new in wanted)
    assert job.tokens == [65536] * round(3250 * 600 / 3242)
    for other in (source.replace("mbs = 64", ""), source + "\nmbs = 64"):
        with pytest.raises(side_by_side.Failed, match="not once: another version"):
            side_by_side.peer_job("simple", other, PLAN, tmp_path)


def test_step_times_leave_validation_and_compilation_out():
    """Updates of 5 ms; the first ones and those with a validation before them take longer."""
    intervals = [900.0] * 3 + [5.0 + 95 * (k < 10 or k % 20 == 0) for k in range(1, 40)]
    assert side_by_side.step_times(intervals, 40, 20) == [5.0] * 40
    with pytest.raises(side_by_side.Failed, match="39 updates seen, 40 planned"):
        side_by_side.step_times(intervals[-38:], 40, 20)


def test_time_to_a_loss_lies_between_validations():
    curve = [(0, 8.0, 0.0), (10, 6.0, 1.0), (20, 5.0, 3.0)]
    assert side_by_side.time_to(curve, 5.5) == 2.0 and side_by_side.time_to(curve, 4.9) is None


@pytest.mark.parametrize(
    "line, found",
    [
        ("step:40/600 val_loss:5.1234 train_time:1000ms step_avg:25.00ms", ("40", "5.1234")),
        ("step:40/600 train_time:1ms step_avg:25.00ms val_loss:5.1", ("40", "5.1")),
        ("step 40: train loss 5.2, val loss 5.3", ("40", "5.3")),
        ("step:40/600 train_loss:5.1234 train_time:1000ms", None),
    ],
)
def test_validations_of_every_script_are_read(line, found):
    assert side_by_side.VAL.findall(line) == ([found] if found else [])


def test_the_table_compares_with_the_record():
    run = dict(name="record", flags="", tokens=9e6, tokens_per_second=100.0, mfu=0.4)
    run |= dict(peak_memory_bytes=2e9, step_ms=[1, 2, 3], val_loss=5.0, seconds=8.0)
    run["curve"] = [(1, 6.0, 1.0), (2, 5.0, 8.0)]
    faster = run | dict(name="ours", flags="--preset x", tokens_per_second=150.0, val_loss=4.0)
    faster["curve"] = [(1, 6.0, 1.0), (2, 4.0, 3.0)]
    limits = dict(matmul_flops=1e14, copy_bytes=1e12, matmul="8x8x8 bf16")
    failed = dict(name="simple", flags="", failed="exit code 1: a | b")
    report = dict(runs=[run, faster, failed], ceilings=limits, device="card", torch="2")
    lines = side_by_side.table(report).splitlines()
    assert "Target: 5.0000" in lines[2] and "| 1.50 |" in lines[7] and "| 2.0 | 0.250 |" in lines[7]
    assert lines[8].startswith("| simple | failed: exit code 1: a / b |")


@pytest.mark.parametrize(
    "more, words",
    [
        (["--only", "record"], "not among ours, ours2"),
        (["--modded", "nowhere"], "clone it first"),
        (["--batch_tokens", "1024"], "multiple of 65536"),
        ([], "usable tokens, 39,321,600 are needed"),
    ],
)
def test_misuse_is_one_line(more, words, tmp_path, capsys):
    make_data(tmp_path)
    files = [f"--{kind}_files={tmp_path}/{kind}_*.bin" for kind in ("train", "val")]
    assert side_by_side.main([*files, "--out", str(tmp_path / "out"), *more]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_profile_of_a_step(tmp_path, capsys, monkeypatch):
    """On the CPU, of a tiny model: classes that add up to the step."""
    limits = dict(matmul_flops=1e9, copy_bytes=1e9, matmul="made up")
    monkeypatch.setattr(profile_step, "ceilings", lambda device: limits)
    folder = make_data(tmp_path)
    argv = ["--steps", "1", "--json", str(tmp_path / "profile.json"), "--"]
    assert profile_step.main([*argv, *flags(folder, device="cpu", compile=False)]) == 0
    assert "| matmul |" in capsys.readouterr().out
    result = json.loads((tmp_path / "profile.json").read_text())
    total = sum(row["ms"] for row in result["classes"].values())
    assert total == pytest.approx(result["step_ms"])
    assert profile_step.main(["--trainer", str(tmp_path / "none.py")]) == 2


@pytest.mark.parametrize("name", prove.CASES)
def test_what_is_to_be_proved_are_flags_of_the_trainer(name, tmp_path):
    args = SimpleNamespace(out=tmp_path, train_files="t", val_files="v")
    config = train_gpt.parse_config(prove.command_of(name, args), "nov2024")
    assert bool(config.generate) == (name == "sample")
    assert config.preset == "nov2024" or config.stages != train_gpt.PRESETS["nov2024"].stages


def test_one_gpu_and_all_of_them_make_the_same_updates(tmp_path, capsys, monkeypatch):
    """One and the same flags, in one process and in eight; losses that differ are a fault."""
    make_data(tmp_path)
    shards = [f"--{kind}_files={tmp_path}/{kind}_*.bin" for kind in ("train", "val")]
    argv = [*shards, "--out", str(tmp_path / "out"), "--gpus", "8"]
    commands = []

    def call(command, *rest):
        commands.append([str(word) for word in command])

    monkeypatch.setattr(prove, "call", call)
    assert prove.main(argv) == 1  # no losses to compare
    one, all_gpus = commands
    assert "--nproc_per_node=8" in all_gpus and "--nproc_per_node=8" not in one
    recipes = [c[c.index("--preset") : c.index("--log_dir")] for c in commands]
    assert recipes[0] == recipes[1] and "gpt2_small" in recipes[0]
    for apart, code in ((0.5, 1), (0.001, 0)):
        found = dict.fromkeys(prove.CASES, dict(error="", losses={"1": 4.0}, result={}))
        found[prove.ALL] = dict(error="", losses={"1": 4.0 + apart}, result={})
        (tmp_path / "out" / "prove.json").write_text(json.dumps(found))
        assert prove.main(argv) == code
        assert ("FAILED" in capsys.readouterr().out) == bool(code)
    assert prove.main([*argv[:-2], "--only", prove.ALL]) == 2
    assert "needs --gpus" in capsys.readouterr().err
    assert prove.main(["--train_files", "none*", "--out", str(tmp_path / "out")]) == 2
    assert "no such shards; ./run.sh fetch" in capsys.readouterr().err


@pytest.mark.slow
def test_runs_are_compared_and_kept(tmp_path, capsys, monkeypatch):
    shards = [f"--{kind}_files={tmp_path}/{kind}_*.bin" for kind in ("train", "val")]
    folder = make_data(tmp_path)
    words = flags(folder, device="cpu", compile=False, steps=3)
    words = [word for word in words if "bin" not in word and "_files" not in word]
    cases = dict(one=words, other=[*words, "--seed", "1"], wrong=["--no_such", "1"])
    monkeypatch.setattr(prove, "CASES", {name: " ".join(words) for name, words in cases.items()})
    monkeypatch.setattr(prove, "EQUAL", {("one", "other"): 1e-4})
    argv = [*shards, "--out", str(tmp_path / "out")]
    assert prove.main(argv) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["ok", "ok", "FAILED", "FAILED"]
    assert "no_such" in lines[2] and "apart, more than 0.0001" in lines[3]
    monkeypatch.setattr(prove, "EQUAL", {("one", "one"): 0.0})
    monkeypatch.setattr(prove, "run", lambda name, args: pytest.fail("it is kept"))
    assert prove.main([*argv, "--only", "one"]) == 0


def test_flags_of_a_contender():
    args = SimpleNamespace(ours=["--a", "--b"])
    assert [side_by_side.flags_of(name, args) for name in ("ours", "ours2", "record")] == [
        "--a",
        "--b",
        "",
    ]
