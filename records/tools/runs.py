"""Running trainers as a user would: each in a session of its own, timed by a stopwatch of ours."""

import contextlib
import json
import math
import os
import platform
import re
import selectors
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from setup.launch import MALLOC

GRACE = 15  # seconds between SIGTERM and SIGKILL
POLL = 0.01  # seconds between two looks at the log
STEP = re.compile(rb"step:(\d{1,9})/(\d{1,9}) (train|val)_loss:")
RULE = re.compile(rb"={20,}\s*$")


class Failed(Exception):
    """A run that brought no result, and why."""


class Interrupted(BaseException):
    """SIGINT or SIGTERM; the argument is the exit code."""


@dataclass(frozen=True)
class Result:
    """One finished run: what the stopwatch measured, and what its log says."""

    time_ms: float  # training, by the stopwatch
    wall_ms: float  # from start to exit
    loss: float  # final validation loss, nats per token
    log: Path
    line: dict  # the log's last line

    @property
    def logged_ms(self) -> float:
        return float(self.line["train_time_ms"])

    @property
    def data(self) -> str:
        """What was trained and validated on: shards by their hashes, and how much of them."""
        config = self.line.get("config") or {}
        tokens = self.line.get("val_tokens", config.get("val_tokens"))
        return json.dumps([self.line.get("data_sha256"), tokens], sort_keys=True)


