"""Running scripts: one process runner, one stopwatch, one sandbox, for race and judge alike."""

import contextlib
import ctypes
import functools
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from data import shards
from records.tools.command import Interrupted, interruptible, printable  # noqa: F401
from setup.launch import MALLOC

GRACE = 15  # seconds between SIGTERM and SIGKILL
POLL = 0.01  # seconds between two looks at a process
MOST_BYTES = 16 << 30  # that a run may write: endless logs and checkpoints end there
PR_SET_CHILD_SUBREAPER = 36
SCRIPT = "train_gpt.py"
cancelled = threading.Event()  # set: the calls of all threads end
# As root of its own namespaces. Arguments: the folder, the home, places to keep, --, the command.
# Open files and the working directory reach what a mount hides.
UNSHARED = r"""
set -e
cd "$1"; folder=$1; home=$2; shift 2
kept=; n=3
while [ "$1" != -- ]; do eval "exec $n<\"\$1\""; kept="$kept $n:$1"; n=$((n + 1)); shift; done
shift
mount --make-rprivate /
mount -t proc proc /proc
ip link set lo up 2>/dev/null || true
while read -r _ place kind options _; do
    case "$kind,$options" in *,ro,*|proc,*|sysfs,*|cgroup*|dev*|mqueue,*) continue;; esac
    flags=$(echo "$options" | tr , '\n' | grep -xE 'nosuid|nodev|noexec|noatime|relatime' || true)
    mount -o "remount,bind,ro$(for f in $flags; do printf ",$f"; done)" "$(printf '%b' "$place")"
done < /proc/self/mounts
for place in /tmp /dev/shm "$home"; do mount -t tmpfs tmpfs "$place"; done
for one in $kept; do
    place=${one#*:}
    mkdir -p "$place" 2>/dev/null || true
    mount -c --bind "/proc/self/fd/${one%%:*}" "$place" && mount -o remount,bind,ro "$place"
done
mkdir -p "$folder"
mount -c --bind . "$folder"
mount -o remount,bind,rw "$folder"
cd "$folder"
exec 3<&- 4<&- 5<&-
"$@" &
wait $!
"""


class Failed(Exception):
    """A run that brought no result, and why."""


def environment(threads: int = 1) -> dict[str, str]:
    """The environment of a run: ours, with `threads` threads per process, and with what run.sh
    tells the C library."""
    return os.environ | MALLOC | {"OMP_NUM_THREADS": str(threads)}


def machine() -> str:
    """The processor and its threads."""
    try:
        name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):  # not Linux, or a processor without a name there
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} threads"


# ---------------------------------------------------------------------------------- the processes
def launch(command, output, **options) -> subprocess.Popen:
    """Starts a command in a session of its own; what it says goes to `output`."""
    streams = dict(stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
    words = [str(word) for word in command]
    return subprocess.Popen(words, start_new_session=True, **streams, **options)


def stop(process, grace: float = GRACE):
    """Ends a process and everything it started in its session: asks first, kills after `grace`
    seconds."""
    try:
        with contextlib.suppress(ProcessLookupError, PermissionError, subprocess.TimeoutExpired):
            if grace:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait(grace)
    finally:  # also where a second Ctrl-C comes
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def adopt_orphans():
    """Processes that lose their parent become ours, so that none can hide (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def offspring(known=()) -> list:
    """Our children that still run, with theirs, but for those in `known`: psutil's processes."""
    import psutil

    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if child not in known and child.status() != psutil.STATUS_ZOMBIE:
                found.append(child)
    return found


def written(folder) -> int:
    """Bytes of the files under a folder."""
    total = 0
    for top, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(top, name)).st_size
    return total


