"""Make the virtual environment that the Makefile's targets run in, and never surprise anybody with gigabytes.

Knows: which Python will do, where the pinned versions stand, what pip plans before it downloads, and where
a CPU build of torch is to be had.
Refuses to know: anything of the product. Standard library only: it runs before anything is installed, and it
must parse on an old Python to be able to say that it is too old.

    python3 scripts/setup.py --extras dev            (what `make test` calls)

Environment: `TORCH_CPU_INDEX` names the index, or a folder of wheels, that holds CPU builds of torch;
`ALLOW_CUDA=1` accepts the CUDA build on a machine that shows no GPU.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST_PYTHON = (3, 11)
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
GIGABYTE = 1000**3
# The environment measured 2.0 GB with the CPU build of torch; pip unpacks beside the download.
FREE_BYTES_WANTED = 3 * GIGABYTE
# Unpacked CUDA wheels take about this many times their download.
UNPACKED_RATIO = 2.0
STAMP = "theriac-setup.json"

Plan = collections.namedtuple("Plan", "packages")
Package = collections.namedtuple("Package", "name version url requires")


class SetupError(Exception):
    """Setup cannot go on; the message says what to do about it."""


class PipFailed(Exception):
    """pip ended with an error; `output` is the tail of what it said."""

    def __init__(self, output: str) -> None:
        super().__init__(output)
        self.output = output


def read_plan(report: dict) -> Plan:
    """The packages that pip says it would install, from its `--report`."""
    packages = []
    for item in report.get("install", []):
        metadata = item["metadata"]
        requires = [line for line in metadata.get("requires_dist", []) if "extra ==" not in line]
        packages.append(Package(metadata["name"], metadata["version"], item["download_info"]["url"], requires))
    return Plan(packages)


def cuda_packages(plan: Plan) -> list:
    """The packages of a plan that serve only an NVIDIA GPU."""
    return [p for p in plan.packages if re.match(r"(nvidia|cuda|triton)([-_]|$)", p.name.lower())]


def wants_cuda(plan: Plan) -> bool:
    """True if the plan brings `nvidia-*`, or (for a plan without dependencies) asks for it by its metadata."""
    if any(p.name.lower().startswith("nvidia") for p in plan.packages):
        return True
    if not sys.platform.startswith("linux"):
        return False  # only torch's Linux wheels ask for CUDA; their metadata names it for every platform
    torch = [p for p in plan.packages if p.name.lower() == "torch" and "+cpu" not in p.version]
    return any(line.lower().startswith(("nvidia", "cuda")) for p in torch for line in p.requires)


def download_bytes(url: str):
    """Size of what stands at `url` without fetching it, or None where nobody says."""
    if url.startswith("file:"):
        try:
            return os.path.getsize(urllib.request.url2pathname(url.split("://", 1)[1]))
        except OSError:
            return None
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=10) as answer:
            return int(answer.headers["Content-Length"])
    except (OSError, TypeError, ValueError):
        return None


def describe_download(packages: list, size_of=download_bytes) -> str:
    """For example "2.4 GB in 19 packages", honest about sizes that nobody told."""
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        sizes = list(pool.map(size_of, [p.url for p in packages]))
    known = [size for size in sizes if size is not None]
    if not known:
        return "several GB in %d packages (the index told no sizes)" % len(packages)
    text = "%.1f GB in %d packages" % (sum(known) / GIGABYTE, len(packages))
    if len(known) < len(sizes):
        text = "at least %s (%d of unknown size)" % (text, len(sizes) - len(known))
    return text


def torch_requirement(constraints: str) -> str:
    """The pin of torch, for example ``torch==2.13.0``."""
    for line in constraints.splitlines():
        if line.startswith("torch=="):
            return line.strip()
    raise SetupError("constraints.txt pins no torch")


def cpu_index_arguments(index: str) -> list:
    """pip's arguments for an index address or for a folder of wheels; without dependencies on purpose:
    the other packages come from the ordinary index, in their pinned versions."""
    if os.path.isdir(index):
        return ["--no-deps", "--no-index", "--find-links", index]
    return ["--no-deps", "--index-url", index]


def choose_torch(pip, requirement: str, *, gpu: bool, allow_cuda: bool, cpu_index: str, size_of=download_bytes) -> list:
    """pip's arguments that install torch without surprise, decided from plans alone: nothing is downloaded here."""
    plan = pip.plan([requirement])
    if not plan.packages or not wants_cuda(plan):
        return [requirement]
    if gpu:
        say("an NVIDIA GPU is here: taking the CUDA build of %s" % requirement)
        return [requirement]
    if allow_cuda:
        say("ALLOW_CUDA=1: taking the CUDA build of %s, %s" % (requirement, describe_download(plan.packages, size_of)))
        return [requirement]
    say("the plan for %s holds CUDA packages and no GPU is here: asking for the CPU build" % requirement)
    arguments = cpu_index_arguments(cpu_index)
    try:
        cpu_plan = pip.plan([*arguments, requirement])
        reason = "it offers only a CUDA build" if wants_cuda(cpu_plan) or not cpu_plan.packages else ""
    except PipFailed as failed:
        reason = explain(failed.output)
    if not reason:
        return [*arguments, requirement]
    raise SetupError(
        "%s for this Python comes with CUDA: %s to download, and this machine shows no NVIDIA GPU.\n"
        "The CPU build was not to be had from %s: %s.\n"
        "Nothing was downloaded. Either name an index or a folder that has the CPU build,\n"
        "    TORCH_CPU_INDEX=<address or folder> make ...\n"
        "or accept the download:\n"
        "    ALLOW_CUDA=1 make ..." % (requirement, describe_download(plan.packages, size_of), cpu_index, reason)
    )


