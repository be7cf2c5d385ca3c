"""Between product and library: a job's objects become a folder the pipeline reads.

Knows: both vocabularies, and that nothing fetched is used before its digest was compared.
Refuses to know: processes and leases (`agent`), and what leaves the folder again (`packaging`).
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from app.errors import NotFound, ServiceError, StorageFull
from app.jobs.outcome import JobError, JobPlan, PlannedObject
from app.storage import Storage
from workers.ml.jobspec import JobSpec

Tick = Callable[[], None]
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
LORA_FIELDS = ("rank", "alpha", "dropout")


class Fault(Exception):
    """Work that cannot go on. `retryable`: the same job may succeed later or elsewhere.

    `message` is the customer's; `detail` (paths, names of machines) is for the operator and reaches only
    `work.last_error` and the log.
    """

    def __init__(
        self, code: str, message: str, *, param: str | None = None, retryable: bool = False, detail: str = ""
    ) -> None:
        super().__init__(code, message)
        self.error = JobError(code, message, param)
        self.retryable = retryable
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.error.code}: {self.error.message}" + (f" ({self.detail})" if self.detail else "")


@contextmanager
def faults_named() -> Iterator[None]:
    """Turns what storage and disk raise into faults with a code."""
    try:
        yield
    except StorageFull as error:
        raise Fault("system_storage_full", error.message, retryable=True) from error
    except NotFound as error:
        message = "An object of the job is missing from the store."
        raise Fault("system_object_missing", message, detail=str(error.param)) from error
    except ServiceError as error:
        raise Fault(f"system_{error.code}", error.message, retryable=error.retryable) from error
    except OSError as error:
        if error.errno in FULL:
            raise Fault("system_storage_full", "The worker's disk is full.", retryable=True) from error
        detail = f"{type(error).__name__}: {error}"
        message = "The worker could not read or write its files."
        raise Fault("system_storage_error", message, retryable=True, detail=detail) from error


def lay_out(plan: JobPlan, storage: Storage, folder: Path, *, tick: Tick) -> None:
    """Writes `job.json`, `input/` and `sets/`. `tick` is called between objects and may raise to stop."""
    if not Path(plan.base.path).is_dir():
        raise Fault("system_base_model_missing", f"The base model {plan.base.name!r} is not on this worker's disk.")
    if plan.base.pretrained_path is not None and not Path(plan.base.pretrained_path).is_dir():
        message = f"The weights of {plan.base.name!r} before its alignment are not on this worker's disk."
        raise Fault("system_base_model_missing", message)
    spec = job_spec(plan)
    with faults_named():
        (folder / "out").mkdir(parents=True, exist_ok=True)
        (folder / "job.json").write_text(spec.model_dump_json(indent=2), encoding="utf-8")
    wanted = {folder / "input" / "train.jsonl": plan.training}
    if plan.validation is not None:
        wanted[folder / "input" / "validation.jsonl"] = plan.validation
    wanted |= {folder / "sets" / f"{planned.role}.jsonl": planned for planned in plan.sets}
    for path, planned in wanted.items():
        tick()
        fetch(storage, planned, path)


def fetch(storage: Storage, planned: PlannedObject, path: Path) -> None:
    """One object to one file; other bytes than the row promised are never left behind."""
    with faults_named():
        path.parent.mkdir(parents=True, exist_ok=True)
        stored = storage.get_to_path(planned.storage_key, path)
        if stored.sha256 != planned.sha256:
            path.unlink()
            raise Fault("system_object_altered", f"The object {planned.role!r} is not the one that was stored.")


def job_spec(plan: JobPlan) -> JobSpec:
    """The library's description of the run; what it refuses, the customer hears as their setting's fault."""
    body = plan.policy.body
    document = {
        "base": {
            "name": plan.base.name,
            "path": plan.base.path,
            "digest": plan.base.digest,
            "pretrained": plan.base.pretrained_path,
            "pretrained_digest": plan.base.pretrained_digest,
        },
        "tuning": {
            **{name: value for name, value in plan.hyperparameters.items() if value is not None},
            "seed": plan.seed,
            "base_learning_rate": plan.base.learning_rate,
            "context_limit": plan.base.context_limit,
            **_registered(plan.base.defaults, ("micro_batch_tokens",)),
            "lora": _lora(plan),
        },
        "recovery": plan.policy.recovery,
        "judge": body["judge"],
        "limits": body["limits"],
        **_registered(body, ("max_answer_tokens", "max_task_answer_tokens")),
    }
    try:
        return JobSpec.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise Fault("user_invalid_setting", f"{place}: {first['msg']}.", param=place) from error


def _lora(plan: JobPlan) -> dict[str, Any]:
    """The customer's wish, else the base's default, else the library's."""
    registered = plan.base.defaults.get("lora") or plan.base.defaults
    chosen = _registered(registered, LORA_FIELDS) | _registered(plan.peft, LORA_FIELDS)
    return {**chosen, "target_modules": plan.peft.get("target_modules") or plan.base.target_modules}


def _registered(values: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: values[name] for name in names if values.get(name) is not None}
