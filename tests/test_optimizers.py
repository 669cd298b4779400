"""Update rules against their published form, stacks and shards, and the schedules."""

import dataclasses
import math

import pytest
import torch
from helpers import CPU, EVERY_METHOD, same, tiny
from torch.utils.flop_counter import FlopCounterMode

import train_gpt
from train_gpt import (
    PRESETS,
    Adagrad,
    Adam,
    Anvil,
    Group,
    Method,
    Muon,
    Optimizer,
    Run,
    Runtime,
    newton_schulz,
)


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def published_newton_schulz(g):
    """Keller Jordan's five steps on one matrix [out, in], written out."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = g / (g.norm() + 1e-7)
    if g.size(0) > g.size(1):
        x = x.T
    for _ in range(5):
        A = x @ x.T
        x = a * x + (b * A + c * A @ A) @ x
    return x.T if g.size(0) > g.size(1) else x


def built(runtime=CPU, **changes) -> Run:
    run = train_gpt.build(tiny(**changes), runtime)
    run.optimizers = train_gpt.make_optimizers(run)
    return run


def one(rule, named, lr, shape, **changes) -> Optimizer:
    """An optimizer of its own."""
    named = {name: train_gpt.parameter(p.clone(), "matrix") for name, p in named.items()}
    group = Group("lr_muon", lr / 0.02)
    return rule(named, group, shape, Run(tiny(**changes), CPU, None, []))


def one_step(optimizer):
    optimizer.reduce()
    optimizer.step()
    optimizer.finish()


# ------------------------------------------------------------------------------ weights in bfloat16
@pytest.mark.parametrize("rule", ["muon", "anvil", "adam"])
def test_bf16_weights_are_rounded_masters(rule):
    """Updates far below bfloat16's steps add up; only hidden matrices are rounded."""
    changes = dict(matrix_optimizer=rule, lr_muon=1e-5, lr_adam=1e-5, zero_init=False)
    exact, rounded = built(**changes), built(**changes, bf16_weights=True)
    before = {name: p.detach().clone() for name, p in exact.model.named_parameters()}
    for step in range(6):
        for run in (exact, rounded):
            train_gpt.set_stage(run)
            for number, p in enumerate(run.model.parameters()):
                seed = 100 * step + number
                p.grad = rand(p.numel(), seed=seed).bfloat16().to(p.dtype).view_as(p)
            for optimizer in run.optimizers:
                one_step(optimizer)
            run.step += 1
    for ours, theirs in zip(rounded.optimizers, exact.optimizers, strict=True):
        assert ours.name == theirs.name and ours.own_weights.dtype == torch.float32
        kept = torch.bfloat16 if ours.trains_matrices else torch.float32
        assert {p.dtype for p in ours.named.values()} == {kept} == {ours.weights.dtype}
        torch.testing.assert_close(ours.own_weights, theirs.own_weights, rtol=0, atol=1e-7)
        assert torch.equal(ours.weights[ours.own], ours.own_weights.to(kept))
        for one, other in ((ours, theirs), (theirs, ours)) if ours.trains_matrices else ():
            with pytest.raises(train_gpt.UserError, match="bf16_weights"):
                one.load_state(other.gather_state())
        if ours.trains_matrices:
            begun = torch.stack([before[name] for name in ours.named])
            moved = (ours.own_weights.view_as(begun) - begun).abs().max()
            assert 0 < moved < 2e-4, "less than a step of bfloat16"


