"""GPT-2 speedrun: train GPT-2 Small on FineWeb to 3.28 validation loss, as fast as possible.

    ./run.sh                                    any machine: set up, get the data, pick the preset
    torchrun --nproc_per_node=8 train_gpt.py    8 GPUs
    python train_gpt.py --help                  every flag

The whole trainer is this file. From top to bottom, nothing is used before it stands there:

    Config         what people turn: every field is a --flag and a part of the log; PRESETS
    Schedules      rates, momentum, windows, loss weights: functions of the step, read from stages
    Runtime        which process this is, and what the processes do together
    Data           token shards; the batch of a step is a pure function of the step
    Model          what both models share, then GPT2024 and GPT2026; each reads like its paper
    Method         the hooks of the optional methods, so that Optimizers can be read
    Optimizers     weights as stacks of rows, sharded over ranks: reduce-scatter, update, all-gather
    Clock and log  the one place where time is measured; the one file that a run leaves behind
    Checkpoint     save, find, resume bit for bit
    Evaluate       validation loss, load_model(), sampling
    Train          warm-up before the clock, the loop, main()
    Methods        ReLoRA, GaLore, LAWA, SuPar, tail averages: an appendix on the hooks

gpt2_small is the recipe of the public record of 28 September 2026 (number 92 of
github.com/KellerJordan/modded-nanogpt); nov2024 is that of 8 November 2024.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import gc
import glob
import hashlib
import io
import itertools
import json
import math
import os
import platform
import queue
import re
import shutil
import signal
import sys
import sysconfig
import threading
import time
import traceback
import unicodedata
import uuid
from pathlib import Path
from typing import Literal, get_args, get_origin

try:
    import numpy as np
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from torch import Tensor, nn
    from torch.distributed.elastic.multiprocessing.errors import record
    from torch.nn.attention.flex_attention import BlockMask, flex_attention
    from torch.utils.checkpoint import checkpoint as recompute
except (ImportError, OSError) as error:
    if __name__ != "__main__":
        raise
    print(f"train_gpt.py: {error}: ./run.sh sets up what it needs", file=sys.stderr)
    sys.exit(2)

SOURCE = Path(__file__).read_bytes().decode()  # read first: the log holds the code that really ran
SOURCE_SHA256 = hashlib.sha256(SOURCE.encode()).hexdigest()


# ---------------------------------------------------------------------------------------- Config
class UserError(Exception):
    """Something that only the user can mend: one line, exit code 2, no traceback."""


def fail_if(wrong, line):
    """Raises UserError(line) if wrong."""
    if wrong:
        raise UserError(line)


@contextlib.contextmanager
def explain_errors(line):
    """Raises UserError(line) for whatever goes wrong inside, with the first line of its cause."""
    try:
        yield
    except Exception as error:
        cause = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{line} ({cause[:150]})") from None


@dataclasses.dataclass(frozen=True)
class Stage:
    """A row of the training plan. Its numbers are flags: one value for all stages, or one for each
    (--batch_tokens 1024 2048); where the preset has another number of stages, equal ones."""

    steps: int = 3242  # optimizer updates; one value: of the whole run
    batch_tokens: int = 524288  # tokens per update, over all ranks
    seq_len: int = 1024  # tokens per row
    max_document: int = 0  # rows start at documents, each cut to so many tokens; 0: cut anywhere
    window: int = 0  # tokens that a layer looks back; 0: no limit
    short_window: int = 0  # ... those layers of gpt2026 that have a short one
    lr_factor: float = 1.0  # on all rates
    extension: bool = False  # after the cool-down: rates stay at --lr_floor
    predictions: tuple = ((1.0,), (1.0,))  # loss weights of the next tokens, at first and at last
    prefix: tuple = (0.0,)  # ... of the longest token that begins the target, by equal parts
    candidates: tuple = (0,)  # classes of a sampled softmax, by equal parts; 0: all


@dataclasses.dataclass(frozen=True)
class Config:
    """One run. Every field is a flag; booleans are --bf16 or --no_bf16."""

    preset: str = "nov2024"  # where all other fields start from
    model: Literal["gpt2024", "gpt2026"] = "gpt2024"  # which forward pass
    stages: tuple = (Stage(),)  # the training plan
    seed: int = 0  # of the initial weights and everything random
    target: float = 3.28  # validation loss to reach, nats per token
    device: Literal["auto", "cpu", "cuda", "mps", "xpu"] = "auto"  # auto: a GPU if there is one
    compile: bool | None = None  # torch.compile; unless given, on CUDA only
    max_autotune: bool = False  # compile by trying kernels for every matmul: minutes of warm-up
    # data
    val_tokens: int = 10485760  # validation tokens, the same ones every time
    val_seq_len: int = 0  # tokens per row of validation; 0: the longest of training
    val_every: int = 125  # updates between validations; 0: only at the end
    epochs_allowed: int = 1  # how often the training tokens may be seen
    spread_rows: bool = False  # rows from all over the data: for data that is not shuffled
    # model
    vocab_size: int = 50257  # tokens in the data; the last one marks the start of a document
    n_layer: int = 12  # blocks
    n_head: int = 6  # attention heads
    n_embd: int = 768  # width
    value_residual: bool = True  # mix the first block's values into every block's
    embed_residual: bool = True  # mix the normed embedding into every block's input
    untie_head: bool = True  # lm_head has weights of its own
    zero_init: bool = True  # lm_head, o and down start at zero
    softcap: float = 30.0  # logits become softcap * tanh(logits / softcap); 0: off
    bf16: bool = True  # activations and tables in bfloat16, other weights cast at use
    bf16_weights: bool = False  # hidden matrices in bfloat16; fp32 on the rank that trains them
    fp8_head: bool = False  # lm_head's matmuls in training in float8; no card has shown it yet
    doc_mask: bool = False  # tokens attend within their own document only
    ngram: int = 0  # add embeddings of the last 2, 3, ... this many tokens, side by side; 0: off
    ngram_rows: int = 16384  # of each table of such embeddings; n-grams share rows by hash
    value_embeds: bool = False  # tables of values for the outer layers, gated
    key_offset: bool = False  # half of the last layer's key is the previous token's
    half_rotary: bool = False  # half of a head's dims do not rotate
    table_rows: int = 0  # gpt2026: rows of the n-gram table; 0: as memory allows, steps follow
    token_classes: bool = False  # gpt2026: n-grams ignore case, accents and kinds of blanks
    copy_input: bool = False  # gpt2026: add what followed the longest earlier match
    # optimizers
    matrix_optimizer: Literal["muon", "anvil", "adam"] = "muon"  # of hidden matrices, adapters
    lr_muon: float = 0.02  # Muon's and ANVIL's rate
    lr_adam: float = 0.002  # Adam's rate for hidden matrices and adapters
    lr_embed: float = 0.3  # Adam's rate for wte
    lr_head: float = 0.002  # Adam's rate for lm_head, and for wte when tied to it
    lr_scalar: float = 0.02  # Adam's rate for learned factors
    lr_table: float = 0.6  # Adam's rate for value tables and gpt2026's n-grams
    lr_gate: float = 0.008  # Adam's rate for gates
    lr_ngram: float = 1.0  # Adagrad's rate for --ngram's tables
    momentum: float = 0.95  # Muon's and ANVIL's, after a warm-up from 0.85
    momentum_warmup: int = 500  # updates
    momentum_cooldown: int = 0  # last updates, in which it falls back to 0.85
    normuon: float = 0.0  # decay of NorMuon's mean square of each neuron's update; 0: plain Muon
    beta1: float = 0.9  # Adam's, in gpt2024
    beta2: float = 0.95  # Adam's, in gpt2024
    adam_eps: float = 1e-8  # Adam's, in gpt2024
    warmup: int = 0  # updates of linear learning-rate warm-up
    cooldown: float = 926 / 3242  # share of the plan, at its end, in which the rates fall
    lr_floor: float = 0.0  # ... to this share of the unfactored rates
    # methods
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
    tail_average: bool = False  # end on averages of the last quarter's weights
    sparsity: float = 0.0  # SuPar: share of every hidden matrix fixed at zero
    mup_base_width: int = 0  # SuPar: width at which the rates were tuned; 0: this width
    # files and machine: nothing from here on changes what is trained
    train_files: str = "data/fineweb10B/fineweb_train_*.bin"  # token shards, a glob
    val_files: str = "data/fineweb10B/fineweb_val_*.bin"  # token shards, a glob
    log_dir: str = "logs"  # the log is <log_dir>/<run_id>.txt
    log_norms: int = 0  # updates between lines of norms, while the clock runs; 0: off, free
    micro_batch: int = 0  # rows per forward pass of a rank; 0: as many as fit
    rank_timeout: float = 600.0  # seconds that ranks wait for each other before they give up
    checkpoint_every: int = 0  # updates between checkpoints; 0: only at the end or when stopped
    checkpoint_keep: int = 2  # newest checkpoints of the run that stay on disk
    checkpoint_dir: str = "checkpoints"  # they are <checkpoint_dir>/<run_id>/step_<n>.pt
    resume: str = ""  # train on from a checkpoint: its path, latest, or auto: latest if any
    resume_anyway: bool = False  # ... although flags, source or data changed
    generate: str | None = None  # do not train, continue this text
    checkpoint: str = "latest"  # ... with the model of this checkpoint: its path, or latest
    generate_tokens: int = 200  # ... by so many tokens
    temperature: float = 0.8  # ... drawn at this temperature; 0: the likeliest

    def __post_init__(self):
        check_config(self)

    @property
    def steps(self):
        return sum(stage.steps for stage in self.stages)

    @property
    def scheduled(self):
        """Updates up to the end of the cool-down."""
        return sum(stage.steps for stage in self.stages if not stage.extension)

    @property
    def max_seq_len(self):
        return max(stage.seq_len for stage in self.stages)

    @property
    def val_len(self):
        return self.val_seq_len or self.max_seq_len

    @property
    def dtype(self):
        return torch.bfloat16 if self.bf16 else torch.get_default_dtype()

    @property
    def padded_vocab(self):
        return -(-self.vocab_size // 64) * 64  # matmuls like multiples of 64


# Fields that may differ between two logs of one and the same run
LOCAL_FIELDS = frozenset(
    "train_files val_files log_dir log_norms micro_batch rank_timeout checkpoint_every "
    "checkpoint_keep checkpoint_dir resume resume_anyway generate checkpoint generate_tokens "
    "temperature".split()
)
POSITIVE = frozenset(
    "steps batch_tokens seq_len val_tokens epochs_allowed vocab_size n_layer n_head n_embd "
    "ngram_rows galore_interval checkpoint_keep".split()
)
BELOW_ONE = "momentum", "beta1", "beta2", "normuon", "sparsity"


def check_config(c):
    """Mistakes that would waste a run. Raises UserError: one line that says what to do."""
    for owner in (c, *c.stages):
        for name, value in vars(owner).items():
            least = int(name in POSITIVE)
            wrong = isinstance(value, int | float) and not least <= value < 2**63
            fail_if(wrong, f"--{name} {value}: must be a number from {least} to 2^63")
    for name in BELOW_ONE:
        fail_if(getattr(c, name) >= 1, f"--{name} {getattr(c, name)}: must be below 1")
    fail_if(
        c.vocab_size == 50304,
        "--vocab_size 50304: GPT-2's tokens are 50257; the model pads them to 50304 by itself",
    )
    for stage in c.stages:
        tokens, seq_len = stage.batch_tokens, stage.seq_len
        fail_if(tokens % seq_len, f"--batch_tokens {tokens}: must be a multiple of {seq_len}")
    fail_if(c.val_tokens % c.val_len, f"--val_tokens must be a multiple of {c.val_len}, its row")
    packed = {stage.max_document > 0 for stage in c.stages}
    fail_if(len(packed) > 1, "--max_document must be above 0 in every stage or in none")
    intervals = c.relora_warm_start, c.relora_interval, c.lawa * c.lawa_interval
    longest = max(c.warmup, *intervals)
    fail_if(longest > c.steps, f"--steps {c.steps} end before a warm-up or interval of {longest}")
    check_model(c)
    early = c.compile and c.galore_per_layer  # compiled, the backward pass frees nothing early
    fail_if(early, "--galore_per_layer needs --no_compile: else it would save no memory")
    early = c.log_norms and c.galore_per_layer
    fail_if(early, "--log_norms does nothing with --galore_per_layer, which keeps no gradient")
    supar = bool(c.sparsity or c.mup_base_width)
    line = "SuPar has no rule for --matrix_optimizer anvil: use muon or adam"
    fail_if(supar and c.matrix_optimizer == "anvil", line)
    written = c.relora or (c.lawa and c.lawa_mode == "replace")
    fail_if(
        c.bf16_weights and written, "--bf16_weights: --relora and --lawa_mode replace need fp32"
    )
    odd = any(size % 16 for size in (c.n_embd, *(stage.seq_len for stage in c.stages)))
    fail_if(c.fp8_head and odd, "--fp8_head needs --n_embd and --seq_len in multiples of 16")
    methods = [c.relora, c.galore, supar]
    fail_if(sum(map(bool, methods)) > 1, "--relora, --galore and SuPar exclude each other")
    fail_if(c.relora > c.n_embd, f"--relora {c.relora}: the rank must be at most --n_embd")


def check_model(c):
    unit = 4 if c.half_rotary or c.model == "gpt2026" else 2  # dims that rotate together
    even = c.n_embd % (unit * c.n_head) == 0
    fail_if(not even, f"--n_embd {c.n_embd}: must be a multiple of {unit} * --n_head {c.n_head}")
    fail_if(c.ngram == 1 or c.ngram > 8, f"--ngram {c.ngram}: must be 0 (off) or 2 to 8")
    if c.model == "gpt2026":
        fail_if(c.n_head % 2, f"--n_head {c.n_head}: gpt2026 pairs heads, so it must be even")
        fail_if(c.n_embd % 12, f"--n_embd {c.n_embd}: gpt2026 needs a multiple of 12")
        fail_if(c.n_embd < 24, "--n_embd must be at least 24 for gpt2026's gates")
        fail_if(0 < c.table_rows < 8, "--table_rows must be at least 8")
        for stage in c.stages:
            fail_if(stage.window == 0, "gpt2026 needs a --window and a --short_window above 0")
            fail_if(stage.short_window == 0, "gpt2026 needs a --short_window above 0")


# Record 92 of 28 September 2026; numbers by its own source. A row of a step is an eighth of its
# tokens, on any number of ranks.
RECORD_92 = (
    Stage(
        steps=320,
        batch_tokens=131072,
        seq_len=16384,
        max_document=896,
        window=384,
        short_window=128,
        predictions=((1.0, 0.5, 0.25), (1.0, 0.5, 0.0)),
        prefix=(0.25,),
        candidates=(10240,),
    ),
    Stage(
        steps=361,
        batch_tokens=262144,
        seq_len=32768,
        max_document=2048,
        window=896,
        short_window=384,
        lr_factor=1.52,
        predictions=((1.0, 0.5), (1.0, 0.0)),
        prefix=(0.20, 0.15, 0.10, 0.05),
        candidates=(10240,),
    ),
    Stage(
        steps=426,
        batch_tokens=393216,
        seq_len=49152,
        max_document=3072,
        window=1408,
        short_window=640,
        lr_factor=1.73,
        candidates=(14336, 14336, 24576),
    ),
    Stage(
        steps=67,
        batch_tokens=327680,
        seq_len=40960,
        max_document=3072,
        window=1408,
        short_window=640,
        lr_factor=1.73 * (20 / 24) ** 0.5,
    ),
    Stage(
        steps=20,
        batch_tokens=131072,
        seq_len=16384,
        max_document=3072,
        window=1664,
        short_window=768,
        extension=True,
    ),
)
# Rows of the n-gram table, and the updates that make up for those that are missing, added to the
# longest stage. Priced from the public ablation (three sizes, two runs each): never shown.
TABLE_ROWS = {
    84_602_880: 0,
    42_301_440: 12,
    21_150_720: 27,
    8_460_288: 56,
    4_230_144: 81,
    2_115_072: 107,
    377_280: 180,
}
FINAL_WINDOW = 2560  # of the long layers in the last validation

PRESETS = {
    "nov2024": Config("nov2024"),  # the fields' defaults: 8xH100 record of 8 November 2024
    "gpt2_small": Config(
        "gpt2_small",
        model="gpt2026",
        stages=RECORD_92,
        val_seq_len=262144,
        val_every=250,
        doc_mask=True,
        matrix_optimizer="anvil",
        lr_muon=0.023,
        lr_embed=0.008,
        lr_head=0.008,
        lr_scalar=0.04,
        lr_table=0.56,
        momentum=0.93,
        momentum_warmup=240,
        momentum_cooldown=50,
        cooldown=940 / 1174,
        lr_floor=0.30,
        tail_average=True,
    ),
    # Wider models by muP (arXiv 2203.03466): lm_head's rate falls with the width. Never run.
    "gpt2_medium": Config(
        "gpt2_medium",
        stages=(Stage(steps=6000),),
        target=2.92,
        n_layer=24,
        n_head=8,
        n_embd=1024,
        lr_head=0.0015,
    ),
    "gpt2_xl": Config(
        "gpt2_xl",
        stages=(Stage(steps=10000),),
        target=2.8,
        n_layer=48,
        n_head=25,
        n_embd=1600,
        lr_head=0.001,
    ),
    # For your own text as GPT-2 tokens on a laptop; data/prepare.py prints the command
    "small": Config(
        "small",
        stages=(Stage(steps=200, batch_tokens=1024, seq_len=128),),
        target=6.5,
        val_tokens=16384,
        val_every=50,
        epochs_allowed=1000,
        spread_rows=True,
        n_layer=4,
        n_head=2,
        n_embd=128,
        bf16=False,
        lr_head=0.008,
        momentum_warmup=40,
        cooldown=0.6,
        train_files="data/mine/*_train_*.bin",
        val_files="data/mine/*_val_*.bin",
    ),
    "laptop": Config(
        "laptop",
        stages=(Stage(steps=138, batch_tokens=2048, seq_len=128),),
        target=1.26,
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


def rescale(stages, steps):
    """The plan at another length: each stage keeps its share; those without an update go."""
    ends = np.cumsum([stage.steps for stage in stages])
    ends = [0, *(round(steps * int(end) / int(ends[-1])) for end in ends)]
    lengths = [end - begin for begin, end in itertools.pairwise(ends)]
    pairs = zip(stages, lengths, strict=True)
    return tuple(dataclasses.replace(stage, steps=n) for stage, n in pairs if n)


def edit_stages(stages, columns):
    """The plan with {column: values} that flags give, as Stage says. Raises UserError where two
    flags give different numbers of stages."""
    counts = {len(values) for values in columns.values()} - {1}
    fail_if(len(counts) > 1, f"flags give plans of {sorted(counts)} stages: give all the same")
    count = counts.pop() if counts else len(stages)
    steps = sum(stage.steps for stage in stages)
    if count != len(stages):
        near = (stages[i * len(stages) // count] for i in range(count))
        stages = [dataclasses.replace(stage, steps=steps) for stage in near]
        stages = rescale(stages, steps)
        fail_if(len(stages) < count, f"{steps} updates are too few for {count} stages")
    for name, values in columns.items():
        if name == "steps" and len(values) == 1:
            continue
        values = values * count if len(values) == 1 else values
        pairs = zip(stages, values, strict=True)
        stages = tuple(dataclasses.replace(stage, **{name: value}) for stage, value in pairs)
    total = columns.get("steps", ())
    if len(total) != 1:
        return stages
    fail_if(not 0 < total[0] < 2**63, f"--steps {total[0]}: must be a number from 1 to 2^63")
    return rescale(stages, total[0])


def describe_flags(owner, values):
    """The fields of Stage or Config as their source describes them, with these values."""
    body = SOURCE.partition(f"class {owner.__name__}:\n")[2].partition("\n\n\n")[0]
    lines = []
    for name, _, comment in re.findall(r"\n    (?:(\w+): .*?)?(#|  #) (.*)", body):
        if not name:
            lines.append(f"  {comment}")
        elif name in values:
            lines.append(f"    --{name} {values[name]}  {comment}")
    return lines


def help_text(config):
    columns = {
        field.name: " ".join(str(getattr(stage, field.name)) for stage in config.stages)
        for field in stage_flags()
    }
    values = {name: value for name, value in vars(config).items() if name != "stages"}
    return "\n".join(
        [
            f"Values are those of --preset {config.preset}; others: {', '.join(PRESETS)}.",
            "A boolean is --flag or --no_flag.",
            "  by stage: one value for all of them, or one for each",
            *describe_flags(Stage, columns),
            "  for the whole run",
            *describe_flags(Config, values),
        ]
    )


def stage_flags():
    """The fields of Stage that are flags."""
    return [field for field in dataclasses.fields(Stage) if field.type in (int, float)]


def parse_config(argv, default_preset):
    """Flags to Config. Raises UserError for a flag that is wrong or would do nothing."""
    parser = argparse.ArgumentParser(
        argument_default=argparse.SUPPRESS, allow_abbrev=False, add_help=False
    )
    parser.error = functools.partial(fail_if, True)
    parser.add_argument("-h", "--help", action="store_true")
    for field in stage_flags():
        parser.add_argument(f"--{field.name}", nargs="+", type=field.type)
    for field in dataclasses.fields(Config):
        kind, options = field.type, dict(dest=field.name)
        if kind in (bool, bool | None):
            parser.add_argument(f"--no_{field.name}", action="store_false", **options)
            options["action"] = "store_true"
        elif get_origin(kind) is Literal:
            options |= dict(choices=get_args(kind), type=type(field.default))
        else:  # text is a path, but for --generate's, and --preset's, which has no ~
            options["type"] = {str: os.path.expanduser, str | None: str}.get(kind, kind)
        if field.name == "resume":
            options |= dict(nargs="?", const="latest")
        if field.name != "stages":
            parser.add_argument(f"--{field.name}", **options)
    given = vars(parser.parse_args(argv))
    preset = given.get("preset", default_preset)
    fail_if(preset not in PRESETS, f"--preset {preset}: must be one of {', '.join(PRESETS)}")
    if given.pop("help", False):
        print("usage: train_gpt.py [--flag value ...]\n\n" + help_text(PRESETS[preset]))
        sys.exit(0)
    names = {field.name for field in stage_flags()} & given.keys()
    fields = {name: value for name, value in given.items() if name not in names}
    fields["stages"] = edit_stages(PRESETS[preset].stages, {name: given[name] for name in names})
    config = dataclasses.replace(PRESETS[preset], **fields)
    for name, reason in idle_flags(config).items():
        fail_if(name in given, f"--{name} does nothing {reason}")
    return config


def idle_flags(c):
    """{flag that does nothing in this run: why}."""
    rule, modern = c.matrix_optimizer, c.model == "gpt2026"
    tables = modern or c.value_embeds
    acting = {
        "without --relora": (c.relora, "relora_scale relora_warm_start relora_interval"),
        "without --galore": (
            c.galore,
            "galore_interval galore_scale galore_bits galore_per_layer",
        ),
        "without --lawa": (c.lawa, "lawa_interval lawa_mode"),
        "without --resume": (c.resume, "resume_anyway"),
        "without --generate": (c.generate is not None, "checkpoint generate_tokens temperature"),
        "without --ngram": (c.ngram, "ngram_rows lr_ngram"),
        "where nothing is gated": (tables, "lr_gate"),
        "without a table of values or n-grams": (tables, "lr_table"),
        "without a learned factor": (
            modern or c.value_residual or c.embed_residual,
            "lr_scalar",
        ),
        "where wte is lm_head": (modern or c.untie_head, "lr_embed"),
        "in gpt2026, whose layers are a table in the script": (
            not modern,
            "n_layer value_residual embed_residual untie_head zero_init softcap doc_mask ngram "
            "value_embeds key_offset half_rotary adam_eps",
        ),
        "in gpt2024": (modern, "short_window table_rows token_classes copy_input"),
        "where no matrix is trained by Muon or ANVIL": (
            rule != "adam",
            "lr_muon momentum momentum_warmup momentum_cooldown",
        ),
        "where no matrix is trained by Muon": (rule == "muon", "normuon"),
        "where no matrix is trained by Adam": (rule == "adam", "lr_adam"),
        "where only groups with their own are trained by Adam": (
            not modern or rule == "adam",
            "beta1 beta2",
        ),
    }
    return {
        name: why for why, (acts, names) in acting.items() if not acts for name in names.split()
    }


def config_of(fields):
    """The Config that dataclasses.asdict made {name: value} of."""
    stages = tuple(Stage(**stage) for stage in fields["stages"])
    return Config(**fields | dict(stages=stages))


# ------------------------------------------------------------------------------------- Schedules
def stage_at(step, c):
    """(stage, its updates done) at update `step`, 0-based; at c.steps the end of the last one."""
    for stage in c.stages:
        if step < stage.steps:
            return stage, step
        step -= stage.steps
    return stage, stage.steps


def equal_part(values, stage, done):
    """Of values that share a stage equally, the one at hand."""
    return values[min(len(values) - 1, done * len(values) // stage.steps)]


def scaled(step, c):
    """A step of record 92's 1194 in a run of another length."""
    return round(step * c.steps / 1194)


