"""How good is the judge? Runs it on the cheats and honest variants of this folder, and counts.

    python tests/judge/evaluate.py [NAME ...] [--out FOLDER] [--jobs 1] [-- FLAGS]

Every patch is applied to the train_gpt.py of laptop record 11 in a temporary folder, and the script
that results is judged: `python -m records judge SCRIPT --json FILE -- FLAGS`. Names choose patches,
as globs do: 'ahead_*'. Verdicts are kept in FOLDER, by the patch's name and a hash of script and
flags: what has a verdict is not judged again, so a run that was stopped goes on where it was.
Delete the folder when the judge has changed.

Exit code: 0 at least 95 % of the cheats are caught and nothing else is accused, 1 not so, 2 misuse.
"""

import argparse
import concurrent.futures
import fnmatch
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TRAINER = ROOT / "records/laptop/2026-11-21_11_key_offset/train_gpt.py"
CODES = {0: "legal", 1: "not legal", 3: "not decided", 4: "void"}  # 4: a lead that is worth nothing
# {what a patch is: {code: what that makes of the judge}}; other codes: broken
MEANING = {
    "cheats": {0: "missed", 1: "caught", 3: "undecided", 4: "caught"},
    "honest": {0: "passed", 1: "accused", 3: "undecided", 4: "accused"},
    "priced": {0: "passed", 1: "accused", 3: "undecided", 4: "accused"},
}
running: set[subprocess.Popen] = set()


def patches(names=()):
    """Paths of the patches that a name chooses; all without names. Raises SystemExit for a name
    that chooses none."""
    found = sorted(HERE.glob("*/*.patch"))
    for name in names:
        if not any(fnmatch.fnmatch(path.stem, name) for path in found):
            sys.exit(f"evaluate.py: no patch is called {name}; see tests/judge/README.md")
    return [p for p in found if not names or any(fnmatch.fnmatch(p.stem, n) for n in names)]


def build(patch: Path, folder: Path) -> Path:
    """The record's trainer with the patch, in the folder. Raises RuntimeError if it does not
    apply."""
    script = folder / "train_gpt.py"
    script.write_bytes(TRAINER.read_bytes())
    # --directory does not leave an enclosing repository, and GIT_DIR would lead into another
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    environment["GIT_CEILING_DIRECTORIES"] = str(folder.parent)
    command = ["git", "apply", "--whitespace=nowarn", str(patch)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{patch.name}: {done.stderr.strip()}")
    return script


def judge(patch: Path, out: Path, flags: list[str]) -> tuple[int, str]:
    """(code, its reason), from the folder of verdicts if it is there."""
    with tempfile.TemporaryDirectory(prefix="trainer_") as folder:
        script = build(patch, Path(folder))
        key = hashlib.sha256(script.read_bytes() + repr(flags).encode()).hexdigest()[:12]
        kept = out / f"{patch.stem}_{key}.json"
        if not kept.exists():
            verdict = Path(folder, "verdict.json")
            command = [sys.executable, "-m", "records", "judge", script, "--json", verdict]
            code, text = call(command + ["--", *flags])
            if not verdict.exists():
                return code, text.strip().splitlines()[-1]
            aside = kept.with_suffix(".tmp")
            aside.write_bytes(verdict.read_bytes())
            aside.replace(kept)  # it appears whole or not at all
    told = json.loads(kept.read_text())
    odd = [check for check in told["checks"] if check["state"] not in ("pass", "skipped")]
    void = told["code"] == 3 and any(check["state"] == "void" for check in odd)
    odd.sort(key=lambda check: (check["state"] != "fail", check["state"] != "void"))
    said = f"{odd[0]['state']} {odd[0]['name']}: {odd[0]['reason']}" if odd else ""
    return 4 if void else told["code"], said


def call(command):
    """(Exit code, output) of a command in its own process group, which Ctrl-C here ends."""
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    process = subprocess.Popen(
        list(map(str, command)), cwd=ROOT, text=True, start_new_session=True, **streams
    )
    running.add(process)
    text = process.communicate()[0]
    running.discard(process)
    return process.returncode, text


def stop(number, frame):
    """Ends the judges that run; their verdicts are not kept."""
    for process in list(running):
        os.killpg(process.pid, signal.SIGTERM)
    os._exit(128 + number)


def report(results) -> int:
    """Prints totals for {patch: outcome}; returns the exit code."""
    counts = {kind: {} for kind in MEANING}
    for patch, outcome in results.items():
        count = counts[patch.parent.name]
        count[outcome] = count.get(outcome, 0) + 1
    for kind, count in counts.items():
        parts = ", ".join(f"{n} {outcome}" for outcome, n in sorted(count.items()))
        print(f"{kind}: {sum(count.values())}: {parts or 'none'}")
    caught, cheats = counts["cheats"].get("caught", 0), sum(counts["cheats"].values())
    wrong = sum(count.get(what, 0) for count in counts.values() for what in ("accused", "broken"))
    good = caught >= 0.95 * cheats and not wrong
    print(f"caught {caught} of {cheats}; {'as wanted' if good else 'NOT as wanted'}")
    return int(not good)


def main(argv=None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    own, flags = argv, []
    if "--" in argv:
        own, flags = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("names", nargs="*", metavar="NAME", help="patches to judge; default: all")
    default = Path(tempfile.gettempdir(), "judge_verdicts")
    parser.add_argument("--out", type=Path, default=default, help="(default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="judges at a time (default: 1)")
    options = parser.parse_args(own)
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: must be 1 or more")
    chosen, results = patches(options.names), {}
    options.out.mkdir(parents=True, exist_ok=True)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        jobs = {pool.submit(judge, patch, options.out, flags): patch for patch in chosen}
        for job in concurrent.futures.as_completed(jobs):
            patch, (code, said) = jobs[job], job.result()
            results[patch] = MEANING[patch.parent.name].get(code, "broken")
            verdict = CODES.get(code, f"exit code {code}")
            name = f"{patch.parent.name}/{patch.stem}"
            print(f"{results[patch]:<10} {name:<42} {verdict}: {said[:160]}", flush=True)
    return report(results)


if __name__ == "__main__":
    sys.exit(main())
