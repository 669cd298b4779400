"""Shards and batches: what is refused before step 0; a batch depends on data and step alone."""

import json
import os

import numpy as np
import pytest
import torch
from helpers import at_step, check_refused, flags, make_data, run, text, tiny, write_shard

import train_gpt
from train_gpt import Batches, Shards, UserError

T = 32
STAGES = dict(batch_tokens=(64, 128, 256))  # over 12 steps: 2, 4, 8 rows


@pytest.fixture
def folder(tmp_path):
    return make_data(tmp_path)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """(folder, its training rows [155, T + 1]: none crosses from shard to shard)."""
    folder = make_data(tmp_path_factory.mktemp("source"))
    rows = []
    for count, seed in ((2001, 10), (3000, 11)):
        tokens = text(count, seed)
        rows += [tokens[at : at + T + 1] for at in range(0, count - T, T)]
    return folder, torch.from_numpy(np.stack(rows))


def batches(folder, **changes) -> Batches:
    return Batches(Shards(f"{folder}/train_*.bin", "train_files", 256), tiny(**changes))


# --------------------------------------------------------------------------------------- bad shards
def make_pipe(path):
    path.unlink()
    os.mkfifo(path)


FAULTS = {
    "magic": lambda path: write_shard(path, text(2001, 10), magic=20240521),
    "version": lambda path: write_shard(path, text(2001, 10), version=2),
    "count too large": lambda path: write_shard(path, text(2001, 10), count=2002),
    "count too small": lambda path: write_shard(path, text(2001, 10), count=2000),
    "negative count": lambda path: write_shard(path, text(2001, 10), count=-1),
    "truncated": lambda path: os.truncate(path, 3000),
    "header cut": lambda path: os.truncate(path, 700),
    "header cut short": lambda path: os.truncate(path, 7),
    "empty file": lambda path: os.truncate(path, 0),
    "no tokens": lambda path: write_shard(path, []),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a pipe": make_pipe,  # reading it would block for ever
    "a dead link": lambda path: (path.unlink(), path.symlink_to("nowhere")),
    "text": lambda path: path.write_bytes(b"not tokens at all" * 200),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["train_000000.bin", "val_000000.bin"])
def test_a_bad_shard_is_refused_before_step_0(fault, name, folder):
    FAULTS[fault](folder / name)
    check_refused(run(flags(folder)), str(folder / name), "not a whole token shard")
    assert not (folder / "logs").exists(), "refused before a log is opened"


def test_tokens_outside_the_vocabulary_are_one_line(folder):
    """Shards of another tokenizer: say so at once, not in a kernel's words."""
    write_shard(folder / "val_000000.bin", text(700, 1) + 1000)
    check_refused(run(flags(folder)), "val_000000.bin", "--vocab_size 257")
    make_data(folder)
    write_shard(folder / "train_000001.bin", text(3000, 1) + 1000)
    check_refused(run(flags(folder)), "train_000001.bin", "--vocab_size 257")


def test_missing_or_too_few_tokens(folder):
    for nothing in (f"{folder}/nothing_*.bin", f"{folder}/absent/*"):
        check_refused(run(flags(folder, val_files=nothing)), "--val_files", "no such files")
    # 155 rows, of which 19 whole batches of 8
    words = ("holds 155 rows", "reads 160", "--epochs_allowed")
    check_refused(run(flags(folder, steps=20)), *words)
    check_refused(run(flags(folder, val_tokens=704)), "val_*.bin", "--val_tokens")
    check_refused(run(flags(folder, batch_tokens=8192, steps=1, epochs_allowed=9)), "256")
    assert run(flags(folder, steps=20, epochs_allowed=2, val_every=0)).code == 0
    assert run(flags(folder, val_tokens=672, val_every=0)).code == 0


def test_validation_on_training_shards_is_refused(folder):
    for pattern in ("train_*.bin", "train_000001.bin", "*.bin"):
        check_refused(run(flags(folder, val_files=f"{folder}/{pattern}")), "validate on other")
    (folder / "link_0.bin").symlink_to(folder / "train_000001.bin")
    check_refused(run(flags(folder, val_files=f"{folder}/link_*.bin")), "validate on other")