UNREACHABLE = "|".join(
    [
        "NewConnectionError",
        "Failed to (establish|resolve)",
        "Name or service not known",
        "Network is unreachable",
        "ConnectTimeout",
        "Connection refused",
        "ProxyError",
        "Read timed out",
    ]
)
CAUSES = [
    (r"No space left on device|Errno 28", "the disk is full"),
    (
        UNREACHABLE,
        "the package index cannot be reached (no network, or a proxy is needed)",
    ),
    (r"CERTIFICATE_VERIFY_FAILED|SSLError", "the package index's certificate is not trusted here (see pip's --cert)"),
    (r"No matching distribution|Could not find a version", "the index has no build of it for this Python and platform"),
    (r"Permission denied|Errno 13", "a folder cannot be written to"),
    (r"403|401|Forbidden", "the index refused the request"),
]


def explain(output: str) -> str:
    """The cause behind pip's words, in one line. Causes stand in the order in which they hide each other."""
    for pattern, cause in CAUSES:
        if re.search(pattern, output):
            return cause
    lines = [line for line in output.strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else "pip failed without a word"


class Pip:
    """pip of one environment."""

    def __init__(self, python: Path, constraints: Path) -> None:
        self.command = [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input"]
        self.constraints = ["-c", str(constraints)]

    def plan(self, arguments: list) -> Plan:
        """What `pip install` would do. Current pip reads only metadata for this."""
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder, "report.json")
            command = ["install", "--dry-run", "--quiet", "--report", str(report), *self.constraints, *arguments]
            done = subprocess.run([*self.command, *command], capture_output=True, text=True)
            if done.returncode != 0:
                raise PipFailed(done.stderr + done.stdout)
            return read_plan(json.loads(report.read_text()))

    def install(self, arguments: list) -> None:
        """Install, showing the downloads that take time and nothing else of pip's talk."""
        command = [*self.command, "install", "--progress-bar", "off", *self.constraints, *arguments]
        tail = collections.deque(maxlen=60)  # type: collections.deque[str]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for line in child.stdout or []:
            tail.append(line)
            if re.match(r"\s*(Downloading .* [MG]B\)|Installing collected|ERROR)", line):
                say("  " + (line.strip() if len(line) < 110 else line.strip()[:107] + "..."))
        if child.wait() != 0:
            raise PipFailed("".join(tail))


def say(text: str) -> None:
    sys.stdout.write("setup: %s\n" % text)
    sys.stdout.flush()


def has_gpu() -> bool:
    """True if an NVIDIA driver shows at least one device."""
    if not shutil.which("nvidia-smi"):
        return False
    try:
        shown = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return False
    return shown.returncode == 0 and "GPU 0" in shown.stdout


def require_python(version: tuple) -> None:
    if tuple(version[:2]) < OLDEST_PYTHON:
        raise SetupError(
            "Python %d.%d is too old: Theriac needs %d.%d or newer.\n"
            "Name one that is installed, for example:  make PYTHON=python3.12 ..."
            % (version[0], version[1], OLDEST_PYTHON[0], OLDEST_PYTHON[1])
        )


def require_disk(folder: Path, wanted: int, usage=shutil.disk_usage) -> None:
    free = usage(str(folder)).free
    if free < wanted:
        raise SetupError(
            "%s has %.1f GB free and the environment needs about %.1f GB. Make room, or clone to a bigger disk."
            % (folder, free / GIGABYTE, wanted / GIGABYTE)
        )


def fingerprint(root: Path) -> str:
    """Changes when an installed package might: pins, declared dependencies, Python."""
    import tomllib  # Python 3.11; require_python has been asked before

    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    parts = [(root / "constraints.txt").read_text(), json.dumps(project, sort_keys=True), sys.version, str(root)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def read_stamp(venv: Path) -> dict:
    try:
        return json.loads((venv / STAMP).read_text())
    except (OSError, ValueError):
        return {}


def up_to_date(stamp: dict, print_: str, extras: set) -> bool:
    """True if what the stamp records covers what is asked for: extras only ever grow."""
    return stamp.get("fingerprint") == print_ and extras <= set(stamp.get("extras", []))


def make_venv(venv: Path) -> Path:
    """The environment's interpreter; a folder left half made by an interruption is made anew."""
    python = venv / "bin" / "python"
    ask = [str(python), "-c", "import sys, pip; print(sys.version)"]
    if python.exists():
        answer = subprocess.run(ask, capture_output=True, text=True)
        if answer.returncode == 0 and answer.stdout.strip() == sys.version.strip():
            return python
        say("%s is broken or belongs to another Python: making it anew" % venv)
    else:
        say("making %s with Python %s" % (venv, sys.version.split()[0]))
    made = subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], capture_output=True, text=True)
    if made.returncode != 0:
        said = made.stdout + made.stderr
        if "ensurepip" in said:
            raise SetupError("this Python has no venv module; on Debian and Ubuntu: apt install python3-venv")
        raise SetupError("making %s failed: %s" % (venv, explain(said)))
    return python


