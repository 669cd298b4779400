"""Fetches GPT-2-tokenised FineWeb shards from the Hugging Face hub: the validation shard and the
first N train shards.

    python data/fineweb.py [N] [--set 10B|100B] [--out DIR]

A shard is 100M tokens, 200 MB. 18 of them, 1.8B tokens, cover the 1.7B tokens of the November 2024
recipe.

The hub's revision is resolved once and written to manifest.json beside the shards with each file's
sha256; later calls keep to it. A file gets its own name only after its sha256 and its header have
been checked. Files that are whole are not fetched again, and when all are, the network is not
touched. HF_ENDPOINT names another hub, HF_TOKEN is sent where it is set.
"""

import concurrent.futures
import os
import shutil
import sys
import threading
import time
from pathlib import Path

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data import shards
from data.shards import BadInput

REPOS = {"10B": "kjj0/fineweb10B-gpt2", "100B": "kjj0/fineweb100B-gpt2"}
TIMEOUT = 30  # seconds without a byte before a request counts as failed
MAY_PASS = {408, 425, 429}  # of the statuses from 400 to 499
LONGEST_WAIT = 900  # seconds, whatever the hub asks for
STAGING = ".fetching"  # downloads lie in here until they are checked


class Manifest:
    """manifest.json of a repository's shards, saved at every change; {"repo", "revision", "files"}.

    Raises BadInput when it cannot be read, or is another repository's.
    """

    def __init__(self, folder: Path, repo: str):
        saved = shards.read_manifest(folder)
        found = saved.get("repo", repo if not saved["files"] else None)
        if found != repo:
            raise BadInput(
                f"{folder} holds shards of {found}, not of {repo}; give another folder with --out"
            )
        self.folder = folder
        self.repo = repo
        self.revision = saved.get("revision")
        self.files = saved["files"]
        self.lock = threading.Lock()

    def record(self, name: str, sha256: str):
        with self.lock:
            self.files[name] = shards.entry_of(self.folder / name, sha256)
            files = dict(sorted(self.files.items()))
            saved = {"repo": self.repo, "revision": self.revision, "files": files}
            shards.write_manifest(self.folder, saved)

    def whole(self, name: str, rehash: bool) -> bool:
        """Whether the recorded file is in place and unchanged: by size and time, by sha256 when
        these do not tell.
        """
        path = self.folder / name
        entry = self.files.get(name)
        if entry is None or not path.exists():
            return False
        if shards.unchanged(path, entry) and not rehash:
            return True
        if shards.sha256_file(path) != entry["sha256"]:
            return False
        self.record(name, entry["sha256"])
        return True


