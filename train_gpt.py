"""GPT-2 speedrun: train GPT-2 Small on FineWeb to 3.28 validation loss, as fast as possible.

    ./run.sh                                    any machine: set up, get the data, pick the preset
    torchrun --nproc_per_node=8 train_gpt.py    8 GPUs
    python train_gpt.py --help                  every flag

The whole trainer is this file. From top to bottom:

    Config         every setting is a typed field, a --flag, a part of the log; PRESETS
    Runtime        which process this is, and how processes agree
    Data           token shards; batch_at(step) is a pure function of the step
    Model          the forward pass reads like the paper; one mask rule for two attention backends
    Optimizers     weights as stacks of rows, sharded over ranks: reduce-scatter, update, all-gather
    Schedules      rate, momentum and every tuple in Config as functions of the step
    Clock and log  the one place where time is measured; the one file that a run leaves behind
    Checkpoint     a run is never lost: save, find, resume bit for bit
    Evaluate       validation loss, load_model(), sampling
    Train          warm-up before the clock, the loop, main()
    Methods        ReLoRA, GaLore, LAWA, SuPar: an appendix on hooks; switched off they cost nothing

The recipe is that of the public record of 19 January 2026 (github.com/KellerJordan/modded-nanogpt,
number 62); --preset nov2024 is that of 8 November 2024.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import glob
import hashlib
import io
import itertools
import json
import math
import os
import platform
import resource
import signal
import sys
import time
import traceback
import uuid
from pathlib import Path
from typing import Literal, get_args, get_origin

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

SOURCE = Path(__file__).read_bytes().decode()  # read first: the log holds the code that really ran
SOURCE_SHA256 = hashlib.sha256(SOURCE.encode()).hexdigest()


# ---------------------------------------------------------------------------------------- Config
class UserError(Exception):
    """Something that only the user can mend: told in one line, exit code 2, no traceback."""


def refuse(bad, line):
    """Errors: UserError(line) if bad."""
    if bad:
        raise UserError(line)


@contextlib.contextmanager
def blame(line):
    """Errors: UserError(line) for whatever goes wrong inside, with the first line of its cause."""
    try:
        yield
    except Exception as error:
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{line} ({cause[:150]})") from None


@dataclasses.dataclass(frozen=True)
class Config:
    """One run. Every field is a flag: --steps 50; booleans --bf16 or --no_bf16. A tuple takes one
    value per equal stage of the run (--batch_tokens 1024 2048), or one for all of it."""

    preset: str = "gpt2_small"  # where all other fields start from
    steps: int = 3242  # optimizer updates
    seed: int = 0  # of the initial weights and everything random
    target: float = 3.28  # validation loss to reach, nats per token
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU if there is one
    compile: bool | None = None  # torch.compile; unless given, on CUDA only
    # data
    batch_tokens: tuple = (524288,)  # tokens per update, over all ranks
    extension: int = 0  # last updates, for which the last value of every longer tuple is meant
    seq_len: int = 1024  # tokens per row
    max_document: int = 0  # rows start at documents, each cut to so many tokens (9/2025); 0: off
    val_tokens: int = 10485760  # validation tokens, the same ones every time
    val_seq_len: int = 0  # tokens per row of validation; 0: seq_len
    val_every: int = 125  # updates between validations; 0: only at the end
    epochs_allowed: int = 1  # how often the training tokens may be seen
    spread_rows: bool = False  # rows from all over the data: for data that is not shuffled
    # model; (month/year) is that of the public record which showed what a piece is worth
    vocab_size: int = 50257  # tokens in the data; the last one marks the start of a document
    n_layer: int = 12  # blocks
    n_head: int = 6  # attention heads
    n_embd: int = 768  # width
    value_residual: bool = True  # mix the first block's values into every block's
    embed_residual: bool = True  # mix the normed embedding into every block's input
    residual_scale: float = 1.0  # first factor on every block's input (11/2025)
    untie_head: bool = True  # lm_head has weights of its own
    tied_share: float = 0.0  # ... but is one with wte for this share of the run (12/2025)
    zero_init: bool = True  # lm_head, o and down start at zero
    init_qkv: float = 1.0  # factor on the first values of q, k and v, U(±1/√in)
    init_up: float = 1.0  # ... and of the MLP's up
    ngram: int = 0  # add embeddings of the last 2, 3, ... this many tokens, side by side; 0: off
    ngram_rows: int = 16384  # of each table of such embeddings; n-grams share rows by hash
    bigram_rows: int = 0  # of a table of hashed bigrams, added before every block (1/2026); 0: off
    value_embeds: bool = False  # tables of values for the outer layers, gated (12/2024, 12/2025)
    smear: bool = False  # add a gated share of the previous token's embedding (9/2025)
    middle_skip: bool = False  # no attention in the middle, but a gated skip (12/2024, 11/2025)
    backout: bool = False  # take off the head's input what the stream held at 2/3 depth (10/2025)
    attention_gate: bool = False  # a gate on every head's output (8/2025)
    attention_factors: bool = False  # learned factors on values and output (12/2025)
    attention_scale: float = 0.0  # of the scores (1/2025); 0: 1/√head_dim
    paired_heads: bool = False  # in outer short layers, two heads share a sequence (1/2026)
    key_offset: bool = False  # half of a long layer's key is the previous token's (12/2025)
    half_rotary: bool = False  # half of a head's dims do not rotate (12/2024)
    yarn: bool = False  # rotary and scores follow the window as it grows (9/2025)
    softcap: float = 30.0  # logits become softcap * tanh(logits / softcap); 0: off
    sigmoid_softcap: bool = False  # 23 * sigmoid((logits + 5) / 7.5) instead (12/2025)
    multi_token: bool = False  # training: also predict the next two tokens, less and less (12/2025)
    bf16: bool = True  # activations and tables in bfloat16, other weights cast at use
    doc_mask: bool = False  # tokens attend within their own document only
    window: tuple = (0,)  # tokens that a layer looks back; 0: no limit
    short_window: tuple = (0,)  # ... but for two long layers; 0: as those (1/2025)
    final_window: int = 0  # window of the last validation; 0: as before (9/2025)
    # optimizers
    matrix_optimizer: Literal["muon", "adam"] = "muon"  # of the hidden matrices
    lr_muon: float = 0.02  # Muon's rate
    lr_adam: float = 0.002  # Adam's rate for hidden matrices and adapters
    lr_embed: float = 0.3  # Adam's rate for wte
    lr_ngram: float = 1.0  # Adagrad's rate for the n-gram tables
    lr_head: float = 0.002  # Adam's rate for lm_head, and for wte when tied to it
    lr_scalar: float = 0.02  # Adam's rate for the lambdas
    momentum: float = 0.95  # Muon's, after a warm-up from 0.85
    momentum_warmup: int = 500  # updates
    momentum_cooldown: int = 0  # last updates, in which it falls back to 0.85 (9/2025)
    momentum_ema: bool = False  # (1 - momentum) of each gradient goes in, not all of it
    normuon: float = 0.0  # decay of NorMuon's mean square of each neuron's update; 0: plain Muon
    polar_express: bool = False  # Newton-Schulz with the coefficients of arXiv 2505.16932 (9/2025)
    lr_down: float = 1.0  # factor on the rate of the MLP's down (12/2025), not of its adapters
    lr_table: float = 0.6  # Adam's rate for value embeddings and bigrams
    lr_gate: float = 0.008  # Adam's rate for gates
    beta1: float = 0.9  # Adam's
    beta2: float = 0.95  # Adam's
    adam_eps: float = 1e-8  # Adam's
    adam_every: int = 1  # updates whose gradients Adam sums for one of its own (9/2025)
    adam_table: bool = False  # betas and decay by kind of parameter (12/2025, 1/2026)
    decay_muon: float = 0.0  # cautious decay of matrices and adapters, times rate squared (11/2025)
    decay_adam: float = 0.0  # ... of the rest, with adam_table's factors (12/2025)
    sum_loss: bool = False  # gradients of the sum over tokens / 8: they grow with the batch
    lr_factor: tuple = (1.0,)  # on all rates
    warmup: int = 0  # updates of linear learning-rate warm-up
    cooldown: float = 926 / 3242  # share of the run, at its end, in which the rates fall
    lr_floor: float = 0.0  # ... to this share of the unfactored rates
    # methods
    low_rank_optimizer: Literal["adam", "muon"] = "adam"  # of ReLoRA's adapters; within GaLore
    relora: int = 0  # ReLoRA: rank of the adapters; 0: off
    relora_scale: float = 0.25  # of what the adapters add: alpha / rank
    relora_warm_start: int = 0  # full-rank updates before the adapters; 0: a quarter of the run
    relora_interval: int = 0  # updates between merges, a tenth to re-warm; 0: a quarter of the rest
    galore: int = 0  # GaLore: rank of the projected gradients; 0: off
    galore_interval: int = 200  # updates between projections
    galore_scale: float = 0.25  # factor on the projected update
    galore_bits: Literal[32, 8] = 32  # of a moment's entry
    galore_per_layer: bool = False  # update a matrix as its gradient arrives, and free the gradient
    lawa: int = 0  # LAWA: how many snapshots are averaged; 0: off
    lawa_interval: int = 0  # updates between snapshots; 0: one per cent of the run
    lawa_mode: Literal["eval", "replace"] = "eval"  # validate on the average, or also train on it
    sparsity: float = 0.0  # SuPar: share of every hidden matrix fixed at zero
    mup_base_width: int = 0  # SuPar: width at which the rates were tuned; 0: this width
    # files and machine: from here on, nothing that changes what is trained
    train_files: str = "data/fineweb10B/fineweb_train_*.bin"  # token shards, a glob
    val_files: str = "data/fineweb10B/fineweb_val_*.bin"  # token shards, a glob
    log_dir: str = "logs"  # the log is <log_dir>/<run_id>.txt
    micro_batch: int = 0  # rows per forward pass of a rank; 0: as many as fit
    rank_timeout: float = 600.0  # seconds that ranks wait for each other before they give up
    checkpoint_every: int = 0  # updates between checkpoints; 0: none
    checkpoint_keep: int = 2  # newest checkpoints of the run that stay on disk
    checkpoint_dir: str = "checkpoints"  # they are <checkpoint_dir>/<run_id>/step_<n>.pt
    resume: str = ""  # train on from a checkpoint: its path, or latest
    resume_anyway: bool = False  # ... although flags, source or data changed
    generate: str = ""  # do not train, continue this text
    checkpoint: str = "latest"  # ... with the model of this checkpoint: its path, or latest
    generate_tokens: int = 200  # ... by so many tokens
    temperature: float = 0.8  # ... drawn at this temperature; 0: the likeliest

    def __post_init__(self):
        check_config(self)

    @property
    def val_len(self):
        return self.val_seq_len or self.seq_len

    @property
    def dtype(self):
        return torch.bfloat16 if self.bf16 else torch.float32

    @property
    def padded_vocab(self):
        return -(-self.vocab_size // 64) * 64  # matmuls like multiples of 64


def check_config(c):
    """Mistakes that would waste a run. Errors: UserError, one line that says what to do."""
    for name, value in vars(c).items():
        default = getattr(Config, name)
        least = int(type(default) is int and default > 0 and name != "val_every")
        for number in value if isinstance(value, tuple) else [value]:
            wrong = isinstance(number, int | float) and not least <= number < 2**63
            refuse(wrong, f"--{name} {number}: must be a number from {least} to 2^63")
    shares = max(c.momentum, c.beta1, c.beta2, c.normuon, c.sparsity)
    refuse(shares >= 1, f"{shares}: momentum, betas, --normuon and --sparsity must be below 1")
    for tokens in c.batch_tokens:
        uneven = tokens == 0 or tokens % c.seq_len
        refuse(uneven, f"--batch_tokens {tokens}: must be a multiple of --seq_len {c.seq_len}")
    refuse(c.val_tokens % c.val_len, f"--val_tokens must be a multiple of {c.val_len}, its row")
    intervals = c.relora_warm_start, c.relora_interval, c.lawa * c.lawa_interval
    longest = max(c.warmup, c.extension + 1, *intervals)
    line = f"--steps {c.steps} end before a warm-up, interval or extension of {longest}"
    refuse(longest > c.steps, line)
    refuse(c.n_embd % (2 * c.n_head), "--n_embd over --n_head must give an even whole head_dim")
    refuse(c.ngram == 1 or c.ngram > 8, f"--ngram {c.ngram}: must be 0 (off) or 2 to 8")
    refuse(c.yarn and 0 in c.window, "--yarn needs a --window above 0 in every stage")
    refuse(c.n_layer < 2 and c.backout, "--backout needs an --n_layer of 2 or more")
    refuse(c.paired_heads and c.n_head % 2, "--paired_heads needs an even --n_head")
    odd = c.checkpoint_every % c.adam_every  # then gradients would be on their way
    refuse(odd, f"--checkpoint_every must be a multiple of --adam_every {c.adam_every}")
    early = c.compile and c.galore_per_layer  # compiled, the backward pass frees nothing early
    refuse(early, "--galore_per_layer needs --no_compile: else it would save no memory")
    methods = [c.relora, c.galore, c.sparsity or c.mup_base_width]
    refuse(sum(map(bool, methods)) > 1, "--relora, --galore and SuPar exclude each other")


# Record 62 of 19 January 2026, complete; numbers by its own log
JANUARY_2026 = dict(
    steps=1600,
    extension=40,
    batch_tokens=(131072, 262144, 393216, 393216),
    seq_len=16384,
    max_document=2048,
    val_seq_len=65536,
    val_every=250,
    n_layer=11,
    value_residual=False,
    residual_scale=1.1,
    tied_share=2 / 3,
    init_qkv=3**0.5,
    init_up=0.5 * 3**0.5,
    bigram_rows=5 * 50304,
    value_embeds=True,
    smear=True,
    middle_skip=True,
    backout=True,
    attention_gate=True,
    attention_factors=True,
    attention_scale=0.1,
    paired_heads=True,
    key_offset=True,
    half_rotary=True,
    yarn=True,
    sigmoid_softcap=True,
    multi_token=True,
    doc_mask=True,
    window=(384, 896, 1408, 1664),
    short_window=(128, 384, 640, 768),
    final_window=2560,
    lr_muon=0.023,
    lr_down=4.0,
    lr_embed=0.008,
    lr_head=0.008,
    lr_scalar=0.04,
    momentum_warmup=300,
    momentum_cooldown=50,
    momentum_ema=True,
    normuon=0.95,
    polar_express=True,
    adam_eps=1e-10,
    adam_every=2,
    adam_table=True,
    decay_muon=1.2,
    decay_adam=0.005,
    sum_loss=True,
    lr_factor=(1.0, 1.52, 1.73, 1.73),
    cooldown=0.55,
    lr_floor=0.1,
)
# Wider models by muP (arXiv 2203.03466): lm_head's rate falls with the width. Never run.
MEDIUM = dict(steps=6000, target=2.92, n_layer=24, n_head=8, n_embd=1024, lr_head=0.006)
XL = dict(steps=10000, target=2.8, n_layer=48, n_head=25, n_embd=1600, lr_head=0.0038)
PRESETS = {
    "nov2024": Config("nov2024"),  # the fields' defaults: 8xH100 record of 8 November 2024
    "gpt2_small": Config("gpt2_small", **JANUARY_2026),
    "gpt2_medium": Config("gpt2_medium", **JANUARY_2026 | MEDIUM),
    "gpt2_xl": Config("gpt2_xl", **JANUARY_2026 | XL | dict(paired_heads=False)),
    "laptop": Config(
        "laptop",
        steps=138,
        target=1.26,
        batch_tokens=(2048,),
        seq_len=128,
        val_tokens=262144,
        val_every=50,
        spread_rows=True,
        vocab_size=257,
        n_layer=2,
        n_head=2,
        n_embd=128,
        ngram=5,
        value_embeds=True,
        key_offset=True,
        half_rotary=True,
        bf16=False,
        lr_muon=0.04,
        lr_head=0.008,
        momentum_warmup=40,
        normuon=0.95,
        cooldown=0.6,
        lr_floor=0.1,
        train_files="data/laptop/laptop_train_*.bin",
        val_files="data/laptop/laptop_val_*.bin",
    ),
}


def parse_config(argv, default_preset):
    """Flags to Config. Errors: UserError for a flag that is wrong, or a method's without it."""
    parser = argparse.ArgumentParser(
        usage="train_gpt.py [--flag value ...]",
        description=SOURCE.partition("class Config:\n")[2].partition("\n    def ")[0],
        epilog=f"The values above are those of nov2024. Presets: {', '.join(PRESETS)}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.error = functools.partial(refuse, True)
    for field in dataclasses.fields(Config):
        kind, options = field.type, dict(help=argparse.SUPPRESS, dest=field.name)
        if kind in (bool, bool | None):
            parser.add_argument(f"--no_{field.name}", action="store_false", **options)
            options["action"] = "store_true"
        elif kind is tuple:
            options |= dict(nargs="+", type=type(field.default[0]))
        elif get_origin(kind) is Literal:
            options |= dict(choices=get_args(kind), type=type(field.default))
        elif field.name == "resume":
            options |= dict(nargs="?", const="latest")
        else:
            options["type"] = kind
        parser.add_argument(f"--{field.name}", **options)
    given = vars(parser.parse_args(argv)).items()
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in given}
    preset = given.get("preset", default_preset)
    refuse(preset not in PRESETS, f"--preset {preset}: must be one of {', '.join(PRESETS)}")
    config = dataclasses.replace(PRESETS[preset], **given)
    for name, reason in idle_flags(config).items():
        refuse(name in given, f"--{name} does nothing {reason}")
    return config


