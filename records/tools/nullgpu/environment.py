"""What a preflight runs in: Python with the CUDA build of torch, and the stand-in, in one folder.

Made at the first use and kept. torch and triton come without NVIDIA's libraries (2 GB more), since
the stand-in takes their place: on a real GPU this environment is of no use.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from records.tools.command import BadInput

HERE = Path(__file__).resolve().parent
REQUIREMENTS = HERE.parents[2] / "requirements.txt"
SOURCES = ("counts.c", "runtime.c", "driver.c", "libraries.c")
ROOM = 3.5e9  # bytes of disk that the set-up needs; 2.3 GB stay
LIBRARY = "libcuda.so.1"
HEADERS = ("nvidia-cuda-runtime", "nvidia-cuda-crt")  # packages of CUDA's headers
# Functions of NVIDIA's libraries, by how their names begin
FOREIGN = re.compile(
    r"__cuda|cuda|cublas|cusolver|cusparse|cudnn|cufft|curand|cuFile|cupti|nccl|nvrtc|nvtx|nvshmem|nvJitLink|cu[A-Z]"
)
CHECK = "import torch; torch.ones(4, device='cuda').sum(); print(torch.cuda.get_device_name())"


def say(text: str):
    print(f"preflight: {text}", file=sys.stderr, flush=True)


def cache_folder() -> Path:
    """$SPEEDRUN_PREFLIGHT, or gpt2-speedrun/preflight in the user's cache folder."""
    given = os.environ.get("SPEEDRUN_PREFLIGHT")
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(given or Path(cache, "gpt2-speedrun", "preflight")).resolve()