@contextlib.contextmanager
def interruptible():
    """SIGINT, SIGTERM and SIGHUP raise Interrupted inside: a running trainer is ended first."""

    def interrupt(number, frame):
        raise Interrupted(128 + number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]  # nohup
    before = {number: signal.signal(number, interrupt) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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


def launch(command, output, **options) -> subprocess.Popen:
    """Starts a command in a session of its own; what it says goes to `output`."""
    streams = dict(stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
    words = [str(word) for word in command]
    return subprocess.Popen(words, start_new_session=True, **streams, **options)


def trainer(script, flags, processes: int) -> list:
    """The command of a training run by so many processes."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [sys.executable, *torchrun * (processes > 1), script, *flags]


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


# ------------------------------------------------------------------------------- the stopwatch


class Stopwatch:
    """Stamps the lines of a run as they come to light, in what it prints and in the log that it
    appends to. A line's moment is that of its first sight; what it says about time is not read."""

    def __init__(self, now=time.monotonic):
        self.now = now
        self.started = now()
        self.opening = None  # the newest line while there is no step line
        self.lines = {}  # step line -> seconds, in order of sight
        self.trained = 0  # training lines among them
        self.rest = {}  # source -> bytes after its last newline

    def read(self, source, data: bytes):
        """Takes what has newly come from `source`, any hashable name."""
        moment = self.now()
        *lines, self.rest[source] = (self.rest.get(source, b"") + data).split(b"\n")
        for line in lines:
            if found := STEP.match(line):
                self.trained += line not in self.lines and found[3] == b"train"
                self.lines.setdefault(line, moment)
            elif not self.lines:
                self.opening = moment
            elif RULE.match(line) and moment - next(iter(self.lines.values())) < 1:
                self.lines.clear()  # they stood in the source, at the head of the log
                self.trained = 0

    def training_seconds(self) -> float:
        """Time up to each training line since the line in front of it: validations end in lines of
        their own, so they are left out. Steps without a training line count as the mean of the
        others. Failed where there are no training lines to time."""
        seconds, counted, planned = 0.0, 0, 0
        at, since = 0, self.opening
        for line, moment in self.lines.items():
            found = STEP.match(line)
            step, planned, kind = int(found[1]), int(found[2]), found[3]
            if kind == b"train" and since is not None and step > at:
                seconds += moment - since
                counted += step - at
            at, since = step, moment
        if not counted or not seconds:
            raise Failed("no training lines could be timed while it ran")
        return seconds * planned / counted


class Tail:
    """The logs in a folder, as they grow."""

    def __init__(self, folder: Path | None, watch: Stopwatch):
        self.folder, self.watch, self.offsets = folder, watch, {}

    def follow(self):
        """Shows the stopwatch what has been appended since the last call."""
        with contextlib.suppress(OSError):
            for entry in os.scandir(self.folder) if self.folder else ():
                if entry.name.endswith(".txt") and entry.is_file(follow_symlinks=False):
                    self.read(entry.path)

    def read(self, path: str):
        start = self.offsets.get(path, 0)
        if os.path.getsize(path) <= start:
            return
        with open(path, "rb") as file:
            file.seek(start)
            data = file.read()
        self.offsets[path] = start + len(data)
        self.watch.read(path, data)


def pump(process, file, tail: Tail, deadline: float, enough: float) -> bytes:
    """Everything that the process prints goes into `file` and past the stopwatch, until it ends or
    has shown `enough` training lines. Returns the end of it. Raises Failed after the deadline."""
    last = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            ended = process.poll() is not None
            ready = selector.select(POLL)
            data = os.read(process.stdout.fileno(), 1 << 16) if ready else b""
            tail.follow()
            tail.watch.read(None, data)
            file.write(data)
            last = (last + data)[-2000:]
            if ready and not data:  # the end of the pipe
                selector.unregister(process.stdout)
            elif ended and not ready:  # something that it started may hold the pipe open
                return last
            if tail.watch.trained >= enough:
                return last
            if time.monotonic() > deadline:
                raise Failed("timeout")


def call(
    command, output: Path, timeout: float, env=None, cwd=None, logs=None, enough=math.inf
) -> Stopwatch:
    """Runs a command, what it prints going through a pipe into the file `output`. Returns the
    stopwatch that saw the pipe and the logs in the folder `logs`. Raises Failed unless the command
    exits 0 within `timeout` seconds, or has shown `enough` training lines by then and was stopped.
    Nothing that it started in its session outlives the call."""
    watch = Stopwatch()
    process = launch(command, subprocess.PIPE, env=env, cwd=cwd)
    try:
        with open(output, "wb") as file:
            last = pump(process, file, Tail(logs, watch), watch.started + timeout, enough)
        code = process.wait() if watch.trained < enough else 0
    except Failed:
        raise Failed(f"not finished after {timeout:g} s") from None
    finally:
        stop(process)
        process.stdout.close()
    if code:
        lines = [line for line in last.decode(errors="replace").splitlines() if line.strip()]
        raise Failed(f"exit code {code}: {(lines or ['no output'])[-1][:300]}")
    return watch


def read_result(folder: Path, watch: Stopwatch) -> Result:
    """The result of the only log in `folder`. Raises Failed where there is none."""
    logs = sorted(folder.glob("*.txt"))
    if len(logs) != 1:
        raise Failed(f"it wrote {len(logs)} logs")
    with open(logs[0], "rb") as file:
        file.seek(max(0, os.path.getsize(logs[0]) - (1 << 20)))
        last = file.read().rstrip().rpartition(b"\n")[2]
    try:
        line = json.loads(last)
        loss, logged = float(line["val_loss"]), float(line["train_time_ms"])
    except (ValueError, TypeError, KeyError):
        raise Failed("its log ends without a result line") from None
    if not (math.isfinite(loss) and 0 < logged < math.inf):
        raise Failed(f"val loss {loss}, train time {logged} ms")
    time_ms = round(1000 * watch.training_seconds(), 1)
    wall_ms = round(1000 * (watch.now() - watch.started))
    return Result(time_ms, wall_ms, loss, logs[0], line)


def train(
    script: Path, flags, folder: Path, timeout: float, threads=1, processes=1, enough=math.inf
) -> Result | None:
    """Runs a trainer once, alone, with its log in the new folder `folder`. With `enough`, stops it
    after so many training lines, and there is no result."""
    folder.mkdir(parents=True)
    command = trainer(script, [*flags, "--log_dir", folder], processes)
    env = environment(threads)
    watch = call(command, folder / "output", timeout, env, logs=folder, enough=enough)
    return read_result(folder, watch) if watch.trained < enough else None
