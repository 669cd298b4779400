"""What ReLoRA, GaLore, LAWA and SuPar promise, as properties of tiny models and of single matrices."""
import dataclasses
import functools
import io
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_gpt as tg

ALONE = tg.Runtime(torch.device("cpu"))
TINY = dataclasses.replace(tg.PRESETS["laptop"], n_layer=2, n_head=2, n_embd=32, ngram=0, normuon=0.0, lr_floor=0.0,
                           vocab_size=64, seq_len=16, batch_tokens=64, val_tokens=64, steps=24, spread_rows=False, device="cpu")
METHODS = {
    "relora": dict(relora=2, relora_warm_start=3, relora_interval=4, relora_rewarm=2),
    "relora_muon": dict(relora=2, relora_warm_start=3, relora_interval=4, relora_rewarm=2, relora_optimizer="muon", normuon=0.9),
    "galore": dict(galore=4, galore_interval=5),
    "galore_muon": dict(galore=4, galore_interval=5, galore_inner="muon"),
    "galore_8bit": dict(galore=4, galore_interval=5, galore_bits=8),
    "galore_per_layer": dict(galore=4, galore_interval=5, galore_per_layer=True),
    "lawa": dict(lawa=3, lawa_interval=2),
    "lawa_replace": dict(lawa=3, lawa_interval=2, lawa_mode="replace"),
    "supar": dict(sparsity=0.75, mup_base_width=16),
    "relora_lawa": dict(relora=2, relora_warm_start=3, relora_interval=4, relora_rewarm=2, lawa=2, lawa_interval=3),
    "supar_lawa": dict(sparsity=0.5, lawa=2, lawa_interval=3),
}


def build(start: int = 0, **fields) -> tg.Run:
    """A run as train() makes it, without data, clock and log, in the shape it has after `start` updates."""
    config = tg.resolve(dataclasses.replace(TINY, **fields), ALONE.device)
    model = tg.GPT(config)
    tg.init_weights(model, config)
    methods = tg.make_methods(config)
    for method in methods:
        method.attach(model)
    run = tg.Run(config, ALONE, model, methods, tg.make_optimizers(model, config, ALONE, methods), step=start)
    if start:
        for method in methods:
            method.resume(start, run)
    return run


