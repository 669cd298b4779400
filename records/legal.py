"""Does a trainer keep the rules? Runs it on the CPU for a few steps, on shards made for the purpose, and watches.

    python records/legal.py train_gpt.py [--data DIR] [--json] [-- flags for the trainer]
    python records/legal.py records/laptop/NEW -- --lawa 3

causality      changing tokens from position t on changes no logit before t, and none in another row; nothing is
               remembered from one call to the next
probabilities  the loss is -log softmax(logits)[target] over the whole vocabulary, and so is every val_loss in the log
validation     each evaluation scores the first val_tokens validation tokens, every one of them once; the last one comes
               after the last update
leakage        validation tokens are read in evaluate() alone (but for hashing), and the model meets them nowhere else;
               with --data, no document of the validation shards in DIR is also in the training shards there
batches        what is trained on is the stream of the shards: rows in its order (or that of --spread_rows), none twice
               in an epoch, targets one token on, batch_tokens for each update
clock          weights change while the clock runs and only then; warm-up leaves them as they were and sees no token of
               the shards; the logged train_time is the time between starts and stops, also when steps are slow

The trainer is run as it is, in a process of its own; what it does is seen by wrapping GPT.forward, evaluate, Clock and
the reading of files, so it needs these names. One that lacks them fails what cannot be checked. All this finds mistakes
and shortcuts. Code that knows that it is watched can hide from it: read the change as well.

Exit code 0: all checks pass; 1: some fail, each with its reasons, or the trainer does not run; 2: misuse.
"""
import builtins
import collections
import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import inspect
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import check, shards
from data.shards import BadInput

# torch is imported where it is used: only the process that runs the trainer needs it.

TINY = dict(preset="laptop", device="cpu", compile=False, n_layer=2, n_head=2, n_embd=32, seq_len=32, batch_tokens=256,
            steps=6, warmup=0, val_tokens=1024, val_every=3, seed=1)
NEEDED = ("steps", "seq_len", "batch_tokens", "val_tokens", "train_files", "val_files", "log_dir")
OURS = {"train_files", "val_files", "log_dir", "device", "compile", "resume", "generate", "checkpoint", "vocab_size"}
VOCAB = shards.BYTE_VOCAB
LOGIT_TOLERANCE = 1e-5  # of the largest logit: the same sums in the same order hardly differ
LOSS_TOLERANCE = 5e-4   # nats per token, of a mean
SLOW = 1.0              # seconds by which every forward pass in training seems longer than it is
GRAM = 8                # so many tokens in a row are not met by chance


class Failed(Exception):
    """Why the trainer could not be watched to the end."""


# ----------------------------------------------------------------------------------------------------------------- data

