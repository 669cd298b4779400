"""ReLoRA study: full-rank, LoRA and ReLoRA at equal steps, the parts of a restart one by one, and
the rank of what was learned.

    python records/methods/relora.py     10 minutes on two cores; writes relora*.csv and relora.png

All matrices train with Adam, so that adapters and weights differ in nothing but their rank. Each of
full, LoRA and ReLoRA gets the best of four rates (seed 0), then runs with seeds 1 to 3. Without a
warm start, as in the paper's ablation, all variants use ReLoRA's rate."""

import dataclasses
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import (
    SMALL,
    arguments,
    change,
    figure,
    in_parallel,
    mean_std,
    read_csv,
    save,
    tg,
    train,
    write_csv,
)  # noqa: E402

STEPS, RANK, CYCLE = 200, 8, 40
BASE = change(SMALL, matrix_optimizer="adam", steps=STEPS, val_every=20)
RESTARTS = dict(relora=RANK, relora_interval=CYCLE)
LORA = dict(relora=RANK, relora_interval=STEPS - 1)  # never merges
WARM, COLD = dict(relora_warm_start=CYCLE), dict(relora_warm_start=2)
VARIANTS = {
    "full rank": {},
    "LoRA": LORA | WARM,
    "ReLoRA": RESTARTS | WARM,
    "no warm start: LoRA": LORA | COLD,
    "no warm start: restarts": RESTARTS | COLD,
    "no warm start: restarts + reset": RESTARTS | COLD,
    "no warm start: restarts + re-warm": RESTARTS | COLD,
    "no warm start: all three": RESTARTS | COLD,
    "ReLoRA, adapters with Muon": RESTARTS | WARM | dict(matrix_optimizer="muon"),
}
# The parts that a variant leaves out
KEEPS_MOMENTS = ("no warm start: restarts", "no warm start: restarts + re-warm")
KEEPS_RATES = ("no warm start: restarts", "no warm start: restarts + reset")
RATES = [0.004 * 2**n for n in range(4)]  # Adam's
TUNED = dict.fromkeys(("full rank", "LoRA", "ReLoRA"), RATES) | {
    "ReLoRA, adapters with Muon": [0.01 * 2**n for n in range(4)]
}


class Parts(tg.ReLoRA):
    """ReLoRA whose merges leave the adapters' moments as they are."""

    def after_step(self, step, run):
        before = [(optimizer, optimizer.steps, optimizer.state) for optimizer in run.optimizers]
        super().after_step(step, run)
        for optimizer, steps, state in before:
            optimizer.steps, optimizer.state = steps, state


def lr_without_rewarming(step, c):
    return LR_AT(step, dataclasses.replace(c, relora=0))


LR_AT = tg.lr_at


