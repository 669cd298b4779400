"""SuPar study: does one learning rate hold for all widths and densities, and which rule does Muon
need?

    python records/methods/supar.py                 an hour on two cores; writes supar_*.csv, .png
    python records/methods/supar.py --part check    coordinate check, 5 minutes (or sweep)

standard: the masks alone. muP: and the rules for width. SuPar: and the rules for density. All share
masks and data."""

import dataclasses
import itertools
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import (
    SMALL,
    arguments,
    build,
    change,
    data,
    figure,
    in_parallel,
    mean_std,
    read_csv,
    save,
    tg,
    train,
    write_csv,
)  # noqa: E402

WIDTHS, DENSITIES, BASE, RULES = (
    (64, 128, 256),
    (1.0, 1 / 4, 1 / 16),
    64,
    ("standard", "muP", "SuPar"),
)
MUON = (
    (0.0, True),
    (0.0, False),
    (0.75, False),
)  # (exponent of 1 / density in the rate, gradient masked before, too?)
RATES = {"adam": [2.0**-n for n in range(11, 3, -1)], "muon": [0.02 * 2.0**n for n in range(6)]}
RUNS = {
    "adam": dict(steps=200, zero_init=False),
    "muon": dict(steps=60),
}  # in 60 updates, or zero-initialised, Adam at base width gains too little


class Rules(tg.SuPar):
    """SuPar with the rules for width or density left out, or with another exponent for Muon."""

    width_rules = density_rules = True
    power = tg.SuPar.MUON_POWER
    mask_first = False  # mask the gradient before Newton-Schulz, too

    def project(self, optimizer, g):
        return self.lift(optimizer, g) if self.mask_first else g

    def attach(self, model):
        c, density = self.config, 1 - self.config.sparsity
        whole = dataclasses.replace(
            c, mup_base_width=c.mup_base_width if self.width_rules else c.n_embd
        )
        self.config = whole
        super().attach(model)
        self.config = c
        for name, p in model.named_parameters():
            if name in self.masks:
                if c.matrix_optimizer == "muon":
                    p.lr_mult = density**-self.power
                if not self.density_rules:
                    p.data.mul_(density**0.5)  # undo the larger init
                    p.lr_mult = (
                        whole.mup_base_width / c.n_embd if c.matrix_optimizer == "adam" else 1.0
                    )


def rules(name: str, power: float = tg.SuPar.MUON_POWER, mask_first: bool = False) -> type:
    return type(
        name,
        (Rules,),
        dict(
            width_rules=name != "standard",
            density_rules=name == "SuPar",
            power=power,
            mask_first=mask_first,
        ),
    )


def config_of(width: int, density: float, optimizer: str, **fields) -> tg.Config:
    return change(
        SMALL,
        n_layer=2,
        n_embd=width,
        n_head=width // 32,
        batch_tokens=1024,
        val_tokens=16384,
        warmup=5,
        sparsity=1 - density,
        mup_base_width=BASE,
        matrix_optimizer=optimizer,
        **fields,
    )


# ------------------------------------------------------------------------------------------ sweeps


def sweep_run(task: dict) -> dict:
    config = config_of(
        task["width"],
        task["density"],
        task["optimizer"],
        seed=task["seed"],
        **RUNS[task["optimizer"]],
        **{f"lr_{task['optimizer']}": task["lr"]},
    )
    run = train(config, [rules(task["rule"])])
    return task | dict(val_loss=run.log.val[config.steps])


def sweep_tasks(optimizers) -> list[dict]:
    """Where rules agree (dense, or base width) one run stands for all of them."""
    tasks = []
    for optimizer, width, density, rule in itertools.product(optimizers, WIDTHS, DENSITIES, RULES):
        same_rule = density == 1 and rule == "SuPar" or width == BASE and rule == "muP"
        if same_rule or optimizer == "muon" and (rule == "muP" and density < 1 or width == 256):
            continue
        stands_for_supar = optimizer == "adam" and (
            rule == "SuPar" or density == 1 and (rule == "muP" or width == BASE)
        )
        tasks += [
            dict(
                optimizer=optimizer,
                width=width,
                density=density,
                rule=rule,
                lr=lr,
                seed=seed,
                steps=RUNS[optimizer]["steps"],
            )
            for lr in RATES[optimizer]
            for seed in range(
                3 if stands_for_supar and 2**-9 <= lr <= 2**-6 else 2 if width == BASE else 1
            )
        ]
    return sorted(tasks, key=lambda t: -t["width"])


