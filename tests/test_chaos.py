"""A small slice of chaos.py: the harness itself works, and nothing gets through in a few trials of each in-process fault."""
import random

import chaos
import pytest


@pytest.mark.parametrize("fault, count", [(chaos.checkpoints, 6), (chaos.shard_faults, 10), (chaos.flags, 8)])
def test_a_slice(fault, count, tmp_path):
    text, fine = fault(count, random.Random(7), tmp_path)
    assert fine, text


def test_the_harness_can_fail(tmp_path, monkeypatch):
    """With the hashes of the shards unchecked, damage inside the tokens is trained on, and the harness says so."""
    monkeypatch.setattr(chaos.shards, "record", lambda folder, digests: None)
    assert not chaos.shard_faults(12, random.Random(7), tmp_path)[1]
