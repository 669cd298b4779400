"""What the judge shows a script, and the runs of one judging: data and its variants, questions."""

import math
import os
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data import shards
from records.tools.command import BadInput
from records.tools.judge_runs import Answers, Training, run_all

ROOT = Path(__file__).resolve().parents[2]
FIRST = 2  # batches whose tokens the first update may depend on: its own, or one twice as large
QUESTIONS = 1536  # positions at which the model is shown the prefix alone
ASKED_AT_ONCE = 8192  # tokens, or one row
PROBED = 256  # rows on which models are compared where all would take too long
REPEATED = 1.5  # times as far apart as two runs of the same, where these are not equal, is equal
RUN_LOCAL = ("log_dir", "checkpoint_every", "checkpoint_dir", "train_files", "val_files")


# ------------------------------------------------------------------------------------------- flags


def without(flags: list[str], *names: str) -> list[str]:
    """The flags but for these and their values; --no_name counts as name."""
    kept, dropping = [], False
    for word in flags:
        if word.startswith("--"):
            dropping = word[2:].partition("=")[0].removeprefix("no_") in names
        if not dropping:
            kept.append(word)
    return kept


def value_of(flags: list[str], name: str) -> str | None:
    """The (first) value given for a flag."""
    for word, after in zip(flags, [*flags[1:], ""], strict=False):
        if word == f"--{name}":
            return after
        if word.startswith(f"--{name}="):
            return word.partition("=")[2]
    return None


def with_flags(flags: list[str], **values) -> list[str]:
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    return without(flags, *values) + words


