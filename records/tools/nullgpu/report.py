"""What a run on the stand-in device says about the script."""

import re
from collections import Counter

from records.tools.nullgpu import estimate
from records.tools.nullgpu.run import Run

CANNOT_SEE = (
    "numbers: everything computed is zero, so no loss, no NaN, no branch on a value is real",
    "speed: nothing is timed but this host; overlap, clocks and caches are not modelled",
    "other ranks, and time-outs between them: collectives return at once",
    "cuDNN's attention, which torch may prefer on sm_90: FlashAttention 2 runs in its place",
    "autotuning's real choice: all candidates seem equally fast, so the first one is taken",
    "CUDA graphs, NVRTC, profilers, expandable segments; about 0.5 GiB of CUDA's own is a guess",
)


def stages_of(run: Run, options) -> list[dict]:
    """One row for each stage of the schedules: what an update of it asks for, on average."""
    config = run.config()
    stages = {}
    for number, update in single_updates(run.seen):
        stages.setdefault(stage_at(number, config), []).append(update)
    return [
        dict(stage=dict(stage)) | stage_row(updates, dict(stage), config, run.result(), options)
        for stage, updates in stages.items()
    ]


def single_updates(seen: dict) -> list[tuple[int, dict]]:
    """(its number, 0-based; what it asked for) of every update that can be told from the others
    and in which nothing was validated or compiled."""
    updates = seen.get("updates", [])
    # A script may read the loss one update late. Then the update before a validation has two lines,
    # and the first one after it shares its line with the next.
    late = any(update["validated"] and update["last"] - update["first"] > 1 for update in updates)
    compiled = {entry["step"] for entry in seen.get("compilations", []) if entry["late"]}
    found = []
    after_validation = True
    for update in updates:
        steps = range(update["first"], update["last"] + 1)
        whole = len(steps) == 2 and not update["validated"] and not after_validation
        if whole and not compiled.intersection(steps):
            found.append((update["first"] + late, update))
        after_validation = update["validated"]
    return found


def mean_of(updates: list[dict]) -> dict:
    """One update: the mean of what these asked for."""
    n = len(updates)
    mean = {
        name: sum(update[name] for update in updates) / n for name in ("host_seconds", "backwards")
    }
    shares = [update["attention"] for update in updates if update.get("attention")]
    mean["attention"] = sum(shares) / len(shares) if shares else None
    for kind in ("counts", "triton"):
        rows = {}
        for update in updates:
            for name, row in update[kind].items():
                rows.setdefault(name, []).append(row)
        mean[kind] = {
            name: [sum(column) / n for column in zip(*found, strict=True)]
            for name, found in rows.items()
        }
    return mean


def stage_at(step: int, config: dict) -> tuple:
    """Of the stage at an update, 0-based, what differs among stages, and its batch: ((name, value),
    ...). Stages hold for another number of steps in proportion."""
    plan = config.get("stages")
    if not plan:  # a script that logs no config
        return (("batch_tokens", 0),)
    whole = sum(stage["steps"] for stage in plan)
    step = step * whole // config.get("steps", whole)
    for stage in plan:
        if step < stage["steps"]:
            break
        step -= stage["steps"]
    return tuple(
        (name, value)
        for name, value in stage.items()
        if name == "batch_tokens"
        or name not in ("steps", "extension", "predictions")
        and len({str(other[name]) for other in plan}) > 1
        and isinstance(value, int | float)
    )


def whole_run(stages: list[dict], run: Run, options) -> dict | None:
    """Seconds of the script's full number of updates, outside validation; None: not known."""
    steps = options.updates or run.seen.get("steps")
    if not steps or not stages:
        return None
    config = run.config() | dict(steps=steps)
    seconds = {tuple(stage["stage"].items()): stage["estimated_seconds"] for stage in stages}
    last = stages[0]["estimated_seconds"]
    total = 0.0
    for step in range(steps):
        last = seconds.get(stage_at(step, config), last)
        total += last
    hours = total * options.gpus / 3600
    dollars = hours * options.dollars_per_hour if options.dollars_per_hour else None
    return dict(updates=steps, seconds=total, error=estimate.ERROR * total, dollars=dollars)


def launches_of(update: dict) -> int:
    return sum(
        times
        for name, (times, _) in update["counts"].items()
        if name.startswith(("kernel", "matmul"))
    )


def stage_row(updates: list[dict], stage: dict, config: dict, result: dict, options) -> dict:
    update = mean_of(updates)
    waits = sorted((update["waits"] for update in updates), key=len)
    works = estimate.works_of(update)
    classes = estimate.by_class(works, options.card, options.gpus)
    total = {
        key: sum(row[key] for row in classes.values()) for key in ("bytes", "operations", "seconds")
    }
    tokens = stage["batch_tokens"]
    share = tokens / options.gpus
    (first, *_) = config.get("stages") or [{}]
    rows = share / stage.get("seq_len", first.get("seq_len", 1))
    flops = result.get("flops_per_token")
    utilization = flops * share / total["seconds"] / options.card.bf16_flops if flops else None
    micro_batches = update["backwards"]
    return dict(
        micro_batches=micro_batches,
        micro_batch=rows / micro_batches if micro_batches else None,
        launches=launches_of(update),
        updates=len(updates),
        waits=len(waits[0]),
        most_waits=len(waits[-1]),
        waits_at=[list(wait) for wait in waits[0]],
        host_seconds=update["host_seconds"],
        bytes=total["bytes"],
        bytes_per_token=total["bytes"] / share if share else None,
        operations=total["operations"],
        attention=update["attention"],
        estimated_seconds=total["seconds"],
        estimated_mfu=utilization,
        spills=spills_of(update),
        uncounted=sum(work.launches for work in works if not work.known),
        classes=classes,
        largest=[vars(work) for work in works[:12]],
    )


