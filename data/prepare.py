"""Turns text files into token shards.

    python data/prepare.py FILES... --out DIR [--tokenizer gpt2|bytes] [--field text]
                           [--val_fraction 0.01]

A .txt file is one document, or several with <|endoftext|> between them; a .jsonl file is one JSON
object a line, its text in --field. All text is UTF-8. A document goes whole into train or
validation, decided by the hash of its text: equal documents are never on both sides. Memory does
not grow with the amount of text, only with the longest document. Shards appear, all together, as
DIR/NAME_train_000001.bin … and DIR/NAME_val_000000.bin … when everything went well; existing ones
are never replaced. The result does not depend on --workers.
"""

import argparse
import collections
import concurrent.futures
import functools
import hashlib
import json
import multiprocessing
import os
import re
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

PIECE = 1 << 20  # bytes of text that a worker is handed at a time
MARK, BOM = b"<|endoftext|>", b"\xef\xbb\xbf"
# A long document may be cut right before a space or line feed that follows a non-space: GPT-2's
# pattern matches no stretch of text that has a space after a non-space, and looks ahead only from
# spaces, so both sides come out with the tokens they have in the whole. The non-space is printable
# ASCII or, for text that has none, a character from U+3001 to U+FFFF: the only space up there is
# U+3000.
SAFE_CUT = re.compile(rb"(?:[!-~]|(?!\xe3\x80\x80)[\xe3-\xef][\x80-\xbf]{2})(?=[ \n])")

EOT = {"gpt2": shards.GPT2_VOCAB - 1, "bytes": shards.BYTE_VOCAB - 1}

# What a worker is handed. kind "jsonl": data is a list of lines and `where` the first one's number;
# "txt": a list of documents, `where` the list of their byte offsets; "piece": a part of one
# document, `where` its byte offset. `digest` is the sha256 of the whole document on its last piece,
# else None.
Work = collections.namedtuple("Work", "kind path where data digest")


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
    return lambda text: encoding.encode_to_numpy(text.decode(), disallowed_special=())


def is_val(digest: bytes, val_fraction: float) -> bool:
    return int.from_bytes(digest[:8], "big") < val_fraction * 2**64


def documents(work: Work, field: str):
    """The texts of a "jsonl" or "txt" unit of work, as UTF-8 bytes. Raises BadInput with file and
    place.
    """
    for index, item in enumerate(work.data):
        if work.kind == "txt":
            check_utf8(item, work.path, work.where[index])
            yield item
            continue
        where = f"{work.path}, line {work.where + index}"
        if not item.strip():
            continue
        try:
            record = json.loads(item.decode())
            text = record[field].encode()
        except UnicodeError as error:
            raise BadInput(f"{where}: not UTF-8 ({error.reason}); convert the file") from None
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{where}: not JSON ({error}); repair the line") from None
        except (TypeError, KeyError, AttributeError):
            names = ", ".join(record)[:100] if isinstance(record, dict) else type(record).__name__
            raise BadInput(
                f"{where}: no text in a field '{field}' (found: {names}); "
                "name the field with --field"
            ) from None
        yield text


def check_utf8(text: bytes, path: Path, offset: int):
    try:
        text.decode()
    except UnicodeDecodeError as error:
        raise BadInput(
            f"{path}, byte {offset + error.start}: not UTF-8 ({error.reason}); convert the file"
        ) from None