def test_hashes_come_from_the_manifest(folder):
    shards = Shards(f"{folder}/train_*.bin", "train_files", 256)
    assert shards.hashes() == {"train_000000.bin": None, "train_000001.bin": None}
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps({"files": {"train_000000.bin": {"sha256": "abc"}}}))
    assert shards.hashes() == {"train_000000.bin": "abc", "train_000001.bin": None}
    logged = json.loads(run(flags(folder, steps=1)).facts()["data_sha256"])
    assert logged["train_000000.bin"] == "abc" and logged["val_000000.bin"] is None
    nested = "[" * 100_000 + "]" * 100_000
    for broken in ("", "{", "[]", '{"files": 3}', '{"files": {"val_000000.bin": 3}}', nested):
        manifest.write_text(broken)
        check_refused(run(flags(folder)), "manifest.json", "delete it")


# ------------------------------------------------------------------------------------------ batches
def test_rows_are_those_of_the_shards_in_order(source):
    folder, rows = source
    shards = Shards(f"{folder}/train_*.bin", "train_files", 256)
    assert shards.count(T) == len(rows) == 155
    read = np.stack([shards.read(shards.row(number, T)) for number in range(155)])
    assert read.dtype == np.int64 and (read == rows.numpy()).all()
    plan = batches(folder, spread_rows=False)
    for step in range(12):
        assert (plan.batch_at(step) == rows[8 * step : 8 * step + 8].numpy()).all()


