"""Whole runs on tiny shards, in this process: the loss, the log, the clock, faults, signals."""

import gc
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import time
import types
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers import (
    CPU,
    RULE,
    STEP,
    Ranks,
    at_step,
    check_refused,
    flags,
    make_data,
    run,
    same,
    tiny,
    wait_for_step,
)
from test_checkpoints import RECIPE

import train_gpt
from train_gpt import adapters

FACTS = "run_id python torch cuda device cpu world_size argv source_sha256 data_sha256 config"
KEYS = f"""{FACTS} preset seed steps tokens val_loss target_val_loss target_reached train_time_ms
    step_avg_ms warmup_ms peak_memory_bytes param_count optimizer_state_bytes"""
STAGES = dict(  # borders after steps 4 and 8
    batch_tokens=(128, 256, 512), window=(8, 8, 16), lr_factor=(1.0, 1.0, 0.5)
)
CLOSING = r"val_loss (\d\.\d{4}), target 6.0000 reached by (\d\.\d{4}) in \d+\.\d s of training.*"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def place(data, tmp_path):
    """place() gives the flags of a run on the shared shards whose files are this test's own."""
    own = dict(log_dir=tmp_path / "logs", checkpoint_dir=tmp_path / "checkpoints")
    return lambda **changes: flags(data, **own | changes)


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory):
    """A run with nothing special about it."""
    outcome = run(flags(data, log_dir=tmp_path_factory.mktemp("plain"), target=6.0))
    assert outcome.code == 0 and not outcome.err
    return outcome


# ---------------------------------------------------------------------------- the run and its log
def test_the_loss_falls(plain):
    losses = {(step, kind): float(loss) for step, kind, loss in plain.losses()}
    uniform = pytest.approx(math.log(320), abs=1e-4)
    assert losses["0", "val"] == losses["1", "train"] == uniform
    assert losses["12", "val"] < losses["5", "val"] < losses["0", "val"] - 0.5


def test_the_log(plain):
    start = train_gpt.SOURCE.removesuffix("\n") + "\n" + RULE + "\n"
    assert plain.log.startswith(start), "the source that ran, verbatim"
    assert train_gpt.SOURCE == Path(train_gpt.__file__).read_text(encoding="utf-8")
    assert [plain.path] == list(plain.path.parent.iterdir()), "one file, no leftovers"
    facts = plain.facts()
    assert set(FACTS.split()) <= set(facts)
    assert facts["run_id"] == plain.path.stem
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_[0-9a-f]{6}", facts["run_id"])
    assert facts["source_sha256"] == train_gpt.SOURCE_SHA256
    assert (facts["torch"], facts["world_size"]) == (torch.__version__, "1")
    assert facts["device"] == "cpu" and "--steps 12" in facts["argv"]
    shards = {"train_000000.bin", "train_000001.bin", "val_000000.bin"}
    assert set(json.loads(facts["data_sha256"])) == shards


def test_the_step_lines(plain):
    steps = [STEP.fullmatch(line) for line in plain.body if line.startswith("step:")]
    assert all(steps)
    assert [int(m[1]) for m in steps if m[3] == "train"] == list(range(1, 13))
    assert [int(m[1]) for m in steps if m[3] == "val"] == [0, 5, 10, 12]
    assert all(m[2] == "12" and re.fullmatch(r"\d\.\d{4}", m[4]) for m in steps)
    times = [int(m[5]) for m in steps]
    assert times == sorted(times) and times[0] == 0
    for m in steps[1:]:
        assert abs(float(m[6]) - int(m[5]) / int(m[1])) < 0.6
    shown = [line for line in plain.out.splitlines() if line.startswith("step:")]
    assert shown == [line for line in plain.body if "val_loss:" in line], "validations are shown"


