"""Several processes (gloo, on this machine) train the same run as one; when one fails, all end."""

import contextlib
import json
import os
import re
import signal
import time

import numpy as np
import pytest
import torch
from helpers import (
    EVERY_METHOD,
    ROOT,
    Outcome,
    Ranks,
    flags,
    free_port,
    make_data,
    run,
    same,
    torchrun,
    wait_for_step,
)

import train_gpt

BASE = dict(rank_timeout=20, checkpoint_every=6, ngram=3, ngram_rows=100, normuon=0.9)
STAGES = dict(batch_tokens=(128, 256, 512), window=(8, 8, 16), lr_factor=(1, 1, 0.5))
ENDLESS = dict(steps=100000, epochs_allowed=100000, val_every=0, checkpoint_every=0)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def argv(data, folder, **changes):
    files = dict(log_dir=folder / "logs", checkpoint_dir=folder / "checkpoints")
    return flags(data, **BASE | files | changes)


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return folder, run(argv(data, folder))


def check_losses(outcome, expected, tolerance=1.5e-4):
    """To 4 decimals: the last digit may round the other way."""
    for ours, theirs in zip(outcome.losses(), expected.losses(), strict=True):
        assert ours[:2] == theirs[:2]
        assert abs(float(ours[2]) - float(theirs[2])) < tolerance, (ours, theirs)


def check_same(outcome, expected, weights):
    """Losses, and final weights up to float error."""
    check_losses(outcome, expected)
    for name, tensor in expected.weights.items():
        far = ((weights[name] - tensor).abs() > 2e-3).double().mean().item()
        # Adagrad makes a whole step of a rounding error, too
        assert far <= (0.01 if name.startswith("ngrams") else 0), f"{name}: {far}"


@pytest.mark.long
def test_norms_are_those_of_all_ranks(data, tmp_path):
    few = dict(steps=4, momentum_warmup=4, log_norms=2)
    few |= dict(zero_init=False)  # where first gradients are zero, rounding is all there is
    line = argv(data, tmp_path / "two", **few)
    two, _ = Ranks(tmp_path / "two", [line] * 2).wait()
    one = run(argv(data, tmp_path / "one", **few))
    assert one.code == two.code == 0, one.err + two.err
    assert one.norms().keys() == two.norms().keys() and len(one.norms()) >= 8
    for key, values in two.norms().items():
        assert values == pytest.approx(one.norms()[key], rel=2e-3), key


def keep_weights(rank):
    """In a rank, before main: leave the final weights beside the log."""
    result_of = train_gpt.result_of

    def keep(run, *rest):
        path = run.log.path.parent.parent / f"weights{run.runtime.rank}.pt"
        torch.save(run.model.state_dict(), path)
        return result_of(run, *rest)

    train_gpt.result_of = keep


# ------------------------------------------------------------------------------------- the same run
@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.long)])
def test_two_and_four_ranks_are_one_run(world_size, data, alone, tmp_path):
    """All ranks end with the same weights; rank 0 alone speaks and writes."""
    outcomes = Ranks(tmp_path, [argv(data, tmp_path)] * world_size, keep_weights).wait()
    assert [outcome.code for outcome in outcomes] == [0] * world_size, outcomes[0].err
    for rank, outcome in enumerate(outcomes[1:], 1):
        (line,) = outcome.out.splitlines()
        assert line.startswith(f"rank {rank} of {world_size} waits for the others at 127.0.0.1:")
    assert len(list(tmp_path.glob("logs/*"))) == 1
    weights = [torch.load(tmp_path / f"weights{rank}.pt") for rank in range(world_size)]
    assert all(same(other, weights[0]) for other in weights[1:])
    check_same(outcomes[0], alone[1], weights[0])
    ours, theirs = outcomes[0].result(), alone[1].result()
    assert ours["world_size"] == world_size and ours["param_count"] == theirs["param_count"]
    share = ours["optimizer_state_bytes"] / theirs["optimizer_state_bytes"]
    assert share == pytest.approx(1 / world_size, rel=0.01), (
        "each rank keeps its share of the state"
    )


@pytest.mark.long
def test_resume_on_another_world_size(data, alone, tmp_path):
    """From 1 to 2 processes and back."""
    (path,) = alone[0].glob("checkpoints/*/step_000006.pt")
    line = argv(data, tmp_path, resume=path, checkpoint_every=9)
    outcomes = Ranks(tmp_path, [line] * 2, keep_weights).wait()
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].err
    check_same(outcomes[0], alone[1], torch.load(tmp_path / "weights0.pt"))
    (path,) = tmp_path.glob("checkpoints/*/step_000009.pt")
    back = run(argv(data, tmp_path, resume=path))
    assert back.code == 0
    check_same(back, alone[1], back.weights)


