"""run.sh with stand-ins for the trainer, the data scripts, torch, torchrun and pip: what it starts, and how it ends."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

TRAINER = """
import json, os, pathlib, signal, sys, time
class UserError(Exception):
    pass
class parse_config:
    def __init__(self, argv, preset):
        words = " ".join(argv).replace("=", " ").split()
        given = {words[i]: words[i + 1] for i in range(len(words) - 1) if words[i].startswith("--")}
        if "--bad" in words:
            raise UserError("unknown flag --bad")
        laptop = given.get("--preset", preset) == "laptop"
        self.steps, self.batch_tokens, self.epochs_allowed = int(given.get("--steps", 3242)), 524288, 1
        usual = "data/laptop/laptop_train_*.bin" if laptop else "data/fineweb10B/fineweb_train_*.bin"
        self.train_files = given.get("--train_files", usual)
if __name__ == "__main__":
    def record(**what):
        with open(os.environ["CALLS"], "a") as f:
            f.write(json.dumps(what) + "\\n")
    def stop(number, frame):
        record(signal=signal.Signals(number).name)
        sys.exit(0)
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    keep = ("OMP_NUM_THREADS", "PET_NNODES", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT")
    record(script="train", argv=sys.argv[1:], env={k: os.environ[k] for k in keep if k in os.environ}, cwd=os.getcwd())
    if "--sleep" in sys.argv:
        time.sleep(20)
    if "--fail" in sys.argv:
        if "SPEEDRUN_ERROR_FILE" in os.environ:
            cause = pathlib.Path(os.environ["SPEEDRUN_ERROR_FILE"])
            cause.write_text("2 train_gpt.py: no such thing; try another\\nmore\\n")
        sys.exit(3)
"""
DATA = """
import json, os, pathlib, sys
with open(os.environ["CALLS"], "a") as f:
    f.write(json.dumps({"script": pathlib.Path(__file__).stem, "argv": sys.argv[1:]}) + "\\n")
sys.exit(int(os.environ.get("DATA_EXIT", 0)))
"""
TORCHRUN = """
import json, os, signal, subprocess, sys
cut = next(i for i, a in enumerate(sys.argv) if a.endswith("train_gpt.py"))
with open(os.environ["CALLS"], "a") as f:
    f.write(json.dumps({"script": "torchrun", "argv": sys.argv[1:cut]}) + "\\n")
child = subprocess.Popen([sys.executable, "-S", *sys.argv[cut:]], start_new_session=True)
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: child.send_signal(number))
code = child.wait()
print("torchrun: a long report", file=sys.stderr)
sys.exit(1 if code else 0)  # the real one masks the workers' exit codes too
"""
# python3 as found on PATH, without any package but those on PYTHONPATH; venv and pip only leave a trace.
PYTHON3 = f"""#!/bin/sh
case "$1 $2" in
    "-m venv") for last; do :; done; mkdir -p "$last/bin"; cp "$0" "$last/bin/python"; echo '"venv"' >>"$CALLS" ;;
    "-m pip") [ "$3" != install ] || echo "\\"pip $*\\"" >>"$CALLS"; exit "${{PIP_EXIT:-0}}" ;;
    "-m pytest") echo '"pytest"' >>"$CALLS"; exit 5 ;;
    *) exec {sys.executable} -S "$@" ;;
