"""Token shards: reading, checking and writing them; and what the scripts of this folder share.

A shard is 256 little-endian int32 (magic 20240520, version 1, number of tokens, rest 0) and then
the tokens as little-endian uint16: the format of llm.c. In front of every document stands
<|endoftext|>, the last token of the vocabulary: 50256 of GPT-2's 50257, or 256 of the 257 of
byte-level shards (tokens 0..255 are the bytes themselves).
"""

import argparse
import contextlib
import errno
import functools
import hashlib
import json
import os
import stat
import sys
from pathlib import Path

import numpy as np

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024
MAX_TOKENS = 2**31 - 1  # the count is an int32
GPT2_VOCAB, BYTE_VOCAB = 50257, 257
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class BadInput(Exception):
    """Something that only the user can mend; the text is one line: what is wrong, what to do."""


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line and exit code 2; it does not guess at shortened flags."""

    def __init__(self, doc):
        super().__init__(
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def tool(main):
    """Decorates a script's main(argv=None): BadInput and OSError are one line and exit code 2."""

    @functools.wraps(main)
    def wrapped(argv=None):
        name = Path(main.__code__.co_filename).name
        for stream in (sys.stdout, sys.stderr):  # one that cannot show a letter shows its number
            with contextlib.suppress(AttributeError):
                stream.reconfigure(errors="backslashreplace")
        try:
            return main(argv) or 0
        except BadInput as error:
            line = str(error)
        except BrokenPipeError:  # the reader has enough, as head has
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except OSError as error:
            line = explain(error)
        except KeyboardInterrupt:
            print(f"{name}: interrupted", file=sys.stderr)
            return 130
        print(f"{name}: {' '.join(line.split())}", file=sys.stderr)
        return 2

    return wrapped


def explain(error: OSError) -> str:
    """One line for an OSError: what is wrong; what to do."""
    where = f"{error.filename}: " if error.filename else ""
    if error.errno in DISK_FULL:
        full = f"{where}the disk is full ({error.strerror})"
        return f"{full}; free space or choose another place"
    return f"{where}{error.strerror or error}; check the path and its permissions"


def refuse_irregular(path):
    """Raises BadInput for a folder, a device or a pipe, whose opening might wait for ever."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise BadInput(f"{path}: not a regular file; move it away")


def sha256_file(path) -> str:
    refuse_irregular(path)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def header(count: int) -> bytes:
    """The first 1024 bytes of a shard of `count` tokens."""
    numbers = np.zeros(HEADER_BYTES // 4, "<i4")
    numbers[:3] = MAGIC, VERSION, count
    return numbers.tobytes()


def read_header(path) -> int:
    """Number of tokens in a shard. Raises BadInput unless header and file length are right."""
    refuse_irregular(path)
    with open(path, "rb") as file:
        head = file.read(HEADER_BYTES)
        size = file.seek(0, os.SEEK_END)
    again = "fetch or build it again"
    if len(head) < HEADER_BYTES:
        raise BadInput(f"{path}: only {size} bytes, shorter than a shard's header; {again}")
    magic, version, count = (int(number) for number in np.frombuffer(head, "<i4", 3))
    if magic != MAGIC:
        raise BadInput(f"{path}: not a token shard (magic {magic}, should be {MAGIC}); {again}")
    if version != VERSION:
        raise BadInput(f"{path}: shard version {version}, should be {VERSION}; {again}")
    if count < 0 or size != HEADER_BYTES + 2 * count:
        raise BadInput(
            f"{path}: {size} bytes, but {count} tokens need {HEADER_BYTES + 2 * count}; {again}"
        )
    return count


def open_shard(path) -> np.ndarray:
    """The tokens of a shard, uint16 [count], memory-mapped and read-only. Raises BadInput as
    read_header does.
    """
    count = read_header(path)
    if count == 0:  # an empty range cannot be mapped
        return np.empty(0, "<u2")
    return np.memmap(path, "<u2", "r", HEADER_BYTES, (count,))


@contextlib.contextmanager
def atomic(path):
    """A binary file that appears under `path` only when the block ends well."""
    path = Path(path)
    temp = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temp, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
    finally:
        temp.unlink(missing_ok=True)


class ShardFile:
    """A shard being written: write() tokens, then close() and commit(), or discard().

    Until commit() it lies under a temporary name in the same folder: a shard with its own name is
    whole.
    """

    def __init__(self, path):
        self.path = Path(path)
        self.count = 0
        self.temp = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        self.file = open(self.temp, "wb")
        self.file.write(bytes(HEADER_BYTES))

    def write(self, tokens):
        """tokens: integers [n], each in 0..65535."""
        self.file.write(np.ascontiguousarray(tokens, "<u2"))
        self.count += len(tokens)

    def close(self):
        if self.file.closed:
            return
        if self.count > MAX_TOKENS:
            raise BadInput(
                f"{self.path.name}: {self.count} tokens, but a shard holds at most {MAX_TOKENS}; "
                "split the document"
            )
        self.file.seek(0)
        self.file.write(header(self.count))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()

    def commit(self):
        os.replace(self.temp, self.path)

    def discard(self):
        with contextlib.suppress(OSError):  # closing flushes, which a full disk refuses
            self.file.close()
        self.temp.unlink(missing_ok=True)


def write_shard(path, tokens):
    """Writes one shard at once, replacing what is there only when the new one is whole."""
    shard = ShardFile(path)
    try:
        shard.write(tokens)
        shard.close()
        shard.commit()
    finally:
        shard.discard()


def read_manifest(folder: Path) -> dict:
    """manifest.json beside the shards: {"files": {name: {"sha256", "size", "mtime_ns", ...}}, ...}.

    Without files where there is none; of an entry only "sha256" is sure to be there. Raises
    BadInput when it is no manifest.
    """
    path = folder / "manifest.json"
    if not path.exists():
        return {"files": {}}
    refuse_irregular(path)
    try:
        manifest = json.loads(path.read_bytes())
        sound = all(isinstance(entry["sha256"], str) for entry in manifest["files"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise BadInput(
            f"{path}: cannot be read as a manifest; "
            "delete it, then fetch or prepare the shards again"
        )
    return manifest


def write_manifest(folder: Path, manifest: dict):
    with atomic(folder / "manifest.json") as file:
        file.write((json.dumps(manifest, indent=1) + "\n").encode())


def entry_of(path: Path, sha256: str) -> dict:
    """What a manifest records of a file that has just been checked or written."""
    found = path.stat()
    return {"sha256": sha256, "size": found.st_size, "mtime_ns": found.st_mtime_ns}


def unchanged(path: Path, entry: dict) -> bool:
    """Whether size and modification time are those that the manifest's entry recorded."""
    found = path.stat()
    return (found.st_size, found.st_mtime_ns) == (entry.get("size"), entry.get("mtime_ns"))


def record(folder: Path, digests: dict[str, str]):
    """Adds {file name: sha256} to the folder's manifest. A run refuses a shard that differs."""
    manifest = read_manifest(folder)
    for name, sha256 in digests.items():
        manifest["files"][name] = entry_of(folder / name, sha256)
    write_manifest(folder, manifest)
