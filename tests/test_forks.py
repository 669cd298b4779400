"""Nine edits that people make, kept as patches: each is small, applies, trains and resumes.

They hold train_gpt.py to being easy to edit. Where a change of it breaks one, mend the patch; where
the patch has to grow, think again about the change."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, Outcome, flags, make_data, run, same, text, write_shard
from test_format import check_size

import train_gpt

FORKS = ROOT / "tests" / "forks"
MOST_PLACES = 4
SHORT_LAPTOP = dict(  # its stages, some of its updates; the first one ends at a checkpoint
    preset="laptop", steps=15, batch_tokens=None, seq_len=None, ngram_rows=64, epochs_allowed=20
)
FILES = "train", "mix"  # shards of the fork with two sources
TRAINED = {  # fork: the flags that switch it on
    "swiglu": [{}, dict(relora=4, relora_warm_start=3)],
    "value_embeddings": [dict(value_embeds=True, n_layer=4, lr_value=0.1)],
    "lion": [dict(matrix_optimizer="lion", lr_lion=0.002)],
    "half_the_batch_first": [SHORT_LAPTOP],
    "seq_len_curriculum": [SHORT_LAPTOP],
    "ema": [dict(ema=0.5), dict(ema=0.5, relora=4, relora_warm_start=3, relora_interval=4)],
    "grouped_query_attention": [dict(n_kv_head=1), dict(n_kv_head=1, galore=4)],
    "two_sources": [dict(mix_files="{folder}/mix_*.bin")],
    "z_loss": [dict(z_loss=0.01)],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = make_data(tmp_path_factory.mktemp("data"))
    write_shard(folder / "mix_0.bin", text(2000, 7))
    return folder


def hunks(patch: str) -> list[str]:
    """[what stands before the first place, a place, a place ...]"""
    head, *places = patch.split("\n@@ ")
    return [head + "\n", *(f"@@ {place.rstrip()}\n" for place in places)]


def patched(name: str, folder, without: int | None = None) -> Path:
    """A copy of the trainer with a fork's patch, or all of its places but one."""
    parts = hunks((FORKS / f"{name}.patch").read_text())
    if without is not None:
        del parts[without]
    (folder / "fork.patch").write_text("".join(parts))
    shutil.copy(ROOT / "train_gpt.py", folder)
    command = ["git", "apply", "-C1", "--recount", "fork.patch"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "train_gpt.py"


def forked(name: str, folder, without: int | None = None):
    """The same as a module of its own."""
    path = patched(name, folder, without)
    spec = importlib.util.spec_from_file_location(f"fork_{folder.name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def train(module, data, folder, **changes) -> Outcome:
    files = dict(log_dir=folder / "logs", checkpoint_dir=folder / "checkpoints")
    changes = {
        key: str(value).format(folder=data) if key == "mix_files" else value
        for key, value in changes.items()
    }
    return run(flags(data, **files, **changes), module)


def test_all_are_tested_and_small(tmp_path):
    assert {path.stem for path in FORKS.glob("*.patch")} == set(TRAINED)
    for path in FORKS.glob("*.patch"):
        assert len(hunks(path.read_text())) - 1 <= MOST_PLACES, path
        check_size(patched(path.stem, tmp_path).read_text(encoding="utf-8"))


@pytest.mark.long
@pytest.mark.parametrize("name", TRAINED)
def test_a_fork_trains_and_resumes(name, data, tmp_path):
    """Falling losses, not those of the trainer itself; bit for bit after a resume."""
    module = forked(name, tmp_path)
    for number, changes in enumerate(TRAINED[name]):
        place = tmp_path / str(number)
        changes = dict(checkpoint_every=5, checkpoint_keep=9, **changes)
        outcome = train(module, data, place, **changes)
        assert outcome.code == 0, outcome.err
        losses = [float(loss) for _, kind, loss in outcome.losses() if kind == "val"]
        assert losses[-1] < losses[0] - 0.5
        (path,) = place.glob("checkpoints/*/step_000005.pt")
        again = train(module, data, place, resume=path, **changes)
        assert again.losses() == outcome.losses() and same(again.weights, outcome.weights)
        known = set(train_gpt.Config.__dataclass_fields__)
        own = {key: value for key, value in changes.items() if key in known}
        if name != "lion":
            plain = run(flags(data, log_dir=place / "plain", **own))
            assert plain.losses() != outcome.losses(), "the fork changes nothing"


def test_what_the_forks_promise(data, tmp_path):
    """Half the batch first; EMA averages by its formula; the second loss is not in validation."""

    def place(name):
        folder = tmp_path / name
        folder.mkdir()
        return folder

    for name, sizes in {
        "half_the_batch_first": [(46, 1024, 128), (92, 2048, 128)],
        "seq_len_curriculum": [(46, 2048, 64), (92, 2048, 128)],
    }.items():
        stages = forked(name, place(name)).PRESETS["laptop"].stages
        assert [(s.steps, s.batch_tokens, s.seq_len) for s in stages] == sizes

    ema = forked("ema", place("ema"))
    method, decay = ema.EMA(ema.Config("nov2024", ema=0.75)), 0.75
    model = torch.nn.Linear(2, 2)
    expected = None
    for step in range(3):
        with torch.no_grad():
            model.weight.fill_(step + 1.0)
        made = train_gpt.Run(None, None, model, [])
        method.after_step(step + 1, made)
        expected = step + 1.0 if expected is None else decay * expected + (1 - decay) * (step + 1)
    assert torch.allclose(method.eval_weights(model)["weight"], torch.full((2, 2), expected))

    z = forked("z_loss", place("z"))
    first = [train(z, data, tmp_path / "z", z_loss=w, steps=1).losses()[:2] for w in (0, 0.1)]
    (val, with_none), (same_val, with_some) = first
    assert val == same_val and float(with_some[2]) > float(with_none[2]) + 1

    mixed = forked("two_sources", place("mix"))
    shards = [mixed.Shards(f"{data}/{kind}_*.bin", f"{kind}_files", 256) for kind in FILES]
    both, (first, second) = mixed.Mixture(*shards), shards
    expected = [(first, n) for n in (0, 1, 2, 3)] + [(second, 0)]
    expected += [(first, n) for n in (4, 5, 6, 7)] + [(second, 1)]
    for number, (source, row) in enumerate(expected):
        mixture = both.read(both.row(number, 32))
        assert mixture.tolist() == source.read(source.row(row, 32)).tolist()
    assert both.count(32) == 5 * min(first.count(32) // 4, second.count(32))


FORGOTTEN = [  # fork, its place that is left out, what the answer names
    ("value_embeddings", 3, "no optimizer trains value_embeds.0.weight"),
    ("value_embeddings", 1, "--lr_value"),
    ("lion", 1, "invalid choice: 'lion'"),
    ("lion", 2, "lion"),
    ("ema", 1, "--ema"),
    ("grouped_query_attention", 1, "--n_kv_head"),
    ("two_sources", 1, "--mix_files"),
    ("two_sources", 2, "name 'Mixture' is not defined"),
    ("z_loss", 1, "--z_loss"),
]


@pytest.mark.parametrize("name, without, words", FORGOTTEN)
def test_a_forgotten_place_is_named(name, without, words, data, tmp_path):
    module = forked(name, tmp_path, without)
    outcome = train(module, data, tmp_path, **TRAINED[name][0])
    assert outcome.code in (1, 2)
    assert words in outcome.err.rstrip().splitlines()[-1], outcome.err
