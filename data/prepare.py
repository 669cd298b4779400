"""Turns text files into token shards, and prints the command that trains on them.

    ./run.sh prepare FILES... --out DIR [--tokenizer gpt2|bytes] [--field text]
                     [--val_fraction 0.01]
    python data/prepare.py FILES... --out DIR      the same, where Python has the requirements

Any UTF-8 file is one document, or several with <|endoftext|> between them; a .jsonl file is one
JSON object a line, its text in --field; a folder stands for the files in it. What is not UTF-8, or
a line without a text, is left out, counted and reported. A document goes whole into train or
validation, decided by the hash of its text: equal documents are never on both sides. Only where
hardly anything falls into validation is the tail of the longest document moved there. Memory does
not grow with the amount of text, only with the longest document. Shards appear, all together, as
DIR/NAME_train_000001.bin ... and DIR/NAME_val_000000.bin ... when everything went well; where DIR
holds such shards already, as DIR_2/NAME_... The result does not depend on --workers.
"""

import argparse
import collections
import concurrent.futures
import functools
import glob
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import re
import shlex
import signal
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import shards
from data.shards import BadInput
from setup.environment import usable_cores

ROOT = Path(__file__).resolve().parents[1]
PIECE = 1 << 20  # bytes of text that a worker is handed at a time
MARK, BOM = b"<|endoftext|>", b"\xef\xbb\xbf"
# A long document may be cut right before a space or line feed that follows a non-space: GPT-2's
# pattern matches no stretch of text that has a space after a non-space, and looks ahead only from
# spaces, so both sides come out with the tokens they have in the whole. The non-space is printable
# ASCII or, for text that has none, a character from U+3001 to U+FFFF: the only space up there is
# U+3000.
SAFE_CUT = re.compile(rb"(?:[!-~]|(?!\xe3\x80\x80)[\xe3-\xef][\x80-\xbf]{2})(?=[ \n])")

# A run of n white-space characters in front of another character is one match of n - 1 in GPT-2's
# pattern, and costs it a place on its stack for each, so long runs are matched here. (What the
# pattern's \\s matches; Python's matches more.)
SPACES = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
LONG_RUN = re.compile(f"[{SPACES}]{{10000,}}+")

EOT = {"gpt2": shards.GPT2_VOCAB - 1, "bytes": shards.BYTE_VOCAB - 1}
PRESET = {"gpt2": "small", "bytes": "laptop"}  # of train_gpt.py, for a small machine
ENOUGH = 1025  # tokens of validation, if they are no more than a tenth of all

# What a worker is handed. kind "jsonl": data is a list of lines and `where` the first one's number;
# "txt": a list of documents, `where` the list of their byte offsets; "piece": a part of one
# document, `where` its byte offset. `digest` is the sha256 of the whole document on its last piece,
# else None.
Work = collections.namedtuple("Work", "kind path where data digest")
# What comes back: uint16 tokens, bytes of text, and what was left out: how often, the first reason.
# A piece's tokens come as train tokens without <|endoftext|>.
Encoded = collections.namedtuple("Encoded", "train val size left_out why")


@functools.cache
def encoder(tokenizer: str):
    """A function from UTF-8 bytes to tokens, integers [n]. Raises BadInput when tiktoken's files
    cannot be had.
    """
    if tokenizer == "bytes":
        return lambda text: np.frombuffer(text, np.uint8)
    try:
        import tiktoken

        encoding = tiktoken.get_encoding("gpt2")
    except Exception as error:  # missing package, no network, damaged download: all the same here
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise BadInput(
            "cannot load tiktoken's gpt2 files; where there is network, run TIKTOKEN_CACHE_DIR=DIR "
            "python -c 'import tiktoken; tiktoken.get_encoding(\"gpt2\")', copy DIR (vocab.bpe and "
            "encoder.json, 1.5 MB) here and set TIKTOKEN_CACHE_DIR to it; or use --tokenizer bytes "
            f"({reason})"
        ) from None
    # with no special tokens to look for, this is encode_ordinary without its Python list
    return lambda text: encode_runs(
        text.decode(), functools.partial(encoding.encode_to_numpy, disallowed_special=())
    )