class Hub:
    """The few calls of huggingface_hub that are needed, with retries and one-line errors."""

    def __init__(self, repo: str, retries: int):
        # read when huggingface_hub is imported
        os.environ.setdefault("HF_HUB_DOWNLOAD_TIMEOUT", str(TIMEOUT))
        os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", str(TIMEOUT))
        try:
            import huggingface_hub
            import huggingface_hub.errors
        except ImportError as error:
            raise BadInput(f"{error}; run: pip install -r requirements.txt") from None
        self.lib = huggingface_hub
        self.repo = repo
        self.retries = retries
        huggingface_hub.logging.set_verbosity_error()
        if not sys.stderr.isatty():
            huggingface_hub.utils.disable_progress_bars()

    def attempt(self, what: str, call):
        """call(), again after a pause when it fails in a way that may pass: as long as the hub asks
        for, else 0.5 s, 1 s, 2 s ... up to 30 s.
        """
        for failures in range(1, self.retries + 2):
            try:
                return call()
            except self.lib.errors.OfflineModeIsEnabled:
                raise BadInput(f"{what}: HF_HUB_OFFLINE is set; unset it to fetch") from None
            # whatever the HTTP library in use raises: its text is passed on
            except Exception as error:
                if isinstance(error, OSError) and error.errno in shards.DISK_FULL:
                    raise
                # a hub that cannot be reached, or asks to wait, ends in a LocalEntryNotFoundError
                unfound = isinstance(error, self.lib.errors.LocalEntryNotFoundError)
                problem = error.__cause__ or error if unfound else error
            status, asked = answer_of(problem)
            if 400 <= status < 500 and status not in MAY_PASS:
                raise BadInput(f"{what}: {self.refusal(problem, status)}") from None
            if failures <= self.retries:
                pause = asked or min(0.5 * 2 ** (failures - 1), 30)
                print(f"{what}: {brief(problem)}; trying again in {pause:g} s", flush=True)
                time.sleep(pause)
        if status == 429:
            raise BadInput(
                f"{what}: the hub limits the rate of requests; tried {failures} times: wait some "
                "minutes, or set HF_TOKEN to a token of yours; what is whole is kept"
            )
        raise BadInput(
            f"{what}: {brief(problem)}; tried {failures} times: check the network (HF_ENDPOINT is "
            f"{os.environ.get('HF_ENDPOINT', 'not set')}) and start again: what is whole is kept"
        )

    def refusal(self, problem: Exception, status: int) -> str:
        """What the hub will not do however often it is asked, and what to do."""
        if status in (401, 403):
            token = (
                "HF_TOKEN is set, but it" if os.environ.get("HF_TOKEN") else "no HF_TOKEN, and it"
            )
            return f"the hub refuses it ({status}; {token} may need one with access): check both"
        if status == 404 or isinstance(problem, self.lib.errors.RevisionNotFoundError):
            return f"not found on the hub ({brief(problem)}); check the name and the revision"
        return f"the hub refuses it ({brief(problem)}); check HF_ENDPOINT and the command"

    def listing(self, revision: str | None) -> tuple[str, dict[str, tuple[str, int]]]:
        """(full revision, {file name: (sha256, bytes)}) of the repository's large files."""
        api = self.lib.HfApi()
        info = self.attempt(
            self.repo,
            lambda: api.dataset_info(
                self.repo, revision=revision, files_metadata=True, timeout=TIMEOUT
            ),
        )
        return info.sha, {
            file.rfilename: (file.lfs.sha256, file.lfs.size) for file in info.siblings if file.lfs
        }

    def fetch(self, name: str, revision: str, sha256: str, staging: Path) -> Path:
        """Downloads one file into `staging` and checks it; returns its path. Nothing of a bad file
        stays.
        """

        def download():
            # straight into a folder of its own: no second copy in the hub's cache, no stale state
            # after a failure
            shutil.rmtree(staging, ignore_errors=True)
            path = Path(
                self.lib.hf_hub_download(
                    self.repo, name, repo_type="dataset", revision=revision, local_dir=staging
                )
            )
            if shards.sha256_file(path) != sha256:
                raise ValueError("what arrived does not have the hub's sha256")
            shards.read_header(path)
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
            return path

        return self.attempt(name, download)


def answer_of(error: Exception) -> tuple[int, int]:
    """(HTTP status, seconds that the hub asks to wait) of an error; 0 where it has none."""
    response = getattr(error, "response", None)
    asked = response.headers.get("Retry-After", "") if response is not None else ""
    wait = min(int(asked), LONGEST_WAIT) if asked.isdecimal() else 0
    return getattr(response, "status_code", 0), wait


