"""The pieces of gpt2026 (record 92), each by the property that it must have.

That all of them together are the recipe is shown by test_record92.py, against a second form of it.
"""

import dataclasses
import math
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import CPU, tiny

import train_gpt
from train_gpt import RECORD_92, Stage

SMALL = train_gpt.PRESETS["gpt2_small"]
EOT, T = 256, 32
STAGES = (
    Stage(4, 64, T, 0, 12, 4, predictions=((1.0, 0.5, 0.25), (1.0, 0.5, 0.0)), prefix=(0.25,)),
    Stage(4, 64, T, 0, 18, 8, lr_factor=1.5, predictions=((1.0, 0.5), (1.0, 0.0))),
    Stage(4, 64, T, 0, 24, 12, lr_factor=1.7),
    Stage(4, 64, T, 0, 28, 14, extension=True),
)
TINY = dataclasses.replace(
    SMALL,
    stages=STAGES,
    vocab_size=257,
    n_head=2,
    n_embd=48,
    table_rows=600,
    val_tokens=64,
    val_seq_len=0,
    momentum_warmup=4,
    momentum_cooldown=2,
    bf16=False,
    device="cpu",
    compile=False,
)


def make(config=TINY) -> train_gpt.GPT2026:
    model = train_gpt.GPT2026(config)
    model.table.allocate(CPU)
    return model.eval()


def lively(config=TINY) -> train_gpt.GPT2026:
    """None of its weights is zero, so that every path shows."""
    model, generator = make(config), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in (*model.parameters(), model.table.rows):
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return model


def random_tokens(rows: int = 2, length: int = T, seed: int = 2) -> torch.Tensor:
    return torch.randint(256, (rows, length), generator=torch.Generator().manual_seed(seed))


def run_of(config=TINY) -> train_gpt.Run:
    run = train_gpt.build(config, CPU)
    run.optimizers = train_gpt.make_optimizers(run)
    return run


def train(run, steps, asked):
    for run.step in steps:
        train_gpt.set_stage(run)
        run.micro[2, T] = 1
        rows = random_tokens(2, T + 1, seed=run.step).numpy()
        batch = train_gpt.make_batch(run, rows, run.step, asked)
        train_gpt.forward_backward(run, batch)
        train_gpt.step_optimizers(run)


# ----------------------------------------------------------------------------------------- model
@pytest.mark.parametrize("step", [0, 4, 13, 16])
@pytest.mark.parametrize("copying", [False, True])
def test_the_model_is_causal(step, copying):
    model = lively(dataclasses.replace(TINY, copy_input=copying, token_classes=copying))
    model.set_stage(step)
    tokens = random_tokens() % 8 if copying else random_tokens()  # contexts that come again
    changed = tokens.clone()
    changed[:, 20:] = (changed[:, 20:] + 7) % 256
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.allclose(before[:, :20], after[:, :20], atol=1e-5)
    assert not torch.allclose(before[:, 20:], after[:, 20:], atol=1e-2)


def test_every_piece_is_causal():
    """Each layer's output, and each attention's, not the logits alone."""
    model, tokens, seen = lively(), random_tokens(), []
    pieces = [m for b in model.blocks for m in (b.attn, *b.mlps) if m is not None]
    pieces += [model.early_gates.w2, model.late_gates.w2, model.last_mix.w2, model.head_mix.w2]
    for piece in (*pieces, model.smear_gate, model.head_groups):
        piece.register_forward_hook(lambda module, inputs, y: seen.append(y))
    changed = tokens.clone()
    changed[:, 20] = (changed[:, 20] + 7) % 256
    with torch.no_grad():
        model(tokens)
        before, seen[:] = list(seen), []
        model(changed)
    assert len(before) == len(seen) >= 20
    for a, b in zip(before, seen, strict=True):
        assert torch.allclose(a[:, :20], b[:, :20], atol=1e-5)
        assert not torch.allclose(a[:, 20:], b[:, 20:], atol=1e-5)


def without_what_crosses_borders(model):
    """By design, the smear, the key offset and the n-grams see across a document's start."""
    with torch.no_grad():
        model.smear.zero_()
        model.table.rows.zero_()
    for block in model.blocks:
        if block.attn is not None:
            block.attn.key_offset = False
    return model