def encode_runs(text: str, encode) -> np.ndarray:
    """The tokens of `text`, its long runs of white space handed over on their own."""
    parts = []
    start = 0
    for run in LONG_RUN.finditer(text):
        end = run.end() - (run.end() < len(text))  # the last one belongs to what follows it
        parts += [encode(text[start : run.start()]), encode(text[run.start() : end])]
        start = end
    return np.concatenate([*parts, encode(text[start:])]) if parts else encode(text)


def is_val(digest: bytes, val_fraction: float) -> bool:
    return int.from_bytes(digest[:8], "big") < val_fraction * 2**64


def documents(work: Work, field: str):
    """The texts of a "jsonl" or "txt" unit of work, as UTF-8 bytes; in the place of one that cannot
    be read a BadInput that says where and why.
    """
    for index, item in enumerate(work.data):
        try:
            if work.kind == "txt":
                check_utf8(item, work.path, work.where[index])
                yield item
            elif item.strip():
                yield text_of(item, field, f"{work.path}, line {work.where + index}")
        except BadInput as error:
            yield error


def text_of(line: bytes, field: str, where: str) -> bytes:
    """The text in a line of JSON. Raises BadInput."""
    try:
        record = json.loads(line.decode())
        text = record[field]
        try:
            return text.encode()
        except UnicodeEncodeError:  # half a surrogate pair: U+FFFD, as in tiktoken
            return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
    except UnicodeError as error:
        raise BadInput(f"{where}: not UTF-8 ({error.reason})") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{where}: not JSON ({error})") from None
    except (TypeError, KeyError, AttributeError):
        names = ", ".join(record)[:100] if isinstance(record, dict) else type(record).__name__
        raise BadInput(
            f"{where}: no text in a field '{field}' (found: {names}); name the field with --field"
        ) from None


def check_utf8(text: bytes, path: Path, offset: int):
    try:
        text.decode()
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}, byte {offset + error.start}: not UTF-8 ({error.reason})") from None


def encode(work: Work, tokenizer: str, field: str, val_fraction: float) -> Encoded:
    """The tokens of a unit of work."""
    to_tokens = encoder(tokenizer)
    split = ([], [])
    size = left_out = 0
    why = ""
    for text in [work.data] if work.kind == "piece" else documents(work, field):
        try:
            if isinstance(text, BadInput):
                raise text
            if work.kind == "piece":
                check_utf8(text, work.path, work.where)
                split[0].append(to_tokens(text))
            elif text.strip():
                split[is_val(hashlib.sha256(text).digest(), val_fraction)].extend(
                    ([EOT[tokenizer]], to_tokens(text))
                )
            size += len(text)
        except BadInput as error:
            left_out += 1
            why = why or str(error)
    train, val = (np.concatenate([[], *parts], dtype="<u2", casting="unsafe") for parts in split)
    return Encoded(train, val, size, left_out, why)


def cut(file):
    """(offset, bytes, whether its document ends here) of a text file: documents, long ones in
    several pieces.
    """
    buffer = bytearray()
    scanned = 0
    offset = 0
    if file.read(len(BOM)) == BOM:
        offset = len(BOM)
    else:
        file.seek(0)

    def take(size, skip=0):
        nonlocal scanned, offset
        part = offset, bytes(buffer[:size])
        del buffer[: size + skip]
        scanned = 0
        offset += size + skip
        return part

    while block := file.read(PIECE):
        buffer += block
        while (end := buffer.find(MARK, max(0, scanned - len(MARK) + 1))) >= 0:
            yield *take(end, len(MARK)), True
        while len(buffer) >= PIECE and (match := SAFE_CUT.search(buffer, max(PIECE, scanned) - 4)):
            end = match.end()
            del match  # it holds the buffer
            yield *take(end), False
        scanned = len(buffer)
    yield *take(len(buffer)), True


