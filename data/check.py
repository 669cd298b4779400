"""Checks a folder of token shards and says what is in it.

    python data/check.py DIR [--vocab_size V]

For every *.bin: header and length, largest token, number of documents, sha256 (compared with manifest.json if there
is one). For NAME_train_* and NAME_val_* shards: how many validation documents also occur in train. Exit code 0 when all
is well, 1 when something is wrong, 2 when the folder cannot be checked. Memory: a hash for each validation document.
"""
import collections
import hashlib
import json
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
        yield np.asarray(tokens[start:start + CHUNK])


def document_hashes(paths: list[Path], eot: int):
    """(hash, tokens) of every document in the shards, read as one stream: in some sets documents run on from one shard
    into the next. What stands before the first <|endoftext|> is the end of a document that is not here: left out."""
    digest, count = None, 0
    for path in paths:
        for tokens in chunks(path):
            starts = np.flatnonzero(tokens == eot).tolist()
            rest = starts[0] if starts else len(tokens)
            if digest is not None:
                digest.update(tokens[:rest])
                count += rest
            for begin, end in zip(starts, starts[1:] + [len(tokens)]):
                if count:
                    yield digest.digest(), count
                digest, count = hashlib.blake2b(tokens[begin + 1:end], digest_size=16), end - begin - 1
    if count:
        yield digest.digest(), count


def overlap(train: list[Path], val: list[Path], eot: int) -> tuple[int, int, int]:
    """(validation documents that also occur in train, their tokens, all validation documents)"""
    number, size = collections.Counter(), {}
    for digest, count in document_hashes(val, eot):
        number[digest] += 1
        size[digest] = count
    shared = {digest for digest, _ in document_hashes(train, eot) if digest in size}
    return sum(number[d] for d in shared), sum(number[d] * size[d] for d in shared), number.total()


def check_set(paths: list[Path], vocab_size: int | None, recorded: dict, faults: list[str]) -> int:
    """Checks the shards of one NAME, prints a line for each, adds to `faults`; returns the <|endoftext|> token."""
    largest, whole = {}, []
    for path in paths:
        try:
            largest[path] = max((int(tokens.max()) for tokens in chunks(path)), default=0)
            whole.append(path)
        except BadInput as error:
            faults.append(str(error))
    top = max(largest.values(), default=0)
    vocab_size = vocab_size or (shards.BYTE_VOCAB if top < shards.BYTE_VOCAB else shards.GPT2_VOCAB)
    for path in whole:
        documents, first = 0, None
        for tokens in chunks(path):
            first = int(tokens[0]) if first is None else first
            documents += int(np.count_nonzero(tokens == vocab_size - 1))
        sha256 = shards.sha256_file(path)
        start = "" if first == vocab_size - 1 else ", begins inside a document"
        print(f"{path.name}: {shards.read_header(path):,} tokens, largest {largest[path]} of vocabulary {vocab_size}, "
              f"{documents:,} documents{start}, sha256 {sha256}")
        if largest[path] >= vocab_size:
            faults.append(f"{path.name}: token {largest[path]} is outside the vocabulary of {vocab_size}; build it "
                          "again, or give its --vocab_size")
        if documents == 0:
            faults.append(f"{path.name}: no <|endoftext|> ({vocab_size - 1}) in it, so no document starts; build it "
                          "again, or give its --vocab_size")
        if sha256 != recorded.get(path.name, sha256):
            faults.append(f"{path.name}: its sha256 is not the one in manifest.json; fetch it again")
    return vocab_size - 1


def read_manifest(folder: Path, faults: list[str]) -> dict[str, str]:
    """{file name: sha256} of manifest.json, empty when there is none."""
    path = folder / "manifest.json"
    if not path.exists():
        return {}
    try:
        recorded = {name: entry["sha256"] for name, entry in json.loads(path.read_text())["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        faults.append(f"{path.name}: cannot be read as a manifest; delete it and fetch the shards again")
        return {}
    faults += [f"{name}: is in manifest.json but not in the folder; fetch it again"
               for name in recorded if not (folder / name).exists()]
    return recorded


@shards.tool
def main(argv=None):
    parser = shards.Parser(__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--vocab_size", type=int, help="default: 257 if no token is larger than 256, else 50257")
    parser.add_argument("--allow_overlap", action="store_true", help="report documents in train and validation, but "
                        "do not count them as a fault (published sets can contain some)")
    args = parser.parse_args(argv)
    if args.vocab_size is not None and not 2 <= args.vocab_size <= 2**16:
        parser.error(f"--vocab_size is {args.vocab_size}, should be between 2 and {2**16}")
    if not args.folder.is_dir():
        raise BadInput(f"{args.folder}: no such folder; check the path")
    paths = sorted(args.folder.glob("*.bin"))
    if not paths:
        raise BadInput(f"{args.folder}: no *.bin in it; fetch or build shards first")

    faults: list[str] = []
    recorded = read_manifest(args.folder, faults)
    sets = collections.defaultdict(lambda: collections.defaultdict(list))
    for path in paths:
        name, split = match.groups() if (match := NAME.fullmatch(path.name)) else (path.name, None)
        sets[name][split].append(path)
    for name, splits in sets.items():
        before = len(faults)
        eot = check_set([path for group in splits.values() for path in group], args.vocab_size, recorded, faults)
        if splits["train"] and splits["val"] and len(faults) == before:
            shared, tokens, number = overlap(splits["train"], splits["val"], eot)
            print(f"{name}: {shared:,} of {number:,} validation documents also occur in train ({tokens:,} tokens)")
            if shared and not args.allow_overlap:
                faults.append(f"{name}: {shared:,} validation documents occur in train; build the shards again, or "
                              "accept it with --allow_overlap")
    for fault in faults:
        print(f"check.py: {fault}", file=sys.stderr)
    print(f"{len(paths)} shards: {f'{len(faults)} faults' if faults else 'all well'}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
