"""Estimate what a run costs: python -m records cost [--utilisation 0.35] [-- FLAGS OF train_gpt.py]

Tokens of the run, times operations per token (train_gpt.flops_per_token), over the cards' dense
bf16 peak times an assumed utilisation: minutes. Nothing is measured. The assumption rests on the
public record of 8 November 2024: 467.6 s for nov2024's tokens on 8 H100; its share is shown.

A second table: what stays in a GPU's memory between updates, by the sizes of all tensors that the
trainer would make. Computed, not measured; activations come on top. --relora and --galore, which
change these tensors as they go, have no line there.
"""

import functools
import sys
from pathlib import Path

import torch

from records.tools.command import BadInput, Parser, command, emit, number_in

sys.path.append(str(Path(__file__).resolve().parents[2]))
import train_gpt  # noqa: E402

CARDS = {  # dense bf16 operations per second, by the vendors' data sheets
    "8×H100": 8 * 989e12,
    "H100": 989e12,
    "4090": 165e12,
    "3090": 71e12,
}
ANCHOR = "nov2024", "8×H100", 467.6  # seconds
GPUS = 1, 8
PRESETS = ("nov2024", "gpt2_small", "gpt2_medium", "gpt2_xl")


def tokens_of(c) -> int:
    """Tokens of a run."""
    return sum(train_gpt.at_step(c.batch_tokens, step, c) for step in range(c.steps))


@functools.cache
def operations_per_token(c) -> float:
    with torch.device("meta"):  # shapes without memory
        return train_gpt.flops_per_token(train_gpt.GPT(c))


def operations_of(c) -> float:
    return tokens_of(c) * operations_per_token(c)


def row(name: str, c, utilisation: float) -> str:
    """A line of the table: tokens, operations per token, all of them, minutes on each machine."""
    operations = operations_of(c)
    minutes = [operations / (peak * utilisation) / 60 for peak in CARDS.values()]
    cells = [
        f"`{name}`",
        f"{tokens_of(c) / 1e6:,.1f} M",
        f"{operations_per_token(c) / 1e6:,.0f} M",
        f"{operations / 1e18:.2f} E",
        *(f"{value:,.0f}" if value >= 20 else f"{value:.1f}" for value in minutes),
    ]
    return f"| {' | '.join(cells)} |"


def bytes_of(c, gpus: int) -> tuple[int, int, int]:
    """On the first of so many GPUs: weights, gradients, optimizer state after the first update."""
    runtime = train_gpt.Runtime(torch.device("meta"), world_size=gpus)
    with torch.device("meta"):
        run = train_gpt.build(train_gpt.resolve(c, runtime.device), runtime)
        optimizers = train_gpt.make_optimizers(run)
        for optimizer in optimizers:
            optimizer.steps = 1
            optimizer.update(optimizer.grads[optimizer.mine])
    weights = sum(optimizer.weights.nbytes for optimizer in optimizers)
    gradients = sum(optimizer.grads.nbytes for optimizer in optimizers)
    state = sum(tensor.nbytes for o in optimizers for tensor in o.state.values())
    return weights, gradients, state


def memory_row(name: str, c) -> str:
    """A line of the table: parameters; GiB of weights, gradients and state; sums by GPUs."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in train_gpt.GPT(c).parameters())
    found = [bytes_of(c, gpus) for gpus in GPUS]
    weights, gradients, _ = found[0]
    states = [state for *_, state in found]
    sizes = [weights, gradients, *states, *map(sum, found)]
    cells = [f"{size / 2**30:.2f}" for size in sizes]
    return f"| `{name}` | {parameters / 1e6:,.1f} M | {' | '.join(cells)} |"


@command("cost")
def main(argv: list[str]) -> int:
    parser = Parser("cost", __doc__)
    share = number_in(float, 0.01, 1)
    parser.add_argument("--utilisation", type=share, default=0.35, help="share of the peak [0.35]")
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
        emit(row(name, config, args.utilisation))
    preset, cards, seconds = ANCHOR
    reached = operations_of(train_gpt.PRESETS[preset]) / seconds / CARDS[cards]
    share = f"{args.utilisation:.0%} of the cards' bf16 peak is assumed"
    emit(f"\nAn estimate: {share}. The public record of")
    emit(f"8 November 2024 reached {reached:.0%} ({seconds} s on {cards}).\n")
    heads = ["preset", "parameters", "GiB of weights", "gradients"]
    heads += [f"{what} of {gpus}" for what in ("state, rank", "sum, rank") for gpus in GPUS]
    emit(f"| {' | '.join(heads)} |\n|---{'|---:' * (len(heads) - 1)}|")
    for name, config in chosen.items():
        if not config.relora and not config.galore:
            emit(memory_row(name, config))
    emit("\nComputed from sizes of tensors, without activations; nothing was measured.")
    return 0
