"""setup/launch.py: which data, how many processes, and how a run of several processes ends."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

import train_gpt
from data import check, fineweb, laptop, shards
from setup import launch

ROOT = Path(__file__).resolve().parents[1]
ALONE = ["--standalone", "--local_addr=127.0.0.1"]


class Executed(Exception):
    """os.execv was called."""


@pytest.fixture
def start(monkeypatch, capfd):
    """start(*flags, gpus=0, **environment): launch.main with nothing fetched and nothing started.

    Returns what was called, in order: ("laptop", flags), ("fineweb", flags), ("check", globs), then
    ("exec", command) or ("torchrun", its flags, the trainer's), the exit code, and stderr.
    """

    def start(*flags, gpus=0, cores=8, data_exit=0, **environment):
        calls, compilers = [], []

        def call(name, result=0):
            return lambda *args: calls.append((name, *args)) or result

        def execv(path, command):
            calls.append(("exec", command[1:]))
            raise Executed

        monkeypatch.setattr(launch, "usable_gpus", lambda: gpus)
        monkeypatch.setattr(train_gpt, "check_compiler", compilers.append)
        monkeypatch.setattr(launch, "usable_cores", lambda: cores)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
        monkeypatch.setattr(laptop, "main", call("laptop", data_exit))
        monkeypatch.setattr(fineweb, "main", call("fineweb", data_exit))
        monkeypatch.setattr(check, "check_run", call("check"))
        monkeypatch.setattr(launch, "torchrun", call("torchrun"))
        monkeypatch.setattr(os, "execv", execv)
        monkeypatch.setattr(os, "environ", dict(environment))
        monkeypatch.chdir("/")
        monkeypatch.setattr(sys, "argv", ["launch.py"])
        try:
            code = launch.main(list(flags))
        except Executed:
            code = None
        out, err = capfd.readouterr()
        return SimpleNamespace(
            calls=calls, compilers=compilers, code=code, out=out, err=err, env=os.environ
        )

    return start


def names(started) -> list[str]:
    return [call[0] for call in started.calls]


def test_a_cpu_builds_the_laptop_corpus_and_becomes_the_trainer(start):
    started = start("--steps", "50", "--log_dir", "two words")
    laptop_call, check_call, exec_call = started.calls
    assert laptop_call == ("laptop", [])
    globs = ["data/laptop/laptop_train_*.bin", "data/laptop/laptop_val_*.bin"]
    assert check_call == ("check", globs, 257)
    assert exec_call == ("exec", ["train_gpt.py", "--steps", "50", "--log_dir", "two words"])
    assert Path.cwd() == ROOT  # wherever it was started from: the globs are relative
    assert started.env["MALLOC_MMAP_MAX_"] == "0" and "OMP_NUM_THREADS" not in started.env
    assert started.env["OMP_WAIT_POLICY"] == "PASSIVE"


def test_threads_are_no_more_than_a_quota_allows(start):
    assert start(cores=2).env["OMP_NUM_THREADS"] == "2"
    assert start(cores=2, NPROC="2").env["OMP_NUM_THREADS"] == "1"
    assert start(cores=1, NPROC="2").env["OMP_NUM_THREADS"] == "1"


def test_values_that_the_user_has_set_stay(start):
    started = start(MALLOC_TOP_PAD_="7", OMP_NUM_THREADS="5", NPROC="2", OMP_WAIT_POLICY="ACTIVE")
    assert started.env["OMP_WAIT_POLICY"] == "ACTIVE"
    assert started.env["MALLOC_TOP_PAD_"] == "7" and started.env["MALLOC_MMAP_MAX_"] == "0"
    assert started.env["OMP_NUM_THREADS"] == "5"


def test_gpus_fetch_fineweb_and_start_a_process_each(start):
    started = start("--steps", "50", gpus=2)
    # 50 steps need 26M tokens: one shard of 100M
    assert names(started) == ["fineweb", "check", "torchrun"] and started.calls[0][1] == ["1"]
    assert started.calls[2][1:] == ([*ALONE, "--nproc_per_node=2"], ["--steps", "50"])
    assert started.env["OMP_NUM_THREADS"] == "3" and "MALLOC_MMAP_MAX_" not in started.env


@pytest.mark.parametrize(
    "batch_tokens, epochs, number",
    [
        ((524_288,), 1, 17),
        ((131_072, 262_144, 393_216), 1, 9),
        ((524_288,), 2, 9),
        ((25_000_000,), 1, 811),
    ],
)
def test_as_many_shards_as_the_run_needs(batch_tokens, epochs, number):
    # 3242 steps: 1081, 1081 and 1080 of them in stages, 850M tokens in all
    flags = ["--batch_tokens", *map(str, batch_tokens), "--seq_len", "1"]
    config = train_gpt.parse_config(flags + ["--epochs_allowed", str(epochs)], "nov2024")
    assert launch.fineweb_shards(config) == number


@pytest.mark.parametrize(
    "flags, gpus, called",
    [
        ("--preset laptop", 1, ["laptop", "check", "exec"]),
        ("--preset=gpt2_small", 0, ["fineweb", "check", "exec"]),
        ("--preset gpt2_small --train_files x.bin", 0, ["check", "exec"]),
        ("--train_files=x.bin", 1, ["check", "exec"]),
        ("--generate 20 --checkpoint a.pt", 4, ["exec"]),
        ("--device cpu", 4, ["fineweb", "check", "exec"]),
    ],
)
def test_data_follows_the_preset(start, flags, gpus, called):
    assert names(start(*flags.split(), gpus=gpus)) == called


def test_bad_flags_and_bad_data_end_it(start):
    started = start("--bad", gpus=8)
    assert (started.code, started.calls) == (2, []) and started.err.startswith("train_gpt.py: ")
    assert started.err.count("\n") == 1
    started = start(data_exit=2)
    assert (started.code, names(started)) == (2, ["laptop"])


@pytest.mark.parametrize(
    "environment, message",
    [
        (dict(NPROC="0"), "NPROC=0: must be a whole number from 1 to 16"),
        (dict(NPROC="17"), "NPROC=17: must be a whole number from 1 to 16"),  # rows of a batch
        (dict(NPROC="two"), "NPROC=two: must"),
        (dict(NPROC="9" * 20), f"NPROC={'9' * 20}: must"),
        (dict(NPROC="9" * 5000), f"NPROC={'9' * 5000}: must"),
        (dict(NPROC="-1"), "NPROC=-1: must"),
        (dict(NNODES="two"), "NNODES=two: must"),
        (dict(NNODES="2", MASTER_ADDR="10.0.0.1"), "NNODES=2 needs NODE_RANK and MASTER_ADDR"),
        (dict(NNODES="2", NODE_RANK="1"), "NNODES=2 needs NODE_RANK and MASTER_ADDR"),
        (dict(NNODES="2", NODE_RANK="2", MASTER_ADDR="a"), "NODE_RANK=2: must be"),
        (dict(NNODES="2", NODE_RANK="1", MASTER_ADDR="a", MASTER_PORT="x"), "MASTER_PORT=x: must"),
    ],
)
def test_bad_environment_is_one_line(start, environment, message):
    started = start(**environment)
    assert (started.code, started.calls) == (2, [])
    assert started.err.startswith(f"launch.py: {message}") and started.err.count("\n") == 1


@pytest.mark.parametrize(
    "flags, gpus, environment, counts",
    [
        ("--preset gpt2_small", 8, dict(NPROC="3"), "1 or 2 or 4 or 8"),
        ("--preset gpt2_small", 6, {}, "1 or 2 or 4"),
        ("--preset gpt2_small", 8, dict(NNODES="2"), "1 or 2 or 4"),
        ("--batch_tokens 1280 2560", 0, dict(NPROC="4"), "1 or 2"),
    ],
)
def test_processes_that_do_not_divide_a_batch(start, flags, gpus, environment, counts):
    """Refused before anything is fetched, with the numbers that do."""
    started = start(*flags.split(), gpus=gpus, **environment)
    assert (started.code, started.calls) == (2, []) and started.err.count("\n") == 1
    assert started.err.endswith(f"set NPROC to {counts}\n"), started.err


def test_another_launchers_environment_is_left_out(start):
    cluster = dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="a", MASTER_PORT="1", LOCAL_RANK="0")
    for processes, last in ((1, "exec"), (2, "torchrun")):
        started = start(NPROC=str(processes), TORCHELASTIC_ERROR_FILE="x", **cluster)
        assert names(started)[-1] == last
        assert not {*cluster, "TORCHELASTIC_ERROR_FILE"} & started.env.keys()
        assert started.out.count("RANK and WORLD_SIZE are not used") == 1
    assert start(MASTER_ADDR="a").out == ""


def test_fetch_and_no_more(start):
    started = start("fetch", "--steps", "50", gpus=8)
    assert (started.code, names(started)) == (0, ["fineweb", "check"])
    assert started.calls[0][1] == ["1"]


# Cards that are there, and cards that torch can use


@pytest.fixture
def cards(monkeypatch, tmp_path):
    """cards(devices, probe's stdout, probe's stderr): launch.usable_gpus on such a machine."""

    def cards(devices, out="", err="", known=False, **environment):
        found = {"/dev/nvidia[0-9]*": devices}
        monkeypatch.setattr(launch.glob, "glob", lambda pattern: found.get(pattern, []))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: known)
        monkeypatch.setattr(os, "environ", environment)
        program = f"import sys; print({out!r}); sys.exit({err!r} or 0)"
        monkeypatch.setattr(launch, "PROBE", program)
        return launch.usable_gpus()

    return cards


def test_cards_are_counted_by_what_they_compute(cards):
    assert cards([]) == 0
    assert cards(["/dev/nvidia0", "/dev/nvidia1"], "2.13.0 2") == 2
    assert cards([], "2.13.0 1", known=True) == 1  # one that is no NVIDIA card
    assert cards(["/dev/nvidia0"], err="not asked", CUDA_VISIBLE_DEVICES="") == 0


@pytest.mark.parametrize(
    "out, err, why",
    [
        ("2.13.0+cpu 0", "", "torch 2.13.0+cpu finds none: it is built without CUDA"),
        ("", "RuntimeError: The NVIDIA driver on your system is too old", "driver on your system"),
    ],
)
def test_cards_that_torch_cannot_use(cards, monkeypatch, out, err, why):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(shards.BadInput, match=re.escape(why)):
        cards(["/dev/nvidia0"], out, err)
    # nothing is fetched, but a run on the CPU needs no card
    monkeypatch.setattr(os, "execv", lambda *words: None)
    assert launch.main(["--steps", "20"]) == 2
    config, gpus = launch.read_config(["--device", "cpu"])
    assert (config.preset, gpus) == ("laptop", 0)


def test_no_compiler_is_one_line_before_the_fetch(start, monkeypatch, capfd, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert launch.main(["--compile"]) == 2
    assert capfd.readouterr().err.startswith("train_gpt.py: torch.compile needs a compiler (g++): ")

    assert start(gpus=1).compilers == [True] and start("--compile").compilers == [False]
    for words, gpus in ((["--no_compile"], 1), ([], 0), (["fetch"], 1)):
        assert not start(*words, gpus=gpus).compilers


def test_more_processes_than_gpus_are_refused(start):
    assert "NPROC=5: must be a whole number from 1 to 4" in start(gpus=4, NPROC="5").err
    assert names(start(gpus=4, NPROC="1"))[-1] == "exec"


def test_several_machines(start):
    nodes = dict(NNODES="2", NODE_RANK="1", MASTER_ADDR="10.0.0.1", MASTER_PORT="777")
    flags = ["--nnodes=2", "--node_rank=1", "--master_addr=10.0.0.1", "--master_port=777"]
    assert start(**nodes).calls[-1] == ("torchrun", [*flags, "--nproc_per_node=1"], [])
    # torchrun reads its own variables itself
    torchruns = {f"PET_{name}": value for name, value in nodes.items()}
    assert start(**torchruns).calls[-1] == ("torchrun", ["--nproc_per_node=1"], [])


# How a run of several processes ends


def failed(exitcode: int, timestamp: int) -> ProcessFailure:
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=exitcode, error_file="")
    failure.timestamp = timestamp
    return failure


@pytest.mark.parametrize(
    "failures, culprit",
    [
        ([(1, 10), (1, 12)], 0),
        ([(1, 12), (1, 10)], 1),
        ([(1, 10), (-signal.SIGKILL, 11)], 1),  # its peers lost the connection
        ([(1, 10), (2, 10)], 1),
        ([(-signal.SIGTERM, 10), (143, 10), (1, 10)], 2),
        ([(1, 10), (-signal.SIGKILL, 40)], 0),  # hung, so torchrun killed it
        ([(-signal.SIGABRT, 11), (2, 10)], 1),
    ],
)
def test_the_first_cause_is_found(failures, culprit):
    ranks = {rank: failed(*failure) for rank, failure in enumerate(failures)}
    assert launch.root_cause(ranks)[0] == culprit


TRAINER = """
import os, signal, sys, time
from types import SimpleNamespace

class UserError(Exception):
    pass

PRESETS = dict.fromkeys(("laptop", "gpt2_small"), SimpleNamespace(train_files="another"))

def parse_config(argv, default_preset):
    return SimpleNamespace(train_files="x.bin", val_files="x.bin", vocab_size=257,
                           stages=[SimpleNamespace(batch_tokens=64, seq_len=8)],
                           steps=4, device="cpu", generate=None, compile=None, val_tokens=64,
                           val_len=8)

def obey(number, frame):
    os.write(1, f"{signal.Signals(number).name} at rank {rank}\\n".encode())
    sys.exit(128 + number)

def run():
    if rank == 1 and sys.argv[1] == "mistake":
        raise UserError("no such thing; try another")
    if rank == 1 and sys.argv[1] == "bug":
        raise ZeroDivisionError("oh")
    if rank == 1 and sys.argv[1] == "death":
        os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[1] == "nothing":
        return
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, obey)
    os.write(1, f"rank {rank} is up\\n".encode())
    time.sleep(30)

