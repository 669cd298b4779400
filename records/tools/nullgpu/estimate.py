"""From launches to bytes and operations by class of kernel, and on to a roofline estimate."""

import re
from dataclasses import dataclass

from records.tools.nullgpu.cards import Card

WIDTH = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8, "fp8": 1, "other": 4}  # bytes of an element

# What the estimate assumes: shares of the data sheet that kernels reach, and a launch's least time.
MATMUL = 0.70  # of the peak, cuBLAS on large bf16 matrices
MEMORY = 0.85  # of the bandwidth, kernels that only stream
LINK = 0.75  # of the link, NCCL's rings
LAUNCH = 3e-6  # seconds, a kernel that does next to nothing
ASSUMPTIONS = (
    f"matmuls reach {MATMUL:.0%} of the data sheet's peak, FlashAttention 2 {{attention:.0%}}, "
    f"other kernels {MEMORY:.0%} of the bandwidth, collectives {LINK:.0%} of the link",
    f"a kernel takes the longest of its operations, its bytes and {1e6 * LAUNCH:.0f} us; they run "
    "one after the other, no collective is hidden, and the host keeps up",
    "attention is causal: half of the score matrix, and of that what lies within the stage's "
    "longest --window; documents and shorter windows would leave out more",
)

# Classes of the kernels that Inductor makes, by the operators in their names; first match.
FUSED = (
    ("attention", ("flex_attention",)),
    ("loss", ("log_softmax", "nll_loss", "online_softmax", "tanh")),
    ("activation", ("relu", "threshold", "gelu", "silu", "sigmoid")),
    ("optimizer", ("lerp_mul_sqrt", "sqrt_0", "linalg_vector_norm", "baddbmm")),
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


def within(window: int, length: int) -> float:
    """Share of a row's causal pairs of tokens that are no further apart than the window; 0: all."""
    reach = min(1.0, window / length) if window and length else 1.0
    return 2 * reach - reach**2


def fused(name: str, row: list, seen: float) -> Work:
    launches, moved, operations = row
    kind = next((kind for kind, words in FUSED if any(word in name for word in words)), OTHER)
    share = 0.5 * seen if kind == "attention" else 1.0
    return Work(kind, name, launches, moved, share * operations, known=moved > 0)


def works_of(update: dict, seen: float = 1.0) -> list[Work]:
    """All work of an update that observe.py saw, the largest first; seen: the share of causal
    attention that its window leaves."""
    works = [fused(name, row, seen) for name, row in update["triton"].items()]
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


def seconds(work: Work, card: Card, cards: int) -> float:
    """The time that one kernel's launches take at least, as assumed."""
    if work.kind == "collective":
        return work.bytes * (cards - 1) / cards / (LINK * card.link)
    peak = card.bf16_flops * (card.attention if work.kind == "attention" else MATMUL)
    if work.precision in ("fp32", "fp64") or work.kind in ("eager", "copies"):
        peak = card.fp32_flops * MATMUL
    return max(
        work.operations / peak, work.bytes / (MEMORY * card.bandwidth), work.launches * LAUNCH
    )


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
    return dict(sorted(classes.items(), key=lambda item: -item[1]["seconds"]))