def call(
    command, output: Path, timeout: float, env=None, cwd=None, folder=None, alone=False
) -> float:
    """Runs a command, what it prints going into the file `output`. Returns the seconds from its
    start to its end; with `alone`, to the end of the last process that it started, in whatever
    session. Raises Failed unless it exits 0 within `timeout` seconds and writes no more than
    MOST_BYTES to `output` and `folder`. Nothing that it started outlives the call."""
    adopt_orphans()
    known = offspring() if alone else []
    begun = looked = time.monotonic()
    with open(output, "wb") as file:
        process = launch(command, file, env=env, cwd=cwd)
    try:
        while process.poll() is None or alone and offspring(known):
            now = time.monotonic()
            if cancelled.is_set():
                raise Failed("interrupted")
            if now - begun > timeout:
                raise Failed(f"not finished after {timeout:g} s")
            if now - looked > 1:
                looked = now
                size = os.path.getsize(output) + (written(folder) if folder else 0)
                if size > MOST_BYTES:
                    raise Failed(f"it writes without end: more than {MOST_BYTES >> 30} GiB")
            time.sleep(POLL)
        seconds = time.monotonic() - begun
    finally:
        stop(process, grace=0 if alone or folder else GRACE)
        for child in offspring(known) if alone else ():
            with contextlib.suppress(Exception):  # it may have gone by itself
                child.kill()
    if process.returncode:
        raise Failed(f"exit code {process.returncode}: {last_words(output)}")
    return seconds


def last_words(output: Path) -> str:
    with open(output, "rb") as file:
        file.seek(max(0, os.path.getsize(output) - 4000))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return printable(lines[-1].strip() if lines else "no output", 300)


# ------------------------------------------------------------------------------------ the sandbox
def kept_places(home: str) -> list[str]:
    """What a run needs of the home that it does not see: its Python."""
    prefixes = {os.path.realpath(p) for p in (sys.prefix, sys.base_prefix)} | {sys.prefix}
    return sorted(p for p in prefixes if Path(p).is_relative_to(home) or p.startswith("/tmp/"))


def boxed(box: str, words, folder) -> list:
    """The command that runs `words` in a sandbox: its own processes, network, /tmp and home, a
    disk that it can read and not write, but for the folder, in which it starts."""
    folder, home = str(folder), str(Path.home())
    kept = kept_places(home)
    if box == "unshare":
        apart = "--user --map-root-user --pid --fork --kill-child --mount --net --ipc".split()
        return ["unshare", *apart, "sh", "-c", UNSHARED, "sh", folder, home, *kept, "--", *words]
    apart = "--die-with-parent --unshare-pid --unshare-net --unshare-ipc --ro-bind / /".split()
    apart += "--dev-bind /dev /dev --tmpfs /dev/shm --proc /proc --tmpfs /tmp".split()
    apart += ["--tmpfs", home]
    for place in kept:
        apart += ["--ro-bind", place, place]
    return ["bwrap", *apart, "--bind", folder, folder, "--chdir", folder, "--", *words]


@functools.cache
def sandbox() -> str | None:
    """The sandbox that works on this machine: bwrap, unshare, or None."""
    with tempfile.TemporaryDirectory() as folder:
        for box in ("bwrap", "unshare"):
            words = boxed(box, [sys.executable, "-c", "open('written', 'w')"], folder)
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                done = subprocess.run(words, capture_output=True, timeout=20)
                if done.returncode == 0 and os.path.exists(os.path.join(folder, "written")):
                    return box
    return None


def about_the_sandbox() -> str:
    box = sandbox()
    if box:
        return f"every run in a sandbox ({box}): own processes, network, home and /tmp"
    return (
        "NO SANDBOX on this machine: install bubblewrap, or allow user namespaces; a run can see "
        "and leave what it likes"
    )


