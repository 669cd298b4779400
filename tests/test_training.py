"""Whole runs on tiny shards, in this process: the loss, the log, the clock, faults, checkpoints and resuming."""
import dataclasses
import errno
import hashlib
import io
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from helpers import RULE, STEP, Ranks, check_refused, flags, make_data, run, tiny

import train_gpt

KEYS = ("run_id preset seed steps tokens val_loss target_val_loss target_reached train_time_ms step_avg_ms warmup_ms world_size device "
        "peak_memory_bytes param_count optimizer_state_bytes source_sha256 data_sha256 config val_tokens resumed").split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def place(data, tmp_path):
    """make() gives the flags of a run on the shared shards whose logs and checkpoints are this test's own."""
    return lambda **changes: flags(data, **(dict(log_dir=tmp_path / "logs", checkpoint_dir=tmp_path / "checkpoints") | changes))


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory):
    """A run with nothing special about it."""
    outcome = run(flags(data, log_dir=tmp_path_factory.mktemp("plain"), target=6.0))
    assert outcome.code == 0 and not outcome.err
    return outcome


def same_weights(a, b):
    assert a.weights.keys() == b.weights.keys()
    for name, tensor in a.weights.items():
        assert torch.equal(tensor, b.weights[name]), name


@contextmanager
def at_step(step: int, act):
    """Call act(run) after update number `step`."""
    update = train_gpt.update

    def update_and_act(run):
        update(run)
        if run.log and run.step + 1 == step and run.clock.since:  # not the warm-up's
            act(run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "update", update_and_act)
        yield


# ---------------------------------------------------------------------------------------------------------- the run, its log

def test_the_loss_falls(plain):
    losses = {(step, kind): float(loss) for step, kind, loss in plain.losses()}
    assert losses["0", "val"] == losses["1", "train"] == pytest.approx(math.log(320), abs=1e-4)
    assert losses["12", "val"] < losses["5", "val"] < losses["0", "val"] - 0.5


def test_the_log(plain):
    log = plain.log
    assert log.startswith(train_gpt.SOURCE.removesuffix("\n") + "\n" + RULE + "\n"), "the source that ran, verbatim"
    assert train_gpt.SOURCE == Path(train_gpt.__file__).read_text(encoding="utf-8")
    assert [plain.path] == list(plain.path.parent.iterdir()), "one file, no leftovers"
    facts = plain.facts()
    assert list(facts) == "run_id python torch cuda driver device cpu world_size argv source_sha256 data config".split()
    assert facts["run_id"] == plain.path.stem and re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_[0-9a-f]{6}", facts["run_id"])
    assert facts["source_sha256"] == train_gpt.SOURCE_SHA256 and facts["torch"] == torch.__version__
    assert facts["world_size"] == "1" and "--steps 12" in facts["argv"] and facts["device"] == "cpu"
    assert set(json.loads(facts["data"])) == {"train_000000.bin", "train_000001.bin", "val_000000.bin"}
    config = json.loads(facts["config"])
    assert list(config) == [field.name for field in dataclasses.fields(train_gpt.Config)]
    assert config["compile"] is False and config["attention"] == "sdpa" and config["device"] == "cpu", "what was chosen, not 'auto'"


def test_the_step_lines(plain):
    steps = [match for match in map(STEP.fullmatch, plain.body) if match]
    assert all(not line.startswith("step:") or STEP.fullmatch(line) for line in plain.body)
    assert [int(m[1]) for m in steps if m[3] == "train"] == list(range(1, 13))
    assert [int(m[1]) for m in steps if m[3] == "val"] == [0, 5, 10, 12]
    assert steps[0][3] == steps[-1][3] == "val" and steps[-1][1] == steps[-1][2] == "12"
    times = [int(m[5]) for m in steps]
    assert times == sorted(times)
    for m in steps[1:]:
        assert abs(float(m[6]) - int(m[5]) / int(m[1])) < 0.6


