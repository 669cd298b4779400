"""`python -m records parity`: the machinery against a small script of our own, written here in the
manner of a GPU record; against public records when their logs are given:

    PARITY_LOGS=record10.txt pytest -m slow tests/test_parity.py
"""

import math
import os

import pytest
import torch
import torch.nn.functional as F

from records.tools import parity, peer
from records.tools.command import BadInput

# One block, Adam for everything: what our trainer is with FLAGS. It needs GPUs and
# several processes, so only a rewritten copy of it can run here.
SCRIPT = """
import os
import sys
with open(sys.argv[0]) as f:
    code = f.read()
from dataclasses import dataclass
import torch
import torch.nn.functional as F
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

rank = int(os.environ["RANK"])
assert torch.cuda.is_available()
dist.init_process_group(backend="nccl")
device = f"cuda:{rank}"

@torch.compile
def norm(x):
    return F.rms_norm(x, (x.size(-1),))

def turn(x):
    half = x.size(-1) // 2
    place = torch.arange(x.size(0), dtype=torch.float32, device=f"cuda:{rank}")
    angles = torch.outer(place, 10000.0 ** -(torch.arange(half).float() / half))[:, None]
    a, b = x[..., :half], x[..., half:]
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    return torch.cat((a * cos + b * sin, b * cos - a * sin), -1)

@dataclass
class GPTConfig:
    vocab_size: int = 50304
    width: int = 768

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        w = config.width
        self.wte = nn.Embedding(config.vocab_size, w)
        self.qkvo = nn.Parameter(torch.zeros(4, w, w))
        self.up = nn.Parameter(torch.zeros(4 * w, w))
        self.down = nn.Parameter(torch.zeros(4 * w, w))
        self.head = nn.Parameter(torch.zeros(w, config.vocab_size, dtype=torch.bfloat16))

    def forward(self, idx, target):
        total = 0
        for tokens, wanted in zip(idx, target):
            total = total + self.row(tokens, wanted)
        return total / len(idx)

    def row(self, tokens, wanted):
        x = norm(self.wte(tokens).bfloat16())
        q, k, v = (F.linear(norm(x), w.bfloat16()).unflatten(-1, (2, -1)) for w in self.qkvo[:3])
        q, k, v = (part.transpose(0, 1) for part in (turn(norm(q)), turn(norm(k)), v))
        y = F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
        x = x + F.linear(y.transpose(0, 1).flatten(1), self.qkvo[3].bfloat16())
        x = x + F.linear(norm(x), self.up).relu().square() @ self.down
        logits = (norm(x) @ self.head).float()
        return F.cross_entropy(30 * torch.tanh(logits / 30), wanted)

@dataclass
class Hyperparameters:
    num_iterations: int = 1200
    warmdown_iters: int = 343
args = Hyperparameters()

train_loader = open("no such file")
x, y = train_loader.read()
model = GPT(GPTConfig(vocab_size=50304, width=768)).cuda()
model = torch.compile(model)
model = DDP(model, device_ids=[rank])
raw_model = model.module

def factor(step):
    return min(1, (args.num_iterations - step) / args.warmdown_iters)

def adam(params, lr):
    return torch.optim.Adam(params, lr=lr, betas=(0.9, 0.95))

optimizer1 = adam([raw_model.wte.weight], 0.3)
optimizer2 = adam([raw_model.head], 0.002)
optimizer3 = adam([raw_model.qkvo, raw_model.up, raw_model.down], 0.002)
optimizers = [optimizer1, optimizer2, optimizer3]
schedulers = [torch.optim.lr_scheduler.LambdaLR(o, factor) for o in optimizers]

training_time_ms = 0
raise SystemExit("the training loop was executed")
for step in range(args.num_iterations):
    frac = min(step/300, 1)
"""
WIDTH = 16
FLAGS = ["--matrix_optimizer", "adam", "--no_value_residual", "--no_embed_residual"]
FLAGS += ["--steps", "1200", "--batch_tokens", "524288", "1048576"]


