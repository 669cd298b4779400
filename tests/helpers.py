"""What the trainer's tests share: tiny shards, a tiny config, runs in this process and in several.

A tiny config is nov2024 (the fields' defaults) made small, so that a preset may change without
changing what the tests run."""

import contextlib
import dataclasses
import functools
import gc
import io
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import train_gpt

ROOT = Path(__file__).resolve().parents[1]
RULE = "=" * 100
STEP = re.compile(
    r"step:(\d+)/(\d+) (train|val)_loss:(\S+) train_time:(\d+)ms step_avg:(\d+\.\d\d)ms"
)
TINY = dict(
    preset="nov2024",
    device="cpu",
    steps=12,
    batch_tokens=256,
    seq_len=32,
    val_tokens=512,
    val_every=5,
    spread_rows=True,
    vocab_size=257,
    n_layer=2,
    n_head=2,
    n_embd=32,
    bf16=False,
    lr_head=0.008,
    momentum_warmup=8,
)
EVERY_METHOD = {  # each in its forms, small enough for a tiny run
    "relora": dict(relora=4, relora_warm_start=3, relora_interval=4),
    "relora, adam": dict(relora=4, relora_warm_start=6, matrix_optimizer="adam"),
    "galore": dict(galore=8, galore_interval=5),
    "galore, adam": dict(galore=8, galore_interval=5, matrix_optimizer="adam"),
    "galore, 8 bit": dict(galore=8, galore_interval=5, galore_bits=8),
    "galore, per layer": dict(galore=8, galore_interval=5, galore_per_layer=True, galore_bits=8),
    "lawa": dict(lawa=3, lawa_interval=2),
    "lawa, replace": dict(lawa=2, lawa_interval=3, lawa_mode="replace"),
    "supar": dict(sparsity=0.5, mup_base_width=16),
    "relora, lawa": dict(relora=4, relora_warm_start=3, relora_interval=4, lawa=2, lawa_interval=3),
    "supar, lawa": dict(sparsity=0.5, lawa=2, lawa_interval=3),
}
CPU = train_gpt.Runtime(torch.device("cpu"))


# -------------------------------------------------------------------------------- shards, configs
def write_shard(path: Path, tokens, magic=20240520, version=1, count=None) -> Path:
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(tokens, "<u2").tobytes())
    return path


def text(count: int, seed: int) -> np.ndarray:
    """Tokens that a model can learn: small steps over an alphabet of 64, documents of 50."""
    tokens = np.random.default_rng(seed).integers(1, 3, count).cumsum() % 64
    tokens[::50] = 256
    return tokens


