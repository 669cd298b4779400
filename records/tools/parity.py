"""Compare this repository's trainer with a public one: same weights, same batches, every number.

    python -m records parity LOG [-- FLAGS OF train_gpt.py]

    python -m records parity --replaced

LOG is a public record's log, which begins with the script that wrote it, or that script itself, of
github.com/KellerJordan/modded-nanogpt. Known scripts, and our flags that each is compared with:

{scripts}

Their model and optimizers run on the CPU, plain operations in the place of kernels (--replaced
lists them, records/tools/peer.py holds them). Both sides are narrow, and their schedules are shrunk
by one rule: a phase of n updates has n / 104, at least 3. Their first weights are moved off 0 and
1, behind which errors hide, and copied into ours by name. Both get the same batches. At each step
are compared: logits and loss before the update, every gradient, every weight after it. A difference
is |ours - theirs| / |theirs| over a tensor.

Both sides compute in float64; --fp32 shows what rounding does to the comparison.

Exit code 0: no difference above the tolerance; 1: there is one; 2: bad input.
"""

import ast
import contextlib
import dataclasses
import math
import re
import sys
import types
from pathlib import Path

import torch
from torch import Tensor

from records.tools.command import BadInput, Parser, command, emit, number_in
from records.tools.peer import (
    RULES,
    STAND_INS,
    Exact,
    Peer,
    Row,
    execute,
    helpers,
    source_of,
)

TRAINER = Path(__file__).resolve().parents[2] / "train_gpt.py"
TOLERANCE = 1e-4  # relative; what float32 leaves of equality where Adam divides by roots near 0
VOCABULARY = 512  # no side pads it; the last token starts a document
MEASURES = ("logits", "loss", "gradient", "weight")


def shrink(updates: int) -> int:
    """The length, here, of a phase of `updates` updates."""
    return max(3, round(updates / 104)) if updates > 1 else updates


# ---------------------------------------------------------------------------------- scripts we know
@dataclasses.dataclass(frozen=True)
class Script:
    """A public script that this tool knows, and what of ours it is compared with."""

    name: str
    flags: tuple[str, ...]  # of ours, with which it is compared
    marks: tuple[str, ...]  # texts that this script has
    lacks: tuple[str, ...]  # and texts that later ones have, but not this one
    theirs: dict  # sizes of their model
    ours: dict  # fields of our config that give the same sizes
    rows: int  # of the first batch; later ones grow as the preset's batch_tokens do
    row_length: int
    weights: object  # {their name: tensor} -> {our name: tensor}


def build_peer(source: str, sizes: dict) -> Peer:
    def settle(args):
        args.num_iterations = shrink(args.num_iterations)
        args.warmdown_iters = shrink(args.warmdown_iters)

    warmup = re.search(r"min\(step/(\d+), 1\)", source)  # it stands in the training loop
    return Peer(execute(source, sizes, settle), shrink(int(warmup[1])) if warmup else 0)


NAMES_2024 = {
    "transformer.h.": "blocks.",
    "transformer.": "",
    "attn.c_proj": "attn.o",
    "attn.c_": "attn.",
    "attn.lamb": "attn.value_lambda",
    "mlp.c_fc": "mlp.up",
    "mlp.c_proj": "mlp.down",
}