def curves(rows: list[dict], optimizer: str, rule: str) -> dict:
    """{(width, density): [(lr, mean, std, n)]} with the stand-ins filled in."""
    found = {}
    for width, density in itertools.product(WIDTHS, DENSITIES):
        for stand_in in {
            "standard": ["standard"],
            "muP": ["muP", "standard" if width == BASE else "-"],
            "SuPar": ["SuPar"]
            + (["muP", "standard" if width == BASE else "-"] if density == 1 else []),
        }[rule]:
            group = [
                r
                for r in rows
                if (r["optimizer"], r["rule"], r["width"]) == (optimizer, stand_in, width)
                and abs(r["density"] - density) < 1e-9
            ]
            if group:
                found[width, density] = [
                    (lr, *mean_std(losses), len(losses))
                    for lr in sorted({r["lr"] for r in group})
                    if (losses := [r["val_loss"] for r in group if r["lr"] == lr])
                ]
                break
    return found


def best_rate(points: list[tuple]) -> tuple[float, float, float]:
    """(rate at the minimum of a parabola through the lowest point and its neighbours in log rate,
    loss, std)."""
    points = [p for p in points if math.isfinite(p[1])]
    i = min(range(len(points)), key=lambda n: points[n][1])
    lr, loss, std, _ = points[i]
    if 0 < i < len(points) - 1:
        left, right = points[i - 1][1] - loss, points[i + 1][1] - loss
        step = math.log2(points[i + 1][0] / lr)
        lr *= 2 ** (step * 0.5 * (left - right) / (left + right))
    return lr, loss, std


def ceiling(points: list[tuple], margin: float = 0.05) -> float:
    """The rate, above the best one, at which the loss is `margin` nats worse than at its best;
    infinite where the grid ends before."""
    lowest = min(p[1] for p in points)
    i = min(range(len(points)), key=lambda n: points[n][1])
    for (lr, loss, *_), (lr2, loss2, *_) in zip(points[i:], points[i + 1 :], strict=False):
        if loss2 - lowest > margin:
            return lr * (lr2 / lr) ** ((lowest + margin - loss) / (loss2 - loss))
    return math.inf


def report_sweep():
    rows, best = read_csv("supar_sweep.csv"), []
    for optimizer in RATES:
        names = [rule for rule in RULES if optimizer == "adam" or rule != "muP"]
        made, axes = figure(1, len(names))
        for axis, rule in zip(axes, names, strict=False):
            for (width, density), points in curves(rows, optimizer, rule).items():
                style = {1.0: "-", 0.25: "--", 0.0625: ":"}[density]
                axis.errorbar(
                    [p[0] for p in points],
                    [p[1] for p in points],
                    [p[2] for p in points],
                    linestyle=style,
                    marker=".",
                    color=f"C{WIDTHS.index(width)}",
                    label=f"{width}, 1/{round(1 / density)}",
                )
                lr, loss, std = best_rate(points)
                best.append(
                    dict(
                        optimizer=optimizer,
                        rule=rule,
                        width=width,
                        density=density,
                        best_lr=lr,
                        ceiling=ceiling(points),
                        val_loss=loss,
                        std=std,
                        n=next(n for _, mean, _, n in points if mean == loss),
                    )
                )
            axis.set(
                xscale="log",
                title=f"{rule}, {optimizer}",
                xlabel=f"lr_{optimizer}",
                ylim=(1.9, 3.1) if optimizer == "adam" else (2.0, 3.6),
                ylabel=f"val loss after {RUNS[optimizer]['steps']} updates",
            )
            rates = sorted({r["lr"] for r in rows if r["optimizer"] == optimizer})[::2]
            axis.set_xticks(rates, [f"{rate:.2g}" for rate in rates])
            axis.minorticks_off()
        axes[-1].legend(title="width, density", fontsize=7, ncol=3, loc="upper center")
        save(made, f"supar_lr_{optimizer}.png")
    write_csv("supar_best.csv", best)
    print(
        "optimizer rule      best lr, smallest to largest over the widths and densities; their "
        "ratio; the same of the rate that costs 0.05 nats; "
        "cost of the base model's rate elsewhere"
    )
    for optimizer, rule in itertools.product(RATES, RULES):
        rates = [b["best_lr"] for b in best if (b["optimizer"], b["rule"]) == (optimizer, rule)]
        if rates:
            points = curves(rows, optimizer, rule)
            base = min(points.get((BASE, 1.0), next(iter(points.values()))), key=lambda p: p[1])[0]
            costs = [
                next(p[1] for p in c if p[0] == base) - min(p[1] for p in c)
                for c in points.values()
            ]
            tops = [b["ceiling"] for b in best if (b["optimizer"], b["rule"]) == (optimizer, rule)]
            tuned = next(
                (
                    b["best_lr"]
                    for b in best
                    if (b["optimizer"], b["rule"], b["width"], b["density"])
                    == (optimizer, rule, BASE, 1.0)
                ),
                math.nan,
            )
            print(
                f"{optimizer:9} {rule:9} {min(rates):.4g} .. {max(rates):.4g}  "
                f"x{max(rates) / min(rates):.1f}, {min(rates) / tuned:.2f} .. "
                f"{max(rates) / tuned:.2f} of the base model's   {min(tops):.4g} .. "
                f"{max(tops):.4g}  "
                f"x{max(tops) / min(tops):.1f}   mean {sum(costs) / len(costs):.4f}, "
                f"worst {max(costs):.4f}"
            )


