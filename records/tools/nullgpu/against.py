"""The estimate beside what real cards took: public scripts run on the stand-in, out of their logs.

A public log holds the script that made it and a line `step:N/M ... train_time:T` for each update.
The script runs as rank 0 of 8 with its number of updates cut and its shapes kept; REPLACED says
what of it has to be changed. Each third of the run is compared by itself, since batches and windows
grow. What the constants of the estimate should be is fitted on one half of the scripts and judged
on the rest, for all ways to choose a half.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import os
import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from records.tools.command import BadInput, need, write_json
from records.tools.nullgpu import estimate
from records.tools.nullgpu.cards import CARDS, GIB, Card
from records.tools.nullgpu.environment import Environment, say
from records.tools.nullgpu.report import single_updates
from records.tools.nullgpu.run import Run, random_shard, ranks

COUNTING = "2"  # to be raised when observe.py counts something else
UPDATES = 54
PARTS = 3  # of a run, each compared by itself
EDGE = 0.1  # of a part, left out at both ends: the next part may begin a little sooner there
SPAN = 10  # updates whose mean time is one reading of the log
SHARD = 100_000_000  # tokens, as in FineWeb's
MEMORY = 300 * GIB  # of each card: what a script needs with this torch is not the question
TIMEOUT = 3600  # seconds of one script
STEP = re.compile(r"^step:(\d+)/(\d+) (?!val_loss).*?train_time:([\d.]+)ms", re.MULTILINE)
DEVICE = re.compile(r"^\|\s+\d+\s+(NVIDIA \S.*?)\s+(?:On|Off) ", re.MULTILINE)
SEPARATOR = re.compile(r"^={20,}$", re.MULTILINE)
SECOND_FILE = re.compile(r"^-{20,}\n# (\w+\.py)\n-{20,}$", re.MULTILINE)
LENGTH = r"(\s*(?::\s*int)?\s*=\s*)\d+"
REPLACED = (  # (what it is, pattern, replacement)
    ("", r"\b(num_iterations|num_scheduled_iterations)" + LENGTH, rf"\g<1>\g<2>{UPDATES}"),
    ("", r"\b(num_extension_iterations|iteration_extension)" + LENGTH, r"\g<1>\g<2>1"),
    ("", r"\b(warmdown_iters|cooldown_iters)" + LENGTH, rf"\g<1>\g<2>{UPDATES // 3}"),
    ("", r"\b(val_loss_every)" + LENGTH, r"\g<1>\g<2>0"),
    ("", r"(expandable_segments):True", r"\1:False"),
    ("", r"^    A, B, C,$", "    A: tl.constexpr, B: tl.constexpr, C: tl.constexpr,"),  # Triton 3.7
    ("no coordinate descent", r"^( *[^#\n ].*coordinate_descent_tuning = )True", r"\1False"),
    (
        "FlashAttention 2 for cuDNN's",
        r"enable_cudnn_sdp\(True\)\nenable_flash_sdp\(False\)",
        "enable_cudnn_sdp(False)\nenable_flash_sdp(True)",
    ),
)
FITTED = dict(matmul=0.15, memory=0.1, flex=0.2, flash3=0.2, update=0.5)  # and how far, as logs


@dataclass
class Public:
    """A public run: name, files of its script, and milliseconds per update in each part."""

    name: str
    card: Card
    gpus: int
    files: dict[str, str]
    measured: list[float]
    changes: list[str]


def read(path: Path) -> Public:
    """Raises BadInput where this is no log of a public script."""
    try:
        text = path.read_text(errors="replace")
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}; name a log of a public script") from None
    chunks = [chunk for chunk in SEPARATOR.split(text) if chunk.strip()]
    steps = [(int(n), int(of), float(ms)) for n, of, ms in STEP.findall(text)]
    if not chunks or "import torch" not in chunks[0] or len(steps) < 10 * SPAN:
        raise BadInput(f"{path}: no log of a public script: its source, then a line per update")
    source, changes = chunks[0].lstrip("\n"), []
    for what, pattern, replacement in REPLACED:
        source, found = re.subn(pattern, replacement, source, flags=re.MULTILINE)
        changes += [what] if found and what else []
    if re.search(r"^(?:from|import) (?:kernels|flash_attn_interface)", source, re.MULTILINE):
        changes.append("an operator that counts for FlashAttention 3")
    main, *others = SECOND_FILE.split(source)
    files = {"train_gpt.py": main} | dict(zip(others[::2], others[1::2], strict=True))
    devices = DEVICE.findall(text)
    card = next((card for card in CARDS.values() if card.name in devices), CARDS["h100"])
    return Public(path.stem, card, len(devices) or 8, files, measured(steps), changes)


def part_of(step: int, steps: int) -> int | None:
    """In which part of the run this update is, 0-based both; None at the edges of one."""
    part, place = divmod(step * PARTS / steps, 1)
    return int(part) if EDGE <= place <= 1 - EDGE and part < PARTS else None


def measured(steps: list[tuple]) -> list[float]:
    """Milliseconds per update in each part of a run: the median over spans, so that neither a
    validation nor updates that differ in turn matter."""
    found = [[] for _ in range(PARTS)]
    for (first, total, begin), (last, _, end) in zip(steps, steps[SPAN:], strict=False):
        part = part_of((first + last) // 2, total)
        if part is not None and last - first == SPAN and end > begin:
            found[part].append((end - begin) / SPAN)
    return [statistics.median(times) for times in found]


class PublicRun(Run):
    """A run of a public script, in a folder that holds what it asks for."""

    def __init__(self, public: Public, environment: Environment):
        self.public = public
        options = dict(memory=MEMORY, timeout=TIMEOUT, script=Path())
        super().__init__(
            SimpleNamespace(card=public.card, gpus=public.gpus, **options), environment
        )

    def prepare(self, options, data: Path) -> list[str]:
        for name, text in self.public.files.items():
            (self.folder / name).write_text(text)
        self.script = self.folder / "train_gpt.py"
        tokens = self.folder / "data/fineweb10B"
        tokens.mkdir(parents=True)
        for kind in ("train_000001", "train_000002", "val_000000"):
            (tokens / f"fineweb_{kind}.bin").symlink_to(random_shard(data, 50257, SHARD))
        tool = self.folder / "nvidia-smi"
        tool.write_text("#!/bin/sh\n")
        tool.chmod(0o755)
        return []

    def variables(self, options, environment: Environment) -> dict[str, str]:
        path = f"{self.folder}:{os.environ.get('PATH', '')}"
        settings = super().variables(options, environment) | ranks(options.gpus)
        # Operators of 2025 return other strides than they promise.
        return settings | dict(PATH=path, TORCHINDUCTOR_SIZE_ASSERTS="0")


def counted(public: Public, environment: Environment) -> list[list[estimate.Work]]:
    """The work of an update of each part. Kept, since a run takes minutes."""
    words = [COUNTING, environment.torch, *public.files.values()]
    words += [str(public.card.compute), str(public.gpus)]
    digest = hashlib.sha256("\0".join(words).encode()).hexdigest()
    kept = environment.home / "against" / f"{digest[:16]}.json"
    if not kept.exists():
        say(f"runs {public.name} on a stand-in for {public.gpus} x {public.card.name}")
        run = PublicRun(public, environment)
        if run.code != 0:
            say(f"{public.name} does not run: {run.last_line()}; see {run.folder}/output.txt")
            return []
        kept.parent.mkdir(exist_ok=True)
        write_json(kept, run.seen)
    seen = json.loads(kept.read_text())
    return parts_of(seen)


def parts_of(seen: dict) -> list[list]:
    """[[all work of an update, ...] for each part]; [] where a part was not seen."""
    updates = [[] for _ in range(PARTS)]
    for number, update in single_updates(seen):
        part = part_of(number, UPDATES + 1)
        if part is not None:
            updates[part].append(estimate.works_of(update))
    return updates if all(len(part) > 1 for part in updates) else []


def estimated(public: Public, parts: list[list], shares: estimate.Shares) -> list[float]:
    """Milliseconds per update in each part."""

    def middle(updates):
        times = [
            estimate.update_seconds(works, public.card, public.gpus, shares) for works in updates
        ]
        pairs = zip(times, times[1:], strict=False)  # updates may differ in turn
        return 500 * statistics.median(map(sum, pairs))

    return [middle(updates) for updates in parts]


def deviations(runs: list, shares: estimate.Shares) -> list[float]:
    """log(estimate / measured) of all parts of these runs."""
    return [
        math.log(guess / truth)
        for public, parts in runs
        for guess, truth in zip(estimated(public, parts, shares), public.measured, strict=True)
    ]


def fit(runs: list) -> estimate.Shares:
    """The constants that come closest, held near what is known of them."""
    need("scipy")
    from scipy.optimize import least_squares

    def shares_of(logs):
        start = estimate.Shares()
        values = {
            name: getattr(start, name) * math.exp(log)
            for name, log in zip(FITTED, logs, strict=True)
        }
        return dataclasses.replace(start, **values)

    def residuals(logs):
        held = [log / width for log, width in zip(logs, FITTED.values(), strict=True)]
        return [error / 0.05 for error in deviations(runs, shares_of(logs))] + held

    return shares_of(least_squares(residuals, [0.0] * len(FITTED)).x)


def compare(publics: list[Public], environment: Environment) -> dict:
    """runs: each script's estimate beside its log, "judged" with constants from halves of the
    scripts that it is not in, the mean over all such halves; error: root mean square over all of
    them; worst: the largest; fitted: constants from all scripts; not_run."""
    runs = [(public, counted(public, environment)) for public in publics]
    seen = [(public, parts) for public, parts in runs if parts]
    if len(seen) < 2:
        raise BadInput("at least two of these scripts must run: one half is judged by the other")
    judged = {public.name: [] for public, _ in seen}
    for half in itertools.combinations(seen, len(seen) // 2):
        shares = fit(half)
        for public, parts in seen:
            if all(public is not fitted for fitted, _ in half):
                judged[public.name].append(estimated(public, parts, shares))
    rows = [
        dict(
            name=public.name,
            cards=f"{public.gpus} x {public.card.name}",
            measured=public.measured,
            estimated=estimated(public, parts, estimate.SHARES),
            judged=[statistics.mean(part) for part in zip(*judged[public.name], strict=True)],
            replaced=public.changes,
        )
        for public, parts in seen
    ]
    errors = [
        guess / truth - 1
        for public, _ in seen
        for times in judged[public.name]
        for guess, truth in zip(times, public.measured, strict=True)
    ]
    return dict(
        runs=rows,
        error=math.sqrt(statistics.mean(error**2 for error in errors)),
        worst=max(map(abs, errors)),
        fitted={name: getattr(fit(seen), name) for name in FITTED},
        not_run=[public.name for public, parts in runs if not parts],
    )