def batch(step: int, config: tg.Config) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens, but each one says something about the next."""
    rows = torch.randint(config.vocab_size, (config.rows, config.seq_len + 1), generator=tg.seeded("test", step))
    rows[:, 1::2] = (rows[:, 0:-1:2] * 5 + 1) % config.vocab_size
    return rows[:, :-1], rows[:, 1:]


def advance(run: tg.Run, steps: int, micro: int = 0, hooks: bool = True) -> tg.Run:
    for _ in range(steps):
        for optimizer in run.optimizers:
            optimizer.scale = tg.lr_at(run.step, run.config)
        tg.forward_backward(run.model, *batch(run.step, run.config), micro or run.config.rows, 1)
        tg.update(run)
        run.step += 1
        if hooks:
            call_hooks(run)
    return run


def call_hooks(run: tg.Run):
    for method in run.methods:
        method.after_step(run.step, run)


def weights(run: tg.Run) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in run.model.named_parameters()}


@torch.no_grad()
def logits(run: tg.Run) -> torch.Tensor:
    return run.model(batch(99, run.config)[0])


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def rank(matrix: torch.Tensor, tolerance: float) -> int:
    s = torch.linalg.svdvals(matrix.double())
    return int((s > tolerance * s[0]).sum())


def one(kind: type, shape: tuple, method=None, lr: float = 0.1, **fields) -> tuple[torch.Tensor, tg.Optimizer]:
    """One seeded matrix and its optimizer."""
    p = torch.nn.Parameter(torch.randn(shape, generator=tg.seeded("matrix", shape)))
    optimizer = kind({"w": p}, lr, shape, dataclasses.replace(TINY, **fields), ALONE)
    if method:
        optimizer.method = method
    return p, optimizer


def feed(p: torch.Tensor, optimizer: tg.Optimizer, step: int, rank: int = 0):
    """One update on the gradient of `step`, of full rank or of the given one."""
    g = torch.randn(p.shape, generator=tg.seeded("gradient", step))
    if rank:
        U, S, V = torch.linalg.svd(g, full_matrices=False)
        g = U[:, :rank] * S[:rank] @ V[:rank]
    p.grad.copy_(g)
    optimizer.reduce()
    optimizer.step()
    optimizer.finish()


# ------------------------------------------------------------------------------------------------------------ all of them

def test_off_is_bit_identical_and_creates_nothing(monkeypatch):
    """Bitwise the same as a build without methods, and no method object exists."""
    expected = weights(advance(build(), 6))
    made = []
    for name in ("ReLoRA", "GaLore", "LAWA", "SuPar"):
        monkeypatch.setattr(tg, name, lambda *a, name=name, **k: made.append(name))
    off = build()
    assert not off.methods and not made
    monkeypatch.setattr(tg, "make_methods", lambda *a, **k: [])
    assert same(weights(advance(build(), 6)), expected)


@pytest.mark.parametrize("name", METHODS)
def test_trains(name):
    """The loss falls with every method, and nothing becomes NaN."""
    run = build(**METHODS[name])
    first = tg.forward_backward(run.model, *batch(0, run.config), run.config.rows, 1)
    for optimizer in run.optimizers:
        if optimizer.grads is not None:
            optimizer.grads.zero_()
    advance(run, 14)
    with torch.no_grad():
        assert run.model(*batch(14, run.config)) < first - 0.05
    assert all(p.isfinite().all() for p in run.model.parameters())


@pytest.mark.parametrize("at", [3, 6])
@pytest.mark.parametrize("name", METHODS)
def test_resumes_bit_for_bit(name, at):
    """From a checkpoint read with weights_only=True, also in the middle of a cycle."""
    run = advance(build(**METHODS[name]), at)
    file = io.BytesIO()
    torch.save(run.state(), file)
    file.seek(0)
    again = build(start=at, **METHODS[name])
    again.load_state(torch.load(file, weights_only=True))
    advance(run, 6), advance(again, 6)
    assert same(weights(run), weights(again))
    for a, b in zip(run.methods, again.methods):
        with a.eval_weights(run.model), b.eval_weights(again.model):
            assert same(weights(run), weights(again))


@pytest.mark.parametrize("name", ["relora", "galore_muon", "supar"])
def test_four_micro_batches_equal_one(name):
    whole, parts = build(**METHODS[name]), build(**METHODS[name])
    advance(whole, 6), advance(parts, 6, micro=1)
    for (n, a), b in zip(whole.model.named_parameters(), parts.model.parameters()):
        # Adam's first step is the sign of the gradient, so that B, which starts at zero, doubles rounding errors
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3 if name == "relora" else 5e-4, msg=n)


@pytest.mark.parametrize("flags, words", [
    ("--relora 33", "rank"), ("--galore 33", "rank"), ("--relora -1", "--relora"), ("--galore 1.5", "--galore: invalid int"),
    ("--sparsity 1", "--sparsity"), ("--sparsity -0.1", "--sparsity"), ("--sparsity nan", "--sparsity"), ("--mup_base_width -4", "--mup_base_width"),
    ("--relora 4 --galore 4", "combined"), ("--relora 4 --sparsity 0.5", "combined"), ("--galore 4 --sparsity 0.5", "combined"),
    ("--galore 4 --mup_base_width 16", "combined"), ("--relora 4 --mup_base_width 16", "combined"),
    ("--relora 4 --relora_interval 24", "run"), ("--relora 4 --relora_warm_start 24", "run"), ("--galore 4 --galore_interval 25", "run"),
    ("--lawa 4 --lawa_interval 30", "run"), ("--relora 4 --relora_rewarm 40", "run"), ("--galore 4 --galore_interval 0", "galore_interval"),
    ("--galore_bits 8", "--galore"), ("--relora_interval 4", "--relora"), ("--lawa_mode replace", "--lawa"), ("--galore_per_layer", "--galore"),
    ("--galore 4 --galore_bits 16", "32, 8"), ("--galore 4 --galore_inner sgd", "adam"), ("--lawa 4 --lawa_mode often", "eval, replace"),
    ("--relora 4 --relora_optimizer sgd", "adam"), ("--relora 4 --relora_prune 1.1", "relora_prune"), ("--lawa -2", "--lawa"),
])
def test_refusals(flags, words):
    with pytest.raises(tg.UserError) as refused:
        tg.parse_config(f"--preset laptop --n_embd 32 --steps 24 {flags}".split(), "laptop")
    assert words in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("one_of, other", [("relora", "galore"), ("galore", "supar"), ("lawa", "supar")])
def test_checkpoint_of_another_method_is_refused(one_of, other, tmp_path):
    """Named before anything is loaded: `differences` is what resume() refuses on."""
    written, now = build(**METHODS[one_of]).config, build(**METHODS[other]).config
    state = dict(config=dataclasses.asdict(written), source_sha256=tg.SOURCE_SHA256, data_sha256={})
    assert any(one_of in line for line in tg.differences(state, SimpleNamespace(config=now, data={})))
    assert not tg.differences(state, SimpleNamespace(config=written, data={}))


def test_choices_are_printed_in_the_config():
    """0 stands for "chosen for you": resolve() fills in what runs, and the log's config shows it."""
    c = tg.resolve(dataclasses.replace(TINY, steps=1000, relora=8, lawa=5), ALONE.device)
    assert 0 < c.relora_warm_start < c.relora_warm_start + c.relora_interval < 1000
    assert 0 < c.relora_rewarm < c.relora_interval and c.relora_alpha > 0 and c.lawa_interval == 10


