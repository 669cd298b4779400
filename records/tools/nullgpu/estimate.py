"""From launches to bytes and operations by class of kernel, and on to a roofline estimate."""

import re
from dataclasses import dataclass

from records.tools.nullgpu.cards import Card

WIDTH = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8, "fp8": 1, "other": 4}  # bytes of an element


@dataclass(frozen=True)
class Shares:
    """What an update's time depends on beyond counts and data sheets: as usually said of these
    kernels, where against.py starts to fit."""

    matmul: float = 0.70  # of the peak, cuBLAS on large matrices
    memory: float = 0.85  # of the bandwidth, kernels that only stream
    flex: float = 0.85  # FlexAttention's speed, of FlashAttention 2's (cards.py)
    flash3: float = 1.30  # FlashAttention 3's
    update: float = 5e-3  # seconds of each update that no kernel's sum explains
    link: float = 0.75  # of the link, NCCL's rings
    issue: float = 0.65  # of the instructions that a card can issue
    launch: float = 3e-6  # seconds, a kernel that does next to nothing


# Fitted to five public scripts: records/ESTIMATE.md
SHARES = Shares(matmul=0.638, memory=0.846, flex=0.826, flash3=1.265, update=4.7e-3)
ERROR = 0.03  # root mean square of estimate / measured - 1, of scripts that were not fitted
JUDGED = "± 3 %, at worst 7 %: five public scripts on 8 x H100; no other cards"
LANES = 128  # instructions for one element each, that a multiprocessor issues in a cycle


def assumptions(card: Card, shares: Shares = SHARES) -> list[str]:
    return [
        f"matmuls reach {shares.matmul:.0%} of the data sheet's peak, FlashAttention 2 "
        f"{card.attention:.0%}, FlexAttention {shares.flex:.0%} of that, other kernels "
        f"{shares.memory:.0%} of the bandwidth, collectives {shares.link:.0%} of the link",
        "a kernel takes the longest of its operations, its bytes, its instructions and "
        f"{1e6 * shares.launch:.0f} us; they run one after the other, no collective is hidden, "
        f"the host keeps up, and each update takes {1e3 * shares.update:.1f} ms more",
        "documents have lengths like FineWeb's (log-normal, median 400 tokens, sigma 1.1); "
        "FlexAttention computes the blocks that they and the windows leave, masks being causal; "
        "FlashAttention computes half of the score matrix",
    ]


# Classes of the kernels that Inductor makes, by the operators in their names; first match.
FUSED = (
    ("attention", ("flex_attention", "flash_attention")),
    ("loss", ("log_softmax", "nll_loss", "online_softmax", "tanh", "entropy")),
    ("activation", ("relu", "threshold", "gelu", "silu", "sigmoid")),
    (
        "optimizer",
        ("lerp_mul_sqrt", "sqrt_0", "linalg_vector_norm", "baddbmm", "XXT", "XTX", "cAA"),
    ),
    ("embedding", ("embedding",)),
    ("norm, rotary, residual", ("rms_norm", "rsqrt", "cat", "add", "mul", "to_copy", "clone")),
)
OTHER = "other fused"


@dataclass(frozen=True)
class Work:
    """All launches of one kernel in one update."""

    kind: str  # its class
    name: str
    launches: int
    bytes: float  # moved between memory and the chip; 0 where nothing is known
    operations: float
    precision: str = "bf16"  # of the operations
    instructions: float = 0.0  # for one element each
    known: bool = True  # are the bytes known?


# ------------------------------------------------------------------------------ one kernel's work


def matmul(name: str, times: int, operations: float) -> Work:
    """`name`: "matmul bf16 m=768 n=4 k=4 batch=1", as libraries.c writes it."""
    precision = name.split()[1]
    m, n, k, batch = (int(number) for number in re.findall(r"=(\d+)", name))
    elements = batch * (m * k + k * n + m * n)
    # Only optimizers multiply stacks of matrices here; a model's own matmuls are single ones.
    kind = "matmul, optimizer" if batch > 1 else "matmul"
    return Work(kind, name, times, times * elements * WIDTH[precision], operations, precision)


# FlashAttention 2, by kernel: which of the template's two block sizes the grid counts, operations
# in forward passes, and bytes per element of a query: tensors of 2 bytes, sums of 4.
FLASH = {
    "flash_fwd_kernel": (1, 1.0, 8),  # q, k, v -> o
    "flash_bwd_dot_do_o_kernel": (1, 0.0, 8),  # o, do -> dot, zeroed sum of dq
    "flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel": (2, 2.5, 20),  # q, k, v, do, dq -> dq, dk, dv
    "flash_bwd_convert_dq_kernel": (1, 0.0, 6),  # dq
}
TRAITS = re.compile(r"Flash_\w+_kernel_traitsILi(\d+)ELi(\d+)ELi(\d+)E")


