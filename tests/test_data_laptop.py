"""data/laptop.py and the shard format of data/shards.py."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data import laptop, shards

SCRIPT = Path(laptop.__file__)
needs_pinned_numpy = pytest.mark.skipif(
    np.__version__ != laptop.NUMPY, reason=f"needs numpy {laptop.NUMPY}"
)


def run(*args, cwd=None):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, args)], cwd=cwd, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("laptop")
    assert laptop.main(["--out", str(folder)]) == 0
    return folder


@needs_pinned_numpy
def test_shards_have_the_pinned_bytes_and_documents_begin_with_256(built):
    for name, sha256 in laptop.SHA256.items():
        assert shards.sha256_file(built / name) == sha256
        tokens = shards.open_shard(built / name)
        assert tokens[0] == 256 and tokens.max() == 256
        assert np.count_nonzero(tokens == 256) > 30


@needs_pinned_numpy
def test_no_document_is_in_train_and_validation():
    train, val = laptop.documents(Path(np.__file__).parent)
    assert len(set(train)) == len(train) and not set(train) & set(val)
    share = sum(map(len, val)) / sum(map(len, train + val))
    assert 0.08 < share < 0.10


@needs_pinned_numpy
def test_second_call_is_quick_and_a_damaged_shard_is_built_again(built, tmp_path):
    for name in laptop.SHA256:
        shutil.copy(built / name, tmp_path)
    start = time.perf_counter()
    again = run("--out", tmp_path, cwd="/")
    assert time.perf_counter() - start < 3  # a quarter of a second on an idle machine
    assert (
        again.returncode == 0 and "whole already" in again.stdout and again.stdout.count("\n") == 1
    )
    damaged = tmp_path / "laptop_val_000000.bin"
    damaged.write_bytes(damaged.read_bytes()[:-2])
    assert laptop.main(["--out", str(tmp_path)]) == 0
    assert shards.sha256_file(damaged) == laptop.SHA256[damaged.name]
    assert not list(tmp_path.glob("*.tmp"))


def test_windows_line_ends_and_left_out_files_change_nothing(tmp_path):
    texts = {
        "lib/a.py": b"x = 1\n",
        "core/b.py": b"y = 2\n",
        "core/same.py": b"y = 2\n",
        "empty.py": b"",
    }
    for system, end in (("unix", b"\n"), ("windows", b"\r\n")):
        for name, text in texts.items():
            path = tmp_path / system / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.replace(b"\n", end))
    for extra in ("__config__.py", "__init__.py", "version.py", "distutils/core.py"):
        path = tmp_path / "windows" / extra
        path.parent.mkdir(exist_ok=True)
        path.write_text("generated")
    unix, windows = (laptop.documents(tmp_path / system) for system in ("unix", "windows"))
    assert unix == windows
    assert sorted(unix[0] + unix[1]) == [b"x = 1\n", b"y = 2\n"]
    assert laptop.tokens([b"ab", b"c"]).tolist() == [256, 97, 98, 256, 99]


def test_another_numpy_is_one_line_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(np, "__version__", "1.26.4")
    assert laptop.main(["--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert (
        error.count("\n") == 1
        and f"pip install numpy=={laptop.NUMPY}" in error
        and "1.26.4" in error
    )
    assert not (tmp_path / "out").exists()


def test_changed_numpy_sources_are_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "numpy").mkdir()
    (tmp_path / "numpy" / "a.py").write_text("edited")
    monkeypatch.setattr(np, "__version__", laptop.NUMPY)
    monkeypatch.setattr(np, "__file__", str(tmp_path / "numpy" / "__init__.py"))
    assert laptop.main(["--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--force-reinstall" in error
    assert not (tmp_path / "out").exists()


def test_bad_flag_is_one_line():
    result = run("--ouch")
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "--ouch" in result.stderr


def test_shard_round_trip(tmp_path):
    path = tmp_path / "x.bin"
    shards.write_shard(path, np.arange(1000))
    assert shards.open_shard(path).tolist() == list(range(1000))
    head = np.fromfile(path, "<i4", 256)
    assert head[:3].tolist() == [20240520, 1, 1000] and not head[3:].any()
    assert path.stat().st_size == 1024 + 2000


@pytest.mark.parametrize(
    "damage, word",
    [
        (lambda b: b[:500], "shorter"),
        (lambda b: b"\0" + b[1:], "magic"),
        (lambda b: b[:4] + b"\2" + b[5:], "version 2"),
        (lambda b: b[:-2], "need"),
        (lambda b: b + b"\0\0", "need"),
        (lambda b: b[:8] + b"\xff\xff\xff\xff" + b[12:], "need"),
    ],
)
def test_bad_shards_are_refused(tmp_path, damage, word):
    path = tmp_path / "x.bin"
    shards.write_shard(path, [1, 2, 3])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(shards.BadInput, match=word):
        shards.open_shard(path)


def test_a_failed_write_leaves_the_old_shard(tmp_path):
    path = tmp_path / "x.bin"
    shards.write_shard(path, [1, 2, 3])
    with pytest.raises((ValueError, TypeError)):
        shards.write_shard(path, ["no token"])
    with pytest.raises(RuntimeError), shards.atomic(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert shards.open_shard(path).tolist() == [1, 2, 3] and list(tmp_path.iterdir()) == [path]