def test_documents_are_isolated():
    model = without_what_crosses_borders(lively())
    tokens = random_tokens()
    tokens[:, 10] = EOT
    changed = tokens.clone()
    changed[:, :10] = (changed[:, :10] + 7) % 256
    with torch.no_grad():
        before, after = model(tokens), model(changed)
        assert torch.allclose(before[:, 10:], after[:, 10:], atol=1e-5)
        assert not torch.allclose(before[:, :10], after[:, :10], atol=1e-2)
        whole = lively()
        assert not torch.allclose(whole(tokens)[:, 10], whole(changed)[:, 10], atol=1e-4)


@pytest.mark.parametrize("training", [False, True])
def test_segments_of_a_document_are_isolated_in_training_alone(training, monkeypatch):
    monkeypatch.setattr(train_gpt.GPT2026, "SEGMENT", 7)
    model = without_what_crosses_borders(lively())
    tokens = random_tokens()
    tokens[:, 0] = tokens[0, 10] = EOT  # segments begin at 7, 10 and 17 of row 0; 7, 14 of row 1
    docs = model.prepare(tokens.numpy(), training=training)["docs"]
    starts = [np.flatnonzero(np.diff(row)) + 1 for row in docs]
    if not training:
        assert [list(row) for row in starts] == [[10], []]
        return
    assert [list(row) for row in starts] == [[7, 10, 17, 24, 31], [7, 14, 21, 28]]
    changed = tokens.clone()
    changed[0, 12], changed[1, 9] = 3, 5
    with torch.no_grad():
        a, b = (
            model(**model.load(model.prepare(t.numpy(), training=True))) for t in (tokens, changed)
        )
    moved = (a - b).abs().amax(-1) > 1e-5
    assert moved[0].nonzero().flatten().tolist() == list(range(12, 17))
    assert moved[1].nonzero().flatten().tolist() == list(range(9, 14))


@pytest.mark.parametrize("number", [1, 3, 5])
def test_windows_hold(number):
    """Narrow and wide layers look back their windows; of paired heads' doubled sequence, too."""
    model, config = lively(), TINY
    attn, layer = model.blocks[number].attn, train_gpt.LAYERS[number]
    attn.key_offset = False
    x = torch.randn(1, T, config.n_embd, generator=torch.Generator().manual_seed(4))
    changed = x.clone()
    changed[:, 8] += 1
    docs = torch.zeros(1, T, dtype=torch.int64)
    for step in (0, 4, 13):
        model.set_stage(step)
        kind, stage = model.kind(layer), train_gpt.stage_at(step, config)[0]
        view, mask = model.views[kind], model.masks(docs)[kind]
        with torch.no_grad():
            moved = attn(changed, None, view, mask) - attn(x, None, view, mask)
        reach = stage.window if layer.wide else stage.short_window
        reach = (reach + 1) // 2 if layer.paired else reach  # tokens: half as far
        expected = list(range(8, min(T, 8 + reach + 1)))
        assert (moved.abs().amax((0, 2)) > 1e-6).nonzero().flatten().tolist() == expected


def test_windows_and_scales_of_the_record():
    model = mock.Mock(config=SMALL)
    views = {step: train_gpt.GPT2026.views_at(model, step) for step in (0, 320, 1194)}
    assert views[0]["wide"] == (0.085, (384,), 384, False)
    assert views[0]["narrow"] == (0.13, (128,), 128, False)
    assert views[320]["paired"] == (0.13, (128, 384), 384, True)
    assert views[1194]["wide"] == (0.085, (384, 896, 1408, 1664), 2560, False)
    assert views[1194]["narrow"][1:3] == ((128, 384, 640, 768), 768)


