"""On a new machine with GPUs: does everything of the trainer run there, and compute what it should?

    ./run.sh test -n 0 -m gpu tests/test_gpu.py        each CUDA path, on tiny models
    python records/one_gpu/prove.py --out FOLDER [--only NAME ...]
    python records/one_gpu/prove.py --out FOLDER --gpus 8

With --gpus: 50 updates of gpt2_small at its own batches, on one GPU and on all of them, no more.
Their losses must agree: run this before a long run on several GPUs. Without it: both presets for
200 updates at full width, an eighth of their batches, compiled, through every stage, with
checkpoints; gpt2_small again from its middle; a sample; every optional method; and 50 updates of a
small model on the GPU and on the CPU, in fp32 and in bf16. The shards are those that ./run.sh fetch
gets, or --train_files and --val_files: any GPT-2 tokens. What --out holds already is kept.

One line for each: what it says, val_loss, ms per update, peak memory. Exit code 0: all as wanted;
1: not so; 2: misuse."""

import glob
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if not __package__:  # run as a script
    sys.path.insert(0, str(ROOT))
from records.tools import logs  # noqa: E402
from records.tools.command import BadInput, Parser, number_in, printable, write_json  # noqa: E402
from records.tools.runs import Failed, Interrupted, call, interruptible, trainer  # noqa: E402

FULL = "--val_tokens 1048576 --val_every 50"
NOV2024 = f"--preset nov2024 --steps 200 --momentum_warmup 31 --batch_tokens 65536 {FULL}"
GPT2_SMALL = f"""--preset gpt2_small --steps 200 --momentum_warmup 38 --momentum_cooldown 6
    --batch_tokens 16384 32768 49152 40960 16384 --seq_len 2048 4096 6144 5120 2048 {FULL}"""
METHOD = f"--preset nov2024 --steps 60 --momentum_warmup 10 --batch_tokens 16384 {FULL}"
ADAM = METHOD.replace(" --momentum_warmup 10", " --matrix_optimizer adam")
TINY = """--preset gpt2_small --steps 50 --momentum_warmup 10 --momentum_cooldown 2 --n_embd 240
    --n_head 2 --table_rows 50304 --val_seq_len 1024 --val_tokens 32768 --val_every 25
    --batch_tokens 2048 4096 6144 5120 2048 --seq_len 256 512 768 640 256
    --max_document 256 512 512 512 512 --window 128 256 384 384 448
    --short_window 64 128 192 192 192"""
CASES = {
    "nov2024": NOV2024,
    "gpt2_small": f"{GPT2_SMALL} --checkpoint_every 100",
    "gpt2_small resumed": f"{GPT2_SMALL} --checkpoint_every 100",  # see command_of
    "sample": "--generate The --generate_tokens 60",
    "doc_mask and window": f"{METHOD} --doc_mask --window 256 512",
    "relora": f"{METHOD} --relora 64 --relora_warm_start 20 --relora_interval 10",
    "galore": f"{METHOD} --galore 128 --galore_interval 20",
    "galore, adam": f"{ADAM} --galore 128 --galore_interval 20",
    "galore, 8 bits": f"{METHOD} --galore 128 --galore_bits 8",
    "galore, per layer": f"{METHOD} --galore 128 --galore_per_layer --no_compile",
    "lawa": f"{METHOD} --lawa 5 --lawa_interval 10",
    "lawa, replace": f"{METHOD} --lawa 3 --lawa_interval 10 --lawa_mode replace",
    "sparsity": f"{METHOD} --sparsity 0.5 --mup_base_width 256",
    "tiny fp32": f"{TINY} --no_bf16",
    "tiny fp32, CPU": f"{TINY} --no_bf16 --device cpu",
    "tiny bf16": TINY,
    "tiny bf16, CPU": f"{TINY} --device cpu",
}
# The same updates on one GPU and on several: only where --gpus is given
SAME = f"""--preset gpt2_small --steps 50 --momentum_warmup 10 --momentum_cooldown 2
    {FULL}"""
ONE, ALL = "one GPU", "all GPUs"
CASES |= {ONE: SAME, ALL: SAME}
EQUAL = {  # pairs that must have the same losses of training: to so many nats
    ("gpt2_small", "gpt2_small resumed"): 0.02,
    (ONE, ALL): 0.02,
    ("tiny fp32", "tiny fp32, CPU"): 0.005,
    ("tiny bf16", "tiny bf16, CPU"): 0.05,
}


