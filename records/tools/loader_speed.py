"""Tokens per second that the loader delivers from the page cache, in one process.

python -m records loader_speed 'data/fineweb10B/fineweb_train_*.bin' [--rows 512]
    [--seq_len 1024] [--spread_rows]"""

import statistics
import time

import train_gpt
from records.tools.command import BadInput, Parser, command, number_in


@command("loader_speed")
def main(argv) -> int:
    parser = Parser("loader_speed", __doc__)
    parser.add_argument("files", help="token shards, a glob")
    parser.add_argument("--rows", type=number_in(int, 1), default=512)
    parser.add_argument("--seq_len", type=number_in(int, 1), default=1024)
    parser.add_argument("--spread_rows", action="store_true")
    args = parser.parse_args(argv)
    batch_tokens = args.rows * args.seq_len
    try:
        shards = train_gpt.Shards(args.files, "train_files", args.seq_len)
        steps = len(shards) // args.rows
        if not steps:
            raise BadInput(
                f"{args.files} holds {len(shards):,} rows, fewer than --rows {args.rows}"
            )
        config = train_gpt.Config(
            batch_tokens=(batch_tokens,),
            seq_len=args.seq_len,
            val_tokens=args.seq_len,
            steps=steps,
            spread_rows=args.spread_rows,
        )
    except train_gpt.UserError as error:
        raise BadInput(str(error)) from None
    batches, rates = train_gpt.Batches(shards, config), []
    for _repeat in range(6):  # the first one fills the page cache
        begun = time.perf_counter()
        for step in range(min(steps, 20)):
            batches.batch_at(step)
        rates.append(min(steps, 20) * batch_tokens / (time.perf_counter() - begun) / 1e6)
    median, low, high = statistics.median(rates[1:]), min(rates[1:]), max(rates[1:])
    print(f"{median:.1f} M tokens/s (median of 5, {low:.1f} to {high:.1f})")
    return 0