def test_the_result_line(plain):
    result, config = plain.result(), tiny()
    assert set(KEYS) <= set(result)
    assert result["run_id"] == plain.path.stem and result["config"] == json.loads(plain.facts()["config"])
    assert result["tokens"] == 12 * 256 and result["steps"] == 12 and result["preset"] == "laptop" and result["resumed"] is False
    last = STEP.fullmatch(plain.body[-2])
    assert f"{result['val_loss']:.4f}" == last[4] and abs(result["train_time_ms"] - int(last[5])) <= 1
    assert result["step_avg_ms"] == pytest.approx(result["train_time_ms"] / 12, abs=0.1)
    assert result["target_val_loss"] == 6.0 and result["target_reached"] is True
    model = train_gpt.GPT(config)
    assert result["param_count"] == sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2)
    assert result["optimizer_state_bytes"] == 4 * matrices + 8 * (result["param_count"] - matrices)  # Muon keeps one moment, Adam two
    assert result["bits_per_byte"] == pytest.approx(result["val_loss"] / math.log(2), abs=1e-4)
    assert result["peak_memory_bytes"] > 1e7 and result["data_sha256"] == json.loads(plain.facts()["data"])


def test_the_closing_line(plain, place):
    last = plain.out.splitlines()[-1]
    found = re.fullmatch(r"val_loss (\d\.\d{4}) \(\d\.\d+ bits per byte\), target 6.0000 reached by (\d\.\d{4}) in \d+\.\d s of training \| log (.*)", last)
    assert found and float(found[1]) + float(found[2]) == pytest.approx(6.0, abs=2e-4) and found[3] == str(plain.path)
    missed = run(place(target=0.5))
    assert "target 0.5000 missed by" in missed.out.splitlines()[-1] and missed.result()["target_reached"] is False
    assert missed.code == 0, "a missed target is a result, not an error"


def test_chosen_values_of_a_method_are_told(plain, data, tmp_path):
    """And nothing is, where no method is on."""
    outcome = run(flags(data, log_dir=tmp_path, steps=8, lawa=2, relora=4))
    line = next(line for line in outcome.out.splitlines() if line.startswith("methods: "))
    assert "relora 4, relora_alpha 1.0, relora_warm_start 2, relora_interval 1" in line and "lawa 2, lawa_interval 1" in line and "galore" not in line
    assert "methods:" not in plain.out


def test_the_log_is_enough_to_run_again(plain, data, tmp_path):
    """The config line as flags gives the same losses; so does argv."""
    config, words = json.loads(plain.facts()["config"]), []
    for name, value in config.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no_{name}")
        elif value not in ("", None):
            words += [f"--{name}", str(value)]
    words[words.index("--log_dir") + 1] = str(tmp_path)
    again = run(words)
    assert again.losses() == plain.losses() and json.loads(again.facts()["config"]) == config | {"log_dir": str(tmp_path)}
    argv = plain.facts()["argv"].split()
    argv[argv.index("--log_dir") + 1] = str(tmp_path)
    third = run(argv)
    assert third.losses() == plain.losses()
    same_weights(third, plain)


def test_seeds(plain, place):
    same, other = run(place(target=6.0)), run(place(seed=1))
    assert same.losses() == plain.losses()
    same_weights(same, plain)
    assert other.losses() != plain.losses()


def test_micro_batches_accumulate_to_the_same_update(plain, place):
    for micro in (1, 2):
        outcome = run(place(micro_batch=micro))
        assert f"micro-batch {micro} rows" in outcome.out
        for (step, kind, loss), (step2, kind2, loss2) in zip(outcome.losses(), plain.losses(), strict=True):
            assert (step, kind) == (step2, kind2) and abs(float(loss) - float(loss2)) < 2e-3
        assert all(torch.allclose(outcome.weights[name], tensor, atol=5e-3) for name, tensor in plain.weights.items())


