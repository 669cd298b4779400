"""Time to nanoGPT's final validation loss: our laptop run against nanoGPT's own recipe for a CPU,
on the same bytes.

    git clone https://github.com/karpathy/nanoGPT
    python -m records vs_nanogpt nanoGPT [--runs 3] [-- flags for train_gpt.py]

Each pair, in alternating order, on the same cores:
    nanoGPT   the command of its README for "only a macbook": 4 layers of 128, rows of 64, 12 rows
              a step, 2000 steps. Its time is the sum of its own per-iteration times, without
              evaluations, checkpoints and start: the first iteration, whose time holds the first
              evaluation, counts as the median of the others.
    ours      train_gpt.py --preset laptop --val_every 10, its clock stopped during validation.
nanoGPT's final loss is computed here from its checkpoint, over the very validation tokens that ours
is validated on, in rows of nanoGPT's own length; its own estimate, from 20 random batches, is shown
beside it. Our time is the train_time of the first validation at or below that loss, so it is
rounded up to the next ten steps.

Writes the shards' tokens to NANOGPT/data/laptop_bytes, and everything else to a new folder (--out).
Needs nothing beyond requirements.txt. Exit code 0: measured; 1: a run failed; 2: misuse; 130:
interrupted."""

import pickle
import re
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from data import shards
from records.tools import logs
from records.tools.command import BadInput, Parser, command, number_in, write_json
from records.tools.runs import Failed, call, environment, machine, trainer

ROOT = Path(__file__).resolve().parents[2]

BLOCK = 64
RECIPE = (
    "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 "
    f"--log_interval=1 --block_size={BLOCK} --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 "
    f"--dropout=0.0"
).split()
ITERATION = re.compile(r"^iter (\d+): loss \S+, time ([\d.]+)ms", re.M)
ESTIMATE = re.compile(r"^step (\d+): train loss \S+, val loss (\S+)", re.M)

# Runs in a process of its own, with nanoGPT's model.py: mean loss of its checkpoint over
# tokens[1:], in nats per token.
EVALUATE = """
import sys
import numpy as np, torch
folder, checkpoint, tokens, count, block = sys.argv[1:]
sys.path.insert(0, folder)
from model import GPT, GPTConfig
saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
model = GPT(GPTConfig(**saved["model_args"])).eval()
model.load_state_dict(saved["model"])
tokens = torch.from_numpy(np.fromfile(tokens, np.uint16, int(count) + 1).astype(np.int64))
x, y = tokens[:-1].view(-1, int(block)), tokens[1:].view(-1, int(block))
with torch.no_grad():
    total = sum(model(a, b)[1].double() * a.numel() for a, b in zip(x.split(256), y.split(256)))
print("loss", float(total) / int(count))
"""


def read_shards(pattern: str) -> np.ndarray:
    """Tokens of all shards that match, uint16 [n]. Raises BadInput where there is none, or one is
    not a shard."""
    path = Path(pattern)
    paths = sorted(path.parent.glob(path.name))
    if not paths:
        raise BadInput(f"{pattern}: no such file; run: python data/laptop.py")
    return np.concatenate([shards.open_shard(path) for path in paths])


def convert(nanogpt: Path, train: np.ndarray, val: np.ndarray):
    """What nanoGPT's train.py wants of a dataset: bare tokens, and the size of the vocabulary."""
    folder = nanogpt / "data" / "laptop_bytes"
    folder.mkdir(parents=True, exist_ok=True)
    train.tofile(folder / "train.bin")
    val.tofile(folder / "val.bin")
    (folder / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 257}))


def read_nanogpt(output: str, steps: int) -> dict:
    """Train time in ms and own estimate of the final loss, from what its train.py printed. Raises
    Failed if cut off."""
    times = {int(step): float(ms) for step, ms in ITERATION.findall(output)}
    estimates = {int(step): float(loss) for step, loss in ESTIMATE.findall(output)}
    if steps not in estimates or any(step not in times for step in range(steps)):
        raise Failed("its output has no time for every step, or no final evaluation")
    # The checkpoint is saved before iteration number `steps`, which is therefore left out.
    rest = [times[step] for step in range(1, steps)]
    return {"time_ms": sum(rest) + statistics.median(rest), "own_estimate": estimates[steps]}