# ----------------------------------------------------------------------------------------------------------------- ReLoRA

def relora(steps: int = 0, **fields) -> tg.Run:
    return advance(build(**METHODS["relora"] | fields), steps)


def adapters(run: tg.Run) -> dict:
    return {name: m for name, m in run.model.named_modules() if isinstance(m, tg.LoRALinear)}


def test_relora_wrap_leaves_logits_unchanged():
    run = relora(2)
    advance(run, 1, hooks=False)
    before = logits(run)
    assert not adapters(run)
    call_hooks(run)
    assert len(adapters(run)) == 6 * run.config.n_layer
    assert torch.equal(logits(run), before)
    assert not any(p.requires_grad for name, p in run.model.named_parameters() if name.startswith("blocks.") and name.endswith("weight"))


def test_relora_first_step_after_the_wrap_reaches_every_B():
    run = relora(3)
    tg.forward_backward(run.model, *batch(3, run.config), run.config.rows, 1)
    for name, layer in adapters(run).items():
        assert layer.B.grad.norm() > 0 and layer.A.abs().sum() > 0 and layer.weight.grad is None, name


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_relora_merge_is_exact(optimizer):
    run = relora(6, relora_optimizer=optimizer)
    advance(run, 1, hooks=False)
    before, layers = logits(run), adapters(run)
    old = {name: (m.weight.double(), m.A.double(), m.B.double()) for name, m in layers.items()}
    call_hooks(run)
    assert (logits(run) - before).abs().max() <= 1e-5
    for name, layer in layers.items():
        W, A, B = old[name]
        delta = run.config.relora_alpha / run.config.relora * B @ A
        assert delta.abs().max() > 0
        torch.testing.assert_close(layer.weight.double(), W + (delta.T if layer.transposed else delta), rtol=1e-6, atol=1e-7)
        assert not layer.B.any() and not torch.equal(layer.A.double(), A) and layer.weight.dtype == torch.float32


@pytest.mark.parametrize("r", [2, 12])
def test_relora_rank_adds_up(r):
    """rank(W - W at the wrap) is min(k r, n) after k merges: the point of ReLoRA."""
    run = relora(3, relora=r, lr_adam=0.05)
    start = {name: m.weight.clone() for name, m in adapters(run).items()}
    for merges in (1, 2, 3, 4):
        advance(run, 4)
        ranks = {name: rank(m.weight - start[name], 1e-5) for name, m in adapters(run).items()}
        assert set(ranks.values()) == {min(merges * r, 32)}, ranks


def test_relora_prunes_adapter_state_only():
    run = relora(6)
    advance(run, 1, hooks=False)
    others = [o for o in run.optimizers if not any(".A" in n or ".B" in n for n in o.named)]
    before = [({k: t.clone() for k, t in o.state.items()}, o.steps) for o in others]
    call_hooks(run)
    assert len(others) == 3
    for optimizer, (state, steps) in zip(others, before):
        assert same(optimizer.state, state) and optimizer.steps == steps
    for optimizer in (o for o in run.optimizers if o not in others):
        m, v = (optimizer.state[name].flatten(1) for name in ("exp_avg", "exp_avg_sq"))
        assert ((m != 0).sum(1) == round(0.01 * m.size(1))).all() and torch.equal(m != 0, v != 0)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("prune", [0.0, 0.5, 0.9, 1.0])
