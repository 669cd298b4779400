"""GPT-2 speedrun: train GPT-2 Small on FineWeb to 3.28 validation loss, as fast as the machine allows.

    ./run.sh                                    any machine: sets up, gets the data, picks the preset
    torchrun --nproc_per_node=8 train_gpt.py    8 GPUs;     python train_gpt.py --help    every flag

The whole trainer is this file, at most 1,100 lines (a test counts). From top to bottom:

    Config         every setting is a typed field, a --flag and a part of the log; PRESETS are instances of it
    Runtime        which process this is, how processes agree, how one failure is told to all
    Data           token shards, checked before step 0; batch_at(step) is a pure function of the step
    Model          the forward pass reads like the paper; one mask rule for two attention backends
    Optimizers     weights as stacks of rows, sharded over ranks: reduce-scatter, update, all-gather
    Methods        ReLoRA, GaLore, LAWA, SuPar: optional, on shared hooks; switched off they cost nothing
    Schedules      learning rate and momentum as functions of the step
    Clock and log  the one place where time is measured; the one file that a run leaves behind
    Checkpoint     a run is never lost: save, find, resume bit for bit
    Evaluate       validation loss, and sampling from a trained model
    Train          warm-up before the clock, the loop, main()
The recipe: the public record of 8 November 2024 (github.com/KellerJordan/modded-nanogpt; --preset nov2024) and what beat it since (measured in records/).
"""
import argparse, concurrent.futures, contextlib, ctypes, dataclasses, datetime, difflib, functools, glob, hashlib, io, json, math, os, platform, re, resource
import signal, sys, threading, time, traceback, uuid
from pathlib import Path

import numpy as np
import torch
if [int(part) for part in torch.__version__.split(".")[:2]] < [2, 11]:
    sys.exit(print(f"train_gpt.py: torch {torch.__version__} is too old, 2.11 is needed: pip install -r requirements.txt", file=sys.stderr) or 2)
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

SOURCE = Path(__file__).read_bytes().decode("utf-8")  # read first: the log holds the code that really ran
SOURCE_SHA256 = hashlib.sha256(SOURCE.encode("utf-8")).hexdigest()

# ---------------------------------------------------------------------------------------------------------------- Config
class UserError(Exception): """Something that only the user can mend: told in one line, exit code 2, no traceback."""
def refuse(bad, line: str):
    if bad: raise UserError(line)

