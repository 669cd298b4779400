"""data/prepare.py: text in, shards out, and nothing at all when the text is bad."""

import hashlib
import itertools
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

import train_gpt
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


@pytest.mark.long
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
    # what a worker leaves out is counted here
    jsonl.write_text(jsonl.read_text() + '{"other": 1}\n')
    result = run(jsonl, "--out", tmp_path / "3", *flags, "--workers", 2)
    assert (
        result.returncode == 0 and "left out 1 " in result.stdout and "line 6001" in result.stdout
    )


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
        ("a.md", b"one \xff", "byte 4: not UTF-8"),
        ("a.parquet", b"\x00PAR1\x80", "not UTF-8"),
        ("a.txt", b"", "no text"),
        ("a.txt", b" \n<|endoftext|>\n", "no text"),
        ("a.jsonl", b"", "no text"),
        ("a.jsonl", b"\n" * 20 + b"{}\n", "line 21: no text"),
        ("a.jsonl", b'{"body": "x"}\n', "line 1: no text in a field 'text' (found: body)"),
        ("a.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("missing.txt", None, "no such file"),
    ],
)
def test_no_text_at_all_is_one_line_and_leaves_nothing(
    tmp_path, capsys, monkeypatch, name, content, word
):
    # so that the place of the fault is counted across reads
    monkeypatch.setattr(prepare, "PIECE", 8)
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    assert main(path, "--out", tmp_path / "o", "--shard_tokens", 5000) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("prepare.py: ") and word in error
    assert not (tmp_path / "o").exists() or not list((tmp_path / "o").iterdir())


@pytest.mark.parametrize(
    "name, content, count, first",
    [
        ("a.txt", b"one<|endoftext|>two\xff<|endoftext|>\xff", 2, "byte 19: not UTF-8"),
        ("a.txt", b"long and fine " * 9 + b"\xff is not " * 9, 1, "byte 126: not UTF-8"),
        ("a.jsonl", b'\n{"text": 5}\n["text"]\n', 2, "line 2: no text in a field 'text'"),
        ("a.jsonl", b'{"text": "\xff"}\n{"text": \n{"body": ""}', 3, "line 1: not UTF-8"),
    ],
)
def test_what_cannot_be_read_is_left_out_and_counted(
    tmp_path, capsys, monkeypatch, name, content, count, first
):
    monkeypatch.setattr(prepare, "PIECE", 8)
    good, _ = write_inputs(tmp_path)
    bad = tmp_path / "bad" / name
    bad.parent.mkdir()
    bad.write_bytes(content)
    assert main(good, bad, good, "--out", tmp_path / "o", "--val_fraction", 0) == 0
    out = capsys.readouterr().out
    assert f"left out {count} documents or lines, the first: {bad}, {first}" in out
    rest = ["one"] if content.startswith(b"one") else []
    assert documents(tmp_path / "o", "train") == DOCUMENTS + rest + DOCUMENTS