def test_accumulated_gradients_are_those_of_the_batch():
    model, grads = train_gpt.GPT(tiny(zero_init=False)), []
    train_gpt.init_weights(model, model.config)
    x, y = torch.randint(0, 257, (2, 8, 32), generator=torch.Generator().manual_seed(0))
    for micro, world_size in ((8, 1), (4, 1), (1, 1), (2, 4)):
        model.zero_grad()
        loss = train_gpt.forward_backward(model, x, y, micro, world_size)
        assert loss.item() * world_size == pytest.approx(model(x, y).item(), abs=1e-5)
        grads.append({name: p.grad.clone() * world_size for name, p in model.named_parameters()})
    for other in grads[1:]:
        assert all(torch.allclose(other[name], g, atol=1e-6) for name, g in grads[0].items())


def test_every_mode_of_training_runs(place):
    for changes in (dict(bf16=True), dict(matrix_optimizer="adam"), dict(doc_mask=True, window=8, window_pattern="SL"),
                    dict(value_residual=False, embed_residual=False, untie_head=False, softcap=0.0, qk_norm=False, zero_init=False)):
        outcome = run(place(steps=5, **changes))
        losses = [float(loss) for _, kind, loss in outcome.losses() if kind == "val"]
        assert outcome.code == 0 and losses[-1] < losses[0], changes


# ------------------------------------------------------------------------------------------------------------------ the clock

def test_the_clock_counts_training_alone(place, monkeypatch):
    """On a clock that only these functions move: an update takes 1 s, validation 100, saving 1000, warming up 10000."""
    now = [0.0]

    def takes(seconds, name):
        function = getattr(train_gpt, name)

        def slow(*args, **kwargs):
            now[0] += seconds
            return function(*args, **kwargs)
        monkeypatch.setattr(train_gpt, name, slow)

    monkeypatch.setattr(train_gpt.time, "perf_counter", lambda: now[0])
    for seconds, name in ((1, "forward_backward"), (100, "evaluate"), (1000, "save_checkpoint"), (10000, "warm_up"), (500, "make_optimizers")):
        takes(seconds, name)
    outcome = run(place(checkpoint_every=4))
    assert outcome.result()["train_time_ms"] == 12000 and outcome.result()["step_avg_ms"] == 1000
    assert outcome.result()["warmup_ms"] == 10_001_000  # it runs forward and backward once
    assert "step:5/12 val_loss" in outcome.log and "train_time:5000ms step_avg:1000.00ms" in outcome.log


def test_a_really_slow_validation_is_not_in_train_time(place, monkeypatch):
    evaluate = train_gpt.evaluate
    monkeypatch.setattr(train_gpt, "evaluate", lambda *args: (time.sleep(0.5), evaluate(*args))[1])
    began = time.perf_counter()
    outcome = run(place(steps=2, val_every=1))
    assert time.perf_counter() - began > 1.5 and outcome.result()["train_time_ms"] < 1000 * (time.perf_counter() - began) - 1500


def test_warm_up_leaves_no_trace(place, monkeypatch, plain):
    """With and without it: the same losses and weights. It must not see training data either."""
    monkeypatch.setattr(train_gpt, "warm_up", lambda run, forward: 8)
    outcome = run(place())
    assert outcome.losses() == plain.losses()
    same_weights(outcome, plain)


# --------------------------------------------------------------------------------------------------------------------- faults

@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run(value, place):
    def plant(run):
        with torch.no_grad():
            run.model.lm_head.weight[3, 3] = value

    with at_step(7, plant):
        outcome = run(place(softcap=0.0))
    last_val = [loss for _, kind, loss in outcome.losses() if kind == "val"][-1]
    check_refused(outcome, "the loss became nan at step 8" if math.isnan(value) else "at step 8", last_val, str(outcome.path))
    assert re.search(rf"^diverged: step 8 train_loss (nan|inf) last val_loss {last_val}$", outcome.log, re.M)
    assert outcome.losses()[-1][0] == "7", "nothing after it"


def test_a_last_validation_that_is_not_finite_is_no_result(place):
    """The last update is followed by no training loss: only the validation can tell."""
    def plant(run):
        with torch.no_grad():
            run.model.lm_head.weight[3, 3] = math.nan

    with at_step(12, plant):
        outcome = run(place())
    check_refused(outcome, "nan", "step 12")


