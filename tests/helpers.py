"""What the trainer's tests share: tiny shards, a tiny config, runs in this process and in several; and the README's table of flags.

    python tests/helpers.py --update-readme     writes train_gpt.flag_table() into README.md
"""
import contextlib
import dataclasses
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
from pathlib import Path
from unittest import mock

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:  # when run as a script
    sys.path.insert(0, str(ROOT))
import train_gpt  # noqa: E402

RULE = "=" * 100
STEP = re.compile(r"step:(\d+)/(\d+) (train|val)_loss:(\d+\.\d{4}) train_time:(\d+)ms step_avg:(\d+\.\d\d)ms")
TINY = dict(preset="laptop", device="cpu", n_layer=2, n_embd=32, n_head=2, ngram=0, normuon=0.0, lr_floor=0.0, seq_len=32, batch_tokens=256,
            val_tokens=512, val_every=5, steps=12, momentum_warmup=8, lr_muon=0.02, lr_embed=0.3, lr_head=0.008, lr_scalar=0.02, cooldown=0.2856, spread_rows=True)


# ------------------------------------------------------------------------------------------------------------ shards, configs

def write_shard(path: Path, tokens, magic: int = 20240520, version: int = 1, count: int | None = None) -> Path:
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
    """Two training shards and one of validation; the first border lies within a row."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, count) in enumerate({"train_000000": 2001, "train_000001": 3000, "val_000000": 700}.items()):
        write_shard(folder / f"{name}.bin", text(count, 10 * seed + number))
    return folder


def tiny(**changes) -> train_gpt.Config:
    return dataclasses.replace(train_gpt.PRESETS["laptop"], **(TINY | changes))


def flags(folder: Path, **changes) -> list[str]:
    """The command line of a tiny run on make_data(folder); logs and checkpoints go into the folder too."""
    fields = TINY | dict(train_files=f"{folder}/train_*.bin", val_files=f"{folder}/val_*.bin", log_dir=f"{folder}/logs",
                         checkpoint_dir=f"{folder}/checkpoints") | changes
    words = []
    for name, value in fields.items():
        words += [f"--{name}" if value else f"--no_{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return words


# ----------------------------------------------------------------------------------------------------------------------- runs

@dataclasses.dataclass
class Outcome:
    """What a run left: exit code, both streams, the log's text and path, the final weights (when it came to its end)."""
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
        return dict(line.split(": ", 1) for line in self.log.rpartition(RULE)[0].rpartition(RULE + "\n")[2].splitlines())

    def losses(self) -> list[tuple[str, str, str]]:
        """(step, train or val, loss) of every step line, as written."""
        return [(m[1], m[3], m[4]) for m in map(STEP.fullmatch, self.body) if m]

    def result(self) -> dict:
        return json.loads(self.body[-1])


def run(argv: list[str]) -> Outcome:
    """train_gpt.main in this process, its streams caught, its signal handlers undone."""
    result_of, out, err, weights, paths = train_gpt.result_of, *(io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in "oe"), {}, []

    def keep_weights(ran, *rest):
        weights.update({name: p.detach().clone() for name, p in ran.model.state_dict().items()})
        return result_of(ran, *rest)

    def keep_path(log, *rest):
        make_log(log, *rest)
        paths.append(log.path)

    handlers, make_log = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}, train_gpt.Log.__init__
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), mock.patch.object(train_gpt, "result_of", keep_weights), \
                mock.patch.object(train_gpt.Log, "__init__", keep_path):
            code = train_gpt.main([str(word) for word in argv])
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
    assert len(outcome.err.splitlines()) == 1 and outcome.err.startswith("train_gpt.py: "), outcome.err
    for words in expected:
        assert words in outcome.err, (words, outcome.err)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Ranks:
    """Processes of one run, forked off a server that has imported the trainer once: an import takes longer than a tiny run.

    argvs: one command line per rank. before: called in each process, with its rank, before main."""

    def __init__(self, folder: Path, argvs: list[list[str]], before=None):
        folder.mkdir(parents=True, exist_ok=True)
        # The server is started once and keeps the environment that it finds then
        with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["train_gpt", "helpers"])
            self.folder, port = folder, free_port()
            self.processes = [context.Process(target=_rank, args=(folder, rank, len(argvs), port, argv, before), daemon=True)
                              for rank, argv in enumerate(argvs)]
            for process in self.processes:
                process.start()

    def wait(self, seconds: float = 60) -> list[Outcome]:
        """Every rank's outcome; processes that have not ended by then are killed, and their code is that of SIGKILL, -9."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        for process in self.processes:
            if process.is_alive():
                process.kill()
                process.join()
        logs = list(self.folder.glob("logs/*.txt"))
        return [Outcome(process.exitcode, *((self.folder / f"{name}{rank}").read_text() for name in ("out", "err")), path=logs[0] if logs else None)
                for rank, process in enumerate(self.processes)]

    def wait_for_step(self, step: int, seconds: float = 60):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            logs = list(self.folder.glob("logs/*.txt"))
            if logs and re.search(rf"^step:{step}/", logs[0].read_text().rpartition(RULE)[2], re.M):
                return
            assert any(process.is_alive() for process in self.processes), "the run ended before that step"
            time.sleep(0.01)
        raise AssertionError(f"no step {step} within {seconds} s")


def _rank(folder: Path, rank: int, world_size: int, port: int, argv: list[str], before):
    for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
        os.dup2(os.open(folder / f"{name}{rank}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), stream.fileno())
    if world_size > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if before:
        before(rank)
    code = train_gpt.main(argv)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def torchrun(argv: list[str], *options: str) -> subprocess.Popen:
    """The trainer under torchrun, as a user starts it; options are torchrun's."""
    command = [sys.executable, "-m", "torch.distributed.run", *options, str(ROOT / "train_gpt.py"), *argv]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


# --------------------------------------------------------------------------------------------------------------------- README

def flag_lines() -> str:
    """The table of flags that stands in README.md between <!-- flags --> and <!-- /flags -->."""
    lines = ["| flag | what it sets | default |", "|---|---|---|"]
    for name, comment, default in train_gpt.flag_table():
        shown = {"True": "on", "False": "off", "None": ""}.get(str(default), default)
        lines.append(f"| `--{name}` | {comment.replace('|', chr(92) + '|').replace('<', '&lt;')} | {f'`{shown}`' if shown != '' else ''} |")
    return "\n".join(lines)


def with_flags(readme: str) -> str:
    """The README with a fresh table. Errors: ValueError when the marks are missing."""
    new, count = re.subn(r"(<!-- flags -->\n).*?(<!-- /flags -->)", lambda found: f"{found[1]}{flag_lines()}\n{found[2]}", readme, flags=re.S)
    if count != 1:
        raise ValueError("README.md needs one <!-- flags --> ... <!-- /flags -->")
    return new


def main(argv=None) -> int:
    if (sys.argv[1:] if argv is None else argv) != ["--update-readme"]:
        print(__doc__)
        return 0
    path = ROOT / "README.md"
    new = with_flags(path.read_text(encoding="utf-8"))
    temporary = path.with_suffix(".tmp")
    temporary.write_text(new, encoding="utf-8")
    os.replace(temporary, path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
