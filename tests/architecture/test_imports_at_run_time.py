"""What static analysis cannot see: packages that import heavy things on the way, and names that lead nowhere."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from workers.ml import recovery
from workers.ml.recovery.run import load_method
from workers.ml.recovery.specs import default_specs

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "peft", "accelerate", "datasets", "safetensors")
WEB = ("fastapi", "starlette")


def modules_after_import(module: str) -> set[str]:
    code = f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("module", ["app.main", "app.cli"])
def test_the_gateway_starts_without_torch(module: str) -> None:
    assert modules_after_import(module) & set(HEAVY) == set()


@pytest.mark.parametrize("module", ["workers.agent", "workers.side", "workers.celery_app", "workers.supervisor"])
def test_a_supervising_process_starts_without_torch_and_without_the_web_framework(module: str) -> None:
    assert modules_after_import(module) & {*HEAVY, *WEB} == set()


@pytest.mark.parametrize(
    "module",
    [
        "workers.ml.types",
        "workers.ml.gate",
        "workers.ml.recovery",
        "workers.ml.recovery.specs",
        "workers.ml.provider_sets",
    ],
)
def test_the_library_opens_its_torch_free_doors(module: str) -> None:
    assert modules_after_import(module) & set(HEAVY) == set()


def test_every_package_of_the_library_has_an_empty_init_but_the_one_with_lazy_doors() -> None:
    inits = sorted((ROOT / "workers").rglob("__init__.py"))
    assert len(inits) > 5
    filled = [str(file.relative_to(ROOT)) for file in inits if file.read_text().strip()]
    assert filled == ["workers/ml/recovery/__init__.py"]


def test_every_lazy_door_of_recovery_opens() -> None:
    assert all(getattr(recovery, name) is not None for name in recovery.__all__)
    assert set(dir(recovery)) == set(recovery.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        recovery.nothing  # noqa: B018


def test_every_package_of_the_library_has_an_init() -> None:
    folders = {file.parent for file in (ROOT / "workers").rglob("*.py")}
    assert [str(folder.relative_to(ROOT)) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


@pytest.mark.parametrize("spec", default_specs(controls=True, research=True), ids=lambda spec: spec.method)
def test_every_registered_method_leads_to_a_function(spec) -> None:
    assert callable(load_method(type(spec)))
