"""The model against a plain form of itself, its masks, its first values, and what each switch does."""
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny

import train_gpt
from train_gpt import GPT, CausalSelfAttention, Runtime, attend, attention_mask, init_weights, layer_windows, make_optimizers, rotate

EOT, T = 256, 32


def make(**changes) -> GPT:
    config = tiny(**changes)
    model = GPT(config)
    init_weights(model, config)
    return model


def stir(model: GPT) -> GPT:
    """Every parameter away from the values at which it does nothing."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator).to(p.dtype) * 0.2)
    return model


def some_tokens(rows=2, seed=0) -> torch.Tensor:
    tokens = torch.randint(0, EOT, (rows, T), generator=torch.Generator().manual_seed(seed))
    tokens[0, [0, 9, 20]] = EOT
    tokens[1, [5, 6, 31]] = EOT
    return tokens


def naive_mask(tokens, window, doc_mask):
    """[B, T, T], written as the rule is told: not ahead, not further back than the window, not into another document."""
    mask = torch.zeros(len(tokens), T, T, dtype=torch.bool)
    for b, row in enumerate(tokens.tolist()):
        for q in range(T):
            for k in range(q + 1):
                near = not window or q - k < window
                same = not doc_mask or EOT not in row[k + 1:q + 1]
                mask[b, q, k] = near and same
    return mask


def naive_attention(q, k, v, mask):
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(q.size(-1))
    return torch.einsum("bhqk,bhkd->bhqd", torch.softmax(scores.masked_fill(~mask[:, None], -math.inf), -1), v)


def naive_ngram_row(row: list[int], at: int, n: int, rows: int) -> int:
    """The table row of the n tokens that end at `at`, looking neither before the row nor before a document's mark."""
    value = row[at]
    for back in range(1, n):
        inside = at - back >= 0 and EOT not in row[at - back + 1:at + 1]
        value = (value * 65599 + (row[at - back] if inside else EOT)) % 2**31
    return (value * 0x9E3779B1 >> 20) % rows


def plain_forward(model: GPT, tokens):
    """The whole model again, spelled out from the config in fp32, one head at a time."""
    c, w = model.config, dict(model.named_parameters())
    head_dim = c.n_embd // c.n_head

    def rms(x):
        return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()

    def rotate(x):  # [B, T, head_dim]; each pair (i, i + half) turns by position * frequency
        half, y = head_dim // 2, x.clone()
        for i in range(half):
            angle = torch.arange(T) * 10000.0 ** (-2 * i / head_dim)
            y[..., i] = x[..., i] * angle.cos() + x[..., i + half] * angle.sin()
            y[..., i + half] = x[..., i + half] * angle.cos() - x[..., i] * angle.sin()
        return y

    x, width = w["wte.weight"][tokens], c.n_embd // max(1, c.ngram - 1)
    for i in range(c.ngram - 1):  # bigrams into the first channels, trigrams into the next
        rows = [[naive_ngram_row(row, at, i + 2, c.ngram_rows) for at in range(T)] for row in tokens.tolist()]
        x[..., i * width:(i + 1) * width] += w[f"ngrams.{i}.weight"][torch.tensor(rows)]
    x = x0 = rms(x)
    v1 = None
    for layer in range(c.n_layer):
        name = f"blocks.{layer}"
        if c.embed_residual:
            x = w[f"{name}.lambdas"][0] * x + w[f"{name}.lambdas"][1] * x0
        q, k, v = (rms(x) @ w[f"{name}.attn.{m}.weight"].T for m in "qkv")
        v1 = v if v1 is None else v1
        if c.value_residual:
            share = w[f"{name}.attn.value_lambda"]
            v = (1 - share) * v + share * v1
        letter = c.window_pattern[layer % len(c.window_pattern)]
        mask = naive_mask(tokens, c.window if letter == "S" else 0, c.doc_mask)
        heads = []
        for h in range(c.n_head):
            qh, kh, vh = (t[..., h * head_dim:(h + 1) * head_dim] for t in (q, k, v))
            if c.qk_norm:
                qh, kh = rms(qh), rms(kh)
            heads.append(naive_attention(rotate(qh)[:, None], rotate(kh)[:, None], vh[:, None], mask)[:, 0])
        x = x + torch.cat(heads, -1) @ w[f"{name}.attn.o.weight"].T
        x = x + (rms(x) @ w[f"{name}.mlp.up.weight"].T).relu().square() @ w[f"{name}.mlp.down.weight"]
    logits = rms(x) @ (w["lm_head.weight"] if c.untie_head else w["wte.weight"]).T
    return c.softcap * torch.tanh(logits / c.softcap) if c.softcap else logits


# ------------------------------------------------------------------------------------------------- the whole, and each switch

