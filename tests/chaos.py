"""Faults on purpose, counted: the long form of what the quick tests do in small.

    python tests/chaos.py kill 50          kill -9 at random moments of a run (saving included), resume, compare final weights
    python tests/chaos.py checkpoints 200  random flips, cuts and swaps of checkpoints: is one ever trained on?
    python tests/chaos.py shards 500       the same for token shards
    python tests/chaos.py flags 300        random command lines: each must run, or exit 2 with one line
    python tests/chaos.py ranks            two ranks; one is killed, stopped (SIGSTOP), or fed another file
    python tests/chaos.py all              everything, with these counts

Everything is drawn from --seed. Exit code 0 when nothing was lost, 1 otherwise. `ranks` needs a few minutes, `kill 50` about ten.
"""
import argparse
import contextlib
import io
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import train_gpt  # noqa: E402
from data import shards  # noqa: E402

STEPS = 60
TINY = ("--preset laptop --n_layer 2 --n_embd 32 --n_head 2 --seq_len 32 --batch_tokens 256 --val_tokens 512 --val_every 20 "
        f"--steps {STEPS} --checkpoint_every 3 --momentum_warmup 10").split()


class Place:
    """A folder with tiny shards (and their manifest), logs and checkpoints."""

    def __init__(self, folder: Path, seed: int):
        self.folder = folder
        rng = np.random.default_rng(seed)
        for name, size in (("train_000001", 12000), ("train_000002", 9000), ("val_000000", 1200)):
            tokens = rng.integers(0, 64, size)
            tokens[::97] = 256
            folder.mkdir(parents=True, exist_ok=True)
            shards.write_shard(folder / f"{name}.bin", tokens)
        shards.record(folder, {path.name: shards.sha256_file(path) for path in folder.glob("*.bin")})
        self.flags = [*TINY, "--train_files", f"{folder}/train_*.bin", "--val_files", f"{folder}/val_*.bin",
                      "--log_dir", f"{folder}/logs", "--checkpoint_dir", f"{folder}/checkpoints"]

    def checkpoints(self) -> list[Path]:
        return sorted(self.folder.glob("checkpoints/*/step_*.pt"), key=lambda path: path.stat().st_mtime_ns)

    def final_weights(self) -> dict:
        for path in reversed(self.checkpoints()):
            state = train_gpt.read_checkpoint(path)
            if state["step"] == STEPS:
                return state["model"]
        return {}


def in_process(argv: list[str]) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the trainer's main; an exception that gets out counts as code -1."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = train_gpt.main(argv)
        except BaseException as error:  # a traceback is what we look for
            code = -1
            err.write(f"{type(error).__name__}: {error}\n")
    return code, out.getvalue(), err.getvalue()


