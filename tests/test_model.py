"""GPT2024 against a plain form of itself, its masks, its first values, what each switch does."""

import functools
import itertools
import math

import pytest
import torch
from helpers import CPU, same, tiny
from torch.nn.attention import flex_attention

import train_gpt
from train_gpt import GPT2024, attention_mask, make_optimizers, rotate

EOT, T = 256, 32
EAGER_FLEX = "ignore:flex_attention called without torch.compile"


def stir(model: GPT2024) -> GPT2024:
    """Every parameter away from the values at which it does nothing."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator).to(p.dtype) * 0.2)
    return model


def make(**changes) -> GPT2024:
    return GPT2024(tiny(**changes))


def some_tokens(seed=0) -> torch.Tensor:
    tokens = torch.randint(0, EOT, (2, T), generator=torch.Generator().manual_seed(seed))
    tokens[0, [0, 9, 20]] = EOT
    tokens[1, [5, 6, 31]] = EOT
    return tokens


def naive_mask(tokens, window, doc_mask):
    """[B, T, T], as the rule is told: not ahead, nor beyond the window, nor in another document."""
    mask = torch.zeros(len(tokens), T, T, dtype=torch.bool)
    for b, row in enumerate(tokens.tolist()):
        for q in range(T):
            for k in range(q + 1):
                near = not window or q - k <= window
                same = not doc_mask or EOT not in row[k + 1 : q + 1]
                mask[b, q, k] = near and same
    return mask


def naive_attention(q, k, v, mask):
    """Of one head, [B, T, head_dim]."""
    scores = q @ k.mT * q.size(-1) ** -0.5
    return torch.softmax(scores.masked_fill(~mask, -math.inf), -1) @ v


def naive_ngram_row(row: list[int], at: int, n: int, rows: int) -> int:
    """The table row of the n tokens that end at `at`, looking neither before the row nor before a
    document's mark."""
    value = row[at]
    for back in range(1, n):
        inside = at - back >= 0 and EOT not in row[at - back + 1 : at + 1]
        value = (value * 65599 + (row[at - back] if inside else EOT)) % 2**31
    return (value * 0x9E3779B1 >> 20) % rows


def rms(x):
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()


def naive_rotary(x, half_rotary=False):
    """[B, T, head_dim]; each pair (i, i + half) turns by position times frequency. half_rotary:
    among the first half of the dims alone."""
    half, y = x.size(-1) // (4 if half_rotary else 2), x.clone()
    for i in range(half):
        frequency = 1024.0 ** (-i / (half - 1)) if half_rotary else 10000.0 ** (-i / half)
        angle = torch.arange(T) * frequency
        y[..., i] = x[..., i] * angle.cos() + x[..., i + half] * angle.sin()
        y[..., i + half] = x[..., i + half] * angle.cos() - x[..., i] * angle.sin()
    return y


def plain_embedding(c, w, tokens):
    x, width = w["wte.weight"][tokens], c.n_embd // max(1, c.ngram - 1)
    for i in range(c.ngram - 1):  # bigrams into the first channels, trigrams into the next
        rows = [
            [naive_ngram_row(row, at, i + 2, c.ngram_rows) for at in range(T)]
            for row in tokens.tolist()
        ]
        x[..., i * width : (i + 1) * width] += w[f"ngrams.{i}.weight"][torch.tensor(rows)]
    return x