def test_relora_keeps_the_exact_share(prune, ties):
    """Also where all entries are equal; m and v keep the same ones; Adam's next update is the unbiased mean of what it kept."""
    run = relora(4, relora_prune=prune)
    method, optimizer = run.methods[0], next(o for o in run.optimizers if any(".A" in n for n in o.named))
    m, v = optimizer.state["exp_avg"], optimizer.state["exp_avg_sq"]
    m.copy_(torch.ones_like(m) if ties else torch.randn(m.shape, generator=tg.seeded("m")))
    v.copy_(m.square())
    optimizer.steps, old = 40, m.clone()
    method.prune(optimizer)
    m, v = optimizer.state["exp_avg"], optimizer.state["exp_avg_sq"]
    kept = (m != 0).flatten(1)
    assert (kept.sum(1) == round((1 - prune) * kept.size(1))).all() and torch.equal(kept, (v != 0).flatten(1))
    largest = old.abs().where(m != 0, math.inf).flatten(1).amin(1) >= old.abs().where(m == 0, 0).flatten(1).amax(1)
    assert largest.all() or prune == 1
    unbiased = m / (1 - run.config.beta1**optimizer.steps)
    torch.testing.assert_close(unbiased, old.where(m != 0, 0) / (1 - run.config.beta1**40))


def test_relora_first_update_after_a_full_prune_is_no_jump():
    """With a stale step count it would be (1 - β1) / √(1 - β2) of the bias-corrected step, with v pruned alone up to 1 / eps."""
    run = relora(11, relora_prune=1.0)
    optimizer = next(o for o in run.optimizers if any(".A" in n for n in o.named))
    g = torch.randn(optimizer.weights.shape, generator=tg.seeded("g"))
    optimizer.steps += 1
    assert 0.5 < optimizer.update(g).abs().max() < 1.1


def test_relora_draws_A_from_the_seed_alone():
    """Equal on any rank: whatever was drawn from torch's generator before; new at every merge, for every matrix, for every seed."""
    a = relora(7)
    torch.rand(17)
    b, c = relora(7), relora(7, seed=1)
    first, second, other = ({name: m.A for name, m in adapters(run).items()} for run in (a, b, c))
    assert same(first, second)
    drawn = [*first.values(), *other.values(), *(m.A for m in adapters(relora(3)).values())]
    assert len({round(A.double().sum().item(), 9) for A in drawn}) == len(drawn)


def test_relora_schedule_is_jagged():
    c = relora().config
    flat = dataclasses.replace(c, relora=0, relora_alpha=0, relora_warm_start=0, relora_interval=0, relora_rewarm=0)
    ratio = [tg.lr_at(step, c) / tg.lr_at(step, flat) for step in range(c.steps)]
    assert ratio[:3] == [1.0] * 3
    assert ratio[3:11] == [0.5, 1.0, 1.0, 1.0] * 2


# ----------------------------------------------------------------------------------------------------------------- GaLore

class SGD(tg.Optimizer):
    def update(self, g):
        return g


class HeavyBall(tg.Optimizer):
    def update(self, g):
        return self.moment("momentum", g).mul_(0.9).add_(g).clone()


SHAPES = [(12, 12), (24, 8), (8, 24)]


def galore(r: int, **fields) -> tg.GaLore:
    return tg.GaLore(dataclasses.replace(TINY, galore=r, **fields), lambda line: None)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind, interval, tolerance", [(SGD, 1, 1e-5), (SGD, 3, 1e-5), (HeavyBall, 20, 1e-5), (HeavyBall, 3, 1e-5), (tg.Muon, 20, 2e-4)])
def test_galore_at_full_rank_is_the_inner_optimizer(shape, kind, interval, tolerance):
    """SGD and, as moments move to the new basis, momentum for any interval; Muon, which rotations commute with, too."""
    method = galore(min(shape), galore_scale=1.0, galore_interval=interval)
    (p, projected), (q, plain) = one(kind, shape, method), one(kind, shape)
    for step in range(10):
        feed(p, projected, step), feed(q, plain, step)
    torch.testing.assert_close(p, q, rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES)
def test_galore_projection_is_orthonormal_and_leading(shape):
    p, optimizer = one(tg.Adam, shape, galore(3, galore_interval=1))
    feed(p, optimizer, 0)
    P, g = optimizer.state["P"][0], torch.randn(shape, generator=tg.seeded("gradient", 0))
    assert P.shape == (min(shape), 3)
    torch.testing.assert_close(P.T @ P, torch.eye(3), rtol=0, atol=1e-5)
    best = torch.linalg.svdvals(g)[:3].norm()
    torch.testing.assert_close((g @ P if shape[0] >= shape[1] else P.T @ g).norm(), best)