def test_yarn_by_hand():
    """What turns 32 times or more within the window stays; what turns less than once slows down as
    the window grows."""
    turns = torch.tensor([64.0, 32.0, 16.5, 1.0, 0.1]) * 2 * math.pi / 100
    slowed, scale = train_gpt.yarn(turns, 0.1, (100, 200))
    shares = [1, 1, 0.75, 0.5, 0.5]
    assert torch.allclose(slowed, turns * torch.tensor(shares))
    assert scale == pytest.approx(0.1 * (1 + 0.2 * math.log(2)))
    same, scale = train_gpt.yarn(turns, 0.1, (100,))
    assert torch.equal(same, turns) and scale == 0.1


def test_layers_are_the_record():
    def numbers(role):
        return [i for i, layer in enumerate(train_gpt.LAYERS) if getattr(layer, role)]

    assert numbers("attention") == [0, 1, 2, 3, 5, 8, 10]
    assert (numbers("wide"), numbers("thin"), numbers("paired")) == ([3, 10], [1, 8], [0, 2, 5])
    tables = [(i, s.table) for i, s in enumerate(train_gpt.LAYERS) if s.table is not None]
    assert tables == [(1, 0), (2, 1), (8, 2), (10, 3)]
    assert (numbers("xsa"), numbers("grams")) == ([1, 3], [1, 4, 5, 9])
    assert [layer.mlps for layer in train_gpt.LAYERS] == [1] * 7 + [0, 2, 1, 1]


def test_paired_heads_interleave():
    x = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5)  # [B, T, H, head_dim]
    y = train_gpt.interleave(x)
    assert torch.equal(y[:, 0::2], x[:, :, :2]) and torch.equal(y[:, 1::2], x[:, :, 2:])


def test_what_starts_at_zero_changes_nothing():
    """The smear's and the value gate's inputs, xsa, the n-grams, the head's groups, the copies."""
    plain = make()
    with torch.no_grad():
        tokens, generator = random_tokens(), torch.Generator().manual_seed(6)
        for module in plain.modules():  # what ends in zeros lets nothing through
            if isinstance(module, train_gpt.MLP):
                assert not module.down.weight.any()
        assert not plain.table.rows.any() and plain.smear == 0
        before = plain(tokens)
        lists = [b.mlps for b in plain.blocks]
        for p in [m.up.weight for mlps in lists for m in mlps] + [plain.smear_gate.weight]:
            p.add_(torch.randn(p.shape, generator=generator))
        for mix in (plain.early_gates, plain.late_gates, plain.last_mix, plain.head_mix):
            assert not mix.w2.weight.any()
            mix.w1.weight.add_(torch.randn(mix.w1.weight.shape, generator=generator))
        assert torch.equal(plain(tokens), before)
        copying = make(dataclasses.replace(TINY, copy_input=True))
        assert torch.equal(copying(tokens % 8), make()(tokens % 8))


def test_every_parameter_is_read():
    """A table that no layer looks into would be counted, updated and saved all the same."""
    config = dataclasses.replace(TINY, copy_input=True)
    run = run_of(config)
    run.micro[2, T] = 1
    rows = random_tokens(2, T + 1).numpy() % 8
    train_gpt.forward_backward(run, train_gpt.make_batch(run, rows, 0, []))
    unread = {name for name, p in run.model.named_parameters() if p.grad is None}
    # layer 7 has no MLP, layer 10 takes its numbers from a mix: the record keeps these two, too
    assert unread == {"blocks.7.post", "blocks.10.residual", "blocks.10.post"}
    assert len(run.model.table.gradients) == 2, "one of each micro-batch"


# ---------------------------------------------------------------------------------------- losses
def test_losses_of_a_stage_by_hand():
    """The next tokens by their weights, the longest token that begins the target by its own; in
    validation the mean cross-entropy alone."""
    model = lively()
    rows = random_tokens(1, T + 1)
    tokens, targets = rows[:, :-1], rows[:, 1:]
    table = np.full(320, -1)
    table[:128] = np.arange(128)[::-1]
    model.prefixes = table
    with torch.no_grad():
        for step, weights, prefix in ((1, (1, 0.5, 0.1875), 0.25), (6, (1, 0.25), 0), (9, (1,), 0)):
            model.eval().set_stage(step)
            logp = model(tokens).double().log_softmax(-1)[0]
            plain = -logp.gather(-1, targets.T).mean()
            assert model(tokens, targets).item() == pytest.approx(plain.item(), rel=1e-5)
            model.train()
            expected = 0.0
            for n, weight in enumerate(weights):
                expected -= weight * logp[: T - n].gather(-1, targets[:, n:].T).sum()
            begins = torch.from_numpy(table)[targets[0]]
            known = begins >= 0
            assert 0 < known.sum() < T
            expected -= prefix * logp[known].gather(-1, begins[known, None]).sum()
            goals = model.prepare_targets(targets.numpy(), step, 0, 1)
            inputs = model.load(model.prepare(tokens.numpy(), training=True) | goals)
            assert model(**inputs).item() == pytest.approx(expected.item() / T, rel=1e-5)


