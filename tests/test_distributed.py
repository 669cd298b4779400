"""Several processes (gloo, on this machine) train the same run as one, and when one of them fails all of them end."""
import os
import re
import signal
import time

import numpy as np
import pytest
import torch
from helpers import Ranks, flags, free_port, make_data, run, torchrun

import train_gpt


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def argv(data, folder, **changes):
    return flags(data, **(dict(log_dir=folder / "logs", checkpoint_dir=folder / "checkpoints", rank_timeout=5, checkpoint_every=6,
                               ngram=3, ngram_rows=100, normuon=0.9) | changes))


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return folder, run(argv(data, folder))


def check_same(outcome, expected, weights):
    """Losses to 4 decimals (the last digit may round the other way) and final weights up to float error."""
    assert len(outcome.losses()) == len(expected.losses())
    for (step, kind, loss), (step2, kind2, loss2) in zip(outcome.losses(), expected.losses()):
        assert (step, kind) == (step2, kind2) and abs(float(loss) - float(loss2)) < 1.5e-4, (step, kind, loss, loss2)
    for name, tensor in expected.weights.items():
        far = ((weights[name] - tensor).abs() > 2e-3).double().mean().item()
        assert far <= (0.01 if name.startswith("ngrams") else 0), f"{name}: {far}"  # Adagrad makes a whole step of a rounding error, too


def keep_weights(rank):
    """In a rank, before main: leave the final weights beside the log."""
    result_of = train_gpt.result_of

    def keep(run, *rest):
        torch.save(run.model.state_dict(), run.log.path.parent.parent / f"weights{run.runtime.rank}.pt")
        return result_of(run, *rest)

    train_gpt.result_of = keep


@pytest.mark.parametrize("world_size", [2, 4])
def test_two_and_four_ranks_are_one_run(world_size, data, alone, tmp_path):
    """4 ranks do not divide the 6,144-row... padding included; all ranks end with the same weights."""
    outcomes = Ranks(tmp_path, [argv(data, tmp_path)] * world_size, keep_weights).wait()
    assert [outcome.code for outcome in outcomes] == [0] * world_size, outcomes[0].err
    assert not outcomes[1].out and len(list(tmp_path.glob("logs/*"))) == 1, "rank 0 alone speaks and writes"
    weights = [torch.load(tmp_path / f"weights{rank}.pt") for rank in range(world_size)]
    for other in weights[1:]:
        assert all(torch.equal(other[name], tensor) for name, tensor in weights[0].items())
    check_same(outcomes[0], alone[1], weights[0])
    result = outcomes[0].result()
    assert result["world_size"] == world_size and result["param_count"] == alone[1].result()["param_count"]
    share = result["optimizer_state_bytes"] / alone[1].result()["optimizer_state_bytes"]
    assert share == pytest.approx(1 / world_size, rel=0.01), "each rank keeps its share of the state"


def test_resume_on_another_world_size(data, alone, tmp_path):
    """From 1 to 2 processes and back."""
    (checkpoint,) = alone[0].glob("checkpoints/*/step_000006.pt")
    outcomes = Ranks(tmp_path, [argv(data, tmp_path, resume=checkpoint, checkpoint_every=9)] * 2, keep_weights).wait()
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].err
    check_same(outcomes[0], alone[1], torch.load(tmp_path / "weights0.pt"))
    (checkpoint,) = tmp_path.glob("checkpoints/*/step_000009.pt")
    back = run(argv(data, tmp_path, resume=checkpoint))
    assert back.code == 0
    check_same(back, alone[1], back.weights)


@pytest.mark.parametrize("changes", [dict(galore=8, galore_interval=4, galore_bits=8, matrix_optimizer="adam"), dict(galore=8, galore_per_layer=True),
                                     dict(relora=4, relora_warm_start=3, relora_interval=4, lawa=2, lawa_interval=3), dict(sparsity=0.5, bf16=True)],
                         ids=["galore", "per layer", "relora, lawa", "sparsity"])
def test_methods_on_two_ranks(changes, data, tmp_path):
    expected = run(argv(data, tmp_path / "alone", **changes))
    outcomes = Ranks(tmp_path, [argv(data, tmp_path, **changes)] * 2).wait()
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes[0].err
    losses = np.array([[float(loss) for *_, loss in outcome.losses()] for outcome in (outcomes[0], expected)])
    assert np.abs(losses[0] - losses[1]).max() < 0.05 and abs(losses[0] - losses[1])[:5].max() < 2e-3, losses


