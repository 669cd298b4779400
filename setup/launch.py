"""Gets the data of a run, checks it, and starts training: run.sh hands over to this.

    python setup/launch.py [--flag value ...]           the flags are train_gpt.py's
    python setup/launch.py fetch [--flag value ...]     gets the data of such a run, no more

One process for each GPU, or a single one; several are started and watched by torchrun. The
environment (NPROC, NNODES, ...) is described by ./run.sh help. Exit code: the trainer's own, that
of the process that failed first where there are several; 128 + n when signal n ended the run; 2 for
what only the user can mend.
"""

import glob
import logging
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import check, fineweb, laptop, shards
from data.shards import BadInput
from setup.environment import usable_cores

ROOT = Path(__file__).resolve().parents[1]
FINEWEB_SHARD = 10**8  # tokens
# Tokens read for each one trained on where documents are cut. At 2,048 tokens 1.17 for lengths as
# FineWeb's (median 403, mean 690, log-normal); where this is too small, train_gpt.py says so.
CUT_OFF = 1.25
# glibc's malloc keeps what a step frees: fresh pages cost a step on a CPU up to ten times its time.
MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_TOP_PAD_": str(2**28),
}
# Threads that wait for each other sleep. Where they spin, which is the default, a step takes ten
# times as long as soon as another program runs on the same cores.
SLEEP = {"OMP_WAIT_POLICY": "PASSIVE"}
SAVING = 600  # seconds that processes may take to save and leave after a signal
# Failures within so many seconds are one event: a collective fails where a peer has died.
AT_ONCE = 5
# What a cluster's or another torchrun's environment says of processes that are not ours
FOREIGN = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
# A small sum on every card: one that is only counted may still be of no use.
PROBE = """
import torch
for card in range(torch.cuda.device_count()):
    torch.ones(1, device=f"cuda:{card}").sum().item()
print(torch.__version__, torch.cuda.device_count())
"""


def usable_gpus() -> int:
    """How many GPUs torch can use. Raises BadInput where the machine has cards that it cannot."""
    import torch

    import train_gpt

    cards = glob.glob("/dev/nvidia[0-9]*")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
    if hidden or not (cards or torch.cuda.is_available()):
        if not hidden and glob.glob("/proc/driver/nvidia/gpus/*"):
            print("this machine has GPUs, but this container has none: docker run --gpus all")
        return 0
    # in a process of its own, which gives back the memory that a card's first use takes
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no reason given"])[-1][:200]
    else:
        version, count = done.stdout.split()[-2:]
        if count != "0":
            return int(count)
        why = f"torch {version} finds none"
        why += "" if torch.version.cuda or torch.version.hip else ": it is built without CUDA"
    raise BadInput(f"{train_gpt.UNUSABLE} ({why})")


def whole_number(name: str, default: int, least: int, most: int) -> int:
    """Environment variable `name`. Raises BadInput when it is not a number in [least, most]."""
    text = os.environ.get(name) or str(default)
    if text.isdecimal() and len(text) < 10 and least <= int(text) <= most:
        return int(text)
    raise BadInput(f"{name}={text}: must be a whole number from {least} to {most}")


def fineweb_shards(config) -> int:
    """How many FineWeb shards hold the training tokens of a run."""
    import train_gpt  # takes seconds, so not before bad input has been refused

    tokens = train_gpt.tokens_of(config)
    if config.stages[0].max_document:
        tokens *= CUT_OFF
    return math.ceil((tokens + 1) / (config.epochs_allowed * FINEWEB_SHARD))


def bring_data(config, presets: dict) -> int:
    """Fetches or builds the shards of the presets, checks any. Returns an exit code."""
    code = 0
    if config.train_files == presets["laptop"].train_files:
        code = laptop.main([])
    elif config.train_files == presets["gpt2_small"].train_files:
        code = fineweb.main([str(fineweb_shards(config))])
    if not code:
        check.check_run([config.train_files, config.val_files], config.vocab_size)
    return code


def rendezvous() -> list[str]:
    """How the machines of a run meet, as flags for torchrun, which reads PET_* itself."""
    if any(os.environ.get(f"PET_{name}") for name in ("NNODES", "MASTER_ADDR", "RDZV_ENDPOINT")):
        return []
    nodes = whole_number("NNODES", 1, 1, 99_999)
    if nodes == 1:
        # without an address torchrun looks for this machine's full name, which may lead nowhere
        return ["--standalone", "--local_addr=127.0.0.1"]
    address = os.environ.get("MASTER_ADDR")
    if not address or not os.environ.get("NODE_RANK"):
        raise BadInput(f"NNODES={nodes} needs NODE_RANK and MASTER_ADDR as well")
    rank = whole_number("NODE_RANK", 0, 0, nodes - 1)
    port = whole_number("MASTER_PORT", 29500, 1, 65535)
    print(f"machine {rank} of {nodes}; they meet at {address}:{port}", flush=True)
    where = [f"--master_addr={address}", f"--master_port={port}"]
    return [f"--nnodes={nodes}", f"--node_rank={rank}", *where]