rank = int(os.environ.get("RANK", 0))
if __name__ == "__main__":
    if sys.argv[1] in ("mistake", "bug"):  # the import takes seconds
        from torch.distributed.elastic.multiprocessing.errors import record
        run = record(run)
    try:
        run()
    except UserError:
        sys.exit(2)
    except Exception:
        sys.exit(1)
"""


def start_two(folder: Path, what: str, *wrapper: str) -> subprocess.Popen:
    """Two processes of a stand-in for the trainer, under the real torchrun."""
    for path in (*(ROOT / "data").glob("*.py"), *(ROOT / "setup").glob("*.py")):
        (folder / path.parent.name).mkdir(exist_ok=True)
        shutil.copy(path, folder / path.parent.name)
    (folder / "train_gpt.py").write_text(TRAINER)
    shards.write_shard(folder / "x.bin", [256, 1, 2])
    return subprocess.Popen(
        [*wrapper, sys.executable, str(folder / "setup" / "launch.py"), what],
        env=os.environ | {"NPROC": "2", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.long
@pytest.mark.parametrize(
    "what, code, lines",
    [
        pytest.param("nothing", 0, [], marks=pytest.mark.slow),
        ("mistake", 2, ["train_gpt.py: no such thing; try another"]),
        pytest.param(
            "bug",  # test_distributed has one, too
            1,
            ["ZeroDivisionError: oh", "launch.py: rank 1 failed first"],
            marks=pytest.mark.slow,
        ),
        ("death", 137, ["launch.py: rank 1 was killed by SIGKILL"]),
    ],
)
def test_one_cause_and_its_exit_code(tmp_path, what, code, lines):
    process = start_two(tmp_path, what)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert err.splitlines()[-len(lines) :] == lines or not (lines or err)
    assert ("Traceback" in err) == (what == "bug")


@pytest.mark.long
@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, marks=pytest.mark.slow),  # Slurm's warning
    ],
)
def test_a_signal_reaches_every_process_once(tmp_path, number):
    process = start_two(tmp_path, "sleep")
    out = process.stdout.readline() + process.stdout.readline()
    assert sorted(out.splitlines()) == ["rank 0 is up", "rank 1 is up"]
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (128 + number, "")
    assert sorted(out.splitlines()) == [f"{number.name} at rank 0", f"{number.name} at rank 1"]


@pytest.mark.slow
def test_nohup_outlives_its_terminal(tmp_path):
    process = start_two(tmp_path, "sleep", "nohup")
    process.stdout.readline()
    process.stdout.readline()
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.terminate()
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and "SIGHUP" not in out
