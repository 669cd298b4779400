"""data/fineweb.py against a stand-in for the hub: real HTTP on the loopback, the script as a
process of its own.
"""

import collections
import contextlib
import hashlib
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from data import fineweb, shards

REVISION, NEWER = "a" * 40, "b" * 40
VAL, TRAIN = "fineweb_val_000000.bin", "fineweb_train_00000{}.bin"


def shard_bytes(seed: int) -> bytes:
    tokens = np.random.default_rng(seed).integers(0, 50257, 30_000)
    return shards.header(len(tokens)) + tokens.astype("<u2").tobytes()


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as the hub of its server says."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub = self.server.hub
        parts = self.path.partition("?")[0].strip("/").split("/")
        is_info = parts[0] == "api"
        kind, name = ("info", "") if is_info else (self.command, parts[-1])
        hub.asked[kind, name] += 1
        fault = hub.fault(kind, name, hub.asked[kind, name])
        if isinstance(fault, int):
            self.answer(fault, {"Retry-After": hub.wait} if hub.wait else {}, b"")
        elif is_info:
            self.send_info(parts[parts.index("revision") + 1] if "revision" in parts else "main")
        else:
            hub.revisions.add(parts[parts.index("resolve") + 1])
            self.send_file(hub.files[name], fault)

    def send_info(self, revision):
        revision = self.server.hub.head if revision == "main" else revision
        if revision in (REVISION, NEWER):
            kind = {"Content-Type": "application/json"}
            self.answer(200, kind, self.server.hub.info(revision))
        else:
            self.answer(404, {"X-Error-Code": "RevisionNotFound"}, b"")

    def send_file(self, body, fault):
        headers = {
            "ETag": f'"{hashlib.sha256(body).hexdigest()}"',
            "X-Repo-Commit": self.server.hub.head,
            "Accept-Ranges": "bytes",
        }
        if self.command == "HEAD":
            return self.answer(200, headers, body)
        if fault == "corrupt":
            body = body[:5000] + bytes([body[5000] ^ 1]) + body[5001:]
        asked = self.headers.get("Range")
        if not asked:
            return self.answer(200, headers, body, fault)
        start = int(asked.removeprefix("bytes=").split("-")[0])
        headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        self.answer(206, headers, body[start:], fault)

    def answer(self, status, headers, body, fault=None):
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault == "truncate":
            self.wfile.write(body[:20_000])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif fault == "slow":
            for at in range(0, len(body), 10_000):
                self.wfile.write(body[at : at + 10_000])
                time.sleep(0.05)
        else:
            self.wfile.write(body)


class Hub:
    """Holds the files of one dataset at revision `head`. `fault(kind, name, times asked)` may spoil
    an answer: it returns None, an HTTP status, or "slow", "truncate", "corrupt". kind: "info",
    "HEAD" or "GET".
    """

    def __init__(self):
        self.files = {VAL: shard_bytes(0)} | {TRAIN.format(i): shard_bytes(i) for i in (1, 2, 3)}
        self.head = REVISION
        self.fault = lambda *_: None
        self.asked = collections.Counter()
        self.wait = None  # what a fault's Retry-After says
        self.revisions = set()
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.hub = self
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def info(self, revision):
        siblings = [{"rfilename": ".gitattributes", "size": 10, "blobId": "0" * 40}]
        siblings += [
            {
                "rfilename": name,
                "size": len(body),
                "blobId": "0" * 40,
                "lfs": {
                    "sha256": hashlib.sha256(body).hexdigest(),
                    "size": len(body),
                    "pointerSize": 134,
                },
            }
            for name, body in self.files.items()
        ]
        return json.dumps(
            {
                "id": "kjj0/fineweb10B-gpt2",
                "sha": revision,
                "siblings": siblings,
                "private": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
            }
        ).encode()


@pytest.fixture
def hub():
    hub = Hub()
    threading.Thread(
        target=hub.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
    ).start()
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def environment(url, home):
    kept = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    return kept | {
        "HF_ENDPOINT": url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(home),
        "HF_HUB_DOWNLOAD_TIMEOUT": "2",
        "HF_HUB_ETAG_TIMEOUT": "2",
    }


def fetch(url, out, *args):
    return subprocess.run(
        [sys.executable, fineweb.__file__, *map(str, args), "--out", str(out)],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(url, out.parent / "home"),
        cwd="/",
    )


