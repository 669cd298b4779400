"""Checkpoints: resuming bit for bit, files that are damaged or hold something else, sampling."""

import contextlib
import hashlib
import io
import json
import math
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers import EVERY_METHOD, RULE, check_refused, flags, make_data, run, same

import train_gpt

STAGES = dict(batch_tokens=(128, 256, 512), window=(8, 8, 16), lr_factor=(1, 1, 0.5))
RECIPE = dict(  # record 92, small: candidate sweeps, table cycles, untying, tail averages
    preset="gpt2_small",
    steps=36,
    n_layer=None,
    n_embd=48,
    table_rows=300,
    bf16_weights=True,
    batch_tokens=(128, 256, 256, 256, 128),
    seq_len=(16, 32, 32, 32, 16),
    max_document=(9, 20, 20, 20, 20),
    window=(8, 12, 16, 16, 20),
    short_window=(4, 6, 8, 8, 8),
    val_seq_len=32,
    val_every=4,
    epochs_allowed=50,
    spread_rows=None,
    checkpoint_every=2,
)
RESUMED = {
    "muon": {},
    "adam, bf16": dict(matrix_optimizer="adam", bf16=True),
    "bf16 weights": dict(bf16_weights=True),
    "tied, ngrams": dict(untie_head=False, ngram=3, ngram_rows=99, normuon=0.9),
} | EVERY_METHOD


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def place(data, tmp_path):
    """place() gives the flags of a run on the shared shards whose files are this test's own."""
    own = dict(log_dir=tmp_path / "logs", checkpoint_dir=tmp_path / "checkpoints")
    return lambda **changes: flags(data, **own | changes)


@pytest.fixture(scope="module")
def saved(data, tmp_path_factory):
    """(outcome, folder of checkpoints of steps 4, 8 and 12) of a plain run."""
    folder = tmp_path_factory.mktemp("saved")
    own = dict(log_dir=folder / "logs", checkpoint_dir=folder / "checkpoints")
    outcome = run(flags(data, **own, checkpoint_every=4, checkpoint_keep=9))
    (folder / "checkpoints" / outcome.path.stem).rename(folder / "run")
    return outcome, folder / "run"


@pytest.fixture
def plain(saved):
    return saved[0]


@pytest.fixture
def copied(saved, tmp_path):
    """This test's own copy of the three checkpoints."""
    shutil.copytree(saved[1], tmp_path / "checkpoints" / "run")
    return tmp_path / "checkpoints" / "run"


# -------------------------------------------------------------------------------------- resuming
@pytest.mark.parametrize("method", RESUMED)
def test_resume_is_bit_for_bit(method, place, tmp_path):
    changes = dict(checkpoint_every=5, checkpoint_keep=9, **RESUMED[method])
    whole = run(place(**changes))
    assert whole.code == 0, whole.err
    found = sorted(tmp_path.glob("checkpoints/*/step_*.pt"))
    assert [int(path.stem[-6:]) for path in found] == [5, 10, 12]
    before = found[0].read_bytes()
    again = run(place(resume=found[0], **changes))
    assert again.code == 0, again.err
    assert again.losses() == whole.losses(), "the same log lines but for the times"
    assert same(again.weights, whole.weights)
    assert again.path != whole.path and found[0].read_bytes() == before
    (line,) = [line for line in again.body if line.startswith("resumed: ")]
    assert str(found[0]) in line and "step 5" in line


@pytest.fixture(scope="module")
def recipe(data, tmp_path_factory):
    """(outcome, checkpoints) of a whole run of RECIPE, with sampled softmax."""
    folder = tmp_path_factory.mktemp("recipe")
    own = dict(log_dir=folder / "logs", checkpoint_dir=folder / "checkpoints")
    with fewer_classes():
        outcome = run(flags(data, **own | RECIPE, checkpoint_keep=99))
    return outcome, next((folder / "checkpoints").glob("*"))


@contextlib.contextmanager
def fewer_classes():
    """A softmax over 200 of 320 classes in the first stages."""
    with pytest.MonkeyPatch.context() as patch:
        at = train_gpt.candidates_at
        patch.setattr(train_gpt, "candidates_at", lambda step, c: 200 if step < 30 else at(step, c))
        yield