def brief(error: Exception) -> str:
    """The first line of what an error says."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0].rstrip(".: ")


def take_stock(
    manifest: Manifest, missing: list[str], listed: dict[str, tuple[str, int]], repo: str
) -> list[str]:
    """Which of the missing files really have to be fetched. Adopts whole files that no manifest
    records yet.
    """
    absent = [name for name in missing if name not in listed]
    if absent:
        have = sum(name.startswith("fineweb_train_") for name in listed)
        raise BadInput(
            f"{repo} has no {absent[0]}: it has {have} train shards; ask for at most {have}"
        )
    fetch = []
    for name in missing:
        path = manifest.folder / name
        if name in manifest.files and path.exists():
            print(f"{name}: damaged since it was fetched; deleted")
            path.unlink()
        elif path.exists():  # not from here: never delete what may be somebody's own file
            if shards.sha256_file(path) != listed[name][0]:
                raise BadInput(
                    f"{path} is not the file of {repo}; "
                    "move it away or give another folder with --out"
                )
            manifest.record(name, listed[name][0])
            continue
        fetch.append(name)
    need = sum(listed[name][1] for name in fetch)
    free = shutil.disk_usage(manifest.folder).free
    if need > free:
        raise BadInput(
            f"{manifest.folder}: {need / 1e9:.1f} GB to fetch, but only {free / 1e9:.1f} GB of "
            "disk are free; free space, ask for fewer shards, or give another folder with --out"
        )
    return fetch


def fetch_all(
    hub: Hub, manifest: Manifest, names: list[str], listed: dict[str, tuple[str, int]], jobs: int
):
    """Fetches the files, `jobs` at a time, and records each; the first lasting failure ends it."""
    staging = manifest.folder / STAGING

    def one(name):
        sha256, size = listed[name]
        start = time.perf_counter()
        path = hub.fetch(name, manifest.revision, sha256, staging / Path(name).stem)
        os.replace(path, manifest.folder / name)
        manifest.record(name, sha256)
        return f"{name}  {size / 1e6:.1f} MB in {time.perf_counter() - start:.1f} s"

    pool = concurrent.futures.ThreadPoolExecutor(jobs)
    try:
        running = [pool.submit(one, name) for name in names]
        for number, done in enumerate(concurrent.futures.as_completed(running), 1):
            print(f"[{number}/{len(names)}] {done.result()}", flush=True)
    except KeyboardInterrupt:
        print("fineweb.py: interrupted; what is whole is kept", file=sys.stderr, flush=True)
        shutil.rmtree(staging, ignore_errors=True)
        os._exit(130)  # the pool would wait for its downloads to end
    finally:
        pool.shutdown(cancel_futures=True)
        shutil.rmtree(staging, ignore_errors=True)


@shards.tool
def main(argv=None):
    parser = shards.Parser(__doc__)
    parser.add_argument(
        "count", nargs="?", type=int, default=18, metavar="N", help="train shards (default: 18)"
    )
    parser.add_argument(
        "--set", choices=list(REPOS), default="10B", help="which set (default: 10B)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="default: data/fineweb<set> beside this script"
    )
    parser.add_argument(
        "--revision", help="the hub's commit or branch, for a folder that has no manifest yet"
    )
    parser.add_argument(
        "--retries", type=int, default=5, help="per file, with growing pauses (default: 5)"
    )
    parser.add_argument("--jobs", type=int, default=4, help="files at a time (default: 4)")
    parser.add_argument("--verify", action="store_true", help="hash the files that are there again")
    args = parser.parse_args(argv)
    for name, value, least in (
        ("N", args.count, 0),
        ("--retries", args.retries, 0),
        ("--jobs", args.jobs, 1),
    ):
        if value < least:
            parser.error(f"{name} is {value}, should be at least {least}")
    repo = REPOS[args.set]
    out = args.out or Path(__file__).resolve().parent / f"fineweb{args.set}"

    manifest = Manifest(out, repo)
    if args.revision and manifest.revision not in (None, args.revision):
        raise BadInput(
            f"{out} keeps to revision {manifest.revision}; give another folder with --out"
        )
    wanted = ["fineweb_val_000000.bin"] + [
        f"fineweb_train_{number:06}.bin" for number in range(1, args.count + 1)
    ]
    missing = [name for name in wanted if not manifest.whole(name, args.verify)]
    if missing:
        hub = Hub(repo, args.retries)
        os.makedirs(out, exist_ok=True)
        # a second process on this folder waits, then finds it whole
        with hub.lib.utils.WeakFileLock(out / ".lock"):
            shutil.rmtree(out / STAGING, ignore_errors=True)  # left by a killed process
            manifest = Manifest(out, repo)
            manifest.revision, listed = hub.listing(manifest.revision or args.revision)
            missing = [name for name in missing if not manifest.whole(name, args.verify)]
            fetch_all(hub, manifest, take_stock(manifest, missing, listed, repo), listed, args.jobs)
    tokens = sum(shards.read_header(out / name) for name in wanted[1:])
    print(
        f"{out}: 1 validation and {args.count} train shards, {tokens:,} train tokens "
        f"({'fetched' if missing else 'whole already'}; {repo} at {manifest.revision})"
    )


if __name__ == "__main__":
    sys.exit(main())
