"""gpt2_small against nov2024 at middle scale: loss at equal tokens, tokens to equal loss.

    python records/methods/middle_scale.py --train_files 'x_train_*.bin' --val_files 'x_val_*.bin'

Any GPT-2 token shards will do (data/prepare.py makes them from text). One run after another, each
of one thread and up to 5 GB, by the trainer as it is in this clone; what is finished in --logs is
not run again. Sampled softmax is an edit of the trainer, sampled_softmax.patch, made in a copy.
Writes middle_scale.csv, prints the tables; --report_only: from what is finished.
"""

import argparse
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import ROOT, write_csv  # noqa: E402  (it also finds records)

from records.tools import logs, runs, stats  # noqa: E402

# Both recipes are shrunk alike: model 768 wide to 192, 11 or 12 layers to 4, 6 heads to 2; batches
# to 1 / 64, updates and what is counted in updates to 1 / 16; contexts of gpt2_small to 1 / 2.
SHARED = """--device cpu --no_compile --n_layer 4 --n_embd 192 --n_head 2 --seq_len 1024
    --val_seq_len 1024 --val_tokens 32768 --micro_batch 1""".split()
GPT2_SMALL = """--preset gpt2_small --max_document 1024 --window 192 448 704 832
    --short_window 64 192 320 384 --final_window 1280""".split()
ITS_LENGTH = """--steps 100 --extension 2 --batch_tokens 2048 4096 6144 6144 --val_every 10
    --momentum_warmup 19 --momentum_cooldown 3""".split()
RECIPES = {
    "gpt2_small": [*GPT2_SMALL, *ITS_LENGTH],
    # the same tokens: so many updates of its own batch, its schedules fitted to that length
    "nov2024": """--preset nov2024 --steps 50 --batch_tokens 8192 --momentum_warmup 8
        --val_every 5""".split(),
    # the same tokens and updates
    "nov2024, 100 updates": """--preset nov2024 --steps 100 --batch_tokens 4096
        --momentum_warmup 15 --val_every 10""".split(),
    # its own length
    "nov2024, whole": """--preset nov2024 --steps 203 --batch_tokens 8192 --momentum_warmup 31
        --val_every 29""".split(),
    # the training loss over a tenth of the vocabulary, see sampled_softmax.patch
    "sampled softmax": [*GPT2_SMALL, *ITS_LENGTH, "--sampled_softmax", "4096"],
    # as many operations: twice the updates, twice the batches
    "sampled softmax, 4 x tokens": """--steps 200 --extension 4 --val_every 20
        --batch_tokens 4096 8192 12288 12288 --momentum_warmup 38 --momentum_cooldown 6
        --sampled_softmax 4096""".split()
    + GPT2_SMALL,
    # 2.5 times as long: updates to 1 / 6.4
    "gpt2_small, 1M tokens": """--steps 250 --extension 6 --batch_tokens 2048 4096 6144 6144
        --momentum_warmup 47 --momentum_cooldown 8 --val_every 25""".split()
    + GPT2_SMALL,
    "nov2024, 1M tokens": """--preset nov2024 --steps 126 --batch_tokens 8192
        --momentum_warmup 19 --val_every 14""".split(),
    "nov2024, 1M tokens, 252 updates": """--preset nov2024 --steps 252 --batch_tokens 4096
        --momentum_warmup 39 --val_every 28""".split(),
}
# What is compared with gpt2_small of the same length and seed
COMPARED = {
    "nov2024": "gpt2_small",
    "nov2024, 100 updates": "gpt2_small",
    "nov2024, whole": "gpt2_small",
    "sampled softmax": "gpt2_small",
    "sampled softmax, 4 x tokens": "gpt2_small",
    "nov2024, 1M tokens": "gpt2_small, 1M tokens",
    "nov2024, 1M tokens, 252 updates": "gpt2_small, 1M tokens",
}
ONCE = ("nov2024, whole", "sampled softmax", "sampled softmax, 4 x tokens")
PLAN = [(name, seed) for seed in (0, 1, 2) for name in RECIPES if seed == 0 or name not in ONCE]


def folder_of(name: str, seed: int, logs_dir: Path) -> Path:
    return logs_dir / f"{name.replace(', ', '_').replace(' ', '_')}_{seed}"


def finished(folder: Path) -> logs.Run | None:
    """The run in a folder that went to its end, if there is one."""
    for path in sorted(folder.glob("*.txt")):
        for run in logs.read_log(path):
            if run.result:
                return run
    return None


