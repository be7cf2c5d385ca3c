"""From a finished run's folder to stored objects: the bundle, its manifest, the safety report.

Knows: that the packaged files must be byte for byte those the gate judged; that keys carry job and fence, so that a
zombie's objects lie beside and never over the current ones; that a row makes objects current, not their upload.
Refuses to know: whether they become current (`app.jobs.service.settle`).
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from app.jobs.outcome import JobOutcome, JobPlan
from app.kit.clock import now
from app.kit.ids import new_id
from app.releases import manifest as manifests
from app.storage import Storage, StoredObject
from app.tables.safety import Verdict
from workers.bridge import Fault, Tick, faults_named
from workers.ml.digests import digest_folder
from workers.ml.errors import IntegrityError

SAFETY_REPORT = "safety_report.json"
VERSIONS_OF = ("theriac", "torch", "transformers", "peft", "safetensors", "tokenizers")


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """The folder of a run that ended with a result line, and that line."""

    folder: Path
    result: Mapping[str, Any]
    environment: Mapping[str, str]

    def inside(self, name: str) -> Path:
        """A path the result names; one that leaves the folder is a protocol fault."""
        path = (self.folder / str(self.result.get(name, ""))).resolve()
        if not path.is_relative_to(self.folder.resolve()) or not path.exists() or path == self.folder.resolve():
            raise Fault("system_trainer_protocol", f"The run's result names no {name} inside its folder.")
        return path


def package(plan: JobPlan, run: FinishedRun, storage: Storage, *, fence: int, tick: Tick) -> JobOutcome:
    """Checks, describes and stores the candidate; raises `Fault` when anything does not fit."""
    verdict = _verdict(run)
    report = _read_json(run.inside("report"))
    candidate = run.inside("candidate")
    candidate_digest = _checked_digest(candidate, run)
    # Only what a gate passed lies where releases are served from; everything else waits in quarantine.
    area = "releases" if verdict is Verdict.PASS else "quarantine"
    prefix = f"{area}/{plan.job_id}/{fence}"
    report_path = run.folder / SAFETY_REPORT
    beside = {SAFETY_REPORT: report_path, **_pictures(run)}
    document = safety_report(plan, run, report, candidate_digest)
    with faults_named():
        report_path.write_text(json.dumps(document, indent=2, ensure_ascii=False), encoding="utf-8")
        manifest = manifests.build(candidate, beside, _facts(plan, run))
        if manifest["candidate_digest"] != candidate_digest:
            raise Fault("system_candidate_altered", "The candidate changed while it was packaged.")
        for entry in manifest["files"]:
            tick()
            source = beside.get(entry["path"], candidate / entry["path"])
            stored = storage.put_file(f"{prefix}/{entry['path']}", source)
            if stored.sha256 != entry["sha256"]:
                raise Fault("system_candidate_altered", f"{entry['path']} changed while it was stored.")
        storage.put_bytes(f"{prefix}/{manifests.MANIFEST_NAME}", json.dumps(manifest, indent=1).encode())
        result_csv = _store_result_csv(plan, run, storage, fence)
    return JobOutcome(
        verdict=verdict,
        report=report,
        candidate_digest=candidate_digest,
        bundle_digest=manifest["bundle_digest"],
        manifest=manifest,
        storage_prefix=prefix,
        report_key=f"{prefix}/{SAFETY_REPORT}",
        result_csv=result_csv,
        trained_tokens=_count(run.result.get("trained_tokens")),
    )


def safety_report(plan: JobPlan, run: FinishedRun, report: Mapping[str, Any], candidate_digest: str) -> dict[str, Any]:
    """The run's own report, and whose it is. What the gate measured stands in it unchanged."""
    return {
        **report,
        "object": "safety.report",
        "id": new_id("srep_"),
        "created_at": int(now()),
        "job_id": plan.job_id,
        "model": plan.model_id,
        "candidate_digest": candidate_digest,
        "base_model": {"name": plan.base.name, "digest": plan.base.digest},
        "policy": {
            "id": plan.policy.id,
            "name": plan.policy.name,
            "version": plan.policy.version,
            "digest": plan.policy.digest,
        },
        "data": _data_digests(plan),
        "environment": dict(run.environment),
        "versions": versions(),
    }


def _pictures(run: FinishedRun) -> dict[str, Path]:
    """What the run drew of its search, by file name."""
    return {path.name: path for path in sorted(run.inside("report").parent.glob("*.svg"))}


def versions() -> dict[str, str]:
    """Of what can change a byte of the result, read from installed metadata: nothing is imported."""
    found = {"python": platform.python_version()}
    for name in VERSIONS_OF:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _verdict(run: FinishedRun) -> Verdict:
    try:
        return Verdict(str(run.result.get("verdict")))
    except ValueError:
        raise Fault("system_trainer_protocol", "The run ended with a verdict that nobody knows.") from None


def _checked_digest(candidate: Path, run: FinishedRun) -> str:
    """What lies on disk now must be what the gate said it judged."""
    try:
        found = digest_folder(candidate).digest
    except IntegrityError as error:
        raise Fault("system_candidate_altered", error.message) from error
    if found != run.result.get("candidate_digest"):
        raise Fault("system_candidate_altered", "The candidate on disk is not the one the gate judged.")
    return found


def _facts(plan: JobPlan, run: FinishedRun) -> dict[str, Any]:
    recovery = run.result.get("recovery")
    return {
        "model": plan.model_id,
        "job_id": plan.job_id,
        "created_at": int(now()),
        "base_model": {"name": plan.base.name, "digest": plan.base.digest},
        "data": _data_digests(plan),
        "policy": {"name": plan.policy.name, "version": plan.policy.version, "digest": plan.policy.digest},
        "seed": plan.seed,
        "recovery": recovery if isinstance(recovery, dict) else None,
        "versions": versions(),
    }


def _data_digests(plan: JobPlan) -> dict[str, Any]:
    return {
        "training": plan.training.sha256,
        "validation": plan.validation.sha256 if plan.validation else None,
        "sets": {planned.role: planned.sha256 for planned in plan.sets},
    }


def _store_result_csv(plan: JobPlan, run: FinishedRun, storage: Storage, fence: int) -> StoredObject | None:
    path = run.folder / "out" / "train" / "result.csv"
    return storage.put_file(f"results/{plan.job_id}/{fence}/step_metrics.csv", path) if path.is_file() else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Fault("system_trainer_protocol", f"The run's {path.name} cannot be read.") from error
    if not isinstance(value, dict):
        raise Fault("system_trainer_protocol", f"The run's {path.name} is not an object.")
    return value


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