@pytest.mark.parametrize("changes", [{}, dict(spread_rows=False), STAGES], ids=str)
def test_batch_at_is_pure_and_ranks_only_slice_it(changes, source):
    plan, again = batches(source[0], **changes), batches(source[0], seed=5, **changes)
    whole = [plan.batch_at(step) for step in range(12)]
    for step in reversed(range(12)):  # any order, any object, any seed
        assert np.array_equal(again.batch_at(step), whole[step])
        for ranks in (1, 2, 4):
            if len(whole[step]) % ranks == 0:
                parts = [plan.batch_at(step, rank, ranks) for rank in range(ranks)]
                assert {len(part) for part in parts} == {len(whole[step]) // ranks}
                assert np.array_equal(np.concatenate(parts), whole[step])
    rows = {tuple(row.tolist()) for batch in whole for row in batch}
    assert len(rows) == sum(map(len, whole)), "no row twice"


def test_a_schedule_of_batches_reads_on_where_it_was(source):
    folder, rows = source
    plan = batches(folder, spread_rows=False, **STAGES)
    sizes = [len(plan.batch_at(step)) for step in range(12)]
    assert sizes == [2] * 4 + [4] * 4 + [8] * 4
    read = np.concatenate([plan.batch_at(step) for step in range(12)])
    assert np.array_equal(read, rows[: sum(sizes)].numpy())


def test_rows_may_grow_by_stages(source):
    """A row is as many of the longest one's parts as it needs; every token is read once."""
    folder, rows = source
    plan = batches(folder, spread_rows=False, seq_len=(16, 32), batch_tokens=256, steps=4)
    read = [plan.batch_at(step) for step in range(4)]
    assert [part.shape for part in read] == [(16, 17)] * 2 + [(8, 33)] * 2
    halves = rows[:16].unfold(1, 17, 16).flatten(0, 1)
    assert np.array_equal(np.concatenate(read[:2]), halves.numpy())
    assert np.array_equal(np.concatenate(read[2:]), rows[16:32].numpy())
    with pytest.raises(UserError, match="must divide"):
        batches(folder, seq_len=(24, 32), batch_tokens=(240, 256))


def test_spread_rows_reads_every_row_once_an_epoch(source):
    folder, rows = source
    plan = batches(folder, steps=19)  # an epoch
    read = np.concatenate([plan.batch_at(step) for step in range(19)])
    numbers = [next(n for n in range(152) if np.array_equal(rows[n], row)) for row in read]
    assert sorted(numbers) == list(range(152))
    first = numbers[:8]
    gaps = [abs(a - b) for a in first for b in first if a != b]
    assert min(gaps) > 8, "neighbours in a batch come from far apart"


@pytest.mark.parametrize("spread", [False, True])
def test_epochs_repeat_the_same_batches(spread, source):
    plan = batches(source[0], spread_rows=spread, steps=40, epochs_allowed=3)
    for step in (0, 5, 18):
        assert np.array_equal(plan.batch_at(step), plan.batch_at(step + 19))
    for allowed, steps in ((1, 20), (2, 39)):
        with pytest.raises(UserError, match="--epochs_allowed"):
            batches(source[0], spread_rows=spread, steps=steps, epochs_allowed=allowed)
        batches(source[0], spread_rows=spread, steps=steps - 1, epochs_allowed=allowed)


def naive_documents(tokens, room, most):
    """Rows of documents, each cut to `most` and to what is left of its row."""
    rows, row, document = [], [], []
    for token in [*tokens.tolist(), 256]:
        if token == 256 and document:
            row += document[:most][: room - len(row)]
            document = []
            if len(row) == room:
                rows.append(row)
                row = []
        if document or token == 256:
            document.append(token)
    return torch.tensor(rows)


@pytest.mark.parametrize("most", [7, 20, 1000])
def test_rows_that_start_at_documents(most, tmp_path):
    shards, expected = [], []
    for number in range(2):
        tokens = text(1500, number)
        tokens[:: 31 + number] = 256
        tokens[0] = 5  # what comes before the first document is not read
        write_shard(tmp_path / f"train_{number}.bin", tokens)
        expected.append(naive_documents(tokens, T + 1, most))
    steps = len(expected[0]) // 2 + len(expected[1]) // 2  # of two rows; none crosses shards
    columns = dict(batch_tokens=2 * T, max_document=most, steps=steps)
    config = tiny(**columns, momentum_warmup=1, spread_rows=False)
    shards = Shards(f"{tmp_path}/train_*.bin", "train_files", 256)
    plan = Batches(shards, config)
    rows = torch.cat([part[: len(part) // 2 * 2] for part in expected])
    read = np.concatenate([plan.batch_at(step) for step in range(steps)])
    assert np.array_equal(read, rows.numpy()) and len(rows) > 20
    assert (rows[:, 0] == 256).all()
    longer = tiny(**columns | dict(steps=steps + 1), momentum_warmup=1, spread_rows=False)
    with pytest.raises(UserError, match=f"documents for {steps} of {steps + 1} updates"):
        Batches(shards, longer)


# ----------------------------------------------------------------------------------- during the run
def test_a_shard_cut_during_the_run_is_one_line(folder):
    def cut(run):
        os.truncate(folder / "train_000001.bin", 1500)

    with at_step(3, cut):
        outcome = run(flags(folder, val_every=0))
    check_refused(outcome, "train_000001.bin: cut short during the run")


@pytest.mark.long
def test_the_same_batches_again_after_a_restart(folder, monkeypatch):
    """Two runs, and one that resumes, train on the same tokens step by step."""
    seen, forward_backward = [], train_gpt.forward_backward

    def watch(run, batch):
        (part,) = batch.parts
        seen.append((part["tokens"], part["targets"]))
        return forward_backward(run, batch)

    monkeypatch.setattr(train_gpt, "forward_backward", watch)
    runs = []
    for extra in ({}, dict(checkpoint_every=5, checkpoint_keep=9), dict(resume=True)):
        seen.clear()
        if "resume" in extra:
            (extra["resume"],) = folder.glob("checkpoints/*/step_000005.pt")
        assert run(flags(folder, **extra)).code == 0
        runs.append(seen[-7 if "resume" in extra else -12 :])  # before them, the warm-up's
    plan = batches(folder)
    whole = [plan.batch_at(step) for step in range(12)]
    expected = [(rows[:, :-1], rows[:, 1:]) for rows in whole]
    for batches_seen in runs:
        ours = zip(batches_seen, expected[-len(batches_seen) :], strict=True)
        assert all(np.array_equal(x, x2) and np.array_equal(y, y2) for (x, y), (x2, y2) in ours)


def test_the_loader_makes_batches_in_order_and_raises_what_went_wrong():
    def make(step):
        if step == 12:
            raise train_gpt.UserError("cut short during the run")
        return 10 * step

    loader = train_gpt.Loader(make, range(5, 20))
    assert [next(loader) for _ in range(7)] == [10 * step for step in range(5, 12)]
    with pytest.raises(train_gpt.UserError, match="cut short"):
        next(loader)


@pytest.mark.long
def test_a_run_with_the_loader_is_one_without(tmp_path, monkeypatch):
    """A GPU has it, a CPU has not; here the CPU, too, and a shard that is cut short meanwhile."""
    data = make_data(tmp_path)
    plain = run(flags(data))

    def on_a_thread(function, *values):
        of_batches = getattr(function, "__name__", "") == "make"
        return train_gpt.Loader(function, *values) if of_batches else map(function, *values)

    monkeypatch.setattr(train_gpt, "map", on_a_thread, raising=False)
    assert run(flags(data)).losses() == plain.losses()
    read, calls = train_gpt.Shards.read, []

    def fails(self, row):
        calls.append(row)
        train_gpt.fail_if(len(calls) > 40, "a shard, cut short during the run")
        return read(self, row)

    monkeypatch.setattr(train_gpt.Shards, "read", fails)
    check_refused(run(flags(data)), "a shard, cut short during the run")
