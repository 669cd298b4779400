"""What the judge shows a script, and the runs of one judging: data and its variants, questions."""

import math
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data import shards
from records.tools.command import BadInput, Parser
from records.tools.judge_runs import NOT_NEEDED, Answers, Job, Training, run_all

ROOT = Path(__file__).resolve().parents[2]
FIRST = 2  # batches whose tokens the first update may depend on: its own, or one twice as large
QUESTIONS = 1536  # positions at which the model is shown the prefix alone
ASKED_AT_ONCE = 8192  # tokens, or one row
PROBED = 64  # rows on which models are compared where all would take too long
SHORT = 9  # steps at least, of a run that need not be long
REPEATED = 1.5  # times as far apart as two runs of the same, where these are not equal, is equal
RUN_LOCAL = ("log_dir", "checkpoint_every", "checkpoint_dir", "train_files", "val_files")


# ------------------------------------------------------------------------------------------- flags


def taken(flags: list[str], *names: str) -> tuple[dict, list[str]]:
    """{name: its (last) value or None}, and the flags but for these."""
    parser = Parser("judge", "", add_help=False)
    for name in names:
        parser.add_argument(f"--{name}")
    values, rest = parser.parse_known_args(flags)
    return vars(values), rest


def with_flags(flags: list[str], **values) -> list[str]:
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    return taken(flags, *values)[1] + words


# -------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Corpus:
    """Training and validation tokens, uint16, and the paths at which runs in a clone find them."""

    train: np.ndarray
    val: np.ndarray
    paths: tuple[str, str]
    mark: int  # the token before each document, the last of the vocabulary

    def files(self) -> dict[str, np.ndarray]:
        return {self.paths[0]: self.train, self.paths[1]: self.val}

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
    for flag, given in taken(flags, "train_files", "val_files")[0].items():
        default = getattr(preset, flag)
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

    def __init__(self, count: int, seq_len: int):
        self.count, self.seq_len = count, seq_len

    def __len__(self):
        return (self.count - 1) // self.seq_len

    def read(self, numbers) -> np.ndarray:
        return np.asarray(numbers)[:, None] * self.seq_len + np.arange(self.seq_len + 1)


