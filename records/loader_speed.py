"""Tokens per second that the loader delivers from the page cache, in one process without the reading thread.

    python records/loader_speed.py 'data/fineweb10B/fineweb_train_*.bin' [--rows 512] [--seq_len 1024] [--spread_rows]
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if not __package__:
    sys.path.insert(0, str(ROOT))
import train_gpt


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", help="token shards, a glob")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--seq_len", type=int, default=1024)
    parser.add_argument("--spread_rows", action="store_true")
    args = parser.parse_args(argv)
    try:
        shards = train_gpt.Shards(args.files, "files")
        batch_tokens = args.rows * args.seq_len
        steps = (len(shards) - 1) // batch_tokens
        train_gpt.refuse(steps < 1, f"{args.files} holds {len(shards):,} tokens, less than a batch of {batch_tokens:,}")
        config = train_gpt.Config(batch_tokens=batch_tokens, seq_len=args.seq_len, val_tokens=args.seq_len, steps=steps, spread_rows=args.spread_rows)
    except train_gpt.UserError as error:
        print(f"loader_speed.py: {error}", file=sys.stderr)
        return 2
    batches, rates = train_gpt.Batches(shards, config), []
    for repeat in range(6):  # the first one fills the page cache
        begun = time.perf_counter()
        for step in range(min(steps, 20)):
            batches.batch_at(step)
        rates.append(min(steps, 20) * batch_tokens / (time.perf_counter() - begun) / 1e6)
    print(f"{statistics.median(rates[1:]):.1f} M tokens/s (median of 5, {min(rates[1:]):.1f} to {max(rates[1:]):.1f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