def test_the_result_line(plain):
    result, model = plain.result(), train_gpt.GPT2024(tiny())
    assert set(KEYS.split()) <= set(result)
    assert result["run_id"] == plain.path.stem
    assert result["config"] == json.loads(plain.facts()["config"])
    assert (result["tokens"], result["steps"], result["preset"]) == (12 * 256, 12, "nov2024")
    assert plain.body[-2].startswith("checkpoint: "), "the final model is always saved"
    last = STEP.fullmatch(plain.body[-3])
    assert f"{result['val_loss']:.4f}" == last[4]
    assert abs(result["train_time_ms"] - int(last[5])) <= 1
    assert result["step_avg_ms"] == pytest.approx(result["train_time_ms"] / 12, abs=0.1)
    assert result["target_val_loss"] == 6.0 and result["target_reached"] is True
    assert result["param_count"] == sum(p.numel() for p in model.parameters())
    names = dict(model.named_parameters()).items()
    matrices = sum(p.numel() for name, p in names if name.startswith("blocks.") and p.ndim == 2)
    # Muon keeps one moment, Adam two, of wte, lm_head and scalars, each padded to a multiple of 16
    states = 4 * matrices + 8 * (result["param_count"] - matrices)
    assert 0 <= result["optimizer_state_bytes"] - states <= 8 * 3 * 15
    assert result["peak_memory_bytes"] > 1e7
    assert result["flops_per_token"] == model.flops_per_token()


def test_the_closing_line(plain, place):
    last, sample = plain.out.splitlines()[-2:]
    (checkpoint,) = re.findall(r"--checkpoint (\S+)", sample)
    assert "--generate" in sample and Path(checkpoint).exists()
    found = re.fullmatch(CLOSING, last)
    assert found and float(found[1]) + float(found[2]) == pytest.approx(6.0, abs=2e-4)
    assert last.endswith(str(plain.path))
    missed = run(place(target=0.5))
    assert "target 0.5000 missed by" in missed.out.splitlines()[-2]
    assert missed.result()["target_reached"] is False
    assert missed.code == 0, "a missed target is a result, not an error"


def test_argv_in_the_log_runs_it_again(plain, tmp_path):
    argv = plain.facts()["argv"].split()
    argv[argv.index("--log_dir") + 1] = str(tmp_path)
    again = run(argv)
    assert again.losses() == plain.losses() and same(again.weights, plain.weights)
    other = run([*argv, "--seed", "1"])
    assert other.losses() != plain.losses()


def test_micro_batches_accumulate_to_the_same_update(plain, place):
    for micro in (1, 2):
        outcome = run(place(micro_batch=micro))
        assert f"micro-batches {{'8x32': {micro}}}" in outcome.out
        for ours, theirs in zip(outcome.losses(), plain.losses(), strict=True):
            assert ours[:2] == theirs[:2] and abs(float(ours[2]) - float(theirs[2])) < 2e-3
        for name, tensor in plain.weights.items():
            assert torch.allclose(outcome.weights[name], tensor, atol=5e-3), name


def limit_memory(monkeypatch, fits):
    """Work before the clock runs out of memory unless fits(model, rows, tokens of each). Returns
    all that was run: (adapters?, rows, tokens of each, layers recomputed?, is the clock there?)."""
    forward_backward, seen = train_gpt.forward_backward, []

    def limited(run, batch):
        rows, tokens = batch.parts[0]["tokens"].shape
        if not run.clock and not fits(run.model, rows, tokens):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")
        adapters = bool(train_gpt.adapters(run.model))
        seen.append((adapters, rows, tokens, run.model.recompute, run.clock is not None))
        return forward_backward(run, batch)

    monkeypatch.setattr(train_gpt, "forward_backward", limited)
    return seen


def check_forms(seen):
    """Nothing runs that the warm-up has not run in the same form."""
    warmed, ran = ({form[:4] for form in seen if form[4] is clock} for clock in (False, True))
    assert ran and ran <= warmed