def encode(
    work: Work, tokenizer: str, field: str, val_fraction: float
) -> tuple[np.ndarray, np.ndarray, int]:
    """(train tokens, val tokens, bytes of text). A piece's tokens come as train tokens without
    <|endoftext|>.
    """
    to_tokens = encoder(tokenizer)
    split = ([], [])
    size = 0
    if work.kind == "piece":
        check_utf8(work.data, work.path, work.where)
        split[0].append(to_tokens(work.data))
        size = len(work.data)
    else:
        for text in documents(work, field):
            if text.strip():
                split[is_val(hashlib.sha256(text).digest(), val_fraction)].extend(
                    ([EOT[tokenizer]], to_tokens(text))
                )
                size += len(text)
    train, val = (np.concatenate([[], *parts], dtype="<u2", casting="unsafe") for parts in split)
    return train, val, size


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
            self.files[-1].write(tokens[bounds[begin] : bounds[end]])
            begin = end

    def add_long(self, parts: list[np.ndarray]):
        """One document in parts, without its <|endoftext|>."""
        size = 1 + sum(map(len, parts))
        used = self.files[-1].count if self.files else self.shard_tokens
        if used and used + size > self.shard_tokens:
            self.next_shard()
        for part in ([self.eot], *parts):
            self.files[-1].write(part)
        self.documents += 1

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
    parts = []  # tokens of the long document that is under way
    results = in_order(read(paths), workers, tokenizer, field, val_fraction)
    try:
        for work, (train_tokens, val_tokens, size) in results:
            progress.add(size, len(train_tokens) + len(val_tokens))
            if work.kind != "piece":
                train.add(train_tokens)
                val.add(val_tokens)
                continue
            parts.append(train_tokens)
            if work.digest:
                (val if is_val(work.digest, val_fraction) else train).add_long(parts)
                parts.clear()
        if not train.files and not val.files:
            raise BadInput("there is no text in the files; nothing was written")
        files = train.files + val.files
        for split in (train, val):
            if split.files:
                split.files[-1].close()
        refuse_existing(out, name, val_fraction)  # another process may have been faster
        for shard in files:
            shard.commit()
        shards.record(out, {shard.path.name: shards.sha256_file(shard.path) for shard in files})
    finally:
        results.close()
        for shard in train.files + val.files:
            shard.discard()
    print(progress)
    return train, val


def refuse_existing(out: Path, name: str, val_fraction: float):
    """Raises BadInput when shards that this call may write are there. (All of one split leaves the
    other alone.)
    """
    shards.read_manifest(out)  # refuses one that the new shards could not be added to
    for split, possible in (("train", val_fraction < 1), ("val", val_fraction > 0)):
        found = sorted(out.glob(f"{name}_{split}_*.bin"))
        if possible and found:
            raise BadInput(
                f"{found[0]} exists; give another --name or --out, or delete the old shards"
            )


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


def parse(argv) -> argparse.Namespace:
    """The command line, its values checked."""
    parser = shards.Parser(__doc__)
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILES", help=".txt and .jsonl files"
    )
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
        "--workers", type=int, default=cores(), help="processes (default: all cores: %(default)s)"
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


@shards.tool
def main(argv=None):
    args = parse(argv)
    for path in args.files:
        if path.suffix not in (".txt", ".jsonl"):
            raise BadInput(f"{path}: unknown kind of file; give .txt or .jsonl")
        if not path.is_file():
            raise BadInput(f"{path}: no such file; check the path")
    if args.benchmark:
        return benchmark(args.files, args.tokenizer, args.field, args.workers)
    name = args.name or args.out.resolve().name
    if not re.fullmatch(r"[\w.-]+", name):
        raise BadInput(
            f"'{name}' cannot begin a file name; give --name with letters, digits, '_', '-' and '.'"
        )

    os.makedirs(args.out, exist_ok=True)
    refuse_existing(args.out, name, args.val_fraction)
    encoder(args.tokenizer)  # fails here rather than in every worker
    train, val = prepare(
        args.files,
        args.out,
        name,
        args.tokenizer,
        args.field,
        args.val_fraction,
        args.shard_tokens,
        args.workers,
    )
    for split in (train, val):
        for shard in split.files:
            print(f"{shard.path}: {shard.count:,} tokens")
    print(f"{train.documents:,} train and {val.documents:,} validation documents")
    if 0 < args.val_fraction < 1 and not (train.files and val.files):
        empty = "validation" if train.files else "train"
        print(
            f"note: no document fell into {empty}: with few documents, separate them with "
            "<|endoftext|>, change --val_fraction, or prepare a file for each with "
            "--val_fraction 0 and 1"
        )


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


if __name__ == "__main__":
    # an ordinary exit, which takes the temporary files along
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
