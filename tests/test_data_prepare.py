"""data/prepare.py: text in, shards out, and nothing at all when the text is bad."""

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from data import check, prepare, shards

needs_gpt2 = pytest.mark.skipif(
    "TIKTOKEN_CACHE_DIR" not in os.environ, reason="needs tiktoken's gpt2 files"
)
DOCUMENTS = [f"Document {i}: " + "some words, " * (i % 7) + "é€𝄞。\n" for i in range(300)]


def run(*args, **env):
    return subprocess.run(
        [sys.executable, prepare.__file__, *map(str, args)],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        cwd="/",
        timeout=60,
    )


def main(*args):
    return prepare.main([*map(str, args), "--tokenizer", "bytes", "--workers", "1"])


def documents(folder, split):
    """The texts in a folder's byte shards, in order."""
    texts = []
    for path in sorted(folder.glob(f"*_{split}_*.bin")):
        tokens = shards.open_shard(path)
        assert tokens[0] == 256
        texts += [
            part[1:].astype(np.uint8).tobytes().decode()
            for part in np.split(tokens, np.flatnonzero(tokens == 256))[1:]
        ]
    return texts


def write_inputs(folder, texts=DOCUMENTS):
    txt, jsonl = folder / "a.txt", folder / "a.jsonl"
    txt.write_text("<|endoftext|>".join(texts), encoding="utf-8", newline="")
    jsonl.write_text(
        "".join(json.dumps({"id": 1, "body": text}) + "\n" for text in texts), encoding="utf-8"
    )
    return txt, jsonl


def test_every_document_arrives_once_whole_and_in_order(tmp_path):
    txt, jsonl = write_inputs(tmp_path)
    assert main(txt, "--out", tmp_path / "t", "--val_fraction", 0.1) == 0
    train, val = documents(tmp_path / "t", "train"), documents(tmp_path / "t", "val")
    assert 10 < len(val) < 60 and sorted(train + val) == sorted(DOCUMENTS)
    assert train == [text for text in DOCUMENTS if text in set(train)]
    assert main(jsonl, "--out", tmp_path / "j", "--val_fraction", 0.1, "--field", "body") == 0
    assert (train, val) == (documents(tmp_path / "j", "train"), documents(tmp_path / "j", "val"))
    assert check.main([str(tmp_path / "t")]) == 0
    assert not list(tmp_path.rglob("*.tmp"))


def test_equal_documents_are_on_the_same_side(tmp_path, monkeypatch):
    """Also when they are in pieces in one file and whole in another, or long with the same
    beginning or end.
    """
    monkeypatch.setattr(prepare, "PIECE", 64)
    long = [f"{i} " + "the same long middle " * 20 + f"{j}" for i in range(5) for j in range(5)]
    txt, jsonl = write_inputs(tmp_path, DOCUMENTS + long + DOCUMENTS[::-1] + long)
    assert main(txt, jsonl, "--out", tmp_path / "o", "--val_fraction", 0.5, "--field", "body") == 0
    train, val = documents(tmp_path / "o", "train"), documents(tmp_path / "o", "val")
    assert len(train) + len(val) == 4 * len(DOCUMENTS + long) and not set(train) & set(val)
    assert len(val) == 4 * len(set(val)) and 5 < sum(text in val for text in long) < 20


def test_fraction_0_and_1_and_names(tmp_path):
    txt, _ = write_inputs(tmp_path)
    out = tmp_path / "corpus"
    assert main(txt, "--out", out, "--val_fraction", 0) == 0
    assert main(txt, "--out", out, "--val_fraction", 1) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "corpus_train_000001.bin",
        "corpus_val_000000.bin",
        "manifest.json",
    ]
    assert documents(out, "train") == documents(out, "val") == DOCUMENTS


@pytest.mark.parametrize("shard_tokens", [1, 50, 64, 200, 1000])
def test_shards_end_between_documents(tmp_path, shard_tokens):
    texts = DOCUMENTS[:40]
    txt, _ = write_inputs(tmp_path, texts)
    assert (
        main(txt, "--out", tmp_path / "o", "--val_fraction", 0, "--shard_tokens", shard_tokens) == 0
    )
    # documents() asserts that each shard begins with one
    assert documents(tmp_path / "o", "train") == texts
    expected = [0]
    for size in (1 + len(text.encode()) for text in texts):
        if expected[-1] and expected[-1] + size > shard_tokens:
            expected.append(0)
        expected[-1] += size  # alone in its shard when it is longer than a shard
    counts = [shards.read_header(path) for path in sorted((tmp_path / "o").glob("*.bin"))]
    assert counts == expected


