"""Run the model and the optimizers of a public speedrun script on a CPU, without its kernels.

A record's log begins with the source of the script that wrote it. That source is parsed, rewritten
by the rules below and executed statement by statement up to its training loop, which `Peer`
replaces: one step at a time, with batches of the caller's choice. No line of a script stands here.

The rewriting (`Exact`, `Rewrite`) and the stand-ins for kernels (`STAND_INS`) are what is *not*
compared: kernels, rounding to bf16 and FP8, communication, data loader, warm-up before the clock.
The scripts are the work of the contributors of github.com/KellerJordan/modded-nanogpt.
"""

import ast
import re
import warnings
from dataclasses import dataclass
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from data.shards import refuse_irregular
from records.tools.command import BadInput


@dataclass(frozen=True)
class Row:
    """inputs, targets: int64 [T]."""

    inputs: Tensor
    targets: Tensor


# ---------------------------------------------------------------------------------------- stand-ins
ONE_PROCESS = SimpleNamespace(
    is_initialized=lambda: True,
    get_world_size=lambda: 1,
    get_rank=lambda: 0,
    all_reduce=lambda tensor, **_: None,
    ReduceOp=SimpleNamespace(AVG=0, SUM=1),
)


@dataclass(frozen=True)
class StandIn:
    """A name that the scripts import or define, what takes its place here, and why that is fair."""

    name: str
    value: object
    why: str


STAND_INS = (
    StandIn("dist", ONE_PROCESS, "one process: a sum or mean over processes is its input"),
    StandIn(
        "DDP",
        lambda model, **_: SimpleNamespace(module=model),
        "one process: the model without its wrapper",
    ),
)
BY_NAME = {stand_in.name: stand_in.value for stand_in in STAND_INS}


def exactly(x):
    """In the place of .bfloat16() and .float(): a copy, as scripts go on to change it in place."""
    dtype = torch.get_default_dtype()
    return x.to(dtype, copy=True) if torch.is_tensor(x) else x.to(dtype)


def helpers() -> dict:
    """Names that the rewritten script uses."""
    return {
        "_stand_ins": BY_NAME,
        "_exactly": exactly,
        "_environment": dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1"),
    }


# ---------------------------------------------------------------------------------------- rewriting
RULES = {  # what Exact and Rewrite do to a script, and why
    "bfloat16, float32": "one precision, the comparison's: rounding is not compared",
    "F.rms_norm without eps": "the epsilon that it has in fp32 and in bf16 is written out",
    "cuda": "cpu",
    "torch.compile": "left out: plain PyTorch computes the same",
    "os.environ": "one process",
    "sizes, lengths of phases": "small",
    "training loop, data loader, warm-up": "not executed: Peer takes one step at a time",
}


def dotted(node) -> str:
    """ "a.b.c" for the expression a.b.c or its call a.b.c(...); "" for anything else."""
    if isinstance(node, ast.Call):
        return dotted(node.func)
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def named(text: str) -> ast.Name:
    return ast.Name(text, ast.Load())


class Exact(ast.NodeTransformer):
    """One precision for all: PyTorch's default, which the caller sets, for bf16 and fp32.

    RMSNorm keeps the epsilon that it has in fp32 and in bf16, where none is given.
    """

    EPSILON = torch.finfo(torch.float32).eps
    HALF_AND_SINGLE = ("torch.bfloat16", "torch.float32")

    def visit_Call(self, node):
        self.generic_visit(node)
        if getattr(node.func, "attr", "") in ("bfloat16", "float") and not node.args:
            return ast.Call(named("_exactly"), [node.func.value], [])
        if dotted(node) == "F.rms_norm" and len(node.args) + len(node.keywords) == 2:
            node.keywords.append(ast.keyword("eps", ast.Constant(self.EPSILON)))
        return node

    def visit_Attribute(self, node):
        self.generic_visit(node)
        if dotted(node) in self.HALF_AND_SINGLE:
            return ast.Call(ast.Attribute(named("torch"), "get_default_dtype", ast.Load()), [], [])
        return node


class Rewrite(Exact):
    """From a script for 8 GPUs to one for a CPU, and to a small model."""

    def __init__(self, sizes: dict):
        self.sizes = sizes

    def visit_FunctionDef(self, node):
        marks = node.decorator_list
        node.decorator_list = [mark for mark in marks if dotted(mark) != "torch.compile"]
        return self.generic_visit(node)

    def visit_Call(self, node):
        node = super().visit_Call(node)
        called = dotted(node.func)
        if called == "torch.compile":
            return node.args[0]
        if getattr(node.func, "attr", "") == "cuda" and not node.args:
            return node.func.value
        if called == "GPTConfig":
            for word in node.keywords:
                if word.arg in self.sizes:
                    word.value = ast.Constant(self.sizes[word.arg])
        return node

    def visit_Attribute(self, node):
        node = super().visit_Attribute(node)
        return named("_environment") if dotted(node) == "os.environ" else node

    def visit_Constant(self, node):
        return ast.Constant("cpu") if node.value == "cuda" else node

    def visit_JoinedStr(self, node):
        on_gpu = getattr(node.values[0], "value", None) == "cuda:"
        return ast.Constant("cpu") if on_gpu else self.generic_visit(node)


