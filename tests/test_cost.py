"""`python -m records cost`: an estimate from tokens and operations, no measurement."""

import dataclasses

import pytest

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
