"""The processes of a judged script: each in a folder, a home and a session of its own, its log read
while it grows and stamped by our clock. What they leave is taken into memory; the folder goes."""

import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import shards
from records.tools import logs, runs
from records.tools.command import printable

TICK = 0.02  # seconds between two looks at all processes
PASSED_ON = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "USER", "SHELL", "TERM", "VIRTUAL_ENV")
PASSED_ON += ("CUDA_VISIBLE_DEVICES", "CUDA_HOME", "NVIDIA_VISIBLE_DEVICES", "SYSTEMROOT")
STEP = re.compile(
    rb"^step:(\d+)/\d+ (?:.* )?(train|val)_loss:(\S+) (?:.* )?train_time:([\d.]+)ms", re.M
)
ANSWER = Path(__file__).with_name("judge_answer.py")
PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Line:
    """A step line of a log."""

    seen: float  # seconds from the start of the process, by our clock
    spent: float  # seconds of computing until then
    step: int
    kind: str  # train or val
    loss: str  # as written
    logged: float  # train_time in seconds


def adopt_orphans():
    """Processes that lose their parent become ours, so that none can hide (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def children() -> set[int]:
    """Processes whose parent is this one."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.add(int(path.parent.name))
    return found


def cpu_seconds(pid: int) -> float | None:
    """Processor time of a process and of the children it has waited for."""
    try:
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]
    except OSError:
        return None
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