class Ranks(tg.Method):
    """Rank of every adapted matrix's change since it was wrapped, after each merge and at the
    end."""

    def __init__(self, config):
        super().__init__(config)
        self.start, self.rows = {}, []

    @torch.no_grad()
    def after_step(self, step, run):
        c, layers = (
            run.config,
            {n: m for n, m in run.model.named_modules() if isinstance(m, tg.LoRALinear)},
        )
        if not layers:
            return
        self.start = self.start or {name: layer.weight.double() for name, layer in layers.items()}
        since = step - c.relora_warm_start
        if since % c.relora_interval == 0 or step == c.steps:
            products = -(-since // c.relora_interval)
            spectra = [
                torch.linalg.svdvals(layer.merged().double() - self.start[name])
                for name, layer in layers.items()
            ]
            ranks = [int((s > 1e-5 * s[0]).sum()) for s in spectra] if since else [0] * len(spectra)
            effective = [
                (s.sum() ** 2 / s.square().sum()).item() if since else 0.0 for s in spectra
            ]
            self.rows.append(
                dict(
                    step=step,
                    products=products,
                    k_times_r=products * c.relora,
                    lowest_rank=min(ranks),
                    highest_rank=max(ranks),
                    effective_rank=sum(effective) / len(effective),
                    full=min(layers["blocks.0.attn.q"].weight.shape),
                )
            )


def run_one(task: dict) -> dict:
    ranks, variant = Ranks(BASE), task["variant"]
    rates = dict(lr_adam=task["lr"])
    if "Muon" in variant:
        rates = dict(lr_muon=task["lr"], lr_adam=0.008)  # Adam's: of the warm start
    config = dataclasses.replace(BASE, seed=task["seed"], **rates, **VARIANTS[variant])
    tg.lr_at = lr_without_rewarming if variant in KEEPS_RATES else LR_AT
    run = train(config, [Parts] if variant in KEEPS_MOMENTS else None, watch=ranks)
    return task | dict(val=run.log.val, ranks=ranks.rows)


def study(processes: int):
    found = in_parallel(
        run_one,
        [dict(variant=v, lr=lr, seed=0) for v, rates in TUNED.items() for lr in rates],
        processes,
    )
    rates = {}
    for variant in TUNED:
        rates[variant] = min(
            (r for r in found if r["variant"] == variant),
            key=lambda r: (r["val"][STEPS] != r["val"][STEPS], r["val"][STEPS]),
        )["lr"]
    write_csv(
        "relora_rates.csv",
        [dict(variant=r["variant"], lr=r["lr"], seed=0, val_loss=r["val"][STEPS]) for r in found],
    )
    found = in_parallel(
        run_one,
        [
            dict(variant=v, lr=rates.get(v, rates["ReLoRA"]), seed=s)
            for v in VARIANTS
            for s in (1, 2, 3)
        ],
        processes,
    )
    write_csv(
        "relora_losses.csv",
        [
            dict(variant=r["variant"], lr=r["lr"], seed=r["seed"], step=step, val_loss=loss)
            for r in found
            for step, loss in r["val"].items()
        ],
    )
    write_csv(
        "relora_ranks.csv",
        [dict(variant=r["variant"], seed=r["seed"]) | row for r in found for row in r["ranks"]],
    )


def report():
    losses, ranks = read_csv("relora_losses.csv"), read_csv("relora_ranks.csv")
    made, axes = figure(1, 3)
    table = []
    for number, variant in enumerate(VARIANTS):
        mine = [r for r in losses if r["variant"] == variant]
        points = [
            (step, *mean_std([r["val_loss"] for r in mine if r["step"] == step]))
            for step in sorted({r["step"] for r in mine})
        ]
        cold = variant.startswith("no warm start")
        table.append(
            dict(
                variant=variant,
                lr=mine[0]["lr"],
                val_loss=points[-1][1],
                std=points[-1][2],
                n=len({r["seed"] for r in mine}),
            )
        )
        for axis in axes[:2]:
            if cold == (axis is axes[1]) or variant == "full rank":
                axis.errorbar(
                    *zip(*points[2:], strict=False),
                    label=variant.removeprefix("no warm start: "),
                    color="k" if number == 0 else f"C{number}",
                    marker=".",
                )
    full = table[0]["val_loss"]
    axes[0].set(
        title="40 full-rank updates first",
        xlabel="updates",
        ylabel="val loss",
        ylim=(full - 0.1, full + 1.4),
    )
    axes[1].set(title="no warm start", xlabel="updates", ylim=(full - 0.1, full + 1.4))
    for variant, color in (("LoRA", "C1"), ("ReLoRA", "C2")):
        mine = [r for r in ranks if r["variant"] == variant and r["seed"] == 1]
        axes[2].plot(
            [r["step"] for r in mine],
            [r["lowest_rank"] for r in mine],
            color=color,
            marker="o",
            label=variant,
        )
        axes[2].plot(
            [r["step"] for r in mine],
            [min(r["k_times_r"], r["full"]) for r in mine],
            color="k",
            marker="x",
            linestyle=":",
        )
        axes[2].plot(
            [r["step"] for r in mine],
            [r["effective_rank"] for r in mine],
            color=color,
            linestyle="--",
            label=f"{variant}, effective",
        )
    axes[2].set(title="rank of the change; crosses: k r", xlabel="updates")
    for axis in axes:
        axis.legend(fontsize=7)
    save(made, "relora.png")
    write_csv("relora.csv", table)
    for row in table:
        print(
            f"{row['variant']:36} lr {row['lr']:.3g}  val loss {row['val_loss']:.4f} ± "
            f"{row['std']:.4f} (n={row['n']})  "
            f"against full rank {row['val_loss'] - full:+.4f}"
        )
    for variant in VARIANTS:
        print(
            variant,
            [
                (
                    int(r["step"]),
                    int(r["k_times_r"]),
                    int(r["lowest_rank"]),
                    int(r["highest_rank"]),
                    round(r["effective_rank"], 1),
                )
                for r in ranks
                if r["variant"] == variant and r["seed"] == 1
            ],
        )


def main(argv=None) -> int:
    flags = arguments(__doc__.partition("\n\n")[0]).parse_args(argv)
    if not flags.plot_only:
        study(flags.processes)
    report()
    return 0


if __name__ == "__main__":
    sys.exit(main())
