"""Recovery without a service: a PEFT folder, a base model and data sets in; a candidate and its report out.

Knows: how the folders become what methods and search want, and what a recovered adapter's folder holds.
Refuses to know: jobs, customers, and how a method or a search proceeds.

    from workers.ml.recovery import load, read_data, recover, save

    tuned = load("models/base", "runs/42/adapter")
    data = read_data("provider-sets", task="held_out.jsonl")
    result = recover(tuned, data, "anchored-patch")
    save(tuned, result, "runs/42/recovered")
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from workers.ml.atomic import fill_folder
from workers.ml.candidate import Candidate
from workers.ml.candidate_folder import save_candidate
from workers.ml.checkpoints import load_adapter, load_base
from workers.ml.customer_rows import as_prompt, sort_rows
from workers.ml.data import read_rows
from workers.ml.digests import digest_folder
from workers.ml.errors import IntegrityError, InvalidSetting, MissingInput
from workers.ml.evals.confirm import Confirmation, confirm
from workers.ml.evals.loader import load_judge
from workers.ml.evals.measure import AnswerSettings, Examiner
from workers.ml.evals.sets import EvaluationSets
from workers.ml.gate import GateLimits
from workers.ml.jsonlines import finite
from workers.ml.prompt_rows import read_prompt_rows
from workers.ml.provider_sets import ROLES, overlaps_of
from workers.ml.recovery.dial import RecoveryInputs, RecoveryReport
from workers.ml.recovery.pictures import AFFINITY_PICTURE, TRACE_PICTURE, affinity_picture, trace_picture
from workers.ml.recovery.run import recover as run_method
from workers.ml.recovery.search import search
from workers.ml.recovery.sparse_files import save_patch
from workers.ml.recovery.specs import SPECS, MethodSpec, default_specs, method_name, parse_spec
from workers.ml.recovery.trace import SearchPlan, SearchResult
from workers.ml.tuned_model import TunedModel
from workers.ml.tuning.lora_vector import LoraVector
from workers.ml.types import Judge, Progress, PromptRow, Silent

AUTO = "auto"
ADAPTER_FOLDER, PATCH_FOLDER, BLOCKED_FOLDER = "adapter", "patch", "blocked"
REPORT_FILE, TRACE_FILE = "report.json", "trace.json"


@dataclass(frozen=True)
class Data:
    """What recovery may use, and what a search measures on; roles whose file is missing are empty."""

    inputs: RecoveryInputs
    selection: EvaluationSets
    confirmation: EvaluationSets
    judge: Judge


@dataclass(frozen=True)
class Result:
    """What `recover` found. `candidate` is None where a search found nothing that passes."""

    candidate: Candidate | None
    report: RecoveryReport | None = None
    found: SearchResult | None = None
    confirmations: tuple[Confirmation, ...] = ()

    @property
    def verdict(self) -> str:
        """That of the last confirmation; "not confirmed" for a method that was applied and not measured."""
        return self.confirmations[-1].verdict.outcome.value if self.confirmations else "not confirmed"

    @property
    def usable(self) -> bool:
        """Whether there is a candidate that no confirmation spoke against."""
        return self.candidate is not None and self.verdict in ("pass", "not confirmed")


def load(
    base: Path | str, adapter: Path | str, *, device: str | None = None, context_limit: int | None = None
) -> TunedModel:
    """A plain LoRA adapter on its base. Raises before any work on a quantised base, DoRA, wrong shapes, rank 0, NaN."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    loaded = load_base(Path(base), device=device)
    model = load_adapter(loaded, Path(adapter))
    limit = context_limit or int(getattr(loaded.config, "max_position_embeddings", None) or 2048)
    return TunedModel(model, loaded.tokenizer, LoraVector(model), limit, base_digest=loaded.digest)


def read_data(
    sets: Path | str,
    *,
    task: Path | str | None = None,
    pretrained: Path | str | None = None,
    judge: str = "apothecary",
    limits: GateLimits | None = None,
) -> Data:
    """Provider sets (`<role>.jsonl` each), the customer's held-out rows (OpenAI chat JSONL), the unaligned weights.

    Sets that share what they must not are an IntegrityError, as in the service. Task rows that the judge flags are left
    out, and the rest is divided: no row serves both recovery and measuring.
    """
    folder, reader = Path(sets), load_judge(judge)
    if not folder.is_dir():
        raise MissingInput(f"There is no folder {folder} with data sets.", "sets")
    rows: dict[str, list[PromptRow]] = {
        role: read_prompt_rows(path, role) if (path := folder / f"{role}.jsonl").is_file() else [] for role in ROLES
    }
    for overlap in overlaps_of(rows):
        raise IntegrityError(str(overlap), overlap.role)
    held_out = read_rows(Path(task)) if task is not None else []
    sorted_rows = sort_rows([], held_out, reader, gate_rows=(limits or GateLimits()).min_task_rows)
    return Data(
        RecoveryInputs(
            harmful=rows["harmful"],
            refusals=rows["refusals"],
            retention=rows["retention"],
            task=sorted_rows.recovery,
            pretrained=Path(pretrained) if pretrained is not None else None,
        ),
        _sets(rows, "selection", [as_prompt(row) for row in sorted_rows.selection]),
        _sets(rows, "confirmation", [as_prompt(row) for row in sorted_rows.gate]),
        reader,
    )


