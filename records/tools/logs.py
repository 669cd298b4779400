"""Read training logs: ours and the public speedrun's. Parsing only: nothing that is read is ever
run.

    read_log(path) -> [Run, ...]     one Run, or several where a file holds one after the other

A log is the source text of the trainer, a line of '=', an optional header (environment, config,
data hashes), lines

    step:125/3242 val_loss:4.1234 train_time:12345ms step_avg:98.76ms

and, in our logs, one line of JSON with the result. Also read: logs without the source (record
folders), without any line of '=' (captured stdout), times in seconds (`train_time:12.345s`), extra
`name:value` fields, `step_avg:nanms`, and the loss-only lines of llm.c (`s:250 tel:6.3097`). A file
is read in blocks, so memory does not grow with its size. Whatever is wrong with a file ends up in
`Run.problems`, in words; the contents of a file never raise."""

import hashlib
import json
import math
import os
import re
import stat
from dataclasses import dataclass, field

import numpy as np

from records.tools.command import printable

BLOCK = 1 << 20  # bytes read at a time
MAX_LINE = 4 << 20  # bytes; no honest line is longer
MAX_VAL = 100_000  # validation lines kept per run
MAX_TRAIN = 500  # training lines kept per run, about
MAX_LOSS = 1e6  # anything above has diverged, and nan is not below it
MAX_NUMBER = 1e18  # in JSON: no honest number is larger
MAX_DEPTH = 20  # of nested JSON

NUMBER = rb"[-+\d.einaf]{1,30}"  # cheap for the regex engine; float() decides
# Starts with a literal newline, not with ^, because that lets the regex engine skip to the next
# "\nstep:".
STEP = re.compile(
    rb"\nstep:(\d{1,15})/(\d{1,15})(?: (val|train)_loss:(" + NUMBER + rb"))?"
    rb"(?: (?!(?:val|train)_(?:loss|time):)[A-Za-z]\w*:\S+)*? train_time:([\d.]{1,25})(m?s)"
    rb"(?: step_avg:(" + NUMBER + rb")(m?s)(?=[ \r\n]|\Z)|(?=[\r\n]|\Z| (?!step)\w+:))"
)
STEP_LIKE = re.compile(rb"\nstep:\d[^\n]{0,200}")
LLMC = re.compile(rb"\ns:(\d{1,15}) (tel|trl):(" + NUMBER + rb")(?=[ \r\n]|\Z)")
SEPARATOR = re.compile(rb"\n={20,}\r?(?=\n|\Z)")
OPENING = re.compile(rb"={20,}\r?\n(?![a-z][a-z0-9_]*: )")  # not followed by a header
HEADER = re.compile(
    rb"\n(run_id|python|torch|cuda|driver|device|cpu|world_size|argv|source_sha256|data|data_sha256"
    rb"|config): ?"
    rb"([^\r\n]*)"
)
DECLARED = {  # of a result line: what a loss was bought with, as the script says
    "param_count": "parameters",
    "optimizer_state_bytes": "bytes of optimizer state",
    "tokens": "tokens trained",
}
MEMORY = re.compile(rb"\npeak memory (?:consumption|allocated): (\d{1,9}) MiB")
RESULT = re.compile(rb"\n(\{\"[^\r\n]*)")