esac
"""


class Checkout:
    """A copy of run.sh in its own folder, its stand-ins, and what was called."""

    def __init__(self, folder: Path):
        self.folder, self.calls_file = folder, folder / "calls"
        self.site, self.bin, self.here = folder / "site", folder / "bin", folder / "with space"
        for name in ("run.sh", "requirements.txt", "tests/requirements.txt", "records/requirements.txt"):
            (self.here / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.here / name)
        (self.here / "data").mkdir()
        (self.here / "train_gpt.py").write_text(TRAINER)
        for name in ("laptop", "fineweb"):
            (self.here / "data" / f"{name}.py").write_text(DATA)
        self.numpy = next(line[7:].strip() for line in open(ROOT / "requirements.txt") if line.startswith("numpy=="))
        self.bin.mkdir()
        (self.bin / "python3").write_text(PYTHON3)
        (self.bin / "python3").chmod(0o755)
        (self.site / "torch" / "distributed").mkdir(parents=True)
        (self.site / "torch" / "__init__.py").write_text(
            "import os\nclass cuda:\n    device_count = staticmethod(lambda: int(os.environ.get('GPUS', 0)))\n"
            "get_num_threads = lambda: 6\n")
        (self.site / "torch" / "distributed" / "__init__.py").write_text("")
        (self.site / "torch" / "distributed" / "run.py").write_text(TORCHRUN)
        self.install(torch="2.12.1+cpu", numpy=self.numpy, tiktoken="1", huggingface_hub="1")

    def install(self, **versions):
        for old in self.site.glob("*.dist-info"):
            shutil.rmtree(old)
        for name, version in versions.items():
            info = self.site / f"{name}-{version}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")

    def start(self, *args, **env):
        clean = {k: v for k, v in os.environ.items() if k in ("HOME", "LANG", "TMPDIR")}
        clean.update(PATH=f"{self.bin}:{os.environ['PATH']}", PYTHONPATH=str(self.site), CALLS=str(self.calls_file))
        self.calls_file.unlink(missing_ok=True)
        return subprocess.Popen(["bash", str(self.here / "run.sh"), *args], env={**clean, **env}, cwd=self.folder,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)

    def run(self, *args, **env):
        process = self.start(*args, **env)
        out, err = process.communicate(timeout=15)
        return process.returncode, out, err

    def calls(self):
        lines = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        return [json.loads(line) for line in lines]

    def scripts(self):
        return [call["script"] if isinstance(call, dict) else call.split(" -r")[0] for call in self.calls()]

    def wait_for(self, script):
        deadline = time.monotonic() + 10
        while script not in self.scripts() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert script in self.scripts()


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def test_help_needs_no_setup(checkout):
    code, out, err = checkout.run("help", PYTHON="/nonexistent")
    assert (code, err) == (0, "") and "./run.sh test" in out and "NPROC" in out
    assert checkout.calls() == []


def test_cpu_builds_the_laptop_corpus_and_passes_flags_on(checkout):
    code, out, err = checkout.run("--steps", "50", "--run_name", "two words")
    assert (code, err) == (0, "")
    laptop, train = checkout.calls()
    assert laptop == {"script": "laptop", "argv": []}
    assert train["argv"] == ["--steps", "50", "--run_name", "two words"]
    assert train["cwd"] == str(checkout.here)  # wherever run.sh was started from: the data globs are relative
    assert train["env"] == {}


def test_gpus_fetch_fineweb_and_start_one_process_each(checkout):
    assert checkout.run("--steps", "50", GPUS="2")[0] == 0
    fineweb, torchrun, train = checkout.calls()
    assert fineweb == {"script": "fineweb", "argv": ["1"]}  # 50 steps need 26M tokens: one shard of 100M
    assert torchrun["argv"] == ["--standalone", "--nproc_per_node=2"]
    assert train["argv"] == ["--steps", "50"]


def test_bad_flags_end_before_anything_is_fetched(checkout):
    code, out, err = checkout.run("--bad", GPUS="8")
    assert (code, err, checkout.calls()) == (2, "train_gpt.py: unknown flag --bad\n", [])


def test_as_many_shards_as_the_run_needs(checkout):
    checkout.run("--preset", "gpt2_small", GPUS="1")
    assert checkout.calls()[0] == {"script": "fineweb", "argv": ["17"]}


@pytest.mark.parametrize("flags, gpus, scripts", [
    ("--preset laptop", "1", ["laptop", "train"]),
    ("--preset=laptop", "1", ["laptop", "train"]),
    ("--preset gpt2_small", "0", ["fineweb", "train"]),
    ("--preset=gpt2_xl --steps 5", "0", ["fineweb", "train"]),
    ("--preset gpt2_small --train_files x.bin", "0", ["train"]),
    ("--train_files=x.bin", "1", ["train"]),
    ("--seed 1 --steps 9", "0", ["laptop", "train"]),
    ("--help", "1", ["train"]),
    ("--generate 20 --checkpoint a.pt", "0", ["train"]),
])
def test_data_follows_the_preset(checkout, flags, gpus, scripts):
    assert checkout.run(*flags.split(), GPUS=gpus)[0] == 0
    assert checkout.scripts() == scripts


def test_nproc(checkout):
    assert checkout.run(NPROC="2")[0] == 0
    _, torchrun, train = checkout.calls()
    assert torchrun["argv"] == ["--standalone", "--nproc_per_node=2"]
    assert train["env"] == {"OMP_NUM_THREADS": "3"}
    checkout.run(NPROC="8")
    assert checkout.calls()[2]["env"] == {"OMP_NUM_THREADS": "1"}
    checkout.run(NPROC="2", OMP_NUM_THREADS="5")
    assert checkout.calls()[2]["env"] == {"OMP_NUM_THREADS": "5"}
    checkout.run(NPROC="1", GPUS="4")
    assert checkout.scripts() == ["fineweb", "train"]


@pytest.mark.parametrize("env, message", [
    (dict(NPROC="0"), "NPROC=0 is not a number"),
    (dict(NPROC="two"), "NPROC=two is not a number"),
    (dict(NNODES="2", MASTER_ADDR="10.0.0.1"), "NNODES=2 needs MASTER_ADDR and NODE_RANK"),
    (dict(NNODES="2", NODE_RANK="1"), "NNODES=2 needs MASTER_ADDR and NODE_RANK"),
    (dict(PYTHON="/nonexistent"), "PYTHON=/nonexistent: "),
])
def test_bad_environment_is_one_line(checkout, env, message):
    code, out, err = checkout.run(**env)
    assert code == 2 and err.startswith("run.sh: " + message) and err.count("\n") == 1, err
    assert checkout.calls() == []


@pytest.mark.parametrize("env", [
    dict(NNODES="2", NODE_RANK="1", MASTER_ADDR="10.0.0.1", MASTER_PORT="777"),
    dict(PET_NNODES="2", PET_NODE_RANK="1", PET_MASTER_ADDR="10.0.0.1", PET_MASTER_PORT="777"),
])
def test_several_machines(checkout, env):
    assert checkout.run(**env)[0] == 0
    _, torchrun, train = checkout.calls()
    assert torchrun["argv"] == ["--nproc_per_node=1"]  # the rest reaches torchrun through PET_*
    train["env"].pop("OMP_NUM_THREADS")
    assert train["env"] == dict(PET_NNODES="2", PET_NODE_RANK="1", PET_MASTER_ADDR="10.0.0.1", PET_MASTER_PORT="777")


def test_exit_codes(checkout):
    assert checkout.run("--fail")[0] == 3  # one process: the trainer's own
    code, out, err = checkout.run("--fail", NPROC="2")  # torchrun turns it into 1; the trainer's file has the cause
    assert code == 2 and err.splitlines()[-1] == "train_gpt.py: no such thing; try another"
    assert checkout.run(DATA_EXIT="2")[0] == 2 and checkout.scripts() == ["laptop"]


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_reach_the_workers(checkout, number, code):
    process = checkout.start("--sleep", NPROC="2")
    checkout.wait_for("train")
    process.send_signal(number)
    process.communicate(timeout=10)
    assert process.returncode == code
    assert checkout.calls()[-1] == {"signal": number.name}


def test_one_process_replaces_the_shell(checkout):
    process = checkout.start("--sleep")
    checkout.wait_for("train")
    process.terminate()
    process.communicate(timeout=10)
    assert process.returncode == 0 and checkout.calls()[-1] == {"signal": "SIGTERM"}


@pytest.mark.parametrize("changes, message", [
    (dict(torch="2.10.0"), "torch 2.10.0 is not between 2.11 and 2.13"),
    (dict(torch="2.14.0"), "torch 2.14.0 is not between 2.11 and 2.13"),
    (dict(tiktoken=None), "tiktoken"),
])
def test_named_python_is_never_installed_into(checkout, changes, message):
    versions = dict(torch="2.13.0", numpy="2.0.0", tiktoken="1", huggingface_hub="1")
    checkout.install(**{k: v for k, v in {**versions, **changes}.items() if v})
    code, out, err = checkout.run(PYTHON="python3")
    assert code == 2 and message in err and err.startswith("run.sh: PYTHON=python3: ") and err.count("\n") == 1
    checkout.install(**versions)
    assert checkout.run(PYTHON="python3")[0] == 0  # any numpy will do there
    assert checkout.scripts() == ["laptop", "train"]


def test_venv_is_made_once(checkout):
    checkout.install(torch="2.13.0", numpy="1.0", tiktoken="1", huggingface_hub="1")  # not the numpy of the corpus
    code, out, err = checkout.run(PIP_EXIT="1")
    assert code == 2 and "pip install failed" in err and "train" not in checkout.scripts()
    assert checkout.run()[0] == 0
    assert checkout.scripts()[-3:] == ["pip -m pip install", "laptop", "train"]
    assert checkout.run()[0] == 0
    assert checkout.scripts() == ["laptop", "train"]
    (checkout.here / "requirements.txt").open("a").write("extra==1\n")
    assert checkout.run()[0] == 0
    assert checkout.scripts() == ["pip -m pip install", "laptop", "train"]


def test_test_command(checkout):
    assert checkout.run("test")[0] == 5  # pytest's own exit code
    calls = checkout.calls()
    assert calls[0] == "venv" and calls[-1] == "pytest"
    for name in ("requirements.txt", "tests/requirements.txt", "records/requirements.txt"):
        assert f"-r{name}" in calls[1].split()
    checkout.run("test", "-k", "muon")
    assert checkout.calls() == ["pytest"]
    checkout.install(torch="2.13.0", numpy="1.0", tiktoken="1", huggingface_hub="1")
    checkout.run()  # the .venv of the tests has what training needs
    assert checkout.scripts() == ["laptop", "train"]


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck():
    done = subprocess.run(["shellcheck", ROOT / "run.sh", ROOT / ".ci" / "run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
