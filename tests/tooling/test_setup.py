"""Setup looks before it downloads: decisions over recorded plans, and its words when it has to stop."""

import json
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from scripts import setup

ROOT = Path(__file__).resolve().parents[2]
PLANS = Path(__file__).parent / "plans"
TORCH = "torch==2.13.0"
CPU_INDEX = "https://cpu.example/whl"


def recorded(name: str) -> setup.Plan:
    return setup.read_plan(json.loads((PLANS / f"{name}.json").read_text()))


UNREACHABLE = setup.PipFailed((PLANS / "unreachable.txt").read_text())
# What the CPU index answers when asked without dependencies: torch alone.
CPU_ALONE = setup.Plan([package for package in recorded("cpu").packages if package.name == "torch"])
CUDA_ALONE = setup.Plan([package for package in recorded("cuda").packages if package.name == "torch"])


class PlayedBackPip:
    """Answers plans from recordings and notes what it was asked."""

    def __init__(self, *answers) -> None:
        self.answers = list(answers)
        self.asked: list[list[str]] = []

    def plan(self, arguments):
        self.asked.append(arguments)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def choose(pip, *, gpu=False, allow_cuda=False, cpu_index=CPU_INDEX, size_of=lambda url: 100_000_000):
    return setup.choose_torch(pip, TORCH, gpu=gpu, allow_cuda=allow_cuda, cpu_index=cpu_index, size_of=size_of)


def test_a_plan_without_cuda_is_taken_as_it_is() -> None:
    pip = PlayedBackPip(recorded("cpu"))
    assert choose(pip) == [TORCH]
    assert pip.asked == [[TORCH]]


def test_an_installed_torch_asks_for_nothing() -> None:
    assert choose(PlayedBackPip(setup.Plan([]))) == [TORCH]


def test_a_cuda_plan_without_a_gpu_takes_torch_alone_from_the_cpu_index() -> None:
    pip = PlayedBackPip(recorded("cuda"), CPU_ALONE)
    chosen = choose(pip)
    assert chosen == ["--no-deps", "--index-url", CPU_INDEX, TORCH]
    assert pip.asked[1] == chosen, "what is installed is what was planned"


def test_a_folder_of_wheels_may_stand_for_the_cpu_index(tmp_path: Path) -> None:
    pip = PlayedBackPip(recorded("cuda"), CPU_ALONE)
    assert choose(pip, cpu_index=str(tmp_path)) == ["--no-deps", "--no-index", "--find-links", str(tmp_path), TORCH]


@pytest.mark.parametrize("machine", [{"gpu": True}, {"allow_cuda": True}])
def test_cuda_is_taken_with_a_gpu_or_when_allowed(machine) -> None:
    pip = PlayedBackPip(recorded("cuda"))
    assert choose(pip, **machine) == [TORCH]
    assert len(pip.asked) == 1


def test_an_unreachable_cpu_index_stops_setup_and_says_how_many_gigabytes_it_would_take() -> None:
    with pytest.raises(setup.SetupError) as stopped:
        choose(PlayedBackPip(recorded("cuda"), UNREACHABLE))
    said = str(stopped.value)
    assert "2.9 GB in 29 packages" in said
    assert "the package index cannot be reached" in said
    assert CPU_INDEX in said
    assert "ALLOW_CUDA=1" in said
    assert "TORCH_CPU_INDEX=" in said


@pytest.mark.parametrize("answer", [CUDA_ALONE, setup.Plan([])])
def test_a_cpu_index_that_offers_cuda_or_nothing_is_not_believed(answer) -> None:
    with pytest.raises(setup.SetupError, match="only a CUDA build"):
        choose(PlayedBackPip(recorded("cuda"), answer))


def test_unknown_sizes_are_admitted() -> None:
    packages = recorded("cuda").packages
    assert setup.describe_download(packages, lambda url: None).startswith("several GB in 29 packages")
    some = setup.describe_download(packages, lambda url: 10**9 if "nvidia_cublas" in url else None)
    assert some == "at least 1.0 GB in 29 packages (28 of unknown size)"