# ----------------------------------------------------------------------------------- Newton-Schulz
@pytest.mark.parametrize("shape", [(4, 24, 24), (3, 24, 96), (3, 96, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_newton_schulz_against_an_svd(shape, dtype):
    n, rows, cols = shape
    U, _, Vh = torch.linalg.svd(rand(*shape), full_matrices=False)
    values = torch.linspace(0.2, 1.0, min(rows, cols))
    g = 37.0 * U * values @ Vh  # well-conditioned; the scale must not matter
    x = newton_schulz(g, dtype)
    assert x.shape == g.shape and x.dtype == torch.float32
    S = torch.linalg.svdvals(x)
    assert 0.6 < S.min() and S.max() < 1.3, (S.min(), S.max())
    coordinates = U.mT @ x @ Vh.mT  # diagonal: the singular vectors are kept
    off = coordinates - torch.diag_embed(coordinates.diagonal(dim1=-2, dim2=-1))
    assert off.abs().max() < (0.03 if dtype == torch.bfloat16 else 1e-4)
    assert (coordinates.diagonal(dim1=-2, dim2=-1) > 0).all()


def test_anvil_keeps_matrices_of_rank_one_finite_in_bfloat16():
    """First gradients are nearly that; at record 92's margin, 1.05, a third become infinite."""
    generator = torch.Generator().manual_seed(0)
    column = torch.randn(100, 96, 1, generator=generator)
    g = column @ torch.randn(100, 1, 64, generator=generator)
    x = newton_schulz(g, torch.bfloat16, Anvil.MAPS, Anvil.MARGIN, 1e-6)
    norms = torch.linalg.matrix_norm(x, 2)
    assert 0.98 < norms.min() and norms.max() < 1.05
    edge = newton_schulz(g, torch.bfloat16, Anvil.MAPS, 1.05, 1e-6)
    assert not (torch.linalg.matrix_norm(edge) < 2).all()


def test_newton_schulz_of_a_batch_is_that_of_each():
    for shape in ((5, 16, 16), (5, 16, 64), (5, 64, 16)):
        g = rand(*shape) * torch.logspace(-3, 3, 5)[:, None, None]
        x = newton_schulz(g, torch.float32)
        for i in range(5):
            assert torch.allclose(x[i], published_newton_schulz(g[i]), atol=2e-5)
        assert torch.allclose(newton_schulz(g.mT, torch.float32), x.mT, atol=2e-5)
    zero = torch.zeros(2, 8, 8)
    assert torch.equal(newton_schulz(zero, torch.float32), zero)


def test_newton_schulz_squares_the_shorter_side():
    short, long = 8, 64
    each = 2 * 2 * short * short * long + 2 * short**3  # two products with x, one of the square
    for shape in ((1, short, long), (1, long, short)):
        with FlopCounterMode(display=False) as counter:
            newton_schulz(rand(*shape), torch.float32)
        assert counter.get_total_flops() == 5 * each


def test_normuon_evens_out_neurons_and_keeps_the_norm():
    """Rows of a tall matrix, columns of a wide one: a running mean of squares, bias-corrected."""
    for shape in ((8, 4), (4, 8), (4, 4)):
        named = {"w": rand(*shape)}
        plain = one(Muon, named, 0.1, shape, momentum_warmup=1)
        even = one(Muon, named, 0.1, shape, momentum_warmup=1, normuon=0.9)
        mean, dim = 0.0, -1 if shape[0] >= shape[1] else -2
        for step in (1, 2, 3):
            plain.steps = even.steps = step
            g = rand(1, *shape, seed=step)
            u, found = plain.direction(g), even.direction(g)
            mean = 0.9 * mean + 0.1 * u.square().mean(dim, keepdim=True)
            expected = u / (mean / (1 - 0.9**step)).sqrt()
            assert torch.allclose(found, expected * u.norm() / expected.norm(), atol=1e-5)
        assert found.norm().item() == pytest.approx(u.norm().item(), rel=1e-4)
        assert set(even.state) == {"momentum", "row_sq"}


# -------------------------------------------------------------------------------------------- rules
def test_muon_is_the_published_loop():
    """Over all hidden matrices of a model: Nesterov momentum with its warm-up, Newton-Schulz,
    sqrt(max(1, out / in)), the schedule's scale."""
    run = built(momentum_warmup=3, cooldown=0.0)
    muon = [optimizer for optimizer in run.optimizers if isinstance(optimizer, Muon)]
    expected = {name: p.detach().clone() for o in muon for name, p in o.named.items()}
    assert len(expected) == 6 * run.config.n_layer
    buffers = {name: torch.zeros_like(w) for name, w in expected.items()}
    for step in range(5):
        for number, (name, w) in enumerate(expected.items()):
            g = rand(*w.shape, seed=100 * step + number)
            run.model.get_parameter(name).grad = g
            momentum = 0.85 + (0.95 - 0.85) * min(step / 3, 1)
            buffers[name] = momentum * buffers[name] + g
            nesterov = g + momentum * buffers[name]
            down = name.endswith("down.weight")  # lies as [in, out]
            u = published_newton_schulz(nesterov.T if down else nesterov)
            u = u * max(1, u.size(0) / u.size(1)) ** 0.5
            w -= run.config.lr_muon * 0.5 * (u.T if down else u)
        for optimizer in muon:
            optimizer.set_stage(step)
            optimizer.rate *= 0.5
            one_step(optimizer)
    for name, w in expected.items():
        p = run.model.get_parameter(name)
        assert torch.allclose(p, w, atol=2e-5), name
        assert p.grad is None, "gradients are cleared"


@pytest.mark.parametrize(
    "rule, theirs, settings, state",
    [
        (Adam, torch.optim.Adam, dict(betas=(0.8, 0.95), eps=1e-3), {"exp_avg", "exp_avg_sq"}),
        (Adagrad, torch.optim.Adagrad, dict(eps=1e-12), {"sum_sq"}),
    ],
)
def test_elementwise_rules_are_those_of_torch(rule, theirs, settings, state):
    start = {"a": rand(7, 5), "b": rand(3, seed=1), "c": torch.tensor(0.5)}
    ours = one(rule, start, 0.03, (), beta1=0.8, beta2=0.95, adam_eps=1e-3)
    reference = {name: torch.nn.Parameter(p.clone()) for name, p in start.items()}
    optimizer = theirs(reference.values(), lr=0.03, **settings)
    for step in range(20):
        for number, (name, p) in enumerate(reference.items()):
            g = rand(35, seed=10 * step + number + 3)[: p.numel()].view_as(p)
            p.grad = g * 10.0 ** (number - 1)
            ours.named[name].grad = p.grad.clone()
        one_step(ours)
        optimizer.step()
        for name, p in reference.items():
            assert (ours.named[name] - p).abs().max() < 1e-6, (step, name)
    assert set(ours.state) == state


def test_rows_without_a_gradient_stay_with_adagrad():
    start = rand(5, 4)
    optimizer = one(Adagrad, {"table": start}, 1.0, ())
    gradient = optimizer.named["table"].grad = torch.zeros(5, 4)
    gradient[[1, 3]] = rand(2, 4, seed=1)
    one_step(optimizer)
    moved = (optimizer.named["table"] != start).any(1)
    assert moved.tolist() == [False, True, False, True, False]


def test_each_group_has_its_rule_and_rate():
    rates = dict(lr_embed=0.1, lr_head=0.2, lr_scalar=0.3, lr_muon=0.4, lr_ngram=0.5)
    optimizers = built(ngram=3, ngram_rows=9, **rates).optimizers
    found = {name: (type(o), o.rate) for o in optimizers for name in o.named}
    assert found["wte.weight"] == (Adam, 0.1) and found["lm_head.weight"] == (Adam, 0.2)
    assert found["blocks.0.x_lambda"] == found["blocks.1.attn.value_lambda"] == (Adam, 0.3)
    assert found["blocks.1.x0_lambda"] == (Adam, 0.3)
    assert found["blocks.0.attn.q.weight"] == found["blocks.1.mlp.down.weight"] == (Muon, 0.4)
    assert found["ngrams.0.weight"] == found["ngrams.1.weight"] == (Adagrad, 0.5)
    run = built(matrix_optimizer="adam", lr_adam=0.004)
    matrices = [o for o in run.optimizers if o.trains_matrices]
    assert sum(len(o.named) for o in matrices) == 6 * run.config.n_layer
    assert all(type(o) is Adam and o.rate == 0.004 for o in matrices)
    assert all((o.row_scale == 1).all() for o in matrices), "Adam knows no shapes"


# -------------------------------------------------------------------------------- stacks and shards
def test_parameters_are_views_of_the_stack_and_gradients_are_collected():
    run = train_gpt.build(tiny(zero_init=False), CPU)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    optimizers = run.optimizers = train_gpt.make_optimizers(run)
    shapes = sorted(tuple(o.weights.shape) for o in optimizers if isinstance(o, Muon))
    assert shapes == [(4, 128, 32), (8, 32, 32)]  # up with down; q, k, v, o
    for optimizer in optimizers:
        for name, p in optimizer.named.items():
            assert p.untyped_storage().data_ptr() == optimizer.weights.untyped_storage().data_ptr()
            assert torch.equal(p, before[name])
        optimizer.weights.mul_(2)
    for name, p in run.model.named_parameters():
        assert torch.equal(p, 2 * before[name])
    run.model(*torch.randint(257, (2, 2, 32))).backward()
    for optimizer in optimizers:
        left = {name: p.grad for name, p in optimizer.named.items()}
        optimizer.reduce()
        rows = zip(left.items(), optimizer.unstack(optimizer.grads), strict=True)
        assert all(g is None or torch.equal(g.flatten(), row.flatten()) for (_, g), row in rows)
        assert all(p.grad is None for p in optimizer.named.values()) and optimizer.grads.any()


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_rows_divide_over_ranks_with_padding(world_size):
    """Ranks' rows are disjoint and equal in number; padding is zero; state is a rank's own."""
    covered, fresh = {}, dict(train_gpt.GPT2024(tiny()).named_parameters())
    for rank in range(world_size):
        run = built(Runtime(torch.device("cpu"), rank, world_size))
        assert same(dict(run.model.named_parameters()), fresh), "rows and views meet"
        for index, o in enumerate(run.optimizers):
            used = sum(p.numel() for p in o.named.values()) // math.prod(o.weights.shape[1:])
            unit = world_size * (16 if o.weights.ndim == 1 else 1)  # Adam's shards are aligned
            assert len(o.weights) % unit == 0 and 0 <= len(o.weights) - used < unit
            assert not o.weights[used:].any()
            covered.setdefault(index, []).extend(range(*o.own.indices(len(o.weights))))
            o.steps += 1
            u = o.direction(torch.zeros_like(o.weights[o.own]))
            assert u.shape == o.weights[o.own].shape
            assert torch.isfinite(u).all(), "padding gives no NaN"
            assert all(len(t) == len(o.weights) // world_size for t in o.state.values())
            if isinstance(o.row_scale, torch.Tensor):
                assert len(o.row_scale) == len(o.weights) // world_size
    for rows in covered.values():
        assert rows == list(range(len(rows)))


def test_state_goes_to_parameters_by_name_and_back():
    run, whole = built(), {}
    for o in run.optimizers:
        for p in o.named.values():
            p.grad = rand(max(1, p.numel())).view_as(p)
        one_step(o)
        whole[o.name] = o.gather_state()
    names = [name for state in whole.values() for name in state["parameters"]]
    assert sorted(names) == sorted(dict(run.model.named_parameters()))
    assert len(whole) == len(run.optimizers)
    for rank in range(3):  # another number of ranks takes its own rows of it
        other = built(Runtime(torch.device("cpu"), rank, 3))
        for o, mine in zip(run.optimizers, other.optimizers, strict=True):
            mine.load_state(whole[o.name])
            assert mine.steps == 1 and mine.state.keys() == o.state.keys()
            for name, full in o.state.items():
                expected, got = full[mine.own], mine.state[name]
                assert torch.equal(got[: len(expected)], expected)
                assert not got[len(expected) :].any()
    with pytest.raises(train_gpt.UserError, match="other parameters"):
        run.optimizers[0].load_state(whole[run.optimizers[1].name])


@pytest.mark.parametrize("method", ["galore, 8 bit", "relora", "supar", "lawa"])
def test_a_whole_state_there_and_back(method):
    """What is loaded is what was saved, and both runs go on alike."""
    changes = EVERY_METHOD[method]

    def trained(steps):
        run = train_gpt.build(train_gpt.resolve(tiny(**changes), CPU), CPU)
        run.optimizers = train_gpt.make_optimizers(run)
        advance(run, steps)
        return run

    def advance(run, steps):
        for _ in range(steps):
            train_gpt.set_stage(run)
            tokens = torch.randint(257, (8, 33), generator=torch.Generator().manual_seed(run.step))
            run.micro = {(8, 32): 8}
            batch = train_gpt.make_batch(run, tokens.numpy(), run.step, [])
            train_gpt.forward_backward(run, batch)
            train_gpt.step_optimizers(run)
            run.step += 1
            for hook in run.methods:
                hook.after_step(run.step, run)

    def flat(value, path=""):
        if isinstance(value, dict):
            value = sorted(value.items())
        if isinstance(value, list | tuple):
            return {k: v for i, x in enumerate(value) for k, v in flat(x, f"{path}/{i}").items()}
        return {path: value.clone() if torch.is_tensor(value) else torch.tensor(hash(value))}

    run = trained(5)
    state = run.state()
    before = flat(state)
    again = trained(0)
    again.load_state(state)
    assert same(flat(again.state()), before)
    advance(run, 3)
    advance(again, 3)
    assert same(run.model.state_dict(), again.model.state_dict())


def test_base_class_and_hooks_default_to_nothing():
    g, hooks = rand(2, 3, 4), Method(tiny())
    assert hooks.project(None, g) is g and hooks.lift(None, g) is g
    assert hooks.state_dict() == {} and hooks.eval_weights(None) == {}
    with pytest.raises(NotImplementedError):
        one(Optimizer, {"a": rand(3, 4)}, 1.0, ()).direction(g)


# ---------------------------------------------------------------------------------------- schedules
def rates(steps, **changes):
    config = tiny(steps=100, **changes)
    return [train_gpt.lr_at(step, config) for step in steps]


def test_learning_rate():
    up = rates([0, 4, 9, 10, 50, 74, 75], warmup=10, cooldown=0.25)
    assert up == pytest.approx([0.1, 0.5, 1, 1, 1, 1, 1])
    down = rates([76, 85, 99], cooldown=0.25)
    assert down == pytest.approx([24 / 25, 15 / 25, 1 / 25])
    floor = rates([0, 75, 85, 99], cooldown=0.25, lr_floor=0.1)
    assert floor == pytest.approx([1, 1, 0.1 + 0.9 * 0.6, 0.1 + 0.9 / 25])
    assert rates(range(100), cooldown=0.0) == [1.0] * 100
    staged = rates([0, 49, 50, 51, 99], cooldown=0.0, lr_factor=(1.0, 1.5))
    assert staged == [1.0, 1.0, 1.5, 1.5, 1.5]
    stages = (train_gpt.Stage(steps=80), train_gpt.Stage(steps=20, extension=True))
    extended = dataclasses.replace(tiny(cooldown=0.5, lr_floor=0.1, val_seq_len=32), stages=stages)
    at = [train_gpt.lr_at(step, extended) for step in (0, 75, 95, 99)]
    assert at == pytest.approx([1, 5 / 40 + 0.1 * 35 / 40, 0.1, 0.1])
    both = rates([80], cooldown=0.4, lr_factor=(1.0, 2.0))
    assert both == pytest.approx([2 * 20 / 40])


def test_the_record_of_november_2024():
    """Its rates fall over the last 926 updates; its momentum rises over 500."""
    record = PRESETS["nov2024"]
    rate = [train_gpt.lr_at(step, record) for step in range(record.steps)]
    falling = next(step for step, factor in enumerate(rate) if factor < 1)
    assert falling == 3242 - 926 + 1 and rate[0] == 1 and rate[-1] == pytest.approx(1 / 926)
    momentum = [train_gpt.momentum_at(step, record) for step in (0, 250, 500, 3000)]
    assert momentum == pytest.approx([0.85, 0.90, 0.95, 0.95])


def test_momentum():
    at = train_gpt.momentum_at
    assert at(1, tiny(momentum_warmup=1)) == pytest.approx(0.95)
    never_above = [at(step, tiny(momentum=0.5)) for step in (0, 3, 100)]
    assert never_above == pytest.approx([0.5] * 3)
    falling = [at(step, tiny(momentum_warmup=1, momentum_cooldown=4)) for step in range(12)]
    assert falling == pytest.approx([0.85] + [0.95] * 8 + [0.925, 0.9, 0.875])


def test_relora_schedule_is_jagged():
    jagged = tiny(relora=4, relora_warm_start=30, relora_interval=20, cooldown=0.5, steps=100)
    flat = dataclasses.replace(jagged, relora=0)
    at = train_gpt.lr_at
    ratio = [at(step, jagged) / at(step, flat) for step in range(100)]
    assert ratio[:30] == [1.0] * 30
    assert ratio[30:] == pytest.approx(([0.5] + [1.0] * 19) * 3 + [0.5] + [1.0] * 9)
