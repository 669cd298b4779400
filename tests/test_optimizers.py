"""Update rules against their published form, stacks and shards, and the schedules."""
import math

import pytest
import torch
from helpers import tiny

import train_gpt
from train_gpt import GPT, Adagrad, Adam, Method, Muon, Optimizer, Runtime, init_weights, make_optimizers, newton_schulz

CPU = Runtime(torch.device("cpu"))


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


def model_and_optimizers(runtime=CPU, **changes):
    config = tiny(**changes)
    model = GPT(config)
    init_weights(model, config)
    return model, make_optimizers(model, config, runtime, []), config


# ------------------------------------------------------------------------------------------------------------- Newton-Schulz

@pytest.mark.parametrize("shape", [(4, 24, 24), (3, 24, 96), (3, 96, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_newton_schulz_against_an_svd(shape, dtype):
    n, rows, cols = shape
    U, _, Vh = torch.linalg.svd(rand(*shape), full_matrices=False)
    values = torch.linspace(0.2, 1.0, min(rows, cols))
    g = 37.0 * U * values @ Vh  # well-conditioned; the scale must not matter
    x = newton_schulz(g, dtype)
    assert x.shape == g.shape and x.dtype == torch.float32
    U2, S, Vh2 = torch.linalg.svd(x, full_matrices=False)
    assert 0.6 < S.min() and S.max() < 1.3, (S.min(), S.max())
    tolerance = 0.03 if dtype == torch.bfloat16 else 1e-4
    coordinates = U.mT @ x @ Vh.mT  # diagonal: the singular vectors are kept
    off = coordinates - torch.diag_embed(coordinates.diagonal(dim1=-2, dim2=-1))
    assert off.abs().max() < tolerance
    cosine = (x * (U @ Vh)).sum((-2, -1)) / x.norm(dim=(-2, -1)) / (U @ Vh).norm(dim=(-2, -1))
    assert cosine.min() > 0.97, cosine


def test_newton_schulz_of_a_batch_is_that_of_each():
    for shape in ((5, 16, 16), (5, 16, 64), (5, 64, 16)):
        g = rand(*shape) * torch.logspace(-3, 3, 5)[:, None, None]
        x = newton_schulz(g, torch.float32)
        for i in range(5):
            assert torch.allclose(x[i], newton_schulz(g[i:i + 1], torch.float32)[0], atol=2e-5)
            assert torch.allclose(x[i], published_newton_schulz(g[i]), atol=2e-5)
        assert torch.allclose(newton_schulz(g.mT, torch.float32), x.mT, atol=2e-5)


def test_normuon_evens_out_neurons_and_keeps_the_norm():
    """Rows of a tall matrix, columns of a wide one: by a running mean of squares, bias-corrected like Adam's."""
    for shape in ((8, 4), (4, 8), (4, 4)):
        config, grads = tiny(normuon=0.9, momentum_warmup=0), [rand(1, *shape, seed=s) for s in range(3)]
        plain, even = (Muon({"w": torch.nn.Parameter(rand(*shape))}, 0.1, shape, c, CPU) for c in (tiny(momentum_warmup=0), config))
        mean, dim = 0.0, -1 if shape[0] >= shape[1] else -2
        for step, g in enumerate(grads, 1):
            plain.steps = even.steps = step
            u, found = plain.update(g), even.update(g)
            mean = 0.9 * mean + 0.1 * u.square().mean(dim, keepdim=True)
            expected = u / (mean / (1 - 0.9**step)).sqrt()
            assert torch.allclose(found, expected * u.norm() / expected.norm(), atol=1e-5)
        assert found.norm().item() == pytest.approx(u.norm().item(), rel=1e-4)
        assert set(even.state) == {"momentum", "row_sq"}


def test_newton_schulz_of_zero_is_zero():
    assert torch.equal(newton_schulz(torch.zeros(2, 8, 8), torch.float32), torch.zeros(2, 8, 8))


# ---------------------------------------------------------------------------------------------------------------------- rules

def test_muon_is_the_published_loop():
    """Over all hidden matrices of a model: Nesterov momentum with its warm-up, Newton-Schulz, sqrt(max(1, out / in))."""
    model, optimizers, config = model_and_optimizers(momentum_warmup=3)
    muon = [optimizer for optimizer in optimizers if isinstance(optimizer, Muon)]
    expected = {name: p.detach().clone() for o in muon for name, p in o.named.items()}
    assert len(expected) == 6 * config.n_layer
    buffers = {name: torch.zeros_like(w) for name, w in expected.items()}
    for step in range(5):
        for number, (name, w) in enumerate(expected.items()):
            g = rand(*w.shape, seed=100 * step + number)
            model.get_parameter(name).grad.copy_(g)
            momentum = 0.85 + (0.95 - 0.85) * min(step / 3, 1)
            buffers[name] = momentum * buffers[name] + g
            nesterov = g + momentum * buffers[name]
            down = name.endswith("down.weight")  # lies as [in, out]
            u = published_newton_schulz(nesterov.T if down else nesterov)
            u = u * max(1, u.size(0) / u.size(1)) ** 0.5
            w -= config.lr_muon * 0.5 * (u.T if down else u)
        for optimizer in muon:
            optimizer.scale = 0.5
            optimizer.reduce()
            optimizer.step()
            optimizer.finish()
    for name, w in expected.items():
        assert torch.allclose(model.get_parameter(name), w, atol=2e-5), name
        assert not model.get_parameter(name).grad.any(), "gradients are cleared"


@pytest.mark.parametrize("rule, theirs, settings, state", [
    (Adam, torch.optim.Adam, dict(betas=(0.8, 0.95), eps=1e-8), {"exp_avg", "exp_avg_sq"}),
    (Adagrad, torch.optim.Adagrad, dict(eps=1e-12), {"sum_sq"})])
def test_elementwise_rules_are_those_of_torch(rule, theirs, settings, state):
    config = tiny(beta1=0.8, beta2=0.95, adam_eps=1e-8)
    start = {"a": rand(7, 5), "b": rand(3, seed=1), "c": torch.tensor(0.5)}
    ours, reference_of = ({name: torch.nn.Parameter(t.clone()) for name, t in start.items()} for _ in "ot")
    optimizer, reference = rule(ours, 0.03, (), config, CPU), theirs(reference_of.values(), lr=0.03, **settings)
    for step in range(20):
        for number, name in enumerate(start):
            g = rand(35, seed=10 * step + number + 3)[:start[name].numel()].view_as(start[name]) * 10.0 ** (number - 1)
            ours[name].grad.copy_(g)
            reference_of[name].grad = g
        optimizer.reduce()
        optimizer.step()
        optimizer.finish()
        reference.step()
        for name in start:
            assert (ours[name] - reference_of[name]).abs().max() < 1e-6, (step, name)
    assert set(optimizer.state) == state


def test_rows_without_a_gradient_stay_with_adagrad():
    table = torch.nn.Parameter(rand(5, 4))
    optimizer, before = Adagrad({"table": table}, 1.0, (), tiny(), CPU), table.detach().clone()
    table.grad[[1, 3]] = rand(2, 4, seed=1)
    optimizer.reduce()
    optimizer.step()
    assert (table != before).any(1).tolist() == [False, True, False, True, False]


def test_matrix_optimizer_adam_and_its_rates():
    _, optimizers, config = model_and_optimizers(matrix_optimizer="adam", lr_adam=0.004)
    assert all(type(optimizer) is Adam for optimizer in optimizers)
    matrices = [o for o in optimizers if any(name.startswith("blocks.") and p.ndim == 2 for name, p in o.named.items())]
    assert sum(len(o.named) for o in matrices) == 6 * config.n_layer
    assert all(o.lr == 0.004 and o.row_scale == 1.0 for o in matrices)


def test_each_group_has_its_rate():
    _, optimizers, config = model_and_optimizers(lr_embed=0.1, lr_head=0.2, lr_scalar=0.3, lr_muon=0.4)
    _, with_tables, _ = model_and_optimizers(ngram=3, lr_ngram=0.5)
    assert [(type(o), o.lr, list(o.named)) for o in with_tables if type(o) is Adagrad] == [(Adagrad, 0.5, ["ngrams.0.weight", "ngrams.1.weight"])]
    rates = {name: (type(o), o.lr) for o in optimizers for name in o.named}
    assert rates["wte.weight"] == (Adam, 0.1) and rates["lm_head.weight"] == (Adam, 0.2)
    assert rates["blocks.0.lambdas"] == rates["blocks.1.attn.value_lambda"] == (Adam, 0.3)
    assert rates["blocks.0.attn.q.weight"] == rates["blocks.1.mlp.down.weight"] == (Muon, 0.4)


# ----------------------------------------------------------------------------------------------------------- stacks and shards

def test_parameters_and_gradients_are_views_of_the_stack():
    model, optimizers, _ = model_and_optimizers()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for optimizer in optimizers:
        for name, p in optimizer.named.items():
            assert p.untyped_storage().data_ptr() == optimizer.weights.untyped_storage().data_ptr()
            assert p.grad.untyped_storage().data_ptr() == optimizer.grads.untyped_storage().data_ptr()
            assert p.grad.shape == p.shape and torch.equal(p, before[name])
        optimizer.weights.mul_(2)
    for name, p in model.named_parameters():
        assert torch.equal(p, 2 * before[name])
    loss = model(torch.randint(257, (2, 32)), torch.randint(257, (2, 32)))
    loss.backward()  # accumulates into the views
    assert all(p.grad.untyped_storage().data_ptr() == o.grads.untyped_storage().data_ptr() for o in optimizers for p in o.named.values())
    assert any(o.grads.abs().sum() > 0 for o in optimizers)


def test_matrices_of_one_shape_are_one_stack():
    _, optimizers, config = model_and_optimizers()
    shapes = sorted(tuple(o.weights.shape) for o in optimizers if isinstance(o, Muon))
    assert shapes == [(4, 128, 32), (8, 32, 32)]  # up with down; q, k, v, o


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_rows_divide_over_ranks_with_padding(world_size):
    """Each rank's rows are disjoint and equal in number, the padding is zero, and the state is a rank's own rows."""
    covered = {}
    for rank in range(world_size):
        runtime = Runtime(torch.device("cpu"), rank, world_size)
        model, optimizers, _ = model_and_optimizers(runtime=runtime)
        for index, o in enumerate(optimizers):
            used = sum(p.numel() for p in o.named.values()) // math.prod(o.weights.shape[1:])
            assert len(o.weights) % world_size == 0 and 0 <= len(o.weights) - used < world_size
            assert not o.weights[used:].any()
            covered.setdefault(index, []).extend(range(*o.mine.indices(len(o.weights))))
            o.steps += 1
            u = o.update(o.grads[o.mine])
            assert u.shape == o.weights[o.mine].shape and torch.isfinite(u).all(), "padding gives no NaN"
            assert all(len(t) == len(o.weights) // world_size for t in o.state.values())
    for index, rows in covered.items():
        assert rows == list(range(len(rows)))


def test_state_goes_to_parameters_by_name_and_back():
    model, optimizers, config = model_and_optimizers()
    for o in optimizers:
        o.grads.copy_(rand(*o.grads.shape))
        o.step()
    whole = {name: state for o in optimizers for name, state in o.gather_state().items()}
    assert whole.keys() == dict(model.named_parameters()).keys()
    for rank in range(3):  # another number of ranks takes its own rows of it
        _, others, _ = model_and_optimizers(runtime=Runtime(torch.device("cpu"), rank, 3))
        for o, other in zip(optimizers, others):
            other.load_state(whole)
            assert other.steps == 1
            for name, full in o.state.items():
                mine = full[other.mine]
                assert torch.equal(other.state[name][:len(mine)], mine) and not other.state[name][len(mine):].any()
    with pytest.raises(KeyError):
        optimizers[0].load_state({"another": {"steps": 1}})


def test_base_class_and_hooks_default_to_nothing():
    g = rand(2, 3, 4)
    assert Method().project(None, g) is g and Method().lift(None, g) is g and Method().state_dict() == {}
    with pytest.raises(NotImplementedError):
        Optimizer({"a": torch.nn.Parameter(rand(3, 4))}, 1.0, (), tiny(), CPU).update(g)


# ------------------------------------------------------------------------------------------------------------------ schedules

def test_learning_rate():
    at = train_gpt.lr_at
    config = tiny(steps=100, warmup=10, cooldown=0.25)
    assert [at(step, config) for step in (0, 4, 9, 10, 50, 74, 75)] == pytest.approx([0.1, 0.5, 1, 1, 1, 1, 1])
    assert [at(step, config) for step in (76, 85, 99)] == pytest.approx([24 / 25, 15 / 25, 1 / 25])
    assert [at(step, tiny(steps=100, cooldown=0.25, lr_floor=0.1)) for step in (0, 75, 85, 99)] == pytest.approx([1, 1, 0.1 + 0.9 * 0.6, 0.1 + 0.9 / 25])
    assert all(at(step, tiny(steps=100, cooldown=0.0)) == 1 for step in range(100))
    record = train_gpt.PRESETS["gpt2_small"]
    falling = next(step for step in range(record.steps) if at(step, record) < 1)
    assert falling == 3242 - 926 + 1 and at(0, record) == 1 and at(3241, record) == pytest.approx(1 / 926)


def test_momentum():
    at, config = train_gpt.momentum_at, tiny(momentum_warmup=300)
    assert [at(step, config) for step in (0, 150, 300, 5000)] == pytest.approx([0.85, 0.90, 0.95, 0.95])
    assert at(0, tiny(momentum_warmup=0)) in (pytest.approx(0.85), pytest.approx(0.95)) and at(1, tiny(momentum_warmup=0)) == pytest.approx(0.95)
    assert all(at(step, tiny(momentum=0.5)) == pytest.approx(0.5) for step in (0, 3, 100)), "never above the setting"