def test_a_later_form_that_needs_more_memory(place, monkeypatch):
    """ReLoRA's adapters allow four rows, what came before them eight: both are warmed with four."""
    changes = dict(relora=4, relora_warm_start=3, relora_interval=4)
    free = run(place(**changes))
    seen = limit_memory(monkeypatch, lambda model, rows, _: rows <= 8 - 4 * bool(adapters(model)))
    outcome = run(place(**changes))
    assert "micro-batches {'8x32': 4}" in outcome.out, outcome.err
    assert {(form[0], form[1]) for form in seen if form[4]} == {(False, 4), (True, 4)}
    check_forms(seen)
    for ours, theirs in zip(outcome.losses(), free.losses(), strict=True):
        assert abs(float(ours[2]) - float(theirs[2])) < 2e-3


def test_long_rows_alone_are_recomputed(place, monkeypatch):
    """The short rows that come before and after them keep their activations."""
    free = run(place(**RECIPE))
    fits = lambda model, _, tokens: tokens == 16 or model.recompute  # noqa: E731
    seen = limit_memory(monkeypatch, fits)
    outcome = run(place(**RECIPE))
    assert "layers recomputed in rows of 32 to save memory" in outcome.out, outcome.err
    assert {form[2:4] for form in seen if form[4]} == {(16, False), (32, True)}
    check_forms(seen)
    assert outcome.losses() == free.losses()


def test_micro_batches_of_stages_with_other_rows(place):
    """A stage of as many rows as another one's micro-batches are tried with."""
    outcome = run(place(batch_tokens=(64, 256), micro_batch=1))
    assert outcome.code == 0, outcome.err
    assert "micro-batches {'2x32': 1, '8x32': 1}" in outcome.out


def test_accumulated_gradients_are_those_of_the_batch():
    grads, config = [], tiny(zero_init=False)
    rows = torch.randint(257, (8, 33), generator=torch.Generator().manual_seed(0))
    for micro, ranks in ((8, 1), (4, 1), (1, 1), (2, 4)):
        runtime = train_gpt.Runtime(torch.device("cpu"), 0, ranks)
        ran = train_gpt.build(config, runtime)
        ran.micro = {(8, 32): micro}
        batch = train_gpt.make_batch(ran, rows.numpy(), 0, [])
        assert len(batch.parts) == 8 // micro
        loss = train_gpt.forward_backward(ran, batch)
        mean = ran.model(rows[:, :-1], rows[:, 1:])
        assert loss.item() * ranks == pytest.approx(mean.item(), abs=1e-5)
        grads.append({name: p.grad * ranks for name, p in ran.model.named_parameters()})
    for other in grads[1:]:
        assert all(torch.allclose(other[name], g, atol=1e-6) for name, g in grads[0].items())


