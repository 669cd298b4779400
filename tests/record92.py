"""Record 92 of the public speedrun once more, in plain PyTorch, for one row of tokens at a time.

It was written from the formulas alone, apart from train_gpt.py, and checked against the public
functions: over 36 updates in float64 the loss differs by 4e-16, gradients by 3e-13, weights by
7e-15 (relative). Numbers in brackets are sections of those notes. It has no kernels, no low
precision, no processes and no files. test_record92.py holds the trainer to it.

A row is one rank's tokens of a step: inputs [T], targets [T], and segments [T], the number of each
token's attention segment. Sizes are parameters; the layers, schedules and constants are the
record's.
"""

import itertools
import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn


# ---- Recipe
@dataclass
class Stage:
    steps: int
    tokens: int  # per step, over all rows
    document: int  # cap
    windows: tuple  # short, long
    rate: float
    ahead: tuple = ((1.0,), (1.0,))  # weights of the next targets, at first and at last
    prefix: tuple = (0.0,)  # weight of the prefix target, by equal parts
    candidates: tuple = (0,)  # classes of the sampled softmax, by equal parts; 0: all


@dataclass
class Recipe:
    vocab: int = 50304
    width: int = 768
    heads: int = 6
    hidden: int = 2816
    table_rows: int = 84_602_880  # n-grams: half bigrams, half trigrams
    sign_rows: int = 8192
    groups: int = 12  # of channels, in the last mix
    gate_width: int = 64
    stages: list = field(
        default_factory=lambda: [
            Stage(
                320,
                131072,
                896,
                (128, 384),
                1.0,
                ((1.0, 0.5, 0.25), (1.0, 0.5, 0.0)),
                (0.25,),
                (10240,),
            ),
            Stage(
                361,
                262144,
                2048,
                (384, 896),
                1.52,
                ((1.0, 0.5), (1.0, 0.0)),
                (0.20, 0.15, 0.10, 0.05),
                (10240,),
            ),
            Stage(426, 393216, 3072, (640, 1408), 1.73, candidates=(14336, 14336, 24576)),
            Stage(67, 327680, 3072, (640, 1408), 1.73 * (20 / 24) ** 0.5),
            Stage(20, 131072, 3072, (768, 1664), 1.0),
        ]
    )
    final_window: int = 2560
    cooldown: float = 0.80
    floor: float = 0.30
    momentum: tuple = (0.85, 0.93)
    momentum_warmup: int = 240
    momentum_cooldown: int = 50
    rails_from: int = 514  # both momenta
    rare_from: int = 336  # tables every fourth step
    scale_narrow: float = 0.13
    scale_wide: float = 0.085
    tail: int = 298  # last steps that the averages of head and matrices see
    tail_short: int = 250  # ... and those of tables, MLPs, v and o

    def __post_init__(self):
        self.steps = sum(stage.steps for stage in self.stages)
        self.scheduled = self.steps - self.stages[-1].steps
        self.split = self.scheduled | 1  # last update with a tied head


# ---- Schedules
def stage_at(c, step):
    """(stage, its steps done, its number); the last one's end at step c.steps."""
    for number, stage in enumerate(c.stages):
        if step < stage.steps:
            return stage, step, number
        step -= stage.steps
    return stage, stage.steps, number