TOGETHER = {name: EVERY_METHOD[name] for name in ("galore, 8 bit", "relora, lawa", "supar")} | {
    "per layer": EVERY_METHOD["galore, per layer"],
    "stages": STAGES,
    "tied": dict(untie_head=False),
    "bf16 weights": dict(bf16_weights=True),
}


@pytest.mark.long
@pytest.mark.parametrize("name", TOGETHER)
def test_methods_and_stages_on_two_ranks(name, data, tmp_path):
    changes = dict(ngram=0, ngram_rows=None, normuon=None) | TOGETHER[name]
    expected = run(argv(data, tmp_path / "alone", **changes))
    assert expected.code == 0, expected.err
    outcomes = Ranks(tmp_path, [argv(data, tmp_path, **changes)] * 2, keep_weights).wait()
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].err
    assert same(*(torch.load(tmp_path / f"weights{rank}.pt") for rank in (0, 1)))
    both = (outcomes[0].losses(), expected.losses())
    ours, theirs = (np.array([float(loss) for *_, loss in losses]) for losses in both)
    # Adam makes a whole step of a rounding error: what starts at zero drifts a little
    assert abs(ours - theirs).max() < 0.02 and abs(ours - theirs)[:5].max() < 2e-3


RECORD_92 = dict(
    preset="gpt2_small",
    steps=24,
    n_layer=None,
    ngram=None,
    ngram_rows=None,
    normuon=None,
    spread_rows=None,
    n_embd=48,
    table_rows=300,
    batch_tokens=(128, 256, 256, 256, 128),
    seq_len=(16, 32, 32, 32, 16),
    max_document=(9, 20, 20, 20, 20),
    window=(8, 12, 16, 16, 20),
    short_window=(4, 6, 8, 8, 8),
    val_seq_len=32,
    epochs_allowed=50,
    checkpoint_keep=9,
)


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.long)])
def test_record_92_on_ranks(world_size, data, tmp_path):
    """The same model; a table that these ranks wrote is read by one."""
    expected = run(argv(data, tmp_path / "alone", **RECORD_92))
    assert expected.code == 0, expected.err
    lines = [argv(data, tmp_path, **RECORD_92)] * world_size
    outcomes = Ranks(tmp_path, lines, keep_weights).wait()
    assert [outcome.code for outcome in outcomes] == [0] * world_size, outcomes[0].err
    check_losses(outcomes[0], expected, 2e-3)
    (folder,) = tmp_path.glob("checkpoints/*")
    assert len(list(folder.glob("step_000024.table*.pt"))) == world_size
    back = run(argv(data, tmp_path / "back", **RECORD_92, resume=folder / "step_000012.pt"))
    assert back.code == 0, back.err
    check_losses(back, expected, 2e-3)


# ----------------------------------------------------------------------------------------- torchrun
@contextlib.contextmanager
def ended(process):
    """Nothing of the process's group outlives the test."""
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


ALONE = ["--standalone", "--nproc_per_node=2"]
WRAPPER = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import train_gpt
update = train_gpt.step_optimizers
def broken(run):
    update(run)
    if run.runtime.rank == 1 and run.step == 4:
        raise ZeroDivisionError("a bug in an idea")
train_gpt.step_optimizers = broken
sys.exit(train_gpt.main())
"""


def worker(folder, rank):
    """The process id of a rank."""
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            line = open(f"/proc/{entry}/cmdline", "rb").read()
            environment = open(f"/proc/{entry}/environ", "rb").read().split(b"\0")
            if str(folder).encode() in line and f"RANK={rank}".encode() in environment:
                return int(entry)
    raise AssertionError(f"no rank {rank}")


@pytest.mark.long
def test_torchrun_names_a_killed_rank_and_shows_a_bug_once(data, tmp_path):
    """Both end at once, by torchrun's own watch."""
    script = tmp_path / "idea.py"
    script.write_text(WRAPPER)
    killed = torchrun(argv(data, tmp_path / "killed", **ENDLESS), *ALONE)
    broken = torchrun(argv(data, tmp_path / "broken", **ENDLESS), *ALONE, script=script)
    with ended(killed), ended(broken):
        wait_for_step(tmp_path / "killed", 3)
        os.kill(worker(tmp_path / "killed", 1), signal.SIGKILL)
        began = time.monotonic()
        out, err = killed.communicate(timeout=60)
        assert killed.returncode == 1 and time.monotonic() - began < 30
        assert re.search(r"rank +: 1 \(", err) and "SIGKILL" in err and "Traceback" in err
        out, err = broken.communicate(timeout=60)
        assert broken.returncode == 1
        assert err.count("ZeroDivisionError: a bug in an idea") == 1, err
        assert re.search(r"rank +: 1 \(", err) and "in broken\n" in err


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["a user's mistake", "nan", "stopped", "SIGTERM", "SIGINT"])
def test_other_ends_under_torchrun(fault, data, tmp_path):
    """One cause, said once; a stopped rank ends the others within --rank_timeout."""
    changes = ENDLESS | {
        "a user's mistake": dict(val_tokens=704),
        "nan": dict(lr_head=9e18, lr_embed=9e18, softcap=0),
        "stopped": dict(rank_timeout=8),
    }.get(fault, dict(checkpoint_every=100000))
    process = torchrun(argv(data, tmp_path, **changes), *ALONE)
    with ended(process):
        if fault in ("stopped", "SIGTERM", "SIGINT"):
            wait_for_step(tmp_path, 3)
        began = time.monotonic()
        if fault == "stopped":
            os.kill(worker(tmp_path, 1), signal.SIGSTOP)
        elif fault.startswith("SIG"):
            os.kill(process.pid, getattr(signal, fault))
        out, err = process.communicate(timeout=120)
    assert process.returncode != 0
    if fault.startswith("SIG"):
        assert len(list(tmp_path.glob("checkpoints/*/step_*.pt"))) == 1
        assert time.monotonic() - began < 30
    elif fault == "stopped":
        assert time.monotonic() - began < 8 + 40
    else:
        said = {"nan": "lower the learning rates", "a user's mistake": "--val_tokens"}[fault]
        assert process.returncode == 1 and said in err, err


