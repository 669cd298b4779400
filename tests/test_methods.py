"""What ReLoRA, GaLore, LAWA and SuPar promise: properties of tiny models and of single matrices."""

import dataclasses
import functools
from unittest import mock

import pytest
import torch
from helpers import CPU, EVERY_METHOD, flags, make_data, run, same, tiny

import train_gpt as tg

RELORA, LAWA = (
    EVERY_METHOD["relora"],
    EVERY_METHOD["lawa"],
)  # merges at 3, 7, 11; snapshots 2, 4 ...


def build(**fields) -> tg.Run:
    """A run as train() makes it, without data, clock and log."""
    made = tg.build(tg.resolve(tiny(**dict(batch_tokens=128, steps=24) | fields), CPU), CPU)
    made.optimizers = tg.make_optimizers(made)
    made.micro = {(4, 32): 4}
    return made


def rows(step: int) -> torch.Tensor:
    """Random tokens, but each one says something about the next."""
    made = torch.randint(64, (4, 33), generator=tg.seeded("test", step))
    made[:, 1::2] = (made[:, 0:-1:2] * 5 + 1) % 64
    return made


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    return rows(step)[:, :-1], rows(step)[:, 1:]


def gradients(made: tg.Run, step: int):
    tg.forward_backward(made, tg.make_batch(made, rows(step).numpy(), made.step, []))


def advance(made: tg.Run, steps: int, hooks=True) -> tg.Run:
    for _ in range(steps):
        tg.set_stage(made)
        gradients(made, made.step)
        tg.step_optimizers(made)
        made.step += 1
        if hooks:
            call_hooks(made)
    return made


def call_hooks(made: tg.Run):
    for method in made.methods:
        method.after_step(made.step, made)


def weights(made: tg.Run) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in made.model.named_parameters()}


def evaluated(made: tg.Run) -> dict[str, torch.Tensor]:
    """The weights that validation sees."""
    raw = tg.replace_weights(made.model, tg.eval_weights(made))
    seen = weights(made)
    tg.replace_weights(made.model, raw)
    return seen


def hidden(made: tg.Run) -> dict[str, torch.Tensor]:
    named = made.model.named_parameters()
    return {name: p for name, p in named if name.startswith("blocks.") and p.ndim == 2}


@torch.no_grad()
def logits(made: tg.Run) -> torch.Tensor:
    return made.model(batch(99)[0])


def rank(matrix: torch.Tensor, tolerance=1e-5) -> int:
    s = torch.linalg.svdvals(matrix.double())
    return int((s > tolerance * s[0]).sum())


# -------------------------------------------------------------------------------------- all of them
def test_off_creates_nothing():
    assert tg.make_methods(tiny()) == []
    made = build()
    assert all(type(optimizer.method) is tg.Method for optimizer in made.optimizers)
    assert tg.eval_weights(made) == {}


@pytest.mark.parametrize("method", EVERY_METHOD)
def test_trains(method):
    """The loss falls with every method, and nothing becomes NaN."""
    made = build(**EVERY_METHOD[method])
    with torch.no_grad():
        first = made.model(*batch(14))
    advance(made, 14)
    with torch.no_grad():
        assert made.model(*batch(14)) < first - 0.3
    assert all(p.isfinite().all() for p in made.model.parameters())


@pytest.mark.parametrize("method", ["relora, adam", "galore", "supar"])
def test_four_micro_batches_equal_one(method):
    whole, parts = build(**EVERY_METHOD[method]), build(**EVERY_METHOD[method])
    parts.micro = {(4, 32): 1}
    advance(whole, 6)
    advance(parts, 6)
    # Adam's first step is the sign of the gradient: B, zero at first, doubles rounding errors
    tolerance = 2e-3 if method == "relora, adam" else 5e-4
    for (name, a), b in zip(weights(whole).items(), weights(parts).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=tolerance, msg=name)