def write_data(folder: Path, settings: dict) -> dict[str, np.ndarray]:
    """Writes two train shards and a val shard of random documents; returns {"train" or "val": the stream, uint16}.

    Both streams are longer than what is needed, and no GRAM tokens in a row are likely to occur twice."""
    rng, streams, odds = np.random.default_rng(0), {}, 1 / np.arange(3, 43)
    counts = dict(train=(settings["steps"] + 3) * settings["batch_tokens"] + 77, val=settings["val_tokens"] + 333)
    for name, count in counts.items():
        stream = rng.choice(np.arange(65, 105), count, p=odds / odds.sum())
        stream[rng.random(count) < 0.02] = VOCAB - 1
        stream[0] = VOCAB - 1
        streams[name] = stream.astype("<u2")
    first, second = np.split(streams["train"], [len(streams["train"]) * 2 // 5])
    for name, tokens in (("train_000000", first), ("train_000001", second), ("val_000000", streams["val"])):
        shards.write_shard(folder / f"tiny_{name}.bin", tokens)
    return streams


def find(row: np.ndarray, stream: np.ndarray) -> int | None:
    """Where a row of tokens stands in a stream; None: nowhere."""
    if not row.size or row.min() < 0 or row.max() > 65535:
        return None
    needle, haystack, at = row.astype("<u2").tobytes(), stream.tobytes(), -1
    while (at := haystack.find(needle, at + 1)) % 2 == 1 and at > 0:
        pass
    return at // 2 if at >= 0 else None


def grams(tokens: np.ndarray) -> set[bytes]:
    data = tokens.astype("<u2").tobytes()
    return {data[2 * i:2 * (i + GRAM)] for i in range(len(tokens) - GRAM + 1)}


# ------------------------------------------------------------------------------------------------------------- watching

@dataclass
class Call:
    """One forward pass of the model."""
    phase: str  # warm-up, training or evaluation
    running: bool  # did the clock run?
    grad: bool  # were gradients computed?
    weights: bytes  # their checksum
    inputs: np.ndarray  # [rows, T]
    targets: np.ndarray | None  # [rows, T]


@dataclass
class Evaluation:
    """One call of evaluate()."""
    loss: float
    own_loss: float  # mean of -log softmax(logits) of the tokens that follow the rows it scored; nan: it scored none
    calls: list[Call]
    seconds: float  # on the clock so far
    trained: int  # training calls before it
    kept: bool  # weights after it as before it


class Watch:
    """A trainer's module with its functions wrapped, and a record of what they did."""

    def __init__(self, module, folder: Path, streams: dict[str, np.ndarray], settings: dict):
        self.module, self.streams, self.settings = module, streams, settings
        self.val_files = {os.stat(path).st_ino for path in folder.glob("tiny_val_*")}
        self.calls, self.evaluations, self.models, self.val_reads, self.events = [], [], [], [], []
        self.evaluating = self.hashing = 0
        self.running = self.started = self.quiet = False
        self.seconds, self.since, self.late = 0.0, 0.0, 0.0

    def weights(self) -> bytes:
        """Checksum of all parameters and buffers of every model seen so far."""
        import torch
        digest = hashlib.blake2b(digest_size=16)
        for model in self.models:
            for t in (*model.parameters(), *model.buffers()):
                digest.update(t.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy())
        return digest.digest()

    def missing(self, *names: str) -> list[str]:
        """Those of the names ("Class" or "Class.method") that the script has not."""
        def has(owner, member):
            return hasattr(self.module, owner) and (not member or hasattr(getattr(self.module, owner), member))
        return [name for name in names if not has(*name.partition(".")[::2])]

    # wrappers: each is called in place of `original`

    def forward(self, original, model, *args, **kwargs):
        import torch
        if self.quiet:
            return original(model, *args, **kwargs)
        if not any(model is known for known in self.models):
            self.models.append(model)
        given = [a for a in (*args, *kwargs.values()) if torch.is_tensor(a) and not a.is_floating_point() and a.dim()]
        rows = [t.cpu().reshape(-1, t.shape[-1]).numpy().copy() for t in given[:2]] + [None]
        if not given:
            raise Failed("GPT.forward is called without a tensor of tokens: nothing can be checked")
        phase = "evaluation" if self.evaluating else "training" if self.started else "warm-up"
        self.calls.append(Call(phase, self.running, torch.is_grad_enabled(), self.weights(), *rows[:2]))
        if phase == "training":
            self.late += SLOW
        return original(model, *args, **kwargs)

    def evaluate(self, original, *args, **kwargs):
        before, first, trained = self.weights(), len(self.calls), sum(call.phase == "training" for call in self.calls)
        seconds = self.seconds + (time.perf_counter() - self.since if self.running else 0)
        self.events.append("work")
        self.evaluating += 1
        try:
            loss = original(*args, **kwargs)
        finally:
            self.evaluating -= 1
        kept, calls, own_loss, number = before == self.weights() or first == 0, self.calls[first:], math.nan, math.nan
        with contextlib.suppress(Failed):  # the check of probabilities will meet the same failure
            own_loss = self.own_loss(calls)
        with contextlib.suppress(TypeError, ValueError):  # not a number: the comparison with own_loss will say so
            number = float(loss)
        self.evaluations.append(Evaluation(number, own_loss, calls, seconds, trained, kept))
        return loss

    def start(self, original, *args, **kwargs):
        weights = self.weights()
        original(*args, **kwargs)
        now = time.perf_counter()
        self.seconds += now - self.since if self.running else 0
        self.since, self.running, self.started = now, True, True
        self.events.append(("start", weights))

    def stop(self, original, *args, **kwargs):
        self.seconds += time.perf_counter() - self.since if self.running else 0
        self.running = False
        original(*args, **kwargs)
        self.events.append(("stop", self.weights()))

    def work(self, original, *args, **kwargs):
        self.events.append("work")
        return original(*args, **kwargs)

    def hash(self, original, *args, **kwargs):
        self.hashing += 1
        try:
            return original(*args, **kwargs)
        finally:
            self.hashing -= 1

    def note_read(self, file, end: int):
        """A file is read up to byte `end`: is it a validation shard, beyond its header, at the wrong time?"""
        if self.evaluating or self.hashing or end <= 1024:
            return
        try:
            if os.stat(file).st_ino not in self.val_files:
                return
        except (OSError, TypeError, ValueError):
            return  # no such file: nothing to read
        frame = sys._getframe(1)
        while frame and frame.f_code.co_filename != self.module.__file__:
            frame = frame.f_back
        self.val_reads.append(frame.f_code.co_name if frame else "a library")

    @contextlib.contextmanager
    def watching(self):
        """Everything wrapped that the script has, and put back at the end."""
        open_file, pread, read = open, os.pread, os.read

        def seen_open(file, *args, **kwargs):
            self.note_read(file, sys.maxsize)  # that it is open must do: what follows cannot be seen
            return open_file(file, *args, **kwargs)

        def seen_pread(fd, n, offset):
            self.note_read(fd, offset + n)
            return pread(fd, n, offset)

        def seen_read(fd, n):
            self.note_read(fd, sys.maxsize)
            return read(fd, n)

        wraps = {"GPT.forward": self.forward, "evaluate": self.evaluate, "save_checkpoint": self.work,
                 "Clock.start": self.start, "Clock.stop": self.stop,
                 "Shards.__init__": self.hash, "Shards.verify": self.hash, "check_inputs": self.hash}
        files = ((builtins, "open", seen_open), (io, "open", seen_open), (os, "pread", seen_pread),
                 (os, "read", seen_read))
        with contextlib.ExitStack() as stack:
            for path, wrapper in wraps.items():
                if not self.missing(path):
                    owner, _, name = path.rpartition(".")
                    owner = getattr(self.module, owner) if owner else self.module
                    stack.enter_context(mock.patch.object(owner, name, passing(wrapper, getattr(owner, name))))
            for owner, name, new in files:
                stack.enter_context(mock.patch.object(owner, name, new))
            yield

    @contextlib.contextmanager
    def slow_time(self):
        """All of Python's clocks run ahead by self.late, the seconds by which forward passes pretend to be slow."""
        def shifted(real, unit):
            return lambda: real() + type(unit)(self.late * unit)
        with contextlib.ExitStack() as stack:
            for name in ("perf_counter", "monotonic", "time"):
                stack.enter_context(mock.patch.object(time, name, shifted(getattr(time, name), 1.0)))
                stack.enter_context(mock.patch.object(time, f"{name}_ns", shifted(getattr(time, f"{name}_ns"), 10**9)))
            yield

    # asking the model

    def ask(self, tokens, *targets):
        """model(tokens) or model(tokens, targets), unwatched and without gradients; fp64, on the CPU."""
        import torch
        self.quiet = True
        try:
            with torch.no_grad():
                return self.models[-1](torch.as_tensor(tokens), *map(torch.as_tensor, targets)).double().cpu()
        finally:
            self.quiet = False

    def logits(self, tokens):
        """[B, T, V] for tokens [B, T]. Raises Failed where the model does not give them."""
        try:
            logits = self.ask(tokens)
        except Failed:
            raise
        except Exception as error:  # any fork, any signature
            raise Failed(f"model(tokens) fails: {type(error).__name__}: {str(error)[:100]}") from None
        if logits.dim() != 3 or tuple(logits.shape[:2]) != tuple(tokens.shape) or logits.shape[2] < VOCAB:
            raise Failed(f"model(tokens) gives {list(logits.shape)}, not logits [B, T, V] of all {VOCAB} tokens")
        return logits

    def own_loss(self, calls: list[Call]) -> float:
        import torch
        total, count, val = 0.0, 0, self.streams["val"]
        for call in calls:
            found = [(row, find(row, val)) for row in call.inputs]
            if placed := [(row, at) for row, at in found if at is not None and at + len(row) < len(val)]:
                logits = self.logits(np.stack([row for row, _ in placed]))
                targets = np.stack([val[at + 1:at + 1 + len(row)] for row, at in placed]).astype(np.int64)
                total += cross_entropy(logits, torch.as_tensor(targets)) * targets.size
                count += targets.size
        return total / count if count else math.nan


def passing(wrapper, original):
    """A plain function, so that it becomes a method where `original` is one."""
    @functools.wraps(original)
    def wrapped(*args, **kwargs):
        return wrapper(original, *args, **kwargs)
    return wrapped


def cross_entropy(logits, targets) -> float:
    """Mean of -log softmax(logits)[target], nats."""
    return float((logits.logsumexp(-1) - logits.gather(-1, targets[..., None]).squeeze(-1)).mean())


# --------------------------------------------------------------------------------------------------------------- checks
# Each returns its reasons to fail, in words.

def val_rows(watch: Watch, rows: int = 3) -> np.ndarray:
    T = watch.settings["seq_len"]
    return watch.streams["val"][:rows * T].astype(np.int64).reshape(rows, T)


def check_causality(watch: Watch) -> list[str]:
    rng, base, reasons, heard = np.random.default_rng(1), val_rows(watch), {}, False  # the first reason of each kind
    logits, T = watch.logits(base), base.shape[1]
    tolerance = LOGIT_TOLERANCE * max(1.0, float(logits.abs().max()))
    if float((watch.logits(base) - logits).abs().max()) > tolerance:
        return ["the same tokens give other logits the second time: the model remembers what it has seen"]
    for t in sorted({1, T // 2, T - 2, T - 1, *rng.integers(1, T, 6).tolist()}):
        row, one, tail, eot = int(rng.integers(len(base))), base.copy(), base.copy(), base.copy()
        one[row, t] = 65 + (one[row, t] - 64) % 40  # another letter
        tail[row, t:] = rng.integers(0, 256, T - t)
        eot[row, t] = VOCAB - 1 if base[row, t] != VOCAB - 1 else 65
        for changed in (one, tail, eot):
            moved = (watch.logits(changed) - logits).abs().amax(-1)  # [B, T]
            before, others = moved[row, :t], moved[np.arange(len(base)) != row]
            if float(before.max()) > tolerance:
                at = int((before > tolerance).nonzero().max())
                reasons.setdefault("ahead", f"changing a token at position {t} changes the logits at position {at}, by "
                                            f"{float(before[at]):.2g}: the model looks ahead by {t - at}")
            if float(others.max()) > tolerance:
                reasons.setdefault("rows", f"changing a token of row {row} changes logits in another row of the batch, "
                                           f"by {float(others.max()):.2g}")
            if changed is one:
                heard |= t + 1 < T and float(moved[row, t + 1:].max()) > tolerance
                if float(moved[row, t]) <= tolerance:
                    reasons.setdefault("deaf", f"cannot check causality: changing the token at position {t} does not "
                                               "even change the logits there")
    if not heard:
        reasons["deaf"] = "cannot check causality: no logits depend on earlier tokens"
    return list(reasons.values())


def check_probabilities(watch: Watch) -> list[str]:
    import torch
    x, reasons = val_rows(watch), []
    true = watch.streams["val"][1:x.size + 1].astype(np.int64).reshape(x.shape)
    some = np.random.default_rng(2).integers(0, VOCAB, x.shape)
    cases = {"the true next tokens": (x, true), "random targets": (x, some), "one row": (x[:1], true[:1]),
             "the least likely targets": (x, watch.logits(x)[..., :VOCAB].argmin(-1).numpy())}
    for name, (tokens, targets) in cases.items():
        expected = cross_entropy(watch.logits(tokens), torch.as_tensor(targets))
        try:
            loss = float(watch.ask(tokens, targets))
        except Exception as error:  # any fork, any signature
            reasons.append(f"model(tokens, targets) gives no number: {type(error).__name__}: {str(error)[:80]}")
            break
        if not abs(loss - expected) <= LOSS_TOLERANCE:
            reasons.append(f"with {name} the model's loss is {loss:.5f}, but -log softmax of its logits is "
                           f"{expected:.5f}: the probabilities behind the loss do not sum to one")
            break
    for number, e in enumerate(watch.evaluations, 1):
        if not math.isnan(e.own_loss) and not abs(e.loss - e.own_loss) <= LOSS_TOLERANCE:
            reasons.append(f"evaluation {number} returned {e.loss:.5f}, but -log softmax of the model's logits on the "
                           f"rows that it scored is {e.own_loss:.5f}")
            break
    logged = [float(text) for text in re.findall(r"^step:\d+/\d+ val_loss:(\S+)", watch.log, re.M)]
    losses = [e.loss for e in watch.evaluations]
    if len(logged) != len(losses) or any(not abs(a - b) < 6e-5 for a, b in zip(logged, losses)):
        returned = [round(loss, 4) for loss in losses]
        reasons.append(f"the log's val_loss are {logged}, but evaluate() returned {returned}")
    final = watch.result.get("val_loss")
    if final is not None and losses and not abs(final - losses[-1]) < 6e-5:
        reasons.append(f"the result's val_loss is {final}, but the last evaluation returned {losses[-1]:.6f}")
    return reasons


def check_validation(watch: Watch) -> list[str]:
    val, tokens, reasons = watch.streams["val"], watch.settings["val_tokens"], []
    for number, e in enumerate(watch.evaluations, 1):
        counts, which = np.zeros(len(val), dtype=int), f"evaluation {number} of {len(watch.evaluations)}"
        wrong = collections.Counter()
        for call in e.calls:
            for row, inputs in enumerate(call.inputs):
                at = find(inputs, val)
                if at is None:
                    wrong["are no rows of the validation shard"] += 1
                    continue
                counts[at:at + len(inputs)] += 1
                if call.targets is not None and call.targets[row].tolist() != val[at + 1:at + 1 + len(inputs)].tolist():
                    wrong["have other targets than the next tokens"] += 1
        inside, beyond = counts[:tokens], int((counts[tokens:] > 0).sum())
        missed, again = int((inside == 0).sum()), int((inside > 1).sum())
        told = [f"{n} of its rows {what}" for what, n in wrong.items()]
        if missed:
            told.append(f"it left out {missed} of the {tokens} tokens" if e.calls else "the model was not called")
        told += [f"it scored {again} tokens more than once"] if again else []
        told += [f"it scored {beyond} tokens beyond the first {tokens}"] if beyond else []
        if told:
            reasons.append(f"{which}: {', '.join(told)}")
    if not watch.evaluations:
        reasons.append("evaluate() was never called")
    elif watch.evaluations[-1].trained < sum(call.phase == "training" for call in watch.calls):
        reasons.append("the last evaluation comes before the last update")
    return reasons[:3]


def check_leakage(watch: Watch) -> list[str]:
    reasons, val = [], grams(watch.streams["val"]) - grams(watch.streams["train"])
    seen = collections.Counter(call.phase for call in watch.calls if call.phase != "evaluation"
                               for row in call.inputs if not val.isdisjoint(grams(row)))
    reasons += [f"{n} rows of the validation shard were fed to the model in {phase}" for phase, n in seen.items()]
    for name, n in collections.Counter(watch.val_reads).items():
        reasons.append(f"the validation shard was read {n} times outside of evaluate(), by {name}()")
    return reasons


def shared_documents(folder: Path) -> list[str]:
    """Reasons to fail of the shards NAME_train_* and NAME_val_* in a folder. Raises BadInput where there are none."""
    names = {match[1] for path in folder.glob("*.bin") if (match := check.NAME.fullmatch(path.name))}
    pairs = {name: [sorted(folder.glob(f"{name}_{part}_*.bin")) for part in ("train", "val")] for name in names}
    if not any(train and val for train, val in pairs.values()):
        raise BadInput(f"--data {folder}: holds no NAME_train_*.bin beside NAME_val_*.bin; name a folder of shards")
    reasons = []
    for name, (train, val) in pairs.items():
        if train and val:
            top = max(int(tokens.max()) for path in val for tokens in check.chunks(path))
            shared, tokens, documents = check.overlap(train, val, top if top == VOCAB - 1 else shards.GPT2_VOCAB - 1)
            if shared:
                reasons.append(f"{folder}: {shared} of {documents} validation documents of {name} ({tokens} tokens) "
                               "are also in train")
    return reasons


def orders(watch: Watch) -> list[np.ndarray]:
    """For the plain order and for --spread_rows: [steps, batch_tokens] positions in the training stream, sorted."""
    s, N = watch.settings, len(watch.streams["train"])
    T, rows = s["seq_len"], s["batch_tokens"] // s["seq_len"]
    row_count = (N - 1) // s["batch_tokens"] * rows
    spread = int(0.618 * row_count) or 1
    while math.gcd(spread, row_count) != 1:
        spread += 1
    number = np.arange(s["steps"] * rows).reshape(s["steps"], rows)
    starts = [number * stride % row_count * T for stride in (1, spread)]  # [steps, rows] each
    return [np.sort((start[:, :, None] + np.arange(T)).reshape(s["steps"], -1)) for start in starts]


def check_batches(watch: Watch) -> list[str]:
    s, train, reasons = watch.settings, watch.streams["train"], {}  # the first reason of each kind
    size, calls = s["batch_tokens"], [call for call in watch.calls if call.phase == "training" and call.grad]
    epoch, total, wanted = (len(train) - 1) // size * size, sum(call.inputs.size for call in calls), s["steps"] * size
    seen, positions, done, pending = {}, [], 0, 0
    for call, last in zip(calls, [None, *calls]):
        if last and call.weights != last.weights:
            if pending < size:
                reasons.setdefault("size", f"step {(done - 1) // size}: an update after {pending} tokens, not {size}")
            pending = 0
        pending += call.inputs.size
        for row, inputs in enumerate(call.inputs):
            where, at = f"step {done // size}, row {done % size // len(inputs)}", find(inputs, train)
            if at is None:
                in_val = find(inputs, watch.streams["val"])
                but = "" if in_val is None else f" but of the validation shard, at token {in_val}"
                reasons.setdefault("window", f"{where}: is no window of the training shards{but}")
            elif (at, done // epoch) in seen:
                reasons.setdefault("again", f"{where}: the window at token {at} again, first seen in step "
                                            f"{seen[at, done // epoch]}")
            elif call.targets is None:
                reasons.setdefault("targets", "the model is called without targets in training: they cannot be checked")
            elif call.targets[row].tolist() != train[at + 1:at + 1 + len(inputs)].tolist():
                reasons.setdefault("targets", f"{where}: its targets are not its inputs moved on by one token")
            if at is not None:
                seen.setdefault((at, done // epoch), done // size)
                positions.append(np.arange(at, at + len(inputs)))
            done += len(inputs)
    if total != wanted:
        reasons["total"] = f"trained on {total} tokens, not on steps x batch_tokens = {wanted}"
    if not reasons:
        steps = np.sort(np.concatenate(positions).reshape(s["steps"], size))
        wrong = [np.flatnonzero((steps != order).any(1)) for order in orders(watch)]
        if all(len(w) for w in wrong):
            reasons["order"] = (f"step {max(w[0] for w in wrong)} does not hold the rows that come next in the stream, "
                                "in its own order or that of --spread_rows")
    return list(reasons.values())


def check_clock(watch: Watch) -> list[str]:
    reasons, calls = [], watch.calls
    if not watch.started:
        return ["the clock was never started"]
    known = grams(watch.streams["train"]) | grams(watch.streams["val"])
    warm = [call for call in calls if call.phase == "warm-up"]
    if any(not known.isdisjoint(grams(row)) for call in warm for row in call.inputs):
        reasons.append("warm-up, before the clock, feeds tokens of the shards to the model")
    clock = [event for event in watch.events if event != "work"]
    if warm and clock[0][1] != warm[0].weights:
        reasons.append("warm-up, before the clock, leaves other weights than it found")
    for number, (kind, weights) in enumerate(clock):
        after = clock[number + 1][1] if number + 1 < len(clock) else watch.final_weights
        if kind == "stop" and after != weights:
            stops = sum(kind == "stop" for kind, _ in clock[:number + 1])
            reasons.append(f"weights changed while the clock stood, after it stopped for the {stops}. time")
            break
    if any(not e.kept for e in watch.evaluations):
        reasons.append("evaluate() changes the weights")
    kinds = [event if event == "work" else event[0] for event in watch.events]
    if idle := list(zip(kinds, kinds[1:])).count(("stop", "start")):
        reasons.append(f"the clock stood {idle} times for neither a validation nor a checkpoint")
    graded = sum(call.grad and not call.running and call.phase != "warm-up" for call in calls)
    if graded:
        reasons.append(f"{graded} forward passes with gradients while the clock stood")
    times = [float(text) for text in re.findall(r"^step:\d+/\d+ val_loss:\S+ train_time:(\d+)ms", watch.log, re.M)]
    pairs = [*zip(times, (e.seconds for e in watch.evaluations)), (watch.result.get("train_time_ms"), watch.seconds)]
    for logged, seconds in pairs:
        if logged is not None and logged < 990 * seconds - 100:
            reasons.append(f"the log says train_time {logged:.0f} ms where {1000 * seconds:.0f} ms have passed between "
                           "starts and stops")
            break
    return reasons + ["the log has no lines step:N/M val_loss:X train_time:Yms"] * (not times)


MODEL, RUN = ("GPT.forward", "evaluate"), ("GPT.forward", "evaluate", "Clock.start", "Clock.stop")
CHECKS = {  # name: (the check, what it needs in the script)
    "causality": (check_causality, MODEL[:1]), "probabilities": (check_probabilities, MODEL),
    "validation": (check_validation, MODEL), "leakage": (check_leakage, MODEL),
    "batches": (check_batches, RUN), "clock": (check_clock, RUN),
}


# -------------------------------------------------------------------------------------------------------------- running

def settings_of(flags: list[str]) -> dict:
    """TINY, changed to what the given flags say. Raises BadInput for a flag that is ours."""
    settings = dict(TINY)
    for at, flag in enumerate(flags):
        name = flag.removeprefix("--").split("=")[0]
        if not flag.startswith("--"):
            continue
        if name.removeprefix("no_") in OURS:
            raise BadInput(f"--{name}: legal.py brings its own; leave it out")
        if name in NEEDED:
            text = flag.split("=", 1)[1] if "=" in flag else flags[at + 1] if at + 1 < len(flags) else ""
            if not text.isdigit() or int(text) < 1:
                raise BadInput(f"--{name} {text}: must be a whole number from 1 up")
            settings[name] = int(text)
        elif name.removeprefix("no_") in settings:
            settings.pop(name.removeprefix("no_"))
    if settings["seq_len"] < GRAM or settings["val_tokens"] < 4 * settings["seq_len"]:
        raise BadInput(f"--seq_len must be from {GRAM} up, and --val_tokens at least 4 times as much")
    return settings


def load(script: Path):
    spec = importlib.util.spec_from_file_location("candidate", script)
    module = importlib.util.module_from_spec(spec)
    sys.modules["candidate"] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def examine(script: Path, flags: list[str], folder: Path) -> dict:
    """Runs the trainer in this process, in an empty folder, and judges it: {"checks": {name: reasons}, "notes": [...]}.

    Raises Failed when the run does not come to its end."""
    settings = settings_of(flags)
    streams = write_data(folder, settings)
    settings |= {f"{name}_files": str(folder / f"tiny_{name}_*.bin") for name in streams}
    settings["log_dir"] = str(folder / "logs")
    watch = Watch(None, folder, streams, settings)
    path, arguments = [str(script.parent), *sys.path], [str(script)]
    with mock.patch.object(sys, "path", path), mock.patch.object(sys, "argv", arguments), watch.slow_time():
        module = watch.module = load(script)
        config, notes = getattr(module, "Config", None), []
        known = {f.name for f in dataclasses.fields(config)} if dataclasses.is_dataclass(config) else set(settings)
        if lacking := watch.missing("main") or [f"--{name}" for name in NEEDED if name not in known]:
            no_check = {name: [f"cannot check {name}: the script has no {lacking[0]}"] for name in CHECKS}
            return {"checks": no_check, "notes": notes}
        given = {flag.removeprefix("--").split("=")[0] for flag in flags}
        argv = []
        for name, value in settings.items():
            if name not in known:
                notes.append(f"the script has no --{name}: left out")
            elif name not in given:
                argv += [f"--{'' if value else 'no_'}{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
        arguments += argv + flags
        with watch.watching():
            try:
                code = module.main(argv + flags) if inspect.signature(module.main).parameters else module.main()
            except SystemExit as end:
                code = end.code
        if code:
            raise Failed(f"it ended with exit code {code}")
        logs = [path.read_text(encoding="utf-8", errors="replace") for path in (folder / "logs").glob("*.txt")]
        watch.log = logs[0].rpartition("=" * 100 + "\n")[2] if len(logs) == 1 else ""
        last = watch.log.rstrip().rpartition("\n")[2]
        watch.result = json.loads(last) if last.startswith("{") else {}
        watch.final_weights = watch.weights()
        results = {}
        for name, (judge, names) in CHECKS.items():
            try:
                if lacking := watch.missing(*names):
                    raise Failed(f"the script has no {' and no '.join(lacking)}")
                if not watch.models:
                    raise Failed("GPT.forward was never called")
                results[name] = judge(watch)
            except Failed as error:
                results[name] = [f"cannot check {name}: {error}"]
    return {"checks": results, "notes": notes}


def child(folder: Path) -> int:
    """What the process does that runs the trainer: job.json to report.json, both in `folder`."""
    job = json.loads((folder / "job.json").read_text())
    try:
        report = examine(Path(job["script"]), job["flags"], folder)
    except Failed as error:
        report = {"error": str(error)}
    (folder / "report.json").write_text(json.dumps(report))
    return 0


def run_child(script: Path, flags: list[str], timeout: float) -> dict:
    """examine() in a process of its own, in a temporary folder. Raises Failed with the last line of what it said."""
    with tempfile.TemporaryDirectory(prefix="legal_") as name:
        folder = Path(name)
        (folder / "job.json").write_text(json.dumps({"script": str(script), "flags": flags}))
        ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SPEEDRUN_ERROR_FILE")
        env = {key: value for key, value in os.environ.items() if key not in ranks}
        env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        with open(folder / "stderr", "w+b") as stderr:
            command = [sys.executable, str(Path(__file__).resolve()), "--child", name]
            process = subprocess.Popen(command, cwd=folder, env=env, start_new_session=True, stdin=subprocess.DEVNULL,
                                       stdout=subprocess.DEVNULL, stderr=stderr)
            late = False
            try:
                process.wait(timeout)
            except subprocess.TimeoutExpired:
                late = True
            finally:  # also when we are interrupted
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            stderr.seek(0)
            said = stderr.read().decode(errors="replace").strip().splitlines() or ["it said nothing"]
        if late:
            raise Failed(f"it did not end within {timeout:g} s")
        if not (folder / "report.json").exists():
            raise Failed(f"it crashed (exit code {process.returncode}): {said[-1]}")
        report = json.loads((folder / "report.json").read_text())
        if "error" in report:
            raise Failed(f"{report['error']}: {said[-1]}")
        return report


@shards.tool
def main(argv=None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["--child"]:
        return child(Path(argv[1]))
    ours, flags = (argv[:argv.index("--")], argv[argv.index("--") + 1:]) if "--" in argv else (argv, [])
    parser = shards.Parser(__doc__)
    parser.prog = "legal.py"
    parser.usage = "legal.py SCRIPT [--data DIR] [--timeout SECONDS] [--json] [-- flags for the trainer]"
    parser.add_argument("script", type=Path, help="a trainer, or a record folder with its train_gpt.py")
    parser.add_argument("--data", type=Path, help="folder whose training shards are searched for validation documents")
    parser.add_argument("--timeout", type=float, default=300, help="seconds that the trainer may take [300]")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    args = parser.parse_args(ours)
    script = (args.script / "train_gpt.py" if args.script.is_dir() else args.script).resolve()
    if not script.is_file():
        raise BadInput(f"{args.script}: no such trainer; name a script or a record folder")
    settings_of(flags)
    shared = shared_documents(args.data) if args.data else []
    sha256 = shards.sha256_file(script)
    report = {"script": str(args.script), "sha256": sha256, "legal": False, "checks": {}, "notes": []}
    try:
        report |= run_child(script, flags, args.timeout)
        report["checks"]["leakage"] += shared
        report["legal"] = not any(report["checks"].values())
    except Failed as error:
        report["error"] = str(error)
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        for name, reasons in report["checks"].items():
            print(f"FAIL  {name:<14}" + ("\n" + " " * 20).join(reasons) if reasons else f"pass  {name}")
        for note in report["notes"]:
            print(f"note  {note}")
        print(f"{args.script} (sha256 {sha256[:12]}): {'legal' if report['legal'] else 'not legal'}")
    if "error" in report:
        print(f"legal.py: {args.script}: {report['error']}", file=sys.stderr)
    return 0 if report["legal"] else 1


if __name__ == "__main__":
    sys.exit(main())