def weights_2024(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, tensor in theirs.items():
        for old, new in NAMES_2024.items():
            name = name.replace(old, new)
        if name.endswith("lambdas"):
            block = name.removesuffix("lambdas")
            found |= {f"{block}x_lambda": tensor[0], f"{block}x0_lambda": tensor[1]}
        else:
            found[name] = tensor.T if name.endswith("mlp.down.weight") else tensor
    return found


SMALL_2024 = dict(vocab_size=VOCABULARY, n_layer=4, n_head=2, n_embd=64)
SCRIPTS = (
    Script(
        name="record 10, 8 November 2024",
        flags=("--preset", "nov2024"),
        marks=("self.lamb = ", "self.lambdas = ", "logits = 30 *", "model.cuda().bfloat16()"),
        lacks=("skip_weights",),
        theirs=SMALL_2024,
        ours=SMALL_2024,
        rows=8,
        row_length=64,
        weights=weights_2024,
    ),
)


def recognise(source: str, log: str) -> Script:
    """The entry of SCRIPTS for this source. Raises BadInput where there is none."""
    for script in SCRIPTS:
        marked = all(mark in source for mark in script.marks)
        if marked and not any(mark in source for mark in script.lacks):
            return script
    known = "; ".join(script.name for script in SCRIPTS)
    raise BadInput(f"{log}: not a script that parity knows; give a log of one of these: {known}")


# ------------------------------------------------------------------------------------------ batches
def make_rows(seed: int, step: int, count: int, length: int) -> list[Row]:
    """Rows of random tokens, low ones more often; each begins with a document and holds several."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + step)
    shape, exact = (count, length + 1), dict(generator=generator, dtype=torch.float64)
    tokens = (torch.rand(shape, **exact) ** 3 * (VOCABULARY - 1)).long()
    tokens[torch.rand(shape, **exact) < 3 / length] = VOCABULARY - 1
    tokens[:, 0] = VOCABULARY - 1
    return [Row(row[:-1], row[1:]) for row in tokens]


# --------------------------------------------------------------------------------------------- ours
def load_trainer() -> types.ModuleType:
    """train_gpt.py with PyTorch's default precision in the place of bf16 and fp32, as in peers."""
    module = types.ModuleType("train_gpt_exact")
    module.__file__ = str(TRAINER)
    vars(module).update(helpers())
    sys.modules[module.__name__] = module  # where dataclasses look for it
    tree = ast.fix_missing_locations(Exact().visit(ast.parse(TRAINER.read_bytes())))
    exec(compile(tree, str(TRAINER), "exec"), vars(module))
    return module


class Ours:
    """This repository's trainer, one step at a time."""

    def __init__(self, script: Script, given: list[str]):
        """given: the user's flags, which change the preset before it is shrunk."""
        self.trainer = trainer = load_trainer()
        runtime = trainer.Runtime(torch.device("cpu"))
        try:
            asked = trainer.parse_config([*script.flags, *given], "nov2024")
            shrunk = dataclasses.replace(asked, **shrunk_fields(script, asked, trainer.rescale))
            self.config = trainer.resolve(shrunk, runtime)
            self.run = trainer.build(self.config, runtime)
            self.run.optimizers = trainer.make_optimizers(self.run)
        except trainer.UserError as error:
            raise BadInput(str(error)) from None

    def tensors(self, kind: str = "data") -> dict[str, Tensor]:
        """{name: weight}, or with kind="grad" {name: gradient}."""
        named = self.run.model.named_parameters()
        found = {name: getattr(weight, kind) for name, weight in named}
        if kind == "grad":  # none: nothing reached it
            weights = dict(self.run.model.named_parameters())
            found = {n: torch.zeros_like(weights[n]) if g is None else g for n, g in found.items()}
        return found

    @torch.no_grad()
    def copy(self, weights: dict[str, Tensor]):
        """Take these weights. Raises BadInput where names or shapes of the two sides differ."""
        mine = self.tensors()
        shared = mine.keys() & weights.keys()
        odd = {
            "only ours": mine.keys() - shared,
            "only theirs": weights.keys() - shared,
            "of another shape": {n for n in shared if mine[n].shape != weights[n].shape},
        }
        if any(odd.values()):
            kinds = {what: ", ".join(sorted(set(map(kind_of, odd[what])))) for what in odd}
            said = "; ".join(f"{what}: {names}" for what, names in kinds.items() if names)
            raise BadInput(f"the two models are not alike, drop flags ({said})")
        for name, tensor in mine.items():
            tensor.copy_(weights[name])

    def begin(self, step: int):
        self.run.step = step
        self.trainer.set_stage(self.run)

    def rows(self, step: int) -> int:
        """Of the batch at a step."""
        stage = self.trainer.stage_at(step, self.config)[0]
        return stage.batch_tokens // stage.seq_len

    @torch.no_grad()
    def logits(self, row: Row) -> Tensor:
        return self.run.model(row.inputs[None])[0]

    def backward(self, rows: list[Row]) -> float:
        """Add the gradients of a batch; its training loss per token."""
        whole = [torch.cat((row.inputs, row.targets[-1:])) for row in rows]
        tokens, one_by_one = torch.stack(whole).numpy(), 1
        self.run.micro[len(tokens), tokens.shape[1] - 1] = one_by_one
        batch = self.trainer.make_batch(self.run, tokens, self.run.step, [])
        return float(self.trainer.forward_backward(self.run, batch))

    def update(self, step: int):
        self.trainer.step_optimizers(self.run)


def shrunk_fields(script: Script, c, rescale) -> dict:
    """The fields that make our config as small as theirs."""
    first = script.rows * script.row_length
    steps = shrink(c.steps)
    largest = c.stages[0].batch_tokens
    rows = dict(seq_len=script.row_length)
    plan = [
        dataclasses.replace(stage, batch_tokens=first * stage.batch_tokens // largest, **rows)
        for stage in c.stages
    ]
    return dict(
        script.ours,
        stages=rescale(plan, steps),
        cooldown=shrink(round(c.cooldown * c.steps)) / steps,  # they count its updates
        momentum_warmup=shrink(c.momentum_warmup),
        val_seq_len=0,
        val_tokens=script.row_length,
        device="cpu",
    )


# ------------------------------------------------------------------------------------------ compare
def difference(ours: Tensor, theirs: Tensor) -> float:
    """|ours - theirs| / |theirs| (Euclidean norms); 0 where both are 0."""
    gap, size = (ours - theirs).norm().item(), theirs.norm().item()
    if gap == 0:
        return 0.0
    return gap / size if size else float("inf")


def kind_of(name: str) -> str:
    """A weight's name without its layer: one line of the table is for all layers."""
    return re.sub(r"\.\d+\.", ".", name)


@dataclasses.dataclass
class Largest:
    """The largest difference seen, and where."""

    value: float = 0.0
    name: str = ""
    step: int = 0

    def see(self, value: float, name: str, step: int):
        if value > self.value or math.isnan(value) and not math.isnan(self.value):
            self.value, self.name, self.step = value, name, step


class Comparison:
    """Both sides, step by step. kinds: {(kind, measure): the largest difference of all steps}."""

    def __init__(self, script: Script, peer: Peer, ours: Ours, seed: int):
        self.script, self.peer, self.ours, self.seed = script, peer, ours, seed
        self.kinds: dict[tuple[str, str], Largest] = {}
        self.stage: dict = {}

    def see(self, measure: str, ours: dict, theirs: dict, step: int) -> float:
        """Compare tensors by name; the largest difference of this step."""
        worst = Largest()
        for name, tensor in ours.items():
            value = difference(torch.as_tensor(tensor), torch.as_tensor(theirs[name]))
            worst.see(value, name, step)
            self.kinds.setdefault((kind_of(name), measure), Largest()).see(value, name, step)
        return worst.value

    def rows_at(self, step: int) -> list[Row]:
        return make_rows(self.seed, step, self.ours.rows(step), self.script.row_length)

    def changes(self, step: int, rows: list[Row]) -> str:
        """What is in force from this step on, where that is new."""
        now = {"rows": len(rows)} | self.peer.stage(step)
        new = [name for name in now if self.stage and now[name] != self.stage[name]]
        self.stage = now
        return ", ".join(f"{name}: {now[name]}" for name in new)

    def step(self, step: int) -> str:
        """One step of both sides; its line of the table."""
        peer, ours, named = self.peer, self.ours, self.script.weights
        rows = self.rows_at(step)
        for side in (peer, ours):
            side.begin(step)
        changed = self.changes(step, rows)
        found = {}
        logits = [{"logits": side.logits(rows[0])} for side in (ours, peer)]
        found["logits"] = self.see("logits", *logits, step)
        losses = [{"loss": side.backward(rows)} for side in (ours, peer)]
        found["loss"] = self.see("loss", *losses, step)
        gradients = ours.tensors("grad"), named(peer.tensors("grad"))
        found["gradient"] = self.see("gradient", *gradients, step)
        for side in (peer, ours):
            side.update(step)
        found["weight"] = self.see("weight", ours.tensors(), named(peer.tensors()), step)
        cells = [f"{found[measure]:9.1e}" for measure in MEASURES]
        loss = f"{losses[1]['loss']:9.5f}  {losses[0]['loss']:9.5f}"
        return f"{step:4d}  {loss}  {'  '.join(cells)}  {changed}".rstrip()

    def table(self) -> str:
        """The largest difference of each kind of tensor over all steps and layers."""
        kinds = dict.fromkeys(kind for kind, measure in self.kinds if measure == "weight")
        width = max(len(kind) for kind in kinds)
        lines = [f"{'kind':{width}}  {'gradient':>9}  {'weight':>9}"]
        for kind in kinds:
            cells = [self.kinds[kind, measure].value for measure in ("gradient", "weight")]
            lines.append(f"{kind:{width}}  {cells[0]:9.1e}  {cells[1]:9.1e}")
        return "\n".join(lines)

    def largest(self) -> Largest:
        """Of all measures; its name begins with the measure."""
        worst = Largest(-1.0)
        for (_, measure), found in self.kinds.items():
            worst.see(found.value, f"{measure} {found.name}", found.step)
        return worst


@contextlib.contextmanager
def precision(dtype: torch.dtype):
    """PyTorch's default precision within a block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def compare(log: str, given: list[str], seed: int, tolerance: float) -> int:
    """Print the tables; the exit code."""
    source = source_of(log)
    script = recognise(source, log)
    torch.manual_seed(seed)
    peer, ours = build_peer(source, script.theirs), Ours(script, given)
    peer.shake(torch.Generator().manual_seed(seed))
    ours.copy(script.weights(peer.tensors()))
    compared = Comparison(script, peer, ours, seed)
    count = sum(tensor.numel() for tensor in ours.tensors().values())
    flags = " ".join([*script.flags, *given])
    steps, dtype = ours.config.steps, str(torch.get_default_dtype()).removeprefix("torch.")
    emit(f"theirs  {script.name}: {log}\nours    train_gpt.py {flags}")
    emit(f"both    {count:,} parameters, {steps} updates, {dtype}\n")
    heads = "  ".join(f"{measure:>9}" for measure in MEASURES)
    emit(f"step  {'theirs':>9}  {'ours':>9}  {heads}  from here on")
    for step in range(steps):
        emit(compared.step(step))
    worst = compared.largest()
    equal = worst.value <= tolerance
    where = f"{worst.name}, step {worst.step}"
    emit(f"\n{compared.table()}\n")
    emit(
        f"largest difference {worst.value:.1e} ({where}), tolerance {tolerance:.0e}: "
        + ("equal" if equal else "NOT EQUAL")
    )
    return 0 if equal else 1


@command("parity")
def main(argv: list[str]) -> int:
    listing = "\n".join(f"    {script.name}: {' '.join(script.flags)}" for script in SCRIPTS)
    usage = "python -m records parity LOG [OPTION ...] [-- FLAGS OF train_gpt.py]"
    parser = Parser("parity", __doc__.format(scripts=listing), usage=usage)
    parser.add_argument("log", metavar="LOG", nargs="?")
    parser.add_argument(
        "--replaced", action="store_true", help="what of theirs is replaced, and why"
    )
    parser.add_argument("--seed", type=number_in(int, 0), default=0, help="of weights and batches")
    parser.add_argument("--fp32", action="store_true", help="float32 on both sides, not float64")
    parser.add_argument("--tolerance", type=number_in(float, 0), help=f"[{TOLERANCE}]")
    cut = argv.index("--") if "--" in argv else len(argv)
    args, flags = parser.parse_args(argv[:cut]), argv[cut + 1 :]
    if args.replaced:
        replaced = RULES | {stand_in.name: stand_in.why for stand_in in STAND_INS}
        emit("\n".join(f"{name}: {why}" for name, why in replaced.items()))
        return 0
    if not args.log:
        parser.error("no LOG given")
    dtype = torch.float32 if args.fp32 else torch.float64
    tolerance = TOLERANCE if args.tolerance is None else args.tolerance
    with precision(dtype):
        return compare(args.log, flags, args.seed, tolerance)