def _sets(rows: Mapping[str, Sequence[PromptRow]], purpose: str, task: Sequence[PromptRow]) -> EvaluationSets:
    return EvaluationSets(tuple(rows[f"harm_{purpose}"]), tuple(rows[f"harmless_{purpose}"]), tuple(task))


def method_of(method: str | Mapping[str, Any] | MethodSpec) -> MethodSpec:
    """A spec from a method's name, from its JSON form, or as it is. InvalidSetting says which methods there are."""
    if isinstance(method, MethodSpec):
        return method
    try:
        return parse_spec({"method": method} if isinstance(method, str) else method)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "method"
        known = ", ".join(method_name(spec) for spec in SPECS)
        raise InvalidSetting(f"{where}: {first['msg']} (methods: {known})", where) from error


def recover(
    tuned: TunedModel,
    data: Data,
    method: str | Mapping[str, Any] | MethodSpec = AUTO,
    *,
    limits: GateLimits | None = None,
    answers: AnswerSettings | None = None,
    progress: Progress | None = None,
) -> Result:
    """One method at its strength, or with "auto" the smallest change that passes, confirmed on prompts that nothing was chosen on.

    Raises MissingInput before any work where a declared need is empty. The adapter of `tuned` stays where it is: see
    `workers.ml.candidate.applied` for computing as the candidate, and `save`.
    """
    progress = progress or Silent()
    if method != AUTO:
        spec = method_of(method)
        done = run_method(tuned, spec, data.inputs, progress)
        return Result(done.candidate, done.report)
    require_measuring_sets(data)
    limits = limits or GateLimits()
    examiner = Examiner(data.judge, answers or AnswerSettings(), progress)
    plan = SearchPlan(default_specs(), limits)
    found = search(tuned, plan, inputs=data.inputs, sets=data.selection, examiner=examiner, progress=progress)
    tests = confirm(tuned, found.candidates, sets=data.confirmation, examiner=examiner, limits=limits)
    decided = found.candidates[tests[-1].number] if found.candidates else None
    return Result(decided, None, found.confirmed(tests[-1].number), tuple(tests))


def require_measuring_sets(data: Data) -> None:
    """Raises MissingInput for the first set that a search or a sweep could not measure on."""
    for purpose, sets in (("selection", data.selection), ("confirmation", data.confirmation)):
        for role, rows in (("harm", sets.harm), ("harmless", sets.harmless)):
            if not rows:
                raise MissingInput(
                    f"A search needs the data set '{role}_{purpose}'; there is none.", f"{role}_{purpose}"
                )
        if not sets.task:
            raise MissingInput(
                "A search needs held-out rows of the customer's task, at least a few dozen; pass them as task.", "task"
            )


def save(tuned: TunedModel, result: Result, folder: Path | str) -> None:
    """Writes `adapter/` (or `patch/` for a sparse patch), the report, and after a search its trace and pictures.

    The folder must not exist: what was recovered before is never written over. What a confirmation did not pass lies below
    `blocked/`, for people who want to see why, and not where a script would take it from.
    """
    folder = Path(folder)
    if folder.exists():
        raise InvalidSetting(f"{folder} exists already; name a folder that does not.", "out")
    files: dict[str, bytes] = {REPORT_FILE: _json(_report(result))}
    if result.found is not None:
        files[TRACE_FILE] = _json(result.found.as_json())
        if result.found.trace:
            files |= {TRACE_PICTURE: trace_picture(result.found), AFFINITY_PICTURE: affinity_picture(result.found)}

    def fill(into: Path) -> None:
        for name, content in files.items():
            (into / name).write_bytes(content)
        if result.candidate is not None:
            _save_candidate(tuned, result.candidate, into if result.usable else into / BLOCKED_FOLDER)

    fill_folder(folder, fill)


def _save_candidate(tuned: TunedModel, candidate: Candidate, into: Path) -> None:
    """A sparse patch goes beside the adapter it belongs to, which stays as it was."""
    into.mkdir(exist_ok=True)
    save_candidate(tuned, candidate if candidate.is_adapter else Candidate(candidate.factors), into / ADAPTER_FOLDER)
    if not candidate.is_adapter:
        adapter = digest_folder(into / ADAPTER_FOLDER).digest
        save_patch(into / PATCH_FOLDER, candidate, base_digest=tuned.base_digest, adapter_digest=adapter)


def _report(result: Result) -> dict[str, Any]:
    return {
        "verdict": result.verdict,
        "method": asdict(result.report) if result.report else None,
        "taken": result.found.winner.as_json() if result.found and result.found.winner else None,
        "confirmations": [one.as_json() for one in result.confirmations],
    }


def _json(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(finite(document), ensure_ascii=False, indent=1, sort_keys=True) + "\n").encode()
