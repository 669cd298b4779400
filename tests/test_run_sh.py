"""run.sh and setup/environment.py: which Python they use, what they install, what they leave alone.

Stand-ins on PYTHONPATH take the place of venv, pip and pytest, and of setup/launch.py: they write
down how they were called. The Python is real: a virtual environment whose packages are bare
metadata.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import venv
from pathlib import Path

import pytest

from setup import environment

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = ["requirements.txt", "tests/requirements.txt", "records/requirements.txt"]
TRAINING = {"torch": "2.12.1+cpu", "numpy": None, "tiktoken": "1", "huggingface_hub": "1"}

NOTE = """
import json, os, sys
from pathlib import Path
def note(*words):
    with open(os.environ["CALLS"], "a") as file:
        file.write(json.dumps(words) + "\\n")
def install(prefix, **versions):
    site = Path(prefix, "lib", "python%d.%d" % sys.version_info[:2], "site-packages")
    for name, version in versions.items():
        info = site / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(f"Name: {name}\\nVersion: {version}\\n")
"""
LAUNCH = """
import os, sys
from stand_ins import note
note("launch", sys.prefix, os.getcwd(), *sys.argv[1:])
sys.exit(7)
"""
PYTEST = """
import sys
from stand_ins import note
note("pytest", sys.prefix, *sys.argv[1:])
sys.exit(5)
"""
VENV = """
import os, sys
from pathlib import Path
from stand_ins import note
note("venv", *sys.argv[1:])
sys.path.remove(str(Path(__file__).parent))
import venv  # the real one
venv.create(sys.argv[-1], with_pip=False)
if "--without-pip" not in sys.argv:
    if os.environ.get("NO_ENSUREPIP"):
        sys.exit("no ensurepip")
    Path(sys.argv[-1], "has_pip").touch()
"""
PIP = """
import os, re, sys, time
from pathlib import Path
from stand_ins import install, note
if "--python" in sys.argv:
    prefix = Path(sys.argv[sys.argv.index("--python") + 1]).parents[1]
    note("pip --python", str(prefix))
    sys.exit((prefix / "has_pip").touch())
if not Path(sys.prefix, "has_pip").exists():
    sys.exit(1)
if "--version" in sys.argv:
    sys.exit()
if os.environ.get("PIP_USER") == "1" or "PIP_TARGET" in os.environ:
    sys.exit("not into the virtual environment")
note("pip", *sys.argv[1:])
time.sleep(float(os.environ.get("PIP_SECONDS", 0)))
if os.environ.get("PIP_EXIT"):
    sys.exit(int(os.environ["PIP_EXIT"]))
for name, following in zip(sys.argv, sys.argv[1:]):
    if name == "-r":
        pins = re.findall(r"^([\\w.-]+)==(\\S+)", Path(following).read_text(), re.M)
        install(sys.prefix, **dict(pins))
