"""data/check.py: finds every kind of fault, and none where there is none."""

import errno
import json
import os

import numpy as np
import pytest

from data import check, shards


def write(folder, name, documents, eot=256):
    shards.write_shard(folder / name, np.concatenate([[eot, *document] for document in documents]))


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, "x_train_000001.bin", [[1, 2, 3], [4, 5]])
    write(tmp_path, "x_train_000002.bin", [[6], [7, 8, 9, 10]])
    write(tmp_path, "x_val_000000.bin", [[11, 12], [13]])
    return tmp_path


def run(folder, capsys, *flags):
    code = check.main([str(folder), *flags])
    output = capsys.readouterr()
    return code, output.out, output.err


def test_a_good_folder(folder, capsys):
    code, out, err = run(folder, capsys)
    assert (code, err) == (0, "")
    assert (
        "x_train_000002.bin: 7 tokens, largest 256 of vocabulary 257, 2 documents, sha256 " in out
    )
    assert shards.sha256_file(folder / "x_train_000002.bin") in out
    assert "0 of 2 validation documents" in out


def test_gpt2_shards_are_recognised(tmp_path, capsys):
    write(tmp_path, "x_train_000001.bin", [[1, 2], [50255]], eot=50256)
    code, out, _ = run(tmp_path, capsys)
    assert code == 0 and "vocabulary 50257, 2 documents" in out


@pytest.mark.parametrize(
    "position, byte, word", [(0, 0, "magic"), (4, 9, "version 9"), (8, 99, "need")]
)
def test_bad_header(folder, capsys, position, byte, word):
    path = folder / "x_train_000001.bin"
    damaged = bytearray(path.read_bytes())
    damaged[position] = byte
    path.write_bytes(damaged)
    code, _, err = run(folder, capsys)
    assert code == 1 and word in err and err.count("\n") == 1


def test_token_outside_the_vocabulary(tmp_path, capsys):
    write(tmp_path, "x_train_000001.bin", [[1, 2], [60000]], eot=50256)
    code, _, err = run(tmp_path, capsys)
    assert code == 1 and "token 60000" in err
    code, _, err = run(tmp_path, capsys, "--vocab_size", "60001")
    assert code == 0


def test_no_document_start(tmp_path, capsys):
    shards.write_shard(tmp_path / "x_train_000001.bin", [1, 2, 3])
    code, _, err = run(tmp_path, capsys)
    assert code == 1 and "no <|endoftext|>" in err