@pytest.mark.parametrize("piece", [1, 7, 64, 1000])
def test_the_size_of_pieces_changes_nothing(tmp_path, monkeypatch, piece):
    """Marks that straddle reads, long and short documents in turn, a byte order mark, empty
    documents.
    """
    texts = [
        "x y " * 500,
        "",
        "short",
        "é " * 300,
        " \n",
        "no space" * 200,
        "end <|endof text|> <|endoftext",
    ]
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "<|endoftext|>".join(texts).encode())
    monkeypatch.setattr(prepare, "PIECE", piece)
    assert main(path, "--out", tmp_path / "o", "--val_fraction", 0, "--shard_tokens", 2500) == 0
    assert documents(tmp_path / "o", "train") == [text for text in texts if text.strip()]


def cut_up(text: bytes, piece: int) -> list[bytes]:
    """`text` at its safe cuts, in pieces of at least `piece` bytes."""
    parts, start = [], 0
    while match := prepare.SAFE_CUT.search(text, start + piece):
        parts.append(text[start : match.end()])
        start = match.end()
    return [*parts, text[start:]]


@pytest.mark.parametrize("seed", range(5))
def test_cuts_do_not_change_tokens(seed):
    """GPT-2's own pattern with a vocabulary in which every pair of bytes is a token, on text full
    of hard places.
    """
    rng = random.Random(seed)
    alphabet = [
        "a",
        "Z",
        "7",
        "'",
        "'s",
        "'ll",
        ".",
        "!",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "\r\n",
        "é",
        "。",
        "字",
        "한",
        "𝄞",
        "\x85",
        "\u00a0",
        "\u2003",
        "\u3000",
        "\ufeff",
        "<|endoftext|>",
    ]
    used = sorted({byte for text in alphabet for byte in text.encode()})
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {
        bytes([a, b]): 256 + len(used) * i + j
        for i, a in enumerate(used)
        for j, b in enumerate(used)
    }
    encoding = tiktoken.Encoding(
        "pairs", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={}
    )
    pieces = 0
    for _ in range(300):
        text = "".join(rng.choices(alphabet, k=rng.randrange(1, 60)))
        parts = cut_up(text.encode(), rng.randrange(1, 8))
        pieces += len(parts)
        assert b"".join(parts) == text.encode()
        tokens = [token for part in parts for token in encoding.encode_ordinary(part.decode())]
        assert tokens == encoding.encode_ordinary(text)
    assert pieces > 600


def test_workers_and_the_command_line(tmp_path):
    txt, jsonl = write_inputs(tmp_path, DOCUMENTS * 20)
    flags = (
        "--tokenizer",
        "bytes",
        "--val_fraction",
        0.2,
        "--field",
        "body",
        "--shard_tokens",
        100_000,
        "--name",
        "x",
    )
    for workers in (1, 2):
        result = run(txt, jsonl, "--out", tmp_path / str(workers), *flags, "--workers", workers)
        assert result.returncode == 0 and result.stderr == "", result
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()} for folder in "12"
    )
    recorded = [json.loads(files.pop("manifest.json"))["files"] for files in (one, two)]
    assert one == two and len(one) > 4
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in one.items()}
    for files in recorded:
        assert {name: entry["sha256"] for name, entry in files.items()} == digests
    # an error in a worker comes out as the same single line
    jsonl.write_text(jsonl.read_text() + '{"other": 1}\n')
    result = run(jsonl, "--out", tmp_path / "3", *flags, "--workers", 2)
    assert (
        result.returncode == 2 and result.stderr.count("\n") == 1 and "line 6001" in result.stderr
    )
    assert not list((tmp_path / "3").iterdir())