def test_weights_blown_up_by_a_huge_rate(place):
    check_refused(run(place(lr_head=9e18, lr_embed=9e18, softcap=0.0)), "the loss became", "at step", "lower the learning rates")


@contextmanager
def full_disk(path: Path):
    """No file may grow beyond the size that the log has now: what the system says of a full disk, for real."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_disk_full_while_logging_for_a_while(place, plain, tmp_path):
    """The run goes on, says so once, and the log is whole in the end."""
    disk = ExitStack()
    with at_step(3, lambda run: disk.enter_context(full_disk(run.log.path))), at_step(9, lambda run: disk.close()):
        outcome = run(place(checkpoint_every=4))
    assert outcome.code == 0 and len(outcome.err.splitlines()) == 1 and "training goes on" in outcome.err
    assert outcome.losses() == plain.losses() and outcome.result()["steps"] == 12
    assert not list(outcome.path.parent.glob("*.tmp"))
    assert "step_000004.pt could not be written" in outcome.log and "training goes on without it" in outcome.log
    assert [path.name for path in tmp_path.glob("checkpoints/*/*")] == ["step_000012.pt"], "no half a checkpoint"


def test_disk_full_to_the_end(place):
    with ExitStack() as disk, at_step(3, lambda run: disk.enter_context(full_disk(run.log.path))):
        outcome = run(place())
    assert outcome.code == 2
    goes_on, last = outcome.err.splitlines()
    assert "training goes on" in goes_on and "its log cannot be written" in last
    assert "step:12/12 val_loss:" in outcome.out, "the result was on the screen"
    assert outcome.log.startswith(train_gpt.SOURCE[:1000]) and "step:2/12" in outcome.log, "what was written stays"


def test_disk_full_before_the_start(place, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(train_gpt.os, "replace", full)
    check_refused(run(place()), "--log_dir", "No space left on device")


def test_log_folder_removed_during_the_run(place, plain):
    with at_step(6, lambda run: shutil.rmtree(run.log.path.parent)):
        outcome = run(place())
    assert outcome.code == 0 and outcome.losses() == plain.losses() and outcome.log.startswith(train_gpt.SOURCE[:1000])
    with at_step(12, lambda run: shutil.rmtree(run.log.path.parent)):
        outcome = run(place())
    assert outcome.code == 0 and outcome.losses() == plain.losses()


def test_nothing_is_overwritten(place, tmp_path):
    logs = []
    for _ in range(3):
        logs.append(run(place(steps=2, checkpoint_every=1)).path)
        if len(logs) == 1:
            before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(set(logs)) == 3 and len(before) >= 2
    assert all(path.read_bytes() == content for path, content in before.items())


# ---------------------------------------------------------------------------------------------------------------- checkpoints

METHODS = {
    "muon": {}, "adam, bf16": dict(matrix_optimizer="adam", bf16=True), "tied": dict(untie_head=False),
    "relora": dict(relora=4, relora_warm_start=3, relora_interval=4), "relora, muon": dict(relora=4, relora_warm_start=6, relora_optimizer="muon"),
    "galore": dict(galore=8, galore_interval=4, matrix_optimizer="adam"), "galore, muon": dict(galore=8, galore_interval=3),
    "galore, 8 bit": dict(galore=8, galore_interval=4, galore_bits=8, matrix_optimizer="adam"),
    "galore, per layer": dict(galore=8, galore_interval=4, galore_per_layer=True, galore_bits=8, matrix_optimizer="adam"),
    "lawa": dict(lawa=3, lawa_interval=2), "lawa, replace": dict(lawa=2, lawa_interval=3, lawa_mode="replace"),
    "sparsity": dict(sparsity=0.5, mup_base_width=16), "relora and lawa": dict(relora=4, relora_warm_start=2, lawa=2, lawa_interval=2),
}


@pytest.mark.parametrize("method", METHODS)
def test_resume_is_bit_for_bit(method, place, tmp_path):
    whole = run(place(checkpoint_every=5, checkpoint_keep=9, **METHODS[method]))
    assert whole.code == 0, whole.err
    found = sorted(tmp_path.glob("checkpoints/*/step_*.pt"))
    assert [path.name for path in found][:2] == ["step_000005.pt", "step_000010.pt"]
    before = found[0].read_bytes()
    again = run(place(checkpoint_every=5, checkpoint_keep=9, resume=found[0], **METHODS[method]))
    assert again.code == 0, again.err
    assert again.losses() == whole.losses(), "the same log lines but for the times"
    same_weights(again, whole)
    assert again.result()["resumed"] is True and again.path != whole.path and found[0].read_bytes() == before
    (line,) = [line for line in again.body if line.startswith("resumed: ")]
    resumed = json.loads(line.removeprefix("resumed: "))
    assert resumed["from"] == str(found[0]) and resumed["step"] == 5 and resumed["changed"] == []
    assert again.result()["train_time_ms"] >= resumed["train_time_ms"] > 0


def test_a_restarted_process_resumes_its_own_run_by_itself(place, plain, tmp_path, monkeypatch):
    """What torchrun --max-restarts starts: the same command line, and a count in the environment."""
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    fresh = run(place(checkpoint_every=5))
    assert fresh.code == 0 and "restarted from step 0" in fresh.out and fresh.losses() == plain.losses()
    next(tmp_path.glob("checkpoints/*/step_000012.pt")).unlink()
    assert run(place(checkpoint_every=5, seed=3)).code == 0, "newer, but another run's"
    again = run(place(checkpoint_every=5))
    assert again.code == 0 and again.losses() == plain.losses()
    (line,) = [line for line in again.body if line.startswith("resumed: ")]
    assert fresh.path.stem in line and json.loads(line.removeprefix("resumed: "))["step"] == 10


def test_random_numbers_go_on_where_they_were(place, tmp_path):
    """For ideas that draw some (dropout): torch's generator is part of a checkpoint, and the warm-up does not advance it."""
    drawn, update = [], train_gpt.update

    def update_and_draw(run):
        update(run)
        drawn.append(torch.rand(()).item())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "update", update_and_draw)
        run(place(checkpoint_every=5, checkpoint_keep=9))
        torch.manual_seed(99)
        run(place(resume=next(tmp_path.glob("checkpoints/*/step_000005.pt"))))
    assert len(drawn) == 13 + 8 and drawn[0] == drawn[1], "the first draw of each run is the warm-up's, and put back"
    assert drawn[-7:] == drawn[6:13]


