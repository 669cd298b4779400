"""data/check.py: finds every kind of fault, and none where there is none."""
import json

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
    assert "x_train_000002.bin: 7 tokens, largest 256 of vocabulary 257, 2 documents, sha256 " in out
    assert shards.sha256_file(folder / "x_train_000002.bin") in out
    assert "0 of 2 validation documents" in out


def test_gpt2_shards_are_recognised(tmp_path, capsys):
    write(tmp_path, "x_train_000001.bin", [[1, 2], [50255]], eot=50256)
    code, out, _ = run(tmp_path, capsys)
    assert code == 0 and "vocabulary 50257, 2 documents" in out


@pytest.mark.parametrize("position, byte, word", [(0, 0, "magic"), (4, 9, "version 9"), (8, 99, "need")])
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
    write(tmp_path, "x_val_000000.bin", [long, [5, 6], [30, 31, 32, 33, 34], long, [1, 2], [30, 31, 32]])
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
    assert run(folder, capsys)[0] == 1


def test_misuse_is_one_line_and_2(tmp_path, capsys):
    for arguments in ([str(tmp_path)], [str(tmp_path / "none")]):
        assert check.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith("check.py: ")
    with pytest.raises(SystemExit) as stop:
        check.main([str(tmp_path), "--vocab_size", "1"])
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1