@pytest.mark.long
@pytest.mark.parametrize(
    "changes",
    [
        dict(bf16=True),
        dict(matrix_optimizer="adam"),
        dict(doc_mask=True, window=8),
        dict(ngram=3, ngram_rows=99, normuon=0.9, lr_floor=0.1),
        dict(value_residual=False, embed_residual=False, untie_head=False, softcap=0.0),
        dict(zero_init=False),
        STAGES,
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_mode_of_training_runs(changes, place):
    outcome = run(place(**changes))
    losses = [float(loss) for _, kind, loss in outcome.losses() if kind == "val"]
    assert outcome.code == 0 and losses[-1] < losses[0] - 0.5


def test_schedules_are_lists(place):
    """Each stage has its own batch, window and rate; tokens are those that were read."""
    seen, sizes, step_optimizers = [], [], train_gpt.step_optimizers
    forward_backward = train_gpt.forward_backward

    def watch(run):
        seen.append((run.model.views["all"].window.item(), run.optimizers[0].rate))
        step_optimizers(run)

    def measure(run, batch):
        sizes.append(batch.tokens)
        return forward_backward(run, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "step_optimizers", watch)
        patch.setattr(train_gpt, "forward_backward", measure)
        outcome = run(place(**STAGES, cooldown=0))
    assert sizes[-12:] == [128] * 4 + [256] * 4 + [512] * 4
    rate = seen[-1][1] * 2
    assert seen[-12:] == [(8, rate)] * 8 + [(16, rate / 2)] * 4
    assert outcome.result()["tokens"] == 4 * (128 + 256 + 512)
    assert [stage["window"] for stage in outcome.result()["config"]["stages"]] == [8, 8, 16]
    assert len(set(sizes[:-12])) == 3, "the warm-up runs every size"
    assert {window for window, _ in seen[:-12]} == {8, 16}, "and every window"


# -------------------------------------------------------------------------------------- the clock
def test_the_clock_counts_training_alone(place, monkeypatch):
    """On a clock that only these move: an update takes 1 s, validation 100, saving 1000 ..."""
    now, seconds = [0.0], dict(forward_backward=1, evaluate=100, save_checkpoint=1000)

    def slowed(name, seconds):
        function = getattr(train_gpt, name)

        def slow(*args, **kwargs):
            now[0] += seconds
            return function(*args, **kwargs)

        monkeypatch.setattr(train_gpt, name, slow)

    clock = types.SimpleNamespace(**vars(time) | dict(perf_counter=lambda: now[0]))
    monkeypatch.setattr(train_gpt, "time", clock)
    for name, cost in (seconds | dict(warm_up=10000, make_optimizers=500)).items():
        slowed(name, cost)
    outcome = run(place(checkpoint_every=4))
    result = outcome.result()
    assert (result["train_time_ms"], result["step_avg_ms"]) == (12000, 1000)
    forms = result["warmup_ms"] / 1000 - 10_500  # it makes optimizers, and runs each form once
    assert forms in (1, 2, 3)
    assert "step:5/12 val_loss" in outcome.log
    assert "train_time:5000ms step_avg:1000.00ms" in outcome.log


def test_no_garbage_is_collected_while_the_clock_runs(place, monkeypatch):
    seen, step = [], train_gpt.step_optimizers

    def watch(run):
        seen.append((gc.isenabled(), gc.get_freeze_count() > 0))
        step(run)

    monkeypatch.setattr(train_gpt, "step_optimizers", watch)
    monkeypatch.setattr(train_gpt, "warm_up", lambda *given: ({(8, 32): 8}, set(), 32))
    run(place())
    assert seen and set(seen) == {(False, True)}
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_warm_up_leaves_no_trace(place, monkeypatch, plain):
    """With and without it: the same losses and weights."""
    monkeypatch.setattr(train_gpt, "warm_up", lambda *given: ({(8, 32): 8}, set(), 32))
    outcome = run(place())
    assert outcome.losses() == plain.losses() and same(outcome.weights, plain.weights)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        dict(batch_tokens=(128, 256), relora=4, relora_warm_start=3, relora_interval=3, lawa=2),
        dict(batch_tokens=(128, 256, 512), window=(8, 12, 16)),
        dict(galore=4, matrix_optimizer="muon", normuon=0.9, galore_interval=2, galore_bits=8),
    ],
    ids=["relora, lawa", "more forms than Dynamo's limit", "galore"],
)
def test_warm_up_compiles_every_form(changes, place, monkeypatch):
    """Dynamo's counters stand still after it; with its own code generator left out, for speed."""
    compile, counters, seen = torch.compile, torch._dynamo.utils.counters, []
    warm_up = train_gpt.warm_up

    def watch(*given):
        torch._dynamo.reset()
        counters.clear()
        found = warm_up(*given)
        seen.append(dict(counters["stats"]))
        return found

    train_gpt.compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", lambda f, **rest: compile(f, backend="eager", **rest))
    monkeypatch.setattr(train_gpt, "warm_up", watch)
    eager = run(place(**changes))
    outcome = run(place(compile=True, **changes))
    train_gpt.compiled.cache_clear()
    assert outcome.code == 0 and outcome.losses() == eager.losses()
    assert seen[-1]["unique_graphs"] >= 6 and dict(counters["stats"]) == seen[-1]
    assert not counters["graph_break"], counters["graph_break"]