class Job:
    """One process of the script. fill(job): called when all `needs` are over; it sets the words of
    the command and writes into the folder."""

    def __init__(self, name: str, script: bytes, fill, needs=(), cuda=False, timeout=3600.0):
        self.name, self.script, self.fill, self.needs = name, script, fill, needs
        self.cuda, self.timeout = cuda, timeout
        self.process, self.home, self.over, self.why, self.left = None, None, False, "", []
        self.words: list[str] = []
        self.after = lambda: None  # called when it has ended well
        self.lock, self.enough = threading.Lock(), False  # enough: nothing more is wanted of it

    @property
    def ok(self) -> bool:
        return self.over and not self.why

    def start(self):
        self.home = Path(tempfile.mkdtemp())  # a name that says nothing
        self.folder = self.home / "speedrun"
        for folder in (self.folder, self.home / "tmp"):
            folder.mkdir()
        (self.folder / "train_gpt.py").write_bytes(self.script)
        self.fill(self)
        env = {name: value for name, value in os.environ.items() if name in PASSED_ON}
        own = runs.environment()
        env |= {name: own[name] for name in own if name.startswith(("OMP_", "MALLOC_"))}
        env |= {"HOME": str(self.home), "TMPDIR": str(self.home / "tmp"), "PWD": str(self.folder)}
        self.began, self.computed = time.monotonic(), 0.0
        self.output = open(self.home / "output", "w+b")
        self.process = subprocess.Popen(
            [sys.executable, *self.words],
            cwd=self.folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def spent(self) -> float:
        """Seconds of computing so far: processor time, or on CUDA all time."""
        if self.cuda:
            return time.monotonic() - self.began
        self.computed = cpu_seconds(self.process.pid) or self.computed  # it may be over
        return self.computed

    def poll(self):
        """Has the process ended? Then collects everything."""
        with self.lock:
            ended = self.process.poll() is not None
        late = time.monotonic() - self.began > self.timeout
        if ended or self.enough or late:
            self.end()
            code = self.process.returncode
            if late and not ended:
                self.why = f"it did not end within {self.timeout:g} s"
            elif ended and code and not self.why:
                self.why = f"it ended with exit code {code}: {self.last_words()}"
            try:
                self.collect()
            finally:
                self.close()

    def last_words(self) -> str:
        size = self.output.seek(0, os.SEEK_END)
        self.output.seek(max(0, size - 4000))
        lines = self.output.read().decode(errors="replace").strip().splitlines()
        return printable(lines[-1].strip() if lines else "it said nothing", 160)

    def files(self, pattern: str) -> list[Path]:
        """Regular files: to open a pipe would wait for its writer."""
        return [path for path in self.folder.glob(pattern) if path.is_file()]

    def look(self):
        """Called every tick while the process lives, by a thread that does nothing else."""

    def collect(self):
        """Take what is wanted out of the folder."""

    def end(self):
        """Kill the process and its session. After one that ended by itself, see end_strays()."""
        with self.lock:
            alive = self.process.poll() is None
        if alive:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def close(self):
        """Nothing of it stays: no process, no file."""
        if self.process:
            self.end()
            self.output.close()
        self.over = True
        if self.home:
            shutil.rmtree(self.home, ignore_errors=True)


class Training(Job):
    """A run of the script on given data. first: end it as soon as its first checkpoint is whole.

    Afterwards: lines, log (bytes), run (logs.Run), checkpoint (bytes), touched (our files that it
    changed)."""

    def __init__(self, name, script, flags, data: dict, needs=(), first=False, ranks=1, **options):
        """data: {path in the folder: tokens}. It and flags may be callables, called when the needs
        are over."""
        super().__init__(name, script, self.prepare, needs, **options)
        self.flags, self.data, self.first, self.ranks = flags, data, first, ranks
        self.lines, self.log, self.run, self.checkpoint, self.touched = [], b"", None, b"", []
        self.held, self.parsed, self.first_saved = None, 0, None
        self.first_seen = None

    def prepare(self, job):
        self.hashes = {"train_gpt.py": shards.sha256_file(self.folder / "train_gpt.py")}
        data = self.data() if callable(self.data) else self.data
        self.flags = list(self.flags() if callable(self.flags) else self.flags)
        for path, tokens in data.items():
            place = self.folder / path
            place.parent.mkdir(parents=True, exist_ok=True)
            shards.write_shard(place, tokens)
            self.hashes[path] = shards.sha256_file(place)
            shards.record(place.parent, {place.name: self.hashes[path]})
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.ranks}"]
        self.words = [*launcher * (self.ranks > 1), "train_gpt.py", *self.flags]

    def look(self):
        self.read_lines()
        found = self.checkpoints() if self.first else []
        if found and not self.held:
            with contextlib.suppress(OSError):
                self.held = open(found[0], "rb")
                self.first_saved, self.first_seen = self.spent(), time.monotonic() - self.began
        # Whole when the next one is there; the open file outlives its name
        self.enough = self.held is not None and len(found) > 1

    @property
    def losses(self) -> dict[int, str]:
        """{step: loss as written} of the lines of training batches."""
        return {line.step: line.loss for line in self.lines if line.kind == "train"}

    def checkpoints(self) -> list[Path]:
        paths = self.files("checkpoints/**/*.pt")
        return sorted(paths, key=lambda path: [int(n) for n in re.findall(r"\d+", path.stem)])

    def read_lines(self):
        for path in self.files("logs/*.txt")[:1]:
            with contextlib.suppress(OSError), open(path, "rb") as file:
                file.seek(len(self.log))  # opened anew: it may have been replaced by a longer one
                self.log += file.read()
        seen, spent = time.monotonic() - self.began, self.spent()
        source = self.script.rstrip(b"\n")
        begin = max(self.parsed, len(source) if self.log.startswith(source) else 0)
        self.parsed = self.log.rfind(b"\n") + 1
        for found in STEP.finditer(self.log, begin, self.parsed):
            step, kind, loss, ms = (part.decode(errors="replace") for part in found.groups())
            with contextlib.suppress(ValueError):
                self.lines.append(Line(seen, spent, int(step), kind, loss, float(ms) / 1000))

    def collect(self):
        self.read_lines()
        paths = self.files("logs/*.txt")
        if paths:
            self.run = logs.read_log(paths[0])[0]
        found = self.checkpoints()
        if self.held:
            self.held.seek(0)
            self.checkpoint = self.held.read()
            self.held.close()
        elif found:
            self.checkpoint = found[-1].read_bytes()
        for path, digest in self.hashes.items():
            place = self.folder / path
            if not place.is_file() or shards.sha256_file(place) != digest:
                self.touched.append(path)
        if not self.why and not self.first:
            if not paths:
                self.why = "it wrote no log into logs/"
            elif not self.run.result or self.run.val_loss is None:
                self.why = "its log has no result line, or no validation line"