"""


class Checkout:
    """A copy of run.sh and what it needs in a folder of its own, and a Python beside it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.here = folder / "with space"
        self.venv = self.here / ".venv"
        self.base = folder / "base"
        self.stand_ins = folder / "stand_ins"
        self.notes = folder / "calls"
        for name in ("run.sh", "setup/environment.py", *REQUIREMENTS):
            (self.here / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.here / name)
        (self.here / "setup" / "launch.py").write_text(LAUNCH)
        self.stand_ins.mkdir()
        for name, text in dict(stand_ins=NOTE, venv=VENV, pip=PIP, pytest=PYTEST).items():
            (self.stand_ins / f"{name}.py").write_text(text)
        venv.create(self.base, with_pip=False)
        requirements = (ROOT / "requirements.txt").read_text()
        self.numpy = re.search(r"^numpy==(\S+)", requirements, re.M)[1]

    def install(self, prefix: Path, **versions):
        """Metadata of packages in a Python's site-packages, in place of what is there."""
        site = next(prefix.glob("lib/python*/site-packages"))
        for old in site.glob("*.dist-info"):
            shutil.rmtree(old)
        for name, version in (TRAINING | {"numpy": self.numpy} | versions).items():
            if version:
                info = site / f"{name.replace('-', '_')}-{version}.dist-info"
                info.mkdir()
                info.joinpath("METADATA").write_text(f"Name: {name}\nVersion: {version}\n")

    def start(self, *args, path: Path | None = None, **env) -> subprocess.Popen:
        self.notes.unlink(missing_ok=True)
        clean = {key: value for key, value in os.environ.items() if key in ("HOME", "LANG")}
        clean["PATH"] = f"{path or self.base / 'bin'}:/usr/bin:/bin"
        clean["PYTHONPATH"] = str(self.stand_ins)
        clean["PYTHONDONTWRITEBYTECODE"] = "1"
        clean["CALLS"] = str(self.notes)
        return subprocess.Popen(
            ["bash", str(self.here / "run.sh"), *args],
            env=clean | env,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *args, **env) -> tuple[int, str, str]:
        process = self.start(*args, **env)
        out, err = process.communicate(timeout=30)
        return process.returncode, out, err

    def calls(self) -> list[list[str]]:
        lines = self.notes.read_text().splitlines() if self.notes.exists() else []
        return [json.loads(line) for line in lines]

    def names(self) -> list[str]:
        return [call[0] for call in self.calls()]

    def check_launched(self, *args, prefix: Path, **env):
        """A start that installs nothing and hands over to the launcher in `prefix`'s Python."""
        code, out, err = self.run(*args, **env)
        assert (code, out, err) == (7, "", "")
        assert self.calls() == [["launch", str(prefix), str(self.here), *args]]

    def check_refused(self, *words: str, **env):
        """One line on stderr that holds the words, exit code 2, nothing called."""
        code, out, err = self.run(**env)
        assert (code, out) == (2, "") and err.startswith("run.sh: ") and err.count("\n") == 1, err
        assert all(word in err for word in words), err
        assert self.calls() == []


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def tree(folder: Path) -> dict[str, bytes | str]:
    """Every file, link and folder below, with what it holds."""
    found = {}
    for path in sorted(folder.rglob("*")):
        kind = (
            os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else ""
        )
        found[str(path)] = kind
    return found


def test_help_needs_nothing(checkout):
    code, out, err = checkout.run("help", PYTHON="/nonexistent")
    assert (code, err) == (0, "") and "./run.sh test" in out and "NPROC" in out
    assert checkout.calls() == []


def test_a_python_that_has_everything_is_used_as_it_is(checkout):
    checkout.install(checkout.base)
    checkout.check_launched("--steps", "50", "two words", prefix=checkout.base)
    assert not checkout.venv.exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(torch="2.10.0"), "has torch 2.10.0, not 2.11 to 2.13"),
        (dict(torch="2.14.0"), "has torch 2.14.0, not 2.11 to 2.13"),
        (dict(tiktoken=None), "lacks tiktoken"),
    ],
)
def test_named_python_is_never_installed_into(checkout, changes, message):
    python = str(checkout.base / "bin" / "python")
    checkout.install(checkout.base, **changes)
    checkout.check_refused(f"PYTHON={python} {message}", PYTHON=python)
    checkout.install(checkout.base, numpy="2.0.0")  # any numpy will do there
    checkout.check_launched(prefix=checkout.base, PYTHON=python)


@pytest.mark.parametrize("name", ["/bin/true", "/bin/false", "/nonexistent", "no_such_python"])
def test_what_is_no_python_is_one_line(checkout, name):
    checkout.check_refused(f"{name} does not run as Python 3.11 or newer", PYTHON=name)


