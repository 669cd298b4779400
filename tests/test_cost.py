"""`python -m records cost`: an estimate from tokens and operations, no measurement."""

import pytest
import torch

import train_gpt
from records.tools import cost


def test_tokens_of_a_schedule():
    """Three equal stages of 7 updates have 3, 2 and 2."""
    flags = "--steps 7 --batch_tokens 1024 2048 3072".split()
    config = train_gpt.parse_config(flags, "nov2024")
    steps = [stage.steps for stage in config.stages]
    assert cost.tokens_of(config) == sum(
        n * s for n, s in zip(steps, (1024, 2048, 3072), strict=True)
    )
    assert sorted(steps) == [2, 2, 3]


@pytest.mark.long
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
    flags = "--n_layer 4 --n_head 2 --n_embd 64 --vocab_size 320 --steps 20 --momentum_warmup 9"
    config = train_gpt.parse_config(flags.split(), "nov2024")
    alone = train_gpt.Runtime(torch.device("cpu"))
    run = train_gpt.build(train_gpt.resolve(config, alone), alone)
    run.optimizers = train_gpt.make_optimizers(run)
    for optimizer in run.optimizers:
        optimizer.reduce()
        optimizer.step()
    weights = sum(optimizer.weights.nbytes for optimizer in run.optimizers)
    assert weights == pytest.approx(sum(p.nbytes for p in run.model.parameters()), rel=0.01)
    state = sum(optimizer.state_bytes() for optimizer in run.optimizers)
    assert cost.bytes_of(config, 1) == (weights, weights, state)
    assert cost.bytes_of(config, 8)[2] == pytest.approx(state / 8, rel=0.05)


def test_memory_of_the_main_preset():
    """Adam (8 bytes) for four value tables and two ends; ANVIL's two momenta for the matrices."""
    _, gradients, state = cost.bytes_of(train_gpt.PRESETS["gpt2_small"], 1)
    tables, ends = 4 * 50304 * 768, 2 * 50304 * 768
    matrices = 12_386_304 + 11 * 2 * 2816 * 768
    assert state == pytest.approx(8 * (tables + ends + matrices), rel=0.01)
    assert gradients == pytest.approx(2 * tables + 4 * (ends + matrices), rel=0.01)


@pytest.mark.long
def test_a_small_card_gets_a_smaller_table_and_more_steps(capsys):
    assert cost.main(["--dollars_per_hour", "3"]) == 0
    out = capsys.readouterr().out
    assert "8×H100: 84,602,880 rows (121.3 GiB), 1194 steps" in out
    assert "4090: 2,115,072 rows (3.0 GiB), 1301 steps" in out and "($" in out
    line = next(line for line in out.splitlines() if "`gpt2_small`" in line)
    assert "| 328.7 M |" in line, "the record's tokens"
    operations = float(line.split("|")[3].strip(" M").replace(",", ""))
    assert operations == pytest.approx(464, rel=0.1), "as the plan of record 92 was counted by hand"