def test_head_loss_has_the_gradients_of_autograd():
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(9, 5, generator=generator, dtype=torch.double).requires_grad_()
    w = torch.randn(11, 5, generator=generator, dtype=torch.double).requires_grad_()
    goals = torch.randint(-1, 11, (9, 3), generator=generator)
    shares = torch.tensor([1.0, 0.5, 0.25], dtype=torch.double)
    cap = make().cap
    ours = train_gpt.HeadLoss.apply(x, w, goals, shares, cap, False)
    grads = torch.autograd.grad(2 * ours, (x, w))
    logp = (23 * torch.sigmoid((x @ w.T + 5) / 7.5)).log_softmax(-1)
    picked = logp.gather(1, goals.clamp(min=0)) * (goals >= 0) * shares
    torch.testing.assert_close(ours, -picked.sum())
    torch.testing.assert_close(grads, torch.autograd.grad(-2 * picked.sum(), (x, w)))


@pytest.mark.parametrize("scale", [0.005, 0.05, 0.2])
def test_a_float8_head_stays_near_the_exact_one(scale):
    generator = torch.Generator().manual_seed(8)
    x = torch.nn.functional.rms_norm(torch.randn(64, 48, generator=generator), (48,))
    w = scale * torch.randn(320, 48, generator=generator)
    goals = torch.randint(-1, 320, (64, 2), generator=generator)
    shares, cap, found = torch.tensor([1.0, 0.5]), make().cap, []
    for kind, fp8 in ((torch.double, False), (torch.bfloat16, True)):
        leaves = x.to(kind).requires_grad_(), w.to(kind).requires_grad_()
        loss = train_gpt.HeadLoss.apply(
            *leaves, goals, shares.to(torch.promote_types(kind, torch.float32)), cap, fp8
        )
        found.append((loss.double(), *(g.double() for g in torch.autograd.grad(loss, leaves))))
    (loss, *exact), (loss8, *near) = found
    assert 0 < (loss8 / loss - 1).abs() < 2e-3
    for g8, g in zip(near, exact, strict=True):
        assert 1e-4 < (g8 - g).norm() / g.norm() < 0.1


def test_the_sampled_loss_over_all_classes_is_the_full_one():
    model = lively().train()
    model.set_stage(9)
    rows = random_tokens(1, T + 1).numpy()
    full = model.prepare_targets(rows[:, 1:], 9, 0, 1)
    place = np.random.default_rng(8).permutation(320)  # whatever the order of the classes
    inverse = np.argsort(place)
    assert set(full) == {"targets"}
    sampled = {"targets": inverse[full["targets"]], "classes": place}
    losses = []
    for goals in (full, sampled):
        inputs = model.load(model.prepare(rows[:, :-1], training=True) | goals)
        losses.append(model(**inputs))
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    grads = [torch.autograd.grad(loss, model.lm_head.weight)[0] for loss in losses]
    torch.testing.assert_close(*grads)


def test_candidates_hold_every_target_and_sweep_the_vocabulary():
    sets = train_gpt.CandidateSets(320)
    targets, met = np.array([3, 3, 9, 300]), set()
    for _ in range(40):
        classes = sets.draw(targets, 20, 1, 4)
        assert len(classes) == 20 and (np.diff(classes) > 0).all()
        assert set(targets) <= set(classes.tolist())
        met |= set(classes.tolist())
    assert len(met) > 200, "the sweep goes on"
    assert sets.places.keys() == {1}, "rows have their own sweeps"
    assert sets.draw(targets, 2, 1, 4) is None, "more targets than classes"
    assert sets.draw(targets, 3, 0, 4).tolist() == [3, 9, 300]
    assert len(sets.draw(targets, 320, 2, 4)) == 320


