"""Flags and presets: what is refused, in which words, and what an import must not do."""

import dataclasses
import json
import os
import subprocess
import sys
from typing import get_args, get_origin

import pytest
from helpers import ROOT, check_refused, flags, make_data, run, tiny, words

import train_gpt
from train_gpt import PRESETS, Config, UserError, parse_config

FIELDS = dataclasses.fields(Config)
HUGE = "9" * 30
BAD = [  # what is added to the flags of a tiny run, and words that the answer must hold
    ("--stepz 5", "--stepz"),
    ("--step 5", "--step"),  # no guessing at shortened flags
    ("--no_steps", "--no_steps"),
    ("steps 5", "steps"),
    ("--steps", "--steps", "expected one argument"),
    ("--steps=", "--steps", "invalid int"),
    ("--steps five", "--steps", "invalid int value: 'five'"),
    ("--steps 1.5", "--steps", "invalid int"),
    ("--bf16 true", "true"),
    ("--bf16=1", "--bf16"),
    ("--batch_tokens", "--batch_tokens", "at least one"),
    ("--batch_tokens 256 x", "--batch_tokens", "'x'"),
    ("--lr_muon fast", "--lr_muon", "'fast'"),
    ("--lr_muon nan", "--lr_muon nan"),
    ("--lr_adam inf --matrix_optimizer adam", "--lr_adam inf"),
    ("--lr_head -0.1", "--lr_head -0.1", "from 0"),
    ("--lr_factor 1 -1", "--lr_factor -1"),
    ("--target nan", "--target nan"),
    ("--steps 0", "--steps 0", "from 1"),
    ("--steps -3", "--steps -3", "from 1"),
    (f"--steps {HUGE}", "--steps 9", "number"),
    ("--seed -1", "--seed -1"),
    ("--n_head 0", "--n_head 0"),
    ("--checkpoint_keep 0", "--checkpoint_keep 0"),
    ("--batch_tokens 0", "--batch_tokens"),
    ("--batch_tokens 256 0", "--batch_tokens"),
    ("--val_every -1", "--val_every -1"),
    ("--momentum 1", "below 1"),
    ("--beta2 1", "below 1"),
    ("--sparsity 1", "below 1"),
    ("--normuon 1", "below 1"),
    ("--preset gpt5", "--preset gpt5", "gpt2_small", "laptop"),
    ("--device tpu", "--device", "auto"),
    ("--matrix_optimizer sgd", "--matrix_optimizer", "muon"),
    ("--galore 8 --galore_bits 4", "--galore_bits", "32"),
    ("--galore 8 --low_rank_optimizer sgd", "--low_rank_optimizer", "adam"),
    ("--lawa 3 --lawa_mode swap", "--lawa_mode", "eval"),
    ("--relora 4 --low_rank_optimizer sgd", "--low_rank_optimizer", "adam"),
    ("--n_head 3", "--n_head", "head_dim"),
    ("--n_embd 34 --n_head 34", "head_dim"),
    ("--batch_tokens 1000", "--batch_tokens 1000", "--seq_len 32"),
    ("--batch_tokens 256 1000", "--batch_tokens 1000", "--seq_len 32"),
    ("--val_tokens 1010", "--val_tokens", "32"),
    ("--val_tokens 512 --val_seq_len 100", "--val_tokens", "100"),
    ("--micro_batch 3", "--micro_batch 3", "8 rows"),
    ("--paired_heads --n_head 1", "--paired_heads", "even"),
    ("--checkpoint_every 3 --adam_every 2", "--checkpoint_every", "--adam_every 2"),
    ("--extension 12", "--steps 12", "extension of 13"),
    ("--warmup 100", "--steps 12", "100"),
    ("--relora 8 --relora_warm_start 50", "--steps 12", "50"),
    ("--relora 8 --relora_interval 50", "--steps 12", "50"),
    ("--lawa 3 --lawa_interval 12", "--steps 12", "36"),
    ("--yarn --window 0 8", "--yarn", "above 0"),
    ("--n_layer 1 --backout", "--backout", "--n_layer of 2"),
    ("--lr_muon 1e30", "--lr_muon", "from 0 to 2^63"),
    ("--ngram 1", "--ngram 1", "2 to 8"),
    ("--ngram 9", "--ngram 9", "2 to 8"),
    ("--relora 8 --galore 8", "exclude each other"),
    ("--galore 8 --sparsity 0.5", "exclude each other"),
    ("--relora 8 --mup_base_width 16", "exclude each other"),
    ("--galore 8 --galore_per_layer --compile", "--galore_per_layer", "--no_compile"),
    ("--galore 8 --galore_per_layer --micro_batch 2", "--galore_per_layer", "lower the batch"),
    ("--generate hello", "no checkpoint", "--checkpoint_every"),
    ("--generate hello --checkpoint nowhere.pt", "nowhere.pt"),
    ("--resume nowhere.pt", "nowhere.pt"),
    ("--resume", "no checkpoint", "--checkpoint_every"),
    ("--train_files nowhere/*.bin", "--train_files", "no such files", "./run.sh"),
    (
        "--checkpoint_every 2 --checkpoint_dir {folder}/train_000000.bin/x",
        "--checkpoint_dir",
        "no folder can be made there",
    ),
    ("--log_dir {folder}/train_000000.bin/logs", "--log_dir", "no log can be written there"),
    # flags that nothing would read
    ("--relora_interval 2", "--relora_interval does nothing without --relora"),
    ("--lawa_mode replace", "--lawa_mode does nothing without --lawa"),
    ("--galore_per_layer", "--galore_per_layer does nothing without --galore"),
    ("--ngram_rows 99", "--ngram_rows does nothing without --ngram"),
    ("--resume_anyway", "--resume_anyway does nothing without --resume"),
    ("--generate_tokens 9", "--generate_tokens does nothing without --generate"),
    ("--galore 8 --matrix_optimizer muon", "--matrix_optimizer", "--low_rank_optimizer"),
    ("--matrix_optimizer adam --lr_muon 1", "--lr_muon does nothing"),
    ("--matrix_optimizer adam --normuon 0.9", "--normuon does nothing"),
    ("--galore 8 --lr_muon 1", "--lr_muon does nothing"),
    ("--lr_adam 1", "--lr_adam does nothing"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("config"))


@pytest.mark.parametrize("line, expected", [(line, rest) for line, *rest in BAD])
def test_bad_input_is_one_line_and_nothing_is_written(
    line, expected, folder, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in folder.glob("*.bin")}
    given = line.replace("{folder}", str(folder)).split()
    check_refused(
        run(flags(folder, log_dir="logs", checkpoint_dir="checkpoints") + given), *expected
    )
    assert {path: path.read_bytes() for path in folder.glob("*.bin")} == before
    logs = list(tmp_path.rglob("*.txt"))
    assert not any("step:0/" in log.read_text().rpartition("=" * 100)[2] for log in logs)
    late = {"--micro_batch"} & set(given)  # told by the warm-up, with a log open
    assert late or not list(tmp_path.iterdir()), (
        "this could have been refused before a log was opened"
    )


def test_cuda_asked_for_and_absent(folder, monkeypatch):
    monkeypatch.setattr(train_gpt.torch.cuda, "device_count", lambda: 0)
    check_refused(run(flags(folder, device="cuda")), "0 usable GPUs")


def test_ranks_that_do_not_divide_the_rows(folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    check_refused(run(flags(folder)), "3 processes", "8 rows")
    monkeypatch.setenv("WORLD_SIZE", "4")  # 4 divide the batches, but not the validation rows
    check_refused(run(flags(folder, val_tokens=576)), "4 processes", "18")


def other_value(field):
    """A value of the field's type that is not its default, with the flags that make it legal."""
    numbers = {int: 7, float: 0.5, str: "x", type(None): True, bool: not field.default}
    special = dict(
        preset=("laptop", ""),
        n_head=(2, ""),
        n_embd=(24, ""),
        window=((8, 16), ""),
        short_window=((8, 16), "--window 9"),
        key_offset=(True, "--half_rotary"),
        yarn=(True, "--window 9"),
        resume_anyway=(True, "--resume x"),
        ngram_rows=(7, "--ngram 3"),
        batch_tokens=((64, 128), "--seq_len 32 --val_tokens 32"),
        val_tokens=(2048, ""),
        val_seq_len=(2048, ""),
        seq_len=(64, ""),
        lr_factor=((0.5, 2.0), ""),
        lr_ngram=(0.5, "--ngram 3"),
        lr_adam=(0.5, "--matrix_optimizer adam"),
        generate=("x", ""),
        low_rank_optimizer=("muon", "--relora 4"),
        checkpoint=("x", "--generate x"),
        mup_base_width=(7, ""),
    )
    if field.name in special:
        return special[field.name]
    owner = field.name.split("_")[0]
    needs = dict(relora="--relora 4", galore="--galore 4", lawa="--lawa 2", generate="--generate x")
    extra = needs.get(owner, "") if field.name != owner else ""
    if get_origin(field.type) is not None and not isinstance(field.type, type):
        choices = [choice for choice in get_args(field.type) if choice != field.default]
        return (choices[0] if field.default is not None else True), extra
    return numbers[type(field.default)], extra


@pytest.mark.parametrize("field", FIELDS, ids=lambda field: field.name)
def test_every_field_is_a_flag(field):
    value, extra = other_value(field)
    config = parse_config(words(**{field.name: value}) + extra.split(), "nov2024")
    assert getattr(config, field.name) == value != field.default
    assert type(getattr(config, field.name)) is type(value)


def test_every_field_lands_in_the_log(folder):
    logged = json.loads(run(flags(folder, steps=1, seed=5, lr_factor=(1, 2.5))).facts()["config"])
    assert list(logged) == [field.name for field in FIELDS]
    assert logged["seed"] == 5 and logged["lr_factor"] == [1.0, 2.5] and logged["window"] == [0]
    assert (logged["device"], logged["compile"]) == ("cpu", False)


def test_values_chosen_for_the_user_are_told():
    config = train_gpt.resolve(tiny(steps=1000, relora=8, lawa=5), train_gpt.torch.device("cpu"))
    assert (config.relora_warm_start, config.relora_interval, config.lawa_interval) == (
        250,
        187,
        10,
    )
    config = train_gpt.resolve(tiny(steps=1, relora=8), train_gpt.torch.device("cpu"))
    assert min(config.relora_warm_start, config.relora_interval, config.lawa_interval) == 1


def test_flags_become_fields():
    line = "--steps=7 --lr_muon 1e-3 --no_value_residual --compile --resume --train_files a*b"
    config = parse_config(line.split() + ["--log_dir=x=y"], "laptop")
    assert (config.preset, config.steps, config.lr_muon) == ("laptop", 7, 0.001)
    assert (config.value_residual, config.compile, config.resume) == (False, True, "latest")
    assert (config.train_files, config.log_dir) == ("a*b", "x=y")
    assert parse_config(["--no_compile"], "laptop").compile is False
    assert parse_config(["--resume", "a.pt"], "laptop").resume == "a.pt"
    assert parse_config(["--preset", "gpt2_medium"], "laptop").n_layer == 24
    assert all(parse_config([], name) == preset for name, preset in PRESETS.items())


def test_presets():
    assert set(PRESETS) == {"gpt2_small", "nov2024", "gpt2_medium", "gpt2_xl", "laptop"}
    for name, preset in PRESETS.items():
        assert preset.preset == name
        assert dataclasses.replace(preset) == preset  # obeys every rule
        assert preset.device == "auto" and preset.padded_vocab % 64 == 0
    record = PRESETS["nov2024"]
    assert record == Config(preset="nov2024"), "the fields' defaults are that record"
    shape = (record.n_layer, record.n_embd, record.n_head, record.padded_vocab, record.softcap)
    assert shape == (12, 768, 6, 50304, 30)
    assert (record.batch_tokens, record.seq_len) == ((512 * 1024,), 1024)
    assert (record.val_tokens, record.target, record.steps) == (10485760, 3.28, 3242)
    assert (record.momentum_warmup, record.normuon, record.bf16) == (500, 0, True)
    assert PRESETS["laptop"].vocab_size == 257


def test_config_is_frozen_and_checked_however_it_is_made():
    config = tiny()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.steps = 5
    with pytest.raises(UserError, match="n_head"):
        dataclasses.replace(config, n_head=5)


def test_help_lists_every_field():
    for flag in ("--help", "-h"):
        outcome = run([flag])
        assert outcome.code == 0 and not outcome.err
    lines = outcome.out.splitlines()
    for field in FIELDS:
        (line,) = [line for line in lines if line.strip().startswith(f"{field.name}: ")]
        assert "  # " in line, f"{field.name} has no comment"
    assert all(name in outcome.out for name in PRESETS)


def test_import_has_no_side_effects(tmp_path):
    """Prints nothing, makes no file, touches neither CUDA nor groups, signals, random numbers."""
    code = f"""
import os, signal, sys, threading, torch
numbers = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
def look():
    handlers = [signal.getsignal(number) for number in numbers]
    return handlers, torch.get_rng_state().tolist(), threading.active_count(), dict(os.environ)
before = look()
sys.path.insert(0, {str(ROOT)!r})
import train_gpt
assert before == look()
assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()
ours = {{name.split(".")[0] for name in sys.modules}}
unwanted = {{"tiktoken", "huggingface_hub", "tests", "records", "data", "pytest", "scipy"}}
assert not ours & unwanted, ours & unwanted
"""
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done.stderr
    assert not list(tmp_path.iterdir())
