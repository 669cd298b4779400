"""Faults on purpose, counted: the long form of what the quick tests do in small.

    python tests/chaos.py kill 50          kill -9 at random moments, resume, compare final weights
    python tests/chaos.py checkpoints 200  flips, cuts and swaps of checkpoints: is one trained on?
    python tests/chaos.py shards 500       the same for token shards, through run.sh's check
    python tests/chaos.py flags 300        random command lines: each runs, or one line and exit 2
    python tests/chaos.py all              everything, with these counts

Everything is drawn from --seed. Exit code 0 when nothing was lost, 1 otherwise. `kill 50` takes
about ten minutes.
"""

import argparse
import contextlib
import io
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train_gpt  # noqa: E402
from data import check, shards  # noqa: E402

STEPS = 60
TINY = f"""--preset laptop --device cpu --n_layer 2 --n_embd 32 --n_head 2 --seq_len 32
    --batch_tokens 256 --val_tokens 512 --val_every 20 --steps {STEPS} --checkpoint_every 3
    --momentum_warmup 10""".split()
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


class Place:
    """A folder with tiny shards (and their manifest), logs and checkpoints."""

    def __init__(self, folder: Path, seed: int):
        self.folder, rng = folder, np.random.default_rng(seed)
        folder.mkdir(parents=True)
        for name, size in (("train_000001", 12000), ("train_000002", 9000), ("val_000000", 1200)):
            tokens = rng.integers(0, 64, size)
            tokens[::97] = 256
            shards.write_shard(folder / f"{name}.bin", tokens)
        hashes = {path.name: shards.sha256_file(path) for path in folder.glob("*.bin")}
        shards.record(folder, hashes)
        self.globs = [f"{folder}/train_*.bin", f"{folder}/val_*.bin"]
        files = ["--train_files", self.globs[0], "--val_files", self.globs[1]]
        outputs = ["--log_dir", f"{folder}/logs", "--checkpoint_dir", f"{folder}/checkpoints"]
        self.flags = [*TINY, *files, *outputs]

    def checkpoints(self) -> list[Path]:
        found = self.folder.glob("checkpoints/*/step_*.pt")
        return sorted(found, key=lambda path: path.stat().st_mtime_ns)

    def final_weights(self) -> dict:
        for path in reversed(self.checkpoints()):
            state = train_gpt.read_checkpoint(path)
            if state["step"] == STEPS:
                return state["model"]
        return {}

    def clean(self):
        for name in ("logs", "checkpoints"):
            shutil.rmtree(self.folder / name, ignore_errors=True)


def in_process(argv: list[str]) -> tuple[int, str]:
    """(exit code, stderr) of the trainer's main; an exception that gets out counts as code -1."""
    err = io.StringIO()
    with (
        warnings.catch_warnings(action="ignore"),  # torchrun's `record` wants a real stderr
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(err),
    ):
        try:
            code = train_gpt.main(argv)
        except BaseException as error:  # what we look for
            code = -1
            err.write(f"{type(error).__name__}: {error}\n")
    return code, err.getvalue().strip()


def refused(code: int, err: str) -> bool:
    return code == 2 and len(err.splitlines()) == 1


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def wait_until(true, process: subprocess.Popen):
    while process.poll() is None and not true():
        time.sleep(0.001)


def kill(count: int, rng: random.Random, root: Path):
    """kill -9 at a random step, every other time while a checkpoint is written; then resume."""
    command = [sys.executable, str(ROOT / "train_gpt.py")]
    whole, same, saving = Place(root / "unbroken", 1), 0, 0
    quiet = dict(stdout=subprocess.DEVNULL, env=ENVIRONMENT)
    subprocess.run(command + whole.flags, check=True, **quiet)
    expected = whole.final_weights()
    for trial in range(count):
        place, step = Place(root / f"kill{trial}", 1), rng.randrange(STEPS - 2)
        process = subprocess.Popen(command + place.flags, stderr=subprocess.DEVNULL, **quiet)

        def logged(place=place, step=step):
            logs = list(place.folder.glob("logs/*.txt"))
            return logs and f"\nstep:{step}/" in logs[0].read_text().rpartition("=" * 100)[2]

        def half_saved(place=place):
            return any(place.folder.glob("checkpoints/*/*.tmp"))

        wait_until(logged, process)
        if trial % 2:
            wait_until(half_saved, process)
        else:
            time.sleep(rng.random() * 0.05)
        process.kill()
        process.wait()
        saving += half_saved()
        before = {path: path.read_bytes() for path in place.checkpoints()}
        resume = ["--resume"] if before else []  # killed before the first: start again
        line = command + place.flags + resume
        done = subprocess.run(line, capture_output=True, text=True, env=ENVIRONMENT)
        kept = all(path.read_bytes() == data for path, data in before.items() if path.exists())
        good = done.returncode == 0 and kept and equal(place.final_weights(), expected)
        same += good
        if not good:
            print(f"kill {trial}: exit {done.returncode}, files kept {kept}: {done.stderr[-300:]}")
        shutil.rmtree(place.folder)
    text = f"{same}/{count} end with the weights of the unbroken run ({saving} killed while saving)"
    return f"kill -9 then resume: {text}", same == count


