"""Running trainers: alone, in a process group of their own, with a stopwatch that is not theirs."""

import contextlib
import os
import platform
import re
import signal
import subprocess
from pathlib import Path

GRACE = 15  # seconds between SIGTERM and SIGKILL


class Failed(Exception):
    """A run that brought no result, and why."""


class Interrupted(BaseException):
    """SIGINT or SIGTERM; the argument is the exit code."""


@contextlib.contextmanager
def interruptible():
    """SIGINT and SIGTERM raise Interrupted inside, so that a trainer being run is ended before we are."""

    def interrupt(number, frame):
        raise Interrupted(128 + number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop(process):
    """Ends a process and everything it started in its session."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(GRACE)
            return
        except ProcessLookupError:
            process.wait()
            return
        except subprocess.TimeoutExpired:
            continue


def call(command, output: Path, timeout, env=None, cwd=None):
    """Runs a command, printing to the file `output`. Raises Failed unless it exits 0 within `timeout` seconds."""
    with open(output, "wb") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=env,
            cwd=cwd,
        )
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            stop(process)
            raise Failed(f"not finished after {timeout:g} s") from None
        except BaseException:
            stop(process)
            raise
    if code:
        lines = output.read_text(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "no output")
        raise Failed(f"exit code {code}: {last[:300]}")


def environment(threads: int = 1, processes: int = 1) -> dict[str, str]:
    """The environment of a run on a CPU: ours, with `threads` threads for each process, and a C library that keeps freed
    tensors in its heap. Fresh pages make a step up to ten times as long."""
    env = dict(os.environ)
    settings = {
        "OMP_NUM_THREADS": str(threads),
        "MALLOC_MMAP_MAX_": "0",  # everything on the heap
        "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),  # never given back
        "MALLOC_TOP_PAD_": str(2**28),  # grown by 256 MB at a time
    }
    return env | settings


def machine() -> str:
    """The processor and its threads."""
    try:
        name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):  # not Linux, or a processor without a name there
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} threads"
