"""Builds the byte-level corpus of the laptop preset from what is already on the machine: numpy's
own Python sources.

    python data/laptop.py [--out DIR]

Writes laptop_train_000000.bin and laptop_val_000000.bin. No network, and the same bytes on every
machine: the sha256 of both shards is fixed below. One document per source file, its bytes as
tokens, 256 in front of each; vocabulary 257.
"""

import hashlib
import os
import sys
from pathlib import Path

import numpy as np

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import shards
from data.shards import BadInput

NUMPY = "2.4.6"
SHA256 = {
    "laptop_train_000000.bin": "53331ae70c2e860685a803960d24e74d43f901a98e888cffb897cf1845ef4b79",
    "laptop_val_000000.bin": "f901ea4e3b98302cd0304aa5783351ca363fafe38c2b614d916dae95925c6a8f",
}
# Generated at build time (__config__, version), patched in the Windows wheels (__init__), or
# shipped for Python 3.11 only (distutils). All other .py files are the same in every wheel, line
# ends on Windows aside.
LEFT_OUT = ("__config__.py", "__init__.py", "version.py", "distutils/")
# Files fall into 11 buckets by the hash of their path. Bucket 1 is validation: 9.6 % of the text,
# and no file in it is more than 18 % of it (in bucket 0 one file would be 30 %).
BUCKETS, VAL_BUCKET = 11, 1


def documents(root: Path) -> tuple[list[bytes], list[bytes]]:
    """Train and validation documents from the package folder `root`, in the order of the hash of
    their path.

    In plain path order a short run would see only numpy/_core; in hash order any stretch is a
    sample of everything.
    """
    paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    hashed = {
        name: int(hashlib.sha256(name.encode()).hexdigest(), 16)
        for name in paths
        if not name.startswith(LEFT_OUT)
    }
    split = ([], [])
    seen = set()
    for name in sorted(hashed, key=hashed.get):
        text = paths[name].read_bytes().replace(b"\r\n", b"\n")
        if text and text not in seen:  # equal files count once, so none is in train and validation
            seen.add(text)
            split[hashed[name] % BUCKETS == VAL_BUCKET].append(text)
    return split


def tokens(texts: list[bytes]) -> np.ndarray:
    """uint16 [number of bytes + number of documents]"""
    eot = np.array([shards.BYTE_VOCAB - 1], "<u2")
    parts = [part for text in texts for part in (eot, np.frombuffer(text, np.uint8))]
    return np.concatenate([eot[:0], *parts], dtype="<u2")


def build(root: Path, version: str) -> dict[str, np.ndarray]:
    """Shard name -> tokens. Raises BadInput unless `root` is the numpy they are made of."""
    if version != NUMPY:
        raise BadInput(
            f"the corpus is numpy {NUMPY}'s source, but numpy {version} is installed; "
            f"run: pip install numpy=={NUMPY}"
        )
    train, val = documents(root)
    return {name: tokens(texts) for name, texts in zip(SHA256, (train, val), strict=True)}


@shards.tool
def main(argv=None):
    parser = shards.Parser(__doc__)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).resolve().parent / "laptop",
        metavar="DIR",
        help="where the two shards go (default: data/laptop beside this script)",
    )
    out = parser.parse_args(argv).out

    whole = [
        name
        for name in SHA256
        if (out / name).is_file() and shards.sha256_file(out / name) == SHA256[name]
    ]
    if len(whole) < len(SHA256):
        corpus = build(Path(np.__file__).parent, np.__version__)
        for name, stream in corpus.items():
            if (
                hashlib.sha256(shards.header(len(stream)) + stream.tobytes()).hexdigest()
                != SHA256[name]
            ):
                raise BadInput(
                    f"this numpy {NUMPY} does not hold the sources of the published wheels; "
                    f"run: pip install --force-reinstall --no-deps numpy=={NUMPY}"
                )
        os.makedirs(out, exist_ok=True)
        for name in SHA256.keys() - whole:
            shards.write_shard(out / name, corpus[name])
    if not (out / "manifest.json").is_file():
        shards.record(out, SHA256)
    counts = ", ".join(f"{name} {shards.read_header(out / name):,} tokens" for name in SHA256)
    print(f"{out}: {counts} ({'whole already' if len(whole) == len(SHA256) else 'built'})")


if __name__ == "__main__":
    sys.exit(main())
