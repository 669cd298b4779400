"""What public scripts import and nobody can have here: FlashAttention 3, as an operator of torch
that allocates and counts.

Its tiles are those of the documents and the window that it is called with. Lengths that the script
computes on the device read as zero; then the last ones that it copied there are taken, stretched.
"""

import sys
import types

import torch
from blocks import host_view

TILE = 128  # queries and keys of a tile
BACKWARD = 2.5  # operations of a backward pass, in forward passes


def tiles(ends: list[int], window: int) -> int:
    """Tiles that are computed for documents that end there; window < 0: no limit."""
    total = 0
    for begin, end in zip([0, *ends], ends, strict=False):
        for query in range(0, end - begin, TILE):
            nearest = max(0, query - window) // TILE if window >= 0 else 0
            total += query // TILE + 1 - nearest
    return total


def install(launched):
    """Make `kernels` and `flash_attn_interface` importable; launched(name, bytes, operations)."""
    known = [[]]

    def count(kind: str, q, ends, window: int, passes: float, tensors: int):
        length, heads, size = q.shape
        given = sorted(set(host_view(ends).tolist()) - {0})
        known[0] = given or known[0] or [length]
        stretch = length / known[0][-1]
        computed = tiles([int(end * stretch) for end in known[0]], window)
        operations = passes * 4 * computed * TILE**2 * heads * size
        launched(f"flash_attention_3_{kind}", tensors * 2.0 * q.numel(), operations)

    @torch.library.custom_op("nullgpu::attend", mutates_args=())
    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends: torch.Tensor, window: int
    ) -> torch.Tensor:
        count("forward", q, ends, window, 1.0, 4)
        return torch.empty_like(v, memory_format=torch.contiguous_format)

    @torch.library.custom_op("nullgpu::attend_backward", mutates_args=())
    def attend_backward(
        g: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        ends: torch.Tensor,
        window: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        count("backward", q, ends, window, BACKWARD, 12)
        return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))

    @attend.register_fake
    def _(q, k, v, ends, window):
        return torch.empty_like(v, memory_format=torch.contiguous_format)

    @attend_backward.register_fake
    def _(g, q, k, v, ends, window):
        return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))

    def remember(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:4])
        ctx.window = inputs[4]

    def backward(ctx, g):
        return *torch.ops.nullgpu.attend_backward(g, *ctx.saved_tensors, ctx.window), None, None

    attend.register_autograd(backward, setup_context=remember)

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, window_size=(-1, -1), **others):
        return torch.ops.nullgpu.attend(q, k, v, cu_seqlens_q, window_size[0])

    interface = types.ModuleType("flash_attn_interface")
    interface.flash_attn_varlen_func = flash_attn_varlen_func
    kernels = types.ModuleType("kernels")
    kernels.get_kernel = lambda *names: types.SimpleNamespace(flash_attn_interface=interface)
    for module in (interface, kernels):
        sys.modules.setdefault(module.__name__, module)