@pytest.mark.long
@pytest.mark.parametrize("at", [2, 12, 20, 32])
def test_resume_of_the_recipe(at, recipe, place, tmp_path):
    """Across stages, between cycles of the table, before and after untying."""
    whole, folder = recipe
    assert whole.code == 0, whole.err
    with fewer_classes():
        again = run(place(**RECIPE, resume=folder / f"step_{at:06d}.pt"))
    assert again.code == 0, again.err
    assert again.losses() == whole.losses() and same(again.weights, whole.weights)
    last = "step_000036.table0.pt"
    (path,) = tmp_path.glob(f"checkpoints/*/{last}")
    ours, theirs = train_gpt.read_file(path), train_gpt.read_file(folder / last)
    assert same(ours, theirs) and len(ours["rows"]) > 100


@pytest.mark.long
@pytest.mark.parametrize("at", [3, 4, 5, 6, 8])
def test_resume_across_the_borders_of_stages(at, place, tmp_path):
    """Also where a validation, a new batch or a new window comes right after the checkpoint."""
    changes = dict(val_every=2, checkpoint_every=1, checkpoint_keep=99, **STAGES)
    whole = run(place(**changes))
    (path,) = tmp_path.glob(f"checkpoints/*/step_{at:06d}.pt")
    again = run(place(resume=path, **changes))
    assert again.losses() == whole.losses() and same(again.weights, whole.weights)


def test_random_numbers_go_on_where_they_were(place, tmp_path):
    """For ideas that draw some (dropout); the warm-up's draws are put back."""
    drawn, update = [], train_gpt.step_optimizers

    def update_and_draw(run):
        update(run)
        number = torch.rand(()).item()
        if run.clock:  # not the warm-up's
            drawn.append(number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_gpt, "step_optimizers", update_and_draw)
        run(place(checkpoint_every=5, checkpoint_keep=9))
        torch.manual_seed(99)
        run(place(resume=next(tmp_path.glob("checkpoints/*/step_000005.pt"))))
    assert len(set(drawn[:12])) == 12 and drawn[12:] == drawn[5:12]
    torch.manual_seed(0)
    assert drawn[0] == torch.rand(()).item()


def test_resume_twice_over(place, plain, tmp_path):
    """`latest` is the newest of all runs; the log of a resumed run holds all of the run's steps."""
    run(place(checkpoint_every=5))
    next(tmp_path.glob("checkpoints/*/step_000012.pt")).unlink()
    second = run(place(checkpoint_every=11, resume="latest"))
    assert "step_000010.pt" in second.out
    next(tmp_path.glob("checkpoints/*/step_000012.pt")).unlink()
    third = run(place(resume="latest"))
    assert "step_000011.pt" in third.out
    assert second.losses() == third.losses() == plain.losses()
    assert same(third.weights, plain.weights)
    assert sum(line.startswith("resumed: ") for line in third.body) == 2
    assert third.result()["train_time_ms"] > 0


def test_latest_is_the_newest_whatever_its_step(place, copied):
    os.utime(copied / "step_000004.pt", (2**32, 2**32))
    assert "step_000004.pt" in run(place(resume="latest")).out


def test_the_clock_goes_on(place, copied):
    """A resumed run's time holds the time before."""
    path = copied / "step_000008.pt"
    rewrite(path, lambda state: state.update(train_seconds=1000.0))
    assert run(place(resume=path)).result()["train_time_ms"] > 1_000_000


def test_the_newest_are_kept(place, tmp_path):
    run(place(checkpoint_every=2, checkpoint_keep=3))
    names = sorted(path.name for path in tmp_path.glob("checkpoints/*/*"))
    assert names == ["step_000008.pt", "step_000010.pt", "step_000012.pt"]


def test_a_finished_run_resumed_still_gets_its_result(place, copied, plain):
    outcome = run(place(resume=copied / "step_000012.pt"))
    assert outcome.code == 0 and outcome.losses() == plain.losses()
    assert outcome.result()["val_loss"] == plain.result()["val_loss"]


def test_checkpoints_hold_no_code(copied):
    for path in copied.glob("*"):
        state = train_gpt.read_checkpoint(path)  # weights_only
        assert state["step"] == int(path.stem[-6:]) and state["train_seconds"] > 0