# ------------------------------------------------------------------------------------------- ReLoRA
def relora(steps=0, **fields) -> tg.Run:
    return advance(build(**RELORA | fields), steps)


def adapter_optimizers(made):
    return [o for o in made.optimizers if any(name[-2:] in (".A", ".B") for name in o.named)]


def test_relora_wrap_leaves_logits_unchanged_and_freezes_the_matrices():
    made = advance(relora(2), 1, hooks=False)
    before = logits(made)
    assert not tg.adapters(made.model)
    call_hooks(made)
    assert len(tg.adapters(made.model)) == 6 * made.config.n_layer
    assert torch.equal(logits(made), before)
    layers = tg.adapters(made.model).values()
    assert not any(layer.weight.requires_grad for layer in layers)
    trained = {name for optimizer in made.optimizers for name in optimizer.named}
    learning = {name for name, p in made.model.named_parameters() if p.requires_grad}
    assert trained == learning


def test_relora_first_step_after_the_wrap_reaches_every_B():
    made = relora(3)
    tg.set_stage(made)
    gradients(made, 3)
    for name, layer in tg.adapters(made.model).items():
        assert layer.B.grad.norm() > 0 and layer.A.any() and layer.weight.grad is None, name
        assert layer.A.abs().max() <= layer.n_in**-0.5


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_relora_merge_is_exact(optimizer):
    made = advance(relora(6, matrix_optimizer=optimizer, relora_scale=0.5), 1, hooks=False)
    before, layers = logits(made), tg.adapters(made.model)
    old = {name: [m.double() for m in (x.weight, x.A, x.B)] for name, x in layers.items()}
    call_hooks(made)
    assert (logits(made) - before).abs().max() <= 1e-5
    for name, layer in layers.items():
        W, A, B = old[name]
        delta = 0.5 * B @ A
        assert delta.abs().max() > 0
        expected = W + (delta.T if layer.transposed else delta)
        torch.testing.assert_close(layer.weight.double(), expected, rtol=1e-6, atol=1e-7)
        assert not layer.B.any() and not torch.equal(layer.A.double(), A)
        assert layer.weight.dtype == torch.float32


@pytest.mark.parametrize("r", [2, 6])
def test_relora_rank_adds_up(r):
    """rank(W - W at the wrap) is min(k r, n) after k merges: the point of ReLoRA."""
    made = relora(3, relora=r, matrix_optimizer="adam", lr_adam=0.05)
    start = {name: m.weight.clone() for name, m in tg.adapters(made.model).items()}
    for merges in (1, 2, 3, 4):
        advance(made, 4)
        ranks = {n: rank(m.weight - start[n]) for n, m in tg.adapters(made.model).items()}
        assert set(ranks.values()) == {min(merges * r, 32)}, ranks


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_relora_restarts_the_adapters_moments_and_no_others(optimizer):
    """Steps, too: the first update after a merge is Adam's (Muon's) first, no jump."""
    made = advance(relora(6, matrix_optimizer=optimizer, relora_interval=8), 4, hooks=False)
    ours = adapter_optimizers(made)
    others = [o for o in made.optimizers if o not in ours]
    before = [({k: t.clone() for k, t in o.state.items()}, o.steps) for o in others]
    assert made.step == 10 and ours and all(o.steps == 7 and o.state for o in ours)
    made.step = 11
    call_hooks(made)
    assert all(o.steps == 0 and not o.state for o in ours)
    for o, (state, steps) in zip(others, before, strict=True):
        assert same(o.state, state) and o.steps == steps > 0
    if optimizer == "adam":
        ours[0].steps = 1
        assert ours[0].direction(torch.randn(ours[0].weights.shape)).abs().max() < 1.1