def make_data(folder: Path, seed: int = 1) -> Path:
    """Two training shards, the first no whole number of rows long, and one of validation."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"train_000000": 2001, "train_000001": 3000, "val_000000": 700}
    for number, (name, count) in enumerate(sizes.items()):
        write_shard(folder / f"{name}.bin", text(count, 10 * seed + number))
    return folder


def tiny(**changes) -> train_gpt.Config:
    with mock.patch.object(train_gpt, "idle_flags", lambda c: {}):  # TINY has flags of all rules
        return train_gpt.parse_config(words(**TINY | changes), "nov2024")


def words(**fields) -> list[str]:
    """Fields as a command line."""
    line = []
    for name, value in fields.items():
        if isinstance(value, bool):
            line.append(f"--{name}" if value else f"--no_{name}")
        elif isinstance(value, list | tuple):
            line += [f"--{name}", *map(str, value)]
        elif value is not None:
            line += [f"--{name}", str(value)]
    return line


def flags(folder: Path, **changes) -> list[str]:
    """The command line of a tiny run on make_data(folder); its files go into the folder, too."""
    files = dict(
        train_files=f"{folder}/train_*.bin",
        val_files=f"{folder}/val_*.bin",
        log_dir=f"{folder}/logs",
        checkpoint_dir=f"{folder}/checkpoints",
    )
    fields = TINY | files | changes
    if fields.get("matrix_optimizer") == "adam":
        del fields["momentum_warmup"]  # would do nothing
    return words(**fields)


# ------------------------------------------------------------------------------------------- runs
@dataclasses.dataclass
class Outcome:
    """What a run left: exit code, both streams, the log's path, the final weights (if it ended)."""

    code: int
    out: str = ""
    err: str = ""
    path: Path | None = None
    weights: dict | None = None

    @property
    def log(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @property
    def body(self) -> list[str]:
        """The log's lines after its header."""
        return self.log.rpartition(RULE + "\n")[2].splitlines()

    def facts(self) -> dict[str, str]:
        table = self.log.rpartition(RULE)[0].rpartition(RULE + "\n")[2]
        return dict(line.split(": ", 1) for line in table.splitlines())

    def losses(self) -> list[tuple[str, str, str]]:
        """(step, train or val, loss) of every step line, as written."""
        return [(m[1], m[3], m[4]) for m in map(STEP.fullmatch, self.body) if m]

    def norms(self) -> dict[tuple[str, str], list[float]]:
        """{(step, first parameter): norms of gradient, update, weights} by --log_norms."""
        rows = [line.split() for line in self.body if line.startswith("norms:")]
        return {
            (step[6:], name): [float(word.partition(":")[2]) for word in words]
            for step, _, name, *words in rows
        }

    def result(self) -> dict:
        return json.loads(self.body[-1])


def run(argv: list[str], trainer=train_gpt) -> Outcome:
    """The trainer's main in this process, its streams caught, its signal handlers undone."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in "oe")
    result_of, make_log = trainer.result_of, trainer.Log.__init__
    weights, paths = {}, []

    def keep_weights(ran, *rest):
        weights.update({name: t.clone() for name, t in ran.model.state_dict().items()})
        return result_of(ran, *rest)

    def keep_path(log, *rest):
        make_log(log, *rest)
        paths.append(log.path)

    numbers = (*train_gpt.STOP_SIGNALS, *train_gpt.SAVE_SIGNALS)
    handlers = {number: signal.getsignal(number) for number in numbers}
    with (
        warnings.catch_warnings(action="ignore"),  # torchrun's `record` wants a real stderr
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(trainer, "result_of", keep_weights),
        mock.patch.object(trainer.Log, "__init__", keep_path),
        # of the youngest alone: a look at all that pytest holds takes a third of a run
        mock.patch.object(gc, "collect", functools.partial(gc.collect, 0)),
    ):
        try:
            code = trainer.main([str(word) for word in argv])
        except SystemExit as ended:  # --help
            code = ended.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    texts = [stream.buffer.getvalue().decode(errors="replace") for stream in (out, err)]
    return Outcome(code, *texts, path=paths[0] if paths else None, weights=weights or None)


def check_refused(outcome: Outcome, *expected: str):
    """One line on stderr that holds the expected words, exit code 2."""
    assert outcome.code == 2, (outcome.code, outcome.err)
    assert outcome.err.startswith("train_gpt.py: "), outcome.err
    assert len(outcome.err.splitlines()) == 1, outcome.err
    for part in expected:
        assert part in outcome.err, (part, outcome.err)


def same(a: dict, b: dict) -> bool:
    """Two dictionaries of tensors are equal, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@contextlib.contextmanager
def at_step(step: int, act):
    """Call act(run) after update number `step`, 1-based, of training."""
    update = train_gpt.step_optimizers

    def update_and_act(run):
        update(run)
        if run.clock and run.step + 1 == step:  # not the warm-up's
            act(run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "step_optimizers", update_and_act)
        yield


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Ranks:
    """Processes of one run, forked off a server that has imported the trainer once: an import takes
    longer than a tiny run.

    argvs: a command line per rank. before: called in each process, with its rank, before main."""

    def __init__(self, folder: Path, argvs: list[list[str]], before=None):
        folder.mkdir(parents=True, exist_ok=True)
        # the server is started once and keeps the environment that it finds then
        with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["train_gpt", "helpers"])
            self.folder, port = folder, free_port()
            self.processes = []
            for rank, argv in enumerate(argvs):
                args = (folder, rank, len(argvs), port, argv, before)
                self.processes.append(context.Process(target=_rank, args=args, daemon=True))
                self.processes[-1].start()

    def wait(self, seconds: float = 60) -> list[Outcome]:
        """Every rank's outcome; what has not ended by then is killed: -9, the code of SIGKILL."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        for process in self.processes:
            if process.is_alive():
                process.kill()
                process.join()
        path = next(self.folder.glob("logs/*.txt"), None)
        outcomes = []
        for rank, process in enumerate(self.processes):
            texts = [(self.folder / f"{name}{rank}").read_text() for name in ("out", "err")]
            outcomes.append(Outcome(process.exitcode, *texts, path=path))
        return outcomes


def _rank(folder: Path, rank: int, world_size: int, port: int, argv: list[str], before):
    for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
        file = os.open(folder / f"{name}{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(file, stream.fileno())
    if world_size > 1:
        numbers = dict(RANK=rank, WORLD_SIZE=world_size, LOCAL_RANK=rank, MASTER_PORT=port)
        os.environ.update({name: str(number) for name, number in numbers.items()})
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    if before:
        before(rank)
    code = train_gpt.main(argv)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def torchrun(argv: list[str], *options: str, script: Path = ROOT / "train_gpt.py"):
    """The trainer under torchrun, as a user starts it; options are torchrun's. A Popen."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *options, str(script), *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def wait_for_step(folder: Path, step: int, seconds: float = 60):
    """Until the only log under a folder holds that step."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        logs = list(folder.glob("logs/*.txt"))
        if logs and f"\nstep:{step}/" in logs[0].read_text().rpartition(RULE)[2]:
            return
        time.sleep(0.02)
    raise AssertionError(f"no step {step} within {seconds} s")
