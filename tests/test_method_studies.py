"""records/methods: every study runs with today's trainer; middle_scale's recipes and
arithmetic."""

import sys

import pytest
from helpers import ROOT, make_data

import train_gpt

sys.path.insert(0, str(ROOT / "records" / "methods"))
import common  # noqa: E402
import lawa  # noqa: E402
import memory  # noqa: E402
import middle_scale  # noqa: E402
import relora  # noqa: E402
import supar  # noqa: E402


@pytest.fixture
def small(tmp_path) -> dict:
    """Fields of a run that takes a moment."""
    files = {f"{kind}_files": f"{make_data(tmp_path)}/{kind}_*.bin" for kind in ("train", "val")}
    sizes = dict(n_layer=1, seq_len=16, batch_tokens=64, val_tokens=64, momentum_warmup=2)
    return files | sizes | dict(steps=8)


def test_lawa_runs(small, monkeypatch):
    monkeypatch.setattr(lawa, "SMALL", common.change(lawa.SMALL, **small))
    for name, value in dict(STEPS=8, EVERY=4, INTERVALS=(1, 2), K=2).items():
        monkeypatch.setattr(lawa, name, value)
    task = dict(seed=0, cooldown=0.0, factor=1)
    modes = {
        row["mode"] for interval in (0, 2) for row in lawa.run_one(task | dict(interval=interval))
    }
    assert modes == {"raw", "eval, every 1", "eval, every 2", "replace, every 2"}


# Bytes of state: four matrices of 32 x 32, two of 128 x 32. A projection of rank 4 is 32 x 4; an
# 8-bit moment has a scale per row.
HIDDEN_STATE = {
    "Muon": 4 * 12288,
    "Adam": 4 * 2 * 12288,
    "GaLore 4": 4 * (6 * 128 + 2 * 1536),
    "GaLore 4, 8 bit": 4 * 6 * 128 + 2 * 1536 + 4 * 2 * 384,
    "GaLore 4, 8 bit, per layer": 4 * 6 * 128 + 2 * 1536 + 4 * 2 * 384,
    "ReLoRA 4": 4 * 2 * 2304,
}


@pytest.mark.parametrize("name, state", HIDDEN_STATE.items())
def test_memory_measures(name, state):
    tiny = dict(n_layer=1, n_head=2, n_embd=32, ngram=0, value_embeds=False, normuon=0.0)
    row = memory.measure("laptop", name, memory.variants(4)[name] | tiny)
    assert row["hidden_state"] == state
    saved = row["weights"] - row["gradients"]
    # hidden gradients at the peak; one at a time, they are gone when those of wte arrive
    alive = {"GaLore 4, 8 bit, per layer": 0, "ReLoRA 4": 0}
    padding = 64  # stacks of weights have some, gradients have none
    assert 0 <= saved - (4 * 12288 - alive.get(name, 4 * 12288)) < padding


@pytest.mark.parametrize(
    "variant", ["ReLoRA", "no warm start: restarts", "ReLoRA, adapters with Muon"]
)
def test_relora_runs(variant, small, monkeypatch):
    small |= dict(val_every=4)
    monkeypatch.setattr(relora, "BASE", common.change(relora.BASE, **small))
    fields = {
        name: min(value, 3) if "relora" in name else value
        for name, value in relora.VARIANTS[variant].items()
    }
    monkeypatch.setitem(relora.VARIANTS, variant, fields)
    found = relora.run_one(dict(variant=variant, lr=0.004, seed=0))
    assert set(found["val"]) == {0, 4, 8}


def test_supar_runs(small, monkeypatch):
    changed = common.change(supar.SMALL, **small | dict(batch_tokens=32))
    monkeypatch.setattr(supar, "SMALL", changed)
    monkeypatch.setattr(
        supar,
        "config_of",
        lambda width, density, optimizer, **fields: common.change(
            changed, n_embd=64, n_head=2, matrix_optimizer=optimizer, sparsity=1 - density, **fields
        ),
    )
    task = dict(width=64, density=0.5, seed=0, rule="SuPar", power=0.25, mask_first=False)
    for optimizer in ("adam", "muon"):
        rows = supar.check_run(task | dict(optimizer=optimizer, steps=1))
        assert rows and all(row["step"] == 1 for row in rows)


@pytest.mark.slow
def test_memory_follows_its_formula():
    memory.check_formula("60M")


def config_of(trainer, name, *more):
    flags = [*middle_scale.RECIPES[name], *middle_scale.SHARED, *more]
    return trainer.parse_config(flags, "laptop")


def test_equal_tokens():
    """Of all that is compared, within what whole batches leave."""
    ours = train_gpt.tokens_of(config_of(train_gpt, "gpt2_small"))
    for name in middle_scale.COMPARED:
        theirs = train_gpt.tokens_of(config_of(train_gpt, name))
        assert theirs == pytest.approx(ours, rel=0.006), name


def test_where_a_curve_reaches_a_loss():
    curve = [(0, 10.0), (100, 8.0), (200, 8.5), (300, 7.0)]
    assert middle_scale.tokens_to(9.0, curve) == 50
    assert middle_scale.tokens_to(7.75, curve) == 250
    assert middle_scale.tokens_to(7.0, curve) == 300