def lr_at(step, c):
    """Factor on all rates for update `step`: linear warm-up, stages, linear cool-down; jagged with
    ReLoRA."""
    left = min(1.0, max(0, c.scheduled - step) / max(1, c.cooldown * c.scheduled))
    factor = left * stage_at(step, c)[0].lr_factor + (1 - left) * c.lr_floor
    factor *= min(1.0, (step + 1) / max(1, c.warmup))
    since_start = step - c.relora_warm_start
    if c.relora and since_start >= 0:  # from near zero back to the same curve
        since_merge = since_start % c.relora_interval + 1
        factor *= min(1.0, since_merge / max(1, c.relora_interval // 10))
    return factor


def momentum_at(step, c):
    """Muon's and ANVIL's for update `step`: from 0.85 up (record of 6 November 2024), and down
    again (September 2025)."""
    risen = step / max(1, c.momentum_warmup)
    left = (c.steps - step) / max(1, c.momentum_cooldown)
    share = min(1.0, risen, left)
    return (1 - share) * min(0.85, c.momentum) + share * c.momentum


def loss_weights_at(step, c):
    """(weights of the losses of the next tokens, weight of the prefix's loss) at update `step`."""
    stage, done = stage_at(step, c)
    t = done / stage.steps
    weights = [(1 - t) * first + t * last for first, last in zip(*stage.predictions, strict=True)]
    return weights, equal_part(stage.prefix, stage, done)


def candidates_at(step, c):
    """Classes of the sampled softmax at update `step`; 0: all of them."""
    stage, done = stage_at(step, c)
    count = equal_part(stage.candidates, stage, done)
    return count if count < c.padded_vocab else 0


def tied_at(step, c):
    """Is wte a copy of lm_head at update `step`? gpt2026 parts them where Adam, which steps at odd
    updates, first steps in the extension."""
    return step <= c.scheduled | 1 if c.model == "gpt2026" else not c.untie_head


def rare_from(c):
    """The update from which gpt2026's tables are updated every fourth time, not every second."""
    return 4 * round(scaled(336, c) / 4)


def gradient_cycle(step, c):
    """Updates of the run for one of the tables' around `step`; a checkpoint falls between them."""
    if c.model == "gpt2024":
        return 1
    return 4 if step >= rare_from(c) else 2


def stages_of_work(c):
    """The first updates of all shapes and forms that the work takes."""
    first = {}
    for step in range(c.steps):
        stage = stage_at(step, c)[0]
        weights, prefix = loss_weights_at(step, c)
        adapters = bool(c.relora and step >= c.relora_warm_start)
        losses = len(weights), prefix > 0, candidates_at(step, c)
        form = stage.batch_tokens, stage.seq_len, losses, adapters
        first.setdefault(form, step)
    return list(first.values())


# --------------------------------------------------------------------------------------- Runtime
@dataclasses.dataclass
class Runtime:
    """This process among its peers."""

    device: torch.device
    rank: int = 0
    world_size: int = 1
    loader_group: object = None  # on the CPU, for the loader's thread alone

    @property
    def on_gpu(self):
        return self.device.type != "cpu"

    @property
    def memory(self):
        """Bytes of the GPU's memory, 0 where they are not known."""
        if self.device.type != "cuda":
            return 0
        return torch.cuda.get_device_properties(self.device).total_memory

    def synchronize(self):
        if self.on_gpu:
            torch.accelerator.synchronize()

    def gather(self, value):
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


UNUSABLE = (
    "this machine has GPUs, but torch cannot use them: mend the driver or torch, or train on the "
    "CPU with --device cpu --preset laptop"
)


def find_device(wanted, local_rank):
    """The device of a process. Raises UserError where the machine has none of this kind."""
    found = torch.accelerator.current_accelerator(check_available=True)
    kind = wanted if wanted != "auto" else found.type if found else "cpu"
    if kind == "cpu":
        return torch.device("cpu")
    usable = found is not None and found.type == kind
    fail_if(not usable, f"--device {kind}: torch finds none here that it can use")
    count = torch.accelerator.device_count()
    fail_if(local_rank >= count, f"{local_rank + 1} processes, but {count} usable GPUs here")
    device = torch.device(kind, local_rank)
    with explain_errors(UNUSABLE):
        torch.accelerator.set_device_index(local_rank)
        torch.ones(1, device=device).sum().item()
    return device


def check_compiler(on_gpu):
    """Raises UserError where torch.compile could not build what it writes: Triton's parts in C, or
    a CPU's kernels in C++."""
    variable, usual = ("CC", "gcc") if on_gpu else ("CXX", "g++")
    compiler = os.environ.get(variable, usual)
    lacking = [] if shutil.which(compiler) else [f"a compiler ({compiler})"]
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        lacking.append("Python's headers (python3-dev)")
    fail_if(
        lacking,
        f"torch.compile needs {' and '.join(lacking)}: apt install {usual} python3-dev, "
        "or run without it, several times slower: --no_compile",
    )


def init_runtime(c):
    """Device and process group. torchrun sets RANK and its like; without it, a single process."""
    rank, local_rank = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    rows = [stage.batch_tokens // stage.seq_len for stage in c.stages]
    counts = [n for n in range(1, 65) if all(row % n == 0 for row in rows)]
    line = f"{world_size} processes do not divide a batch of {min(rows)} rows: use {counts}"
    fail_if(world_size > 1 and world_size not in counts, line)
    rows = c.val_tokens // c.val_len
    line = f"{world_size} processes do not divide the {rows} rows of --val_tokens"
    fail_if(rows % world_size, line)
    runtime = Runtime(find_device(c.device, local_rank), rank, world_size)
    old = runtime.device.type == "cuda" and torch.cuda.get_device_capability() < (8, 0)
    fail_if(old and c.bf16, "this card has no bfloat16: use --no_bf16")
    old = runtime.device.type == "cuda" and torch.cuda.get_device_capability() < (8, 9)
    fail_if(old and c.fp8_head, "this card has no float8: leave --fp8_head out")
    if world_size > 1:
        address = ":".join(os.environ.get(k, "?") for k in ("MASTER_ADDR", "MASTER_PORT"))
        if "TORCHELASTIC_RUN_ID" not in os.environ:  # started by hand: the others may never come
            print(f"rank {rank} of {world_size} waits for the others at {address}", flush=True)
        limit = datetime.timedelta(seconds=c.rank_timeout)
        dist.init_process_group(timeout=limit)
        runtime.loader_group = dist.new_group(backend="gloo", timeout=limit)
    return runtime


def resolve(c, runtime):
    """Every "chosen for you" value replaced by what was chosen, so that the log says what ran."""
    compiles = runtime.device.type == "cuda" and not c.galore_per_layer
    compiles = compiles if c.compile is None else c.compile
    if compiles:
        check_compiler(runtime.on_gpu)
    fail_if(c.max_autotune and not compiles, "--max_autotune does nothing without --compile")
    if c.max_autotune:
        torch._inductor.config.max_autotune_gemm = True
    start = c.relora_warm_start or max(1, c.steps // 4)
    c = dataclasses.replace(
        c,
        device=runtime.device.type,
        compile=compiles,
        relora_warm_start=start,
        relora_interval=c.relora_interval or max(1, (c.steps - start) // 4),
        lawa_interval=c.lawa_interval or max(1, c.steps // 100),
    )
    return with_table(c, runtime) if c.model == "gpt2026" else c


def with_table(c, runtime):
    """The n-gram table as large as memory allows; in the preset's plan the updates that make up
    for missing rows."""
    # By preflight, as no card has been tried: 17 GiB go to weights, moments, averages, a row's
    # activations and the gradients of a cycle. The table takes at most half of the rest.
    memory = max(0, runtime.memory - 17 * 2**30) * runtime.world_size
    fitting = [rows for rows in TABLE_ROWS if table_bytes(rows, c) <= 0.5 * memory]
    rows = c.table_rows or max(fitting, default=min(TABLE_ROWS))
    stages = list(c.stages)
    if c.stages == PRESETS[c.preset].stages:
        known = sorted(TABLE_ROWS.items())
        sizes, updates = (np.array(column, dtype=float) for column in zip(*known, strict=True))
        more = np.interp(math.log(rows), np.log(sizes), updates)
        longest = max(stages, key=lambda stage: stage.steps)
        steps = longest.steps + round(float(more))
        stages[stages.index(longest)] = dataclasses.replace(longest, steps=steps)
    return dataclasses.replace(c, table_rows=rows, stages=tuple(stages))


def table_bytes(rows, c):
    """Of the n-gram table and its one second moment per row."""
    return rows * (c.n_embd * c.dtype.itemsize + 4)


# ------------------------------------------------------------------------------------------ Data
# A shard, as in llm.c: 256 int32 (magic, version, tokens, zeros), then the tokens as uint16
HEADER_BYTES = 1024


def shard_tokens(path):
    """Tokens in a shard. Raises UserError if it is no file, or not as long as its header says."""
    regular = os.path.isfile(path)  # a pipe would block
    header = np.fromfile(path, "<i4", 3).tolist() if regular else []
    tokens = os.path.getsize(path) // 2 - HEADER_BYTES // 2 if regular else 0
    whole = tokens > 0 and header == [20240520, 1, tokens]
    fail_if(not whole, f"{path}: not a whole token shard; fetch or prepare it again")
    return tokens


class Shards:
    """The token shards that match a glob, in the order of their names. A row is a list of pieces
    (shard, first token, tokens). mark: the token before each document, the vocabulary's last."""

    def __init__(self, pattern, flag, mark):
        self.pattern, self.mark = pattern, mark
        self.paths = sorted(glob.glob(pattern))
        hint = "./run.sh fetches or builds them; data/prepare.py makes your own"
        fail_if(not self.paths, f"--{flag} {pattern}: no such files. {hint}")
        self.tokens = [shard_tokens(path) for path in self.paths]

    def count(self, length):
        """Rows of length + 1 tokens, none from shard to shard; neighbours share a token."""
        return sum((tokens - 1) // length for tokens in self.tokens)

    def row(self, number, length):
        """Row `number` of those, as pieces."""
        for shard, tokens in enumerate(self.tokens):
            here = (tokens - 1) // length
            if number < here:
                return [(shard, number * length, length + 1)]
            number -= here
        raise IndexError(number)

    def read(self, row):
        """A row's tokens, int64. Raises UserError if a shard has been cut short, or is of another
        vocabulary."""
        parts = []
        for shard, first, count in row:
            path = self.paths[shard]
            part = np.fromfile(path, "<u2", count, offset=HEADER_BYTES + 2 * first)
            fail_if(len(part) < count, f"{path}: cut short during the run")
            line = f"{path}: holds tokens beyond --vocab_size {self.mark + 1}"
            fail_if(part.max() > self.mark, line)
            parts.append(part)
        return np.concatenate(parts).astype(np.int64)

    def documents(self, shard):
        """(first token, tokens) of each document of a shard. Raises UserError where there is
        none."""
        tokens = np.fromfile(self.paths[shard], "<u2", offset=HEADER_BYTES)
        starts = np.flatnonzero(tokens == self.mark)
        line = f"{self.paths[shard]}: no token {self.mark} starts a document; see --max_document"
        fail_if(len(starts) == 0, line)
        lengths = np.diff(starts, append=len(tokens))
        return zip(starts.tolist(), lengths.tolist(), strict=True)

    def hashes(self):
        """{file: sha256} by the manifest.json beside it, which data/check.py holds it to."""
        manifest = Path(self.paths[0]).with_name("manifest.json")
        with explain_errors(f"{manifest}: not a manifest; delete it"):
            files = json.loads(manifest.read_text())["files"] if manifest.exists() else {}
            names = map(os.path.basename, self.paths)
            return {name: files[name]["sha256"] if name in files else None for name in names}


class Batches:
    """batch_at(step) depends on shards, plan and step, on nothing else: no state to save."""

    def __init__(self, shards, c):
        self.shards = shards
        plan = [stage for stage in c.stages for _ in range(stage.steps)]
        self.lengths = [(stage.batch_tokens // stage.seq_len, stage.seq_len) for stage in plan]
        packed = plan[0].max_document > 0
        self.rows = self.pack(plan, c) if packed else self.cut(plan, c)

    def cut(self, plan, c):
        """Rows cut anywhere: each step's in turn. Where rows grow, one is as many of the longest's
        parts as it needs."""
        shards, block, seq_lens = self.shards, c.max_seq_len, {stage.seq_len for stage in plan}
        for stage in c.stages:
            odd = block % stage.seq_len or (len(seq_lens) > 1 and stage.batch_tokens % block)
            fail_if(odd, f"--seq_len {stage.seq_len}: each must divide {block}, and that the batch")
        have = shards.count(block)
        blocks = [rows * length // block for rows, length in self.lengths]
        epoch = have // max(blocks) * max(blocks)  # blocks in one
        need = sum(blocks)
        line = f"{shards.pattern} holds {have:,} rows, the run reads {need:,}"
        short = need > epoch * c.epochs_allowed
        fail_if(short, f"{line}: get more tokens, or raise --epochs_allowed")
        stride = 1
        if c.spread_rows:  # near the golden ratio: all rows once, neighbours far apart
            stride = int(0.618 * epoch) or 1
            while math.gcd(stride, epoch) > 1:
                stride += 1
        offsets = np.cumsum([0, *blocks])

        def rows_of(step):
            length, rows = self.lengths[step][1], []
            for number in range(offsets[step], offsets[step + 1]):
                ((shard, first, _),) = shards.row(number * stride % epoch, block)
                parts = range(first, first + block, length)
                rows += [[(shard, part, length + 1)] for part in parts]
            return rows

        return rows_of

    def pack(self, plan, c):
        """Rows of whole documents in their order, each cut to max_document and to what is left of
        its row: what is cut off is never read. At the end of a shard an unfinished step starts anew
        in the next one (records of 12 July, 3 September 2025)."""
        steps, rows, row = [], [], []
        visits = itertools.product(range(c.epochs_allowed), range(len(self.shards.paths)))
        for _, shard in visits:
            rows, row, left = [], [], self.lengths[len(steps)][1] + 1
            for first, length in self.shards.documents(shard):
                stage = plan[len(steps)]
                row.append((shard, first, min(length, stage.max_document, left)))
                left -= row[-1][2]
                if left > 0:
                    continue
                rows.append(row)
                if len(rows) == self.lengths[len(steps)][0]:
                    steps.append(rows)
                    rows = []
                    if len(steps) == len(plan):
                        return steps.__getitem__
                row, left = [], self.lengths[len(steps)][1] + 1
        line = f"{self.shards.pattern} holds documents for {len(steps):,} of {len(plan):,} updates"
        raise UserError(f"{line}: get more tokens, or raise --epochs_allowed")

    def batch_at(self, step, rank=0, world_size=1):
        """A rank's rows of the global batch of `step`, 0-based: [rows, seq_len + 1] int64."""
        rows = self.rows(step)
        share = len(rows) // world_size
        own = rows[rank * share : (rank + 1) * share]
        return np.stack([self.shards.read(row) for row in own])


class Loader:
    """Makes the batches of the coming updates on a thread of its own, a few ahead. For a GPU: on a
    CPU the thread takes from training more than it gives."""

    def __init__(self, make, steps):
        self.ready = queue.Queue(maxsize=3)
        threading.Thread(target=self.work, args=(make, steps), daemon=True).start()

    def work(self, make, steps):
        for step in steps:
            try:
                self.ready.put((make(step), None))
            except Exception as error:
                self.ready.put((None, error))

    def __next__(self):
        """The next update's batch. Raises what went wrong on the thread."""
        batch, error = self.ready.get()
        if error:
            raise error
        return batch


def token_texts(vocab_size):
    """{bytes of a token: its number}; of byte shards each byte, else tiktoken's gpt2. Raises
    UserError where that cannot be had."""
    if vocab_size == 257:
        return {bytes([value]): value for value in range(256)}
    return gpt2_encoding()._mergeable_ranks


def gpt2_encoding():
    line = "tiktoken's gpt2 tables cannot be read: go online once, or set TIKTOKEN_CACHE_DIR"
    with explain_errors(line):
        import tiktoken  # only sampling and gpt2026 need it

        return tiktoken.get_encoding("gpt2")


def prefix_table(c):
    """Of each token the longest other one that begins it, or -1: [padded_vocab] (record 88)."""
    table = np.full(c.padded_vocab, -1)
    texts = token_texts(c.vocab_size)
    for text, token in texts.items():
        begins = (text[:n] for n in range(len(text) - 1, 0, -1))
        table[token] = next((texts[begin] for begin in begins if begin in texts), -1)
    return table


def class_table(c):
    """Of each token the smallest that reads the same but for case, accents, and kinds and runs of
    blanks: [padded_vocab] (#375 of modded-nanogpt)."""
    table, first = np.arange(c.padded_vocab), {}
    for text, token in sorted(token_texts(c.vocab_size).items(), key=lambda item: item[1]):
        with contextlib.suppress(UnicodeDecodeError):  # a part of a character stays itself
            plain = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text.decode()))
            marked = text.isascii()
            plain = "".join(c for c in plain if marked or unicodedata.category(c)[0] != "M")
            plain = re.sub("[ \t\r\n]+", " ", plain.lower())
            blanks = " \t\n\v\f\r\x85\xa0\u2028\u2029\u3000"
            plain = plain if plain == " " else plain.strip(blanks)
            table[token] = first.setdefault(plain, token) if plain else token
    return table


# ----------------------------------------------------------------------------------------- Model
def norm(x):
    return F.rms_norm(x, (x.size(-1),))  # RMSNorm without gain


def at_least_fp32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


def seeded(*where):
    """A CPU generator that depends on its arguments alone: equal on all ranks, in any order."""
    digest = hashlib.sha256(repr(where).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def parameter(values, group, bank="", transposed=False, block=0, neurons=0, rate=None):
    """A trained tensor. group: its row of GROUPS, which says how; "matrix": a hidden matrix.

    Of a hidden matrix [out, in], or [in, out] if transposed: bank, its kind; block, the rows that
    are orthogonalised together (0: all); neurons, the axis over which NorMuon takes its means (0:
    the longer one); rate, a factor on Muon's or ANVIL's (None: by shape)."""
    p = nn.Parameter(torch.as_tensor(values))
    p.group, p.bank, p.transposed = group, bank or group, transposed
    p.block, p.neurons, p.rate, p.lr_mult = block, neurons, rate, 1.0
    return p


def uniform_(weight, bound, generator):
    weight.copy_(torch.rand(weight.shape, generator=generator) * 2 * bound - bound)


class Linear(nn.Module):
    """y = x Wᵀ; fp32 weight [out, in], cast at use. Starts at U(±bound); torch.nn.Linear's bound
    is 1/√in. transposed: kept as [in, out], so that MLP.down shares a stack with MLP.up."""

    def __init__(self, n_in, n_out, bound=None, group="matrix", transposed=False, **facts):
        super().__init__()
        self.n_in, self.n_out, self.transposed = n_in, n_out, transposed
        self.bound = n_in**-0.5 if bound is None else bound
        shape = (n_in, n_out) if transposed else (n_out, n_in)
        self.weight = parameter(torch.zeros(shape), group, transposed=transposed, **facts)

    def init(self, generator):
        uniform_(self.weight, self.bound, generator)

    def forward(self, x):
        weight = self.weight.to(x.dtype)
        return x @ weight if self.transposed else F.linear(x, weight)


def project(x, linears, factor=None):
    """The outputs of Linears for one x, times a learned factor: one matmul, whose weights carry
    the factor; but one by one where a method has put other modules."""
    if any(type(linear) is not Linear for linear in linears):
        x = x if factor is None else factor * x
        return [linear(x) for linear in linears]
    weight = torch.cat([linear.weight for linear in linears])
    weight = weight if factor is None else factor * weight
    sizes = [linear.n_out for linear in linears]
    return F.linear(x, weight.to(x.dtype)).split(sizes, dim=-1)


class Embedding(nn.Module):
    """A table [rows, width]; std: of its first values."""

    def __init__(self, rows, width, std, dtype, group):
        super().__init__()
        self.std = std
        self.weight = parameter(torch.zeros(rows, width, dtype=dtype), group)

    def init(self, generator):
        if self.std:
            self.weight.copy_(torch.randn(self.weight.shape, generator=generator) * self.std)

    def forward(self, rows):
        return F.embedding(rows, self.weight)


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


def yarn(frequencies, scale, windows):
    """YaRN, arXiv 2309.00071: as the window grows, what turns too rarely within it is slowed down,
    and the scores grow (September 2025)."""
    for old, new in itertools.pairwise(windows):
        kept = ((old * frequencies / (2 * math.pi) - 1) / 31).clamp(0, 1)  # share, by turns
        frequencies = frequencies * (old / new * (1 - kept) + kept)
        scale *= 1 + 0.2 * math.log(new / old)
    return frequencies, scale


@dataclasses.dataclass
class View:
    """What a kind of layer needs for attention, at a stage of the run."""

    rotary: Tensor  # [2, T, H or 1, frequencies]
    scale: Tensor  # of the scores
    window: Tensor | None  # tokens


def attention_mask(docs, window, flex):
    """The one attention rule: causal; back by `window` tokens, if any; within a document, for
    document numbers [B, T], if any. Returns what the backend wants: a BlockMask, or bool
    [B, 1, T, T]."""

    def allowed(b, h, q, k):
        seen = q >= k
        if window is not None:
            seen = seen & (q - k <= window)
        return seen & (docs[b, q] == docs[b, k])

    b = torch.arange(len(docs), device=docs.device).view(-1, 1, 1, 1)
    t = torch.arange(docs.size(1), device=docs.device)
    return block_mask(allowed, b, t) if flex else allowed(b, 0, t[:, None], t)


def block_mask(allowed, b, t, size=128):
    """What FlexAttention's create_block_mask finds by looking at all T² pairs. As documents are
    runs of tokens, the nearest pair of a block of queries and one of keys before it says whether
    any pair is allowed, the farthest whether all are."""
    first, last = t[::size], t[size - 1 :: size]
    last = torch.cat((last, t[len(last) * size :][-1:]))  # of a block that the row cuts short
    some = allowed(b, 0, first[:, None], last).expand(len(b), 1, -1, -1)
    whole = (last - first == size - 1)[:, None]
    every = some & allowed(b, 0, last[:, None], first) & whole
    diagonal = torch.eye(len(first), dtype=torch.bool, device=t.device)
    partial, lists = (some & ~every) | diagonal, []
    for blocks in (partial, every, partial.mT, every.mT):  # for queries, then for keys
        lists += block_lists(blocks)
    return BlockMask((len(t), len(t)), *lists, BLOCK_SIZE=(size, size), mask_mod=allowed)


def block_lists(blocks):
    """Of bool [B, 1, n, n]: how many blocks are true in each row, and a row's true ones before its
    others. As by a stable sort, but for a sort the compiler makes kernels that take minutes."""
    column = torch.arange(blocks.size(-1), device=blocks.device).expand_as(blocks)
    met = blocks.cumsum(-1)
    count = met[..., -1:]
    place = torch.where(blocks, met - 1, count + column - met)
    return count.squeeze(-1).int(), torch.zeros_like(place).scatter(-1, place, column).int()


def masked_attention(q, k, v, mask):
    """Over [B, T, H, head_dim], queries scaled; mask: attention_mask's, or None: plain causal."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if isinstance(mask, BlockMask):
        y = flex_attention(q, k, v, block_mask=mask, scale=1.0)
    else:
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=1.0)
    return y.transpose(1, 2)


def interleave(x):
    """[B, T, H, head_dim] to [B, 2 T, H / 2, head_dim]: head h and head h + H / 2 take turns."""
    return x.unflatten(2, (2, -1)).flatten(1, 2)


class Attention(nn.Module):
    """q, k, v, o of a layer, and what happens between them. qk_dim, v_dim: of a head; qk, vo: what
    the optimizers know of the matrices; key_offset: the second half of a key is the token's before;
    paired: two heads share a sequence."""

    def __init__(self, c, dims, bounds, qk=None, vo=None, key_offset=False, paired=False):
        super().__init__()
        self.n_head, self.key_offset, self.paired = c.n_head, key_offset, paired
        qk_out, v_out = (c.n_head * dim for dim in dims)
        self.q = Linear(c.n_embd, qk_out, bounds[0], bank="qk", **qk or {})
        self.k = Linear(c.n_embd, qk_out, bounds[0], bank="qk", **qk or {})
        self.v = Linear(c.n_embd, v_out, bounds[0], bank="vo", **vo or {})
        self.o = Linear(v_out, c.n_embd, bounds[1], bank="vo", **vo or {})

    def heads(self, x, factor=None):
        """q, k, v of x [B, T, D]: [B, T, H, head_dim]."""
        parts = project(x, (self.q, self.k, self.v), factor)
        return [part.unflatten(-1, (self.n_head, -1)) for part in parts]

    def attend(self, q, k, v, view, mask):
        """Normed (arXiv 2302.05442), turned, scaled, masked attention: [B, T, H, v_dim]."""
        q = rotate(norm(q), view.rotary) * view.scale.to(q.dtype)
        k = rotate(norm(k), view.rotary)
        if self.key_offset:  # December 2025; the first token keeps its own
            turning, still = k.chunk(2, dim=-1)
            before = torch.cat((still[:, :1], still[:, :-1]), dim=1)
            k = torch.cat((turning, before), dim=-1)
        if self.paired:  # January 2026
            q, k, v = interleave(q), interleave(k), interleave(v)
        y = masked_attention(q, k, v, mask)
        return y.unflatten(1, (-1, 2)).flatten(2, 3) if self.paired else y


class MLP(nn.Module):
    """ReLU² (arXiv 2109.08668). bounds, rates: of up and down."""

    def __init__(self, c, hidden, bounds, rates=(None, None)):
        super().__init__()
        facts = dict(bank="mlp", rate=rates[0]), dict(bank="mlp", rate=rates[1])
        self.up = Linear(c.n_embd, hidden, bounds[0], **facts[0])
        self.down = Linear(hidden, c.n_embd, bounds[1], transposed=True, **facts[1])

    def forward(self, x):
        return self.down(F.relu(self.up(x)).square())


@torch.library.custom_op("speedrun::matmul_float8", mutates_args=())
def matmul_float8(a: Tensor, b: Tensor, a_max: Tensor, b_max: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in float8 (record of 13 January 2025). a_max, b_max: what no entry passes; dtype: of
    a. An operator of its own, as the compiler would write transposed casts byte by byte."""
    scales = a_max / torch.finfo(dtype).max, b_max / torch.finfo(torch.float8_e4m3fn).max
    a8 = (a / scales[0]).to(dtype).contiguous()
    b8 = (b / scales[1]).to(torch.float8_e4m3fn).T.contiguous().T  # columns, as the card wants
    return torch._scaled_mm(a8, b8, *scales, out_dtype=a.dtype)


@matmul_float8.register_fake
def _(a, b, a_max, b_max, dtype):
    return a.new_empty(a.size(0), b.size(1))


def head_matmul(a, b, a_max, b_max, dtype=torch.float8_e4m3fn):
    """a @ b, in float8 where limits are given."""
    return a @ b if a_max is None else matmul_float8(a, b, a_max, b_max, dtype)


AT_ONCE = 8192  # tokens whose logits are in memory together: 0.8 GB of them in bfloat16


class HeadLoss(torch.autograd.Function):
    """Sum of the weighted cross-entropies of the capped logits of x Wᵀ. The gradients are made
    along with the loss, a part of the tokens at a time: logits are read once and never kept."""

    @staticmethod
    def forward(ctx, x, weight, goals, shares, cap, fp8, at_once=AT_ONCE):
        """x [N, D], weight [V, D], goals [N, losses] (below 0: none), shares [losses]; cap: logits
        to (capped logits, their slope, at most 1, whether they are bounded); at_once: tokens."""
        w, column = weight.to(x.dtype), torch.arange(len(weight), device=x.device)
        total, dx, dw = 0.0, [], 0.0
        x_max = w_max = g_max = None
        if fp8:
            largest = x.abs().amax(), w.abs().amax().clamp(min=1e-12), shares.sum()
            x_max, w_max, g_max = (number.float() for number in largest)
        for part, goal in zip(x.split(at_once), goals.split(at_once), strict=True):
            logits, slope, bounded = cap(at_least_fp32(head_matmul(part, w.T, x_max, w_max)))
            # the exponentials of bounded logits need no maximum taken off first
            lse = logits.exp().sum(1, True).log() if bounded else logits.logsumexp(1, True)
            hits = logits.gather(1, goal.clamp(min=0))
            share = shares * (goal >= 0)
            total = total + (share * (lse - hits)).sum()
            g = share.sum(1, True) * (logits - lse).exp()
            for label, s in zip(goal.unbind(1), share.unbind(1), strict=True):
                g = g - s[:, None] * (column == label[:, None])
            g = (g * slope).to(x.dtype)
            dx.append(head_matmul(g, w, g_max, w_max, torch.float8_e5m2))
            dw_part = head_matmul(g.T, part, g_max, x_max, torch.float8_e5m2)
            dw = dw + dw_part.to(weight.dtype)
        ctx.save_for_backward(torch.cat(dx), dw)
        return total

    @staticmethod
    def backward(ctx, grad):
        dx, dw = ctx.saved_tensors
        return (grad * dx).to(dx.dtype), grad * dw, None, None, None, None, None


class CandidateSets:
    """Classes of the sampled softmax: all targets of a row and others, from a sweep over the
    vocabulary that goes on where the row of that number stopped. The loss is not corrected for
    what is left out (S:CandidateBuilder of record 92)."""

    def __init__(self, vocab):
        self.vocab, self.places = vocab, {}  # {row: where its sweep stands}

    def draw(self, targets, count, row, rows):
        """`count` classes, ascending; None if the targets alone are more."""
        wanted = np.zeros(self.vocab, bool)
        wanted[targets] = True
        need = count - int(wanted.sum())
        if need < 0:
            return None
        place = self.places.get(row, self.vocab * row // rows)
        if need:
            drawn = min(self.vocab, int(need * 1.7) + 256)
            sweep = 20011 * (place + np.arange(drawn)) % self.vocab
            sweep = sweep[~wanted[sweep]]
            if len(sweep) < need:
                free = np.flatnonzero(~wanted)
                sweep = free[:: max(1, len(free) // need)]
            wanted[sweep[:need]] = True
            place = (place + drawn) % self.vocab
        self.places[row] = place
        return np.flatnonzero(wanted)


class GPT(nn.Module):
    """What both models share: the two ends. Tokens [B, T] to logits [B, T, padded_vocab] in fp32;
    with targets [B, T], to the mean cross-entropy in nats. A subclass says what stands between
    (hidden). A module's init() is given a generator that its name seeds."""

    sums_loss = False  # gradients are of the sum over tokens / 8, not of the mean
    rows_at_once = None  # a limit of the rows in a micro-batch
    end_groups = "wte", "lm_head"
    can_recompute = False  # its layers in the backward pass, to save memory

    def __init__(self, c):
        super().__init__()
        self.config, self.stage = c, None
        self.table = None  # gpt2026's NGramTable
        self.candidates = CandidateSets(c.padded_vocab)
        self.output_scale = self.score_scale = 1.0  # muP's
        self.recompute = False  # of the instance, also in warm-up: the compiler guards where it is
        tied, (wte, head) = tied_at(0, c), self.end_groups
        # a tied wte makes the logits, too: small and exact
        exact = torch.get_default_dtype() if tied else c.dtype
        self.wte = Embedding(c.padded_vocab, c.n_embd, 0.005 if tied else 1.0, exact, wte)
        bound = 0.0 if c.zero_init else None
        self.lm_head = Linear(c.n_embd, c.padded_vocab, bound, group=head)

    @torch.no_grad()
    def init_weights(self):
        c = self.config
        for name, module in self.named_modules():
            if hasattr(module, "init"):
                module.init(seeded(c.seed, f"{name}.weight"))
        if tied_at(0, c):
            self.lm_head.weight.copy_(self.wte.weight)
        self.set_stage(0)

    def set_stage(self, step):
        """Take the form that update `step`, 0-based, trains; c.steps: of the last validation. What
        changes is tensors, so that nothing compiles again."""
        device = self.wte.weight.device
        weights, prefix = loss_weights_at(step, self.config)
        shares = [*weights, prefix] if prefix else weights
        self.shares = self.to_device(torch.tensor(shares))
        views = self.views_at(step)
        if (views, device) != self.stage:
            self.stage = views, device
            self.views = {name: self.make_view(*spec) for name, spec in views.items()}

    def set_score_scale(self, scale):
        self.score_scale, self.stage = scale, None
        self.set_stage(0)

    def views_at(self, step):
        """{kind of layer: what make_view makes its View of} at update `step`."""
        raise NotImplementedError

    def prepare(self, tokens, group=None, training=False):
        """{name: array} of what hidden needs for tokens [B, T]: made on the CPU, ahead of the
        device. group: of the ranks that do so at the same time."""
        return {"tokens": tokens}

    def prepare_targets(self, targets, step, row, rows):
        """{name: array} of what loss needs for the targets of update `step`: rows `row` and on, out
        of `rows`."""
        return {"targets": targets}

    def load(self, arrays):
        """What prepare made, as arguments of forward."""
        return {name: self.to_device(array) for name, array in arrays.items()}

    def to_device(self, array):
        device, tensor = self.wte.weight.device, torch.as_tensor(array)
        if device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(device, non_blocking=True)

    def hidden(self, tokens, **inputs):
        """Normed [B, T, D], of which lm_head makes logits."""
        raise NotImplementedError

    def forward(self, tokens, targets=None, classes=None, **inputs):
        """targets: [B, T], or [B, T, losses] with the weights of the stage; classes: rows of
        lm_head over which the softmax goes and which targets number, if not all."""
        x = self.hidden(tokens, **inputs) * self.output_scale
        return self.logits(x) if targets is None else self.loss(x, targets, classes)

    def logits(self, x):
        return self.cap(at_least_fp32(self.lm_head(x)))[0]

    def cap(self, logits):
        """(Capped logits, their slope, whether they are bounded)."""
        raise NotImplementedError

    def loss(self, x, targets, classes=None):
        """Mean over tokens; in training, the stage's losses are added by their weights."""
        count = targets.size(0) * targets.size(1)
        if not self.training:
            total = 0.0
            for part, goal in zip(x.split(AT_ONCE, 1), targets.split(AT_ONCE, 1), strict=True):
                logits = self.logits(part).flatten(0, 1)
                total = total + F.cross_entropy(logits, goal.flatten(), reduction="sum")
            return total / count
        weight = self.lm_head.weight if classes is None else self.lm_head.weight[classes]
        goals = targets.reshape(count, -1)
        shares = self.shares.to(torch.promote_types(x.dtype, torch.float32))
        how = self.cap, self.config.fp8_head, AT_ONCE // (1 + self.recompute)
        return HeadLoss.apply(x.flatten(0, 1), weight, goals, shares, *how) / count

    def numel(self):
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self):
        """Of forward and backward, over the whole plan: 6 per weight of a matmul, and attention
        over its span, without what documents leave out."""
        c = self.config
        linears = [m for m in self.modules() if isinstance(m, Linear) and m is not self.lm_head]
        weights = sum(p.numel() for linear in linears for p in linear.parameters())
        flops = tokens = 0
        for step in range(c.steps):
            stage = stage_at(step, c)[0]
            classes = candidates_at(step, c) or c.padded_vocab
            each = 6 * (weights + c.n_embd * classes)
            for attention, window in self.windows(stage):
                span = min(window or stage.seq_len, stage.seq_len / 2)
                each += 6 * span * (attention.q.n_out + attention.v.n_out)
            flops += each * stage.batch_tokens
            tokens += stage.batch_tokens
        return flops / tokens

    def windows(self, stage):
        """(Attention, its window) of every layer that has one."""
        raise NotImplementedError


class NGrams(nn.ModuleList):
    """Embeddings of the last 2, 3, ... n tokens, side by side, found by hash. All before the row or
    the document counts as its mark."""

    def __init__(self, c):
        width, tables = c.n_embd // (c.ngram - 1), range(c.ngram - 1)
        super().__init__(Embedding(c.ngram_rows, width, 0.0, c.dtype, "ngrams") for _ in tables)
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


class Attention2024(Attention):
    """table: the number of the value table that is added, gated, or None."""

    def __init__(self, c, table):
        dim, o_bound = c.n_embd // c.n_head, 0.0 if c.zero_init else None
        super().__init__(c, (dim, dim), (None, o_bound), key_offset=c.key_offset)
        self.table = table
        self.value_lambda = parameter(0.5, "scalars") if c.value_residual else None
        self.value_gate = None if table is None else Linear(12, c.n_head, 0.0, "gates")

    def forward(self, x, shared):
        q, k, v = self.heads(x)
        shared.setdefault("v1", v)  # arXiv 2410.17897; λ learned (Grad62304977)
        if self.value_lambda is not None:
            v = torch.lerp(v, shared["v1"], self.value_lambda.to(v.dtype))
        if self.table is not None:  # December 2024, gated in December 2025
            values = shared["values"][self.table].unflatten(-1, (self.n_head, -1))
            share = 2 * torch.sigmoid(self.value_gate(x[..., :12]))
            v = v + share.unsqueeze(-1) * values
        return self.o(self.attend(q, k, v, shared["view"], shared["mask"]).flatten(-2))


class Block2024(nn.Module):
    def __init__(self, c, table):
        super().__init__()
        self.attn = Attention2024(c, table)
        self.mlp = MLP(c, 4 * c.n_embd, (None, 0.0 if c.zero_init else None))
        self.x_lambda = parameter(1.0, "scalars") if c.embed_residual else None
        self.x0_lambda = parameter(0.0, "scalars") if c.embed_residual else None

    def forward(self, x, shared):
        if self.x_lambda is not None:  # record of 6 November 2024 (Grad62304977)
            x = self.x_lambda * x + self.x0_lambda * shared["x0"]
        x = x + self.attn(norm(x), shared)
        return x + self.mlp(norm(x))


class GPT2024(GPT):
    """The model of the record of 8 November 2024, of any depth, with switches; and what the laptop
    track added."""

    def __init__(self, c):
        super().__init__(c)
        n = c.n_layer
        tables = {0: 0, 1: 1} | {n - k: -k for k in (1, 2, 3)} if c.value_embeds else {}
        self.ngrams = NGrams(c) if c.ngram else None
        self.value_embeds = nn.ModuleList(
            Embedding(c.padded_vocab, c.n_embd, 0.0, c.dtype, "value_embeds")
            for _ in range(min(3, n) if c.value_embeds else 0)
        )
        self.blocks = nn.ModuleList(Block2024(c, tables.get(i)) for i in range(n))
        self.init_weights()

    def views_at(self, step):
        return {"all": (stage_at(step, self.config)[0].window,)}

    def make_view(self, window):
        c, device = self.config, self.wte.weight.device
        head_dim = c.n_embd // c.n_head
        frequencies = 10000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
        if c.half_rotary:
            frequencies = 1024.0 ** -torch.linspace(0, 1, head_dim // 4)
        places = torch.arange(max(c.max_seq_len, c.val_len), device=device).unsqueeze(1)
        scale = torch.tensor(self.score_scale * head_dim**-0.5, device=device)
        window = torch.tensor(window, device=device) if window else None
        return View(rotary_tables(frequencies, places), scale, window)

    def hidden(self, tokens):
        c, view = self.config, self.views["all"]
        x = self.wte(tokens).to(c.dtype)
        if self.ngrams is not None:
            x = x + self.ngrams(tokens)
        x = norm(x)
        values = [table(tokens) for table in self.value_embeds]
        mask = None
        if c.doc_mask or view.window is not None:
            docs = (tokens == c.vocab_size - 1).cumsum(1)
            docs = docs if c.doc_mask else torch.zeros_like(docs)
            mask = attention_mask(docs, view.window, tokens.is_cuda and c.compile)
        shared = dict(x0=x, values=values, view=view, mask=mask)  # by all blocks
        for block in self.blocks:
            x = block(x, shared)
        return norm(x)

    def cap(self, logits):
        softcap = self.config.softcap  # Gemma 2, arXiv 2408.00118
        if not softcap:
            return logits, 1.0, False
        share = torch.tanh(logits / softcap)
        return softcap * share, 1 - share * share, True

    def windows(self, stage):
        return [(block.attn, stage.window) for block in self.blocks]


# The model of record 92. What each piece is worth: records/PUBLIC.md
@dataclasses.dataclass(frozen=True)
class Layer:
    """The roles of one layer."""

    attention: bool = True
    wide: bool = False  # q and k of full width, long window, key offset, a gate on every head
    thin: bool = False  # v and o of half a head's width
    paired: bool = False  # two heads share a sequence
    table: int | None = None  # of values
    xsa: bool = False  # heads lose a share of what lies along their own value
    x0: bool = True  # the normed embedding is injected
    grams: bool = False  # n-grams are injected
    mlps: int = 1  # side by side


LAYERS = (
    Layer(paired=True),  # its n-grams come before it
    Layer(thin=True, table=0, xsa=True, grams=True),
    Layer(paired=True, table=1),
    Layer(wide=True, xsa=True, x0=False),  # its output is used four times below
    Layer(attention=False, grams=True),
    Layer(paired=True, grams=True),
    Layer(attention=False, x0=False),  # layer 3's output is added before it
    Layer(attention=False, mlps=0),  # its output is read by the attention of 8 and 10
    Layer(thin=True, table=2, x0=False, mlps=2),
    Layer(attention=False, x0=False, grams=True),
    Layer(wide=True, table=3, x0=False),  # and mixes of earlier states
)


class Mix(nn.Module):
    """Numbers for every token: b + W2 gelu(W1 x), in parts with names. starts: {name: (how many,
    first value)}. MUDD, arXiv 2502.12170."""

    def __init__(self, c, starts, group):
        super().__init__()
        self.starts = starts
        self.w1 = Linear(c.n_embd, 64, group=group)
        biases = [value for count, value in starts.values() for _ in range(count)]
        self.w2 = Linear(64, len(biases), 0.0, group)
        self.bias = parameter(torch.tensor(biases), f"{group}_bias")

    def forward(self, x):
        """({name: [B, T, how many]}, what W2 sees)."""
        seen = F.gelu(self.w1(x))
        numbers = self.w2(seen) + self.bias.to(x.dtype)
        sizes = [count for count, _ in self.starts.values()]
        return dict(zip(self.starts, numbers.split(sizes, -1), strict=True)), seen


class Attention2026(Attention):
    def __init__(self, c, layer):
        dim = c.n_embd // c.n_head
        qk_dim = dim if layer.wide else dim // 2
        v_dim = dim // 2 if layer.thin else dim
        bound = 3**0.5 / 2 * c.n_embd**-0.5
        super().__init__(
            c,
            (qk_dim, v_dim),
            (bound, bound),
            qk=dict(block=2 * qk_dim, neurons=-2, rate=1.0),  # two heads at a time
            vo=dict(neurons=-1, rate=1.0),
            key_offset=layer.wide,
            paired=layer.paired,
        )
        self.factors = parameter([0.5, 1.0], "scalars_2026")  # before and after, December 2025

    def forward(self, x, values, view, mask, xsa=None, gate=None):
        """values [B, T, D]: added to v, as much of each head as it has; xsa, gate: [B, T, H]."""
        q, k, v = self.heads(x, self.factors[0])
        if values is not None:
            v = v + values.unflatten(-1, (self.n_head, -1))[..., : v.size(-1)]
        y = self.attend(q, k, v, view, mask)
        if xsa is not None:
            size = v.square().sum(-1, keepdim=True).clamp_min(1e-8)
            along = (y * v).sum(-1, keepdim=True) / size
            y = y - torch.tanh(xsa).unsqueeze(-1) * along * v
        if gate is not None:
            y = y * gate.unsqueeze(-1)
        return self.factors[1] * self.o(y.flatten(-2))


class Block2026(nn.Module):
    """The weights of one layer; GPT2026 says how they act together."""

    def __init__(self, c, layer):
        super().__init__()
        hidden = c.n_embd * 11 // 3
        bound, rate = 3**0.5 / 2 * c.n_embd**-0.5, (hidden / c.n_embd) ** 0.5
        self.attn = Attention2026(c, layer) if layer.attention else None
        self.mlps = nn.ModuleList(
            MLP(c, hidden, (bound, 0.0), (rate, 2 * rate)) for _ in range(layer.mlps)
        )
        gated = layer.table is not None and not layer.wide
        self.value_gate = Linear(12, c.n_head, 0.0, "value_gate") if gated else None
        self.residual = parameter([1.1**0.5, 1.1**0.5], "residual")  # on the stream
        self.post = parameter([1.0, 1.0], "post")  # on attention, on MLPs

    def mlp(self, x):
        return sum(mlp(x) for mlp in self.mlps)


# ngram_hashes' factors: of this token and those before it, for rows and for signs
BIGRAM, TRIGRAM = (36313, 27191), (17351, 60961, 45259)
BIGRAM_SIGN, TRIGRAM_SIGN = (48271, 30011), (58699, 39779, 26801)
SIGN_ROWS = 8192


def hash_tokens(factors, x):
    """Of tokens [B, T] and those before them; products wrap in int32."""
    total = np.zeros(x.shape, np.int32)
    for back, factor in enumerate(factors):
        before = np.zeros_like(x)
        before[:, back:] = x[:, : x.shape[1] - back]
        total ^= (factor * before).astype(np.int32)
    return total


def ngram_hashes(x, rows):
    """(rows of the table, rows of signs) of the bigram and the trigram that end at each token:
    [2, B, T] each. Half of the table is for bigrams; the last row of a half is for what begins
    before the row (record 92)."""
    half = rows // 2
    two = hash_tokens(BIGRAM, x)
    reserved = np.int64(BIGRAM[1] * (half - 1))
    two[:, 1:2] = (BIGRAM[0] * x[:, 1:2] ^ reserved).astype(np.int32)  # there, too, not x[0]
    bigrams = two % np.int32(half - 1)
    bigrams[:, :1] = half - 1
    trigrams = half + hash_tokens(TRIGRAM, x) % np.int32(rows - half - 1)
    trigrams[:, :2] = rows - 1
    signs = [hash_tokens(f, x) % SIGN_ROWS for f in (BIGRAM_SIGN, TRIGRAM_SIGN)]
    for back, sign in enumerate(signs, 1):
        sign[:, :back] = 0
    return np.stack((bigrams, trigrams)).astype(np.int64), np.stack(signs).astype(np.int64)


@dataclasses.dataclass
class Lookup:
    """How ranks get the rows of a batch. places: [2, B, T], where each n-gram's row stands among
    the distinct ones; signs: [2, B, T]; asked: rows of this rank that anyone wants, counted from
    its first; sends, receives: how many rows go to each rank, and come from it; merge: plan_merge
    of the cycle that ends with it."""

    places: np.ndarray
    signs: np.ndarray
    asked: np.ndarray
    sends: list
    receives: list
    merge: list | None = None


class NGramTable(nn.Module):
    """Rows of hashed bigrams and trigrams [table_rows, D], zero at first. A row is multiplied by
    random signs of the n-gram, which tell apart what shares it.

    No Parameter: each rank holds one range of rows, and no gradient has the table's size. A batch's
    rows are planned on the CPU, ahead of the device, and looked up before the forward pass; the
    backward pass leaves their gradients here, until merged() sums those of a cycle for RowAdam."""

    def __init__(self, c):
        super().__init__()
        self.config, self.rank, self.world_size = c, 0, 1
        self.classes = class_table(c) if c.token_classes else None
        signs = torch.empty(SIGN_ROWS, c.n_embd, dtype=c.dtype)
        self.register_buffer("signs", signs, persistent=False)
        self.gradients, self.merge = [], None  # [asked, D] each, of the present cycle

    def init(self, generator):
        self.signs.copy_(2 * torch.randint(2, self.signs.shape, generator=generator) - 1)

    def allocate(self, runtime):
        """This rank's rows, and of each the mean square of its gradients."""
        c, self.rank, self.world_size = self.config, runtime.rank, runtime.world_size
        self.share = -(-c.table_rows // self.world_size)
        self.rows = torch.zeros(self.share, c.n_embd, dtype=c.dtype, device=runtime.device)
        self.squares = torch.zeros(self.share, device=runtime.device)

    def plan(self, tokens, group=None):
        """The Lookup of tokens [B, T]. With several ranks a collective on the CPU in this group."""
        tokens = tokens if self.classes is None else self.classes[tokens]
        rows, signs = ngram_hashes(tokens, self.config.table_rows)
        wanted, places = np.unique(rows, return_inverse=True)
        places = places.reshape(rows.shape)
        if self.world_size == 1:
            return Lookup(places, signs, wanted, [len(wanted)], [len(wanted)])
        ends = np.searchsorted(wanted, self.share * np.arange(1, self.world_size + 1))
        receives = np.diff(ends, prepend=0)
        sends = torch.empty(self.world_size, dtype=torch.int64)
        dist.all_to_all_single(sends, torch.from_numpy(receives), group=group)
        sends, receives = sends.tolist(), receives.tolist()
        asked = torch.empty(sum(sends), dtype=torch.int64)
        numbers = torch.from_numpy(wanted)
        dist.all_to_all_single(asked, numbers, sends, receives, group=group)
        asked = asked.numpy() - self.share * self.rank
        return Lookup(places, signs, asked, sends, receives)

    @staticmethod
    def plan_merge(asked, at_once=2**17):
        """How the gradients of a cycle are summed by row: for each part of the distinct rows,
        (rows, [(their places among each gradient's rows, where these go in the part)]). asked: of
        each gradient, its rows."""
        orders = [np.argsort(rows, kind="stable") for rows in asked]
        ranked = [rows[order] for rows, order in zip(asked, orders, strict=True)]
        distinct = np.unique(np.concatenate(asked))
        parts = []
        for rows in np.split(distinct, range(at_once, len(distinct), at_once)):
            places = []
            for order, found in zip(orders, ranked, strict=True):
                low = np.searchsorted(found, rows[0])
                high = np.searchsorted(found, rows[-1], side="right")
                places.append((order[low:high], np.searchsorted(rows, found[low:high])))
            parts.append((rows, places))
        return parts

    def look_up(self, lookup, to_device):
        """The sum of a token's bigram and trigram, [B, T, D]."""
        places, signs = to_device(lookup.places), to_device(lookup.signs)
        with torch.no_grad():
            rows = self.exchange(self.rows[to_device(lookup.asked)], lookup, back=False)
            found = sum(rows[p] * self.signs[s] for p, s in zip(places, signs, strict=True))
        if self.training and torch.is_grad_enabled():
            collect = functools.partial(self.collect, lookup, places, signs)
            found.requires_grad_().register_post_accumulate_grad_hook(collect)
        return found

    @torch.no_grad()
    def collect(self, lookup, places, signs, found):
        """Send the gradient of what was found, summed by row, to the rows' ranks."""
        g, dtype = found.grad, torch.promote_types(found.dtype, torch.float32)
        total = g.new_zeros(sum(lookup.receives), g.size(-1), dtype=dtype)
        for place, sign in zip(places, signs, strict=True):
            values = (g * self.signs[sign]).flatten(0, 1)
            total.index_add_(0, place.flatten(), values.to(dtype))
        self.gradients.append(self.exchange(total.to(g.dtype), lookup, back=True))
        self.merge = lookup.merge

    def exchange(self, rows, lookup, back):
        """Rows from their ranks to those that want them; back: the other way."""
        if self.world_size == 1:
            return rows
        ways = lookup.receives, lookup.sends
        to, come = ways if back else reversed(ways)
        out = rows.new_empty(sum(come), rows.size(1))
        dist.all_to_all_single(out, rows, come, to)
        return out

    def merged(self, to_device):
        """Yields (rows, their gradients summed over the cycle), some distinct rows at a time."""
        for rows, places in self.merge or ():
            dtype = torch.promote_types(self.rows.dtype, torch.float32)
            g = self.rows.new_zeros(len(rows), self.rows.size(1), dtype=dtype)
            for values, (entries, targets) in zip(self.gradients, places, strict=True):
                values = values[to_device(entries)].to(dtype)
                g.index_add_(0, to_device(targets), values)
            yield to_device(rows), g
        self.forget()

    def forget(self):
        """Drop the gradients of the present cycle."""
        self.gradients, self.merge = [], None

    def cycle_bytes(self, tokens, step):
        """An estimate: of the gradients that wait until their cycle ends, where four fifths of the
        n-grams in a row are distinct. In long rows of English it is three quarters."""
        c, rows = self.config, 0.8 * 2 * tokens * gradient_cycle(step, self.config)
        return int(rows) * c.n_embd * c.dtype.itemsize

    def state(self):
        """Of this rank's rows those that ever moved."""
        squares = self.squares.cpu()
        (rows,) = squares.nonzero(as_tuple=True)
        values = self.rows[rows.to(self.rows.device)].cpu()
        return {
            "rows": rows + self.share * self.rank,
            "values": values,
            "squares": squares[rows],
        }

    def load_state(self, state):
        """Those of a rank's state() that are this rank's, whatever the number of ranks was."""
        rows = state["rows"] - self.share * self.rank
        own = (rows >= 0) & (rows < self.share)
        device = self.squares.device
        rows = rows[own].to(device)
        self.rows[rows] = state["values"][own].to(device)
        self.squares[rows] = state["squares"][own].to(device)


COPY_LENGTHS = 1, 2, 3, 4, 6, 8, 12, 16, 24, 32


def copy_candidates(x, classes, mark):
    """For tokens [B, T]: what followed the last time that the longest matching context stood
    earlier in the document, and its bucket, 3 * (number of the length) + 1, 2 or 3 and more times;
    0 and bucket 0 if there is none (#378 of modded-nanogpt)."""
    B, T = x.shape
    factor = 0x9E3779B97F4A7C15
    inverse = pow(factor, -1, 2**64)
    ones = np.ones(1, np.uint64)
    up = np.cumprod(np.r_[ones, np.full(T - 1, factor, np.uint64)])
    down = np.cumprod(np.r_[ones, np.full(T - 1, inverse, np.uint64)])
    place = np.arange(T)
    candidates, buckets = np.zeros_like(x), np.zeros_like(x)
    for row in range(B):
        is_mark = x[row] == mark
        begin = np.maximum.accumulate(np.where(is_mark, place, 0))
        document = is_mark.cumsum().astype(np.uint64) * np.uint64(0x5851F42D4C957F2D)
        terms = (classes[x[row]] + 1).astype(np.uint64) * down
        sums = np.r_[np.uint64(0), np.cumsum(terms)]  # all modulo 2^64
        for number, length in enumerate(COPY_LENGTHS):
            first = place - length + 1
            whole = np.flatnonzero(first >= begin)
            keys = up[whole] * (sums[whole + 1] - sums[first[whole]]) ^ document[whole]
            order = np.argsort(keys, kind="stable")
            keys, here = keys[order], whole[order]
            fresh = np.r_[True, keys[1:] != keys[:-1]]
            index = np.arange(len(keys))
            times = index - np.maximum.accumulate(np.where(fresh, index, 0))
            again = np.flatnonzero(times)
            candidates[row, here[again]] = x[row, here[again - 1] + 1]
            buckets[row, here[again]] = 3 * number + times[again].clip(max=3)
    return candidates, buckets


class CopyInput(nn.Module):
    """Adds what copy_candidates found: gate 0 to the input, gate 1 before the last norm."""

    def __init__(self, c):
        super().__init__()
        buckets = 3 * len(COPY_LENGTHS) + 1
        self.scale = parameter(torch.zeros(buckets), "copy")
        self.embed = parameter(torch.zeros(buckets, c.n_embd), "copy")
        self.gates = parameter([0.5, 1.0], "copy")

    def forward(self, embeddings, buckets):
        """What to add at both places, [B, T, D] each."""
        scale, embed = self.scale[buckets].unsqueeze(-1), self.embed[buckets]
        vector = scale.to(embeddings.dtype) * embeddings + embed.to(embeddings.dtype)
        vector = vector * (buckets > 0).unsqueeze(-1)
        return self.gates[0] * vector, self.gates[1] * vector


class GPT2026(GPT):
    """The model of record 92 (28 September 2026): LAYERS at any width."""

    sums_loss = can_recompute = True
    rows_at_once = 1
    end_groups = "wte_2026", "lm_head_2026"
    SEGMENT = 2560  # tokens of a document that attend to each other in training
    SOURCES = "c0 c7 c9 table0 c3 table1 table3 table2 mlp late".split()  # of the last mix
    GROUPS = 12  # of channels that it weighs apart

    def __init__(self, c):
        super().__init__(c)
        self.table = NGramTable(c)
        predicts_prefix = any(any(stage.prefix) for stage in c.stages)
        self.prefixes = prefix_table(c) if predicts_prefix else None
        self.copy_input = CopyInput(c) if c.copy_input else None
        self.value_embeds = nn.ModuleList(
            Embedding(c.padded_vocab, c.n_embd, 0.01, c.dtype, "value_tables") for _ in range(4)
        )
        self.smear_gate = Linear(12, 1, 0.0, "smear_gate")
        self.smear = parameter(0.0, "scalars_2026")
        self.skip = parameter(-1.5, "scalars_2026")
        self.blocks = nn.ModuleList(Block2026(c, layer) for layer in LAYERS)
        # numbers of the gate blocks, by role and layer: how many, ten times the first value
        H, grow = c.n_head, 10 * 1.1**0.5

        def gates(role, layers, count, start):
            return {(role, i): (count, start) for i in layers}

        early = gates("xsa", (1, 3), H, 0.0) | gates("heads", (3,), H, 2.5)
        early |= gates("x0", (0, 1, 2), 1, 0.0) | gates("grams", (0, 1), 1, 0.5)
        late = gates("heads", (10,), H, 2.5) | gates("x0", (4, 5, 7), 1, 0.0)
        late |= gates("grams", (4, 5, 9), 1, 0.5) | gates("skip", (6,), 1, 5.0)
        self.early_gates = Mix(c, early, "gates_2026")
        self.late_gates = Mix(c, late, "gates_2026")
        self.gate_scale = parameter(0.1, "gates_2026_bias")
        # of layer 10: into its values, into its input, shares of its table, after attention, MLP
        last = dict.fromkeys("v_c0 v_c7 v_x in_c0 in_c7 in_x".split(), (1, 0.0))
        last |= dict(table_a=(1, 20.0), table_b=(1, 20.0), x_attn=(1, grow), attn=(1, 10.0))
        last |= dict(c0=(1, 0.0), grams=(1, 0.5), x_mlp=(1, grow), mlp=(1, 10.0))
        self.last_mix = Mix(c, last, "mudd")
        sources = {name: (1, -5.0 if name == "c7" else 0.0) for name in self.SOURCES}
        self.head_mix = Mix(c, sources, "mudd")
        self.head_groups = Linear(64, len(sources) * self.GROUPS, 0.0, "mudd")
        self.init_weights()

    # ------------------------------------------------------------ what a batch needs
    def prepare(self, tokens, group=None, training=False):
        c, arrays = self.config, {"tokens": tokens, "grams": self.table.plan(tokens, group)}
        starts = tokens == c.vocab_size - 1
        if training:
            place = np.arange(tokens.shape[1])
            begin = np.maximum.accumulate(np.where(starts, place, 0), axis=1)
            starts = (place - begin) % self.SEGMENT == 0
        arrays["docs"] = starts.cumsum(1)
        if c.copy_input:
            classes = self.table.classes
            classes = np.arange(c.padded_vocab) if classes is None else classes
            found = copy_candidates(tokens, classes, c.vocab_size - 1)
            arrays["copied"], arrays["buckets"] = found
        return arrays

    def prepare_targets(self, targets, step, row, rows):
        (targets,) = targets  # one row at a time
        weights, prefix = loss_weights_at(step, self.config)
        pad = functools.partial(np.pad, constant_values=-1)
        columns = [pad(targets[n:], (0, n)) for n in range(len(weights))]
        columns += [self.prefixes[targets]] if prefix else []
        goals, count = np.stack(columns, 1), candidates_at(step, self.config)
        classes = self.candidates.draw(targets, count, row, rows) if count else None
        if classes is None:
            return {"targets": goals[None]}
        place = np.full(self.config.padded_vocab + 1, -1)
        place[classes] = np.arange(len(classes))  # of -1: -1
        return {"targets": place[goals][None], "classes": classes}

    def load(self, arrays):
        plain = {name: array for name, array in arrays.items() if name != "grams"}
        return super().load(plain) | {"grams": self.table.look_up(arrays["grams"], self.to_device)}

    # --------------------------------------------------------------- forms of a stage
    def views_at(self, step):
        """Narrow layers' rotary follows their own, short window; wide layers' the long one."""
        c = self.config
        stage = stage_at(step, c)[0]
        so_far = c.stages[: c.stages.index(stage) + 1]
        short = tuple(dict.fromkeys(stage.short_window for stage in so_far))
        long = tuple(dict.fromkeys(stage.window for stage in so_far))
        last = FINAL_WINDOW if step == c.steps else stage.window
        return {
            "narrow": (0.13, short, stage.short_window, False),
            "wide": (0.085, long, last, False),
            "paired": (0.13, short, stage.short_window, True),
        }

    def make_view(self, scale, windows, window, paired):
        c, device = self.config, self.wte.weight.device
        frequencies = 1024.0 ** -torch.linspace(0, 1, c.n_embd // c.n_head // 4)
        frequencies, scale = yarn(frequencies, self.score_scale * scale, windows)
        places = torch.arange(max(c.max_seq_len, c.val_len), device=device).unsqueeze(1)
        if paired:
            places = 2 * places + torch.arange(c.n_head, device=device) % 2
        scale, window = torch.tensor(scale, device=device), torch.tensor(window, device=device)
        return View(rotary_tables(frequencies, places), scale, window)

    def kind(self, layer):
        return "wide" if layer.wide else "paired" if layer.paired else "narrow"

    def windows(self, stage):
        spans = {True: stage.window, False: stage.short_window}
        pairs = zip(self.blocks, LAYERS, strict=True)
        return [(block.attn, spans[layer.wide]) for block, layer in pairs if layer.attention]

    # -------------------------------------------------------------------- the forward
    def hidden(self, tokens, grams=None, docs=None, copied=None, buckets=None):
        c = self.config
        if grams is None:  # outside of the training loop
            inputs = self.load(self.prepare(tokens.cpu().numpy()))
            return self.hidden(**inputs)
        e = self.wte(tokens).to(c.dtype)
        before = F.pad(e[:, :-1], (0, 0, 1, 0))
        e = e + self.smear * torch.sigmoid(self.smear_gate(e[..., :12])) * before
        if c.copy_input:
            embeddings = self.wte(copied).to(c.dtype)
            copy_in, copy_out = self.copy_input(embeddings, buckets)
            e = e + copy_in
        x0 = norm(e)
        s = dict(x0=x0, grams=grams, gates=self.scaled_gates(self.early_gates, x0))
        s["tables"] = [table(tokens) for table in self.value_embeds]
        s["masks"] = self.masks(docs)
        s["c0"] = x = x0 + s["gates"]["grams", 0] * grams
        layer = self.layer
        if self.training and self.recompute:  # in this order: validation compiles once
            layer = functools.partial(recompute, layer, use_reentrant=False)
        for i in range(len(LAYERS) - 1):
            if i == 4:
                s["gates"] |= self.scaled_gates(self.late_gates, x)
            x = layer(i, x, s)
            if i == 3:
                s["c3"] = x
            if i == 7:
                s["c7"], s["late"] = x, norm(x)
        x = self.mix_for_head(*self.last_layer(x, s), s)  # recomputed, it needs more memory
        if c.copy_input:
            x = x + copy_out
        return norm(x)

    def scaled_gates(self, mix, x):
        return {name: self.gate_scale * gate for name, gate in mix(x)[0].items()}

    def masks(self, docs):
        flex = docs.is_cuda and self.config.compile
        doubled = docs.repeat_interleave(2, dim=1)
        return {
            kind: attention_mask(doubled if kind == "paired" else docs, view.window, flex)
            for kind, view in self.views.items()
        }

    def attention(self, i, source, s, values=None):
        layer, kind = LAYERS[i], self.kind(LAYERS[i])
        xsa, heads = s["gates"].get(("xsa", i)), s["gates"].get(("heads", i))
        view, mask = self.views[kind], s["masks"][kind]
        return self.blocks[i].attn(source, values, view, mask, xsa if layer.xsa else None, heads)

    def layer(self, i, x, s):
        """Layers 0 to 9: attention and what is injected, then the MLPs."""
        layer, block, gates = LAYERS[i], self.blocks[i], s["gates"]
        if i == 6:
            x = x + torch.sigmoid(self.skip) * gates["skip", 6] * s["c3"]
        else:
            y, x_in = 0.0, x
            if layer.attention:
                source = norm(x) if i < 8 else s["late"]
                values = None
                if layer.table is not None:
                    table = s["tables"][layer.table]
                    share = block.value_gate(torch.cat((source[..., :6], table[..., :6]), -1))
                    share = 2 * torch.sigmoid(share).unsqueeze(-1)
                    values = (share * table.unflatten(-1, (share.size(-2), -1))).flatten(-2)
                y = block.post[0] * self.attention(i, source, s, values)
            x = block.residual[0] * x_in + y
            if layer.x0:
                x = x + gates["x0", i] * s["x0"]
            if layer.grams:
                x = x + gates["grams", i] * s["grams"]
        x_in = block.residual[1] * x
        return x_in + block.post[1] * block.mlp(norm(x)) if layer.mlps else x_in

    def last_layer(self, x, s):
        """Layer 10, whose every sum is weighed token by token (MUDD): its output, what entered it,
        what entered its MLP."""
        entered, half = x, self.config.n_head // 2
        mix = {name: 0.1 * number for name, number in self.last_mix(x)[0].items()}
        table = s["tables"][LAYERS[10].table]
        share = torch.cat(
            (mix["table_a"].expand(-1, -1, half), mix["table_b"].expand(-1, -1, half)), -1
        )
        values = (share.unsqueeze(-1) * table.unflatten(-1, (2 * half, -1))).flatten(-2)
        values = values + mix["v_c0"] * s["c0"] + mix["v_c7"] * s["c7"] + mix["v_x"] * x
        x = (1 + mix["in_x"]) * x + mix["in_c0"] * s["c0"] + mix["in_c7"] * s["c7"]
        y = self.attention(10, s["late"], s, values)
        x = mix["x_attn"] * x + mix["attn"] * y + mix["c0"] * s["c0"] + mix["grams"] * s["grams"]
        m = norm(x)
        return mix["x_mlp"] * x + mix["mlp"] * self.blocks[10].mlp(m), entered, m

    def mix_for_head(self, x, entered, m, s):
        """Earlier states are added, weighed token by token and group of channels (MUDD)."""
        tables = {f"table{number}": table for number, table in enumerate(s["tables"])}
        sources = s | tables | dict(c9=entered, mlp=m)
        numbers, seen = self.head_mix(x)
        apart = self.head_groups(seen).unflatten(-1, (-1, self.GROUPS)).unbind(-2)
        parts = x.unflatten(-1, (self.GROUPS, -1))
        for name, delta in zip(self.SOURCES, apart, strict=True):
            share = 0.1 * (numbers[name] + delta)
            parts = parts + share.unsqueeze(-1) * sources[name].unflatten(-1, (self.GROUPS, -1))
        return parts.flatten(-2)

    def cap(self, logits):
        share = torch.sigmoid((logits + 5) / 7.5)  # December 2025
        return 23 * share, 23 / 7.5 * share * (1 - share), True

    def numel(self):
        return super().numel() + self.config.table_rows * self.config.n_embd


MODELS = {"gpt2024": GPT2024, "gpt2026": GPT2026}


# ---------------------------------------------------------------------------------------- Method
class Method:
    """An optional method: hooks that default to nothing, so that the hot path has no branch for
    it. The methods stand at the end of the file."""

    transforms = False  # do project and lift change updates?

    def __init__(self, c):
        self.config = c

    def wraps(self, rule):
        """The Optimizer class of hidden matrices, from the plain one."""
        return rule

    def attach(self, model):
        """After init, before optimizers and compile."""

    def allocate(self, run):
        """Take the memory that the method will need later, before activations take theirs."""

    def project(self, optimizer, g):
        """Gradient rows, on their rank, before the update."""
        return g

    def lift(self, optimizer, u):
        """The update, back to the weights' shape."""
        return u

    def set_form(self, step, run):
        """Give model and optimizers the form that they have after `step` updates."""

    def after_step(self, step, run):
        """After update number `step`, 1-based."""

    def eval_weights(self, model):
        """{parameter: what validation and sampling use in its place}."""
        return {}

    def state_dict(self):
        return {}

    def load_state_dict(self, state): ...


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


def subtract(w, update, rates, decay, signs):
    """w -= rates * (update + decay * w), in place. The decay, None or a number, only shrinks what
    the update shrinks, too (cautious: arXiv 2510.12402); signs: a tensor that says so in its
    place."""
    if decay is not None:
        shrinks = update * w > 0 if signs is None else signs * w >= 0
        update = update + w * shrinks * decay
    w.sub_(update * rates)


@dataclasses.dataclass(frozen=True)
class Group:
    """How a group of parameters is trained. betas, eps: (), 0: the flags' (as in torch); else eps
    is added to the root of the uncorrected second moment. decay: cautious, times the rate
    squared. every: updates of the run for one of these. rare: from rare_from(c) on every fourth
    one, with squared betas and twice the decay."""

    flag: str  # of the rate
    factor: float = 1.0  # on the rate
    betas: tuple = ()
    eps: float = 0.0
    decay: float = 0.0
    every: int = 1
    rare: bool = False
    rule: str = "adam"


class Optimizer:
    """Parameters as rows of one tensor, sharded over ranks (ZeRO, arXiv 1910.02054); a subclass
    says what the update is. With --bf16_weights (record 57, January 2026) matrices are in bfloat16,
    which halves what ranks send, and "master" holds a rank's own rows in fp32.

    named: {name: parameter}; they become views into `weights`, [rows, *row_shape], padded to divide
    over ranks; `grads`, laid out alike, is there from reduce() to step(). row_shape: () where any
    element may go to any rank (Adam), else the matrix that must stay whole. steps: updates since
    the moments began."""

    sharded = True  # else every rank updates all rows

    def __init__(self, named, group, row_shape, run):
        self.named, self.group = named, group
        self.config, self.runtime = run.config, run.runtime
        self.name = f"{type(self).__name__} {next(iter(named))}"
        self.bank = next(iter(named.values())).bank
        self.neurons = next(iter(named.values())).neurons
        self.method, self.row_scale = Method(run.config), 1.0
        self.trains_matrices = len(row_shape) == 2
        self.state: dict[str, Tensor] = {}  # {name: [own rows, ...]}
        self.steps, self.work, self.grads = 0, None, None
        self.set_stage(0)
        self.shards = run.runtime.world_size if self.sharded else 1
        parts = [p.detach().reshape(-1, *row_shape) for p in named.values()]
        self.sizes = [len(part) for part in parts]
        unit = 1 if row_shape else 16  # shards start aligned; of one element, compiling fails
        self.share = -(-sum(self.sizes) // (self.shards * unit)) * unit
        first = self.share * run.runtime.rank if self.sharded else 0
        self.own = slice(first, first + self.share)
        self.weights = self.stack(parts)
        if run.config.bf16_weights and self.trains_matrices:
            self.state["master"] = self.weights[self.own].clone()
            self.weights = self.weights.bfloat16()
        for p, weight in zip(named.values(), self.unstack(self.weights), strict=True):
            p.data = weight.view_as(p)

    @property
    def own_weights(self):
        """The rows that this rank updates."""
        return self.state.get("master", self.weights[self.own])

    def set_stage(self, step):
        """Make ready for update `step` of the run, 0-based."""
        c, group = self.config, self.group
        rare = group.rare and step >= rare_from(c)
        self.run_step, self.every = step, 4 if rare else group.every
        self.rate = getattr(c, group.flag) * group.factor * lr_at(step, c)
        self.momentum = momentum_at(step, c)
        betas = group.betas or (c.beta1, c.beta2)
        self.betas = tuple(beta**2 for beta in betas) if rare else betas
        self.decay = 2 * group.decay if rare else group.decay

    def stack(self, parts):
        """Tensors [its rows, ...] of all parameters to rows of all ranks, on the device; padding
        rows are zero."""
        missing = self.share * self.shards - sum(map(len, parts))
        if missing:
            parts = *parts, parts[0].new_zeros(missing, *parts[0].shape[1:])
        return torch.cat(parts).to(self.runtime.device)

    def unstack(self, rows):
        """Inverse of stack."""
        return rows[: sum(self.sizes)].split(self.sizes)

    def reduce(self):
        """Take the gradients that autograd has left, and start to sum them over ranks, each rank's
        rows on that rank."""
        shape = self.weights.shape[1:]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.named.values()]
        self.grads = self.stack([grad.reshape(-1, *shape) for grad in grads])
        for p in self.named.values():
            p.grad = None
        if self.shards > 1:
            self.work = reduce_scatter(self.grads[self.own], self.grads, async_op=True)

    @torch.no_grad()
    def step(self):
        """Update this rank's rows, then start to gather everyone's."""
        self.finish()
        self.steps += 1
        gradient = self.method.project(self, at_least_fp32(self.grads[self.own]))
        update = self.method.lift(self, self.direction(gradient))
        rates = torch.as_tensor(self.rate * self.row_scale)
        decay = torch.tensor(self.rate * self.decay) if self.decay else None
        apply = compiled(subtract, self.config.compile)
        apply(self.own_weights, update, rates, decay, self.decay_signs())
        self.grads = None
        self.gather()

    def gather(self):
        """Start to bring every rank's rows to all ranks."""
        if "master" in self.state:
            self.weights[self.own] = self.own_weights.bfloat16()
        if self.shards > 1:
            self.work = all_gather(self.weights, self.weights[self.own], async_op=True)

    def finish(self):
        if self.work:
            self.work.wait()
        self.work = None

    def direction(self, g):
        """What to subtract, times the rate, for gradient rows [own rows, ...]."""
        raise NotImplementedError

    def decay_signs(self):
        """What says where decay acts, if not the update."""
        return None

    def moment(self, name, like):
        """In fp32 or more, zero at first, to be changed in place."""
        if name not in self.state:
            dtype = torch.promote_types(like.dtype, torch.float32)
            self.state[name] = torch.zeros_like(like, dtype=dtype)
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
        """Inverse of gather_state. Raises UserError where it is of other parameters."""
        state = dict(whole)
        names, self.steps = state.pop("parameters"), state.pop("steps")
        fail_if(names != list(self.named) or self.steps < 0, "its moments are of other parameters")
        odd = ("master" in state) != ("master" in self.state)
        fail_if(odd, "one of both has --bf16_weights")
        for name, rows in state.items():
            fail_if(len(rows) != sum(self.sizes), f"{name} has not one row per row of the weights")
            self.state[name] = self.stack([rows])[self.own].clone()

    def state_bytes(self):
        return sum(tensor.nbytes for tensor in self.state.values())

    def tensors(self):
        return [self.weights]


def adam_direction(g, m, v, beta1, beta2, eps, bias1, bias2):
    """Adam, arXiv 1412.6980; bias: 1 - beta ** steps. Changes the moments m and v in place."""
    g = g.to(m.dtype)
    m.lerp_(g, 1 - beta1)
    v.lerp_(g * g, 1 - beta2)
    return (m / bias1) / ((v / bias2).sqrt() + eps)


class Adam(Optimizer):
    def direction(self, g):
        c, (beta1, beta2) = self.config, self.betas
        m, v = self.moment("exp_avg", g), self.moment("exp_avg_sq", g)
        bias1, bias2 = 1 - beta1**self.steps, 1 - beta2**self.steps
        eps = self.group.eps / bias2**0.5 if self.group.eps else c.adam_eps
        numbers = (torch.tensor(x, dtype=m.dtype) for x in (eps, bias1, bias2))
        return compiled(adam_direction, c.compile)(g, m, v, beta1, beta2, *numbers)


class Adagrad(Optimizer):
    """Rate over the root of the sum of all squared gradients (Duchi et al., JMLR 2011): rare rows
    take large steps when their turn comes."""

    def direction(self, g):
        total = self.moment("sum_sq", g).addcmul_(g.float(), g.float())
        return g / (total.sqrt() + 1e-12)


KELLER_JORDAN = [(3.4445, -4.7750, 2.0315)] * 5  # kellerjordan.github.io/posts/muon


def newton_schulz(g, dtype, maps=tuple(KELLER_JORDAN), margin=1.0, eps=1e-7):
    """Matrices [n, rows, cols] with singular values brought near 1 (0.7 to 1.2, by the default
    maps). margin, eps: by which their norm is taken too large."""
    tall = g.size(-2) > g.size(-1)
    x = (g.mT if tall else g).to(dtype)
    x = x / (margin * x.norm(dim=(-2, -1), keepdim=True) + eps)
    for a, b, c in maps:
        gram = x @ x.mT
        x = a * x + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ x
    return at_least_fp32(x.mT if tall else x)


class Muon(Optimizer):
    """Momentum, orthogonalised by Newton-Schulz; Nesterov style (Keller Jordan,
    kellerjordan.github.io/posts/muon)."""

    def direction(self, g):
        c, m = self.config, self.moment("momentum", g)
        m.mul_(self.momentum).add_(g)
        u = compiled(newton_schulz, c.compile)(g + self.momentum * m, c.dtype)
        return self.level_neurons(u, c.normuon) if c.normuon else u

    def level_neurons(self, u, beta):
        """NorMuon (arXiv 2510.05491): divide each neuron by the running RMS of its updates, and
        keep the update's norm (so a correction of bias would cancel). Neurons are the rows of a
        tall matrix, the columns of a wide one, unless the parameter says otherwise."""
        axis = self.neurons or (-1 if u.size(-2) >= u.size(-1) else -2)
        square = u.square().mean(axis, keepdim=True)
        mean = self.moment("row_sq", square).lerp_(square, 1 - beta)
        level = u / mean.clamp_min(1e-10).sqrt()
        size = torch.linalg.matrix_norm(u, keepdim=True)
        return level * (size / torch.linalg.matrix_norm(level, keepdim=True).clamp_min(1e-10))


class Anvil(Muon):
    """ANVIL2 of record 92: the velocity blends a fast and a slow momentum from step 514 on, six
    maps of their own, NorMuon's levelling, decay where the slow momentum shrinks the weight."""

    MAPS = (
        (3.923798038567, -6.095026865488, 3.905234618423),
        (3.278126713798, -3.328923386476, 0.989127286973),
        (3.505298394150, -5.137358782410, 1.968325560615),
        (2.815058591845, -3.685181239622, 1.417196497642),
        (2.245503932403, -2.443826979899, 0.963091710461),
        (2.256537145403, -2.166840097229, 0.929501253245),
    )

    # Record 92: 1.05, the very edge of its maps. Rounding to bfloat16 then throws a third of all
    # matrices of rank one, as first gradients are, over it, to infinity. From 1.06 on, none.
    MARGIN = 1.07

    def direction(self, g):
        c, fast, slow = self.config, self.moment("fast", g), self.moment("slow", g)
        blends = self.run_step >= scaled(514, c)
        fast.lerp_(g, 1 - (0.85 if blends else self.momentum))
        slow.lerp_(g, 0.02)
        steady = 0.4385 * fast + 0.5615 * slow if blends else fast
        velocity = torch.lerp(g.to(fast.dtype), steady, self.momentum)
        u = compiled(newton_schulz, c.compile)(velocity, c.dtype, self.MAPS, self.MARGIN, 1e-6)
        return self.level_neurons(u, 0.9)

    def decay_signs(self):
        return self.state["slow"]


MATRIX_RULES = {"muon": Muon, "anvil": Anvil, "adam": Adam}
MATRIX_GROUPS = {
    "muon": Group("lr_muon"),
    "anvil": Group("lr_muon", decay=2.25),
    "adam": Group("lr_adam"),
}
EVERY_SECOND = functools.partial(Group, eps=1e-10, every=2)
GROUPS = {
    "wte": Group("lr_embed"),
    "lm_head": Group("lr_head"),
    "scalars": Group("lr_scalar"),
    "gates": Group("lr_gate"),
    "value_embeds": Group("lr_table"),
    "ngrams": Group("lr_ngram", rule="adagrad"),
    # record 92
    "wte_2026": EVERY_SECOND("lr_embed", betas=(0.5, 0.95), decay=0.75),
    "lm_head_2026": EVERY_SECOND("lr_head", betas=(0.5, 0.95), decay=0.75),
    "scalars_2026": EVERY_SECOND("lr_scalar", betas=(0.9, 0.99)),
    "residual": EVERY_SECOND("lr_scalar", betas=(0.9, 0.95)),
    "post": EVERY_SECOND("lr_scalar", 0.2, betas=(0.9, 0.95)),
    "value_gate": EVERY_SECOND("lr_gate", betas=(0.9, 0.99), decay=0.005),
    "smear_gate": EVERY_SECOND("lr_gate", 0.01, betas=(0.9, 0.99)),
    "mudd": EVERY_SECOND("lr_gate", 0.25, betas=(0.9, 0.99), decay=0.005),
    "mudd_bias": EVERY_SECOND("lr_gate", 0.25, betas=(0.9, 0.99)),
    "gates_2026": EVERY_SECOND("lr_gate", 0.1, betas=(0.9, 0.99), decay=0.005),
    "gates_2026_bias": EVERY_SECOND("lr_gate", 0.1, betas=(0.9, 0.99)),
    "value_tables": EVERY_SECOND("lr_table", betas=(0.75, 0.95), decay=0.025, rare=True),
    "ngram_table": EVERY_SECOND("lr_table", betas=(0.0, 0.95), decay=0.025, rare=True),
    "copy": EVERY_SECOND("lr_gate", betas=(0.9, 0.99)),
}


class RowAdam:
    """Adam for NGramTable: no momentum, one second moment per row, only rows with a gradient move
    (T:adam_update of record 92). To the loop it is an Optimizer, but NGramTable holds what it
    changes, and has summed the gradients over ranks."""

    name, named, bank, trains_matrices = "RowAdam", {}, "ngram_table", False
    set_stage = Optimizer.set_stage

    def __init__(self, model, run):
        self.to_device, self.table, self.config = model.to_device, model.table, run.config
        self.group, self.steps = GROUPS["ngram_table"], 0
        self.set_stage(0)

    def reduce(self): ...

    def finish(self): ...

    @torch.no_grad()
    def step(self):
        self.steps += 1
        table, beta2 = self.table, self.betas[1]
        scale = self.rate * (1 - beta2**self.steps) ** 0.5
        shrink = self.rate**2 * self.decay
        table.squares.mul_(beta2)
        for rows, g in table.merged(self.to_device):
            old = table.rows[rows]
            square = table.squares[rows] + (1 - beta2) * g.square().mean(1)
            table.squares[rows] = square
            u = scale * g / (square.sqrt() + self.group.eps)[:, None]
            table.rows[rows] = (old - u - (u * old > 0) * shrink * old).to(old.dtype)

    def gather_state(self):
        return {"steps": self.steps}

    def load_state(self, whole):
        self.steps = whole["steps"]

    def state_bytes(self):
        return self.table.squares.nbytes

    def tensors(self):
        return [self.table.rows, self.table.squares]


def make_optimizers(run):
    """Every parameter in exactly one optimizer; the hidden matrices in stacks of one shape. Raises
    KeyError with the name of a parameter that belongs to no group."""
    groups, optimizers = {}, []
    for name, p in run.model.named_parameters():
        group = getattr(p, "group", None)
        if group != "matrix" and group not in GROUPS:
            raise KeyError(f"no optimizer trains {name}: make it by parameter(), with a group")
        if p.requires_grad:
            groups.setdefault(group, {})[name] = p
    matrices = groups.pop("matrix", {})
    for group, named in groups.items():
        rule = Adagrad if GROUPS[group].rule == "adagrad" else Adam
        optimizers.append(rule(named, GROUPS[group], (), run))
    if run.model.table is not None:
        optimizers.append(RowAdam(run.model, run))
    return optimizers + stack_matrices(matrices, run)


def stack_matrices(matrices, run):
    """Optimizers for {name: hidden matrix}, one per shape. Unless a matrix has a rate of its own,
    Muon's and ANVIL's is times √(out / in): orthogonal updates of all shapes then act alike."""
    c, stacks, scales, optimizers = run.config, {}, {}, []
    rule = c.matrix_optimizer
    for name, p in matrices.items():
        n_out, n_in = reversed(p.shape) if p.transposed else p.shape
        by_shape = max(1.0, n_out / n_in) ** 0.5
        orthogonal = by_shape if p.rate is None else p.rate
        scale = orthogonal if rule != "adam" else 1.0
        scales[name] = torch.full((1, 1, 1), scale * p.lr_mult)
        alone = name if c.galore_per_layer else p.bank if c.tail_average else ""
        key = alone, p.neurons, p.block or p.size(0), p.size(1)
        stacks.setdefault(key, {})[name] = p
    method = next((method for method in run.methods if method.transforms), Method(c))
    for (*_, rows, cols), named in stacks.items():
        optimizer = method.wraps(MATRIX_RULES[rule])(named, MATRIX_GROUPS[rule], (rows, cols), run)
        optimizer.method = method
        counts = zip(named, optimizer.sizes, strict=True)
        by_row = [scales[name].expand(count, 1, 1) for name, count in counts]
        optimizer.row_scale = optimizer.stack(by_row)[optimizer.own]
        optimizers.append(optimizer)
    return optimizers


# --------------------------------------------------------------------------------- Clock and log
class Clock:
    """Training time. Synchronises the device at every start and stop; nothing else measures
    training. Garbage is collected while it stands: an update leaves no cycles."""

    def __init__(self, runtime):
        self.runtime, self.seconds, self.since = runtime, 0.0, None

    def switch(self, on):
        (gc.disable if on else gc.enable)()
        self.runtime.synchronize()
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
        cuda = runtime.device.type == "cuda"
        name = torch.cuda.get_device_name(runtime.device) if cuda else runtime.device.type
        self.facts = dict(
            run_id=runtime.gather(stamp)[0],
            python=platform.python_version(),
            torch=torch.__version__,
            cuda=torch.version.cuda if cuda else "none",
            device=name,
            cpu=f"{platform.machine()}, {torch.get_num_threads()} threads",
            world_size=runtime.world_size,
            argv=" ".join(argv),
            source_sha256=SOURCE_SHA256,
            data_sha256=data,
            config=dataclasses.asdict(c),
        )
        self.path, self.lines = Path(c.log_dir, f"{self.facts['run_id']}.txt"), []
        table = [
            f"{name}: {fact if isinstance(fact, str) else json.dumps(fact)}"
            for name, fact in self.facts.items()
        ]
        rule = "=" * 100
        with explain_errors(f"--log_dir {c.log_dir}: no log can be written there"):
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
        """The public speedrun's line; kind: val or train. Raises UserError when it is not
        finite."""
        times = f"train_time:{ms:.0f}ms step_avg:{ms / max(1, step):.2f}ms"
        self.line(f"step:{step}/{steps} {kind}_loss:{loss:.4f} {times}", echo=kind == "val")
        lost = not math.isfinite(loss)
        fail_if(lost, f"the {kind} loss became {loss} at step {step}: lower the learning rates")

    def progress(self, text):
        """The live line: rewritten in place on a terminal, every ten seconds elsewhere."""
        if time.monotonic() - self.shown > (0.2 if self.live else 10):
            self.shown = time.monotonic()
            if self.live:  # a line that wraps cannot be rewritten
                text = text[: shutil.get_terminal_size().columns - 1]
            self.show(text, end="" if self.live else "\n")


# ------------------------------------------------------------------------------------ Checkpoint
@dataclasses.dataclass
class Run:
    """A run: its settings, and all that training changes. step: updates done; micro: {(rows of a
    rank, tokens of each): rows of its micro-batch}; recomputed: tokens of rows whose layers run
    again in the backward pass; sweeps: of the candidate sets; data: {file: sha256}."""

    config: Config
    runtime: Runtime
    model: GPT
    methods: list
    optimizers: list = dataclasses.field(default_factory=list)
    micro: dict = dataclasses.field(default_factory=dict)
    recomputed: set = dataclasses.field(default_factory=set)
    val_len: int = 0  # tokens per row of validation, as many as fit
    clock: Clock | None = None
    log: Log | None = None
    data: dict | None = None
    flops: float = 0.0  # per token
    folder: Path | None = None  # of its checkpoints
    step: int = 0
    sweeps: dict = dataclasses.field(default_factory=dict)
    late_losses: list = dataclasses.field(default_factory=list)  # on their way from the device

    def state(self):
        """All of it but the n-gram table, on the CPU, by name, the same for any number of ranks. A
        collective."""
        sweeps = {}
        for theirs in self.runtime.gather(self.sweeps):
            sweeps |= theirs
        return {
            "step": self.step,
            "model": {name: t.cpu() for name, t in self.model.state_dict().items()},
            "optimizers": {o.name: o.gather_state() for o in self.optimizers},
            "methods": [method.state_dict() for method in self.methods],
            "sweeps": sweeps,
            "rng": torch.get_rng_state(),
        }

    def load_state(self, state):
        """Take the form and the values of a state."""
        self.step, self.sweeps = state["step"], state["sweeps"]
        for method, values in zip(self.methods, state["methods"], strict=True):
            method.set_form(self.step, self)
            method.load_state_dict(values)
        self.model.load_state_dict(state["model"])
        for optimizer in self.optimizers:
            optimizer.load_state(state["optimizers"][optimizer.name])
        torch.set_rng_state(state["rng"])


class HashingWriter:
    """A file that takes the sha256 of what goes into it."""

    def __init__(self, file):
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, data):
        self.sha256.update(data)
        return self.file.write(data)

    def flush(self):
        self.file.flush()


def write_file(path, state):
    """torch.save, and behind it the sha256 of that. The file appears whole or not at all. Raises
    OSError."""
    aside = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(aside, "wb") as disk:
            writer = HashingWriter(disk)
            torch.save(state, writer)
            disk.write(writer.sha256.digest())
            disk.flush()
            os.fsync(disk.fileno())
        aside.replace(path)
    except RuntimeError as error:  # torch.save's word for a write that failed
        raise OSError(str(error).splitlines()[0]) from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)  # it may fill the disk


def read_file(path):
    """What write_file wrote. Raises UserError when it is not, bit for bit, that."""
    with explain_errors(f"{path}: damaged or not a checkpoint"):
        data = Path(path).read_bytes()
        fail_if(hashlib.sha256(data[:-32]).digest() != data[-32:], "wrong checksum")
        return torch.load(io.BytesIO(data[:-32]), map_location="cpu", weights_only=True)


def identity(c, data):
    """What two runs must share to be the same run."""
    fields = dataclasses.asdict(c)
    stages = fields.pop("stages")
    trained = {name: value for name, value in fields.items() if name not in LOCAL_FIELDS}
    trained |= {name: [stage[name] for stage in stages] for name in stages[0]}
    return trained | {"the source of train_gpt.py": SOURCE_SHA256, "the data": data}


def save_checkpoint(run):
    """<folder>/step_<n>.pt; a rank's rows of an n-gram table go into step_<n>.table<rank>.pt, all
    before that. A collective."""
    c, log, runtime, table = run.config, run.log, run.runtime, run.model.table
    path = run.folder / f"step_{run.step:06d}.pt"
    state = run.state() | dict(
        train_seconds=run.clock.ms / 1000,
        config=dataclasses.asdict(c),
        identity=identity(c, run.data),
        tables=runtime.world_size if table else 0,
        log=[line for line in log.lines if line.startswith(("step:", "resumed:"))],
    )
    error = None
    try:
        if table:
            write_file(path.with_suffix(f".table{runtime.rank}.pt"), table.state())
    except OSError as failed:
        error = str(failed)
    error = next(filter(None, runtime.gather(error)), None)
    if runtime.rank == 0:
        try:
            if error:
                raise OSError(error)
            write_file(path, state)
            log.line(f"checkpoint: {path}")
            found = sorted(run.folder.glob("step_??????.pt"), key=os.path.getmtime)
            for old in found[: -c.checkpoint_keep]:
                for file in (old, *old.parent.glob(f"{old.stem}.table*.pt")):
                    file.unlink()
        except OSError as failed:
            log.line(f"checkpoint: {path} not written ({failed})", echo=True)
    written = runtime.gather(path.exists())[0]
    if table and not written:  # rows without their model
        path.with_suffix(f".table{runtime.rank}.pt").unlink(missing_ok=True)


def newest_checkpoint(run):
    """The path of the run's last checkpoint that was written, or None."""
    found = run.folder.glob("step_??????.pt")
    return max(found, key=os.path.getmtime, default=None)


def read_checkpoint(path):
    """Raises UserError when the file is not, bit for bit, what save_checkpoint wrote."""
    state = read_file(path)
    with explain_errors(f"{path}: damaged or not a checkpoint"):
        dict(state["identity"]), dict(state["sweeps"]), config_of(state["config"])
        fail_if(type(state["tables"]) is not int, "it miscounts")
        counts = type(state["step"]) is int and state["step"] >= 0
        fail_if(not counts or not 0 <= state["train_seconds"] < math.inf, "it miscounts")
    return state


def read_table(run, path, state):
    """The files of the n-gram table's ranks. Raises UserError where one is missing."""
    for rank in range(state["tables"]):
        run.model.table.load_state(read_file(Path(path).with_suffix(f".table{rank}.pt")))


def find_checkpoint(wanted, folder):
    """(path, state) of the checkpoint at a path; or the latest in a folder that can be read."""
    if wanted not in ("latest", "auto"):
        return wanted, read_checkpoint(wanted)
    found = sorted(Path(folder).glob("*/step_??????.pt"), key=os.path.getmtime)
    for path in reversed(found):
        try:
            return path, read_checkpoint(path)
        except UserError as error:
            print(f"{error}; looking for an older one", file=sys.stderr)
    raise UserError(f"no checkpoint in {folder} can be read: train first")


def find_resumption(c, data):
    """(path, state) that --resume names; ("", {}) if auto finds none. Raises UserError when it is
    of another run, and --resume_anyway was not given."""
    if c.resume == "auto" and not any(Path(c.checkpoint_dir).glob("*/step_??????.pt")):
        return "", {}
    path, state = find_checkpoint(c.resume, c.checkpoint_dir)
    now, then = identity(c, data), state["identity"]
    changed = [name for name in now if then.get(name) != now[name]]
    state["changed"] = changed
    long = [name for name in changed if len(f"{then.get(name)}{now[name]}") > 60]
    lines = [
        f"{name}: {'other' if name in long else f'{then.get(name)}, now {now[name]}'}"
        for name in changed
    ]
    line = f"{path} is of another run ({'; '.join(lines)}): give its flags, or --resume_anyway"
    fail_if(changed and not c.resume_anyway, line)
    fail_if(state["step"] > c.steps, f"{path}: step {state['step']} is after the end of this run")
    return path, state


def resume(run, path, state):
    """Go on where a checkpoint stands. Raises UserError when it does not fit this model or
    method."""
    with explain_errors(f"{path} does not fit this model or method"):
        run.load_state(state)
        read_table(run, path, state)
        run.clock.seconds = float(state["train_seconds"])
        end = f"step:{run.config.steps}/{run.config.steps} val_loss"  # comes once more
        for line in state["log"]:
            if not line.startswith(end):
                run.log.line(line)
    folder = Path(path).parent
    if not state["changed"] and folder.parent == run.folder.parent:
        run.folder = folder  # the same run: its checkpoints stay together
    run.log.line(f"resumed: from step {run.step} of {path}, changed: {state['changed']}", echo=True)


# -------------------------------------------------------------------------------------- Evaluate
def largest_divisor(n, at_most):
    return max((d for d in range(1, at_most + 1) if n % d == 0), default=1)


@torch.no_grad()
def replace_weights(model, weights):
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
    """Rows per forward pass of a validation: about as many tokens as in training."""
    share = run.config.val_tokens // run.val_len // run.runtime.world_size
    tokens = next(rows * seq_len for (_, seq_len), rows in run.micro.items())
    return largest_divisor(share, max(1, tokens // run.val_len))


def call_model(model, inputs):
    return model(**inputs)


def forward(run, inputs):
    return compiled(call_model, run.config.compile)(run.model, inputs)


@torch.no_grad()
def evaluate(run, val):
    """Mean cross-entropy, nats per token, of the first val_tokens tokens, each seen once."""
    c, runtime, model, losses = run.config, run.runtime, run.model, []
    share = c.val_tokens // run.val_len // runtime.world_size
    rows = np.arange(share) + runtime.rank * share
    raw = replace_weights(model, eval_weights(run))
    model.eval()
    for chunk in np.split(rows, share // val_rows(run)):
        tokens = np.stack([val.read(val.row(row, run.val_len)) for row in chunk.tolist()])
        losses.append(forward(run, validation_inputs(run, tokens)) * len(chunk))
        run.log.progress(f"step {run.step}/{c.steps} validating: row {chunk[0]} of {share}")
    model.train()
    replace_weights(model, raw)
    own = torch.stack(losses).cpu().double().sum().item()
    return sum(runtime.gather(own)) / (share * runtime.world_size)


def validation_inputs(run, tokens):
    """Of rows [B, T + 1]."""
    arrays = run.model.prepare(tokens[:, :-1])
    return run.model.load(arrays | {"targets": tokens[:, 1:]})


def build(c, runtime):
    """The model at its first weights, on its device, with its methods; no optimizers yet."""
    torch.manual_seed(c.seed)
    run = Run(c, runtime, MODELS[c.model](c), make_methods(c))
    for method in run.methods:
        method.attach(run.model)
    run.model.to(runtime.device)
    if run.model.table:
        run.model.table.allocate(runtime)
    run.val_len = c.val_len
    return run


def load_model(path, device="cpu"):
    """A checkpoint's model as validation saw it: tokens [B, T] to logits [B, T, padded_vocab]."""
    state = read_checkpoint(path)
    with explain_errors(f"{path} does not fit this train_gpt.py"):
        c = dataclasses.replace(config_of(state["config"]), compile=False)
        run = build(c, Runtime(torch.device(device)))
        run.load_state(state)
        read_table(run, path, state)
        run.model.set_stage(run.step)
    replace_weights(run.model, eval_weights(run))
    return run.model.eval()


@torch.no_grad()
def generate(c):
    """Print c.generate and what the model of a checkpoint makes of it, as it comes."""
    device = init_runtime(c).device
    model = load_model(find_checkpoint(c.checkpoint, c.checkpoint_dir)[0], device)
    seq_len, mark = model.config.max_seq_len, model.config.vocab_size - 1
    if mark == 256:
        encode, decode = str.encode, bytes
    else:
        encoding = gpt2_encoding()
        encode, decode = encoding.encode_ordinary, encoding.decode_bytes
    tokens, generator = [mark, *encode(c.generate)], seeded(c.seed, "generate")
    out = sys.stdout.buffer  # whatever the terminal's encoding
    out.write(c.generate.encode())
    for _ in range(c.generate_tokens):
        context = torch.tensor([tokens[-seq_len:]], device=device)
        logits = model(context)[0, -1, : mark + 1].cpu()
        odds = torch.softmax(logits / max(c.temperature, 1e-6), 0)
        tokens.append(int(torch.multinomial(odds, 1, generator=generator)))
        if tokens[-1] == mark:
            break
        out.write(decode(tokens[-1:]))
        out.flush()
    out.write(b"\n")
    out.flush()


# ----------------------------------------------------------------------------------------- Train
class Stopped(Exception):
    """A signal ended the run, on all ranks."""


@dataclasses.dataclass
class Batch:
    """A rank's share of an update, made on the CPU. parts: what the model needs, by micro-batch;
    tokens: in all of them; sweeps: as this batch leaves them."""

    parts: list
    tokens: int
    sweeps: dict


def make_batch(run, rows, step, asked):
    """The Batch of rows [rows, T + 1]. asked: rows of the n-gram table that the present cycle has
    asked for so far."""
    model, runtime, parts = run.model, run.runtime, []
    count, micro = len(rows), run.micro[len(rows), rows.shape[1] - 1]
    for first in range(0, count, micro):
        part = rows[first : first + micro]
        arrays = model.prepare(part[:, :-1], runtime.loader_group, training=True)
        number, total = runtime.rank * count + first, count * runtime.world_size
        parts.append(arrays | model.prepare_targets(part[:, 1:], step, number, total))
        if "grams" in arrays:
            asked.append(arrays["grams"].asked)
    if asked and (step + 1) % gradient_cycle(step, run.config) == 0:
        arrays["grams"].merge = model.table.plan_merge(asked)
        asked.clear()
    return Batch(parts, rows[:, 1:].size, dict(model.candidates.places))


def forward_backward(run, batch):
    """Add the gradients of the global mean loss, or of the sum over tokens / 8, a micro-batch at a
    time. Returns this rank's share of the mean."""
    model, world_size = run.model, run.runtime.world_size
    shares = len(batch.parts) * world_size
    size = batch.tokens * world_size / 8 if model.sums_loss else 1.0
    total = 0.0
    for arrays in batch.parts:
        loss = forward(run, model.load(arrays)) / shares
        (size * loss).backward()
        total = total + loss.detach()
    run.sweeps = batch.sweeps
    return total


@contextlib.contextmanager
def norms_in_log(run, due):
    """--log_norms: of gradient, update and weights, a line for each stack of parameters that this
    update moves, named by the first. Not of the n-gram table."""
    every, number = run.config.log_norms, run.step + 1
    if not every or number % every or not run.clock:
        yield
        return
    stacks = [optimizer for optimizer in due if isinstance(optimizer, Optimizer)]
    for optimizer in stacks:
        optimizer.finish()  # its gradients are on their way
    gradients = [at_least_fp32(o.grads[o.own]).norm() for o in stacks]
    before = [at_least_fp32(o.own_weights).clone() for o in stacks]
    yield
    rows = []
    for optimizer, gradient, old in zip(stacks, gradients, before, strict=True):
        new = at_least_fp32(optimizer.own_weights)
        rows.append(torch.stack((gradient, (new - old).norm(), new.norm())))
    norms = run.runtime.sum(torch.stack(rows).square()).sqrt().tolist()
    for optimizer, (gradient, update, weights) in zip(stacks, norms, strict=True):
        size = f"gradient:{gradient:.4e} update:{update:.4e} weights:{weights:.4e}"
        run.log.line(f"norms:{number}/{run.config.steps} {optimizer.name} {size}")


def step_optimizers(run):
    """One optimizer update. All collectives are under way before the first is waited for."""
    due = [optimizer for optimizer in run.optimizers if (run.step + 1) % optimizer.every == 0]
    wte, head = run.model.wte.weight, run.model.lm_head.weight
    ends = any(head is p for optimizer in due for p in optimizer.named.values())
    tied = ends and tied_at(run.step, run.config)
    if tied and head.grad is not None:
        head.grad += wte.grad
        wte.grad = head.grad
    for optimizer in due:
        optimizer.reduce()
    with norms_in_log(run, due):
        for stage in ("step", "finish"):
            for optimizer in due:
                getattr(optimizer, stage)()
    if tied:  # by lm_head's rate
        wte.data.copy_(head.data)


def set_stage(run):
    """Make ready for update number run.step, 0-based."""
    run.model.set_stage(run.step)
    run.model.recompute = stage_at(run.step, run.config)[0].seq_len in run.recomputed
    for optimizer in run.optimizers:
        optimizer.set_stage(run.step)


def random_rows(run, rows, seq_len):
    """[rows, seq_len + 1], of so few tokens that a sampled softmax has them all, as it has a real
    text's: else the warm-up would meet the full one."""
    c, shape = run.config, (rows, seq_len + 1)
    some = min(c.vocab_size, candidates_at(run.step, c) or c.vocab_size)
    return torch.randint(some, shape, generator=seeded("warm-up")).numpy()


def free(run):
    """The memory of a run, whatever the compiler still holds of it."""
    for optimizer in run.optimizers:
        for tensor in optimizer.tensors():
            tensor.untyped_storage().resize_(0)
    for p in run.model.parameters():
        p.grad = None


def misfit(run, work):
    """What the allocator of some rank says of this work, "" where it fits on all. Raises UserError
    where a kernel fits at no size, as attention with wide heads on a small card."""
    line = ""
    try:
        work()
    except torch.OutOfMemoryError as error:
        line = str(error).partition(" If reserved")[0]
    except Exception as error:
        line = "a kernel needs more shared memory than this card has: narrower heads, --n_head"
        fail_if("out of resource" in str(error), f"{line} {2 * run.config.n_head}")
        raise
    if run.runtime.device.type == "cuda":
        gc.collect()  # only here has the error let go of its tensors
        torch.cuda.empty_cache()
    return next(filter(None, run.runtime.gather(line)), "")


def fit_micro_batch(run, rows, seq_len):
    """Set run.micro[rows, seq_len]: what it is, --micro_batch, or all rows that the model takes at
    once; halved while they do not fit into the memory. Last, a model that can recomputes its
    layers."""
    c, model = run.config, run.model
    micro = c.micro_batch or largest_divisor(rows, max(1, 65536 // seq_len))
    micro = run.micro.get((rows, seq_len)) or min(micro, model.rows_at_once or micro)
    fail_if(rows % micro, f"--micro_batch {micro} does not divide the {rows} rows of a rank")
    later = model.table.cycle_bytes(rows * seq_len, run.step) if model.table else 0
    while True:
        parted = c.galore_per_layer and micro < rows
        fail_if(parted, f"--galore_per_layer needs {rows} rows in one micro-batch: lower the batch")
        few, asked = min(rows, 2 * micro), []  # the second one meets memory in pieces
        part = dataclasses.replace(run, micro={(few, seq_len): micro})
        batch = make_batch(part, random_rows(run, few, seq_len), run.step, asked)
        if asked:
            batch.parts[-1]["grams"].merge = model.table.plan_merge(asked)

        def work(part=part, batch=batch):
            waiting = torch.empty(later, dtype=torch.uint8, device=run.runtime.device)
            forward_backward(part, batch)
            del waiting

        line = misfit(run, work)
        if not line:
            run.micro[rows, seq_len] = micro
            return
        if model.table:
            model.table.forget()
        if micro == 1:
            stuck = not model.can_recompute or model.recompute
            fail_if(stuck, f"not even one row of {seq_len} fits into the GPU's memory: {line}")
            run.recomputed.add(seq_len)
            model.recompute = True
        micro = largest_divisor(rows, max(1, micro // 2))


def fit_validation(run):
    """Halve the rows of validation while they do not fit into the memory."""

    def work():
        with torch.no_grad():
            forward(run, validation_inputs(run, random_rows(run, val_rows(run), run.val_len)))

    while line := misfit(run, work):
        small = run.val_len % 2 or run.val_len < 256
        fail_if(small, f"not even a short row of validation fits into the GPU's memory: {line}")
        run.val_len //= 2


def warm_up(c, runtime, log):
    """Compile and run every form that the work takes, before the clock starts. Returns
    (micro, recomputed, val_len), as a Run has them."""
    micro, recomputed, val_len = {}, set(), 0
    while not val_len:
        val_len = run_forms(c, runtime, log, micro, recomputed)
    return micro, recomputed, val_len


def run_forms(c, runtime, log, micro, recomputed):
    """Once through all forms, on random tokens and a model that is then thrown away. Returns
    val_len; or 0, once a form had to save memory in a way that changes the forms before it."""
    run, begun = build(c, runtime), time.perf_counter()
    run.log, run.optimizers, steps = log, make_optimizers(run), stages_of_work(c)
    run.micro, run.recomputed = micro, recomputed
    for method in run.methods:
        method.allocate(run)
    for number, run.step in enumerate(steps, 1):
        seconds = time.perf_counter() - begun
        log.progress(f"warm-up {number} of {len(steps)}, {seconds:.0f} s")
        for method in run.methods:
            method.set_form(run.step, run)
        set_stage(run)
        for optimizer in run.optimizers:
            optimizer.every = 1
        step_optimizers(run)  # first, so that the moments are there when memory is measured
        stage = stage_at(run.step, c)[0]
        rows = stage.batch_tokens // stage.seq_len // runtime.world_size
        before = micro.copy(), recomputed.copy()
        fit_micro_batch(run, rows, stage.seq_len)
        step_optimizers(run)
        if before[0].items() - micro.items() or before[1] != recomputed:
            free(run)
            return 0
    run.model.eval()
    run.model.set_stage(c.steps)
    fit_validation(run)
    free(run)
    return run.val_len


def threads_fight(seconds=0.3):
    """Do the threads of a CPU wait for each other longer than they work? A sum that they share
    takes 10 to 600 us, also beside other programs; 10 ms or more, a time slice of the system, where
    a thread that has a core waits, spinning, for one that has none."""
    threads, sums = torch.get_num_threads(), 0
    x, end = torch.zeros(32768 * threads), time.monotonic() + seconds
    while threads > 1 and time.monotonic() < end:
        x += 1
        sums += 1
    return threads > 1 and seconds / sums > 0.003


def send_loss(run, loss, requests):
    """Sum over ranks the loss and how many were asked to stop and to save, and start to copy all
    to the host."""
    cuda = run.runtime.device.type == "cuda"
    asked = [torch.full_like(loss, float(any(numbers))) for numbers in requests]
    sums = run.runtime.sum(torch.stack((loss, *asked)))
    host = torch.empty(3, pin_memory=cuda, dtype=sums.dtype).copy_(sums, non_blocking=True)
    event = torch.cuda.current_stream().record_event() if cuda else None
    run.late_losses.append((run.step, host, event))


def read_losses(run, late=0):
    """Log all but the newest `late` of them: on a GPU the host reads one update late, so that it
    never waits. Returns (whether to stop, whether to save). Raises UserError if one is not
    finite."""
    stop = save = 0
    while len(run.late_losses) > late:
        step, host, event = run.late_losses.pop(0)
        if event:
            event.synchronize()
        loss, stop_here, save_here = host.tolist()
        stop, save = stop + stop_here, save + save_here
        run.log.loss(step, run.config.steps, "train", loss, run.clock.ms)
    return stop > 0, save > 0


STOP_SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
SAVE_SIGNALS = signal.SIGUSR1, signal.SIGUSR2  # Slurm's warning


class Signals:
    """Signals that came in since the run began; those that are ignored, as under nohup, stay so."""

    def __init__(self):
        self.stop, self.save = [], []
        for numbers, came in ((STOP_SIGNALS, self.stop), (SAVE_SIGNALS, self.save)):
            for number in numbers:
                if signal.getsignal(number) != signal.SIG_IGN:
                    signal.signal(number, functools.partial(self.note, came))

    @staticmethod
    def note(came, number, frame):
        came.append(number)


def training_loop(run, batches, val, signals):
    """From run.step to the end. Returns the last validation loss. Raises Stopped."""
    c, clock, asked, runtime = run.config, run.clock, [], run.runtime
    run.model.candidates.places = dict(run.sweeps)

    def make(step):
        rows = batches.batch_at(step, runtime.rank, runtime.world_size)
        return make_batch(run, rows, step, asked)

    steps = range(run.step, c.steps)
    loader = Loader(make, steps) if runtime.on_gpu else map(make, steps)
    stop = save = False
    clock.switch(on=True)
    while True:
        last = run.step == c.steps
        set_stage(run)
        if last or (c.val_every and run.step % c.val_every == 0):
            read_losses(run)
            clock.switch(on=False)
            run.log.loss(run.step, c.steps, "val", val_loss := evaluate(run, val), clock.ms)
            if last:
                return val_loss
            clock.switch(on=True)
        loss = forward_backward(run, next(loader))
        if run.step == steps.start and runtime.device.type == "cuda":
            torch.cuda.empty_cache()  # else the moments break up the memory of activations
        step_optimizers(run)
        run.step += 1
        for method in run.methods:
            method.after_step(run.step, run)
        send_loss(run, loss, (signals.stop, signals.save))
        signals.save.clear()
        asked_now = read_losses(run, late=int(runtime.on_gpu))
        stop, save = stop or asked_now[0], save or asked_now[1]
        run.log.progress(progress_line(run))
        if run.step % gradient_cycle(run.step, c) == 0:  # no gradients on their way
            save = save or checkpoint_due(run.step, c)
            if stop or save:
                read_losses(run)
                with clock.paused():
                    save_checkpoint(run)
                save = False
            if stop:
                raise Stopped


def checkpoint_due(step, c):
    """Has --checkpoint_every passed since the cycle before?"""
    every, cycle = c.checkpoint_every, gradient_cycle(step, c)
    return every > 0 and step < c.steps and step // every > (step - cycle) // every


# Peak of dense bfloat16 matmuls, TFLOP/s, by the makers' data sheets
PEAK_TFLOPS = {
    "B200": 2250,
    "H100": 989,
    "H200": 989,
    "A100": 312,
    "L40S": 362,
    "5090": 209,
    "4090": 165,
    "3090": 71,
}


def speed(run, seconds, tokens):
    """Tokens per second and, on a card whose peak is known, the share of it that the model uses."""
    rate = tokens / max(seconds, 1e-9)
    name, cards = run.log.facts["device"], run.runtime.world_size
    peak = next((peak for card, peak in PEAK_TFLOPS.items() if card in name), None)
    text = f"{rate:,.0f} tokens/s"
    if peak and run.config.bf16:
        text += f", {rate * run.flops / (1e12 * peak * cards):.0%} MFU"
    return text


def progress_line(run):
    c, ms = run.config, run.clock.ms
    pace = ms / run.step
    left = pace * (c.steps - run.step) / 1000
    tokens = stage_at(run.step, c)[0].batch_tokens
    return (
        f"{run.step}/{c.steps} {pace:.0f} ms {left:.0f} s left, {speed(run, pace / 1000, tokens)}"
    )


def peak_memory(runtime):
    """Bytes: of the GPU, or of this process."""
    if runtime.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        import resource  # not on every system
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def tokens_of(c):
    return sum(stage.steps * stage.batch_tokens for stage in c.stages)


def result_of(run, val_loss, warmup_ms):
    """The log's last line."""
    c, ms = run.config, run.clock.ms
    return run.log.facts | dict(
        preset=c.preset,
        seed=c.seed,
        steps=c.steps,
        tokens=tokens_of(c),
        val_loss=round(val_loss, 6),
        target_val_loss=c.target,
        target_reached=val_loss <= c.target,
        train_time_ms=round(ms),
        step_avg_ms=round(ms / c.steps, 3),
        warmup_ms=round(warmup_ms),
        peak_memory_bytes=peak_memory(run.runtime),
        flops_per_token=run.flops,
        param_count=run.model.numel(),
        optimizer_state_bytes=sum(optimizer.state_bytes() for optimizer in run.optimizers),
    )


def open_data(c):
    """(Batches, validation Shards, hashes). Raises UserError where validation tokens are too few
    or trained on."""
    shards = Shards(c.train_files, "train_files", c.vocab_size - 1)
    val = Shards(c.val_files, "val_files", c.vocab_size - 1)
    batches, hashes = Batches(shards, c), (shards.hashes(), val.hashes())
    have = val.count(c.val_len) * c.val_len
    line = f"{c.val_files} holds {have:,} tokens in whole rows, --val_tokens are {c.val_tokens:,}"
    fail_if(have < c.val_tokens, line)
    trained, validated = (set(map(os.path.realpath, s.paths)) for s in (shards, val))
    shared = trained & validated
    fail_if(shared, f"--val_files and --train_files share {shared}: validate on other tokens")
    same_name = hashes[0].keys() & hashes[1].keys()  # by which the log tells them apart
    fail_if(same_name, f"{same_name}: --val_files need other names than --train_files; rename them")
    return batches, val, hashes[0] | hashes[1]


def check_ranks_agree(runtime, facts):
    """Raises UserError with the names of facts that are not the same on all ranks."""
    odd = {k for theirs in runtime.gather(facts) for k in facts if theirs[k] != facts[k]}
    fail_if(odd, f"ranks differ in {odd}: give all of them the same files and flags")


def check_folders(c):
    """Before anything is written. Raises UserError."""
    for flag in ("log_dir", "checkpoint_dir"):
        path = Path(getattr(c, flag)).absolute()
        place = next(filter(os.path.exists, (path, *path.parents)))
        fits = os.path.isdir(place) and os.access(place, os.W_OK | os.X_OK)
        fail_if(not fits, f"--{flag} {path}: {place} is not a folder that can be written to")


def train(c, runtime, argv):
    """A whole run, from the shards to the result line."""
    batches, val, data = open_data(c)
    path, state = find_resumption(c, data) if c.resume else ("", {})
    saving = {"checkpoint_every": c.checkpoint_every, "the step of --resume": state.get("step")}
    check_ranks_agree(runtime, identity(c, data) | saving)
    check_folders(c)
    log, begun = Log(c, runtime, argv, data), time.perf_counter()
    log.line(f"{c.preset}: {c.steps} steps, {tokens_of(c):,} tokens", echo=True)
    cuda = runtime.device.type == "cuda"
    if cuda:  # what fits now must still fit later
        limit = torch.cuda.get_per_process_memory_fraction()
        torch.cuda.set_per_process_memory_fraction(0.9 * limit)
    micro, recomputed, val_len = warm_up(c, runtime, log)
    if cuda:
        torch.cuda.set_per_process_memory_fraction(limit)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    warmup_ms = 1000 * (time.perf_counter() - begun)
    run = build(c, runtime)
    run.optimizers, run.flops = make_optimizers(run), run.model.flops_per_token()
    run.micro, run.recomputed, run.val_len = micro, recomputed, val_len
    run.clock, run.log, run.data = Clock(runtime), log, data
    run.folder = Path(c.checkpoint_dir, log.path.stem)
    log.line(run_facts(run, warmup_ms), echo=True)
    if not runtime.on_gpu and threads_fight():
        line = "other programs use these cores, and the threads wait for each other: steps take up "
        line += "to ten times as long; set OMP_WAIT_POLICY=PASSIVE or OMP_NUM_THREADS=1"
        log.line(line, echo=True)
    if state:
        resume(run, path, state)
        state = None  # its memory is free
    for method in run.methods:
        method.allocate(run)
    gc.collect()
    gc.freeze()  # what is there will stay: no collection looks at it again
    signals = Signals()
    try:
        val_loss = training_loop(run, batches, val, signals)
    except Stopped:
        path = newest_checkpoint(run)
        hint = f"go on with --resume {path}" if path else "no checkpoint could be written"
        log.line(f"stopped by a signal after step {run.step}; {hint}", echo=True)
        raise Stopped(*signals.stop) from None
    finally:
        gc.enable()
        gc.unfreeze()
    save_checkpoint(run)
    log.line(json.dumps(result_of(run, val_loss, warmup_ms)))
    log.show(closing_lines(run, val_loss))


def run_facts(run, warmup_ms):
    parts = [f"{run.model.numel():,} parameters"]
    if run.config.model == "gpt2026":
        parts.append(f"table of {run.config.table_rows:,} rows{pricing(run.config)}")
    if run.recomputed:
        lengths = " and ".join(map(str, sorted(run.recomputed)))
        parts.append(f"layers recomputed in rows of {lengths} to save memory")
    if run.val_len < run.config.val_len:
        parts.append(f"validation in rows of {run.val_len} to save memory")
    micro = {f"{rows}x{seq_len}": micro for (rows, seq_len), micro in run.micro.items()}
    parts.append(f"micro-batches {micro}")
    return f"{', '.join(parts)}; warm-up {warmup_ms:.0f} ms, not in train_time"


def pricing(c):
    """What must be said where the n-gram table is not the record's."""
    if c.model != "gpt2026" or c.table_rows == max(TABLE_ROWS):
        return ""
    return ", steps priced from the public ablation, not shown"


def closing_lines(run, val_loss):
    c, seconds = run.config, run.clock.seconds
    gap = c.target - val_loss
    outcome = f"target {c.target:.4f} {'reached' if gap >= 0 else 'missed'} by {abs(gap):.4f}"
    pace, path = speed(run, seconds, tokens_of(c)), newest_checkpoint(run)
    line = f"val_loss {val_loss:.4f}, {outcome} in {seconds:.1f} s of training ({pace})"
    line += f"{pricing(c)} | log {run.log.path}"
    sample = f'\nsample from it: ./run.sh --generate "..." --checkpoint {path}'
    return line + sample if path else line


def start(argv):
    """Train, or sample. Raises whatever goes wrong."""
    gpu = torch.accelerator.is_available()
    c = parse_config(argv, "gpt2_small" if gpu else "laptop")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
    idle = glob.glob("/dev/nvidia[0-9]*") and not gpu and not hidden and c.device == "auto"
    fail_if(idle, f"{UNUSABLE} (torch {torch.__version__} finds none)")
    if c.generate is not None:
        return generate(c)
    runtime = init_runtime(c)
    train(resolve(c, runtime), runtime, argv)
    if runtime.world_size > 1:
        dist.destroy_process_group()


def close_stdout():
    """Python itself would complain, at its end, of what no reader is left for."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(argv=None):
    """Exit code: 0 done, 2 a user's mistake in one line, 1 a bug with its traceback, 128 + n
    stopped by signal n. Under torchrun `record` takes notes: the first error of all ranks is shown
    there."""
    if hasattr(sys.stdout, "reconfigure"):  # a terminal may not know all letters
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        record(start)(sys.argv[1:] if argv is None else argv)
        return 0
    except Stopped as stopped:
        return 128 + max(stopped.args, default=signal.SIGTERM)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except UserError as error:
        code, text = 2, f"train_gpt.py: {error}"
    except BrokenPipeError:  # the reader has enough: --help | head
        return 0
    except Exception:
        code, text = 1, traceback.format_exc()
    finally:
        close_stdout()
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        print(text, file=sys.stderr, flush=True)
    return code


# --------------------------------------------------------------------------------------- Methods
def make_methods(c):
    on = {ReLoRA: c.relora, GaLore: c.galore, SuPar: c.sparsity or c.mup_base_width}
    on |= {TailAverage: c.tail_average, LAWA: c.lawa}  # last: it sees what the others did
    return [method(c) for method in on if on[method]]


class LoRALinear(Linear):
    """y = x Wᵀ + s·(x Aᵀ) Bᵀ: W frozen, A [r, in], B [out, r] zero at first, so nothing changes."""

    def __init__(self, linear, rank, scale):
        super().__init__(linear.n_in, linear.n_out, transposed=linear.transposed)
        self.weight, self.scale = linear.weight.requires_grad_(False), scale
        self.weight.grad = None
        self.A = parameter(self.weight.new_zeros(rank, self.n_in), "matrix", bank="A")
        self.B = parameter(self.weight.new_zeros(self.n_out, rank), "matrix", bank="B")

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
    def set_form(self, step, run):
        c, model = self.config, run.model
        if step < c.relora_warm_start or adapters(model):
            return
        modules = dict(model.named_modules())
        for name, p in list(model.named_parameters()):
            if p.group == "matrix":
                path = name.removesuffix(".weight")
                unknown = type(modules.get(path)) is not Linear
                fail_if(unknown, f"--relora does not know {name}: make it a Linear")
                model.set_submodule(path, LoRALinear(modules[path], c.relora, c.relora_scale))
        matrices = {name: p for name, p in model.named_parameters() if name[-2:] in (".A", ".B")}
        others = [o for o in run.optimizers if not o.trains_matrices]  # the frozen matrices' go
        run.optimizers = others + stack_matrices(matrices, run)

    @torch.no_grad()
    def after_step(self, step, run):
        c, since = self.config, step - self.config.relora_warm_start
        self.set_form(step, run)  # at the end of the warm start
        if since < 0 or since % c.relora_interval or step == c.steps:
            return
        for name, layer in adapters(run.model).items():
            layer.weight.copy_(layer.merged())
            uniform_(layer.A, layer.n_in**-0.5, seeded(c.seed, "relora", step, name))
            layer.B.zero_()
        for optimizer in run.optimizers:
            if optimizer.trains_matrices:
                optimizer.steps, optimizer.state = 0, {}


class EightBit:
    """Moments in float8 with an fp32 scale per row (after 8-bit Adam, arXiv 2110.02861), the second
    as its root: a range of 2^36, not 2^18. In fp32 during a step."""

    def moment(self, name, like):
        if name in self.state and name not in self.opened:
            values = self.state[name].view(torch.float8_e4m3fn).float()
            values = values * self.state[name + "_scale"]
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
        p.register_post_accumulate_grad_hook(self.arrived)

    def arrived(self, p):
        self.grads = self.runtime.sum(p.grad).view_as(self.weights)
        super().step()
        p.grad = None

    def reduce(self): ...

    def step(self): ...  # it has happened


class GaLore(Method):
    """Gradients, and so the optimizer's state, in a low-rank space (arXiv 2403.03507): the inner
    optimizer sees G P (or PᵀG), P the gradient's leading singular vectors on its shorter side,
    renewed every interval; its update is projected back and scaled. At a refresh the moments move
    to the new basis (as in LDAdam, arXiv 2410.16103): the first by C = P_oldᵀ P_new, the second by
    C squared. The paper's inner optimizer is --matrix_optimizer adam."""

    transforms = True

    def __init__(self, c):
        super().__init__(c)
        fail_if(c.matrix_optimizer == "anvil", "--galore needs --matrix_optimizer adam or muon")

    def wraps(self, rule):
        c = self.config
        mixins = (PerLayer,) * c.galore_per_layer + (EightBit,) * (c.galore_bits == 8)
        return type(f"GaLore{rule.__name__}", (*mixins, rule), {})

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
        for name in {"exp_avg", "exp_avg_sq", "momentum", "fast", "slow"} & state.keys():
            turn = change.square() if name == "exp_avg_sq" else change
            moment = optimizer.moment(name, None)
            moment.copy_(moment @ turn if tall else turn.mT @ moment)


class LAWA(Method):
    """Latest weight averaging: the mean of the last k snapshots, one every interval (arXiv
    2306.03241). eval: validate on it, train on untouched; replace: train on from it, too. ReLoRA's
    adapters are averaged merged (W + s·B A, with B = 0). An n-gram table is not averaged."""

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
            replace_weights(model, self.eval_weights(model))

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


class TailAverage(Method):
    """The run ends on averages of its last quarter's weights, each kind's norm restored (record
    92). Every rank averages its own rows; the averages are a part of the optimizers' state."""

    ENDS = "wte", "wte_2026", "lm_head", "lm_head_2026"
    TABLES = "value_embeds", "value_tables"
    MATRICES = "qk", "vo", "mlp"
    AVERAGES = {"ends": ENDS, "short": ("vo", "mlp", *TABLES), "long": MATRICES}
    # Of each average and kind: the share of it that the run ends on
    SHARES = {"ends": 0.65, "short": 1.0, "qk": 0.55, "vo": 0.55 - 0.2007, "mlp": 0.55 - 0.2007}

    def __init__(self, c):
        super().__init__(c)
        self.room = {}  # {(optimizer, average): memory for it}

    def allocate(self, run):
        for optimizer in run.optimizers:
            for name, banks in self.AVERAGES.items():
                if optimizer.bank in banks and f"tail_{name}" not in optimizer.state:
                    own = optimizer.own_weights
                    dtype = torch.promote_types(own.dtype, torch.float32)
                    self.room[optimizer.name, name] = torch.empty_like(own, dtype=dtype)

    def rates(self, bank, step):
        """{average: rate at which it moves to the weights after update `step`}, 0-based."""
        c, n, found = self.config, self.config.steps, {}
        tail, short = scaled(298, c), scaled(250, c)
        begins, recent = step == n - tail, step >= n - short
        if bank in self.ENDS and step >= n - tail and (step % 2 == 1 or begins):
            rate = 2 / (tail + 1)
            once = begins or step == n - 1
            found["ends"] = rate if once else 1 - (1 - rate) ** 2
        if bank in ("vo", "mlp") and recent and (n - 1 - step) % 4 == 0:
            found["short"] = 4 / 53
        if bank in self.TABLES and recent and (step + 1) % gradient_cycle(step, c) == 0:
            found["short"] = 4 / 53
        if bank in self.MATRICES and step >= n - tail and (step % 4 == 1 or step >= n - 2):
            found["long"] = 2 / (tail // 4 + 1)
        return found

    @torch.no_grad()
    def after_step(self, step, run):
        for optimizer in run.optimizers:
            for name, rate in self.rates(optimizer.bank, step - 1).items():
                own, key = at_least_fp32(optimizer.own_weights), f"tail_{name}"
                if key not in optimizer.state:
                    room = self.room.pop((optimizer.name, name), None)
                    optimizer.state[key] = own.clone() if room is None else room.copy_(own)
                optimizer.state[key].lerp_(own, rate)
        if step == self.config.steps:
            self.end_on_averages(run)

    def end_on_averages(self, run):
        averaged = [o for o in run.optimizers if o.bank in self.ENDS + self.TABLES + self.MATRICES]
        before = self.squares(averaged, run)
        for optimizer in averaged:
            own = optimizer.own_weights
            for name in ("ends", "short", "long"):
                if f"tail_{name}" in optimizer.state:
                    share = self.SHARES.get(name) or self.SHARES[optimizer.bank]
                    average = optimizer.state.pop(f"tail_{name}")
                    own.copy_(torch.lerp(at_least_fp32(own), average, share))
        after = self.squares(averaged, run)
        for optimizer in averaged:
            if optimizer.bank not in self.TABLES:
                ratio = before[optimizer.bank] / after[optimizer.bank]
                optimizer.own_weights.mul_(ratio.sqrt())
            optimizer.gather()
        for optimizer in averaged:
            optimizer.finish()

    def squares(self, optimizers, run):
        """{kind: sum of squares of all its weights}."""
        sums = {}
        for optimizer in optimizers:
            square = at_least_fp32(optimizer.own_weights).square().sum()
            sums[optimizer.bank] = sums.get(optimizer.bank, 0.0) + square
        return {bank: run.runtime.sum(total.clone()) for bank, total in sums.items()}


class SuPar(Method):
    """SuPar, sparse maximal update parameterization (arXiv 2405.15743); at sparsity 0 it is muP
    (arXiv 2203.03466). Static random masks of density rho on the hidden matrices. With m_d = width
    / base width: hidden init variance 1 / rho (the fan-in init holds 1 / m_d), Adam's hidden rate 1
    / (m_d rho), logits 1 / m_d, scores 1 / head_dim (as they are at 64). Muon, found here: one
    spectral norm at every width, so no m_d; the unmasked gradient is orthogonalised (a masked one
    has no leading direction left), and the rate times rho ** -0.25 keeps the best rate in place
    (records/methods)."""

    transforms = True
    MUON_POWER = 0.25

    @torch.no_grad()
    def attach(self, model):
        c, self.masks = self.config, {}
        m_d, density = c.n_embd / (c.mup_base_width or c.n_embd), 1 - c.sparsity
        factors = {"adam": 1 / (m_d * density), "muon": density**-self.MUON_POWER}
        for name, p in model.named_parameters():
            if p.group == "matrix":
                p.lr_mult *= factors[c.matrix_optimizer]
                drawn = torch.rand(p.shape, generator=seeded(c.seed, "mask", name))
                self.masks[name] = drawn < density
                p.mul_(self.masks[name]).mul_(density**-0.5)
        model.output_scale = 1 / m_d
        if c.mup_base_width:
            model.set_score_scale(8 * (c.n_embd // c.n_head) ** -0.5)

    def lift(self, optimizer, u):
        if "mask" not in optimizer.state:
            shape = optimizer.weights.shape[1:]
            masks = [self.masks[name].reshape(-1, *shape) for name in optimizer.named]
            optimizer.state["mask"] = optimizer.stack(masks)[optimizer.own]
        return u * optimizer.state["mask"]


if __name__ == "__main__":
    sys.exit(main())
