"""Shards and batches: what is refused before step 0, and that a batch depends on the data and the step alone."""
import hashlib
import json
import os
import shutil

import numpy as np
import pytest
import torch
from helpers import check_refused, flags, make_data, run, text, tiny, write_shard

import train_gpt
from train_gpt import Batches, Runtime, Shards, UserError


@pytest.fixture
def folder(tmp_path):
    return make_data(tmp_path)


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    """(folder, the training tokens as one array)."""
    folder = make_data(tmp_path_factory.mktemp("stream"))
    return folder, np.concatenate([text(2001, 10), text(3000, 11)])


def batches(folder, **changes) -> Batches:
    return Batches(Shards(f"{folder}/train_*.bin", "train_files"), tiny(**changes))


# ----------------------------------------------------------------------------------------------------------------- bad shards

def rewrite(path, **header):
    write_shard(path, text(2001, 10), **header)


def bad_token(path):
    tokens = text(2001, 10)
    tokens[1234] = 257
    write_shard(path, tokens)


def foreign_bytes(path):
    path.write_bytes(b"not tokens at all" * 200)


FAULTS = {
    "magic": (lambda p: rewrite(p, magic=20240521), "[20240521, 1, 2001], in a file of its size [20240520, 1, 2001]"),
    "version": (lambda p: rewrite(p, version=2), "[20240520, 2, 2001], in a file of its size [20240520, 1, 2001]"),
    "count too large": (lambda p: rewrite(p, count=2002), "[20240520, 1, 2002], in a file of its size [20240520, 1, 2001]"),
    "count too small": (lambda p: rewrite(p, count=2000), "[20240520, 1, 2000], in a file of its size [20240520, 1, 2001]"),
    "negative count": (lambda p: rewrite(p, count=-1), "not a whole token shard"),
    "truncated": (lambda p: os.truncate(p, 3000), "[20240520, 1, 2001], in a file of its size [20240520, 1, 988]"),
    "header cut": (lambda p: os.truncate(p, 700), "token shard"),
    "empty file": (lambda p: os.truncate(p, 0), "token shard"),
    "no tokens": (lambda p: write_shard(p, []), "not a whole token shard"),
    "a folder": (lambda p: (p.unlink(), p.mkdir()), "token shard"),
    "text": (foreign_bytes, "not a whole token shard"),
    "token >= vocab": (bad_token, "holds token 257, but --vocab_size is 257"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["train_000000.bin", "val_000000.bin"])
def test_bad_shard_is_refused_before_step_0(fault, name, folder):
    damage, words = FAULTS[fault]
    damage(folder / name)
    check_refused(run(flags(folder)), str(folder / name), words if name.startswith("train") or "2001" not in words else "in a file of its size")
    assert not (folder / "logs").exists(), "refused before a log is opened"


def test_missing_shards(folder, tmp_path):
    check_refused(run(flags(folder, train_files=f"{folder}/nothing_*.bin")), "--train_files", "no such files", "./run.sh")
    (tmp_path / "empty").mkdir()
    check_refused(run(flags(folder, val_files=f"{tmp_path}/empty/*")), "--val_files", "no such files")
    check_refused(run(flags(folder, val_files=f"{tmp_path}/absent/*")), "--val_files", "no such files")


def test_too_few_tokens_says_how_many_shards(folder):
    # 5,001 tokens in 2 shards; 40 steps of 256 need 10,241: 10,241 / 2,500.5, rounded up
    check_refused(run(flags(folder, steps=40)), "5,001 tokens", "10,241", "about 5 such shards", "data/fineweb.py 5", "--epochs_allowed")
    check_refused(run(flags(folder, val_tokens=704)), "700 tokens", "705")
    check_refused(run(flags(folder, batch_tokens=8192, steps=1, epochs_allowed=9)), "needs 8,193")
    assert run(flags(folder, steps=40, epochs_allowed=3, val_every=0)).code == 0


def test_just_enough_tokens(folder):
    for count, fine in ((12 * 256 + 1, True), (12 * 256, False)):
        write_shard(folder / "just.bin", text(count, 5))
        shards = Shards(f"{folder}/just.bin", "train_files")
        plan = Batches(shards, tiny(steps=12, spread_rows=False))
        if fine:
            shards.verify(plan.tokens_read, 257)
            assert plan.batch_at(11).shape == (8, 33)
        else:
            with pytest.raises(UserError, match="the run needs 3,073"):
                shards.verify(plan.tokens_read, 257)


def test_verify_hashes_the_shards_that_are_read_and_no_others(stream):
    folder, _ = stream
    shards = Shards(f"{folder}/train_*.bin", "train_files")
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("train_*.bin")}
    assert shards.verify(5001, 257) == hashes
    assert shards.verify(2001, 257) == {"train_000000.bin": hashes["train_000000.bin"]}
    assert shards.verify(2002, 257) == hashes