def read(paths: list[Path]):
    """Everything in the files as units of Work, in order, one at a time."""
    for path in paths:
        with open(path, "rb") as file:
            if path.suffix == ".jsonl":
                if file.read(len(BOM)) != BOM:
                    file.seek(0)
                number = 1
                while lines := file.readlines(PIECE):
                    yield Work("jsonl", path, number, lines, None)
                    number += len(lines)
                continue
            batch = []
            offsets = []
            size = 0
            digest = None
            for offset, text, last in cut(file):
                if digest is None and last:  # a document in one piece; small ones travel together
                    batch.append(text)
                    offsets.append(offset)
                    size += len(text) + len(MARK)
                if batch and (size >= PIECE or not last):
                    yield Work("txt", path, offsets, batch, None)
                    batch = []
                    offsets = []
                    size = 0
                if digest is not None or not last:
                    digest = digest or hashlib.sha256()
                    digest.update(text)
                    yield Work("piece", path, offset, text, digest.digest() if last else None)
                    digest = None if last else digest
            if batch:
                yield Work("txt", path, offsets, batch, None)


def start_worker():
    """Runs first in every worker: Ctrl-C is the parent's to handle, and a worker never outlives its
    parent.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


def in_order(units, workers: int, *options):
    """Yields (work, encode(work, *options)) in the order of the units, with at most 4 per worker
    under way.
    """
    if workers == 1:
        for work in units:
            yield work, encode(work, *options)
        return
    # Workers are started fresh, not forked: the same on every system, and safe beside threads
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), start_worker
    )
    pending = collections.deque()
    try:
        for work in units:
            pending.append((work._replace(data=None), pool.submit(encode, work, *options)))
            if len(pending) >= 4 * workers:
                work, result = pending.popleft()
                yield work, result.result()
        for work, result in pending:
            yield work, result.result()
    except concurrent.futures.BrokenExecutor:
        problem = "a worker process died, most likely for lack of memory; use fewer --workers"
        raise BadInput(problem) from None
    finally:
        pool.shutdown(cancel_futures=True)


class ShardSet:
    """The shards of one split. Documents are added in order; one that does not fit any more begins
    the next shard.
    """

    def __init__(self, folder: Path, prefix: str, first: int, shard_tokens: int, eot: int):
        self.folder = folder
        self.prefix = prefix
        self.first = first
        self.shard_tokens = shard_tokens
        self.eot = eot
        self.files = []
        self.documents = 0
        self.longest = (0, 0, 0)  # of the documents: tokens, number of its shard, where it starts

    @property
    def tokens(self) -> int:
        return sum(shard.count for shard in self.files)

    def add(self, tokens: np.ndarray):
        """tokens: uint16 [n], whole documents, each beginning with <|endoftext|>."""
        bounds = np.append(np.flatnonzero(tokens == self.eot), len(tokens))
        self.documents += len(bounds) - 1
        begin = 0
        while begin < len(bounds) - 1:
            room = self.shard_tokens - self.files[-1].count if self.files else -1
            end = int(np.searchsorted(bounds, bounds[begin] + room, "right")) - 1
            if end <= begin:
                if not self.files or self.files[-1].count:
                    self.next_shard()
                    continue
                # a document longer than a shard is not torn: its shard is longer than the others
                end = begin + 1
            lengths = np.diff(bounds[begin : end + 1])
            long = int(lengths.argmax())
            place = self.files[-1].count + int(bounds[begin + long] - bounds[begin])
            self.longest = max(self.longest, (int(lengths[long]), len(self.files) - 1, place))
            self.files[-1].write(tokens[bounds[begin] : bounds[end]])
            begin = end

    def add_long(self, parts: list[np.ndarray]):
        """One document in parts, without its <|endoftext|>."""
        size = 1 + sum(map(len, parts))
        used = self.files[-1].count if self.files else self.shard_tokens
        if used and used + size > self.shard_tokens:
            self.next_shard()
        self.longest = max(self.longest, (size, len(self.files) - 1, self.files[-1].count))
        for part in ([self.eot], *parts):
            self.files[-1].write(part)
        self.documents += 1

    def take_tail(self, size: int) -> np.ndarray:
        """Takes up to `size` tokens, at most half, off the end of the longest document."""
        length, number, start = self.longest
        size = min(size, length // 2)
        old = self.files[number]
        old.close()
        tokens = np.memmap(old.temp, "<u2", "r", shards.HEADER_BYTES, (old.count,))
        old.temp.unlink()  # what is mapped stays
        end = start + length
        new = self.files[number] = shards.ShardFile(old.path)
        new.write(tokens[: end - size])
        new.write(tokens[end:])
        return tokens[end - size : end].copy()

    def next_shard(self):
        if self.files:
            self.files[-1].close()
        self.files.append(
            shards.ShardFile(self.folder / f"{self.prefix}_{self.first + len(self.files):06}.bin")
        )


class Progress:
    """A line that is rewritten on a terminal, and a line every 10 s elsewhere."""

    def __init__(self):
        self.start = self.shown = time.perf_counter()
        self.size = self.tokens = 0
        on_terminal = sys.stdout.isatty()
        self.every = 0.5 if on_terminal else 10
        self.end = "\r" if on_terminal else "\n"

    def add(self, size: int, tokens: int):
        self.size += size
        self.tokens += tokens
        now = time.perf_counter()
        if now - self.shown > self.every:
            self.shown = now
            print(self, end=self.end, flush=True)

    def __str__(self):
        seconds = time.perf_counter() - self.start
        size = self.size / 1e6
        return f"{size:,.1f} MB, {self.tokens:,} tokens, {seconds:.1f} s, {size / seconds:.1f} MB/s"


def prepare(
    paths,
    out: Path,
    name: str,
    tokenizer: str,
    field: str,
    val_fraction: float,
    shard_tokens: int,
    workers: int,
) -> tuple[ShardSet, ShardSet]:
    """Writes the shards; see the text at the top. Raises BadInput or OSError, and then leaves no
    shard.
    """
    eot = EOT[tokenizer]
    progress = Progress()
    train = ShardSet(out, f"{name}_train", 1, shard_tokens, eot)
    val = ShardSet(out, f"{name}_val", 0, shard_tokens, eot)
    results = in_order(read(paths), workers, tokenizer, field, val_fraction)
    try:
        left_out = collect(results, train, val, val_fraction, progress)
        if not train.files and not val.files:
            raise BadInput(
                f"there is no text in the files{left_out and ': '}{left_out}; nothing was written"
            )
        note = guarantee_validation(train, val, val_fraction)
        files = train.files + val.files
        for shard in files:
            shard.close()
        if existing(out, name, val_fraction):
            raise BadInput(f"another process has just written to {out}; give another --out")
        for shard in files:
            shard.commit()
        shards.record(out, {shard.path.name: shards.sha256_file(shard.path) for shard in files})
    finally:
        results.close()
        for shard in train.files + val.files:
            shard.discard()
    print(progress)
    for line in filter(None, (left_out, note)):
        print(line)
    return train, val


def collect(results, train: ShardSet, val: ShardSet, val_fraction: float, progress) -> str:
    """Adds all documents to the shards. Returns what was left out, in a line."""
    parts = []  # tokens of the long document that is under way
    left_out, why, broken = 0, "", False
    for work, encoded in results:
        progress.add(encoded.size, len(encoded.train) + len(encoded.val))
        why = why or encoded.why
        if work.kind != "piece":
            left_out += encoded.left_out
            train.add(encoded.train)
            val.add(encoded.val)
            continue
        broken |= bool(encoded.left_out)
        if not broken:
            parts.append(encoded.train)
        if work.digest:
            left_out += broken
            if not broken:
                (val if is_val(work.digest, val_fraction) else train).add_long(parts)
            parts.clear()
            broken = False
    return f"left out {left_out:,} documents or lines, the first: {why}" if left_out else ""


def guarantee_validation(train: ShardSet, val: ShardSet, val_fraction: float) -> str:
    """Moves a document's tail into validation where hardly any tokens fell there; says so."""
    total = train.tokens + val.tokens
    enough = min(ENOUGH, total // 10)
    if not 0 < val_fraction < 1 or val.tokens >= enough or not train.files:
        return ""
    tail = train.take_tail(max(enough, int(val_fraction * total)) - val.tokens)
    val.add_long([tail])
    return f"validation: the last {len(tail):,} tokens of the longest document"


def existing(out: Path, name: str, val_fraction: float) -> list[Path]:
    """Shards that this call might write, and that are there. (All of one split leaves the other
    alone.)
    """
    possible = {"train": val_fraction < 1, "val": val_fraction > 0}
    return [path for s in possible if possible[s] for path in sorted(out.glob(f"{name}_{s}_*.bin"))]


def free_folder(out: Path, name: str, val_fraction: float) -> Path:
    """`out`, or out_2, out_3, ...: the first without shards that this call might write."""
    for number in itertools.count(1):
        folder = out.with_name(f"{out.name}_{number}") if number > 1 else out
        if not existing(folder, name, val_fraction):
            if number > 1:
                print(f"{out} holds such shards already: these go to {folder}")
            return folder


def benchmark(paths, tokenizer: str, field: str, workers: int, rounds: int = 5):
    """Prints this script's speed on the files (a few 100 MB at most) against tiktoken's bare batch
    call, in turn.

    The bare call gets the text ready in memory and throws its tokens away; this script reads,
    splits, hashes and writes, and its time includes starting its workers.
    """
    import tiktoken

    encoding = tiktoken.get_encoding(tokenizer)
    texts = []
    size = 0
    for work in read(paths):
        for text in [work.data] if work.kind == "piece" else documents(work, field):
            if isinstance(text, BadInput):
                raise text
            texts.append(text.decode())
            size += len(text)
    ratios = []
    for _ in range(rounds):
        start = time.perf_counter()
        encoding.encode_ordinary_batch(texts, num_threads=workers)
        bare = time.perf_counter() - start
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            prepare(paths, Path(folder), "benchmark", tokenizer, field, 0.01, 10**8, workers)
            ours = time.perf_counter() - start
        ratios.append(ours / bare)
        print(
            f"tiktoken {size / 1e6 / bare:.2f} MB/s, prepare.py {size / 1e6 / ours:.2f} MB/s, "
            f"time ratio {ratios[-1]:.3f}"
        )
    print(
        f"median time ratio {statistics.median(ratios):.3f} on {workers} workers, "
        f"{size / 1e6:.0f} MB of text"
    )


def training_command(out: Path, name: str, tokenizer: str) -> str:
    """The ./run.sh line that trains on the shards: a preset, and flags where its values do not fit.

    Raises BadInput where there is too little text for a single row.
    """
    from train_gpt import PRESETS  # takes seconds

    c = PRESETS[PRESET[tokenizer]]
    seq_len = c.max_seq_len
    folder = out.resolve()
    folder = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
    words = ["./run.sh", "--preset", PRESET[tokenizer]]
    rows = []
    for split, length in (("train", seq_len), ("val", c.val_len)):
        words += [f"--{split}_files", f"{glob.escape(str(folder))}/{name}_{split}_*.bin"]
        counts = [shards.read_header(path) for path in out.glob(f"{name}_{split}_*.bin")]
        rows.append(sum((count - 1) // length for count in counts if count))
        if not rows[-1]:
            raise BadInput(
                f"{sum(counts):,} tokens for {split}, and a row of --preset {PRESET[tokenizer]} "
                f"takes {length + 1}"
            )
    train_rows, val_rows = rows
    most = max(stage.batch_tokens for stage in c.stages) // seq_len
    batch = min(most, train_rows)
    if batch < most:
        words += ["--batch_tokens", str(batch * seq_len)]
    epochs = math.ceil(c.steps * batch / (train_rows // batch * batch))
    if epochs > c.epochs_allowed:
        words += ["--epochs_allowed", str(epochs)]
        print(f"little text, seen {epochs} times: if val_loss rises again, give fewer --steps")
    if val_rows * c.val_len < c.val_tokens:
        words += ["--val_tokens", str(val_rows * c.val_len)]
    return shlex.join(words)


def parse(argv) -> argparse.Namespace:
    """The command line, its values checked."""
    parser = shards.Parser(__doc__)
    parser.add_argument("files", nargs="+", metavar="FILES", help="files, folders, globs")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the shards go")
    parser.add_argument("--name", help="how the shards' names begin (default: the name of DIR)")
    parser.add_argument("--tokenizer", choices=list(EOT), default="gpt2", help="default: gpt2")
    parser.add_argument(
        "--field", default="text", help="where the text is in a .jsonl line (default: text)"
    )
    parser.add_argument(
        "--val_fraction",
        type=float,
        default=0.01,
        help="share of documents for validation (default: 0.01); "
        "0 makes train shards only, 1 validation shards only",
    )
    parser.add_argument(
        "--shard_tokens", type=int, default=10**8, help="tokens in a shard (default: 100000000)"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=usable_cores(),
        help="processes (default: all cores: %(default)s)",
    )
    parser.add_argument(
        "--benchmark", action="store_true", help="write nothing; time this against bare tiktoken"
    )
    args = parser.parse_args(argv)

    if not 0 <= args.val_fraction <= 1:
        parser.error(f"--val_fraction is {args.val_fraction}, should be between 0 and 1")
    if not 1 <= args.shard_tokens <= shards.MAX_TOKENS:
        parser.error(
            f"--shard_tokens is {args.shard_tokens}, should be between 1 and {shards.MAX_TOKENS}"
        )
    if args.workers < 1:
        parser.error(f"--workers is {args.workers}, should be at least 1")
    if args.benchmark and args.tokenizer != "gpt2":
        parser.error("--benchmark measures --tokenizer gpt2")
    if not args.benchmark and not args.out:
        parser.error("--out DIR is missing")
    return args


def find_files(names: list[str]) -> list[Path]:
    """The files that names, folders and globs stand for. Raises BadInput for one without any."""
    paths = []
    for name in names:
        path = Path(name).expanduser()
        if path.is_dir():
            inside = (p.relative_to(path) for p in path.rglob("*") if p.is_file())
            found = sorted(path / p for p in inside if not any(q[0] == "." for q in p.parts))
        elif path.is_file():
            found = [path]
        else:
            found = sorted(filter(Path.is_file, map(Path, glob.glob(str(path), recursive=True))))
        if not found:
            raise BadInput(f"{name}: no such file; check the path")
        paths += found
    return paths


@shards.tool
def main(argv=None):
    args = parse(argv)
    files = find_files(args.files)
    if args.benchmark:
        return benchmark(files, args.tokenizer, args.field, args.workers)
    out = args.out.expanduser()
    name = args.name or out.resolve().name
    if not re.fullmatch(r"[\w.-]+", name):
        raise BadInput(
            f"'{name}' cannot begin a file name; give --name with letters, digits, '_', '-' and '.'"
        )
    out = free_folder(out, name, args.val_fraction)
    os.makedirs(out, exist_ok=True)
    shards.read_manifest(out)  # refuses one that the new shards could not be added to
    encoder(args.tokenizer)  # fails here rather than in every worker
    options = args.tokenizer, args.field, args.val_fraction, args.shard_tokens, args.workers
    train, val = prepare(files, out, name, *options)
    for split in (train, val):
        for shard in split.files:
            print(f"{shard.path}: {shard.count:,} tokens")
    print(f"{train.documents:,} train and {val.documents:,} validation documents")
    if 0 < args.val_fraction < 1:
        try:
            print(f"train on them:\n{training_command(out, name, args.tokenizer)}")
        except BadInput as error:
            print(f"too little text to train on: {error}")


if __name__ == "__main__":
    # an ordinary exit, which takes the temporary files along
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
