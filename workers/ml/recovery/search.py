"""`auto`: the smallest change that passes.

Knows: diagnose first, then methods from the gentlest to the strongest, each dial upwards on its grid; every candidate
is recorded with what was measured and why it was or was not taken; among those that pass, the one whose answers differ
least from the raw fine-tune's wins.
Refuses to know: what any method does, and the confirmation sets. What it finds is a proposal for the gate.

Dials are walked on a grid and not bisected: at small sizes they are steep and not all of them monotone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from workers.ml.candidate import Candidate, applied
from workers.ml.errors import InvalidSetting, MissingInput, NumericError
from workers.ml.evals.measure import Examiner, Measured, first_look
from workers.ml.evals.sets import EvaluationSets
from workers.ml.evals.task_loss import answer_losses, loss_rise
from workers.ml.gate import GateLimits, needs_task_loss
from workers.ml.measurements import GateEvidence, LossRise, ModelMeasures, PairedMeasurement
from workers.ml.memory import is_out_of_memory, release_reserve
from workers.ml.recovery.deltas import relative_change
from workers.ml.recovery.dial import RecoveryInputs, StrengthPath
from workers.ml.recovery.drift import Drift
from workers.ml.recovery.run import prepare
from workers.ml.recovery.selection import at_best, shortcomings
from workers.ml.recovery.specs import MethodSpec, method_name
from workers.ml.tuned_model import TunedModel
from workers.ml.types import Progress

RAW = "none"  # the method name of the fine-tune as it came out of training


@dataclass(frozen=True)
class SearchPlan:
    """What may be tried, what must be reached, and how long it may take."""

    specs: Sequence[MethodSpec]
    limits: GateLimits
    budget_seconds: float = 600.0
    budget_evaluations: int = 64
    first_look_rows: int = 24
    passing_per_method: int = 2  # a second, stronger candidate stands by for a second confirmation


@dataclass(frozen=True)
class CandidateRecord:
    """One point on one dial. `looked`: "full", "first" (hopeless after the first prompts) or "" (not tried)."""

    method: str
    strength: float
    spec: dict[str, Any]
    looked: str = ""
    measures: ModelMeasures | None = None
    task: PairedMeasurement | None = None
    task_loss: LossRise | None = None
    slices: dict[str, Any] = field(default_factory=dict)
    kl: float | None = None
    relative_change: float | None = None
    seconds: float = 0.0
    passed: bool = False
    taken: bool = False
    why: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class SearchResult:
    """`candidates` are the passing points as vectors, least change first; `winner` is the record of the first."""

    raw: CandidateRecord
    base: ModelMeasures
    trace: tuple[CandidateRecord, ...]
    winner: CandidateRecord | None
    candidates: tuple[Candidate, ...]
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """Everything but the vectors."""
        return {
            "raw": self.raw.as_json(),
            "base": asdict(self.base),
            "trace": [record.as_json() for record in self.trace],
            "winner": self.winner.as_json() if self.winner else None,
            "seconds": self.seconds,
        }


def search(
    tuned: TunedModel,
    plan: SearchPlan,
    *,
    inputs: RecoveryInputs,
    sets: EvaluationSets,
    examiner: Examiner,
    progress: Progress,
) -> SearchResult:
    """Finds the least change that passes on the selection sets. The adapter ends where it began."""
    run = _Search(tuned, plan, inputs, sets, examiner, progress)
    if not run.raw_record.passed:
        for spec in sorted(plan.specs, key=lambda one: one.gentleness):
            run.walk(spec)
    return run.result()


class _Search:
    """The state of one search."""

    def __init__(
        self,
        tuned: TunedModel,
        plan: SearchPlan,
        inputs: RecoveryInputs,
        sets: EvaluationSets,
        examiner: Examiner,
        progress: Progress,
    ) -> None:
        self._started = time.monotonic()
        self._tuned, self._plan, self._inputs, self._sets = tuned, plan, inputs, sets
        self._examiner, self._progress = examiner, progress
        self._start = tuned.vector.get()
        self._first, self._rest = first_look(sets, rows=plan.first_look_rows)
        self._drift = Drift(tuned, sets, self._start)
        self._evaluations = 0
        self._records: list[CandidateRecord] = []
        self._vectors: dict[int, Candidate] = {}  # passing candidates, by place in the records
        self._base = examiner.measure_base(tuned, sets)
        self._raw = examiner.measure_raw(tuned, sets, self._start)
        self._raw_losses = answer_losses(tuned, sets.task) if needs_task_loss(self._raw.measures()) else None
        self.raw_record = self._diagnose()

    def _diagnose(self) -> CandidateRecord:
        """The raw fine-tune against every limit: only one that meets them all is left alone."""
        faults = self._faults(self._raw)
        record = CandidateRecord(
            RAW,
            0.0,
            {},
            looked="full",
            measures=self._raw.measures(),
            task=self._raw.paired_with(self._raw),
            slices=_plain(self._raw),
            kl=0.0,
            relative_change=0.0,
            seconds=time.monotonic() - self._started,
            passed=not faults,
            why="; ".join(faults),
        )
        self._progress.event("diagnosis", passed=record.passed, why=record.why)
        return record

    def _faults(self, measured: Measured, task_loss: LossRise | None = None) -> list[str]:
        task = measured.paired_with(self._raw)
        return shortcomings(self._evidence(measured.measures(), task, task_loss), self._plan.limits)

    def _evidence(
        self, measures: ModelMeasures, task: PairedMeasurement, task_loss: LossRise | None = None
    ) -> GateEvidence:
        return GateEvidence(self._base.measures(), self._raw.measures(), measures, task, task_loss)

    def _task_loss(self) -> LossRise | None:
        """Of the model as it stands; None where exact match tells enough."""
        if self._raw_losses is None:
            return None
        return loss_rise(self._raw_losses, answer_losses(self._tuned, self._sets.task, self._progress))

    def walk(self, spec: MethodSpec) -> None:
        """One method's dial, upwards, until enough strengths pass."""
        path: StrengthPath | None = None
        # A second spec of one method is a firmer version of it, for jobs that the first did not repair.
        passing = sum(one.passed for one in self._records if one.method == method_name(type(spec)))
        wanted = 1 if passing else self._plan.passing_per_method
        began = time.monotonic()
        for strength in spec.strengths:
            record = CandidateRecord(method_name(type(spec)), strength, spec.model_dump(mode="json"))
            if passing >= wanted:
                self._keep(replace(record, why="not tried: gentler strengths of this method pass"))
                continue
            if self._spent():
                self._keep(replace(record, why="not tried: the budget of the search is used up"))
                continue
            try:
                path = path or prepare(self._tuned, spec, self._inputs, self._progress)
                values = path.at(strength)
                record = self._look(record, values)
            except (NumericError, MissingInput, InvalidSetting) as error:
                self._keep(replace(record, why=f"not tried: {error}", seconds=time.monotonic() - began))
                return
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                # A method that needs more memory than there is must not cost the job the others.
                self._keep(replace(record, why="not tried: out of memory", seconds=time.monotonic() - began))
                release_reserve()
                return
            facts = path.facts_of(strength)
            self._keep(replace(record, facts=facts, seconds=time.monotonic() - began), values)
            passing += record.passed
            began = time.monotonic()

    def _spent(self) -> bool:
        over_time = time.monotonic() - self._started > self._plan.budget_seconds
        return over_time or self._evaluations >= self._plan.budget_evaluations

    def _look(self, record: CandidateRecord, values: Candidate) -> CandidateRecord:
        """A first look at a few prompts of every set, and a full one unless that has already decided."""
        self._evaluations += 1
        change = relative_change(self._tuned.vector, values, self._start)
        with applied(self._tuned, values):
            record = replace(record, kl=self._drift(), relative_change=change)
            measured = self._examiner.measure(self._tuned, self._first)
            faults = shortcomings(self._evidence(*at_best(measured, self._raw, self._sets)), self._plan.limits)
            if faults:
                # Told in the counts that were seen, not in those that were only hoped for.
                faults = self._faults(measured) or faults
                looked = "first"
            else:
                measured += self._examiner.measure(self._tuned, self._rest)
                record = replace(record, task_loss=self._task_loss())
                faults, looked = self._faults(measured, record.task_loss), "full"
        return replace(
            record,
            looked=looked,
            measures=measured.measures(),
            task=measured.paired_with(self._raw),
            slices=_plain(measured),
            passed=not faults,
            why="; ".join(faults),
        )

    def _keep(self, record: CandidateRecord, values: Candidate | None = None) -> None:
        if record.passed and values is not None:
            self._vectors[len(self._records)] = values
        self._records.append(record)
        harmful = record.measures.harmful if record.measures else None
        self._progress.event(
            "candidate",
            method=record.method,
            strength=record.strength,
            passed=record.passed,
            harmful_score=harmful.value if harmful else None,
            kl=record.kl,
            why=record.why,
        )

    def result(self) -> SearchResult:
        """Ranks what passed by its drift and writes down why each was not taken."""
        if self.raw_record.passed:
            raw = replace(self.raw_record, taken=True, why="passes as it is: nothing was changed")
            return self._result(raw, raw, (Candidate(self._start),))
        order = sorted(self._vectors, key=lambda place: (_drift_of(self._records[place]), place))
        for rank, place in enumerate(order):
            record, best = self._records[place], self._records[order[0]]
            why = (
                "taken: the least change that passes"
                if rank == 0
                else f"passes, but differs more from the raw fine-tune (KL {record.kl:.3g} against {best.kl:.3g})"
            )
            self._records[place] = replace(record, taken=rank == 0, why=why)
        winner = self._records[order[0]] if order else None
        return self._result(self.raw_record, winner, tuple(self._vectors[place] for place in order))

    def _result(
        self, raw: CandidateRecord, winner: CandidateRecord | None, candidates: tuple[Candidate, ...]
    ) -> SearchResult:
        seconds = time.monotonic() - self._started
        return SearchResult(raw, self._base.measures(), tuple(self._records), winner, candidates, seconds)


def _drift_of(record: CandidateRecord) -> float:
    assert record.kl is not None  # every candidate that was looked at has one
    return record.kl


def _plain(measured: Measured) -> dict[str, Any]:
    return {name: {key: asdict(value) for key, value in row.items()} for name, row in measured.slices().items()}
