"""LAWA study: does the mean of the last 5 snapshots validate better, and does it pay to train on
from it?

    python records/methods/lawa.py     about 10 minutes on two cores; writes lawa*.csv and lawa.png

At 1, 2 and 4 times all rates, with the rates held constant and with the usual cool-down; snapshots
every 2 updates (one per cent of the run, the paper's choice), for evaluation also every 8.
Averaging for evaluation leaves training untouched, so one run gives the raw loss and both
evaluation averages."""

import dataclasses
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import (
    SMALL,
    arguments,
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

STEPS, K, INTERVALS, COOLDOWNS, FACTORS, SEEDS, EVERY = (
    200,
    5,
    (2, 8),
    (0.0, SMALL.cooldown),
    (1, 2, 4),
    (0, 1, 2),
    25,
)
RATES = ("lr_muon", "lr_adam", "lr_embed", "lr_head", "lr_scalar")


class Averages(tg.Method):
    """LAWA windows beside a run that knows nothing of them."""

    def __init__(self, config):
        super().__init__(config)
        self.windows = {}
        for n in INTERVALS:
            window = dataclasses.replace(config, lawa=K, lawa_interval=n)
            self.windows[f"eval, every {n}"] = tg.LAWA(window)
        self.val, self.losses = data(config)[1], {}

    def after_step(self, step, run):
        for name, lawa in self.windows.items():
            lawa.after_step(step, run)
            if step % EVERY == 0:
                raw = tg.replace_weights(run.model, lawa.eval_weights(run.model))
                self.losses[name, step] = tg.evaluate(run, self.val)
                tg.replace_weights(run.model, raw)


def run_one(task: dict) -> list[dict]:
    config = change(
        SMALL,
        steps=STEPS,
        val_every=EVERY,
        seed=task["seed"],
        cooldown=task["cooldown"],
        **{name: getattr(SMALL, name) * task["factor"] for name in RATES},
    )
    if task["interval"]:
        mode = f"replace, every {task['interval']}"
        run = train(
            dataclasses.replace(config, lawa=K, lawa_interval=task["interval"], lawa_mode="replace")
        )
        losses = {(mode, step): loss for step, loss in run.log.val.items()}
    else:
        averages = Averages(config)
        run = train(config, watch=averages)
        losses = averages.losses | {("raw", step): loss for step, loss in run.log.val.items()}
    return [
        dict(
            cooldown=task["cooldown"],
            factor=task["factor"],
            mode=mode,
            seed=task["seed"],
            step=step,
            val_loss=loss,
        )
        for (mode, step), loss in losses.items()
        if step
    ]


def report():
    rows, table = read_csv("lawa_losses.csv"), []
    made, axes = figure(2, 3)
    modes = ["raw", *(f"eval, every {n}" for n in INTERVALS), "replace, every 2"]
    for axis, (cooldown, factor) in zip(axes, itertools.product(COOLDOWNS, FACTORS), strict=False):
        for number, mode in enumerate(modes):
            mine = [
                r
                for r in rows
                if (r["factor"], r["mode"]) == (factor, mode)
                and abs(r["cooldown"] - cooldown) < 1e-6
            ]
            points = [
                (step, *mean_std([r["val_loss"] for r in mine if r["step"] == step]))
                for step in sorted({r["step"] for r in mine})
            ]
            axis.errorbar(
                *zip(*points[1:], strict=False),
                label=mode,
                marker=".",
                color="k" if mode == "raw" else f"C{number}",
            )
            final = {r["seed"]: r["val_loss"] for r in mine if r["step"] == STEPS}
            raw = {
                r["seed"]: r["val_loss"]
                for r in rows
                if (r["factor"], r["mode"], r["step"]) == (factor, "raw", STEPS)
                and abs(r["cooldown"] - cooldown) < 1e-6
            }
            gain, gain_std = mean_std([final[seed] - raw[seed] for seed in final])
            table.append(
                dict(
                    cooldown=cooldown,
                    factor=factor,
                    mode=mode,
                    val_loss=points[-1][1],
                    std=points[-1][2],
                    n=len(final),
                    against_raw=gain,
                    against_raw_std=gain_std,
                )
            )
        axis.set(
            title=f"{factor}x the rates, {'cool-down' if cooldown else 'constant'}",
            xlabel="updates",
            ylabel="val loss",
        )
    axes[0].legend(fontsize=7)
    save(made, "lawa.png")
    write_csv("lawa.csv", table)
    for row in table:
        print(
            f"cooldown {row['cooldown']:.2f}  {row['factor']}x  {row['mode']:17} "
            f"{row['val_loss']:.4f} ± {row['std']:.4f} (n={row['n']})  "
            f"against raw {row['against_raw']:+.4f} ± {row['against_raw_std']:.4f}"
        )


def main(argv=None) -> int:
    flags = arguments(__doc__.partition("\n\n")[0]).parse_args(argv)
    if not flags.plot_only:
        tasks = [
            dict(cooldown=c, factor=f, seed=s, interval=n)
            for c, f, s, n in itertools.product(COOLDOWNS, FACTORS, SEEDS, (0, 2))
        ]
        write_csv(
            "lawa_losses.csv",
            [row for rows in in_parallel(run_one, tasks, flags.processes) for row in rows],
        )
    report()
    return 0


if __name__ == "__main__":
    sys.exit(main())