# ------------------------------------------------------------------------------------ the trainers
class Place:
    """A folder like a user's clone, with a script and shards, in which it runs. The name tells
    nothing, and race and judge make it alike."""

    def __init__(self, script: bytes, files: dict):
        """files: {path in the folder: tokens}."""
        home = str(Path.home())
        where = home if os.access(home, os.W_OK) else None
        self.folder = Path(tempfile.mkdtemp(prefix="speedrun_", dir=where))
        self.script, self.older = script, set()
        self.fill(files)

    def fill(self, files: dict):
        (self.folder / SCRIPT).write_bytes(self.script)
        for path, tokens in files.items():
            place = self.folder / path
            place.parent.mkdir(parents=True, exist_ok=True)
            shards.write_shard(place, tokens)
            shards.record(place.parent, {place.name: shards.sha256_file(place)})

    def run(self, words, timeout: float, threads: int = 1) -> float:
        """Seconds from start to the end of the last process. Raises Failed."""
        box = sandbox()
        env = environment(threads) | {"PWD": str(self.folder)}
        words = boxed(box, words, self.folder) if box else words
        # what it prints lies beside the folder, which it may empty
        output = self.folder.with_name(self.folder.name + ".output")
        return call(words, output, timeout, env, self.folder, self.folder, alone=not box)

    def train(self, flags, timeout: float, threads: int = 1, processes: int = 1) -> float:
        self.older = {*self.files("logs/*.txt"), *self.files("checkpoints/**/*.pt")}
        return self.run(trainer(SCRIPT, flags, processes), timeout, threads)

    def files(self, pattern: str) -> list[Path]:
        """Regular files: to open a pipe would wait for its writer."""
        return sorted(
            path for path in self.folder.glob(pattern) if path.is_file() and not path.is_symlink()
        )

    def new(self, pattern: str, what: str) -> list[Path]:
        """What the newest run left. Raises Failed where there is nothing."""
        found = [path for path in self.files(pattern) if path not in self.older]
        if not found:
            raise Failed(f"it left no {what} in {pattern.partition('/')[0]}/")
        return found

    def log(self) -> Path:
        return max(self.new("logs/*.txt", "log"), key=os.path.getmtime)

    def checkpoint(self) -> Path:
        """The final one, by the last number in its name."""

        def step(path):
            return int((re.findall(r"\d+", path.stem) or ["0"])[-1][-18:])

        return max(self.new("checkpoints/**/*.pt", "checkpoint"), key=step)

    def keep(self, place: Path):
        """Copies what it printed and its log to a folder."""
        output = self.folder.with_name(self.folder.name + ".output")
        place.mkdir(parents=True, exist_ok=True)
        for path in [output, *self.files("logs/*.txt")[-1:]]:
            if path.exists():
                name = "output" if path == output else path.name
                shutil.copyfile(path, place / name)

    def close(self):
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.with_name(self.folder.name + ".output").unlink(missing_ok=True)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


def trainer(script, flags, processes: int) -> list:
    """The command of a training run by so many processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [sys.executable, *torchrun * (processes > 1), script, *flags]


# ----------------------------------------------------------------------------------- its score
ANSWER = Path(__file__).with_name("answer.py")


def ask(script: bytes, checkpoint: Path, files: dict, questions: dict, cuda: bool, timeout: float):
    """What the model of a checkpoint answers, in a process that sees these files and nothing else.

    questions: {name: (rows, sizes of batches, positions or None)}. Returns {name: losses [N, T] of
    the targets, or with positions logits [N, V] there}, and what the model says of its size.
    Raises Failed."""
    with Place(script, files) as place:
        shutil.copyfile(checkpoint, place.folder / "model.pt")
        shutil.copyfile(ANSWER, place.folder / "answer.py")
        for name, (rows, sizes, at) in questions.items():
            np.savez(
                place.folder / f"{name}.npz",
                rows=rows.astype(np.int64),
                sizes=sizes,
                at=np.array([] if at is None else at, int),
            )
        device = "cuda" if cuda else "cpu"
        try:
            place.run([sys.executable, "answer.py", device, *questions], timeout)
        except Failed as error:
            raise Failed(f"load_model's model cannot be asked ({error})") from None
        answers = {}
        for name, (rows, _, at) in questions.items():
            path = place.folder / f"{name}.answers"
            shape = (len(rows), rows.shape[1] - 1) if at is None else (len(rows), -1)
            try:
                answers[name] = np.fromfile(path, "<f4").reshape(shape)
            except (OSError, ValueError):
                raise Failed("load_model's model gives no logits [B, T, V]") from None
        return answers