# -------------------------------------------------------------------------------- coordinate check


def check_run(task: dict) -> list[dict]:
    """Per step, geometric means over the hidden matrices: mean |output|, RMS of what their changed
    weights add to it, RMS of its whole change."""
    optimizer, steps = task["optimizer"], task["steps"]
    config = config_of(
        task["width"], task["density"], optimizer, steps=100, seed=task["seed"], zero_init=False
    )
    config = dataclasses.replace(
        config, n_layer=1 if task["width"] > 512 else 2, warmup=0, momentum_warmup=1, cooldown=0.0
    )
    run = build(config, [rules(task["rule"], task["power"], task["mask_first"])])
    batches, _ = data(run.config)
    fixed = batches.batch_at(config.steps - 1)  # never trained on here
    layers = {name: m for name, m in run.model.blocks.named_modules() if isinstance(m, tg.Linear)}
    start, seen, rows = {name: m.weight.detach().clone() for name, m in layers.items()}, {}, []
    for name, layer in layers.items():
        layer.register_forward_hook(
            lambda module, inputs, y, name=name: seen.update(
                {name: (inputs[0].detach(), y.detach())}
            )
        )

    def look() -> dict:
        project = tg.project  # one product for q, k and v calls none of them, so no hook fires
        tg.project = lambda x, linears, factor=None: [linear(x) for linear in linears]
        try:
            with torch.no_grad():
                run.model(torch.from_numpy(fixed[:2, :-1]))
        finally:
            tg.project = project
        return dict(seen)

    first = look()
    for step in range(1, steps + 1):
        tg.forward_backward(run, tg.make_batch(run, batches.batch_at(step), step, []))
        tg.step_optimizers(run)
        now = look()
        sizes = {}
        for name, layer in layers.items():
            x, y = now[name]
            delta = layer.weight.detach() - start[name]
            added = x @ delta if layer.transposed else x @ delta.T
            for key, value in dict(
                activation=y.abs().mean(),
                added=added.square().mean().sqrt(),
                change=(y - first[name][1]).square().mean().sqrt(),
            ).items():
                sizes.setdefault(key, []).append(value.item())
        rows.append(
            task
            | dict(step=step)
            | {
                key: math.exp(sum(map(math.log, values)) / len(values))
                for key, values in sizes.items()
            }
        )
    return rows


def check_tasks() -> list[dict]:
    tasks = []
    for width, density in itertools.product((64, 128, 256, 512, 1024), (1.0, 1 / 4, 1 / 8, 1 / 16)):
        if width == 1024 and density in (1 / 4, 1 / 8):
            continue  # slow, and decided at 512
        kinds = [("adam", rule, 0.0, False, 10 if width < 1024 else 4) for rule in RULES]
        kinds += [
            ("muon", "SuPar", power, first, 10 if width < 512 else 4 if width < 1024 else 1)
            for power, first in MUON
        ]
        tasks += [
            dict(
                optimizer=o,
                rule=r,
                power=p,
                mask_first=f,
                width=width,
                density=density,
                seed=0,
                steps=n,
            )
            for o, r, p, f, n in kinds
        ]
    return sorted(tasks, key=lambda t: -t["width"] - 1000 * (t["optimizer"] == "muon"))


