"""Checks a folder of token shards and says what is in it.

    python data/check.py DIR [--vocab_size V]

For every *.bin: header and length, largest token, number of documents, sha256 (compared with
manifest.json if there is one). For NAME_train_* and NAME_val_* shards: how many validation
documents also occur in train. Exit code 0 when all is well, 1 when something is wrong, 2 when the
folder cannot be checked. Memory: a hash for each validation document.
"""

import collections
import glob
import hashlib
import itertools
import os
import re
import sys
from pathlib import Path

import numpy as np

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import shards
from data.shards import BadInput

CHUNK = 1 << 22  # tokens looked at a time
NAME = re.compile(r"(.+)_(train|val)_\d+\.bin")


def chunks(path: Path):
    """The tokens of a shard, uint16 [<= CHUNK] at a time."""
    tokens = shards.open_shard(path)
    for start in range(0, len(tokens), CHUNK):
        yield np.asarray(tokens[start : start + CHUNK])


def examine(path: Path) -> tuple[str, int]:
    """(sha256 of the file, its largest token), read once. Raises BadInput for a wrong header."""
    shards.read_header(path)
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read(shards.HEADER_BYTES))
    largest = 0
    for tokens in chunks(path):
        digest.update(tokens)
        largest = max(largest, int(tokens.max()))
    return digest.hexdigest(), largest


def document_hashes(paths: list[Path], eot: int):
    """(hash, tokens) of every document in the shards, read as one stream: in some sets documents
    run on from one shard into the next. What stands before the first <|endoftext|> is the end of a
    document that is not here: left out.
    """
    digest = None
    count = 0
    for path in paths:
        for tokens in chunks(path):
            starts = np.flatnonzero(tokens == eot).tolist()
            rest = starts[0] if starts else len(tokens)
            if digest is not None:
                digest.update(tokens[:rest])
                count += rest
            for begin, end in itertools.pairwise([*starts, len(tokens)]):
                if count:
                    yield digest.digest(), count
                digest, count = (
                    hashlib.blake2b(tokens[begin + 1 : end], digest_size=16),
                    end - begin - 1,
                )
    if count:
        yield digest.digest(), count


def overlap(train: list[Path], val: list[Path], eot: int) -> tuple[int, int, int]:
    """(validation documents that also occur in train, their tokens, all validation documents)"""
    number = collections.Counter()
    size = {}
    for digest, count in document_hashes(val, eot):
        number[digest] += 1
        size[digest] = count
    shared = {digest for digest, _ in document_hashes(train, eot) if digest in size}
    documents = sum(number[digest] for digest in shared)
    tokens = sum(number[digest] * size[digest] for digest in shared)
    return documents, tokens, number.total()


def check_set(paths: list[Path], vocab_size: int | None, recorded: dict, faults: list[str]) -> int:
    """Checks the shards of one NAME, prints a line for each, adds to `faults`; returns the
    <|endoftext|> token.
    """
    found = {}
    for path in paths:
        try:
            found[path] = examine(path)
        except BadInput as error:
            faults.append(str(error))
    top = max((largest for _, largest in found.values()), default=0)
    if vocab_size is None:
        vocab_size = shards.BYTE_VOCAB if top < shards.BYTE_VOCAB else shards.GPT2_VOCAB
    eot = vocab_size - 1
    again = "build it again, or give its --vocab_size"
    for path, (sha256, largest) in found.items():
        documents = sum(int(np.count_nonzero(tokens == eot)) for tokens in chunks(path))
        whole = shards.open_shard(path)
        start = "" if len(whole) and whole[0] == eot else ", begins inside a document"
        print(
            f"{path.name}: {len(whole):,} tokens, largest {largest} of vocabulary {vocab_size}, "
            f"{documents:,} documents{start}, sha256 {sha256}"
        )
        if largest >= vocab_size:
            problem = f"token {largest} is outside the vocabulary of {vocab_size}"
            faults.append(f"{path.name}: {problem}; {again}")
        if documents == 0:
            problem = f"no <|endoftext|> ({eot}) in it, so no document starts"
            faults.append(f"{path.name}: {problem}; {again}")
        if sha256 != recorded.get(path.name, {"sha256": sha256})["sha256"]:
            problem = "its sha256 is not the one in manifest.json"
            faults.append(f"{path.name}: {problem}; fetch it again")
    return eot


