"""Gets the data of a run, checks it, and starts training: run.sh hands over to this.

    python data/launch.py [--flag value ...]     the flags are train_gpt.py's

One process for each GPU, or a single one; several are started and watched by torchrun. The
environment (NPROC, NNODES, ...) is described by ./run.sh help. Exit code: the trainer's own, that
of the process that failed first where there are several; 128 + n when signal n ended the run; 2 for
what only the user can mend.
"""

import logging
import math
import os
import signal
import sys
from pathlib import Path

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import check, fineweb, laptop, shards
from data.shards import BadInput

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
SAVING = 600  # seconds that processes may take to save and leave after a signal
# Failures within so many seconds are one event: a collective fails where a peer has died.
AT_ONCE = 5


def whole_number(name: str, default: int, least: int, most: int) -> int:
    """Environment variable `name`. Raises BadInput when it is not a number in [least, most]."""
    text = os.environ.get(name) or str(default)
    if text.isdecimal() and len(text) < 10 and least <= int(text) <= most:
        return int(text)
    raise BadInput(f"{name}={text}: must be a whole number from {least} to {most}")


def fineweb_shards(config) -> int:
    """How many FineWeb shards hold the training tokens of a run."""
    import train_gpt  # takes seconds, so not before bad input has been refused

    sizes = (train_gpt.at_step(config.batch_tokens, step, config) for step in range(config.steps))
    tokens = sum(sizes)
    if config.max_document:
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
        return ["--standalone"]
    address = os.environ.get("MASTER_ADDR")
    if not address or not os.environ.get("NODE_RANK"):
        raise BadInput(f"NNODES={nodes} needs NODE_RANK and MASTER_ADDR as well")
    rank = whole_number("NODE_RANK", 0, 0, nodes - 1)
    port = whole_number("MASTER_PORT", 29500, 1, 65535)
    print(f"machine {rank} of {nodes}; they meet at {address}:{port}", flush=True)
    where = [f"--master_addr={address}", f"--master_port={port}"]
    return [f"--nnodes={nodes}", f"--node_rank={rank}", *where]


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
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # as under nohup
        os.environ.setdefault("PET_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGQUIT")
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


@shards.tool
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    os.chdir(ROOT)  # relative paths start there
    sys.argv[0] = "train_gpt.py"  # what --help and errors of flags name
    try:
        import torch
    except (ImportError, OSError) as error:
        raise BadInput(f"torch cannot be imported ({error}); install it again") from None
    import train_gpt

    gpus = torch.cuda.device_count()
    try:
        config = train_gpt.parse_config(argv, "gpt2_small" if gpus else "laptop")
    except train_gpt.UserError as error:
        print(f"train_gpt.py: {error}", file=sys.stderr)
        return 2
    if config.device == "cpu":
        gpus = 0
    most = gpus or min(config.batch_tokens) // config.seq_len  # a process needs a row
    processes = whole_number("NPROC", gpus or 1, 1, most)
    flags = rendezvous()
    if config.generate:
        processes = 1
        flags = ["--standalone"]
    else:
        code = bring_data(config, train_gpt.PRESETS)
        if code:
            return code

    if not gpus:
        os.environ.update({name: os.environ.get(name) or MALLOC[name] for name in MALLOC})
    sys.stdout.flush()
    if processes == 1 and flags == ["--standalone"]:
        os.execv(sys.executable, [sys.executable, "train_gpt.py", *argv])
    if not os.environ.get("OMP_NUM_THREADS"):
        os.environ["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // processes))
    return torchrun([*flags, f"--nproc_per_node={processes}"], argv)


if __name__ == "__main__":
    sys.exit(main())