def part(values, done, of):
    """Of values that share a stage equally."""
    return values[min(len(values) - 1, done * len(values) // of)]


def ahead_at(c, step):
    stage, done, _ = stage_at(c, step)
    return [a + (b - a) * done / stage.steps for a, b in zip(*stage.ahead, strict=False)]


def prefix_at(c, step):
    stage, done, _ = stage_at(c, step)
    return part(stage.prefix, done, stage.steps)


def candidates_at(c, step):
    stage, done, _ = stage_at(c, step)
    return part(stage.candidates, done, stage.steps)


def rate_at(c, step):
    begin = int(c.scheduled * (1 - c.cooldown))
    t = min(1.0, max(0.0, (step - begin) / (c.scheduled - begin)))
    return stage_at(c, step)[0].rate * (1 - t) + c.floor * t


def momentum_at(c, step):
    low, high = c.momentum
    share = min(1.0, step / c.momentum_warmup, (c.steps - step) / c.momentum_cooldown)
    return low + share * (high - low)


def tables_due(c, step):
    return step % 4 == 3 if step >= c.rare_from else step % 2 == 1


def rotary_at(c, step, wide):
    """YaRN [4.1]: (frequencies, scale of the scores); short layers follow the short window."""
    d = c.width // c.heads // 2
    frequencies = 1024.0 ** -torch.linspace(0, 1, d // 2)
    scale = c.scale_wide if wide else c.scale_narrow
    windows = dict.fromkeys(stage_at(c, s)[0].windows[wide] for s in range(step + 1))
    for old, new in itertools.pairwise(windows):
        kept = ((old * frequencies / (2 * math.pi) - 1) / 31).clamp(0, 1)
        frequencies = frequencies * (old / new * (1 - kept) + kept)
        scale *= 1 + 0.2 * math.log(new / old)
    return frequencies, scale


# ---- N-grams
def ngram_rows(x, rows):
    """Rows of the bigrams and of the trigrams [2.3]; products wrap in int32."""
    half = rows // 2
    before = F.pad(x[1:-1], (2, 0), value=half - 1)  # at t = 1 the reserved row's number, not x[0]
    two = ((36313 * x).int() ^ (27191 * before).int()) % (half - 1)
    one, far = F.pad(x[:-1], (1, 0)), F.pad(x[:-2], (2, 0))
    three = half + ((17351 * x).int() ^ (60961 * one).int() ^ (45259 * far).int()) % (
        rows - half - 1
    )
    return F.pad(two[1:], (1, 0), value=half - 1).long(), F.pad(
        three[2:], (2, 0), value=rows - 1
    ).long()


def sign_numbers(x, rows):
    one, far = F.pad(x[:-1], (1, 0)), F.pad(x[:-2], (2, 0))
    two = ((48271 * x) ^ (30011 * one)) & (rows - 1)
    three = ((58699 * x) ^ (39779 * one) ^ (26801 * far)) & (rows - 1)
    return F.pad(two[1:], (1, 0)), F.pad(three[2:], (2, 0))


class NGrams(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(c.table_rows, c.width))
        self.register_buffer("signs", torch.randn(c.sign_rows, c.width).sign())

    def forward(self, x):
        found = zip(ngram_rows(x, len(self.weight)), sign_numbers(x, len(self.signs)), strict=False)
        return sum(
            F.embedding(row, self.weight, sparse=True) * self.signs[sign] for row, sign in found
        )


# ---- Model
def norm(x):
    return F.rms_norm(x, (x.size(-1),))


def matrix(n_out, n_in, bound=0.0, **rule):
    """A hidden matrix; rule: what ANVIL has to know of it."""
    weight = nn.Parameter(torch.empty(n_out, n_in).uniform_(-bound, bound))
    weight.rule = rule
    return weight


def rotate(x, angles):
    """x [T, H, D], angles [T, H or 1, frequencies]: the first dims turn, in neighbouring pairs."""
    n = 2 * angles.size(-1)
    a, b = x[..., 0:n:2], x[..., 1:n:2]
    cos, sin = angles.cos(), angles.sin()
    turned = torch.stack((a * cos + b * sin, b * cos - a * sin), -1).flatten(-2)
    return torch.cat((turned, x[..., n:]), -1)


def interleave(x):
    """[T, H, D] to [2 T, H / 2, D]: head h and head h + H / 2 take turns."""
    return x.unflatten(1, (2, -1)).flatten(0, 1)


def attend(q, k, v, segments, window, scale):
    place = torch.arange(len(q), device=q.device)
    back = place[:, None] - place
    seen = (back >= 0) & (back <= window) & (segments[:, None] == segments)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -math.inf).softmax(-1), v)


@dataclass
class Layer:
    attention: bool = True
    wide: bool = False  # q and k of full width, long window, key offset, gate on heads
    thin: bool = False  # v and o of half a head's width
    paired: bool = False
    table: int | None = None  # of values
    table_gate: bool = True
    xsa: bool = False
    x0: bool = True
    ngrams: bool = False
    mlps: int = 1


PLAN = [
    Layer(paired=True),  # its n-grams come before it
    Layer(thin=True, table=0, xsa=True, ngrams=True),
    Layer(paired=True, table=1),
    Layer(wide=True, xsa=True, x0=False),
    Layer(attention=False, ngrams=True),
    Layer(paired=True, ngrams=True),
    Layer(attention=False, x0=False),
    Layer(attention=False, mlps=0),
    Layer(thin=True, table=2, x0=False, mlps=2),
    Layer(attention=False, x0=False, ngrams=True),
    Layer(wide=True, table=3, table_gate=False, x0=False),
]


class Attention(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.layer, self.heads = layer, c.heads
        full = c.width // c.heads
        self.qk = full if layer.wide else full // 2
        self.v_dim = full // 2 if layer.thin else full
        bound = 3**0.5 * 0.5 * c.width**-0.5
        pairs = range(0, c.heads, 2)  # ANVIL sees two heads of q or k at a time
        self.q = nn.ParameterList(matrix(2 * self.qk, c.width, bound, axis=-2) for _ in pairs)
        self.k = nn.ParameterList(matrix(2 * self.qk, c.width, bound, axis=-2) for _ in pairs)
        self.v = matrix(c.heads * self.v_dim, c.width, bound)
        self.o = matrix(c.width, c.heads * self.v_dim, bound)
        self.factors = nn.Parameter(torch.tensor([0.5, 1.0]))
        if layer.table is not None and layer.table_gate:
            self.gate = nn.Parameter(torch.zeros(c.heads, 12))

    def forward(self, u, values, run, xsa=None, gate=None):
        """u: normed [T, width]; values [T, width] or None, to be added to v; run: form."""
        T, layer = len(u), self.layer
        u = self.factors[0] * u  # in q and k the norm takes it out again, but for its eps
        q, k = (
            norm((u @ torch.cat(tuple(w)).T).view(T, self.heads, self.qk)) for w in (self.q, self.k)
        )
        v = (u @ self.v.T).view(T, self.heads, self.v_dim)
        if values is not None:
            v = v + values.view(T, self.heads, -1)[..., : self.v_dim]
        frequencies, scale = run.rotary[layer.wide]
        place = torch.arange(T, device=u.device)[:, None]
        segments, window = run.segments, run.windows[layer.wide]
        if layer.paired:
            place = 2 * place + torch.arange(self.heads, device=u.device) % 2
        angles = place[..., None] * frequencies
        q, k = rotate(q, angles), rotate(k, angles)
        if layer.wide:  # what does not turn comes from the token before
            still = k[..., self.qk // 2 :]
            k = torch.cat((k[..., : self.qk // 2], torch.cat((still[:1], still[:-1]))), -1)
        if layer.paired:
            y = attend(*map(interleave, (q, k, v)), segments.repeat_interleave(2), window, scale)
            y = y.unflatten(0, (T, 2)).flatten(1, 2)
        else:
            y = attend(q, k, v, segments, window, scale)
        if xsa is not None:
            along = (y * v).sum(-1, keepdim=True) / v.square().sum(-1, keepdim=True).clamp_min(1e-8)
            y = y - torch.tanh(xsa)[..., None] * along * v
        if gate is not None:
            y = y * gate[..., None]
        return self.factors[1] * (y.flatten(1) @ self.o.T)


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        k = math.sqrt(c.hidden / c.width)
        self.up = matrix(c.hidden, c.width, 3**0.5 * 0.5 * c.width**-0.5, rate=k)
        self.down = matrix(c.hidden, c.width, rate=2 * k)

    def forward(self, x):
        return F.relu(x @ self.up.T).square() @ self.down


class Mix(nn.Module):
    """Numbers for every token: b + W2 gelu(W1 x), to be scaled."""

    def __init__(self, c, biases):
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(c.gate_width, c.width).uniform_(-1, 1) * c.width**-0.5)
        self.w2 = nn.Parameter(torch.zeros(len(biases), c.gate_width))
        self.b = nn.Parameter(torch.tensor(biases))

    def forward(self, x):
        self.hidden = F.gelu(x @ self.w1.T)
        return self.hidden @ self.w2.T + self.b


@dataclass
class Form:
    """What a forward pass needs besides weights and tokens."""

    segments: torch.Tensor
    windows: tuple
    rotary: tuple


class GPT92(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.config = c
        self.head = nn.Parameter(0.005 * torch.randn(c.width, c.vocab))
        self.embed = nn.Parameter(self.head.detach().T.clone())
        self.tables = nn.Parameter(0.01 * torch.randn(4, c.vocab, c.width))
        self.ngrams = NGrams(c)
        self.smear, self.smear_gate = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(12))
        self.skip = nn.Parameter(torch.tensor(-1.5))
        self.attentions = nn.ModuleDict(
            {str(i): Attention(c, layer) for i, layer in enumerate(PLAN) if layer.attention}
        )
        self.mlps = nn.ModuleList(
            nn.ModuleList(MLP(c) for _ in range(layer.mlps)) for layer in PLAN
        )
        self.residual = nn.Parameter(torch.full((len(PLAN), 2), 1.1**0.5))
        self.post = nn.Parameter(torch.ones(len(PLAN), 2))
        H, s = c.heads, 1.1**0.5
        first = (
            [0.0] * 2 * H + [2.5] * H + [0.0] * 3 + [0.5] * 2
        )  # XSA 1, 3; heads 3; x0 0-2; n-grams 0, 1
        second = (
            [2.5] * H + [0.0] * 3 + [0.5] * 3 + [5.0]
        )  # heads 10; x0 4, 5, 7; n-grams 4, 5, 9; skip
        self.gates = nn.ModuleList((Mix(c, first), Mix(c, second)))
        self.gate_scale = nn.Parameter(torch.tensor(0.1))
        last = [0.0] * 6 + [20.0, 20.0, 10 * s, 10.0, 0.0, 0.5, 10 * s, 10.0]
        self.mudd = nn.ModuleList((Mix(c, last), Mix(c, [0.0, -5.0] + [0.0] * 8)))
        self.mudd_groups = nn.Parameter(torch.zeros(10, c.groups, c.gate_width))

    def forward(self, tokens, run):
        """Tokens [T] to the head's normed input [T, width]."""
        c, H = self.config, self.config.heads
        e = F.embedding(tokens, self.embed)
        smeared = self.smear * torch.sigmoid(e[1:, :12] @ self.smear_gate)[:, None] * e[:-1]
        x0 = norm(torch.cat((e[:1], e[1:] + smeared)))
        z, tables = self.ngrams(tokens), [table[tokens] for table in self.tables]
        xsa1, xsa3, heads3, x0_gates, z_gates = (self.gate_scale * self.gates[0](x0)).split(
            (H, H, H, 3, 2), -1
        )
        xsa, heads = {1: xsa1, 3: xsa3}, {3: heads3}
        x0_gates = dict(zip((0, 1, 2), x0_gates.split(1, -1), strict=False))
        z_gates = dict(zip((0, 1), z_gates.split(1, -1), strict=False))
        x = c0 = x0 + z_gates[0] * z
        saved, late = {}, None
        for i, layer in enumerate(PLAN):
            if i == 4:
                parts = (self.gate_scale * self.gates[1](x)).split((H, 3, 3, 1), -1)
                heads[10], skip_gate = parts[0], parts[3]
                x0_gates |= dict(zip((4, 5, 7), parts[1].split(1, -1), strict=False))
                z_gates |= dict(zip((4, 5, 9), parts[2].split(1, -1), strict=False))
            last, (r1, r2), (p1, p2) = i == 10, self.residual[i], self.post[i]
            if layer.attention:
                if i == 8:
                    late = norm(saved[7])
                u, values = norm(x) if late is None else late, None
                attention = self.attentions[str(i)]
                if last:
                    c9, mu = x, (0.1 * self.mudd[0](x)).split(1, -1)
                    gate = torch.cat((mu[6].expand(-1, H // 2), mu[7].expand(-1, H // 2)), -1)
                    values = mu[0] * c0 + mu[1] * saved[7] + mu[2] * x
                    x = (1 + mu[5]) * x + mu[3] * c0 + mu[4] * saved[7]
                elif layer.table is not None:
                    table = tables[layer.table]
                    gate = 2 * torch.sigmoid(
                        torch.cat((u[:, :6], table[:, :6]), -1) @ attention.gate.T
                    )
                    values = 0.0
                if layer.table is not None:
                    values = values + (
                        gate[..., None] * tables[layer.table].unflatten(-1, (H, -1))
                    ).flatten(1)
                y = attention(u, values, run, xsa.get(i), heads.get(i))
            if last:
                x = mu[8] * x + mu[9] * y + mu[10] * c0 + mu[11] * z
            elif i == 6:
                x = x + torch.sigmoid(self.skip) * skip_gate * saved[3]
            else:
                x = r1 * x + (p1 * y if layer.attention else 0.0)
                if layer.x0:
                    x = x + x0_gates[i] * x0
                if layer.ngrams:
                    x = x + z_gates[i] * z
            m = norm(x) if layer.mlps else None
            y = sum(mlp(m) for mlp in self.mlps[i])
            x = mu[12] * x + mu[13] * y if last else r2 * x + p2 * y
            saved[i] = x
        sources = [c0, saved[7], c9, tables[0], saved[3], tables[1], tables[3], tables[2], m, late]
        mu = 0.1 * self.mudd[1](x)
        deltas = 0.1 * torch.einsum("td,kgd->tkg", self.mudd[1].hidden, self.mudd_groups)
        shares = (mu[..., None] + deltas).repeat_interleave(
            c.width // c.groups, -1
        )  # [T, 10, width]
        return norm(
            x
            + sum(share * source for share, source in zip(shares.unbind(1), sources, strict=False))
        )


# ---- Losses
def candidates(targets, count, at, vocab):
    """Classes of a sampled softmax [2.9]: all targets and, from the sweep's place `at`, others
    up to `count`, ascending; and the sweep's next place."""
    wanted = torch.zeros(vocab, dtype=torch.bool)
    wanted[targets] = True
    need = count - int(wanted.sum())
    assert need >= 0, "more targets than candidates"
    if need:
        draw = min(vocab, int(need * 1.7) + 256)
        sweep = 20011 * (at + torch.arange(draw)) % vocab
        sweep = sweep[~wanted[sweep]]
        if len(sweep) < need:
            free = (~wanted).nonzero()[:, 0]
            sweep = free[:: max(1, len(free) // need)]
        wanted[sweep[:need]] = True
        at = (at + draw) % vocab
    return wanted.nonzero()[:, 0], at


def prefix_table(ranks, vocab):
    """Of each token its longest proper prefix that is a token, or -1. ranks: {bytes: number}."""
    table = torch.full((vocab,), -1)
    for text, number in ranks.items():
        table[number] = next(
            (ranks[text[:n]] for n in range(len(text) - 1, 0, -1) if text[:n] in ranks), -1
        )
    return table


def loss_of(x, head, targets, ahead, prefixes, prefix_weight, classes=None):
    """Sum over positions of the weighted cross-entropies [2.8]."""
    if classes is not None:
        place = torch.full((head.size(1) + 1,), -1)
        place[classes] = torch.arange(len(classes))  # place[-1] stays -1
        head, targets, prefixes = head[:, classes], place[targets], place[prefixes]
    capped = 23 * torch.sigmoid((x @ head + 5) / 7.5)
    lse, total = capped.logsumexp(-1), 0.0
    for k, weight in enumerate(ahead):
        hit = capped[torch.arange(len(x) - k), targets[k:]]
        total = total + weight * (lse[: len(hit)] - hit).sum()
    known = (prefixes >= 0).nonzero()[:, 0]
    return total + prefix_weight * (lse[known] - capped[known, prefixes[known]]).sum()


def validation_loss(x, head, targets):
    logits = 23 * torch.sigmoid((x @ head + 5) / 7.5)
    return F.cross_entropy(logits, targets)


# ---- Data
def segments_of(lengths, cap):
    """Number of the attention segment of each token, for documents of these lengths."""
    starts = torch.cat([torch.arange(n) % cap == 0 for n in lengths])
    return starts.cumsum(0)


# ---- Optimizers
MAPS = [
    (3.923798038567, -6.095026865488, 3.905234618423),
    (3.278126713798, -3.328923386476, 0.989127286973),
    (3.505298394150, -5.137358782410, 1.968325560615),
    (2.815058591845, -3.685181239622, 1.417196497642),
    (2.245503932403, -2.443826979899, 0.963091710461),
    (2.256537145403, -2.166840097229, 0.929501253245),
]


def orthogonal(g):
    """Singular values of g brought near 1."""
    tall = g.size(-2) > g.size(-1)
    x = g.mT if tall else g
    x = x / (1.07 * x.norm() + 1e-6)  # the record: 1.05; see Anvil
    for a, b, c in MAPS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def anvil(w, g, state, momentum, both, factor):
    """One update of a hidden matrix [4.3]. both: also the slow momentum steers."""
    if not state:
        state |= dict(fast=torch.zeros_like(w), slow=torch.zeros_like(w), energy=0.0)
    state["fast"].lerp_(g, 1 - (0.85 if both else momentum))
    state["slow"].lerp_(g, 0.02)
    blend = 0.4385 * state["fast"] + 0.5615 * state["slow"] if both else state["fast"]
    u = orthogonal(torch.lerp(g, blend, momentum))
    state["energy"] = 0.9 * state["energy"] + 0.1 * u.square().mean(
        w.rule.get("axis", -1), keepdim=True
    )
    even = u * state["energy"].clamp_min(1e-10).rsqrt()
    u = even * (u.norm() / even.norm().clamp_min(1e-10))
    decay = 2.25 * 0.023 * factor * (state["slow"] * w >= 0)
    w.sub_(0.023 * factor * w.rule.get("rate", 1.0) * (u + decay * w))


ADAM = [  # beginning of the name, factor on the rate, beta1, beta2, factor on the decay
    ("head", 1, 0.5, 0.95, 150),
    ("embed", 1, 0.5, 0.95, 150),
    ("tables", 70, 0.75, 0.95, 5),
    ("smear_gate", 0.01, 0.9, 0.99, 0),
    ("smear", 5, 0.9, 0.99, 0),
    ("skip", 5, 0.9, 0.99, 0),
    ("residual", 5, 0.9, 0.95, 0),
    ("post", 1, 0.9, 0.95, 0),
    ("gate_scale", 0.1, 0.9, 0.99, 0),
    ("gates", 0.1, 0.9, 0.99, 1),
    ("mudd", 0.25, 0.9, 0.99, 1),
    ("attentions", 1, 0.9, 0.99, 1),
]


def adam_rule(name, rare):
    """Of the parameter `name`: (factor on the rate, beta1, beta2, factor on the decay)."""
    rate, beta1, beta2, decay = next(rule for start, *rule in ADAM if name.startswith(start))
    if name.endswith(".factors"):
        return 5, 0.9, 0.99, 0
    if name.endswith(".b"):
        decay = 0
    if name == "tables" and rare:
        return rate, beta1**2, beta2**2, 2 * decay
    return rate, beta1, beta2, decay


def adam(w, g, state, rule, factor):
    rate, beta1, beta2, decay = rule
    if not state:
        state |= dict(m=torch.zeros_like(w), v=torch.zeros_like(w), steps=0)
    state["steps"] += 1
    state["m"].lerp_(g, 1 - beta1)
    state["v"].lerp_(g * g, 1 - beta2)
    rate *= 0.008 * factor
    bias = math.sqrt(1 - beta2 ** state["steps"]) / (1 - beta1 ** state["steps"])
    u = rate * bias * state["m"] / (state["v"].sqrt() + 1e-10)
    w.sub_(u + (u * w > 0) * rate**2 * 0.005 * decay * w)


def row_adam(w, g, state, rare, factor):
    """The n-gram table's [4.4]: no momentum, one second moment per row; g: sparse, summed."""
    if not state:
        state |= dict(v=torch.zeros(len(w)), steps=0)
    beta2, decay = (0.95**2, 10) if rare else (0.95, 5)
    state["steps"] += 1
    g = g.coalesce()
    rows, g = g.indices()[0], g.values()
    state["v"] *= beta2  # at full size: when a row is next touched
    state["v"][rows] += (1 - beta2) * g.square().mean(1)
    rate = 70 * 0.008 * factor
    u = (
        rate
        * math.sqrt(1 - beta2 ** state["steps"])
        * g
        / (state["v"][rows].sqrt() + 1e-10)[:, None]
    )
    old = w[rows]
    w[rows] = old - u - (u * old > 0) * rate**2 * 0.005 * decay * old


# ---- Tail averages
def kind(name, p):
    """What a parameter is to the averages [5]: head, tables, mlp, vo, qk or nothing."""
    if name in ("head", "embed", "tables"):
        return name
    if hasattr(p, "rule"):
        return "mlp" if name.startswith("mlps") else "vo" if name.endswith((".v", ".o")) else "qk"


class Tail:
    """Averages of late weights, and what the run ends on."""

    def __init__(self, c, named):
        self.config, self.averages = c, {}
        self.named = [(name, p, kind(name, p)) for name, p in named if kind(name, p)]

    def ticks(self, step):
        """{(average, kind of weight): rate} after update `step`."""
        c, n, found = self.config, self.config.steps, {}
        r = 2 / (c.tail + 1)
        if step >= n - c.tail and (step % 2 == 1 or step == n - c.tail):
            for which in ("head", "embed"):
                found["ema", which] = r if step in (n - c.tail, n - 1) else 1 - (1 - r) ** 2
        if step >= n - c.tail and (step % 4 == 1 or step >= n - 2):
            for which in ("qk", "vo", "mlp"):
                found["blend", which] = 2 / (c.tail // 4 + 1)
        if step >= n - c.tail_short and (n - 1 - step) % 4 == 0:
            found["mean", "vo"] = found["mean", "mlp"] = 4 / 53
        if step >= n - c.tail_short and tables_due(c, step):
            found["mean", "tables"] = 4 / 53
        return found

    @torch.no_grad()
    def tick(self, step):
        for (average, which), rate in self.ticks(step).items():
            for name, p, own in self.named:
                if own == which:
                    self.averages.setdefault((average, name), p.clone()).lerp_(p, rate)

    @torch.no_grad()
    def ship(self, dead=None):
        """dead: {kind: (norm² before, after) of unread weights}, which the record's banks hold."""
        shares = {("ema", "head"): 0.65, ("ema", "embed"): 0.65, ("blend", "qk"): 0.55}
        shares |= {("blend", "vo"): 0.55 - 0.2007, ("blend", "mlp"): 0.55 - 0.2007}
        before = self.squares(dead, 0)
        for average in ("ema", "mean", "blend"):
            for name, p, own in self.named:
                if (average, name) in self.averages:
                    p.lerp_(self.averages[average, name], shares.get((average, own), 1.0))
        after = self.squares(dead, 1)
        for _, p, own in self.named:
            if own != "tables":
                p.mul_((before[own] / after[own]) ** 0.5)

    def squares(self, dead, when):
        sums = {own: pair[when] for own, pair in (dead or {}).items()}
        for _name, p, own in self.named:
            sums[own] = sums.get(own, 0.0) + p.square().sum()
        return sums


# ---- Training
class Trainer:
    def __init__(self, c, model, prefixes, rows):
        """rows: of a step; the record's 8 ranks have one each."""
        self.config, self.model, self.prefixes, self.rows = c, model, prefixes, rows
        self.state = {name: {} for name, _ in model.named_parameters()}
        self.sweeps = [c.vocab * row // rows for row in range(rows)]
        self.tail = Tail(c, model.named_parameters())

    def form(self, step, segments, final=False):
        c = self.config
        short, long = stage_at(c, step)[0].windows
        rotary = tuple(rotary_at(c, step, wide) for wide in (False, True))
        return Form(segments, (short, c.final_window if final else long), rotary)

    def step(self, step, batch):
        """batch: (tokens, targets, segments) for each row. Returns the loss per token."""
        c, model, total = self.config, self.model, 0.0
        count = candidates_at(c, step)
        for row, (tokens, targets, segments) in enumerate(batch):
            classes = None
            if count:
                classes, self.sweeps[row] = candidates(targets, count, self.sweeps[row], c.vocab)
            x = model(tokens, self.form(step, segments))
            loss = loss_of(
                x,
                model.head,
                targets,
                ahead_at(c, step),
                self.prefixes[targets],
                prefix_at(c, step),
                classes,
            )
            (loss / 8).backward()  # on any number of rows
            total += loss.item()
        self.update(step)
        self.tail.tick(step)
        return total / sum(len(row[0]) for row in batch)

    @torch.no_grad()
    def update(self, step):
        c, model = self.config, self.model
        factor, odd, tables = rate_at(c, step), step % 2 == 1, tables_due(c, step)
        tied = step <= c.split
        if odd and tied:
            model.head.grad += model.embed.grad.T
            model.embed.grad = None
        for name, p in model.named_parameters():
            state, matrix = self.state[name], hasattr(p, "rule")
            late = tables if name in ("tables", "ngrams.weight") else odd
            if p.grad is None or not (matrix or late):
                continue
            if matrix:
                anvil(p, p.grad, state, momentum_at(c, step), step >= c.rails_from, factor)
            elif name == "ngrams.weight":
                row_adam(p, p.grad, state, step >= c.rare_from, factor)
            else:
                adam(p, p.grad, state, adam_rule(name, step >= c.rare_from), factor)
            p.grad = None
        if odd and tied:
            model.embed.copy_(model.head.T)
        if step == c.split:
            head = self.state["head"]
            self.state["embed"] = dict(
                m=head["m"].T.clone(), v=head["v"].T.clone(), steps=head["steps"]
            )