def test_two_nodes_through_torchrun(data, alone, tmp_path):
    """Two launchers of one process each, which find one another on the loopback device."""
    options = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}"]
    nodes = [torchrun(argv(data, tmp_path), *options) for _ in range(2)]
    try:
        for node in nodes:
            out, err = node.communicate(timeout=120)
            assert node.returncode == 0, err[-2000:]
    finally:
        for node in nodes:
            if node.poll() is None:
                os.killpg(node.pid, signal.SIGKILL)
    (log,) = tmp_path.glob("logs/*.txt")
    losses = re.findall(r"^step:(\d+)/12 (train|val)_loss:(\S+)", log.read_text().rpartition("=" * 100)[2], re.M)
    for (step, kind, loss), (step2, kind2, loss2) in zip(losses, alone[1].losses(), strict=True):
        assert (step, kind) == (step2, kind2) and abs(float(loss) - float(loss2)) < 1.5e-4
    assert "\nworld_size: 2\n" in log.read_text()


# --------------------------------------------------------------------------------------------------------------------- faults

def plant_nan(rank):
    update = train_gpt.update

    def update_and_plant(run):
        update(run)
        if rank == 1 and run.step == 4:
            with torch.no_grad():
                run.model.wte.weight.fill_(float("nan"))

    train_gpt.update = update_and_plant


def raise_in_rank_1(rank):
    update = train_gpt.update

    def update_or_raise(run):
        if rank == 1 and run.step == 4:
            raise ZeroDivisionError("a bug in an idea")
        update(run)

    train_gpt.update = update_or_raise


def full_disk_on_rank_0(rank):
    def full(*args):
        raise OSError(28, "No space left on device")

    if rank == 0:
        train_gpt.os.replace = full


def last_lines(outcomes) -> list[str]:
    return [outcome.err.splitlines()[-1] for outcome in outcomes if outcome.err]


def test_whatever_happens_to_one_rank_all_end_and_say_why(data, tmp_path):
    """Killed, stopped, raising, without a disk, with a NaN, fed other tokens: side by side, for most of it is waiting."""
    other = make_data(tmp_path / "other", seed=2)
    endless = dict(steps=100000, epochs_allowed=100000, val_every=0, checkpoint_every=0, lr_muon=0.0, lr_head=0.0, lr_embed=0.0)
    folders = {name: tmp_path / name for name in ("killed", "stopped", "raising", "disk", "nan", "data", "flags")}
    command = {name: [argv(data, folder, **endless)] * 2 for name, folder in folders.items()}
    command["data"][1:] = [argv(data, folders["data"], **endless, train_files=f"{other}/train_*.bin")]
    command["flags"][1:] = [argv(data, folders["flags"], **endless | dict(seed=3))]
    before = {"raising": raise_in_rank_1, "nan": plant_nan, "disk": full_disk_on_rank_0}
    runs = {name: Ranks(folder, command[name], before.get(name)) for name, folder in folders.items()}
    for name, number in (("killed", signal.SIGKILL), ("stopped", signal.SIGSTOP)):
        runs[name].wait_for_step(2)
        os.kill(runs[name].processes[1].pid, number)
    began = time.monotonic()
    runs["stopped"].processes[0].join(60)
    os.kill(runs["stopped"].processes[1].pid, signal.SIGKILL)  # what a launcher does in the end; it cannot end by itself
    outcomes = {name: ranks.wait(60) for name, ranks in runs.items()}
    assert time.monotonic() - began < 60
    for name, (first, second) in outcomes.items():
        codes = first.code, second.code
        assert 0 not in codes and (-9 not in codes or name in ("killed", "stopped") and codes[0] == 1), (name, codes)

    for name in ("killed", "stopped"):
        assert "rank 1 died or stopped responding" in outcomes[name][0].err.splitlines()[-1], outcomes[name][0].err
        assert "Traceback" not in outcomes[name][0].err
    assert any("rank 1: ZeroDivisionError: a bug in an idea" in line for line in last_lines(outcomes["raising"]))
    assert any("different data" in line for line in last_lines(outcomes["data"]))
    assert any("different flags" in line for line in last_lines(outcomes["flags"]))
    assert any("No space left on device" in line for line in last_lines(outcomes["disk"]))
    assert any("the loss became nan at step" in line for line in last_lines(outcomes["nan"]))
    for name in ("data", "flags", "nan", "disk"):
        lines = [line for outcome in outcomes[name] for line in outcome.err.splitlines()]
        causes = [line for line in lines if line.startswith("train_gpt.py:")]
        assert len(causes) == 1 and not any("Traceback" in line for line in lines), (name, lines)
    assert [outcome.code for outcome in outcomes["nan"]] == [2, 2]
    # here rank 0 hosts the store: a peer that reads it too late finds it gone, and ends with 1 instead of 2
    assert all(outcome.code in (1, 2) for outcome in outcomes["data"]) and 2 in [outcome.code for outcome in outcomes["data"]]