def assert_whole(hub, out, names):
    assert {path.name for path in out.glob("*.bin")} == set(names)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["repo"] == "kjj0/fineweb10B-gpt2" and manifest["revision"] == REVISION
    assert set(manifest["files"]) == set(names)
    for name in names:
        assert (out / name).read_bytes() == hub.files[name]
        assert manifest["files"][name]["sha256"] == hashlib.sha256(hub.files[name]).hexdigest()
        assert manifest["files"][name]["size"] == len(hub.files[name])
    assert not (out / ".fetching").exists()


def assert_one_line(result, *words):
    assert result.returncode == 2, result
    assert result.stderr.startswith("fineweb.py: ") and result.stderr.count("\n") == 1, (
        result.stderr
    )
    assert all(word in result.stderr for word in words), result.stderr


def test_fetches_then_skips_then_extends_at_the_same_revision(hub, tmp_path):
    out = tmp_path / "shards"
    first = fetch(hub.url, out, 1)
    assert first.returncode == 0 and first.stderr == "" and "[2/2]" in first.stdout, first
    assert_whole(hub, out, [VAL, TRAIN.format(1)])
    home = tmp_path / "home"
    assert (
        not home.exists()
        or sum(path.stat().st_size for path in home.rglob("*") if path.is_file()) < 10_000
    )

    asked = hub.asked.total()
    assert fetch("http://127.0.0.1:9", out, 1).returncode == 0  # whole: no network needed
    assert hub.asked.total() == asked

    hub.head = NEWER  # the dataset moves on: this folder does not
    assert fetch(hub.url, out, 2).returncode == 0
    assert_whole(hub, out, [VAL, TRAIN.format(1), TRAIN.format(2)])
    assert hub.revisions == {REVISION}
    assert hub.asked["GET", VAL] == hub.asked["GET", TRAIN.format(1)] == 1
    assert_one_line(fetch(hub.url, out, 2, "--revision", NEWER), "keeps to revision", "--out")


@pytest.mark.long
def test_bad_answers_are_asked_again(hub, tmp_path):
    """503 twice, a truncated, a corrupt and a slow file: each in one of the four downloads."""
    spoilt = {
        ("GET", VAL): [503, 503],
        ("GET", TRAIN.format(1)): ["truncate"],
        ("GET", TRAIN.format(2)): ["corrupt"],
        ("GET", TRAIN.format(3)): ["slow"],
        ("info", ""): [503],
    }

    def fault(kind, name, times):
        plan = spoilt.get((kind, name), [])
        return plan[times - 1] if times <= len(plan) else None

    hub.fault = fault
    result = fetch(hub.url, tmp_path / "shards", 3)
    assert result.returncode == 0 and result.stderr == "", result
    assert_whole(hub, tmp_path / "shards", hub.files)
    assert hub.asked["GET", VAL] == 3 and hub.asked["GET", TRAIN.format(1)] == 2
    assert hub.asked["GET", TRAIN.format(2)] == 2 and hub.asked["info", ""] == 2
    assert "sha256" in result.stdout and "503" in result.stdout and "trying again" in result.stdout


@pytest.mark.long
def test_a_rate_limit_is_waited_for_then_named(hub, tmp_path):
    """The hub's own pause, not ours: 2 s where the first pauses of ours are 0.5 s and 1 s."""
    hub.wait = "2"
    hub.fault = lambda kind, name, times: 429 if kind == "info" and times <= 2 else None
    start = time.monotonic()
    result = fetch(hub.url, tmp_path / "shards", 0)
    assert result.returncode == 0 and "trying again in 2 s" in result.stdout, result
    assert time.monotonic() - start > 2
    hub.wait = "0"
    hub.fault = lambda kind, name, times: 429 if kind == "info" else None
    result = fetch(hub.url, tmp_path / "other", 0, "--retries", 1)
    assert_one_line(result, "limits the rate of requests; tried 2 times", "HF_TOKEN")


@pytest.mark.long
@pytest.mark.parametrize("kind, status", [("info", 401), ("info", 403), ("HEAD", 403)])
def test_what_the_hub_refuses_for_good_is_not_asked_for_again(hub, tmp_path, kind, status):
    hub.fault = lambda asked, name, times: status if asked == kind else None
    result = fetch(hub.url, tmp_path / "shards", 0)
    assert_one_line(result, f"the hub refuses it ({status}; ", "HF_TOKEN")
    # the library itself asks for the listing twice
    assert sum(hub.asked[key] for key in hub.asked if key[0] == kind) == 1 + (kind == "info")
    assert "network" not in result.stderr and "trying again" not in result.stdout