# -------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Corpus:
    """Training and validation tokens, uint16, and the paths at which runs in a clone find them."""

    train: np.ndarray
    val: np.ndarray
    paths: tuple[str, str]
    mark: int  # the token before each document, the last of the vocabulary

    def files(self, train=None, val=None) -> dict[str, np.ndarray]:
        train = self.train if train is None else train
        return dict(zip(self.paths, (train, self.val if val is None else val), strict=True))

    def renumbered(self, rng) -> "Corpus":
        """Each token but the mark under another number: any for bytes, a near one where numbers
        tell how often a token is used."""
        block = 256 if self.mark == 256 else 64
        order = np.argsort(np.arange(self.mark) // block + rng.random(self.mark))
        table = np.append(order, self.mark).astype("<u2")
        return replace(self, train=table[self.train], val=table[self.val])

    def other_val(self, rng) -> np.ndarray:
        """Other text of the same kind and length."""
        start = int(rng.integers(len(self.train)))
        return np.resize(np.roll(self.train, -start), len(self.val))

    def other_train(self, changed: np.ndarray, rng) -> np.ndarray:
        """Training tokens, random ones where changed [bool]; the documents' marks stay."""
        random = rng.integers(self.mark, size=len(self.train), dtype=np.uint16)
        return np.where(changed & (self.train != self.mark), random, self.train).astype("<u2")


def read_corpus(flags: list[str], preset, limit: int | None, digests: dict | None) -> Corpus:
    """The data of a preset, or of --train_files and --val_files. limit: tokens that are enough.
    digests: {file name: sha256} that the preset's data must have."""
    streams, paths = [], []
    for flag in ("train_files", "val_files"):
        given, default = value_of(flags, flag), getattr(preset, flag)
        pattern = Path(given or ROOT / default)
        found = sorted(pattern.parent.glob(pattern.name))
        if not found:
            script = "laptop" if preset.vocab_size == shards.BYTE_VOCAB else "fineweb"
            raise BadInput(f"{pattern}: no such data; python data/{script}.py brings it")
        if digests and not given and shards.sha256_file(found[0]) != digests[found[0].name]:
            raise BadInput(f"{found[0]}: not the track's data; delete it and build it again")
        parts, count = [], 0
        while found and (limit is None or count < limit):
            parts.append(np.asarray(shards.open_shard(found.pop(0))))
            count += len(parts[-1])
        streams.append(np.concatenate(parts)[:limit])
        paths.append(default.replace("*", "000000"))
    return Corpus(*streams, tuple(paths), preset.vocab_size - 1)


class Places:
    """Stands for training shards: rows that hold their places in the stream instead of tokens."""

    pattern = "the training tokens"

    def __init__(self, corpus: Corpus, config):
        import train_gpt

        self.seq_len, self.documents = config.seq_len, None
        self.rows = (len(corpus.train) - 1) // self.seq_len
        if config.max_document:  # rows start at documents
            with tempfile.TemporaryDirectory() as folder:
                path, room = Path(folder, "train.bin"), self.seq_len + 1
                shards.write_shard(path, corpus.train)
                self.documents = train_gpt.pack(path, corpus.mark, room, config.max_document)
            self.rows = len(self.documents)

    def __len__(self):
        return self.rows

    def read(self, numbers) -> np.ndarray:
        if self.documents is None:
            return np.asarray(numbers)[:, None] * self.seq_len + np.arange(self.seq_len + 1)
        rows = [[np.arange(at, at + n) for at, n in self.documents[row]] for row in numbers]
        return np.stack([np.concatenate(row) for row in rows])


def loader(corpus: Corpus, config):
    """Our own batches of places, rows in the stream's order where they start at documents, else
    spread."""
    import train_gpt

    order = replace(config, spread_rows=not config.max_document, epochs_allowed=2**20)
    return train_gpt.Batches(Places(corpus, config), order)


def scheduled(corpus: Corpus, config, first: int, last: int) -> np.ndarray:
    """bool [len(corpus.train)]: tokens of the batches of steps first..last - 1."""
    used, batches = np.zeros(len(corpus.train), bool), loader(corpus, config)
    for step in range(first, last):
        used[batches.batch_at(step)] = True
    return used


# ------------------------------------------------------------------------------------------ losses


def losses(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-log softmax(logits)[target] in fp64, nats: logits [..., V], targets [...].
    Raises ValueError where there are too few logits for the targets."""
    import torch

    if logits.shape[-1] <= targets.max():
        raise ValueError(f"{logits.shape[-1]} logits for target {targets.max()}")
    flat, wanted = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1).astype(np.int64)
    found = np.empty(len(flat))
    for start in range(0, len(flat), 8192):
        piece = slice(start, start + 8192)
        part, index = torch.from_numpy(flat[piece]).double(), torch.from_numpy(wanted[piece])
        chosen = part.gather(-1, index[:, None]).squeeze(-1)
        found[piece] = part.logsumexp(-1) - chosen
    return found.reshape(targets.shape)


def batch_sizes(count: int, most: int, rng) -> list[int]:
    """Random sizes of batches that hold `count` rows together."""
    sizes = []
    while sum(sizes) < count:
        sizes.append(int(min(rng.integers(1, most + 1), count - sum(sizes))))
    return sizes


# -------------------------------------------------------------------------------------------- case


class Case:
    """One script and its runs: a base run, and runs that differ from it in one thing each."""

    def __init__(self, script: bytes, flags: list[str], corpus: Corpus, preset, cuda: bool, args):
        self.script, self.corpus, self.preset, self.cuda = script, corpus, preset, cuda
        self.args, self.rng = args, np.random.default_rng(args.dice)
        self.val_tokens = int(value_of(flags, "val_tokens") or preset.val_tokens)
        self.seed = int(value_of(flags, "seed") or 0)
        self.plain_flags = with_flags(without(flags, *RUN_LOCAL), seed=self.seed)
        self.flags = with_flags(self.plain_flags, val_every=0, checkpoint_every=10**6)
        self.first_flags = with_flags(self.flags, checkpoint_every=1)
        self.other = corpus.renumbered(self.rng)
        self.other_val = corpus.other_val(self.rng)
        self.bytes = corpus.mark == shards.BYTE_VOCAB - 1
        self.options = dict(cuda=cuda, timeout=args.timeout)
        self.trainings, self.scored, self.exact, self.noise = [], {}, True, 0.0

    # runs

    def train(self, name, flags=None, files=None, needs=(), **more) -> Training:
        files = files or self.corpus.files()
        ranks = int(os.environ.get("NPROC", 1)) if self.cuda else 1
        options = self.options | dict(ranks=ranks) | more
        run = Training(name, self.script, flags or self.flags, files, needs, **options)
        self.trainings.append(run)
        return run

    def run(self, *extra: Training):
        """All that a legal script needs; the checks ask for more where something differs."""
        self.base = self.train("base run")
        self.base.after = self.read_config
        after_base = dict(needs=(self.base,))
        self.plain = self.train("plain run", self.plain_flags)
        self.changed = self.train("other tokens", files=self.changed_files, **after_base)
        self.rising = self.train("worse at the end", self.rising_flags, self.worse, **after_base)
        self.renumbered = self.train("renumbered tokens", files=self.other.files())
        first = dict(first=True, **after_base)
        self.first = self.train("first update", self.first_flags, **first)
        self.early = self.train(
            "first update, other tokens", self.first_flags, self.later_files, **first
        )
        seed = with_flags(self.first_flags, seed=self.seed + 1)
        self.reseeded = self.train("first update, other seed", seed, **first)
        self.short = self.train("short run", self.short_flags, **first)
        self.prefix = self.prefixes(self.base)
        for run in (self.base, self.changed):
            self.score(run)
        self.score(self.renumbered, corpus=self.other)
        self.score(self.rising, pick=lambda order: order[order < PROBED])
        for run in (self.first, self.early, self.reseeded):
            self.score(run, pick=lambda order: order[:PROBED])
        self.start(*self.trainings, *extra, self.prefix, *self.scored.values())
        if self.plain.ok and self.base.ok and self.plain.losses != self.base.losses:
            self.repeat()

    def repeat(self):
        """Is the base run repeated bit for bit? If not, how far apart are two of the same?"""
        again = self.again("base run again")
        self.exact = again.losses == self.base.losses
        scores = [self.scored[run] for run in (self.base, again)]
        if not self.exact and all(score.ok for score in scores):
            self.noise = REPEATED * float(np.abs(scores[0].value - scores[1].value).mean())

    def start(self, *jobs):
        run_all(jobs, at_once=1 if self.cuda else 2, say=self.say)

    def again(self, name: str, **change) -> Training:
        """One more run, scored, to see which of several changes mattered."""
        run = self.train(name, **change)
        pick = (lambda order: order[:PROBED]) if run.first else None
        self.start(run, self.score(run, pick=pick))
        return run

    def say(self, text: str):
        if not self.args.quiet:
            print(f"  {text}", file=sys.stderr, flush=True)

    def read_config(self):
        """Our own Config of what the base run's log says, for the order of rows; and its tokens."""
        ours = vars(self.preset)
        known = dict.fromkeys(("val_seq_len", "max_document", "extension"), 0)  # unless it says so
        for name, value in (self.base.run.config or {}).items():
            if name in ours:
                several = isinstance(ours[name], tuple)
                known[name] = tuple(np.atleast_1d(value).tolist()) if several else value
        try:
            config = replace(self.preset, **known | dict(val_tokens=self.val_tokens))
            self.row_order = self.rng.permutation(config.val_tokens // config.val_len)
            planned = int(loader(self.corpus, config).first[-1]) * config.seq_len
            tokens = int(self.base.run.result["tokens"])
            if tokens > planned:  # a schedule of its own, told in the result
                config = replace(config, steps=math.ceil(config.steps * tokens / planned))
        except Exception as error:  # whatever the script wrote there
            self.base.why = f"its log's config or result cannot be used ({type(error).__name__})"
            return
        self.config, self.tokens = config, max(tokens, planned)

    # what a run is given

    def kept(self, steps: int, tokens: int) -> np.ndarray:
        """bool: what the first steps may depend on. Rows spread, or in the stream's order; there
        with room for rows that skip the ends of documents."""
        used = scheduled(self.corpus, self.config, 0, steps)
        used[: 2 * tokens + 1] = True
        return used

    def changed_files(self, val=True, train=True):
        """Other validation tokens, and other training tokens beyond the schedule."""
        other_train = None
        if train:
            beyond = ~self.kept(self.config.steps, self.tokens)
            other_train = self.corpus.other_train(beyond, self.rng)
        return self.corpus.files(other_train, self.other_val if val else None)

    def first_batches(self) -> np.ndarray:
        batch = int(loader(self.corpus, self.config).first[1]) * self.config.seq_len
        return self.kept(min(FIRST, self.config.steps), FIRST * batch)

    def later_files(self):
        return self.corpus.files(self.corpus.other_train(~self.first_batches(), self.rng))

    def first_files(self):
        """Other tokens in the first batches, but for the very first row: all orders begin there."""
        inside = self.first_batches()
        inside[: 2 * self.config.seq_len] = False
        return self.corpus.files(self.corpus.other_train(inside, self.rng))

    def worse(self):
        """The last third of the schedule is noise: the loss rises."""
        steps = self.config.steps
        late = scheduled(self.corpus, self.config, steps - max(1, steps // 3), steps)
        late[self.tokens - self.tokens // 3 :] = True
        return self.corpus.files(self.corpus.other_train(late, self.rng))

    def short_flags(self):
        return with_flags(self.first_flags, steps=max(2, self.config.steps // 10))

    def rising_flags(self):
        tokens = min(self.val_tokens, PROBED * self.config.val_len)
        every = max(1, self.config.steps // 3)
        return with_flags(self.flags, val_every=every, val_tokens=tokens)

    # what a model is asked

    @property
    def most(self) -> int:
        """Rows in a batch, at most: logits take memory."""
        return max(1, ASKED_AT_ONCE // self.config.val_len)

    def rows(self, corpus: Corpus) -> np.ndarray:
        """[N, T + 1] of validation tokens; each target is in one row."""
        length, count = self.config.val_len, len(self.row_order)
        flat = corpus.val[: count * length + 1].astype(np.int64)
        return np.lib.stride_tricks.sliding_window_view(flat, length + 1)[::length]

    def score(self, run: Training, pick=None, corpus=None) -> Answers:
        """Our losses [rows, T] of a run's checkpoint: of all rows in a random order, the same for
        every model, so that neighbours tell nothing; or of those that pick(order) leaves.

        Logits come back where that is possible; else losses, whose sample `prefixes` checks."""

        def chosen():
            order = pick(self.row_order) if pick else self.row_order
            return self.rows(corpus or self.corpus)[order]

        def ask():
            rows = chosen()
            dice = np.random.default_rng([self.args.dice, len(rows)])
            return (
                rows[:, :-1] if self.bytes else rows,
                batch_sizes(len(rows), self.most, dice),
                None,
            )

        def reduce(answers):
            return losses(answers, chosen()[:, 1:]) if self.bytes else answers.astype(np.float64)

        answer = "logits" if self.bytes else "losses"
        name = f"score of {run.name}"
        self.scored[run] = Answers(name, run, ask, answer, reduce, (self.base,), **self.options)
        return self.scored[run]

    def prefixes(self, run: Training) -> Answers:
        """Our losses [Q] at one position of each of Q rows, all later tokens being another row's;
        the last ones are whole rows, only moved."""

        def ask():
            rows = self.rows(self.corpus)
            count, length = len(rows), self.config.val_len
            mixed = self.rng.permutation(count)
            self.moved = max(1, count // 4)
            tested = mixed[self.moved :] if count > 1 else mixed
            asked = min(QUESTIONS, count * length // 4)
            at = np.sort(np.resize(np.arange(length), asked))  # of one row, short prefixes first
            self.asked_row = np.append(np.resize(tested, asked), mixed[: self.moved])
            self.asked_at = np.append(at, np.full(self.moved, length - 1))
            shown = rows[self.asked_row, :-1].copy()
            future = rows[self.rng.permutation(np.resize(mixed, len(shown))), :-1]
            later = np.arange(length) > self.asked_at[:, None]
            shown[later] = future[later]
            sizes = batch_sizes(len(shown), self.most, self.rng)
            return shown, sizes, self.asked_at.tolist()

        def reduce(answers):
            return losses(answers, self.rows(self.corpus)[self.asked_row, self.asked_at + 1])

        name = f"prefixes to {run.name}"
        return Answers(name, run, ask, "position", reduce, **self.options)
