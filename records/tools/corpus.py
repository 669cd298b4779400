"""The text of a race or a judging: the track's own, and draws of it that no script can know."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data import shards
from records.tools.command import BadInput, Parser

ROOT = Path(__file__).resolve().parents[2]
LOCAL = ("log_dir", "checkpoint_every", "checkpoint_dir", "train_files", "val_files", "seed")
PIECE = 4096  # tokens of a document where nothing marks any
SHARES = 16  # documents at least that validation text is made of
ASKED_AT_ONCE = 8192  # tokens, or one row


def taken(flags: list[str], *names: str) -> tuple[dict, list[str]]:
    """{name: its (last) value or None}, and the flags but for these."""
    parser = Parser("race", "", add_help=False)
    for name in dict.fromkeys(names):
        parser.add_argument(f"--{name}")
    values, rest = parser.parse_known_args(flags)
    return vars(values), rest


def whole_number(flags, name: str, default: int) -> int:
    given = taken(flags, name)[0][name]
    if given and not re.fullmatch("[0-9]{1,18}", given):
        raise BadInput(f"--{name} {given}: must be a whole number")
    return int(given or default)


@dataclass(frozen=True)
class Corpus:
    """What a run is given, and what its model is scored on. hidden: validation tokens that no run
    sees; shown: those that it is given. All uint16."""

    train: np.ndarray
    shown: np.ndarray
    hidden: np.ndarray
    paths: tuple[str, str]  # of the shards in a clone
    mark: int  # the token before each document, the last of the vocabulary
    length: int  # of a validation row
    val_tokens: int

    def files(self) -> dict[str, np.ndarray]:
        return {self.paths[0]: self.train, self.paths[1]: self.shown}

    def rows(self, tokens: np.ndarray) -> np.ndarray:
        """[N, T + 1] of validation tokens; each target is in one row."""
        flat = tokens[: self.val_tokens // self.length * self.length + 1].astype(np.int64)
        return np.lib.stride_tricks.sliding_window_view(flat, self.length + 1)[:: self.length]

    def batches(self, count: int, rng, most: int | None = None) -> list[int]:
        """Random sizes of batches, at most `most`, that hold `count` rows together."""
        most = max(1, min(ASKED_AT_ONCE // self.length, most or count))
        ends = np.cumsum(rng.integers(1, most + 1, count)).clip(max=count)
        return np.diff(np.unique(ends), prepend=0).tolist()

    def noise(self, rng) -> "Corpus":
        """Validation tokens that are none: a model gets worse at them as it learns."""
        return replace(self, shown=rng.integers(self.mark, size=len(self.shown)).astype("<u2"))

    def documents(self) -> list[np.ndarray]:
        """Of training and validation text, without their marks."""
        found = []
        for stream in filter(len, (self.train, self.hidden)):
            starts = np.flatnonzero(stream == self.mark)
            if len(starts) < 2:
                starts = np.arange(0, len(stream), PIECE)
            ends = [*starts[1:], len(stream)]
            pieces = [stream[a:b] for a, b in zip(starts, ends, strict=True)]
            found += [piece[piece != self.mark] for piece in pieces]
        return [piece for piece in found if len(piece)]

    def drawn(self, rng, known=False) -> "Corpus":
        """Documents in a secret order, all reversed or none, each cut at a secret place, with all
        tokens renumbered; validation text drawn anew. known: the tokens as they are, and no text
        of the old validation part in the new one."""
        pieces = (replace(self, hidden=self.train[:0]) if known else self).documents()
        order, table = rng.permutation(len(pieces)), np.arange(self.mark + 1)
        back = -1 if rng.integers(2) and not known else 1
        if not known:  # any number for bytes, a near one where numbers tell how often it is used
            block = 256 if self.mark == 256 else 64
            table[:-1] = np.argsort(np.arange(self.mark) // block + rng.random(self.mark))
        table, texts = table.astype("<u2"), []
        for number in order:
            piece = pieces[number]
            cut = 0 if known else int(rng.integers(len(piece) // 4 + 1))
            texts.append(np.append(table[self.mark], table[piece[cut:][::back]]))
        need, parts = self.val_tokens + 1, []
        for _ in range(2):  # hidden, shown: of many documents, however long some are
            part, count = [], 0
            while texts and count < need:
                part.append(texts.pop()[: max(PIECE, need // SHARES)])
                count += len(part[-1])
            parts.append(np.concatenate([*part, self.train[:0]])[:need])
        if len(parts[1]) < need or not texts:
            raise BadInput(f"too little text for {need:,} hidden validation tokens; give more")
        return replace(self, train=np.concatenate(texts), shown=parts[1], hidden=parts[0])


def track_corpus(flags: list[str], preset, limit: int | None, digests: dict | None) -> Corpus:
    """The data of a preset, or of --train_files and --val_files: shown and hidden are the same.
    limit: tokens that are enough. digests: {file name: sha256} that the preset's data must have."""
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
    train, val = streams
    length = preset.val_len
    tokens = whole_number(flags, "val_tokens", preset.val_tokens)
    if len(val) <= tokens:
        raise BadInput(f"the validation shards hold {len(val):,} tokens, --val_tokens are {tokens}")
    return Corpus(train, val, val, tuple(paths), preset.vocab_size - 1, length, tokens)


def preset_of(flags: list[str], default: str):
    """(name, Config) of the preset that the flags choose."""
    import train_gpt

    name = taken(flags, "preset")[0]["preset"] or default
    if name not in train_gpt.PRESETS:
        raise BadInput(f"--preset {name}: must be one of {', '.join(train_gpt.PRESETS)}")
    return name, train_gpt.PRESETS[name]