def test_a_failing_python3_is_one_line_and_another_python_is_tried(checkout, tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("python3", "python", "python3.13", "python3.12", "python3.11"):
        (broken / name).write_text("#!/bin/sh\necho no such version >&2\nexit 127\n")
        (broken / name).chmod(0o755)
    checkout.check_refused("python3 does not run as Python 3.11 or newer", path=broken)
    checkout.install(checkout.base)
    (broken / "python3.11").write_text(f'#!/bin/sh\nexec "{checkout.base}/bin/python" "$@"\n')
    checkout.check_launched(prefix=checkout.base, path=broken)


def test_venv_is_made_once(checkout):
    code, _, err = checkout.run(PIP_EXIT="1")
    assert code == 2 and "pip install failed" in err and checkout.names() == ["venv", "pip"]
    code, _, err = checkout.run()
    assert code == 7 and checkout.names() == ["pip", "launch"]
    assert checkout.calls()[0][-2:] == ["-r", "requirements.txt"]
    assert err.startswith(f"run.sh: setting up {checkout.venv}") and err.count("\n") == 1
    checkout.check_launched(prefix=checkout.venv)


def test_set_up_and_no_more(checkout):
    code, out, _ = checkout.run("setup")
    assert code == 0 and checkout.names() == ["venv", "pip"]
    assert out == f"set up: {checkout.venv}/bin/python\n"


def test_pips_own_settings_do_not_lead_out_of_the_venv(checkout):
    assert checkout.run(PIP_USER="1", PIP_TARGET="/elsewhere")[0] == 7
    assert checkout.names() == ["venv", "pip", "launch"]


@pytest.mark.parametrize(
    "version, index, refused",
    [("550.54.15", "", True), ("580.65.06", "", False), ("550.54.15", "another", False)],
)
def test_an_old_driver_is_named_before_torch_is_fetched(
    tmp_path, monkeypatch, capsys, version, index, refused
):
    monkeypatch.setattr(environment, "DRIVER", tmp_path / "version")
    environment.DRIVER.write_text(f"{version}\n")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", index)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if not refused:
        return environment.check_driver()
    with pytest.raises(SystemExit) as stopped:
        environment.check_driver()
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.count("\n") == 1 and f"is {version}" in err


@pytest.mark.parametrize(
    "groups, files, cores",
    [
        ("0::/\n", {"cpu.max": "300000 100000\n"}, 3),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "50000 100000"}, 0),
        ("1:cpu:/x\n", {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),
        ("1:cpu:/x\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
    ],
)
def test_cores_that_control_groups_allow(tmp_path, groups, files, cores):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "groups").write_text(groups)
    found = min(environment.quotas(tmp_path, tmp_path / "groups"))
    assert found == (sys.maxsize if cores is None else cores)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs sched_setaffinity")
def test_cores_that_affinity_allows():
    code = "from setup import environment; print(environment.usable_cores())"
    one = f"import os; os.sched_setaffinity(0, {{{min(os.sched_getaffinity(0))}}}); {code}"
    done = subprocess.run([sys.executable, "-c", one], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr


def test_venv_follows_the_requirements(checkout):
    checkout.run()
    (checkout.here / "requirements.txt").open("a").write("extra==1\n")
    checkout.run()
    assert checkout.names() == ["pip", "launch"]
    checkout.check_launched(prefix=checkout.venv)


def test_a_stamp_without_torch_is_mended(checkout):
    checkout.run()
    checkout.install(checkout.venv, torch=None)
    checkout.run()
    assert checkout.names() == ["pip", "launch"]
    checkout.check_launched(prefix=checkout.venv)


def test_a_broken_venv_of_ours_is_made_again_and_its_links_are_left_alone(checkout, tmp_path):
    checkout.run()
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("mine")
    (checkout.venv / "link").symlink_to(precious)
    (checkout.venv / "has_pip").unlink()
    (checkout.here / "requirements.txt").open("a").write("extra==1\n")
    checkout.run()
    assert checkout.names() == ["venv", "pip", "launch"]
    assert (precious / "file").read_text() == "mine"


def test_python_without_ensurepip(checkout):
    checkout.run(NO_ENSUREPIP="1")
    assert checkout.names() == ["venv", "venv", "pip --python", "pip", "launch"]
    checkout.check_launched(prefix=checkout.venv)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["theirs", "link to theirs", "link to ours"])