@pytest.mark.parametrize("kind", [tg.Adam, tg.Muon])
@pytest.mark.parametrize("shape", SHAPES)
def test_galore_moves_within_r_dimensions_per_period(shape, kind):
    p, optimizer = one(kind, shape, galore(2, galore_interval=5))
    before, start = [], p.detach().clone()
    for step in range(20):
        if step % 5 == 0:
            before.append(p.detach().clone())
        feed(p, optimizer, step)
    before.append(p.detach().clone())
    assert all(rank(b - a, 1e-5) == 2 for a, b in zip(before[1:], before[2:]))
    assert rank(p.detach() - start, 1e-5) > 2


@pytest.mark.parametrize("shape", SHAPES + [(100, 40)])
@pytest.mark.parametrize("bits", [32, 8])
def test_galore_state_bytes_equal_the_formula(shape, bits):
    """min·r floats of P, and 2·max·r of moments: 4 bytes each, or 1 and 4 more per block of 256."""
    r, method = 4, galore(4, galore_bits=bits)
    p, optimizer = one(method.optimizers["adam"], shape, method)
    feed(p, optimizer, 0)
    blocks = -(-max(shape) * r // 256)
    moment = 4 * max(shape) * r if bits == 32 else blocks * (256 + 4)
    assert sum(t.nbytes for t in optimizer.state.values()) == 4 * min(shape) * r + 2 * moment


def test_galore_state_of_a_model_is_smaller():
    full, low = (advance(build(matrix_optimizer="adam", **fields), 1) for fields in ({}, dict(galore=4, galore_inner="adam")))
    sizes = [sum(t.nbytes for o in run.optimizers if o.weights.ndim == 3 for t in o.state.values()) for run in (full, low)]
    shapes = [p.shape for o in full.optimizers if o.weights.ndim == 3 for p in o.named.values()]
    assert sizes == [sum(4 * 2 * m * n for m, n in shapes), sum(4 * (min(m, n) * 4 + 2 * max(m, n) * 4) for m, n in shapes)]


@pytest.mark.parametrize("kind, names", [("adam", ("exp_avg", "exp_avg_sq")), ("muon", ("momentum",))])
def test_galore_8bit_moments_are_close(kind, names):
    exact, rounded = galore(4), galore(4, galore_bits=8)
    (p, a), (q, b) = one(exact.optimizers[kind], (64, 32), exact), one(rounded.optimizers[kind], (64, 32), rounded)
    for step in range(8):
        feed(p, a, step), feed(q, b, step)
    assert b.state[names[0]].dtype == torch.uint8
    for name in names:
        full, read = a.moment(name, a.state[name]), b.moment(name, a.state[name])
        assert (full - read).norm() / full.norm() < 0.1, name
    start = torch.randn((64, 32), generator=tg.seeded("matrix", (64, 32)))
    assert (p - q).norm() / (p - start).norm() < 0.1


def test_galore_inner_optimizer_is_the_flag():
    for inner in ("adam", "muon"):
        run = advance(build(galore=4, galore_inner=inner), 1)
        states = [set(o.state) for o in run.optimizers if o.weights.ndim == 3]
        assert all(("momentum" in names) == (inner == "muon") for names in states), inner


def test_galore_projection_follows_the_gradient_although_matrices_start_at_zero():
    """Zero-initialised projections give q, k, v and up no gradient at first; P must not stay arbitrary for a whole interval."""
    run = advance(build(galore=4, galore_interval=20, batch_tokens=1024), 5)
    tg.forward_backward(run.model, *batch(5, run.config), run.config.rows, 1)
    for optimizer in (o for o in run.optimizers if o.weights.ndim == 3):
        g, P = optimizer.grads, optimizer.state["P"]
        kept = (g @ P).flatten(1).norm(dim=1) / torch.linalg.svdvals(g)[:, :4].norm(dim=1)
        assert kept.mean() > 0.53, kept  # a random P of rank 4 would keep 0.42 to 0.48


def test_galore_survives_a_failing_svd(monkeypatch):
    """The last projection, at first a random orthonormal one; a line in the log; no NaN."""
    said = []
    method = tg.GaLore(dataclasses.replace(TINY, galore=3, galore_interval=2), said.append)
    p, optimizer = one(tg.Adam, (12, 8), method)
    svd = torch.linalg.svd
    def failing(*a, **k):
        raise torch.linalg.LinAlgError("did not converge")
    monkeypatch.setattr(torch.linalg, "svd", failing)
    feed(p, optimizer, 0)
    P = optimizer.state["P"][0]
    torch.testing.assert_close(P.T @ P, torch.eye(3), rtol=0, atol=1e-5)
    monkeypatch.setattr(torch.linalg, "svd", svd)
    feed(p, optimizer, 1), feed(p, optimizer, 2)
    P = optimizer.state["P"].clone()
    monkeypatch.setattr(torch.linalg, "svd", failing)
    feed(p, optimizer, 3), feed(p, optimizer, 4)
    assert torch.equal(optimizer.state["P"], P) and p.isfinite().all()
    assert len(said) >= 2 and all("svd" in line.lower() for line in said)


@pytest.fixture
def losses(tmp_path):
    """Run train() itself on made-up shards; returns the train losses of its log."""
    for name in ("train", "val"):
        rows = torch.cat([torch.cat(batch(step, TINY)).flatten() for step in range(16 if name == "train" else 1)])
        header = np.zeros(256, dtype="<i4")
        header[:3] = 20240520, 1, len(rows)
        (tmp_path / f"{name}.bin").write_bytes(header.tobytes() + rows.numpy().astype("<u2").tobytes())

    def run(**fields) -> list[float]:
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        config = dataclasses.replace(TINY, train_files=str(tmp_path / "train.bin"), val_files=str(tmp_path / "val.bin"), steps=16, val_every=0,
                                     log_dir=str(folder), **fields)
        tg.train(tg.resolve(config, ALONE.device), ALONE, [])
        (log,) = folder.glob("*.txt")
        return [float(loss) for loss in re.findall(r"^step:\d+/16 train_loss:(\S+)", log.read_text(), re.M)]
    return run


@pytest.mark.parametrize("bits", [32, 8])
def test_galore_per_layer_equals_the_stacked_update(losses, bits):
    """Step by step, through warm-up and cool-down of the rate, in the real training loop."""
    fields = dict(galore=4, galore_interval=6, galore_bits=bits, galore_scale=2.0, warmup=8, cooldown=0.5, lr_adam=0.02, galore_inner="adam")
    stacked, layered = losses(**fields), losses(galore_per_layer=True, **fields)
    assert len(stacked) == 16 and stacked[-1] < stacked[0] - 0.05
    assert max(abs(a - b) for a, b in zip(stacked, layered)) < 3e-4


def test_galore_per_layer_frees_every_gradient():
    run = build(**METHODS["galore_per_layer"])
    tg.forward_backward(run.model, *batch(0, run.config), run.config.rows, 1)
    assert all(p.grad is None for p in hidden(run).values()) and len(hidden(run)) == 12
    assert all(o.grads is None for o in run.optimizers if o.weights.ndim == 3)


# ------------------------------------------------------------------------------------------------------------------- LAWA

def test_lawa_is_the_fp64_mean_of_the_last_k():
    run, kept = build(**METHODS["lawa"]), {}
    for _ in range(9):
        advance(run, 1)
        kept[run.step] = weights(run)
    raw = weights(run)
    with run.methods[0].eval_weights(run.model):
        for name, p in run.model.named_parameters():
            mean = torch.stack([kept[step][name].double() for step in (4, 6, 8)]).mean(0)
            assert torch.equal(p, mean.to(p.dtype)), name
    assert same(weights(run), raw)


def test_lawa_before_the_first_snapshot_evaluates_the_raw_weights():
    run = advance(build(**METHODS["lawa"]), 1)
    raw = weights(run)
    with run.methods[0].eval_weights(run.model):
        assert same(weights(run), raw)


def test_lawa_of_one_is_the_raw_weights():
    run = advance(build(lawa=1, lawa_interval=1), 5)
    raw = weights(run)
    with run.methods[0].eval_weights(run.model):
        assert same(weights(run), raw)


@pytest.mark.parametrize("extra", [{}, METHODS["relora"], METHODS["supar"], METHODS["galore"]])
def test_lawa_eval_does_not_touch_training(extra):
    plain, averaged = build(**extra), build(lawa=2, lawa_interval=2, **extra)
    for _ in range(9):
        advance(plain, 1), advance(averaged, 1)
        with averaged.methods[-1].eval_weights(averaged.model):
            logits(averaged)
        assert same(weights(plain), weights(averaged))


def test_lawa_window_does_not_alias_the_weights():
    run = advance(build(**METHODS["lawa"]), 2)
    window = run.methods[0].window
    live = {p.untyped_storage().data_ptr() for p in run.model.parameters()}
    assert not live & {t.untyped_storage().data_ptr() for snapshot in window for t in snapshot.values()}
    before = {name: t.clone() for name, t in window[0].items()}
    advance(run, 1)
    assert same(window[0], before)


def test_lawa_replace_trains_on_from_the_mean():
    run, kept = build(lawa=2, lawa_interval=2, lawa_mode="replace"), []
    for step in range(1, 5):
        advance(run, 1, hooks=False)
        kept.append(weights(run))
        call_hooks(run)
    for name, p in run.model.named_parameters():
        torch.testing.assert_close(p.data, (kept[1][name] + kept[3][name]) / 2, rtol=1e-6, atol=1e-7)


def test_lawa_averages_merged_adapters():
    """The mean of W + s B A, not of the factors: also across a merge."""
    run, kept = build(lawa=2, lawa_interval=1, **METHODS["relora"]), {}
    for _ in range(8):
        advance(run, 1, hooks=False)
        kept[run.step] = {name: m.merged().detach().double() for name, m in adapters(run).items()}
        call_hooks(run)
    with run.methods[-1].eval_weights(run.model):
        for name, layer in adapters(run).items():
            torch.testing.assert_close(layer.merged().double(), (kept[7][name] + kept[8][name]) / 2, rtol=1e-5, atol=1e-6)


def test_lawa_replace_keeps_the_newest_adapters():
    """A is drawn anew at every merge: the mean of two draws is neither. W is the mean of the merged ones, B zero."""
    run = advance(build(lawa=2, lawa_interval=1, lawa_mode="replace", **METHODS["relora"]), 5)
    relora, lawa = run.methods
    for _ in range(4):  # a merge among them
        advance(run, 1, hooks=False)
        relora.after_step(run.step, run)
        drawn = {name: layer.A.clone() for name, layer in adapters(run).items()}
        lawa.after_step(run.step, run)
        for name, layer in adapters(run).items():
            assert torch.equal(layer.A, drawn[name]) and not layer.B.any()


def test_lawa_refuses_a_window_that_never_fills():
    with pytest.raises(tg.UserError, match="never fill the window"):
        tg.resolve(dataclasses.replace(TINY, steps=24, lawa=5, lawa_interval=5), ALONE.device)


# ------------------------------------------------------------------------------------------------------------------ SuPar

def hidden(run: tg.Run) -> dict[str, torch.Tensor]:
    return {name: p for name, p in run.model.named_parameters() if name.startswith("blocks.") and p.ndim == 2}


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_supar_dense_at_the_base_width_is_the_standard_model(optimizer):
    standard, same_width = (build(matrix_optimizer=optimizer, **fields) for fields in ({}, dict(mup_base_width=32)))
    assert type(same_width.methods[0]) is tg.SuPar
    advance(standard, 5), advance(same_width, 5)
    assert same(weights(standard), weights(same_width)) and torch.equal(logits(standard), logits(same_width))


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_supar_dense_is_mup(optimizer):
    """Against muP written down by hand: Adam's hidden rate and the logits over m_d, nothing else."""
    supar, config = build(matrix_optimizer=optimizer, mup_base_width=8), None
    config = tg.resolve(dataclasses.replace(TINY, matrix_optimizer=optimizer), ALONE.device)
    model = tg.GPT(config)
    tg.init_weights(model, config)
    model.lm_head.register_forward_hook(lambda module, inputs, y: y / 4)
    for p in hidden(tg.Run(config, ALONE, model, [], [])).values():
        p.lr_mult = 1 / 4 if optimizer == "adam" else 1.0
    by_hand = tg.Run(config, ALONE, model, [], tg.make_optimizers(model, config, ALONE, []))
    advance(supar, 5), advance(by_hand, 5)
    assert same(weights(supar), weights(by_hand))


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_supar_masked_weights_stay_zero_and_others_move(optimizer):
    run = build(sparsity=0.75, matrix_optimizer=optimizer, zero_init=False)
    masks, start = run.methods[0].masks, weights(run)
    assert all(not start[name][~mask].any() for name, mask in masks.items())
    advance(run, 5)
    for name, p in hidden(run).items():
        assert not p[~masks[name]].any() and (p != start[name])[masks[name]].float().mean() > 0.9, name
        assert abs(masks[name].float().mean() - 0.25) < 0.06


def test_supar_masks_are_equal_everywhere_and_differ_between_matrices():
    a = build(sparsity=0.5).methods[0].masks
    torch.rand(3)
    b, other_seed = build(sparsity=0.5).methods[0].masks, build(sparsity=0.5, seed=1).methods[0].masks
    assert same(a, b) and not any(torch.equal(a[name], other_seed[name]) for name in a)
    square = [mask for mask in a.values() if mask.shape == (32, 32)]
    assert len({tuple(mask.flatten().tolist()) for mask in square}) == len(square) == 8


def test_supar_masks_come_back_from_the_checkpoint():
    """Not redrawn: a checkpoint's mask wins over the one that this code would draw."""
    run = advance(build(sparsity=0.5), 2)
    state = run.state()
    name = next(iter(hidden(run)))
    mask = state["optimizers"][name]["mask"]
    assert torch.equal(mask[0], run.methods[0].masks[name])
    run.load_state(state)
    assert all(torch.equal(o.state["mask"][o.spans[n]][0], run.methods[0].masks[n]) for o in run.optimizers for n in o.named if "mask" in o.state)


def test_supar_rates():
    """Adam: 1 / (m_d rho). Muon: rho ** -MUON_POWER, no m_d."""
    for optimizer, expected in (("adam", 2.0), ("muon", 0.25**-tg.SuPar.MUON_POWER)):
        run = build(sparsity=0.75, mup_base_width=16, matrix_optimizer=optimizer)
        assert {p.lr_mult for p in hidden(run).values()} == {expected}


@functools.cache
@torch.no_grad()
def activations(width: int, density: float) -> dict[str, float]:
    """Mean |output| of every hidden matrix at init, without zero-init."""
    config = dataclasses.replace(TINY, n_layer=1, n_head=4, n_embd=width, seq_len=32, batch_tokens=64, zero_init=False, sparsity=1 - density,
                                 mup_base_width=256)
    model, seen = tg.GPT(config), {}
    tg.init_weights(model, config)
    for method in tg.make_methods(config):
        method.attach(model)
    for name, module in model.blocks.named_modules():
        if isinstance(module, tg.Linear):
            module.register_forward_hook(lambda module, inputs, y, name=name: seen.update({name: y.abs().mean().item()}))
    model(torch.randint(64, (4, 32), generator=tg.seeded("tokens")))
    return seen


@pytest.mark.parametrize("density", [1.0, 1 / 4, 1 / 16])
@pytest.mark.parametrize("width", [256, 512, 1024])
def test_supar_keeps_activations_at_init(width, density):
    """Within 3 % of dense at 256; a single matrix varies a little more with its few weights per neuron."""
    dense, now = activations(256, 1.0), activations(width, density)
    ratios = [now[name] / dense[name] for name in dense]
    assert abs(sum(ratios) / len(ratios) - 1) < 0.03 and all(abs(ratio - 1) < 0.06 for ratio in ratios), ratios


# ---------------------------------------------------------------------------------------------------------- torch.compile

@pytest.mark.slow
@pytest.mark.parametrize("name", ["relora", "galore", "lawa", "supar"])
def test_compiled_equals_eager(name):
    """Step by step from the same state: losses, gradients, and weights after the update. On their own the two would drift apart, as
    Newton-Schulz and Adam make whole steps even of rounding errors; an eps above those keeps Adam's scalars from it."""
    torch.compiler.reset()  # compiled code is not guarded by hooks: SuPar's model would get that of a model without one
    eager, compiled = (build(compile=compile, adam_eps=1e-6, **METHODS[name]) for compile in (False, True))
    forward = torch.compile(compiled.model)
    for _ in range(6):
        compiled.load_state(eager.state())
        losses = [tg.forward_backward(f, *batch(run.step, run.config), run.config.rows, 1) for run, f in ((eager, eager.model), (compiled, forward))]
        torch.testing.assert_close(*losses, rtol=0, atol=1e-5)
        for a, b in zip(eager.optimizers, compiled.optimizers):
            torch.testing.assert_close(a.grads, b.grads, rtol=1e-3, atol=1e-6)
        for run in (eager, compiled):
            tg.update(run)
            run.step += 1
            call_hooks(run)
        ours, theirs = weights(eager), weights(compiled)
        assert all((ours[n] - theirs[n]).square().mean().sqrt() < 1e-3 for n in ours)
