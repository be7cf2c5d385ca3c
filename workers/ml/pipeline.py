"""One run from rows to a verdict: a folder in, a folder out.

Knows: the order training, recovering, gating; what each stage reads and leaves; and that the gate measures the
bytes it finds on disk, never what training or recovery still hold in memory.
Refuses to know: jobs, customers, storage, and what happens to a verdict.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from workers.ml import checkpoints, report
from workers.ml.atomic import write_folder
from workers.ml.candidate import Candidate
from workers.ml.candidate_folder import assemble, candidate_from_disk, save_candidate
from workers.ml.chat import padding_id
from workers.ml.customer_rows import as_prompt
from workers.ml.digests import digest_folder
from workers.ml.evals.confirm import Confirmation, confirm
from workers.ml.evals.measure import AnswerSettings, Examiner
from workers.ml.evals.sets import EvaluationSets
from workers.ml.jobspec import RecoveryPlan
from workers.ml.jsonlines import finite
from workers.ml.preparation import Prepared, prepare
from workers.ml.recovery.dial import RecoveryInputs
from workers.ml.recovery.pictures import AFFINITY_PICTURE, TRACE_PICTURE, affinity_picture, trace_picture
from workers.ml.recovery.run import step_method
from workers.ml.recovery.search import search
from workers.ml.recovery.specs import MethodSpec, default_specs
from workers.ml.recovery.trace import SearchPlan, SearchResult
from workers.ml.tuned_model import TunedModel
from workers.ml.tuning.loop import Run, TrainingData, TuningResult
from workers.ml.tuning.lora_vector import LoraVector
from workers.ml.tuning.metrics import MetricsFiles
from workers.ml.tuning.steps import PlainStep, StepMethod
from workers.ml.types import Progress, Stage

STAGES = (Stage.TRAINING, Stage.RECOVERING, Stage.GATING)
CANDIDATE_FOLDER, REPORT_FILE, ANSWERS_FILE = "candidate", "report.json", "answers.jsonl"


@dataclass(frozen=True)
class Outcome:
    """What a finished run says of itself; paths are relative to the run's folder."""

    verdict: str
    candidate_digest: str
    candidate: str
    report: str
    trained_tokens: int
    recovery: dict[str, Any] | None


@dataclass
class _Walk:
    """What the stages hand on."""

    folder: Path
    prepared: Prepared
    progress: Progress
    tuned: TunedModel
    examiner: Examiner
    candidates: list[Path] = field(default_factory=list)  # adapters on disk, least change first
    tuning: TuningResult | None = None
    found: SearchResult | None = None
    seconds: dict[str, float] = field(default_factory=dict)


def run(folder: Path, progress: Progress) -> Outcome:
    """Walks the stages for the job in `folder` (`job.json`, `input/`, `sets/`) and leaves `out/`."""
    began = time.monotonic()
    prepared = prepare(folder, progress)
    progress.event("Hyperparameters resolved.", hyperparameters=_hyperparameters(prepared), reasons=prepared.reasons)
    walk = _open(folder, prepared, progress)
    walk.seconds["preparing"] = time.monotonic() - began
    for stage, step in zip(STAGES, (_train, _recover, _gate), strict=True):
        began = time.monotonic()
        progress.stage(stage)
        confirmations = step(walk)
        walk.seconds[stage] = time.monotonic() - began
    assert confirmations is not None
    return _conclude(walk, confirmations)


def _hyperparameters(prepared: Prepared) -> dict[str, float]:
    """What "auto" became, in the words of the request."""
    settings = prepared.settings
    return {
        "n_epochs": settings.n_epochs,
        "batch_size": settings.batch_size,
        "learning_rate_multiplier": settings.learning_rate / prepared.spec.tuning.base_learning_rate,
    }


def _open(folder: Path, prepared: Prepared, progress: Progress) -> _Walk:
    settings = prepared.settings
    model = checkpoints.attach_adapter(prepared.base, settings.lora, seed=settings.seed)
    tokenizer = prepared.base.tokenizer
    tuned = TunedModel(model, tokenizer, LoraVector(model), settings.context_limit, settings.micro_batch_tokens)
    answers = AnswerSettings(prepared.spec.max_answer_tokens, prepared.task_answer_tokens)
    examiner = Examiner(prepared.judge, answers, progress, base_digest=prepared.base.digest)
    return _Walk(folder, prepared, progress, tuned, examiner)


def _train(walk: _Walk) -> None:
    """The raw fine-tune, on every row of the training part, whatever it teaches. With a training method of the plan the
    raw fine-tune is the one that this method made; recovery and gate go on from there as from any other."""
    prepared, out = walk.prepared, walk.folder / "out" / "train"
    method = _step_method(walk)
    data = TrainingData(rows=prepared.train, held_out=prepared.validation, pad_id=padding_id(prepared.base.tokenizer))
    with MetricsFiles(out, walk.progress) as metrics:
        walk.tuning = Run(walk.tuned.model, data, settings=prepared.settings, progress=metrics).walk(method)
    checkpoints.save_adapter(walk.tuned.model, out / "adapter", base_name=prepared.spec.base.name)


def _step_method(walk: _Walk) -> StepMethod:
    """How each step finds its gradient; what a method needs and does not find is refused here, before any step."""
    training = walk.prepared.spec.recovery.training
    if training is None:
        return PlainStep()
    return step_method(walk.tuned, training, RecoveryInputs(harmful=walk.prepared.sets["harmful"]), walk.progress)