def test_somebody_elses_venv_is_used_or_named_but_never_changed(checkout, tmp_path, kind):
    home = checkout.venv if kind == "theirs" else tmp_path / "elsewhere"
    venv.create(home, with_pip=False)  # as `uv venv` makes them: without pip
    if home != checkout.venv:
        checkout.venv.symlink_to(home)
    if kind == "link to ours":
        (home / "installed").write_text((ROOT / "requirements.txt").read_text())
        (home / "has_pip").touch()
    before = tree(home)
    checkout.check_refused(f"{checkout.venv} lacks torch, and is not run.sh's to change")
    assert tree(home) == before
    checkout.install(home)
    before = tree(home)
    checkout.check_launched(prefix=checkout.venv)
    assert tree(home) == before


@pytest.mark.parametrize("kind", ["file", "empty folder", "dangling link"])
def test_what_is_no_venv_is_named_and_left_alone(checkout, kind):
    if kind == "file":
        checkout.venv.write_text("mine")
    elif kind == "empty folder":
        checkout.venv.mkdir()
    else:
        checkout.venv.symlink_to("nowhere")
    before = tree(checkout.here)
    checkout.check_refused(f"{checkout.venv} does not run, and is not run.sh's to change")
    assert tree(checkout.here) == before


@pytest.mark.long
def test_test_command(checkout):
    code, _, err = checkout.run("test")
    assert code == 5, err  # pytest's own exit code
    assert checkout.names() == ["venv", "pip", "pytest"]
    for name in REQUIREMENTS:
        assert name in checkout.calls()[1]
    checkout.run("test", "-k", "muon")
    spread = ["-n", str(environment.usable_cores() + 1), "--dist", "worksteal"]
    assert checkout.calls() == [["pytest", str(checkout.venv), "-q", *spread, "-k", "muon"]]
    checkout.check_launched(prefix=checkout.venv)  # it has what training needs


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_pip_too(checkout, number):
    process = checkout.start(PIP_SECONDS="20")
    deadline = time.monotonic() + 20
    while "pip" not in checkout.names() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=10)  # returns when pip has closed the pipes as well
    assert process.returncode == 128 + number and "Traceback" not in err
    assert checkout.run()[0] == 7 and checkout.names() == ["pip", "launch"]


def test_git_ignores_a_venv_that_is_a_link(tmp_path):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    shutil.copy(ROOT / ".gitignore", tmp_path)
    (tmp_path / ".venv").symlink_to("elsewhere")
    done = subprocess.run(["git", "-C", tmp_path, "check-ignore", ".venv"], capture_output=True)
    assert done.returncode == 0


def test_a_clone_has_the_line_ends_of_the_repository(tmp_path):
    """Also where git is told to convert them: bash reads no others, and sha256 would change."""
    origin, clone = tmp_path / "origin", tmp_path / "clone"
    git = ["git", "-c", "core.autocrlf=true", "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q", origin], check=True)
    for name in (".gitattributes", "run.sh", "train_gpt.py"):
        shutil.copy(ROOT / name, origin)
    subprocess.run([*git, "-C", origin, "add", "."], check=True, capture_output=True)
    subprocess.run([*git, "-C", origin, "commit", "-qm", "all"], check=True)
    subprocess.run([*git, "clone", "-q", origin, clone], check=True)
    for name in ("run.sh", "train_gpt.py"):
        assert (clone / name).read_bytes() == (ROOT / name).read_bytes()


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck():
    scripts = [ROOT / "run.sh", ROOT / ".ci" / "run"]
    done = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