def checkpoints(out: Path) -> Path:
    return out / "gpt2_small" / "checkpoints"


def command_of(name: str, args) -> list[str]:
    """Words for train_gpt.py."""
    folder = args.out / name
    words = CASES[name].split()
    if name == "sample":
        return [*words, "--checkpoint_dir", str(checkpoints(args.out))]
    words += ["--train_files", args.train_files, "--val_files", args.val_files]
    words += ["--log_dir", str(folder), "--checkpoint_dir", str(folder / "checkpoints")]
    if name.endswith("resumed"):
        found = sorted(checkpoints(args.out).glob("*/step_000100.pt"))
        words += ["--resume", str(found[-1]) if found else "none"]
    return words


def run(name: str, args) -> dict:
    """{error: what went wrong, losses: {step: train loss}, result: the log's last line}."""
    folder = args.out / name
    folder.mkdir(parents=True, exist_ok=True)
    processes = args.gpus if name == ALL else 1
    command = trainer(ROOT / "train_gpt.py", command_of(name, args), processes)
    found = dict(error="", losses={}, result={})
    try:
        call(command, folder / "output", args.timeout)
    except Failed as failure:
        found["error"] = str(failure)
    for path in sorted(folder.glob("*.txt"))[-1:]:
        (log,) = logs.read_log(path)
        found["losses"] = {str(step): loss for step, loss, _ in log.train}
        found["result"] = log.result or {}
    return found


def row(name: str, found: dict) -> str:
    result, facts = found["result"], printable(found["error"], 100)
    if result:
        memory = f"{result['peak_memory_bytes'] / 1e9:6.1f} GB"
        step = f"{result['step_avg_ms']:9.1f} ms"
        facts = f"val_loss {result['val_loss']:.4f} {step} {memory}  {result['device']}"
    return f"{'FAILED' if found['error'] else 'ok':<7} {name:<22} {facts}"


def unequal(one: dict, other: dict, most: float) -> str:
    """What is wrong with a pair, if anything."""
    steps = one["losses"].keys() & other["losses"].keys()
    if not steps:
        return "no losses to compare"
    apart = max(abs(one["losses"][step] - other["losses"][step]) for step in steps)
    return "" if apart <= most else f"losses are {apart:.4f} apart, more than {most}"


def prove(argv) -> int:
    parser = Parser("", __doc__, prog="prove.py")
    for kind in ("train", "val"):
        shards = f"{ROOT}/data/fineweb10B/fineweb_{kind}_*.bin"
        parser.add_argument(f"--{kind}_files", default=shards, metavar="GLOB")
    parser.add_argument("--gpus", type=number_in(int, 2), help="compare one GPU with so many")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--only", nargs="+", choices=CASES, metavar="NAME")
    parser.add_argument(
        "--timeout",
        type=number_in(float, 1),
        default=1800,
        help="seconds a run, its compilation included (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    several = [ONE, ALL]
    args.only = args.only or (several if args.gpus else [n for n in CASES if n not in several])
    if ALL in args.only and not args.gpus:
        raise BadInput(f"--only '{ALL}' needs --gpus")
    for pattern in (args.train_files, args.val_files):
        if not glob.glob(pattern):
            raise BadInput(f"{pattern}: no such shards; ./run.sh fetch, or name others")
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    kept, good = args.out / "prove.json", True
    found = json.loads(kept.read_text()) if kept.exists() else {}
    for name in args.only:
        if name not in found or found[name]["error"]:
            found[name] = run(name, args)
            write_json(kept, found)
        print(row(name, found[name]), flush=True)
        good &= not found[name]["error"]
    for (one, other), most in EQUAL.items():
        if {one, other} <= found.keys():
            wrong = unequal(found[one], found[other], most)
            print(f"{'FAILED' if wrong else 'ok':<7} {one} = {other} {wrong}".rstrip())
            good &= not wrong
    return int(not good)


def main(argv=None) -> int:
    try:
        with interruptible():
            return prove(sys.argv[1:] if argv is None else argv)
    except (BadInput, OSError) as error:
        print(f"prove.py: {error}", file=sys.stderr)
        return 2
    except Interrupted as stopped:
        return stopped.args[0]


if __name__ == "__main__":
    sys.exit(main())