@pytest.mark.slow
def test_two_nodes_through_torchrun(data, alone, tmp_path):
    """Two launchers of one process each, which find one another on the loopback device."""
    endpoint = f"--rdzv_endpoint=127.0.0.1:{free_port()}"
    options = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", endpoint]
    nodes = [torchrun(argv(data, tmp_path), *options) for _ in range(2)]
    with ended(nodes[0]), ended(nodes[1]):
        for node in nodes:
            out, err = node.communicate(timeout=120)
            assert node.returncode == 0, err[-2000:]
    (log,) = tmp_path.glob("logs/*.txt")
    outcome = Outcome(0, path=log)
    check_losses(outcome, alone[1])
    assert outcome.facts()["world_size"] == "2"


# ------------------------------------------------------------------------------------------- faults
def plant_nan(rank):
    update = train_gpt.step_optimizers

    def update_and_plant(run):
        update(run)
        if rank == 1 and run.step == 4:
            with torch.no_grad():
                run.model.wte.weight.fill_(float("nan"))

    train_gpt.step_optimizers = update_and_plant


@pytest.mark.long
def test_whatever_happens_to_one_rank_all_end(data, tmp_path):
    """Stopped, NaN, other data, other flags, a signal: side by side, most of it is waiting."""
    other = make_data(tmp_path / "other", seed=2)
    manifest = {"files": {"train_000000.bin": {"sha256": "0"}}}
    (other / "manifest.json").write_text(json.dumps(manifest))
    names = ("stopped", "nan", "data", "flags", "saving", "signal")
    lines = {name: [argv(data, tmp_path / name, **ENDLESS)] * 2 for name in names}
    lines["stopped"] = [argv(data, tmp_path / "stopped", **ENDLESS | dict(rank_timeout=4))] * 2
    train_files = f"{other}/train_*.bin"
    lines["data"][1:] = [argv(data, tmp_path / "data", **ENDLESS, train_files=train_files)]
    lines["flags"][1:] = [argv(data, tmp_path / "flags", **ENDLESS, seed=3)]
    lines["saving"][1:] = [argv(data, tmp_path / "saving", **ENDLESS | dict(checkpoint_every=9))]
    lines["signal"] = [
        argv(data, tmp_path / "signal", **ENDLESS | dict(checkpoint_every=10**5))
    ] * 2
    before = {"nan": plant_nan}
    runs = {name: Ranks(tmp_path / name, line, before.get(name)) for name, line in lines.items()}
    for name, number in (("stopped", signal.SIGSTOP), ("signal", signal.SIGTERM)):
        wait_for_step(tmp_path / name, 2)
        os.kill(runs[name].processes[1].pid, number)
    runs["stopped"].processes[0].join(40)
    assert runs["stopped"].processes[0].exitcode == 1, "it waited for --rank_timeout, no longer"
    runs["stopped"].processes[1].kill()  # as a launcher does in the end
    outcomes = {name: ranks.wait(60) for name, ranks in runs.items()}
    for name, words in (
        ("nan", "loss became nan at step"),
        ("data", "ranks differ in {'the data'}"),
        ("flags", "ranks differ in {'seed'}"),
        ("saving", "ranks differ in {'checkpoint_every'}"),
    ):
        assert [outcome.code for outcome in outcomes[name]] == [2, 2], (name, outcomes[name])
        errors = [outcome.err for outcome in outcomes[name]]
        assert all(words in err and "Traceback" not in err for err in errors), (name, errors)
    assert [outcome.code for outcome in outcomes["signal"]] == [143, 143], outcomes["signal"]
    assert len(list(tmp_path.glob("signal/checkpoints/*/step_*.pt"))) == 1
