"""How much of the score matrix FlexAttention computes: the block masks of a compiled graph, made
again on the host from the real tokens.

What the stand-in device computes reads as zero, block masks too. But tokens are copied to it, not
computed, so they are there. For each call of a compiled graph this evaluates on the CPU what leads
from the graph's inputs to its block masks, and puts integers that a later graph may want into the
device's memory. Where block masks would mean looking at all pairs of tokens (create_block_mask),
the mask function is asked about the nearest pair of each two blocks instead: right for masks that
are causal and else only forbid what is further away or in another document.
"""

import copy
import ctypes
import functools

import torch
from torch.fx.node import map_aggregate

LARGEST = 1 << 25  # elements of a tensor that is worth evaluating on the host


def host_view(value):
    """The tensor's memory as a tensor of the CPU, without a copy that the device would count."""
    if not isinstance(value, torch.Tensor) or not value.is_cuda:
        return value
    size = value.untyped_storage().nbytes()
    if not size:
        return torch.empty(value.shape, dtype=value.dtype)
    memory = (ctypes.c_char * size).from_address(value.untyped_storage().data_ptr())
    flat = torch.frombuffer(memory, dtype=torch.uint8).view(value.dtype)
    return flat.as_strided(value.shape, value.stride(), value.storage_offset())


class Graph:
    """The integers and the attentions of one graph, which the compiler is about to change."""

    def __init__(self, module: torch.fx.GraphModule):
        self.module = module
        graph = torch.fx.Graph()
        outputs = graph.graph_copy(module.graph, {})
        self.graph = graph
        self.attentions = [
            node
            for node in graph.nodes
            if node.op == "call_function" and str(node.target) == "flex_attention"
        ]
        self.integers = [
            (i, node)
            for i, node in enumerate(outputs)
            if isinstance(node, torch.fx.Node) and self.evaluable([node])
        ]
        # The compiler lowers these in place.
        self.functions = {
            node.args[4][-1]: copy.deepcopy(getattr(module, node.args[4][-1].target))
            for node in self.attentions
        }

    def evaluable(self, wanted: list) -> set:
        """The nodes that lead to these; none where they are too large or no integers."""
        needed, open_nodes = set(), [node for node in wanted if isinstance(node, torch.fx.Node)]
        while open_nodes:
            node = open_nodes.pop()
            value = node.meta.get("val")
            large = isinstance(value, torch.Tensor) and value.numel() > LARGEST
            if is_float(value) or large and node.op != "placeholder":
                return set()
            if node not in needed:
                needed.add(node)
                open_nodes += node.all_input_nodes
        return needed

    def evaluate(self, wanted: list, inputs: list) -> list | None:
        """The values of nodes, of a call of the graph with these inputs. None: not evaluable."""
        needed = self.evaluable(wanted)
        if not needed and any(isinstance(node, torch.fx.Node) for node in wanted):
            return None
        given = iter(inputs)
        values = {}

        def resolve(argument):
            if isinstance(argument, torch.fx.Node):
                return values[argument]
            if argument is torch.uint16:  # Inductor's type of small numbers; a CPU counts in others
                return torch.int64
            return torch.device("cpu") if isinstance(argument, torch.device) else argument

        for node in self.graph.nodes:
            value = next(given) if node.op == "placeholder" else None
            if node not in needed:
                continue
            if node.op == "call_function":
                args, kwargs = map_aggregate((node.args, node.kwargs), resolve)
                value = node.target(*args, **kwargs)
            elif node.op == "get_attr":
                value = getattr(self.module, node.target)
            values[node] = host_view(value)
        return [map_aggregate(node, resolve) for node in wanted]

    def count(self, inputs: list) -> tuple[float, float]:
        """(query, key) pairs times heads and sizes of heads: in the blocks that are computed, and
        in the whole score matrices."""
        computed = whole = 0.0
        known = {}  # layers share masks
        for node in self.attentions:
            query, mask, buffers = node.args[0].meta["val"], node.args[4], node.args[8]
            key = (*mask[2:5], mask[-1])
            if key not in known:
                known[key] = self.share(query, mask, buffers, inputs)
            size = float(query.numel()) * int(node.args[1].meta["val"].shape[-2])
            computed += size * known[key]
            whole += size
        return computed, whole

    def share(self, query, mask: tuple, buffers: tuple, inputs: list) -> float:
        """Share of the blocks of a score matrix that this mask leaves."""
        block_q, block_k, function = mask[-3:]
        length_q, length_k, *_ = self.evaluate(mask[:2], inputs)
        rows, columns = -(-length_q // block_q), -(-length_k // block_k)
        found = self.evaluate([node for node in (mask[2], mask[4]) if node is not None], inputs)
        blocks = sum(found) if found else torch.zeros(1)
        if blocks.min():  # else the device has made them
            return blocks.sum().item() / (blocks.numel() * columns)
        values = self.evaluate(list(buffers), inputs)
        first_q = torch.arange(rows)[:, None] * block_q
        first_k = torch.arange(columns) * block_k
        last_k = torch.clamp(first_k + block_k, max=length_k) - 1
        q = torch.clamp(last_k, first_q, torch.clamp(first_q + block_q, max=length_q) - 1)
        k = torch.minimum(last_k, q)
        batch = torch.arange(mask[2].meta["val"].shape[0])[:, None, None]
        allowed = self.functions[function](batch, torch.tensor(0), q, k, *values)
        return (allowed & (k >= first_k)).expand(len(batch), rows, columns).float().mean().item()


def is_float(value) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def watch(tell):
    """Call tell(graph, inputs) at each call of a compiled graph that has attentions."""
    from torch._functorch import config
    from torch._inductor import compile_fx

    config.enable_autograd_cache = False  # it would skip what is watched here
    compile_inner = compile_fx._compile_fx_inner

    @functools.wraps(compile_inner)
    def watched(module, *args, **kwargs):
        graph = Graph(module)
        compiled = compile_inner(module, *args, **kwargs)
        if graph.attentions or graph.integers:
            run = compiled.current_callable

            def counted(inputs):  # what it holds on to, the graph cannot free as it goes
                given = [None if is_float(value) else value for value in inputs]
                if graph.attentions:
                    tell(graph, given)
                outputs = run(inputs)
                for i, node in graph.integers:
                    (value,) = graph.evaluate([node], given)
                    if isinstance(value, torch.Tensor):
                        host_view(outputs[i]).copy_(value)
                return outputs

            compiled.current_callable = counted
        return compiled

    compile_fx._compile_fx_inner = watched
