"""records/methods: every study runs with today's trainer; middle_scale's recipes, arithmetic, and
edit of the trainer."""

import dataclasses
import importlib.util
import sys

import pytest
import torch
from helpers import ROOT, make_data

import train_gpt

sys.path.insert(0, str(ROOT / "records" / "methods"))
import lawa  # noqa: E402
import memory  # noqa: E402
import middle_scale  # noqa: E402
import relora  # noqa: E402
import supar  # noqa: E402


@pytest.fixture
def small(tmp_path) -> dict:
    """Fields of a run that takes a moment."""
    files = {f"{kind}_files": f"{make_data(tmp_path)}/{kind}_*.bin" for kind in ("train", "val")}
    sizes = dict(n_layer=1, seq_len=16, batch_tokens=(64,), val_tokens=64, momentum_warmup=2)
    return files | sizes | dict(steps=8)


def test_lawa_runs(small, monkeypatch):
    monkeypatch.setattr(lawa, "SMALL", dataclasses.replace(lawa.SMALL, **small))
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
    alive = {"GaLore 4, 8 bit, per layer": 4 * 4096, "ReLoRA 4": 0}  # of hidden gradients
    assert saved == 4 * 12288 - alive.get(name, 4 * 12288)


@pytest.mark.parametrize(
    "variant", ["ReLoRA", "no warm start: restarts", "ReLoRA, adapters with Muon"]
)
def test_relora_runs(variant, small, monkeypatch):
    small |= dict(val_every=4)
    monkeypatch.setattr(relora, "BASE", dataclasses.replace(relora.BASE, **small))
    fields = {
        name: min(value, 3) if "relora" in name else value
        for name, value in relora.VARIANTS[variant].items()
    }
    monkeypatch.setitem(relora.VARIANTS, variant, fields)
    found = relora.run_one(dict(variant=variant, lr=0.004, seed=0))
    assert set(found["val"]) == {0, 4, 8}


def test_supar_runs(small, monkeypatch):
    changed = dataclasses.replace(supar.SMALL, **small | dict(batch_tokens=(32,)))
    monkeypatch.setattr(supar, "SMALL", changed)
    monkeypatch.setattr(
        supar,
        "config_of",
        lambda width, density, optimizer, **fields: dataclasses.replace(
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
    """Of what is compared but for the longer run, within what whole batches leave."""
    for pair in middle_scale.COMPARED.items():
        if pair[0].startswith("sampled"):
            continue  # flags of the patch
        configs = [config_of(train_gpt, name) for name in pair]
        one, other = (
            sum(train_gpt.at_step(c.batch_tokens, step, c) for step in range(c.steps))
            for c in configs
        )
        longer = {"nov2024, whole": 1662976}
        assert one == pytest.approx(longer.get(pair[0], other), rel=0.006), pair


def test_where_a_curve_reaches_a_loss():
    curve = [(0, 10.0), (100, 8.0), (200, 8.5), (300, 7.0)]
    assert middle_scale.tokens_to(9.0, curve) == 50
    assert middle_scale.tokens_to(7.75, curve) == 250
    assert middle_scale.tokens_to(7.0, curve) == 300


@pytest.fixture(scope="module")
def patched(tmp_path_factory):
    path = middle_scale.trainer_of("sampled softmax", tmp_path_factory.mktemp("logs"))
    spec = importlib.util.spec_from_file_location("sampled_softmax_trainer", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def losses(trainer, sampled, count):
    """Training losses of one batch under samples of the vocabulary; the gradient of the first."""
    small = "--n_embd 32 --vocab_size 1000 --bigram_rows 640 --no_bf16 --sampled_softmax"
    c = config_of(trainer, "gpt2_small", *small.split(), str(sampled))
    alone = trainer.Runtime(torch.device("cpu"))
    model = trainer.build(trainer.resolve(c, alone.device), alone).model.train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    tokens = torch.randint(1000, (1, 65), generator=generator)
    found = [model(tokens[:, :-1], tokens[:, 1:]) for _ in range(count)]
    found[0].backward()
    return torch.stack(found).detach(), model.lm_head.weight.grad, model


def test_a_sample_of_all_is_the_whole(patched):
    whole, gradient, _ = losses(patched, 0, 1)
    loss, sampled, _ = losses(patched, 1000, 1)
    assert torch.allclose(loss, whole, rtol=1e-6)
    assert torch.allclose(sampled, gradient, rtol=1e-4, atol=1e-6)


def test_samples_agree_with_the_whole_on_average(patched):
    whole, _, full = losses(patched, 0, 1)
    found, _, model = losses(patched, 200, 100)
    error = found.std() / len(found) ** 0.5
    assert 0.001 < found.std() < 0.2
    assert abs(found.mean() - whole) < 4 * error + 0.002  # the log of a mean is above its mean
    saved = patched.flops_per_token(full) - patched.flops_per_token(model)
    rows = sum(model.head_rows) / len(model.head_rows)
    assert rows < 300 and saved == pytest.approx(6 * 32 * (1024 - rows))