def names_bound(node) -> list[str]:
    """The names that a statement at the top of a script binds; none for one that only acts."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [alias.asname or alias.name.split(".")[0] for alias in node.names]
    targets = []
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign):
        targets = [node.target]
    flat = [part for target in targets for part in getattr(target, "elts", [target])]
    return [part.id for part in flat if isinstance(part, ast.Name)]


def execute(source: str, sizes: dict, settle) -> dict:
    """Execute a script's imports, definitions and assignments up to its finished optimizers.

    sizes: arguments of its GPTConfig. settle(args): called when hyperparameters are made.
    Returns the script's names. Raises BadInput where a statement fails.
    """
    space = {"__name__": "peer"} | helpers()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes in the script's docstrings
        body = Rewrite(sizes).visit(ast.parse(source)).body
    left_out = {"train_loader", "val_loader"}  # and what is made from them
    for node in body:
        bound = names_bound(node)
        if {"initial_state", "training_time_ms"} & set(bound):
            break  # the training proper begins here
        used = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
        if not bound or isinstance(node, ast.Assign) and left_out & used:
            left_out |= set(bound)
        else:
            run_statement(node, space)
        space.update({known: BY_NAME[known] for known in bound if known in BY_NAME})
        if bound == ["args"]:
            settle(space["args"])
    return space


def run_statement(node, space: dict):
    statement = ast.fix_missing_locations(ast.Module([node], []))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of autocast, which scripts of 2024 prepare on a CPU
            exec(compile(statement, "the public script", "exec"), space)
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        line = f"line {node.lineno} of the script cannot be run here ({what})"
        raise BadInput(f"{line}; this tool knows the scripts that its --help names") from error


def source_of(log: str) -> str:
    """The training script in a log, or in a file that is one. Raises BadInput without one."""
    refuse_irregular(log)
    with open(log, encoding="utf-8", errors="replace") as file:
        parts = re.split(r"^={100}$", file.read(), flags=re.M)
    for part in parts:
        if re.search(r"^class GPT\(", part, flags=re.M):
            return part
    raise BadInput(f"{log}: holds no training script; give a record's own log from the public site")


# -------------------------------------------------------------------------------------------- peers
class Peer:
    """A public script, one step at a time: rows of one length, the mean loss, four optimizers with
    one schedule."""

    def __init__(self, space: dict, warmup: int):
        """warmup: updates of Muon's momentum warm-up, a number in the script's loop; 0: none."""
        self.script, self.model, self.warmup = space, space["raw_model"], warmup

    def tensors(self, kind: str = "data") -> dict[str, Tensor]:
        """{name: weight}, or with kind="grad" {name: gradient}: zeros where there is none."""
        found = {}
        for label, weight in self.model.named_parameters():
            value = getattr(weight, kind)
            found[label] = torch.zeros_like(weight) if value is None else value
        return found

    @torch.no_grad()
    def shake(self, generator: torch.Generator):
        """Move all weights off their first values: behind a 0 or a 1 errors hide."""
        for weight in self.model.parameters():
            scale = 0.02 if weight.ndim > 1 else 0.1
            weight.add_(scale * torch.randn(weight.shape, generator=generator))

    @torch.no_grad()
    def logits(self, row: Row) -> Tensor:
        """[T, vocabulary]: capped, as they go into the cross-entropy of an evaluation."""
        self.model.eval()
        with mock.patch.object(F, "cross_entropy", wraps=F.cross_entropy) as spy:
            self.forward([row])
        logits = spy.call_args.args[0]
        return logits.reshape(-1, logits.size(-1))

    def begin(self, step: int):
        share = min(step / self.warmup, 1) if self.warmup else 1
        momentum = (1 - share) * 0.85 + share * 0.95
        self.script["optimizer3"].param_groups[0]["momentum"] = momentum

    def stage(self, step: int) -> dict:
        """What is in force at a step: what the table says where it changes."""
        args = self.script["args"]
        cooling = step > args.num_iterations - args.warmdown_iters
        return {"momentum warm": step >= self.warmup, "rates falling": cooling}

    def forward(self, rows: list[Row]) -> Tensor:
        inputs = torch.stack([row.inputs for row in rows])
        targets = torch.stack([row.targets for row in rows])
        return self.model(inputs, targets)

    def backward(self, rows: list[Row]) -> float:
        """Add the gradients of a batch; its training loss per token."""
        self.model.train()
        loss = self.forward(rows)
        loss.backward()
        return loss.item()

    def update(self, step: int):
        for optimizer in self.script["optimizers"]:
            optimizer.step()
        for schedule in self.script["schedulers"]:
            schedule.step()
        self.model.zero_grad(set_to_none=True)