@pytest.mark.long
def test_an_always_corrupt_file_never_gets_its_name(hub, tmp_path):
    hub.fault = lambda kind, name, times: (
        "corrupt" if (kind, name) == ("GET", TRAIN.format(1)) else None
    )
    out = tmp_path / "shards"
    assert_one_line(fetch(hub.url, out, 1, "--retries", 1), TRAIN.format(1), "sha256")
    assert hub.asked["GET", TRAIN.format(1)] == 2
    assert_whole(hub, out, [VAL])  # the good one is kept


def test_a_file_that_is_no_shard_never_gets_its_name(hub, tmp_path):
    hub.files[VAL] = b"x" * 5000
    assert_one_line(fetch(hub.url, tmp_path / "shards", 0, "--retries", 0), VAL, "magic")
    assert not list((tmp_path / "shards").glob("*.bin"))


def test_no_network_is_one_line(tmp_path):
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert_one_line(
        fetch(f"http://127.0.0.1:{port}", tmp_path / "shards", 1, "--retries", 1),
        "check the network",
    )
    assert not list(tmp_path.rglob("*.bin"))


@pytest.mark.long
def test_damaged_files_are_fetched_again(hub, tmp_path):
    out = tmp_path / "shards"
    assert fetch(hub.url, out, 2).returncode == 0
    short, flipped = out / VAL, out / TRAIN.format(1)
    short.write_bytes(short.read_bytes()[:-100])
    body = bytearray(flipped.read_bytes())
    body[-1] ^= 1
    before = flipped.stat().st_mtime_ns
    flipped.write_bytes(body)
    os.utime(flipped, ns=(before, before))  # same size, same time: only --verify can tell
    result = fetch(hub.url, out, 2, "--verify")
    assert result.returncode == 0 and result.stdout.count("damaged since") == 2
    assert_whole(hub, out, [VAL, TRAIN.format(1), TRAIN.format(2)])
    assert hub.asked["GET", TRAIN.format(2)] == 1


@pytest.mark.long
def test_files_of_unknown_origin_are_adopted_or_left_alone(hub, tmp_path):
    out = tmp_path / "shards"
    out.mkdir()
    (out / VAL).write_bytes(hub.files[VAL])
    assert fetch(hub.url, out, 0).returncode == 0
    assert hub.asked["GET", VAL] == 0
    mine = out / TRAIN.format(1)
    mine.write_bytes(shard_bytes(99))
    assert_one_line(fetch(hub.url, out, 1), "move it away")
    assert mine.read_bytes() == shard_bytes(99)


@pytest.mark.long
def test_misuse_is_one_line(hub, tmp_path):
    out = tmp_path / "shards"
    assert_one_line(fetch(hub.url, out, 9), "at most 3")
    assert_one_line(fetch(hub.url, out, 1, "--revision", "gone"), "not found")
    assert_one_line(fetch(hub.url, out, "-3"), "at least 0")
    assert_one_line(fetch(hub.url, out, 1, "--ouch"), "--ouch")
    (out / "manifest.json").write_text("{}")
    assert_one_line(fetch(hub.url, out, 1), "manifest")
    (out / "manifest.json").write_text(
        json.dumps({"repo": "kjj0/fineweb100B-gpt2", "revision": REVISION, "files": {}})
    )
    assert_one_line(fetch(hub.url, out, 1), "kjj0/fineweb100B-gpt2", "--out")


def test_too_little_disk_is_seen_before_fetching(tmp_path, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(fineweb.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    manifest = fineweb.Manifest(tmp_path, "some/repo")
    with pytest.raises(shards.BadInput, match="of disk are free"):
        fineweb.take_stock(manifest, [VAL], {VAL: ("0" * 64, 2 * 10**8)}, "some/repo")


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_a_disk_that_fills_up_is_one_line(hub, tmp_path):
    """Writing fails in the middle of a file, as on a full disk: a file size limit is the portable
    way to get there.
    """
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)); "
        f"sys.path.insert(0, {str(Path(fineweb.__file__).parents[1])!r}); "
        "from data import fineweb; sys.exit(fineweb.main(sys.argv[1:]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", limited, "0", "--out", str(tmp_path / "shards")],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(hub.url, tmp_path / "home"),
    )
    assert_one_line(result, "disk is full")
    assert not list((tmp_path / "shards").rglob("*.bin"))