def override(argv: list[str], **values) -> list[str]:
    """argv with these flags instead of what it says on them."""
    pairs = dict(zip(argv[::2], argv[1::2])) | {f"--{name}": str(value) for name, value in values.items()}
    return [word for pair in pairs.items() for word in pair]


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def kill(count: int, rng: random.Random, root: Path) -> str:
    """kill -9 at a random moment after the start of training, then resume until the end: the weights of the unbroken run?"""
    whole = Place(root / "unbroken", 1)
    command = [sys.executable, str(ROOT / "train_gpt.py")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command + whole.flags, check=True, stdout=subprocess.DEVNULL, env=environment)
    expected, same, saving = whole.final_weights(), 0, 0
    for trial in range(count):
        place = Place(root / f"kill{trial}", 1)
        process = subprocess.Popen(command + place.flags, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        wait_for_step(place, rng.randrange(STEPS - 2), process)
        if trial % 2:  # in every other trial, while a checkpoint is being written
            wait_until(lambda: any(place.folder.glob("checkpoints/*/*.tmp")), process)
        else:
            time.sleep(rng.random() * 0.05)
        process.kill()
        process.wait()
        saving += any(place.folder.glob("checkpoints/*/*.tmp"))
        before = {path: path.read_bytes() for path in place.checkpoints()}
        resume = ["--resume", "latest"] if place.checkpoints() else []  # killed before the first checkpoint: start again
        done = subprocess.run(command + place.flags + resume, capture_output=True, text=True, env=environment)
        kept = all(path.read_bytes() == data for path, data in before.items())
        good = done.returncode == 0 and kept and equal(place.final_weights(), expected)
        same += good
        if not good:
            print(f"kill {trial}: exit {done.returncode}, earlier files {'kept' if kept else 'CHANGED'}: {done.stderr[-300:]}")
        shutil.rmtree(place.folder)
    return f"kill -9 then resume: {same}/{count} end with the weights of the unbroken run ({saving} were killed while saving)", same == count


def wait_until(true, process: subprocess.Popen):
    while process.poll() is None and not true():
        pass


def wait_for_step(place: Place, step: int, process: subprocess.Popen):
    def reached() -> bool:
        logs = list(place.folder.glob("logs/*.txt"))
        return bool(logs and re.search(rf"^step:{step}/", logs[0].read_text(encoding="utf-8").rpartition("=" * 100)[2], re.M))
    wait_until(reached, process)


def damage(data: bytes, rng: random.Random, other: bytes) -> tuple[str, bytes]:
    """A random fault of a disk or a copy."""
    kind, at = rng.choice(("flip", "flips", "cut", "zeros", "swap", "grow", "other", "empty")), rng.randrange(len(data))
    if kind == "flip":
        return kind, data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1:]
    if kind == "flips":
        changed = bytearray(data)
        for _ in range(20):
            changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
        return kind, bytes(changed)
    if kind == "zeros":
        size = rng.randrange(1, 512)
        return kind, data[:at] + bytes(len(data[at:at + size])) + data[at + size:]
    if kind == "swap":  # two blocks change places
        size = min(256, len(data) // 4)
        a, b = sorted((rng.randrange(len(data) // 2 - size), len(data) // 2 + rng.randrange(len(data) // 2 - size)))
        return kind, data[:a] + data[b:b + size] + data[a + size:b] + data[a:a + size] + data[b + size:]
    return kind, {"cut": data[:at], "grow": data + os.urandom(rng.randrange(1, 64)), "other": other, "empty": b""}[kind]


def checkpoints(count: int, rng: random.Random, root: Path) -> str:
    """Resume from a damaged checkpoint, with an older whole one beside it or without: refused, or the older one taken."""
    place = Place(root / "checkpoints_source", 2)
    assert in_process(place.flags + ["--checkpoint_keep", "100"])[0] == 0
    expected, (older, newer) = place.final_weights(), place.checkpoints()[-3:-1]
    silent = tracebacks = fell_back = unchanged = 0
    for trial in range(count):
        kind, data = damage(newer.read_bytes(), rng, os.urandom(2000))
        unchanged += data == newer.read_bytes()
        folder = place.folder / f"trial{trial}" / "run"
        folder.mkdir(parents=True)
        (folder / newer.name).write_bytes(data)
        with_older = rng.random() < 0.3
        if with_older:
            shutil.copy(older, folder)
        before = len(place.checkpoints())
        code, out, err = in_process(override(place.flags, resume=folder / newer.name, checkpoint_every=STEPS))
        tracebacks += code == -1 or "Traceback" in err
        if with_older:
            fell_back += code == 0 and len(place.checkpoints()) == before + 1 and equal(place.final_weights(), expected) and str(newer.name) in out
        elif data != newer.read_bytes():
            silent += code != 2 or len(err.strip().splitlines()) != 1
        shutil.rmtree(folder.parent)
        for path in place.folder.glob("checkpoints/*"):
            if path != newer.parent:
                shutil.rmtree(path)
    wrong = silent + tracebacks
    return (f"damaged checkpoints: {silent}/{count} trained on or not told in one line, {tracebacks} tracebacks, {fell_back} times the older "
            f"whole one was taken and gave the same final weights; {unchanged} mutations changed nothing"), wrong == 0


def shard_faults(count: int, rng: random.Random, root: Path) -> str:
    """Start on a damaged shard: refused in one line, before step 0."""
    place = Place(root / "shards", 3)
    silent = tracebacks = unchanged = 0
    files = sorted(place.folder.glob("*.bin"))
    assert in_process(place.flags)[0] == 0, "the whole shards must train"
    for trial in range(count):
        path = rng.choice(files)
        whole = path.read_bytes()
        kind, data = damage(whole, rng, rng.choice(files).read_bytes())
        if data == whole:
            unchanged += 1
            continue
        path.write_bytes(data)
        code, out, err = in_process(place.flags)
        tracebacks += code == -1 or "Traceback" in err
        if code != 2 or len(err.strip().splitlines()) != 1 or "step:0/" in out:
            silent += 1
            print(f"shard {trial}: {kind} of {path.name} gave exit {code}: {err.strip()[-200:]}")
        path.write_bytes(whole)
    return (f"damaged shards: {silent}/{count} trained on or not told in one line, {tracebacks} tracebacks "
            f"({unchanged} mutations changed nothing)"), silent + tracebacks == 0


def flags(count: int, rng: random.Random, root: Path) -> str:
    """Random flags with random values on a tiny run: it runs, or one line and exit code 2."""
    place = Place(root / "flags", 4)
    values = ["0", "1", "2", "3", "7", "8", "16", "33", "64", "-1", "0.5", "1.0", "1e9", "nan", "inf", "", "x", "adam", "muon", "S", "SL", "flex",
              "eval", "replace", "latest", "/nowhere/x", "10000000000000000000000", "gpt2_small", "laptop", "ü", "1_0"]
    skip = {"train_files", "val_files", "log_dir", "checkpoint_dir", "compile", "no_compile", "n_layer", "n_embd", "steps", "batch_tokens",
            "val_tokens", "generate_tokens"}
    names = sorted(set(train_gpt.FIELDS) - skip)
    ran = refused = wrong = 0
    for trial in range(count):
        argv = list(place.flags)
        for name in rng.sample(names, rng.randrange(1, 4)):
            if f"--{name}" in argv:
                at = argv.index(f"--{name}")
                del argv[at:at + 2]
            word = rng.choice((f"--{name}", f"--{name}", f"--{name}", f"--no_{name}", f"--{name[:-1]}", name))
            usual = getattr(train_gpt.PRESETS["laptop"], name)
            value = rng.choice(values) if rng.random() < 0.5 else str(usual)
            argv += [word] if rng.random() < 0.1 or usual in (True, False, None) else [word, value]
        code, out, err = in_process(argv)
        lines = [line for line in err.strip().splitlines() if line]
        if code == 0:
            ran += 1
        elif code == 2 and len(lines) == 1 and "Traceback" not in err:
            refused += 1
        else:
            wrong += 1
            print(f"flags {trial}: exit {code} for {' '.join(argv[len(TINY) - 2:])}: {err.strip()[-300:]}")
        shutil.rmtree(place.folder / "logs", ignore_errors=True)
        shutil.rmtree(place.folder / "checkpoints", ignore_errors=True)
    return f"random flags: {ran} ran, {refused} refused in one line with exit code 2, {wrong}/{count} neither", wrong == 0


def ranks(count: int, rng: random.Random, root: Path) -> str:
    """Two ranks under torchrun through run.sh; one is killed, stopped, or fed another file. All must end, the cause last."""
    report, fine = [], True
    for fault in ("killed", "stopped", "another file"):
        place = Place(root / f"ranks_{fault.replace(' ', '_')}", 5)
        argv = override(place.flags, checkpoint_every=0, steps=2000, epochs_allowed=1000, rank_timeout=15)
        environment = os.environ | {"NPROC": "2", "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
        if fault == "another file":  # a wrapper gives rank 1 another seed's shards
            other = Place(root / "ranks_other", 6)
            environment["CHAOS_OTHER"], environment["CHAOS_MINE"] = str(other.folder), str(place.folder)
            script = root / "swap_rank.py"
            script.write_text("import os, sys\nif os.environ['RANK'] == '1':\n    sys.argv = [a.replace(os.environ['CHAOS_MINE'] + '/train', "
                              f"os.environ['CHAOS_OTHER'] + '/train') for a in sys.argv]\nsys.path.insert(0, {str(ROOT)!r})\n"
                              "import train_gpt\nsys.exit(train_gpt.main())\n")
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script), *argv]
        else:
            command = [str(ROOT / "run.sh"), *argv]
        cause = root / f"cause_{fault.replace(' ', '_')}"
        if fault == "another file":
            environment["SPEEDRUN_ERROR_FILE"] = str(cause)
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)
        begun = time.monotonic()
        if fault != "another file":
            wait_for_step(place, 5, process)
            workers = subprocess.run(["pgrep", "-f", f"train_gpt.py.*{place.folder}"], capture_output=True, text=True).stdout.split()
            workers = [int(pid) for pid in workers if b"RANK=1\0" in environ_of(int(pid))]
            os.kill(workers[0], signal.SIGKILL if fault == "killed" else signal.SIGSTOP)
            begun = time.monotonic()
        try:
            out, err = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
        seconds = time.monotonic() - begun
        last = cause.read_text().strip() if cause.exists() else (err.strip().splitlines() or ["nothing"])[-1]
        good = process.returncode != 0 and seconds < 60 and "rank 1" in last
        fine &= good
        report.append(f"{fault}: all ended after {seconds:.0f} s with exit code {process.returncode}: {last}")
    return "two ranks, one of them\n  " + "\n  ".join(report), fine


def environ_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fault", choices=["kill", "checkpoints", "shards", "flags", "ranks", "all"])
    parser.add_argument("count", nargs="?", type=int, help="how many trials")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    faults = {"kill": (kill, 50), "checkpoints": (checkpoints, 200), "shards": (shard_faults, 500), "flags": (flags, 300), "ranks": (ranks, 1)}
    fine = True
    with tempfile.TemporaryDirectory(prefix="chaos") as folder:
        for name, (fault, default) in faults.items():
            if args.fault in (name, "all"):
                begun = time.monotonic()
                text, good = fault(args.count or default, random.Random(f"{args.seed} {name}"), Path(folder))
                print(f"{text} [{time.monotonic() - begun:.0f} s]", flush=True)
                fine &= good
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
