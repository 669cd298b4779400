"""Finds or makes a Python that has what the requirements files name, and hands over to it.

    python data/environment.py [--flag value ...]     then data/launch.py
    python data/environment.py test [pytest flags]    then the tests

run.sh starts this with any Python from 3.11 on: nothing but the standard library is needed. The
Python at hand is used if it has everything; else .venv, which is made where there is none. A .venv
that was not made here, or is a link, is used if it has everything, and never changed.
"""

import fcntl
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
EXACT = {"numpy", "ruff"}  # the laptop corpus is numpy's source; another ruff formats otherwise
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


def lack(python, requirements: str, exact=EXACT) -> str:
    """What keeps `python` from being used, in a few words; empty when nothing does.

    Reads the packages' metadata: importing torch takes seconds.
    """
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


def install(base: str, files: list[str], requirements: str, why: str):
    """Brings .venv, which is ours or not there yet, up to the requirements files."""
    VENV.mkdir(exist_ok=True)
    with open(INSTALLED, "a") as lock:  # from now on it is ours
        fcntl.flock(lock, fcntl.LOCK_EX)  # another run.sh may be at it
        if INSTALLED.read_text() == requirements:
            return
        print(f"run.sh: setting up {VENV}, a minute or more ({base} {why})", file=sys.stderr)
        INSTALLED.write_text("")
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
        workers = (os.cpu_count() or 1) + 1  # one more than cores: some tests only wait
        spread = ["-n", str(workers), "--dist", "worksteal"]
        command = ["-m", "pytest", "-q", *spread, *argv[1:]]
    else:
        files = ["requirements.txt"]
        command = ["data/launch.py", *argv]
    try:
        python = find_python(files)
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}")
    os.execvp(python, [python, *command])


if __name__ == "__main__":
    main(sys.argv[1:])