def test_losses_read_late_give_the_same_log(place, plain, monkeypatch):
    """As on a GPU, where a loss is read one update after it was made."""
    read_losses = train_gpt.read_losses
    monkeypatch.setattr(
        train_gpt,
        "read_losses",
        lambda run, late=None: read_losses(run, late=0 if late is None else 1),
    )
    outcome = run(place(checkpoint_every=4))
    assert outcome.losses() == plain.losses()

    def plant(run):
        with torch.no_grad():
            run.model.lm_head.weight[3, 3] = math.nan

    with at_step(6, plant):
        late = run(place(val_every=0))
    check_refused(late, "the train loss became nan at step 7")
    with at_step(7, lambda run: os.kill(os.getpid(), signal.SIGTERM)):
        stopped = run(place(checkpoint_every=100))
    assert stopped.code == 143
    again = run(place(checkpoint_every=100, resume="latest"))
    assert again.losses() == plain.losses() and same(again.weights, plain.weights)


# ----------------------------------------------------------------------------------------- faults
@pytest.mark.long
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run(value, place):
    def plant(run):
        with torch.no_grad():
            run.model.lm_head.weight[3, 3] = value

    with at_step(7, plant):
        outcome = run(place(softcap=0.0))
    check_refused(outcome, "the train loss became", "at step 8", "lower the learning rates")
    assert outcome.losses()[-1][0] == "8", "nothing after it"
    with at_step(12, plant):  # only the last validation can tell
        outcome = run(place(softcap=0.0))
    check_refused(outcome, "the val loss became", "at step 12")
    assert not outcome.body[-1].startswith("{"), "no result"