def run_nanogpt(nanogpt: Path, steps: int, folder: Path, timeout) -> dict:
    """One run by nanoGPT's recipe; its checkpoint and its output end up in `folder`."""
    folder.mkdir(parents=True)
    command = [
        sys.executable,
        "-u",
        "train.py",
        *RECIPE,
        f"--max_iters={steps}",
        f"--lr_decay_iters={steps}",
        f"--eval_interval={steps}",
        "--always_save_checkpoint=True",
        "--dataset=laptop_bytes",
        f"--out_dir={folder.resolve()}",
    ]
    call(command, folder / "output", timeout, environment(), cwd=nanogpt)
    return read_nanogpt((folder / "output").read_text(), steps)


def evaluate_nanogpt(nanogpt: Path, folder: Path, count: int, timeout) -> float:
    """Loss of the checkpoint in `folder` over the predictions of val tokens 1..count, nats per
    token."""
    tokens = (nanogpt / "data" / "laptop_bytes" / "val.bin").resolve()
    command = [
        sys.executable,
        "-c",
        EVALUATE,
        nanogpt.resolve(),
        (folder / "ckpt.pt").resolve(),
        tokens,
        count,
        BLOCK,
    ]
    call(command, folder / "evaluation", timeout)
    return float((folder / "evaluation").read_text().split()[-1])


def run_ours(script: Path, flags, folder: Path, timeout) -> logs.Run:
    """One run of ours, whose log ends up in `folder`. Raises Failed where it has no result."""
    folder.mkdir(parents=True)
    command = trainer(script, [*flags, "--log_dir", folder], 1)
    call(command, folder / "output", timeout, environment())
    found = [run for path in folder.glob("*.txt") for run in logs.read_log(path) if run.result]
    if len(found) != 1:
        raise Failed("its log has no result line")
    return found[0]


def first_at(run: logs.Run, loss: float) -> tuple[int, int] | None:
    """(step, train time in ms) of the first validation at or below `loss`, or None where it is
    never reached."""
    return next(((step, round(ms)) for step, found, ms in run.val if found <= loss), None)


def one_pair(number: int, args, flags, val_size: int) -> dict:
    """Both runs once, the order by `number`. Raises Failed where either fails."""
    theirs_in, ours_in = args.out / f"pair{number}_nanogpt", args.out / f"pair{number}_ours"
    ours_flags = [
        "--preset",
        "laptop",
        "--val_every",
        "10",
        "--seed",
        str(number),
        "--train_files",
        args.train_files,
        "--val_files",
        args.val_files,
        *flags,
    ]
    jobs = {
        "nanoGPT": lambda: run_nanogpt(args.nanogpt, args.steps, theirs_in, args.timeout),
        "ours": lambda: run_ours(args.script, ours_flags, ours_in, args.timeout),
    }
    done = {}
    for name in sorted(jobs, reverse=number % 2 == 1):
        print(f"pair {number + 1}/{args.runs}: {name} ...", flush=True)
        done[name] = jobs[name]()
    theirs, ours = done["nanoGPT"], done["ours"]
    count = min(int(ours.result["config"]["val_tokens"]), val_size - 1) // BLOCK * BLOCK
    loss = evaluate_nanogpt(args.nanogpt, theirs_in, count, args.timeout)
    reached = first_at(ours, loss)
    return {
        "nanogpt_time_ms": theirs["time_ms"],
        "nanogpt_val_loss": loss,
        "nanogpt_own_estimate": theirs["own_estimate"],
        "val_tokens": count,
        "our_step": reached and reached[0],
        "our_time_ms": reached and reached[1],
        "our_final_loss": ours.val_loss,
        "our_final_time_ms": ours.train_time,
        "ratio": reached and reached[1] / theirs["time_ms"],
    }


def summary(pairs, args, flags) -> dict:
    ratios = [pair["ratio"] for pair in pairs if pair["ratio"] is not None]
    return {
        "ratio_median": statistics.median(ratios) if len(ratios) == len(pairs) else None,
        "ratio_min": min(ratios, default=None),
        "ratio_max": max(ratios, default=None),
        "n": len(pairs),
        "nanogpt_steps": args.steps,
        "flags": flags,
        "machine": machine(),
        "source_sha256": logs.sha256_file(args.script),
        "pairs": pairs,
    }