def test_the_warm_up_meets_the_sampled_softmax():
    """With as many classes as a row has targets, evenly drawn tokens would be too many."""
    stages = (dataclasses.replace(STAGES[0], candidates=(20,)), *STAGES[1:])
    c = dataclasses.replace(TINY, stages=stages)
    run = train_gpt.Run(c, CPU, make(c), [])
    run.micro[1, T] = 1
    rows = train_gpt.random_rows(run, 1, T)
    (part,) = train_gpt.make_batch(run, rows, 0, []).parts
    assert len(part["classes"]) == 20
    run.step = c.steps - 1
    assert train_gpt.random_rows(run, 1, T).max() > 20


def test_sampled_targets_number_the_candidates():
    stages = (dataclasses.replace(STAGES[0], candidates=(100,)), *STAGES[1:])
    model = make(dataclasses.replace(TINY, stages=stages))
    targets = random_tokens(1).numpy()
    whole = make().prepare_targets(targets, 0, 0, 2)["targets"]
    some = model.prepare_targets(targets, 0, 0, 2)
    assert len(some["classes"]) == 100 and some["targets"].shape == (1, T, 4)
    asked = some["targets"] >= 0
    assert (some["classes"][some["targets"][asked]] == whole[asked]).all()
    assert (asked[..., :3] == (whole[..., :3] >= 0)).all(), "next tokens are always candidates"


# ---------------------------------------------------------------------- n-grams, classes, copies
def test_hashes_by_hand():
    rows, half = 600, 300
    x = np.array([[256, 100, 7, 40000]])
    (two, three), (sign2, sign3) = train_gpt.ngram_hashes(x, rows)

    def wrap(n):
        return (n + 2**31) % 2**32 - 2**31

    reserved = wrap(27191 * 299)  # what stands before the row
    assert two[0].tolist() == [
        299,
        wrap((36313 * 100) ^ reserved) % 299,
        ((36313 * 7) ^ (27191 * 100)) % 299,
        (wrap(36313 * 40000) ^ (27191 * 7)) % 299,
    ]
    assert three[0, :2].tolist() == [599, 599]
    assert three[0, 2] == half + ((17351 * 7) ^ (60961 * 100) ^ (45259 * 256)) % 299
    hashed = wrap(17351 * 40000) ^ (60961 * 7) ^ (45259 * 100)
    assert three[0, 3] == half + hashed % 299
    assert sign2[0, 0] == 0 and sign3[0, :2].tolist() == [0, 0]
    assert sign2[0, 2] == ((48271 * 7) ^ (30011 * 100)) % 8192
    assert sign3[0, 2] == ((58699 * 7) ^ (39779 * 100) ^ (26801 * 256)) % 8192


def test_the_table_is_a_dense_embedding():
    """plan, look_up and merged give the values and gradients of autograd."""
    run = run_of()
    model, table = run.model.train(), run.model.table
    table.rows.normal_(generator=torch.Generator().manual_seed(9))
    dense, asked = table.rows.clone().requires_grad_(), []
    for seed in (1, 2, 3):
        tokens = (random_tokens(seed=seed) % 5).numpy()  # rows that are asked for many times
        lookup = table.plan(tokens)
        found = table.look_up(lookup, model.to_device)
        rows, signs = map(torch.from_numpy, train_gpt.ngram_hashes(tokens, 600))
        expected = (dense[rows] * table.signs[signs]).sum(0)
        assert torch.equal(found, expected)
        weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(seed))
        (found * weight).sum().backward()
        (expected * weight).sum().backward()
        asked.append(lookup.asked)
    merged, named = torch.zeros_like(dense), []
    table.merge = table.plan_merge(asked, at_once=7)
    for rows, g in table.merged(torch.as_tensor):
        merged[rows] = g
        named += rows.tolist()
        assert 0 < len(rows) <= 7
    assert len(named) > 7 and not table.gradients and table.merge is None
    torch.testing.assert_close(merged, dense.grad)
    assert named == dense.grad.any(1).nonzero().flatten().tolist()


