"""The pieces of the recipe of January 2026, each by the property that it must have.

That all of them together equal the public script is shown by `python -m records parity LOG`.
"""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Ranks

import train_gpt

SMALL = train_gpt.PRESETS["gpt2_small"]
TINY = dataclasses.replace(
    SMALL,
    vocab_size=257,
    n_layer=4,
    n_head=4,
    n_embd=64,
    seq_len=32,
    val_seq_len=0,
    val_tokens=64,
    max_document=0,
    batch_tokens=(64, 128, 192, 192),
    window=(12, 18, 24, 28),
    short_window=(4, 8, 12, 14),
    final_window=0,
    bigram_rows=500,
    steps=14,
    extension=2,
    bf16=False,
    device="cpu",
    compile=False,
)
PIECES = dict(
    value_embeds=False,
    smear=False,
    backout=False,
    attention_gate=False,
    attention_factors=False,
    paired_heads=False,
    key_offset=False,
    bigram_rows=0,
    middle_skip=False,
    multi_token=False,
)


def lively(config) -> train_gpt.GPT:
    """A model none of whose weights is zero, so that every path shows."""
    model = train_gpt.GPT(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model


def random_tokens(rows: int = 2, length: int = 32) -> torch.Tensor:
    return torch.randint(256, (rows, length), generator=torch.Generator().manual_seed(2))


# ----------------------------------------------------------------------------------------- model
@pytest.mark.parametrize("off", [(), *[(piece,) for piece in PIECES], tuple(PIECES)])
def test_no_piece_looks_ahead(off):
    model = lively(dataclasses.replace(TINY, **{piece: PIECES[piece] for piece in off}))
    tokens = random_tokens()
    changed = tokens.clone()
    changed[:, 20:] = (changed[:, 20:] + 7) % 256
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.allclose(before[:, :20], after[:, :20], atol=1e-5)
    assert not torch.allclose(before[:, 20:], after[:, 20:], atol=1e-2)


@pytest.mark.parametrize("paired", [True, False])
def test_attention_stays_within_a_document(paired):
    off = dict(smear=False, key_offset=False, bigram_rows=0)  # these cross borders, as the record's
    model = lively(dataclasses.replace(TINY, paired_heads=paired, **off))
    tokens = random_tokens()
    tokens[:, 10] = 256
    changed = tokens.clone()
    changed[:, :10] = (changed[:, :10] + 7) % 256
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.allclose(before[:, 10:], after[:, 10:], atol=1e-5)
    assert not torch.allclose(before[:, :10], after[:, :10], atol=1e-2)


def test_windows_hold():
    config = dataclasses.replace(TINY, **PIECES, n_layer=1, window=(5,), short_window=(0,))
    model = lively(config)
    tokens = random_tokens()
    changed = tokens.clone()
    changed[:, 8] = (changed[:, 8] + 7) % 256
    with torch.no_grad():
        differs = (model(tokens) - model(changed)).abs().amax((0, 2)) > 1e-5
    assert differs.nonzero().flatten().tolist() == [8, 9, 10, 11, 12, 13]  # itself and five on


@pytest.mark.parametrize("piece", ["value_embeds", "smear"])
def test_what_starts_at_zero_changes_nothing(piece):
    with_it, without = (
        train_gpt.GPT(TINY),
        train_gpt.GPT(dataclasses.replace(TINY, **{piece: False})),
    )
    with torch.no_grad():
        tokens = random_tokens()
        assert torch.equal(with_it(tokens), without(tokens))


@pytest.mark.parametrize("n_layer", [4, 11, 12, 24, 48])
def test_layer_plan(n_layer):
    plan = train_gpt.layer_plan(dataclasses.replace(SMALL, n_layer=n_layer))
    attending = [layer for layer in plan if layer.attention]
    assert len(attending) == n_layer - 1 and plan[-1].long and plan[-1].attention
    assert sum(layer.long for layer in attending) == 2
    assert all(layer.attention and not layer.long for layer in plan if layer.paired)
    assert all(layer.attention for layer in plan if layer.table is not None)
    (skip,) = [i for i, layer in enumerate(plan) if layer.skip is not None]
    assert not plan[skip].attention and plan[skip].skip < skip


def test_layer_plan_at_eleven_layers_is_the_record():
    plan = train_gpt.layer_plan(SMALL)
    assert [i for i, layer in enumerate(plan) if not layer.attention] == [6]
    assert [i for i, layer in enumerate(plan) if layer.long and layer.attention] == [3, 10]
    assert [i for i, layer in enumerate(plan) if layer.paired] == [0, 2, 5, 9]
    tables = {i: layer.table for i, layer in enumerate(plan) if layer.table is not None}
    assert tables == {0: -2, 1: -1, 8: -3, 9: -2, 10: -1} and plan[6].skip == 3


@pytest.mark.parametrize("preset", ["laptop", "nov2024", "gpt2_small"])
def test_every_parameter_is_read(preset):
    """A table that no layer looks into would be counted, updated and saved all the same."""
    whole = train_gpt.PRESETS[preset]
    small = dict(n_embd=48, n_head=2, vocab_size=257, bf16=False, seq_len=32, val_seq_len=0)
    small |= dict(batch_tokens=(64,), val_tokens=32, max_document=0, ngram_rows=64)
    small |= dict(bigram_rows=min(99, whole.bigram_rows), zero_init=False, compile=False)
    model = train_gpt.GPT(dataclasses.replace(whole, **small))
    tokens = torch.randint(257, (2, 33))
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


def test_bigram_rows_by_hand():
    rows = 251520
    tokens = torch.tensor([[50256, 100, 7, 40000]])
    found = train_gpt.bigram_rows(tokens, rows)[0].tolist()
    assert found[0] == rows - 1  # no token before
    assert found[1] == 223063  # where 27191 * 251519 wraps in int32
    assert found[2] == ((36313 * 7) ^ (27191 * 100)) % (rows - 1)
    wrapped = (36313 * 40000 + 2**31) % 2**32 - 2**31
    assert found[3] == (wrapped ^ (27191 * 7)) % (rows - 1)


def test_paired_heads_interleave():
    x = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5)  # [B, T, H, head_dim]
    y = train_gpt.interleave(x)
    assert torch.equal(y[:, 0::2], x[:, :, :2]) and torch.equal(y[:, 1::2], x[:, :, 2:])


