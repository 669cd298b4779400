"""gpt2_small against record92.py, an independent form of the same recipe: every loss, gradient and
weight of a whole run at small width, in float64."""

import dataclasses

import numpy as np
import pytest
import record92
import torch
from helpers import CPU

import train_gpt

STEPS, ROWS, VOCAB, WIDTH, HEADS = 28, 2, 257, 48, 6
LENGTHS = (7, 8, 6, 3, 4)  # of the stages, in updates; the last is the extension
TOLERANCE = 1e-9


def small_config(**changes):
    """Record 92's stages with short rows, a small vocabulary and a narrow model."""
    columns = dict(
        seq_len=(16, 32, 48, 40, 16),
        max_document=(9, 20, 30, 30, 30),
        window=(6, 9, 12, 12, 14),
        short_window=(3, 5, 7, 7, 8),
        candidates=((100,), (120,), (150, 150, 200), (0,), (0,)),
    )
    stages = []
    for i, (stage, steps) in enumerate(zip(train_gpt.RECORD_92, LENGTHS, strict=True)):
        fields = {name: values[i] for name, values in columns.items()}
        fields |= dict(steps=steps, batch_tokens=ROWS * columns["seq_len"][i])
        stages.append(dataclasses.replace(stage, **fields))
    fields = dict(
        stages=tuple(stages),
        device="cpu",
        compile=False,
        bf16=False,
        vocab_size=VOCAB,
        n_embd=WIDTH,
        n_head=HEADS,
        table_rows=600,
        val_tokens=128,
        val_seq_len=64,
        momentum_warmup=8,
        momentum_cooldown=5,
        cooldown=0.75,
    )
    return dataclasses.replace(train_gpt.PRESETS["gpt2_small"], **fields | changes)


@pytest.fixture
def double(monkeypatch):
    """float64 everywhere; lengths that show at this size; prefixes for a vocabulary of bytes."""
    torch.set_default_dtype(torch.float64)
    monkeypatch.setattr(train_gpt.GPT2026, "SEGMENT", 11)
    monkeypatch.setattr(train_gpt, "FINAL_WINDOW", 17)
    monkeypatch.setattr(train_gpt, "prefix_table", lambda c: prefixes())
    yield
    torch.set_default_dtype(torch.float32)


def prefixes():
    table = np.random.default_rng(1).integers(0, 256, 320)
    table[::3] = -1
    return table


def twin_recipe(c):
    """The same settings for record92.py."""
    stages = [
        record92.Stage(
            steps=stage.steps,
            tokens=stage.batch_tokens,
            document=stage.max_document,
            windows=(stage.short_window, stage.window),
            rate=stage.lr_factor,
            ahead=stage.predictions,
            prefix=stage.prefix,
            candidates=stage.candidates,
        )
        for stage in c.stages
    ]
    return record92.Recipe(
        vocab=c.padded_vocab,
        width=c.n_embd,
        heads=c.n_head,
        hidden=c.n_embd * 11 // 3,
        table_rows=c.table_rows,
        stages=stages,
        final_window=train_gpt.FINAL_WINDOW,
        cooldown=c.cooldown,
        momentum_warmup=c.momentum_warmup,
        momentum_cooldown=c.momentum_cooldown,
        rails_from=train_gpt.scaled(514, c),
        rare_from=train_gpt.rare_from(c),
        tail=train_gpt.scaled(298, c),
        tail_short=train_gpt.scaled(250, c),
    )


def in_pairs(weight, heads, turning):
    """Rows of our q or k, [heads * dim, ...], in the twin's order: what turns together, a half
    apart with us, is a pair of neighbours there."""
    rows = weight.unflatten(0, (heads, -1))
    turned = rows[:, :turning].unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
    return torch.cat((turned, rows[:, turning:]), 1).flatten(0, 1)


PLAIN = {
    "smear": "smear",
    "skip": "skip",
    "gate_scale": "gate_scale",
    "wte.weight": "embed",
}
MIXES = {
    "early_gates": "gates.0",
    "late_gates": "gates.1",
    "last_mix": "mudd.0",
    "head_mix": "mudd.1",
}
MIX_PARTS = {"w1.weight": "w1", "w2.weight": "w2", "bias": "b"}


def by_twin_name(tensors, c):
    """{our name: tensor} of weights or gradients as {the twin's name: tensor}."""
    found, stacks = {}, {"tables": [], "residual": [], "post": []}
    for name, tensor in tensors.items():  # blocks and tables come in the order of their numbers
        first, _, rest = name.partition(".")
        if name in PLAIN:
            found[PLAIN[name]] = tensor
        elif name == "lm_head.weight":
            found["head"] = tensor.T
        elif name == "smear_gate.weight":
            found["smear_gate"] = tensor[0]
        elif name == "head_groups.weight":
            found["mudd_groups"] = tensor.unflatten(0, (-1, 12))
        elif first in MIXES:
            found[f"{MIXES[first]}.{MIX_PARTS[rest]}"] = tensor
        elif first == "value_embeds":
            stacks["tables"].append(tensor)
        elif rest.rpartition(".")[2] in ("residual", "post"):
            stacks[rest.rpartition(".")[2]].append(tensor)
        else:
            assert first == "blocks", name
            number, _, rest = rest.partition(".")
            found |= of_block(int(number), rest, tensor, c)
    return found | {name: torch.stack(stack) for name, stack in stacks.items()}