SWITCHES = {
    "all on": {}, "no value_residual": dict(value_residual=False), "no embed_residual": dict(embed_residual=False), "tied": dict(untie_head=False),
    "no softcap": dict(softcap=0.0), "softcap 5": dict(softcap=5.0), "no qk_norm": dict(qk_norm=False), "no zero_init": dict(zero_init=False),
    "ngrams": dict(ngram=4, ngram_rows=50), "ngrams, documents": dict(ngram=3, ngram_rows=97, doc_mask=True),
    "windows": dict(window=7, window_pattern="SL"), "documents": dict(doc_mask=True),
    "documents, windows": dict(doc_mask=True, window=4, window_pattern="LS"), "one head": dict(n_head=1),
    "documents, windows, flex": dict(doc_mask=True, window=4, window_pattern="LS", attention="flex"),
    "plain": dict(value_residual=False, embed_residual=False, untie_head=False, softcap=0.0, qk_norm=False),
}


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_forward_is_the_plain_form(switch):
    model = stir(make(**SWITCHES[switch]))
    tokens = some_tokens()
    with torch.no_grad():
        logits, expected = model(tokens), plain_forward(model, tokens)
        assert logits.shape == (2, T, 320) and logits.dtype == torch.float32 and logits.std() > 0.3
        assert torch.allclose(logits, expected, atol=2e-4, rtol=1e-4), (logits - expected).abs().max()
        loss, targets = model(tokens, some_tokens(seed=1)), some_tokens(seed=1)
    by_hand = -torch.log_softmax(expected, -1).gather(-1, targets[..., None]).mean()
    assert loss.item() == pytest.approx(by_hand.item(), abs=1e-4)


def test_off_equals_on_at_its_neutral_value():
    tokens = some_tokens()
    for switch, neutral in (("value_residual", lambda m: [b.attn.value_lambda.zero_() for b in m.blocks]),
                            ("embed_residual", lambda m: [b.lambdas.copy_(torch.tensor([1.0, 0.0])) for b in m.blocks])):
        with torch.no_grad():
            on, off = stir(make(**{switch: True})), make(**{switch: False})
            neutral(on)
            missing = off.load_state_dict(on.state_dict(), strict=False)
            assert not missing.missing_keys and all("lambda" in key for key in missing.unexpected_keys)
            assert torch.equal(on(tokens), off(tokens))
    with torch.no_grad():
        capped, free = stir(make(softcap=30.0)), stir(make(softcap=0.0))
        assert torch.allclose(capped(tokens), 30 * torch.tanh(free(tokens) / 30), atol=1e-6)


def test_off_leaves_nothing_behind():
    on = dict(make().named_parameters())
    assert sum("lambda" in name for name in on) == 4
    assert not any("lambda" in name for name, _ in make(value_residual=False, embed_residual=False).named_parameters())
    tied = make(untie_head=False)
    assert tied.lm_head.weight is tied.wte.weight and "lm_head.weight" not in dict(tied.named_parameters())
    assert make().lm_head.weight is not make().wte.weight


def test_zero_init():
    for zero in (True, False):
        model = make(zero_init=zero)
        for weight in (model.lm_head.weight, *(w for b in model.blocks for w in (b.attn.o.weight, b.mlp.down.weight))):
            assert bool(weight.any()) != zero
        assert all(w.any() for b in model.blocks for w in (b.attn.q.weight, b.attn.k.weight, b.attn.v.weight, b.mlp.up.weight))
    assert make(untie_head=False).wte.weight.any(), "a tied head is the embedding: it must not be zero"


def test_bf16():
    for on, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        model = make(bf16=on, zero_init=False)
        assert model.wte.weight.dtype == dtype
        assert all(p.dtype == torch.float32 for name, p in model.named_parameters() if not name.startswith("wte"))
        seen = []
        model.blocks[1].mlp.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        logits = model(some_tokens())
        assert seen == [dtype] and logits.dtype == torch.float32
        assert model(some_tokens(), some_tokens(seed=1)).dtype == torch.float32
    assert make(bf16=True, untie_head=False).wte.weight.dtype == torch.float32, "the tied weight is the head's fp32 master"
    exact, rough = (make(bf16=on, zero_init=False)(some_tokens()) for on in (False, True))
    assert 0 < (exact - rough).abs().max() < 0.05 * exact.abs().max()


def test_first_loss_is_that_of_a_uniform_guess():
    loss = make()(some_tokens(), some_tokens(seed=1)).item()
    assert loss == pytest.approx(math.log(320), abs=1e-6)
    tied = make(untie_head=False)(some_tokens(), some_tokens(seed=1)).item()
    assert abs(tied - math.log(320)) < 0.5


# ---------------------------------------------------------------------------------------------------- causality and documents