def test_a_folder_that_no_checkpoint_can_be_in_is_refused_at_once(place, tmp_path):
    (tmp_path / "checkpoints").write_text("a file in the way")
    check_refused(run(place(checkpoint_every=5)), "--checkpoint_dir", "is not a folder")
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("flag", ["log_dir", "checkpoint_dir"])
def test_a_folder_that_may_not_be_written_to_leaves_nothing_behind(
    flag, place, tmp_path, monkeypatch
):
    (tmp_path / "others").mkdir()
    access = os.access  # root may write anywhere, so the system's answer is replaced
    monkeypatch.setattr(
        os, "access", lambda path, mode: access(path, mode) and not str(path).endswith("others")
    )
    check_refused(run(place(**{flag: tmp_path / "others" / "mine"})), f"--{flag}", "others is not")
    assert [path.name for path in tmp_path.rglob("*")] == ["others"]


# --------------------------------------------------------------------------------- other than told
def test_another_config_is_refused_unless_told(place, copied, plain):
    path = copied / "step_000008.pt"
    changed = dict(resume=path, lr_muon=0.01, seed=4)
    words = "seed: 0, now 4; lr_muon: 0.02, now 0.01"
    check_refused(run(place(**changed)), str(path), words, "--resume_anyway")
    outcome = run(place(**changed, resume_anyway=True))
    assert outcome.code == 0 and outcome.losses() != plain.losses()
    assert "'seed', 'lr_muon'" in outcome.log.rpartition(RULE)[2], "the log says what changed"
    elsewhere = dict(micro_batch=2, checkpoint_every=3, rank_timeout=9, val_every=5)
    assert run(place(resume=path, **elsewhere)).code == 0, "where and how, not what, is trained"


def test_other_source_or_data_are_refused(place, copied, tmp_path, monkeypatch):
    other = make_data(tmp_path / "other", seed=2)
    digest = {"files": {"train_000000.bin": {"sha256": "0"}}}
    (other / "manifest.json").write_text(json.dumps(digest))
    other_data = place(resume="latest", train_files=f"{other}/train_*.bin")
    check_refused(run(other_data), "the data", "--resume_anyway")
    monkeypatch.setattr(train_gpt, "SOURCE_SHA256", "0" * 64)
    check_refused(run(place(resume="latest")), "the source of train_gpt.py", "--resume_anyway")


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(n_layer=3), "does not fit this model"),
        (dict(n_embd=64), "does not fit this model"),
        (dict(lawa=2), "does not fit this model or method"),
        (dict(matrix_optimizer="adam"), "does not fit this model or method"),
        (dict(steps=7, momentum_warmup=7), "step 12 is after the end"),
    ],
)
def test_another_model_is_refused(changes, words, place, copied):
    check_refused(run(place(resume="latest", **changes)), next(iter(changes)), "--resume_anyway")
    check_refused(run(place(resume="latest", **changes, resume_anyway=True)), words)


# ------------------------------------------------------------------------------------------ damage
def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)