def damage(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """A random fault of a disk or a copy."""
    kind = rng.choice(("flip", "cut", "zeros", "swap", "grow", "other", "empty"))
    at, changed = rng.randrange(len(data)), bytearray(data)
    if kind == "flip":
        for _ in range(rng.choice((1, 20))):
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "zeros":
        end = min(len(data), at + rng.randrange(1, 512))
        changed[at:end] = bytes(end - at)
    elif kind == "swap":  # two blocks change places
        size, half = min(256, len(data) // 4), len(data) // 2
        a, b = rng.randrange(half - size), half + rng.randrange(half - size)
        changed[a : a + size], changed[b : b + size] = data[b : b + size], data[a : a + size]
    else:
        grown = data + os.urandom(rng.randrange(1, 64))
        return {"cut": data[:at], "grow": grown, "other": other, "empty": b""}[kind]
    return bytes(changed)


def checkpoints(count: int, rng: random.Random, root: Path):
    """`--resume` with the newest checkpoint damaged: the older one is taken; alone: refused."""
    place = Place(root / "checkpoints_source", 2)
    assert in_process([*place.flags, "--checkpoint_keep", "100"])[0] == 0
    expected, (older, newer) = place.final_weights(), place.checkpoints()[-3:-1]
    older_data, newer_data, good = older.read_bytes(), newer.read_bytes(), 0
    for trial in range(count):
        place.clean()
        data, folder = damage(newer_data, rng, os.urandom(2000)), newer.parent
        folder.mkdir(parents=True)
        with_older = rng.random() < 0.3
        if with_older:
            (folder / older.name).write_bytes(older_data)
            os.utime(folder / older.name, (1, 1))
        (folder / newer.name).write_bytes(data)
        code, err = in_process([*place.flags, "--resume", "latest"])
        if with_older or data == newer_data:
            fine = code == 0 and equal(place.final_weights(), expected)
        else:
            fine = code == 2 and "Traceback" not in err and len(err.splitlines()) == 2
        good += fine
        if not fine:
            print(f"checkpoint {trial}: exit {code}: {err[-300:]}")
    return f"damaged checkpoints: {good}/{count} refused, or the older one taken", good == count


def shard_faults(count: int, rng: random.Random, root: Path):
    """Start on a damaged shard: refused before step 0, by the trainer or by run.sh's check."""
    place, good = Place(root / "shards", 3), 0
    files = sorted(place.folder.glob("*.bin"))
    assert in_process(place.flags)[0] == 0, "the whole shards must train"
    for trial in range(count):
        path = rng.choice(files)
        whole = path.read_bytes()
        data = damage(whole, rng, rng.choice(files).read_bytes())
        path.write_bytes(data)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                check.check_run(place.globs, 257)
            found = ""
        except shards.BadInput as error:
            found = str(error)
        fine = data == whole or (found and "\n" not in found)
        code, err = (2, "a") if fine else in_process(place.flags)
        fine = fine or refused(code, err)
        good += bool(fine)
        if not fine:
            print(f"shard {trial}: {path.name} gave exit {code}: {err[-200:]}")
        path.write_bytes(whole)
    return f"damaged shards: {good}/{count} refused in one line", good == count


VALUES = (
    """0 1 2 3 7 8 16 33 64 -1 0.5 1.0 1e9 nan inf x adam muon flex eval replace latest /nowhere/x
    10000000000000000000000 gpt2_small laptop ü 1_0""".split()
    + [""]
)
LONG = """train_files val_files log_dir checkpoint_dir compile n_layer n_embd steps batch_tokens
    val_tokens generate_tokens""".split()


def flags(count: int, rng: random.Random, root: Path):
    """Random flags with random values on a tiny run: it runs, or one line and exit code 2."""
    place, laptop = Place(root / "flags", 4), train_gpt.PRESETS["laptop"]
    numbers = vars(laptop.stages[0]) | vars(laptop)
    names = [n for n, value in numbers.items() if n not in LONG and not isinstance(value, tuple)]
    ran = told = 0
    for trial in range(count):
        argv = list(place.flags)
        for name in rng.sample(names, rng.randrange(1, 4)):
            word = rng.choice((f"--{name}",) * 3 + (f"--no_{name}", f"--{name[:-1]}", name))
            usual = numbers[name]
            bare = rng.random() < 0.1 or usual in (True, False, None)
            value = rng.choice((str(usual), rng.choice(VALUES)))
            argv += [word] if bare else [word, value]
        code, err = in_process(argv)
        ran, told = ran + (code == 0), told + refused(code, err)
        if code and not refused(code, err):
            print(
                f"flags {trial}: exit {code} for {' '.join(argv[len(place.flags) :])}: {err[-300:]}"
            )
        place.clean()
    text = f"{ran} ran, {told} refused in one line with exit code 2, of {count}"
    return f"random flags: {text}", ran + told == count


FAULTS = dict(kill=(kill, 50), checkpoints=(checkpoints, 200))
FAULTS |= dict(shards=(shard_faults, 500), flags=(flags, 300))


def main(argv=None) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("fault", choices=[*FAULTS, "all"])
    parser.add_argument("count", nargs="?", type=int, help="how many trials")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    fine = True
    with tempfile.TemporaryDirectory(prefix="chaos") as folder:
        for name in FAULTS if args.fault == "all" else [args.fault]:
            fault, default = FAULTS[name]
            begun, rng = time.monotonic(), random.Random(f"{args.seed} {name}")
            text, good = fault(args.count or default, rng, Path(folder))
            print(f"{text} [{time.monotonic() - begun:.0f} s]", flush=True)
            fine &= good
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