def test_relora_keeps_the_runs_momentum():
    """A merge restarts the moments; Muon's momentum rises and falls with the run."""
    fields = dict(matrix_optimizer="muon", momentum_warmup=4, momentum_cooldown=2)
    made = advance(relora(6, relora_interval=8, **fields), 3)
    for step in (7, 11, made.config.steps - 1):
        made.step = step
        tg.set_stage(made)
        assert {o.momentum for o in adapter_optimizers(made)} == {tg.momentum_at(step, made.config)}


def test_relora_draws_A_from_the_seed_alone():
    """Equal on any rank; new at every merge, for every matrix, for every seed."""
    a = relora(7)
    torch.rand(17)
    runs = [a, relora(7), relora(7, seed=1), relora(3)]
    drawn = [{name: m.A for name, m in tg.adapters(made.model).items()} for made in runs]
    assert same(drawn[0], drawn[1])
    different = [A for made in (drawn[0], drawn[2], drawn[3]) for A in made.values()]
    assert len({round(A.double().sum().item(), 9) for A in different}) == len(different)


def test_relora_names_a_module_that_it_does_not_know():
    made = build(relora=4, relora_warm_start=1)
    gate = made.model.blocks[1].mlp.gate = torch.nn.Linear(32, 32, bias=False)
    gate.weight = tg.parameter(gate.weight.detach(), "matrix")
    with pytest.raises(tg.UserError, match="blocks.1.mlp.gate.weight"):
        made.methods[0].set_form(1, made)


# ------------------------------------------------------------------------------------------- GaLore
class SGD(tg.Optimizer):
    def direction(self, g):
        return g


class HeavyBall(tg.Optimizer):
    def direction(self, g):
        return self.moment("momentum", g).mul_(0.9).add_(g).clone()


SHAPES = [(12, 12), (24, 8), (8, 24)]


def galore(r: int, **fields) -> tg.GaLore:
    return tg.GaLore(tiny(galore=r, **fields))


def one(kind: type, shape: tuple, method=None) -> tuple[torch.Tensor, tg.Optimizer]:
    """One seeded matrix and its optimizer."""
    p = tg.parameter(torch.randn(shape, generator=tg.seeded("matrix", shape)), "matrix")
    group = tg.Group("lr_muon", 5.0)  # a rate of 0.1
    optimizer = kind({"w": p}, group, shape, tg.Run(tiny(), CPU, None, []))
    if method:
        optimizer.method = method
    return p, optimizer


def gradient(shape, step):
    return torch.randn(shape, generator=tg.seeded("gradient", step))


def feed(p: torch.Tensor, optimizer: tg.Optimizer, step: int, row_scale=1.0):
    """One update on the gradient of `step`."""
    p.grad = gradient(p.shape, step) * row_scale
    optimizer.reduce()
    optimizer.step()
    optimizer.finish()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize(
    "kind, interval, tolerance",
    [(SGD, 1, 1e-5), (SGD, 3, 1e-5), (HeavyBall, 20, 1e-5), (HeavyBall, 3, 1e-5)]
    + [(tg.Muon, 20, 2e-4)],
)
def test_galore_at_full_rank_is_the_inner_optimizer(shape, scale, kind, interval, tolerance):
    """SGD and, as moments move to the new basis, momentum for any interval; Muon, which rotations
    commute with, too. Times the scale."""
    method = galore(min(shape), galore_scale=scale, galore_interval=interval)
    (p, projected), (q, plain) = one(kind, shape, method), one(kind, shape)
    plain.rate *= scale
    for step in range(10):
        feed(p, projected, step)
        feed(q, plain, step)
    torch.testing.assert_close(p, q, rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES)