def test_row_adam_by_hand():
    """No momentum, a second moment per row; cautious decay; rows without a gradient stay."""
    run = run_of()
    table, adam = run.model.table, next(o for o in run.optimizers if o.name == "RowAdam")
    generator = torch.Generator().manual_seed(10)
    table.rows.normal_(generator=generator)
    rows, square = table.rows.clone(), torch.zeros(600)
    for number, step in enumerate((1, 3, 5, 7), 1):
        adam.set_stage(step)
        rare = step >= train_gpt.rare_from(TINY)
        beta2, decay = (0.95**2, 0.05) if rare else (0.95, 0.025)
        rate = 0.56 * train_gpt.lr_at(step, TINY)
        asked = [np.array([4, 9, 300]), np.array([9, 599])]
        gradients = [torch.randn(len(names), 48, generator=generator) for names in asked]
        table.gradients, table.merge = gradients, table.plan_merge(asked)
        adam.step()
        g = torch.zeros(600, 48)
        for names, values in zip(asked, gradients, strict=True):
            g[names] += values
        moved = g.any(1)
        square = beta2 * square + (1 - beta2) * g.square().mean(1)
        size = rate * (1 - beta2**number) ** 0.5
        u = size * g / (square.sqrt() + 1e-10)[:, None]
        new = rows - u - (u * rows > 0) * rate * rate * decay * rows
        rows = torch.where(moved[:, None], new, rows)
        torch.testing.assert_close(table.rows, rows)
        torch.testing.assert_close(table.squares, square)
        assert not table.gradients and table.merge is None
    assert moved.nonzero().flatten().tolist() == [4, 9, 300, 599]


@pytest.mark.parametrize(
    "gib, rows, more",
    [(0, 377_280, 180), (24, 2_115_072, 107), (32, 4_230_144, 81), (79.1, 21_150_720, 27)],
)
def test_the_table_is_as_large_as_memory_allows(gib, rows, more):
    memory = mock.PropertyMock(return_value=int(gib * 2**30))
    with mock.patch.object(train_gpt.Runtime, "memory", memory):
        c = train_gpt.with_table(SMALL, CPU)
        assert (c.table_rows, c.steps) == (rows, 1194 + more)
        assert [s.steps for s in c.stages] == [320, 361, 426 + more, 67, 20]
        eight = train_gpt.with_table(SMALL, dataclasses.replace(CPU, world_size=8))
        shared = {0: 377_280, 24: 8_460_288, 32: 21_150_720, 79.1: 84_602_880}
        assert eight.table_rows == shared[gib]
        given = train_gpt.with_table(dataclasses.replace(SMALL, table_rows=4_230_144), CPU)
        assert (given.table_rows, given.steps) == (4_230_144, 1194 + 81)
        own = dataclasses.replace(SMALL, stages=train_gpt.rescale(RECORD_92, 100))
        assert train_gpt.with_table(own, CPU).steps == 100, "a plan of one's own stays"


def test_classes_of_bytes():
    """Case and kinds of blanks do not count; parts of characters stay themselves."""
    table = train_gpt.class_table(tiny())
    assert len(table) == 320 and table[256:].tolist() == list(range(256, 320))
    assert table[ord("a")] == table[ord("A")] == ord("A") and table[ord("7")] == ord("7")
    assert table[ord(" ")] == table[ord("\n")] == table[ord("\t")] == table[ord("\r")] == 9
    assert table[128:256].tolist() == list(range(128, 256))
    prefixes = train_gpt.prefix_table(tiny())
    assert (prefixes == -1).all(), "nothing begins a byte"


