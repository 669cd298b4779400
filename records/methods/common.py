"""What the method studies share: a run of the repository's trainer inside this process, tables and
pictures."""

import csv
import dataclasses
import math
import multiprocessing
import sys
import types
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))
import train_gpt as tg  # noqa: E402  (the trainer under study, as it is in this clone)

ALONE = tg.Runtime(torch.device("cpu"))


def change(config, **fields):
    """A config with other fields; those of a stage go to its only stage."""
    names = {field.name for field in dataclasses.fields(tg.Stage)}
    (stage,) = config.stages
    of_stage = {name: fields.pop(name) for name in names & fields.keys()}
    return dataclasses.replace(config, stages=(dataclasses.replace(stage, **of_stage),), **fields)


SMALL = change(
    tg.PRESETS["laptop"],
    train_files=str(ROOT / "data/laptop/laptop_train_*.bin"),
    val_files=str(ROOT / "data/laptop/laptop_val_*.bin"),
    n_layer=4,
    n_embd=64,
    n_head=2,
    ngram=0,
    value_embeds=False,
    key_offset=False,
    half_rotary=False,
    normuon=0.0,
    lr_floor=0.0,
    momentum_warmup=60,
    seq_len=128,
    batch_tokens=2048,
    val_tokens=32768,
    steps=200,
    val_every=0,
    device="cpu",
    compile=False,
)


class Recorder:
    """Stands in for the trainer's log: keeps the losses, writes nothing."""

    path = "(no log)"

    def __init__(self):
        self.train, self.val = {}, {}  # {step: loss}
        self.facts = {"device": "cpu"}

    def loss(self, step, steps, kind, loss, ms):
        getattr(self, kind)[step] = loss
        tg.fail_if(not math.isfinite(loss), "it diverged")

    def line(self, text, echo=False): ...
    def progress(self, text): ...


def build(config, methods=None) -> tg.Run:
    """A run before its first step, as train() builds it; methods: classes, instead of those that
    the config asks for."""
    config = tg.resolve(config, ALONE)
    torch.manual_seed(config.seed)
    chosen = tg.make_methods(config) if methods is None else [made(config) for made in methods]
    run = tg.Run(config, ALONE, tg.MODELS[config.model](config), chosen)
    for method in run.methods:
        method.attach(run.model)
    if run.model.table:
        run.model.table.allocate(ALONE)
    run.val_len = config.val_len
    run.optimizers = tg.make_optimizers(run)
    for stage in config.stages:
        rows = stage.batch_tokens // stage.seq_len
        run.micro[rows, stage.seq_len] = rows
    run.clock, run.log = tg.Clock(ALONE), Recorder()
    return run


def data(config):
    """(training batches, validation shards) of a config."""
    try:
        return tg.open_data(config)[:2]
    except tg.UserError as error:
        name = Path(sys.argv[0]).name
        raise SystemExit(f"{name}: {error}; here: python data/laptop.py") from None


def train(config, methods=None, watch=None) -> tg.Run:
    """A whole run in the trainer's own loop; losses in run.log. watch: a Method whose after_step
    looks on.

    A run that diverges has the final validation loss nan."""
    run = build(config, methods)
    run.methods += [watch] if watch else []
    batches, val = data(run.config)
    try:
        tg.training_loop(run, batches, val, types.SimpleNamespace(stop=[], save=[]))
    except tg.UserError:
        run.log.val[run.config.steps] = math.nan
    return run


def mean_std(values) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for a single value)."""
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1))


def single_thread():
    torch.set_num_threads(1)


def in_parallel(job, tasks, processes: int) -> list:
    """[job(task) for task in tasks], by so many processes of one thread each; says how far it
    is."""
    results = []
    with multiprocessing.get_context("spawn").Pool(processes, initializer=single_thread) as pool:
        for result in pool.imap(job, tasks):
            results.append(result)
            print(f"\r{len(results)}/{len(tasks)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return results


def write_csv(name: str, rows: list[dict]):
    """records/methods/<name>, written aside and renamed."""
    temporary = HERE / (name + ".tmp")
    with open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows
        )
    temporary.replace(HERE / name)


def read_csv(name: str) -> list[dict]:
    """The rows of records/methods/<name>, numbers as numbers."""

    def value(text):
        try:
            return float(text)
        except ValueError:
            return text

    with open(HERE / name, newline="", encoding="utf-8") as file:
        return [{k: value(v) for k, v in row.items()} for row in csv.DictReader(file)]


def figure(rows: int, columns: int):
    """(figure, axes as a flat list) of matplotlib, without a display."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit(
            "pictures need matplotlib: pip install -r records/requirements.txt"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    from records.tools.plot import COLOURS  # one style for all pictures

    colours = [colour for colour in COLOURS if colour != "#000000"]  # black: what they compare with
    colours += ["#882255", "#999933"]  # for studies of nine curves
    matplotlib.rcParams.update({"axes.prop_cycle": pyplot.cycler(color=colours), "font.size": 9})
    size = (4.8 * columns, 3.6 * rows)
    made, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.set_axisbelow(True)
    return made, list(axes.flat)


def save(made, name: str):
    made.savefig(HERE / name, dpi=110, metadata={"Software": None})


def arguments(description: str):
    """The flags that all studies have: how many processes, and to redraw pictures from the CSV."""
    import argparse

    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--processes", type=int, default=2, help="runs at once, one thread each [2]"
    )
    parser.add_argument(
        "--plot_only", action="store_true", help="draw the pictures again from the CSV files"
    )
    return parser