def _recover(walk: _Walk) -> None:
    """The search's proposals, least change first, each saved as an adapter. None: nothing passed the selection."""
    prepared, plan = walk.prepared, walk.prepared.spec.recovery
    out = walk.folder / "out" / "recover"
    if not prepared.rows.gate:
        # The gate cannot pass any model without a clean row of the task; searching would only cost time.
        walk.progress.event("Recovery skipped: no clean held-out row of the customer's task is left.", level="warn")
        return
    if plan.mode == "none":
        _save_candidates(walk, [Candidate(walk.tuned.vector.get())])
        return
    walk.found = search(
        walk.tuned,
        SearchPlan(
            _specs(plan),
            prepared.spec.limits,
            plan.budget_seconds,
            plan.budget_evaluations,
            refinements=0 if plan.mode == "fixed" else 1,
        ),
        inputs=RecoveryInputs(
            harmful=prepared.sets["harmful"],
            refusals=prepared.sets["refusals"],
            retention=prepared.sets["retention"],
            task=prepared.rows.recovery,
            pretrained=prepared.spec.base.pretrained,
        ),
        sets=_sets(prepared, "selection"),
        examiner=walk.examiner,
        progress=walk.progress,
    )
    write_folder(out / "trace", {"trace.json": _json(walk.found.as_json())})
    _save_candidates(walk, walk.found.candidates)


def _specs(plan: RecoveryPlan) -> Sequence[MethodSpec]:
    """`fixed` asks for exactly the strength of each spec, whatever its dial."""
    specs = plan.specs or default_specs()
    return [spec.model_copy(update={"dial": (spec.strength,)}) for spec in specs] if plan.mode == "fixed" else specs


def _save_candidates(walk: _Walk, candidates: Sequence[Candidate]) -> None:
    for number, candidate in enumerate(candidates[: walk.prepared.spec.limits.planned_confirmations]):
        target = walk.folder / "out" / "recover" / f"{CANDIDATE_FOLDER}-{number}"
        save_candidate(walk.tuned, candidate, target, base_name=walk.prepared.spec.base.name)
        walk.candidates.append(target)


def _gate(walk: _Walk) -> list[Confirmation]:
    """Confirms candidates as they lie on disk, on prompts that nothing was trained, recovered or chosen on."""
    prepared = walk.prepared
    adapters = walk.candidates
    confirmations = confirm(
        walk.tuned,
        [candidate_from_disk(walk.tuned, adapter, prepared.base.model) for adapter in adapters],
        sets=_sets(prepared, "confirmation"),
        examiner=walk.examiner,
        limits=prepared.spec.limits,
        flagged_task_rows=int(prepared.rows.counts["held_out_rows_flagged"]),
    )
    if walk.found is not None:
        walk.found = walk.found.confirmed(confirmations[-1].number)
    judged = adapters[confirmations[-1].number] if adapters else walk.folder / "out" / "train" / "adapter"
    assemble(judged, prepared.spec.base.path, walk.folder / "out" / "gate" / CANDIDATE_FOLDER)
    return confirmations


def _sets(prepared: Prepared, purpose: str) -> EvaluationSets:
    rows = {"selection": prepared.rows.selection, "confirmation": prepared.rows.gate}[purpose]
    return EvaluationSets(
        harm=tuple(prepared.sets[f"harm_{purpose}"]),
        harmless=tuple(prepared.sets[f"harmless_{purpose}"]),
        task=tuple(as_prompt(row) for row in rows),
    )


def _conclude(walk: _Walk, confirmations: list[Confirmation]) -> Outcome:
    """The report beside the candidate it speaks of."""
    assert walk.tuning is not None
    gate = walk.folder / "out" / "gate"
    digest = digest_folder(gate / CANDIDATE_FOLDER).digest
    document = report.build(
        walk.prepared,
        walk.tuning,
        walk.found,
        confirmations,
        candidate_digest=digest,
        seconds=walk.seconds,
    )
    files = {REPORT_FILE: _json(document), ANSWERS_FILE: _answers(confirmations)}
    if walk.found is not None and walk.found.trace:
        files |= {TRACE_PICTURE: trace_picture(walk.found), AFFINITY_PICTURE: affinity_picture(walk.found)}
    write_folder(gate / "evidence", files)
    return Outcome(
        verdict=document["verdict"],
        candidate_digest=digest,
        candidate=f"out/gate/{CANDIDATE_FOLDER}",
        report=f"out/gate/evidence/{REPORT_FILE}",
        trained_tokens=walk.tuning.trained_tokens,
        recovery=document["recovery"]["taken"],
    )


def _answers(confirmations: list[Confirmation]) -> bytes:
    """Every answer the gate read, with its judgement: evidence for the provider, not for customers."""
    lines = []
    for one in confirmations:
        for answered in (*one.candidate.harm, *one.candidate.harmless):
            judgement = asdict(answered.judgement)
            record = {"confirmation": one.number, "row": answered.row.id, "answer": answered.answer, **judgement}
            lines.append(json.dumps(record, ensure_ascii=False, sort_keys=True))
    return ("\n".join(lines) + "\n").encode()


def _json(document: Mapping[str, Any]) -> bytes:
    """Strict JSON: a figure that is not a number has no place in a report and is written as null."""
    return (json.dumps(finite(document), ensure_ascii=False, indent=1, sort_keys=True) + "\n").encode()
