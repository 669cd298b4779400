"""Know before you rent: does an edit compile, fit and keep the GPU busy? No GPU needed.

    python -m records preflight [SCRIPT] [--gpu h100] [--gpus 1|8] [--memory_gb N] [-- flags]
    python -m records preflight --gpus 8
    python -m records preflight my_train_gpt.py --gpu 3090 -- --window 256
    python -m records preflight --against LOG [LOG ...]

SCRIPT (train_gpt.py unless you name another) runs whole and unmodified on the CUDA build of torch,
over a library that stands in for NVIDIA's: it allocates, checks and counts, and computes nothing.
Dynamo, Inductor, Triton, ptxas for the named card, the caching allocator and NCCL's host side are
real. The run is 120 updates of the script's own shapes on random tokens, validations in between:
--steps 120 --val_every 30, unless the flags after -- say otherwise. --gpus 8 runs rank 0 of 8 and
pretends the others.

The report says: whether every stage and method compiles; graph breaks; compilations after the clock
started; micro-batch and peak memory; launches and waits for the device per update; bytes and
operations by class of kernel; spills; and an estimate of the step's time, never a measurement, with
what it assumes, for an update and for the whole run (--updates where it is not known), with
--dollars_per_hour of one card in dollars. --json prints the same as JSON.

--against LOG [LOG ...] holds the estimate against public logs: the scripts in them run on the
stand-in, some minutes each, and their estimated times stand beside the ones that real cards took;
see records/ESTIMATE.md.

Exit code 0: fine. 1: there it would fail or keep the GPU waiting: an error, out of memory, a launch
that the card refuses, a graph break, a compilation after the clock started, a wait for the device
in every update. 2: misuse, or something is missing on this machine. Spilled registers are warnings.

The first use sets up an environment of its own (730 MB to download, 2.3 GB on disk) in
~/.cache/gpt2-speedrun/preflight, or where SPEEDRUN_PREFLIGHT says; each --torch has its own, for
machines that come with another release than requirements.txt's. Needs Linux x86-64, a C compiler
and Python's headers.
"""

import json
import re
import sys
from pathlib import Path

from records.tools.command import BadInput, Parser, command, emit, number_in
from records.tools.nullgpu import against
from records.tools.nullgpu.cards import CARDS, GIB
from records.tools.nullgpu.environment import Environment, cache_folder, say
from records.tools.nullgpu.report import report_on
from records.tools.nullgpu.run import Run
from records.tools.runs import Interrupted, interruptible


def separated(flags: list[str]) -> list[str]:
    """--name=value as two words."""
    words = []
    for flag in flags:
        words += flag.split("=", 1) if flag.startswith("--") else [flag]
    return words


def release(text: str) -> str:
    if not re.fullmatch(r"\d+\.\d+\.\d+", text):
        raise ValueError
    return text


def parse(argv: list[str]):
    parser = Parser("preflight", __doc__)
    parser.add_argument("script", nargs="?", default="train_gpt.py")
    parser.add_argument("--gpu", choices=CARDS, default="h100")
    parser.add_argument("--gpus", type=int, choices=(1, 8), default=1)
    parser.add_argument("--memory_gb", type=number_in(float, 1, 1000), help="GiB of each card")
    parser.add_argument("--torch", type=release, help="another release, as 2.11.0")
    parser.add_argument("--timeout", type=number_in(float, 1), default=3600, help="seconds")
    parser.add_argument("--updates", type=number_in(int, 1), help="of the whole run")
    parser.add_argument("--dollars_per_hour", type=number_in(float, 0), help="of one card")
    parser.add_argument("--against", nargs="+", type=Path, metavar="LOG", help="public logs")
    parser.add_argument("--json", action="store_true", help="the report as JSON")
    at = argv.index("--") if "--" in argv else len(argv)
    options = parser.parse_args(argv[:at])
    options.flags = separated(argv[at + 1 :])
    if options.against:
        return options
    options.script = Path(options.script)
    if options.script.is_dir():
        options.script = options.script / "train_gpt.py"
    if not options.script.is_file():
        raise BadInput(f"{options.script}: no such file; name the script to check")
    options.card = CARDS[options.gpu]
    options.memory = options.memory_gb * GIB if options.memory_gb else options.card.memory
    return options


# ------------------------------------------------------------------------------- what people read


def gib(size: float | None) -> str:
    return f"{size / GIB:.1f} GiB" if size is not None else "?"


def number(value: float | None, digits: int = 0) -> str:
    return f"{value:,.{digits}f}" if value is not None else "?"