@pytest.mark.parametrize("changes", [dict(), dict(doc_mask=True), dict(window=5, window_pattern="S"), dict(doc_mask=True, window=5, window_pattern="SL"),
                                     dict(ngram=4, doc_mask=True)], ids=["plain", "documents", "windows", "both", "ngrams"])
def test_a_token_changes_nothing_before_it_nor_in_other_documents(changes):
    model, tokens = stir(make(**changes)), some_tokens()
    document = (tokens == EOT).cumsum(1)
    with torch.no_grad():
        before = model(tokens)
        for row, at in ((0, 3), (0, 12), (0, 19), (1, 2), (1, 10), (1, 30)):
            other = tokens.clone()
            other[row, at] = (other[row, at] + 1) % EOT
            moved = (model(other) - before).abs().amax(-1)  # [B, T]
            may_move = torch.zeros(2, T, dtype=torch.bool)
            may_move[row, at:] = True
            if model.config.doc_mask:
                may_move &= document == document[row, at]
            if model.config.window and model.config.window_pattern == "S":
                may_move[row, at + 2 * (5 - 1) + 1:] = False  # two layers, each 4 back
            assert moved[~may_move].max() < 1e-6, "changed where it must not"
            assert moved[may_move].min() > 1e-5, "did not change where it must"


@pytest.mark.parametrize("attention", ["sdpa", "flex"])
@pytest.mark.parametrize("window", [0, 1, 6, 31, 32, 100])
@pytest.mark.parametrize("doc_mask", [False, True])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_backends_against_a_naive_mask(attention, window, doc_mask):
    config, tokens = tiny(attention=attention, doc_mask=doc_mask), some_tokens()
    q, k, v = torch.randn(3, 2, 3, T, 16, generator=torch.Generator().manual_seed(1))
    mask = attention_mask(tokens, window, config)
    expected = naive_attention(q, k, v, naive_mask(tokens, window, doc_mask))
    assert torch.allclose(attend(q, k, v, mask), expected, atol=1e-5)
    assert (mask is None) == (not doc_mask and window in (0, 32, 100)), "plain causal attention needs no mask"
    if mask is not None:
        assert isinstance(mask, train_gpt.BlockMask) == (attention == "flex")


def test_ngrams_spread_over_their_table():
    """Every pair of 256 bytes in 4,096 rows: no row far fuller than chance, and the tables of two lengths disagree."""
    pairs = torch.cartesian_prod(torch.arange(256), torch.arange(256))
    rows = train_gpt.ngram_hashes(pairs, tiny(ngram=2, ngram_rows=4096))[0][:, 1].bincount(minlength=4096)
    assert rows.min() > 0 and rows.max() < 4 * rows.float().mean()
    two, three = train_gpt.ngram_hashes(some_tokens(), tiny(ngram=3, ngram_rows=4096))
    assert not torch.equal(two, three)


def test_windows_of_layers():
    assert layer_windows(tiny(n_layer=5, window=9, window_pattern="SSL")) == [9, 9, 0, 9, 9]
    assert layer_windows(tiny(n_layer=3)) == [0, 0, 0]


# ------------------------------------------------------------------------------------------------------------ rotary, QK-norm

def test_rotary_keeps_norms_and_tells_relative_positions():
    generator, rotary = torch.Generator().manual_seed(0), functools.partial(rotate, tables=CausalSelfAttention(tiny(n_embd=32, n_head=2, seq_len=T)).rotary)
    x = torch.randn(2, 3, T, 16, generator=generator)
    assert torch.allclose(rotary(x).norm(dim=-1), x.norm(dim=-1), atol=1e-5)
    assert torch.allclose(rotary(x)[..., 0, :], x[..., 0, :]), "position 0 does not turn"
    q, k = (torch.randn(1, 1, 1, 16, generator=generator).expand(1, 1, T, 16) for _ in "qk")
    scores = (rotary(q) @ rotary(k).mT)[0, 0]
    for distance in range(T):
        along = scores.diagonal(-distance)
        assert torch.allclose(along, along[0].expand_as(along), atol=1e-4)
    assert scores[:, 0].std() > 0.1
    assert torch.allclose(rotary(x[:, :, :10]), rotary(x)[:, :, :10]), "shorter rows use the same angles"
    assert not any("rotary" in name for name in GPT(tiny()).state_dict()), "its tables are no weights"