@dataclasses.dataclass(frozen=True)
class Config:
    """One run. Every field is a flag: --steps 50; booleans --bf16, --no_bf16. The comments are the --help."""
    # run
    preset: str = "gpt2_small"  # where all other fields start from
    steps: int = 3242  # optimizer updates
    seed: int = 0  # of the initial weights and everything random
    target: float = 3.28  # validation loss to reach, nats per token
    device: str = "auto"  # auto, cpu or cuda
    compile: bool | None = None  # torch.compile; unless given, on CUDA only
    log_dir: str = "logs"  # the log is <log_dir>/<run_id>.txt
    # data
    train_files: str = "data/fineweb10B/fineweb_train_*.bin"  # token shards, a glob
    val_files: str = "data/fineweb10B/fineweb_val_*.bin"  # token shards, a glob
    batch_tokens: int = 524288  # tokens per update, over all ranks
    seq_len: int = 1024  # tokens per row
    micro_batch: int = 0  # rows per forward pass of a rank; 0: as many as fit
    val_tokens: int = 10485760  # validation tokens, the same ones every time
    val_every: int = 125  # updates between validations; 0: only at the end
    epochs_allowed: int = 1  # how often the training tokens may be seen
    spread_rows: bool = False  # rows of a batch from all over the data, not side by side: for data that is not shuffled
    # model
    vocab_size: int = 50257  # tokens in the data; the last one marks the start of a document
    n_layer: int = 12  # blocks
    n_head: int = 6  # attention heads
    n_embd: int = 768  # width
    value_residual: bool = True  # mix the first block's values into every block's
    embed_residual: bool = True  # mix the normed embedding into every block's input
    untie_head: bool = True  # lm_head has weights of its own
    zero_init: bool = True  # lm_head, o and down start at zero
    ngram: int = 0  # embeddings of the last 2, 3, ... this many tokens, side by side, are added to the token's; 0: off
    ngram_rows: int = 16384  # of each table of such embeddings; n-grams share rows by hash
    softcap: float = 30.0  # logits become softcap * tanh(logits / softcap); 0: off
    qk_norm: bool = True  # RMSNorm on queries and keys
    bf16: bool = True  # activations and wte in bfloat16, other weights cast at use
    doc_mask: bool = False  # tokens attend within their own document only
    window: int = 0  # tokens that a short layer looks back
    window_pattern: str = "L"  # S(hort) and L(ong) layers, repeated over the depth
    attention: str = "auto"  # sdpa or flex; auto: flex where CUDA is compiled and a mask is needed
    # optimizers
    matrix_optimizer: str = "muon"  # of the hidden matrices: muon or adam
    lr_muon: float = 0.02  # Muon's rate
    lr_adam: float = 0.002  # Adam's rate for hidden matrices and adapters
    lr_embed: float = 0.3  # Adam's rate for wte
    lr_ngram: float = 1.0  # Adagrad's rate for the n-gram tables
    lr_head: float = 0.002  # Adam's rate for lm_head, and for wte when tied to it
    lr_scalar: float = 0.02  # Adam's rate for the lambdas
    momentum: float = 0.95  # Muon's, after a warm-up from 0.85
    momentum_warmup: int = 300  # updates
    normuon: float = 0.0  # decay of NorMuon's mean square of each neuron's update; 0: plain Muon
    beta1: float = 0.9  # Adam's
    beta2: float = 0.95  # Adam's
    adam_eps: float = 1e-8  # Adam's
    warmup: int = 0  # updates of linear learning-rate warm-up
    cooldown: float = 0.2856  # share of the run, at its end, in which the rates fall
    lr_floor: float = 0.0  # ... to this share of themselves
    # methods
    relora: int = 0  # ReLoRA: rank of the adapters; 0: off
    relora_alpha: float = 0.0  # adapters count alpha / rank; 0: a quarter of the rank
    relora_warm_start: int = 0  # full-rank updates before the adapters; 0: a quarter of the run
    relora_interval: int = 0  # updates between merges; 0: a quarter of the updates left
    relora_rewarm: int = 0  # updates of re-warming after a merge; 0: a tenth of the interval
    relora_prune: float = 0.99  # share of the adapters' moments set to zero at a merge
    relora_optimizer: str = "adam"  # of the adapters: adam or muon
    galore: int = 0  # GaLore: rank of the projected gradients; 0: off
    galore_inner: str = "adam"  # optimizer in the projected space: adam or muon
    galore_interval: int = 200  # updates between projections
    galore_scale: float = 0.25  # factor on the projected update
    galore_bits: int = 32  # of a moment's entry: 32 or 8
    galore_per_layer: bool = False  # update each matrix as its gradient arrives, then free the gradient
    lawa: int = 0  # LAWA: how many snapshots are averaged; 0: off
    lawa_interval: int = 0  # updates between snapshots; 0: one per cent of the run
    lawa_mode: str = "eval"  # eval: validate on the average; replace: also train on from it
    sparsity: float = 0.0  # SuPar: share of every hidden matrix fixed at zero
    mup_base_width: int = 0  # SuPar: width at which the rates were tuned; 0: this width
    # checkpoints, and sampling from one
    checkpoint_every: int = 0  # updates between checkpoints; 0: none
    checkpoint_keep: int = 2  # newest checkpoints of the run that stay on disk
    checkpoint_dir: str = "checkpoints"  # they are <checkpoint_dir>/<run_id>/step_<n>.pt
    resume: str = ""  # train on from a checkpoint: its path, or latest
    resume_anyway: bool = False  # ... although flags, source or data changed
    rank_timeout: float = 25.0  # seconds after which a silent rank counts as lost
    generate: str = ""  # do not train, continue this text
    checkpoint: str = ""  # ... with the model of this checkpoint: its path, or latest
    generate_tokens: int = 200  # ... by so many tokens
    temperature: float = 0.8  # ... drawn at this temperature; 0: the likeliest
    def __post_init__(self):  # every rule that a single config must obey
        get, fields, T = functools.partial(getattr, self), type(self).__dataclass_fields__, self.seq_len
        for name, field in fields.items():
            value, low, high = get(name), int(name in POSITIVE), AT_MOST.get(name, {int: 2**63 - 1, float: sys.float_info.max}.get(field.type))
            refuse(value not in CHOICES.get(name, [value]), f"--{name} {value}: must be one of {', '.join(map(str, CHOICES.get(name, [])))}")
            refuse(high and not low <= value <= high, f"--{name} {value}: must be a number from {low} {f'to {high}' if name in AT_MOST else 'up'}")
            method, given = name.split("_")[0], value != field.default
            if given and name != method and method in ("relora", "galore", "lawa"):
                refuse(not get(method), f"--{name} does nothing without --{method}")
                lasts = value if name.endswith(("interval", "start", "rewarm")) else 0  # updates
                refuse(lasts >= self.steps, f"--{name} {value} is not shorter than the run of {self.steps} steps")
        for name in ("batch_tokens", "val_tokens"):
            refuse(get(name) % T, f"--{name} {get(name)} is not divisible by --seq_len {T}; nearest: {max(1, round(get(name) / T)) * T}")
        for name in ("relora", "galore"): refuse(get(name) > self.n_embd, f"--{name} {get(name)}: rank above that of the matrices, {self.n_embd}")
        refuse(self.n_embd % (2 * self.n_head), f"--n_embd {self.n_embd} over --n_head {self.n_head} must give an even whole head_dim")
        refuse(self.ngram == 1 or self.ngram > self.n_embd, f"--ngram {self.ngram}: must be 0 (off), or from 2 up to --n_embd {self.n_embd}")
        windows, allowed = f"--window {self.window} with --window_pattern {self.window_pattern}", [{"S"}, {"L", "S"}] if self.window else [{"L"}]
        refuse(set(self.window_pattern) not in allowed, f"{windows}: letters L and S only, and an S if and only if there is a window")
        refuse(self.warmup > self.steps, f"--warmup {self.warmup} is longer than the run of {self.steps} steps")
        refuse(self.generate and not self.checkpoint, "--generate needs --checkpoint PATH (or latest)")
        on = [name for name in ("relora", "galore", "sparsity", "mup_base_width") if get(name)]
        refuse(len(on) > 1 and on != ["sparsity", "mup_base_width"], f"--{' and --'.join(on)} cannot be combined: each trains the hidden matrices its way")
    rows = property(lambda self: self.batch_tokens // self.seq_len)  # of a global batch
    padded_vocab = property(lambda self: -(-self.vocab_size // 64) * 64)  # matmuls like multiples of 64
CHOICES = dict(device=("auto", "cpu", "cuda"), attention=("auto", "sdpa", "flex"), matrix_optimizer=("muon", "adam"),
               relora_optimizer=("adam", "muon"), galore_inner=("adam", "muon"), galore_bits=(32, 8), lawa_mode=("eval", "replace"))
AT_MOST = dict(vocab_size=65536, ngram=8, normuon=0.9999, momentum=0.9999, beta1=0.9999, beta2=0.99999, sparsity=0.9999, cooldown=1, lr_floor=1, relora_prune=1)
POSITIVE = {"steps", "batch_tokens", "seq_len", "val_tokens", "epochs_allowed", "vocab_size", "n_layer", "n_head", "n_embd",
            "ngram_rows", "galore_interval", "checkpoint_keep", "generate_tokens", "rank_timeout"}
RUN_LOCAL = {"log_dir", "train_files", "val_files", "micro_batch", "checkpoint_every", "checkpoint_keep", "checkpoint_dir", "resume",
             "resume_anyway", "rank_timeout", "generate", "checkpoint", "generate_tokens", "temperature"}  # not part of what is trained
FIELDS = {field.name: field.type for field in dataclasses.fields(Config)}
PRESETS = {name: Config(preset=name, **fields) for name, fields in {
    "nov2024": {},  # the fields' defaults: 8xH100 record of 8 November 2024
    "gpt2_small": dict(normuon=0.95),
    "gpt2_medium": dict(normuon=0.95, n_layer=24, n_head=8, n_embd=1024, steps=6000, target=2.92),
    "gpt2_xl": dict(normuon=0.95, n_layer=48, n_head=25, n_embd=1600, steps=10000, target=2.8),
    "laptop": dict(train_files="data/laptop/laptop_train_*.bin", val_files="data/laptop/laptop_val_*.bin", vocab_size=257, n_layer=2,
                   n_head=2, n_embd=128, ngram=5, normuon=0.95, batch_tokens=2048, seq_len=128, val_tokens=262144, val_every=50, steps=181, target=1.26,
                   spread_rows=True, lr_muon=0.04, lr_head=0.008, cooldown=0.6, lr_floor=0.1, momentum_warmup=40, bf16=False),
}.items()}
def flag_table() -> list[tuple[str, str, object]]:  # (flag, its comment in Config, default in gpt2_small): what --help and the README print
    body = SOURCE.split("class Config:", 1)[1].split("def __post_init__", 1)[0]
    return [(name, comment, getattr(PRESETS["gpt2_small"], name)) for name, comment in re.findall(r"^    (\w+): .*?  # (.*)$", body, re.M)]
def parse_config(argv: list[str], default_preset: str) -> Config:
    """Flags to Config. Errors: UserError for an unknown flag (names the nearest), a wrong type, a bad combination; --help exits."""
    wide, end = functools.partial(argparse.HelpFormatter, max_help_position=34, width=170), f"In [ ]: gpt2_small's. Presets: {', '.join(PRESETS)}."
    parser = argparse.ArgumentParser(usage="train_gpt.py [--flag value ...]; booleans: --flag or --no_flag", epilog=end, formatter_class=wide,
                                     allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.error = lambda message: refuse(True, f"{message} (--help lists all flags)")
    for name, comment, default in flag_table():
        kind, about, latest = FIELDS[name], f"{comment} [{default}]", dict(nargs="?", const="latest") if name == "resume" else {}
        if "bool" not in str(kind): parser.add_argument(f"--{name}", type=kind, metavar="", help=about, **latest)
        else:
            parser.add_argument(f"--{name}", action="store_true", help=about)
            parser.add_argument(f"--no_{name}", action="store_false", help=argparse.SUPPRESS, dest=name)
    given, unknown = parser.parse_known_args(argv)
    near = [f", did you mean --{name}?" for name in difflib.get_close_matches("".join(unknown[:1]).removeprefix("--"), FIELDS, n=1)]
    if unknown: parser.error(f"unknown argument {unknown[0]}{(near or ['' if unknown[0].startswith('-') else '; a glob needs quotes'])[0]}")
    names = [word.partition("=")[0].replace("--no_", "--") for word in argv if word.startswith("--")]
    for name in names: refuse(names.count(name) > 1, f"{name} is given twice")
    refuse("" in vars(given).values(), f"--{next((name for name, value in vars(given).items() if value == ''), '')} needs a value")
    preset = getattr(given, "preset", default_preset)
    refuse(preset not in PRESETS, f"--preset {preset}: must be one of {', '.join(PRESETS)}")
    return dataclasses.replace(PRESETS[preset], **vars(given))
def resolve(config: Config, device: torch.device) -> Config:
    """Every "chosen for you" value replaced by what was chosen, so that the log says what ran."""
    c, compile = config, device.type == "cuda" if config.compile is None else config.compile
    masked = c.doc_mask or any(0 < window < c.seq_len for window in layer_windows(c))
    auto = "flex" if device.type == "cuda" and compile and masked else "sdpa"
    new = dict(device=device.type, compile=compile, attention=auto if c.attention == "auto" else c.attention)
    if c.relora:
        wrap = c.relora_warm_start or max(1, c.steps // 4)
        every = c.relora_interval or max(1, (c.steps - wrap) // 4)
        alpha, rewarm = c.relora_alpha or c.relora / 4, c.relora_rewarm or max(1, every // 10)
        new |= dict(relora_alpha=alpha, relora_warm_start=wrap, relora_interval=every, relora_rewarm=rewarm)
    if c.lawa:
        new["lawa_interval"] = every = c.lawa_interval or max(1, c.steps // 100)
        refuse(c.lawa * every > c.steps, f"--lawa {c.lawa}: snapshots every {every} of {c.steps} steps never fill the window; lower one of them")
    return dataclasses.replace(c, **new)

# --------------------------------------------------------------------------------------------------------------- Runtime
class Runtime:
    """This process among its peers; store is their shared key-value store, None for a single process."""
    def __init__(self, device: torch.device, rank: int = 0, world_size: int = 1, store=None):
        self.device, self.rank, self.world_size, self.store, self.cuda = device, rank, world_size, store, device.type == "cuda"
        self.leaving, self.watcher = threading.Event(), None  # of watch_peers
    def exchange(self, key: str, value) -> list:
        """Every rank's JSON-able value, in the order of ranks. Waits up to half an hour: ranks may be compiling or saving."""
        if not self.store: return [value]
        self.store.set(f"{key}/{self.rank}", json.dumps(value))
        return [json.loads(self.store.get(f"{key}/{rank}")) for rank in range(self.world_size)]
    def reduce(self, tensor: Tensor): return dist.all_reduce(tensor, async_op=True) if self.world_size > 1 else None  # the work to wait for
def init_runtime(config: Config) -> Runtime:
    """Device and process group: the one place that touches CUDA or the network."""
    rank, local_rank, world_size = (int(os.environ.get(name) or default) for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    gpus, rows = torch.cuda.device_count(), config.rows
    cuda = config.device == "cuda" or config.device == "auto" and gpus > 0
    refuse(cuda and not gpus, "--device cuda: no usable CUDA device on this machine; leave --device out to train on the CPU")
    refuse(cuda and local_rank >= gpus, f"more processes than the {gpus} GPUs of this machine: lower NPROC")
    fits = sorted((n for n in range(1, min(rows, 2**16) + 1) if rows % n == 0), key=lambda n: abs(n - world_size))[:2]
    refuse(rows % world_size, f"{world_size} processes do not divide the {rows} rows of a batch; nearest that do: {' and '.join(map(str, sorted(fits)))}")
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda: torch.cuda.set_device(device)
    elif platform.libc_ver()[0] == "glibc":
        # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD: freed tensors stay in the heap. Fresh pages made a step up to 10 times as long
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)): ctypes.CDLL(None).mallopt(option, value)
    if world_size == 1: return Runtime(device)
    store = next(dist.rendezvous("env://", timeout=datetime.timedelta(minutes=30)))[0]
    store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group("nccl" if cuda else "gloo", store=dist.PrefixStore("group", store), rank=rank, world_size=world_size,
                            timeout=datetime.timedelta(seconds=config.rank_timeout), device_id=device if cuda else None)
    runtime = Runtime(device, rank, world_size, store)
    runtime.watcher = threading.Thread(target=watch_peers, args=(runtime, 0.8 * config.rank_timeout), daemon=True)
    runtime.watcher.start()
    return runtime
def watch_peers(runtime: Runtime, patience: float):
    """Beat once a second; end this process when a peer has been silent for `patience` seconds (killed, stopped, unplugged).
    Rank 0 watches all, all watch rank 0. A peer that beats but stays away from a collective is up to that one's time-out."""
    store, last = runtime.store, dict.fromkeys(range(1, runtime.world_size) if runtime.rank == 0 else [0], (b"", time.monotonic()))
    with contextlib.suppress(RuntimeError, OSError):  # the store is gone: the launcher is ending all of us
        while not runtime.leaving.wait(1):
            store.set(f"beat/{runtime.rank}", str(time.time()))
            for peer, (seen, since) in last.items():
                now = store.get(f"beat/{peer}") if store.check([f"beat/{peer}"]) else b""
                if now != seen: last[peer] = now, time.monotonic()
                elif seen != b"done" and time.monotonic() - since > patience:
                    tell_failure(runtime, f"rank {peer} died or stopped responding for {patience:.0f} s", 1)
                    os._exit(1)
        store.set(f"beat/{runtime.rank}", "done")
def brief(error) -> str: return (str(error).splitlines() or ["unknown error"])[0]  # all that a user gets of a message
def tell_failure(runtime: Runtime | None, message: str, code: int):  # one line, from the first rank to fail; also into $SPEEDRUN_ERROR_FILE
    line, first = f"train_gpt.py: {brief(message)}", not int(os.environ.get("LOCAL_RANK") or 0)
    with contextlib.suppress(RuntimeError, OSError):  # no store left to ask
        if runtime and runtime.store: first = runtime.store.compare_set("first to fail", "", str(runtime.rank)) == str(runtime.rank).encode()
    if first: print(line, file=sys.stderr, flush=True)
    if first and (path := os.environ.get("SPEEDRUN_ERROR_FILE")): Path(path).write_text(f"{code} {line}\n")

# ------------------------------------------------------------------------------------------------------------------ Data
class Shards:
    """The token shards that match a glob, by name, memory-mapped, as one stream. Format of llm.c: 256 int32 of header, then uint16
    tokens. A shard that changes during the run is refused before it is read: reading past the end of a map kills a process."""
    def __init__(self, pattern: str, flag: str):
        self.pattern, self.paths, self.maps = pattern, sorted(glob.glob(pattern)), []
        refuse(not self.paths, f"--{flag} {pattern}: no such files. ./run.sh fetches or builds them; data/prepare.py makes your own")
        for path in self.paths:
            try:
                self.maps.append(np.memmap(path, "<u2", "r"))
                header, right = self.maps[-1][:6].view("<i4").tolist(), [20240520, 1, len(self.maps[-1]) - 512]
            except (OSError, ValueError) as error: raise UserError(f"{path}: cannot be read as a token shard ({error}); fetch or prepare it again") from None
            why = f"magic number, version and tokens in its header are {header}, in a file of its size {right}"
            refuse(header != right or right[2] < 1, f"{path}: not a whole token shard ({why}); fetch or prepare it again")
        self.stats, self.ends = [file_stat(path) for path in self.paths], np.cumsum([len(tokens) - 512 for tokens in self.maps])
    def __len__(self) -> int: return int(self.ends[-1])
    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count) of the stream, uint16. Errors: UserError when a shard has changed since the start."""
        parts, shard = [], int(np.searchsorted(self.ends, start, side="right"))
        while count:
            path, at = self.paths[shard], start - int(self.ends[shard])  # from the shard's end
            refuse(not os.path.exists(path) or file_stat(path) != self.stats[shard], f"{path}: changed during the run; stopped before training on it")
            parts.append(self.maps[shard][at : min(at + count, 0) or None])
            start, count, shard = start + len(parts[-1]), count - len(parts[-1]), shard + 1
        return np.concatenate(parts)
    def verify(self, tokens: int, vocab_size: int) -> dict[str, str]:
        """{file name: sha256} of the shards that hold the first `tokens` tokens. Errors: UserError for a token >= vocab_size."""
        digests, shards = {}, math.ceil(tokens * len(self.paths) / len(self))
        remedy = f"about {shards} such shards (python data/fineweb.py {shards}), or --epochs_allowed"
        refuse(tokens > len(self), f"{self.pattern} holds {len(self):,} tokens, the run needs {tokens:,}: {remedy}")
        for path, whole in zip(self.paths[: np.searchsorted(self.ends, tokens) + 1], self.maps):
            name, manifest = os.path.basename(path), Path(path).with_name("manifest.json")
            worst, digest = int(whole[512:].max()), hashlib.sha256(whole).hexdigest()
            try: recorded = json.loads(manifest.read_text())["files"].get(name, {}).get("sha256", digest) if manifest.exists() else digest
            except (OSError, ValueError, KeyError, AttributeError, TypeError): raise UserError(f"{manifest}: cannot be read; delete it") from None
            refuse(worst >= vocab_size, f"{path}: holds token {worst}, but --vocab_size is {vocab_size}; wrong data for this preset?")
            refuse(digest != recorded, f"{path}: not the shard that manifest.json records (sha256); fetch or prepare it again")
            refuse(name in digests, f"{path}: another shard of this run has the same file name; rename one")
            digests[name] = digest
        return digests
def file_stat(path: str): return (found := os.stat(path)).st_ino, found.st_size, found.st_mtime_ns

class Batches:
    """Rows of seq_len + 1 tokens; batch_at(step) depends on the shards, the step and the global batch, on nothing else."""
    def __init__(self, shards: Shards, config: Config):
        self.shards, self.seq_len, self.rows, self.stride = shards, config.seq_len, config.rows, 1
        per_epoch, needed = max(1, (len(shards) - 1) // config.batch_tokens), -(-config.steps // config.epochs_allowed)
        self.tokens_read = max(needed, min(config.steps, per_epoch)) * config.batch_tokens + 1  # of the stream
        self.row_count = count = per_epoch * config.rows
        if config.spread_rows:  # a stride near the golden ratio visits all rows once, neighbours far apart
            self.stride = next(n for n in range(int(0.618 * count) or 1, count + 2) if math.gcd(n, count) == 1)
            self.tokens_read = max(self.tokens_read, len(shards))
    def batch_at(self, step: int, rows: slice = slice(None)) -> np.ndarray:
        """Rows of the global batch of `step`, 0-based: [rows, seq_len + 1] uint16, inputs [:, :-1], targets [:, 1:]."""
        numbers = [(step * self.rows + row) * self.stride % self.row_count for row in range(*rows.indices(self.rows))]
        return np.stack([self.shards.read(number * self.seq_len, self.seq_len + 1) for number in numbers])
    def stream(self, start: int, stop: int, runtime: Runtime):
        """Yield this rank's (inputs, targets), [rows / world_size, seq_len] int64 on its device; a thread reads one step ahead."""
        share = self.rows // runtime.world_size
        def read(step: int) -> Tensor:
            rows = torch.from_numpy(self.batch_at(step, slice(runtime.rank * share, (runtime.rank + 1) * share)).astype(np.int64))
            return rows.pin_memory() if runtime.cuda else rows
        with concurrent.futures.ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(read, start)  # the last batch is read twice: no special case
            for step in range(start + 1, stop + 1):
                rows, ahead = ahead.result(), reader.submit(read, min(step, stop - 1))
                yield split(rows.to(runtime.device, non_blocking=True))
def split(rows: Tensor) -> tuple[Tensor, Tensor]: return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()  # [B, T + 1]: inputs, targets

# ----------------------------------------------------------------------------------------------------------------- Model
def norm(x: Tensor) -> Tensor: return F.rms_norm(x, (x.size(-1),))  # RMSNorm without gain
def layer_windows(config: Config) -> list[int]:  # tokens that each layer looks back; 0: no limit. The pattern is repeated over the depth
    return [config.window * (config.window_pattern[i % len(config.window_pattern)] == "S") for i in range(config.n_layer)]
def attention_mask(tokens: Tensor, window: int, config: Config):
    """The one attention rule, for tokens [B, T]: causal; within `window` tokens, if not 0; with doc_mask within a document. As the
    backend wants it: None (plain causal), a BlockMask, or bool [B or 1, 1, T, T]."""
    (B, T), device = tokens.shape, tokens.device
    if not (0 < window < T or config.doc_mask): return None
    docs, rows, i = (tokens == config.vocab_size - 1).cumsum(1) if config.doc_mask else None, B if config.doc_mask else 1, torch.arange(T, device=device)
    def allowed(b, h, q, k):
        ok = (q >= k) & (q - k < window) if window else q >= k
        return ok & (docs[b, q] == docs[b, k]) if config.doc_mask else ok
    if config.attention == "flex": return create_block_mask(allowed, rows, None, T, T, device=device)
    return allowed(torch.arange(rows, device=device)[:, None, None, None], 0, i[:, None], i)
def attend(q: Tensor, k: Tensor, v: Tensor, mask) -> Tensor:  # of [B, H, T, head_dim] under an attention_mask; the mask knows the backend
    if isinstance(mask, BlockMask): return flex_attention(q, k, v, block_mask=mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)

class Linear(nn.Module):
    """y = x Wᵀ; fp32 weight [out, in], cast at use. transposed: kept as [in, out], so MLP.down shares a stack with MLP.up."""
    def __init__(self, n_in: int, n_out: int, transposed: bool = False):
        super().__init__()
        self.n_in, self.n_out, self.transposed = n_in, n_out, transposed
        self.weight = nn.Parameter(torch.empty((n_in, n_out) if transposed else (n_out, n_in)))
    def forward(self, x: Tensor) -> Tensor: return x @ self.weight.to(x.dtype) if self.transposed else F.linear(x, self.weight.to(x.dtype))
def ngram_hashes(tokens: Tensor, config: Config) -> list[Tensor]:
    """Table rows [B, T] of the last 2, 3, ... `ngram` tokens; all before the row or the document counts as a document's mark."""
    mark, back, value, found = config.vocab_size - 1, tokens, tokens, []
    for _ in range(config.ngram - 1):
        back = torch.where(back == mark, mark, F.pad(back[:, :-1], (1, 0), value=mark))  # one token further back
        value = (value * 65599 + back) % 2**31
        found.append((value * 0x9E3779B1 >> 20) % config.ngram_rows)  # Fibonacci hashing: all bits count
    return found
def rotate(x: Tensor, tables: Tensor) -> Tensor:  # rotary position embedding of [B, H, T, head_dim], arXiv 2104.09864; halves, not neighbours
    (cos, sin), (a, b) = tables[:, : x.size(-2)].to(x.dtype), x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)

class CausalSelfAttention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.n_head, self.qk_norm = config.n_head, config.qk_norm
        self.q, self.k, self.v, self.o = (Linear(config.n_embd, config.n_embd) for _ in range(4))
        head_dim = config.n_embd // config.n_head
        angles = torch.outer(torch.arange(config.seq_len), 10000.0 ** -(torch.arange(0, head_dim, 2) / head_dim))
        self.register_buffer("rotary", torch.stack((angles.cos(), angles.sin())), persistent=False)  # [2, T, head_dim / 2]
        self.value_lambda = nn.Parameter(torch.empty(())) if config.value_residual else None
    def forward(self, x: Tensor, v1: Tensor | None, mask) -> tuple[Tensor, Tensor]:
        q, k, v = (w(x).unflatten(-1, (self.n_head, -1)).transpose(1, 2) for w in (self.q, self.k, self.v))  # [B, H, T, head_dim]
        v1 = v if v1 is None else v1
        if self.value_lambda is not None:  # (1-λ)·v + λ·v1; value residual, arXiv 2410.17897, λ learned (Grad62304977)
            v = torch.lerp(v, v1, self.value_lambda.to(v.dtype))
        if self.qk_norm: q, k = norm(q), norm(k)  # arXiv 2302.05442
        y = attend(rotate(q, self.rotary), rotate(k, self.rotary), v, mask)
        return self.o(y.transpose(1, 2).flatten(-2)), v1

class MLP(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.up, self.down = Linear(config.n_embd, 4 * config.n_embd), Linear(4 * config.n_embd, config.n_embd, transposed=True)
    def forward(self, x: Tensor) -> Tensor: return self.down(F.relu(self.up(x)).square())  # ReLU², arXiv 2109.08668

class Block(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.attn, self.mlp = CausalSelfAttention(config), MLP(config)
        self.lambdas = nn.Parameter(torch.empty(2)) if config.embed_residual else None
    def forward(self, x: Tensor, v1: Tensor | None, x0: Tensor, mask) -> tuple[Tensor, Tensor]:
        if self.lambdas is not None:  # λ₀·x + λ₁·x0; embedding residual, record of 6 November 2024 (Grad62304977)
            x = self.lambdas[0].to(x.dtype) * x + self.lambdas[1].to(x.dtype) * x0
        y, v1 = self.attn(norm(x), v1, mask)
        x = x + y
        return x + self.mlp(norm(x)), v1

class GPT(nn.Module):
    """Tokens [B, T] to logits [B, T, padded_vocab] in fp32; with targets [B, T], to the mean cross-entropy in nats."""
    def __init__(self, config: Config):
        super().__init__()
        self.config, self.windows, self.dtype = config, layer_windows(config), torch.bfloat16 if config.bf16 else torch.float32
        self.wte = nn.Embedding(config.padded_vocab, config.n_embd, dtype=self.dtype if config.untie_head else torch.float32)
        parts = [config.n_embd // (config.ngram - 1)] * (config.ngram - 1) if config.ngram else []  # widths of the tables
        self.ngrams = nn.ModuleList(nn.Embedding(config.ngram_rows, width, dtype=self.dtype) for width in parts)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.lm_head = Linear(config.n_embd, config.padded_vocab)
        if not config.untie_head: self.lm_head.weight = self.wte.weight
    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        masks = {window: attention_mask(tokens, window, self.config) for window in set(self.windows)}
        x = self.wte(tokens).to(self.dtype)  # [B, T, D]
        if self.ngrams:  # hashed bigrams: record of 1.65 min, January 2026; here longer ones, too, that share the width
            grams = torch.cat([table(rows) for table, rows in zip(self.ngrams, ngram_hashes(tokens, self.config))], dim=-1)
            x = x + F.pad(grams, (0, x.size(-1) - grams.size(-1)))
        x, v1 = norm(x), None
        x0 = x
        for block, window in zip(self.blocks, self.windows): x, v1 = block(x, v1, x0, masks[window])
        logits = self.lm_head(norm(x)).float()
        if cap := self.config.softcap: logits = cap * torch.tanh(logits / cap)  # Gemma 2, arXiv 2408.00118
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())
def seeded(*where) -> torch.Generator:  # A CPU generator that depends on its arguments alone: equal on all ranks, whatever was drawn before
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(repr(where).encode()).digest()[:7], "little"))
def uniform(p: Tensor, n_in: int, *where):  # fill p from U(±1/√n_in), as torch.nn.Linear does
    p.copy_(torch.rand(p.shape, generator=seeded(*where)) * 2 * n_in**-0.5 - n_in**-0.5)
@torch.no_grad()
def init_weights(model: GPT, config: Config):
    """Every parameter's first value, by name. Errors: KeyError for a name without a rule."""
    zero = dict.fromkeys(("q", "k", "v", "up"), False) | dict.fromkeys(("o", "down", "lm_head"), config.zero_init)  # muP-like
    constant = {"value_lambda": torch.tensor(0.5), "lambdas": torch.tensor([1.0, 0.0])}
    for name, p in model.named_parameters():
        kind = name.removesuffix(".weight").split(".")[-1]
        if kind in constant: p.copy_(constant[kind])
        elif kind == "wte":  # tied, it makes the logits too: then GPT-2's small scale
            p.copy_(torch.randn(p.shape, generator=seeded(config.seed, name)) * (1.0 if config.untie_head else 0.02))
        elif name.startswith("ngrams.") or zero[kind]: p.zero_()
        else: uniform(p, p.size(0) if kind == "down" else p.size(1), config.seed, name)
def flops_per_token(config: Config) -> float:
    """Floating-point operations of forward and backward: 6 per weight in a matmul, and attention over its mean span."""
    spans = [min(window or config.seq_len, config.seq_len / 2) for window in layer_windows(config)]
    return 6 * config.n_embd * (12 * config.n_layer * config.n_embd + config.padded_vocab) + 12 * config.n_embd * sum(spans)

# ------------------------------------------------------------------------------------------------------------ Optimizers
class Optimizer:
    """Parameters as rows of one tensor, sharded over ranks (ZeRO, arXiv 1910.02054); a subclass says what the update is.
    named: {name: parameter}; they and their gradients become views into `weights` and `grads`, [rows, *row_shape], padded to divide over
    ranks. row_shape: () where any element may go to any rank (Adam), else the matrix that must stay whole. shards=1: every rank updates
    everything. A parameter's attribute rate_scale, if any, is a factor on its rate. steps: updates since the moments began."""
    def __init__(self, named: dict[str, nn.Parameter], lr: float, row_shape: tuple, config: Config, runtime: Runtime, method=None, shards=0):
        self.named, self.lr, self.config, self.runtime, self.shards = named, lr, config, runtime, shards or runtime.world_size
        self.state: dict[str, Tensor] = {}  # {name: [own rows, ...]}
        self.steps, self.scale, self.row_scale, self.method, self.work = 0, 1.0, 1.0, method or Method(), None
        self.spans, rows, first = {}, 0, next(iter(named.values()))
        for name, p in named.items(): self.spans[name] = slice(rows, rows := rows + p.numel() // math.prod(row_shape))
        share, index = -(-rows // self.shards), runtime.rank if self.shards > 1 else 0
        self.mine = slice(index * share, (index + 1) * share)
        self.weights = torch.zeros(share * self.shards, *row_shape, dtype=first.dtype, device=first.device)
        self.grads = torch.zeros_like(self.weights)
        for name, p in named.items():
            self.weights[self.spans[name]] = p.detach().view(-1, *row_shape)
            p.data, p.grad = (whole[self.spans[name]].view_as(p) for whole in (self.weights, self.grads))
        scales = {name: torch.full((1,) * self.weights.ndim, getattr(p, "rate_scale", 1.0)) for name, p in named.items()}
        if any(scale != 1 for scale in scales.values()): self.row_scale = self.own_rows(scales)
    def own_rows(self, named: dict[str, Tensor]) -> Tensor:  # this rank's rows of per-parameter tensors [its rows, ...]; padding rows are zero
        like = next(iter(named.values()))
        whole = torch.zeros(len(self.weights), *like.shape[1:], dtype=like.dtype)
        for name, span in self.spans.items(): whole[span] = named[name]
        return whole[self.mine].to(self.weights.device)
    def reduce(self):  # start to sum the gradients over ranks, each rank's rows on that rank
        self.work = reduce_scatter(self.grads[self.mine], self.grads, async_op=True) if self.shards > 1 else self.runtime.reduce(self.grads)
    @torch.no_grad()
    def step(self):  # update this rank's rows, then start to gather everyone's
        self.finish()
        self.steps += 1
        update = self.method.lift(self, self.update(self.method.project(self, self.grads[self.mine])))
        self.weights[self.mine].sub_(update * (self.lr * self.scale * self.row_scale))
        self.grads.zero_()
        if self.shards > 1: self.work = all_gather(self.weights, self.weights[self.mine], async_op=True)
    def finish(self):
        if self.work: self.work.wait()
        self.work = None
    def update(self, g: Tensor) -> Tensor: raise NotImplementedError  # what to subtract, times the rate, for gradient rows [own rows, ...]
    def call(self, rule, *args) -> Tensor: return (compiled(rule) if self.config.compile else rule)(*args)
    def moment(self, name: str, like: Tensor) -> Tensor:  # fp32, zero at first, to be changed in place
        if name not in self.state: self.state[name] = torch.zeros_like(like, dtype=torch.float32)
        return self.state[name]
    def gather_state(self) -> dict:
        """{parameter: {"rule": class name, "steps": n, state name: its rows}}, whole, on the CPU of every rank."""
        whole = {param: {"rule": type(self).__name__, "steps": self.steps} for param in self.named}
        for name, own in self.state.items():
            own = own.contiguous()
            shards = [torch.empty_like(own) for _ in range(self.shards)] if self.shards > 1 else [own]
            if self.shards > 1: dist.all_gather([s.view(torch.uint8) for s in shards], own.view(torch.uint8))
            rows = torch.cat([s.cpu() for s in shards])
            for param, span in self.spans.items(): whole[param][name] = rows[span].clone()
        return whole
    def load_state(self, whole: dict):
        """Inverse of gather_state, for any number of ranks. Errors: KeyError for a parameter that is not there, or of another rule."""
        first, rule = whole[next(iter(self.named))], type(self).__name__
        if first["rule"] != rule: raise KeyError(f"{next(iter(self.named))} was trained by {first['rule']}, not by {rule}")
        self.steps, names = first["steps"], sorted(first.keys() - {"rule", "steps"})
        self.state = {name: self.own_rows({param: whole[param][name] for param in self.named}) for name in names}
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)  # torch 2.13 renamed them
all_gather = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
compiled = functools.cache(functools.partial(torch.compile, dynamic=False))  # once per update rule; each stack's shape is compiled for itself
def adam_update(g: Tensor, m: Tensor, v: Tensor, beta1: float, beta2: float, eps: float, bias1: Tensor, bias2: Tensor) -> Tensor:
    """Adam, arXiv 1412.6980; bias: 1 - beta ** steps. Changes the moments m and v in place."""
    g = g.float()
    m.lerp_(g, 1 - beta1)
    v.lerp_(g * g, 1 - beta2)
    return (m / bias1) / ((v / bias2).sqrt() + eps)
def newton_schulz(g: Tensor, dtype: torch.dtype) -> Tensor:
    """Matrices [n, rows, cols] with singular values brought near 1 (0.7 to 1.2) by five steps, Keller Jordan's coefficients."""
    tall = g.size(-2) > g.size(-1)
    x = (g.mT if tall else g).to(dtype)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # largest singular value at most 1
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315) @ x
    return (x.mT if tall else x).float()

class Adam(Optimizer):
    def update(self, g: Tensor) -> Tensor:
        c, bias1, bias2 = self.config, *(torch.tensor(1 - beta**self.steps) for beta in (self.config.beta1, self.config.beta2))
        return self.call(adam_update, g, self.moment("exp_avg", g), self.moment("exp_avg_sq", g), c.beta1, c.beta2, c.adam_eps, bias1, bias2)
class Adagrad(Optimizer):
    """Rate over the root of the sum of all squared gradients (Duchi et al., JMLR 2011): rare rows take large steps when their turn comes."""
    def update(self, g: Tensor) -> Tensor: return g / (self.moment("sum_sq", g).addcmul_(g.float(), g.float()).sqrt() + 1e-12)
class Muon(Optimizer):
    """Momentum, orthogonalised by Newton-Schulz; Nesterov style (Keller Jordan, kellerjordan.github.io/posts/muon). NorMuon (arXiv
    2510.05491) then divides each row of a tall matrix, column of a wide one, by its running RMS and keeps the update's norm."""
    def update(self, g: Tensor) -> Tensor:
        c, momentum, m = self.config, momentum_at(self.steps - 1, self.config), self.moment("momentum", g)
        u = self.call(newton_schulz, g + momentum * m.mul_(momentum).add_(g), torch.bfloat16 if c.bf16 else torch.float32)
        if not c.normuon: return u
        square = u.square().mean(-1 if u.size(-2) >= u.size(-1) else -2, keepdim=True)
        mean = self.moment("row_sq", square).lerp_(square, 1 - c.normuon) / (1 - c.normuon**self.steps)
        even = u / (mean + 1e-16).sqrt()
        return even * (u.norm(dim=(-2, -1), keepdim=True) / (even.norm(dim=(-2, -1), keepdim=True) + 1e-7))
def make_optimizers(model: nn.Module, config: Config, runtime: Runtime, methods: list) -> list[Optimizer]:
    """Every parameter in exactly one optimizer; the hidden matrices in stacks of one shape."""
    c, groups = config, {}
    for name, p in model.named_parameters():
        kind = ("matrices" if p.ndim == 2 else "scalars") if name.startswith("blocks.") else name.split(".")[0]
        groups.setdefault("lm_head" if p is model.lm_head.weight else kind, {})[name] = p
    rates = dict(wte=(Adam, c.lr_embed), lm_head=(Adam, c.lr_head), scalars=(Adam, c.lr_scalar), ngrams=(Adagrad, c.lr_ngram))
    optimizers = [rule(groups[kind], lr, (), c, runtime) for kind, (rule, lr) in rates.items() if kind in groups]
    return optimizers + stack_matrices(model, groups["matrices"], c.galore_inner if c.galore else c.matrix_optimizer, c, runtime, methods)
def stack_matrices(model: nn.Module, matrices: dict, rule: str, config: Config, runtime: Runtime, methods: list) -> list[Optimizer]:
    """Optimizers for hidden matrices, one per shape (galore_per_layer: one each). Times √(out / in), orthogonal updates of all shapes act alike."""
    method, alone, groups = next((m for m in methods if m.transforms), Method()), config.galore_per_layer, {}
    for name, p in matrices.items():
        linear = model.get_submodule(name.rpartition(".")[0])
        n_in, n_out = (linear.n_in, linear.n_out) if p is linear.weight else reversed(p.shape)
        p.rate_scale = (max(1.0, n_out / n_in) ** 0.5 if rule == "muon" else 1.0) * getattr(p, "lr_mult", 1.0)
        groups.setdefault((name if alone else "", *p.shape), {})[name] = p
    new, lr = method.optimizers[rule], config.lr_muon if rule == "muon" else config.lr_adam
    return [new(group, lr, shape, config, runtime, method, int(alone)) for (_, *shape), group in groups.items()]

# --------------------------------------------------------------------------------------------------------------- Methods
class Method:
    """An optional method: hooks that default to nothing, so that the hot path has no branch for any of them."""
    transforms, optimizers = False, {"muon": Muon, "adam": Adam}  # transforms: do project and lift change updates?
    def __init__(self, config: Config | None = None, log=print): self.config, self.log = config, log
    def attach(self, model: GPT): ...  # after init, before optimizers and compile
    def project(self, optimizer: Optimizer, g: Tensor) -> Tensor: return g  # gradient rows, on their rank, before the update
    def lift(self, optimizer: Optimizer, u: Tensor) -> Tensor: return u  # the update, back to the weights' shape
    def resume(self, step: int, run: "Run"): ...  # give model and optimizers the shape of after `step` updates, if they lack it
    def after_step(self, step: int, run: "Run"): ...  # after update number `step`, 1-based
    def eval_weights(self, model: GPT): return contextlib.nullcontext()  # around validation
    def state_dict(self) -> dict: return {}
    def load_state_dict(self, state: dict): ...

class LoRALinear(Linear):
    """y = x Wᵀ + s·(x Aᵀ) Bᵀ: W frozen, A [r, in], B [out, r] zero at first, so the function is the same as before."""
    def __init__(self, linear: Linear, rank: int, scale: float):
        super().__init__(linear.n_in, linear.n_out, linear.transposed)
        self.weight, self.scale = linear.weight.requires_grad_(False), scale
        self.weight.grad = None
        self.A, self.B = (nn.Parameter(self.weight.new_empty(shape)) for shape in ((rank, self.n_in), (self.n_out, rank)))
    def forward(self, x: Tensor) -> Tensor: return super().forward(x) + self.scale * F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype))
    def merged(self) -> Tensor: return self.weight + self.scale * ((self.B @ self.A).T if self.transposed else self.B @ self.A)
def layers_of(model: nn.Module, kind: type) -> dict[str, Linear]: return {n: m for n, m in model.blocks.named_modules(prefix="blocks") if type(m) is kind}

class ReLoRA(Method):
    """High-rank training through low-rank updates (arXiv 2307.05695): after a warm start each hidden Linear becomes a LoRALinear;
    every interval B A is merged into the fp32 W, A drawn anew, B zero, moments pruned, the rates re-warmed (lr_at)."""
    @torch.no_grad()
    def resume(self, step: int, run: "Run"):
        c, model = self.config, run.model
        if step < c.relora_warm_start or layers_of(model, LoRALinear): return
        for name, linear in layers_of(model, Linear).items():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, LoRALinear(linear, c.relora, c.relora_alpha / c.relora))
        adapters = {name: p for name, p in model.named_parameters() if name.endswith((".A", ".B"))}
        run.optimizers = [o for o in run.optimizers if o.weights.ndim != 3]  # those of the frozen matrices go, with their state
        run.optimizers += stack_matrices(model, adapters, c.relora_optimizer, c, run.runtime, [])
    @torch.no_grad()
    def after_step(self, step: int, run: "Run"):
        c = self.config
        if step < c.relora_warm_start or (step - c.relora_warm_start) % c.relora_interval or step == c.steps: return
        for layer in layers_of(run.model, LoRALinear).values(): layer.weight.copy_(layer.merged())
        for optimizer in run.optimizers:
            if optimizer.weights.ndim == 3 and optimizer.state and step > c.relora_warm_start: self.prune(optimizer)
        self.resume(step, run)  # at the end of the warm start, when there is nothing to merge yet
        for name, layer in layers_of(run.model, LoRALinear).items():
            uniform(layer.A, layer.n_in, c.seed, "relora", step, name)
            layer.B.zero_()
    def prune(self, optimizer: Optimizer):
        """Keep the largest entries of first moments, the same ones of second ones. Adam's count restarts at 1: unbiased means stay as they were."""
        c, state = self.config, optimizer.state
        first = state["exp_avg" if "exp_avg" in state else "momentum"].flatten(1)
        kept = first.abs().topk(round(first.size(1) * (1 - c.relora_prune)), dim=1).indices
        keep, betas = torch.zeros_like(first).scatter_(1, kept, 1.0), dict(exp_avg=c.beta1, exp_avg_sq=c.beta2, momentum=0.0)
        for name in betas.keys() & state.keys():
            state[name].mul_(keep.view_as(state[name])).mul_((1 - betas[name]) / (1 - betas[name] ** optimizer.steps))
        if "exp_avg" in state: optimizer.steps = 1

class EightBit:
    """Moments in float8, an fp32 scale per 256 entries (like 8-bit Adam, arXiv 2110.02861); the second as its root: a range of 2^36, not 2^18."""
    def moment(self, name: str, like: Tensor) -> Tensor:
        if name not in self.opened and name in self.state:
            values = (self.state[name].view(torch.float8_e4m3fn).float() * self.state[name + "_scale"]).flatten(1)
            values = values[:, : like[0].numel()].reshape(like.shape)
            self.opened[name] = values.square() if name == "exp_avg_sq" else values
        if name not in self.opened: self.opened[name] = torch.zeros_like(like, dtype=torch.float32)
        return self.opened[name]
    def step(self):
        self.opened = {}  # moments in fp32, during this step
        super().step()
        while self.opened:
            name, moment = self.opened.popitem()
            values = (moment.sqrt() if name == "exp_avg_sq" else moment).flatten(1)
            values = F.pad(values, (0, -values.size(1) % 256)).unflatten(1, (-1, 256))
            scale = values.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 448  # the largest float8_e4m3fn
            self.state |= {name: (values / scale).to(torch.float8_e4m3fn).view(torch.uint8), name + "_scale": scale}

class PerLayer:
    """Update a matrix in the backward pass, as its gradient arrives, then free the gradient (LOMO, arXiv 2306.09782)."""
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        (p,) = self.named.values()
        self.grads = p.grad = None
        p.register_post_accumulate_grad_hook(self.arrived)
    def arrived(self, p: Tensor):
        self.grads = p.grad.view_as(self.weights)
        super().reduce()
        super().step()
        self.grads = p.grad = None
    def reduce(self): ...  # both have happened
    def step(self): ...

class GaLore(Method):
    """Gradients, and so the optimizer's state, in a low-rank space (arXiv 2403.03507): the inner optimizer sees G P (or PᵀG), P the gradient's
    leading singular vectors on its shorter side, renewed every interval; its update is projected back and scaled. At a refresh the moments
    move to the new basis (as in LDAdam, arXiv 2410.16103): the first by C = P_oldᵀ P_new, the second by C squared entry by entry."""
    transforms = True
    def __init__(self, config: Config, log=print):
        super().__init__(config, log)
        mixins = (PerLayer,) * config.galore_per_layer + (EightBit,) * (config.galore_bits == 8)
        self.optimizers = {rule: type(f"GaLore{base.__name__}", (*mixins, base), {}) for rule, base in Method.optimizers.items()}
    def project(self, optimizer: Optimizer, g: Tensor) -> Tensor:
        tall, r = g.size(-2) >= g.size(-1), self.config.galore  # P: [rows, shorter side, r]; zero until the row has had a gradient
        if "P" not in optimizer.state: optimizer.state["P"] = torch.zeros(len(g), min(g.shape[1:]), r, device=g.device)
        P, live = optimizer.state["P"], g.flatten(1).any(1)  # behind zero-initialised weights the first gradients are zero
        due = live if (optimizer.steps - 1) % self.config.galore_interval == 0 else live & ~P.flatten(1).any(1)
        if due.any(): self.refresh(optimizer, g, due, tall)
        return g @ P if tall else P.mT @ g
    def lift(self, optimizer: Optimizer, u: Tensor) -> Tensor:
        P = optimizer.state["P"]
        return self.config.galore_scale * (u @ P.mT if optimizer.weights.size(-2) >= optimizer.weights.size(-1) else P @ u)
    def refresh(self, optimizer: Optimizer, g: Tensor, due: Tensor, tall: bool):
        P, r = optimizer.state["P"], self.config.galore
        old, noise = P.clone(), torch.randn(P[due].shape, generator=seeded(self.config.seed, "galore", optimizer.steps)).to(g.device)
        try:
            U, _, Vh = torch.linalg.svd(g[due].float(), full_matrices=False)
            P[due] = (Vh.mT if tall else U)[..., :r]
        except torch.linalg.LinAlgError:
            P[due] = torch.where(P[due].flatten(1).any(1)[:, None, None], P[due], torch.linalg.qr(noise)[0])  # keep, or draw at random
            self.log(f"galore: an SVD did not converge at update {optimizer.steps}, stack of {next(iter(optimizer.named))}: old bases kept, else random")
        change, like = old.mT @ P, g[..., :r] if tall else g[:, :r]  # old basis to new; the same basis where a row was not due
        for name in {"exp_avg", "exp_avg_sq", "momentum"} & set(optimizer.state):
            turn, moment = change.square() if name == "exp_avg_sq" else change, optimizer.moment(name, like)
            moment[due] = (moment @ turn if tall else turn.mT @ moment)[due]

class LAWA(Method):
    """Latest weight averaging: the mean of the last k snapshots, one every interval (arXiv 2306.03241). eval: validate on it, train on
    untouched; replace: train on from it, too. ReLoRA's adapters are averaged merged (W + s·B A, then B = 0)."""
    window, place = (), None
    @torch.no_grad()
    def after_step(self, step: int, run: "Run"):
        c, device = self.config, run.runtime.device
        if step % c.lawa_interval: return
        weights = {name: p.detach().clone() for name, p in run.model.named_parameters()}
        for name, layer in layers_of(run.model, LoRALinear).items():
            weights |= {f"{name}.weight": layer.merged().detach(), f"{name}.B": torch.zeros_like(layer.B)}
        size = c.lawa * sum(t.nbytes for t in weights.values())  # on the device, if the window fits into a third of its free memory
        self.place = self.place or (device if run.runtime.cuda and size < torch.cuda.mem_get_info()[0] / 3 else torch.device("cpu"))
        same_model = [old for old in self.window if old.keys() == weights.keys()]  # since a wrap, if there was one
        self.window = [{name: t.to(self.place) for name, t in old.items()} for old in [*same_model, weights][-c.lawa:]]
        if c.lawa_mode == "replace" and len(self.window) == c.lawa: self.put(run.model, self.mean())
    def mean(self) -> dict[str, Tensor]:
        mean = {name: sum(weights[name].double() for weights in self.window) / len(self.window) for name in self.window[0]}
        return mean | {name: t for name, t in self.window[-1].items() if name.endswith(".A")}  # drawn anew at a merge, so not averaged
    def put(self, model: GPT, weights: dict[str, Tensor]):
        for name, p in model.named_parameters(): p.data.copy_(weights[name])
    @contextlib.contextmanager
    def eval_weights(self, model: GPT):
        raw = {name: p.detach().clone() for name, p in model.named_parameters()}
        if self.window and self.window[-1].keys() == raw.keys(): self.put(model, self.mean())
        yield
        self.put(model, raw)
    def state_dict(self) -> dict: return {"window": [{name: t.cpu() for name, t in weights.items()} for weights in self.window]}
    def load_state_dict(self, state: dict): self.window = state["window"]

class SuPar(Method):
    """SuPar, sparse maximal update parameterization (arXiv 2405.15743); at sparsity 0 it is muP (arXiv 2203.03466). Static random masks of density
    rho on the hidden matrices. With m_d = width / base width: hidden init variance 1 / rho (the fan-in init holds 1 / m_d), Adam's hidden rate
    1 / (m_d rho), logits 1 / m_d. Muon, found here: one spectral norm at every width, so no m_d; the unmasked gradient is orthogonalised (a
    masked one has no leading direction left), and the rate times rho ** -0.25 keeps the best rate in place (records/methods)."""
    transforms, MUON_POWER = True, 0.25
    @torch.no_grad()
    def attach(self, model: GPT):
        c, self.masks = self.config, {}
        m_d, density = c.n_embd / (c.mup_base_width or c.n_embd), 1 - c.sparsity
        for name, p in model.named_parameters():
            if name.startswith("blocks.") and p.ndim == 2:
                p.lr_mult = 1 / (m_d * density) if c.matrix_optimizer == "adam" else density**-self.MUON_POWER
                self.masks[name] = torch.rand(p.shape, generator=seeded(c.seed, "mask", name)) < density
                p.mul_(self.masks[name].to(p.device)).mul_(density**-0.5)
        if m_d != 1: model.lm_head.register_forward_hook(lambda module, inputs, logits: logits / m_d)
    def lift(self, optimizer: Optimizer, u: Tensor) -> Tensor:
        if not self.config.sparsity: return u
        if "mask" not in optimizer.state:
            optimizer.state["mask"] = optimizer.own_rows({name: self.masks[name][None] for name in optimizer.named})
        return u * optimizer.state["mask"]
def make_methods(config: Config, log=print) -> list[Method]:
    on = dict(relora=ReLoRA, galore=GaLore, sparsity=SuPar, mup_base_width=SuPar, lawa=LAWA)  # LAWA last: it sees what the others did
    return [method(config, log) for method in dict.fromkeys(method for name, method in on.items() if getattr(config, name))]

# ------------------------------------------------------------------------------------------------------------- Schedules
def lr_at(step: int, config: Config) -> float:
    """Factor on all rates for update `step`, 0-based: linear warm-up, constant, linear cool-down; jagged with ReLoRA."""
    c, since_wrap, left = config, step - config.relora_warm_start, (config.steps - step) / max(1, round(config.cooldown * config.steps))
    factor = min(1.0, (step + 1) / max(1, c.warmup), c.lr_floor + (1 - c.lr_floor) * left)
    if not c.relora or since_wrap < 0: return factor
    return factor * min(1.0, (since_wrap % c.relora_interval + 1) / c.relora_rewarm)  # from near zero back to the same curve
def momentum_at(step: int, config: Config) -> float:  # Muon's momentum for update `step`: from 0.85 up (record of 6 November 2024)
    share = min(1.0, step / max(1, config.momentum_warmup))
    return (1 - share) * min(0.85, config.momentum) + share * config.momentum

# --------------------------------------------------------------------------------------------------------- Clock and log
class Clock:
    """Training time. Synchronises the device at every start and stop; nothing else in this file measures training."""
    def __init__(self, device: torch.device):
        self.seconds, self.since, self.sync = 0.0, None, torch.cuda.synchronize if device.type == "cuda" else lambda: None
    def now(self) -> float: return self.sync() or time.perf_counter()  # sync() returns None
    def start(self): self.since = self.now()
    def stop(self): self.seconds, self.since = self.seconds + self.now() - self.since, None
    @contextlib.contextmanager
    def paused(self):
        self.stop()
        yield
        self.start()
    ms = property(lambda self: 1000 * (self.seconds + (time.perf_counter() - self.since if self.since else 0.0)))  # so far, unsynchronised
def write_whole(path: Path, data: bytes):
    """The file appears complete or not at all: written aside, synced, renamed. Errors: OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(path.with_suffix(".tmp"), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path.with_suffix(".tmp"), path)
    finally: path.with_suffix(".tmp").unlink(missing_ok=True)

class Log:
    """logs/<run_id>.txt and the screen, on rank 0: the source, the facts, the steps, the result.
    When the disk fills up or the folder goes, lines wait in memory and the run goes on; close() is the last try."""
    def __init__(self, config: Config, runtime: Runtime, argv: list[str], data: dict[str, str]):
        self.run_id = runtime.exchange("run_id", f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{uuid.uuid4().hex[:6]}")[0]
        self.path, self.main, self.live = Path(config.log_dir, f"{self.run_id}.txt"), runtime.rank == 0, sys.stdout.isatty()
        cpu, driver = grep("/proc/cpuinfo", r"model name.*: (.*)"), grep("/proc/driver/nvidia/version", r"Module\D*([\d.]+)")
        facts = dict(run_id=self.run_id, python=platform.python_version(), torch=torch.__version__, cuda=torch.version.cuda if runtime.cuda else "none",
                     driver=driver if runtime.cuda else "none", device=device_name(runtime.device), cpu=f"{cpu}, {torch.get_num_threads()} threads",
                     world_size=runtime.world_size, argv=" ".join(argv), source_sha256=SOURCE_SHA256, data=json.dumps(data), config=json.dumps(vars(config)))
        self.lines = [SOURCE.removesuffix("\n"), "=" * 100, *(f"{name}: {value}" for name, value in facts.items()), "=" * 100]
        self.shown, self.behind = 0.0, True  # behind: the file lacks lines
        self.write(fatal=f"--log_dir {config.log_dir}: no log can be written there")
    def write(self, fatal: str = ""):  # append the newest line, or write the whole file where it lacks more than that
        if not self.main: return
        try:
            if self.behind or not self.path.exists(): write_whole(self.path, "\n".join([*self.lines, ""]).encode())
            else:
                with open(self.path, "ab") as file: file.write(f"{self.lines[-1]}\n".encode())
            self.behind = False
        except OSError as error:
            refuse(fatal, f"{fatal} ({error.strerror}); free space, or name another --log_dir")
            if not self.behind: print(f"train_gpt.py: {self.path}: {error.strerror}; training goes on, its log waits in memory", file=sys.stderr)
            self.behind = True
    def line(self, text: str, echo: bool = False):  # into the log; echo: and onto the screen
        if echo and self.main: print(("\r\033[K" if self.live else "") + text, flush=True)
        self.lines.append(text)
        self.write()
    def close(self):
        if self.behind or not self.path.exists(): self.write(fatal=f"{self.path}: the run is over, but its log cannot be written")
    def step(self, step: int, steps: int, kind: str, loss: float, ms: float):  # the public speedrun's line; kind: val or train
        self.line(f"step:{step}/{steps} {kind}_loss:{loss:.4f} train_time:{ms:.0f}ms step_avg:{ms / max(1, step):.2f}ms", echo=kind == "val")
    def progress(self, text: str):  # the live line: rewritten in place on a terminal, every ten seconds elsewhere
        if self.main and time.monotonic() - self.shown > (0.2 if self.live else 10):
            self.shown = time.monotonic()
            print(f"\r\033[K{text}" if self.live else text, end="" if self.live else "\n", flush=True)
def device_name(device: torch.device) -> str: return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
def grep(path: str, pattern: str) -> str:
    return (re.findall(pattern, Path(path).read_text() if os.path.exists(path) else "") or [platform.machine()])[0]

# ------------------------------------------------------------------------------------------------------------ Checkpoint
class Run:
    """A run: its settings, and all that training changes. data: {file name: sha256}; step: updates done; signal: the one that asks us to stop."""
    def __init__(self, config: Config, runtime: Runtime, model: GPT, methods: list, optimizers=(), clock=None, log=None, data=None, step: int = 0):
        self.config, self.runtime, self.model, self.methods, self.optimizers = config, runtime, model, methods, list(optimizers)
        self.clock, self.log, self.data, self.step, self.resumed, self.signal = clock, log, data, step, False, 0
    size = property(lambda self: sum(p.numel() for p in self.model.parameters()))
    def state(self) -> dict:
        """All of it, on the CPU, by name, the same for any number of ranks. A collective: every rank must call it."""
        return {"model": {name: t.detach().cpu().clone() for name, t in self.model.state_dict().items()}, "step": self.step,
                "optimizers": functools.reduce(dict.__or__, (o.gather_state() for o in self.optimizers), {}), "rng": torch.get_rng_state(),
                "methods": {type(m).__name__: m.state_dict() for m in self.methods}}
    def load_state(self, state: dict, origin: Path | None = None):
        """Take the shape and the values of a state. Errors: UserError when the checkpoint `origin` is of another model or method."""
        try:
            for method in self.methods: method.resume(state["step"], self)
            self.model.load_state_dict(state["model"])
            for optimizer in self.optimizers: optimizer.load_state(state["optimizers"])
            for method in self.methods: method.load_state_dict(state["methods"][type(method).__name__])
            torch.set_rng_state(state["rng"])
            self.step = state["step"]
        except (KeyError, RuntimeError) as error:
            raise (UserError(f"{origin} does not fit this model or method ({brief(error)[:90]})") if origin else error) from None
def save_checkpoint(run: Run):
    """checkpoint_dir/<run_id>/step_<n>.pt: torch.save and the sha256 of that. A collective."""
    state, path, log, file = run.state(), Path(run.config.checkpoint_dir, run.log.run_id, f"step_{run.step:06d}.pt"), run.log, io.BytesIO()
    state |= dict(train_seconds=run.clock.seconds, config=vars(run.config), data_sha256=run.data, source_sha256=SOURCE_SHA256,
                  log=[text for text in log.lines if text.startswith(("step:", "resumed:"))])
    if run.runtime.rank == 0:
        torch.save(state, file)
        try:
            write_whole(path, file.getvalue() + hashlib.sha256(file.getvalue()).digest())
            for old in sorted(path.parent.glob("step_*.pt"))[: -run.config.checkpoint_keep]: old.unlink()
            log.line(f"checkpoint: {path}")
        except OSError as error: log.line(f"checkpoint: {path} could not be written ({error.strerror}); training goes on without it", echo=True)
    run.runtime.exchange(f"saved {run.step}", True)  # the others wait here: a collective would time out
def read_checkpoint(path: Path) -> dict:
    """Errors: UserError when the file cannot be read or is not, bit for bit, what save_checkpoint wrote."""
    try:
        data = path.read_bytes()
        refuse(hashlib.sha256(data[:-32]).digest() != data[-32:], "its checksum is wrong")
        state = torch.load(io.BytesIO(data[:-32]), map_location="cpu", weights_only=True)
        refuse(not {"step", "config", "model", "optimizers", "methods", "log"} <= set(state), "not of this trainer")
        return state
    except Exception as error:  # unreadable, damaged, or whatever torch makes of a foreign file: the user needs one line
        raise UserError(f"{path}: damaged or not a checkpoint ({brief(error)[:90]})") from None
def find_checkpoint(wanted: str, folder: str, say, accept=lambda state: True) -> tuple[Path, dict]:
    """The checkpoint at a path, or the latest; one that is damaged is named, and the next older one taken."""
    path, latest = Path(wanted), wanted == "latest"
    if latest: found = sorted(Path(folder).glob("*/step_*.pt"), key=lambda p: (p.stat().st_mtime_ns, p.name), reverse=True)
    else: found = [path, *sorted((p for p in path.parent.glob("step_*.pt") if p.name < path.name), reverse=True)] if path.is_file() else []
    refuse(not found, f"no checkpoint {f'in {folder}' if latest else wanted}: train with --checkpoint_every N first")
    for path in found:
        try:
            if accept(state := read_checkpoint(path)): return path, state
        except UserError as error: say(f"{error}; looking for an older one")
    raise UserError(f"none of {len(found)} checkpoints in {found[0].parent} can be used; start again without --resume")
def differences(state: dict, run: Run) -> list[str]:  # what has changed between the run that wrote a checkpoint and this one
    before, now = state["config"], vars(run.config)
    found = [f"--{name} {before.get(name)} -> {now[name]}" for name in now if name not in RUN_LOCAL and before.get(name) != now[name]]
    return found + ["the source of train_gpt.py"] * (state["source_sha256"] != SOURCE_SHA256) + ["the data"] * (state["data_sha256"] != run.data)
def resume(run: Run):
    """Go on from --resume; in a process that torchrun has restarted, from this run's own newest checkpoint if there is one."""
    c, say = run.config, functools.partial(run.log.line, echo=True)
    restarted = c.checkpoint_every and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if not (c.resume or restarted): return
    try: path, state = find_checkpoint("latest" if restarted else c.resume, c.checkpoint_dir, say, lambda s: not restarted or not differences(s, run))
    except UserError as error:
        if c.resume: raise
        return say(f"restarted from step 0: {error}")
    changed, step, steps = differences(state, run), state["step"], run.runtime.exchange("resume", state["step"])
    refuse(changed and not c.resume_anyway, f"{path} is from another run: {'; '.join(changed)}. Give the flags of that run, or --resume_anyway")
    refuse(len(set(steps)) > 1, f"the ranks found checkpoints of different steps, {steps}: --checkpoint_dir must be a shared folder")
    refuse(step > c.steps, f"{path} is from step {step}, but the run ends at {c.steps}: nothing left to train")
    run.load_state(state, path)
    run.clock.seconds, run.resumed = state["train_seconds"], True
    for text in state["log"]: run.log.line(text)
    say("resumed: " + json.dumps({"from": str(path), "step": step, "train_time_ms": round(1000 * run.clock.seconds), "changed": changed}))

# -------------------------------------------------------------------------------------------------------------- Evaluate
def largest_divisor(n: int, at_most: int) -> int: return max(d for d in range(1, min(n, at_most) + 1) if n % d == 0)
@torch.no_grad()
def evaluate(forward, shards: Shards, config: Config, runtime: Runtime, micro: int) -> float:
    """Mean cross-entropy, nats per token, of the first val_tokens tokens of the validation shards, each seen once."""
    rows, T = config.val_tokens // config.seq_len, config.seq_len
    first, last = (rank * rows // runtime.world_size for rank in (runtime.rank, runtime.rank + 1))
    chunk, total = largest_divisor(max(1, last - first), micro), torch.zeros((), dtype=torch.float64, device=runtime.device)
    for row in range(first, last, chunk):  # one shape, compiled once
        flat = torch.from_numpy(shards.read(row * T, chunk * T + 1).astype(np.int64)).to(runtime.device)
        total += forward(flat[:-1].view(chunk, T), flat[1:].view(chunk, T)).double() * chunk
    if work := runtime.reduce(total): work.wait()
    return total.item() / rows
def tokenizer(config: Config):
    """(encode, decode) of the data's vocabulary: bytes for byte shards, tiktoken's gpt2 for all others."""
    if config.vocab_size == 257: return lambda text: list(text.encode()), lambda tokens: bytes(token for token in tokens if token < 256)
    try:
        import tiktoken  # only sampling needs it
        return (gpt2 := tiktoken.get_encoding("gpt2")).encode_ordinary, gpt2.decode_bytes
    except Exception as error:  # not installed, or offline without its tables
        raise UserError(f"--generate needs tiktoken's gpt2 tables ({type(error).__name__}): go online once, or set TIKTOKEN_CACHE_DIR") from None
@torch.no_grad()
def generate(config: Config):
    """Print config.generate and what the model of a checkpoint makes of it, as it comes."""
    path, state = find_checkpoint(config.checkpoint, config.checkpoint_dir, print)
    c = Config(**{name: value for name, value in state["config"].items() if name in FIELDS} | dict(attention="sdpa"))
    run, (encode, decode) = build(c, init_runtime(config)), tokenizer(c)
    run.load_state(state, path)
    tokens, draw, out = [c.vocab_size - 1, *encode(config.generate)], seeded(config.seed, "generate"), sys.stdout.buffer
    out.write(config.generate.encode())
    for _ in range(config.generate_tokens):
        logits = run.model(torch.tensor([tokens[-c.seq_len:]], device=run.runtime.device))[0, -1, : c.vocab_size].cpu()
        odds = torch.softmax(logits / (config.temperature or 1.0), 0)
        tokens.append(int(torch.multinomial(odds, 1, generator=draw) if config.temperature else odds.argmax()))
        if tokens[-1] == c.vocab_size - 1: break
        out.write(decode(tokens[-1:]))
        out.flush()
    print()

# ----------------------------------------------------------------------------------------------------------------- Train
class Stopped(Exception): """A signal ended the run; args: its number."""
def forward_backward(forward, inputs: Tensor, targets: Tensor, micro: int, world_size: int) -> Tensor:
    """Add the gradients of the global mean loss, `micro` rows at a time. Returns this rank's share of that loss."""
    parts, total = len(inputs) // micro, torch.zeros((), device=inputs.device)
    for x, y in zip(inputs.split(micro), targets.split(micro)):
        loss = forward(x, y) / (parts * world_size)
        loss.backward()
        total += loss.detach()
    return total
def update(run: Run):  # one optimizer update. All collectives are under way before the first is waited for
    for stage in ("reduce", "step", "finish"):
        for optimizer in run.optimizers: getattr(optimizer, stage)()
def warm_up(run: Run, forward) -> int:
    """Compile and run everything once on random tokens, before the clock starts, then put weights and state back.
    Returns the micro-batch: --micro_batch, or a guess from the free memory that is halved while it does not fit."""
    c, runtime, device, before, share = run.config, run.runtime, run.runtime.device, run.state(), run.config.rows // run.runtime.world_size
    row_bytes = c.seq_len * (10 * c.padded_vocab + 70 * c.n_layer * c.n_embd)  # of logits and activations, about
    fitting = min(int(0.85 * torch.cuda.mem_get_info(device)[0] / row_bytes), 65536 // c.seq_len) if runtime.cuda else share
    micro = c.micro_batch or largest_divisor(share, max(1, fitting))
    refuse(share % micro, f"--micro_batch {micro} does not divide the {share} rows of a rank; nearest below: {largest_divisor(share, micro)}")
    while True:
        refuse(c.galore_per_layer and micro < share, f"--galore_per_layer needs a rank's {share} rows in one micro-batch, not {micro}: lower --batch_tokens")
        inputs, targets = split(torch.randint(c.vocab_size, (micro, c.seq_len + 1), generator=seeded("warm-up", runtime.rank)).to(device))
        try:
            forward_backward(forward, inputs, targets, micro, runtime.world_size)
            with torch.no_grad(): forward(inputs, targets)
            fits = True
        except torch.OutOfMemoryError: fits = False
        if all(runtime.exchange(f"fits {micro}", fits)): break
        refuse(micro == 1, "not even one row fits into the device's memory: lower --seq_len or the model's size")
        micro = largest_divisor(share, micro // 2)
        torch.cuda.empty_cache()
    update(run)  # also leaves no gradient behind
    run.load_state(before)
    if runtime.cuda: torch.cuda.reset_peak_memory_stats()
    return micro
def training_loop(run: Run, forward, batches: Batches, val: Shards, micro: int) -> float:
    """From run.step to the end. Returns the last validation loss. Errors: UserError when a loss is not finite; Stopped."""
    c, runtime, clock, log, first, val_loss = run.config, run.runtime, run.clock, run.log, run.step, math.nan
    def checked(kind: str, loss: float) -> float:
        if math.isfinite(loss): return loss
        log.line(f"diverged: step {run.step} {kind}_loss {loss} last val_loss {val_loss:.4f}")
        raise UserError(f"the loss became {loss} at step {run.step} (last val loss {val_loss:.4f}): lower the learning rates; log {log.path}")
    started, stream = clock.ms, batches.stream(run.step, c.steps, runtime)
    clock.start()
    while True:
        if run.step == c.steps or c.val_every and run.step % c.val_every == 0:
            with clock.paused(), contextlib.ExitStack() as averaged:
                for method in run.methods: averaged.enter_context(method.eval_weights(run.model))
                val_loss = checked("val", evaluate(forward, val, c, runtime, micro))
            log.step(run.step, c.steps, "val", val_loss, clock.ms)
        if run.step == c.steps: return val_loss
        inputs, targets = next(stream)
        for optimizer in run.optimizers: optimizer.scale = lr_at(run.step, c)  # now: galore_per_layer updates during backward
        loss = forward_backward(forward, inputs, targets, micro, runtime.world_size)
        health = torch.stack((loss, torch.full_like(loss, run.signal > 0)))
        work = runtime.reduce(health)  # summed over ranks, so all ranks decide alike
        update(run)
        run.step += 1
        for method in run.methods: method.after_step(run.step, run)
        if work: work.wait()
        loss, stop = health.tolist()  # waits for the whole step
        log.step(run.step, c.steps, "train", checked("train", loss), clock.ms)
        seconds = (clock.ms - started) / 1000 / (run.step - first)
        log.progress(f"step {run.step}/{c.steps}  loss {loss:.4f}  {c.batch_tokens / seconds:,.0f} tokens/s  {seconds * (c.steps - run.step):.0f} s left")
        if stop: raise Stopped(run.signal or signal.SIGTERM)
        if c.checkpoint_every and (run.step % c.checkpoint_every == 0 or run.step == c.steps):
            with clock.paused(): save_checkpoint(run)
# Dense bf16 FLOP/s by the vendors' data sheets; the first name found in the device's counts
BF16_PEAK = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "5090": 210e12,
             "4090": 165e12, "A6000": 155e12, "L4": 121e12, "3090": 71e12, "A10G": 70e12}
def result_of(run: Run, val_loss: float, warmup_ms: float) -> dict:  # the log's last line
    c, ms, runtime, name = run.config, 1000 * run.clock.seconds, run.runtime, device_name(run.runtime.device)
    rate, peak = c.steps * c.batch_tokens / ms * 1000, next((flops for card, flops in BF16_PEAK.items() if card in name), None)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    result = dict(run_id=run.log.run_id, preset=c.preset, seed=c.seed, steps=c.steps, tokens=c.steps * c.batch_tokens,
                  val_loss=round(val_loss, 6), val_tokens=c.val_tokens, target_val_loss=c.target, target_reached=val_loss <= c.target,
                  train_time_ms=round(ms), step_avg_ms=round(ms / c.steps, 3), warmup_ms=round(warmup_ms), tokens_per_second=round(rate),
                  world_size=runtime.world_size, device=name, resumed=run.resumed, param_count=run.size,
                  peak_memory_bytes=torch.cuda.max_memory_allocated() if runtime.cuda else resident,
                  optimizer_state_bytes=sum(t.nbytes for o in run.optimizers for t in o.state.values()))
    if peak: result["mfu"] = round(rate * flops_per_token(c) / (peak * runtime.world_size), 4)
    if c.vocab_size == 257: result["bits_per_byte"] = round(val_loss / math.log(2), 4)
    return result | dict(source_sha256=SOURCE_SHA256, data_sha256=run.data, config=vars(c))
def check_inputs(config: Config, runtime: Runtime, train: Shards, tokens: int, val: Shards) -> dict[str, str]:
    """Hash the shards that this run reads, on every rank, and hold all ranks to the same. Returns {file name: sha256}."""
    data = train.verify(tokens, config.vocab_size) | val.verify(config.val_tokens + 1, config.vocab_size)
    ours = {"source": SOURCE_SHA256, "data": data, "flags": {k: v for k, v in vars(config).items() if k not in RUN_LOCAL}}
    for rank, theirs in enumerate(runtime.exchange("inputs", ours)):
        odd = " and ".join(what for what in ours if ours[what] != theirs[what])
        refuse(odd, f"rank {rank} and rank {runtime.rank} have different {odd}: all ranks must train on the same")
    return data
def build(config: Config, runtime: Runtime, log=print) -> Run:  # the model at its first weights, on its device, with its methods; no optimizers yet
    model, methods = GPT(config), make_methods(config, log)
    init_weights(model, config)
    model.to(runtime.device)
    for method in methods: method.attach(model)
    return Run(config, runtime, model, methods)
def train(config: Config, runtime: Runtime, argv: list[str]):  # a whole run, from the shards to the result line
    shards, val = Shards(config.train_files, "train_files"), Shards(config.val_files, "val_files")
    batches = Batches(shards, config)
    data = check_inputs(config, runtime, shards, batches.tokens_read, val)
    log = Log(config, runtime, argv, data)
    say = functools.partial(log.line, echo=True)
    run = build(config, runtime, say)
    run.optimizers, run.clock, run.log, run.data = make_optimizers(run.model, config, runtime, run.methods), Clock(runtime.device), log, data
    def obey(number, frame): run.signal = number if not run.signal else os._exit(128 + number)  # after the current step; a second one at once
    for number in (signal.SIGTERM, signal.SIGINT): signal.signal(number, obey)
    say(f"{config.preset}: {run.size:,} parameters, {config.steps} steps of {config.batch_tokens:,} tokens, "
        f"{runtime.world_size} x {device_name(runtime.device)}, attention {config.attention}, compile {config.compile}")
    on = tuple(name for name in ("relora", "galore", "lawa", "sparsity", "mup_base_width") if getattr(config, name))
    if on: say("methods: " + ", ".join(f"{name} {value}" for name, value in vars(config).items() if name.startswith(on)))  # with the chosen values
    resume(run)
    begun, forward = time.perf_counter(), torch.compile(run.model, dynamic=False) if config.compile else run.model
    micro, warmup_ms = warm_up(run, forward), 1000 * (time.perf_counter() - begun)
    say(f"warm-up: {warmup_ms:.0f} ms, not in train_time; micro-batch {micro} rows")
    try:
        result = result_of(run, training_loop(run, forward, batches, val, micro), warmup_ms)
    except Stopped as stop:
        run.clock.stop()
        if config.checkpoint_every: save_checkpoint(run)
        say(f"stopped by {signal.Signals(stop.args[0]).name} after step {run.step}")
        log.close()
        raise
    log.line(json.dumps(result))
    log.close()
    gap, bits = config.target - result["val_loss"], f" ({result['bits_per_byte']:.3f} bits per byte)" if "bits_per_byte" in result else ""
    outcome = f"target {config.target:.4f} {'reached' if gap >= 0 else 'missed'} by {abs(gap):.4f}"
    if log.main: print(f"val_loss {result['val_loss']:.4f}{bits}, {outcome} in {run.clock.seconds:.1f} s of training | log {log.path}")
def main(argv: list[str] | None = None) -> int:
    argv, runtime, code = sys.argv[1:] if argv is None else argv, None, 0
    for number in (signal.SIGTERM, signal.SIGINT): signal.signal(number, lambda number, frame: os._exit(128 + number))  # train() is kinder
    try:
        config = parse_config(argv, "gpt2_small" if torch.cuda.is_available() else "laptop")
        if config.generate: return generate(config) or 0
        runtime = init_runtime(config)
        train(resolve(config, runtime.device), runtime, argv)
    except Stopped as stop: code = 128 + stop.args[0]
    except (UserError, torch.OutOfMemoryError) as error:
        tell_failure(runtime, error if isinstance(error, UserError) else "out of memory: give a smaller --micro_batch than the log's", code := 2)
    except Exception as error:
        if runtime and runtime.store and isinstance(error, RuntimeError):
            time.sleep(config.rank_timeout)  # most likely a peer is gone: watch_peers knows which, and ends us
        else: traceback.print_exc()
        tell_failure(runtime, f"rank {os.environ.get('RANK', 0)}: {type(error).__name__}: {error}", code := 1)
    if runtime and runtime.store:
        runtime.leaving.set()
        runtime.watcher.join(timeout=5)  # it must not use the store while that is torn down
        if code:  # peers may never answer again, so no farewell: the launcher ends them
            time.sleep(2)  # the store may live in this process: let the others read from it what went wrong
            os._exit(code)
        dist.destroy_process_group()
    return code

if __name__ == "__main__": sys.exit(main())
