"""Run a trainer as __main__ on the stand-in device, and write down what it asks of that device.

    python observe.py REPORT TRAINER [flags]

Standard library and torch only, since it runs in the preflight's own environment. Of the trainer it
knows that it prints `warm-up: ...` before its clock starts, that its log has lines such as
`step:3/9 train_loss:...` or `step:3/9 train_time:...`, and that it calls backward(). What it cannot
find is missing from REPORT, a JSON file; Observer.report says what is in it.
"""

import ctypes
import functools
import importlib
import json
import math
import os
import re
import runpy
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import blocks
import replaced

CLOCK = re.compile(r"(warm-?up: |step:\d+/)", re.IGNORECASE)
STEP = re.compile(r"step:(\d+)/\d+ (?:(val|train)_loss|train_time):")
ASSIGNED = re.compile(r"^\s+tmp\d+ = ", re.MULTILINE)  # what a fused kernel does per element
LIVE = re.compile(r"^(\r|\033\[K)+")  # how a line is rewritten on a terminal


class TrainerLog:
    """The lines that the trainer's log has gained since the last look."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.path = None
        self.offset = 0

    def new_lines(self) -> list[str]:
        if not self.path:
            self.path = next(self.folder.glob("*.txt"), None)
        if not self.path or os.path.getsize(self.path) == self.offset:
            return []
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            whole, newline, _ = file.read().rpartition(b"\n")
        self.offset += len(whole) + len(newline)
        return whole.decode(errors="replace").splitlines()


class Snapshot:
    """Everything counted up to one moment, the start of a call of backward()."""

    def __init__(self, observer):
        self.step = observer.step
        self.validations = observer.validations
        self.backwards = observer.backwards
        self.waits = len(observer.waits)
        self.counts = observer.library.nullgpu_counts()
        self.triton = {name: tuple(row) for name, row in observer.triton.items()}
        self.attention = tuple(observer.attention)
        self.overhead = observer.overhead
        self.time = time.perf_counter()


class Observer:
    def __init__(self, script: str, log_folder: Path):
        self.script = script
        self.log = TrainerLog(log_folder)
        self.clock_started = False
        self.step = 0  # the last one in the log
        self.validations = 0
        self.backwards = 0
        self.overhead = 0.0  # seconds that observing took
        self.compilations = []
        self.triton = {}  # kernel: [launches, bytes, operations, instructions]
        self.attention = [0.0, 0.0]  # what FlexAttention computed, of whole score matrices
        self.blind = ""  # why block masks could not be made again
        self.steps = None  # of a whole run
        self.waits = []  # (what, line of the script)
        self.snapshots = []
        self.library = ctypes.CDLL(None)
        self.library.nullgpu_counts.restype = ctypes.c_char_p
        self.library.nullgpu_peak_memory.restype = ctypes.c_ulonglong

    def line_of_script(self) -> int | None:
        """The line of the script that is being run, innermost frame first."""
        frame = sys._getframe()
        while frame and frame.f_code.co_filename != self.script:
            frame = frame.f_back
        return frame.f_lineno if frame else None

    # --------------------------------------------------------------------------- where it listens

    def watch_output(self):
        """Lines on stdout may start the clock; the step lines are read from the log."""
        write = sys.stdout.write

        def watched(text):
            if CLOCK.match(LIVE.sub("", text)):
                self.clock_started = True
            return write(text)

        sys.stdout.write = watched

    def read_log(self):
        for line in self.log.new_lines():
            if CLOCK.match(line):
                self.clock_started = True
            found = STEP.match(line)
            if found:
                self.step = max(self.step, int(found[1]))
                self.validations += found[2] == "val"

    def watch_compiler(self):
        from torch._dynamo.callback import callback_handler

        running = []

        def begin(args):
            self.read_log()
            late = self.clock_started
            entry = dict(id=str(args.compile_id), kind=args.callback_trigger.name.lower())
            entry |= dict(late=late, step=self.step, line=self.line_of_script(), seconds=0.0)
            self.compilations.append(entry)
            running.append((entry, time.perf_counter()))

        def end(args):
            entry, begun = running.pop()
            entry["seconds"] = round(time.perf_counter() - begun, 2)

        callback_handler.register_start_callback(begin)
        callback_handler.register_end_callback(end)

    def launched(self, name: str, moved: float, operations: float, instructions: float = 0.0):
        row = self.triton.setdefault(name, [0, 0.0, 0.0, 0.0])
        for i, amount in enumerate((1, moved, operations, instructions)):
            row[i] += amount

    def watch_triton(self):
        """The work of each launch of a Triton kernel: Inductor's, and the script's own."""
        from torch._inductor.runtime.triton_heuristics import CachingAutotuner
        from triton.runtime.jit import JITFunction

        known = {}  # by kernel and sizes; no arguments, which would stay in memory
        run, run_own = CachingAutotuner.run, JITFunction.run

        @functools.wraps(run)
        def counted(kernel, *args, **kwargs):
            begun = time.perf_counter()
            given = dict(zip(kernel.triton_meta["signature"], args, strict=False))
            if "kernel_num_gb" in kernel.inductor_meta:
                key = kernel, *(value for value in args if isinstance(value, int))
                known[key] = known.get(key) or fused_work(kernel, given)
                self.launched(*known[key])
            else:
                self.launched(*own_work(kernel.fn, given))
            self.overhead += time.perf_counter() - begun
            return run(kernel, *args, **kwargs)

        @functools.wraps(run_own)
        def counted_own(function, *args, grid, warmup, **kwargs):
            if not warmup:
                given = dict(zip(function.arg_names, args, strict=False)) | kwargs
                self.launched(*own_work(function, given))
            return run_own(function, *args, grid=grid, warmup=warmup, **kwargs)

        CachingAutotuner.run = counted
        JITFunction.run = counted_own

    def watch_attention(self):
        """What block masks leave of the score matrices, and FlashAttention 3 (see replaced.py)."""

        def count(graph, inputs):
            begun = time.perf_counter()
            try:
                for i, size in enumerate(graph.count(inputs)):
                    self.attention[i] += size
            except Exception as error:  # a script's own masks may hold anything
                self.blind = f"{type(error).__name__}: {error}"
            self.overhead += time.perf_counter() - begun

        blocks.watch(count)
        replaced.install(self.launched)

    def watch_waits(self):
        def waited(what):
            self.waits.append((what.decode(), self.line_of_script()))

        self.on_wait = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(waited)  # kept: C holds no reference
        self.library.nullgpu_on_wait(self.on_wait)

    def watch_backward(self):
        """Backward passes are the fixed points at which one update is told from the next."""
        import torch

        backward = torch.autograd.backward

        @functools.wraps(backward)
        def watched(*args, **kwargs):
            begun = time.perf_counter()
            before = self.step, self.validations
            self.read_log()
            if (self.step, self.validations) != before or not self.snapshots:
                self.snapshots.append(Snapshot(self))
            self.backwards += 1
            self.overhead += time.perf_counter() - begun
            return backward(*args, **kwargs)

        torch.autograd.backward = watched

    def start(self):
        self.watch_output()
        self.watch_compiler()
        self.watch_triton()
        self.watch_attention()
        self.watch_waits()
        self.watch_backward()

    def stop(self):
        self.library.nullgpu_on_wait(None)  # threads of torch may outlive the interpreter

    # -------------------------------------------------------------------------------- the report

    def report(self) -> dict:
        """compilations: what, when and for which line of the script; updates: see difference();
        total: all counts; memory: bytes."""
        import torch

        memory = dict(reserved=self.library.nullgpu_peak_memory())
        if torch.cuda.is_initialized():
            memory["allocated"] = torch.cuda.max_memory_allocated()
        pairs = zip(self.snapshots, self.snapshots[1:], strict=False)
        return dict(
            compilations=self.compilations,
            updates=[self.difference(a, b) for a, b in pairs if b.step > a.step > 0],
            total=table(self.library.nullgpu_counts()),
            memory=memory,
            blind=self.blind,
            steps=self.steps,
        )

    def difference(self, a: Snapshot, b: Snapshot) -> dict:
        """What was asked of the device from one logged step to a later one. host_seconds: the time
        that the host took; counts: {name: [times, amount]}; triton: {kernel: [launches, bytes,
        operations, instructions]}; attention: share of score matrices that FlexAttention computed,
        None: not known."""
        before = table(a.counts)
        counts = {}
        for name, (times, amount) in table(b.counts).items():
            old_times, old_amount = before.get(name, (0, 0))
            if times > old_times:
                counts[name] = [times - old_times, amount - old_amount]
        triton = {}
        for name, row in b.triton.items():
            old = a.triton.get(name, (0, 0, 0, 0))
            if row[0] > old[0]:
                triton[name] = [new - was for new, was in zip(row, old, strict=True)]
        computed, whole = (new - was for new, was in zip(b.attention, a.attention, strict=True))
        return dict(
            first=a.step,
            last=b.step,
            validated=b.validations > a.validations,
            backwards=b.backwards - a.backwards,
            host_seconds=b.time - a.time - (b.overhead - a.overhead),
            waits=self.waits[a.waits : b.waits],
            counts=counts,
            triton=triton,
            attention=computed / whole if whole else None,
        )


def fused_work(kernel, given: dict) -> tuple:
    """(name, bytes, operations, instructions) of a launch of Inductor's kernel: no more bytes than
    its buffers have, since Inductor counts slices of one as if each were another."""
    meta = kernel.inductor_meta
    moved = min(1e9 * (meta["kernel_num_gb"] or 0.0), distinct_bytes(given))
    elements = math.prod(value for name, value in given.items() if name.endswith("numel"))
    instructions = elements * len(ASSIGNED.findall(kernel.fn.src))
    return meta["kernel_name"], moved, meta.get("kernel_flop") or 0.0, instructions


def own_work(function, given: dict) -> tuple:
    """The same of a kernel of the script's own: each buffer once, and a matmul's operations."""
    operations = 0.0
    if "tl.dot" in function.src and "M" in given:
        m = given["M"]
        n, k = given.get("N", m), given.get("K", m)
        first = next(tensor for tensor in map(tensor_of, given.values()) if tensor is not None)
        operations = 2.0 * m * n * k * max(1, first.numel() // (m * k))
    return function.__name__, distinct_bytes(given), operations, 0.0


def tensor_of(value):
    """The tensor that an argument is or, for a descriptor, stands for."""
    value = getattr(value, "base", value)
    return value if hasattr(value, "untyped_storage") else None


def distinct_bytes(given: dict) -> float:
    """Bytes of the buffers among a kernel's arguments, each read once and written once."""
    sizes = {}
    for name, value in given.items():
        tensor = tensor_of(value)
        if tensor is not None:
            buffer = tensor.untyped_storage().data_ptr()
            for direction in ("in", "out"):
                if direction in name or not name.startswith(("in_", "out_")):
                    key = buffer, direction if name.startswith(("in_", "out_")) else ""
                    size = tensor.numel() * tensor.element_size()
                    sizes[key] = max(sizes.get(key, 0), size)
    return float(sum(sizes.values()))