def test_manifest_is_kept_to(folder):
    """One flipped byte that leaves a token in range: only the recorded hash can tell."""
    names = [path.name for path in folder.glob("*.bin")]
    recorded = {name: {"sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest()} for name in names}
    (folder / "manifest.json").write_text(json.dumps({"files": recorded}))
    assert run(flags(folder, steps=2)).code == 0
    path = folder / "train_000000.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:])
    check_refused(run(flags(folder)), str(path), "manifest.json")
    path.write_bytes(whole)
    del recorded["train_000000.bin"]  # a shard that was added by hand
    (folder / "manifest.json").write_text(json.dumps({"files": recorded}))
    assert run(flags(folder, steps=2)).code == 0
    for broken in ("", "{", "[]", '{"files": 3}', '{"files": {"val_000000.bin": 3}}'):
        (folder / "manifest.json").write_text(broken)
        check_refused(run(flags(folder)), "manifest.json: cannot be read", "delete it")


# -------------------------------------------------------------------------------------------------------------------- batches

def test_the_stream_runs_across_borders(stream):
    folder, tokens = stream
    shards = Shards(f"{folder}/train_*.bin", "train_files")
    assert len(shards) == 5001
    for start, count in ((0, 1), (1990, 30), (2000, 1), (2001, 1), (2000, 2), (0, 5001), (4990, 11)):
        read = shards.read(start, count)
        assert read.dtype == np.uint16 and np.array_equal(read, tokens[start:start + count]), (start, count)


def test_rows_in_order_are_the_stream(stream):
    folder, tokens = stream
    plan = batches(folder, spread_rows=False)
    for step in range(12):
        rows = plan.batch_at(step)
        assert rows.shape == (8, 33)
        for row in range(8):  # step 7 crosses the border between the shards
            start = step * 256 + row * 32
            assert np.array_equal(rows[row], tokens[start:start + 33])


@pytest.mark.parametrize("spread", [False, True])
def test_batch_at_is_pure(spread, stream):
    folder, _ = stream
    plan, again = batches(folder, spread_rows=spread), batches(folder, spread_rows=spread, seed=5)
    forward = [plan.batch_at(step) for step in range(12)]
    for step in reversed(range(12)):  # any order, any object, any seed
        assert np.array_equal(again.batch_at(step), forward[step])
    assert any(not np.array_equal(forward[0], batch) for batch in forward[1:])


@pytest.mark.parametrize("spread", [False, True])
def test_ranks_and_micro_batches_only_slice(spread, stream):
    folder, _ = stream
    plan = batches(folder, spread_rows=spread)
    for step in (0, 7):
        whole = plan.batch_at(step)
        for world_size in (1, 2, 4, 8):
            share = 8 // world_size
            ranks = [next(batches(folder, spread_rows=spread).stream(step, step + 1, Runtime(torch.device("cpu"), rank, world_size)))
                     for rank in range(world_size)]
            assert np.array_equal(np.concatenate([x.numpy() for x, _ in ranks]), whole[:, :-1])
            assert np.array_equal(np.concatenate([y.numpy() for _, y in ranks]), whole[:, 1:])
            assert all(x.shape == y.shape == (share, 32) and x.dtype == torch.int64 for x, y in ranks)


def test_stream_starts_anywhere_and_targets_are_one_ahead(stream):
    folder, _ = stream
    runtime = Runtime(torch.device("cpu"))
    whole = list(batches(folder).stream(0, 12, runtime))
    assert len(whole) == 12
    for (x, y), (x2, y2) in zip(whole[5:], batches(folder).stream(5, 12, runtime), strict=True):
        assert torch.equal(x, x2) and torch.equal(y, y2)
        assert torch.equal(x[:, 1:], y[:, :-1])


def test_spread_rows_reads_every_row_once_an_epoch(stream):
    folder, tokens = stream
    plan = batches(folder, spread_rows=True, steps=19)
    rows = np.concatenate([plan.batch_at(step) for step in range(19)])
    expected = np.stack([tokens[n * 32:n * 32 + 33] for n in range(152)])
    assert np.array_equal(rows[np.lexsort(rows.T)], expected[np.lexsort(expected.T)])
    numbers = [next(n for n in range(152) if np.array_equal(expected[n], row)) for row in plan.batch_at(0)]
    assert min(abs(a - b) for a in numbers for b in numbers if a != b) > 8, "neighbours in a batch come from far apart"


@pytest.mark.parametrize("spread", [False, True])
def test_epochs_allowed(spread, stream):
    folder, _ = stream
    plan = batches(folder, spread_rows=spread, steps=40, epochs_allowed=3)  # 19 batches are an epoch
    assert plan.tokens_read <= 5001
    for step in (0, 5, 18):
        assert np.array_equal(plan.batch_at(step), plan.batch_at(step + 19))
        assert np.array_equal(plan.batch_at(step), plan.batch_at(step + 38))
    with pytest.raises(UserError, match="--epochs_allowed"):
        once = batches(folder, spread_rows=spread, steps=40)
        once.shards.verify(once.tokens_read, 257)
    with pytest.raises(UserError, match="--epochs_allowed"):  # 2 x 19 batches are not 40
        twice = batches(folder, spread_rows=spread, steps=40, epochs_allowed=2)
        twice.shards.verify(twice.tokens_read, 257)


# ------------------------------------------------------------------------------------------------------------- during the run

CHANGES = {
    "cut short": lambda path: os.truncate(path, 2000),
    "grown": lambda path: path.write_bytes(path.read_bytes() + b"12"),
    "one byte": lambda path: (path.write_bytes(path.read_bytes()[:-1] + b"\x01"), os.utime(path, ns=(1, 1))),
    "replaced": lambda path: (shutil.copy(path, f"{path}.new"), os.replace(f"{path}.new", path)),
    "removed": lambda path: path.unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_shard_that_changes_during_the_run_is_noticed(change, folder):
    shards = Shards(f"{folder}/train_*.bin", "train_files")
    shards.read(100, 10)
    CHANGES[change](folder / "train_000000.bin")
    with pytest.raises(UserError, match="train_000000.bin: changed during the run"):
        shards.read(100, 10)
    shards.read(2001, 10)  # the other is as it was


def test_prefetch_passes_errors_on(folder):
    runtime, plan = Runtime(torch.device("cpu")), batches(folder, spread_rows=False)
    stream = plan.stream(0, 12, runtime)
    next(stream)
    os.truncate(folder / "train_000001.bin", 1500)
    with pytest.raises(UserError, match="train_000001.bin: changed"):
        list(stream)


def test_a_run_whose_shard_is_cut_stops_with_one_line(folder, monkeypatch):
    update, seen = train_gpt.update, []

    def cutting_update(run):
        update(run)
        seen.append(run.step)
        if len(seen) == 3:
            os.truncate(folder / "train_000001.bin", 1500)

    monkeypatch.setattr(train_gpt, "update", cutting_update)
    check_refused(run(flags(folder, val_every=0)), "train_000001.bin: changed during the run")


def test_the_same_batches_again_after_a_restart(folder, monkeypatch):
    """Two runs, and one that resumes, train on the same tokens step by step."""
    seen, forward_backward = [], train_gpt.forward_backward

    def watch(forward, inputs, targets, *rest):
        seen.append((inputs.clone(), targets.clone()))
        return forward_backward(forward, inputs, targets, *rest)

    monkeypatch.setattr(train_gpt, "forward_backward", watch)
    runs = []
    for extra in ({}, dict(checkpoint_every=5, checkpoint_keep=9), dict(resume="STEP 5")):
        seen.clear()
        if "resume" in extra:
            (extra["resume"],) = folder.glob("checkpoints/*/step_000005.pt")
        assert run(flags(folder, **extra)).code == 0
        runs.append(seen[1:])  # the first is the warm-up's: random tokens
    assert [len(run_batches) for run_batches in runs] == [12, 12, 7]
    for batches_seen in (runs[1], runs[2]):
        for (x, y), (x2, y2) in zip(batches_seen, runs[0][-len(batches_seen):], strict=True):
            assert torch.equal(x, x2) and torch.equal(y, y2)