def test_resume_twice_over(place, plain, tmp_path):
    first = run(place(checkpoint_every=5))
    next(tmp_path.glob("checkpoints/*/step_000012.pt")).unlink()
    second = run(place(checkpoint_every=11, resume="latest"))
    assert "step_000010.pt" in second.out
    next(tmp_path.glob(f"checkpoints/{second.path.stem}/step_000012.pt")).unlink()
    third = run(place(resume="latest"))
    assert "step_000011.pt" in third.out
    assert first.losses() == second.losses() == third.losses() == plain.losses()
    same_weights(third, plain)
    assert [line for line in second.body if line.startswith("resumed: ")] == [line for line in third.body if line.startswith("resumed: ")][:1]


def test_the_newest_are_kept(place, tmp_path):
    run(place(checkpoint_every=2, checkpoint_keep=3))
    assert [path.name for path in sorted(tmp_path.glob("checkpoints/*/*"))] == ["step_000008.pt", "step_000010.pt", "step_000012.pt"]


@pytest.fixture(scope="module")
def saved(data, tmp_path_factory):
    """The folder of a run's checkpoints of steps 4, 8 and 12. Tests take a copy."""
    folder = tmp_path_factory.mktemp("saved")
    outcome = run(flags(data, log_dir=folder / "logs", checkpoint_dir=folder / "checkpoints", checkpoint_every=4, checkpoint_keep=9))
    (folder / "checkpoints" / outcome.path.stem).rename(folder / "run")
    return folder / "run"


@pytest.fixture
def copied(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "checkpoints" / "run")
    return tmp_path / "checkpoints" / "run"