def test_overlap_is_counted_across_chunks_and_shards(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(check, "CHUNK", 5)
    long = list(range(1, 18))
    write(tmp_path, "x_train_000001.bin", [[200], long, [3]])
    # a document that begins in one shard and ends in the next
    shards.write_shard(tmp_path / "x_train_000002.bin", [256, 30, 31, 32])
    shards.write_shard(tmp_path / "x_train_000003.bin", [33, 34, 256, 40])
    write(
        tmp_path,
        "x_val_000000.bin",
        [long, [5, 6], [30, 31, 32, 33, 34], long, [1, 2], [30, 31, 32]],
    )
    code, out, err = run(tmp_path, capsys)
    assert code == 1 and "--allow_overlap" in err
    assert "3 of 6 validation documents also occur in train (39 tokens)" in out
    assert "begins inside a document" in out
    assert run(tmp_path, capsys, "--allow_overlap")[0] == 0


def test_manifest(folder, capsys):
    files = {path.name: {"sha256": shards.sha256_file(path)} for path in folder.glob("*.bin")}
    manifest = folder / "manifest.json"
    manifest.write_text(json.dumps({"files": files}))
    assert run(folder, capsys)[0] == 0
    write(folder, "x_train_000001.bin", [[1, 2, 3], [4, 6]])
    code, _, err = run(folder, capsys)
    assert code == 1 and "x_train_000001.bin: its sha256" in err
    (folder / "x_train_000001.bin").unlink()
    code, _, err = run(folder, capsys)
    assert code == 1 and "not in the folder" in err
    manifest.write_text("{")
    code, _, err = run(folder, capsys)
    assert code == 2 and "manifest.json: cannot be read" in err and err.count("\n") == 1


def test_misuse_is_one_line_and_2(tmp_path, capsys):
    for arguments in ([str(tmp_path)], [str(tmp_path / "none")]):
        assert check.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith("check.py: ")
    with pytest.raises(SystemExit) as stop:
        check.main([str(tmp_path), "--vocab_size", "1"])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


# What a run asks before it starts


@pytest.fixture
def hashed(folder, monkeypatch):
    """The folder with a manifest, and a list that tells which shards were hashed."""
    shards.record(folder, {path.name: shards.sha256_file(path) for path in folder.glob("*.bin")})
    seen = []
    examine = check.examine
    monkeypatch.setattr(check, "examine", lambda path: seen.append(path.name) or examine(path))
    return folder, seen


def check_run(folder, vocab_size=257):
    check.check_run([f"{folder}/x_train_*.bin", f"{folder}/x_val_*.bin"], vocab_size)


def test_a_shard_is_hashed_once_and_again_when_it_has_changed(hashed):
    folder, seen = hashed
    check_run(folder)
    assert len(seen) == 3
    check_run(folder)
    assert len(seen) == 3
    touched = folder / "x_train_000002.bin"
    os.utime(touched, ns=(1, 1))
    check_run(folder)
    assert seen[3:] == [touched.name]
    check_run(folder)
    assert len(seen) == 4
    assert (
        json.loads((folder / "manifest.json").read_text())["files"][touched.name]["largest"] == 256
    )


def test_another_shard_under_a_recorded_name_is_refused_every_time(hashed):
    folder, _ = hashed
    check_run(folder)
    write(folder, "x_train_000001.bin", [[1, 2, 3], [4, 6]])
    before = (folder / "manifest.json").read_bytes()
    for _ in range(2):
        with pytest.raises(shards.BadInput, match=r"x_train_000001.bin: not the shard that"):
            check_run(folder)
    assert (folder / "manifest.json").read_bytes() == before


def test_tokens_outside_the_vocabulary_are_named_with_and_without_a_manifest(hashed):
    folder, seen = hashed
    for _ in range(2):  # the second time from the manifest
        with pytest.raises(shards.BadInput, match="holds token 256, but --vocab_size is 256"):
            check_run(folder, 256)
    (folder / "manifest.json").unlink()
    with pytest.raises(shards.BadInput, match="holds token 256, but --vocab_size is 256"):
        check_run(folder, 256)
    check_run(folder)
    assert len(seen) == 3  # nothing to compare with: not hashed


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[" * 100_000,
        '{"files": ' * 100_000,
        "[]",
        "{}",
        '{"files": []}',
        '{"files": {"x": 3}}',
        '{"files": {"x": {"sha256": 3}}}',
        '{"files": {"x": "sha256"}}',
        b"\xff\xfe",
    ],
)
def test_what_is_no_manifest_is_one_line(folder, capsys, content):
    path = folder / "manifest.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(shards.BadInput, match="manifest.json: cannot be read as a manifest"):
        check_run(folder)


@pytest.mark.parametrize("key, value", [("size", "x"), ("mtime_ns", None), ("largest", "256")])
def test_a_manifest_with_odd_values_is_not_trusted(hashed, key, value):
    folder, seen = hashed
    check_run(folder)
    manifest = shards.read_manifest(folder)
    manifest["files"]["x_val_000000.bin"][key] = value
    shards.write_manifest(folder, manifest)
    check_run(folder)
    assert seen[3:] == ["x_val_000000.bin"]


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "manifest pipe", "manifest folder"])
def test_what_is_no_file_is_one_line_and_nobody_waits(folder, kind, capsys):
    path = folder / ("manifest.json" if kind.startswith("manifest") else "x_train_000009.bin")
    if kind.endswith("pipe"):
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(shards.BadInput, match=f"{path.name}: not a regular file"):
        check_run(folder)
    code, _, err = run(folder, capsys)
    assert code in (1, 2) and "not a regular file" in err and err.count("\n") == 1


def test_a_folder_that_cannot_be_written_to_is_checked_all_the_same(hashed, monkeypatch, capsys):
    folder, seen = hashed

    def refuse(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(shards, "write_manifest", refuse)
    check_run(folder)
    assert len(seen) == 3 and "Read-only file system" in capsys.readouterr().out


def test_a_run_may_name_its_shards_by_the_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    with pytest.raises(shards.BadInput, match="holds token 256"):
        check.check_run(["~/x_train_*.bin"], 200)