def plain_forward(model: GPT2024, tokens):
    """The whole model again, spelled out from the config in fp32, one head at a time."""
    c, w = model.config, dict(model.named_parameters())
    head_dim, v1 = c.n_embd // c.n_head, None
    x = x0 = rms(plain_embedding(c, w, tokens))
    for layer in range(c.n_layer):
        name = f"blocks.{layer}"
        if c.embed_residual:
            x = w[f"{name}.x_lambda"] * x + w[f"{name}.x0_lambda"] * x0
        q, k, v = (rms(x) @ w[f"{name}.attn.{m}.weight"].T for m in "qkv")
        v1 = v if v1 is None else v1
        if c.value_residual:
            share = w[f"{name}.attn.value_lambda"]
            v = (1 - share) * v + share * v1
        if c.value_embeds:
            share = 2 * torch.sigmoid(rms(x)[..., :12] @ w[f"{name}.attn.value_gate.weight"].T)
            number = (0, 1, 0, 1, 2)[layer]  # of five layers
            table = w[f"value_embeds.{number}.weight"][tokens]
            v = v + share.repeat_interleave(head_dim, -1) * table
        mask = naive_mask(tokens, c.stages[0].window, c.doc_mask)
        heads = []
        for h in range(c.n_head):
            qh, kh, vh = (t[..., h * head_dim : (h + 1) * head_dim] for t in (q, k, v))
            qh, kh = (naive_rotary(rms(t), c.half_rotary) for t in (qh, kh))
            if c.key_offset:
                still = kh[..., head_dim // 2 :].clone()
                kh[:, 1:, head_dim // 2 :] = still[:, :-1]
            heads.append(naive_attention(qh, kh, vh, mask))
        x = x + torch.cat(heads, -1) @ w[f"{name}.attn.o.weight"].T
        hidden = (rms(x) @ w[f"{name}.mlp.up.weight"].T).relu().square()
        x = x + hidden @ w[f"{name}.mlp.down.weight"]
    logits = rms(x) @ w["lm_head.weight"].T
    return c.softcap * torch.tanh(logits / c.softcap) if c.softcap else logits


# ---------------------------------------------------------------------- the whole, and each switch
SWITCHES = {
    "all on": {},
    "no value_residual": dict(value_residual=False),
    "no embed_residual": dict(embed_residual=False),
    "tied": dict(untie_head=False),
    "no softcap": dict(softcap=0.0),
    "softcap 5": dict(softcap=5.0),
    "no zero_init": dict(zero_init=False),
    "ngrams": dict(ngram=4, ngram_rows=50),
    "ngrams, documents": dict(ngram=3, ngram_rows=97, doc_mask=True),
    "windows": dict(window=7),
    "half rotary": dict(half_rotary=True),
    "key offset": dict(key_offset=True),
    "key offset, half rotary": dict(key_offset=True, half_rotary=True),
    "value embeds": dict(n_layer=5, value_embeds=True),
    "value embeds alone": dict(n_layer=5, value_embeds=True, value_residual=False),
    "documents": dict(doc_mask=True),
    "documents, windows": dict(n_layer=4, doc_mask=True, window=4),
    "one head": dict(n_head=1),
    "plain": dict(value_residual=False, embed_residual=False, untie_head=False, softcap=0.0),
}


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.filterwarnings(EAGER_FLEX)
def test_forward_is_the_plain_form(switch):
    model = stir(make(**SWITCHES[switch]))
    tokens, targets = some_tokens(), some_tokens(seed=1)
    with torch.no_grad():
        logits, expected = model(tokens), plain_forward(model, tokens)
        assert logits.shape == (2, T, 320) and logits.dtype == torch.float32
        assert logits.std() > 0.3
        torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)
        loss = model(tokens, targets).item()
    by_hand = -torch.log_softmax(expected, -1).gather(-1, targets[..., None]).mean()
    assert loss == pytest.approx(by_hand.item(), abs=1e-4)


def test_off_leaves_nothing_behind():
    on = dict(make().named_parameters())
    assert sum("lambda" in name for name in on) == 6
    off = make(value_residual=False, embed_residual=False).named_parameters()
    assert not any("lambda" in name for name, _ in off)
    assert "rotary" not in "".join(make().state_dict()), "its tables are no weights"


def test_bf16():
    for on, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        model = make(bf16=on, zero_init=False, ngram=3, ngram_rows=9)
        for name, p in model.named_parameters():
            table = name.startswith(("wte", "ngrams"))
            assert p.dtype == (dtype if table else torch.float32), name
        x = model.blocks[1].mlp(torch.ones(1, T, 32, dtype=dtype))
        assert x.dtype == dtype and model(some_tokens()).dtype == torch.float32
    tied = make(bf16=True, untie_head=False)
    assert tied.wte.weight.dtype == torch.float32, "the tied weight is the head's fp32 master"
    exact, rough = (make(bf16=on, zero_init=False)(some_tokens()) for on in (False, True))
    assert 0 < (exact - rough).abs().max() < 0.05 * exact.abs().max()


def test_first_loss_is_that_of_a_uniform_guess():
    batch = some_tokens(), some_tokens(seed=1)
    assert make()(*batch).item() == pytest.approx(math.log(320), abs=1e-6)
    assert abs(make(untie_head=False)(*batch).item() - math.log(320)) < 0.5


# ------------------------------------------------------------------------- causality and documents
@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(doc_mask=True),
        dict(window=4),
        dict(doc_mask=True, window=4),
        dict(ngram=4, doc_mask=True),
    ],
    ids=str,
)
def test_a_token_changes_nothing_before_it_nor_in_other_documents(changes):
    model, tokens = stir(make(**changes)), some_tokens()
    c, document = model.config, (tokens == EOT).cumsum(1)
    with torch.no_grad():
        before = model(tokens)
        for row, at in ((0, 3), (0, 12), (0, 19), (1, 2), (1, 10), (1, 30)):
            other = tokens.clone()
            other[row, at] = (other[row, at] + 1) % EOT
            moved = (model(other) - before).abs().amax(-1)  # [B, T]
            may_move = torch.zeros(2, T, dtype=torch.bool)
            may_move[row, at:] = True
            if c.doc_mask:
                may_move &= document == document[row, at]
            if c.stages[0].window:  # two layers, each 4 back
                may_move[row, at + 2 * 4 + 1 :] = False
            assert moved[~may_move].max() < 1e-6, "changed where it must not"
            assert moved[may_move].min() > 1e-5, "did not change where it must"