def test_resume_with_another_config_is_refused_unless_told(place, copied, plain):
    path = copied / "step_000008.pt"
    check_refused(run(place(resume=path, lr_muon=0.01, seed=4)), str(path), "--seed 0 -> 4", "--lr_muon 0.02 -> 0.01", "--resume_anyway")
    outcome = run(place(resume=path, lr_muon=0.01, seed=4, resume_anyway=True))
    assert outcome.code == 0 and outcome.losses() != plain.losses()
    assert "--lr_muon 0.02 -> 0.01" in outcome.log.rpartition(RULE)[2], "the log says what changed"
    assert run(place(resume=path, micro_batch=2, checkpoint_every=3, rank_timeout=9)).code == 0, "where and how, not what, is trained"


def test_resume_with_other_source_or_data_is_refused(place, copied, tmp_path, monkeypatch):
    other = make_data(tmp_path / "other", seed=2)
    check_refused(run(place(resume="latest", train_files=f"{other}/train_*.bin")), "the data", "--resume_anyway")
    monkeypatch.setattr(train_gpt, "SOURCE_SHA256", "0" * 64)
    check_refused(run(place(resume="latest")), "the source of train_gpt.py", "--resume_anyway")


def test_resume_with_another_model_is_refused(place, copied):
    check_refused(run(place(resume="latest", n_layer=3)), "--n_layer 2 -> 3")
    check_refused(run(place(resume="latest", n_layer=3, resume_anyway=True)), "does not fit this model")
    check_refused(run(place(resume="latest", n_embd=64, resume_anyway=True)), "does not fit this model")
    check_refused(run(place(resume="latest", lawa=2, resume_anyway=True)), "does not fit this model")


def test_resume_beyond_the_end_is_refused(place, copied):
    check_refused(run(place(resume=copied / "step_000008.pt", steps=7, momentum_warmup=7, resume_anyway=True)), "step 8", "nothing left to train")


def test_a_run_killed_after_its_last_update_still_gets_its_result(place, copied, plain):
    outcome = run(place(resume=copied / "step_000012.pt"))
    assert outcome.code == 0 and outcome.losses() == plain.losses() and outcome.result()["val_loss"] == plain.result()["val_loss"]
    same_weights(outcome, plain)


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)


def foreign(path):
    path.write_bytes(os.urandom(5000))


def another_torch_file(path):
    torch.save({"step": 8}, path)


def pickled_code(path):
    torch.save(sys.exit, path)


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, flip, foreign, another_torch_file, pickled_code, empty])
def test_a_damaged_checkpoint_gives_way_to_an_older_one(damage, place, copied, plain):
    newest, older = copied / "step_000008.pt", copied / "step_000004.pt"
    damage(newest)
    (copied / "step_000012.pt").unlink()
    outcome = run(place(resume="latest" if damage is flip else newest))
    assert outcome.code == 0 and str(newest) in outcome.out and "looking for an older one" in outcome.out and str(older) in outcome.out
    assert outcome.losses() == plain.losses()
    older.unlink()
    check_refused(run(place(resume=newest)), "start again without --resume")
    newest.unlink()
    check_refused(run(place(resume=newest)), str(newest), "--checkpoint_every")