def report_check():
    rows, verdict = read_csv("supar_check.csv"), []
    kinds = [("adam", rule, 0.0, "False") for rule in RULES] + sorted(
        {("muon", "SuPar", r["power"], r["mask_first"]) for r in rows if r["optimizer"] == "muon"},
        reverse=True,
    )
    of_kind = [
        [r for r in rows if (r["optimizer"], r["rule"], r["power"], r["mask_first"]) == kind]
        for kind in kinds
    ]
    for key, ylabel in (("activation", "mean |output|"), ("added", "RMS of (W - W at init) x")):
        made, axes = figure(2, 3)
        for axis, (optimizer, rule, power, first), mine in zip(axes, kinds, of_kind, strict=False):
            for density in sorted({r["density"] for r in rows}, reverse=True):
                for step, alpha in ((1, 0.35), (4, 1.0)):
                    points = sorted(
                        (r["width"], r[key])
                        for r in mine
                        if (r["density"], r["step"]) == (density, step)
                    )
                    axis.plot(
                        *zip(*points, strict=False),
                        marker=".",
                        alpha=alpha,
                        color=f"C{round(-math.log2(density))}",
                        label=f"1/{round(1 / density)}" if step == 4 else None,
                    )
            title = (
                rule
                if optimizer == "adam"
                else (f"rate x density^-{power:g}" if power else "no factor")
                + ", gradient masked" * (first == "True")
            )
            axis.set(
                xscale="log",
                yscale="log",
                xlabel="width",
                ylabel=ylabel,
                title=f"{optimizer}, {title}",
            )
        legend = dict(title="density; pale: update 1, full: 4", title_fontsize=7, fontsize=7)
        axes[2].legend(**legend, loc="center right")
        save(made, f"supar_check_{key}.png")
    print(
        "Output sizes against dense at the same width, where a neuron keeps >= 64 weights: "
        "lowest .. highest, mean slope of log size over log density"
    )
    for (optimizer, rule, power, first), mine in zip(kinds, of_kind, strict=False):
        for step, key in itertools.product((1, 4, 10), ("activation", "added", "change")):
            size = {(r["width"], r["density"]): r[key] for r in mine if r["step"] == step}
            ratios = {
                (w, d): s / size[w, 1.0] for (w, d), s in size.items() if w * d >= 64 and d < 1
            }
            slopes = [math.log(ratio) / math.log(d) for (_, d), ratio in ratios.items()]
            verdict.append(
                dict(
                    optimizer=optimizer,
                    rule=rule,
                    power=power,
                    mask_first=first,
                    step=step,
                    what=key,
                    lowest=min(ratios.values()),
                    highest=max(ratios.values()),
                    slope=mean_std(slopes)[0],
                    slope_std=mean_std(slopes)[1],
                    n=len(slopes),
                )
            )
            print(
                "{optimizer} {rule:8} power {power:g} masked first {mask_first:5} step {step:2} "
                "{what:10} {lowest:.2f} .. {highest:.2f}  slope {slope:+.2f} "
                "± {slope_std:.2f} (n={n})".format(**verdict[-1])
            )
    write_csv("supar_check_summary.csv", verdict)


def main(argv=None) -> int:
    parser = arguments(__doc__.partition("\n\n")[0])
    parser.add_argument(
        "--part",
        choices=("check", "sweep"),
        help="only the coordinate check, or only the sweep of rates",
    )
    parser.add_argument(
        "--optimizer",
        choices=tuple(RATES),
        help="sweep this one's rates only; the table keeps the other's",
    )
    flags = parser.parse_args(argv)
    if flags.part != "sweep":
        if not flags.plot_only:
            write_csv(
                "supar_check.csv",
                [
                    row
                    for rows in in_parallel(check_run, check_tasks(), flags.processes)
                    for row in rows
                ],
            )
        report_check()
    if flags.part != "check":
        if not flags.plot_only:
            again = [flags.optimizer] if flags.optimizer else list(RATES)
            kept = (
                [row for row in read_csv("supar_sweep.csv") if row["optimizer"] not in again]
                if flags.optimizer
                else []
            )
            write_csv(
                "supar_sweep.csv",
                in_parallel(sweep_run, sweep_tasks(again), flags.processes) + kept,
            )
        report_sweep()
    return 0


if __name__ == "__main__":
    sys.exit(main())
