"""`python -m records cost`: an estimate from tokens and operations, no measurement."""

import dataclasses

import pytest
import torch

import train_gpt
from records.tools import cost


def test_tokens_of_a_schedule():
    """Three equal stages of 7 updates have 3, 2 and 2."""
    nov2024 = train_gpt.PRESETS["nov2024"]
    config = dataclasses.replace(nov2024, steps=7, batch_tokens=(1024, 2048, 3072))
    assert cost.tokens_of(config) == 3 * 1024 + 2 * 2048 + 2 * 3072


def test_the_public_record_is_the_yardstick(capsys):
    """3242 steps of 524,288 tokens, 798.1M operations each: 467.6 s are 36.6 % of eight H100."""
    preset = train_gpt.PRESETS["nov2024"]
    assert cost.tokens_of(preset) == 1_699_741_696
    assert cost.operations_of(preset) / 1_699_741_696 == pytest.approx(798.1e6, rel=1e-3)
    assert cost.main(["--utilisation", "0.3664"]) == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if "`nov2024`" in line)
    assert float(line.split("|")[5]) == pytest.approx(467.6 / 60, abs=0.05)
    assert "An estimate" in out and "reached 37%" in out


def test_flags_and_mistakes(capsys):
    assert cost.main(["--", "--preset", "nov2024", "--steps", "6484"]) == 0
    assert "| 3,399.5 M |" in capsys.readouterr().out
    assert cost.main(["--", "--no_such_flag", "1"]) == 2
    assert cost.main(["--utilisation", "2"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 2 and "no_such_flag" in said.err


def test_bytes_are_those_of_a_run():
    """A real run's tensors after its first update; of eight ranks each has an eighth of the
    state."""
    small = dict(n_layer=4, n_head=2, n_embd=64, vocab_size=320, bigram_rows=640, steps=20)
    config = dataclasses.replace(train_gpt.PRESETS["gpt2_small"], **small, extension=0)
    alone = train_gpt.Runtime(torch.device("cpu"))
    run = train_gpt.build(train_gpt.resolve(config, alone.device), alone)
    run.optimizers = train_gpt.make_optimizers(run)
    for optimizer in run.optimizers:
        optimizer.step()
    weights = sum(optimizer.weights.nbytes for optimizer in run.optimizers)
    assert weights == pytest.approx(sum(p.nbytes for p in run.model.parameters()), rel=0.01)
    state = sum(tensor.nbytes for o in run.optimizers for tensor in o.state.values())
    assert cost.bytes_of(config, 1) == (weights, weights, state)
    assert cost.bytes_of(config, 8)[2] == pytest.approx(state / 8, rel=0.05)


def test_memory_of_the_main_preset():
    """386.3M parameters of Adam (8 bytes of state), 75.5M of Muon (4 and NorMuon's rows)."""
    _, gradients, state = cost.bytes_of(train_gpt.PRESETS["gpt2_small"], 1)
    adam = 10 * 50304 * 768
    muon = 10 * 4 * 768**2 + 11 * 8 * 768**2
    assert state == pytest.approx(8 * adam + 4 * muon, rel=1e-3)
    assert gradients == pytest.approx(2 * 8 * 50304 * 768 + 4 * (2 * 50304 * 768 + muon), rel=1e-3)
