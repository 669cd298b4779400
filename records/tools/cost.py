"""Estimate what a run costs: python -m records cost [--utilisation SHARE] [-- FLAGS OF train_gpt]

Tokens of the run, times operations per token (flops_per_token of the model), over the cards' dense
bf16 peak times an assumed utilisation: minutes. Nothing is measured. For the model of 2024 it rests
on the public record of 8 November 2024: 467.6 s for nov2024's tokens on 8 H100; its share is shown.
For that of 2026 it is what preflight estimates on 8 H100 (records/ESTIMATE.md).

A second table: what stays in a GPU's memory between updates, by the sizes of all tensors that the
trainer would make. Computed, not measured; activations come on top. --relora and --galore, which
change these tensors as they go, have no line there.
"""

import dataclasses
import functools
import sys
from pathlib import Path

import torch

from records.tools.command import BadInput, Parser, command, emit, number_in

sys.path.append(str(Path(__file__).resolve().parents[2]))
import train_gpt  # noqa: E402

CARDS = {  # dense bf16 operations per second by the vendors' data sheets, cards, GiB of each
    "8×H100": (8 * 989e12, 8, 80),
    "H100": (989e12, 1, 80),
    "5090": (209e12, 1, 32),
    "4090": (165e12, 1, 24),
    "3090": (71e12, 1, 24),
}
# What the public record took; not ours, and on another recipe where the number is another
PUBLIC = (
    "public: 39.9 s on 8×H100 (record 92), 508.8 s (record 91) and 547.4 s (record 89) on one H100"
)
ANCHOR = "nov2024", "8×H100", 467.6  # seconds
UTILISATION = {"gpt2024": 0.35, "gpt2026": 0.29}  # of the peak
GPUS = 1, 8
PRESETS = ("nov2024", "gpt2_small", "gpt2_medium", "gpt2_xl")


tokens_of = train_gpt.tokens_of


@functools.cache
def operations_per_token(c) -> float:
    with torch.device("meta"):  # shapes without memory
        return shape_of(c).flops_per_token()


def shape_of(c):
    """The model without values. A prefix table would need the tokenizer and change no size."""
    stages = tuple(dataclasses.replace(stage, prefix=(0.0,)) for stage in c.stages)
    return train_gpt.MODELS[c.model](dataclasses.replace(c, stages=stages))


def on(c, cards: int, gib: int):
    """The config as it would be resolved there: rows of the n-gram table, and steps by that."""
    if c.model != "gpt2026":
        return c

    class Machine:
        memory, world_size = gib << 30, cards

    return train_gpt.with_table(c, Machine)


def operations_of(c) -> float:
    return tokens_of(c) * operations_per_token(c)


def row(name: str, c, utilisation: float, price: float | None) -> str:
    """A line of the table: tokens, operations per token, all of them on the first machine; minutes,
    or with a price dollars too, on each."""
    cells = []
    for peak, cards, gib in CARDS.values():
        seconds = operations_of(on(c, cards, gib)) / (peak * utilisation)
        minutes = f"{seconds / 60:,.0f}" if seconds >= 1200 else f"{seconds / 60:.1f}"
        cells.append(minutes + (f" (${cards * price * seconds / 3600:,.2f})" if price else ""))
    first = on(c, *next(iter(CARDS.values()))[1:])
    head = [f"`{name}`", f"{tokens_of(first) / 1e6:,.1f} M"]
    head += [f"{operations_per_token(first) / 1e6:,.0f} M", f"{operations_of(first) / 1e18:.2f} E"]
    return f"| {' | '.join(head + cells)} |"


