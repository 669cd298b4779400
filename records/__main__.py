"""The one door to the tools of records/.

python -m records VERB ...          from the repository's folder
python path/to/records VERB ...     from anywhere
python -m records VERB --help
"""

import importlib
import sys
from pathlib import Path

# Run as `python path/to/records`, the folder itself is first on the path: its parent belongs there.
sys.path[0] = str(Path(__file__).resolve().parents[1])

VERBS = {
    "verify": "read logs and record folders; do they support their claim?",
    "judge": "run a trainer and compare: is it causal, does it know nothing of the text?",
    "race": "run two trainers in turn, paired: is one of them faster?",
    "submit": "make a record folder: race a script, or take logs",
    "board": "write the leaderboards from the record folders",
    "plot": "draw validation loss over time and tokens",
    "runs": "one table of training runs",
    "parity": "compare the model with public trainers, weight by weight",
    "preflight": "what an edit costs on a GPU that is not here: compilation, memory, waits",
}
MEASUREMENTS = {
    "vs_nanogpt": "the laptop run against nanoGPT's CPU recipe, on the same bytes",
    "cost": "minutes on some cards, estimated from tokens and operations per token",
}


def usage() -> str:
    lines = [__doc__.strip(), ""]
    for title, table in (("verbs", VERBS), ("measurements", MEASUREMENTS)):
        lines.append(f"{title}:")
        lines += [f"    {verb:<14} {what}" for verb, what in table.items()]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    verb, *rest = argv or ["--help"]
    if verb in ("-h", "--help", "help"):
        importlib.import_module("records.tools.command").emit(usage())
        return 0
    if verb not in VERBS | MEASUREMENTS:
        known = ", ".join(VERBS | MEASUREMENTS)
        print(f"records: no verb {verb!r}; choose one of {known}", file=sys.stderr)
        return 2
    name = f"records.tools.{'runs_table' if verb == 'runs' else verb}"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            print(f"records {verb}: {error}; pip install -r requirements.txt", file=sys.stderr)
        else:
            print(f"records {verb}: this clone has no {verb}; update it", file=sys.stderr)
        return 2
    return module.main(rest)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