def table(rows: list[list[str]]) -> list[str]:
    """Columns: the first one to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]


def summary(report: dict) -> list[str]:
    late = sum(entry["late"] for entry in report["compilations"])
    memory = report["memory"]
    code = report["exit_code"]
    spills = {name for stage in report["stages"] for name in stage["spills"]}
    facts = {
        "runs to its end": "yes" if code == 0 else f"no, exit code {code}",
        "compilations": f"{len(report['compilations']) - late} before the clock, {late} after it",
        "graph breaks": str(len(report["graph_breaks"])),
        "kernels that spill": str(len(spills)),
        "peak memory": f"{gib(memory.get('allocated'))} allocated, {gib(memory.get('reserved'))} "
        f"reserved, of {gib(report['memory_bytes'])}",
    }
    return [f"{name:<22}{value}" for name, value in facts.items()]


def stage_table(report: dict) -> list[str]:
    """One column for each stage of the schedules."""
    stages = report["stages"]
    if not stages:
        return ["no whole update was seen"]
    names = dict.fromkeys(name for stage in stages for name in stage["stage"])
    rows = [[name, *(f"{stage['stage'][name]:,}" for stage in stages)] for name in names]

    def row(label: str, text):
        rows.append([label, *map(text, stages)])

    row("micro-batch, rows", lambda s: f"{s['micro_batches']:g} x {number(s['micro_batch'])}")
    row("launches", lambda s: number(s["launches"]))
    row("waits for the device", lambda s: number(s["waits"]))
    row("  in the worst update", lambda s: number(s["most_waits"]))
    row("GB moved", lambda s: number(s["bytes"] / 1e9, 1))
    row("  MB per token", lambda s: number(s["bytes_per_token"] / 1e6, 3))
    row("TFLOP", lambda s: number(s["operations"] / 1e12, 1))
    row("host alone, here, ms", lambda s: number(1000 * s["host_seconds"], 1))
    if any(stage["attention"] for stage in stages):
        row("attention, of all pairs", lambda s: f"{s['attention'] or 0.5:.1%}")
    row("estimate, ms", lambda s: number(1000 * s["estimated_seconds"], 1))
    utilization = "estimate, MFU"
    row(utilization, lambda s: f"{s['estimated_mfu']:.0%}" if s["estimated_mfu"] else "?")
    return ["one update, outside validation:", *table(rows)]


def class_table(report: dict) -> list[str]:
    """Kernels by class in the last stage, the slowest first."""
    if not report["stages"]:
        return []
    last = report["stages"][-1]
    rows = [["by class of kernel, last stage", "launches", "GB", "TFLOP", "estimate, ms"]]
    for name, row in last["classes"].items():
        cells = number(row["launches"]), number(row["bytes"] / 1e9, 2)
        operations = number(row["operations"] / 1e12, 2)
        rows.append([name, *cells, operations, number(1000 * row["seconds"], 2)])
    lines = table(rows)
    if last["uncounted"]:
        lines.append(f"{last['uncounted']:g} launches of kernels whose bytes are not known")
    return lines


def total_line(whole: dict | None) -> str:
    if not whole:
        return "whole run: not known; say how many updates it has with --updates"
    line = f"whole run: {whole['seconds']:,.0f} s ± {whole['error']:,.0f}"
    if whole["dollars"] is not None:
        line += f", ${whole['dollars']:,.2f}"
    return f"{line} ({whole['updates']:,} updates, without compiling and validating)"


def comparison(found: dict) -> str:
    """What --against found, as a table of Markdown."""

    def times(values):
        return " / ".join(f"{value:.1f}" for value in values)

    rows = [
        f"| {run['name']} | {run['cards']} | {times(run['measured'])} | {times(run['judged'])} | "
        + " / ".join(
            f"{guess / truth - 1:+.0%}"
            for guess, truth in zip(run["judged"], run["measured"], strict=True)
        )
        + f" | {times(run['estimated'])} | {', '.join(run['replaced']) or 'nothing'} |"
        for run in found["runs"]
    ]
    fitted = ", ".join(f"{name} {value:.4g}" for name, value in found["fitted"].items())
    head = "| log | cards | measured | judged | off by | with today's constants | replaced |"
    lines = ["milliseconds per update in the first, second and last third of a run:", "", head]
    lines += ["|" + "-|" * 7, *rows, ""]
    lines += [
        f"error: ± {found['error']:.1%}, root mean square, at worst {found['worst']:.1%}: "
        "constants from one half of the scripts, judged on the rest, for all halves",
    ]
    lines.append(f"constants from all of them: {fitted}")
    lines += [f"does not run: {name}" for name in found["not_run"]]
    return "\n".join(lines)


def finding(entry: dict, script: str) -> str:
    place = f"{script}:{entry['line']}: " if entry["line"] else ""
    return f"    {entry['what']}: {place}{entry['text']}"


def text_of(report: dict) -> str:
    lines = [
        f"{report['script']} {' '.join(report['flags'])}".strip()
        + f" on {'rank 0 of ' if report['gpus'] > 1 else ''}{report['gpus']} x {report['card']}",
        "",
        *summary(report),
        "",
        *stage_table(report),
        "",
        *class_table(report),
        "",
        "an estimate, never a measurement; it assumes that",
        *(f"    {text}" for text in report["assumptions"]),
        "cannot be seen here:",
        *(f"    {text}" for text in report["cannot_see"]),
    ]
    lines.append(f"compared with real cards: {report['judged']}")
    for title in ("warnings", "failures"):
        if report[title]:
            lines += [f"{title}:", *(finding(entry, report["script"]) for entry in report[title])]
    if report["failures"]:
        lines.append(f"output of the run: {report['output']}")
    else:
        lines.append("fine: it compiles, fits and keeps the GPU busy")
    lines.append(total_line(report["whole_run"]))
    return "\n".join(lines)


@command("preflight")
def main(argv) -> int:
    options = parse(argv)
    environment = Environment(cache_folder(), options.torch)
    try:
        with interruptible():
            environment.prepare()
            if options.against:
                publics = [against.read(path) for path in options.against]
                found = against.compare(publics, environment)
                emit(json.dumps(found, indent=1) if options.json else comparison(found))
                return 0
            place = f"a stand-in for {options.gpus} x {options.card.name}"
            say(f"runs {options.script} with {environment.torch} on {place}")
            run = Run(options, environment)
    except Interrupted as signal:
        say("interrupted")
        return signal.args[0]
    run.refuse_misuse()
    report = report_on(run, options)
    emit(json.dumps(report, indent=1) if options.json else text_of(report))
    return 1 if report["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