def test_the_size_of_a_local_wheel_is_read_from_disk(tmp_path: Path) -> None:
    wheel = tmp_path / "a+b.whl"
    wheel.write_bytes(b"x" * 123)
    assert setup.download_bytes(f"file://{tmp_path}/a%2Bb.whl") == 123
    assert setup.download_bytes(f"file://{tmp_path}/none.whl") is None


@pytest.mark.parametrize(
    ("output", "cause"),
    [
        ("OSError: [Errno 28] No space left on device", "the disk is full"),
        (UNREACHABLE.output, "cannot be reached"),
        ("ERROR: No matching distribution found for torch==2.13.0", "no build of it for this Python"),
        ("SSLError(SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY_FAILED]", "not trusted"),
        ("something new\nERROR: unheard of", "ERROR: unheard of"),
        ("", "without a word"),
    ],
)
def test_pips_words_become_a_cause(output: str, cause: str) -> None:
    assert cause in setup.explain(output)


def test_an_old_python_is_refused_with_the_way_out() -> None:
    setup.require_python((3, 11, 0))
    with pytest.raises(setup.SetupError, match=r"3\.10 is too old.*\n.*PYTHON="):
        setup.require_python((3, 10, 13))


def test_a_full_disk_is_said_before_anything_is_downloaded(tmp_path: Path) -> None:
    usage = namedtuple("usage", "free")
    setup.require_disk(tmp_path, 10**9, lambda folder: usage(2 * 10**9))
    with pytest.raises(setup.SetupError, match=r"0\.5 GB free .* 1\.0 GB"):
        setup.require_disk(tmp_path, 10**9, lambda folder: usage(5 * 10**8))


def test_extras_grow_and_pins_invalidate() -> None:
    stamp = {"fingerprint": "a", "extras": ["demo", "dev"]}
    assert setup.up_to_date(stamp, "a", {"demo"})
    assert not setup.up_to_date(stamp, "a", {"bench"})
    assert not setup.up_to_date(stamp, "b", {"demo"})
    assert not setup.up_to_date({}, "a", {"demo"})


def test_the_fingerprint_follows_pins_and_dependencies_but_not_lint_settings(tmp_path: Path) -> None:
    project = '[project]\nname = "x"\ndependencies = ["a"]\n'
    (tmp_path / "pyproject.toml").write_text(project)
    (tmp_path / "constraints.txt").write_text("a==1\n")
    first = setup.fingerprint(tmp_path)
    (tmp_path / "pyproject.toml").write_text(project + "[tool.ruff]\nline-length = 1\n")
    assert setup.fingerprint(tmp_path) == first
    (tmp_path / "pyproject.toml").write_text(project.replace('"a"', '"a", "b"'))
    changed = setup.fingerprint(tmp_path)
    assert changed != first
    (tmp_path / "constraints.txt").write_text("a==2\n")
    assert setup.fingerprint(tmp_path) not in {first, changed}


def test_a_second_run_finds_nothing_to_do(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    stamp = {"fingerprint": setup.fingerprint(ROOT), "extras": ["demo", "dev"]}
    (tmp_path / setup.STAMP).write_text(json.dumps(stamp))
    command = [sys.executable, "scripts/setup.py", "--venv", str(tmp_path), "--extras", "dev"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_half_made_environment_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(setup, "say", said.append)
    (tmp_path / "bin").mkdir()
    broken = tmp_path / "bin" / "python"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    python = setup.make_venv(tmp_path)
    assert subprocess.run([str(python), "-m", "pip", "--version"], capture_output=True).returncode == 0
    assert "broken" in said[0]
    assert setup.make_venv(tmp_path) == python
    assert len(said) == 1, "a sound environment is left alone"


def test_every_declared_dependency_is_pinned() -> None:
    import tomllib

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, version = line.split("==")
            pins[canonicalize_name(name)] = version
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    for requirement in (Requirement(line) for group in lists for line in group):
        if requirement.name != "theriac":
            assert pins[canonicalize_name(requirement.name)] in requirement.specifier, requirement
    assert setup.torch_requirement((ROOT / "constraints.txt").read_text()) == TORCH