def bytes_of(c, gpus: int) -> tuple[int, int, int]:
    """On the first of so many GPUs: weights, gradients, optimizer state after the first update;
    without an n-gram table, which has no gradient."""
    runtime = train_gpt.Runtime(torch.device("meta"), world_size=gpus)
    c = dataclasses.replace(c, table_rows=c.table_rows or 8)
    with torch.device("meta"):
        run = train_gpt.Run(c, runtime, shape_of(c), train_gpt.make_methods(c))
        if run.model.table:
            run.model.table.allocate(runtime)
        optimizers = train_gpt.make_optimizers(run)
        optimizers = [o for o in optimizers if not isinstance(o, train_gpt.RowAdam)]
        for optimizer in optimizers:
            optimizer.steps = 1
            optimizer.direction(torch.empty_like(optimizer.weights[optimizer.own]))
    weights = sum(optimizer.weights.nbytes for optimizer in optimizers)
    state = sum(tensor.nbytes for o in optimizers for tensor in o.state.values())
    return weights, weights, state


def memory_row(name: str, c) -> str:
    """A line of the table: parameters; GiB of weights, gradients and state; sums by GPUs."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in shape_of(c).parameters())
    found = [bytes_of(c, gpus) for gpus in GPUS]
    weights, gradients, _ = found[0]
    states = [state for *_, state in found]
    sizes = [weights, gradients, *states, *map(sum, found)]
    cells = [f"{size / 2**30:.2f}" for size in sizes]
    return f"| `{name}` | {parameters / 1e6:,.1f} M | {' | '.join(cells)} |"


def table_lines() -> list[str]:
    """Rows of gpt2_small's n-gram table, and steps, on each machine."""
    c = train_gpt.PRESETS["gpt2_small"]
    lines = []
    for card, (_, cards, gib) in CARDS.items():
        there = on(c, cards, gib)
        size = train_gpt.table_bytes(there.table_rows, there) / 2**30
        lines.append(f"{card}: {there.table_rows:,} rows ({size:.1f} GiB), {there.steps} steps")
    return lines


@command("cost")
def main(argv: list[str]) -> int:
    parser = Parser("cost", __doc__)
    share = number_in(float, 0.01, 1)
    parser.add_argument("--utilisation", type=share, help="share of the peak")
    price = number_in(float, 0, 1000)
    parser.add_argument("--dollars_per_hour", type=price, help="of one card; adds the price")
    cut = argv.index("--") if "--" in argv else len(argv)
    args, flags = parser.parse_args(argv[:cut]), argv[cut + 1 :]
    try:
        if flags:
            chosen = {" ".join(flags): train_gpt.parse_config(flags, "gpt2_small")}
        else:
            chosen = {name: train_gpt.PRESETS[name] for name in PRESETS}
    except train_gpt.UserError as error:
        raise BadInput(str(error)) from None
    heads = ["preset", "tokens", "FLOPs per token", "FLOPs", *(f"min, {card}" for card in CARDS)]
    emit(f"| {' | '.join(heads)} |\n|---{'|---:' * (len(heads) - 1)}|")
    for name, config in chosen.items():
        assumed = args.utilisation or UTILISATION[config.model]
        emit(row(name, config, assumed, args.dollars_per_hour))
    preset, cards, seconds = ANCHOR
    reached = operations_of(train_gpt.PRESETS[preset]) / seconds / CARDS[cards][0]
    shares = {args.utilisation} if args.utilisation else UTILISATION.values()
    share = " (gpt2_small: ".join(f"{share:.0%}" for share in shares) + ")" * (len(shares) - 1)
    emit(f"\nAn estimate: {share} of the cards' bf16 peak is assumed. The public record of")
    emit(f"8 November 2024 reached {reached:.0%} ({seconds} s on {cards}); {PUBLIC}.")
    emit(f"gpt2_small's n-gram table: {'; '.join(table_lines())}. Steps for fewer rows are")
    emit("priced from the public ablation, not shown.\n")
    heads = ["preset", "parameters", "GiB of weights", "gradients"]
    heads += [f"{what} of {gpus}" for what in ("state, rank", "sum, rank") for gpus in GPUS]
    emit(f"| {' | '.join(heads)} |\n|---{'|---:' * (len(heads) - 1)}|")
    for name, config in chosen.items():
        if not config.relora and not config.galore:
            emit(memory_row(name, config))
    emit("\nComputed from sizes of tensors, without activations; nothing was measured.")
    return 0