def test_classes_and_prefixes_of_words(monkeypatch):
    texts = "a,b,ab,abc,Ab, ab, AB,\u00e4,A\u0308,  , \n,\u00a0x".split(",")
    numbers = {word.encode(): number for number, word in enumerate(texts)}
    monkeypatch.setattr(train_gpt, "token_texts", lambda size: numbers)
    table = dict(zip(texts, train_gpt.class_table(tiny()), strict=False))
    assert [table[word] for word in ("ab", "Ab", " ab", " AB")] == [2] * 4
    assert table["\u00e4"] == table["A\u0308"] == table["a"] == 0
    assert table["  "] == table[" \n"] == 9 and table["\u00a0x"] == 11
    prefixes = dict(zip(texts, train_gpt.prefix_table(tiny()), strict=False))
    assert (prefixes["ab"], prefixes["abc"], prefixes["a"], prefixes[" ab"]) == (0, 2, -1, -1)


def naive_copies(row, classes, mark):
    """What followed the last earlier place of the longest context, and its bucket."""
    found = []
    for t in range(len(row)):
        begin = max([i for i in range(t + 1) if row[i] == mark], default=0)
        best = (0, 0)
        for number, length in enumerate(train_gpt.COPY_LENGTHS):
            if t - length + 1 < begin:
                break
            context = [classes[token] for token in row[t - length + 1 : t + 1]]
            ends = [
                e
                for e in range(begin + length - 1, t)
                if [classes[token] for token in row[e - length + 1 : e + 1]] == context
            ]
            if ends:
                best = (row[ends[-1] + 1], 3 * number + min(3, len(ends)))
        found.append(best)
    return found


def test_copies_by_hand_and_by_search():
    classes = np.arange(320)
    x = np.array([[1, 2, 3, 1, 2, EOT, 1, 2, 1, 2, 1]])
    candidates, buckets = train_gpt.copy_candidates(x, classes, EOT)
    assert candidates[0].tolist() == [0, 0, 0, 2, 3, 0, 0, 0, 2, 1, 2]
    assert buckets[0].tolist() == [0, 0, 0, 1, 4, 0, 0, 0, 1, 4, 7]
    x = np.random.default_rng(11).integers(0, 4, (3, 80))
    x[0, 30] = x[1, 0] = x[1, 50] = x[1, 51] = EOT
    classes[3] = 2  # two tokens that read the same
    candidates, buckets = train_gpt.copy_candidates(x, classes, EOT)
    for row in range(3):
        expected = naive_copies(x[row].tolist(), classes, EOT)
        got = zip(candidates[row].tolist(), buckets[row].tolist(), strict=True)
        assert list(got) == expected
    assert buckets.max() > 12


# --------------------------------------------------------------------------- schedules, training
def test_schedules_of_record_92():
    c = SMALL
    assert sum(stage.steps * stage.batch_tokens for stage in c.stages) == 328_663_040
    assert (c.steps, c.scheduled) == (1194, 1174)
    last = 1.73 * (5 / 6) ** 0.5
    for step, lr_factor in ((0, 1), (320, 1.52), (680, 1.52), (681, 1.73), (1173, last)):
        left = min(1, (1174 - step) / 940)
        assert train_gpt.lr_at(step, c) == pytest.approx(lr_factor * left + 0.3 * (1 - left)), step
    assert train_gpt.lr_at(1174, c) == train_gpt.lr_at(1193, c) == pytest.approx(0.3)
    momenta = [train_gpt.momentum_at(step, c) for step in (0, 120, 240, 1144, 1169)]
    assert momenta == pytest.approx([0.85, 0.89, 0.93, 0.93, 0.89])
    ahead = {0: 3, 319: 3, 320: 2, 680: 2, 681: 1, 1193: 1}
    assert {step: len(train_gpt.loss_weights_at(step, c)[0]) for step in ahead} == ahead
    prefix = {0: 0.25, 320: 0.2, 680: 0.05, 681: 0}
    assert {step: train_gpt.loss_weights_at(step, c)[1] for step in prefix} == prefix
    classes = {0: 10240, 681: 14336, 1106: 24576, 1107: 0, 1193: 0}
    assert {step: train_gpt.candidates_at(step, c) for step in classes} == classes
    parting = [step for step in range(1, c.steps, 2) if not train_gpt.tied_at(step, c)]
    assert parting[0] == 1177  # the last update of both as one is number 1175
    assert [train_gpt.gradient_cycle(step, c) for step in (0, 335, 336, 1193)] == [2, 2, 4, 4]