@pytest.mark.parametrize("content", [[1, 2], {"step": 8}, {"step": 8, "config": {}, "source_sha256": "", "data_sha256": {}, "model": {}}])
def test_a_whole_file_that_is_no_checkpoint(content, place, copied):
    """The right checksum around something else, as another version of the trainer might have written."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    for path in copied.glob("*"):
        path.write_bytes(buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest())
    check_refused(run(place(resume="latest", resume_anyway=True)))
    check_refused(run(["--generate", "a", "--checkpoint", str(path), "--device", "cpu"]))


def test_a_checkpoint_that_cannot_be_written_does_not_stop_the_run(place, tmp_path, plain):
    (tmp_path / "checkpoints").write_text("a file in the way")
    outcome = run(place(checkpoint_every=5))
    assert outcome.code == 0 and "could not be written" in outcome.out and outcome.losses() == plain.losses()


def test_checkpoints_hold_no_code(copied):
    for path in copied.glob("*"):
        state = train_gpt.read_checkpoint(path)  # weights_only
        assert state["step"] == int(path.stem[-6:]) and set(state["model"]) and state["train_seconds"] > 0


# ------------------------------------------------------------------------------------------------------------------- sampling

def test_generate(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = str(saved / "step_000008.pt")
    texts = []
    for seed in ("1", "1", "2"):
        outcome = run(["--generate", "abc é", "--checkpoint", path, "--generate_tokens", "40", "--seed", seed, "--device", "cpu"])
        assert outcome.code == 0 and not outcome.err and outcome.out.startswith("abc é") and outcome.out.endswith("\n")
        texts.append(outcome.out)
    assert texts[0] == texts[1] != texts[2] and len(texts[0]) > 6
    greedy = [run(["--generate", "a", "--checkpoint", path, "--temperature", "0", "--generate_tokens", "50", "--seed", seed, "--device", "cpu"]).out
              for seed in "12"]
    assert greedy[0] == greedy[1]
    assert not list(tmp_path.iterdir()), "sampling writes nothing"


@pytest.mark.parametrize("method", ["relora", "sparsity", "galore, 8 bit", "lawa", "tied"])
def test_generate_from_a_method(method, place, tmp_path):
    assert run(place(checkpoint_every=5, **METHODS[method])).code == 0
    outcome = run(["--generate", "a", "--checkpoint", "latest", "--checkpoint_dir", str(tmp_path / "checkpoints"), "--generate_tokens", "5",
                   "--device", "cpu"])
    assert outcome.code == 0 and outcome.out.startswith("a"), outcome.err


# -------------------------------------------------------------------------------------------------------------------- signals

@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_with_a_checkpoint(number, code, place, plain, tmp_path):
    with at_step(7, lambda run: os.kill(os.getpid(), number)):
        outcome = run(place(checkpoint_every=100))
    assert outcome.code == code and not outcome.err
    assert f"stopped by {number.name} after step" in outcome.log and not outcome.body[-1].startswith("{")
    (path,) = tmp_path.glob("checkpoints/*/step_*.pt")
    assert int(path.stem[-6:]) in (7, 8)
    again = run(place(checkpoint_every=100, resume="latest"))
    assert again.losses() == plain.losses()
    same_weights(again, plain)
    with at_step(7, lambda run: os.kill(os.getpid(), number)):
        assert run(place(checkpoint_dir=tmp_path / "none")).code == code
    assert not (tmp_path / "none").exists(), "no checkpoint unless asked for"


def test_a_signal_in_the_last_step_loses_nothing(place, plain, tmp_path):
    """Too late to stop: either the run comes to its end, or what it leaves can be resumed to it."""
    for step in (11, 12):
        with at_step(step, lambda run: os.kill(os.getpid(), signal.SIGTERM)):
            outcome = run(place(checkpoint_every=100))
        assert outcome.code in (0, 143)
        if outcome.code:
            outcome = run(place(checkpoint_every=100, resume="latest"))
        assert outcome.code == 0 and outcome.losses() == plain.losses()
        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)


def test_a_second_signal_ends_at_once(place, monkeypatch):
    class Ended(BaseException):
        pass

    def end(code):
        raise Ended(code)

    monkeypatch.setattr(train_gpt.os, "_exit", end)
    with at_step(7, lambda run: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)]), pytest.raises(Ended) as ended:
        run(place())
    assert ended.value.args == (143,)


def test_signals_to_a_process_of_its_own(data, tmp_path):
    folder = tmp_path / "own"
    ranks = Ranks(folder, [flags(data, log_dir=folder / "logs", checkpoint_dir=folder / "checkpoints", steps=5000, epochs_allowed=5000,
                                 val_every=0, checkpoint_every=4000)])
    ranks.wait_for_step(3)
    os.kill(ranks.processes[0].pid, signal.SIGTERM)
    (outcome,) = ranks.wait(20)
    assert outcome.code == 143 and not outcome.err and "stopped by SIGTERM" in outcome.log
    assert len(list(folder.glob("checkpoints/*/step_*.pt"))) == 1
