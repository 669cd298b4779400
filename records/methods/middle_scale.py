"""gpt2_small against nov2024 at middle scale: loss at equal tokens, tokens to equal loss.

    python records/methods/middle_scale.py --train_files 'x_train_*.bin' --val_files 'x_val_*.bin'

Any GPT-2 token shards will do (data/prepare.py makes them from text). One run after another, each
of one thread, by the trainer as it is in this clone; what is finished in --logs is not run again.
Writes middle_scale.csv, prints the tables; --report_only: from what is finished.
"""

import argparse
import itertools
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from common import ROOT, write_csv  # noqa: E402  (it also finds records)

from records.tools import logs, runs, stats  # noqa: E402

# Both recipes are shrunk alike: 768 wide to 192; batches to 1 / 64, updates and what is counted in
# updates to 1 / 16, rows to 1,024 tokens. gpt2_small's windows and documents shrink by half. In
# fp32: most CPUs only emulate bfloat16, at a quarter of the speed.
SHARED = """--device cpu --no_compile --no_bf16 --n_embd 192 --n_head 4 --seq_len 1024
    --val_seq_len 1024 --val_tokens 32768 --micro_batch 1""".split()
GPT2_SMALL = """--preset gpt2_small --steps 20 23 27 4 3 --batch_tokens 2048 4096 6144 5120 2048
    --max_document 448 1024 1024 1024 1024 --window 192 448 704 704 832
    --short_window 64 192 320 320 384 --momentum_warmup 15 --momentum_cooldown 3
    --val_every 11""".split()
RECIPES = {
    "gpt2_small": [*GPT2_SMALL, "--table_rows", "377280"],
    # the same tokens: so many updates of its own batch, its schedules fitted to that length
    "nov2024": """--preset nov2024 --steps 40 --batch_tokens 8192 --momentum_warmup 6
        --val_every 8""".split(),
    "gpt2_small, token_classes": [*GPT2_SMALL, "--table_rows", "377280", "--token_classes"],
    "gpt2_small, copy_input": [*GPT2_SMALL, "--table_rows", "377280", "--copy_input"],
    # a larger table
    "gpt2_small, 4M rows": [*GPT2_SMALL, "--table_rows", "4000000"],
    # the same tokens, and about as many updates
    "nov2024, 80 updates": """--preset nov2024 --steps 80 --batch_tokens 4096
        --momentum_warmup 12 --val_every 8""".split(),
}
COMPARED = [name for name in RECIPES if name != "gpt2_small"]  # with gpt2_small of the same seed
GROUPS = list(RECIPES)[:2], list(RECIPES)[2:]  # what is run first, seed by seed
PLAN = [(name, seed) for names in GROUPS for seed in (0, 1, 2) for name in names]


def folder_of(name: str, seed: int, logs_dir: Path) -> Path:
    return logs_dir / f"{name.replace(', ', '_').replace(' ', '_')}_{seed}"


def finished(folder: Path) -> logs.Run | None:
    """The run in a folder that went to its end, if there is one."""
    for path in sorted(folder.glob("*.txt")):
        for run in logs.read_log(path):
            if run.result:
                return run
    return None


def train(name: str, seed: int, folder: Path, args):
    """One run of the trainer, alone."""
    files = ["--train_files", args.train_files, "--val_files", args.val_files]
    flags = [*RECIPES[name], *SHARED, *files, "--seed", str(seed), "--log_dir", str(folder)]
    command = [sys.executable, str(ROOT / "train_gpt.py"), *flags]
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
        theirs, ours = found[name], found.get("gpt2_small", {})
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