class Answers(Job):
    """What the model of a training's checkpoint answers to rows of tokens, in a process that sees
    nothing else.

    answer: "logits" [N, T, V]; "position" [N, V], of one position of each row; or "losses" [N, T]
    of rows [N, T + 1]. Afterwards: value, what reduce makes of the answers."""

    def __init__(self, name, training, ask, answer, reduce, needs=(), **options):
        """ask() -> rows, sizes of batches, positions or None; called when the training is over."""
        super().__init__(name, training.script, self.prepare, (training, *needs), **options)
        self.training, self.ask, self.answer, self.reduce = training, ask, answer, reduce
        self.value, self.began_answering = None, None
        self.answering = self.answering_seen = 0.0  # seconds of computing, and by our clock

    def prepare(self, job):
        (self.folder / "model.pt").write_bytes(self.training.checkpoint)
        rows, sizes, at = self.ask()
        np.save(self.folder / "rows.npy", rows.astype(np.int64))
        device = "cuda" if self.cuda else "cpu"
        plan = dict(answer=self.answer, sizes=sizes, at=at, device=device)
        (self.folder / "plan.json").write_text(json.dumps(plan))
        shutil.copy(ANSWER, self.folder / "answer.py")
        self.words, self.shape = ["answer.py"], rows.shape

    def look(self):
        if self.files("answers.bin"):
            now = (self.spent(), time.monotonic())
            self.began_answering = self.began_answering or now
            self.answering, self.answering_seen = (
                end - start for start, end in zip(self.began_answering, now, strict=True)
            )

    def collect(self):
        if self.process.returncode == 3:
            self.why = "the script has no load_model"
        if self.why:
            return
        rows, length = self.shape
        first = dict(logits=(rows, length), position=(rows,), losses=(rows, length - 1))
        try:
            answers = np.fromfile(*self.files("answers.bin"), "<f4")
            shape = first[self.answer] + (() if self.answer == "losses" else (-1,))
            self.value = self.reduce(answers.reshape(shape))
        except (OSError, TypeError, ValueError, IndexError) as error:
            self.why = f"load_model's model gives no logits [B, T, V] ({printable(error)})"


def run_all(jobs: list[Job], at_once: int, say=lambda text: None):
    """Run the jobs, `at_once` at a time, each when all that it needs are over; one whose needs
    failed fails with them."""
    adopt_orphans()
    before = children()
    waiting, active, over = list(jobs), [], threading.Event()
    watch = threading.Thread(target=look_at, args=(active, over), daemon=True)
    watch.start()
    try:
        while waiting or active:
            for job in list(waiting):
                failed = [need for need in job.needs if need.over and need.why]
                if failed:
                    job.over, job.why = True, failed[0].why
                    waiting.remove(job)
                elif len(active) < at_once and all(need.over for need in job.needs):
                    waiting.remove(job)
                    active.append(job)
                    job.start()
            for job in list(active):
                job.poll()
                if job.over:
                    active.remove(job)
                    job.left = end_strays(before | {other.process.pid for other in active})
                    if job.ok:
                        job.after()
                    say(f"{job.name}: {job.why or 'done'} ({time.monotonic() - job.began:.0f} s)")
            time.sleep(TICK)
    finally:
        over.set()
        watch.join()
        for job in active:
            job.close()
        end_strays(before)


def look_at(active: list[Job], over: threading.Event):
    """Stamp what the active jobs write, whatever else we are busy with."""
    while not over.wait(TICK):
        for job in list(active):
            with job.lock, contextlib.suppress(OSError):
                if job.process and job.process.returncode is None:
                    job.look()


def end_strays(known: set[int]) -> list[str]:
    """Kill the processes that were left behind, in whatever session; returns their commands."""
    end = time.monotonic() + 1.0  # helpers of torch may need a moment to go
    names = []
    while strays := children() - known:
        for pid in strays:
            with contextlib.suppress(OSError, ChildProcessError):
                if os.waitpid(pid, os.WNOHANG) == (0, 0) and time.monotonic() > end:
                    words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
                    names.append(printable(words.decode(errors="replace"), 80))
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
        time.sleep(TICK)
    return names
