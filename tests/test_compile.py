"""What a CPU can prove of the compiled path: each form of the model is one graph, each update rule
too, and flops_per_token counts what the model multiplies."""

import dataclasses

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, flex_attention, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train_gpt

ROWS = 2
SMALL = "--device cpu --n_layer 2 --n_head 2 --n_embd 32 --seq_len 32 --vocab_size 257".split()
WINDOW = "--window 16"
FORMS = {
    "gpt2_small": "--preset gpt2_small",
}
OTHER_FORMS = {
    "documents": f"--preset nov2024 --doc_mask {WINDOW} --window 99",
    "laptop": "--preset laptop",
    "nov2024": "--preset nov2024",
    "gpt2_medium": "--preset gpt2_medium",
    "gpt2_xl": "--preset gpt2_xl",
    "tied": "--preset nov2024 --no_untie_head",
    "window, sdpa": f"--preset nov2024 {WINDOW}",
    "plain": "--preset nov2024 --no_value_residual --no_embed_residual --softcap 0",
}
FORMS |= {name: pytest.param(flags, marks=pytest.mark.slow) for name, flags in OTHER_FORMS.items()}


def config_of(flags: str):
    config = train_gpt.parse_config([*flags.split(), *SMALL], "laptop")
    return dataclasses.replace(config, compile=True)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("flags", FORMS.values(), ids=FORMS)
def test_every_form_of_the_model_is_one_graph(flags, monkeypatch):
    # FlexAttention refuses gradients on a CPU, but nothing is computed here.
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
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
    config = config_of(flags)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = train_gpt.GPT(config)
        compiled = torch.compile(model, dynamic=False, fullgraph=True, backend=backend)
        for _ in range(2):
            tokens = torch.zeros(ROWS, config.seq_len, dtype=torch.int64)
            compiled(tokens, tokens).backward()
        with torch.no_grad():
            compiled(tokens, tokens)
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
        whole(train_gpt.adam_update)(g, *moments[:2], *rest),
        train_gpt.adam_update(g, *moments[2:], *rest),
    )


@pytest.mark.parametrize("flags", ["--preset nov2024", "--preset gpt2_small"])
def test_flops_per_token_counts_what_the_model_multiplies(flags):
    """Forward and backward of one batch: matmuls as counted, half of attention's score matrix."""
    config = config_of(flags)
    model = train_gpt.GPT(config)
    tokens = torch.zeros(ROWS, config.seq_len, dtype=torch.int64)
    counter = FlopCounterMode(display=False)
    # As plain matmuls, so that no operation of a backward pass is counted that only recomputes.
    with sdpa_kernel(SDPBackend.MATH), counter:
        model(tokens, tokens).backward()
    counted = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    attention = counted.pop("aten.bmm", 0)
    causal = 0.5
    per_token = (sum(counted.values()) + causal * attention) / tokens.numel()
    assert per_token == pytest.approx(train_gpt.flops_per_token(model), rel=1e-6)