def print_table(found: dict):
    print("\npair   nanoGPT  its loss  own est.      ours  at step    ratio   ours in the end")
    for i, p in enumerate(found["pairs"], 1):
        print(
            f"{i:4d} {p['nanogpt_time_ms'] / 1e3:8.1f}s {p['nanogpt_val_loss']:9.4f} "
            f"{p['nanogpt_own_estimate']:9.4f}",
            end=" ",
        )
        if p["ratio"] is None:
            print(f"{'never reached':>26}", end="")
        else:
            print(f"{p['our_time_ms'] / 1e3:8.1f}s {p['our_step']:8d} {p['ratio']:8.3f}", end="")
        print(f"   {p['our_final_loss']:.4f} after {p['our_final_time_ms'] / 1e3:.1f}s")
    if found["ratio_median"] is None:
        print("\nours does not reach nanoGPT's loss in every pair: no ratio")
    else:
        print(
            f"\nours needs {found['ratio_median']:.3f} of nanoGPT's time to its final loss "
            f"(median of {found['n']}; {found['ratio_min']:.3f} to {found['ratio_max']:.3f}) on "
            f"{found['machine']}"
        )
    print(f"""
Compared: train time alone on both sides, the same bytes and cores, loss over the same validation
tokens (the first {found["pairs"][0]["val_tokens"]:,}). Each side keeps its own model, batch,
precision, schedule and row length (nanoGPT's is {BLOCK}): recipes are compared, not single ideas,
and the longer rows are part of ours.
""")


def parse_args(argv):
    argv = list(argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = Parser("vs_nanogpt", __doc__)
    add = parser.add_argument
    add("nanogpt", type=Path, metavar="NANOGPT", help="a checkout of karpathy/nanoGPT")
    add("--runs", type=number_in(int, 1), default=3, metavar="N", help="pairs (3)")
    add(
        "--steps",
        type=number_in(int, 3),
        default=2000,
        metavar="N",
        help="nanoGPT's steps (2000)",
    )
    add(
        "--script",
        type=Path,
        default=ROOT / "train_gpt.py",
        metavar="FILE",
        help="our side (train_gpt.py)",
    )
    add(
        "--train_files",
        default=str(ROOT / "data/laptop/laptop_train_*.bin"),
        metavar="GLOB",
        help="training shards",
    )
    add(
        "--val_files",
        default=str(ROOT / "data/laptop/laptop_val_*.bin"),
        metavar="GLOB",
        help="validation shards",
    )
    add(
        "--timeout",
        type=number_in(float, 1),
        default=7200,
        metavar="S",
        help="seconds a run may take (7200)",
    )
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="new folder for logs and vs_nanogpt.json (logs/vs_nanogpt_<date>)",
    )
    args = parser.parse_args(argv[:cut])
    for name in ("train.py", "model.py", "config/train_shakespeare_char.py"):
        if not (args.nanogpt / name).is_file():
            raise BadInput(
                f"{args.nanogpt}: no {name} in it; git clone https://github.com/karpathy/nanoGPT"
            )
    if not args.script.is_file():
        raise BadInput(f"{args.script}: no such file")
    args.out = args.out or Path("logs") / time.strftime("vs_nanogpt_%Y-%m-%d_%H-%M-%S")
    if args.out.exists():
        raise BadInput(f"{args.out}: already there; give a new folder, nothing is overwritten")
    return args, argv[cut + 1 :]


@command("vs_nanogpt")
def main(argv) -> int:
    args, flags = parse_args(argv)
    train, val = read_shards(args.train_files), read_shards(args.val_files)
    convert(args.nanogpt, train, val)
    args.out.mkdir(parents=True)
    pairs = []
    try:
        for number in range(args.runs):
            pairs.append(one_pair(number, args, flags, len(val)))
            write_json(args.out / "vs_nanogpt.json", summary(pairs, args, flags))
    except Failed as error:
        print(f"records vs_nanogpt: a run failed: {error}; see {args.out}", file=sys.stderr)
        return 1
    print_table(summary(pairs, args, flags))
    print(f"logs and vs_nanogpt.json: {args.out}")
    return 0