@needs_gpt2
def test_gpt2_tokens_are_tiktokens_own(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "PIECE", 1000)
    texts = [*DOCUMENTS, "a long one, " * 1000, "<|endoftext|> in a JSON text is text"]
    _, jsonl = write_inputs(tmp_path, texts)
    long = tmp_path / "long.txt"
    long.write_text(Path(prepare.__file__).read_text() * 3)
    assert (
        prepare.main(
            [
                str(jsonl),
                str(long),
                "--field",
                "body",
                "--out",
                str(tmp_path / "o"),
                "--val_fraction",
                "0",
                "--workers",
                "1",
            ]
        )
        == 0
    )
    encoding = tiktoken.get_encoding("gpt2")
    expected = [[50256, *encoding.encode_ordinary(text)] for text in texts]
    # the script's own text holds the mark, which in a .txt file separates documents
    expected += [
        [50256, *encoding.encode_ordinary(text)] for text in long.read_text().split("<|endoftext|>")
    ]
    assert shards.open_shard(tmp_path / "o" / "o_train_000001.bin").tolist() == sum(expected, [])


def test_missing_gpt2_files_are_one_line(tmp_path):
    txt, _ = write_inputs(tmp_path)
    dead = "http://127.0.0.1:9"  # a proxy that is not there stands for no network
    result = run(
        txt,
        "--out",
        tmp_path / "o",
        TIKTOKEN_CACHE_DIR=str(tmp_path / "empty"),
        https_proxy=dead,
        HTTPS_PROXY=dead,
        no_proxy="",
        NO_PROXY="",
    )
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result
    assert "TIKTOKEN_CACHE_DIR" in result.stderr and not list(tmp_path.rglob("*.bin"))


@pytest.mark.parametrize(
    "name, content, word",
    [
        ("a.txt", b"fine " * 100 + b"\xff", "byte 500: not UTF-8"),
        ("a.txt", b"one<|endoftext|>two\xff", "byte 19: not UTF-8"),
        ("a.txt", b"", "no text"),
        ("a.txt", b" \n<|endoftext|>\n", "no text"),
        ("a.jsonl", b"", "no text"),
        (
            "a.jsonl",
            b'{"text": "x"}\n\n{"body": "x"}\n',
            "line 3: no text in a field 'text' (found: body)",
        ),
        ("a.jsonl", b"\n" * 20 + b"{}\n", "line 21: no text"),
        ("a.jsonl", b'{"text": 5}\n', "line 1: no text in a field"),
        ("a.jsonl", b'["text"]\n', "found: list"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "line 2: not JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', "line 2: not UTF-8"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1: not UTF-8"),
        ("a.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("a.parquet", b"x", "give .txt or .jsonl"),
        ("missing.txt", None, "no such file"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    tmp_path, capsys, monkeypatch, name, content, word
):
    # so that the place of the fault is counted across reads
    monkeypatch.setattr(prepare, "PIECE", 8)
    good, _ = write_inputs(tmp_path)
    bad = tmp_path / "bad" / name
    bad.parent.mkdir()
    if content is not None:
        bad.write_bytes(content)
    files = (bad,) if "no text" in word and ":" not in word else (good, bad)
    assert main(*files, "--out", tmp_path / "o", "--shard_tokens", 5000) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("prepare.py: ") and word in error
    assert not (tmp_path / "o").exists() or not list((tmp_path / "o").iterdir())


def test_existing_shards_are_refused(tmp_path, capsys):
    txt, _ = write_inputs(tmp_path)
    assert main(txt, "--out", tmp_path / "o") == 0
    before = {path: path.read_bytes() for path in (tmp_path / "o").iterdir()}
    txt.write_text("something else")
    assert main(txt, "--out", tmp_path / "o") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "exists" in error
    assert before == {path: path.read_bytes() for path in (tmp_path / "o").iterdir()}


@pytest.mark.parametrize(
    "flag, value",
    [
        ("--val_fraction", 2),
        ("--shard_tokens", 0),
        ("--workers", 0),
        ("--tokenizer", "gpt9"),
        ("--val_frac", 0.1),
    ],
)
def test_bad_flags_are_one_line(tmp_path, capsys, flag, value):
    with pytest.raises(SystemExit) as stop:
        prepare.main(["x.txt", "--out", str(tmp_path), flag, str(value)])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and flag in error


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing(tmp_path):
    txt, _ = write_inputs(tmp_path, DOCUMENTS * 20)
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
        f"sys.path.insert(0, {str(Path(prepare.__file__).parents[1])!r}); "
        "from data import prepare; sys.exit(prepare.main(sys.argv[1:]))"
    )
    flags = ["--out", str(tmp_path / "o"), "--tokenizer", "bytes", "--workers", "1"]
    command = [sys.executable, "-c", limited, str(txt), *flags]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result
    assert "disk is full" in result.stderr
    assert not list((tmp_path / "o").iterdir())