def test_galore_moves_both_momenta_of_anvil(shape):
    """At full rank, lifted back, they are those of the plain update, whatever was refreshed."""
    (p, projected), (q, plain) = (
        one(tg.Anvil, shape, galore(min(shape), galore_interval=3)),
        one(tg.Anvil, shape),
    )
    for step in range(10):
        feed(p, projected, step)
        feed(q, plain, step)
    P = projected.state["P"]
    for name in ("fast", "slow"):
        moment = projected.state[name]
        lifted = moment @ P.mT if shape[0] >= shape[1] else P @ moment
        torch.testing.assert_close(lifted, plain.state[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_galore_projection_is_orthonormal_and_leading(shape):
    p, optimizer = one(tg.Adam, shape, galore(3))
    feed(p, optimizer, 0)
    P, g = optimizer.state["P"][0], gradient(shape, 0)
    assert P.shape == (min(shape), 3)
    torch.testing.assert_close(P.T @ P, torch.eye(3), rtol=0, atol=1e-5)
    kept = (g @ P if shape[0] >= shape[1] else P.T @ g).norm()
    torch.testing.assert_close(kept, torch.linalg.svdvals(g)[:3].norm())


def test_galore_refreshes_at_updates_1_to_3_and_every_interval():
    """Behind zero-initialised weights the first two gradients are zero."""
    p, optimizer = one(tg.Adam, (12, 8), galore(3, galore_interval=5))
    before, refreshed = None, []
    for step in range(1, 18):
        feed(p, optimizer, step)
        P = optimizer.state["P"].clone()
        if before is None or not torch.equal(P, before):
            refreshed.append(step)
        before = P
    assert refreshed == [1, 2, 3, 6, 11, 16]


@pytest.mark.parametrize("kind", [tg.Adam, tg.Muon])
@pytest.mark.parametrize("shape", SHAPES)
def test_galore_moves_within_r_dimensions_per_period(shape, kind):
    p, optimizer = one(kind, shape, galore(2, galore_interval=5))
    at, start = [], p.detach().clone()
    for step in range(21):
        if step % 5 == 0:
            at.append(p.detach().clone())
        feed(p, optimizer, step)
    moves = [b - a for a, b in zip(at[1:], at[2:], strict=False)]
    assert len(moves) == 3 and all(rank(move) == 2 for move in moves)
    assert rank(p.detach() - start) > 2


@pytest.mark.parametrize("shape", [*SHAPES, (100, 40)])
@pytest.mark.parametrize("bits", [32, 8])
def test_galore_state_bytes_equal_the_formula(shape, bits):
    """min·r floats of P, and 2·max·r of moments: 4 bytes each, or 1 and an fp32 scale per row."""
    r, method = 4, galore(4, galore_bits=bits)
    p, optimizer = one(method.wraps(tg.Adam), shape, method)
    feed(p, optimizer, 0)
    rows = shape[0] if shape[0] >= shape[1] else r
    moment = 4 * max(shape) * r if bits == 32 else max(shape) * r + 4 * rows
    size = sum(t.nbytes for t in optimizer.state.values())
    assert size == 4 * min(shape) * r + 2 * moment


def test_galore_state_of_a_model_is_smaller():
    def sizes(**fields):
        made = advance(build(**fields), 1)
        stacks = [o for o in made.optimizers if o.trains_matrices]
        shapes = [p.shape for o in stacks for p in o.named.values()]
        return sum(t.nbytes for o in stacks for t in o.state.values()), shapes

    full, shapes = sizes(matrix_optimizer="adam")
    low, _ = sizes(galore=4, matrix_optimizer="adam")
    assert full == sum(4 * 2 * m * n for m, n in shapes)
    assert low == sum(4 * (min(m, n) * 4 + 2 * max(m, n) * 4) for m, n in shapes)


@pytest.mark.parametrize(
    "kind, names", [("adam", ("exp_avg", "exp_avg_sq")), ("muon", ["momentum"])]
)
def test_galore_8bit_moments_are_close(kind, names):
    """Also where the rows of a moment differ by many orders of magnitude."""
    exact, rounded = galore(4), galore(4, galore_bits=8)
    (p, a), (q, b) = (one(m.wraps(tg.MATRIX_RULES[kind]), (64, 32), m) for m in (exact, rounded))
    start = p.detach().clone()
    for step in range(8):
        for w, optimizer in ((p, a), (q, b)):
            feed(w, optimizer, step, row_scale=torch.logspace(-6, 3, 64).view(64, 1))
    assert not b.opened, "fp32 lives no longer than the step"
    for name in names:
        assert b.state[name].dtype == torch.uint8
        assert b.state[f"{name}_scale"].shape == (1, 64, 1)
        full, read = a.state[name], b.moment(name, None)
        assert ((full - read).norm(dim=-1) / full.norm(dim=-1)).max() < 0.16, name
    assert (p - q).norm() / (p - start).norm() < 0.1


def test_the_inner_optimizer_is_the_flag():
    for inner in ("adam", "muon"):
        made = advance(build(galore=4, matrix_optimizer=inner), 1)
        states = [set(o.state) for o in made.optimizers if o.trains_matrices]
        assert all(("momentum" in names) == (inner == "muon") for names in states), inner


def test_galore_projection_follows_the_gradient_although_matrices_start_at_zero():
    """P must not stay what zero gradients gave it for a whole interval."""
    made = advance(build(galore=4, galore_interval=20), 5)
    gradients(made, 5)
    for optimizer in made.optimizers:
        if optimizer.trains_matrices:
            optimizer.reduce()
            g, P = optimizer.grads, optimizer.state["P"]
            best = torch.linalg.svdvals(g)[:, :4].norm(dim=1)
            kept = (g @ P).flatten(1).norm(dim=1) / best
            assert kept.mean() > 0.53, kept  # a random P of rank 4 would keep 0.42 to 0.48


@pytest.mark.long
@pytest.mark.parametrize("bits", [32, 8])
def test_galore_per_layer_equals_the_stacked_update(bits, tmp_path):
    """Step by step, through warm-up and cool-down of the rate, in the real training loop."""
    data = make_data(tmp_path)
    fields = dict(galore=4, galore_interval=6, galore_bits=bits, galore_scale=2.0, val_every=0)
    fields |= dict(warmup=8, cooldown=0.5, lr_adam=0.02, matrix_optimizer="adam")
    stacked, layered = (
        [float(loss) for *_, loss in run(flags(data, galore_per_layer=on, **fields)).losses()]
        for on in (False, True)
    )
    assert len(stacked) == 13 and stacked[-1] < stacked[0] - 0.5
    assert max(abs(a - b) for a, b in zip(stacked, layered, strict=True)) < 3e-4


def test_galore_per_layer_frees_every_gradient():
    made = build(**EVERY_METHOD["galore, per layer"])
    before = weights(made)
    tg.set_stage(made)
    for step in range(2):  # behind the zero head the first gradients are zero
        gradients(made, step)
        assert all(p.grad is None for p in hidden(made).values()) and len(hidden(made)) == 12
        tg.step_optimizers(made)
    after = weights(made)
    assert not torch.equal(after["blocks.1.mlp.down.weight"], before["blocks.1.mlp.down.weight"])


# --------------------------------------------------------------------------------------------- LAWA
def test_lawa_is_the_fp64_mean_of_the_last_k():
    made, kept = build(**LAWA), {}
    for _ in range(9):
        advance(made, 1)
        kept[made.step] = weights(made)
    seen = evaluated(made)
    for name, p in seen.items():
        mean = torch.stack([kept[step][name].double() for step in (4, 6, 8)]).mean(0)
        assert torch.equal(p, mean.to(p.dtype)), name
    assert same(weights(made), kept[9]), "and the raw weights are back"


def test_lawa_of_one_and_of_none_is_the_raw_weights():
    before_the_first = advance(build(**LAWA), 1)
    of_one = advance(build(lawa=1, lawa_interval=1), 5)
    for made in (before_the_first, of_one):
        assert same(evaluated(made), weights(made))


@pytest.mark.parametrize("method", ["relora", "supar", "galore"])
def test_lawa_eval_does_not_touch_training(method):
    plain = build(**EVERY_METHOD[method])
    averaged = build(lawa=2, lawa_interval=2, **EVERY_METHOD[method])
    for _ in range(9):
        advance(plain, 1)
        advance(averaged, 1)
        evaluated(averaged)
    assert same(weights(plain), weights(averaged))


def test_lawa_window_does_not_alias_the_weights():
    made = advance(build(**LAWA), 2)
    (snapshot,) = made.methods[0].window
    before = {name: t.clone() for name, t in snapshot.items()}
    advance(made, 1)
    assert same(snapshot, before)


def test_lawa_replace_trains_on_from_the_mean():
    made, kept = build(lawa=2, lawa_interval=2, lawa_mode="replace"), []
    for _ in range(4):
        advance(made, 1, hooks=False)
        kept.append(weights(made))
        call_hooks(made)
    for name, p in weights(made).items():
        mean = (kept[1][name] + kept[3][name]) / 2
        torch.testing.assert_close(p, mean, rtol=1e-6, atol=1e-7)


def test_lawa_averages_merged_adapters():
    """The mean of W + s B A, not of the factors: also across a merge; never across the wrap."""
    made, kept = build(lawa=2, lawa_interval=1, **RELORA), {}
    for _ in range(8):
        advance(made, 1, hooks=False)
        layers = tg.adapters(made.model)
        kept[made.step] = {name: m.merged().detach().double() for name, m in layers.items()}
        call_hooks(made)
        if made.step == 3:
            assert len(made.methods[1].window) == 1, "snapshots of before the wrap go"
    raw = tg.replace_weights(made.model, tg.eval_weights(made))
    for name, layer in tg.adapters(made.model).items():
        mean = (kept[7][name] + kept[8][name]) / 2
        torch.testing.assert_close(layer.merged().double(), mean, rtol=1e-5, atol=1e-6)
    tg.replace_weights(made.model, raw)


def test_lawa_replace_keeps_the_newest_adapters():
    """A is drawn anew at every merge: the mean of two draws is neither."""
    made = advance(build(lawa=2, lawa_interval=1, lawa_mode="replace", **RELORA), 5)
    first, second = made.methods
    for _ in range(4):  # a merge among them
        advance(made, 1, hooks=False)
        first.after_step(made.step, made)
        drawn = {name: layer.A.clone() for name, layer in tg.adapters(made.model).items()}
        second.after_step(made.step, made)
        for name, layer in tg.adapters(made.model).items():
            assert torch.equal(layer.A, drawn[name]) and not layer.B.any()


# -------------------------------------------------------------------------------------------- SuPar
@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_supar_dense_at_the_base_width_is_the_standard_model(optimizer):
    standard = build(matrix_optimizer=optimizer)
    same_width = build(matrix_optimizer=optimizer, mup_base_width=32)
    standard.model.set_score_scale(2.0)  # muP's scores are over head_dim, 16, not over its root
    assert type(same_width.methods[0]) is tg.SuPar
    advance(standard, 5)
    advance(same_width, 5)
    assert same(weights(standard), weights(same_width))
    assert torch.equal(logits(standard), logits(same_width))


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_supar_dense_is_mup(optimizer):
    """Against muP written down by hand: Adam's hidden rate and the logits over m_d, only."""
    supar = build(matrix_optimizer=optimizer, mup_base_width=8)
    by_hand = build(matrix_optimizer=optimizer)
    by_hand.model.output_scale = 1 / 4
    by_hand.model.set_score_scale(2.0)
    for stack in by_hand.optimizers:
        if stack.trains_matrices and optimizer == "adam":
            stack.group = dataclasses.replace(stack.group, factor=1 / 4)
    advance(supar, 5)
    advance(by_hand, 5)
    assert same(weights(supar), weights(by_hand))


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_supar_masked_weights_stay_zero_and_others_move(optimizer):
    made = build(sparsity=0.75, matrix_optimizer=optimizer, zero_init=False)
    masks, start = made.methods[0].masks, weights(made)
    assert len(masks) == 12 and all(not start[n][~mask].any() for n, mask in masks.items())
    advance(made, 5)
    for name, p in hidden(made).items():
        mask = masks[name]
        moved = (p != start[name])[mask].float().mean()
        assert not p[~mask].any() and moved > 0.9, name
        assert abs(mask.float().mean() - 0.25) < 0.06


def test_supar_masks_are_equal_everywhere_and_differ_between_matrices():
    a = build(sparsity=0.5).methods[0].masks
    torch.rand(3)
    b = build(sparsity=0.5).methods[0].masks
    other = build(sparsity=0.5, seed=1).methods[0].masks
    assert same(a, b) and not any(torch.equal(a[name], other[name]) for name in a)
    square = {tuple(mask.flatten().tolist()) for mask in a.values() if mask.numel() == 32 * 32}
    assert len(square) == 8


def test_supar_masks_come_back_from_the_checkpoint():
    """Not redrawn: a checkpoint's mask wins over the one that this code would draw."""
    made = advance(build(sparsity=0.5), 2)
    state = made.state()
    name = "blocks.0.attn.q.weight"
    stack = state["optimizers"][f"Muon {name}"]
    assert torch.equal(stack["mask"][0], made.methods[0].masks[name])
    stack["mask"] = ~stack["mask"]
    again = build(sparsity=0.5)
    again.load_state(state)
    assert torch.equal(again.state()["optimizers"][f"Muon {name}"]["mask"], stack["mask"])


def test_supar_rates():
    """Adam: 1 / (m_d rho). Muon: rho ** -MUON_POWER, no m_d."""
    for optimizer, expected in (("adam", 2.0), ("muon", 0.25**-tg.SuPar.MUON_POWER)):
        made = build(sparsity=0.75, mup_base_width=16, matrix_optimizer=optimizer)
        for name, stack in ((n, o) for o in made.optimizers for n in o.named if n in hidden(made)):
            tall = 2.0 if "mlp" in name and optimizer == "muon" else 1.0  # √(out / in) of up
            row = list(stack.named).index(name)
            tall = 1.0 if "down" in name else tall
            assert stack.row_scale[row].item() == pytest.approx(expected * tall), name


@functools.cache
@torch.no_grad()
def activations(width: int, density: float) -> dict[str, float]:
    """Mean |output| of every hidden matrix at init, without zero-init."""
    sizes = dict(n_layer=1, n_head=width // 64, n_embd=width, vocab_size=64, zero_init=False)
    config = tiny(sparsity=1 - density, mup_base_width=256, **sizes)
    model, seen = tg.build(config, CPU).model, {}

    def keep(name, module, inputs, y):
        seen[name] = y.abs().mean().item()

    for name, module in model.blocks.named_modules():
        if isinstance(module, tg.Linear):
            module.register_forward_hook(functools.partial(keep, name))
    one_by_one = lambda x, linears, factor=None: [linear(x) for linear in linears]  # noqa: E731
    with mock.patch.object(tg, "project", one_by_one):
        model(torch.randint(64, (4, 32), generator=tg.seeded("tokens")))
    return seen


@pytest.mark.parametrize("density", [1.0, 1 / 4, 1 / 16])
@pytest.mark.parametrize("width", [256, 512, 1024])
def test_supar_keeps_activations_at_init(width, density):
    """Within 3 % of dense at 256; a single matrix varies more with its few weights per neuron."""
    dense, now = activations(256, 1.0), activations(width, density)
    ratios = [now[name] / dense[name] for name in dense]
    assert abs(sum(ratios) / len(ratios) - 1) < 0.03, ratios
    assert all(abs(ratio - 1) < 0.06 for ratio in ratios), ratios
