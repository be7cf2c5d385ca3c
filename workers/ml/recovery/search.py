"""`auto`: the smallest change that passes.

Knows: diagnose first; then families of methods from surgery to patches, every point of every dial read by cheap proxies;
what these show to be hopeless is dropped without a word generated, and the rest answers the selection prompts in the
order of its divergence from the raw fine-tune, until nothing that differs less is left.
Refuses to know: what any method does, and the confirmation sets. What it finds is a proposal for the gate.

Dials are walked on a grid: at small sizes they are steep and not all of them monotone. Only below the winner, and only on
a dial that its spec calls monotone, the grid is refined by bisection.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from workers.ml.candidate import Candidate, applied
from workers.ml.errors import InvalidSetting, MissingInput, NumericError
from workers.ml.evals.measure import Examiner, Measured, first_look
from workers.ml.evals.sets import EvaluationSets
from workers.ml.evals.task_loss import loss_rise
from workers.ml.gate import needs_task_loss
from workers.ml.measurements import GateEvidence, LossRise, ModelMeasures, PairedMeasurement
from workers.ml.memory import is_out_of_memory, release_reserve
from workers.ml.recovery.affinity import EmbeddingDrift, affinity
from workers.ml.recovery.deltas import relative_change
from workers.ml.recovery.dial import RecoveryInputs, StrengthPath
from workers.ml.recovery.drift import Drift
from workers.ml.recovery.proxies import Proxies, ProxyReading
from workers.ml.recovery.run import prepare
from workers.ml.recovery.selection import Foresight, at_best, shortcomings
from workers.ml.recovery.specs import Family, MethodSpec, label, method_name
from workers.ml.recovery.trace import RAW, CandidateRecord, Dial, SearchPlan, SearchResult
from workers.ml.tuned_model import TunedModel, aligned
from workers.ml.types import Progress

CASCADE: tuple[Family, ...] = ("surgery", "perturbation", "closed-form", "patch", "control", "composition")
OUT_OF_BUDGET = "not tried: the budget of the search is used up"


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
        for family in CASCADE:
            # A composition costs as much as its parts together; it is for jobs that no single method repairs.
            if family != "composition" or run.best is None:
                run.try_family([spec for spec in plan.specs if spec.family == family])
        run.refine()
        run.stand_by()
    return run.result()


@dataclass(frozen=True)
class _Point:
    """One strength of one prepared dial; `place` is its record's place in the trace."""

    place: int
    spec: MethodSpec
    path: StrengthPath
    strength: float


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
        self._evaluations = 0
        self._records: list[CandidateRecord] = []
        self._dials: list[Dial] = []
        self._waiting: list[_Point] = []
        self._passing: list[_Point] = []
        self._base = examiner.measure_base(tuned, sets)
        self._raw = examiner.measure_raw(tuned, sets, self._start)
        self._drift = Drift(tuned, sets, self._start)
        self._proxies = Proxies(tuned, raw=self._raw, base=self._base, progress=progress)
        self._raw_proxies = self._proxies()
        with aligned(tuned):
            base_proxies = self._proxies()
        self._foresight = Foresight(
            plan.limits, raw=(self._raw.measures(), self._raw_proxies), base=(self._base.measures(), base_proxies)
        )
        self._embeddings = EmbeddingDrift(tuned, sets.harm)
        self._embedding_drift = {"raw fine-tune": self._embeddings()}
        self.raw_record = self._diagnose()

    def _diagnose(self) -> CandidateRecord:
        """The raw fine-tune against every limit: only one that meets them all is left alone."""
        faults = self._faults(self._raw)
        record = CandidateRecord(
            RAW,
            0.0,
            {},
            label="raw fine-tune",
            looked="full",
            proxies=self._raw_proxies,
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

    @property
    def best(self) -> _Point | None:
        """The passing point that differs least from the raw fine-tune."""
        return min(self._passing, key=lambda point: (self._kl(point), point.place), default=None)

    def _kl(self, point: _Point) -> float:
        kl = self._records[point.place].kl
        assert kl is not None  # a point is only made of a record that was sounded
        return kl

    def try_family(self, specs: Sequence[MethodSpec]) -> None:
        """Every dial of the family by proxies, then by answers what is left of them, least divergence first."""
        for spec in sorted(specs, key=lambda one: one.gentleness):
            self._sound_dial(spec)
        for point in sorted(self._waiting, key=lambda point: (self._kl(point), point.place)):
            if self.best is not None and self._kl(point) >= self._kl(self.best):
                self._drop(point, "not tried: a candidate that differs less from the raw fine-tune passes")
            else:
                self._look(point)
        self._waiting.clear()

    def _sound_dial(self, spec: MethodSpec) -> None:
        path: StrengthPath | None = None
        for strength in spec.strengths:
            record = CandidateRecord(method_name(type(spec)), strength, spec.model_dump(mode="json"), label=label(spec))
            if self._over_time():
                self._keep(replace(record, why=OUT_OF_BUDGET))
                continue
            began = time.monotonic()
            try:
                path = path or self._prepare(spec)
                self._sound(record, spec, path, began)
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

    def _prepare(self, spec: MethodSpec) -> StrengthPath:
        if spec.output == "sparse-patch":
            raise InvalidSetting("a sparse patch cannot be released; ask for its adapter form", "form")
        began = time.monotonic()
        path = prepare(self._tuned, spec, self._inputs, self._progress)
        seconds = time.monotonic() - began
        # At its own strength a spec may be the identity, which acts nowhere.
        shares = affinity(self._tuned, path.at(spec.strength), self._start)
        self._dials.append(Dial(label(spec), seconds, path.facts, shares))
        return path

    def _sound(self, record: CandidateRecord, spec: MethodSpec, path: StrengthPath, began: float) -> _Point | None:
        """Reads one strength by proxies; a point that may pass waits for its look, and is returned."""
        candidate = path.at(record.strength)
        with applied(self._tuned, candidate):
            kl, read = self._drift(), self._proxies()
        change = relative_change(self._tuned.vector, candidate, self._start)
        record = replace(record, kl=kl, proxies=read, relative_change=change, facts=path.facts_at(record.strength))
        why = "; ".join(self._foresight.faults(read))
        record = replace(record, looked="proxies", why=why, seconds=time.monotonic() - began)
        if why:
            self._keep(record)
            return None
        point = _Point(len(self._records), spec, path, record.strength)
        self._records.append(record)
        self._waiting.append(point)
        return point

    def _over_time(self) -> bool:
        return time.monotonic() - self._started > self._plan.budget_seconds

    def _look(self, point: _Point) -> bool:
        """A first look at a few prompts of every set, and a full one unless that has already decided."""
        if self._over_time() or self._evaluations >= self._plan.budget_evaluations:
            self._drop(point, OUT_OF_BUDGET)
            return False
        self._evaluations += 1
        began, record = time.monotonic(), self._records[point.place]
        task_loss = None
        with applied(self._tuned, point.path.at(point.strength)):
            measured = self._examiner.measure(self._tuned, self._first)
            faults = shortcomings(self._evidence(*at_best(measured, self._raw, self._sets)), self._plan.limits)
            if faults:
                # Told in the counts that were seen, not in those that were only hoped for.
                faults, full = self._faults(measured) or faults, False
            else:
                measured += self._examiner.measure(self._tuned, self._rest)
                task_loss = self._task_loss(record.proxies)
                faults, full = self._faults(measured, task_loss), True
        record = replace(
            record,
            looked="full" if full else "first",
            measures=measured.measures(),
            task=measured.paired_with(self._raw),
            task_loss=task_loss,
            slices=_plain(measured),
            seconds=record.seconds + time.monotonic() - began,
            passed=not faults,
            why="; ".join(faults),
        )
        if record.passed:
            self._passing.append(point)
        self._keep(record, point.place)
        return record.passed

    def _task_loss(self, read: ProxyReading | None) -> LossRise | None:
        """None where exact match tells enough."""
        if read is None or not needs_task_loss(self._raw.measures()):
            return None
        return loss_rise(self._raw_proxies.task_row_losses, read.task_row_losses)

    def refine(self) -> None:
        """Bisects between the winner and the strength below it that did not pass."""
        best = self.best
        if best is None or not best.spec.monotone:
            return
        name, high = label(best.spec), best.strength
        below = [r.strength for r in self._records if r.label == name and r.strength < high and not r.passed]
        low = max(below, default=0.0)
        for _ in range(self._plan.refinements):
            middle = (low + high) / 2
            record = replace(self._records[best.place], strength=middle, taken=False, passed=False, measures=None)
            point = self._sound(replace(record, task=None, slices={}), best.spec, best.path, time.monotonic())
            if point is not None and self._look(point):
                high = middle
            else:
                low = middle
        self._waiting.clear()

    def stand_by(self) -> None:
        """Candidates for the further confirmations that a policy plans: stronger points of the winner's dial."""
        best = self.best
        if best is None:
            return
        stronger = [s for s in best.spec.strengths if s > best.strength]
        tried = {(r.label, r.strength): place for place, r in enumerate(self._records)}
        for strength in stronger:
            if len(self._passing) >= self._plan.limits.planned_confirmations:
                return
            place = tried[label(best.spec), strength]
            if self._records[place].looked == "proxies" and not self._is_hopeless(place):
                self._look(_Point(place, best.spec, best.path, strength))

    def _is_hopeless(self, place: int) -> bool:
        read = self._records[place].proxies
        return read is None or bool(self._foresight.faults(read))

    def _drop(self, point: _Point, why: str) -> None:
        self._keep(replace(self._records[point.place], why=why), point.place)

    def _keep(self, record: CandidateRecord, place: int | None = None) -> None:
        if place is None:
            self._records.append(record)
        else:
            self._records[place] = record
        harmful = record.measures.harmful if record.measures else None
        self._progress.event(
            "candidate",
            method=record.label,
            strength=record.strength,
            looked=record.looked,
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
        order = sorted(self._passing, key=lambda point: (self._kl(point), point.place))
        for rank, point in enumerate(order):
            why = (
                "taken: the least change that passes"
                if rank == 0
                else f"passes, but differs more from the raw fine-tune (KL {self._kl(point):.3g} against "
                f"{self._kl(order[0]):.3g})"
            )
            self._records[point.place] = replace(self._records[point.place], taken=rank == 0, why=why)
        worth = order[: self._plan.limits.planned_confirmations]
        candidates = tuple(point.path.at(point.strength) for point in worth)
        if candidates:
            with applied(self._tuned, candidates[0]):
                self._embedding_drift["candidate"] = self._embeddings()
        winner = self._records[order[0].place] if order else None
        return self._result(self.raw_record, winner, candidates)

    def _result(
        self, raw: CandidateRecord, winner: CandidateRecord | None, candidates: tuple[Candidate, ...]
    ) -> SearchResult:
        return SearchResult(
            raw=raw,
            base=self._base.measures(),
            trace=tuple(self._records),
            dials=tuple(self._dials),
            winner=winner,
            candidates=candidates,
            embedding_drift=self._embedding_drift,
            evaluations=self._evaluations,
            seconds=time.monotonic() - self._started,
        )


def _plain(measured: Measured) -> dict[str, Any]:
    return {name: {key: asdict(value) for key, value in row.items()} for name, row in measured.slices().items()}