@pytest.mark.parametrize("attention", ["sdpa", "flex"])
@pytest.mark.parametrize("window", [0, 1, 6, 31, 32, 100])
@pytest.mark.parametrize("doc_mask", [False, True])
@pytest.mark.filterwarnings(EAGER_FLEX)
def test_backends_against_a_naive_mask(attention, window, doc_mask):
    tokens, flex = some_tokens(), attention == "flex"
    attn = train_gpt.Attention(tiny(n_head=3, n_embd=48), (16, 16), (None, None))
    q, k, v = torch.randn(3, 2, T, 3, 16, generator=torch.Generator().manual_seed(1))
    docs = (tokens == EOT).cumsum(1)
    docs = docs if doc_mask else torch.zeros_like(docs)
    mask = attention_mask(docs, torch.tensor(window) if window else None, flex)
    assert isinstance(mask, train_gpt.BlockMask) == flex
    still = torch.stack((torch.ones(T, 1, 8), torch.zeros(T, 1, 8)))  # angles of 0
    view = train_gpt.View(still, torch.tensor(0.25), None)
    y, by_rule = attn.attend(q, k, v, view, mask), naive_mask(tokens, window, doc_mask)
    for head in range(3):
        normed = rms(q[:, :, head]), rms(k[:, :, head])
        expected = naive_attention(*normed, v[:, :, head], by_rule)
        torch.testing.assert_close(y[:, :, head], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("doc_mask, window", [(False, 0), (False, 9), (True, 0)])
def test_plain_causal_attention_needs_no_mask(doc_mask, window, monkeypatch):
    seen, attend = [], train_gpt.Attention.attend

    def look(self, q, k, v, view, mask):
        seen.append(mask)
        return attend(self, q, k, v, view, mask)

    monkeypatch.setattr(train_gpt.Attention, "attend", look)
    make(doc_mask=doc_mask, window=window)(some_tokens())
    assert all((mask is not None) == (doc_mask or window > 0) for mask in seen) and seen


def test_ngrams_spread_over_their_table():
    """All pairs of 256 bytes in 4,096 rows: none far fuller than chance; lengths disagree."""
    model, seen = make(ngram=3, ngram_rows=4096), []
    for table in model.ngrams:
        table.register_forward_hook(lambda table, inputs, y: seen.append(inputs[0]))
    model.ngrams(torch.cartesian_prod(torch.arange(256), torch.arange(256)))
    rows = seen[0][:, 1].bincount(minlength=4096)
    assert rows.min() > 0 and rows.max() < 4 * rows.float().mean()
    assert not torch.equal(seen[0], seen[1])
    assert all(not table.weight.any() for table in model.ngrams), "they start at zero"


@pytest.mark.parametrize("length", [128, 256, 300])
@pytest.mark.parametrize("window", [None, 1, 40, 127, 128, 200])
@pytest.mark.parametrize("documents", [(), (0, 10, 127, 128, 200), (130,)])
def test_the_block_mask_is_that_of_create_block_mask(length, window, documents):
    tokens = torch.zeros(2, length, dtype=torch.int64)
    tokens[0, [place for place in documents if place < length]] = EOT
    docs = (tokens == EOT).cumsum(1)
    reach = None if window is None else torch.tensor(window)
    mask = attention_mask(docs, reach, flex=True)
    published = flex_attention.create_block_mask(mask.mask_mod, 2, 1, length, length, device="cpu")

    def kept(blocks):  # each list of blocks is as long as its count
        counts = (blocks.kv_num_blocks, blocks.full_kv_num_blocks)
        lists = (blocks.kv_indices, blocks.full_kv_indices)
        numbers = zip(map(torch.flatten, counts), (x.flatten(0, 2) for x in lists), strict=True)
        return [
            [set(row[:n].tolist()) for n, row in zip(count.tolist(), rows, strict=True)]
            for count, rows in numbers
        ]

    def pairs(counts, lists):  # in the order of rows
        entries = zip(counts.flatten().tolist(), lists.flatten(0, 2).tolist(), strict=True)
        return [
            (row, block) for row, (count, row_of) in enumerate(entries) for block in row_of[:count]
        ]

    side = -(-length // 128)
    for kind in ("", "full_"):
        found = [
            pairs(getattr(mask, f"{kind}{end}_num_blocks"), getattr(mask, f"{kind}{end}_indices"))
            for end in ("kv", "q")
        ]
        turned = [(row - row % side + block, row % side) for row, block in found[1]]
        assert all(a < b for a, b in itertools.pairwise(found[0]))
        assert sorted(turned) == found[0]
    (some, every), (their_some, their_every) = kept(mask), kept(published)
    for block, (ours, theirs) in enumerate(zip(every, their_every, strict=True)):
        number = block % -(-length // 128)
        assert ours - {number} == theirs - {number}
    for ours, theirs, whole in zip(some, their_some, their_every, strict=True):
        assert theirs <= ours <= theirs | whole


def test_windows_of_stages():
    model = make(window=(4, 8, 0))  # 12 steps
    for step, window in ((0, 4), (3, 4), (4, 8), (8, None), (11, None), (12, None)):
        model.set_stage(step)
        reach = model.views["all"].window
        assert (None if reach is None else reach.item()) == window


# ---------------------------------------------------------------------------------- rotary, QK-norm
def test_rotary_keeps_norms_and_tells_relative_positions():
    generator = torch.Generator().manual_seed(0)
    view = make().views["all"]
    assert view.scale == 16**-0.5
    tables = view.rotary
    rotary = functools.partial(rotate, tables=tables)
    x = torch.randn(2, T, 3, 16, generator=generator)
    assert torch.allclose(rotary(x).norm(dim=-1), x.norm(dim=-1), atol=1e-5)
    assert torch.allclose(rotary(x)[:, 0], x[:, 0]), "position 0 does not turn"
    assert torch.allclose(rotary(x[:, :10]), rotary(x)[:, :10]), "shorter rows: the same angles"
    q, k = (torch.randn(16, generator=generator).expand(1, T, 1, 16) for _ in "qk")
    scores = rotary(q)[0, :, 0] @ rotary(k)[0, :, 0].T
    for distance in range(T):
        along = scores.diagonal(-distance)
        assert torch.allclose(along, along[0].expand_as(along), atol=1e-4)
    assert scores[:, 0].std() > 0.1


def test_the_size_of_queries_and_keys_does_not_matter():
    for matrix in ("q", "k"):
        model = stir(make())
        with torch.no_grad():
            before = model(some_tokens())
            getattr(model.blocks[0].attn, matrix).weight.mul_(10)
            torch.testing.assert_close(model(some_tokens()), before, atol=1e-4, rtol=0)


# ---------------------------------------------------------------------- first values, groups, FLOPs
@pytest.mark.parametrize("switch", ["all on", "plain", "tied", "no zero_init", "ngrams"])
def test_first_values_depend_on_seed_and_name_alone(switch):
    model = make(**SWITCHES[switch])
    torch.randn(5)  # what else is drawn does not matter
    again = make(**SWITCHES[switch])
    other = make(seed=1, **SWITCHES[switch])
    assert same(dict(model.named_parameters()), dict(again.named_parameters()))
    for name in ("wte.weight", "blocks.0.attn.q.weight"):
        assert not torch.equal(model.get_parameter(name), other.get_parameter(name))
    own = [p for name, p in model.named_parameters() if name != "lm_head.weight"]  # may be wte's
    drawn = [p.flatten()[:1024] for p in own if p.numel() >= 1024 and p.any()]
    pairs = [(a, b) for i, a in enumerate(drawn) for b in drawn[:i]]
    assert not any(torch.equal(a, b) for a, b in pairs), "two parameters got the same numbers"


@pytest.mark.parametrize("switch", ["all on", "plain", "tied", "ngrams"])
def test_every_parameter_is_in_exactly_one_optimizer(switch):
    run = train_gpt.build(tiny(**SWITCHES[switch]), CPU)
    optimizers = make_optimizers(run)
    pairs = [pair for optimizer in optimizers for pair in optimizer.named.items()]
    assert sorted(name for name, _ in pairs) == sorted(dict(run.model.named_parameters()))
    assert all(p is run.model.get_parameter(name) for name, p in pairs)


def test_a_parameter_without_a_group_is_named():
    run = train_gpt.build(tiny(), CPU)
    run.model.gate = torch.nn.Module()
    run.model.gate.weight = torch.nn.Parameter(torch.zeros(3, 3))
    with pytest.raises(KeyError, match="no optimizer trains gate.weight"):
        make_optimizers(run)


def test_scales_of_the_first_values():
    model = make(zero_init=False, n_embd=128)
    assert model.wte.weight.std().item() == pytest.approx(1, rel=0.02)
    assert make(untie_head=False).wte.weight.std().item() == pytest.approx(0.005, rel=0.05)
    fans = dict.fromkeys(["blocks.0.attn.q", "blocks.1.attn.o", "blocks.0.mlp.up", "lm_head"], 128)
    for name, fan_in in (fans | {"blocks.0.mlp.down": 512}).items():
        weight = model.get_parameter(f"{name}.weight")
        assert weight.abs().max() <= fan_in**-0.5
        assert weight.std().item() == pytest.approx((3 * fan_in) ** -0.5, rel=0.03), name
        assert abs(weight.mean().item()) < 0.05 * fan_in**-0.5
    assert [block.attn.value_lambda.item() for block in model.blocks] == [0.5, 0.5]
    assert [block.x_lambda.item() for block in model.blocks] == [1, 1]
    assert [block.x0_lambda.item() for block in model.blocks] == [0, 0]


def test_tied_weights_are_one():
    """By both gradients and lm_head's rate, whatever wte's is."""
    run = train_gpt.build(tiny(untie_head=False, steps=8), CPU)
    run.optimizers, w = make_optimizers(run), run.model.lm_head.weight.detach().clone()
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for run.step in range(8):
        train_gpt.set_stage(run)
        run.model(some_tokens(), some_tokens(seed=1)).backward()
        g = run.model.wte.weight.grad + run.model.lm_head.weight.grad
        train_gpt.step_optimizers(run)
        c, n = run.config, run.step + 1
        bias = map(torch.tensor, (1 - c.beta1**n, 1 - c.beta2**n))
        u = train_gpt.adam_direction(g, m, v, c.beta1, c.beta2, c.adam_eps, *bias)
        w -= c.lr_head * train_gpt.lr_at(run.step, c) * u
        assert torch.equal(run.model.wte.weight, run.model.lm_head.weight)
        torch.testing.assert_close(run.model.lm_head.weight.data, w, rtol=0, atol=1e-5)


def test_zero_init():
    for zero in (True, False):
        model = make(zero_init=zero)
        ends = [w for b in model.blocks for w in (b.attn.o.weight, b.mlp.down.weight)]
        assert all(bool(weight.any()) != zero for weight in (model.lm_head.weight, *ends))
        for block in model.blocks:
            starts = (block.attn.q, block.attn.k, block.attn.v, block.mlp.up)
            assert all(linear.weight.any() for linear in starts)
    tied = make(untie_head=False)
    assert tied.wte.weight.any(), "a tied head is the embedding: it must not be zero"


def test_flops_per_token_by_hand():
    # 2 layers, width 32, vocabulary padded to 320, 32 tokens a row
    matrices = 2 * (4 * 32 * 32 + 2 * 32 * 128) + 320 * 32  # q k v o, up, down; head
    attention = 2 * 2 * 32 * 16  # QK and AV, a multiply and an add, over 16 tokens on average
    forward = 2 * matrices + 2 * attention
    assert make().flops_per_token() == make(untie_head=False).flops_per_token() == 3 * forward
    short = 2 * matrices + 2 * 2 * 2 * 32 * 4
    assert make(window=4).flops_per_token() == 3 * short
    assert make(window=(0, 4)).flops_per_token() == 3 * (forward + short) / 2
    grown = make(window=(0, 4), batch_tokens=(64, 192)).flops_per_token()
    assert grown == 3 * (forward + 3 * short) / 4
    assert make(ngram=3).flops_per_token() == 3 * forward, "tables are looked up"
