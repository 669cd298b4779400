"""Flags and presets: what is refused, in which words, and what an import must not do."""

import dataclasses
import json
import os
import subprocess
import sys
from typing import get_args, get_origin

import pytest
from helpers import CPU, ROOT, check_refused, flags, make_data, run, tiny, words

import train_gpt
from train_gpt import PRESETS, Config, Stage, UserError, parse_config

FIELDS = dataclasses.fields(Config)
FLAGS = [field for field in FIELDS if field.name != "stages"]
STAGE_FLAGS = train_gpt.stage_flags()
HUGE = "9" * 30
MODERN = "MODERN"  # stands for: the flags of a small gpt2026 in the place of a tiny gpt2024's
SMALL_2026 = dict(
    preset="gpt2_small",
    device="cpu",
    bf16=False,
    vocab_size=257,
    n_embd=48,
    n_head=2,
    batch_tokens=256,
    seq_len=32,
    val_tokens=512,
    val_seq_len=32,
    steps=12,
)
BAD = [  # what is added to the flags of a tiny run, and words that the answer must hold
    ("--stepz 5", "--stepz"),
    ("--step 5", "--step"),  # no guessing at shortened flags
    ("--no_steps", "--no_steps"),
    ("steps 5", "steps"),
    ("--steps", "--steps", "at least one"),
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
    ("--steps 5 0", "--steps 0", "from 1"),
    ("--steps 5 -1", "--steps -1", "from 1"),
    (f"--steps {HUGE}", f"--steps {HUGE}", "number"),
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
    ("--lawa 3 --lawa_mode swap", "--lawa_mode", "eval"),
    ("--low_rank_optimizer adam", "--low_rank_optimizer"),
    ("--n_head 3", "--n_embd 32", "2 * --n_head 3"),
    ("--n_embd 34 --n_head 34", "--n_embd 34", "2 * --n_head 34"),
    ("--half_rotary --n_embd 36 --n_head 6", "--n_embd 36", "4 * --n_head 6"),
    ("--vocab_size 50304", "--vocab_size 50304", "50257"),
    ("--batch_tokens 1000", "--batch_tokens 1000", "multiple of 32"),
    ("--batch_tokens 256 1000", "--batch_tokens 1000", "multiple of 32"),
    ("--seq_len 32 64 --batch_tokens 96 128", "--seq_len 32", "must divide 64"),
    ("--seq_len 24 32 --batch_tokens 768", "--seq_len 24", "must divide 32"),
    ("--max_document 0 8", "--max_document", "in every stage or in none"),
    ("--max_document 8", "documents for 2 of 12 updates", "--epochs_allowed"),
    ("--steps 1 2 --lr_factor 1 2 3", "[2, 3] stages"),
    ("--model gpt2025", "--model", "gpt2026"),
    ("--val_tokens 1010", "--val_tokens", "32"),
    ("--val_tokens 512 --val_seq_len 100", "--val_tokens", "100"),
    ("--micro_batch 3", "--micro_batch 3", "8 rows"),
    (f"{MODERN} --n_head 3", "--n_head 3", "even"),
    (f"{MODERN} --n_embd 28 --n_head 2", "--n_embd 28", "multiple of 4 * --n_head 2"),
    (f"{MODERN} --n_embd 32 --n_head 2", "--n_embd 32", "multiple of 12"),
    (f"{MODERN} --n_embd 16 --n_head 2", "--n_embd 16"),
    (f"{MODERN} --n_embd 12 --n_head 2", "--n_embd 12"),
    (f"{MODERN} --table_rows 7", "--table_rows", "at least 8"),
    (f"{MODERN} --window 0", "--window", "above 0"),
    (f"{MODERN} --short_window 0", "--short_window", "above 0"),
    ("--warmup 100", "--steps 12", "100"),
    ("--relora 8 --relora_warm_start 50", "--steps 12", "50"),
    ("--relora 8 --relora_interval 50", "--steps 12", "50"),
    ("--lawa 3 --lawa_interval 12", "--steps 12", "36"),
    ("--lr_muon 1e30", "--lr_muon", "from 0 to 2^63"),
    ("--ngram 1", "--ngram 1", "2 to 8"),
    ("--ngram 9", "--ngram 9", "2 to 8"),
    ("--relora 8 --galore 8", "exclude each other"),
    ("--galore 8 --sparsity 0.5", "exclude each other"),
    ("--relora 8 --mup_base_width 16", "exclude each other"),
    ("--galore 8 --galore_per_layer --compile", "--galore_per_layer", "--no_compile"),
    ("--bf16_weights --relora 4", "--bf16_weights", "fp32"),
    ("--bf16_weights --lawa 3 --lawa_mode replace", "--bf16_weights", "fp32"),
    ("--galore 8 --galore_per_layer --log_norms 2", "--log_norms", "--galore_per_layer"),
    ("--galore 8 --galore_per_layer --micro_batch 2", "--galore_per_layer", "lower the batch"),
    ("--generate hello", "no checkpoint", "train first"),
    ("--generate hello --checkpoint nowhere.pt", "nowhere.pt"),
    ("--resume nowhere.pt", "nowhere.pt"),
    ("--resume", "no checkpoint", "train first"),
    ("--train_files nowhere/*.bin", "--train_files", "no such files", "./run.sh"),
    (
        "--checkpoint_every 2 --checkpoint_dir {folder}/train_000000.bin/x",
        "--checkpoint_dir",
        "train_000000.bin is not a folder that can be written to",
    ),
    ("--log_dir {folder}/train_000000.bin", "--log_dir", "is not a folder"),
    ("--log_dir {folder}/train_000000.bin/logs", "--log_dir", "is not a folder"),
    # flags that nothing would read
    ("--relora_interval 2", "--relora_interval does nothing without --relora"),
    ("--lawa_mode replace", "--lawa_mode does nothing without --lawa"),
    ("--galore_per_layer", "--galore_per_layer does nothing without --galore"),
    ("--ngram_rows 99", "--ngram_rows does nothing without --ngram"),
    ("--resume_anyway", "--resume_anyway does nothing without --resume"),
    ("--generate_tokens 9", "--generate_tokens does nothing without --generate"),
    ("--matrix_optimizer adam", "--momentum_warmup does nothing"),  # a tiny run gives that flag
    ("--matrix_optimizer anvil --normuon 0.9", "--normuon does nothing"),
    ("--matrix_optimizer anvil --sparsity 0.5", "SuPar has no rule", "anvil"),
    ("--temperature 0.5", "--temperature does nothing without --generate"),
    ("--short_window 4", "--short_window does nothing in gpt2024"),
    ("--table_rows 9", "--table_rows does nothing in gpt2024"),
    ("--token_classes", "--token_classes does nothing in gpt2024"),
    ("--copy_input", "--copy_input does nothing in gpt2024"),
    ("--no_value_residual --no_embed_residual --lr_scalar 1", "--lr_scalar does nothing"),
    ("--no_untie_head --lr_embed 1", "--lr_embed does nothing where wte is lm_head"),
    ("--lr_gate 1", "--lr_gate does nothing"),
    ("--lr_table 1", "--lr_table does nothing"),
    ("--lr_ngram 1", "--lr_ngram does nothing without --ngram"),
    ("--lr_adam 1", "--lr_adam does nothing"),
    (f"{MODERN} --softcap 1", "--softcap does nothing in gpt2026"),
    (f"{MODERN} --doc_mask", "--doc_mask does nothing in gpt2026"),
    (f"{MODERN} --beta1 0.5", "--beta1 does nothing"),
    (f"{MODERN} --normuon 0.5", "--normuon does nothing"),
    ("--preset laptop --batch_tokens" + 200 * " 512", "too few for 200 stages"),
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
    folders = dict(log_dir="logs", checkpoint_dir="checkpoints")
    whole = flags(folder, **folders) + given
    if given[0] == MODERN:
        files = dict(train_files=f"{folder}/train_*.bin", val_files=f"{folder}/val_*.bin")
        whole = words(**SMALL_2026 | folders | files) + given[1:]
    check_refused(run(whole), *expected)
    assert {path: path.read_bytes() for path in folder.glob("*.bin")} == before
    logs = list(tmp_path.rglob("*.txt"))
    assert not any("step:0/" in log.read_text().rpartition("=" * 100)[2] for log in logs)
    late = {"--micro_batch"} & set(given)  # told by the warm-up, with a log open
    assert late or not list(tmp_path.iterdir()), (
        "this could have been refused before a log was opened"
    )


def test_a_gpu_asked_for_and_absent(folder, monkeypatch):
    accelerator = train_gpt.torch.accelerator
    monkeypatch.setattr(accelerator, "current_accelerator", lambda **_: None)
    check_refused(run(flags(folder, device="cuda")), "--device cuda", "none here")
    monkeypatch.setattr(
        accelerator, "current_accelerator", lambda **_: train_gpt.torch.device("cuda")
    )
    monkeypatch.setattr(accelerator, "device_count", lambda: 0)
    check_refused(run(flags(folder, device="cuda")), "1 processes, but 0 usable GPUs")


def test_gpus_that_torch_cannot_use(folder, monkeypatch):
    found = {"/dev/nvidia[0-9]*": ["/dev/nvidia0"]}
    monkeypatch.setattr(train_gpt.glob, "glob", lambda pattern: found.get(pattern, []))
    monkeypatch.setattr(train_gpt.torch.accelerator, "is_available", lambda: False)
    line = "this machine has GPUs, but torch cannot use them"
    check_refused(
        run(["--log_dir", str(folder)]), line, "--device cpu --preset laptop", "finds none"
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    check_refused(run(["--train_files", "none"]), "no such files")
    # one that torch counts, and that computes nothing
    accelerator = train_gpt.torch.accelerator
    monkeypatch.setattr(
        accelerator, "current_accelerator", lambda **_: train_gpt.torch.device("cuda")
    )
    monkeypatch.setattr(accelerator, "device_count", lambda: 1)
    check_refused(run(flags(folder, device="cuda")), line, "(")


def test_what_the_compiler_lacks(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CXX", "/nonexistent")
    argv = flags(folder, compile=True, log_dir="logs", checkpoint_dir="checkpoints")
    needs = "torch.compile needs a compiler (/nonexistent)"
    check_refused(run(argv), f"{needs}: apt install g++ python3-dev", "--no_compile")
    monkeypatch.setattr(train_gpt.sysconfig, "get_path", lambda name: str(tmp_path))
    check_refused(run(argv), f"{needs} and Python's headers (python3-dev): apt")
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(UserError, match=r"\(gcc\) and Python's headers.*: apt install gcc "):
        train_gpt.check_compiler(on_gpu=True)
    (tmp_path / "Python.h").touch()
    (tmp_path / "gcc").touch(mode=0o755)
    train_gpt.check_compiler(on_gpu=True)


def test_ranks_that_do_not_divide_the_rows(folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    check_refused(run(flags(folder)), "3 processes", "8 rows")
    monkeypatch.setenv("WORLD_SIZE", "4")  # 4 divide the batches, but not the validation rows
    check_refused(run(flags(folder, val_tokens=576)), "4 processes", "18")


def other_value(field):
    """A value of the field's type that is not its default, with the flags that make it legal."""
    numbers = {int: 7, float: 0.5, str: "x", type(None): True, bool: not field.default}
    modern = "--preset gpt2_small"
    special = dict(
        preset=("laptop", ""),
        model=("gpt2026", "--window 8 --short_window 4 --n_embd 48"),
        n_head=(2, ""),
        n_embd=(24, ""),
        resume_anyway=(True, "--resume x"),
        ngram_rows=(7, "--ngram 3"),
        val_tokens=(2048, ""),
        val_seq_len=(2048, ""),
        lr_ngram=(0.5, "--ngram 3"),
        lr_adam=(0.5, "--matrix_optimizer adam"),
        lr_table=(0.5, modern),
        lr_gate=(0.5, modern),
        table_rows=(99, modern),
        token_classes=(True, modern),
        copy_input=(True, modern),
        generate=("x", ""),
        checkpoint=("x", "--generate x"),
        temperature=(0.5, "--generate x"),
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


@pytest.mark.parametrize("field", FLAGS, ids=lambda field: field.name)
def test_every_field_is_a_flag(field):
    value, extra = other_value(field)
    config = parse_config(words(**{field.name: value}) + extra.split(), "nov2024")
    assert getattr(config, field.name) == value != field.default
    assert type(getattr(config, field.name)) is type(value)


@pytest.mark.parametrize("field", STAGE_FLAGS, ids=lambda field: field.name)
def test_every_number_of_a_stage_is_a_flag(field):
    """One value for all stages, or one for each."""
    values = dict(batch_tokens=(2048, 4096), seq_len=(512, 1024), lr_factor=(0.5, 2.0))
    pair = values.get(field.name, (7, 9))
    if field.name == "extension":
        pair = (0, 1)
    extra = ["--preset", "gpt2_small"] if field.name == "short_window" else []
    given = [f"--{field.name}", *map(str, pair)]
    config = parse_config([*given, *extra], "nov2024")
    assert tuple(getattr(stage, field.name) for stage in config.stages) == pair
    config = parse_config([*given[:2], *extra], "nov2024")
    if field.name == "steps":
        assert config.steps == pair[0]
    else:
        assert {getattr(stage, field.name) for stage in config.stages} == {pair[0]}


def test_lengths_of_a_plan():
    """rescale keeps shares; edit_stages takes the number of stages from the flags."""
    plan = PRESETS["gpt2_small"].stages
    lengths = [stage.steps for stage in train_gpt.rescale(plan, 2 * 1194)]
    assert lengths == [640, 722, 852, 134, 40]
    for steps in (1, 7, 100, 1193):
        short = train_gpt.rescale(plan, steps)
        assert sum(stage.steps for stage in short) == steps and all(s.steps > 0 for s in short)
    assert len(train_gpt.rescale(plan, 7)) == 4, "the shortest one is gone"
    half, whole = train_gpt.edit_stages(plan, dict(batch_tokens=[64, 128]))
    assert (half.steps, whole.steps) == (597, 597)
    assert (half.batch_tokens, whole.batch_tokens) == (64, 128)
    assert half.window == plan[0].window and whole.window == plan[2].window
    edited = train_gpt.edit_stages(plan, dict(steps=[12], lr_factor=[1, 2, 3, 4, 5]))
    assert [(s.steps, s.lr_factor) for s in edited] == [(3, 1), (4, 2), (4, 3), (1, 4)]
    given = train_gpt.edit_stages(plan, dict(steps=[3, 4], seq_len=[8]))
    assert [(stage.steps, stage.seq_len) for stage in given] == [(3, 8), (4, 8)]
    assert train_gpt.edit_stages(plan, {}) == plan
    with pytest.raises(UserError, match="2, 3"):
        train_gpt.edit_stages(plan, dict(steps=[3, 4], seq_len=[8, 8, 8]))


def test_every_field_lands_in_the_log(folder):
    argv = flags(folder, steps=2, seed=5, lr_factor=(1, 2.5))
    logged = json.loads(run(argv).facts()["config"])
    assert list(logged) == [field.name for field in FIELDS]
    stages = logged["stages"]
    assert [list(s) for s in stages] == [[f.name for f in dataclasses.fields(Stage)]] * 2
    assert logged["seed"] == 5 and [s["lr_factor"] for s in stages] == [1.0, 2.5]
    assert (logged["device"], logged["compile"]) == ("cpu", False)
    again = train_gpt.config_of(logged)
    stages = [dataclasses.asdict(stage) for stage in again.stages]
    assert json.loads(json.dumps(stages)) == logged["stages"]


def test_values_chosen_for_the_user_are_told():
    config = train_gpt.resolve(tiny(steps=1000, relora=8, lawa=5), CPU)
    assert (config.relora_warm_start, config.relora_interval, config.lawa_interval) == (
        250,
        187,
        10,
    )
    config = train_gpt.resolve(tiny(steps=1, relora=8), CPU)
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


def test_a_tilde_in_a_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    names = "train_files", "val_files", "log_dir", "checkpoint_dir", "resume"
    given = parse_config([f"--{name}=~/x" for name in names], "nov2024")
    assert {getattr(given, name) for name in names} == {"/home/ada/x"}
    given = parse_config(["--generate", "~/x", "--checkpoint", "~/x"], "nov2024")
    assert (given.generate, given.checkpoint) == ("~/x", "/home/ada/x"), "a prompt is no path"


def test_presets():
    assert set(PRESETS) == set("gpt2_small nov2024 gpt2_medium gpt2_xl small laptop".split())
    for name, preset in PRESETS.items():
        assert preset.preset == name
        assert dataclasses.replace(preset) == preset  # obeys every rule
        assert preset.device == "auto" and preset.padded_vocab % 64 == 0
    record = PRESETS["nov2024"]
    assert record == Config(preset="nov2024"), "the fields' defaults are that record"
    shape = (record.n_layer, record.n_embd, record.n_head, record.padded_vocab, record.softcap)
    assert shape == (12, 768, 6, 50304, 30)
    assert record.stages == (Stage(3242, 512 * 1024, 1024),)
    assert (record.val_tokens, record.target, record.steps) == (10485760, 3.28, 3242)
    assert (record.momentum_warmup, record.normuon, record.bf16) == (500, 0, True)
    assert PRESETS["laptop"].vocab_size == 257
    assert PRESETS["gpt2_small"].model == "gpt2026" and PRESETS["gpt2_small"].steps == 1194


def test_config_is_frozen_and_checked_however_it_is_made():
    config = tiny()
    for owner, name in ((config, "seed"), (config.stages[0], "steps")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(owner, name, 5)
    with pytest.raises(UserError, match="n_head"):
        dataclasses.replace(config, n_head=5)


def test_help_lists_every_field():
    for flag in ("--help", "-h"):
        outcome = run([flag])
        assert outcome.code == 0 and not outcome.err
    lines = outcome.out.splitlines()
    for field in (*FLAGS, *STAGE_FLAGS):
        (at,) = [i for i, line in enumerate(lines) if line.strip().startswith(f"--{field.name} ")]
        assert "  " in lines[at].strip(), f"{field.name} has no comment"
    assert all(name in outcome.out for name in PRESETS)


@pytest.mark.long
@pytest.mark.parametrize("prompt", [[], ["--generate", "x"]], ids=["help", "sample"])
def test_a_reader_that_has_enough(prompt, folder, tmp_path):
    """As in `--help | head -3`: no traceback, whoever reads."""
    argv = ["--help"]
    if prompt:
        assert run(flags(folder, steps=1, momentum_warmup=0, checkpoint_dir=tmp_path)).code == 0
        argv = [*prompt, "--device", "cpu", "--checkpoint_dir", str(tmp_path)]
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, str(ROOT / "train_gpt.py"), *argv]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.long
@pytest.mark.parametrize("lacking", ["numpy", "torch"])
def test_a_python_without_what_it_needs(lacking, tmp_path):
    (tmp_path / f"{lacking}.py").write_text(f"raise ImportError('no {lacking} here')")
    for argv in (["train_gpt.py"], ["-c", "import train_gpt"]):
        done = subprocess.run(
            [sys.executable, *argv],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
        )
        line = f"train_gpt.py: no {lacking} here: ./run.sh sets up what it needs\n"
        if "-c" in argv:  # an importer has its own way to say it
            assert done.stderr.endswith(f"ImportError: no {lacking} here\n")
        else:
            assert (done.returncode, done.stderr) == (2, line)


@pytest.mark.long
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
