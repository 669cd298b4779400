"""The whole forward pass of January 2026 against a second form of it, written from the record's
description: one head, one pair of positions, one number at a time; layers by their numbers."""

import dataclasses
import math

import pytest
import torch
from test_recipe import SMALL, TINY, lively

import train_gpt

EOT, T = 256, 32
# The record's roles at 11 layers
LONG, PAIRED, SKIPS, OFFSET = (3, 10), (0, 2, 5, 9), 6, (3, 10)
TABLES = {0: 1, 1: 2, 8: 0, 9: 1, 10: 2}
ELEVEN = dataclasses.replace(TINY, n_layer=11, n_head=2, n_embd=32, bigram_rows=97)
assert SMALL.n_layer == 11


def rms(x):
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()


def gate(w, name, x):
    return torch.sigmoid(x[:12] @ w[f"{name}.weight"].T)


def turn(x, position, frequencies):
    """A head's vector: pairs (i, i + quarter) turn, the second half of the vector does not."""
    y, quarter = x.clone(), len(frequencies)
    for i, frequency in enumerate(frequencies):
        cos, sin = math.cos(position * frequency), math.sin(position * frequency)
        y[i] = x[i] * cos + x[i + quarter] * sin
        y[i + quarter] = x[i + quarter] * cos - x[i] * sin
    return y


def frequencies_and_scale(c, windows):
    """After windows of these sizes, one after the other: YaRN with 1 and 32 turns as its bounds."""
    quarter = c.n_embd // c.n_head // 4
    frequencies = [1024 ** (-i / (quarter - 1)) for i in range(quarter)]
    scale = 0.1
    for old, new in zip(windows, windows[1:], strict=False):
        for i, frequency in enumerate(frequencies):
            turns = old * frequency / (2 * math.pi)
            kept = min(1, max(0, (turns - 1) / 31))
            frequencies[i] = frequency * (old / new * (1 - kept) + kept)
        scale *= 0.2 * math.log(new / old) + 1
    return frequencies, scale


def attention(c, w, name, layer, h, x, values, row, windows):
    """y [T, D] of one row; h: what q, k and v are made of; x: what gates look at."""
    H, d = c.n_head, c.n_embd // c.n_head
    frequencies, scale = frequencies_and_scale(c, windows)
    q, k, v = ((h @ w[f"{name}.{m}.weight"].T).view(T, H, d) for m in "qkv")
    paired, long = layer in PAIRED, layer in LONG
    window = windows[-1] if long else {12: 4, 18: 8}[windows[-1]]
    if layer in TABLES:
        shares = torch.stack([gate(w, f"{name}.value_gate", x[t]) for t in range(T)])
        v = v + 2 * shares[:, :, None] * values[TABLES[layer]].view(T, H, d)
    q, k = rms(q), rms(k)

    def place(t, head):
        """(Position, sequence) of a head's token; paired heads take turns in one sequence."""
        if not paired:
            return t, head
        return 2 * t + head // (H // 2), head % (H // 2)

    turned_q, turned_k = torch.empty_like(q), torch.empty_like(k)
    for t in range(T):
        for head in range(H):
            turned_q[t, head] = turn(q[t, head], place(t, head)[0], frequencies)
            turned_k[t, head] = turn(k[t, head], place(t, head)[0], frequencies)
    if layer in OFFSET:
        still = turned_k[:, :, d // 2 :].clone()
        turned_k[1:, :, d // 2 :] = still[:-1]
    y = torch.zeros(T, H, d)
    for t in range(T):
        for head in range(H):
            here, sequence = place(t, head)
            scores, seen = [], []
            for s in range(T):
                for other in range(H):
                    there, their_sequence = place(s, other)
                    inside = 0 <= here - there <= window and EOT not in row[s + 1 : t + 1]
                    if sequence == their_sequence and inside:
                        scores.append(scale * turned_q[t, head] @ turned_k[s, other])
                        seen.append(v[s, other])
            odds = torch.softmax(torch.stack(scores), 0)
            y[t, head] = odds @ torch.stack(seen) * gate(w, f"{name}.gate", x[t])[head]
    return y.flatten(1) @ w[f"{name}.o.weight"].T


def bigram(row, t):
    if t == 0:
        return 96
    before = row[t - 1] if t > 1 else 96
    return ((36313 * row[t]) ^ (27191 * before)) % 96


def plain(c, w, row, windows):
    """Logits [T, V] of one row of tokens."""
    embedded = w["wte.weight"][row]
    x = embedded.clone()
    for t in range(1, T):
        share = gate(w, "smear_gate", embedded[t]) * w["smear_lambda"]
        x[t] = embedded[t] + share * embedded[t - 1]
    x = x0 = rms(x)
    bigrams = torch.stack([w["bigrams.weight"][bigram(row, t)] for t in range(T)])
    values = [w[f"value_embeds.{i}.weight"][row] for i in range(3)]
    outputs = []
    for layer in range(11):
        name = f"blocks.{layer}"
        if layer == SKIPS:
            shares = torch.stack([gate(w, "skip_gate", x0[t]) for t in range(T)])
            x = x + 2 * torch.sigmoid(w["skip_lambda"]) * shares * outputs[3]
        x = w[f"{name}.x_lambda"] * x + w[f"{name}.x0_lambda"] * x0
        x = x + w[f"{name}.bigram_lambda"] * bigrams
        if layer != SKIPS:
            normed, factors = rms(x), w[f"{name}.attn.factors"]
            made = attention(
                c, w, f"{name}.attn", layer, factors[0] * normed, normed, values, row, windows
            )
            x = x + factors[1] * made
        hidden = (rms(x) @ w[f"{name}.mlp.up.weight"].T).relu().square()
        x = x + hidden @ w[f"{name}.mlp.down.weight"]
        outputs.append(x)
    x = rms(x - w["backout_lambda"] * outputs[7])
    return 23 * torch.sigmoid((x @ w["lm_head.weight"].T + 5) / 7.5)


@pytest.mark.parametrize("step, windows", [(0, [12]), (4, [12, 18])])
def test_forward_is_the_plain_form(step, windows):
    model = lively(ELEVEN)
    model.set_stage(step)
    row = torch.randint(256, (T,), generator=torch.Generator().manual_seed(5))
    row[9] = EOT
    with torch.no_grad():
        expected = plain(ELEVEN, dict(model.named_parameters()), row.tolist(), windows)
        got = model(row[None])[0]
    assert got.std() > 0.3
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("step, windows", [(0, [384]), (520, [384, 896]), (1599, SMALL.window)])
def test_yarn_at_full_size(step, windows):
    frequencies, scale = train_gpt.rotary_at(step, SMALL)
    expected, expected_scale = frequencies_and_scale(SMALL, list(windows))
    assert scale == pytest.approx(expected_scale)
    torch.testing.assert_close(frequencies, torch.tensor(expected), rtol=1e-4, atol=0)