def install(venv: Path, extras: set) -> None:
    started = time.monotonic()
    constraints = ROOT / "constraints.txt"
    python = make_venv(venv)
    pip = Pip(python, constraints)
    say("1/3 pip and setuptools in their pinned versions")
    # A current pip plans from metadata alone; older ones download every wheel to make a plan.
    pip.install(["--upgrade", "pip", "setuptools"])
    if extras & {"worker", "demo", "dev", "bench"}:
        requirement = torch_requirement(constraints.read_text())
        say("2/3 %s: asking pip what it would download" % requirement)
        arguments = choose_torch(
            pip,
            requirement,
            gpu=has_gpu(),
            allow_cuda=os.environ.get("ALLOW_CUDA") == "1",
            cpu_index=os.environ.get("TORCH_CPU_INDEX") or TORCH_CPU_INDEX,
        )
        pip.install(arguments)
    say("3/3 theriac[%s] and its pinned dependencies" % ",".join(sorted(extras)))
    pip.install(["--no-build-isolation", "--editable", "%s[%s]" % (ROOT, ",".join(sorted(extras)))])
    stamp = {"fingerprint": fingerprint(ROOT), "extras": sorted(extras)}
    (venv / STAMP).write_text(json.dumps(stamp, indent=1) + "\n")
    say("ready after %.0f s" % (time.monotonic() - started))


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description="Make Theriac's virtual environment from the pinned versions.")
    parser.add_argument("--extras", default="demo", help="comma-separated extras of pyproject.toml (default: demo)")
    parser.add_argument("--venv", default=str(ROOT / ".venv"), help="where the environment lives (default: .venv)")
    options = parser.parse_args(argv)
    venv, extras = Path(options.venv).absolute(), {e for e in options.extras.split(",") if e}
    try:
        require_python(tuple(sys.version_info))
        # Two `make` at once would install into the same folder; the second waits, then finds all done.
        lock = os.open(str(ROOT), os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        stamp = read_stamp(venv)
        if up_to_date(stamp, fingerprint(ROOT), extras) and (venv / "bin" / "python").exists():
            return 0
        if not (venv / STAMP).exists():
            require_disk(venv.parent, FREE_BYTES_WANTED)
        known = stamp.get("extras", []) if stamp else []
        install(venv, extras | set(known))
    except PipFailed as failed:
        sys.stderr.write(
            "%s\nsetup: stopped: %s. Nothing is lost: run it again.\n" % (failed.output, explain(failed.output))
        )
        return 1
    except SetupError as error:
        sys.stderr.write("setup: stopped: %s\n" % error)
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\nsetup: interrupted; run it again to go on\n")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