def idle_flags(c):
    """{flag of a method or rule that is not in use: why}."""
    idle = {}
    for owner in ("relora", "galore", "lawa", "ngram", "resume", "generate"):
        if not getattr(c, owner):
            names = [name for name in vars(c) if name.startswith(f"{owner}_")]
            idle |= dict.fromkeys(names, f"without --{owner}")
    rules = set()
    if c.relora or c.galore:
        rules.add(c.low_rank_optimizer)
    else:
        idle["low_rank_optimizer"] = "without --relora or --galore"
    if c.galore:
        idle["matrix_optimizer"] = "with --galore, which has --low_rank_optimizer"
    else:
        rules.add(c.matrix_optimizer)
    for flag, rule in {"lr_muon": "muon", "normuon": "muon", "lr_adam": "adam"}.items():
        if rule not in rules:
            idle[flag] = f"where no matrix is trained by {rule}"
    return idle


def resolve(c, device):
    """Every "chosen for you" value replaced by what was chosen, so that the log says what ran."""
    on_gpu = device.type == "cuda" and not c.galore_per_layer
    wrap = c.relora_warm_start or max(1, c.steps // 4)
    return dataclasses.replace(
        c,
        device=device.type,
        compile=on_gpu if c.compile is None else c.compile,
        relora_warm_start=wrap,
        relora_interval=c.relora_interval or max(1, (c.steps - wrap) // 4),
        lawa_interval=c.lawa_interval or max(1, c.steps // 100),
    )


# --------------------------------------------------------------------------------------- Runtime
@dataclasses.dataclass
class Runtime:
    """This process among its peers."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def cuda(self):
        return self.device.type == "cuda"

    def exchange(self, value):
        """Every rank's value, in the order of ranks."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def sum(self, tensor):
        """Over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor


def init_runtime(c):
    """Device and process group. torchrun sets RANK and its like; without it, a single process."""
    rank, local_rank = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
    world_size, gpus = int(os.environ.get("WORLD_SIZE", 1)), torch.cuda.device_count()
    cuda = gpus > 0 if c.device == "auto" else c.device == "cuda"
    refuse(cuda and local_rank >= gpus, f"{local_rank + 1} processes, but {gpus} usable GPUs here")
    for rows in (*(tokens // c.seq_len for tokens in c.batch_tokens), c.val_tokens // c.val_len):
        refuse(rows % world_size, f"{world_size} processes do not divide a batch of {rows} rows")
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world_size > 1:
        dist.init_process_group(timeout=datetime.timedelta(seconds=c.rank_timeout))
    return Runtime(device, rank, world_size)


# ------------------------------------------------------------------------------------------ Data
# A shard, as in llm.c: 256 int32 (magic, version, tokens, zeros), then the tokens as uint16
HEADER_BYTES = 1024


class Shards:
    """Rows of seq_len + 1 tokens out of the token shards that match a glob, in the order of their
    names; none crosses from shard to shard. A row shares its last token with the next one, or, with
    max_document, starts at a document; mark: the token that stands before each, the vocabulary's
    last."""

    def __init__(self, pattern, flag, seq_len, max_document=0, mark=0):
        self.pattern, self.seq_len, self.paths = pattern, seq_len, sorted(glob.glob(pattern))
        self.mark = mark
        hint = "./run.sh fetches or builds them; data/prepare.py makes your own"
        refuse(not self.paths, f"--{flag} {pattern}: no such files. {hint}")
        self.packed = []  # of each shard: rows of documents, as (start, tokens)
        counts = [(shard_tokens(path) - 1) // seq_len for path in self.paths]
        if max_document:
            self.packed = [pack(path, mark, seq_len + 1, max_document) for path in self.paths]
            counts = map(len, self.packed)
        self.first = np.cumsum([0, *counts])

    def __len__(self):
        return int(self.first[-1])

    def read(self, numbers):
        """These rows, [rows, seq_len + 1] int64. Errors: UserError if a shard has been cut short,
        or is of another vocabulary."""
        rows = []
        for number in numbers:
            shard = np.searchsorted(self.first, number, side="right") - 1
            path, row = self.paths[shard], int(number - self.first[shard])
            parts = [(row * self.seq_len, self.seq_len + 1)]
            if self.packed:
                parts = self.packed[shard][row]
            tokens = np.concatenate([read_shard(path, *part) for part in parts])
            refuse(len(tokens) <= self.seq_len, f"{path}: cut short during the run")
            foreign = self.mark and tokens.max() > self.mark
            refuse(foreign, f"{path}: holds tokens beyond --vocab_size {self.mark + 1}")
            rows.append(tokens)
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def hashes(self):
        """{file: sha256} by the manifest.json beside it, which data/check.py holds it to."""
        manifest = Path(self.paths[0]).with_name("manifest.json")
        with blame(f"{manifest}: not a manifest; delete it"):
            files = json.loads(manifest.read_text())["files"] if manifest.exists() else {}
            names = map(os.path.basename, self.paths)
            return {name: files[name]["sha256"] if name in files else None for name in names}


def read_shard(path, start=0, count=-1):
    return np.fromfile(path, "<u2", count, offset=HEADER_BYTES + 2 * start)


def pack(path, mark, room, max_document):
    """Rows of `room` tokens out of a shard's documents in their order, each cut to max_document and
    to what is left of its row: what is cut off is never read (records of 12 July, 3 September
    2025)."""
    rows, row, left = [], [], room
    tokens = read_shard(path)
    starts = np.flatnonzero(tokens == mark)
    lengths = np.diff(starts, append=len(tokens)).clip(max=max_document)
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        row.append((start, min(length, left)))
        left -= row[-1][1]
        if left == 0:
            rows.append(row)
            row, left = [], room
    return rows


def shard_tokens(path):
    """Tokens in a shard. Errors: UserError if it is no file, or not as long as its header says."""
    regular = os.path.isfile(path)  # a pipe would block
    header = np.fromfile(path, "<i4", 3).tolist() if regular else []
    tokens = os.path.getsize(path) // 2 - HEADER_BYTES // 2 if regular else 0
    whole = tokens > 0 and header == [20240520, 1, tokens]
    refuse(not whole, f"{path}: not a whole token shard; fetch or prepare it again")
    return tokens


class Batches:
    """batch_at(step) depends on shards, step and schedule, on nothing else: no state to save."""

    def __init__(self, shards, c):
        self.shards, self.stride = shards, 1
        rows = [at_step(c.batch_tokens, step, c) // c.seq_len for step in range(c.steps)]
        self.first = np.cumsum([0, *rows])  # row of each step; the next step's is where it ends
        self.count = len(shards) // max(rows) * max(rows)  # rows in an epoch
        short = sum(rows) > self.count * c.epochs_allowed
        have = f"{shards.pattern} holds {len(shards):,} rows, the run reads {sum(rows):,}"
        refuse(short, f"{have}: get more tokens, or raise --epochs_allowed")
        if c.spread_rows:  # near the golden ratio: all rows once, neighbours far apart
            self.stride = int(0.618 * self.count) or 1
            while math.gcd(self.stride, self.count) > 1:
                self.stride += 1

    def batch_at(self, step, rank=0, world_size=1):
        """A rank's rows of the global batch of `step`, 0-based: [rows, seq_len + 1]."""
        rows = np.arange(self.first[step], self.first[step + 1])
        return self.shards.read(np.split(rows, world_size)[rank] * self.stride % self.count)


def split(rows, device):
    """Rows [B, T + 1] to inputs and targets [B, T] on the device."""
    if device.type == "cuda":
        rows = rows.pin_memory()
    rows = rows.to(device, non_blocking=True)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


# ----------------------------------------------------------------------------------------- Model
def norm(x):
    return F.rms_norm(x, (x.size(-1),))  # RMSNorm without gain


def seeded(*where):
    """A CPU generator that depends on its arguments alone: equal on all ranks, in any order."""
    digest = hashlib.sha256(repr(where).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


@dataclasses.dataclass
class Layer:
    """The roles of one layer."""

    attention: bool
    long: bool  # looks back by window, not by short_window
    paired: bool
    offset: bool  # its keys
    table: int | None  # of value_embeds, from the last
    skip: int | None  # the layer whose output is added before this one


def layer_plan(c):
    """What each layer does, by rules that give the record's numbers at 11 layers."""
    n, middle = c.n_layer, (c.n_layer + 1) // 2
    tables = {0: -2, 1: -1}
    tables |= {n - k: -k for k in (1, 2, 3)}
    plan = []
    for i in range(n):
        skips = c.middle_skip and i == middle
        long = i in (middle // 2, n - 1) or not any(c.short_window)
        outer = i in (0, 2, middle - 1, n - 2)
        layer = Layer(
            attention=not skips,
            long=long,
            paired=c.paired_heads and outer and not long and not skips,
            offset=c.key_offset and long,
            table=tables.get(i) if c.value_embeds and not skips else None,
            skip=middle // 2 if skips else None,
        )
        plan.append(layer)
    return plan


def use_flex(docs, c):
    return docs.is_cuda and c.compile  # it has no eager form worth having


def attention_mask(docs, window, c):
    """The one attention rule, for document numbers [B, T]: causal; back by `window` tokens; with
    doc_mask within a document. Returns what the backend wants: None (plain causal), a BlockMask, or
    bool [B or 1, 1, T, T]."""
    B, T = docs.shape
    if not (c.doc_mask or any(c.window) or any(c.short_window)):
        return None
    rows = B if c.doc_mask else 1

    def allowed(b, h, q, k):
        near = (q >= k) & (q - k <= window)
        return near & (docs[b, q] == docs[b, k]) if c.doc_mask else near

    if use_flex(docs, c):
        return create_block_mask(allowed, rows, None, T, T, device=docs.device)
    b = torch.arange(rows, device=docs.device).view(-1, 1, 1, 1)
    t = torch.arange(T, device=docs.device)
    return allowed(b, 0, t[:, None], t)


def attend(q, k, v, mask):
    """Attention over [B, T, H, head_dim], queries scaled, under an attention_mask."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if isinstance(mask, BlockMask):
        y = flex_attention(q, k, v, block_mask=mask, scale=1.0)
    else:
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=1.0)
    return y.transpose(1, 2)


def scalar(value, on):
    """A learned factor, or several, if on."""
    return nn.Parameter(torch.tensor(value)) if on else None


class Linear(nn.Module):
    """y = x Wᵀ; fp32 weight [out, in], cast at use. transposed: kept as [in, out], so that MLP.down
    shares a stack with MLP.up. Starts at init·U(±1/√in); torch.nn.Linear's init is 1."""

    def __init__(self, n_in, n_out, init=1.0, transposed=False):
        super().__init__()
        self.n_in, self.n_out, self.transposed = n_in, n_out, transposed
        self.bound = init * n_in**-0.5
        self.weight = nn.Parameter(torch.zeros((n_in, n_out) if transposed else (n_out, n_in)))
        self.weight.transposed = transposed

    def init(self, generator):
        uniform_(self.weight, self.bound, generator)

    def forward(self, x):
        weight = self.weight.to(x.dtype)
        return x @ weight if self.transposed else F.linear(x, weight)


def uniform_(weight, bound, generator):
    weight.copy_(torch.rand(weight.shape, generator=generator) * 2 * bound - bound)


class Embedding(nn.Module):
    """A table [rows, width]; std: of its first values."""

    def __init__(self, rows, width, std, dtype):
        super().__init__()
        self.std, self.weight = std, nn.Parameter(torch.zeros(rows, width, dtype=dtype))

    def init(self, generator):
        if self.std:
            self.weight.copy_(torch.randn(self.weight.shape, generator=generator) * self.std)

    def forward(self, rows):
        return F.embedding(rows, self.weight)


class Gate(Linear):
    """Shares in (0, 1), a half at first, of the first 12 dims: [B, T, D] to [B, T, n_out]."""

    def __init__(self, n_out):
        super().__init__(12, n_out, init=0.0)
        self.weight.is_gate = True

    def forward(self, x):
        return torch.sigmoid(super().forward(x[..., :12]))


def bigram_rows(tokens, rows):
    """The row of each token's bigram in a hashed table; what no two tokens make has the last one,
    as in the record of 19 January 2026, where products wrap in int32 and `rows` stands before
    them."""
    before = F.pad(tokens[:, 1:-1], (2, 0), value=rows - 1)
    mixed = (36313 * tokens).int() ^ (27191 * before).int()
    found = mixed % (rows - 1)
    return F.pad(found[:, 1:], (1, 0), value=rows - 1)


class NGrams(nn.ModuleList):
    """Embeddings of the last 2, 3, ... n tokens, side by side, found by hash. All before the row or
    the document counts as its mark."""

    def __init__(self, c, dtype):
        width = c.n_embd // (c.ngram - 1)
        super().__init__(Embedding(c.ngram_rows, width, 0.0, dtype) for _ in range(c.ngram - 1))
        self.config = c

    def forward(self, tokens):
        c, found = self.config, []
        mark = c.vocab_size - 1
        back = value = tokens
        for table in self:
            shifted = F.pad(back[:, :-1], (1, 0), value=mark)
            back = torch.where(back == mark, mark, shifted)  # one token further back
            value = (value * 65599 + back) % 2**31
            found.append(table((value * 0x9E3779B1 >> 20) % c.ngram_rows))  # Fibonacci hashing
        grams = torch.cat(found, dim=-1)
        return F.pad(grams, (0, c.n_embd - grams.size(-1)))


def rotary_at(step, c):
    """(frequencies, factor on the scores) of update `step`. YaRN, arXiv 2309.00071: as the window
    grows, what turns too rarely within it is slowed down, and the scores grow."""
    head_dim = c.n_embd // c.n_head
    scale = c.attention_scale or head_dim**-0.5
    frequencies = 10000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
    if c.half_rotary:
        frequencies = 1024.0 ** -torch.linspace(0, 1, head_dim // 4)
    windows = dict.fromkeys(at_step(c.window, earlier, c) for earlier in range(step + 1))
    for old, new in itertools.pairwise(windows if c.yarn else ()):
        kept = ((old * frequencies / (2 * math.pi) - 1) / 31).clamp(0, 1)  # share, by turns
        frequencies = frequencies * (old / new * (1 - kept) + kept)
        scale *= 1 + 0.2 * math.log(new / old)
    return frequencies, scale


def rotary_tables(frequencies, places):
    """cos and sin at places [T, H or 1]: [2, T, H or 1, frequencies]."""
    angles = places.unsqueeze(-1) * frequencies.to(places.device)
    return torch.stack((angles.cos(), angles.sin()))


def rotate(x, tables):
    """Rotary position embedding of [B, T, H, head_dim], arXiv 2104.09864: of the first dims, as
    many as there are angles for; halves, not neighbours."""
    cos, sin = tables[:, : x.size(1)].to(x.dtype)
    a, b, *rest = x.split(cos.size(-1), dim=-1)
    turned = a * cos + b * sin, b * cos - a * sin
    return torch.cat((*turned, *rest), dim=-1)


def interleave(x):
    """[B, T, H, head_dim] to [B, 2 T, H / 2, head_dim]: head h and head h + H / 2 take turns."""
    return x.unflatten(2, (2, -1)).flatten(1, 2)


class CausalSelfAttention(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.layer, self.heads = layer, (c.n_head, -1)
        self.q = Linear(c.n_embd, c.n_embd, c.init_qkv)
        self.k = Linear(c.n_embd, c.n_embd, c.init_qkv)
        self.v = Linear(c.n_embd, c.n_embd, c.init_qkv)
        self.o = Linear(c.n_embd, c.n_embd, 0.0 if c.zero_init else 1.0)
        self.value_lambda = scalar(0.5, c.value_residual)
        self.factors = scalar([0.5, 1.0], c.attention_factors)
        self.gate = Gate(c.n_head) if c.attention_gate else None
        self.value_gate = None if layer.table is None else Gate(c.n_head)

    def forward(self, x, shared):
        layer = self.layer
        h = x if self.factors is None else self.factors[0].to(x.dtype) * x
        q = self.q(h).unflatten(-1, self.heads)  # [B, T, H, head_dim], as are k and v
        k = self.k(h).unflatten(-1, self.heads)
        v = self.v(h).unflatten(-1, self.heads)
        if self.value_lambda is not None:
            v1 = shared.setdefault("v1", v)  # arXiv 2410.17897; λ learned (Grad62304977)
            v = torch.lerp(v, v1, self.value_lambda.to(v.dtype))
        if layer.table is not None:
            values = shared["values"][layer.table].unflatten(-1, self.heads)
            v = v + 2 * self.value_gate(x).unsqueeze(-1) * values
        tables = shared["rotary"][layer.paired]
        q = rotate(norm(q), tables) * shared["scale"].to(q.dtype)  # norm: arXiv 2302.05442
        k = rotate(norm(k), tables)
        if layer.offset:  # with half_rotary what does not rotate; the first token keeps its own
            turning, still = k.chunk(2, dim=-1)
            before = torch.cat((still[:, :1], still[:, :-1]), dim=1)
            k = torch.cat((turning, before), dim=-1)
        if layer.paired:
            q, k, v = interleave(q), interleave(k), interleave(v)
        y = attend(q, k, v, shared["masks"][layer.long, layer.paired])
        if layer.paired:
            y = y.unflatten(1, (-1, 2)).flatten(2, 3)
        if self.gate is not None:
            y = y * self.gate(x).unsqueeze(-1)
        y = self.o(y.flatten(-2))
        return y if self.factors is None else self.factors[1].to(y.dtype) * y


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.up = Linear(c.n_embd, 4 * c.n_embd, c.init_up)
        self.down = Linear(4 * c.n_embd, c.n_embd, 0.0 if c.zero_init else 1.0, transposed=True)
        self.down.weight.lr_mult = c.lr_down

    def forward(self, x):
        return self.down(F.relu(self.up(x)).square())  # ReLU², arXiv 2109.08668


class Block(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.attn = CausalSelfAttention(c, layer) if layer.attention else None
        self.mlp = MLP(c)
        self.x_lambda = scalar(c.residual_scale, c.embed_residual)
        self.x0_lambda = scalar(0.0, c.embed_residual)
        self.bigram_lambda = scalar(0.1, c.bigram_rows)

    def forward(self, x, shared):
        if self.x_lambda is not None:  # record of 6 November 2024 (Grad62304977)
            x = self.x_lambda.to(x.dtype) * x + self.x0_lambda.to(x.dtype) * shared["x0"]
        if self.bigram_lambda is not None:
            x = x + self.bigram_lambda.to(x.dtype) * shared["bigrams"]
        if self.attn is not None:
            x = x + self.attn(norm(x), shared)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    """Tokens [B, T] to logits [B, T, padded_vocab] in fp32; with targets [B, T], to the mean
    cross-entropy in nats, in training plus what multi_token asks for. A module's init() is given a
    generator that its name seeds."""

    def __init__(self, c):
        super().__init__()
        self.config, self.plan, self.stage = c, layer_plan(c), None
        tied = tied_at(0, c)  # then wte makes the logits, too: small and exact
        exact = torch.float32 if tied else c.dtype
        self.wte = Embedding(c.padded_vocab, c.n_embd, 0.005 if tied else 1.0, exact)
        self.ngrams = NGrams(c, c.dtype) if c.ngram else None
        if c.bigram_rows:
            self.bigrams = Embedding(c.bigram_rows, c.n_embd, 0.0, c.dtype)
        if c.value_embeds:
            self.value_embeds = nn.ModuleList(
                Embedding(c.padded_vocab, c.n_embd, 0.0, c.dtype) for _ in range(min(3, c.n_layer))
            )
        self.smear_gate = Gate(1) if c.smear else None
        self.smear_lambda = scalar(0.0, c.smear)
        self.skip_gate = Gate(1) if c.middle_skip else None
        self.skip_lambda = scalar(-1.5, c.middle_skip)
        self.backout_lambda = scalar(0.5, c.backout)
        self.blocks = nn.ModuleList(Block(c, layer) for layer in self.plan)
        self.lm_head = Linear(c.n_embd, c.padded_vocab, 0.0 if c.zero_init else 1.0)
        with torch.no_grad():
            for name, module in self.named_modules():
                if hasattr(module, "init"):
                    module.init(seeded(c.seed, f"{name}.weight"))
            if tied:
                self.lm_head.weight.copy_(self.wte.weight)
        self.set_stage(0)

    def set_stage(self, step):
        """Take the form that update `step`, 0-based, trains; c.steps: of the last validation. What
        changes is tensors, so that nothing compiles again; in dicts, since torch 2.11's compiler
        indexes no list by a bool."""
        c, device = self.config, self.wte.weight.device
        self.ahead = [torch.tensor(weight) for weight in prediction_weights(step, c)]
        windows = windows_at(step, c)
        if (windows, device) == self.stage:
            return
        self.stage = windows, device
        self.windows = {
            long: torch.tensor(w or 2**30, device=device) for long, w in windows.items()
        }
        frequencies, scale = rotary_at(step, c)
        self.scale = torch.tensor(scale, device=device)
        places = torch.arange(max(c.seq_len, c.val_len), device=device).unsqueeze(1)
        self.rotary = {False: rotary_tables(frequencies, places)}  # by Layer.paired
        if c.paired_heads:
            taking_turns = 2 * places + torch.arange(c.n_head, device=device) % 2
            self.rotary[True] = rotary_tables(frequencies, taking_turns)

    def forward(self, tokens, targets=None):
        c = self.config
        docs = (tokens == c.vocab_size - 1).cumsum(1)
        x = self.wte(tokens).to(c.dtype)  # [B, T, D]
        if self.ngrams is not None:
            x = x + self.ngrams(tokens)
        if c.smear:
            before = F.pad(x[:, :-1], (0, 0, 1, 0))
            x = x + self.smear_lambda.to(x.dtype) * self.smear_gate(x) * before
        x = norm(x)
        shared = dict(x0=x, scale=self.scale, rotary=self.rotary, masks={})  # by all blocks
        for long, paired in {(layer.long, layer.paired) for layer in self.plan}:
            places = docs.repeat_interleave(2, dim=1) if paired else docs
            mask = attention_mask(places, self.windows[long], c)
            shared["masks"][long, paired] = mask
        if c.bigram_rows:
            shared["bigrams"] = self.bigrams(bigram_rows(tokens, c.bigram_rows))
        if c.value_embeds:
            shared["values"] = [table(tokens) for table in self.value_embeds]
        outputs = []
        for block, layer in zip(self.blocks, self.plan, strict=True):
            if layer.skip is not None:
                factor = 2 * torch.sigmoid(self.skip_lambda).to(x.dtype)
                x = x + factor * self.skip_gate(shared["x0"]) * outputs[layer.skip]
            x = block(x, shared)
            outputs.append(x)
        if c.backout:
            x = x - self.backout_lambda.to(x.dtype) * outputs[round(2 * c.n_layer / 3)]
        x = norm(x)
        return self.logits(x) if targets is None else self.loss(x, targets)

    def logits(self, x):
        c, logits = self.config, self.lm_head(x).float()
        if c.sigmoid_softcap:
            return 23 * torch.sigmoid((logits + 5) / 7.5)
        if c.softcap:  # Gemma 2, arXiv 2408.00118
            return c.softcap * torch.tanh(logits / c.softcap)
        return logits

    def loss(self, x, targets):
        """Mean cross-entropy; in training, those of later tokens are added by their weights."""
        weights = self.ahead if self.training else self.ahead[:1]
        beyond = F.pad(targets, (0, len(weights) - 1), value=-100)  # the row: left out
        ahead, total = beyond.unfold(1, len(weights), 1), 0.0  # [B, T, predictions]
        for part, goals in zip(x.split(16384, 1), ahead.split(16384, 1), strict=True):
            logits = self.logits(part).flatten(0, 1)
            for weight, goal in zip(weights, goals.flatten(0, 1).unbind(-1), strict=True):
                total = total + weight * F.cross_entropy(logits, goal, reduction="sum")
        return total / targets.numel()


def prediction_weights(step, c):
    """Of the losses of the next one to three tokens at update `step`. The third fades in the first
    third of the run, the second in the second (record of 22 December 2025)."""
    thirds = 3 * step / (c.steps - c.extension)
    weights = 1.0, 0.5 * min(1.0, 2 - thirds), 0.25 * (1 - thirds)
    return [weight for weight in weights if weight > 0] if c.multi_token else [1.0]


def flops_per_token(model):
    """Floating-point operations of forward and backward: 6 per weight of a matmul, and attention
    over its mean span, averaged over the stages of the run."""
    c = model.config
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    weights = sum(p.numel() for linear in linears for p in linear.parameters())
    spans = 0
    for step in range(c.steps):
        windows = windows_at(step, c)
        for layer in model.plan:
            window = windows[layer.long] or c.seq_len
            spans += layer.attention * min(window, c.seq_len / 2)
    return 6 * weights + 12 * c.n_embd * spans / c.steps


# ------------------------------------------------------------------------------------ Optimizers
# torch 2.13 gave these collectives new names
reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


@functools.cache
def compiled(function, on):
    """Once in the life of the process, for every shape and form that the function meets."""
    if not on:
        return function
    torch._dynamo.config.recompile_limit = 256  # from the ninth on it would run uncompiled
    return torch.compile(function, dynamic=False)


def descend(w, update, rates, decay):
    """Take the update times its rates off the weights, in place. Cautious decay (arXiv 2510.12402):
    only where the update goes that way, too."""
    if decay is not None:
        update = update + w * (update * w > 0) * decay
    w.sub_(update * rates)


class Optimizer:
    """Parameters as rows of one tensor, sharded over ranks (ZeRO, arXiv 1910.02054); a subclass
    says what the update is.

    named: {name: parameter}; they and their gradients become views into `weights` and `grads`,
    [rows, *row_shape], padded to divide over ranks. row_shape: () where any element may go to any
    rank (Adam), else the matrix that must stay whole. steps: updates since the moments began."""

    sharded = True  # else every rank updates all rows
    every, decay = 1, 0.0  # updates of the run per update of these; cautious weight decay

    def __init__(self, named, lr, row_shape, run):
        self.named, self.lr, self.config, self.runtime = named, lr, run.config, run.runtime
        self.name = f"{type(self).__name__} {next(iter(named))}"
        self.method, self.row_scale, self.scale = Method(run.config), 1.0, 1.0
        self.momentum = run.config.momentum
        self.betas = run.config.beta1, run.config.beta2
        self.state: dict[str, Tensor] = {}  # {name: [own rows, ...]}
        self.steps, self.work = 0, None
        self.shards = run.runtime.world_size if self.sharded else 1
        parts = [p.detach().reshape(-1, *row_shape) for p in named.values()]
        self.sizes = [len(part) for part in parts]
        unit = 1 if row_shape else 16  # shards start aligned; of one element, compiling fails
        self.share = -(-sum(self.sizes) // (self.shards * unit)) * unit
        first = self.share * run.runtime.rank if self.sharded else 0
        self.mine = slice(first, first + self.share)
        self.weights = self.stack(parts)
        self.grads = torch.zeros_like(self.weights)
        views = named.values(), self.parts(self.weights), self.parts(self.grads)
        for p, weight, grad in zip(*views, strict=True):
            p.data, p.grad = weight.view_as(p), grad.view_as(p)

    def stack(self, parts):
        """Tensors [its rows, ...] of all parameters to rows of all ranks, on the device; padding
        rows are zero."""
        rows = torch.cat(parts)
        padding = rows.new_zeros(self.share * self.shards - len(rows), *rows.shape[1:])
        return torch.cat((rows, padding)).to(self.runtime.device)

    def parts(self, rows):
        """Inverse of stack."""
        return rows[: sum(self.sizes)].split(self.sizes)

    def reduce(self):
        """Start to sum the gradients over ranks, each rank's rows on that rank."""
        if self.shards > 1:
            self.work = reduce_scatter(self.grads[self.mine], self.grads, async_op=True)

    @torch.no_grad()
    def step(self):
        """Update this rank's rows, then start to gather everyone's."""
        self.finish()
        self.steps += 1
        gradient = self.method.project(self, self.grads[self.mine])
        update = self.method.lift(self, self.update(gradient))
        rate = self.lr * self.scale
        rates = torch.as_tensor(rate * self.row_scale)
        decay = torch.tensor(rate * self.decay) if self.decay else None
        compiled(descend, self.config.compile)(self.weights[self.mine], update, rates, decay)
        self.grads.zero_()
        if self.shards > 1:
            self.work = all_gather(self.weights, self.weights[self.mine], async_op=True)

    def finish(self):
        if self.work:
            self.work.wait()
        self.work = None

    def update(self, g):
        """What to subtract, times the rate, for gradient rows [own rows, ...]."""
        raise NotImplementedError

    def moment(self, name, like):
        """fp32, zero at first, to be changed in place."""
        if name not in self.state:
            self.state[name] = torch.zeros_like(like, dtype=torch.float32)
        return self.state[name]

    def gather_state(self):
        """Of all ranks, on every rank's CPU: the same for any number of ranks."""
        whole = {"parameters": list(self.named), "steps": self.steps}
        for name, own in self.state.items():
            rows = torch.cat([own] * self.shards)
            if self.shards > 1:
                all_gather(rows, own.contiguous())
            whole[name] = rows[: sum(self.sizes)].cpu()
        return whole

    def load_state(self, whole):
        """Inverse of gather_state. Errors: UserError where it is of other parameters."""
        state = dict(whole)
        names, self.steps = state.pop("parameters"), state.pop("steps")
        refuse(names != list(self.named) or self.steps < 0, "its moments are of other parameters")
        for name, rows in state.items():
            refuse(len(rows) != sum(self.sizes), f"{name} has not one row per row of the weights")
            self.state[name] = self.stack([rows])[self.mine].clone()


def adam_update(g, m, v, beta1, beta2, eps, bias1, bias2):
    """Adam, arXiv 1412.6980; bias: 1 - beta ** steps. Changes the moments m and v in place."""
    g = g.float()
    m.lerp_(g, 1 - beta1)
    v.lerp_(g * g, 1 - beta2)
    return (m / bias1) / ((v / bias2).sqrt() + eps)


class Adam(Optimizer):
    def update(self, g):
        c, (beta1, beta2) = self.config, self.betas
        m, v = self.moment("exp_avg", g), self.moment("exp_avg_sq", g)
        bias1, bias2 = (torch.tensor(1 - beta**self.steps) for beta in (beta1, beta2))
        eps = c.adam_eps / bias2.sqrt() if c.adam_table else torch.tensor(c.adam_eps)
        return compiled(adam_update, c.compile)(g, m, v, beta1, beta2, eps, bias1, bias2)


class Adagrad(Optimizer):
    """Rate over the root of the sum of all squared gradients (Duchi et al., JMLR 2011): rare rows
    take large steps when their turn comes."""

    def update(self, g):
        total = self.moment("sum_sq", g).addcmul_(g.float(), g.float())
        return g / (total.sqrt() + 1e-12)


KELLER_JORDAN = [(3.4445, -4.7750, 2.0315)] * 5
POLAR_EXPRESS = [  # arXiv 2505.16932, for five steps
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


def newton_schulz(g, dtype, polar_express=False):
    """Matrices [n, rows, cols] with singular values brought near 1 (0.7 to 1.2) by five steps."""
    tall = g.size(-2) > g.size(-1)
    x = (g.mT if tall else g).to(dtype)
    largest = x.norm(dim=(-2, -1), keepdim=True)  # at least
    x = x / (1.02 * largest + 1e-6 if polar_express else largest + 1e-7)
    for a, b, c in POLAR_EXPRESS if polar_express else KELLER_JORDAN:
        gram = x @ x.mT
        x = a * x + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ x
    return (x.mT if tall else x).float()


class Muon(Optimizer):
    """Momentum, orthogonalised by Newton-Schulz; Nesterov style (Keller Jordan,
    kellerjordan.github.io/posts/muon)."""

    def update(self, g):
        c, m, momentum = self.config, self.moment("momentum", g), self.momentum
        if c.momentum_ema:
            m.lerp_(g, 1 - momentum)
            g = torch.lerp(g, m, momentum)
        else:
            m.mul_(momentum).add_(g)
            g = g + momentum * m
        u = compiled(newton_schulz, c.compile)(g, c.dtype, c.polar_express)
        return self.even(u) if c.normuon else u

    def even(self, u):
        """NorMuon (arXiv 2510.05491): divide each row of a tall matrix, column of a wide one, by
        its running RMS, and keep the update's norm (so Adam's correction of bias would cancel)."""
        decay = self.config.normuon
        across = -1 if u.size(-2) >= u.size(-1) else -2
        square = u.square().mean(across, keepdim=True)
        mean = self.moment("row_sq", square).lerp_(square, 1 - decay)
        even = u / (mean + 1e-16).sqrt()
        size = torch.linalg.matrix_norm(u, keepdim=True)
        return even * (size / (torch.linalg.matrix_norm(even, keepdim=True) + 1e-7))


MATRIX_RULES = {"muon": Muon, "adam": Adam}


# Of each group: the flag of its rate, a factor on that; with --adam_table, by the record of 19
# January 2026, also beta1, beta2 and the factor on decay_adam
GROUPS = {
    "ngrams": ("lr_ngram", 1),
    "wte": ("lr_embed", 1, 0.5, 0.95, 150),
    "lm_head": ("lr_head", 1, 0.5, 0.95, 150),
    "tables": ("lr_table", 1, 0.75, 0.95, 5),
    "scalars": ("lr_scalar", 1, 0.9, 0.99, 0),
    "x0_lambda": ("lr_scalar", 1, 0.65, 0.95, 0),
    "gates": ("lr_gate", 1, 0.9, 0.99, 1),
    "smear_gate": ("lr_gate", 0.01, 0.9, 0.99, 0),
    "skip_gate": ("lr_gate", 0.05, 0.9, 0.99, 0),
}


def is_matrix(name, p):
    """Is this parameter one of the hidden matrices, which Muon and the methods train?"""
    return name.startswith("blocks.") and p.ndim == 2 and not getattr(p, "is_gate", False)


def group_of(name, p):
    """The optimizer group of a parameter that is no hidden matrix."""
    first, last = name.partition(".")[0], name.rpartition(".")[2]
    if first in ("bigrams", "value_embeds"):
        return "tables"
    if last == "x0_lambda":
        return last
    if p.ndim < 2:
        return "scalars"
    return "gates" if first == "blocks" else first


def make_optimizers(run):
    """Every parameter in exactly one optimizer; the hidden matrices in stacks of one shape. Errors:
    KeyError for a parameter that belongs to no group."""
    c, matrices, groups, optimizers = run.config, {}, {}, []
    for name, p in run.model.named_parameters():
        group = matrices if is_matrix(name, p) else groups.setdefault(group_of(name, p), {})
        group[name] = p
    for group, named in groups.items():
        if group not in GROUPS:
            raise KeyError(f"no optimizer trains {', '.join(named)}: give {group} a row of GROUPS")
        flag, factor, *table = GROUPS[group]
        rule = Adagrad if group == "ngrams" else Adam
        optimizer = rule(named, factor * getattr(c, flag), (), run)
        optimizer.every = c.adam_every
        if c.adam_table and table:
            *optimizer.betas, decay = table
            optimizer.decay = decay * c.decay_adam
        optimizers.append(optimizer)
    rule = c.low_rank_optimizer if c.galore else c.matrix_optimizer
    return optimizers + stack_matrices(matrices, rule, run)


def stack_matrices(matrices, rule, run):
    """Optimizers for {name: hidden matrix}, one per shape. Times √(out / in), orthogonal updates of
    all shapes act alike; a matrix's attribute lr_mult, if any, is a factor on its rate."""
    c, stacks, scales, optimizers = run.config, {}, {}, []
    for name, p in matrices.items():
        n_out, n_in = reversed(p.shape) if getattr(p, "transposed", False) else p.shape
        scale = max(1.0, n_out / n_in) ** 0.5 if rule == "muon" else 1.0
        scales[name] = torch.full((1, 1, 1), scale * getattr(p, "lr_mult", 1.0))
        stacks.setdefault((name if c.galore_per_layer else "", *p.shape), {})[name] = p
    method = next((method for method in run.methods if method.transforms), Method(c))
    for (_, *shape), named in stacks.items():
        optimizer = method.optimizers[rule](named, getattr(c, f"lr_{rule}"), shape, run)
        optimizer.method, optimizer.decay = method, c.decay_muon
        optimizer.row_scale = optimizer.stack([scales[name] for name in named])[optimizer.mine]
        optimizers.append(optimizer)
    return optimizers


# ------------------------------------------------------------------------------------- Schedules
def at_step(values, step, c):
    """The value of a schedule for update `step`, 0-based: one for each equal share of the run; with
    an extension, the last of several is for that."""
    steps = c.steps - c.extension
    if c.extension and len(values) > 1:
        *values, last = values
        if step >= steps:
            return last
    return values[min(step, steps - 1) * len(values) // steps]


def windows_at(step, c):
    """{Layer.long: window} at update `step`; c.steps: of the last validation; 0: no limit."""
    long = at_step(c.window, step, c)
    if step == c.steps:
        long = c.final_window or long
    return {True: long, False: at_step(c.short_window, step, c) or long}


def lr_at(step, c):
    """Factor on all rates for update `step`, 0-based: linear warm-up, stages (which a rate joins
    one update late, as in the record of 29 November 2025), linear cool-down; jagged with ReLoRA."""
    steps = c.steps - c.extension
    left = min(1.0, max(0, steps - step) / max(1, c.cooldown * steps))
    stage = at_step(c.lr_factor, max(0, step - 1), c)
    factor = left * stage + (1 - left) * c.lr_floor
    factor *= min(1.0, (step + 1) / max(1, c.warmup))
    since_wrap = step - c.relora_warm_start
    if c.relora and since_wrap >= 0:  # from near zero back to the same curve
        since_merge = since_wrap % c.relora_interval + 1
        factor *= min(1.0, since_merge / max(1, c.relora_interval // 10))
    return factor


def momentum_at(step, c):
    """Muon's momentum for update `step`: from 0.85 up (record of 6 November 2024), and down
    again."""
    risen = step / max(1, c.momentum_warmup)
    left = (c.steps - step) / max(1, c.momentum_cooldown)
    share = min(1.0, risen, left)
    return (1 - share) * min(0.85, c.momentum) + share * c.momentum


def tied_at(step, c):
    """Are wte and lm_head one at update `step`? They part where Adam first steps in the new
    share."""
    return not c.untie_head or step - c.adam_every + 1 <= c.tied_share * (c.steps - c.extension) > 0


def forms(c):
    """The first steps of all forms that the work takes, and c.steps, that of the last
    validation."""
    first = {}
    for step in range(c.steps):
        wrapped = c.relora and step >= c.relora_warm_start
        form = at_step(c.batch_tokens, step, c), len(prediction_weights(step, c)), wrapped
        first.setdefault(form, step)
    return [*first.values(), c.steps]


# --------------------------------------------------------------------------------- Clock and log
class Clock:
    """Training time. Synchronises the device at every start and stop; nothing else measures
    training."""

    def __init__(self, device):
        self.device, self.seconds, self.since = device, 0.0, None

    def switch(self, on):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds = self.ms / 1000
        self.since = time.perf_counter() if on else None

    @contextlib.contextmanager
    def paused(self):
        self.switch(on=False)
        yield
        self.switch(on=True)

    @property
    def ms(self):
        """So far, without waiting for the device."""
        running = time.perf_counter() - self.since if self.since else 0.0
        return 1000 * (self.seconds + running)


class Log:
    """logs/<run_id>.txt and the screen, on rank 0: the source, the facts, the steps, the result.
    Where the file can no longer be written, the run goes on and every line goes to the screen."""

    def __init__(self, c, runtime, argv, data):
        stamp = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{uuid.uuid4().hex[:6]}"
        self.main, self.live, self.shown = runtime.rank == 0, sys.stdout.isatty(), 0.0
        self.facts = dict(
            run_id=runtime.exchange(stamp)[0],
            python=platform.python_version(),
            torch=torch.__version__,
            cuda=torch.version.cuda if runtime.cuda else "none",
            device=torch.cuda.get_device_name(runtime.device) if runtime.cuda else "cpu",
            cpu=f"{platform.machine()}, {torch.get_num_threads()} threads",
            world_size=runtime.world_size,
            argv=" ".join(argv),
            source_sha256=SOURCE_SHA256,
            data_sha256=data,
            config=vars(c),
        )
        self.path, self.lines = Path(c.log_dir, f"{self.facts['run_id']}.txt"), []
        table = [
            f"{name}: {fact if isinstance(fact, str) else json.dumps(fact)}"
            for name, fact in self.facts.items()
        ]
        rule = "=" * 100
        with blame(f"--log_dir {c.log_dir}: no log can be written there"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.append("\n".join((SOURCE.removesuffix("\n"), rule, *table, rule)))

    def append(self, text):
        if self.main:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(text + "\n")

    def line(self, text, echo=False):
        """Into the log; echo: and onto the screen."""
        self.lines.append(text)
        try:
            self.append(text)
        except OSError as error:
            text, echo = f"{text} (not logged: {error})", True
        if echo:
            self.show(text)

    def show(self, text, end="\n"):
        if self.main:
            with contextlib.suppress(OSError):  # the terminal may be gone
                print("\r\033[K" * self.live + text, end=end, flush=True)

    def loss(self, step, steps, kind, loss, ms):
        """The public speedrun's line; kind: val or train. Errors: UserError when it is not
        finite."""
        times = f"train_time:{ms:.0f}ms step_avg:{ms / max(1, step):.2f}ms"
        self.line(f"step:{step}/{steps} {kind}_loss:{loss:.4f} {times}", echo=kind == "val")
        lost = not math.isfinite(loss)
        refuse(lost, f"the {kind} loss became {loss} at step {step}: lower the learning rates")

    def progress(self, text):
        """The live line: rewritten in place on a terminal, every ten seconds elsewhere."""
        if time.monotonic() - self.shown > (0.2 if self.live else 10):
            self.shown = time.monotonic()
            self.show(text, end="" if self.live else "\n")


# ------------------------------------------------------------------------------------ Checkpoint
@dataclasses.dataclass
class Run:
    """A run: its settings, and all that training changes. step: updates done; micro: {rows of a
    rank: rows of its micro-batch}; data: {file: sha256}."""

    config: Config
    runtime: Runtime
    model: GPT
    methods: list
    optimizers: list[Optimizer] = dataclasses.field(default_factory=list)
    micro: dict[int, int] = dataclasses.field(default_factory=dict)
    clock: Clock | None = None
    log: Log | None = None
    data: dict | None = None
    step: int = 0
    unread: list = dataclasses.field(default_factory=list)  # losses on their way from the device

    def state(self):
        """All of it, on the CPU, by name, the same for any number of ranks. A collective."""
        return {
            "step": self.step,
            "model": {name: t.cpu() for name, t in self.model.state_dict().items()},
            "optimizers": {o.name: o.gather_state() for o in self.optimizers},
            "methods": [method.state_dict() for method in self.methods],
            "rng": torch.get_rng_state(),
        }

    def load_state(self, state):
        """Take the form and the values of a state."""
        self.step = state["step"]
        for method, values in zip(self.methods, state["methods"], strict=True):
            method.resume(self.step, self)
            method.load_state_dict(values)
        self.model.load_state_dict(state["model"])
        for optimizer in self.optimizers:
            optimizer.load_state(state["optimizers"][optimizer.name])
        torch.set_rng_state(state["rng"])


def identity(c, data):
    """What two runs must share to be the same run."""
    trained = list(vars(c).items())[: list(vars(c)).index("train_files")]
    return dict(trained) | {"the source of train_gpt.py": SOURCE_SHA256, "the data": data}


def save_checkpoint(run):
    """checkpoint_dir/<run_id>/step_<n>.pt: torch.save and the sha256 of that; the file appears
    whole or not at all. A collective."""
    c, log, file = run.config, run.log, io.BytesIO()
    path = Path(c.checkpoint_dir, log.path.stem, f"step_{run.step:06d}.pt")
    state = run.state() | dict(
        train_seconds=run.clock.ms / 1000,
        config=vars(c),
        identity=identity(c, run.data),
        log=[line for line in log.lines if line.startswith(("step:", "resumed:"))],
    )
    if run.runtime.rank == 0:
        torch.save(state, file)
        data, aside = file.getvalue(), path.with_name("being_written.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(aside, "wb") as disk:
                disk.write(data + hashlib.sha256(data).digest())
                disk.flush()
                os.fsync(disk.fileno())
            aside.replace(path)
            for old in sorted(path.parent.glob("step_*.pt"))[: -c.checkpoint_keep]:
                old.unlink()
            log.line(f"checkpoint: {path}")
        except OSError as error:
            with contextlib.suppress(OSError):
                aside.unlink()  # it may fill the disk
            log.line(f"checkpoint: {path} not written ({error})", echo=True)
    run.runtime.exchange(None)  # the others wait here


def read_checkpoint(path):
    """Errors: UserError when the file is not, bit for bit, what save_checkpoint wrote."""
    with blame(f"{path}: damaged or not a checkpoint"):
        data = Path(path).read_bytes()
        refuse(hashlib.sha256(data[:-32]).digest() != data[-32:], "wrong checksum")
        state = torch.load(io.BytesIO(data[:-32]), map_location="cpu", weights_only=True)
        dict(state["identity"]), Config(**state["config"])
        counts = type(state["step"]) is int and state["step"] >= 0
        refuse(not counts or not 0 <= state["train_seconds"] < math.inf, "it miscounts")
        return state


def find_checkpoint(wanted, folder):
    """(path, state) of the checkpoint at a path; or the latest in a folder that can be read."""
    if wanted != "latest":
        return wanted, read_checkpoint(wanted)
    found = sorted(Path(folder).glob("*/step_*.pt"), key=os.path.getmtime)
    for path in reversed(found):
        try:
            return path, read_checkpoint(path)
        except UserError as error:
            print(f"{error}; looking for an older one", file=sys.stderr)
    raise UserError(f"no checkpoint in {folder} can be read: train with --checkpoint_every N first")


def find_resumption(c, data):
    """(path, state) that --resume names. Errors: UserError when it is of another run, and
    --resume_anyway was not given."""
    path, state = find_checkpoint(c.resume, c.checkpoint_dir)
    now = identity(c, data).items()
    state["changed"] = [name for name, value in now if state["identity"].get(name) != value]
    line = f"{path} is of a run with other {state['changed']}: give that run's, or --resume_anyway"
    refuse(state["changed"] and not c.resume_anyway, line)
    refuse(state["step"] > c.steps, f"{path}: step {state['step']} is after the end of this run")
    return path, state


def resume(run, path, state):
    """Go on where a checkpoint stands. Errors: UserError when it does not fit this model or
    method."""
    with blame(f"{path} does not fit this model or method"):
        run.load_state(state)
        run.clock.seconds = float(state["train_seconds"])
        for line in state["log"]:
            run.log.line(line)
    run.log.line(f"resumed: from step {run.step} of {path}, changed: {state['changed']}", echo=True)


# -------------------------------------------------------------------------------------- Evaluate
def largest_divisor(n, at_most):
    return max((d for d in range(1, at_most + 1) if n % d == 0), default=1)


@torch.no_grad()
def swap(model, weights):
    """Copy {parameter: values} into the model; returns what they were."""
    named = dict(model.named_parameters())
    before = {name: named[name].clone() for name in weights}
    for name in weights:
        named[name].copy_(weights[name])
    return before


def eval_weights(run):
    """{parameter: what validation and sampling use in its place}, as the methods say."""
    return {k: v for method in run.methods for k, v in method.eval_weights(run.model).items()}


def val_rows(run):
    """Rows per forward pass of a validation: one shape, known from the first stage on."""
    c, first = run.config, next(iter(run.micro.values()))
    share = c.val_tokens // c.val_len // run.runtime.world_size
    return largest_divisor(share, first * c.seq_len // c.val_len)


@torch.no_grad()
def evaluate(run, val):
    """Mean cross-entropy, nats per token, of the first val_tokens tokens, each seen once."""
    c, runtime = run.config, run.runtime
    share = c.val_tokens // c.val_len // runtime.world_size
    rows = np.arange(share) + runtime.rank * share
    total = torch.zeros((), dtype=torch.float64, device=runtime.device)
    raw = swap(run.model, eval_weights(run))
    run.model.eval()
    for chunk in np.split(rows, share // val_rows(run)):
        total += forward(run, *split(val.read(chunk), runtime.device)) * len(chunk)
    run.model.train()
    swap(run.model, raw)
    return runtime.sum(total).item() / (share * runtime.world_size)


def load_model(path, device="cpu"):
    """A checkpoint's model as validation saw it: tokens [B, T] to logits [B, T, padded_vocab]."""
    state = read_checkpoint(path)
    with blame(f"{path} does not fit this train_gpt.py"):
        c = Config(**state["config"] | dict(compile=False))
        run = build(c, Runtime(torch.device(device)))
        run.load_state(state)
        run.model.set_stage(run.step)
    swap(run.model, eval_weights(run))
    return run.model.eval()


def tokenizer(vocab_size):
    """(encode, decode) of the data's vocabulary: bytes for byte shards, else tiktoken's gpt2."""
    if vocab_size == 257:
        return str.encode, bytes
    with blame(
        "--generate needs tiktoken's gpt2 tables: go online once, or set TIKTOKEN_CACHE_DIR"
    ):
        import tiktoken  # only sampling needs it

        gpt2 = tiktoken.get_encoding("gpt2")
        return gpt2.encode_ordinary, gpt2.decode_bytes


@torch.no_grad()
def generate(c):
    """Print c.generate and what the model of a checkpoint makes of it, as it comes."""
    device = init_runtime(c).device
    model = load_model(find_checkpoint(c.checkpoint, c.checkpoint_dir)[0], device)
    seq_len, mark = model.config.seq_len, model.config.vocab_size - 1
    encode, decode = tokenizer(mark + 1)
    tokens, generator = [mark, *encode(c.generate)], seeded(c.seed, "generate")
    print(c.generate, end="", flush=True)
    for _ in range(c.generate_tokens):
        context = torch.tensor([tokens[-seq_len:]], device=device)
        logits = model(context)[0, -1, : mark + 1].cpu()
        odds = torch.softmax(logits / max(c.temperature, 1e-6), 0)
        tokens.append(int(torch.multinomial(odds, 1, generator=generator)))
        if tokens[-1] == mark:
            break
        sys.stdout.buffer.write(decode(tokens[-1:]))
        sys.stdout.buffer.flush()
    print()


# ----------------------------------------------------------------------------------------- Train
class Stopped(Exception):
    """A signal ended the run, on all ranks."""


def forward(run, inputs, targets):
    return compiled(GPT.forward, run.config.compile)(run.model, inputs, targets)


def forward_backward(run, inputs, targets, micro):
    """Add the gradients of the global mean loss (sum_loss: of the sum over tokens / 8), `micro`
    rows at a time. Returns this rank's share of the mean."""
    shares = len(inputs) // micro * run.runtime.world_size
    size = inputs.numel() * run.runtime.world_size / 8 if run.config.sum_loss else 1.0
    total = torch.zeros((), device=inputs.device)
    for x, y in zip(inputs.split(micro), targets.split(micro), strict=True):
        loss = forward(run, x, y) / shares
        (size * loss).backward()
        total += loss.detach()
    return total


def update(run):
    """One optimizer update. All collectives are under way before the first is waited for."""
    due = [optimizer for optimizer in run.optimizers if (run.step + 1) % optimizer.every == 0]
    wte, head = run.model.wte.weight, run.model.lm_head.weight
    tied = tied_at(run.step, run.config) and len(due) == len(run.optimizers)
    if tied:
        head.grad += wte.grad
        wte.grad.copy_(head.grad)
    for stage in ("reduce", "step", "finish"):
        for optimizer in due:
            getattr(optimizer, stage)()
    if tied:  # by lm_head's rate
        wte.data.copy_(head.data)


def set_stage(run):
    """Make ready for update number run.step, 0-based."""
    run.model.set_stage(run.step)
    for optimizer in run.optimizers:
        optimizer.scale = lr_at(run.step, run.config)
        optimizer.momentum = momentum_at(run.step, run.config)


def build(c, runtime):
    """The model at its first weights, on its device, with its methods; no optimizers yet."""
    torch.manual_seed(c.seed)
    run = Run(c, runtime, GPT(c), make_methods(c))
    for method in run.methods:
        method.attach(run.model)
    run.model.to(runtime.device)
    return run


def warm_up(c, runtime):
    """Compile and run every form that the work takes, on random tokens and a model that is then
    thrown away, before the clock starts. Returns Run.micro."""
    run = build(c, runtime)
    run.optimizers = make_optimizers(run)
    for run.step in forms(c):
        for method in run.methods:
            method.resume(run.step, run)
        set_stage(run)
        for optimizer in run.optimizers:
            optimizer.every = 1
        update(run)  # first, so that the moments are there when memory is measured
        rows = at_step(c.batch_tokens, run.step, c) // c.seq_len // runtime.world_size
        fit_micro_batch(run, rows)
        run.model.eval()
        with torch.no_grad():
            forward(run, *random_batch(run, val_rows(run), c.val_len))
        run.model.train()
    for optimizer in run.optimizers:  # what the compiler still holds of them takes no memory
        for stack in (optimizer.weights, optimizer.grads):
            if stack is not None:
                stack.untyped_storage().resize_(0)
    return run.micro


def random_batch(run, rows, seq_len):
    shape = (rows, seq_len + 1)
    tokens = torch.randint(run.config.vocab_size, shape, generator=seeded("warm-up"))
    return split(tokens, run.runtime.device)


def fit_micro_batch(run, rows):
    """Set run.micro[rows]: --micro_batch, or all rows, halved while they do not fit into the
    memory."""
    c, runtime = run.config, run.runtime
    micro = c.micro_batch or largest_divisor(rows, 65536 // c.seq_len)
    refuse(rows % micro, f"--micro_batch {micro} does not divide the {rows} rows of a rank")
    fits = False
    while not fits:
        parted = c.galore_per_layer and micro < rows
        refuse(parted, f"--galore_per_layer needs {rows} rows in one micro-batch: lower the batch")
        with contextlib.suppress(torch.OutOfMemoryError):
            two = min(rows, 2 * micro)  # the second one meets memory in pieces
            forward_backward(run, *random_batch(run, two, c.seq_len), micro)
            fits = True
        torch.cuda.empty_cache()  # only here has the error let go of its tensors
        fits = all(runtime.exchange(fits))
        refuse(not fits and micro == 1, "not even one row fits into the GPU's memory")
        run.micro[rows] = micro
        micro = largest_divisor(rows, micro // 2)


def send_loss(run, loss, stopping):
    """Sum over ranks the loss and how many were asked to stop, and start to copy both to the
    host."""
    cuda = run.runtime.cuda
    sums = run.runtime.sum(torch.stack((loss, torch.full_like(loss, stopping))))
    host = torch.empty(2, pin_memory=cuda).copy_(sums, non_blocking=True)
    event = torch.cuda.current_stream().record_event() if cuda else None
    run.unread.append((run.step, host, event))


def read_losses(run, late=0):
    """Log all but the newest `late` of them: on a GPU the host reads one update late, so that it
    never waits. Errors: UserError if one is not finite, Stopped."""
    stopping = 0
    while len(run.unread) > late:
        step, host, event = run.unread.pop(0)
        if event:
            event.synchronize()
        loss, stopping = host.tolist()
        run.log.loss(step, run.config.steps, "train", loss, run.clock.ms)
        if stopping:
            late = 0  # the log that goes into the checkpoint is whole
    if stopping and run.step % run.config.adam_every == 0:  # no gradients on their way
        raise Stopped


def training_loop(run, batches, val, stop):
    """From run.step to the end. Returns the last validation loss."""
    c, clock = run.config, run.clock
    clock.switch(on=True)
    while True:
        last = run.step == c.steps
        set_stage(run)
        if last or (c.val_every and run.step % c.val_every == 0):
            read_losses(run)
            with clock.paused():
                val_loss = evaluate(run, val)
            run.log.loss(run.step, c.steps, "val", val_loss, clock.ms)
        if last:
            clock.switch(on=False)
            return val_loss
        rows = batches.batch_at(run.step, run.runtime.rank, run.runtime.world_size)
        loss = forward_backward(run, *split(rows, run.runtime.device), run.micro[len(rows)])
        update(run)
        run.step += 1
        for method in run.methods:
            method.after_step(run.step, run)
        send_loss(run, loss, bool(stop))
        read_losses(run, late=int(run.runtime.cuda))
        pace = clock.ms / run.step
        left = f"{pace * (c.steps - run.step) / 1000:.0f} s left"
        run.log.progress(f"step {run.step}/{c.steps}  {pace:.0f} ms per step  {left}")
        if c.checkpoint_every and (run.step % c.checkpoint_every == 0 or run.step == c.steps):
            read_losses(run)
            with clock.paused():
                save_checkpoint(run)


def result_of(run, val_loss, warmup_ms):
    """The log's last line."""
    c, ms = run.config, run.clock.ms
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 ** (sys.platform != "darwin")
    if run.runtime.cuda:
        memory = torch.cuda.max_memory_allocated()
    return run.log.facts | dict(
        preset=c.preset,
        seed=c.seed,
        steps=c.steps,
        tokens=sum(at_step(c.batch_tokens, step, c) for step in range(c.steps)),
        val_loss=round(val_loss, 6),
        target_val_loss=c.target,
        target_reached=val_loss <= c.target,
        train_time_ms=round(ms),
        step_avg_ms=round(ms / c.steps, 3),
        warmup_ms=round(warmup_ms),
        peak_memory_bytes=memory,
        flops_per_token=flops_per_token(run.model),
        param_count=sum(p.numel() for p in run.model.parameters()),
        optimizer_state_bytes=sum(t.nbytes for o in run.optimizers for t in o.state.values()),
    )


def open_data(c):
    """(Batches, validation Shards, hashes). Errors: UserError where validation tokens are too few
    or trained on."""
    shards = Shards(c.train_files, "train_files", c.seq_len, c.max_document, c.vocab_size - 1)
    val = Shards(c.val_files, "val_files", c.val_len, mark=c.vocab_size - 1)
    batches, hashes = Batches(shards, c), (shards.hashes(), val.hashes())
    refuse(
        len(val) * c.val_len < c.val_tokens,
        f"{c.val_files} holds {len(val) * c.val_len:,} tokens in whole rows, --val_tokens are more",
    )
    trained, validated = (set(map(os.path.realpath, s.paths)) for s in (shards, val))
    shared = trained & validated
    refuse(shared, f"--val_files and --train_files share {shared}: validate on other tokens")
    same_name = hashes[0].keys() & hashes[1].keys()  # by which the log tells them apart
    refuse(same_name, f"{same_name}: --val_files need other names than --train_files; rename them")
    return batches, val, hashes[0] | hashes[1]


def agree(runtime, facts):
    """Errors: UserError with the names of facts that are not the same on all ranks."""
    odd = {k for theirs in runtime.exchange(facts) for k in facts if theirs[k] != facts[k]}
    refuse(odd, f"ranks differ in {odd}: give all of them the same files and flags")


def train(c, runtime, argv):
    """A whole run, from the shards to the result line."""
    batches, val, data = open_data(c)
    path, state = find_resumption(c, data) if c.resume else ("", {})
    saving = {"checkpoint_every": c.checkpoint_every, "the step of --resume": state.get("step")}
    agree(runtime, identity(c, data) | saving)
    if c.checkpoint_every or c.resume:
        with blame(f"--checkpoint_dir {c.checkpoint_dir}: no folder can be made there"):
            Path(c.checkpoint_dir).mkdir(parents=True, exist_ok=True)
    log, begun = Log(c, runtime, argv, data), time.perf_counter()
    if runtime.cuda:  # what fits now must still fit later
        limit = torch.cuda.get_per_process_memory_fraction()
        torch.cuda.set_per_process_memory_fraction(0.8 * limit)
    micro = warm_up(c, runtime)
    if runtime.cuda:
        torch.cuda.set_per_process_memory_fraction(limit)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    warmup_ms = 1000 * (time.perf_counter() - begun)
    run = build(c, runtime)
    run.optimizers = make_optimizers(run)
    run.micro, run.clock, run.log, run.data = micro, Clock(runtime.device), log, data
    size = sum(p.numel() for p in run.model.parameters())
    tokens = batches.first[-1] * c.seq_len
    log.line(f"{c.preset}: {size:,} parameters, {tokens:,} tokens, {c.steps} steps", echo=True)
    log.line(f"warm-up: {warmup_ms:.0f} ms, not in train_time; micro-batches {micro}", echo=True)
    if state:
        resume(run, path, state)
        state = None  # its memory is free
    stop = []  # numbers of the signals that asked this process to end
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, lambda number, frame: stop.append(number))
    try:
        val_loss = training_loop(run, batches, val, stop)
    except Stopped:
        if c.checkpoint_every or c.resume:
            save_checkpoint(run)
        log.line(f"stopped by a signal after step {run.step}", echo=True)
        raise Stopped(*stop) from None
    log.line(json.dumps(result_of(run, val_loss, warmup_ms)))
    gap = c.target - val_loss
    outcome = f"target {c.target:.4f} {'reached' if gap >= 0 else 'missed'} by {abs(gap):.4f}"
    seconds = f"{run.clock.seconds:.1f} s of training"
    log.show(f"val_loss {val_loss:.4f}, {outcome} in {seconds} | log {log.path}")


def start(argv):
    """Train, or sample. Raises whatever goes wrong."""
    c = parse_config(argv, "gpt2_small" if torch.cuda.is_available() else "laptop")
    if c.generate:
        return generate(c)
    runtime = init_runtime(c)
    train(resolve(c, runtime.device), runtime, argv)
    if runtime.world_size > 1:
        dist.destroy_process_group()


def main(argv=None):
    """Exit code: 0 done, 2 a user's mistake in one line, 1 a bug with its traceback, 128 + n
    stopped by signal n. Under torchrun `record` takes notes: the first error of all ranks is shown
    there."""
    try:
        record(start)(sys.argv[1:] if argv is None else argv)
        return 0
    except Stopped as stopped:
        return 128 + max(stopped.args, default=signal.SIGTERM)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except UserError as error:
        code, text = 2, f"train_gpt.py: {error}"
    except Exception:
        code, text = 1, traceback.format_exc()
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        print(text, file=sys.stderr, flush=True)
    return code


# --------------------------------------------------------------------------------------- Methods
class Method:
    """An optional method: hooks that default to nothing, so that the hot path has no branch for
    it."""

    optimizers = MATRIX_RULES
    transforms = False  # do project and lift change updates?

    def __init__(self, c):
        self.config = c

    def attach(self, model):
        """After init, before optimizers and compile."""

    def project(self, optimizer, g):
        """Gradient rows, on their rank, before the update."""
        return g

    def lift(self, optimizer, u):
        """The update, back to the weights' shape."""
        return u

    def resume(self, step, run):
        """Give model and optimizers the form that they have after `step` updates."""

    def after_step(self, step, run):
        """After update number `step`, 1-based."""

    def eval_weights(self, model):
        """{parameter: what validation and sampling use in its place}."""
        return {}

    def state_dict(self):
        return {}

    def load_state_dict(self, state): ...


def make_methods(c):
    on = {ReLoRA: c.relora, GaLore: c.galore, SuPar: c.sparsity or c.mup_base_width}
    on[LAWA] = c.lawa  # last: it sees what the others did
    return [method(c) for method in on if on[method]]


class LoRALinear(Linear):
    """y = x Wᵀ + s·(x Aᵀ) Bᵀ: W frozen, A [r, in], B [out, r] zero at first, so nothing changes."""

    def __init__(self, linear, rank, scale):
        super().__init__(linear.n_in, linear.n_out, transposed=linear.transposed)
        self.weight, self.scale = linear.weight.requires_grad_(False), scale
        self.weight.grad = None
        self.A = nn.Parameter(self.weight.new_zeros(rank, self.n_in))
        self.B = nn.Parameter(self.weight.new_zeros(self.n_out, rank))

    def forward(self, x):
        low = F.linear(x, self.A.to(x.dtype))
        change = F.linear(low, self.B.to(x.dtype))
        return super().forward(x) + self.scale * change

    def merged(self):
        change = self.scale * self.B @ self.A
        return self.weight + (change.T if self.transposed else change)


def adapters(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


class ReLoRA(Method):
    """High-rank training through low-rank updates (arXiv 2307.05695): after a warm start each
    hidden Linear becomes a LoRALinear; every interval B A is merged into the fp32 W, A drawn anew,
    B zero, the rates re-warmed (lr_at). The adapters' moments start anew, too (the paper prunes 99
    %)."""

    @torch.no_grad()
    def resume(self, step, run):
        c, model = self.config, run.model
        if step < c.relora_warm_start or adapters(model):
            return
        modules = dict(model.named_modules())
        for name, p in list(model.named_parameters()):
            if is_matrix(name, p):
                path = name.removesuffix(".weight")
                unknown = type(modules.get(path)) is not Linear
                refuse(unknown, f"--relora does not know {name}: make it a Linear")
                model.set_submodule(path, LoRALinear(modules[path], c.relora, c.relora_scale))
        matrices = {name: p for name, p in model.named_parameters() if name[-2:] in (".A", ".B")}
        others = [o for o in run.optimizers if o.weights.ndim != 3]  # the frozen matrices' go
        run.optimizers = others + stack_matrices(matrices, c.low_rank_optimizer, run)

    @torch.no_grad()
    def after_step(self, step, run):
        c, since = self.config, step - self.config.relora_warm_start
        self.resume(step, run)  # at the end of the warm start
        if since < 0 or since % c.relora_interval or step == c.steps:
            return
        for name, layer in adapters(run.model).items():
            layer.weight.copy_(layer.merged())
            uniform_(layer.A, layer.n_in**-0.5, seeded(c.seed, "relora", step, name))
            layer.B.zero_()
        for optimizer in run.optimizers:
            if optimizer.weights.ndim == 3:
                optimizer.steps, optimizer.state = 0, {}


class EightBit:
    """Moments in float8 with an fp32 scale per row (after 8-bit Adam, arXiv 2110.02861), the second
    as its root: a range of 2^36, not 2^18. In fp32 during a step."""

    def moment(self, name, like):
        if name in self.state and name not in self.opened:
            values = (
                self.state[name].view(torch.float8_e4m3fn).float() * self.state[name + "_scale"]
            )
            self.opened[name] = values.square() if name == "exp_avg_sq" else values
        if name not in self.opened:
            self.opened[name] = torch.zeros_like(like, dtype=torch.float32)
        return self.opened[name]

    def step(self):
        self.opened = {}
        super().step()
        while self.opened:  # fp32 lives no longer than the step
            name, values = self.opened.popitem()
            values = values.sqrt() if name == "exp_avg_sq" else values
            scale = values.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 448  # float8's largest
            self.state[name] = (values / scale).to(torch.float8_e4m3fn).view(torch.uint8)
            self.state[name + "_scale"] = scale


class PerLayer:
    """Update a matrix in the backward pass, as its gradient arrives, then free the gradient (LOMO,
    arXiv 2306.09782)."""

    sharded = False

    def __init__(self, named, *args):
        super().__init__(named, *args)
        (p,) = named.values()
        self.grads = p.grad = None
        p.register_post_accumulate_grad_hook(self.arrived)

    def arrived(self, p):
        self.grads = self.runtime.sum(p.grad).view_as(self.weights)
        super().step()
        self.grads = p.grad = None

    def step(self): ...  # it has happened


class GaLore(Method):
    """Gradients, and so the optimizer's state, in a low-rank space (arXiv 2403.03507): the inner
    optimizer sees G P (or PᵀG), P the gradient's leading singular vectors on its shorter side,
    renewed every interval; its update is projected back and scaled. At a refresh the moments move
    to the new basis (as in LDAdam, arXiv 2410.16103): the first by C = P_oldᵀ P_new, the second by
    C squared."""

    transforms = True

    def __init__(self, c):
        super().__init__(c)
        mixins = (PerLayer,) * c.galore_per_layer + (EightBit,) * (c.galore_bits == 8)
        self.optimizers = {
            rule: type(f"GaLore{base.__name__}", (*mixins, base), {})
            for rule, base in MATRIX_RULES.items()
        }

    def project(self, optimizer, g):
        tall = g.size(-2) >= g.size(-1)
        # behind zero-initialised weights the first two gradients are zero
        if optimizer.steps <= 3 or (optimizer.steps - 1) % self.config.galore_interval == 0:
            self.refresh(optimizer, g, tall)
        P = optimizer.state["P"]
        return g @ P if tall else P.mT @ g

    def lift(self, optimizer, u):
        P, (rows, cols) = optimizer.state["P"], optimizer.weights.shape[1:]
        return self.config.galore_scale * (u @ P.mT if rows >= cols else P @ u)

    def refresh(self, optimizer, g, tall):
        r, state, long = self.config.galore, optimizer.state, (g if tall else g.mT).float()
        P = torch.linalg.eigh(long.mT @ long)[1][..., -r:].contiguous()  # eigenvalues ascend
        change = state.get("P", P).mT @ P
        state["P"] = P
        for name in {"exp_avg", "exp_avg_sq", "momentum"} & state.keys():
            turn = change.square() if name == "exp_avg_sq" else change
            moment = optimizer.moment(name, None)
            moment.copy_(moment @ turn if tall else turn.mT @ moment)


class LAWA(Method):
    """Latest weight averaging: the mean of the last k snapshots, one every interval (arXiv
    2306.03241). eval: validate on it, train on untouched; replace: train on from it, too. ReLoRA's
    adapters are averaged merged (W + s·B A, with B = 0)."""

    window = ()

    @torch.no_grad()
    def after_step(self, step, run):
        c, model = self.config, run.model
        if step % c.lawa_interval:
            return
        weights = {name: p for name, p in model.named_parameters() if not name.endswith(".A")}
        for name, layer in adapters(model).items():
            weights |= {f"{name}.weight": layer.merged(), f"{name}.B": torch.zeros_like(layer.B)}
        weights = {name: p.detach().to("cpu", copy=True) for name, p in weights.items()}
        same_model = [old for old in self.window if old.keys() == weights.keys()]  # since a wrap
        self.window = [*same_model, weights][-c.lawa :]
        if c.lawa_mode == "replace" and len(self.window) == c.lawa:
            swap(model, self.eval_weights(model))

    def eval_weights(self, model):
        names = self.window[0] if self.window else {}
        if adapters(model) and not any(name.endswith(".B") for name in names):
            return {}  # snapshots of before the wrap
        return {
            name: sum(old[name].double() for old in self.window) / len(self.window)
            for name in names
        }

    def state_dict(self):
        return {"window": list(self.window)}

    def load_state_dict(self, state):
        self.window = state["window"]


class SuPar(Method):
    """SuPar, sparse maximal update parameterization (arXiv 2405.15743); at sparsity 0 it is muP
    (arXiv 2203.03466). Static random masks of density rho on the hidden matrices. With m_d = width
    / base width: hidden init variance 1 / rho (the fan-in init holds 1 / m_d), Adam's hidden rate 1
    / (m_d rho), logits 1 / m_d. Muon, found here: one spectral norm at every width, so no m_d; the
    unmasked gradient is orthogonalised (a masked one has no leading direction left), and the rate
    times rho ** -0.25 keeps the best rate in place (records/methods)."""

    transforms = True
    MUON_POWER = 0.25

    @torch.no_grad()
    def attach(self, model):
        c, self.masks = self.config, {}
        m_d, density = c.n_embd / (c.mup_base_width or c.n_embd), 1 - c.sparsity
        factors = {"adam": 1 / (m_d * density), "muon": density**-self.MUON_POWER}
        refuse(c.matrix_optimizer not in factors, f"SuPar has no rule for {c.matrix_optimizer}")
        for name, p in model.named_parameters():
            if is_matrix(name, p):
                p.lr_mult = factors[c.matrix_optimizer] * getattr(p, "lr_mult", 1.0)
                drawn = torch.rand(1, *p.shape, generator=seeded(c.seed, "mask", name))
                self.masks[name] = drawn < density
                p.mul_(self.masks[name][0]).mul_(density**-0.5)
        if m_d != 1:
            model.lm_head.register_forward_hook(lambda module, inputs, logits: logits / m_d)

    def lift(self, optimizer, u):
        if "mask" not in optimizer.state:
            masks = optimizer.stack([self.masks[name] for name in optimizer.named])
            optimizer.state["mask"] = masks[optimizer.mine]
        return u * optimizer.state["mask"]


if __name__ == "__main__":
    sys.exit(main())
