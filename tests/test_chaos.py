"""A small slice of chaos.py: the harness works, and nothing gets through in a few trials."""

import random

import chaos
import pytest


@pytest.mark.long
@pytest.mark.parametrize(
    "fault, count", [(chaos.checkpoints, 4), (chaos.shard_faults, 8), (chaos.flags, 6)]
)
def test_a_slice(fault, count, tmp_path):
    text, fine = fault(count, random.Random(7), tmp_path)
    assert fine, text


@pytest.mark.long
def test_the_harness_can_fail(tmp_path, monkeypatch):
    """Without the hashes of the shards, damage inside the tokens is trained on, and it says so."""
    monkeypatch.setattr(chaos.check, "check_run", lambda patterns, vocab_size: None)
    monkeypatch.setattr(chaos, "damage", lambda data, rng, other: data[:-2] + b"\x47\x00")
    assert not chaos.shard_faults(1, random.Random(7), tmp_path)[1]