def test_yarn_gives_the_records_scales():
    scales = [train_gpt.rotary_at(step, SMALL)[1] for step in (0, 519, 520, 1040, 1560)]
    assert scales == pytest.approx([0.1, 0.1, 0.11695, 0.12752, 0.13178], abs=1e-5)
    first, last = (train_gpt.rotary_at(step, SMALL)[0] for step in (0, 1599))
    assert last[0] == first[0] and last[-1] == pytest.approx(first[-1] * 384 / 1664)


# --------------------------------------------------------------------------------- loss, schedules
def test_later_tokens_count_in_training_alone():
    model = lively(TINY)
    tokens = random_tokens(length=33)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    logits = model(inputs).double().log_softmax(-1)
    plain = -logits.gather(-1, targets[..., None]).mean()
    assert model(inputs, targets).item() == pytest.approx(plain.item(), rel=1e-5)
    model.train().set_stage(1)
    t = 3 * 1 / 12  # share of the first third
    second = -logits[:, :-1].gather(-1, targets[:, 1:, None]).sum() / targets.numel()
    third = -logits[:, :-2].gather(-1, targets[:, 2:, None]).sum() / targets.numel()
    expected = plain + 0.5 * second + 0.25 * (1 - t) * third
    assert model(inputs, targets).item() == pytest.approx(expected.item(), rel=1e-5)
    model.set_stage(13)
    assert model(inputs, targets).item() == pytest.approx(model.eval()(inputs, targets).item())


def test_schedules_of_record_62():
    c = SMALL
    tokens = [train_gpt.at_step(c.batch_tokens, step, c) for step in range(c.steps)]
    assert sum(tokens) == 424_673_280
    assert [tokens.index(size) for size in (131072, 262144, 393216)] == [0, 520, 1040]
    rates = {0: 1.0, 520: 1.0, 521: 1.52, 701: 1.52, 1040: None, 1559: None, 1560: 0.1, 1599: 0.1}
    for step, rate in rates.items():
        left = min(1, (1 - step / 1560) / 0.55)
        factor = 1.0 if step <= 520 else 1.52 if step <= 1040 else 1.73
        expected = rate if rate is not None else factor * left + 0.1 * (1 - left)
        assert train_gpt.lr_at(step, c) == pytest.approx(expected), step
    momenta = [train_gpt.momentum_at(step, c) for step in (0, 150, 300, 1550, 1575, 1599)]
    assert momenta == pytest.approx([0.85, 0.9, 0.95, 0.95, 0.9, 0.852])
    ahead = {0: 3, 519: 3, 520: 2, 1039: 2, 1040: 1, 1599: 1}
    assert {step: len(train_gpt.prediction_weights(step, c)) for step in ahead} == ahead
    assert train_gpt.tied_at(1041, c) and not train_gpt.tied_at(1043, c)
    parting = [step for step in range(1, c.steps, 2) if not train_gpt.tied_at(step, c)]
    assert parting[0] == 1043  # the last update of both as one is number 1041