def weights(theirs):
    found = {"wte.weight": theirs["wte.weight"], "lm_head.weight": theirs["head"].T}
    for name, tensor in zip("qkvo", theirs["qkvo"], strict=True):
        found[f"blocks.0.attn.{name}.weight"] = tensor
    for name in ("up", "down"):
        found[f"blocks.0.mlp.{name}.weight"] = theirs[name]
    return found


STAND_IN = parity.Script(
    name="a script of the tests",
    flags=("--preset", "nov2024"),
    marks=("class GPT(", "def turn("),
    lacks=("something of later scripts",),
    theirs=dict(vocab_size=parity.VOCABULARY, width=WIDTH),
    ours=dict(vocab_size=parity.VOCABULARY, n_layer=1, n_head=2, n_embd=WIDTH),
    rows=2,
    row_length=16,
    weights=weights,
)


@pytest.fixture
def log(tmp_path, monkeypatch):
    """Writes a log that begins with SCRIPT, changed or not; returns its path."""
    monkeypatch.setattr(parity, "SCRIPTS", (STAND_IN,))

    def write(old="", new="", rule="=" * 100):
        assert old in SCRIPT
        path = tmp_path / "log.txt"
        lines = [rule, SCRIPT.replace(old, new), rule, "step:0/1200 val_loss:10.8 ..."]
        path.write_text("\n".join(lines))
        return str(path)

    return write


def run(capsys, *argv):
    """(exit code, stdout, stderr) of the command."""
    code = parity.main(list(argv))
    said = capsys.readouterr()
    return code, said.out, said.err


def test_two_equal_trainers_are_equal(log, capsys):
    code, out, err = run(capsys, log(), "--", *FLAGS)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    steps = [line.split() for line in lines if line[:4].strip().isdigit()]
    assert [int(step[0]) for step in steps] == list(range(12))
    assert all(float(cell) < 1e-11 for step in steps for cell in step[3:7]), out
    assert float(steps[-1][1]) < float(steps[0][1]) - 0.02, "no learning, nothing compared"
    assert "rows: 4" in lines[lines.index(next(x for x in lines if x.startswith("   6 ")))]
    assert "rates falling: True" in out and "blocks.mlp.down.weight" in out
    assert lines[-1].endswith("equal") and "NOT" not in lines[-1]
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.long
@pytest.mark.parametrize(
    "old, new, measure",
    [
        ("betas=(0.9, 0.95)", "betas=(0.9, 0.951)", "weight"),
        ("10000.0", "10001.0", "logits"),
        ("warmdown_iters: int = 343", "warmdown_iters: int = 500", "weight"),
        ("30 * torch.tanh(logits / 30)", "30.01 * torch.tanh(logits / 30)", "logits"),
    ],
)
def test_a_small_difference_is_found(log, capsys, old, new, measure):
    code, out, _ = run(capsys, log(old, new), "--tolerance", "1e-6", "--", *FLAGS)
    assert code == 1 and "NOT EQUAL" in out
    first = next(line.split() for line in out.splitlines() if line[:4].strip().isdigit())
    at_first = float(first[3 + parity.MEASURES.index("logits")])
    assert (at_first > 1e-12) == (measure == "logits"), "seen at once, or by its effect"


@pytest.mark.long
def test_float32_on_demand(log, capsys):
    code, out, _ = run(capsys, log(), "--fp32", "--tolerance", "1e-2", "--", *FLAGS)
    assert code == 0 and "float32" in out
    worst = float(out.splitlines()[-1].split()[2])
    assert 1e-9 < worst < 1e-2


