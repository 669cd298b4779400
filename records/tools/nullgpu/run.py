"""One run of a script on the stand-in device, in a folder of its own, on random tokens."""

import array
import json
import math
import os
import random
import re
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

from records.tools.command import BadInput, write_atomic
from records.tools.nullgpu.environment import Environment
from records.tools.runs import launch, stop

OBSERVE = Path(__file__).resolve().parent / "observe.py"
RUNS_KEPT = 10  # outputs of the latest runs, to read after a failure
STEPS = 120  # more than any preset's last stage or cool-down in updates has
VAL_EVERY = 30
DOCUMENTS = 2000  # of random data, over and over
MEDIAN, SIGMA = 400, 1.1  # of their lengths in tokens, log-normal: about FineWeb's
ERROR = re.compile(r"[\w.]*(Error|Exception|Interrupt|Unsupported)\b.*:|train_gpt\.py: ")
TORCH_LOG = re.compile(r"\[?[VIWE]\d{4} ")  # as glog writes: severity, month and day


def values_of(flags: list[str], name: str) -> list[str]:
    """The words that follow a flag, up to the next one."""
    values = []
    for word in flags[flags.index(name) + 1 :] if name in flags else []:
        if word.startswith("--"):
            break
        values.append(word)
    return values


def random_shard(folder: Path, vocabulary: int, tokens: int) -> Path:
    """A shard of random tokens in documents, the same page over and over, made once. As many
    different ones in a row as English has, or a few more: 4,600 in 16,384 tokens, 10,200 in
    49,152. Evenly drawn ones would be more than a sampled softmax holds."""
    path = folder / f"words_{vocabulary}_{tokens}.bin"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        header = array.array("i", [20240520, 1, tokens, *[0] * 253])  # as in llm.c
        draw = random.Random(0)
        page = array.array("H")
        for _ in range(DOCUMENTS):
            length = max(20, int(draw.lognormvariate(math.log(MEDIAN), SIGMA)))
            page.append(vocabulary - 1)  # the mark of a document
            drawn = (draw.random() ** 1.5 for _ in range(length - 1))
            page.extend(int((vocabulary - 1) ** power) for power in drawn)
        pages = -(-tokens // len(page))
        body = (page.tobytes() * pages)[: 2 * tokens]
        write_atomic(path, header.tobytes() + body)
    return path


def all_flags(flags: list[str], data: Path) -> list[str]:
    """The user's flags, and where there are none, those of a short run on random tokens."""
    default_vocabulary = 257 if "laptop" in values_of(flags, "--preset") else 50257
    try:
        vocabulary = int((values_of(flags, "--vocab_size") or [default_vocabulary])[0])
        steps = int((values_of(flags, "--steps") or [STEPS])[0])
        batch = max([2**19, *map(int, values_of(flags, "--batch_tokens"))])
        val_tokens = max([10 * 2**20, *map(int, values_of(flags, "--val_tokens"))])
    except ValueError as error:
        raise BadInput(f"a flag of the script: {error}") from None
    added = {"--steps": steps, "--val_every": VAL_EVERY}
    if "--galore" in flags:
        added["--galore_interval"] = 4  # so that bases are renewed while we look
    if "--train_files" not in flags:
        added["--train_files"] = random_shard(data, vocabulary, batch * steps + 1)
    if "--val_files" not in flags:
        added["--val_files"] = random_shard(data, vocabulary, val_tokens + 1)
    extra = [str(word) for item in added.items() if item[0] not in flags for word in item]
    return [*flags, *extra]


def absolute(flags: list[str]) -> list[str]:
    """The script runs in a folder of its own, so relative globs of files are taken from here."""
    names = ("--train_files", "--val_files", "--resume", "--checkpoint")
    return [
        os.path.abspath(word) if before in names and not word.startswith("--") else word
        for before, word in zip(["", *flags], flags, strict=False)
    ]


class Run:
    """One run of the script on the stand-in.

    code: its exit code, None when it took too long; output: what it printed; log: the lines of its
    log after the source; seen: what observe.py reports, {} if the script left no chance for that.
    """

    def __init__(self, options, environment: Environment):
        self.folder = new_folder(environment.home / "runs")
        self.script = options.script.resolve()
        flags = self.prepare(options, environment.home / "data")
        report = self.folder / "report.json"
        command = [environment.python, OBSERVE, report, self.script, *flags]
        variables = environment.variables() | self.variables(options, environment)
        self.code = self.execute([str(word) for word in command], variables, options.timeout)
        self.output = (self.folder / "output.txt").read_text(errors="replace")
        self.seen = json.loads(report.read_text()) if report.exists() else {}
        logs = sorted(self.folder.glob("logs/*.txt"))
        text = logs[-1].read_text(errors="replace") if logs else ""
        self.log = text.partition("\n" + "=" * 100 + "\n")[2].splitlines()

    def prepare(self, options, data: Path) -> list[str]:
        """Make what the run needs. Returns its flags."""
        return all_flags(absolute(options.flags), data)

    def variables(self, options, environment: Environment) -> dict[str, str]:
        card = options.card
        settings = card.environment(options.gpus, options.memory) | dict(
            TORCHINDUCTOR_CACHE_DIR=str(environment.home / "compiled" / f"sm_{card.compute}"),
            TORCHINDUCTOR_BENCHMARK_KERNEL="1",  # kernels know how many bytes they move
            TORCHINDUCTOR_COMPILE_THREADS="1",
            TORCH_LOGS="recompiles,graph_breaks",
            PYTHONUNBUFFERED="1",
        )
        return settings | (ranks(options.gpus) if options.gpus > 1 else {})

    def execute(self, command: list[str], variables: dict, timeout: float) -> int | None:
        with open(self.folder / "output.txt", "wb") as output:
            process = launch(command, output, cwd=self.folder, env=variables)
            try:
                return process.wait(timeout)
            except subprocess.TimeoutExpired:
                return None
            finally:
                if process.poll() is None:
                    stop(process)
                shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)  # GiB of zeros

    def refuse_misuse(self):
        """Raises BadInput for what the script calls a mistake, or what this machine lacks."""
        total = self.seen.get("total", {})
        if "address space refused" in total:
            raise BadInput(
                "this machine limits address space; lift ulimit -v or vm.overcommit_memory"
            )
        if self.code is not None and self.code < 0:
            raise BadInput(
                f"the run was ended by signal {-self.code}, not by the script; run again"
            )
        if self.code == 2 and "memory refused" not in total:
            flags = f"the run has --steps {STEPS} unless you say otherwise"
            raise BadInput(f"{self.script.name} refused: {self.last_line()} ({flags})")

    def last_line(self) -> str:
        """What it said last, but for the logs of torch; of an error its first line."""
        lines = [re.sub(r"^\[rank\d+\]: ?", "", line) for line in self.output.splitlines()]
        errors = [line for line in lines if ERROR.match(line)]
        rest = [line for line in lines if line.strip() and not TORCH_LOG.match(line)]
        return (errors or rest or ["no output"])[-1].strip()

    def line_of_error(self) -> int | None:
        """The line of the script that the last traceback, or the compiler's error, names."""
        found = re.findall(rf'File "{re.escape(str(self.script))}", line (\d+)', self.output)
        return int(found[-1]) if found else None

    def result(self) -> dict:
        """The last line of its log, {} if it did not get there."""
        last = self.log[-1] if self.log else ""
        return json.loads(last) if last.startswith("{") else {}

    def config(self) -> dict:
        for line in self.log:
            if line.startswith("config: "):
                return json.loads(line.removeprefix("config: "))
        return {}


def ranks(gpus: int) -> dict[str, str]:
    """What torchrun tells rank 0 of so many."""
    one = dict(RANK="0", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    return one | dict(WORLD_SIZE=str(gpus), LOCAL_WORLD_SIZE=str(gpus))


def new_folder(parent: Path) -> Path:
    """An empty folder in `parent`, where only the newest ones stay."""
    parent.mkdir(parents=True, exist_ok=True)
    old = sorted(parent.iterdir(), key=os.path.getmtime)
    for folder in old[: max(0, len(old) - RUNS_KEPT + 1)]:
        shutil.rmtree(folder, ignore_errors=True)
    return Path(tempfile.mkdtemp(dir=parent))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