DAMAGE = {
    "truncated": truncate,
    "one bit": flip,
    "foreign": lambda path: path.write_bytes(os.urandom(5000)),
    "another torch file": lambda path: torch.save({"step": 8}, path),
    "pickled code": lambda path: torch.save(sys.exit, path),
    "empty": lambda path: path.write_bytes(b""),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.long
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_checkpoint_gives_way_to_an_older_one(damage, place, copied, plain):
    for path in sorted(copied.glob("*.pt")):
        os.utime(path, (int(path.stem[-6:]),) * 2)
    for name in ("step_000012.pt", "step_000008.pt"):
        damage(copied / name)
        os.utime(copied / name, (100 + int(name[5:11]),) * 2)
    outcome = run(place(resume="latest", checkpoint_keep=9))
    assert outcome.code == 0 and outcome.losses() == plain.losses()
    assert "step_000004.pt" in outcome.out
    (first, second) = outcome.err.splitlines()
    assert "step_000012.pt: damaged or not a checkpoint" in first
    assert "step_000008.pt" in second and "looking for an older one" in second
    check_refused(run(place(resume=copied / "step_000008.pt")), "step_000008.pt", "damaged")
    for path in copied.iterdir():
        if path.is_file():
            path.write_bytes(b"")
    last = run(place(resume="latest"))
    assert last.code == 2 and "no checkpoint in" in last.err.splitlines()[-1]
    assert "Traceback" not in last.err


def rewrite(path, change):
    """Another content under a right checksum, as another program might have written it."""
    state = train_gpt.read_checkpoint(path)
    state = change(state) or state
    file = io.BytesIO()
    torch.save(state, file)
    path.write_bytes(file.getvalue() + hashlib.sha256(file.getvalue()).digest())


def put(*where_and_value):
    """A change of a state: put("model", name, value)."""
    *where, last, value = where_and_value

    def change(state):
        for key in where:
            state = state[key]
        state[last] = value(state[last]) if callable(value) else value

    return change


def without(state, key):
    return {name: value for name, value in state.items() if name != key}


def nested(depth):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


MUON, WTE = "Muon blocks.0.attn.q.weight", "wte.weight"
KEYS = "step model optimizers methods sweeps tables rng train_seconds config identity log".split()
WRONG = {f"no {key}": (lambda state, key=key: without(state, key)) for key in KEYS} | {
    "a list": lambda state: [1, 2],
    "a number": lambda state: 8,
    "negative step": put("step", -3),
    "a step between": put("step", 3.5),
    "step nan": put("step", math.nan),
    "a step in words": put("step", "8"),
    "a step that is a tensor": put("step", torch.tensor([8])),
    "a step that is true": put("step", True),
    "step after the end": put("step", 13),
    "negative time": put("train_seconds", -1.0),
    "time nan": put("train_seconds", math.nan),
    "endless time": put("train_seconds", math.inf),
    "time in words": put("train_seconds", "long ago"),
    "config a list": put("config", [1]),
    "config with a strange field": put("config", "stepz", 5),
    "config of other types": put("config", "n_layer", "2"),
    "config against the rules": put("config", "n_head", 5),
    "identity a list": put("identity", [3]),
    "identity of another": put("identity", {}),
    "log of numbers": put("log", [1, 2]),
    "log none": put("log", None),
    "model empty": put("model", {}),
    "model of numbers": put("model", WTE, 3),
    "model of another shape": put("model", WTE, lambda t: t[:5]),
    "model transposed": put("model", "blocks.0.mlp.up.weight", lambda t: t.T),
    "model with more": put("model", "blocks.9.weight", torch.zeros(3)),
    "model nested": put("model", WTE, nested(50)),
    "optimizers empty": put("optimizers", {}),
    "optimizers of another rule": put(
        "optimizers", lambda o: {name.replace("Muon", "Adam"): v for name, v in o.items()}
    ),
    "moments of numbers": put("optimizers", MUON, 3),
    "moments a list": put("optimizers", MUON, "momentum", [1.0]),
    "too few rows": put("optimizers", MUON, "momentum", lambda t: t[:0]),
    "too many rows": put("optimizers", MUON, "momentum", lambda t: torch.cat((t, t))),
    "moments of another name": put("optimizers", MUON, {"steps": 8, "velocity": torch.zeros(1)}),
    "steps in words": put("optimizers", MUON, "steps", "8"),
    "negative steps": put("optimizers", MUON, "steps", -5),
    "a method too many": put("methods", [{}]),
    "methods a number": put("methods", 3),
    "rng too short": put("rng", lambda t: t[:5]),
    "rng of floats": put("rng", lambda t: t.float()),
    "rng none": put("rng", None),
}
# with --resume_anyway
HARMLESS = {"identity of another", "identity a list", "config of other types"}


@pytest.mark.long
@pytest.mark.parametrize("wrong", WRONG)
def test_a_whole_file_with_wrong_content_is_one_line(wrong, place, copied):
    path = copied / "step_000008.pt"
    rewrite(path, WRONG[wrong])
    resumed = run(place(resume=path, resume_anyway=True))
    if wrong not in HARMLESS:
        check_refused(resumed, str(path))
    argv = ["--generate", "a", "--checkpoint", str(path), "--device", "cpu"]
    sampled = run([*argv, "--generate_tokens", "2"])
    assert sampled.code in (0, 2)
    if sampled.code:
        check_refused(sampled, str(path))


# ----------------------------------------------------------------------------- load_model, sampling
LOADED = RESUMED | {"stages": STAGES, "documents": dict(doc_mask=True)}


@pytest.mark.long
@pytest.mark.parametrize("method", LOADED)
def test_load_model_is_what_validation_saw(method, place, data, tmp_path):
    """LAWA's average, ReLoRA's adapters, SuPar's masks, the last stage's window: all of it."""
    outcome = run(place(**dict(checkpoint_every=12, epochs_allowed=2) | LOADED[method]))
    (path,) = tmp_path.glob("checkpoints/*/step_000012.pt")
    model = train_gpt.load_model(path)
    assert not model.training
    tokens = torch.from_file(str(data / "val_000000.bin"), size=512 + 700, dtype=torch.int16)
    rows = tokens[512 : 512 + 513].long()
    inputs, targets = rows[:-1].view(16, 32), rows[1:].view(16, 32)
    with torch.no_grad():
        logits = model(inputs)
    assert logits.dtype == torch.float32 and logits.shape == (16, 32, 320)
    picked = torch.log_softmax(logits.double(), -1).gather(-1, targets[..., None])
    assert -picked.mean().item() == pytest.approx(outcome.result()["val_loss"], abs=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("changes", [dict(relora_warm_start=12), dict(relora_warm_start=11)])
def test_adapters_that_came_last(changes, place, tmp_path):
    """A warm start as long as the run; its checkpoint loads all the same."""
    changes = dict(relora=4, checkpoint_every=12, **changes)
    outcome = run(place(**changes))
    (path,) = tmp_path.glob("checkpoints/*/step_000012.pt")
    train_gpt.load_model(path)
    again = run(place(resume=path, **changes))
    assert again.code == 0 and again.losses() == outcome.losses()


def sample(path, **fields):
    given = dict(generate="abc é", checkpoint=path, generate_tokens=40, device="cpu") | fields
    return run([word for name, value in given.items() for word in (f"--{name}", str(value))])


def test_generate(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = saved[1] / "step_000008.pt"
    outcomes = [sample(path, seed=seed) for seed in (1, 1, 2)]
    for outcome in outcomes:
        assert outcome.code == 0 and not outcome.err
        assert outcome.out.startswith("abc é") and outcome.out.endswith("\n")
    first, again, other = (outcome.out for outcome in outcomes)
    assert first == again != other and len(first) > 6
    greedy = [sample(path, seed=seed, temperature=0).out for seed in (1, 2)]
    assert greedy[0] == greedy[1]
    latest = sample("latest", checkpoint_dir=path.parents[1])
    assert latest.code == 0
    assert not list(tmp_path.iterdir()), "sampling writes nothing"


def test_generate_takes_the_likeliest_next_token(saved):
    """At temperature 0, by load_model; a window of seq_len tokens, the mark first."""
    path = saved[1] / "step_000012.pt"
    model, tokens = train_gpt.load_model(path), [256, *b"abc"]
    expected = b"abc"
    for _ in range(40):
        with torch.no_grad():
            best = int(model(torch.tensor([tokens[-32:]]))[0, -1, :257].argmax())
        if best == 256:
            break
        tokens.append(best)
        expected += bytes([best])
    out = sample(path, generate="abc", temperature=0).out
    assert out.rstrip("\n") == expected.decode(errors="replace").rstrip("\n")


def test_the_tokenizer_of_other_vocabularies_is_gpt2s(monkeypatch):
    class Encoding:
        _mergeable_ranks = {b"a": 0, b"ab": 1}

    class Tiktoken:
        @staticmethod
        def get_encoding(name):
            return {"gpt2": Encoding}[name]

    monkeypatch.setitem(sys.modules, "tiktoken", Tiktoken)
    assert train_gpt.token_texts(50257) == {b"a": 0, b"ab": 1}
    monkeypatch.setattr(Tiktoken, "get_encoding", None)
    with pytest.raises(train_gpt.UserError, match="go online"):
        train_gpt.token_texts(50257)


def test_a_checkpoint_is_on_the_disk_before_it_gets_its_name(place, monkeypatch):
    order, replace = [], Path.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: order.append("synced"))

    def named(self, target):
        order.append("named")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", named)
    assert run(place(steps=2, checkpoint_every=1)).code == 0
    assert order == ["synced", "named"] * 2