@dataclass
class Run:
    """One training run as its log tells it. Times in milliseconds, losses in nats per token."""

    path: str
    part: int = 0  # 1, 2, ... where one file holds several runs
    style: str = "none"  # "ours", "public", "llm.c", or "none": no step line at all
    source_sha256: str | None = (
        None  # of the source text, or as claimed where the log holds no source
    )
    source_bytes: int = 0  # 0: the log does not hold its source
    header: dict = field(default_factory=dict)
    config: dict | None = None
    data: dict | None = None  # file name -> sha256
    result: dict | None = None  # the JSON line
    resumed: bool = False
    memory: float | None = None  # peak, bytes, where a public log says it
    planned: int | None = None  # steps
    last_step: int = -1
    last_time: float = -1.0
    train_lines: int = 0
    val: list = field(default_factory=list)  # (step, loss, train time or None)
    train: list = field(
        default_factory=list
    )  # the same of some MAX_TRAIN training lines, for pictures
    problems: list = field(default_factory=list)  # sentences

    @property
    def name(self) -> str:
        return os.path.basename(self.path) + (f" (run {self.part})" if self.part else "")

    @property
    def val_loss(self) -> float | None:
        """The final validation loss: of the result line where it agrees with the last step line,
        else of that line."""
        if not self.val:
            return None
        exact = number((self.result or {}).get("val_loss"))
        loss = self.val[-1][1]
        return (
            exact
            if exact is not None and abs(exact - loss) <= 1e-4
            else loss
            if 0 <= loss < MAX_LOSS
            else None
        )

    @property
    def train_time(self) -> float | None:
        """Of the last line, or of the result where that is later: on a busy machine it is."""
        said = number((self.result or {}).get("train_time_ms"))
        last = self.val[-1][2] if self.val else None
        return last if last is None or said is None else max(last, said)

    @property
    def seed(self):
        return (self.config or {}).get("seed")

    @property
    def plan(self) -> list[tuple[float, float]] | None:
        """(updates, tokens of each) by stage; None where the config has no such stages, as until
        November 2026."""
        stages = (self.config or {}).get("stages")
        rows = stages if isinstance(stages, list) else []
        rows = [row if isinstance(row, dict) else {} for row in rows]
        plan = [(number(row.get("steps")), number(row.get("batch_tokens"))) for row in rows]
        return plan if plan and all(None not in row for row in plan) else None

    @property
    def config_steps(self) -> float | None:
        """Updates that the config asks for."""
        if self.plan:
            return sum(steps for steps, _ in self.plan)
        return (self.config or {}).get("steps")

    def tokens(self, step: int) -> float | None:
        """Tokens trained on in the first `step` steps, by the config's batch_tokens: a number, or a
        list with one for each equal stage of the run, and a last one for its extension, if it has
        any (until November 2026); or by its stages. None where the log does not say."""
        config, plan = self.config or {}, self.plan
        if plan:
            done, left = 0, step
            for steps, batch_tokens in plan:
                here = min(left, steps)
                done, left = done + here * batch_tokens, left - here
            return done
        stages = config.get("batch_tokens")
        stages = stages if isinstance(stages, list) else [stages]
        steps, extension = number(config.get("steps")), number(config.get("extension", 0))
        numbers = [steps, extension, *map(number, stages)]
        if None in numbers or not steps or any(value % 1 for value in numbers):
            return None
        equal = len(stages) - (extension > 0 and len(stages) > 1)
        steps -= extension if equal < len(stages) else 0
        if steps < 0 or not equal:
            return None
        # Step s (from 0) of n is in stage s * k // n: stage i begins at step ceil(i * n / k).
        begins = [-(-i * int(steps) // equal) for i in range(equal + 1)]
        if equal < len(stages):
            begins.append(int(steps + extension))
        spans = zip(stages, begins, begins[1:], strict=False)
        return sum(size * max(0, min(step, end) - begin) for size, begin, end in spans)


def number(value) -> float | None:
    """A finite int or float as float, anything else as None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e300:
        return None
    return float(value) if math.isfinite(value) else None


def parse_json(text: bytes):
    """The JSON value of `text`, or None where it is not JSON (nan and inf are not) or nested too
    deeply to be ours."""

    def refuse(constant):
        raise ValueError(constant)

    def small(kind):
        def parse(text):
            value = kind(text)
            return value if abs(value) < MAX_NUMBER else refuse(text)

        return parse

    def once(pairs):
        found = dict(pairs)
        return found if len(found) == len(pairs) else refuse("a key twice")

    hooks = dict(parse_constant=refuse, parse_int=small(int), parse_float=small(float))
    try:
        value = json.loads(text, object_pairs_hook=once, **hooks)
    except (ValueError, RecursionError):
        return None
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            x
            for v in level
            if isinstance(v, (dict, list))
            for x in (v.values() if isinstance(v, dict) else v)
        ]
    return None if level else value


class _Reader:
    """What is known while one file streams by."""

    def __init__(self, path):
        self.run = Run(os.fspath(path))
        self.runs = [self.run]
        self.counts = {}  # kind of problem -> [first sentence, how often]
        self.in_header = True
        self.result_seen = False
        self.hashes = ()  # sha256 of the source with and without its last newline
        self.last_step = {True: -1, False: -1}  # of validation lines, of the others
        self.last_val = (0, 0.0)
        self.last_part = -1

    def problem(self, kind, sentence, count=1):
        self.counts.setdefault(kind, [sentence, 0])[1] += count

    def close_run(self):
        for sentence, count in self.counts.values():
            self.run.problems.append(sentence + (f" ({count} times)" if count > 1 else ""))
        self.counts = {}

    def next_run(self):
        """A public log may hold several runs of one source: step 0 comes again."""
        self.close_run()
        first = self.runs[0]
        first.part = 1
        self.run = Run(
            first.path,
            part=len(self.runs) + 1,
            style=first.style,
            source_sha256=first.source_sha256,
            source_bytes=first.source_bytes,
            header=first.header,
        )
        self.runs.append(self.run)
        self.last_step = {True: -1, False: -1}
        self.last_val = (0, 0.0)
        self.last_part = -1

    def read(self):
        run = self.run
        size = None
        try:
            status = os.stat(run.path)
            size = status.st_size
            if not stat.S_ISREG(status.st_mode):
                raise OSError("not a regular file")
            with open(run.path, "rb") as f:
                blocks = self.blocks(f)
                rest = self.read_source(blocks)
                if (
                    rest is None and not self.counts
                ):  # no line of '=': no source and no header, maybe step lines
                    self.in_header = False
                    f.seek(0)
                    blocks = self.blocks(f)
                if rest:
                    self.body(b"\n" + rest)
                for block in blocks:
                    self.body(b"\n" + block)
        except OSError as error:
            self.problem("read", f"cannot be read: {error.strerror or error}")
        if run.style == "ours":
            self.check_source_claim()
        elif run.style == "none" and not self.counts:
            self.problem(
                "none",
                "holds no step line: not a training log, or cut off before the first step"
                if size
                else "is empty",
            )
        self.close_run()
        return self.runs

    def blocks(self, f):
        """Whole lines, about BLOCK bytes at a time."""
        carry = b""
        while block := f.read(BLOCK):
            if b"\0" in block:
                self.problem(
                    "binary",
                    f"is not text: a zero byte at {f.tell() - len(block) + block.index(0)}",
                )
                return
            cut = block.rfind(b"\n") + 1
            if cut:
                yield carry + block[:cut]
                carry = block[cut:]
            else:
                carry += block
                if len(carry) > MAX_LINE:
                    self.problem(
                        "line", f"holds a line longer than {MAX_LINE >> 20} MB: not a training log"
                    )
                    return
        if carry:
            yield carry

    def read_source(self, blocks):
        """Hash all before the first line of '='; returns the rest of that block, None where there
        is no such line."""
        digest, last, size = hashlib.sha256(), b"", 0
        for i, block in enumerate(blocks):
            if i == 0 and (
                opening := OPENING.match(block)
            ):  # a line of '=' above the source as well
                block = block[opening.end() :]
            found = SEPARATOR.search(b"\n" + block)
            part = block[: found.start()] if found else block
            if part:
                digest.update(last + part[:-1])
                last = part[-1:]
                size += len(part)
            if found:
                without = digest.hexdigest() if last == b"\n" else None
                digest.update(last)
                self.hashes = (digest.hexdigest(), without)
                if size:
                    self.run.source_sha256, self.run.source_bytes = self.hashes[0], size
                return block[found.start() :]
        return None

    def body(self, text):
        """`text` is whole lines after a newline."""
        if self.in_header:
            end = text.find(b"\nstep:")
            self.read_header(text if end < 0 else text[:end])
            self.in_header = end < 0
        if b"\nresumed:" in text:
            self.run.resumed = True
        if found := MEMORY.search(text):
            self.run.memory = float(found[1]) * 2**20
        steps = self.read_steps(text)
        if self.result_seen and steps:
            self.problem("after", "holds step lines after the result line")
        for found in RESULT.finditer(text):
            self.read_result(found, text)
        if b"\ns:" in text and not steps and self.run.style in ("none", "llm.c"):
            self.read_llmc(text)

    def read_header(self, text):
        run = self.run
        for found in HEADER.finditer(text):
            key, value = found[1].decode(), found[2]
            if key in run.header:
                self.problem("twice", f"names {key} twice in its header")
                continue
            run.header[key] = value.decode("utf-8", "replace")
            attribute = {"config": "config", "data": "data", "data_sha256": "data"}.get(key)
            if attribute:
                parsed = parse_json(value)
                if not isinstance(parsed, dict):
                    self.problem(key, f"has a {key} line that is not a JSON object")
                    parsed = None
                setattr(run, attribute, parsed)
        if "config" in run.header or "run_id" in run.header:
            run.style = "ours"

    def read_result(self, found, text):
        run = self.run
        parsed = parse_json(found[1])
        if isinstance(parsed, dict) and "val_loss" in parsed and "train_time_ms" in parsed:
            if self.result_seen:
                self.problem("results", "holds more than one result line")
            if text.find(b"\nstep:", found.end()) >= 0:
                self.problem("after", "holds step lines after the result line")
            run.result = parsed
            self.result_seen = True
        elif run.style == "ours" and not isinstance(parsed, dict):
            self.problem("result", "has a result line that is not JSON: cut off or edited")

    def check_source_claim(self):
        run = self.run
        claim = run.header.get("source_sha256", "").strip()
        if not re.fullmatch("[0-9a-f]{64}", claim):
            self.problem(
                "claim", "does not name its source: no source_sha256 line with 64 hex digits"
            )
        elif not run.source_bytes:
            run.source_sha256 = claim
        elif claim in self.hashes:
            run.source_sha256 = claim
        else:
            self.problem(
                "claim",
                f"claims source_sha256 {claim[:12]}, but the source in it has "
                f"{self.hashes[0][:12]}: edited",
            )

    def read_steps(self, text) -> int:
        """All step lines of a block at once; returns how many."""
        rows = STEP.findall(text)
        if len(rows) != text.count(b"\nstep:"):
            for found in STEP_LIKE.finditer(text):
                if not STEP.match(text, found.start()):
                    self.unreadable_line(found[0][1:])
        if not rows:
            return 0
        found = len(rows)
        try:
            table = numbers(rows)
        except ValueError:  # rare: find the lines that float() does not take
            rows = self.readable(rows)
            if not rows:
                return found
            table = numbers(rows)
        if self.run.style in ("none", "llm.c"):
            self.run.style = "public"
        n = len(rows)
        grain = tuple(
            decimals(rows[0][i]) * (1000 if rows[0][i + 1] == b"s" else 1) for i in (4, 6)
        )
        before = np.concatenate([[self.run.last_step], table["step"][:-1]])
        cuts = [0, n]
        if self.run.style == "public":
            cuts[1:1] = np.nonzero((table["step"] == 0) & (before > 0))[0].tolist()
        for start, end in zip(cuts, cuts[1:], strict=False):
            if (
                start < n
                and table["step"][start] == 0
                and self.run.last_step > 0
                and self.run.style == "public"
            ):
                self.next_run()
            if end > start:
                self.check_steps({k: v[start:end] for k, v in table.items()}, grain)
        return found

    def readable(self, rows) -> list:
        good = []
        for row in rows:
            if all(is_number(row[i]) for i in (3, 4, 6)):
                good.append(row)
            else:
                self.unreadable_line(b" ".join(row))
        return good

    def unreadable_line(self, line):
        text = printable(line.decode("utf-8", "replace"), 60)
        self.problem("line", f"has a step line that cannot be read: {text!r}")

    def check_steps(self, table, grain):
        run = self.run
        step, planned, time, avg, is_val = (
            table[k] for k in ("step", "planned", "time", "avg", "is_val")
        )
        if run.planned is None:
            run.planned = int(planned[0])
        if (planned != run.planned).any():
            self.problem("planned", "changes the number of planned steps half-way")
        if (step > run.planned).any():
            self.problem("beyond", "goes on beyond the planned steps")

        before = np.concatenate([[run.last_step], step[:-1]])
        if (back := step < before).any():
            i = int(back.argmax())
            self.problem("steps", f"steps go backwards: {before[i]} to {step[i]}", int(back.sum()))
        for which in (True, False):
            mine = step[is_val == which]
            if len(mine):
                same = np.concatenate([[self.last_step[which]], mine[:-1]]) == mine
                if same.any():
                    self.problem(
                        f"same {which}", f"has step {mine[same.argmax()]} twice", int(same.sum())
                    )
                self.last_step[which] = int(mine[-1])

        # The public trainers of 2024 restart their clock after ten untimed steps; until then
        # step_avg is nan.
        before = np.concatenate([[run.last_time], time[:-1]])
        restart = (step <= 12) & np.isnan(avg) & (run.style == "public")
        if (back := (time < before) & ~restart).any():
            i = int(back.argmax())
            self.problem(
                "times",
                f"train_time goes backwards at step {step[i]}: {before[i]:.0f} to {time[i]:.0f} ms",
                int(back.sum()),
            )
        with np.errstate(invalid="ignore", over="ignore"):
            self.check_averages(step, time, avg, is_val, grain)

        if (wrong := ~((table["loss"] >= 0) & (table["loss"] < MAX_LOSS))).any():
            self.problem(
                "nan",
                f"has a loss of {table['loss'][wrong.argmax()]} at step {step[wrong.argmax()]}",
                int(wrong.sum()),
            )
        self.keep(step, table["loss"], time, is_val)
        run.last_step, run.last_time = int(step[-1]), float(time[-1])

    def keep(self, step, loss, time, is_val):
        """Takes over the validation lines, and enough of the training lines for pictures."""
        run = self.run
        rows = np.nonzero(is_val)[0]
        if len(run.val) + len(rows) > MAX_VAL:
            self.problem("many", f"holds more than {MAX_VAL} validation lines")
            rows = rows[: max(0, MAX_VAL - len(run.val))]
        run.val += [(int(step[i]), float(loss[i]), float(time[i])) for i in rows]
        run.train_lines += int((~is_val).sum())
        # Of the training lines with a loss, the first in each MAX_TRAIN-th of the run
        part = step * MAX_TRAIN // max(run.planned, MAX_TRAIN)
        for i in np.nonzero(~is_val & (loss > 0))[0]:
            if part[i] > self.last_part and len(run.train) <= MAX_TRAIN:
                run.train.append((int(step[i]), float(loss[i]), float(time[i])))
                self.last_part = part[i]

    def check_averages(self, step, time, avg, is_val, grain):
        """step_avg is train_time over the steps; public logs may leave out ten, or count since the
        last validation."""

        def fits(elapsed, steps):
            return (
                np.abs(elapsed - avg * steps)
                <= grain[0] + np.abs(steps) * grain[1] + 1e-6 * elapsed
            )

        good = np.isnan(avg) | (step == 0) | fits(time, step)
        if self.run.style == "public":
            good |= fits(time, step - 10)
            rows = np.nonzero(is_val)[0]
            if len(rows):
                if not good.all():
                    since_step, since_time = np.zeros(len(step)), np.zeros(len(step))
                    since_step[rows] = np.concatenate([[self.last_val[0]], step[rows][:-1]])
                    since_time[rows] = np.concatenate([[self.last_val[1]], time[rows][:-1]])
                    good |= is_val & fits(time - since_time, step - since_step)
                self.last_val = (int(step[rows[-1]]), float(time[rows[-1]]))
        elif np.isnan(avg[step > 0]).any():
            good &= ~(np.isnan(avg) & (step > 0))
        if not good.all():
            i = int((~good).argmax())
            self.problem(
                "average",
                f"step_avg {avg[i]:.2f} ms does not fit train_time {time[i]:.0f} ms at step "
                f"{step[i]}",
                int((~good).sum()),
            )

    def read_llmc(self, text):
        run = self.run
        for step, kind, loss in LLMC.findall(text):
            if not is_number(loss):
                self.unreadable_line(loss)
                continue
            step, loss = int(step), float(loss)
            run.style = "llm.c"
            if step < run.last_step:
                self.problem("steps", f"steps go backwards: {run.last_step} to {step}")
            run.last_step = step
            if not 0 <= loss < MAX_LOSS:
                self.problem("nan", f"has a loss of {loss} at step {step}")
            if kind == b"trl":
                run.train_lines += 1
            elif len(run.val) < MAX_VAL:
                run.val.append((step, loss, None))


def numbers(rows) -> dict[str, np.ndarray]:
    """STEP's rows as columns, times in ms. A line without a loss has loss 0, one without an average
    has nan."""
    step, planned, kind, loss, time, unit, avg, avg_unit = zip(*rows, strict=False)
    n = len(rows)

    def integers(texts):
        return np.fromiter(map(int, texts), np.int64, n)

    def floats(texts, units=(), empty=b"0"):
        values = np.fromiter(
            map(float, (x or empty for x in texts) if b"" in texts else texts), float, n
        )
        return values * np.where(np.array(units) == b"s", 1000.0, 1.0) if b"s" in units else values

    return dict(
        step=integers(step),
        planned=integers(planned) if len(set(planned)) > 1 else np.full(n, int(planned[0])),
        is_val=np.fromiter(map(b"val".__eq__, kind), bool, n),
        loss=floats(loss),
        time=floats(time, unit),
        avg=floats(avg, avg_unit, b"nan"),
    )


def is_number(text: bytes) -> bool:
    try:
        float(text or b"0")
    except ValueError:
        return False
    return True


def decimals(text: bytes) -> float:
    """The size of the last digit of a printed number: b"1.25" -> 0.01."""
    return 10.0 ** -len(text.partition(b".")[2]) if text[-1:].isdigit() else 0.01


def read_log(path) -> list[Run]:
    """Every run in the file at `path`. Never raises for what the file holds; see `Run.problems`."""
    return _Reader(path).read()


def body_lines(path):
    """The lines (bytes) of one of our logs from the first line of '=' on: all but the source."""
    inside = False
    with open(path, "rb") as f:
        for line in f:
            inside = inside or bool(SEPARATOR.match(b"\n" + line))
            if inside:
                yield line


def source_text(path, sha256: str) -> bytes:
    """The trainer's source in a log, exactly the bytes whose hash is `sha256`; ValueError where it
    is not there."""
    with open(path, "rb") as f:
        text = b"\n" + f.read(MAX_LINE)
    found = SEPARATOR.search(text)
    source = text[1 : found.start() + 1] if found else b""
    for candidate in (source, source[:-1]):
        if candidate and hashlib.sha256(candidate).hexdigest() == sha256:
            return candidate
    raise ValueError(f"{path} does not hold the source {sha256[:12]}")


def sha256_file(path) -> str:
    with open(path, "rb") as f:
        digest = hashlib.sha256()
        while block := f.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