def losses(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-log softmax(logits)[target] in fp64, nats: logits [N, V], targets [N]."""
    whole = np.array([np.logaddexp.reduce(row, dtype=np.float64) for row in logits])
    return whole - logits[np.arange(len(logits)), targets]


def batch_sizes(count: int, most: int, rng) -> list[int]:
    """Random sizes of batches that hold `count` rows together."""
    ends = np.cumsum(rng.integers(1, most + 1, count)).clip(max=count)
    return np.diff(np.unique(ends), prepend=0).tolist()


# -------------------------------------------------------------------------------------------- case


class Case:
    """One script and its runs: a base run, and runs that differ from it in one thing each."""

    def __init__(self, script: bytes, flags: list[str], corpus: Corpus, preset, cuda: bool, args):
        self.script, self.corpus, self.preset, self.cuda = script, corpus, preset, cuda
        self.args, self.rng = args, np.random.default_rng(args.dice)
        given = taken(flags, "val_tokens", "seed")[0]
        self.val_tokens = int(given["val_tokens"] or preset.val_tokens)
        self.seed = int(given["seed"] or 0)
        self.other = corpus.renumbered(self.rng)
        self.other_val = corpus.other_val(self.rng)
        self.options = dict(cuda=cuda, timeout=args.timeout)
        self.trainings, self.scores = [], {}
        self.declare(with_flags(taken(flags, *RUN_LOCAL)[1], seed=self.seed))

    def declare(self, plain: list[str]):
        """All runs, those first that tell most. plain: flags as users give them."""
        flags = with_flags(plain, val_every=0, checkpoint_every=10**6)
        first = dict(first=self.preset.adam_every)
        early = with_flags(flags, checkpoint_every=self.preset.adam_every)
        other_seed = with_flags(early, seed=self.seed + 1)
        other, train, score = self.other_files, self.train, self.score
        self.base = train("base run", flags, needs=())
        self.base.after, self.base.keep = self.read_config, True
        self.base_score = score(self.base)
        self.plain = train("plain run", plain, after_run=self.base, needs=(self.base,))
        self.prefixes = Answers(
            "prefixes", self.script, [self.base], self.ask_prefixes, other, **self.options
        )
        self.first = train("first update", early, **first)
        self.early = train("first update, other tokens", early, self.early_files, **first)
        self.inside = train("first update, other batch", early, self.inside_files, **first)
        self.reseeded = train("first update, other seed", other_seed, **first)
        self.firsts = score(self.first, self.early, self.inside, self.reseeded)
        conditions = dict(wanted=self.plain_differs, needs=(self.plain,))
        self.again = train("base run alone", flags, alone=True, **conditions)
        self.again_score = score(self.again)
        self.changed = train("other tokens", flags, self.changed_files)
        self.rising = train("worse at the end", lambda: self.rising_flags(flags), self.worse)
        self.renumbered = train("renumbered tokens", flags, self.other.files)
        self.lasts = score(self.changed, self.rising, self.renumbered)
        conditions = dict(wanted=self.own_order, needs=(self.lasts, self.firsts))
        self.only_val = train("other validation tokens", flags, other, **conditions)
        self.only_score = score(self.only_val)
        self.jobs = [job for job in vars(self).values() if isinstance(job, Job)]

    # runs

    def train(self, name, flags, files=None, **more) -> Training:
        """Where the base run cannot be scored, no other run is of use that says no other needs."""
        if "needs" not in more:
            more["needs"] = (self.base_score,)
        ranks = int(os.environ.get("NPROC", 1)) if self.cuda else 1
        flags = flags if callable(flags) else lambda given=flags: given
        files = files or self.corpus.files
        run = Training(name, self.script, flags, files, ranks=ranks, **self.options | more)
        self.trainings.append(run)
        return run

    def run(self, settled, *extra: Job):
        at_once = 1 if self.cuda else 2
        run_all([*self.jobs, *extra], at_once, self.say, settled)

    def say(self, text: str):
        print(f"  {text}", file=sys.stderr, flush=True)

    def read_config(self):
        """Our own Config of what the base run's log says, for the order of rows."""
        ours, said = vars(self.preset), self.base.run.config or {}
        known = dict(val_seq_len=0, extension=0)  # unless the log says so
        for name in said.keys() & {"steps", "batch_tokens", "seq_len", *known}:
            several = isinstance(ours[name], tuple)
            known[name] = tuple(np.atleast_1d(said[name]).tolist()) if several else said[name]
        try:
            config = replace(self.preset, **known | dict(val_tokens=self.val_tokens))
            self.row_order = self.rng.permutation(config.val_tokens // config.val_len)
            planned = len(self.places(config, 0, config.steps)) * config.seq_len
            more = int(self.base.run.result["tokens"]) / planned  # a schedule of its own
            self.config = replace(config, steps=math.ceil(config.steps * max(1, more)))
        except Exception as error:  # whatever the script wrote there
            self.base.why = f"its log's config or result cannot be used ({type(error).__name__})"

    # what is compared

    def losses(self, run: Training) -> np.ndarray | None:
        """Ours, by its checkpoint's logits: [rows, T]."""
        return self.scores[run].value.get(run)

    def same(self, a: Training, b: Training) -> bool | None:
        """Are their models equal, by our losses? None: nothing to compare."""
        x, y = self.losses(a), self.losses(b)
        if x is None or y is None:
            return None
        difference = np.abs(x - y)
        return bool(difference.max() == 0 or difference.mean() <= self.noise)

    def plain_differs(self) -> bool:
        ends = [run.run.val_loss for run in (self.base, self.plain)]
        return ends[0] != ends[1] or self.plain.losses != self.base.losses

    def own_order(self) -> bool:
        """Does it read rows in an order of its own, so that what it reads cannot be told?"""
        changed = self.same(self.base, self.changed) is False
        return changed and self.same(self.first, self.inside) is True

    @property
    def exact(self) -> bool:
        """Is a run repeated bit for bit?"""
        return self.again.why == NOT_NEEDED or self.again.losses == self.base.losses

    @property
    def noise(self) -> float:
        """How far apart are two of the same, nats?"""
        x, y = self.losses(self.base), self.losses(self.again)
        if self.exact or x is None or y is None:
            return 0.0
        return REPEATED * float(np.abs(x - y).mean())

    # what a run is given

    def places(self, config, first: int, last: int) -> np.ndarray:
        """[N, T + 1]: where in the stream the tokens of steps first..last - 1 stand, if rows are
        spread over it."""
        import train_gpt

        order = replace(config, spread_rows=True, epochs_allowed=2**20)
        batches = train_gpt.Batches(Places(len(self.corpus.train), config.seq_len), order)
        rows = [batches.batch_at(step) for step in range(first, last)]
        return np.concatenate([np.zeros((0, config.seq_len + 1), int), *rows])

    def scheduled(self, config, first: int, last: int) -> np.ndarray:
        """bool [tokens]: those of the batches of steps first..last - 1, of rows spread over the
        stream, or in its order; there with room for rows that skip the ends of documents."""
        used = np.zeros(len(self.corpus.train), bool)
        start, end = (len(self.places(config, 0, step)) * config.seq_len for step in (first, last))
        used[start : 2 * end] = True
        used[self.places(config, first, last)] = True
        return used

    def other_files(self, changed=None, val=True):
        """Other training tokens where changed [bool], and other validation tokens."""
        corpus = replace(self.corpus, val=self.other_val) if val else self.corpus
        if changed is not None:
            corpus = replace(corpus, train=corpus.other_train(changed, self.rng))
        return corpus.files()

    def changed_files(self):
        """... beyond the schedule."""
        return self.other_files(~self.scheduled(self.config, 0, self.config.steps))

    def first_batches(self) -> np.ndarray:
        batches = min(FIRST * self.preset.adam_every, self.config.steps)
        return self.scheduled(self.config, 0, batches)

    def early_files(self):
        """... beyond the first batches."""
        return self.other_files(~self.first_batches())

    def inside_files(self):
        """... in the first batches, but for the very first row: all orders begin there."""
        inside = self.first_batches()
        inside[: 2 * self.config.seq_len] = False
        return self.other_files(inside, val=False)

    def worse(self):
        """The last third of a short schedule is noise: the loss rises."""
        config, change = replace(self.config, steps=self.short), self.short - self.short // 3
        late = self.scheduled(config, change, self.short)
        late[self.places(config, 0, change)] = False
        return self.other_files(late, val=False)

    @property
    def short(self) -> int:
        return max(min(SHORT, self.config.steps), self.config.steps // 3)

    def rising_flags(self, flags):
        tokens = min(self.val_tokens, PROBED * self.config.val_len)
        return with_flags(flags, steps=self.short, val_every=self.short // 3, val_tokens=tokens)

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

    def score(self, *runs: Training) -> Answers:
        """Our losses of their models on all rows in a random order, the same for every model, so
        that neighbours tell nothing; of short runs on the first ones."""

        def ask(run):
            order, small = self.row_order, run.first or run is self.rising
            corpus = self.other if run is self.renumbered else self.corpus
            rows = self.rows(corpus)[order[order < PROBED] if small else order]
            dice = np.random.default_rng([self.args.dice, len(rows)])
            return rows, batch_sizes(len(rows), self.most, dice), None

        name = f"score of {', '.join(run.name for run in runs)}"
        answers = Answers(name, self.script, runs, ask, self.other_files, **self.options)
        self.scores |= dict.fromkeys(runs, answers)
        return answers

    def ask_prefixes(self, run):
        """One position of each of Q rows, all later tokens being of another text."""
        if hasattr(self, "question"):
            return self.question
        rows = self.rows(self.corpus)
        count, length = len(rows), self.config.val_len
        asked = min(QUESTIONS, max(count, 4 * length))
        self.asked_at = np.sort(np.resize(np.arange(length), asked))  # short prefixes first
        self.asked_row = np.resize(self.rng.permutation(count), asked)
        others = self.rows(replace(self.corpus, val=self.other_val))
        later = np.arange(length) > self.asked_at[:, None]
        shown = np.where(later, others[self.asked_row, :-1], rows[self.asked_row, :-1])
        sizes = batch_sizes(asked, min(self.most, count), self.rng)  # no row twice in a batch
        self.question = shown, sizes, self.asked_at.tolist()
        return self.question

    def prefix_losses(self) -> np.ndarray:
        """Our losses [Q] of the targets behind the prefixes."""
        targets = self.rows(self.corpus)[self.asked_row, self.asked_at + 1]
        return losses(self.prefixes.value[self.base], targets)