def flash(name: str, grid: tuple, times: int) -> Work | None:
    found = TRAITS.search(name)
    kernel = next((kernel for kernel in FLASH if kernel in name), None)
    if not found or not kernel:
        return None
    which, forward_passes, bytes_per_element = FLASH[kernel]
    head_dim = int(found[1])
    blocks, batch, heads = grid
    length = blocks * int(found[1 + which])
    elements = batch * heads * length * head_dim
    causal = 0.5
    operations = forward_passes * causal * 4 * elements * length
    return Work(
        "attention", kernel, times, times * elements * bytes_per_element, times * operations
    )


def elementwise(name: str, times: int, elements: float) -> Work:
    """PyTorch's own element-wise kernels: operands and their type stand in the mangled name."""
    found = re.search(r"St5arrayIPcLm(\d+)E", name)
    operands = int(found[1]) if found else 3 if "Binary" in name else 2
    width = 2 if "BFloat16" in name or "Half" in name else 8 if "Functor_addIl" in name else 4
    kind = "copies" if "direct_copy" in name else "eager"
    return Work(kind, name, times, elements * operands * width, elements)


def fused(name: str, row: list, computed: float) -> Work:
    launches, moved, operations, instructions = row
    kind = next((kind for kind, words in FUSED if any(word in name for word in words)), OTHER)
    share = computed if "flex_attention" in name else 1.0
    known = moved > 0
    return Work(
        kind, name, launches, moved, share * operations, known=known, instructions=instructions
    )


def works_of(update: dict) -> list[Work]:
    """All work of an update that observe.py saw, the largest first."""
    computed = update.get("attention") or 0.5  # causal
    works = [fused(name, row, computed) for name, row in update["triton"].items()]
    for name, (times, amount) in update["counts"].items():
        kind, _, rest = name.partition(" ")
        if kind == "matmul":
            works.append(matmul(name, times, amount))
        elif kind == "kernel":
            works += launched(rest, times, amount, update["triton"])
        elif kind == "collective":
            works.append(Work("collective", rest, times, amount, 0.0))
        elif name == "copy device -> device":
            works.append(Work("copies", name, times, 2 * amount, 0.0))
        elif kind == "fill":
            works.append(Work("copies", name, times, amount, 0.0))
    return sorted(works, key=lambda work: -work.bytes)


def launched(text: str, times: int, amount: float, triton: dict) -> list[Work]:
    """A launch, in runtime.c's words: "NAME grid 1,2,3[ elements]". Inductor's are counted."""
    name, _, grid, *elements = text.split()
    if name in triton:
        return []
    work = flash(name, tuple(int(n) for n in grid.split(",")), times)
    if work:
        return [work]
    if elements:
        return [elementwise(name, times, amount)]
    return [Work("eager", name, times, 0.0, 0.0, known=False)]


# ----------------------------------------------------------------------------------- all together


def seconds(work: Work, card: Card, cards: int, shares: Shares = SHARES) -> float:
    """The time that one kernel's launches take at least, as assumed."""
    if work.kind == "collective":
        return work.bytes * (cards - 1) / cards / (shares.link * card.link)
    peak = card.bf16_flops * shares.matmul
    if work.kind == "attention":
        named = dict(flex_attention=shares.flex, flash_attention_3=shares.flash3)
        speed = next((speed for name, speed in named.items() if name in work.name), 1.0)
        peak = card.bf16_flops * card.attention * speed
    elif work.precision == "fp8":
        peak *= 2
    elif work.precision in ("fp32", "fp64") or work.kind in ("eager", "copies"):
        peak = card.fp32_flops * shares.matmul
    issued = card.multiprocessors * LANES * 1e3 * card.clock * shares.issue
    return max(
        work.operations / peak,
        work.bytes / (shares.memory * card.bandwidth),
        work.instructions / issued,
        work.launches * shares.launch,
    )


def update_seconds(works: list[Work], card: Card, cards: int, shares: Shares = SHARES) -> float:
    """The time of one update, outside validation."""
    return shares.update + sum(seconds(work, card, cards, shares) for work in works)


def by_class(works: list[Work], card: Card, cards: int) -> dict[str, dict]:
    """{class: launches, bytes, operations, seconds}, the slowest first."""
    classes = {}
    for work in works:
        row = classes.setdefault(
            work.kind, dict(launches=0, bytes=0.0, operations=0.0, seconds=0.0)
        )
        row["launches"] += work.launches
        row["bytes"] += work.bytes
        row["operations"] += work.operations
        row["seconds"] += seconds(work, card, cards)
    classes["no kernel's"] = dict(launches=0, bytes=0.0, operations=0.0, seconds=SHARES.update)
    return dict(sorted(classes.items(), key=lambda item: -item[1]["seconds"]))