# ------------------------------------------------------------------------------------------- data
def test_rows_start_at_documents(tmp_path):
    lengths = [5, 30, 3, 17, 60, 8, 9, 40, 2, 2, 70, 11, 25]
    tokens = np.concatenate([[256, *range(1, n)] for n in lengths]).astype("<u2")
    path = tmp_path / "train_000000.bin"
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    path.write_bytes(header.tobytes() + tokens.tobytes())
    shards = train_gpt.Shards(str(path), "train_files", 15, max_document=12, mark=256)
    rows = shards.read(range(len(shards)))
    assert rows.shape[1] == 16 and len(rows) >= 5
    assert (rows[:, 0] == 256).all()
    for row in rows.tolist():
        starts = [i for i, token in enumerate(row) if token == 256] + [len(row)]
        for start, end in zip(starts, starts[1:], strict=False):
            assert end - start <= 12
            assert row[start:end] == [256, *range(1, end - start)]  # a document from its start
    firsts = [length for length in lengths if length > 0]
    assert len(firsts) >= sum((rows == 256).sum(1).tolist()) > len(rows)


# -------------------------------------------------------------------------------------- optimizers
def run_of(config) -> train_gpt.Run:
    run = train_gpt.build(config, train_gpt.Runtime(torch.device("cpu")))
    run.optimizers = train_gpt.make_optimizers(run)
    return run


def train(run, steps):
    for step in steps:
        run.step = step
        train_gpt.set_stage(run)
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(257, (2, 33), generator=generator)
        train_gpt.forward_backward(run, tokens[:, :-1], tokens[:, 1:], 2)
        train_gpt.update(run)


def test_wte_and_lm_head_are_one_until_they_part():
    run = run_of(TINY)  # 12 steps in three stages: they part at step 8, where Adam steps next, 9
    model = run.model
    train(run, range(10))
    assert torch.equal(model.wte.weight, model.lm_head.weight)
    states = {optimizer.name: optimizer.gather_state() for optimizer in run.optimizers}
    for name in ("exp_avg", "exp_avg_sq"):
        head, wte = states["Adam lm_head.weight"][name], states["Adam wte.weight"][name]
        assert torch.equal(head, wte) and head.abs().sum() > 0
    train(run, range(10, 12))
    assert not torch.equal(model.wte.weight, model.lm_head.weight)


def test_adam_steps_every_other_update():
    run = run_of(TINY)
    table, matrix = run.model.value_embeds[0].weight, run.model.blocks[0].mlp.down.weight
    seen = []
    for step in range(4):
        before = table.detach().clone(), matrix.detach().clone()
        train(run, [step])
        seen.append((not torch.equal(before[0], table), not torch.equal(before[1], matrix)))
    assert [adam for adam, _ in seen] == [False, True, False, True]
    assert all(muon for _, muon in seen)


def test_decay_is_cautious():
    run = run_of(dataclasses.replace(TINY, decay_muon=50.0))
    (stack,) = [o for o in run.optimizers if "blocks.0.attn.q.weight" in o.named]
    stack.weights.fill_(1.0)
    half = torch.ones_like(stack.weights)
    half[..., ::2] = -1.0
    stack.update = lambda g: half
    before = stack.weights.clone()
    stack.step()
    rate = stack.lr * stack.row_scale
    down = before - rate * (1 + 50.0 * stack.lr)  # the update shrinks it, too: decay joins in
    up = before + rate
    assert torch.allclose(stack.weights, torch.where(half > 0, down, up))


def test_polar_express_makes_matrices_orthogonal():
    g = torch.randn(3, 40, 24, generator=torch.Generator().manual_seed(3))
    values = torch.linalg.svdvals(train_gpt.newton_schulz(g, torch.float32, True))
    assert values.min() > 0.8 and values.max() < 1.2
    plain = torch.linalg.svdvals(train_gpt.newton_schulz(g, torch.float32))
    assert (values - 1).abs().mean() < (plain - 1).abs().mean()