def test_qk_norm_makes_queries_and_keys_one_size():
    sizes = []

    def spy(q, k, v, mask):
        sizes.append([t.square().mean(-1).sqrt() for t in (q, k)])
        return torch.zeros_like(v)

    for on in (True, False):
        model = stir(make(qk_norm=on))
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr(train_gpt, "attend", spy)
            model(some_tokens())
    for query, key in sizes[:2]:
        assert torch.allclose(query, torch.ones_like(query), atol=1e-4) and torch.allclose(key, torch.ones_like(key), atol=1e-4)
    assert sizes[2][0].std() > 0.01
    with torch.no_grad():
        for on in (True, False):
            model = stir(make(qk_norm=on))
            before = model(some_tokens())
            model.blocks[0].attn.q.weight.mul_(10)
            assert torch.allclose(model(some_tokens()), before, atol=1e-4) == on, "with QK-norm the queries' size does not matter"


# ------------------------------------------------------------------------------------------------ first values, groups, FLOPs

@pytest.mark.parametrize("switch", ["all on", "plain", "tied", "no zero_init", "ngrams"])
def test_every_parameter_is_initialised_once_by_name_and_in_one_group(switch):
    config = tiny(**SWITCHES[switch])
    model, other = GPT(config), GPT(config)
    with torch.no_grad():
        for filled, value in ((model, math.nan), (other, 7.0)):
            for p in filled.parameters():
                p.fill_(value)
    init_weights(model, config)
    torch.randn(5)  # what else is drawn does not matter
    init_weights(other, config)
    for (name, p), q in zip(model.named_parameters(), other.parameters()):
        assert torch.isfinite(p).all() and torch.equal(p, q), name
    init_weights(other, tiny(seed=1, **SWITCHES[switch]))
    assert not torch.equal(model.wte.weight, other.wte.weight) and not torch.equal(model.blocks[0].attn.q.weight, other.blocks[0].attn.q.weight)
    drawn = [p.flatten()[:1024] for p in model.parameters() if p.numel() >= 1024 and p.any()]
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i]), "two parameters got the same numbers"
    for optimizers in (make_optimizers(model, config, Runtime(torch.device("cpu")), []),):
        names = [name for optimizer in optimizers for name in optimizer.named]
        assert sorted(names) == sorted(dict(model.named_parameters()))
        assert all(optimizer.named[name] is model.get_parameter(name) for optimizer in optimizers for name in optimizer.named)


def test_a_parameter_without_a_rule_is_an_error():
    model = make()
    model.extra = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(KeyError, match="extra"):
        init_weights(model, model.config)


def test_scales_of_the_first_values():
    model = make(zero_init=False, n_embd=128)
    assert model.wte.weight.std().item() == pytest.approx(1, rel=0.02)
    assert make(untie_head=False).wte.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for name, fan_in in (("blocks.0.attn.q", 128), ("blocks.1.attn.o", 128), ("blocks.0.mlp.up", 128), ("blocks.0.mlp.down", 512), ("lm_head", 128)):
        weight = model.get_parameter(f"{name}.weight")
        assert weight.abs().max() <= fan_in**-0.5 and weight.std().item() == pytest.approx((3 * fan_in) ** -0.5, rel=0.03), name
    assert [block.attn.value_lambda.item() for block in model.blocks] == [0.5, 0.5]
    assert [block.lambdas.tolist() for block in model.blocks] == [[1, 0], [1, 0]]


def test_flops_per_token_by_hand():
    config = tiny()  # 2 layers, width 32, vocabulary padded to 320, 32 tokens a row
    matrices = 2 * (4 * 32 * 32 + 2 * 32 * 128) + 320 * 32  # q k v o, up, down; head
    forward = 2 * matrices + 2 * (2 * 2 * 32 * 16)  # a multiply and an add each; QK and AV over 16 tokens on average
    assert train_gpt.flops_per_token(config) == 3 * forward  # backward: twice the forward
    assert sum(p.numel() for p in GPT(config).parameters() if p.ndim == 2) == matrices + 320 * 32  # and wte, which is looked up
    short = train_gpt.flops_per_token(tiny(window=4, window_pattern="SL"))
    assert short == 3 * (forward - 2 * 2 * 32 * (16 - 4))
    assert train_gpt.flops_per_token(train_gpt.PRESETS["gpt2_small"]) == pytest.approx(6 * 123.6e6 + 12 * 12 * 768 * 512, rel=1e-3)


def test_optimizer_groups_follow_the_model_in_a_step():
    """One step from the zero head moves the head and nothing that hides behind it; the second moves everything."""
    model = make(bf16=False)
    config = model.config
    optimizers = make_optimizers(model, config, Runtime(torch.device("cpu")), [])
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for step in range(3):
        F.cross_entropy(model(some_tokens()).flatten(0, 1), some_tokens(seed=1).flatten()).backward()
        for optimizer in optimizers:
            optimizer.step()
        moved = {name for name, p in model.named_parameters() if not torch.equal(p, start[name])}
        if step == 0:
            assert moved == {"lm_head.weight"}
    assert moved == set(start) - {"blocks.0.attn.value_lambda"}, "the first block mixes its values with themselves"