def spills_of(update: dict) -> dict[str, int]:
    """{kernel: bytes of local memory per thread}, of the kernels that were launched."""
    return {
        name.removeprefix("spill "): int(amount / times)
        for name, (times, amount) in update["counts"].items()
        if name.startswith("spill ")
    }


def logged(output: str, artifact: str) -> list[tuple[str, str]]:
    """(compilation, text) of what torch's log says under TORCH_LOGS's name `artifact`."""
    found = re.findall(rf"\[(\d+/\d+)[^\]]*\] \[__{artifact}\] (.*)", output)
    return [(number, text.strip()) for number, text in found]


def graph_breaks_of(run: Run) -> list[dict]:
    """Why, and at which line of the script: where it breaks, or what called the code that does."""
    breaks = []
    in_script = (
        rf'(?:File "{re.escape(str(run.script))}", line |{re.escape(str(run.script))}:)(\d+)'
    )
    for _, text in logged(run.output, "graph_breaks"):
        if text.startswith("Graph break"):
            breaks.append(dict(line=None, reason=text))
        found = re.search(in_script, text)
        if breaks and found:
            breaks[-1]["line"] = int(found[1])
        if breaks and text.startswith("Explanation: "):
            breaks[-1]["reason"] = text.removeprefix("Explanation: ")
    return breaks


def limits_hit(output: str) -> list[str]:
    """Functions that torch gave up to compile, since too many forms of them were asked for."""
    found = re.findall(r"hit config\.(\w+) \((\d+)\)\s+(?:.* )?function: (.*)", output)
    return [
        f"{function.strip()} needs more than {limit} graphs ({name}): from there on it runs "
        "uncompiled"
        for name, limit, function in found
    ]


def report_on(run: Run, options) -> dict:
    stages = stages_of(run, options)
    compilations = run.seen.get("compilations", [])
    reasons = {}
    for number, text in logged(run.output, "recompiles"):
        if text.startswith("- "):
            reasons.setdefault(number, " ".join(text.partition("  # ")[0].split()))
    for entry in compilations:
        entry["reason"] = reasons.get(entry["id"])
    report = dict(
        script=str(options.script),
        flags=options.flags,
        card=options.card.name,
        gpus=options.gpus,
        memory_bytes=int(options.memory),
        exit_code=run.code,
        compilations=compilations,
        graph_breaks=graph_breaks_of(run),
        memory=run.seen.get("memory", {}),
        stages=stages,
        output=str(run.folder / "output.txt"),
    )
    report |= dict(failures=failures(report, run), warnings=warnings(report))
    if run.seen.get("blind"):
        text = f"block masks could not be made on the host ({run.seen['blind']}): half is assumed"
        report["warnings"].append(dict(what="attention", text=text, line=None))
    report |= dict(whole_run=whole_run(stages, run, options), judged=estimate.JUDGED)
    return report | dict(assumptions=estimate.assumptions(options.card), cannot_see=CANNOT_SEE)


def failures(report: dict, run: Run) -> list[dict]:
    """What would fail there, or keep the GPU waiting: [{what, text, line of the script}]."""
    found = []

    def fail(what: str, text: str, line: int | None = None):
        found.append(dict(what=what, text=text, line=line))

    total = run.seen.get("total", {})
    if run.code is None:
        fail("does not end", "it took longer than --timeout")
    elif run.code:
        short = "memory refused" in total and (run.code == 2 or "memory" in run.last_line())
        fail("does not fit" if short else "does not run", run.last_line(), run.line_of_error())
    for name in total:
        if name.startswith("refused"):
            fail("refused", name)
    for entry in report["graph_breaks"]:
        fail("graph break", entry["reason"], entry["line"])
    for text in limits_hit(run.output):
        fail("too many forms", text)
    late = [entry for entry in report["compilations"] if entry["late"]]
    if late:
        spent = sum(entry["seconds"] for entry in late)
        first = late[0]
        reason = first["reason"] or "a function that the warm-up did not call"
        text = f"{len(late)} compilations after the clock started, {spent:.1f} s here: {reason}"
        fail("late compilation", text, first["line"])
    for stage in report["stages"]:
        if stage["waits"]:
            what, line = Counter(map(tuple, stage["waits_at"])).most_common(1)[0][0]
            fail("wait", f"{stage['waits']} in each update: {what}", line)
            break
    return found


def warnings(report: dict) -> list[dict]:
    """What works, but slower than need be."""
    found = []
    spills = {name: size for stage in report["stages"] for name, size in stage["spills"].items()}
    for name, size in spills.items():
        text = f"{name}: {size} bytes of registers per thread in memory"
        found.append(dict(what="spill", text=text, line=None))
    return found
