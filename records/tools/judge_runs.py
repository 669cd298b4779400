"""The processes of a judged script: each in a folder and a session of its own, its log read while
it grows and stamped by our clock. What they leave is taken into memory; the folder goes."""

import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
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
PASSED_ON += ("HOME", "TMPDIR", "CUDA_VISIBLE_DEVICES", "CUDA_HOME", "NVIDIA_VISIBLE_DEVICES")
SET = ("OMP_", "MALLOC_")  # by runs.environment()
STEP = re.compile(
    rb"^step:(\d+)/\d+ (?:.* )?(train|val)_loss:(\S+) (?:.* )?train_time:([\d.]+)ms", re.M
)
ANSWER = Path(__file__).with_name("judge_answer.py")
NOT_NEEDED = "not needed"
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


def stat(pid) -> list[str]:
    """What Linux tells of a process, from its state on; empty where there is none."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return []


def children() -> set[int]:
    """Processes whose parent is this one."""
    pids = [path.name for path in Path("/proc").glob("[0-9]*")]
    return {int(pid) for pid in pids if stat(pid)[1:2] == [str(os.getpid())]}


class Job:
    """One process of the script, started when all `needs` are over.

    wanted() says then whether there is any use for it; after() is called when it has ended well."""

    def __init__(self, name, script: bytes, needs=(), wanted=None, cuda=False, timeout=3600.0):
        self.name, self.script, self.needs, self.wanted = name, script, needs, wanted
        self.cuda, self.timeout = cuda, timeout
        self.process, self.folder, self.over, self.why, self.left = None, None, False, "", []
        self.after = lambda: None
        self.lock, self.enough = threading.Lock(), False  # enough: nothing more is wanted of it
        self.computed, self.keep = 0.0, False  # keep its folder for another run

    @property
    def ok(self) -> bool:
        return self.over and not self.why

    def refused(self) -> str:
        """Why it is not to be started, if so."""
        failed = [need.why for need in self.needs if need.why]
        return failed[0] if failed else NOT_NEEDED if self.wanted and not self.wanted() else ""

    def start(self):
        if not self.folder:
            home = Path.home()  # nobody's clone is in a folder for temporary files
            place = home if os.access(home, os.W_OK) else None
            self.folder = Path(tempfile.mkdtemp(prefix="speedrun_", dir=place))
        (self.folder / "train_gpt.py").write_bytes(self.script)
        words = self.prepare()
        own = runs.environment()
        env = {name: own[name] for name in own if name in PASSED_ON or name.startswith(SET)}
        env |= {"PWD": str(self.folder)} | self.own_places()
        self.began, self.output = time.monotonic(), tempfile.TemporaryFile()
        self.process = runs.launch(words, self.output, cwd=self.folder, env=env)

    def own_places(self) -> dict[str, str]:
        return {}

    def spent(self) -> float:
        """Seconds of computing so far, with that of children it waited for; on CUDA all time."""
        if self.cuda:
            return time.monotonic() - self.began
        ticks = sum(map(int, stat(self.process.pid)[11:15]))
        self.computed = ticks / os.sysconf("SC_CLK_TCK") or self.computed  # it may be over
        return self.computed

    def poll(self):
        """Has the process ended? Then collects everything."""
        with self.lock:
            ended = self.process.poll() is not None
        late = time.monotonic() - self.began > self.timeout
        if not (ended or self.enough or late):
            return
        self.end()
        code = self.process.returncode
        if late and not ended:
            self.why = f"it did not end within {self.timeout:g} s"
        elif ended and code:
            self.why = f"it ended with exit code {code}: {self.last_words()}"
        try:
            self.collect()
        finally:
            self.over = True

    def last_words(self) -> str:
        self.output.seek(max(0, self.output.seek(0, os.SEEK_END) - 4000))
        lines = self.output.read().decode(errors="replace").strip().splitlines()
        return printable(lines[-1].strip() if lines else "it said nothing", 160)

    def files(self, pattern: str) -> list[Path]:
        """Regular files: to open a pipe would wait for its writer."""
        return [path for path in self.folder.glob(pattern) if path.is_file()]

    def look(self):
        """Called every tick while the process lives, by a thread that does nothing else."""

    def end(self):
        """Kill the process and its session. After one that ended by itself, see end_strays()."""
        with self.lock:
            alive = self.process and self.process.poll() is None
        if alive:
            runs.stop(self.process, grace=0)

    def close(self):
        """Nothing of it stays: no process, no file."""
        self.end()
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)

    def fill(self, files: dict):
        """Shards of these tokens, {path in the folder: tokens}."""
        for path, tokens in files.items():
            place = self.folder / path
            place.parent.mkdir(parents=True, exist_ok=True)
            shards.write_shard(place, tokens)
            shards.record(place.parent, {place.name: shards.sha256_file(place)})


class Training(Job):
    """A run of the script. first: step of whose checkpoint alone there is use, so that the run is
    ended as soon as that is whole; 0: the last. after_run: run it in the folder that this one left.
    alone: with a home of its own.

    Afterwards: lines, log (bytes), run (logs.Run), checkpoint (bytes), checkpoints (how many),
    touched (did it change its own file?)."""

    def __init__(
        self, name, script, flags, files, first=0, after_run=None, alone=False, ranks=1, **more
    ):
        """flags() -> words; files() -> {path in the folder: tokens}; called when the needs are
        over."""
        super().__init__(name, script, **more)
        self.flags, self.data, self.first, self.ranks = flags, files, first, ranks
        self.after_run, self.alone = after_run, alone
        self.lines, self.log, self.run, self.checkpoint, self.touched = [], b"", None, b"", False
        self.held, self.parsed, self.checkpoints = None, 0, 0

    def prepare(self):
        self.fill(self.data())
        self.flags = [str(word) for word in self.flags()]
        for older in self.files("logs/*.txt"):  # which after_run left
            older.unlink()
        return runs.trainer("train_gpt.py", self.flags, self.ranks)

    def start(self):
        if self.after_run:
            self.folder = self.after_run.folder
        super().start()

    def own_places(self):
        return dict.fromkeys(("HOME", "TMPDIR"), str(self.folder)) if self.alone else {}

    def look(self):
        self.read_lines()
        found = self.saved() if self.first else {}
        if self.first in found and not self.held:
            with contextlib.suppress(OSError):
                self.held = open(found[self.first], "rb")
        # Whole when the next one is there; the open file outlives its name
        self.enough = self.held is not None and max(found, default=0) > self.first

    @property
    def losses(self) -> dict[int, str]:
        """{step: loss as written} of the lines of training batches."""
        return {line.step: line.loss for line in self.lines if line.kind == "train"}

    def saved(self) -> dict[int, Path]:
        """{step: its checkpoint}, by the last number in its name."""
        paths = self.files("checkpoints/**/*.pt")
        return {int(([0] + re.findall(r"\d+", path.stem))[-1]): path for path in paths}

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
                float(loss)
                self.lines.append(Line(seen, spent, int(step), kind, loss, float(ms) / 1000))

    def collect(self):
        self.read_lines()
        found = self.saved()
        self.checkpoints = len(found)
        if self.held:
            with self.held:
                self.checkpoint = self.held.read()
        elif self.first:
            self.why = self.why or f"no checkpoint of step {self.first} came to light"
        elif found:
            self.checkpoint = found[max(found)].read_bytes()
        left = self.files("train_gpt.py")
        self.touched = not left or left[0].read_bytes() != self.script
        if self.why or self.first:
            return
        written = self.files("logs/*.txt")
        self.run = logs.read_log(written[0])[0] if written else None
        if not written:
            self.why = "it wrote no log into logs/"
        elif not self.run.result or self.run.val_loss is None:
            self.why = "its log has no result line, or no validation line"


class Answers(Job):
    """What the models of some trainings answer to rows of tokens, in a process that sees nothing
    else: a loss of each target, or with `at` the logits [V] at one position of each row.

    Afterwards: value {training: [N, T] or [N, V]}, parameters {training: {name: sha256}}."""

    def __init__(self, name, script, trainings, ask, files, **more):
        """ask(training) -> rows, sizes of batches, positions or None; files(): as of a Training."""
        super().__init__(name, script, needs=trainings, **more)
        self.trainings, self.ask, self.data = trainings, ask, files
        self.value, self.parameters, self.began_answering = {}, {}, None
        self.answering = 0.0  # seconds of computing

    def refused(self):
        failed = [run.why for run in self.trainings if run.why]
        return failed[0] if len(failed) == len(self.trainings) else ""

    def prepare(self):
        self.fill(self.data())
        self.asked, plan = [run for run in self.trainings if run.ok], []
        for number, run in enumerate(self.asked):
            rows, sizes, at = self.ask(run)
            (self.folder / f"{number}.pt").write_bytes(run.checkpoint)
            np.save(self.folder / f"{number}.npy", rows.astype(np.int64))
            plan.append(dict(sizes=sizes, at=at, device="cuda" if self.cuda else "cpu"))
        (self.folder / "plan.json").write_text(json.dumps(plan))
        shutil.copy(ANSWER, self.folder / "answer.py")
        return [sys.executable, "answer.py"]

    def look(self):
        if self.files("*.answers"):
            now = self.spent()
            self.began_answering = self.began_answering or now
            self.answering = now - self.began_answering

    def collect(self):
        if self.process.returncode == 3:
            self.why = "the script has no load_model"
        if self.why:
            return
        try:
            for number, run in enumerate(self.asked):
                rows, _, at = self.ask(run)
                shape = (len(rows), rows.shape[1] - 1) if at is None else (len(rows), -1)
                answers = np.fromfile(*self.files(f"{number}.answers"), "<f4")
                self.value[run] = answers.reshape(shape)
                self.parameters[run] = json.loads((self.folder / f"{number}.json").read_text())
        except (OSError, TypeError, ValueError) as error:
            self.why = f"load_model's model gives no logits [B, T, V] ({printable(error)})"


def run_all(jobs: list[Job], at_once: int, say, settled):
    """Run the jobs in their order, `at_once` at a time, until settled(), which is asked after each,
    says that the rest is not needed."""
    adopt_orphans()
    before = children()
    waiting, active, over = list(jobs), [], threading.Event()
    watch = threading.Thread(target=look_at, args=(active, over), daemon=True)
    watch.start()
    try:
        while waiting or active:
            for job in [job for job in waiting if all(need.over for need in job.needs)]:
                why = job.refused()
                if why or len(active) < at_once:
                    waiting.remove(job)
                    job.why, job.over = why, bool(why)
                if not why and job not in waiting:
                    active.append(job)
                    job.start()
            for job in list(active):
                job.poll()
                if job.over:
                    active.remove(job)
                    job.left = end_strays(before | {other.process.pid for other in active})
                    if job.ok:
                        job.after()
                    if not job.keep:
                        job.close()
                    say(f"{job.name}: {job.why or 'done'} ({time.monotonic() - job.began:.0f} s)")
                    if settled():
                        return
            time.sleep(TICK)
    finally:
        over.set()
        watch.join()
        for job in jobs:
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