def check_run(patterns: list[str], vocab_size: int):
    """What a run asks of the shards that match its globs, before it starts.

    Every shard's header is read. A shard that the manifest.json beside it records is hashed when
    its size or modification time are not those of the last check; the manifest remembers them, and
    the largest token. Of a shard that no manifest records the first CHUNK tokens are looked at.
    Raises BadInput for the first fault.
    """
    folders = collections.defaultdict(list)
    for name in sorted({name for p in patterns for name in glob.glob(os.path.expanduser(p))}):
        folders[Path(name).parent].append(Path(name))
    for folder, paths in folders.items():
        for path in paths:
            shards.read_header(path)
        recorded = settle(folder, paths)
        for path in paths:
            if path.name in recorded:
                largest = recorded[path.name]["largest"]
            else:
                largest = int(next(chunks(path), np.zeros(1)).max())
            if largest >= vocab_size:
                raise BadInput(
                    f"{path}: holds token {largest}, but --vocab_size is {vocab_size}; "
                    "name the preset of these shards, or the vocabulary they were made with"
                )


def settle(folder: Path, paths: list[Path]) -> dict[str, dict]:
    """Hashes those of the shards that have changed since the manifest's last check.

    Returns the manifest's entries by file name. Raises BadInput for a shard with another hash.
    """
    manifest = shards.read_manifest(folder)
    recorded = manifest["files"]
    changed = [path for path in paths if must_be_hashed(path, recorded.get(path.name))]
    if not changed:
        return recorded
    size = sum(path.stat().st_size for path in changed)
    if size > 10**9:  # seconds
        print(f"{folder}: hashing {len(changed)} shards, {size / 1e9:.1f} GB, once", flush=True)
    for path in changed:
        entry = shards.entry_of(path, recorded[path.name]["sha256"])  # it may change meanwhile
        sha256, entry["largest"] = examine(path)
        if sha256 != entry["sha256"]:
            raise BadInput(
                f"{path}: not the shard that manifest.json records (sha256); "
                "fetch or prepare it again"
            )
        recorded[path.name] = entry
    try:
        shards.write_manifest(folder, manifest)
    except OSError as error:
        print(f"{folder}: cannot be written to ({error.strerror}), so every run hashes the shards")
    return recorded


def must_be_hashed(path: Path, entry: dict | None) -> bool:
    if entry is None:
        return False
    return not shards.unchanged(path, entry) or not isinstance(entry.get("largest"), int)


@shards.tool
def main(argv=None):
    parser = shards.Parser(__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument(
        "--vocab_size", type=int, help="default: 257 if no token is larger than 256, else 50257"
    )
    parser.add_argument(
        "--allow_overlap",
        action="store_true",
        help="report documents in train and validation, but "
        "do not count them as a fault (published sets can contain some)",
    )
    args = parser.parse_args(argv)
    if args.vocab_size is not None and not 2 <= args.vocab_size <= 2**16:
        parser.error(f"--vocab_size is {args.vocab_size}, should be between 2 and {2**16}")
    if not args.folder.is_dir():
        raise BadInput(f"{args.folder}: no such folder; check the path")
    paths = sorted(args.folder.glob("*.bin"))
    if not paths:
        raise BadInput(f"{args.folder}: no *.bin in it; fetch or build shards first")

    faults: list[str] = []
    recorded = shards.read_manifest(args.folder)["files"]
    for name in recorded:
        if not (args.folder / name).exists():
            problem = "is in manifest.json but not in the folder"
            faults.append(f"{name}: {problem}; fetch it again")
    sets = collections.defaultdict(lambda: collections.defaultdict(list))
    for path in paths:
        match = NAME.fullmatch(path.name)
        name, split = match.groups() if match else (path.name, None)
        sets[name][split].append(path)
    for name, splits in sets.items():
        before = len(faults)
        members = [path for group in splits.values() for path in group]
        eot = check_set(members, args.vocab_size, recorded, faults)
        if splits["train"] and splits["val"] and len(faults) == before:
            shared, tokens, number = overlap(splits["train"], splits["val"], eot)
            print(
                f"{name}: {shared:,} of {number:,} validation documents also occur in train "
                f"({tokens:,} tokens)"
            )
            if shared and not args.allow_overlap:
                problem = f"{shared:,} validation documents occur in train"
                remedy = "build the shards again, or accept it with --allow_overlap"
                faults.append(f"{name}: {problem}; {remedy}")
    for fault in faults:
        print(f"check.py: {fault}", file=sys.stderr)
    print(f"{len(paths)} shards: {f'{len(faults)} faults' if faults else 'all well'}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