def count_processes(config, gpus: int) -> int:
    """How many processes this machine starts. Raises BadInput for a number that cannot share a
    batch evenly, with those that can.
    """
    batches = {stage.batch_tokens // stage.seq_len for stage in config.stages}
    most = gpus or min(batches)  # a process needs a row
    wanted = whole_number("NPROC", gpus or 1, 1, most)
    nodes = os.environ.get("PET_NNODES") or os.environ.get("NNODES") or "1"
    nodes = int(nodes) if nodes.isdecimal() else 1  # torchrun takes a range, too
    rows = sorted(batches | {config.val_tokens // config.val_len})
    if math.gcd(*rows) % (nodes * wanted):
        fine = [n for n in range(1, most + 1) if math.gcd(*rows) % (nodes * n) == 0]
        raise BadInput(
            f"{nodes * wanted} processes do not divide batches of {', '.join(map(str, rows))} rows;"
            f" set NPROC to {' or '.join(map(str, fine)) or 'another number with fewer machines'}"
        )
    return wanted


def leave_cluster():
    """Forgets another launcher's processes, which the trainer would wait for: ours are our own."""
    if os.environ.get("RANK") or os.environ.get("WORLD_SIZE"):
        print(
            "RANK and WORLD_SIZE are not used: run.sh starts its own processes (./run.sh help)",
            flush=True,
        )
    for name in [*os.environ]:
        if name in FOREIGN or name.startswith("TORCHELASTIC_"):
            del os.environ[name]


def root_cause(failures: dict):
    """(rank, torch's ProcessFailure) of the process whose failure the others' follow from.

    Of those that fail at once that is one that was killed, then one that names the user's mistake,
    then the first. torchrun asks the others to leave, and NCCL aborts them: that is no cause.
    """
    first = min(failure.timestamp for failure in failures.values())
    asked = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}

    def order(item):
        code = item[1].exitcode
        consequence = -code in asked or code - 128 in asked or code == -signal.SIGABRT
        killed = code < 0 and not consequence
        late = item[1].timestamp > first + AT_ONCE
        return late, not killed, code != 2, consequence, item[1].timestamp

    return min(failures.items(), key=order)


def report(rank: int, failure) -> int:
    """Says why a process failed: a traceback only for a bug. Returns the run's exit code."""
    code = failure.exitcode
    if code < 0:
        print(f"launch.py: rank {rank} was killed by {failure.signal_name()}", file=sys.stderr)
        return 128 - code
    recorded = failure.error_file_data["message"]  # what torch's `record` left of an exception
    if not isinstance(recorded, dict):
        return code  # the process has spoken for itself
    if code == 2:
        print(f"train_gpt.py: {recorded['message'].partition(': ')[2]}", file=sys.stderr)
    else:
        print(recorded["extraInfo"]["py_callstack"], end="", file=sys.stderr)
        print(f"launch.py: rank {rank} failed first", file=sys.stderr)
    return code


def torchrun(flags: list[str], argv: list[str]) -> int:
    """Runs the trainer in several processes. Returns the exit code of the run."""
    from torch.distributed import DistError, run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    logging.disable(logging.ERROR)  # its long report: the one line comes from here
    os.environ.setdefault("PET_SHUTDOWN_TIMEOUT", str(SAVING))
    heard = ["SIGTERM", "SIGINT", "SIGQUIT", "SIGUSR1", "SIGUSR2"]  # the last two: Slurm's warning
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
        heard.append("SIGHUP")
    os.environ.setdefault("PET_SIGNALS_TO_HANDLE", ",".join(heard))
    try:
        run.run(run.parse_args([*flags, "train_gpt.py", *argv]))
    except SignalException as stopped:
        return 128 + stopped.sigval
    except ChildFailedError as error:
        return report(*root_cause(error.failures))
    except (DistError, RendezvousError) as error:
        line = str(error).splitlines()[0]
        raise BadInput(f"the machines do not find each other ({line}); check MASTER_ADDR") from None
    return 0


def set_threads(processes: int, on_cpu: bool):
    """What the C libraries of a process are told, unless the user has told them something."""
    import torch

    wanted = MALLOC | SLEEP if on_cpu else {}
    threads = min(torch.get_num_threads(), usable_cores())
    if processes > 1 or threads < torch.get_num_threads():  # a quota that torch does not know
        wanted["OMP_NUM_THREADS"] = str(max(1, threads // processes))
    os.environ.update({name: os.environ.get(name) or wanted[name] for name in wanted})


def read_config(argv: list[str]):
    """(the run's config, number of its GPUs). Raises BadInput as usable_gpus() does, and UserError.

    The preset is the trainer's choice: gpt2_small where there are GPUs, else laptop.
    """
    import train_gpt

    try:
        gpus = usable_gpus()
    except BadInput:
        if train_gpt.parse_config(argv, "laptop").device != "cpu":
            raise
        gpus = 0
    config = train_gpt.parse_config(argv, "gpt2_small" if gpus else "laptop")
    return config, 0 if config.device == "cpu" else gpus


@shards.tool
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    os.chdir(ROOT)  # relative paths start there
    sys.argv[0] = "train_gpt.py"  # what --help and errors of flags name
    fetch_only = argv[:1] == ["fetch"]
    argv = argv[fetch_only:]
    try:
        import train_gpt
    except (ImportError, OSError) as error:
        raise BadInput(f"torch cannot be imported ({error}); install it again") from None
    try:
        config, gpus = read_config(argv)
        compiles = gpus > 0 if config.compile is None else config.compile
        if compiles and config.generate is None and not fetch_only:
            train_gpt.check_compiler(gpus > 0)  # before anything is fetched
    except train_gpt.UserError as error:
        print(f"train_gpt.py: {error}", file=sys.stderr)
        return 2
    processes, flags = 1, []
    if config.generate is None:
        processes, flags = count_processes(config, gpus), rendezvous()
        code = bring_data(config, train_gpt.PRESETS)
        if code or fetch_only:
            return code
    leave_cluster()
    set_threads(processes, on_cpu=not gpus)
    sys.stdout.flush()
    if processes == 1 and "--standalone" in flags or config.generate is not None:
        os.execv(sys.executable, [sys.executable, "train_gpt.py", *argv])
    return torchrun([*flags, f"--nproc_per_node={processes}"], argv)


if __name__ == "__main__":
    sys.exit(main())