def test_wte_and_lm_head_are_one_until_they_part():
    config = dataclasses.replace(TINY, tail_average=False)
    run, asked = run_of(config), []
    model = run.model
    assert torch.equal(model.wte.weight, model.lm_head.weight)
    states = {o.bank: o for o in run.optimizers}
    for step in range(10, 16):  # the cool-down ends at 12: they part where Adam steps after 13
        before = model.lm_head.weight.detach().clone()
        train(run, [step], asked)
        assert torch.equal(model.wte.weight, model.lm_head.weight) == (step < 15)
        assert torch.equal(model.lm_head.weight, before) == (step % 2 == 0)
        head, wte = (states[bank].state for bank in ("lm_head_2026", "wte_2026"))
        for name in head:
            assert torch.equal(head[name], wte[name]) == (step < 15) and head[name].any()


def test_adam_steps_at_every_second_update_tables_later_at_every_fourth():
    run, asked, seen = run_of(), [], []
    model = run.model
    watched = [model.value_embeds[0].weight, model.table.rows, model.skip]
    watched.append(model.blocks[0].attn.q.weight)
    assert train_gpt.rare_from(TINY) == 4
    for step in range(12):
        before = [tensor.detach().clone() for tensor in watched]
        train(run, [step], asked)
        seen.append([not torch.equal(a, b) for a, b in zip(before, watched, strict=True)])
    every = range(12)
    tables = [step in (1, 3, 7, 11) for step in every]
    assert [row[0] for row in seen] == [row[1] for row in seen] == tables
    assert [row[2] for row in seen] == [step % 2 == 1 for step in every]
    assert all(row[3] for row in seen)


def test_averages_of_what_stands_still_are_what_stands_still():
    run = run_of()
    (method,) = run.methods
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    for step in range(1, TINY.steps + 1):
        method.after_step(step, run)
    held = [
        o for o in run.optimizers for name in getattr(o, "state", ()) if name.startswith("tail_")
    ]
    assert not held, "the averages are used up"
    for name, p in run.model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name], rtol=1e-5, atol=1e-7)


def test_averages_keep_the_norm_and_lag_behind():
    c = dataclasses.replace(TINY, stages=train_gpt.rescale(STAGES, 160))
    run = run_of(c)
    (method,) = run.methods
    (mlps,) = [o for o in run.optimizers if o.bank == "mlp"]
    stack, drift = mlps.weights, torch.full_like(mlps.weights, 0.01)
    begin = stack.clone()
    for step in range(100, c.steps + 1):
        stack.add_(drift)
        last = stack.clone()
        method.after_step(step, run)
    scale = last.double().norm() / stack.double().norm()
    assert scale.item() == pytest.approx(1, abs=1e-5)
    same = torch.nn.functional.cosine_similarity
    now, before = (same(w.flatten(), begin.flatten(), 0) for w in (stack, last))
    assert now > before + 1e-4, "nearer to where the weights came from"


def test_gradients_of_the_sum_grow_with_the_tokens_alone():
    """An eighth of the sum over this rank's tokens, whatever the ranks and micro-batches."""
    rows = random_tokens(4, T + 1).numpy()
    for ranks in (1, 4):
        run = train_gpt.build(TINY, CPU)
        run.runtime = dataclasses.replace(CPU, world_size=ranks)  # the others are not there
        run.micro[4, T] = 1
        run.model.set_stage(9)
        train_gpt.forward_backward(run, train_gpt.make_batch(run, rows, 9, []))
        model = train_gpt.build(TINY, CPU).model
        model.set_stage(9)
        for row in range(4):
            goals = model.prepare_targets(rows[row : row + 1, 1:], 9, row, 4)
            inputs = model.prepare(rows[row : row + 1, :-1], training=True) | goals
            (model(**model.load(inputs)) * T / 8).backward()
        expected = dict(model.named_parameters())
        for name, p in run.model.named_parameters():
            torch.testing.assert_close(p.grad, expected[name].grad, rtol=1e-3, atol=1e-5)