def table(counts: bytes) -> dict[str, tuple[int, float]]:
    rows = (line.split("\t") for line in counts.decode().splitlines())
    return {name: (int(times), float(amount)) for name, times, amount in rows}


def pretend_peers():
    """This rank meets nobody: it waits for no other to connect, the CPU's collectives do nothing,
    and what ranks tell each other there comes back as if every rank had sent the same."""
    import torch.distributed as dist
    from torch.testing._internal.distributed import fake_pg

    rendezvous = importlib.import_module("torch.distributed.rendezvous")  # not the function
    rendezvous.TCPStore = functools.partial(rendezvous.TCPStore, wait_for_workers=False)
    start = dist.init_process_group

    def start_alone(backend=None, *args, **kwargs):
        return start("cpu:fake,cuda:nccl", *args, **kwargs)

    def gather(objects, mine, group=None):
        objects[:] = [mine] * len(objects)

    new_group = dist.new_group

    def new_group_alone(*args, backend=None, **kwargs):
        return new_group(*args, backend="fake" if backend == "gloo" else backend, **kwargs)

    exchange = dist.all_to_all_single

    def exchange_alone(out, values, out_sizes=None, sizes=None, **kwargs):
        if out.device.type != "cpu":
            return exchange(out, values, out_sizes, sizes, **kwargs)
        sizes = sizes or [len(values) // dist.get_world_size()] * dist.get_world_size()
        first = values.split(sizes)[0]  # what goes to rank 0, this one, comes from all
        out.copy_(first.repeat(len(sizes)))

    assert fake_pg  # importing it registers the backend
    from torch.nn.parallel import distributed

    distributed._verify_param_shape_across_processes = lambda *args: None
    dist.init_process_group, dist.new_group = start_alone, new_group_alone
    dist.all_to_all_single = exchange_alone
    dist.all_gather_object = gather
    dist.broadcast_object_list = lambda *args, **kwargs: None


def whole_steps(names: dict, flags: list[str]) -> int | None:
    """How many updates the script makes here without the preflight's --steps; None: not known."""
    if "parse_config" not in names or "--steps" not in flags:
        return None
    import torch

    at = flags.index("--steps")
    try:
        config = names["parse_config"](flags[:at] + flags[at + 2 :], "gpt2_small")
        if "resolve" in names:  # the n-gram table's rows, and so the updates, follow the memory
            world_size = int(os.environ.get("WORLD_SIZE", 1))
            runtime = names["Runtime"](torch.device("cuda", 0), 0, world_size)
            config = names["resolve"](config, runtime)
        return config.steps
    except (Exception, SystemExit):  # an edit may have another parser
        return None


def names_at_exit(ended: SystemExit, script: str) -> dict:
    """What the script had defined when it called sys.exit, as most do at their end."""
    frames = [frame for frame, _ in traceback.walk_tb(ended.__traceback__)]
    own = (frame.f_globals for frame in frames if frame.f_code.co_filename == script)
    return next(own, {})


def main():
    path, script, *flags = sys.argv[1:]
    script = os.path.abspath(script)
    log_folder = Path(flags[flags.index("--log_dir") + 1] if "--log_dir" in flags else "logs")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        pretend_peers()
    observer = Observer(script, log_folder)
    observer.start()
    sys.argv = [script, *flags]
    sys.path[:2] = [os.path.dirname(script)]
    try:
        observer.steps = whole_steps(runpy.run_path(script, run_name="__main__"), flags)
    except SystemExit as ended:
        observer.steps = whole_steps(names_at_exit(ended, script), flags)
        raise
    finally:
        observer.stop()
        Path(path).write_text(json.dumps(observer.report()))


if __name__ == "__main__":
    main()