@contextmanager
def full_disk(path: Path):
    """No file may grow much beyond the log's size: what the system says of a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_does_not_end_the_run(place, plain, tmp_path):
    """For a while: what was not logged is on the screen, no half a checkpoint is left."""
    disk, leftovers = ExitStack(), []
    with (
        at_step(3, lambda run: disk.enter_context(full_disk(run.log.path))),
        at_step(9, lambda run: leftovers.extend(tmp_path.glob("checkpoints/*/*"))),
        at_step(9, lambda run: disk.close()),
    ):
        outcome = run(place(checkpoint_every=4))
    assert outcome.code == 0 and same(outcome.weights, plain.weights)
    logged = {loss for loss in outcome.losses()}
    lost = [line for line in outcome.out.splitlines() if "not logged" in line]
    assert [line.split("/")[0] for line in lost if "train_loss" in line] == [
        f"step:{step}" for step in range(3, 9)
    ]
    assert logged < set(plain.losses()) and len(logged) == len(plain.losses()) - 7
    assert "step_000004.pt not written" in outcome.out and not leftovers, "it fills the disk"
    assert outcome.result()["val_loss"] == plain.result()["val_loss"]
    assert [path.name for path in tmp_path.glob("checkpoints/*/*")] == ["step_000012.pt"]


def test_a_full_disk_to_the_end_still_shows_the_result(place, plain):
    with ExitStack() as disk, at_step(3, lambda run: disk.enter_context(full_disk(run.log.path))):
        outcome = run(place())
    assert outcome.code == 0
    (result,) = [line for line in outcome.out.splitlines() if line.startswith("{")]
    result = json.loads(result.partition(" (not logged")[0])
    assert result["val_loss"] == plain.result()["val_loss"]
    assert "step:2/12" in outcome.log and "step:3/12" not in outcome.body


def test_a_log_folder_removed_during_the_run(place, plain):
    with at_step(6, lambda run: shutil.rmtree(run.log.path.parent)):
        outcome = run(place())
    assert outcome.code == 0 and same(outcome.weights, plain.weights)
    assert '"run_id"' in outcome.out, "the result reaches the screen"


@pytest.mark.long
@pytest.mark.parametrize(
    "threads, seconds, speaks", [(2, 0.02, True), (2, 0, False), (1, 0.02, False)]
)
def test_threads_that_fight_are_told_once(threads, seconds, speaks, place, monkeypatch):
    """A shared sum takes so many seconds; two spinning processes do the same, but not always."""

    class Slow:
        def __iadd__(self, one):
            time.sleep(seconds)
            return self

    zeros = torch.zeros

    def make(*shape, **options):
        return Slow() if shape == (32768 * threads,) else zeros(*shape, **options)

    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(torch, "zeros", make)
    outcome = run(place(steps=1, momentum_warmup=0))
    assert outcome.code == 0, outcome.err
    said = [line for line in outcome.body if "OMP_WAIT_POLICY=PASSIVE" in line]
    assert len(said) == speaks and all(line in outcome.out for line in said)


@pytest.mark.parametrize("changes", [{}, dict(ngram=3, ngram_rows=50, value_embeds=True)])
def test_norms_are_those_of_every_parameter(changes, place, plain, monkeypatch):
    """Against a plain sum over parameters, each by itself."""
    step_optimizers, expected = train_gpt.step_optimizers, {}

    def norm(tensors):
        return math.sqrt(sum(t.double().square().sum().item() for t in tensors))

    def step(run):
        stacks = {next(iter(o.named)): list(o.named.values()) for o in run.optimizers}
        gradients = {name: norm(p.grad for p in ps) for name, ps in stacks.items() if run.clock}
        before = {name: [p.detach().clone() for p in ps] for name, ps in stacks.items()}
        step_optimizers(run)
        for name in gradients:
            pairs = zip(stacks[name], before[name], strict=True)
            moved = norm(p.detach() - old for p, old in pairs)
            norms = [gradients[name], moved, norm(p.detach() for p in stacks[name])]
            if (run.step + 1) % 5 == 0:
                expected[f"{run.step + 1}/12", name] = norms

    monkeypatch.setattr(train_gpt, "step_optimizers", step)
    outcome = run(place(log_norms=5, **changes))
    assert outcome.code == 0, outcome.err
    found = outcome.norms()
    assert found.keys() == expected.keys() and len(found) >= 8
    for key, values in found.items():
        assert values == pytest.approx(expected[key], rel=1e-3), key
    if not changes:
        assert outcome.losses() == plain.losses() and not plain.norms()


def test_nothing_is_overwritten(place, tmp_path):
    logs = []
    for _ in range(3):
        logs.append(run(place(steps=2, checkpoint_every=1)).path)
        if len(logs) == 1:
            files = [path for path in tmp_path.rglob("*") if path.is_file()]
            before = {path: path.read_bytes() for path in files}
    assert len(set(logs)) == 3 and len(before) == 3
    assert all(path.read_bytes() == content for path, content in before.items())


# ---------------------------------------------------------------------------------------- signals
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_saves_and_leaves(number, place, plain, tmp_path):
    with at_step(7, lambda run: os.kill(os.getpid(), number)):
        outcome = run(place(checkpoint_every=100))
    assert outcome.code == 128 + number and not outcome.err
    assert "stopped by a signal after step 7" in outcome.body[-1]
    (path,) = tmp_path.glob("checkpoints/*/step_*.pt")
    assert path.name == "step_000007.pt"
    again = run(place(checkpoint_every=100, resume="latest"))
    assert again.losses() == plain.losses() and same(again.weights, plain.weights)


def test_a_signal_saves_unasked_and_says_how_to_go_on(place, plain):
    with at_step(7, lambda run: os.kill(os.getpid(), signal.SIGTERM)):
        stopped = run(place())
    (path,) = re.findall(r"go on with --resume (\S+)", stopped.body[-1])
    again = run(place(resume=path))
    assert stopped.code == 143 and again.losses() == plain.losses()


def test_a_stop_on_a_full_disk_names_no_file_that_is_not_there(place, tmp_path):
    with (
        ExitStack() as disk,
        at_step(3, lambda run: disk.enter_context(full_disk(run.log.path))),
        at_step(7, lambda run: os.kill(os.getpid(), signal.SIGTERM)),
    ):
        stopped = run(place())
    assert stopped.code == 143 and not list(tmp_path.glob("checkpoints/*/*"))
    assert "no checkpoint could be written" in stopped.out and "--resume" not in stopped.out


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_a_warning_saves_and_training_goes_on(number, place, plain, tmp_path):
    with at_step(7, lambda run: os.kill(os.getpid(), number)):
        outcome = run(place())
    assert outcome.code == 0 and outcome.losses() == plain.losses()
    names = sorted(path.name for path in tmp_path.glob("checkpoints/*/*"))
    assert names == ["step_000007.pt", "step_000012.pt"]


def test_resume_auto_starts_where_there_is_nothing(place, plain, tmp_path):
    first = run(place(resume="auto", steps=12))
    assert first.code == 0 and first.losses() == plain.losses()
    second = run(place(resume="auto"))
    assert second.code == 0 and "resumed: from step 12" in second.log
    assert len(list(tmp_path.glob("checkpoints/*/*"))) == 1, "one run, one folder"


@pytest.mark.long
def test_checkpoints_kept_are_those_of_the_run_however_often_resumed(place, tmp_path):
    for at in (3, 5, 7, 9):
        with at_step(at, lambda run: os.kill(os.getpid(), signal.SIGTERM)):
            run(place(resume="auto", checkpoint_keep=1))
    assert [path.name for path in tmp_path.glob("checkpoints/*/*")] == ["step_000009.pt"]


def test_the_clock_stands_while_the_last_line_is_written(place, monkeypatch):
    append = train_gpt.Log.append

    def slow(log, text):
        time.sleep(0.3 if "val_loss" in text else 0)
        append(log, text)

    monkeypatch.setattr(train_gpt.Log, "append", slow)
    outcome = run(place(steps=2, val_every=1, momentum_warmup=1))
    last = [STEP.fullmatch(line) for line in outcome.body if "val_loss:" in line][-1]
    assert abs(outcome.result()["train_time_ms"] - int(last[5])) <= 1


def test_a_resumed_run_saves_when_it_is_stopped(place, plain, tmp_path):
    """Asked for checkpoints or not, so that a scheduler may always say --resume."""
    with at_step(5, lambda run: os.kill(os.getpid(), signal.SIGTERM)):
        run(place(checkpoint_every=100))
    with at_step(7, lambda run: os.kill(os.getpid(), signal.SIGTERM)):
        assert run(place(resume="latest")).code == 143
    names = sorted(path.name for path in tmp_path.glob("checkpoints/*/step_*.pt"))
    assert names == ["step_000005.pt", "step_000007.pt"]
    again = run(place(resume="latest"))
    assert again.losses() == plain.losses() and same(again.weights, plain.weights)


def test_the_live_line_fits_the_terminal(place, monkeypatch):
    size = os.terminal_size((30, 24))  # of the trainer alone: pytest has a terminal of its own
    narrow = types.SimpleNamespace(**vars(shutil) | dict(get_terminal_size=lambda: size))
    monkeypatch.setattr(train_gpt, "shutil", narrow)
    seconds = itertools.count().__next__
    monkeypatch.setattr(
        train_gpt, "time", types.SimpleNamespace(**vars(time) | dict(monotonic=seconds))
    )
    started = train_gpt.Log.__init__

    def on_a_terminal(log, *given):
        started(log, *given)
        log.live = True

    monkeypatch.setattr(train_gpt.Log, "__init__", on_a_terminal)
    shown = re.findall(r"\r\x1b\[K(\d+/12 .*?)(?=[\r\n])", run(place()).out)
    assert len(shown) == 12 and all("s left" in line and len(line) < 30 for line in shown)


def test_a_kernel_that_fits_at_no_size_is_one_line(place, monkeypatch):
    def refused(*given):
        raise RuntimeError(
            "out of resource: shared memory, Required: 180224, Hardware limit: 101376"
        )

    monkeypatch.setattr(train_gpt, "forward_backward", refused)
    check_refused(run(place()), "shared memory", "--n_head")


def test_a_terminal_that_goes_away_ends_nothing(place, plain, monkeypatch):
    def gone(*args, **options):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("builtins.print", gone)
        outcome = run(place())
    assert outcome.code == 0 and outcome.losses() == plain.losses()
    assert outcome.result()["val_loss"] == plain.result()["val_loss"]


@pytest.mark.parametrize("step", [11, 12])
def test_a_signal_in_the_last_steps_loses_nothing(step, place, plain):
    with at_step(step, lambda run: os.kill(os.getpid(), signal.SIGTERM)):
        outcome = run(place(checkpoint_every=100))
    if outcome.code == 143:
        outcome = run(place(checkpoint_every=100, resume="latest"))
    assert outcome.code == 0 and outcome.losses() == plain.losses()


@pytest.mark.long
def test_a_signal_to_a_process_of_its_own(data, tmp_path):
    endless = dict(steps=5000, epochs_allowed=5000, val_every=0, checkpoint_every=4000)
    files = dict(log_dir=tmp_path / "logs", checkpoint_dir=tmp_path / "checkpoints")
    ranks = Ranks(tmp_path, [flags(data, **files, **endless)])
    wait_for_step(tmp_path, 3)
    os.kill(ranks.processes[0].pid, signal.SIGHUP)
    (outcome,) = ranks.wait(20)
    assert outcome.code == 129 and not outcome.err
    assert len(list(tmp_path.glob("checkpoints/*/step_*.pt"))) == 1


def test_ctrl_c_before_training_is_no_traceback(place, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_gpt, "warm_up", interrupted)
    outcome = run(place())
    assert outcome.code == 130 and not outcome.err


# ------------------------------------------------------------------------------------- evaluation
def test_validation_is_in_eval_mode_and_sees_every_token_once(place, data):
    """Dropout in a fork must be off; the mean is over the first val_tokens tokens."""
    modes = []
    ran = train_gpt.build(tiny(zero_init=False), CPU)
    ran.model.lm_head.register_forward_hook(lambda head, *rest: modes.append(head.training))
    ran.log = mock.Mock()
    val = train_gpt.Shards(f"{data}/val_*.bin", "val_files", 256)
    losses = []
    for micro in (8, 1, 5):
        ran.micro = {(8, 32): micro}
        losses.append(train_gpt.evaluate(ran, val))
    assert set(modes) == {False} and ran.model.training
    rows = torch.stack([torch.from_numpy(val.read(val.row(i, 32))) for i in range(16)])
    with torch.no_grad():
        by_hand = ran.model(rows[:, :-1], rows[:, 1:]).item()
    assert losses == pytest.approx([by_hand] * 3, abs=1e-5)


def test_a_slow_validation_is_not_in_train_time(place, monkeypatch):
    evaluate = train_gpt.evaluate

    def slow(*args):
        time.sleep(0.4)
        return evaluate(*args)

    monkeypatch.setattr(train_gpt, "evaluate", slow)
    began = time.perf_counter()
    outcome = run(place(steps=2, val_every=1))
    elapsed = 1000 * (time.perf_counter() - began)
    assert elapsed > 1200 and outcome.result()["train_time_ms"] < elapsed - 1200