def of_block(number, rest, tensor, c):
    """The same of one of our blocks' tensors."""
    module, which, *side = rest.split(".")
    if module == "value_gate":
        return {f"attentions.{number}.gate": tensor}
    if module == "mlps":
        return {f"mlps.{number}.{which}.{side[0]}": tensor}
    if which not in "qk":
        return {f"attentions.{number}.{which}": tensor}  # v, o, factors
    dim = c.n_embd // c.n_head
    rows = in_pairs(tensor, c.n_head, dim // 2)
    size = dim if train_gpt.LAYERS[number].wide else dim // 2
    pairs = enumerate(rows.split(2 * size))
    return {f"attentions.{number}.{which}.{i}": pair for i, pair in pairs}


def start(c):
    """(our run, the twin's trainer) from the same weights, none of them 0 or 1."""
    run = train_gpt.build(c, CPU)
    run.optimizers = train_gpt.make_optimizers(run)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in run.model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=generator))
        run.model.wte.weight.copy_(run.model.lm_head.weight)
        rows = run.model.table.rows
        rows.add_(0.02 * torch.randn(rows.shape, generator=generator))
    twin = record92.GPT92(twin_recipe(c))
    ours = by_twin_name(dict(run.model.named_parameters()), c)
    with torch.no_grad():
        for name, p in twin.named_parameters():
            p.copy_(rows if name == "ngrams.weight" else ours[name])
        twin.ngrams.signs.copy_(run.model.table.signs)
    trainer = record92.Trainer(twin.config, twin, torch.from_numpy(prefixes()), ROWS)
    return run, trainer


def make_rows(step, c, generator):
    """Rows of whole documents: [ROWS, T + 1], the mark at the start of each."""
    stage = train_gpt.stage_at(step, c)[0]
    rows = generator.integers(0, 200, (ROWS, stage.seq_len + 1))
    for row in rows:
        place = 0
        while place < len(row):
            row[place] = VOCAB - 1
            place += int(generator.integers(3, stage.max_document + 1))
    return rows


def segments(tokens):
    marks = np.flatnonzero(tokens == VOCAB - 1)
    lengths = np.diff(marks, append=len(tokens)).tolist()
    return record92.segments_of(lengths, train_gpt.GPT2026.SEGMENT)


def difference(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm().clamp_min(1e-30)).item()


def train_one(run, step, rows, asked):
    """One update of ours, as the loop does it."""
    run.step = step
    train_gpt.set_stage(run)
    run.micro[len(rows), rows.shape[1] - 1] = 1
    batch = train_gpt.make_batch(run, rows, step, asked)
    loss = train_gpt.forward_backward(run, batch)
    grads = {name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None}
    train_gpt.step_optimizers(run)
    run.step += 1
    for method in run.methods:
        method.after_step(run.step, run)
    return loss.item(), grads


def test_a_whole_run_equals_the_twin(double):
    """28 updates over five stages, three window changes, every number of candidates, both momenta,
    rare tables, untying and tail averages."""
    c, generator = small_config(), np.random.default_rng(5)
    run, twin = start(c)
    asked, worst = [], {}

    def note(what, value):
        worst[what] = max(worst.get(what, 0.0), value)

    for step in range(STEPS):
        rows = make_rows(step, c, generator)
        loss, grads = train_one(run, step, rows, asked)
        batch = [
            (torch.from_numpy(r[:-1]), torch.from_numpy(r[1:]), segments(r[:-1])) for r in rows
        ]
        before = twin.update
        seen = {}

        def keep(step, before=before, seen=seen):
            seen |= {
                n: p.grad.clone() for n, p in twin.model.named_parameters() if p.grad is not None
            }
            before(step)

        twin.update = keep
        their_loss = twin.step(step, batch)
        twin.update = before
        note("loss", abs(loss - their_loss) / their_loss)
        zero = {n: torch.zeros_like(p) for n, p in run.model.named_parameters()}
        mine = by_twin_name(zero | grads, c)
        for name, grad in seen.items():
            if name != "ngrams.weight" and grad.norm() > 1e-12:
                note("gradient", difference(mine[name], grad))
        ours = by_twin_name({n: p.detach() for n, p in run.model.named_parameters()}, c)
        for name, p in twin.model.named_parameters():
            if name == "ngrams.weight":
                note("n-gram rows", difference(run.model.table.rows, p.detach()))
            elif step < STEPS - 1:
                note("weight", difference(ours[name], p.detach()))
    twin.tail.ship()
    ours = by_twin_name({n: p.detach() for n, p in run.model.named_parameters()}, c)
    for name, p in twin.model.named_parameters():
        if name != "ngrams.weight":
            note("tail average", difference(ours[name], p.detach()))
    rows = make_rows(STEPS - 1, c, generator)
    run.model.set_stage(STEPS)
    run.model.eval()
    with torch.no_grad():
        loss = run.model(**train_gpt.validation_inputs(run, rows)).item()
        total = 0.0
        for row in rows:
            tokens, targets = torch.from_numpy(row[:-1]), torch.from_numpy(row[1:])
            documents = (tokens == VOCAB - 1).cumsum(0)
            x = twin.model(tokens, twin.form(STEPS, documents, final=True))
            total += record92.validation_loss(x, twin.model.head, targets).item() / len(rows)
    note("validation loss", abs(loss - total) / total)
    print(worst)
    assert max(worst.values()) < TOLERANCE, worst
