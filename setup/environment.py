"""Finds or makes a Python that has what the requirements files name, and hands over to it.

    python setup/environment.py [--flag value ...]     then setup/launch.py
    python setup/environment.py test [pytest flags]    then the tests
    python setup/environment.py setup                  then nothing
    python setup/environment.py prepare FILES ...      then data/prepare.py

run.sh starts this with any Python from 3.11 on: nothing but the standard library is needed. The
Python at hand is used if it has everything; else .venv, which is made where there is none. A .venv
that was not made here, or is a link, is used if it has everything, and never changed.
"""

import contextlib
import fcntl
import glob
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
INSTALLED = VENV / "installed"  # only in a .venv made here: the requirements that are in it
OLDEST_TORCH, NEWEST_TORCH = (2, 11), (2, 13)
OLDEST_DRIVER = 580  # of NVIDIA's, for CUDA 13, of which the pinned torch is built
DRIVER = Path("/sys/module/nvidia/version")
QUERY = """
import json, sys
from importlib.metadata import PackageNotFoundError, version
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        pass
print(json.dumps(found))
"""


def fail(line: str):
    print(f"run.sh: {line}", file=sys.stderr)
    sys.exit(2)


def usable_cores() -> int:
    """Cores that this process may use, by its affinity and by the quota of its control groups."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    return max(1, min(cores, *quotas()))


def quotas(root: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")):
    """Whole cores that each control group of this process is allowed; version 2, then 1."""
    folders = [root / "cpu"]
    with contextlib.suppress(OSError):
        own = re.search(r"^0::/(.*)$", groups.read_text(), re.M)
        folders += [root / own[1], *(root / own[1]).parents] if own else [root]
    found = [sys.maxsize, sys.maxsize]
    for folder in folders:
        for names in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
            with contextlib.suppress(OSError, ValueError):  # "max" is no number, -1 no limit
                words = " ".join((folder / name).read_text() for name in names).split()
                quota, period = map(int, words)
                found += [quota // period] * (quota > 0)
    return found


def exact_packages() -> set[str]:
    """Packages of which no other release will do: another ruff formats otherwise, and the corpus of
    the laptop preset is numpy's source, which nobody needs where there are GPUs.
    """
    return {"ruff"} if glob.glob("/dev/nvidia[0-9]*") else {"ruff", "numpy"}


def lack(python, requirements: str, exact=None) -> str:
    """What keeps `python` from being used, in a few words; empty when nothing does.

    Reads the packages' metadata: importing torch takes seconds.
    """
    exact = exact_packages() if exact is None else exact
    wanted = dict(re.findall(r"^([\w.-]+)==([^\s;#]+)", requirements, re.M))
    try:
        done = subprocess.run([python, "-c", QUERY, *wanted], capture_output=True, text=True)
        found = json.loads(done.stdout)
    except (OSError, ValueError):
        return "does not run"
    for name, version in wanted.items():
        if name not in found:
            return f"lacks {name}"
        if name in exact and found[name] != version:
            return f"has {name} {found[name]}, not {version}"
        release = tuple(int(number) for number in re.findall(r"\d+", found[name])[:2])
        if name == "torch" and not OLDEST_TORCH <= release <= NEWEST_TORCH:
            return f"has torch {found[name]}, not 2.11 to 2.13"
    return ""


def is_ours() -> bool:
    return not VENV.is_symlink() and INSTALLED.is_file()


def make_venv(base: str):
    """A .venv with pip; what a broken one of ours held goes, what links in it point to stays."""
    for path in VENV.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path != INSTALLED:
            path.unlink()
    # Debian's python3 may come without ensurepip; its pip can still put one there from outside.
    attempts = [
        [[base, "-m", "venv", VENV]],
        [
            [base, "-m", "venv", "--without-pip", VENV],
            [base, "-m", "pip", "-q", "--python", PYTHON, "install", "pip"],
        ],
    ]
    for commands in attempts:
        if all(
            subprocess.run(command, capture_output=True).returncode == 0 for command in commands
        ):
            return
    fail(
        f"{base} cannot make a virtual environment; "
        "install its venv module (python3-venv), or set PYTHON="
    )


def check_driver():
    """Ends before gigabytes are fetched that the driver here cannot use."""
    elsewhere = os.environ.get("PIP_INDEX_URL") or os.environ.get("PIP_EXTRA_INDEX_URL")
    if elsewhere or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return  # another build of torch, or no GPU wanted
    with contextlib.suppress(OSError, ValueError):
        version = DRIVER.read_text().strip()
        if int(version.split(".")[0]) < OLDEST_DRIVER:
            fail(
                f"NVIDIA's driver here is {version}, and torch's packages need {OLDEST_DRIVER} or "
                "newer; update it, or name a Python with a torch for it: PYTHON=python3"
            )


def install(base: str, files: list[str], requirements: str, why: str):
    """Brings .venv, which is ours or not there yet, up to the requirements files."""
    check_driver()
    VENV.mkdir(exist_ok=True)
    with open(INSTALLED, "a") as lock:  # from now on it is ours
        fcntl.flock(lock, fcntl.LOCK_EX)  # another run.sh may be at it
        if INSTALLED.read_text() == requirements:
            return
        print(f"run.sh: setting up {VENV}, a minute or more ({base} {why})", file=sys.stderr)
        INSTALLED.write_text("")
        for name in ("PIP_TARGET", "PIP_PREFIX", "PIP_ROOT"):  # would lead out of .venv
            os.environ.pop(name, None)
        os.environ["PIP_USER"] = "0"
        pip = [PYTHON, "-m", "pip"]
        if (
            not PYTHON.exists()
            or subprocess.run([*pip, "--version"], capture_output=True).returncode
        ):
            make_venv(base)
        # pip -q shows its progress bar only beside a log
        command = [*pip, "install", "-q", "--log", VENV / "pip.log"]
        for name in files:
            command += ["-r", name]
        if subprocess.run(command).returncode:
            fail(f"pip install failed, see above and {VENV / 'pip.log'}; run again to retry")
        (VENV / "pip.log").unlink(missing_ok=True)  # megabytes
        INSTALLED.write_text(requirements)


def find_python(files: list[str]) -> str:
    """The Python to hand over to; sets .venv up where that is needed."""
    requirements = "".join(Path(name).read_text() for name in files)
    named = os.environ.get("PYTHON")
    if named:
        why = lack(named, requirements, exact=())
        if why:
            hint = "pip install -r requirements.txt there, or unset PYTHON for a .venv"
            fail(f"PYTHON={named} {why}; {hint}")
        return named
    why = lack(sys.executable, requirements)
    if not why:
        return sys.executable
    if is_ours() or not os.path.lexists(VENV):
        # What training needs is the first part of what the tests need
        if is_ours() and INSTALLED.read_text().startswith(requirements):
            if not lack(PYTHON, requirements):
                return str(PYTHON)
            INSTALLED.write_text("")
        install(sys.executable, files, requirements, why)
    else:
        why = lack(PYTHON, requirements)
        if why:
            hint = "install the requirements there, move it away, or set PYTHON="
            fail(f"{VENV} {why}, and is not run.sh's to change; {hint}")
    return str(PYTHON)


def main(argv: list[str]):
    os.chdir(ROOT)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, lambda number, frame: sys.exit(128 + number))  # pip ends with us
    if argv[:1] == ["test"]:
        files = ["requirements.txt", "tests/requirements.txt", "records/requirements.txt"]
        workers = usable_cores() + 1  # one more than cores: some tests only wait
        spread = ["-n", str(workers), "--dist", "worksteal"]
        command = ["-m", "pytest", "-q", *spread, *argv[1:]]
    elif argv[:1] == ["prepare"]:
        files = ["requirements.txt"]
        command = ["data/prepare.py", *argv[1:]]
    else:
        files = ["requirements.txt"]
        command = ["setup/launch.py", *argv]
    try:
        python = find_python(files)
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}")
    if argv[:1] == ["setup"]:
        print(f"set up: {python}")
        return
    os.execvp(python, [python, *command])


if __name__ == "__main__":
    main(sys.argv[1:])