def trainer_of(name: str, logs_dir: Path) -> Path:
    """train_gpt.py, or a patched copy."""
    if not name.startswith("sampled"):
        return ROOT / "train_gpt.py"
    folder = logs_dir / "patched"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "train_gpt.py", folder)
    patch = Path(__file__).with_name("sampled_softmax.patch")
    alone = os.environ | dict(GIT_CEILING_DIRECTORIES=str(logs_dir.resolve()))  # not this clone
    command = ["git", "apply", "-C1", "--recount", str(patch)]
    subprocess.run(command, cwd=folder, env=alone, check=True)
    return folder / "train_gpt.py"


def train(name: str, seed: int, folder: Path, args):
    """One run of the trainer, alone."""
    files = ["--train_files", args.train_files, "--val_files", args.val_files]
    flags = [*RECIPES[name], *SHARED, *files, "--seed", str(seed), "--log_dir", str(folder)]
    command = [sys.executable, str(trainer_of(name, args.logs)), *flags]
    print(" ".join(command), flush=True)
    done = subprocess.run(command, env=runs.environment())
    if done.returncode:
        sys.exit(done.returncode)


def curve_of(run: logs.Run) -> list[tuple[float, float]]:
    """(tokens trained on, validation loss) of each validation."""
    return [(run.tokens(step), loss) for step, loss, _ in run.val]


def tokens_to(loss: float, curve) -> float:
    """Where a curve first falls to a loss, on straight lines between validations."""
    for (before, high), (after, low) in itertools.pairwise(curve):
        if low <= loss:
            return before + (after - before) * (high - loss) / (high - low)
    return curve[-1][0]  # all but the last digit of it


def summary(name: str, found: list[logs.Run]) -> str:
    """A recipe's line of the first table."""
    last = found[0].result
    tokens, operations = last["tokens"], last["flops_per_token"]
    loss = stats.mean_std([run.val_loss for run in found])
    spread = f" ± {loss['std']:.4f}" if len(found) > 1 else ""
    cells = [
        name,
        f"{last['steps']}",
        f"{tokens:,}",
        f"{operations / 1e6:.1f} M",
        f"{tokens * operations / 1e12:.1f} T",
        f"{loss['mean']:.4f}{spread}",
        f"{len(found)}",
    ]
    return f"| {' | '.join(cells)} |"


def against(name: str, seed: int, theirs: logs.Run, ours: logs.Run) -> str:
    """gpt2_small against a recipe, of one seed: a line of the second table."""
    gap = ours.val_loss - theirs.val_loss
    ahead, behind = (ours, theirs) if gap <= 0 else (theirs, ours)
    tokens = tokens_to(behind.val_loss, curve_of(ahead))
    share = tokens / behind.result["tokens"]
    operations = ahead.result["flops_per_token"] / behind.result["flops_per_token"]
    cells = [
        name,
        f"{seed}",
        f"{gap:+.4f}",
        "gpt2_small" if gap <= 0 else name,
        f"{tokens:,.0f}",
        f"{share:.2f}",
        f"{share * operations:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def report(logs_dir: Path):
    """The tables, and every validation in middle_scale.csv."""
    found = {}
    for name, seed in PLAN:
        if run := finished(folder_of(name, seed, logs_dir)):
            found.setdefault(name, {})[seed] = run
    if not found:
        sys.exit(f"middle_scale.py: no finished run in {logs_dir}")
    rows = [
        dict(recipe=name, seed=seed, tokens=int(tokens), val_loss=loss)
        for name, by_seed in found.items()
        for seed, run in by_seed.items()
        for tokens, loss in curve_of(run)
    ]
    write_csv("middle_scale.csv", rows)
    print("| recipe | updates | tokens | FLOPs per token | FLOPs | val loss | n |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, by_seed in found.items():
        print(summary(name, list(by_seed.values())))
    heads = [
        "against",
        "seed",
        "loss of gpt2_small less its",
        "ahead",
        "tokens to the other's loss",
    ]
    heads += ["share of its tokens", "of its FLOPs"]
    print(f"\n| {' | '.join(heads)} |\n|---|---:|---:|---|---:|---:|---:|")
    for name in [name for name in COMPARED if name in found]:
        theirs, ours = found[name], found.get(COMPARED[name], {})
        for seed in sorted(theirs.keys() & ours.keys()):
            print(against(name, seed, theirs[seed], ours[seed]))


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--train_files", help="GPT-2 token shards, a glob")
    parser.add_argument("--val_files", help="GPT-2 token shards, a glob")
    parser.add_argument("--logs", type=Path, default=ROOT / "logs" / "middle_scale")
    parser.add_argument("--report_only", action="store_true", help="run nothing")
    args = parser.parse_args(argv)
    if not args.report_only and not (args.train_files and args.val_files):
        parser.error("--train_files and --val_files are needed, or --report_only")
    for name, seed in () if args.report_only else PLAN:
        folder = folder_of(name, seed, args.logs)
        if not finished(folder):
            train(name, seed, folder, args)
    report(args.logs)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