def test_bad_files_are_one_line(log, capsys, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("step:1/2 val_loss:3.0\n")
    unknown = tmp_path / "unknown.py"
    unknown.write_text("class GPT(object): ...\n")
    cases = {
        str(tmp_path / "none.txt"): "No such file",
        str(other): "no training script",
        str(unknown): "a script of the tests",
    }
    for path, expected in cases.items():
        code, _, err = run(capsys, path)
        assert code == 2 and expected in err and err.count("\n") == 1, err


@pytest.mark.parametrize(
    "argv, change, expected",
    [
        (["--", "--no_such_flag", "1"], ("", ""), "no_such_flag"),
        (["--", "--steps", "1200"], ("", ""), "value_lambda"),
        (["--seed", "-1"], ("", ""), "seed"),
        ([], ("rank = int(", "rank = 1 // 0 * int("), "ZeroDivisionError"),
    ],
)
def test_bad_flags_and_scripts_are_one_line(log, capsys, argv, change, expected):
    code, _, err = run(capsys, log(*change), *argv)
    assert code == 2 and expected in err and err.count("\n") == 1, err


def test_a_log_without_a_rule_before_its_script(log):
    assert peer.source_of(log(rule="")).count("class GPT(") == 1


def test_the_machine_is_left_alone(log):
    before = dict(os.environ)
    space = peer.execute(peer.source_of(log()), STAND_IN.theirs, lambda args: None)
    after = dict(os.environ)
    after.pop("TORCHINDUCTOR_CACHE_DIR", None)  # torch's own, on its first compilation
    before.pop("TORCHINDUCTOR_CACHE_DIR", None)
    assert after == before
    assert "train_loader" not in space and "x" not in space
    assert space["raw_model"].head.device.type == "cpu"
    assert space["raw_model"].head.dtype == torch.get_default_dtype()


def test_rows_begin_with_documents_and_are_reproducible():
    rows = parity.make_rows(0, 3, 4, 32)
    for row in rows:
        assert row.inputs[0] == parity.VOCABULARY - 1
        assert torch.equal(row.inputs[1:], row.targets[:-1])
    again = parity.make_rows(0, 3, 4, 32)
    assert all(torch.equal(a.inputs, b.inputs) for a, b in zip(rows, again, strict=True))


def test_a_difference_that_is_no_number_is_the_largest():
    largest = parity.Largest()
    for step, value in enumerate([0.5, math.nan, 0.7]):
        largest.see(value, "w", step)
    assert math.isnan(largest.value) and largest.step == 1
    largest.see(math.nan, "w", 3)
    assert largest.step == 1, "the first one"
    assert parity.difference(torch.ones(2), torch.zeros(2)) == math.inf
    assert parity.difference(torch.zeros(2), torch.zeros(2)) == 0


def test_their_own_loss_is_what_they_evaluate(log):
    """The logits are those of which the script's own evaluation takes the cross-entropy."""
    source = peer.source_of(log())
    theirs = parity.build_peer(source, STAND_IN.theirs)
    theirs.shake(torch.Generator().manual_seed(0))
    (row,) = parity.make_rows(0, 0, 1, 16)
    logits = theirs.logits(row)
    assert logits.shape == (16, parity.VOCABULARY) and logits.abs().max() <= 30
    loss = F.cross_entropy(logits, row.targets).item()
    assert abs(loss - theirs.backward([row])) < 1e-5


def test_what_is_replaced_has_a_reason(capsys):
    code, out, _ = run(capsys, "--replaced")
    assert code == 0 and len(out.splitlines()) == len(peer.STAND_INS) + len(peer.RULES)
    assert all(line.partition(": ")[2] for line in out.splitlines())
    assert run(capsys)[0] == 2


@pytest.mark.slow
def test_public_records(capsys):
    logs = [path for path in os.environ.get("PARITY_LOGS", "").split(os.pathsep) if path]
    if not logs:
        pytest.skip("PARITY_LOGS names no log of a public record")
    for path in logs:
        assert run(capsys, path)[0] == 0


def test_an_unknown_script_is_named(tmp_path):
    with pytest.raises(BadInput, match="record 10"):
        parity.recognise("class GPT(nn.Module):", str(tmp_path))