def test_half_a_surrogate_pair_is_a_replacement_character(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a\\ud800b"}\n{"text": "\\ud834\\udd1e"}\n')
    assert main(path, "--out", tmp_path / "o", "--val_fraction", 0) == 0
    assert documents(tmp_path / "o", "train") == ["a\ufffdb", "𝄞"]


def test_any_utf8_file_is_a_document(tmp_path, monkeypatch):
    """Named, in a folder, by a glob, in the home folder."""
    for name in ("a.md", "b.py", "sub/c.tex", "sub/no_ending", ".hidden/d.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    monkeypatch.setenv("HOME", str(tmp_path))
    found = {"a": "~/a.md", "b": tmp_path / "*.py", "c": tmp_path, "d": "~/s*/*.tex"}
    texts = {}
    for out, name in found.items():
        assert main(name, "--out", tmp_path / "out" / out, "--val_fraction", 0) == 0
        texts[out] = documents(tmp_path / "out" / out, "train")
        shutil.rmtree(tmp_path / "out")
    assert (texts["a"], texts["b"], texts["d"]) == (
        ["text of a.md"],
        ["text of b.py"],
        ["text of sub/c.tex"],
    )
    names = ["a.md", "b.py", "sub/c.tex", "sub/no_ending"]
    assert texts["c"] == [f"text of {name}" for name in names]


def test_shards_that_are_there_are_not_in_the_way(tmp_path, capsys):
    txt, _ = write_inputs(tmp_path)
    assert main(txt, "--out", tmp_path / "o") == 0
    before = {path: path.read_bytes() for path in (tmp_path / "o").iterdir()}
    txt.write_text("something else")
    for folder in ("o_2", "o_3"):
        assert main(txt, "--out", tmp_path / "o", "--val_fraction", 0) == 0
        assert f"these go to {tmp_path / folder}" in capsys.readouterr().out
        assert documents(tmp_path / folder, "train") == ["something else"]
        assert (tmp_path / folder / "o_train_000001.bin").exists()
    assert before == {path: path.read_bytes() for path in (tmp_path / "o").iterdir()}


@pytest.mark.parametrize("sizes", [[9000], [400] * 20 + [3000] + [300] * 30, [10_000, 20_000]])
@pytest.mark.parametrize("shard_tokens", [10**8, 5000])
@pytest.mark.parametrize("piece", [1 << 20, 64])
def test_validation_is_guaranteed(tmp_path, monkeypatch, sizes, shard_tokens, piece):
    """Where no document falls into it, the tail of the longest one goes there, and nothing else."""
    monkeypatch.setattr(prepare, "PIECE", piece)
    texts = [
        f"{number} " + "word " * (size // 5) + f"{number}" for number, size in enumerate(sizes)
    ]
    texts = [t for t in texts if not prepare.is_val(hashlib.sha256(t.encode()).digest(), 0.01)]
    txt, _ = write_inputs(tmp_path, texts)
    assert main(txt, "--out", tmp_path / "o", "--shard_tokens", shard_tokens) == 0
    (tail,) = documents(tmp_path / "o", "val")
    total = sum(1 + len(text) for text in texts)
    assert min(prepare.ENOUGH, total // 10) == 1 + len(tail) - 1 or len(tail) == total // 100
    longest = max(texts, key=len)
    cut = [text if text != longest else text.removesuffix(tail) for text in texts]
    assert longest.endswith(tail) and documents(tmp_path / "o", "train") == cut
    assert check.main([str(tmp_path / "o")]) == 0


@pytest.mark.parametrize(
    "size, batch, epochs",
    [(1_000_000, None, None), (60_000, None, 5), (1700, 1408, 138)],
)
def test_the_command_that_it_prints_fits_the_shards(tmp_path, capsys, size, batch, epochs):
    """The trainer takes it: enough rows, of training and of validation."""
    txt = tmp_path / "with space.txt"
    txt.write_text("".join(f"some words {i} " for i in range(size // 10))[:size])
    assert main(txt, "--out", tmp_path / "own text", "--name", "x") == 0
    *told, line = capsys.readouterr().out.splitlines()
    assert any(f"seen {epochs} times" in words for words in told) == bool(epochs)
    start, *flags = shlex.split(line)
    config = train_gpt.parse_config(flags, "nov2024")
    assert (start, config.preset) == ("./run.sh", "laptop")
    assert config.stages[0].batch_tokens == (batch or 2048) and config.epochs_allowed == (
        epochs or 1
    )
    train_gpt.open_data(config)  # refuses what does not fit
    assert 128 <= config.val_tokens <= shards.read_header(tmp_path / "own text/x_val_000000.bin")


def test_the_command_for_gpt2_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "ROOT", tmp_path)
    for split in ("train", "val"):
        shards.write_shard(tmp_path / f"x_{split}_000001.bin", [50256] * 1000)
    line = prepare.training_command(tmp_path, "x", "gpt2")
    assert line.startswith("./run.sh --preset small --train_files './x_train_*.bin' ")
    assert "--batch_tokens 896" in line and "--val_tokens 896" in line


def test_too_little_text_to_train_on_is_said(tmp_path, capsys):
    txt = tmp_path / "a.txt"
    txt.write_text("short")
    assert main(txt, "--out", tmp_path / "o") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == (
        "too little text to train on: 6 tokens for train, and a row of --preset laptop takes 129"
    )


@pytest.mark.parametrize("seed", range(4))
def test_long_runs_of_white_space_do_not_change_tokens(seed, monkeypatch):
    """GPT-2's own pattern; a run of 2 counts as long here."""
    monkeypatch.setattr(prepare, "LONG_RUN", re.compile(f"[{prepare.SPACES}]{{2,}}+"))
    ranks = {bytes([byte]): byte for byte in range(256)}
    pairs = itertools.product(b" \n\t\xa0\xc2\xe2\x80\x83a", repeat=2)
    ranks |= {bytes(pair): 256 + rank for rank, pair in enumerate(pairs)}
    encoding = tiktoken.Encoding(
        "pairs", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={}
    )
    rng = random.Random(seed)
    alphabet = [
        " ",
        "  ",
        "\n",
        "\t",
        "\r",
        "\x1c",
        "\x85",
        "\xa0",
        "\u2003",
        "\u3000",
        "a",
        "'s",
        "!",
    ]
    for _ in range(1000):
        text = "".join(rng.choices(alphabet, k=rng.randrange(1, 30)))
        tokens = prepare.encode_runs(
            text, lambda part: np.array(encoding.encode_ordinary(part), int)
        )
        assert tokens.tolist() == encoding.encode_ordinary(text), repr(text)


def test_a_million_white_space_characters(monkeypatch):
    """More than the stack of tiktoken's regular expressions holds."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    encoding = tiktoken.Encoding(
        "bytes", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={}
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    prepare.encoder.cache_clear()
    text = b"two" + b" \n" * 500_000 + b"words" + b" " * 1_000_000
    try:
        assert len(prepare.encoder("gpt2")(text)) == len(text)
    finally:
        prepare.encoder.cache_clear()


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