# -------------------------------------------------------------------------------------- whole runs
@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    generator = np.random.default_rng(0)
    for name, count in {"train_000000": 9000, "val_000000": 2000}.items():
        tokens = generator.integers(1, 3, count).cumsum() % 64
        tokens[::29] = 256
        header = np.zeros(256, "<i4")
        header[:3] = 20240520, 1, count
        (folder / f"{name}.bin").write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())
    return folder


def flags(folder: Path, **more) -> list[str]:
    changed = {
        name: value
        for name, value in vars(TINY).items()
        if value != getattr(SMALL, name) and name not in ("compile", "attention", "bf16")
    }
    changed |= dict(train_files=f"{folder}/train_*.bin", val_files=f"{folder}/val_*.bin")
    changed |= dict(max_document=24, val_every=5, log_dir=f"{folder}/logs", **more)
    words = ["--preset", "gpt2_small", "--no_bf16"]
    for name, value in changed.items():
        values = value if isinstance(value, tuple) else (value,)
        words += [f"--{name}", *map(str, values)]
    return words


def result(folder: Path) -> dict:
    newest = max((folder / "logs").glob("*.txt"), key=os.path.getmtime)
    return json.loads(newest.read_text().splitlines()[-1])


def test_resume_across_stages_is_bit_for_bit(shards):
    folder = f"{shards}/checkpoints"
    saving = dict(checkpoint_every=2, checkpoint_keep=9, checkpoint_dir=folder)
    assert train_gpt.main(flags(shards, **saving)) == 0
    whole = result(shards)
    (run,) = Path(folder).iterdir()
    final = train_gpt.read_checkpoint(run / "step_000014.pt")["model"]
    for step in (4, 10):
        resumed = flags(shards, **saving, resume=f"{run}/step_{step:06d}.pt")
        assert train_gpt.main(resumed) == 0
        assert result(shards)["val_loss"] == whole["val_loss"]
        newest = max(Path(folder).glob("*/step_000014.pt"), key=os.path.getmtime)
        again = train_gpt.read_checkpoint(newest)["model"]
        assert all(torch.equal(final[name], again[name]) for name in final)


def test_two_ranks_agree_with_one(shards):
    assert train_gpt.main(flags(shards)) == 0
    alone = result(shards)["val_loss"]
    outcomes = Ranks(shards, [flags(shards)] * 2).wait(120)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    assert result(shards)["val_loss"] == pytest.approx(alone, abs=2e-4)


@pytest.mark.parametrize(
    "method",
    [dict(relora=4), dict(galore=8), dict(lawa=2), dict(sparsity=0.5)],
    ids=lambda method: next(iter(method)),
)
def test_methods_train_the_recipe(shards, method):
    assert train_gpt.main(flags(shards, **method)) == 0
    assert result(shards)["val_loss"] < 5.5  # from log 257 = 5.55


def test_down_has_its_own_rate():
    run = run_of(TINY)  # lr_down 4; √(out / in) is 2 for up, 1 for down
    (stack,) = [o for o in run.optimizers if "blocks.0.mlp.up.weight" in o.named]
    rates = dict(zip(stack.named, stack.row_scale.flatten().tolist(), strict=False))
    assert {rates[name] for name in rates if "up" in name} == {2.0}
    assert {rates[name] for name in rates if "down" in name} == {4.0}


def test_gradients_of_the_sum_grow_with_the_tokens_alone():
    """An eighth of the sum over this rank's tokens, whatever the ranks and micro-batches."""
    x, y = random_tokens(rows=4), random_tokens(rows=4).roll(1)
    for ranks, micro in ((1, 4), (1, 1), (4, 2)):
        run = train_gpt.build(TINY, train_gpt.Runtime(torch.device("cpu"), 0, ranks))
        train_gpt.forward_backward(run, x, y, micro)
        by_hand = train_gpt.build(TINY, train_gpt.Runtime(torch.device("cpu"))).model
        (by_hand(x, y) * x.numel() / 8).backward()
        expected = dict(by_hand.named_parameters())
        for name, p in run.model.named_parameters():
            torch.testing.assert_close(p.grad, expected[name].grad, rtol=1e-3, atol=1e-5)
