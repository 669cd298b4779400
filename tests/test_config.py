"""Flags and presets: what is refused, in which words, and what an import or a look at --help must not do."""
import ast
import dataclasses
import os
import subprocess
import sys

import pytest
from helpers import ROOT, check_refused, flag_lines, flags, make_data, run, tiny, with_flags

import train_gpt

MAX_LINES, MAX_WIDTH, MAX_FUNCTION = 1100, 160, 100

BAD = [  # a command line, and words that the answer must hold
    ("--stepz 5", "--stepz", "did you mean --steps?"),
    ("--lr_mouon 0.1", "--lr_mouon, did you mean --lr_muon?"),
    ("--no_valu_residual", "did you mean --value_residual?"),
    ("--zzzzzzzz 1", "unknown argument --zzzzzzzz", "--help"),
    ("--no_steps", "unknown argument --no_steps"),
    ("steps 5", "unknown argument steps, did you mean --steps?"),
    ("-steps 5", "-steps"),
    ("--steps", "--steps: expected one argument", "--help"),
    ("--steps=", "--steps: invalid int value: ''"), ("--resume=", "--resume needs a value"), ("--learning_rate=5", "unknown argument --learning_rate=5 (--help"),
    ("--steps --seed 3", "--steps: expected one argument"),
    ("--steps 5 --steps 6", "--steps is given twice"), ("--steps=5 --steps 6", "--steps is given twice"),
    ("--bf16 --no_bf16", "--bf16 is given twice"),
    ("--bf16=1", "--bf16: ignored explicit argument '1'"),
    ("--bf16 true", "unknown argument true"),
    ("--train_files a.bin b.bin", "unknown argument b.bin", "quotes"),
    ("--steps five", "--steps: invalid int value: 'five'"),
    ("--steps 1.5", "--steps: invalid int value: '1.5'"),
    ("--lr_muon fast", "--lr_muon: invalid float value: 'fast'"),
    ("--lr_muon nan", "--lr_muon nan"),
    ("--lr_adam inf", "--lr_adam inf"),
    ("--lr_adam -0.1", "--lr_adam -0.1", "from 0"),
    ("--steps 0", "--steps 0", "from 1"),
    ("--steps -3", "--steps -3", "from 1"),
    ("--steps 99999999999999999999", "--steps 99999999999999999999"),
    ("--seed -1", "--seed -1"),
    ("--n_head 0", "--n_head 0"),
    ("--batch_tokens 0", "--batch_tokens 0"),
    ("--val_every -1", "--val_every -1"),
    ("--rank_timeout 0", "--rank_timeout 0"),
    ("--momentum 1", "--momentum 1.0: must be a number from 0 to 0.9999"),
    ("--beta2 1", "--beta2 1.0: must be a number from 0 to 0.99999"),
    ("--cooldown 1.5", "--cooldown 1.5: must be a number from 0 to 1"),
    ("--sparsity 1", "--sparsity 1.0: must be a number from 0 to"),
    ("--preset gpt5", "--preset gpt5", "gpt2_small", "laptop"),
    ("--device tpu", "--device tpu", "auto, cpu, cuda"),
    ("--attention fast", "--attention fast", "sdpa"),
    ("--matrix_optimizer sgd", "--matrix_optimizer sgd", "muon, adam"),
    ("--galore 8 --galore_bits 4", "--galore_bits 4", "32, 8"),
    ("--lawa 3 --lawa_mode swap", "--lawa_mode swap", "eval, replace"),
    ("--n_head 3", "--n_embd 32", "--n_head 3", "head_dim"),
    ("--n_embd 34 --n_head 34", "head_dim"),
    ("--vocab_size 70000", "--vocab_size 70000", "65536"),
    ("--batch_tokens 1000", "--batch_tokens 1000 is not divisible by --seq_len 32", "nearest: 992"),
    ("--batch_tokens 8", "--batch_tokens 8", "nearest: 32"),
    ("--val_tokens 1010", "--val_tokens 1010 is not divisible by --seq_len 32", "nearest: 1024"),
    ("--micro_batch 3", "--micro_batch 3 does not divide the 8 rows", "nearest below: 2"),
    ("--window 8", "--window", "--window_pattern"),
    ("--window_pattern SL", "--window", "--window_pattern"),
    ("--window 8 --window_pattern SX", "--window_pattern SX"),
    ("--warmup 100", "--warmup 100", "12 steps"),
    ("--generate hello", "--generate needs --checkpoint"), ("--ngram 1", "--ngram 1", "from 2 up"), ("--ngram 9", "--ngram 9", "to 8"),
    ("--relora 8 --galore 8", "--relora", "--galore", "cannot be combined"),
    ("--galore 8 --sparsity 0.5", "--galore", "--sparsity", "cannot be combined"),
    ("--relora_interval 2", "--relora_interval does nothing without --relora"),
    ("--lawa_mode replace", "--lawa_mode does nothing without --lawa"),
    ("--galore_per_layer", "--galore_per_layer does nothing without --galore"),
    ("--relora 8 --relora_warm_start 50", "--relora_warm_start 50", "12 steps"),
    ("--lawa 3 --lawa_interval 12", "--lawa_interval 12", "12 steps"),
    ("--relora 33", "--relora 33", "rank", "32"),
    ("--galore 64", "--galore 64", "rank", "32"),
    ("--galore 8 --galore_per_layer --micro_batch 2", "--galore_per_layer", "--batch_tokens"),
    ("--resume nowhere.pt", "nowhere.pt", "--checkpoint_every"),
    ("--resume", "no checkpoint in", "--checkpoint_every"),
    ("--generate hello --checkpoint nowhere.pt", "nowhere.pt"),
    ("--log_dir {folder}/train_000000.bin/logs", "--log_dir", "no log can be written there"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("config"))


@pytest.mark.parametrize("line, words", [(line, words) for line, *words in BAD], ids=[line[:40] for line, *_ in BAD])
def test_bad_input_is_one_line_and_nothing_is_written(line, words, folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in folder.glob("*.bin")}
    given = line.replace("{folder}", str(folder)).split()
    argv = flags(folder)
    for word in {word.partition("=")[0] for word in given if word.startswith("--")} & set(argv):  # the tested line replaces what it repeats
        at = argv.index(word)
        del argv[at:at + 2]
    check_refused(run(argv + given), *words)
    assert {path: path.read_bytes() for path in folder.glob("*.bin")} == before
    assert not list(tmp_path.iterdir()) and not list(folder.glob("checkpoints/*"))
    logs = [log.read_text() for log in folder.glob("logs/*")]
    assert not any("step:0/" in log.rpartition("=" * 100)[2] for log in logs), "trained before it refused"
    if logs:
        assert {"--micro_batch", "--resume"} & set(given), "this could have been refused before a log was opened"
        [log.unlink() for log in folder.glob("logs/*")]


def test_cuda_asked_for_and_absent(folder, monkeypatch):
    monkeypatch.setattr(train_gpt.torch.cuda, "device_count", lambda: 0)
    check_refused(run(flags(folder, device="cuda")), "--device cuda", "leave --device out")
    assert not list(folder.glob("logs/*"))


def test_world_size_that_does_not_divide_names_the_nearest(folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    check_refused(run(flags(folder)), "3 processes", "8 rows", "2 and 4")


def test_flags_become_fields():
    parse = train_gpt.parse_config
    config = parse("--steps=7 --lr_muon 1e-3 --no_value_residual --compile --resume --train_files a*b --log_dir=x=y".split(), "laptop")
    assert (config.preset, config.steps, config.lr_muon, config.value_residual, config.compile) == ("laptop", 7, 0.001, False, True)
    assert (config.resume, config.train_files, config.log_dir) == ("latest", "a*b", "x=y")
    assert parse(["--preset", "gpt2_medium"], "laptop").n_layer == 24
    assert parse(["--resume", "a.pt"], "laptop").resume == "a.pt"
    assert parse([], "laptop") == train_gpt.PRESETS["laptop"]
    laptop, words = train_gpt.PRESETS["laptop"], []
    for name, value in dataclasses.asdict(laptop).items():  # a whole config as flags gives the config
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no_{name}")
        elif value not in ("", None):
            words += [f"--{name}", str(value)]
    assert parse(words, "gpt2_small") == laptop


def test_config_is_frozen_and_checked_however_it_is_made():
    config = tiny()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.steps = 5
    with pytest.raises(train_gpt.UserError, match="--n_head 5"):
        dataclasses.replace(config, n_head=5)


def test_presets():
    assert set(train_gpt.PRESETS) == {"gpt2_small", "nov2024", "gpt2_medium", "gpt2_xl", "laptop"}
    for name, preset in train_gpt.PRESETS.items():
        assert preset.preset == name
        assert dataclasses.replace(preset) == preset  # obeys every rule
    assert train_gpt.PRESETS["nov2024"] == train_gpt.Config(preset="nov2024"), "the fields' defaults are that record"
    small, medium, xl = (train_gpt.PRESETS[name] for name in ("gpt2_small", "gpt2_medium", "gpt2_xl"))
    assert (small.n_layer, small.n_embd, small.n_head, small.padded_vocab, small.target) == (12, 768, 6, 50304, 3.28)
    assert (small.batch_tokens, small.seq_len, small.val_tokens, small.softcap) == (512 * 1024, 1024, 10485760, 30)
    assert (medium.n_layer, medium.n_embd, medium.target) == (24, 1024, 2.92) and (xl.n_layer, xl.n_embd) == (48, 1600)
    assert train_gpt.PRESETS["laptop"].vocab_size == 257 and train_gpt.PRESETS["laptop"].device == "auto"


def test_help_lists_every_flag_with_its_comment_and_default():
    for flag in ("--help", "-h"):
        outcome = run([flag])
        assert outcome.code == 0 and not outcome.err
    table = train_gpt.flag_table()
    assert [name for name, _, _ in table] == [field.name for field in dataclasses.fields(train_gpt.Config)], "a field without a comment"
    for name, comment, default in table:
        assert default == getattr(train_gpt.PRESETS["gpt2_small"], name)
        assert any(f"--{name} " in line and comment in line and str(default) in line for line in outcome.out.splitlines()), name


def test_readme_has_the_flags_as_they_are():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme == with_flags(readme), "stale: run python tests/helpers.py --update-readme"


def test_table_of_flags():
    lines = flag_lines().splitlines()
    assert len(lines) == 2 + len(dataclasses.fields(train_gpt.Config))
    assert "| `--steps` | optimizer updates | `3242` |" in lines
    assert any(line.startswith("| `--bf16` |") and line.endswith("| `on` |") for line in lines)
    assert any(line.startswith("| `--galore` |") and line.endswith("| `0` |") for line in lines)
    with pytest.raises(ValueError):
        with_flags("a readme without marks")


def test_import_has_no_side_effects(tmp_path):
    """Prints nothing, makes no file, touches neither CUDA nor process groups, signals, threads or random numbers."""
    code = ("import sys, os, signal, threading, random, torch\n"
            "before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), torch.get_rng_state().tolist(), threading.active_count()\n"
            "environment = dict(os.environ)\n"
            f"sys.path.insert(0, {str(ROOT)!r})\n"
            "import train_gpt\n"
            "assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), torch.get_rng_state().tolist(), threading.active_count())\n"
            "assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized() and environment == dict(os.environ)\n"
            "ours = {name.split('.')[0] for name in sys.modules}\n"
            "assert not ours & {'tiktoken', 'huggingface_hub', 'tests', 'records', 'data', 'pytest', 'matplotlib', 'scipy'}, ours\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done.stderr
    assert not list(tmp_path.iterdir())


def test_too_old_torch_is_one_line():
    code = (f"import sys, types\nsys.path.insert(0, {str(ROOT)!r})\ntorch = types.ModuleType('torch')\ntorch.__version__ = '2.4.1+cu121'\n"
            "sys.modules['torch'] = torch\nimport train_gpt\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("train_gpt.py: torch 2.4.1+cu121 is too old") and len(done.stderr.splitlines()) == 1


def test_line_budget():
    source = (ROOT / "train_gpt.py").read_text(encoding="utf-8")
    lines = source.splitlines()
    assert len(lines) <= MAX_LINES, f"train_gpt.py has {len(lines)} lines, {MAX_LINES} are allowed"
    assert f"{MAX_LINES:,} lines" in ast.get_docstring(ast.parse(source)), "the docstring names the budget"
    assert max(map(len, lines)) <= MAX_WIDTH, "lines too long to read"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < MAX_FUNCTION, f"{node.name} is longer than {MAX_FUNCTION} lines"