class Environment:
    """The folder of everything that a preflight needs and leaves behind.

    venv/     Python with torch         lib/      the stand-in
    compiled/ torch's compile caches    runs/     outputs of the latest runs

    release: of torch, in a folder of its own; None: requirements.txt's.
    """

    def __init__(self, home: Path, release: str | None = None):
        requirements = REQUIREMENTS.read_text().split()
        self.torch = next(line for line in requirements if line.startswith("torch=="))
        self.others = [line for line in requirements if line != self.torch]
        if release:
            home, self.torch = home / f"torch-{release}", f"torch=={release}"
        self.home = home
        self.python = home / "venv" / "bin" / "python"
        self.library = home / "lib"
        self.stamp = home / "installed"
        self.packages = Path()  # site-packages, once it is set up
        self.compiler = ""

    def prepare(self):
        """Set up what is missing. Raises BadInput with one line: what is missing and what to do."""
        self.check_machine()
        self.home.mkdir(parents=True, exist_ok=True)
        with locked(self.home / "lock"):
            if not self.installed():
                self.install()
            self.packages = self.find_packages()
            if not self.built():
                self.build()

    def variables(self) -> dict[str, str]:
        """The environment of a process that shall find the stand-in in place of a GPU's driver."""
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith("NULLGPU_")
        }
        paths = [str(self.library), *filter(None, [kept.get("LD_LIBRARY_PATH")])]
        return kept | dict(
            LD_LIBRARY_PATH=":".join(paths),
            LD_PRELOAD=LIBRARY,
            TRITON_LIBCUDA_PATH=str(self.library),
            TRITON_HOME=str(self.home),
            CC=self.compiler,
            PYTHONPYCACHEPREFIX=str(
                self.home / "pycache"
            ),  # fast starts, and no files beside the script
        )

    # ------------------------------------------------------------------------------------ checks

    def check_machine(self):
        system, machine = os.uname().sysname, os.uname().machine
        if (system, machine) != ("Linux", "x86_64"):
            raise BadInput(
                f"this needs Linux x86-64, not {system} {machine}; use a Linux machine or container"
            )
        compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
        if not compiler:
            raise BadInput(
                "no C compiler (cc); install one (Debian, Ubuntu: apt install build-essential)"
            )
        for tool in ("nm", "readelf"):
            if not shutil.which(tool):
                raise BadInput(f"{tool} not found; install binutils")
        if not self.has_headers():
            raise BadInput(
                f"no Python.h for {sys.executable}, which Triton needs; "
                "install Python's headers (Debian, Ubuntu: apt install python3-dev)"
            )
        self.compiler = compiler

    def has_headers(self) -> bool:
        return Path(sysconfig.get_path("include"), "Python.h").exists()

    def check_room(self):
        free = shutil.disk_usage(self.home).free
        if free < ROOM:
            raise BadInput(
                f"{self.home} has {free / 1e9:.1f} GB free, {ROOM / 1e9:.1f} are needed; "
                "free some, or name another folder with SPEEDRUN_PREFLIGHT"
            )

    # ---------------------------------------------------------------------------------- packages

    def wanted(self) -> str:
        """What the stamp says of a complete installation: requirements and Python's version."""
        words = [self.torch, *self.others, *HEADERS, f"python {sys.version}"]
        return "\n".join(words)

    def installed(self) -> bool:
        return (
            self.stamp.exists() and self.stamp.read_text() == self.wanted() and self.python.exists()
        )

    def install(self):
        say("first use: gets the CUDA build of torch, 730 MB to download, 2.3 GB on disk,")
        say(f"into {self.home}; SPEEDRUN_PREFLIGHT=FOLDER puts it elsewhere, deleting it undoes it")
        self.check_room()
        if not self.python.exists():
            say("1 of 3: a virtual environment")
            self.call(
                [sys.executable, "-m", "venv", "--clear", str(self.home / "venv")],
                "install Python's venv module (python3-venv)",
            )
        # New enough to take up a download that breaks off
        self.pip("--quiet", "--upgrade", "pip>=25.1")
        say(f"2 of 3: {self.torch}")
        self.pip("--no-deps", self.torch)
        packages = self.find_packages()
        if not (packages / "torch/lib/libtorch_cuda.so").exists():
            self.pip_remove("torch")
            raise BadInput(
                "pip found a torch without CUDA; set PIP_INDEX_URL to an index with the CUDA build"
            )
        needs = self.needs_of_torch()
        self.pip("--no-deps", *(need for need in needs if need.startswith("triton")))
        cuda = re.search(r"cuda\b.*'(\d+\.\d+)'", (packages / "torch/version.py").read_text())[1]
        self.pip("--quiet", "--no-deps", *(f"{name}=={cuda}.*" for name in HEADERS))
        say("3 of 3: what torch and the script need")
        self.pip("--quiet", "--no-warn-conflicts", *needs, *self.others)
        self.stamp.write_text(self.wanted())

    def pip(self, *words: str):
        """pip install, progress on stderr. The main index alone: others may have a CPU torch."""
        setting = {}
        for name in ("index-url", "cert", "proxy", "trusted-host"):
            value = self.pip_setting(name)
            if value:
                setting["PIP_" + name.replace("-", "_").upper()] = value
        dropped = ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX", "PYTHONPATH")
        kept = {name: value for name, value in os.environ.items() if name not in dropped}
        env = kept | setting | dict(PIP_CONFIG_FILE=os.devnull, PIP_DISABLE_PIP_VERSION_CHECK="1")
        command = [str(self.python), "-m", "pip", "install", *words]
        self.call(command, "check the network and run again, what is complete is kept", env)

    def pip_setting(self, name: str) -> str:
        command = [str(self.python), "-m", "pip", "config", "get", f"global.{name}"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    def pip_remove(self, package: str):
        subprocess.run(
            [str(self.python), "-m", "pip", "uninstall", "--quiet", "--yes", package],
            stdout=sys.stderr,
        )

    def call(self, command, remedy: str, env=None):
        """Run a step of the set-up with its output on stderr. Raises BadInput where it fails."""
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, env=env)
        if done.returncode:
            raise BadInput(f"{' '.join(command[1:5])} failed, see above; {remedy}")

    def find_packages(self) -> Path:
        code = "import sysconfig; print(sysconfig.get_path('purelib'))"
        return Path(
            subprocess.run(
                [str(self.python), "-c", code], capture_output=True, text=True, check=True
            ).stdout.strip()
        )

    def needs_of_torch(self) -> list[str]:
        """torch's own requirements, without NVIDIA's libraries."""
        code = (
            "from importlib.metadata import requires\n"
            "from pip._vendor.packaging.requirements import Requirement\n"
            "for need in map(Requirement, requires('torch')):\n"
            "    if not need.marker or need.marker.evaluate({'extra': ''}):\n"
            "        print(f'{need.name}{need.specifier}')\n"
        )
        done = subprocess.run(
            [str(self.python), "-c", code], capture_output=True, text=True, check=True
        )
        return [line for line in done.stdout.split() if not line.startswith(("nvidia", "cuda"))]

    # ------------------------------------------------------------------------------ the stand-in

    def sources_sha256(self) -> str:
        digest = hashlib.sha256(self.wanted().encode())
        for name in ("nullgpu.h", *SOURCES, "environment.py"):
            digest.update((HERE / name).read_bytes())
        return digest.hexdigest()

    def built(self) -> bool:
        stamp = self.library / "sha256"
        return stamp.exists() and stamp.read_text() == self.sources_sha256()

    def build(self):
        """Compile the stand-in and try it. What torch wants beyond the sources gets empty ones."""
        say("compiles the stand-in for CUDA's libraries")
        shutil.rmtree(self.library, ignore_errors=True)
        self.library.mkdir()
        # torch may have decided on kernels by asking the old one.
        shutil.rmtree(self.home / "compiled", ignore_errors=True)
        torch = sorted((self.packages / "torch/lib").glob("*.so"))
        flags = ["-fPIC", "-O1", "-fvisibility=hidden", "-w"]
        # Those of torch's CUDA: structures differ from release to release
        (include,) = self.packages.glob("nvidia/cu*/include")
        headers = ["-I", str(include)]
        for name in SOURCES:
            self.cc(*flags, *headers, "-c", str(HERE / name), "-o", f"{name}.o")
        written = defined(self.library / f"{name}.o" for name in SOURCES)
        missing = sorted(undefined(torch) - written)
        empty = self.library / "empty.c"
        empty.write_text("".join(f"long {name}(void) {{ return 0; }}\n" for name in missing))
        self.cc("-fPIC", "-w", "-c", "empty.c", "-o", "empty.c.o")
        objects = [f"{name}.o" for name in (*SOURCES, "empty.c")]
        self.cc("-shared", f"-Wl,-soname,{LIBRARY}", "-o", LIBRARY, *objects, "-ldl", "-lpthread")
        for name in needed(torch) - {LIBRARY}:
            (self.library / name).symlink_to(LIBRARY)
        self.try_it()
        (self.library / "sha256").write_text(self.sources_sha256())

    def cc(self, *words: str):
        done = subprocess.run(
            [self.compiler, *words], cwd=self.library, capture_output=True, text=True
        )
        if done.returncode:
            raise BadInput(
                f"{self.compiler} cannot compile the stand-in: {done.stderr.partition(chr(10))[0]}"
            )

    def try_it(self):
        env = self.variables() | dict(LD_BIND_NOW="1")  # every symbol is looked up at once
        done = subprocess.run(
            [str(self.python), "-c", CHECK], env=env, capture_output=True, text=True
        )
        if done.returncode:
            last = (done.stderr.splitlines() or ["?"])[-1]
            raise BadInput(
                f"torch does not run on the stand-in: {last}; delete {self.home} and run again"
            )


# -------------------------------------------------------------------------- symbols of libraries


def symbols(files, *flags: str) -> set[str]:
    """Names that nm prints for these files, without their versions."""
    done = subprocess.run(
        ["nm", *flags, *map(str, files)], capture_output=True, text=True, check=True
    )
    return {
        words[-1].partition("@")[0]
        for words in map(str.split, done.stdout.splitlines())
        if len(words) > 1
    }


def undefined(libraries) -> set[str]:
    """NVIDIA's functions that these shared libraries want."""
    return {name for name in symbols(libraries, "-D", "--undefined-only") if FOREIGN.match(name)}


def defined(objects) -> set[str]:
    return symbols(objects, "-g", "--defined-only")


def needed(libraries) -> set[str]:
    """File names of NVIDIA's libraries that these shared libraries load."""
    done = subprocess.run(
        ["readelf", "-d", *map(str, libraries)], capture_output=True, text=True, check=True
    )
    return set(re.findall(r"NEEDED.*\[(lib(?:cu|nccl|nv)[^\]]*)\]", done.stdout))


@contextlib.contextmanager
def locked(path: Path):
    """One process at a time; a second one waits, and says so."""
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waits for another preflight's set-up")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
