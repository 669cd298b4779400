"""What a CPU can prove of the compiled path: each form of the model is one graph, each update rule
too, and flops_per_token counts what the model multiplies."""

import dataclasses

import numpy as np
import pytest
import torch
from functorch.compile import make_boxed_func
from helpers import CPU
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train_gpt

ROWS = 2
SMALL = (
    "--device cpu --n_head 2 --vocab_size 257 --seq_len 32 --batch_tokens 64 --val_tokens 32 "
    "--val_seq_len 32"
)
SHALLOW = "--n_layer 2 --n_embd 32"
MODERN = "--preset gpt2_small --n_embd 48 --window 16 --short_window 8 --max_document 0"
MODERN += " --table_rows 99"
FORMS = {
    "gpt2_small": pytest.param(MODERN, marks=pytest.mark.long),
    "laptop": f"--preset laptop {SHALLOW}",
}
OTHER_FORMS = {
    "gpt2_small, copying": f"{MODERN} --copy_input --token_classes",
    "documents": f"--preset nov2024 --doc_mask --window 16 {SHALLOW}",
    "nov2024": f"--preset nov2024 {SHALLOW}",
    "gpt2_medium": f"--preset gpt2_medium {SHALLOW}",
    "gpt2_xl": f"--preset gpt2_xl {SHALLOW}",
    "tied": f"--preset nov2024 --no_untie_head {SHALLOW}",
    "window, sdpa": f"--preset nov2024 --window 16 {SHALLOW}",
    "plain": f"--preset nov2024 --no_value_residual --no_embed_residual --softcap 0 {SHALLOW}",
}
FORMS |= {name: pytest.param(flags, marks=pytest.mark.slow) for name, flags in OTHER_FORMS.items()}


def model_of(flags: str):
    config = train_gpt.parse_config([*flags.split(), *SMALL.split()], "laptop")
    model = train_gpt.MODELS[config.model](dataclasses.replace(config, compile=True))
    if model.table:
        model.table.allocate(CPU)
    return model


def inputs_of(model, step=0):
    """What the training loop hands to forward, at update `step`: a batch of as many rows as the
    model takes at once."""
    rows = model.rows_at_once or ROWS
    tokens = np.random.default_rng(0).integers(0, 257, (rows, 33))
    arrays = model.prepare(tokens[:, :-1], training=True)
    return model.load(arrays | model.prepare_targets(tokens[:, 1:], step, 0, rows))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def train_and_validate(flags, backend):
    """Two updates and a validation through the compiler, which may not break a graph."""
    model = model_of(flags)
    call = torch.compile(train_gpt.call_model, dynamic=False, fullgraph=True, backend=backend)
    for step in (0, 1):  # the second one compiles nothing new
        model.set_stage(step)
        inputs = inputs_of(model, step)
        call(model, inputs).backward()
    model.eval()
    with torch.no_grad():
        inputs["targets"] = inputs["tokens"]
        inputs.pop("classes", None)
        call(model, inputs)


@pytest.mark.parametrize("flags", FORMS.values(), ids=FORMS)
def test_every_form_of_the_model_is_one_graph(flags):
    graphs = []

    def keep(graph, inputs):
        graphs.append(torch.is_grad_enabled())
        return graph.forward

    train_and_validate(flags, keep)
    assert graphs == [True, False]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [MODERN, FORMS["laptop"]], ids=["gpt2_small", "laptop"])
def test_forward_and_backward_are_one_graph_each(flags):
    graphs = []

    def record(kind):
        def compiler(graph, inputs):
            graphs.append(kind)
            return make_boxed_func(graph.forward)

        return compiler

    from torch._dynamo.backends.common import aot_autograd  # takes a second to import

    backend = aot_autograd(
        fw_compiler=record("forward"),
        bw_compiler=record("backward"),
        inference_compiler=record("no_grad"),
    )
    train_and_validate(flags, backend)
    assert graphs == ["forward", "backward", "no_grad"]


@pytest.mark.parametrize("shape", [(4, 32, 32), (2, 64, 16)])
def test_update_rules_are_one_graph(shape):
    def whole(rule):
        return torch.compile(rule, dynamic=False, fullgraph=True, backend="eager")

    g = torch.randn(shape)
    torch.testing.assert_close(
        whole(train_gpt.newton_schulz)(g, torch.float32), train_gpt.newton_schulz(g, torch.float32)
    )
    moments = [torch.zeros(shape) for _ in range(4)]
    rest = 0.9, 0.95, 1e-8, torch.tensor(0.1), torch.tensor(0.05)
    torch.testing.assert_close(
        whole(train_gpt.adam_direction)(g, *moments[:2], *rest),
        train_gpt.adam_direction(g, *moments[2:], *rest),
    )
    for decay, signs in ((None, None), (torch.tensor(0.1), None), (torch.tensor(0.1), g)):
        a, b = torch.ones(2, *shape)
        whole(train_gpt.subtract)(a, g, torch.tensor(0.5), decay, signs)
        train_gpt.subtract(b, g, torch.tensor(0.5), decay, signs)
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "flags", [f"--preset nov2024 {SHALLOW}", f"{MODERN} --window 99 --short_window 99"]
)
def test_flops_per_token_counts_what_the_model_multiplies(flags):
    """Forward and backward of one batch: matmuls as counted, half of attention's score matrix."""
    model = model_of(f"{flags} --steps 1")
    inputs = inputs_of(model)
    rows, length = inputs["tokens"].shape
    counter = FlopCounterMode(display=False)
    # As plain matmuls, so that no operation of a backward pass is counted that only recomputes.
    with sdpa_kernel(SDPBackend.MATH), counter:
        model(**inputs).backward()
    counted = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    scores, half = counted.pop("aten.bmm"), 0
    for attention, _ in model.windows(model.config.stages[0]):
        full = 6 * length * (attention.q.n_out + attention.v.n_out) * rows * length
        scores -= 2 * full if attention.paired else full  # twice as long, of half as many heads
        half += full / 2
    assert scores == 0
    per_token = (sum(counted.values()) + half) / (rows * length)
    assert per_token == pytest.approx(model.flops_per_token(), rel=1e-6)
