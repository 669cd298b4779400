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

GPUS = 8  # of the records' machine: each has a row of every batch; gradients are means over them


@dataclass(frozen=True)
class Row:
    """What one GPU sees of a batch. inputs, targets: int64 [T]; starts: places of documents."""

    inputs: Tensor
    targets: Tensor
    starts: Tensor

    @property
    def ends(self) -> Tensor:
        """int32: where documents begin, then the row's length: the form of packed attention."""
        length = self.starts.new_tensor([len(self.inputs)])
        return torch.cat([self.starts, length]).int()


# ---------------------------------------------------------------------------------------- stand-ins
def visible(ends: Tensor, length: int, window: int) -> Tensor:
    """bool [query, key]: is the key of the query's document, and at most `window` places back?"""
    place = torch.arange(length)
    document = torch.searchsorted(ends[1:].contiguous().long(), place, right=True)
    back = place[:, None] - place[None, :]
    return (back >= 0) & (back <= window) & (document[:, None] == document[None, :])


def attention(q, k, v, cu_seqlens_q, softmax_scale, window_size, causal=True, **sizes):
    """FlashAttention on packed documents: q, k, v [T, H, D] -> [T, H, D]."""
    assert causal and window_size[1] == 0
    seen = visible(cu_seqlens_q, len(q), window_size[0])
    products = torch.einsum("qhd,khd->hqk", q, k) * softmax_scale
    probabilities = products.masked_fill(~seen, float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", probabilities, v).contiguous()


def softcapped_loss(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """[T]: sum over k of weights[k] * cross-entropy with the target k places on, if it has one."""
    capped = 23 * torch.sigmoid((logits + 5) / 7.5)
    total = capped.new_zeros(len(capped))
    for k, weight in enumerate(weights):
        count = len(capped) - k
        loss = F.cross_entropy(capped[:count], targets[k:], reduction="none")
        total = total + F.pad(weight * loss, (0, k))
    return total


def cautious_update(weight, hidden_bits, update, decay, rate):
    """Step and decay, the decay only where update and weight do not disagree in sign."""
    agree = update * weight >= 0
    weight.sub_(weight * agree * decay * rate + update * rate)


FLASH = SimpleNamespace(flash_attn_varlen_func=attention)
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
    StandIn(
        "get_kernel",
        lambda *_, **__: SimpleNamespace(flash_attn_interface=FLASH),
        "FlashAttention 3 needs an H100: softmax over a mask made of the documents' ends",
    ),
    StandIn("XXT", lambda x, out: torch.matmul(x, x.mT, out=out), "a Triton kernel: X Xᵀ"),
    StandIn(
        "ba_plus_cAA",
        lambda a, alpha, beta, out: out.copy_(beta * a + alpha * (a @ a)),
        "a Triton kernel: b A + c A A",
    ),
    StandIn(
        "FusedLinearReLUSquareFunction",
        SimpleNamespace(apply=lambda x, up, down: F.linear(x, up).relu().square() @ down),
        "a Triton kernel: the MLP with relu(x)^2",
    ),
    StandIn(
        "FusedSoftcappedCrossEntropy",
        SimpleNamespace(apply=softcapped_loss),
        "a Triton kernel: soft cap and cross-entropies",
    ),
    StandIn(
        "_cautious_wd_and_update_inplace",
        staticmethod(cautious_update),
        "bf16 weights with 16 hidden bits are fp32 numbers: the same rule on whole ones",
    ),
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
        "_environment": dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", DISABLE_FP8="1"),
    }


# ---------------------------------------------------------------------------------------- rewriting
RULES = {  # what Exact and Rewrite do to a script, and why
    "bfloat16, float32": "one precision, the comparison's: rounding is not compared",
    "F.rms_norm without eps": "the epsilon that it has in fp32 and in bf16 is written out",
    "cuda, pinned memory": "cpu",
    "torch.compile, Triton kernels": "left out: plain PyTorch computes the same",
    "x[:, 1:] = x[:, :-1]": "the right side is read first, as when compiled",
    "os.environ": "one process, FP8 switched off; the 8 GPUs' rows come in turn, as scripts allow",
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

    KERNEL_MARKS = ("triton.jit", "torch.library.custom_op")

    def __init__(self, sizes: dict):
        self.sizes = sizes

    def visit_ClassDef(self, node):
        """A method that has a stand-in is replaced in its class, too."""
        node = self.generic_visit(node)
        for index, part in enumerate(node.body):
            if getattr(part, "name", "") in BY_NAME:
                target = ast.Name(part.name, ast.Store())
                value = ast.Subscript(named("_stand_ins"), ast.Constant(part.name), ast.Load())
                node.body[index] = ast.Assign([target], value)
        return node

    def visit_FunctionDef(self, node):
        """Kernels and their registration go, and torch.compile: plain PyTorch remains."""
        marks = [dotted(mark) for mark in node.decorator_list]
        if any(mark in self.KERNEL_MARKS or mark.endswith(".register_fake") for mark in marks):
            return None
        kept = zip(node.decorator_list, marks, strict=True)
        node.decorator_list = [mark for mark, text in kept if text != "torch.compile"]
        return self.generic_visit(node)

    def visit_Call(self, node):
        node = super().visit_Call(node)
        called, method = dotted(node.func), getattr(node.func, "attr", "")
        first = dotted(node.args[0]) if len(node.args) == 1 else ""
        if called == "torch.compile":
            return node.args[0]
        if method == "cuda" and not node.args or method == "view" and first == "torch.uint16":
            return node.func.value
        node.keywords = [word for word in node.keywords if word.arg != "pin_memory"]
        if called in ("GPT", "GPTConfig"):
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

    def visit_Assign(self, node):
        """x[a] = x[b] of overlapping slices: compiled, the right is read first; so it is here."""
        self.generic_visit(node)
        left, right = node.targets[0], node.value
        slices = isinstance(left, ast.Subscript) and isinstance(right, ast.Subscript)
        if (
            slices
            and isinstance(left.slice, ast.Tuple)
            and dotted(left.value) == dotted(right.value)
        ):
            node.value = ast.Call(ast.Attribute(right, "clone", ast.Load()), [], [])
        return node


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


def is_of_kernels(node) -> bool:
    """An import of Triton, of kernels or of the compiler: nothing of it is needed, or installed."""
    if isinstance(node, ast.ImportFrom):
        origin = node.module or ""
    elif isinstance(node, ast.Import):
        origin = node.names[0].name
    else:
        return False
    parts = origin.split(".")
    return parts[0] in ("triton", "tiktoken") or parts[-1].endswith(("kernels", "_dynamo"))


def execute(source: str, sizes: dict, settle) -> dict:
    """Execute a script's imports, definitions and assignments up to its finished optimizers.

    sizes: arguments of its GPT or GPTConfig. settle(args): called when hyperparameters are made.
    Returns the script's names. Errors: BadInput where a statement fails.
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
        elif is_of_kernels(node):
            space.update(dict.fromkeys(bound))
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
    """The training script in a record's log, or in a file that is one; without its kernel files.

    Errors: BadInput where there is none.
    """
    refuse_irregular(log)
    with open(log, encoding="utf-8", errors="replace") as file:
        parts = re.split(r"^={100}$", file.read(), flags=re.M)
    for part in parts:
        if re.search(r"^class GPT\(", part, flags=re.M):
            return re.split(r"^-{40}\n# \S+\.py\n-{40}$", part, flags=re.M)[0]
    raise BadInput(f"{log}: holds no training script; give a record's own log from the public site")


# -------------------------------------------------------------------------------------------- peers
class Peer:
    """A public script, one step at a time. Subclasses know how scripts of a time are run."""

    model_name: str

    def __init__(self, space: dict):
        self.script, self.model = space, space[self.model_name]

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


class Peer2024(Peer):
    """A script of 2024: rows of one length, the mean loss, four optimizers with one schedule."""

    model_name = "raw_model"

    def __init__(self, space: dict, warmup: int):
        """warmup: updates of Muon's momentum warm-up, a number in the script's loop; 0: none."""
        super().__init__(space)
        self.warmup = warmup

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
        made = self.model(inputs, targets)
        return made[-1] if isinstance(made, tuple) else made  # (logits, loss) until record 9

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
